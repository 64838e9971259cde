//! One client's socket: through io_uring, or through epoll, with TLS or without. One interface for all.

use std::io;
use std::net::Shutdown;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_uring::buf::BoundedBuf;

use crate::broker::Link;

/// A read begins small, since a connection may have nothing to send for long, and doubles up to the
/// larger size while reads fill it.
const SMALL_READ: usize = 4 * 1024;
const LARGE_READ: usize = 64 * 1024;

/// How long a client may take to take what is written to it.
const WRITE: Duration = Duration::from_secs(10);

/// How long a client may take to hear why it has to go.
const LAST_WORDS: Duration = Duration::from_secs(1);

pub(super) struct Socket {
    kind: Kind,
    read_size: usize,
}

enum Kind {
    Uring(Uring),
    Epoll(Link),
}

/// A socket of which the kernel reads by itself.
struct Uring {
    stream: Rc<tokio_uring::net::TcpStream>,
    /// What is under way. Not dropped before its end: the kernel may use its buffer until then.
    reading: Option<UnderWay<(io::Result<usize>, BytesMut)>>,
    writing: Option<UnderWay<(io::Result<()>, Vec<u8>)>>,
}

type UnderWay<T> = Pin<Box<dyn Future<Output = T>>>;

impl Socket {
    /// To be called in a runtime of tokio-uring.
    pub(super) fn uring(socket: TcpStream) -> io::Result<Socket> {
        let socket = socket.into_std()?;
        // Else the kernel would not wait for bytes.
        socket.set_nonblocking(false)?;
        let stream = Rc::new(tokio_uring::net::TcpStream::from_std(socket));
        Ok(Socket::new(Kind::Uring(Uring {
            stream,
            reading: None,
            writing: None,
        })))
    }

    pub(super) fn epoll(socket: TcpStream, tls: Option<Arc<ServerConfig>>) -> io::Result<Socket> {
        Ok(Socket::new(Kind::Epoll(Link::new(socket, tls)?)))
    }

    fn new(kind: Kind) -> Socket {
        Socket {
            kind,
            read_size: SMALL_READ,
        }
    }

    /// The verified certificates of the client, its own first.
    pub(super) fn certificates(&self) -> Option<&[CertificateDer<'static>]> {
        match &self.kind {
            Kind::Uring(_) => None,
            Kind::Epoll(link) => link.certificates(),
        }
    }

    /// Reads once, behind what is in `input`, which is empty while this is under way. 0 bytes: the client
    /// has closed. May be dropped at any time: what was read comes with the next call.
    pub(super) async fn read(&mut self, input: &mut BytesMut) -> io::Result<usize> {
        let read_size = self.read_size;
        let count = match &mut self.kind {
            Kind::Uring(uring) => uring.read(input, read_size).await?,
            Kind::Epoll(link) => {
                input.reserve(read_size);
                loop {
                    if !link.ready(true, false).await? {
                        link.flush()?;
                        continue;
                    }
                    match link.try_read(input) {
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        outcome => break outcome?,
                    }
                }
            }
        };
        self.read_size = match count {
            filled if filled >= read_size => (read_size * 2).min(LARGE_READ),
            little if little < read_size / 4 => (read_size / 2).max(SMALL_READ),
            _ => read_size,
        };
        Ok(count)
    }

    /// Writes all of `output`, and empties it.
    pub(super) async fn write(&mut self, output: &mut Vec<u8>) -> io::Result<()> {
        if output.is_empty() {
            return Ok(());
        }
        let written = match &mut self.kind {
            Kind::Uring(uring) => written(timeout(WRITE, uring.write(output)).await),
            Kind::Epoll(link) => written(timeout(WRITE, write_all(link, output)).await),
        };
        output.clear();
        written
    }

    /// Has what was written reach the client, if it takes it soon. May be dropped at any time.
    pub(super) async fn finish(&mut self) {
        let last = async {
            match &mut self.kind {
                Kind::Uring(uring) => uring.stream.shutdown(Shutdown::Write)?,
                Kind::Epoll(link) => link.shut_down().await?,
            }
            // What the client sent and nobody will read would make the kernel reset the connection, and
            // the client might never see our last words.
            let mut rest = BytesMut::new();
            while self.read(&mut rest).await? > 0 {
                rest.clear();
            }
            io::Result::Ok(())
        };
        // Whether it worked makes no difference: the connection is closed.
        let _ = timeout(LAST_WORDS, last).await;
    }

    /// Ends the connection. To be called before it is dropped.
    pub(super) async fn end(&mut self) {
        if let Kind::Uring(uring) = &mut self.kind {
            // It fails if the connection is gone, and then all ends, too.
            let _ = uring.stream.shutdown(Shutdown::Both);
            if let Some(reading) = uring.reading.take() {
                drop(reading.await);
            }
            if let Some(writing) = uring.writing.take() {
                drop(writing.await);
            }
        }
    }
}

fn written(outcome: Result<io::Result<()>, tokio::time::error::Elapsed>) -> io::Result<()> {
    outcome.unwrap_or_else(|_| {
        let why = "the client takes no bytes";
        Err(io::Error::new(io::ErrorKind::TimedOut, why))
    })
}

async fn write_all(link: &mut Link, output: &[u8]) -> io::Result<()> {
    let mut rest = output;
    while !rest.is_empty() || link.is_sending() {
        if rest.is_empty() {
            link.flush()?;
        } else {
            match link.try_write(&[], rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    rest = &rest[count..];
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        if !rest.is_empty() || link.is_sending() {
            link.ready(false, true).await?;
        }
    }
    Ok(())
}

impl Uring {
    async fn read(&mut self, input: &mut BytesMut, size: usize) -> io::Result<usize> {
        let stream = &self.stream;
        let reading = self.reading.get_or_insert_with(|| {
            let mut buffer = std::mem::take(input);
            buffer.reserve(size);
            let stream = stream.clone();
            Box::pin(async move {
                let filled = buffer.len();
                let (result, buffer) = stream.read(buffer.slice(filled..)).await;
                (result, buffer.into_inner())
            })
        });
        let (result, buffer) = reading.await;
        self.reading = None;
        *input = buffer;
        result
    }

    /// After one that was dropped, nothing more can be written.
    async fn write(&mut self, output: &mut Vec<u8>) -> io::Result<()> {
        let stream = &self.stream;
        let writing = self.writing.get_or_insert_with(|| {
            let bytes = std::mem::take(output);
            let stream = stream.clone();
            Box::pin(async move { stream.write_all(bytes).await })
        });
        let (result, bytes) = writing.await;
        self.writing = None;
        *output = bytes;
        result
    }
}
