//! Servers that become ready and not ready, and many changes at a time.

use std::time::Duration;

use crate::common::cluster::{Space, patch, quick, until};
use serde_json::json;

#[tokio::test]
async fn changes_that_never_pause_do_not_keep_a_pool_from_being_reconciled() {
    let space = Space::with_pool("no-pause", quick(2)).await;
    let pods = space.pods();
    let changing = tokio::spawn(async move {
        for number in 0u64.. {
            let change = json!({ "metadata": { "labels": { "test/number": number.to_string() } } });
            patch(&pods, "games-0", change).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    space.scale("games", 3).await.unwrap();
    let took = until("three", async || space.servers("games").await.len() == 3).await;
    assert!(took < Duration::from_secs(3), "{took:?}");
    assert!(!changing.is_finished(), "{:?}", changing.await);
    changing.abort();
}
