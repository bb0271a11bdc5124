//! Each manifest in `examples/` is applied unchanged, but that of SIP with an address
//! to announce. Clients inside of the cluster then use its pool, where
//! `tools/example-images` packs its program.

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

/// Examples without an image: of ffmpeg it would be large, and a client of Teeworlds
/// is none that a pod could run. The API server only checks them here; `portpool local`
/// runs them in `tests/it/local`.
const WITHOUT_IMAGE: [&str; 2] = ["recorder", "teeworlds"];

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
        match pool {
            "sip" => apply_for_calls(&world, &path).await,
            _ => drop(run("kubectl", &apply, "").unwrap()),
        }
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
            "vsftpd" => vsftpd(&world, &address).await,
            "postgresql" => postgresql(&world, &address).await,
            "kernel" => kernel(&world, &address).await,
            "sip" => sip(&world).await,
            // The version and the ways to authenticate: one, which is none.
            "desktop" => {
                let version = "RFB 003.008\n";
                let answer = format!("{version}\u{1}\u{1}");
                prints(&world, "client", &connect, version, &answer).await;
            }
            // What the server plays, with its name.
            "openttd" => prints(&world, "client", &connect, "\u{3}\0\u{7}", "openttd-").await,
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

/// Starts a pod of `image` in which clients run.
async fn client_of(world: &World, example: &str, image: &str) -> String {
    let name = format!("{example}-client");
    world.client_pod(&name, image, &["sleep", "infinity"]).await;
    name
}

/// What `client` returns, which gets the address and port of each port of a session.
/// The session is given back, so that its ports are free for the next attempt.
fn in_session(
    world: &World,
    address: &str,
    asked: &[&str],
    client: impl FnOnce(&[(String, String)]) -> Result<String, String>,
) -> Result<String, String> {
    let request = [&["portpool", "request", "-o", "wide", address], asked].concat();
    let text = world.exec("client", &request, "")?;
    let (mut ports, mut session) = (Vec::new(), "");
    // [NAME ]HOST:PORT ID
    for line in text.lines() {
        let (before, id) = line.rsplit_once(' ').ok_or_else(|| text.clone())?;
        let endpoint = before.rsplit(' ').next().unwrap();
        let (host, port) = endpoint.rsplit_once(':').ok_or_else(|| text.clone())?;
        ports.push((host.to_owned(), port.to_owned()));
        session = id;
    }
    let result = client(&ports);
    let _ = world.exec("client", &["portpool", "release", address, session], "");
    result
}

/// A real client stores a file and receives it again, each over a data connection of
/// its own.
async fn vsftpd(world: &World, address: &str) {
    let client = client_of(world, "vsftpd", "registry.example/vsftpd:3.0").await;
    let content: String = (1..=100_000)
        .map(|number| {
            format!(
                "{number}
"
            )
        })
        .collect();
    until(
        "curl stores and receives a file over FTP",
        LIMIT,
        async || {
            let file = in_session(world, address, &["--port-name", "control"], |ports| {
                let url = format!("ftp://{}:{}/files/numbers", ports[0].0, ports[0].1);
                let curl = ["curl", "--silent", "--show-error", "--max-time", "20", &url];
                world.exec(&client, &[&curl[..], &["-T", "-"]].concat(), &content)?;
                world.exec(&client, &curl, "")
            })?;
            expect(file.len(), |_| file == content)
        },
    )
    .await;
}

/// The real client asks its own server for the sum of numbers that it has stored there.
async fn postgresql(world: &World, address: &str) {
    let client = client_of(world, "postgresql", "postgres:17").await;
    let statements = "CREATE TABLE numbers AS SELECT n FROM generate_series(1, 1000) n; SELECT sum(n) FROM numbers;";
    until("psql stores and receives rows", LIMIT, async || {
        let text = in_session(world, address, &[], |ports| {
            let at = format!("{}:{}", ports[0].0, ports[0].1);
            let psql = format!(
                "exec /usr/lib/postgresql/*/bin/psql -XAtq postgresql://postgres:example@{at}/"
            );
            world.exec(&client, &["sh", "-c", &psql], statements)
        })?;
        expect(text, |text| {
            text == "500500
"
        })
    })
    .await;
}

/// The real client runs code over the five ports of a kernel.
async fn kernel(world: &World, address: &str) {
    let client = client_of(world, "kernel", "registry.example/ipykernel:6").await;
    until("a kernel runs code", LIMIT, async || {
        let text = in_session(world, address, &["--port", "kernel:5"], |ports| {
            let mut python = vec!["/usr/bin/python3", "-", "print(input() * 2)", &ports[0].0];
            python.extend(ports.iter().map(|(_, port)| &port[..]));
            world.exec(&client, &python, include_str!("../clients/kernel.py"))
        })?;
        expect(text, |text| {
            text == "inputinput
ok
interrupt_reply
True
"
        })
    })
    .await;
}

/// Applies the example for SIP at the node's ports, with the address that its server
/// announces there.
async fn apply_for_calls(world: &World, path: &str) {
    let server = format!(
        "spec:\n  connectionServer: {{exposure: HostNetwork, advertisedAddress: {}}}\n",
        world.node_address().await
    );
    let manifest = std::fs::read_to_string(path).unwrap();
    let manifest = manifest.replacen("spec:\n", &server, 1);
    let apply = ["apply", "--namespace", &world.name, "--filename", "-"];
    run("kubectl", &apply, &manifest).unwrap();
}

/// The real client makes a call, and RTP packets come back.
async fn sip(world: &World) {
    let client = client_of(world, "sip", "registry.example/sip-tester:3.6").await;
    let address = format!("{}:7700", world.node_address().await);
    let ports = ["--port", "sip", "--port", "media:2"];
    let call =
        "exec sipp -sn uac -m 1 -d 500 -timeout 20 -nostdin -trace_msg -message_file /tmp/messages";
    until("SIPp makes a call", LIMIT, async || {
        let mut media = String::new();
        let messages = in_session(world, &address, &ports, |ports| {
            media = format!("m=audio {} RTP/AVP 0", ports[1].1);
            let call = format!("{call} {}:{}", ports[0].0, ports[0].1);
            world.exec(&client, &["sh", "-c", &call], "")?;
            world.exec(&client, &["cat", "/tmp/messages"], "")
        })?;
        expect(messages, |messages| messages.contains(&media))
    })
    .await;
    let packet = "a packet of RTP, for all that SIPp knows";
    let connect = [
        &["portpool", "connect", &address, "--udp", "--to", "media"],
        &ports[..],
    ]
    .concat();
    prints(world, "client", &connect, packet, packet).await;
}
