//! Accepting connections.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};

use super::connection;
use super::link::Link;
use super::stream::Stream;
use super::tls_reload::TlsReloader;
use super::websocket::WebSocket;
use super::{Phase, Shared};

/// How long to wait when the system has no file descriptor or memory for another connection.
const BREATHER: Duration = Duration::from_millis(100);

/// A socket that MQTT clients connect to.
pub struct Listener {
    pub socket: TcpListener,
    pub protocols: Protocols,
}

/// What is spoken below MQTT.
#[derive(Clone)]
pub struct Protocols {
    /// None: no TLS.
    pub tls: Option<Arc<TlsReloader>>,
    /// The path of the WebSocket. None: MQTT is spoken without WebSocket.
    pub websocket: Option<Arc<str>>,
}

/// The name of what is spoken below MQTT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    Tcp,
    Tls,
    WebSocket,
    WebSocketTls,
}

impl Transport {
    pub(super) fn has_tls(self) -> bool {
        matches!(self, Transport::Tls | Transport::WebSocketTls)
    }

    /// As metrics and the log have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Transport::Tcp => "tcp",
            Transport::Tls => "tls",
            Transport::WebSocket => "ws",
            Transport::WebSocketTls => "wss",
        }
    }
}

impl Protocols {
    pub fn transport(&self) -> Transport {
        match (&self.tls, &self.websocket) {
            (None, None) => Transport::Tcp,
            (Some(_), None) => Transport::Tls,
            (None, Some(_)) => Transport::WebSocket,
            (Some(_), Some(_)) => Transport::WebSocketTls,
        }
    }

    pub(super) fn stream(&self, socket: TcpStream) -> io::Result<Stream> {
        let tls = self.tls.as_ref().map(|tls| tls.config());
        let link = Link::new(socket, tls)?;
        Ok(Stream::new(
            link,
            self.websocket.clone().map(WebSocket::new),
        ))
    }
}

/// What has come in on the listeners of one transport.
#[derive(Debug, Default)]
pub(super) struct ListenerStats {
    /// Connected clients, now.
    pub clients: AtomicU64,
    /// Connections.
    pub accepted: AtomicU64,
    /// Connections that never became a client.
    pub refused: AtomicU64,
    /// Those among them whose handshake of TLS failed or never ended.
    pub tls_failures: AtomicU64,
}

/// Accepts clients until the shutdown begins.
pub(super) async fn accept(listener: Listener, shared: Arc<Shared>) {
    let Listener { socket, protocols } = listener;
    let transport = protocols.transport();
    let stats = shared.stats.of(transport);
    loop {
        let accepted = tokio::select! {
            accepted = socket.accept() => accepted,
            () = shared.leaves(Phase::Running) => return,
        };
        let (client, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // An aborted connection, or too many open files: the next one may work.
                tracing::warn!(%error, "can't accept a connection");
                tokio::time::sleep(BREATHER).await;
                continue;
            }
        };
        stats.accepted.fetch_add(1, Ordering::Relaxed);
        let place = match shared.sockets.clone().try_acquire_owned() {
            Ok(place) => Ok(place),
            // It comes as soon as the task of that connection gets a turn.
            Err(_) if shared.doorway.make_room() => shared.sockets.clone().acquire_owned().await,
            Err(_) => {
                stats.refused.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(%peer, "connection closed: mqtt.max_connections is reached");
                continue;
            }
        };
        let guest = shared.doorway.enter(peer.ip());
        let (shared, protocols) = (shared.clone(), protocols.clone());
        tokio::spawn(async move {
            connection::serve(client, protocols, peer, guest, shared).await;
            drop(place);
        });
    }
}
