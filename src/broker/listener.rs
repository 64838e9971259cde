//! Accepting connections.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustls::ServerConfig;
use tokio::net::TcpListener;

use super::connection;
use super::{Phase, Shared};

/// How long to wait when the system has no file descriptor or memory for another connection.
const BREATHER: Duration = Duration::from_millis(100);

/// Accepts clients, with TLS if there is a configuration for it, until the shutdown begins.
pub(super) async fn accept(
    listener: TcpListener,
    tls: Option<Arc<ServerConfig>>,
    shared: Arc<Shared>,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shared.leaves(Phase::Running) => return,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // An aborted connection, or too many open files: the next one may work.
                tracing::warn!(%error, "can't accept a connection");
                tokio::time::sleep(BREATHER).await;
                continue;
            }
        };
        shared.stats.accepted.fetch_add(1, Ordering::Relaxed);
        let Ok(place) = shared.sockets.clone().try_acquire_owned() else {
            shared.stats.refused.fetch_add(1, Ordering::Relaxed);
            tracing::debug!(%peer, "connection closed: mqtt.max_connections is reached");
            continue;
        };
        let (shared, tls) = (shared.clone(), tls.clone());
        tokio::spawn(async move {
            connection::serve(stream, tls, peer, shared).await;
            drop(place);
        });
    }
}
