//! The ratios as a picture: one row per figure, further right is better.

use std::fmt::Write as _;

use crate::evaluation::{Evaluation, rounded};
use crate::measures::METRICS;

const WIDTH: f64 = 860.0;
const LEFT: f64 = 190.0;
const RIGHT: f64 = 200.0;
const ROW: f64 = 26.0;
const TOP: f64 = 64.0;
/// Bounds of the logarithmic scale, in times better than the rival.
const LOWEST: f64 = 0.1;
const HIGHEST: f64 = 100.0;

/// Colours for light and for dark backgrounds, as the reader prefers.
const STYLE: &str = "text{font:13px system-ui,sans-serif;fill:#1f2328}.dim{fill:#59636e}\
.grid{stroke:#d1d9e0}.par{stroke:#59636e}.aim{stroke:#9a6700;stroke-width:2}\
.met{stroke:#1a7f37;fill:#1a7f37}.not{stroke:#cf222e;fill:#cf222e}\
.range{stroke-width:3;stroke-linecap:round}\
@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.dim{fill:#9198a1}.grid{stroke:#3d444d}\
.par{stroke:#9198a1}.aim{stroke:#d29922}.met{stroke:#3fb950;fill:#3fb950}.not{stroke:#f85149;fill:#f85149}}";

/// An SVG of every ratio that has an aim.
pub fn plot(evaluation: &Evaluation) -> String {
    let rows: Vec<_> = METRICS
        .iter()
        .filter_map(|metric| Some((metric, metric.aim?, evaluation.ratio(metric)?)))
        .collect();
    let bottom = TOP + ROW * rows.len() as f64;
    let height = bottom + 34.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" role=\"img\" aria-label=\"portpool beside the better of HAProxy and nginx\">\n<style>{STYLE}</style>\n"
    );
    let _ = writeln!(
        svg,
        "<text x=\"8\" y=\"22\" font-weight=\"bold\">portpool, times better than the better of HAProxy and nginx</text>\n<text class=\"dim\" x=\"8\" y=\"42\">dot: median of rounds; line: 95 % interval; upright mark: aim</text>"
    );
    for tick in [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0] {
        let (x, class) = (across(tick), if tick == 1.0 { "par" } else { "grid" });
        let _ = writeln!(
            svg,
            "<line class=\"{class}\" x1=\"{x:.1}\" y1=\"{TOP}\" x2=\"{x:.1}\" y2=\"{bottom}\"/><text class=\"dim\" x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{tick}</text>",
            bottom + 18.0
        );
    }
    for (number, (metric, aim, ratio)) in rows.into_iter().enumerate() {
        let y = TOP + ROW * (number as f64 + 0.5);
        // Where less is better, half as much is twice as good.
        let better = |ratio: f64| if metric.more { ratio } else { 1.0 / ratio };
        let estimate = ratio.estimate;
        let [low, median, high, aim] =
            [estimate.low, estimate.median, estimate.high, aim].map(|ratio| across(better(ratio)));
        let class = if metric.meets(estimate.median) == Some(true) {
            "met"
        } else {
            "not"
        };
        let (text, top, bottom) = (y + 4.0, y - 9.0, y + 9.0);
        let _ = writeln!(
            svg,
            "<text x=\"8\" y=\"{text}\">{}</text><line class=\"aim\" x1=\"{aim:.1}\" y1=\"{top}\" x2=\"{aim:.1}\" y2=\"{bottom}\"/><line class=\"range {class}\" x1=\"{low:.1}\" y1=\"{y}\" x2=\"{high:.1}\" y2=\"{y}\"/><circle class=\"{class}\" cx=\"{median:.1}\" cy=\"{y}\" r=\"5\"/><text class=\"dim\" x=\"{}\" y=\"{text}\">{}× of {}</text>",
            metric.name,
            WIDTH - RIGHT + 12.0,
            rounded(estimate.median),
            ratio.to.name()
        );
    }
    svg.push_str("</svg>\n");
    svg
}

/// The horizontal position of `times` better, in pixels.
fn across(times: f64) -> f64 {
    let part = (times.clamp(LOWEST, HIGHEST) / LOWEST).ln() / (HIGHEST / LOWEST).ln();
    LEFT + part * (WIDTH - LEFT - RIGHT)
}
