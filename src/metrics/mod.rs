//! The exporter: metric descriptions, `/metrics`, `/healthz` and `/readyz`.
//!
//! Rooms count in plain integers of their own and publish them through the hook that
//! [`Endpoints::publish`] holds, right before a scrape is answered: nothing runs for the metrics'
//! sake while nobody asks. No room uses the exporter's own histograms, which keep every sample until
//! they are scraped.

mod descriptions;
mod health;
pub(crate) mod process;

use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tokio::net::TcpListener;

pub use crate::http::ListenError;
pub use health::{Check, Health};

/// This process's recorder: what the `metrics` macros count, rendered for Prometheus.
///
/// Installs the recorder on the first call; one process has one.
pub fn recorder() -> PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE
        .get_or_init(|| {
            let recorder = PrometheusBuilder::new().build_recorder();
            let handle = recorder.handle();
            descriptions::install(&recorder);
            if metrics::set_global_recorder(recorder).is_err() {
                tracing::error!("a metrics recorder is installed already: /metrics stays empty");
            }
            handle
        })
        .clone()
}

/// What the metrics listener answers from.
#[derive(Clone)]
pub struct Endpoints {
    pub recorder: PrometheusHandle,
    /// Called before each rendering, so that the rooms publish what they have counted.
    pub publish: Arc<dyn Fn() + Send + Sync>,
    /// Appends what the recorder does not have: series that come and go.
    pub append: Arc<dyn Fn(&mut String) + Send + Sync>,
    pub health: Health,
}

/// Answers `/metrics`, `/healthz` and `/readyz` until `shutdown` resolves.
pub async fn serve(
    listener: TcpListener,
    endpoints: Endpoints,
    shutdown: impl Future<Output = ()>,
) {
    crate::http::serve(listener, router(endpoints), shutdown).await;
}

fn router(endpoints: Endpoints) -> Router {
    Router::new()
        .route("/metrics", get(metrics_text))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .fallback(|| async {
            (
                StatusCode::NOT_FOUND,
                "here are /metrics, /healthz and /readyz\n",
            )
        })
        .with_state(endpoints)
}

async fn metrics_text(State(endpoints): State<Endpoints>) -> Response {
    (endpoints.publish)();
    let mut text = endpoints.recorder.render();
    process::render(&mut text);
    (endpoints.append)(&mut text);
    (
        [(
            header::CONTENT_TYPE,
            "text/plain; version=0.0.4; charset=utf-8",
        )],
        text,
    )
        .into_response()
}

async fn healthz(State(endpoints): State<Endpoints>) -> Response {
    answer(endpoints.health.check().await)
}

async fn readyz(State(endpoints): State<Endpoints>) -> Response {
    answer(endpoints.health.ready())
}

fn answer(outcome: Result<(), Vec<String>>) -> Response {
    match outcome {
        Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
        Err(missing) => (StatusCode::SERVICE_UNAVAILABLE, missing.join("\n") + "\n"),
    }
    .into_response()
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio::sync::oneshot;

    use super::*;

    struct Served {
        address: SocketAddr,
        health: Health,
        stop: oneshot::Sender<()>,
        server: tokio::task::JoinHandle<()>,
    }

    async fn served(publish: impl Fn() + Send + Sync + 'static) -> Served {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let health = Health::default();
        let (stop, stopped) = oneshot::channel::<()>();
        let endpoints = Endpoints {
            recorder: recorder(),
            publish: Arc::new(publish),
            append: Arc::new(|_| {}),
            health: health.clone(),
        };
        let server = tokio::spawn(serve(listener, endpoints, async {
            stopped.await.ok();
        }));
        Served {
            address,
            health,
            stop,
            server,
        }
    }

    async fn get(address: SocketAddr, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let status = answer[9..12].parse().unwrap();
        let (_, body) = answer.split_once("\r\n\r\n").unwrap();
        (status, body.to_owned())
    }

    #[tokio::test]
    async fn a_scrape_publishes_the_rooms_counters_first() {
        let served = served(|| metrics::counter!("headgate_test_total").absolute(7)).await;
        let (status, body) = get(served.address, "/metrics").await;
        assert_eq!(status, 200);
        assert!(body.contains("headgate_test_total 7"), "{body}");
        assert!(
            body.contains(concat!(
                "headgate_build_info{version=\"",
                env!("CARGO_PKG_VERSION"),
                "\"} 1"
            )),
            "{body}"
        );
    }

    #[tokio::test]
    async fn readiness_names_what_is_missing_until_nothing_is() {
        let served = served(|| {}).await;
        served.health.not_ready("apps", "2 of 3 apps are starting");
        assert_eq!(
            get(served.address, "/readyz").await,
            (503, "apps: 2 of 3 apps are starting\n".into())
        );
        served.health.set_ready("apps");
        assert_eq!(get(served.address, "/readyz").await.0, 200);
        served.health.drain();
        let (status, body) = get(served.address, "/readyz").await;
        assert_eq!((status, body.as_str()), (503, "draining\n"));
        assert_eq!(
            get(served.address, "/healthz").await.0,
            200,
            "a draining gateway is alive"
        );
    }

    #[tokio::test]
    async fn a_loop_that_does_not_answer_makes_the_gateway_unhealthy() {
        let served = served(|| {}).await;
        served
            .health
            .watch("pipeline", || Box::pin(std::future::pending()));
        let (status, body) = get(served.address, "/healthz").await;
        assert_eq!(status, 503);
        assert!(body.starts_with("pipeline: no answer within"), "{body}");
    }

    #[tokio::test]
    async fn an_unknown_path_says_which_there_are() {
        let served = served(|| {}).await;
        let (status, body) = get(served.address, "/metric").await;
        assert_eq!(status, 404);
        assert!(body.contains("/metrics"), "{body}");
    }

    #[tokio::test]
    async fn a_silent_client_does_not_hold_up_the_shutdown() {
        let served = served(|| {}).await;
        let mut silent = TcpStream::connect(served.address).await.unwrap();
        get(served.address, "/healthz").await;
        served.stop.send(()).unwrap();
        served.server.await.unwrap();
        assert_eq!(silent.read(&mut [0; 1]).await.unwrap(), 0);
    }
}
