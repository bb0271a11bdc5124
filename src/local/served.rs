//! How many sessions a processing server has had, as its agent counts them.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The sample of the agent's metrics that counts sessions (`agent::metrics`).
const SAMPLE: &str = "portpool_selections_total{outcome=\"SELECTED\"} ";

/// How long an agent may take to answer. It is on this machine.
const DEADLINE: Duration = Duration::from_secs(1);

/// Number of sessions since the agent started whose admin pages are at `admin`;
/// `None` when it does not answer.
pub(super) async fn sessions(admin: SocketAddr) -> Option<u64> {
    let metrics = tokio::time::timeout(DEADLINE, metrics(admin)).await;
    Some(count(&metrics.ok()?.ok()?))
}

async fn metrics(admin: SocketAddr) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(admin).await?;
    let request = format!("GET /metrics HTTP/1.1\r\nhost: {admin}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

/// The sessions in the text of `metrics`: none before the first.
fn count(metrics: &str) -> u64 {
    let value = metrics.lines().find_map(|line| line.strip_prefix(SAMPLE));
    value
        .and_then(|value| value.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use prometheus_client::registry::Registry;

    use super::*;

    #[test]
    fn the_sessions_are_those_that_the_agent_counts() {
        let mut registry = Registry::default();
        let tables = crate::follow::RejectedTables::default();
        let agent = Arc::new(crate::agent::metrics::Metrics::new(&mut registry, tables));
        let text = |registry: &Registry| {
            let mut text = String::new();
            prometheus_client::encoding::text::encode(&mut text, registry).unwrap();
            text
        };
        assert_eq!(count(&text(&registry)), 0);
        agent.selected(None);
        agent.selected(None);
        agent.selected(Some(crate::selection::RefusalCause::NoFreePort));
        assert_eq!(count(&text(&registry)), 2);
    }
}
