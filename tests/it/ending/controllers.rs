//! The controller, without an API server that answers.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::SIGNALS;
use super::commands::{asked, blackhole};
use super::program::{Program, Reader};
use crate::common::cluster::{quick, write_kubeconfig};
use crate::common::faulty::Faulty;
use crate::common::proxy::Fault;
use crate::common::turn;

fn controller(kubeconfig: &Path, more: &[&str]) -> Program {
    let mut arguments = vec!["controller", "--admin=127.0.0.1:0"];
    arguments.extend(more);
    let kubeconfig = kubeconfig.display().to_string();
    let environment = [("KUBECONFIG", kubeconfig.as_str())];
    Program::with(&arguments, &environment, Reader::Reads, Reader::Reads).0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_whose_api_server_never_answered_ends_at_a_signal() {
    let _turn = turn().await;
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig: PathBuf = folder.path().join("kubeconfig");
    for (signal, _) in SIGNALS {
        for lease in [None, Some("--lease=portpool/portpool")] {
            let more: Vec<&str> = lease.into_iter().collect();
            // It accepts and says nothing.
            let (listener, address) = blackhole();
            write_kubeconfig(&kubeconfig, &format!("http://{address}"));
            let mut program = controller(&kubeconfig, &more);
            let _client = asked(&listener);
            program.ends_at(signal, 0, "a controller without an answer");
        }
        // It refuses connections. With a lease the controller fails by itself.
        write_kubeconfig(&kubeconfig, "http://127.0.0.1:9");
        let mut program = controller(&kubeconfig, &[]);
        program.until_said("controller ready");
        std::thread::sleep(Duration::from_millis(300));
        program.ends_at(signal, 0, "a controller without an API server");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_whose_api_server_stops_answering_says_what_it_waits_for() {
    let faulty = Faulty::new("ending").await;
    for (number, (signal, code)) in SIGNALS.into_iter().enumerate() {
        // One that was ended at once still has its lease.
        let leases = [0, 1].map(|use_| format!("--lease=ending/portpool-{number}-{use_}"));
        let start = |lease: &str| {
            let more = ["--namespace=ending", "--image=portpool:test", lease];
            controller(&faulty.proxy.kubeconfig, &more)
        };
        faulty.proxy.rule(|_| Fault::Pass);
        let mut program = start(&leases[0]);
        program.until_said("controller ready");
        faulty.space.make_ready("games", quick(1)).await;
        program.ends_at(signal, 0, "an idle controller");
        let mut program = start(&leases[1]);
        program.until_said("controller ready");
        faulty.space.make_ready("games", quick(2)).await;
        faulty.proxy.rule(|call| match call.write {
            Some(_) => Fault::Hold,
            None => Fault::Pass,
        });
        faulty.space.apply("games", quick(3)).await.unwrap();
        faulty.proxy.held.notified().await;
        program.signal(signal);
        program.until_said("reconciles under way may finish");
        program.ends_at(signal, code, "a controller that waits");
    }
}
