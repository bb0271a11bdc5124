//! Whether a connection needs a session, by port entry.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use portpool::pool::EntryAdmission;

use crate::common::{COUNT, Pool, SOON, echo, is_cut};

/// A connection to `port` of the connection server.
fn connect(pool: &Pool, port: u16) -> TcpStream {
    let stream = TcpStream::connect((pool.connection_address(0), port)).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream
}

/// Whether what is sent to `port` comes back.
fn answers(pool: &Pool, port: u16) -> bool {
    let mut stream = connect(pool, port);
    stream.write_all(b"?").is_ok() && matches!(stream.read(&mut [0]), Ok(1))
}

#[tokio::test]
async fn an_open_entry_forwards_without_a_session_and_others_do_not() {
    let mut pool = Pool::running(2, |table| {
        table.rows[1].ranges[0].admission = Some(EntryAdmission::Open);
    })
    .await;
    let (first, second) = (20_000, 20_000 + COUNT);
    assert!(is_cut(&mut connect(&pool, first)));
    let mut kept = connect(&pool, second);
    echo(&mut kept, "no session, no question");
    // The entries of a running pool change.
    pool.table.rows[0].ranges[0].admission = Some(EntryAdmission::Open);
    pool.table.rows[1].ranges[0].admission = None;
    pool.table.generation += 1;
    pool.publish();
    let deadline = Instant::now() + SOON;
    while !answers(&pool, first) {
        assert!(Instant::now() < deadline, "still closed");
    }
    assert!(is_cut(&mut connect(&pool, second)));
    echo(&mut kept, "what was forwarded goes on");
}
