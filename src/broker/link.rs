//! A client's socket, plain or with TLS, with one interface: wait until it is ready, then try.

use std::future::poll_fn;
use std::io::{self, BufRead, IoSlice, Read, Write};
use std::sync::Arc;
use std::task::Poll;

use bytes::{BufMut, BytesMut};
use rustls::pki_types::CertificateDer;
use rustls::{ServerConfig, ServerConnection};
use socket2::SockRef;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::TcpStream;

pub(crate) enum Link {
    Plain(TcpStream),
    Tls(Box<Tls>),
}

pub(crate) struct Tls {
    socket: TcpStream,
    session: ServerConnection,
    /// Bytes that are decrypted and not yet read: the socket won't tell of them.
    decrypted: usize,
    /// How it ends once what is decrypted has been read: the client has closed, or something went
    /// wrong, which is told once.
    end: Option<io::Result<()>>,
}

impl Link {
    /// With a `config`, the handshake takes place as what is read and written.
    pub(crate) fn new(socket: TcpStream, config: Option<Arc<ServerConfig>>) -> io::Result<Link> {
        let Some(config) = config else {
            return Ok(Link::Plain(socket));
        };
        let session = ServerConnection::new(config).map_err(io::Error::other)?;
        Ok(Link::Tls(Box::new(Tls {
            socket,
            session,
            decrypted: 0,
            end: None,
        })))
    }

    fn socket(&self) -> &TcpStream {
        match self {
            Link::Plain(socket) => socket,
            Link::Tls(tls) => &tls.socket,
        }
    }

    /// Waits until there may be something to read, if `reads`, or room for what is still to be
    /// sent, if `writes` or the handshake wants to. Returns whether there may be something to read.
    pub(crate) async fn ready(&self, reads: bool, writes: bool) -> io::Result<bool> {
        if reads && self.has_input() {
            return Ok(true);
        }
        let writes = writes || self.is_sending();
        // In the handshake it is one after the other.
        let reads = reads && !(writes && self.is_handshaking());
        let socket = self.socket();
        // Cheaper than `ready`, which makes an entry in a list each time. One task at a time waits.
        poll_fn(|cx| {
            if reads && socket.poll_read_ready(cx)?.is_ready() {
                return Poll::Ready(Ok(true));
            }
            if writes && socket.poll_write_ready(cx)?.is_ready() {
                return Poll::Ready(Ok(false));
            }
            Poll::Pending
        })
        .await
    }

    /// Whether the handshake of TLS has not ended.
    pub(crate) fn is_handshaking(&self) -> bool {
        matches!(self, Link::Tls(tls) if tls.session.is_handshaking())
    }

    /// The verified certificates of the client, its own first.
    pub(crate) fn certificates(&self) -> Option<&[CertificateDer<'static>]> {
        match self {
            Link::Plain(_) => None,
            Link::Tls(tls) => tls.session.peer_certificates(),
        }
    }

    /// Whether there is something to read of which the socket won't tell.
    fn has_input(&self) -> bool {
        matches!(self, Link::Tls(tls) if tls.decrypted > 0 || tls.end.is_some())
    }

    /// Whether something that was accepted by [`Link::try_write`] has not reached the socket yet.
    pub(crate) fn is_sending(&self) -> bool {
        matches!(self, Link::Tls(tls) if tls.session.wants_write())
    }

    /// Reads what is there into the spare room of `buffer`. 0 bytes: the client has closed.
    pub(crate) fn try_read(&mut self, buffer: &mut BytesMut) -> io::Result<usize> {
        match self {
            Link::Plain(socket) => read_all(socket, buffer),
            Link::Tls(tls) => tls.try_read(buffer),
        }
    }

    /// Writes `head`, then `body`. Returns how many bytes of both together were taken.
    pub(crate) fn try_write(&mut self, head: &[u8], body: &[u8]) -> io::Result<usize> {
        let both = [IoSlice::new(head), IoSlice::new(body)];
        // Mostly there is one, and that costs less without a list.
        match (self, head.is_empty()) {
            (Link::Plain(socket), true) => socket.try_write(body),
            (Link::Plain(socket), false) => socket.try_write_vectored(&both),
            (Link::Tls(tls), _) => {
                tls.flush()?;
                if tls.session.wants_write() {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                let taken = tls.session.writer().write_vectored(&both)?;
                tls.flush()?;
                Ok(taken)
            }
        }
    }

    /// Sends on what was accepted, as far as the socket takes it.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        match self {
            Link::Plain(_) => Ok(()),
            Link::Tls(tls) => tls.flush(),
        }
    }

    /// Tells the client that nothing more comes.
    pub(crate) async fn shut_down(&mut self) -> io::Result<()> {
        match self {
            Link::Plain(socket) => socket.shutdown().await,
            Link::Tls(tls) => {
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

/// How much rustls reads at once. Where there was less, there is probably no more.
const RUSTLS_READ: usize = 4096;

/// Reads of one turn, enough to fill a large buffer. A client that sends records with nothing in them
/// must not have a thread for itself.
const READS: usize = 32;

/// Reads once into the spare room of `buffer`. When that isn't filled, the socket is empty for now:
/// tokio is told so, which spares the system call that would find it out.
fn read_all(socket: &TcpStream, buffer: &mut BytesMut) -> io::Result<usize> {
    let spare = buffer.spare_capacity_mut();
    let room = spare.len();
    let mut count = 0;
    let outcome = socket.try_io(Interest::READABLE, || {
        count = SockRef::from(socket).recv(spare)?;
        match count {
            0 => Ok(()),
            count if count < room => Err(io::ErrorKind::WouldBlock.into()),
            _ => Ok(()),
        }
    });
    if count == 0 {
        return outcome.map(|()| 0);
    }
    // SAFETY: so many bytes of the spare room have just been written by the system.
    #[allow(unsafe_code)]
    unsafe {
        buffer.advance_mut(count);
    }
    Ok(count)
}

impl Tls {
    fn try_read(&mut self, buffer: &mut BytesMut) -> io::Result<usize> {
        let start = buffer.len();
        self.take_decrypted(buffer)?;
        for _ in 0..READS {
            if self.decrypted > 0 || buffer.len() == buffer.capacity() || self.end.is_some() {
                break;
            }
            match self.session.read_tls(&mut Socket(&self.socket)) {
                // Whether the client has said goodbye in TLS makes no difference: MQTT has its own.
                Ok(0) => self.end = Some(Ok(())),
                Ok(count) => {
                    self.decrypt();
                    self.take_decrypted(buffer)?;
                    if count < RUSTLS_READ {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => self.end = Some(Err(error)),
            }
        }
        match (buffer.len() - start, &mut self.end) {
            (0, None) => Err(io::ErrorKind::WouldBlock.into()),
            (0, Some(end)) => std::mem::replace(end, Ok(())).map(|()| 0),
            (count, _) => Ok(count),
        }
    }

    fn decrypt(&mut self) {
        match self.session.process_new_packets() {
            Ok(state) => {
                self.decrypted = state.plaintext_bytes_to_read();
                if state.peer_has_closed() {
                    self.end = Some(Ok(()));
                }
            }
            Err(error) => {
                let why = format!("TLS: {error}");
                self.end = Some(Err(io::Error::new(io::ErrorKind::InvalidData, why)));
            }
        }
        // Answers of the handshake, or the alert that tells the client why.
        if let Err(error) = self.flush()
            && self.end.is_none()
        {
            self.end = Some(Err(error));
        }
    }

    /// Moves what there is room for.
    fn take_decrypted(&mut self, buffer: &mut BytesMut) -> io::Result<()> {
        while self.decrypted > 0 && buffer.len() < buffer.capacity() {
            let mut reader = self.session.reader();
            let chunk = reader.fill_buf()?;
            let count = chunk.len().min(buffer.capacity() - buffer.len());
            buffer.extend_from_slice(&chunk[..count]);
            reader.consume(count);
            self.decrypted -= count;
        }
        Ok(())
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

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_write_vectored(buffers)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
