//! Odd manifests, as users, templates and editors write them: what `kubectl apply`
//! and the API server take, `portpool local` takes, and what they refuse, it refuses.
//!
//! The folder of a manifest in `odd/` says who takes it. Where the two differ, the
//! first lines of the manifest say why.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use futures::StreamExt;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use crate::common::cluster::{ApiServer, assets};

/// Most runs of kubectl at a time.
const AT_ONCE: usize = 4;

/// The folders, and whether Kubernetes and portpool take what is in them.
const FOLDERS: [(&str, bool, bool); 4] = [
    ("both-take", true, true),
    ("both-refuse", false, false),
    ("only-kubernetes-takes", true, false),
    ("only-portpool-takes", false, true),
];

fn manifests(folder: &str) -> Vec<PathBuf> {
    let odd = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/manifest/odd");
    let entries = std::fs::read_dir(odd.join(folder)).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// Runs `kubectl apply` without changing anything; `input` is its standard input.
async fn dry_run(server: &ApiServer, file: &Path, input: &str) -> Output {
    let mut kubectl = Command::new(assets().join("kubectl"));
    kubectl.arg("--kubeconfig").arg(server.kubeconfig());
    kubectl.args(["apply", "--dry-run=server", "-o", "json", "-f"]);
    let output = (Stdio::piped(), Stdio::piped(), Stdio::piped());
    let (stdin, stdout, stderr) = output;
    let kubectl = kubectl.arg(file).stdin(stdin).stdout(stdout).stderr(stderr);
    let mut child = kubectl.kill_on_drop(true).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // kubectl may end before it has read everything.
    let _ = stdin.write_all(input.as_bytes()).await;
    drop(stdin);
    child.wait_with_output().await.unwrap()
}

/// Why Kubernetes refuses the pool in `file`, or a pod of its template.
async fn refusal(server: &ApiServer, file: &Path) -> Option<String> {
    let pool = dry_run(server, file, "").await;
    if !pool.status.success() {
        return Some(String::from_utf8_lossy(&pool.stderr).into_owned());
    }
    let mut pool: Value = serde_json::from_slice(&pool.stdout).unwrap();
    if pool["kind"] == "List" {
        pool = pool["items"][0].take();
    }
    let mut template = pool["spec"]["template"].take();
    for containers in ["containers", "initContainers"] {
        let found = template.pointer_mut(&format!("/spec/{containers}"));
        for container in found.and_then(Value::as_array_mut).into_iter().flatten() {
            // No image is needed on one machine.
            if let Some(fields) = container.as_object_mut() {
                fields.entry("image").or_insert_with(|| "none".into());
            }
        }
    }
    let mut pod = template;
    if !pod.is_object() {
        return Some(format!("the template is {pod}"));
    }
    pod["apiVersion"] = "v1".into();
    pod["kind"] = "Pod".into();
    pod["metadata"]["name"] = "small-0".into();
    let pod = dry_run(server, Path::new("-"), &json!(pod).to_string()).await;
    (!pod.status.success()).then(|| String::from_utf8_lossy(&pod.stderr).into_owned())
}

/// Why `portpool local` refuses the pool in `file`. It looks whether the ports
/// are in use, so no pool may run meanwhile.
async fn check(file: &Path) -> Option<String> {
    let mut portpool = std::process::Command::new(env!("CARGO_BIN_EXE_portpool"));
    portpool.args(["local", "--check", "-f"]).arg(file);
    let output = tokio::task::spawn_blocking(move || {
        let _turn = crate::local::one_at_a_time();
        portpool.output().unwrap()
    });
    let output = output.await.unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    match output.status.code() {
        Some(0) => None,
        Some(2) => Some(text),
        other => panic!("{}: {other:?}: {text}", file.display()),
    }
}

#[tokio::test]
async fn portpool_takes_the_manifests_that_kubectl_and_the_api_server_take() {
    let server = ApiServer::shared().await;
    let cases = FOLDERS.iter().flat_map(|(folder, kubernetes, ours)| {
        let manifests = manifests(folder).into_iter();
        manifests.map(move |file| (file, *kubernetes, *ours))
    });
    let compared = futures::stream::iter(cases).map(async |(file, kubernetes, ours)| {
        let refused = refusal(&server, &file).await;
        let checked = check(&file).await;
        let is_right = refused.is_none() == kubernetes && checked.is_none() == ours;
        let answers = [("kubernetes", refused), ("portpool", checked)];
        let answers = answers.map(|(who, refused)| {
            let answer = refused.unwrap_or_else(|| "taken".to_owned());
            format!("\n  {who}: {answer}")
        });
        (!is_right).then(|| format!("{}{}", file.display(), answers.concat()))
    });
    let compared: Vec<_> = compared.buffer_unordered(AT_ONCE).collect().await;
    assert!(compared.len() > 100);
    let wrong: Vec<String> = compared.into_iter().flatten().collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
