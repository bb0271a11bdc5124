//! A program that is to end, and the readers of its output.

use std::fs::File;
use std::io::{PipeReader, Write, pipe};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::common::SOON;

/// How long a program may take to end, or to say what it waits for.
pub const AT_ONCE: Duration = Duration::from_secs(1);

/// A program under test.
pub struct Program {
    pub child: Child,
    pub stdin: Option<ChildStdin>,
    pub folder: tempfile::TempDir,
}

/// Where a program writes to.
#[derive(Clone, Copy, PartialEq)]
pub enum Reader {
    Reads,
    /// There is one, but it has stopped, like a pager or a terminal after Ctrl-S.
    HasStopped,
}

/// A pipe that is full, with its reader.
pub fn full_pipe() -> (PipeReader, Stdio) {
    let (reader, mut writer) = pipe().unwrap();
    let size = rustix::pipe::fcntl_setpipe_size(&writer, 4096).unwrap();
    writer.write_all(&vec![b'.'; size]).unwrap();
    (reader, writer.into())
}

impl Program {
    pub fn start(arguments: &[&str]) -> Self {
        Self::with(arguments, &[], Reader::Reads, Reader::Reads).0
    }

    pub fn with(
        arguments: &[&str],
        environment: &[(&str, &str)],
        stdout: Reader,
        stderr: Reader,
    ) -> (Self, Vec<PipeReader>) {
        let folder = tempfile::tempdir().unwrap();
        let mut readers = Vec::new();
        let mut output = |name: &str, reader| match reader {
            Reader::Reads => Stdio::from(File::create(folder.path().join(name)).unwrap()),
            Reader::HasStopped => {
                let (reader, output) = full_pipe();
                readers.push(reader);
                output
            }
        };
        let temporary = folder.path().join("tmp");
        std::fs::create_dir(&temporary).unwrap();
        // These tests may run under nohup.
        let mut child = Command::new("env")
            .args(["--default-signal=HUP", env!("CARGO_BIN_EXE_portpool")])
            .args(arguments)
            .env("TMPDIR", &temporary)
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(output("stdout", stdout))
            .stderr(output("stderr", stderr))
            .spawn()
            .unwrap();
        let stdin = child.stdin.take();
        let program = Self {
            child,
            stdin,
            folder,
        };
        (program, readers)
    }

    /// What it has written, to both outputs.
    pub fn said(&self) -> String {
        let read = |name| std::fs::read_to_string(self.folder.path().join(name));
        [read("stdout"), read("stderr")]
            .into_iter()
            .map(Result::unwrap_or_default)
            .collect()
    }

    pub fn until_said(&self, words: &str) {
        let deadline = Instant::now() + SOON;
        while !self.said().contains(words) {
            assert!(Instant::now() < deadline, "no {words:?}: {}", self.said());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits until it ends; its status and how long that took.
    pub fn ends(&mut self, within: Duration) -> Option<(ExitStatus, Duration)> {
        let started = Instant::now();
        while started.elapsed() < within {
            if let Some(status) = self.child.try_wait().unwrap() {
                return Some((status, started.elapsed()));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        None
    }

    /// Sends the signal: it ends at once with `code`.
    pub fn ends_at(&mut self, signal: Signal, code: i32, state: &str) {
        self.signal(signal);
        let ended = self.ends(AT_ONCE);
        let (status, _) = ended.unwrap_or_else(|| panic!("{state} goes on: {}", self.said()));
        assert_eq!(status.code(), Some(code), "{state}: {}", self.said());
        assert_eq!(left(&self.folder.path().join("tmp")), [""; 0], "{state}");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The names in `folder`.
fn left(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}
