//! What everything that works with a Kubernetes cluster needs: the client of its
//! API server, and the pauses after a watch has failed. What is read and written
//! in the cluster is in `follow` and `operator`.

use std::time::Duration;

use backon::ExponentialBuilder;
use kube::Client;
use kube::runtime::watcher::ExponentialBackoff;

/// The shortest pause after the first failure of a watch.
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// The shortest pause after many failures of a watch. kube's own pauses grow to
/// 30 s and more, which is long for an API server that was restarted.
const LAST_PAUSE: Duration = Duration::from_secs(4);

/// A client of the cluster that the kubeconfig names, or of the one that this
/// process runs in.
///
/// # Errors
/// kube's, when there is neither.
pub async fn connect() -> Result<Client, kube::Error> {
    Client::try_default().await
}

/// The pauses between the tries of a watch that fails: at most 0.5 s at first,
/// doubling up to 8 s. Each is up to a half shorter by chance, because many
/// watches that lost the same server must not return at the same time.
#[must_use]
pub fn watch_backoff() -> ExponentialBackoff {
    ExponentialBuilder::new()
        .with_min_delay(FIRST_PAUSE)
        .with_max_delay(LAST_PAUSE)
        .without_max_times()
        // This adds up to the pause itself.
        .with_jitter()
        .into()
}

#[cfg(test)]
mod tests {
    use kube::runtime::utils::Backoff;

    use super::*;

    #[test]
    fn pauses_double_up_to_8_seconds() {
        let mut pauses = watch_backoff();
        for _ in 0..2 {
            for longest in [500, 1000, 2000, 4000, 8000, 8000, 8000] {
                let longest = Duration::from_millis(longest);
                let pause = pauses.next().unwrap();
                assert!(
                    (longest / 2..=longest).contains(&pause),
                    "{pause:?}, at most {longest:?}"
                );
            }
            pauses.reset();
        }
    }
}
