//! The other end of version 2: sends events and keeps each until it is acknowledged, over as many
//! connections as it takes. Blocks.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::{InvalidDnsNameError, ServerName};
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use socket2::{SockRef, TcpKeepalive};

use super::frame::{Answer, Code, Hello, Priority, write_frame};
use crate::event::Topic;

/// Most events, and bytes, that are sent and not acknowledged.
const MAX_UNACKNOWLEDGED: usize = 65_536;
const MAX_UNACKNOWLEDGED_BYTES: usize = 64 << 20;

/// What is written at once.
const CHUNK: usize = 64 << 10;

/// Between attempts to connect: doubled from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(5);

/// How long a gateway may take to answer a handshake. Acknowledgements may take as long as its disk does.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// After so long without a word, the system asks whether the gateway is still there.
const KEEPALIVE: Duration = Duration::from_secs(15);

/// Where the gateway is.
#[derive(Clone)]
pub struct Endpoint {
    pub host: String,
    pub port: u16,
    pub tls: Option<Arc<ClientConfig>>,
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// Why events can't be sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    #[error("{endpoint}: {source}")]
    Connection { endpoint: String, source: io::Error },
    #[error("{endpoint} refuses: {text}")]
    Refused {
        endpoint: String,
        code: u8,
        text: String,
    },
    #[error("{endpoint} does not speak version 2 of TCP ingest: it answers with {kind:#04x}")]
    Protocol { endpoint: String, kind: u8 },
    #[error("{host} is no name for TLS: {source}")]
    Name {
        host: String,
        source: InvalidDnsNameError,
    },
    #[error("the client's name and its token are too long together")]
    HelloTooLong,
    #[error("the event on {topic} makes a frame of {bytes} bytes, and the gateway takes {max}")]
    TooLarge {
        topic: String,
        bytes: usize,
        max: usize,
    },
}

impl SendError {
    /// Whether to try again can help.
    fn passes(&self) -> bool {
        match self {
            SendError::Connection { .. } => true,
            SendError::Refused { code, .. } => Code::passes(*code),
            _ => false,
        }
    }
}

/// Sends events in their order, each with an id that ascends.
pub struct Sender {
    endpoint: Endpoint,
    hello: Vec<u8>,
    /// None: it broke, or there has been none.
    connection: Option<Connection>,
    /// Frames that are not acknowledged, with their ids.
    unacknowledged: VecDeque<(u64, Vec<u8>)>,
    bytes: usize,
    /// Those of `unacknowledged` that went out on this connection or are in its output.
    sent: usize,
    next_id: u64,
    acknowledged: u64,
    /// How long it is tried to connect again.
    patience: Duration,
    /// Called with what has gone wrong before it is tried again.
    on_loss: Box<dyn FnMut(&SendError)>,
}

struct Connection {
    stream: Stream,
    output: Vec<u8>,
    input: Vec<u8>,
    max_frame_bytes: usize,
}

enum Stream {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Sender {
    /// Connects. Ids go from `first_id` on; with a rule that tells duplicates by their ids, no run under the
    /// same name may use one again.
    pub fn connect(
        endpoint: Endpoint,
        hello: &Hello,
        first_id: u64,
        patience: Duration,
        on_loss: impl FnMut(&SendError) + 'static,
    ) -> Result<Sender, SendError> {
        let mut bytes = Vec::new();
        hello.write(&mut bytes).ok_or(SendError::HelloTooLong)?;
        let mut sender = Sender {
            endpoint,
            hello: bytes,
            connection: None,
            unacknowledged: VecDeque::new(),
            bytes: 0,
            sent: 0,
            next_id: first_id,
            acknowledged: 0,
            patience,
            on_loss: Box::new(on_loss),
        };
        sender.connection = Some(sender.open()?);
        Ok(sender)
    }

    /// Events that the gateway has taken.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    /// Events that were handed over here, and not acknowledged.
    pub fn unacknowledged(&self) -> usize {
        self.unacknowledged.len()
    }

    /// Sends an event, not necessarily at once. Waits while too many are not acknowledged.
    pub fn send(
        &mut self,
        priority: Priority,
        topic: &Topic,
        payload: &[u8],
    ) -> Result<(), SendError> {
        let mut frame = Vec::new();
        let name = topic.as_bytes();
        write_frame(priority, Some(self.next_id), name, payload, &mut frame);
        let bytes = frame.len() - 4;
        if let Some(connection) = &self.connection
            && bytes > connection.max_frame_bytes
        {
            return Err(SendError::TooLarge {
                topic: topic.to_string(),
                bytes,
                max: connection.max_frame_bytes,
            });
        }
        self.bytes += frame.len();
        self.unacknowledged.push_back((self.next_id, frame));
        self.next_id += 1;
        self.persist(|sender| sender.fill(CHUNK))?;
        while self.unacknowledged.len() >= MAX_UNACKNOWLEDGED
            || self.bytes >= MAX_UNACKNOWLEDGED_BYTES
        {
            // Down to half, so that answers are read in larger pieces.
            let enough = self.unacknowledged.len() / 2;
            self.until(enough)?;
        }
        Ok(())
    }

    /// Has all go out that was handed over.
    pub fn flush(&mut self) -> Result<(), SendError> {
        self.persist(|sender| sender.fill(0))
    }

    /// Waits until all is acknowledged.
    pub fn finish(&mut self) -> Result<(), SendError> {
        self.until(0)
    }

    fn until(&mut self, unacknowledged: usize) -> Result<(), SendError> {
        self.persist(|sender| {
            sender.fill(0)?;
            while sender.unacknowledged.len() > unacknowledged {
                sender.read()?;
            }
            Ok(())
        })
    }

    /// Does it again on a new connection when the one that there is breaks.
    fn persist(
        &mut self,
        mut action: impl FnMut(&mut Sender) -> Result<(), SendError>,
    ) -> Result<(), SendError> {
        let mut pause = FIRST_PAUSE;
        let mut since = None;
        loop {
            let before = self.acknowledged;
            let error = match action(self) {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            self.connection = None;
            if self.acknowledged > before {
                // It got on meanwhile.
                (pause, since) = (FIRST_PAUSE, None);
            }
            let since = *since.get_or_insert_with(Instant::now);
            if !error.passes() || since.elapsed() + pause > self.patience {
                return Err(error);
            }
            (self.on_loss)(&error);
            std::thread::sleep(pause);
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    /// Puts what was not sent into the output, and writes it if that is more than `most` bytes.
    fn fill(&mut self, most: usize) -> Result<(), SendError> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => {
                self.sent = 0;
                self.open()?
            }
        };
        let mut outcome = Ok(());
        while self.sent < self.unacknowledged.len() && outcome.is_ok() {
            let (_, frame) = &self.unacknowledged[self.sent];
            connection.output.extend_from_slice(frame);
            self.sent += 1;
            if connection.output.len() >= CHUNK {
                outcome = connection.write();
            }
        }
        if connection.output.len() > most && outcome.is_ok() {
            outcome = connection.write();
        }
        // Why the gateway has closed the connection it may have said before.
        let outcome = outcome.map_err(|error| match connection.last_answer() {
            Some(Answer::Refused { code, text }) => self.refused(code, text),
            _ => self.broken(error),
        });
        self.connection = Some(connection);
        outcome
    }

    /// Reads answers, at least a part of one.
    fn read(&mut self) -> Result<(), SendError> {
        let Some(mut connection) = self.connection.take() else {
            return Err(self.broken(io::ErrorKind::NotConnected.into()));
        };
        connection.read().map_err(|error| self.broken(error))?;
        while let Some(answer) = connection.answer().map_err(|kind| self.odd(kind))? {
            match answer {
                Answer::Ack { id } => {
                    while let Some((_, frame)) =
                        self.unacknowledged.pop_front_if(|(own, _)| *own <= id)
                    {
                        self.bytes -= frame.len();
                        self.sent = self.sent.saturating_sub(1);
                        self.acknowledged += 1;
                    }
                }
                Answer::Refused { code, text } => return Err(self.refused(code, text)),
                Answer::Welcome { .. } => {}
            }
        }
        self.connection = Some(connection);
        Ok(())
    }

    fn open(&self) -> Result<Connection, SendError> {
        let stream = self.stream()?;
        let mut connection = Connection {
            stream,
            output: self.hello.clone(),
            input: Vec::new(),
            max_frame_bytes: 0,
        };
        let welcomed = connection.socket().set_read_timeout(Some(HANDSHAKE));
        let welcomed = welcomed.and_then(|()| connection.write());
        welcomed.map_err(|error| self.broken(error))?;
        loop {
            match connection.answer().map_err(|kind| self.odd(kind))? {
                Some(Answer::Welcome { max_frame_bytes }) => {
                    connection.max_frame_bytes = max_frame_bytes as usize;
                    break;
                }
                Some(Answer::Refused { code, text }) => return Err(self.refused(code, text)),
                Some(Answer::Ack { .. }) => {}
                None => connection.read().map_err(|error| self.broken(error))?,
            }
        }
        let waits = connection.socket().set_read_timeout(None);
        waits.map_err(|error| self.broken(error))?;
        Ok(connection)
    }

    fn stream(&self) -> Result<Stream, SendError> {
        let Endpoint { host, port, tls } = &self.endpoint;
        let connect = || {
            let mut last = io::ErrorKind::NotFound.into();
            for address in (host.as_str(), *port).to_socket_addrs()? {
                match TcpStream::connect_timeout(&address, HANDSHAKE) {
                    Ok(socket) => {
                        socket.set_nodelay(true)?;
                        let keepalive = TcpKeepalive::new().with_time(KEEPALIVE);
                        SockRef::from(&socket).set_tcp_keepalive(&keepalive)?;
                        return Ok(socket);
                    }
                    Err(error) => last = error,
                }
            }
            Err(last)
        };
        let socket = connect().map_err(|error| self.broken(error))?;
        let Some(config) = tls else {
            return Ok(Stream::Plain(socket));
        };
        let name = ServerName::try_from(host.clone()).map_err(|source| SendError::Name {
            host: host.clone(),
            source,
        })?;
        let session = ClientConnection::new(config.clone(), name);
        let session = session.map_err(|error| self.broken(io::Error::other(error)))?;
        Ok(Stream::Tls(Box::new(StreamOwned::new(session, socket))))
    }

    fn broken(&self, source: io::Error) -> SendError {
        let endpoint = self.endpoint.to_string();
        SendError::Connection { endpoint, source }
    }

    fn refused(&self, code: u8, text: String) -> SendError {
        let endpoint = self.endpoint.to_string();
        SendError::Refused {
            endpoint,
            code,
            text,
        }
    }

    fn odd(&self, kind: u8) -> SendError {
        let endpoint = self.endpoint.to_string();
        SendError::Protocol { endpoint, kind }
    }
}

impl Connection {
    fn socket(&self) -> &TcpStream {
        match &self.stream {
            Stream::Plain(socket) => socket,
            Stream::Tls(tls) => &tls.sock,
        }
    }

    fn write(&mut self) -> io::Result<()> {
        match &mut self.stream {
            Stream::Plain(socket) => socket.write_all(&self.output)?,
            Stream::Tls(tls) => {
                tls.write_all(&self.output)?;
                tls.flush()?;
            }
        }
        self.output.clear();
        Ok(())
    }

    /// Waits for some bytes.
    fn read(&mut self) -> io::Result<()> {
        let mut bytes = [0; 4096];
        let count = match &mut self.stream {
            Stream::Plain(socket) => socket.read(&mut bytes)?,
            Stream::Tls(tls) => tls.read(&mut bytes)?,
        };
        if count == 0 {
            let why = "the gateway closed the connection";
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, why));
        }
        self.input.extend_from_slice(&bytes[..count]);
        Ok(())
    }

    fn answer(&mut self) -> Result<Option<Answer>, u8> {
        let first = Answer::first(&self.input)?;
        Ok(first.map(|(answer, size)| {
            self.input.drain(..size);
            answer
        }))
    }

    /// The last thing that the gateway has said on a connection that can't be written to any more.
    fn last_answer(&mut self) -> Option<Answer> {
        self.socket().set_read_timeout(Some(HANDSHAKE)).ok()?;
        while self.read().is_ok() {}
        let mut last = None;
        while let Ok(Some(answer)) = self.answer() {
            last = Some(answer);
        }
        last
    }
}
