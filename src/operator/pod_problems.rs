//! Why a pod does not run, as its status says. No client.

use std::time::Duration;

use jiff::Timestamp;
use kube::ResourceExt;
use kube::api::DynamicObject;
use serde_json::Value;

use super::observation::{condition, text};
use crate::plan::End;
use crate::plan::status::Blocker;

/// Reasons of a waiting container that do not pass by themselves.
///
/// Source: Kubernetes, pkg/kubelet/images and pkg/kubelet/container, `Err…`.
const STUCK: [&str; 14] = [
    "ImagePullBackOff",
    "ErrImagePull",
    "ErrImageNeverPull",
    "InvalidImageName",
    "ImageInspectError",
    "RegistryUnavailable",
    "SignatureValidationFailed",
    "CrashLoopBackOff",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
    "PreCreateHookError",
    "PreStartHookError",
    "PostStartHookError",
];

/// Restarts from which on a container that fails soon after each is in a loop. The
/// kubelet makes the first one without a pause.
const LOOP_RESTARTS: u64 = 2;

/// How long a container must run so that the failures before it are over: so long, or
/// twice as long as it ran before, so that a loop is one while the container runs, too.
const STABLE: Duration = Duration::from_secs(60);

/// A container that ran for longer was in no loop.
///
/// Source: Kubernetes documentation, Pod Lifecycle, "Container restarts": the time
/// after which the kubelet's back-off begins anew.
const LONGEST_LOOP: Duration = Duration::from_secs(600);

/// Most characters of a message that is not ours.
const MOST_WORDS: usize = 300;

/// How `pod` has ended for good, if it has.
pub(super) fn end(pod: &DynamicObject) -> Option<End> {
    let is_success = match text(pod, "/status/phase")? {
        "Succeeded" => true,
        "Failed" => false,
        _ => return None,
    };
    let ended = containers(pod).find_map(|status| {
        let terminated = &status["state"]["terminated"];
        let has_failed = is_success || terminated["exitCode"].as_i64().is_some_and(|it| it != 0);
        let name = status["name"].as_str().unwrap_or_default();
        (terminated.is_object() && has_failed)
            .then(|| format!("container {name} {}", cause(terminated)))
    });
    // The kubelet and the control plane say why they have ended a pod.
    let told = text(pod, "/status/reason").map(|reason| match text(pod, "/status/message") {
        Some(message) => format!("{reason}: {}", shortened(message)),
        None => reason.to_owned(),
    });
    let cause = told.or(ended);
    Some(End {
        is_success,
        cause: cause.unwrap_or_else(|| "its status does not say why".to_owned()),
    })
}

/// Since when `pod` is ready, if it is.
pub(super) fn ready_since(pod: &DynamicObject) -> Option<Timestamp> {
    let ready = condition(pod, "Ready").filter(|ready| ready["status"] == "True")?;
    time(&ready["lastTransitionTime"])
}

/// What keeps `pod` from running and does not pass by itself.
pub(super) fn blocker(pod: &DynamicObject, now: Timestamp) -> Option<Blocker> {
    let name = pod.name_any();
    let scheduled = condition(pod, "PodScheduled");
    if let Some(condition) = scheduled.filter(|it| it["reason"] == "Unschedulable") {
        let message = condition["message"].as_str().unwrap_or_default();
        return Some(Blocker::new(
            "Unschedulable",
            format!("pod {name} cannot be scheduled: {message}"),
        ));
    }
    containers(pod).find_map(|status| {
        let (reason, why) = stuck(status).or_else(|| crash_loop(status, now))?;
        let container = status["name"].as_str().unwrap_or_default();
        let message = format!("container {container} of pod {name}: {reason}: {why}");
        Some(Blocker::new(reason, message))
    })
}

/// The statuses of the containers of `pod`, those of the workload first: an agent
/// ends with its workload.
fn containers(pod: &DynamicObject) -> impl Iterator<Item = &Value> {
    let lists = ["/status/containerStatuses", "/status/initContainerStatuses"];
    let lists = lists.into_iter().filter_map(|list| pod.data.pointer(list));
    lists.filter_map(Value::as_array).flatten()
}

/// Why a container waits, if that does not pass by itself: the reason, and its cause.
fn stuck(status: &Value) -> Option<(&'static str, String)> {
    let waiting = &status["state"]["waiting"];
    let reason = waiting["reason"].as_str()?;
    let reason = match STUCK.into_iter().find(|stuck| *stuck == reason)? {
        // The kubelet takes turns between the two.
        "ErrImagePull" => "ImagePullBackOff",
        reason => reason,
    };
    let last = &status["lastState"]["terminated"];
    // The kubelet delays the restart of a program that has done its work, too.
    if reason == "CrashLoopBackOff" && last["exitCode"] == 0 {
        return None;
    }
    let why = match reason {
        "CrashLoopBackOff" if last.is_object() => looped(status, last),
        _ => shortened(waiting["message"].as_str().unwrap_or_default()),
    };
    Some((reason, why))
}

/// Whether a container that runs, or has just ended, will soon wait in a loop of
/// crashes again: the reason that it will have then, and the cause.
fn crash_loop(status: &Value, now: Timestamp) -> Option<(&'static str, String)> {
    let last = &status["lastState"]["terminated"];
    let has_failed = last["exitCode"].as_i64().is_some_and(|code| code != 0);
    if !has_failed || status["restartCount"].as_u64()? < LOOP_RESTARTS {
        return None;
    }
    let ran = between(time(&last["startedAt"])?, time(&last["finishedAt"])?);
    let started = time(&status["state"]["running"]["startedAt"]);
    let runs = started.map_or(Duration::ZERO, |started| between(started, now));
    let is_loop = ran < LONGEST_LOOP && runs < STABLE.max(2 * ran);
    is_loop.then(|| ("CrashLoopBackOff", looped(status, last)))
}

fn looped(status: &Value, last: &Value) -> String {
    let restarts = status["restartCount"].as_u64().unwrap_or(0);
    format!("it {} after a restart, {restarts} so far", cause(last))
}

/// How a container ended, as words that follow its name.
fn cause(terminated: &Value) -> String {
    let code = terminated["exitCode"].as_i64().unwrap_or_default();
    let message = shortened(terminated["message"].as_str().unwrap_or_default());
    let ended = match terminated["reason"].as_str().unwrap_or_default() {
        "OOMKilled" => "was killed because it needed more memory than its limit".to_owned(),
        reason @ ("StartError" | "ContainerCannotRun") => {
            format!("could not be started ({reason})")
        }
        _ if (129..=192).contains(&code) => {
            format!("ended with exit code {code} (signal {})", code - 128)
        }
        _ => format!("ended with exit code {code}"),
    };
    match message.as_str() {
        "" => ended,
        message => format!("{ended}: {message}"),
    }
}

/// The first line of `message` that is not empty, and no more of it than a status
/// should have.
fn shortened(message: &str) -> String {
    let mut lines = message.lines().map(str::trim);
    let line = lines.find(|line| !line.is_empty()).unwrap_or_default();
    line.chars().take(MOST_WORDS).collect()
}

fn time(value: &Value) -> Option<Timestamp> {
    value.as_str()?.parse().ok()
}

/// The time from `earlier` to `later`; zero where a clock was set back.
fn between(earlier: Timestamp, later: Timestamp) -> Duration {
    Duration::try_from(later.duration_since(earlier)).unwrap_or_default()
}
