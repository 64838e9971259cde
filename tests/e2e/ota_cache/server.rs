//! A web server for a folder, that counts and misbehaves as it is told to.

use std::collections::HashMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use rustls::{ServerConfig, ServerConnection, StreamOwned};
use socket2::SockRef;

/// What a client asks for.
#[derive(Clone, Debug)]
pub struct Request {
    pub path: String,
    /// From which byte on.
    pub from: Option<u64>,
    /// How often the path was asked for before.
    pub before: usize,
}

/// What to do with a request.
#[derive(Clone, Debug)]
pub enum Answer {
    Serve,
    /// Serves this file below the folder instead.
    Other(String),
    Status(u16),
    Redirect(String),
    /// All of the file, whatever range was asked for.
    Whole,
    /// A range that begins elsewhere.
    WrongRange,
    /// So many bytes of the body, and then nothing for as long as the client waits.
    Stall(usize),
    /// So many bytes of the body, and then the connection ends.
    Cut(usize),
    Reset(usize),
    /// Says that the body is so much longer than it is.
    Longer(u64),
    /// This body instead.
    Body(Vec<u8>),
    /// Says with which encoding it is sent.
    Encoded(&'static str),
}

type Rule = dyn Fn(&Request) -> Answer + Send + Sync;

pub struct Server {
    address: SocketAddr,
    scheme: &'static str,
    shared: Arc<Shared>,
}

struct Shared {
    folder: PathBuf,
    rule: Box<Rule>,
    seen: Mutex<HashMap<String, usize>>,
    requests: Mutex<Vec<Request>>,
    body_bytes: AtomicU64,
    tls: Option<Arc<ServerConfig>>,
}

impl Server {
    pub fn new(folder: &Path) -> Self {
        Self::with(folder, |_| Answer::Serve)
    }

    pub fn with(folder: &Path, rule: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        Self::start(folder, Box::new(rule), None)
    }

    pub fn tls(
        folder: &Path,
        tls: ServerConfig,
        rule: impl Fn(&Request) -> Answer + Send + Sync + 'static,
    ) -> Self {
        Self::start(folder, Box::new(rule), Some(Arc::new(tls)))
    }

    fn start(folder: &Path, rule: Box<Rule>, tls: Option<Arc<ServerConfig>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let scheme = if tls.is_some() { "https" } else { "http" };
        let shared = Arc::new(Shared {
            folder: folder.to_owned(),
            rule,
            seen: Mutex::default(),
            requests: Mutex::default(),
            body_bytes: AtomicU64::new(0),
            tls,
        });
        let served = shared.clone();
        // Both end with the test's process.
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let shared = served.clone();
                // What a client that has gone away makes of its connection is not of interest.
                thread::spawn(move || shared.connection(stream));
            }
        });
        Self {
            address,
            scheme,
            shared,
        }
    }

    pub fn url(&self) -> String {
        format!("{}://localhost:{}", self.scheme, self.address.port())
    }

    pub fn requests(&self) -> Vec<Request> {
        self.shared.requests.lock().unwrap().clone()
    }

    /// How many requests there were for files whose names end so.
    pub fn count(&self, end: &str) -> usize {
        self.requests()
            .iter()
            .filter(|request| request.path.ends_with(end))
            .count()
    }

    /// Requests for NARs.
    pub fn nars(&self) -> Vec<Request> {
        let mut requests = self.requests();
        requests.retain(|request| request.path.starts_with("/nar/"));
        requests
    }

    pub fn body_bytes(&self) -> u64 {
        self.shared.body_bytes.load(Ordering::SeqCst)
    }
}

impl Shared {
    fn connection(&self, stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let raw = stream.try_clone()?;
        match &self.tls {
            None => self.talk(stream, &raw),
            Some(tls) => {
                let connection = ServerConnection::new(tls.clone()).map_err(io::Error::other)?;
                self.talk(StreamOwned::new(connection, stream), &raw)
            }
        }
    }

    fn talk(&self, stream: impl Read + Write, raw: &TcpStream) -> io::Result<()> {
        let mut stream = BufReader::new(stream);
        while let Some(request) = self.request(&mut stream)? {
            self.requests.lock().unwrap().push(request.clone());
            let answer = (self.rule)(&request);
            if !self.answer(&request, answer, stream.get_mut(), raw)? {
                return Ok(());
            }
        }
        Ok(())
    }

    fn request(&self, stream: &mut impl BufRead) -> io::Result<Option<Request>> {
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
        let mut from = None;
        loop {
            line.clear();
            stream.read_line(&mut line)?;
            let field = line.trim().to_ascii_lowercase();
            if field.is_empty() {
                break;
            }
            if let Some(range) = field.strip_prefix("range: bytes=") {
                from = range.trim_end_matches('-').parse().ok();
            }
        }
        let mut seen = self.seen.lock().unwrap();
        let before = seen.entry(path.clone()).or_default();
        *before += 1;
        Ok(Some(Request {
            path,
            from,
            before: *before - 1,
        }))
    }

    /// Whether the connection goes on.
    fn answer(
        &self,
        request: &Request,
        answer: Answer,
        stream: &mut impl Write,
        raw: &TcpStream,
    ) -> io::Result<bool> {
        let path = match &answer {
            Answer::Other(path) => path.clone(),
            _ => request.path.clone(),
        };
        let body = match &answer {
            Answer::Body(body) => Some(body.clone()),
            _ => fs::read(self.folder.join(path.trim_start_matches('/'))).ok(),
        };
        let plain = |status: u16, more: &str| {
            format!("HTTP/1.1 {status} Whatever\r\nContent-Length: 0\r\n{more}\r\n")
        };
        match &answer {
            Answer::Status(status) => {
                stream.write_all(plain(*status, "").as_bytes())?;
                return Ok(true);
            }
            Answer::Redirect(to) => {
                stream.write_all(plain(302, &format!("Location: {to}\r\n")).as_bytes())?;
                return Ok(true);
            }
            _ => {}
        }
        let Some(body) = body else {
            stream.write_all(plain(404, "").as_bytes())?;
            return Ok(true);
        };
        let whole = body.len() as u64;
        let from = match answer {
            Answer::Whole => None,
            _ => request.from,
        };
        let (status, range) = match from {
            None => (200, String::new()),
            Some(from) if from >= whole => {
                stream.write_all(plain(416, "").as_bytes())?;
                return Ok(true);
            }
            Some(from) => {
                let said = from + u64::from(matches!(answer, Answer::WrongRange));
                (
                    206,
                    format!("Content-Range: bytes {said}-{}/{whole}\r\n", whole - 1),
                )
            }
        };
        let body = &body[from.unwrap_or(0) as usize..];
        let more = match &answer {
            Answer::Longer(more) => *more,
            _ => 0,
        };
        let encoding = match &answer {
            Answer::Encoded(encoding) => format!("Content-Encoding: {encoding}\r\n"),
            _ => String::new(),
        };
        let length = body.len() as u64 + more;
        let head =
            format!("HTTP/1.1 {status} OK\r\nContent-Length: {length}\r\n{range}{encoding}\r\n");
        stream.write_all(head.as_bytes())?;
        let sent = match answer {
            Answer::Stall(bytes) | Answer::Cut(bytes) | Answer::Reset(bytes) => {
                bytes.min(body.len())
            }
            _ => body.len(),
        };
        for chunk in body[..sent].chunks(64 * 1024) {
            stream.write_all(chunk)?;
            self.body_bytes
                .fetch_add(chunk.len() as u64, Ordering::SeqCst);
        }
        stream.flush()?;
        match answer {
            Answer::Stall(_) => {
                // Until the client gives up.
                let mut raw = raw;
                let _ = raw.read(&mut [0]);
                Ok(false)
            }
            Answer::Reset(_) => {
                SockRef::from(raw).set_linger(Some(std::time::Duration::ZERO))?;
                Ok(false)
            }
            Answer::Cut(_) | Answer::Longer(_) => Ok(false),
            _ => Ok(true),
        }
    }
}
