use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;

use super::*;
use crate::pool::{LoadSharing, Recycle, Sessions};
use crate::table::{FORMAT_VERSION, TargetPort};

const SOON: Duration = Duration::from_secs(5);

fn table(generation: u64, uid: &str) -> Table {
    Table {
        format_version: FORMAT_VERSION,
        pool: "pool".to_owned(),
        pool_uid: uid.to_owned(),
        generation,
        advertised_address: None,
        agent_port: TargetPort::new(7070).unwrap(),
        load_sharing: LoadSharing::default(),
        sessions: Sessions::default(),
        recycle: Recycle::default(),
        drain_seconds: None,
        rows: Vec::new(),
    }
}

#[test]
fn only_a_newer_table_of_the_same_pool_is_accepted() {
    let current = table(5, "a");
    assert!(matches!(is_newer(&table(1, "b"), None), Ok(true)));
    let decide = |generation, uid| is_newer(&table(generation, uid), Some(&current));
    assert!(matches!(decide(6, "a"), Ok(true)));
    assert!(matches!(decide(5, "a"), Ok(false)));
    let older = decide(4, "a");
    assert!(matches!(
        older,
        Err(Rejected::Older {
            found: 4,
            current: 5
        })
    ));
    assert!(matches!(decide(9, "b"), Err(Rejected::OtherPool { .. })));
}

async fn generation(receiver: &mut watch::Receiver<Option<Arc<Table>>>, wanted: u64) {
    let reached = receiver.wait_for(|table| {
        table
            .as_ref()
            .is_some_and(|table| table.generation == wanted)
    });
    tokio::time::timeout(SOON, reached)
        .await
        .expect("in time")
        .unwrap();
}

async fn counted(rejected: &RejectedTables, cause: &'static str) {
    let mut registry = Registry::default();
    rejected.register(&mut registry);
    let name = format!("portpool_tables_rejected_total{{cause=\"{cause}\"}} ");
    let count = || {
        let mut shown = String::new();
        encode(&mut shown, &registry).unwrap();
        let count = shown.lines().find_map(|line| line.strip_prefix(&name));
        count.unwrap().to_owned()
    };
    let waiting = async {
        while count() == "0" {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(SOON, waiting).await.expect("in time");
}

#[tokio::test]
async fn a_file_is_followed_through_faults() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table.json");
    let follower = follow_file(&path).unwrap();
    let (mut current, rejected) = (follower.watch(), follower.rejected());
    write_table(&path, &table(1, "a")).unwrap();
    generation(&mut current, 1).await;
    std::fs::write(&path, "not a table").unwrap();
    counted(&rejected, "invalid").await;
    std::fs::remove_file(&path).unwrap();
    write_table(&path, &table(3, "a")).unwrap();
    generation(&mut current, 3).await;
    write_table(&path, &table(2, "a")).unwrap();
    counted(&rejected, "older").await;
    generation(&mut current, 3).await;
}

#[tokio::test]
async fn a_mounted_config_map_is_followed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table.json");
    let publish = |number: u64| {
        let data = folder.path().join(format!("..{number}"));
        std::fs::create_dir(&data).unwrap();
        write_table(&data.join("table.json"), &table(number, "a")).unwrap();
        let link = folder.path().join("..data_tmp");
        std::os::unix::fs::symlink(&data, &link).unwrap();
        std::fs::rename(&link, folder.path().join("..data")).unwrap();
    };
    publish(1);
    std::os::unix::fs::symlink("..data/table.json", &path).unwrap();
    let follower = follow_file(&path).unwrap();
    let mut current = follower.watch();
    generation(&mut current, 1).await;
    publish(2);
    generation(&mut current, 2).await;
}

/// How often the file at `path` is opened while `act` runs and a little after it, as the
/// kernel reports them.
async fn reads(path: &std::path::Path, act: impl FnOnce()) -> usize {
    let flags = rustix::fs::inotify::CreateFlags::NONBLOCK;
    let inotify = rustix::fs::inotify::init(flags).unwrap();
    let opened = rustix::fs::inotify::WatchFlags::OPEN;
    rustix::fs::inotify::add_watch(&inotify, path, opened).unwrap();
    act();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
    let mut events = rustix::fs::inotify::Reader::new(&inotify, &mut buffer);
    std::iter::from_fn(|| events.next().ok().map(|_| ())).count()
}

#[tokio::test]
async fn a_file_beside_the_table_makes_no_one_read_the_table() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("table.json");
    write_table(&path, &table(1, "a")).unwrap();
    let followers = [(); 10].map(|()| follow_file(&path).unwrap());
    for follower in &followers {
        generation(&mut follower.watch(), 1).await;
    }
    let beside = reads(&path, || {
        for number in 0..100 {
            std::fs::write(folder.path().join(format!("{number}")), "beside").unwrap();
        }
        let draft = folder.path().join("draft");
        std::fs::write(&draft, "beside").unwrap();
        std::fs::rename(&draft, folder.path().join("0")).unwrap();
        std::fs::remove_file(folder.path().join("1")).unwrap();
    });
    assert_eq!(beside.await, 0);
    write_table(&path, &table(2, "a")).unwrap();
    for follower in &followers {
        generation(&mut follower.watch(), 2).await;
    }
    let text = table(3, "a").encode().unwrap();
    let own = reads(&path, || std::fs::write(&path, text).unwrap());
    assert!(own.await > 0, "a change of it is read");
    for follower in &followers {
        generation(&mut follower.watch(), 3).await;
    }
}
