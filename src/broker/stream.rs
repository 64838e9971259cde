//! A client's socket, plain or with TLS, with one interface: wait until it is ready, then try.

use std::io::{self, Read, Write};
use std::sync::Arc;

use bytes::{BufMut, BytesMut};
use rustls::{ServerConfig, ServerConnection};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::TcpStream;

pub(super) enum Stream {
    Plain(TcpStream),
    Tls(Box<Tls>),
}

pub(super) struct Tls {
    socket: TcpStream,
    session: ServerConnection,
    /// Bytes that are decrypted and not yet read: the socket won't tell of them.
    decrypted: usize,
    /// The client will send nothing more.
    closed: bool,
}

impl Stream {
    /// With a `config`, the handshake takes place as what is read and written.
    pub(super) fn new(socket: TcpStream, config: Option<Arc<ServerConfig>>) -> io::Result<Stream> {
        let Some(config) = config else {
            return Ok(Stream::Plain(socket));
        };
        let session = ServerConnection::new(config).map_err(io::Error::other)?;
        Ok(Stream::Tls(Box::new(Tls {
            socket,
            session,
            decrypted: 0,
            closed: false,
        })))
    }

    fn socket(&self) -> &TcpStream {
        match self {
            Stream::Plain(socket) => socket,
            Stream::Tls(tls) => &tls.socket,
        }
    }

    /// Waits until there may be something to read, if `reads`, or room for what is still to be
    /// sent, if `writes` or the handshake wants to. Returns whether there may be something to read.
    pub(super) async fn ready(&self, reads: bool, writes: bool) -> io::Result<bool> {
        if reads && self.has_decrypted() {
            return Ok(true);
        }
        let writes = writes || self.is_sending();
        // In the handshake it is one after the other.
        let reads = reads && !(writes && self.is_handshaking());
        let interest = match (reads, writes) {
            (true, true) => Interest::READABLE | Interest::WRITABLE,
            (true, false) => Interest::READABLE,
            (false, true) => Interest::WRITABLE,
            (false, false) => std::future::pending().await,
        };
        let ready = self.socket().ready(interest).await?;
        Ok(reads && ready.is_readable())
    }

    fn is_handshaking(&self) -> bool {
        matches!(self, Stream::Tls(tls) if tls.session.is_handshaking())
    }

    fn has_decrypted(&self) -> bool {
        matches!(self, Stream::Tls(tls) if tls.decrypted > 0)
    }

    /// Whether something that was accepted by [`Stream::try_write`] has not reached the socket yet.
    pub(super) fn is_sending(&self) -> bool {
        matches!(self, Stream::Tls(tls) if tls.session.wants_write())
    }

    /// Reads what is there into the spare room of `buffer`. 0 bytes: the client has closed.
    pub(super) fn try_read(&mut self, buffer: &mut BytesMut) -> io::Result<usize> {
        match self {
            Stream::Plain(socket) => socket.try_read_buf(buffer),
            Stream::Tls(tls) => tls.try_read(buffer),
        }
    }

    /// Returns how many bytes were taken.
    pub(super) fn try_write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Plain(socket) => socket.try_write(bytes),
            Stream::Tls(tls) => {
                tls.flush()?;
                if tls.session.wants_write() {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                let taken = tls.session.writer().write(bytes)?;
                tls.flush()?;
                Ok(taken)
            }
        }
    }

    /// Sends on what was accepted, as far as the socket takes it.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        match self {
            Stream::Plain(_) => Ok(()),
            Stream::Tls(tls) => tls.flush(),
        }
    }

    /// Tells the client that nothing more comes.
    pub(super) async fn shut_down(&mut self) -> io::Result<()> {
        match self {
            Stream::Plain(socket) => socket.shutdown().await,
            Stream::Tls(tls) => {
                tls.session.send_close_notify();
                while tls.session.wants_write() {
                    tls.socket.writable().await?;
                    tls.flush()?;
                }
                tls.socket.shutdown().await
            }
        }
    }
}

impl Tls {
    fn try_read(&mut self, buffer: &mut BytesMut) -> io::Result<usize> {
        loop {
            if self.decrypted > 0 {
                let count = self.take_decrypted(buffer)?;
                self.decrypted -= count;
                return Ok(count);
            }
            if self.closed {
                return Ok(0);
            }
            if self.session.read_tls(&mut Socket(&self.socket))? == 0 {
                // Whether the client has said goodbye in TLS makes no difference: MQTT has its own.
                return Ok(0);
            }
            match self.session.process_new_packets() {
                Ok(state) => {
                    self.decrypted = state.plaintext_bytes_to_read();
                    self.closed = state.peer_has_closed();
                }
                Err(error) => {
                    // The alert that tells the client why, if the socket takes it.
                    let _ = self.flush();
                    let why = format!("TLS: {error}");
                    return Err(io::Error::new(io::ErrorKind::InvalidData, why));
                }
            }
            // Answers of the handshake.
            self.flush()?;
        }
    }

    fn take_decrypted(&mut self, buffer: &mut BytesMut) -> io::Result<usize> {
        let count = self.decrypted.min(buffer.capacity() - buffer.len());
        let mut reader = self.session.reader().take(count as u64);
        io::copy(&mut reader, &mut buffer.writer()).map(|count| count as usize)
    }

    fn flush(&mut self) -> io::Result<()> {
        while self.session.wants_write() {
            match self.session.write_tls(&mut Socket(&self.socket)) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// The socket as rustls wants it.
struct Socket<'a>(&'a TcpStream);

impl Read for Socket<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.try_read(buffer)
    }
}

impl Write for Socket<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
