//! The examples with a real API server, which checks the pods that come of them.

use std::path::Path;

use crate::common::cluster::{Space, delete};
use portpool::manifest;

#[tokio::test]
async fn every_example_becomes_pods_that_the_api_server_takes() {
    let space = Space::new("examples").await;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    for file in std::fs::read_dir(folder).unwrap() {
        let example = manifest::load(&file.unwrap().path()).unwrap();
        let pool = &example.pool;
        let spec = example.fields()["spec"].clone();
        space.make_ready(&pool.name, spec).await;
        let pods = space.servers(&pool.name).await;
        assert_eq!(pods.len(), pool.replicas as usize, "{}", pool.name);
        delete(&space.pools(), &pool.name).await;
    }
}
