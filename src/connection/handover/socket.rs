//! The Unix socket where successors request a hand-over.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;

use super::Error;

/// The listening socket; only this user may connect to it. Dropping it removes
/// its file.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Where its file is: beside `path` until [`Socket::publish`].
    file: PathBuf,
    /// Whether the file is a successor's to replace.
    is_left: bool,
}

impl Socket {
    /// Listens beside `path`, where a predecessor may still do so.
    ///
    /// # Errors
    /// [`Error::Socket`].
    pub fn prepare(path: &Path) -> Result<Self, Error> {
        let mut file = path.as_os_str().to_owned();
        file.push(format!(".{}", std::process::id()));
        let file = PathBuf::from(file);
        let listen = || {
            // A dead process that had our id may have left one.
            let _ = fs::remove_file(&file);
            let listener = UnixListener::bind(&file)?;
            fs::set_permissions(&file, fs::Permissions::from_mode(0o600))?;
            Ok(listener)
        };
        match listen() {
            Ok(listener) => Ok(Self {
                listener,
                path: path.to_owned(),
                file,
                is_left: false,
            }),
            Err(source) => Err(Error::Socket {
                path: path.to_owned(),
                source,
            }),
        }
    }

    /// Replaces the socket at the path, so that there is one at any time.
    ///
    /// # Errors
    /// [`Error::Socket`].
    pub fn publish(&mut self) -> Result<(), Error> {
        fs::rename(&self.file, &self.path).map_err(|source| Error::Socket {
            path: self.path.clone(),
            source,
        })?;
        self.file.clone_from(&self.path);
        Ok(())
    }

    /// The next process that connects.
    ///
    /// # Errors
    /// The system's answer.
    pub async fn accept(&self) -> io::Result<UnixStream> {
        let (stream, _) = self.listener.accept().await?;
        stream.into_std()
    }

    /// Closes the socket, but leaves its file, which a successor replaces.
    pub fn leave(mut self) {
        self.is_left = true;
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if !self.is_left {
            // One that stays refuses connections, which the next process sees.
            let _ = fs::remove_file(&self.file);
        }
    }
}
