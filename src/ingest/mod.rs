//! TCP ingest: events as frames, for producers that need no MQTT.
//!
//! Takes frames in and gives them to the subscribers, the pipeline and the journal, by the same rules and
//! logins as MQTT. `docs/ingest.md` has the protocol byte by byte. One thread serves all connections,
//! through io_uring where the kernel lets us.

pub mod client;
mod connection;
pub mod frame;
#[cfg(not(feature = "fuzzing"))]
mod session;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod session;
mod socket;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use io_uring::opcode;
use parking_lot::Mutex;
use serde::Serialize;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::{LocalSet, spawn_local};

use crate::broker::{Door, TlsReloader};
use crate::uring;
use socket::Socket;

/// How long to wait when the system has no file descriptor or memory for another connection.
const BREATHER: Duration = Duration::from_millis(100);

/// How ingest is set up.
#[derive(Clone, Debug)]
pub struct IngestConfig {
    pub max_connections: usize,
    pub max_frame_bytes: usize,
    pub handshake_timeout: Duration,
    /// Zero: a client may be silent for ever.
    pub idle_timeout: Duration,
    /// Whether io_uring is used where the kernel lets us.
    pub io_uring: bool,
}

/// A socket that producers connect to.
pub struct Listener {
    pub socket: TcpListener,
    /// None: no TLS.
    pub tls: Option<Arc<TlsReloader>>,
}

/// Running ingest.
pub struct Ingest {
    shared: Arc<Shared>,
    phase: watch::Sender<Phase>,
    thread: Mutex<Option<JoinHandle<()>>>,
    listen: Option<SocketAddr>,
    tls_listen: Option<SocketAddr>,
    io: Io,
}

/// What all connections share.
struct Shared {
    config: IngestConfig,
    door: Door,
    phase: watch::Receiver<Phase>,
    stats: Stats,
}

/// How far the shutdown has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Running,
    /// Nothing more is read; what was is acknowledged, once it is taken.
    Draining,
    /// All connections are closed.
    Closing,
}

/// How sockets without TLS are read. Those with TLS always take epoll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Io {
    Uring,
    Epoll,
}

impl Io {
    fn as_str(self) -> &'static str {
        match self {
            Io::Uring => "io_uring",
            Io::Epoll => "epoll",
        }
    }
}

#[derive(Debug, Default)]
struct Stats {
    /// Now.
    connections: AtomicU64,
    opened: AtomicU64,
    /// Those among them that were never let in.
    refused: AtomicU64,
    /// Connections that were ended for what came on them, or did not.
    errors: AtomicU64,
    /// Frames.
    accepted: AtomicU64,
    denied: AtomicU64,
    bytes: AtomicU64,
}

/// Ingest, for people and scripts. Totals since the start, except where a count of now is meant.
#[derive(Clone, Debug, Serialize)]
pub struct IngestStatus {
    pub listen: Option<SocketAddr>,
    pub tls_listen: Option<SocketAddr>,
    /// How sockets without TLS are read: `io_uring` or `epoll`.
    pub io: &'static str,
    /// Now.
    pub connections: u64,
    pub opened: u64,
    /// Connections that were never let in.
    pub refused: u64,
    /// Connections that were ended for what came on them, or did not.
    pub errors: u64,
    /// Frames: those that were taken, and those on topics that their client must not publish to.
    pub frames: u64,
    pub accepted: u64,
    pub denied: u64,
    pub bytes: u64,
}

impl Ingest {
    /// Serves these listeners, at least one of them, on a thread of its own.
    pub fn start(config: IngestConfig, listeners: Vec<Listener>, door: Door) -> io::Result<Ingest> {
        let io = match config.io_uring {
            true => match uring::probe(&[opcode::Read::CODE, opcode::Write::CODE]) {
                Ok(()) => Io::Uring,
                Err(why) => {
                    tracing::warn!(why, "ingest works without io_uring, which is refused here");
                    Io::Epoll
                }
            },
            false => Io::Epoll,
        };
        let address = |with_tls| {
            let mut listeners = listeners.iter();
            let listener = listeners.find(|listener| listener.tls.is_some() == with_tls);
            listener.and_then(|listener| listener.socket.local_addr().ok())
        };
        let (listen, tls_listen) = (address(false), address(true));
        let (phase, phase_seen) = watch::channel(Phase::Running);
        let shared = Arc::new(Shared {
            config,
            door,
            phase: phase_seen,
            stats: Stats::default(),
        });
        // They belong to another runtime so far.
        let listeners = listeners
            .into_iter()
            .map(|Listener { socket, tls }| Ok((socket.into_std()?, tls)))
            .collect::<io::Result<Vec<_>>>()?;
        let thread = {
            let shared = shared.clone();
            std::thread::Builder::new()
                .name("ingest".into())
                .spawn(move || {
                    let serve = serve(listeners, shared, io);
                    let served = match io {
                        Io::Uring => tokio_uring::Runtime::new(&tokio_uring::builder())
                            .and_then(|runtime| runtime.block_on(serve)),
                        Io::Epoll => tokio::runtime::Builder::new_current_thread()
                            .enable_all()
                            .build()
                            .and_then(|runtime| LocalSet::new().block_on(&runtime, serve)),
                    };
                    if let Err(error) = served {
                        tracing::error!(%error, "ingest can't run");
                    }
                })?
        };
        let listen_log = listen.map(tracing::field::display);
        let tls_log = tls_listen.map(tracing::field::display);
        tracing::info!(
            listen = listen_log,
            tls_listen = tls_log,
            io = io.as_str(),
            "listening for frames"
        );
        Ok(Ingest {
            shared,
            phase,
            thread: Mutex::new(Some(thread)),
            listen,
            tls_listen,
            io,
        })
    }

    /// Accepts nobody and reads nothing any more.
    pub fn drain(&self) {
        self.phase.send_replace(Phase::Draining);
    }

    /// Closes all connections. Blocks until they are.
    pub fn close(&self) {
        self.phase.send_replace(Phase::Closing);
        if let Some(thread) = self.thread.lock().take() {
            // A panic there has been reported by the panic hook.
            let _ = thread.join();
        }
    }

    pub fn status(&self) -> IngestStatus {
        let stats = &self.shared.stats;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (accepted, denied) = (get(&stats.accepted), get(&stats.denied));
        IngestStatus {
            listen: self.listen,
            tls_listen: self.tls_listen,
            io: self.io.as_str(),
            connections: get(&stats.connections),
            opened: get(&stats.opened),
            refused: get(&stats.refused),
            errors: get(&stats.errors),
            frames: accepted + denied,
            accepted,
            denied,
            bytes: get(&stats.bytes),
        }
    }

    /// Puts the counters into the `metrics` crate's recorder. To be called before a scrape.
    pub fn record_metrics(&self) {
        let status = self.status();
        metrics::gauge!("headgate_ingest_connections").set(status.connections as f64);
        for (result, count) in [("accepted", status.opened), ("refused", status.refused)] {
            metrics::counter!("headgate_ingest_connections_total", "result" => result)
                .absolute(count);
        }
        metrics::counter!("headgate_ingest_errors_total").absolute(status.errors);
        for (result, count) in [("accepted", status.accepted), ("denied", status.denied)] {
            metrics::counter!("headgate_ingest_frames_total", "result" => result).absolute(count);
        }
        metrics::counter!("headgate_ingest_received_bytes_total").absolute(status.bytes);
    }
}

impl Shared {
    /// Returns when the shutdown has come so far.
    async fn reaches(&self, phase: Phase) {
        // An error means that ingest is gone, which is as good.
        let _ = self.phase.clone().wait_for(|now| *now >= phase).await;
    }
}

async fn serve(
    listeners: Vec<(std::net::TcpListener, Option<Arc<TlsReloader>>)>,
    shared: Arc<Shared>,
    io: Io,
) -> io::Result<()> {
    let all = shared.config.max_connections;
    let places = Arc::new(Semaphore::new(all));
    let mut accepting = Vec::new();
    for (socket, tls) in listeners {
        let socket = TcpListener::from_std(socket)?;
        accepting.push(spawn_local(accept(
            socket,
            tls,
            io,
            places.clone(),
            shared.clone(),
        )));
    }
    for listener in accepting {
        // A panic has been reported by the panic hook.
        let _ = listener.await;
    }
    // The semaphore is never closed.
    let _ = places.acquire_many(all as u32).await;
    Ok(())
}

/// Accepts clients until the shutdown begins.
async fn accept(
    listener: TcpListener,
    tls: Option<Arc<TlsReloader>>,
    io: Io,
    places: Arc<Semaphore>,
    shared: Arc<Shared>,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shared.reaches(Phase::Draining) => return,
        };
        let (socket, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // An aborted connection, or too many open files: the next one may work.
                tracing::warn!(%error, "can't accept a connection");
                tokio::time::sleep(BREATHER).await;
                continue;
            }
        };
        shared.stats.opened.fetch_add(1, Ordering::Relaxed);
        let Ok(place) = places.clone().try_acquire_owned() else {
            shared.stats.refused.fetch_add(1, Ordering::Relaxed);
            if shared.door.may_log() {
                tracing::warn!(%peer, "ingest connection closed: ingest.max_connections are open");
            }
            continue;
        };
        let socket = match prepare(socket, tls.as_deref(), io) {
            Ok(socket) => socket,
            Err(error) => {
                shared.stats.refused.fetch_add(1, Ordering::Relaxed);
                tracing::error!(%peer, %error, "an ingest connection can't be used");
                continue;
            }
        };
        let shared = shared.clone();
        spawn_local(async move {
            let _place = place;
            shared.stats.connections.fetch_add(1, Ordering::Relaxed);
            connection::serve(socket, peer, shared.clone()).await;
            shared.stats.connections.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

fn prepare(socket: TcpStream, tls: Option<&TlsReloader>, io: Io) -> io::Result<Socket> {
    // Without it, acknowledgements wait for the peer's delayed acks.
    socket.set_nodelay(true)?;
    // So that a peer that is gone without a word does not keep its place for ever.
    SockRef::from(&socket).set_keepalive(true)?;
    match (tls, io) {
        (None, Io::Uring) => Socket::uring(socket),
        (tls, _) => Socket::epoll(socket, tls.map(TlsReloader::config)),
    }
}
