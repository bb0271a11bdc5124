//! Whether ports answer.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};

use crate::net;
use crate::sink::ECHO;

/// A connection that has carried one byte there and back.
pub fn echoes(to: SocketAddr) -> io::Result<TcpStream> {
    let mut stream = net::connect(to)?;
    stream.write_all(&[ECHO])?;
    let mut answer = [0];
    stream.read_exact(&mut answer)?;
    if answer != [ECHO] {
        return Err(io::Error::other(format!("{to} answered {answer:?}")));
    }
    Ok(stream)
}

/// An error unless the connection still carries a byte there and back.
pub fn still_echoes(mut stream: &TcpStream) -> io::Result<()> {
    stream.write_all(&[ECHO])?;
    stream.read_exact(&mut [0])
}
