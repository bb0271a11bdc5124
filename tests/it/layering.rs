//! The modules use each other as the documentation of the crate draws it.
//!
//! The rules are read from the heads of the source files. In `src/lib.rs`, or
//! in the file of any module that has modules inside, a `text` block under the
//! heading `# The modules` has one line for each module:
//!
//! ```text
//! name         → other, another  remark
//! one, two     remark
//! ```
//!
//! An arrow means "uses". Two spaces or more begin the remark. A module whose
//! remark says `pure` uses no socket, file, clock, lock or await, and one whose remark
//! says `no tokio` does not use tokio; such a line may also name a module deeper
//! inside, as in `agent::book`. The heading
//! `# The modules of` with a module's name in backticks draws that module's
//! inside from any other file.
//!
//! Every arrow that the code uses is drawn, and every arrow drawn is used. Code
//! for tests only does not count. Every file is a module of its program.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};

use regex::Regex;

/// What a module with a remark does not contain: by name, or as a call that reads the
/// clock.
const FORBIDDEN: [(&str, &str); 2] = [
    ("no tokio", r"\btokio\b"),
    (
        "pure",
        r"\btokio\b|\.await\b|\b(?:Instant|SystemTime|Timestamp|Zoned)::now\b|\b(?:Mutex|RwLock)\b|\bstd::fs\b|\b(?:Tcp|Udp|Unix)(?:Stream|Listener|Socket|Datagram)\b",
    ),
];

/// A module by the names that lead to it, `["agent", "book"]`; the crate's root
/// has none.
type Module = Vec<String>;

/// The source files of a crate without their tests and comments, by module.
struct Sources {
    texts: BTreeMap<Module, String>,
    /// The comments that head them.
    heads: BTreeMap<Module, String>,
}

fn module(path: &str) -> Module {
    let names = path.split("::").filter(|name| !name.is_empty());
    names.map(str::to_owned).collect()
}

/// Finds the Rust files below `folder` with the modules that they are.
fn find_files(folder: &Path, module: &Module, found: &mut Vec<(Module, PathBuf)>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap();
        let inside = [module.as_slice(), &[name.to_owned()]].concat();
        if path.is_dir() && name != "tests" {
            find_files(&path, &inside, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") && name != "tests" {
            let is_root = module.is_empty() && (name == "lib" || name == "main");
            found.push((if is_root { Module::new() } else { inside }, path));
        }
    }
}

/// `text` without comments and without what is compiled for tests only, as
/// rustfmt indents it.
fn code(text: &str) -> String {
    let mut kept = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let indentation = line.len() - line.trim_start().len();
        if line.trim() == "#[cfg(test)]" {
            let is_last = |line: &&str| {
                let is_as_deep = line.len() - line.trim_start().len() == indentation;
                is_as_deep && (line.ends_with(';') || line.trim_start().starts_with('}'))
            };
            lines.by_ref().find(is_last);
            continue;
        }
        kept += line.split("//").next().unwrap_or_default();
        kept.push('\n');
    }
    kept
}

impl Sources {
    /// Those below `folder` of this package; `root` is the root's file.
    fn read(folder: &str, root: &str) -> Self {
        let mut files = Vec::new();
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
        find_files(&folder, &Module::new(), &mut files);
        // A library may have its program beside it, which is another crate.
        files.retain(|(module, path)| !module.is_empty() || path.ends_with(root));
        let text = |path| fs::read_to_string(path).unwrap();
        Self::of(
            files
                .into_iter()
                .map(|(module, path)| (module, text(path)))
                .collect(),
        )
    }

    fn of(files: Vec<(Module, String)>) -> Self {
        let head = |text: &str| {
            let lines = text.lines().map_while(|line| line.strip_prefix("//!"));
            lines.fold(String::new(), |head, line| head + line + "\n")
        };
        Self {
            heads: files
                .iter()
                .map(|(module, text)| (module.clone(), head(text)))
                .collect(),
            texts: files
                .into_iter()
                .map(|(module, text)| (module, code(&text)))
                .collect(),
        }
    }

    /// The module whose file has what `path` leads to.
    fn owner(&self, path: &[String]) -> Module {
        let mut prefixes = (0..=path.len()).rev().map(|length| path[..length].to_vec());
        let owner = prefixes.find(|prefix| self.texts.contains_key(prefix));
        owner.unwrap_or_default()
    }

    /// The other modules that the file of `module` names by a path from
    /// `crate`, `super` or `self`.
    fn uses(&self, module: &Module) -> BTreeSet<Module> {
        let start = Regex::new(r"\b(?:crate|self|super)(?:::super)*::").unwrap();
        let text = &self.texts[module];
        let mut found = BTreeSet::new();
        for head in start.find_iter(text) {
            let mut at = module.clone();
            for name in head.as_str().split("::") {
                match name {
                    "crate" => at.clear(),
                    "super" => drop(at.pop()),
                    _ => {}
                }
            }
            for path in tree(&mut &text[head.end()..], &at) {
                found.insert(self.owner(&path));
            }
        }
        found.remove(module);
        found
    }

    /// The modules right inside `parent`.
    fn children(&self, parent: &Module) -> BTreeSet<String> {
        let inside = self
            .texts
            .keys()
            .filter(|module| module.len() > parent.len() && module.starts_with(parent));
        inside.map(|module| module[parent.len()].clone()).collect()
    }

    /// The arrows that the code uses between the modules right inside `parent`.
    fn used_arrows(&self, parent: &Module) -> BTreeSet<(String, String)> {
        let inside = |module: &Module| {
            let is_inside = module.len() > parent.len() && module.starts_with(parent);
            is_inside.then(|| module[parent.len()].clone())
        };
        let mut arrows = BTreeSet::new();
        for module in self.texts.keys() {
            for used in self.uses(module) {
                if let (Some(from), Some(to)) = (inside(module), inside(&used))
                    && from != to
                {
                    arrows.insert((from, to));
                }
            }
        }
        arrows
    }

    /// Everything in which the code and the drawings disagree.
    fn violations(&self) -> Vec<String> {
        let mut found = Vec::new();
        for drawing in self.heads.iter().flat_map(|(at, head)| drawings(at, head)) {
            let name = drawing.parent.join("::");
            let drawn: BTreeSet<_> = drawing.arrows.iter().cloned().collect();
            let used = self.used_arrows(&drawing.parent);
            let missing = used
                .difference(&drawn)
                .map(|arrow| ("used but not drawn", arrow));
            let idle = drawn
                .difference(&used)
                .map(|arrow| ("drawn but not used", arrow));
            for (what, (from, to)) in missing.chain(idle) {
                found.push(format!("in `{name}`, {from} → {to} is {what}"));
            }
            for child in self.children(&drawing.parent) {
                if !drawing.names.contains(&child) {
                    found.push(format!("in `{name}`, {child} is not drawn"));
                }
            }
            for (remarked, forbidden) in &drawing.without {
                let inside = |module: &&Module| module.starts_with(remarked);
                let mut files = self.texts.keys().filter(inside).peekable();
                if files.peek().is_none() {
                    found.push(format!("`{}` does not exist", remarked.join("::")));
                }
                let forbidden = Regex::new(forbidden).unwrap();
                for module in files {
                    if let Some(used) = forbidden.find(&self.texts[module]) {
                        found.push(format!("{} uses {}", module.join("::"), used.as_str()));
                    }
                }
            }
        }
        found
    }

    /// The modules whose files no `mod` line includes, so that they are never
    /// compiled.
    fn forgotten(&self) -> Vec<String> {
        let line = Regex::new(r"(?m)^(?:pub(?:\([^)]+\))? )?mod (\w+);").unwrap();
        let is_included = |parent: &[String], name: &str| {
            let mut included = self
                .texts
                .get(parent)
                .into_iter()
                .flat_map(|text| line.captures_iter(text));
            included.any(|included| &included[1] == name)
        };
        let is_forgotten = |module: &&Module| {
            let parts = module.split_last();
            parts.is_some_and(|(name, parent)| !is_included(parent, name))
        };
        let forgotten = self.texts.keys().filter(is_forgotten);
        forgotten.map(|module| module.join("::")).collect()
    }

    /// Cycles of files, the shortest through each arrow. A file and the files
    /// inside its module may use each other.
    fn cycles(&self) -> Vec<String> {
        let is_family =
            |one: &Module, other: &Module| one.starts_with(other) || other.starts_with(one);
        let arrows: BTreeMap<&Module, BTreeSet<Module>> = self
            .texts
            .keys()
            .map(|module| {
                let mut uses = self.uses(module);
                uses.retain(|used| !is_family(used, module));
                (module, uses)
            })
            .collect();
        let mut cycles = BTreeSet::new();
        for (&from, uses) in &arrows {
            for to in uses {
                if let Some(mut way) = way_back(&arrows, from, to) {
                    // The same cycle is found from each of its files.
                    let first = (0..way.len()).min_by_key(|&index| &way[index]);
                    way.rotate_left(first.unwrap_or_default());
                    let names: Vec<String> = way.iter().map(|module| module.join("::")).collect();
                    cycles.insert(names.join(" → "));
                }
            }
        }
        cycles.into_iter().collect()
    }
}

/// The shortest cycle that begins `from` → `to`.
fn way_back(
    arrows: &BTreeMap<&Module, BTreeSet<Module>>,
    from: &Module,
    to: &Module,
) -> Option<Vec<Module>> {
    let mut ways = VecDeque::from([vec![from.clone(), to.clone()]]);
    let mut seen = BTreeSet::from([to.clone()]);
    while let Some(way) = ways.pop_front() {
        for next in &arrows[way.last()?] {
            if next == from {
                return Some(way);
            }
            if seen.insert(next.clone()) {
                ways.push_back([way.as_slice(), std::slice::from_ref(next)].concat());
            }
        }
    }
    None
}

/// The paths of a `use` tree, or the one of an expression, that `text` begins
/// with; `text` is left after it.
fn tree(text: &mut &str, at: &Module) -> Vec<Module> {
    let is_name = |sign: char| sign.is_alphanumeric() || sign == '_' || sign == '*';
    *text = text.trim_start();
    if let Some(rest) = text.strip_prefix('{') {
        *text = rest;
        let mut found = Vec::new();
        loop {
            *text = text.trim_start_matches(|sign: char| sign.is_whitespace() || sign == ',');
            match text.strip_prefix('}') {
                Some(rest) => {
                    *text = rest;
                    return found;
                }
                None => {
                    let before = text.len();
                    found.extend(tree(text, at));
                    if let Some(rest) = text.strip_prefix(" as ") {
                        *text = rest.trim_start_matches(is_name);
                    }
                    if text.len() == before {
                        return found;
                    }
                }
            }
        }
    }
    let end = text.find(|sign: char| !is_name(sign)).unwrap_or(text.len());
    let (name, rest) = text.split_at(end);
    let mut path = at.clone();
    if name != "self" && !name.is_empty() {
        path.push(name.to_owned());
    }
    match rest.strip_prefix("::") {
        Some(rest) => {
            *text = rest;
            tree(text, &path)
        }
        None => {
            *text = rest;
            vec![path]
        }
    }
}

/// What a block under `# The modules` says of the modules inside `parent`.
#[derive(Default)]
struct Drawing {
    parent: Module,
    names: BTreeSet<String>,
    arrows: Vec<(String, String)>,
    /// Modules, and what their files do not contain.
    without: Vec<(Module, &'static str)>,
}

/// The drawings in `head`, which heads the file of module `at`.
fn drawings(at: &Module, head: &str) -> Vec<Drawing> {
    let heading = Regex::new(r"^ #+ The modules(?: of `([\w:]+)`)?$").unwrap();
    let line = Regex::new(r"^ ([\w:]+(?:, [\w:]+)*)(?: +→ ([\w:]+(?:, [\w:]+)*))?(?:  +(.*))?$");
    let line = line.unwrap();
    let mut found: Vec<Drawing> = Vec::new();
    let (mut is_under, mut is_block) = (false, false);
    for text in head.lines() {
        if let Some(heading) = heading.captures(text) {
            let parent = heading
                .get(1)
                .map_or(at.clone(), |name| module(name.as_str()));
            found.push(Drawing {
                parent,
                ..Drawing::default()
            });
            is_under = true;
        } else if text.starts_with(" #") {
            is_under = false;
        } else if text.starts_with(" ```") {
            is_block = !is_block;
        } else if is_under && is_block && !text.trim().is_empty() {
            let parts = line.captures(text);
            let parts = parts.unwrap_or_else(|| panic!("not a line of a drawing: {text}"));
            let drawing = found.last_mut().unwrap();
            let remark = parts.get(3).map_or("", |remark| remark.as_str());
            let mut forbidden = FORBIDDEN.iter();
            let forbidden = forbidden.find(|(word, _)| remark.contains(word));
            for name in parts[1].split(", ") {
                let path = [drawing.parent.clone(), module(name)].concat();
                drawing.names.insert(name.to_owned());
                drawing
                    .without
                    .extend(forbidden.map(|(_, forbidden)| (path, *forbidden)));
                for used in parts
                    .get(2)
                    .iter()
                    .flat_map(|used| used.as_str().split(", "))
                {
                    drawing.arrows.push((name.to_owned(), used.to_owned()));
                }
            }
        }
    }
    found
}

#[test]
fn modules_use_each_other_as_drawn() {
    let sources = Sources::read("src", "lib.rs");
    assert!(sources.texts.len() > 30);
    assert!(!drawings(&Module::new(), &sources.heads[&Module::new()]).is_empty());
    let found = sources.violations();
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn files_do_not_use_each_other_in_a_cycle() {
    let mut found = Vec::new();
    for (folder, root) in [
        ("src", "lib.rs"),
        ("bench/compare", "main.rs"),
        ("bench/soak", "main.rs"),
    ] {
        found.extend(Sources::read(folder, root).cycles());
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn every_file_is_a_module() {
    for (folder, root) in [
        ("src", "lib.rs"),
        ("tests/it", "main.rs"),
        ("tests/e2e", "main.rs"),
        ("tests/robustness", "main.rs"),
        ("bench/compare", "main.rs"),
        ("bench/soak", "main.rs"),
    ] {
        let sources = Sources::read(folder, root);
        assert!(sources.texts.len() > 1, "{folder} has files");
        let found = sources.forgotten();
        assert!(
            found.is_empty(),
            "no `mod` line in {folder} includes {}",
            found.join(", ")
        );
    }
}

#[test]
fn kubes_client_is_used_at_the_edge_only() {
    let sources = Sources::read("src", "lib.rs");
    let is_edge = |at: &Module| {
        let places = ["operator", "cluster", "follow::config_map"];
        places.iter().any(|place| at.starts_with(&module(place)))
    };
    let client = Regex::new(r"\bkube::(?:\{[^;]*\b)?(?:Client|client|Api)\b").unwrap();
    for (at, text) in &sources.texts {
        let is_used = client.is_match(text);
        assert!(
            is_edge(at) || !is_used,
            "{} uses kube's client",
            at.join("::")
        );
    }
}

/// Sources with these files.
fn sample(files: &[(&str, &str)]) -> Sources {
    let files = files
        .iter()
        .map(|(path, text)| (module(path), (*text).to_owned()));
    Sources::of(files.collect())
}

const DRAWN: &str = "\
//! # The modules
//!
//! ```text
//! one        → two  pure
//! two        a remark
//! two::deep  no tokio
//! ```
";

#[test]
fn an_arrow_that_is_not_drawn_or_not_used_is_found() {
    let violations = |one: &str, two: &str, deep: &str| {
        sample(&[("", DRAWN), ("one", one), ("two", two), ("two::deep", deep)]).violations()
    };
    let used = "use crate::{two::{self, deep}};";
    assert!(violations(used, "", "").is_empty());
    assert!(violations("fn f() { super::two::deep::g() }", "", "").is_empty());
    assert_eq!(
        violations("", "", ""),
        ["in ``, one → two is drawn but not used"]
    );
    for back in [
        "use crate::one;",
        "use crate::{\n    x,\n    one::Y,\n};",
        "fn f(x: super::one::Y) {}",
    ] {
        assert_eq!(
            violations(used, back, ""),
            ["in ``, two → one is used but not drawn"]
        );
    }
    assert!(violations(used, "", "use super::super::one;")[0].contains("two → one"));
    assert!(
        violations(
            used,
            "#[cfg(test)]\nmod tests {\n    use crate::one;\n}\n",
            ""
        )
        .is_empty()
    );
    assert!(violations(used, "// See crate::one::X.", "").is_empty());
    assert_eq!(violations(used, "use tokio::time;", ""), [""; 0]);
    assert_eq!(
        violations(used, "", "use tokio::time;"),
        ["two::deep uses tokio"]
    );
    assert!(violations(used, "", "fn f() { Instant::now(); }").is_empty());
    let one = |code: &str| violations(&format!("{used}\n{code}"), "", "");
    assert_eq!(one("fn f() { Instant::now(); }"), ["one uses Instant::now"]);
    assert_eq!(one("use std::net::TcpStream;"), ["one uses TcpStream"]);
    assert_eq!(one("async fn f() { g().await }"), ["one uses .await"]);
    assert_eq!(
        sample(&[
            ("", DRAWN),
            ("one", used),
            ("two", ""),
            ("two::deep", ""),
            ("new", "")
        ])
        .violations(),
        ["in ``, new is not drawn"]
    );
}

#[test]
fn a_file_that_is_no_module_is_found() {
    let of_root =
        |root: &str| sample(&[("", root), ("a", "mod b;"), ("a::b", ""), ("c", "")]).forgotten();
    assert!(of_root("pub(crate) mod a;\nmod c;").is_empty());
    assert_eq!(of_root("mod a;\n// mod c;"), ["c"]);
    assert_eq!(of_root("mod c;\nmod ab;"), ["a"]);
}

#[test]
fn a_cycle_is_found() {
    let with = |last: &str| {
        let files = [
            ("", ""),
            ("a", "use crate::b::X;"),
            ("b", "use crate::c;"),
            ("b::d", "use super::X;"),
            ("c", last),
        ];
        sample(&files).cycles()
    };
    assert!(with("use crate::X;").is_empty());
    assert_eq!(with("use crate::b::Y;"), ["b → c"]);
    assert_eq!(with("use super::a::Z;"), ["a → b → c"]);
}
