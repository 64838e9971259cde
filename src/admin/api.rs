//! The requests that the admin API answers, and how errors become status codes.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::Mutex;

use super::{AdminState, MANIFEST_LENGTH, MAX_COMPONENT_BYTES, MAX_MANIFEST_BYTES};
use crate::apps::{AppError, AppErrorKind, AppInfo, Apps};

/// Lines that `GET …/logs` answers with when it isn't told.
const DEFAULT_LOG_LINES: usize = 100;

/// The client is on the same machine: 64 MiB take a fraction of a second.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Clone)]
struct Api {
    state: AdminState,
    /// One package is taken in at a time, so that no more than one sits in memory.
    installing: Arc<Mutex<()>>,
}

pub(super) fn router(state: AdminState) -> Router {
    let api = Api {
        state,
        installing: Arc::default(),
    };
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/apps", get(list).post(install))
        .route("/v1/apps/{name}", get(inspect).delete(remove))
        .route("/v1/apps/{name}/start", post(start))
        .route("/v1/apps/{name}/stop", post(stop))
        .route("/v1/apps/{name}/restart", post(restart))
        .route("/v1/apps/{name}/logs", get(logs))
        .fallback(|| async {
            Refusal::new(
                StatusCode::NOT_FOUND,
                "no such path; here are /v1/status and /v1/apps",
            )
        })
        .method_not_allowed_fallback(|| async {
            Refusal::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "this path doesn't answer to this method; see the Allow header",
            )
        })
        .with_state(api)
}

/// An error as it goes over the wire: a status code and `{"error": "…"}`.
struct Refusal {
    status: StatusCode,
    error: String,
}

impl Refusal {
    fn new(status: StatusCode, error: impl Into<String>) -> Refusal {
        Refusal {
            status,
            error: error.into(),
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status, Json(json!({ "error": self.error }))).into_response()
    }
}

impl From<AppError> for Refusal {
    fn from(error: AppError) -> Refusal {
        let status = match error.kind() {
            AppErrorKind::NotFound => StatusCode::NOT_FOUND,
            AppErrorKind::Invalid => StatusCode::UNPROCESSABLE_ENTITY,
            AppErrorKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            AppErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        if status == StatusCode::INTERNAL_SERVER_ERROR {
            tracing::error!(%error, "an admin request failed");
        }
        Refusal::new(status, error.to_string())
    }
}

type Answer<T> = Result<Json<T>, Refusal>;

async fn status(State(api): State<Api>) -> Answer<serde_json::Value> {
    let status = api.state.status;
    blocking(move || Ok(status())).await.map(Json)
}

#[derive(Serialize)]
struct AppList {
    apps: Vec<AppInfo>,
}

async fn list(State(api): State<Api>) -> Answer<AppList> {
    let apps = api.state.apps;
    blocking(move || Ok(AppList { apps: apps.list() }))
        .await
        .map(Json)
}

async fn inspect(State(api): State<Api>, Path(name): Path<String>) -> Answer<AppInfo> {
    with_app(api, name, Apps::inspect).await
}

async fn start(State(api): State<Api>, Path(name): Path<String>) -> Answer<AppInfo> {
    with_app(api, name, Apps::start).await
}

async fn stop(State(api): State<Api>, Path(name): Path<String>) -> Answer<AppInfo> {
    with_app(api, name, Apps::stop).await
}

async fn restart(State(api): State<Api>, Path(name): Path<String>) -> Answer<AppInfo> {
    with_app(api, name, Apps::restart).await
}

async fn remove(State(api): State<Api>, Path(name): Path<String>) -> Answer<serde_json::Value> {
    with_app(api, name, |apps, name| {
        apps.remove(name)?;
        Ok(json!({ "removed": name }))
    })
    .await
}

#[derive(Deserialize)]
struct LogsQuery {
    last: Option<usize>,
}

async fn logs(
    State(api): State<Api>,
    Path(name): Path<String>,
    query: Result<Query<LogsQuery>, QueryRejection>,
) -> Answer<serde_json::Value> {
    let Query(LogsQuery { last }) = query.map_err(|rejection| {
        Refusal::new(
            StatusCode::BAD_REQUEST,
            format!("?last=N takes a number of lines: {}", rejection.body_text()),
        )
    })?;
    with_app(api, name, move |apps, name| {
        let lines = apps.logs(name, last.unwrap_or(DEFAULT_LOG_LINES))?;
        Ok(json!({ "lines": lines }))
    })
    .await
}

async fn install(
    State(api): State<Api>,
    headers: HeaderMap,
    body: Body,
) -> Result<(StatusCode, Json<AppInfo>), Refusal> {
    let manifest_bytes = manifest_length(&headers)?;
    if let Some(announced) = content_length(&headers) {
        check_size(announced, manifest_bytes)?;
    }
    let _one_at_a_time = api.installing.lock().await;
    let package = read_body(body, manifest_bytes).await?;
    if package.len() < manifest_bytes {
        return Err(Refusal::new(
            StatusCode::BAD_REQUEST,
            format!(
                "{MANIFEST_LENGTH} says {manifest_bytes} bytes, but the whole body has {}",
                package.len()
            ),
        ));
    }
    let apps = api.state.apps;
    let installed = blocking(move || {
        let (manifest, component) = package.split_at(manifest_bytes);
        let manifest = std::str::from_utf8(manifest).map_err(|error| {
            Refusal::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                format!("manifest: not UTF-8: {error}"),
            )
        })?;
        Ok(apps.install(manifest, component)?)
    })
    .await?;
    Ok((StatusCode::CREATED, Json(installed)))
}

fn manifest_length(headers: &HeaderMap) -> Result<usize, Refusal> {
    let Some(value) = headers.get(MANIFEST_LENGTH) else {
        return Err(Refusal::new(
            StatusCode::BAD_REQUEST,
            format!(
                "the header {MANIFEST_LENGTH} is missing: the body is the manifest followed by \
                 the component, and it says how many bytes the manifest has"
            ),
        ));
    };
    let length = value.to_str().ok().and_then(|text| text.parse().ok());
    match length {
        Some(length) if length <= MAX_MANIFEST_BYTES => Ok(length),
        Some(length) => Err(Refusal::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the manifest is {length} bytes; it can have {MAX_MANIFEST_BYTES}"),
        )),
        None => Err(Refusal::new(
            StatusCode::BAD_REQUEST,
            format!("the header {MANIFEST_LENGTH} is not a number of bytes"),
        )),
    }
}

fn content_length(headers: &HeaderMap) -> Option<usize> {
    headers
        .get(header::CONTENT_LENGTH)?
        .to_str()
        .ok()?
        .parse()
        .ok()
}

fn check_size(package_bytes: usize, manifest_bytes: usize) -> Result<(), Refusal> {
    let component_bytes = package_bytes.saturating_sub(manifest_bytes);
    if component_bytes > MAX_COMPONENT_BYTES {
        return Err(Refusal::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the component is {component_bytes} bytes; it can have {MAX_COMPONENT_BYTES}"),
        ));
    }
    Ok(())
}

async fn read_body(body: Body, manifest_bytes: usize) -> Result<Bytes, Refusal> {
    let read = axum::body::to_bytes(body, manifest_bytes + MAX_COMPONENT_BYTES);
    match tokio::time::timeout(BODY_TIMEOUT, read).await {
        Ok(Ok(package)) => Ok(package),
        Ok(Err(error)) if is_too_large(&error) => Err(Refusal::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the component has more than {MAX_COMPONENT_BYTES} bytes"),
        )),
        Ok(Err(error)) => Err(Refusal::new(
            StatusCode::BAD_REQUEST,
            format!("the body ended early: {error}"),
        )),
        Err(_) => Err(Refusal::new(
            StatusCode::REQUEST_TIMEOUT,
            format!("the body did not arrive within {} s", BODY_TIMEOUT.as_secs()),
        )),
    }
}

fn is_too_large(error: &axum::Error) -> bool {
    std::error::Error::source(error)
        .is_some_and(|source| source.is::<http_body_util::LengthLimitError>())
}

/// Runs `act` on the app called `name`.
async fn with_app<T, F>(api: Api, name: String, act: F) -> Answer<T>
where
    T: Send + 'static,
    F: FnOnce(&Apps, &str) -> Result<T, AppError> + Send + 'static,
{
    let apps = api.state.apps;
    blocking(move || Ok(act(&apps, &name)?)).await.map(Json)
}

/// Runs what may block on a thread that may be blocked.
async fn blocking<T, F>(work: F) -> Result<T, Refusal>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, Refusal> + Send + 'static,
{
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| {
        Err(Refusal::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the request failed inside the gateway; its log has the details",
        ))
    })
}
