//! Port entries as workloads use them, on one machine.

use std::fs;

use super::{Local, PORTPOOL, connect, echoed, processes, request, write};
use crate::common::echo;

/// A pool of two echo servers with the entry of `ports`. They listen where the
/// environment says.
fn pool_of_echoes(ports: &str, listen: &str) -> (tempfile::TempDir, std::path::PathBuf) {
    write(&format!(
        "\
apiVersion: portpool.dev/v1alpha1
kind: ProcessingPool
metadata: {{name: entries}}
spec:
  replicas: 2
  ports: [{{{ports}}}]
  template:
    spec:
      containers:
        - name: main
          command: [{PORTPOOL}, echo, --ports, {listen}]
          env: [{{name: POD_IP, valueFrom: {{fieldRef: {{fieldPath: status.podIP}}}}}}]
"
    ))
}

#[test]
fn servers_listen_on_their_connection_ports_and_follow_when_these_change() {
    let ports = "name: main, mapping: Identity, count: 2, protocol: TCPUDP";
    let listen = "$(PORTPOOL_MAIN_PORT)-$(PORTPOOL_MAIN_LAST)";
    let (_folder, file) = pool_of_echoes(ports, listen);
    let local = Local::start(&file);
    local.until("4 ports free");
    for first in [20_000, 20_002] {
        let arguments = format!("echo --ports {first}-{}", first + 1);
        assert_ne!(processes(&arguments), 0, "{arguments}");
    }
    let mut taken: Vec<String> = Vec::new();
    for _ in 0..4 {
        let endpoint = request();
        echo(&mut connect(&endpoint), "to the same number");
        taken.push(endpoint.1);
    }
    taken.sort();
    assert_eq!(taken, ["20000", "20001", "20002", "20003"]);
    // The servers learn the ports of the changed entry by being replaced.
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replace("count: 2", "count: 3")).unwrap();
    local.until("6 ports free");
    assert_ne!(processes("echo --ports 20000-20002"), 0);
    assert_ne!(processes("echo --ports 20003-20005"), 0);
    assert_eq!(echoed("datagrams too", &["--udp"]), "datagrams too");
    local.stop();
}
