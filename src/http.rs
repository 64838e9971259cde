//! Serving HTTP/1.1 with bounds on everything a client could hold on to.
//!
//! The admin API and the metrics endpoint share this. A client that connects and says nothing,
//! sends its header byte by byte, or opens connection after connection costs the gateway at most
//! [`MAX_CONNECTIONS`] sockets, each for at most [`HEADER_TIMEOUT`] between requests.

use std::fmt;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::serve::Listener;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

/// Connections open at a time; further ones wait in the kernel's backlog. A scraper and a few
/// people at a command line need a handful.
const MAX_CONNECTIONS: usize = 64;

/// From one request's end (or the accept) to the end of the next one's header.
const HEADER_TIMEOUT: Duration = Duration::from_secs(3);

/// How long requests that are under way may take once `shutdown` has resolved. Stays well under
/// the 5 s in which the whole gateway drains.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// Answers requests on `listener` with `router` until `shutdown` resolves, then lets the requests
/// under way end and returns.
pub async fn serve<L>(mut listener: L, router: Router, shutdown: impl Future<Output = ()>)
where
    L: Listener,
{
    let (stop, stopping) = watch::channel(());
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        let accept = async {
            let permit = permits.clone().acquire_owned().await;
            (permit, listener.accept().await)
        };
        tokio::select! {
            (permit, (stream, _)) = accept => {
                let connection = serve_connection(stream, router.clone(), stopping.clone());
                connections.spawn(async move {
                    let _permit = permit;
                    connection.await;
                });
            }
            Some(_) = connections.join_next() => {}
            () = &mut shutdown => break,
        }
    }
    drop(listener);
    stop.send_replace(());
    let all_ended = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(DRAIN_TIMEOUT, all_ended)
        .await
        .is_err()
    {
        connections.shutdown().await;
    }
}

async fn serve_connection<S>(stream: S, router: Router, mut stopping: watch::Receiver<()>)
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        _ = stopping.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "HTTP connection ended early");
    }
}

/// Why an address can't be listened on. What `source` says, the text says in better words; so it is
/// not the error's source, which would be printed after it.
#[derive(Debug)]
pub struct ListenError {
    /// The configuration key that holds the address.
    pub key: &'static str,
    pub address: String,
    pub source: io::Error,
}

impl std::error::Error for ListenError {}

impl fmt::Display for ListenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ListenError {
            key,
            address,
            source,
        } = self;
        let (reason, advice) = (reason(source), advice(source));
        write!(f, "{key} = \"{address}\": {reason}; {advice}")
    }
}

fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => "another process listens on this address".into(),
        io::ErrorKind::AddrNotAvailable => "this machine has no such address".into(),
        io::ErrorKind::PermissionDenied => "not permitted".into(),
        _ => error.to_string(),
    }
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => "stop it or set this key to a free port",
        io::ErrorKind::PermissionDenied => "ports under 1024 need CAP_NET_BIND_SERVICE",
        _ => "set this key to an address of this machine",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_in_use_names_the_key_the_address_and_what_to_do() {
        let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = taken.local_addr().unwrap().to_string();
        let source = tokio::net::TcpListener::bind(&address).await.unwrap_err();
        let error = ListenError {
            key: "metrics.listen",
            address: address.clone(),
            source,
        };
        assert_eq!(
            error.to_string(),
            format!(
                "metrics.listen = \"{address}\": another process listens on this address; stop it \
                 or set this key to a free port"
            )
        );
    }
}
