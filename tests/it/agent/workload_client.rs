//! A workload in Rust, which serves its clients and decides about them with the client
//! of its agent's local API.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use portpool::client::workload::{Event, Workload, WorkloadError};
use portpool::pool::{Confirm, Mapping, PortProtocol};
use portpool::session::{Amendment, Metadata, SessionRequest, WorkloadSession, WorkloadState};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::timeout;

use crate::common::{COUNT, Pool, SERVER_PORT, SOON};

/// Game rooms: one on each server port, with the name of the map that its player asked
/// for. A player whose map there is not is refused.
async fn play(workload: Workload, address: IpAddr) -> Result<(), WorkloadError> {
    let mut events = workload.events().await?;
    let me = workload.server().await?;
    for port in SERVER_PORT..SERVER_PORT + COUNT {
        let listener = TcpListener::bind(SocketAddr::new(address, port)).await;
        tokio::spawn(room(listener.unwrap()));
    }
    let mut sessions = workload.sessions().await?;
    loop {
        let offered = |it: &WorkloadSession| it.state == WorkloadState::Offered;
        for session in sessions.into_iter().filter(offered) {
            let decided = match session.metadata.get("map") {
                Some("harbor") => {
                    let seat = Metadata::new([("server", me.server.as_str())]).unwrap();
                    workload.confirm(&session.id, seat).await
                }
                _ => {
                    let reason = Some("there is no such map");
                    workload.refuse(&session.id, reason).await
                }
            };
            match decided {
                Err(error) if error.is_too_late() => {}
                decided => decided?,
            }
        }
        sessions = match events.next().await? {
            Some(Event::Change(change)) => change.session.into_iter().collect(),
            Some(Event::Lost(_)) => workload.sessions().await?,
            None => return Ok(()),
        };
    }
}

/// Greets and answers every client.
async fn room(listener: TcpListener) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let _ = stream.write_all(b"welcome").await;
        let mut text = [0; 64];
        while let Ok(length @ 1..) = stream.read(&mut text).await {
            let _ = stream.write_all(&text[..length]).await;
        }
    }
}

fn to_map(map: &str) -> SessionRequest {
    SessionRequest {
        metadata: Metadata::new([("map", map)]).unwrap(),
        ..SessionRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_workload_plays_its_whole_part() {
    let mut pool = Pool::new(1, |table| {
        table.sessions.confirm = Confirm::Workload;
        table.rows[0].ranges[0].protocol = PortProtocol::TCP;
    });
    pool.start_agent(0);
    pool.start_connection_server(0);
    let address = pool.server_address(0);
    let workload = Workload::new(&format!("http://{address}:7072")).unwrap();
    pool.until(|state| state.servers[0].attached).await;
    let playing = tokio::spawn(play(workload.clone(), address));
    pool.until(|state| state.free_ports == u32::from(COUNT))
        .await;

    for unknown in [to_map("sea"), SessionRequest::default()] {
        let refusal = pool.client().request(unknown).await.unwrap_err();
        let text = refusal.to_string();
        assert!(text.contains("there is no such map"), "{text}");
    }
    let session = pool.client().request(to_map("harbor")).await.unwrap();
    assert_eq!(session.workload_metadata.get("server"), Some("test-0"));
    let mut stream = pool.client().connect(&session).await.unwrap();
    let mut welcome = [0; 7];
    stream.read_exact(&mut welcome).await.unwrap();
    assert_eq!(&welcome, b"welcome");

    let sessions = workload.sessions().await.unwrap();
    assert_eq!(sessions.len(), 1);
    while workload.session(&session.id).await.unwrap().state != WorkloadState::Busy {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut events = workload.events().await.unwrap();
    let soon = jiff::Timestamp::now() + SOON;
    let amendment = Amendment {
        expires: Some(Some(soon)),
        metadata: None,
    };
    let amended = workload.amend(&session.id, &amendment).await.unwrap();
    assert_eq!(
        amended.expires.unwrap().as_millisecond(),
        soon.as_millisecond()
    );
    let Some(Event::Change(change)) = events.next().await.unwrap() else {
        panic!("an event");
    };
    assert_eq!((change.name(), change.session), ("Amended", Some(amended)));

    workload.end(&session.id).await.unwrap();
    let cut = timeout(SOON, stream.read(&mut welcome)).await.unwrap();
    assert!(cut.is_err() || cut.is_ok_and(|length| length == 0));
    for unknown in [
        workload.end(&session.id).await,
        workload.confirm(&session.id, Metadata::default()).await,
        workload.refuse(&session.id, None).await,
    ] {
        let is_unknown = |error: &WorkloadError| matches!(error, WorkloadError::Refused(problem) if problem.status == 404);
        assert!(unknown.as_ref().is_err_and(is_unknown), "{unknown:?}");
    }
    workload.set_ready(false).await.unwrap();
    assert!(!workload.server().await.unwrap().ready);
    workload.set_ready(true).await.unwrap();
    workload.drain().await.unwrap();
    assert!(workload.server().await.unwrap().spent);
    pool.until(|state| state.servers[0].spent).await;

    // The streams of events end with the agent.
    pool.agents[0].terminate();
    pool.agents[0].wait();
    let ended = timeout(SOON, playing).await.unwrap().unwrap();
    assert!(matches!(
        ended,
        Ok(()) | Err(WorkloadError::Unreachable { .. })
    ));
    let error = workload.server().await.unwrap_err();
    assert!(
        matches!(error, WorkloadError::Unreachable { .. }),
        "{error}"
    );
}

/// More sessions than a page of the list has, of clients that say nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_workload_sees_all_its_sessions() {
    let count = 120;
    let mut pool = Pool::new(1, |table| {
        let range = &mut table.rows[0].ranges[0];
        (range.count, range.mapping) = (count, Mapping::Shared);
    });
    pool.start_workload(0);
    pool.start_agent(0);
    pool.start_connection_server(0);
    pool.until(|state| state.free_ports == u32::from(count))
        .await;
    let mut got = Vec::new();
    for _ in 0..count {
        got.push(pool.request().await.unwrap().id);
    }
    got.sort();
    let workload = Workload::new(&format!("http://{}:7072", pool.server_address(0))).unwrap();
    let sessions = workload.sessions().await.unwrap();
    let listed: Vec<String> = sessions.into_iter().map(|session| session.id).collect();
    assert_eq!(listed, got);
}

#[tokio::test]
async fn an_address_or_an_id_that_cannot_be_is_named() {
    for wrong in [
        "127.0.0.1:7072",
        "https://127.0.0.1:7072",
        "http://127.0.0.1",
        "http://a:1/b",
        "",
    ] {
        let error = Workload::new(wrong).unwrap_err();
        assert!(error.to_string().contains("PORTPOOL_API"), "{error}");
    }
    let workload = Workload::new("http://127.0.0.1:9/").unwrap();
    let error = workload.end("a/b").await.unwrap_err();
    assert!(matches!(error, WorkloadError::SessionId(_)), "{error}");
}
