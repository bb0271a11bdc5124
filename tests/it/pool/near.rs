//! Requests for a port of one processing server.

use portpool::client::ClientError;
use portpool::session::{Session, SessionRequest};

use crate::cli::portpool;
use crate::common::{COUNT, Pool};

fn near(id: &str) -> SessionRequest {
    SessionRequest {
        near: Some(id.to_owned()),
        ..SessionRequest::default()
    }
}

fn at(server: &str) -> SessionRequest {
    SessionRequest {
        server: Some(server.to_owned()),
        ..SessionRequest::default()
    }
}

/// The type of the problem, without its prefix, and its status.
fn problem<T: std::fmt::Debug>(answer: Result<T, ClientError>) -> (String, u16) {
    let Err(ClientError::Refused(problem)) = answer else {
        panic!("{answer:?}");
    };
    let kind = problem.kind.strip_prefix("urn:portpool:problem:").unwrap();
    (kind.to_owned(), problem.status)
}

#[tokio::test]
async fn a_request_gets_a_port_of_the_server_that_it_names() {
    let mut pool = Pool::running(3, |_| {}).await;
    pool.start_connection_server(1);
    pool.until_of(1, |state| state.free_ports == 3 * u32::from(COUNT))
        .await;
    let (client, other) = (pool.client(), pool.client_of(1));
    let first = client.request(at("test-1")).await.unwrap();
    let mut sessions = vec![first.clone()];
    // By its id, through a connection server that did not make it and may learn of it
    // only now.
    for _ in 1..COUNT {
        sessions.push(other.request(near(&first.id)).await.unwrap());
    }
    let servers = sessions.iter().map(|session| session.server.as_str());
    assert!(servers.eq(["test-1"; COUNT as usize]), "{sessions:?}");
    // It is full, and others are not.
    let refused = client.request(at("test-1")).await;
    assert_eq!(problem(refused), ("no-free-port".to_owned(), 503));
    pool.request().await.unwrap();
    // It waits in the queue.
    let waiting = tokio::spawn({
        let (client, id) = (client.clone(), first.id.clone());
        let request = SessionRequest {
            wait_seconds: 30,
            ..near(&id)
        };
        async move { client.request(request).await }
    });
    pool.until(|state| state.waiting == 1).await;
    client.release(&sessions[2].id).await.unwrap();
    let served = waiting.await.unwrap().unwrap();
    assert_eq!(
        (served.server.as_str(), served.port),
        ("test-1", sessions[2].port)
    );
    // One that is over names no server.
    let over = client.request(near(&sessions[2].id)).await;
    assert_eq!(problem(over), ("unknown-session".to_owned(), 422));
    let unknown = client.request(at("test-3")).await;
    assert_eq!(problem(unknown), ("unknown-server".to_owned(), 422));
    // The same key elsewhere is another request.
    let keyed = |request: SessionRequest| SessionRequest {
        idempotency_key: Some("key".to_owned()),
        ..request
    };
    let there = client.request(keyed(at("test-2"))).await.unwrap();
    let again = other.request(keyed(at("test-2"))).await.unwrap();
    assert_eq!(there.id, again.id);
    let reused = client.request(keyed(at("test-0"))).await;
    assert_eq!(problem(reused), ("key-reused".to_owned(), 422));
}

#[tokio::test]
async fn a_repeated_request_gets_its_session_although_the_one_it_names_is_over() {
    let pool = Pool::running(2, |_| {}).await;
    let client = pool.client();
    let keyed = |id: &str, key: &str| SessionRequest {
        idempotency_key: Some(key.to_owned()),
        ..near(id)
    };
    let first = client.request(at("test-1")).await.unwrap();
    let second = client.request(keyed(&first.id, "second")).await.unwrap();
    for _ in 2..COUNT {
        client.request(at("test-1")).await.unwrap();
    }
    let wait = |request| {
        let client = client.clone();
        let request = SessionRequest {
            wait_seconds: 30,
            ..request
        };
        tokio::spawn(async move { client.request(request).await })
    };
    let earlier = wait(at("test-1"));
    pool.until(|state| state.waiting == 1).await;
    let later = wait(keyed(&first.id, "third"));
    pool.until(|state| state.waiting == 2).await;

    client.release(&first.id).await.unwrap();
    earlier.await.unwrap().unwrap();
    let again = client.request(keyed(&first.id, "second")).await.unwrap();
    assert_eq!(again.id, second.id, "it is live");
    let repeated = wait(keyed(&first.id, "third"));
    client.release(&second.id).await.unwrap();
    let third = later.await.unwrap().unwrap();
    assert_eq!(third.server, "test-1");
    assert_eq!(repeated.await.unwrap().unwrap().id, third.id, "it waits");
    let new = client.request(keyed(&first.id, "new")).await;
    assert_eq!(problem(new), ("unknown-session".to_owned(), 422));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_has_both() {
    let pool = Pool::running(2, |_| {}).await;
    let address = format!("{}:7700", pool.connection_address(0));
    let request = |option: &str, value: &str| {
        let arguments = ["request", &address, "-o", "json", option, value];
        portpool(&arguments, "")
    };
    let first = request("--server", "test-1");
    let first: Session = serde_json::from_slice(&first.stdout).unwrap();
    let second = request("--near", &first.id);
    let second: Session = serde_json::from_slice(&second.stdout).unwrap();
    assert_eq!([&*first.server, &*second.server], ["test-1"; 2]);
    let wrong = request("--server", "test-2");
    assert_eq!(wrong.status.code(), Some(2), "wrong input");
    let text = String::from_utf8_lossy(&wrong.stderr);
    assert!(text.contains("no processing server of this name"), "{text}");
}
