//! Why a pod does not run, as its status says. No client.

use std::time::Duration;

use jiff::Timestamp;
use kube::ResourceExt;
use kube::api::DynamicObject;
use serde_json::Value;

use super::stores::{condition, text};
use crate::plan::objects::AGENT;
use crate::plan::status::Blocker;
use crate::plan::{End, elapsed};

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

/// What `pod` waits for before it is ready, as far as its status says.
pub(super) fn waits_for(pod: &DynamicObject, now: Timestamp) -> Option<String> {
    if let Some(deadline) = &pod.metadata.deletion_timestamp {
        return Some(deletion(pod, deadline.0, now));
    }
    let message = |condition: &Value| condition["message"].as_str().map(str::to_owned);
    let scheduled = condition(pod, "PodScheduled");
    if scheduled.is_some_and(|it| it["reason"] == "SchedulingGated") {
        return Some("it has scheduling gates, which someone else must remove".to_owned());
    }
    if scheduled.is_none_or(|it| it["status"] != "True") && text(pod, "/status/podIP").is_none() {
        let why = scheduled.and_then(message);
        return Some(why.unwrap_or_else(|| "it has no node yet".to_owned()));
    }
    let waiting = containers(pod).find_map(|status| {
        let reason = status["state"]["waiting"]["reason"].as_str()?;
        let container = status["name"].as_str()?;
        Some(format!("container {container} waits, {reason}; if it stays so, kubectl describe pod {} shows for which volume or image", pod.name_any()))
    });
    let ready = condition(pod, "Ready").filter(|ready| ready["status"] != "True");
    let unready = containers(pod).find(|status| status["ready"] == false);
    let unready = unready.map(|status| match status["name"].as_str().unwrap_or_default() {
        AGENT => "its workload listens on none of its ports, or it drains".to_owned(),
        container => format!("container {container} is not ready"),
    });
    // All containers are ready, as the kubelet reported them last.
    let lost = || match ready.and_then(message) {
        Some(message) => message,
        None => "its node does not report".to_owned(),
    };
    waiting.or(unready).or(ready.map(|_| lost()))
}

/// Why `pod`, which is being deleted, is still there. It should be gone at `deadline`.
fn deletion(pod: &DynamicObject, deadline: Timestamp, now: Timestamp) -> String {
    let at = deadline.strftime("%H:%M:%S UTC");
    let finalizers = pod.finalizers();
    if now <= deadline {
        return format!("it is being deleted, and has time until {at}");
    }
    let why = match finalizers.first() {
        Some(finalizer) => format!("finalizer {finalizer} keeps it"),
        None => "its node does not answer".to_owned(),
    };
    format!("it is being deleted, and should have been gone at {at}: {why}")
}

/// Why the cluster refuses the pods of `deployment`, if it does: in the words of the
/// API server, which may be about a quota, a limit or pod security. They begin with the
/// name of a pod, which is another one at each try.
pub(super) fn refused(deployment: &DynamicObject) -> Option<Blocker> {
    let failure = condition(deployment, "ReplicaFailure").filter(|it| it["status"] == "True")?;
    let message = failure["message"].as_str().unwrap_or_default();
    let begins = ["is forbidden: ", "is invalid: "].into_iter();
    let why = begins.filter_map(|begin| message.split_once(begin)).next();
    let message = shortened(why.map_or(message, |(_, why)| why));
    let name = deployment.name_any();
    Some(Blocker::new(
        "ConnectionServerRefused",
        format!("the pods of Deployment {name} cannot be created: {message}"),
    ))
}

/// The statuses of the containers of `pod`, those of the workload first: an agent
/// ends with its workload.
pub(super) fn containers(pod: &DynamicObject) -> impl Iterator<Item = &Value> {
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
    // It is done. That it failed before, its status says for as long as the pod is there.
    if status["state"]["terminated"]["exitCode"] == 0 {
        return None;
    }
    let last = &status["lastState"]["terminated"];
    let has_failed = last["exitCode"].as_i64().is_some_and(|code| code != 0);
    if !has_failed || status["restartCount"].as_u64()? < LOOP_RESTARTS {
        return None;
    }
    let ran = elapsed(time(&last["startedAt"])?, time(&last["finishedAt"])?);
    let started = time(&status["state"]["running"]["startedAt"]);
    let runs = started.map_or(Duration::ZERO, |started| elapsed(started, now));
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const NOW: &str = "2026-03-01T12:00:00Z";

    /// A pod with `status`.
    fn pod(status: &Value) -> DynamicObject {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "games-0" },
            "status": status,
        });
        serde_json::from_value(pod).unwrap()
    }

    fn before(seconds: i64) -> String {
        let now: Timestamp = NOW.parse().unwrap();
        (now - Duration::from_secs(seconds.unsigned_abs())).to_string()
    }

    /// A container in `state` that was restarted five times, and last ended with
    /// `exit_code` and `reason` after it had run for `ran` seconds.
    fn container(state: &Value, exit_code: i64, reason: &str, ran: i64) -> DynamicObject {
        pod(&json!({ "containerStatuses": [{
            "name": "main", "restartCount": 5, "state": state,
            "lastState": { "terminated": {
                "exitCode": exit_code, "reason": reason,
                "startedAt": before(100 + ran), "finishedAt": before(100),
            } },
        }] }))
    }

    fn running(seconds: i64) -> Value {
        json!({ "running": { "startedAt": before(seconds) } })
    }

    fn waiting(reason: &str) -> Value {
        json!({ "waiting": { "reason": reason, "message": "its message\nand more" } })
    }

    fn told(pod: &DynamicObject) -> Option<(&'static str, String)> {
        let blocker = blocker(pod, NOW.parse().unwrap())?;
        let words = format!("container main of pod games-0: {}: ", blocker.reason);
        let why = blocker.message.strip_prefix(&words);
        Some((blocker.reason, why.unwrap_or(&blocker.message).to_owned()))
    }

    #[test]
    fn a_crash_loop_is_one_while_its_container_waits_runs_and_ends() {
        let words = "it ended with exit code 3 after a restart, 5 so far".to_owned();
        let ended = json!({ "terminated": { "exitCode": 3 } });
        for state in [waiting("CrashLoopBackOff"), running(5), running(59), ended] {
            let pod = container(&state, 3, "Error", 1);
            assert_eq!(
                told(&pod),
                Some(("CrashLoopBackOff", words.clone())),
                "{state}"
            );
        }
        // A program that has done its work, and one that prepared the others.
        let done = json!({ "terminated": { "exitCode": 0, "reason": "Completed" } });
        let done = container(&done, 3, "Error", 1);
        assert_eq!(told(&done), None);
        let statuses = done.data["status"]["containerStatuses"].clone();
        let prepared = pod(&json!({ "phase": "Running", "initContainerStatuses": statuses }));
        assert_eq!(told(&prepared), None);
        // It is over when the container runs for longer than it ever does.
        assert_eq!(told(&container(&running(60), 3, "Error", 1)), None);
        assert!(told(&container(&running(239), 3, "Error", 120)).is_some());
        assert_eq!(told(&container(&running(240), 3, "Error", 120)), None);
        // It was none.
        assert_eq!(told(&container(&running(5), 3, "Error", 3600)), None);
        assert_eq!(told(&container(&running(5), 0, "Completed", 1)), None);
        let mut once = container(&running(5), 3, "Error", 1);
        once.data["status"]["containerStatuses"][0]["restartCount"] = 1.into();
        assert_eq!(told(&once), None);
    }

    #[test]
    fn the_cause_of_a_crash_is_told() {
        let cases = [
            (
                137,
                "OOMKilled",
                "it was killed because it needed more memory than its limit",
            ),
            (128, "StartError", "it could not be started (StartError)"),
            (
                127,
                "ContainerCannotRun",
                "it could not be started (ContainerCannotRun)",
            ),
            (139, "Error", "it ended with exit code 139 (signal 11)"),
            (1, "Error", "it ended with exit code 1"),
            (255, "Error", "it ended with exit code 255"),
        ];
        for (code, reason, words) in cases {
            let mut pod = container(&waiting("CrashLoopBackOff"), code, reason, 1);
            let (_, why) = told(&pod).unwrap();
            assert_eq!(why, format!("{words} after a restart, 5 so far"));
            let last = &mut pod.data["status"]["containerStatuses"][0]["lastState"]["terminated"];
            last["message"] = "\n exec: \"x\": not found \nmore".into();
            let (_, why) = told(&pod).unwrap();
            assert!(
                why.starts_with(&format!("{words}: exec: \"x\": not found")),
                "{why}"
            );
        }
    }

    #[test]
    fn a_container_that_waits_for_what_does_not_come_by_itself_is_reported() {
        for reason in STUCK {
            let pod = pod(&json!({ "initContainerStatuses": [
                { "name": "main", "restartCount": 0, "state": waiting(reason) },
            ] }));
            let (told, why) = told(&pod).unwrap();
            assert_eq!(why, "its message");
            let steady = if reason == "ErrImagePull" {
                "ImagePullBackOff"
            } else {
                reason
            };
            assert_eq!(told, steady);
        }
        for reason in ["ContainerCreating", "PodInitializing"] {
            let pod = pod(&json!({ "containerStatuses": [
                { "name": "main", "restartCount": 0, "state": waiting(reason) },
            ] }));
            assert_eq!(told(&pod), None, "{reason}");
        }
    }

    #[test]
    fn a_refusal_is_told_in_the_same_words_at_each_try() {
        let told = |message: &str| {
            let mut deployment = pod(&json!({ "conditions": [{
                "type": "ReplicaFailure", "status": "True", "message": message,
            }] }));
            deployment.metadata.name = Some("games-connection-server".to_owned());
            refused(&deployment).unwrap().message
        };
        let begin = "the pods of Deployment games-connection-server cannot be created: ";
        for (problem, why) in [
            ("is forbidden", "exceeded quota: small, limited: pods=1"),
            ("is invalid", "spec.hostname: Invalid value"),
        ] {
            for name in [
                "games-connection-server-7d9f-abcde",
                "games-connection-server-7d9f-vwxyz",
            ] {
                let message = told(&format!("pods \"{name}\" {problem}: {why}\nand more"));
                assert_eq!(message, format!("{begin}{why}"));
            }
        }
        let others = "admission webhook \"x\" denied the request";
        assert_eq!(told(others), format!("{begin}{others}"));
        assert_eq!(told(&"x".repeat(1000)).len(), begin.len() + MOST_WORDS);
    }

    #[test]
    fn the_end_of_a_pod_is_told_in_the_words_of_the_one_that_ended_it() {
        let terminated = |code: i64| json!([{ "name": "main", "state": { "terminated": { "exitCode": code, "reason": "Error" } } }]);
        let cases = [
            (json!({ "phase": "Running" }), None),
            (json!({}), None),
            (
                json!({ "phase": "Failed", "reason": "NodePorts", "message": "Pod was rejected" }),
                Some((false, "NodePorts: Pod was rejected")),
            ),
            (
                json!({ "phase": "Failed", "reason": "Evicted", "containerStatuses": terminated(137) }),
                Some((false, "Evicted")),
            ),
            (
                json!({ "phase": "Failed", "containerStatuses": terminated(3) }),
                Some((false, "container main ended with exit code 3")),
            ),
            (
                json!({ "phase": "Succeeded", "containerStatuses": terminated(0) }),
                Some((true, "container main ended with exit code 0")),
            ),
            (
                json!({ "phase": "Failed" }),
                Some((false, "its status does not say why")),
            ),
        ];
        for (status, expected) in cases {
            let end = end(&pod(&status));
            let end = end.as_ref().map(|end| (end.is_success, end.cause.as_str()));
            assert_eq!(end, expected, "{status}");
        }
    }
}
