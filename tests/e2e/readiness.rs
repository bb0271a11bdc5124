//! The readiness probe of a workload decides whether its server gets new sessions.

use std::net::{TcpListener, UdpSocket};
use std::time::{Duration, Instant};

use portpool::client::ClientError;
use portpool::session::SessionRequest;
use serde_json::json;

use crate::traffic::Live;
use crate::world::{LIMIT, World, echo_pool, expect, print_time, until};

/// How soon new sessions follow the readiness of a pod.
const SOON: Duration = Duration::from_secs(2);

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster: make e2e"]
async fn a_pod_whose_readiness_probe_fails_gets_no_new_sessions() {
    let world = World::new("e2e-readiness").await;
    // The kubelet probes this process: the image has no program that a probe could
    // switch.
    let switch = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = switch.local_addr().unwrap().port();
    let here = UdpSocket::bind("0.0.0.0:0").unwrap();
    here.connect((world.address.as_str(), port)).unwrap();
    let here = here.local_addr().unwrap().ip();
    let mut spec = echo_pool(1);
    spec["template"]["spec"]["containers"][0]["readinessProbe"] = json!({
        "tcpSocket": { "host": here.to_string(), "port": port },
        "periodSeconds": 1, "failureThreshold": 1,
    });
    world.apply("games", &spec).await;
    world.ready("games").await;
    world.all_offered(1).await;
    let mut live = Live::new(&world.asker()).await;

    drop(switch);
    let (not_ready, refused) = follow(&world, false).await;
    print_time(
        "readiness probe fails: pod not Ready, then refused",
        refused,
    );
    assert!(refused < SOON, "{not_ready:?}, then {refused:?}");
    let error = world.asker().request(SessionRequest::default()).await;
    let Err(ClientError::Refused(problem)) = error else {
        panic!("{error:?}");
    };
    assert_eq!(problem.kind, "urn:portpool:problem:not-ready");
    let said = "1 processing server is not ready";
    world.live(said, |state| state.servers[0].not_ready).await;
    assert!(problem.detail.contains(said), "{problem}");
    live.check();

    let switch = TcpListener::bind(("0.0.0.0", port)).unwrap();
    let (ready, given) = follow(&world, true).await;
    print_time("readiness probe succeeds: pod Ready, then given", given);
    assert!(given < SOON, "{ready:?}, then {given:?}");
    live.check();
    drop((live, switch));
    world.end().await;
}

/// Waits until the pod is Ready, or is not, and requests have followed. Returns how
/// long the first took, and then the second.
async fn follow(world: &World, is_ready: bool) -> (Duration, Duration) {
    let started = Instant::now();
    let what = format!("pod games-0 is Ready: {is_ready}");
    until(&what, LIMIT, async || {
        let pod = world.pods("processing-server").await.remove("games-0");
        expect(pod.as_ref().is_some_and(crate::faults::is_ready), |now| {
            *now == is_ready
        })
    })
    .await;
    let changed = Instant::now();
    let what = format!("a request is served: {is_ready}");
    let client = world.asker();
    until(&what, LIMIT, async || {
        let answer = client.request(SessionRequest::default()).await;
        if let Ok(session) = &answer {
            let _ = client.release(&session.id).await;
        }
        expect(answer.is_ok(), |served| *served == is_ready)
    })
    .await;
    (changed - started, changed.elapsed())
}
