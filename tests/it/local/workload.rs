//! Workloads run as a container runtime runs them, and what they do is reported.

use super::*;

/// Runs `portpool local --check` on `manifest`. Its exit status, and what it prints.
fn check(manifest: &str) -> (Option<i32>, String) {
    let _turn = one_at_a_time();
    let output = portpool(&["local", "--check", "-f", "-"], manifest);
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    (output.status.code(), text)
}

/// A pool of one server whose only container has the fields `container`.
fn manifest_of(container: &str) -> String {
    format!(
        "\
apiVersion: portpool.dev/v1alpha1
kind: ProcessingPool
metadata: {{name: one, namespace: games}}
spec:
  replicas: 1
  ports: [{{name: main, port: 7000, count: 4}}]
  template:
    spec:
      containers:
        - name: main
{container}
"
    )
}

fn executable(path: &Path, script: &str) {
    use std::os::unix::fs::PermissionsExt;
    fs::write(path, script).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

#[test]
fn a_program_is_found_from_its_working_directory_and_by_the_containers_path() {
    let programs = tempfile::tempdir().unwrap();
    let folder = programs.path().display();
    let script = format!("#!/bin/sh\nexec {PORTPOOL} echo --ports 7000-7003\n");
    executable(&programs.path().join("serve.sh"), &script);
    fs::write(programs.path().join("plain.sh"), &script).unwrap();
    let ip = "{name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}";
    let good = [
        format!(
            "          command: [./serve.sh]\n          workingDir: {folder}\n          env: [{ip}]"
        ),
        format!(
            "          command: [serve.sh]\n          env: [{{name: PATH, value: '{folder}:/usr/bin:/bin'}}, {ip}]"
        ),
    ];
    for container in good {
        let (_folder, file) = write(&manifest_of(&container));
        let local = Local::start(&file);
        local.until("4 ports free");
        local.stop();
    }
    let bad = [
        ("[./none.sh]", "does not exist"),
        (
            "[./plain.sh]",
            "is not executable: change that with chmod +x",
        ),
        ("[no-such-program]", "is not in PATH"),
    ];
    for (command, words) in bad {
        let container = format!("          command: {command}\n          workingDir: {folder}");
        let (status, text) = check(&manifest_of(&container));
        assert_eq!(status, Some(2), "{text}");
        assert!(text.contains(words), "{words}: {text}");
    }
    let container = "          command: [sh]\n          env: [{name: PATH, value: /none}]";
    let (status, text) = check(&manifest_of(container));
    assert!(
        status == Some(2) && text.contains("the container's PATH, \"/none\""),
        "{text}"
    );
}

#[test]
fn the_grace_period_of_the_manifest_is_waited_for_and_its_namespace_known() {
    let command = format!(
        "trap 'echo saving; sleep 6; echo saved; exit 0' TERM; echo namespace is $NAMESPACE; {PORTPOOL} echo --ports 7000-7003 & wait; sleep 9"
    );
    let container = format!(
        "          command: [sh, -c, {command:?}]
          env:
            - {{name: POD_IP, valueFrom: {{fieldRef: {{fieldPath: status.podIP}}}}}}
            - {{name: NAMESPACE, valueFrom: {{fieldRef: {{fieldPath: metadata.namespace}}}}}}
      terminationGracePeriodSeconds: 20"
    );
    let (_folder, file) = write(&manifest_of(&container));
    let mut local = Local::start(&file);
    local.until("namespace is games");
    local.until("4 ports free");
    local.signal("-INT");
    local.until("saving");
    local.until("waiting for one-0/main to end, up to 20 s");
    local.until("saved");
    assert!(local.child.wait().unwrap().success());
    drop(local);

    let hasty = manifest_of(
        "          command: [sh, -c, 'trap \"\" TERM; echo started; while :; do sleep 1; done']\n      terminationGracePeriodSeconds: 1",
    );
    let (_folder, file) = write(&hasty);
    let mut local = Local::start(&file);
    local.until("started");
    local.signal("-INT");
    let stopping = Instant::now();
    assert!(local.child.wait().unwrap().success());
    assert!(stopping.elapsed() < Duration::from_secs(10));
}

#[test]
fn what_only_a_cluster_honours_is_named_once_at_the_start() {
    let container = "          command: [sh]
          image: games:1
          securityContext: {runAsUser: 1000}
          readinessProbe: {tcpSocket: {port: 7000}}
          resources: {limits: {cpu: 1}}
      volumes: [{name: data, emptyDir: {}}]";
    let (status, text) = check(&manifest_of(container));
    assert_eq!(status, Some(0), "{text}");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 2, "{text}");
    for field in [
        "containers[0].image",
        "containers[0].securityContext",
        "containers[0].readinessProbe",
        "containers[0].resources",
        "spec.template.spec.volumes",
    ] {
        assert!(
            lines[0].starts_with("ignored here") && lines[0].contains(field),
            "{text}"
        );
    }
    assert_eq!(lines[1], "one can run here");
    let (status, text) = check(&manifest_of("          command: [sh]"));
    assert_eq!((status, text.as_str()), (Some(0), "one can run here\n"));
}

#[test]
fn a_server_whose_workload_does_not_listen_is_not_ready() {
    let (_folder, file) = pool_of("sleep 0.2; exit 3");
    let local = Local::start(&file);
    let mut seen = String::new();
    loop {
        let line = local.lines.recv_timeout(SOON).unwrap();
        assert!(!line.contains("is ready"), "{line}");
        seen.push_str(&line);
        if line.contains(
            "port main of one-0 cannot be given: the workload does not listen on 127.0.0.2:7000",
        ) {
            break;
        }
    }
    assert!(seen.contains("; starting it again in 0.2 s"), "{seen}");
    assert!(seen.contains("; starting it again in 0.8 s"), "{seen}");
    local.stop();
}

#[test]
fn a_workload_that_listens_on_all_addresses_is_told_the_remedy() {
    // Other tests listen on 7000, which such a workload cannot share.
    let (_folder, file) = pool_of("exec python3 -m http.server 7650 --bind 0.0.0.0");
    let manifest = fs::read_to_string(&file).unwrap();
    fs::write(&file, manifest.replace("port: 7000", "port: 7650")).unwrap();
    let local = Local::start(&file);
    let line = local.until("cannot be given");
    assert!(
        line.ends_with(
            "port main of one-0 cannot be given: TCP 0.0.0.0:7650 is listened on instead of 127.0.0.2:7650: make the workload listen on $(POD_IP)"
        ),
        "{line}"
    );
    local.stop();
}

#[test]
fn a_program_that_serves_one_client_is_started_at_once_after_each() {
    // It serves one connection, then ends.
    let serve = "import os,socket; s=socket.create_server((os.environ['POD_IP'],7000)); c,_=s.accept(); c.sendall(c.recv(100)); c.close()";
    let (_folder, file) = pool_of(&format!("exec python3 -c \"{serve}\""));
    let local = Local::start(&file);
    local.until("is ready");
    for _ in 0..6 {
        assert_eq!(echoed("once", &["--wait", "20"]), "once");
        let line = local.until("ended");
        assert!(
            line.ends_with("after a session; starting it again at once"),
            "{line}"
        );
    }
    local.stop();
}

/// The pool of `file` with another load-sharing port and other connection ports.
fn with_other_ports(file: &Path) -> (tempfile::TempDir, PathBuf) {
    let ports =
        "connectionServer: {loadSharingPort: 7800, connectionPorts: {first: 21000, last: 21999}}";
    let manifest = fs::read_to_string(file).unwrap();
    write(&manifest.replace(
        "spec:\n  replicas",
        &format!("spec:\n  {ports}\n  replicas"),
    ))
}

#[test]
fn a_second_pool_of_the_same_manifest_has_addresses_of_its_own() {
    let (_folder, file) = pool_of(&echo_command());
    let first = Local::start(&file);
    first.until("4 ports free");
    let second = Local::start_beside(&first, &file);
    second.until("addresses from 127.1.0.2 on");
    second.until("load-sharing port: http://127.1.0.1:7700  (admin: http://127.1.0.1:7701)");
    second.until("4 ports free");
    for ask in [ASK, "127.1.0.1:7700"] {
        let output = portpool(&["connect", ask], "hello");
        assert_eq!(output.stdout, b"hello", "{ask}");
    }
    // With ports of its own, a further pool is at localhost too.
    let (_other, file) = with_other_ports(&file);
    let third = Local::start_beside(&first, &file);
    third.until("load-sharing port: http://127.0.0.1:7800  (admin: http://127.2.0.1:7701)");
    third.until("4 ports free");
    third.stop();
    second.stop();
    first.stop();
}

#[test]
fn a_pool_at_localhost_is_no_hindrance_after_the_first_one_has_ended() {
    let _turn = one_at_a_time();
    let start = |file: &Path| {
        let folder = tempfile::tempdir().unwrap();
        Local::spawn(folder, file, &["--drain-seconds", "2"], None)
    };
    let (_folder, file) = pool_of(&echo_command());
    let (_other, elsewhere) = with_other_ports(&file);
    let first = start(&file);
    first.until("4 ports free");
    let second = start(&elsewhere);
    second.until("load-sharing port: http://127.0.0.1:7800");
    second.until("4 ports free");
    first.stop();
    let third = start(&elsewhere);
    third.until("load-sharing port: http://127.2.0.1:7800");
    third.until("4 ports free");
    third.stop();
    second.stop();
}

#[test]
fn a_held_session_does_not_delay_the_end_of_its_pool() {
    let (_folder, file) = pool_of(&echo_command());
    let mut local = Local::start_with(&file, &["--drain-seconds", "60"]);
    local.until("4 ports free");
    request();
    local.signal("-INT");
    let stopping = Instant::now();
    assert!(local.child.wait().unwrap().success());
    assert!(stopping.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_pool_is_read_from_standard_input() {
    let (status, text) = check(&manifest_of("          command: [sh]"));
    assert_eq!(status, Some(0), "{text}");
    let (status, text) = check("{");
    assert_eq!(status, Some(2));
    assert!(text.starts_with("error: standard input:1:"), "{text}");
    let nul = "          command: [sh]\n          env: [{name: A, value: \"a\\0b\"}]";
    let (status, text) = check(&manifest_of(nul));
    assert_eq!(status, Some(2));
    assert!(
        text.contains("standard input:12:") && text.contains("NUL character"),
        "{text}"
    );
}

#[test]
fn a_pool_runs_with_a_long_folder_for_temporary_files() {
    let (_folder, file) = pool_of(&echo_command());
    let long = tempfile::Builder::new()
        .prefix(&"long-".repeat(20))
        .tempdir()
        .unwrap();
    let local = Local::start_in(long, &file);
    local.until("4 ports free");
    assert_eq!(echoed("hello", &[]), "hello");
    let folders = fs::read_dir(local.folder.path()).unwrap().count();
    local.stop();
    assert_eq!(folders, 0, "a short folder is used instead");
}
