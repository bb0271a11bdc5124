//! The OpenAPI document against validators of others, and the API against its
//! document. `make openapi` installs the programs and names their folder.

use std::process::Command;

use crate::common::Pool;

/// Runs `program` and panics with its output unless it succeeds.
fn run(program: &str, arguments: &[&str]) {
    let folder = std::env::var("PORTPOOL_OPENAPI").expect("make openapi sets PORTPOOL_OPENAPI");
    // Programs may write caches where they run.
    let scratch = tempfile::tempdir().unwrap();
    let output = Command::new(format!("{folder}/bin/{program}"))
        .args(arguments)
        .current_dir(&scratch)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = [&output.stdout[..], &output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
}

#[test]
#[ignore = "needs Python and Go: make openapi"]
fn validators_accept_the_documents() {
    for document in [
        "openapi.json",
        "openapi-admin.json",
        "openapi-workload.json",
    ] {
        let path = format!("{}/docs/{document}", env!("CARGO_MANIFEST_DIR"));
        run("openapi-spec-validator", &[&path]);
        run("openapi-check", &[&path]);
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs Python and Go: make openapi"]
async fn every_answer_to_generated_requests_is_as_the_document_says() {
    // Requests wait at most until a session ends because its client never comes.
    let pool = Pool::running(2, |table| table.sessions.claim_seconds = 1).await;
    let connection_server = pool.connection_address(0);
    for (address, port) in [
        (connection_server, 7700),
        (connection_server, 7701),
        // Last, because it takes the server out of service.
        (pool.server_address(0), 7072),
    ] {
        let url = format!("http://{address}:{port}/openapi.json");
        run(
            "st",
            &[
                "run",
                "--checks=all",
                // 503 says that nothing is free, and no schema knows the pool's ports.
                "--exclude-checks=not_a_server_error,positive_data_acceptance",
                // Its answer has no end.
                "--exclude-path=/v1/events",
                "--max-examples=60",
                "--generation-deterministic",
                &url,
            ],
        );
    }
}
