//! The examples whose clients send sound: RTP with RTCP, and a call over SIP.

use std::fs;
use std::io::Write;
use std::net::UdpSocket;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use super::{Local, example, request_ports, until, write};

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

/// Datagrams of a client to a server, and of the server to the client.
type Passed = Arc<Mutex<[Vec<Vec<u8>>; 2]>>;

/// Passes datagrams on between `server` and the first client of the port that is
/// returned, with `change` made to each, and records them as they came.
fn relay(
    server: &str,
    change: impl Fn(Vec<u8>) -> Vec<u8> + Clone + Send + 'static,
) -> (u16, Passed) {
    let [near, far] = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
    far.connect(server).unwrap();
    let port = near.local_addr().unwrap().port();
    let passed = Passed::default();
    let record = passed.clone();
    thread::spawn(move || {
        let (_, client) = near.peek_from(&mut [0; 1]).unwrap();
        near.connect(client).unwrap();
        let back = [&far, &near].map(|socket| socket.try_clone().unwrap());
        for (way, [from, to]) in [(0, [near, far]), (1, back)] {
            let (record, change) = (record.clone(), change.clone());
            thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(length) = from.recv(&mut buffer) {
                    let datagram = buffer[..length].to_vec();
                    record.lock().unwrap()[way].push(datagram.clone());
                    // The receiver may be gone; then the sender soon is, too.
                    let _ = to.send(&change(datagram));
                }
            });
        }
    });
    (port, passed)
}

/// The scenario of SIPp's caller, who plays the file `sound` in the call.
fn scenario(sound: &Path) -> String {
    let default = Command::new("sipp").args(["-sd", "uac"]).output().unwrap();
    let play = format!(
        "<nop><action><exec rtp_stream=\"{},1,0\"/></action></nop><pause/>",
        sound.display()
    );
    String::from_utf8(default.stdout)
        .unwrap()
        .replace("[media_port]", "[rtpstream_audio_port]")
        .replace("<pause/>", &play)
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
    let announced = format!("m=audio {} RTP/AVP 0", ports[1].1);
    let [sip, media, _] = ports.map(|(host, port)| format!("{host}:{port}"));
    // SIPp does not show the sound that it receives. So the caller is sent to a relay
    // before the media port, whose number is as long: the lengths in messages stay.
    let (media_relay, sounds) = relay(&media, |packet| packet);
    let changed = format!("m=audio {media_relay} RTP/AVP 0");
    assert_eq!(changed.len(), announced.len());
    let (sip_relay, messages) = relay(&sip, move |message| {
        let text = String::from_utf8(message).unwrap();
        text.replace(&announced, &changed).into_bytes()
    });
    let folder = tempfile::tempdir().unwrap();
    let (file, caller) = (
        folder.path().join("sound"),
        folder.path().join("caller.xml"),
    );
    // 50 packets of 20 ms, as RFC 3551 has it.
    let sound = noise(50 * 160);
    fs::write(&file, &sound).unwrap();
    fs::write(&caller, scenario(&file)).unwrap();
    let mut caller = Command::new("sipp")
        .args(["-m", "1", "-d", "3000", "-timeout", "20", "-nostdin"])
        .args(["-i", "127.0.0.1", "-bind_local", "-ci", "127.0.0.1"])
        .args(["-mi", "127.0.0.1", "-sf"])
        .args([
            caller.as_os_str(),
            format!("127.0.0.1:{sip_relay}").as_ref(),
        ])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let is_successful = caller.wait().unwrap().success();
    let [sent, received] = messages.lock().unwrap().clone().map(|messages| {
        let texts = messages.into_iter().map(String::from_utf8);
        texts.collect::<Result<Vec<_>, _>>().unwrap()
    });
    assert!(is_successful, "{sent:?} {received:?}");
    assert!(sent.last().unwrap().starts_with("BYE sip:"));
    // What the server announces is where the client can reach it.
    let answer = &received[0];
    assert_eq!(lines(answer, "Contact: "), [format!("<sip:{sip}>")]);
    let address = lines(answer, "c=IN IP4 ")[0];
    let port = lines(answer, "m=audio ")[0].strip_suffix(" RTP/AVP 0");
    assert_eq!(format!("{address}:{}", port.unwrap()), media);
    let [played, returned] = sounds.lock().unwrap().clone();
    let payloads = played.iter().flat_map(|packet| &packet[12..]);
    assert_eq!(played.len(), 50);
    assert!(payloads.eq(&sound), "the caller plays the file");
    assert!(returned == played, "every packet comes back, in order");
    local.stop();
}
