//! nats-server, one process or three.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use async_nats::ConnectOptions;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use super::{Client, eventually};

const CLIENT_PORT: u16 = 4222;
const CLUSTER_PORT: u16 = 6222;
const MONITORING_PORT: u16 = 8222;

/// The versions that `./dev setup` installs.
#[derive(Clone, Copy, Debug)]
pub enum Program {
    New,
    Old,
}

impl Program {
    /// Beside what cargo builds.
    pub fn find(self) -> Option<PathBuf> {
        let version = match self {
            Program::New => "new",
            Program::Old => "old",
        };
        let this = std::env::current_exe().unwrap();
        this.ancestors()
            .map(|folder| folder.join("nats").join(version).join("bin/nats-server"))
            .find(|program| program.exists())
    }
}

/// A /24 of the loopback network that nobody else has while this lives: servers that are started again find their
/// ports free.
struct Network {
    bytes: [u8; 2],
    _taken: TcpListener,
}

impl Network {
    fn new() -> Network {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed) + std::process::id() * 64;
            // From 127.1.0.0 on: others like 127.0.x.x.
            let bytes = [1 + (number >> 8) as u8 % 250, number as u8];
            let sign = (Ipv4Addr::new(127, bytes[0], bytes[1], 254), CLIENT_PORT);
            match TcpListener::bind(sign) {
                Ok(_taken) => return Network { bytes, _taken },
                Err(error) => assert_eq!(error.kind(), ErrorKind::AddrInUse, "{error}"),
            }
        }
    }

    fn host(&self, number: usize) -> Ipv4Addr {
        Ipv4Addr::new(127, self.bytes[0], self.bytes[1], number as u8 + 1)
    }
}

/// Servers of one cluster, or one alone. Killed when dropped.
pub struct Servers {
    servers: Vec<Server>,
    network: Network,
    _folder: TempDir,
}

struct Server {
    host: Ipv4Addr,
    program: PathBuf,
    config: PathBuf,
    log: PathBuf,
    process: Option<Child>,
}

impl Servers {
    pub fn single() -> Servers {
        Servers::start(Program::New, 1, "")
    }

    /// Three, which keep three copies of what a stream with `num_replicas: 3` has.
    pub fn cluster() -> Servers {
        Servers::start(Program::New, 3, "")
    }

    /// `config` is added to each server's configuration. Returns when JetStream is ready.
    pub fn start(program: Program, count: usize, config: &str) -> Servers {
        let (network, folder) = (Network::new(), tempfile::tempdir().unwrap());
        let program = program.find().expect(
            "these tests need nats-server below target/nats: `./dev setup` installs it there",
        );
        let routes =
            (0..count).map(|number| format!("nats://{}:{CLUSTER_PORT}", network.host(number)));
        let routes: Vec<String> = routes.collect();
        let servers = (0..count).map(|number| {
            let (host, own) = (network.host(number), folder.path().join(number.to_string()));
            let mut text = format!(
                "server_name: n{number}\nlisten: \"{host}:{CLIENT_PORT}\"\nhttp: \"{host}:{MONITORING_PORT}\"\n\
                 jetstream {{ store_dir: {own:?}, max_memory_store: 256MB, max_file_store: 8GB }}\n{config}\n"
            );
            if count > 1 {
                // Clients are not told of the others: what is to go through a link does.
                text += &format!(
                    "cluster {{ name: test, listen: \"{host}:{CLUSTER_PORT}\", routes: {routes:?}, no_advertise: true }}\n"
                );
            }
            let file = |extension: &str| own.with_extension(extension);
            fs::write(file("conf"), text).unwrap();
            Server {
                host,
                program: program.clone(),
                config: file("conf"),
                log: file("log"),
                process: None,
            }
        });
        let mut servers = Servers {
            servers: servers.collect(),
            network,
            _folder: folder,
        };
        for number in 0..count {
            servers.restart(number);
        }
        servers.until_ready();
        servers
    }

    pub fn count(&self) -> usize {
        self.servers.len()
    }

    pub fn addresses(&self) -> Vec<SocketAddr> {
        let address = |server: &Server| (server.host, CLIENT_PORT).into();
        self.servers.iter().map(address).collect()
    }

    /// `nats://…` of each.
    pub fn urls(&self) -> Vec<String> {
        let url = |address: &SocketAddr| format!("nats://{address}");
        self.addresses().iter().map(url).collect()
    }

    /// An address of the servers' network that no server has.
    pub fn spare_address(&self, number: usize) -> SocketAddr {
        (self.network.host(self.servers.len() + number), CLIENT_PORT).into()
    }

    /// A client that needs no login.
    pub fn client(&self) -> Client {
        self.client_with(ConnectOptions::new())
    }

    pub fn client_with(&self, options: ConnectOptions) -> Client {
        Client::connect(&self.urls(), options)
    }

    /// What a server tells of itself; <https://docs.nats.io/running-a-nats-service/nats_admin/monitoring>.
    pub fn monitoring(&self, number: usize, path: &str) -> Result<Value, String> {
        self.servers[number].monitoring(path)
    }

    pub fn process_id(&self, number: usize) -> u32 {
        let process = self.servers[number].process.as_ref();
        process.expect("it runs").id()
    }

    /// As `kill -9` does it.
    pub fn kill(&mut self, number: usize) {
        self.servers[number].kill();
    }

    /// Starts one that was killed, on what it has stored; does not wait for it.
    pub fn restart(&mut self, number: usize) {
        self.servers[number].start();
    }

    /// Stands still as a machine does that hangs: its connections stay.
    pub fn pause(&self, number: usize) {
        self.signal(number, Signal::STOP);
    }

    pub fn resume(&self, number: usize) {
        self.signal(number, Signal::CONT);
    }

    fn signal(&self, number: usize, signal: Signal) {
        let process = Pid::from_raw(self.process_id(number).cast_signed());
        kill_process(process.expect("not 0"), signal).unwrap();
    }

    /// Waits until each has what it missed, and they agree on a leader.
    pub fn until_ready(&mut self) {
        let alone = self.servers.len() == 1;
        for server in &mut self.servers {
            eventually("JetStream", || {
                if let Some(ended) = server
                    .process
                    .as_mut()
                    .and_then(|it| it.try_wait().unwrap())
                {
                    panic!("nats-server ended with {ended}:\n{}", server.last_words());
                }
                let health = server.monitoring("/healthz")?;
                if health["status"] != "ok" {
                    return Err(health.to_string());
                }
                let state = server.monitoring("/jsz")?;
                let leader = state["meta_cluster"]["leader"].as_str().unwrap_or_default();
                let ready = alone || !leader.is_empty();
                ready.then_some(()).ok_or_else(|| state.to_string())
            });
        }
    }

    /// Which server leads the stream.
    pub fn leader_of(&self, client: &Client, stream: &str) -> usize {
        eventually("a leader", || {
            let info = client.stream(stream).ok_or("there is no such stream")?;
            let leader = info["cluster"]["leader"].as_str().unwrap_or_default();
            let number = leader
                .strip_prefix('n')
                .and_then(|number| number.parse().ok());
            number.ok_or_else(|| info.to_string())
        })
    }
}

impl Server {
    fn start(&mut self) {
        assert!(self.process.is_none(), "it runs");
        let log = File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .unwrap();
        let child = Command::new(&self.program)
            .arg("--config")
            .arg(&self.config)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        self.process = Some(child.unwrap());
    }

    fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    fn monitoring(&self, path: &str) -> Result<Value, String> {
        let ask = || -> std::io::Result<String> {
            let mut stream = TcpStream::connect((self.host, MONITORING_PORT))?;
            write!(stream, "GET {path} HTTP/1.0\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        let answer = ask().map_err(|error| error.to_string())?;
        let body = answer.split_once("\r\n\r\n").map(|(_, body)| body);
        let value = serde_json::from_str(body.unwrap_or_default());
        value.map_err(|_| answer)
    }

    fn last_words(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines = log
            .lines()
            .filter(|line| !line.contains("Healthcheck failed"));
        let lines: Vec<&str> = lines.collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        for server in &mut self.servers {
            server.kill();
            if std::thread::panicking() {
                eprintln!(
                    "---- nats-server at {} ----\n{}",
                    server.host,
                    server.last_words()
                );
            }
        }
    }
}
