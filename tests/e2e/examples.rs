//! Each manifest in `examples/` is applied unchanged. Clients inside of the
//! cluster then use its pool, where `tools/example-images` packs its program.

use std::collections::BTreeSet;
use std::time::Instant;

use k8s_openapi::api::core::v1::Service;

use crate::world::{LIMIT, World, expect, image, print_time, run, until};

/// `ADDRESS:PORT` of a pool's load-sharing port inside of the cluster.
async fn inside(world: &World, pool: &str) -> String {
    let service: Service = world.api().get(pool).await.unwrap();
    let spec = service.spec.unwrap();
    let ports = spec.ports.unwrap();
    format!("{}:{}", spec.cluster_ip.unwrap(), ports[0].port)
}

/// Runs `command` in the client pod until it prints `wanted`: a pool is ready a
/// little before its ports are offered.
async fn prints(world: &World, pod: &str, command: &[&str], input: &str, wanted: &str) {
    until(
        &format!("{command:?} prints {wanted:?}"),
        LIMIT,
        async || {
            let text = world.exec(pod, command, input)?;
            if text.contains(wanted) {
                Ok(())
            } else {
                Err(text)
            }
        },
    )
    .await;
}

/// Examples whose programs would make large images. The API server only checks
/// them here; `portpool local` runs them in `tests/it/local`.
const WITHOUT_IMAGE: [&str; 8] = [
    "desktop",
    "kernel",
    "openttd",
    "postgresql",
    "recorder",
    "sip",
    "teeworlds",
    "vsftpd",
];

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a cluster: make e2e"]
async fn every_example_runs_and_is_used() {
    let world = World::new("e2e-examples").await;
    let idle = ["portpool", "echo", "--listen", "127.0.0.1", "--ports", "1"];
    let idle = [&idle[..5], &["9999"]].concat();
    world.client_pod("client", &image(), &idle).await;
    let mut files: Vec<_> = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/examples"))
        .unwrap()
        .map(|file| file.unwrap().path())
        .collect();
    files.sort();
    for file in files {
        let path = file.display().to_string();
        let pool = file.file_stem().unwrap().to_str().unwrap();
        let apply = ["apply", "--namespace", &world.name, "--filename", &path];
        if WITHOUT_IMAGE.contains(&pool) {
            run("kubectl", &[&apply[..], &["--dry-run=server"]].concat(), "").unwrap();
            continue;
        }
        run("kubectl", &apply, "").unwrap();
        print_time(&format!("{pool}: ready"), world.ready(pool).await);
        let address = inside(&world, pool).await;
        let connect = ["portpool", "connect", &address];
        match pool {
            "echo" => {
                prints(&world, "client", &connect, "hello\n", "hello\n").await;
                let udp = [&connect[..], &["--udp"]].concat();
                prints(&world, "client", &udp, "datagram\n", "datagram\n").await;
            }
            "redis" => prints(&world, "client", &connect, "PING\r\n", "+PONG").await,
            "iperf3" => iperf3(&world, &address).await,
            "fresh" => fresh(&world, &address).await,
            "tftp" => tftp(&world, &address).await,
            _ => panic!("{path} has no client here: add one"),
        }
        run(
            "kubectl",
            &["delete", "--namespace", &world.name, "--filename", &path],
            "",
        )
        .unwrap();
    }
    world.end().await;
}

/// Every session gets a new pod in the same slot.
async fn fresh(world: &World, address: &str) {
    let uids = async || -> BTreeSet<(String, Option<String>)> {
        let pods = world.pods("processing-server").await;
        let pods = pods
            .into_iter()
            .filter(|(name, _)| name.starts_with("fresh-"));
        pods.map(|(name, pod)| (name, pod.metadata.uid)).collect()
    };
    let connect = ["portpool", "connect", address, "--wait", "30"];
    for _ in 0..3 {
        let before = uids().await;
        assert_eq!(before.len(), 3);
        prints(world, "client", &connect, "mine alone\n", "mine alone\n").await;
        let started = Instant::now();
        until("one of three pods is another one", LIMIT, async || {
            let now = uids().await;
            let kept = before.intersection(&now).count();
            expect((now.len(), kept), |found| *found == (3, 2))
        })
        .await;
        print_time("fresh: another pod after", started.elapsed());
        world.ready("fresh").await;
    }
}

/// A real client receives a file, each block of which it acknowledges to the port
/// that has sent it.
async fn tftp(world: &World, address: &str) {
    let idle = ["in.tftpd", "--foreground", "--address", "127.0.0.1:9999"];
    world
        .client_pod("tftp-client", "registry.example/tftpd-hpa:5.2", &idle)
        .await;
    let expected: String = (1..=100_000).map(|number| format!("{number}\n")).collect();
    until("curl receives a file over TFTP", LIMIT, async || {
        let text = world.exec("client", &["portpool", "request", address], "")?;
        let url = format!("tftp://{}/numbers", text.trim());
        let curl = ["curl", "--silent", "--show-error", "--max-time", "20", &url];
        let file = world.exec("tftp-client", &curl, "")?;
        expect(file.len(), |_| file == expected)
    })
    .await;
}

/// The real client measures over the connection port, with TCP and with UDP.
async fn iperf3(world: &World, address: &str) {
    let idle = ["iperf3", "--server", "--port", "9999"];
    world
        .client_pod("iperf3-client", "networkstatic/iperf3:latest", &idle)
        .await;
    for transport in [&[][..], &["--udp", "--bitrate", "20M"]] {
        until("iperf3 sends and receives", LIMIT, async || {
            let text = world.exec("client", &["portpool", "request", address], "")?;
            let (host, port) = text.trim().rsplit_once(':').ok_or_else(|| text.clone())?;
            let client = ["iperf3", "--client", host, "--port", port, "--time", "1"];
            let text = world.exec("iperf3-client", &[&client, transport].concat(), "")?;
            let mut lines = text.lines();
            // Of UDP it is there also when nothing has arrived.
            let receiver =
                lines.find(|line| line.ends_with("receiver") && !line.contains(" 0.00 Bytes"));
            println!("iperf3: {}", receiver.ok_or_else(|| text.clone())?.trim());
            Ok(())
        })
        .await;
    }
}
