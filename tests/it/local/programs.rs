//! The examples of real programs, each with a client of its own kind.

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use super::{ASK, Local, connect, example, portpool, request, request_ports, write};
use crate::common::SOON;

#[test]
fn the_iperf3_example_measures() {
    let local = Local::start(&example("iperf3.yaml"));
    local.until("ports free");
    let (host, port) = request();
    let measure = |further: &[&str]| -> serde_json::Value {
        let measured = Command::new("iperf3")
            .args(["-c", &host, "-p", &port, "-J"])
            .args(further)
            .output()
            .unwrap();
        let report = String::from_utf8_lossy(&measured.stdout);
        assert!(measured.status.success(), "{report}");
        serde_json::from_str(&report).unwrap()
    };
    let tcp = measure(&["-n", "64M"]);
    let received = &tcp["end"]["sum_received"]["bytes"];
    // It counts until the sender says that it is done, not to the last byte.
    assert!(received.as_u64() > Some(8 << 20), "{tcp}");
    // The server opens UDP for each measurement, and the port of TCP is the same.
    for _ in 0..2 {
        let udp = measure(&["--udp", "--bitrate", "20M", "--time", "1"]);
        let sum = &udp["end"]["sum"];
        let (packets, lost) = (sum["packets"].as_u64(), sum["lost_packets"].as_u64());
        assert!(
            packets >= Some(50) && lost < packets.map(|all| all / 2),
            "{udp}"
        );
    }
    local.stop();
}

#[test]
fn the_redis_example_answers_two_clients_on_ports_of_their_own() {
    let local = Local::start(&example("redis.yaml"));
    local.until("ports free");
    let endpoints = [request(), request()];
    assert_ne!(endpoints[0], endpoints[1]);
    for endpoint in endpoints {
        let mut stream = connect(&endpoint);
        stream.write_all(b"PING\r\n").unwrap();
        let mut answer = [0; 7];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"+PONG\r\n");
    }
    local.stop();
}

/// What the SQL client prints for `statement`.
fn query((host, port): &(String, String), statement: &str) -> String {
    let output = Command::new("psql")
        .args(["-h", host, "-p", port, "-U", "postgres", "-XAt", "-c"])
        .arg(statement)
        .env("PGPASSWORD", "example")
        .env("PGCONNECT_TIMEOUT", "20")
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_postgresql_example_gives_each_client_an_empty_database() {
    let local = Local::start(&example("postgresql.yaml"));
    local.until("2 ports free");
    let is_empty = "SELECT to_regclass('numbers') IS NULL";
    let first = portpool(&["request", ASK, "-o", "wide"], "").stdout;
    let first = String::from_utf8(first).unwrap();
    let (endpoint, id) = first.trim().split_once(' ').unwrap();
    let (host, port) = endpoint.rsplit_once(':').unwrap();
    let (one, other) = ((host.to_owned(), port.to_owned()), request());
    query(
        &one,
        "CREATE TABLE numbers AS SELECT n FROM generate_series(1, 100000) n",
    );
    let expected: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
    assert!(query(&one, "COPY numbers TO STDOUT") == expected);
    assert_eq!(query(&other, is_empty), "t\n");
    // The same slot has another server afterwards.
    assert!(portpool(&["release", ASK, id], "").status.success());
    local.until("postgresql-0 is replaced");
    let third = request();
    assert_eq!(third, one);
    assert_eq!(query(&third, is_empty), "t\n");
    local.stop();
}

/// The name of the Teeworlds server that a client of 0.7 would see in its list.
///
/// Source: Teeworlds 0.7, `src/engine/shared/network.h` and `src/mastersrv/mastersrv.h`:
/// a client shows a token that it has received before it is told more.
fn room_name((host, port): &(String, String)) -> String {
    const TOKEN: &[u8] = b"\x01\x02\x03\x04";
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    socket.connect(format!("{host}:{port}")).unwrap();
    let mut answer = [0; 2048];
    let ask_token = [b"\x04\0\0\xff\xff\xff\xff\x05", TOKEN, &[0; 508]].concat();
    socket.send(&ask_token).unwrap();
    assert_eq!(socket.recv(&mut answer).unwrap(), 12);
    assert_eq!((&answer[3..7], answer[7]), (TOKEN, 5));
    let token = answer[8..12].to_owned();
    let ask_info = [b"\x21", &token[..], TOKEN, b"\xff\xff\xff\xffgie3\x05"].concat();
    socket.send(&ask_info).unwrap();
    let length = socket.recv(&mut answer).unwrap();
    let info = answer[9..length].strip_prefix(b"\xff\xff\xff\xffinf3\x05");
    // The version, the name, and so on.
    let mut texts = info.unwrap().split(|byte| *byte == 0);
    let version = texts.next().unwrap();
    assert!(version.starts_with(b"0.7"));
    String::from_utf8(texts.next().unwrap().to_owned()).unwrap()
}

#[test]
fn the_teeworlds_example_gives_each_client_a_game_server() {
    let local = Local::start(&example("teeworlds.yaml"));
    local.until("2 ports free");
    let rooms = [request(), request()];
    for _ in 0..3 {
        let mut names = rooms.each_ref().map(room_name);
        names.sort();
        assert_eq!(names, ["teeworlds-0", "teeworlds-1"]);
    }
    local.stop();
}

/// Reads `N` bytes.
fn read<const N: usize>(stream: &mut TcpStream) -> [u8; N] {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// The name of a desktop and all bytes of its picture.
///
/// Source: RFC 6143, section 7.
fn look_at(stream: &mut TcpStream) -> (String, Vec<u8>) {
    assert_eq!(&read(stream), b"RFB 003.008\n");
    stream.write_all(b"RFB 003.008\n").unwrap();
    // One way to authenticate: none. It succeeds, and others may watch.
    assert_eq!(read(stream), [1, 1]);
    stream.write_all(&[1]).unwrap();
    assert_eq!(read(stream), [0; 4]);
    stream.write_all(&[1]).unwrap();
    let size: [u8; 4] = read(stream);
    assert_eq!(size, [2, 128, 1, 224], "640 times 480");
    let bits_per_pixel = read::<16>(stream)[0];
    assert_eq!(bits_per_pixel, 32);
    let mut name = vec![0; u32::from_be_bytes(read(stream)) as usize];
    stream.read_exact(&mut name).unwrap();
    // The whole picture, as it comes: one rectangle, not encoded.
    stream
        .write_all(&[&[3, 0, 0, 0, 0, 0][..], &size].concat())
        .unwrap();
    assert_eq!(read(stream), [0, 0, 0, 1]);
    let rectangle = [&[0, 0, 0, 0][..], &size, &[0; 4]].concat();
    assert_eq!(read::<12>(stream)[..], rectangle);
    let mut picture = vec![0; 640 * 480 * 4];
    stream.read_exact(&mut picture).unwrap();
    (String::from_utf8(name).unwrap(), picture)
}

#[test]
fn the_desktop_example_shows_each_client_a_screen_of_its_own() {
    let local = Local::start(&example("desktop.yaml"));
    local.until("2 ports free");
    let mut clients = [request(), request()].map(|endpoint| connect(&endpoint));
    let seen = clients.each_mut().map(look_at);
    let mut names = seen.each_ref().map(|(name, _)| name);
    names.sort();
    assert_eq!(names, ["desktop-0", "desktop-1"]);
    for (_, picture) in &seen {
        let is_white = |pixel: &[u8]| pixel[..3] == [255; 3];
        assert!(picture.chunks(4).all(is_white));
    }
    local.stop();
}

#[test]
fn the_tftp_example_sends_and_receives_files() {
    if !rustix::process::geteuid().is_root() {
        return println!("not root: cannot start in.tftpd; nothing was checked");
    }
    // The server reads and writes as another user, and only files that are there.
    let files = tempfile::tempdir().unwrap();
    fs::set_permissions(&files, Permissions::from_mode(0o755)).unwrap();
    let writable = files.path().join("upload");
    fs::write(&writable, "").unwrap();
    fs::set_permissions(&writable, Permissions::from_mode(0o666)).unwrap();
    let content: Vec<u8> = (0..700_001_u32)
        .map(|n| n.wrapping_mul(n).to_le_bytes()[1])
        .collect();
    let boot = files.path().join("boot.img");
    fs::write(&boot, &content).unwrap();
    let manifest = fs::read_to_string(example("tftp.yaml")).unwrap();
    let folder = files.path().display().to_string();
    let (_folder, file) = write(&manifest.replace("/srv/tftp", &folder));
    let local = Local::start(&file);
    local.until("32 ports free");
    let (host, port) = request();
    let curl = |further: &[&str], name: &str| {
        let url = format!("tftp://{host}:{port}/{name}");
        let common = ["--silent", "--show-error", "--max-time", "20", &url];
        output_of("curl", &[&common[..], further].concat())
    };
    // Each transfer has another port of the client, and is another flow.
    for options in [&["--tftp-no-options"][..], &["--tftp-blksize", "1400"]] {
        assert!(curl(options, "boot.img") == content);
        let upload = [options, &["--upload-file", boot.to_str().unwrap()]].concat();
        curl(&upload, "upload");
        assert!(fs::read(&writable).unwrap() == content);
        fs::write(&writable, "").unwrap();
    }
    local.stop();
}

/// What `program` prints.
fn output_of(program: &str, arguments: &[&str]) -> Vec<u8> {
    let output = Command::new(program).args(arguments).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {error}");
    output.stdout
}

#[test]
fn the_vsftpd_example_keeps_the_files_of_each_client() {
    if !rustix::process::geteuid().is_root() {
        return println!("not root: cannot start vsftpd; nothing was checked");
    }
    let local = Local::start(&example("vsftpd.yaml"));
    local.until("2 ports free");
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let clients = [(1, request()), (2, request())];
    let content = |client: u8| vec![client; 3_000_001];
    for (client, (host, port)) in &clients {
        let url = format!("ftp://{host}:{port}/files/");
        // The server sends a port only, or its address as well.
        for (command, option) in [("EPSV", "--ftp-pasv"), ("PASV", "--disable-epsv")] {
            let name = format!("{command}-{client}");
            fs::write(path(&name), content(*client)).unwrap();
            output_of("curl", &["-sS", option, "-T", &path(&name), &url]);
            let file = format!("{url}{name}");
            assert!(output_of("curl", &["-sS", option, &file]) == content(*client));
        }
    }
    for (client, (host, port)) in &clients {
        let (name, back) = (format!("PASV-{client}"), path("back"));
        let commands = format!(
            "set ftp:ssl-allow no; set net:max-retries 1; open ftp://{host}:{port}/files; cls -1; get {name} -o {back}"
        );
        let listing = output_of("lftp", &["--norc", "-c", &commands]);
        let listing = String::from_utf8(listing).unwrap();
        assert_eq!(listing, format!("EPSV-{client}\nPASV-{client}\n"));
        assert!(fs::read(&back).unwrap() == content(*client));
        fs::remove_file(back).unwrap();
    }
    local.stop();
}

#[test]
fn the_kernel_example_gives_each_client_the_five_ports_of_one_kernel() {
    let local = Local::start(&example("kernel.yaml"));
    local.until("10 ports free");
    let run = |ports: &[(String, String); 5], code: &str| {
        let script = include_str!("../../clients/kernel.py");
        let ports: Vec<&str> = ports.iter().map(|(_, port)| &port[..]).collect();
        let arguments = [&["-c", script, code, "127.0.0.1"], &ports[..]].concat();
        String::from_utf8(output_of("/usr/bin/python3", &arguments)).unwrap()
    };
    // Both are in use at once; that of the second call is that of the first one.
    let kernels: [[_; 5]; 2] = [request_ports(&["kernel:5"]), request_ports(&["kernel:5"])];
    for (number, kernel) in kernels.iter().enumerate() {
        let seen = run(kernel, &format!("number = {number}; print(input() * 2)"));
        assert_eq!(seen, "inputinput\nok\ninterrupt_reply\nTrue\n");
    }
    for (number, kernel) in kernels.iter().enumerate() {
        let seen = run(kernel, "print(number + 40)");
        assert_eq!(
            seen,
            format!("{}\nok\ninterrupt_reply\nTrue\n", number + 40)
        );
    }
    local.until("is replaced");
    local.stop();
}

/// The name of the OpenTTD server that a client would see in its list.
///
/// Source: OpenTTD 13, `src/network/core/tcp_game.h` and `network_game_info.cpp`: a
/// packet begins with its length, little-endian, and its type.
fn game_name(endpoint: &(String, String)) -> String {
    // "Is there a server?" over UDP, as on a local network.
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    socket
        .connect(format!("{}:{}", endpoint.0, endpoint.1))
        .unwrap();
    socket.send(&[3, 0, 0]).unwrap();
    let mut answer = [0; 3];
    assert_eq!(socket.recv(&mut answer).unwrap(), 3);
    assert_eq!(answer, [3, 0, 1]);
    // "What does it play?" over TCP.
    let mut stream = connect(endpoint);
    stream.write_all(&[3, 0, 7]).unwrap();
    let [low, high, kind] = read(&mut stream);
    assert_eq!(kind, 6);
    let mut info = vec![0; usize::from(u16::from_le_bytes([low, high])) - 3];
    stream.read_exact(&mut info).unwrap();
    // Two dates of four bytes, and eleven other bytes, are before the name.
    let name = info[19..].split(|byte| *byte == 0).next().unwrap();
    String::from_utf8(name.to_owned()).unwrap()
}

#[test]
fn the_openttd_example_gives_each_client_a_game() {
    let local = Local::start(&example("openttd.yaml"));
    local.until("2 ports free");
    let games = [request(), request()];
    let mut names = games.each_ref().map(game_name);
    names.sort();
    assert_eq!(names, ["openttd-0", "openttd-1"]);
    local.stop();
}
