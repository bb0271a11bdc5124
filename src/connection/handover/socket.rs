//! The Unix socket where successors request a hand-over.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;

use super::Error;

/// The listening socket; only this user may connect to it.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Its path until [`Socket::publish`].
    hidden: Option<PathBuf>,
}

impl Socket {
    /// Listens beside `path`, where a predecessor may still do so.
    ///
    /// # Errors
    /// [`Error::Socket`].
    pub fn prepare(path: &Path) -> Result<Self, Error> {
        let mut hidden = path.as_os_str().to_owned();
        hidden.push(format!(".{}", std::process::id()));
        let hidden = PathBuf::from(hidden);
        let listen = || {
            // A dead process that had our id may have left one.
            let _ = fs::remove_file(&hidden);
            let listener = UnixListener::bind(&hidden)?;
            fs::set_permissions(&hidden, fs::Permissions::from_mode(0o600))?;
            Ok(listener)
        };
        match listen() {
            Ok(listener) => Ok(Self {
                listener,
                path: path.to_owned(),
                hidden: Some(hidden),
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
        let Some(hidden) = &self.hidden else {
            return Ok(());
        };
        fs::rename(hidden, &self.path).map_err(|source| Error::Socket {
            path: self.path.clone(),
            source,
        })?;
        self.hidden = None;
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

    /// Removes the socket. A process that has a successor must not.
    pub fn remove(&self) {
        // A socket that stays refuses connections, which the next process sees.
        let _ = fs::remove_file(&self.path);
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Some(hidden) = &self.hidden {
            let _ = fs::remove_file(hidden);
        }
    }
}
