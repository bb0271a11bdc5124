//! The examples whose clients send sound: RTP with RTCP, and a call over SIP.

use std::fs;
use std::io::Write;
use std::net::UdpSocket;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{Local, example, request_ports, until, write};
use crate::common::SOON;

/// Bytes in which a lost or exchanged packet shows.
fn noise(length: u32) -> Vec<u8> {
    (0..length)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0])
        .collect()
}

#[test]
fn the_recorder_example_keeps_every_sample_until_the_sender_says_goodbye() {
    let recordings = tempfile::tempdir().unwrap();
    let folder = recordings.path().display().to_string();
    let manifest = fs::read_to_string(example("recorder.yaml")).unwrap();
    let (_folder, file) = write(&manifest.replace("/srv/recordings", &folder));
    let local = Local::start(&file);
    local.until("4 ports free");
    let ports = request_ports(&["rtp:2"]);
    let [rtp, rtcp] = ports
        .each_ref()
        .map(|(_, port)| port.parse::<u16>().unwrap());
    assert!(rtp.is_multiple_of(2) && rtcp == rtp + 1, "{rtp}, {rtcp}");
    // Two seconds, in WAV's order of bytes. RTP and RTCP are two flows, so that the
    // goodbye may overtake the silence after them.
    let a_second = 44_100 * 2 * 2;
    let sound = noise(2 * a_second);
    let sent = [&sound[..], &vec![0; a_second as usize / 4]].concat();
    let url = format!("rtp://127.0.0.1:{rtp}?rtcpport={rtcp}");
    let sender = ["-loglevel", "error", "-re", "-f", "s16le", "-ar", "44100"];
    let mut sender = Command::new("ffmpeg")
        .args(sender)
        .args(["-ac", "2", "-i", "pipe:0", "-c:a", "pcm_s16be"])
        .args(["-f", "rtp", "-rtpflags", "send_bye", &url])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    sender.stdin.take().unwrap().write_all(&sent).unwrap();
    assert!(sender.wait().unwrap().success());
    let recorded = || {
        let mut files = fs::read_dir(recordings.path()).unwrap().flatten();
        fs::read(files.next()?.path()).ok()
    };
    // The file is written when the goodbye has arrived over RTCP.
    until(|| recorded().is_some_and(|file| file.len() > sound.len()));
    let file = recorded().unwrap();
    let start = file.windows(4).position(|word| word == b"data").unwrap() + 8;
    assert!(file[start..].starts_with(&sound));
    // Nothing arrives any more, so that the session is over, and the recorder too.
    local.until("is replaced");
    local.stop();
}

/// The lines of a SIP message that begin with `name`, without that.
fn lines<'a>(message: &'a str, name: &'a str) -> Vec<&'a str> {
    let lines = message.lines();
    lines.filter_map(|line| line.strip_prefix(name)).collect()
}

#[test]
fn the_sip_example_answers_a_call_and_returns_its_sound() {
    let local = Local::start(&example("sip.yaml"));
    local.until("6 ports free");
    let ports: [_; 3] = request_ports(&["sip", "media:2"]);
    let [sip, media, _] = ports.map(|(host, port)| format!("{host}:{port}"));
    let folder = tempfile::tempdir().unwrap();
    let messages = folder.path().join("messages");
    let mut caller = Command::new("sipp")
        .args(["-sn", "uac", "-m", "1", "-d", "3000", "-timeout", "20"])
        .args(["-i", "127.0.0.1", "-bind_local", "-ci", "127.0.0.1"])
        .args(["-nostdin", "-trace_msg", "-message_file"])
        .args([messages.as_os_str(), sip.as_ref()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let received = || fs::read_to_string(&messages).unwrap_or_default();
    until(|| received().contains("ACK sip:"));
    let text = received();
    let (_, answer) = text.split_once("UDP message received").unwrap();
    let (answer, _) = answer.split_once("UDP message sent").unwrap();
    // What the server announces is where the client can reach it.
    assert_eq!(lines(answer, "Contact: "), [format!("<sip:{sip}>")]);
    let address = lines(answer, "c=IN IP4 ")[0];
    let port = lines(answer, "m=audio ")[0].strip_suffix(" RTP/AVP 0");
    assert_eq!(format!("{address}:{}", port.unwrap()), media);
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    socket.connect(&media).unwrap();
    // 20 ms of sound each, as RFC 3550 and RFC 3551 have it.
    for (sequence, sound) in (0_u16..).zip(noise(160 * 50).chunks(160)) {
        let times = u32::from(sequence) * 160;
        let header = [
            &[0x80, 0][..],
            &sequence.to_be_bytes(),
            &times.to_be_bytes(),
        ];
        let packet = [&header.concat()[..], b"call", sound].concat();
        socket.send(&packet).unwrap();
        let mut back = [0; 2048];
        let length = socket.recv(&mut back).unwrap();
        assert!(back[..length] == packet, "packet {sequence}");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(caller.wait().unwrap().success(), "{}", received());
    assert!(received().contains("BYE sip:"));
    local.stop();
}
