//! A web server for the cache, on this machine: files, whole or from some byte on, and a count of what was asked
//! for.

use anyhow::{Context, Result};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

/// It serves until this program ends.
pub struct Server {
    pub port: u16,
    /// Of each answer that is over, what was asked for.
    answered: Arc<Mutex<Vec<String>>>,
}

impl Server {
    pub fn start(folder: PathBuf) -> Result<Self> {
        let listener =
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("there is no free port")?;
        let port = listener.local_addr()?.port();
        let answered = Arc::new(Mutex::new(Vec::new()));
        let served = Arc::clone(&answered);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let (folder, served) = (folder.clone(), Arc::clone(&served));
                // A client that goes away in between is none of our business: its machine lost power.
                thread::spawn(move || serve(client, &folder, &served));
            }
        });
        Ok(Server { port, answered })
    }

    /// What was asked for since the last call.
    pub fn take_answered(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.answered))
    }

    /// How many NARs were answered since that call.
    pub fn nars(&self) -> usize {
        let is_nar = |path: &&String| path.starts_with("/nar/");
        lock(&self.answered).iter().filter(is_nar).count()
    }
}

fn lock(answered: &Mutex<Vec<String>>) -> std::sync::MutexGuard<'_, Vec<String>> {
    answered.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(client: TcpStream, folder: &Path, served: &Mutex<Vec<String>>) -> io::Result<()> {
    let mut requests = BufReader::new(client.try_clone()?);
    while let Some(request) = Request::read(&mut requests)? {
        answer(&client, folder, &request)?;
        lock(served).push(request.path);
    }
    Ok(())
}

struct Request {
    path: String,
    has_body: bool,
    /// Of `Range: bytes=FROM-`.
    from: u64,
}

impl Request {
    /// Nothing if the client has asked for all that it wanted.
    fn read(lines: &mut impl BufRead) -> io::Result<Option<Self>> {
        let mut line = String::new();
        if lines.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let mut words = line.split_whitespace();
        let (method, path) = (words.next(), words.next());
        let mut request = Request {
            path: path.unwrap_or_default().to_owned(),
            has_body: method == Some("GET"),
            from: 0,
        };
        loop {
            let mut header = String::new();
            lines.read_line(&mut header)?;
            let header = header.trim().to_ascii_lowercase();
            if header.is_empty() {
                return Ok(Some(request));
            }
            let from = header.strip_prefix("range: bytes=");
            if let Some(from) = from.and_then(|range| range.strip_suffix('-')) {
                request.from = from.parse().unwrap_or_default();
            }
        }
    }
}

fn answer(mut client: &TcpStream, folder: &Path, request: &Request) -> io::Result<()> {
    let Some(mut file) = open(folder, &request.path) else {
        return client.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
    };
    let bytes = file.metadata()?.len();
    let from = request.from.min(bytes);
    let (length, last) = (bytes - from, bytes.saturating_sub(1));
    let status = match from {
        0 => "200 OK\r\n".to_owned(),
        from => format!("206 Partial Content\r\nContent-Range: bytes {from}-{last}/{bytes}\r\n"),
    };
    write!(
        client,
        "HTTP/1.1 {status}Accept-Ranges: bytes\r\nContent-Length: {length}\r\n\r\n"
    )?;
    if request.has_body {
        file.seek(SeekFrom::Start(from))?;
        io::copy(&mut file.take(length), &mut client)?;
    }
    Ok(())
}

fn open(folder: &Path, path: &str) -> Option<File> {
    let path = Path::new(path.trim_start_matches('/'));
    let is_below = path
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    let path = folder.join(path);
    (is_below && path.is_file()).then(|| File::open(path).ok())?
}

#[cfg(test)]
mod a_server {
    use super::*;

    fn ask(request: &str) -> String {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("file"), "0123456789").expect("written");
        let server = Server::start(folder.path().to_owned()).expect("it starts");
        let mut client =
            TcpStream::connect((Ipv4Addr::LOCALHOST, server.port)).expect("it listens");
        write!(client, "{request}\r\n\r\n").expect("sent");
        client
            .shutdown(std::net::Shutdown::Write)
            .expect("half closed");
        let mut answer = String::new();
        client.read_to_string(&mut answer).expect("an answer");
        answer
    }

    #[test]
    fn sends_a_file_or_the_rest_of_it() {
        assert!(ask("GET /file HTTP/1.1").ends_with("Content-Length: 10\r\n\r\n0123456789"));
        let rest = ask("GET /file HTTP/1.1\r\nRange: bytes=7-");
        assert!(
            rest.contains("206 Partial Content\r\nContent-Range: bytes 7-9/10"),
            "{rest}"
        );
        assert!(rest.ends_with("\r\n\r\n789"), "{rest}");
        assert!(ask("HEAD /file HTTP/1.1").ends_with("Content-Length: 10\r\n\r\n"));
    }

    #[test]
    fn has_nothing_that_is_not_in_its_folder() {
        for path in ["/none", "/../../etc/passwd", "/"] {
            assert!(
                ask(&format!("GET {path} HTTP/1.1")).starts_with("HTTP/1.1 404"),
                "{path}"
            );
        }
    }
}
