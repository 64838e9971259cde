//! The requests that the admin API answers, and how errors become status codes.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{FromRequestParts, Path, Query, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::Mutex;

use super::client::DeadLetterList;
use super::mappings;
use super::mqtt::{self, QueryResult, parse};
use super::{AdminState, MANIFEST_LENGTH, MAX_COMPONENT_BYTES, MAX_MANIFEST_BYTES};
use crate::apps::{AppError, AppErrorKind, AppInfo, Apps};
use crate::dead_letters::{DeadLetterInfo, Retried, no_such_letter};
use crate::event::{Topic, TopicFilter};
use crate::why::Explanation;

/// Lines that `GET …/logs` answers with when it isn't told.
const DEFAULT_LOG_LINES: usize = 100;

/// Dead letters that `GET /v1/dead-letters` answers with when it isn't told.
const DEFAULT_DEAD_LETTERS: usize = 100;

/// The client is on the same machine: 64 MiB take a fraction of a second.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Clone)]
pub(super) struct Api {
    pub(super) state: AdminState,
    /// One package is taken in at a time, so that no more than one sits in memory.
    installing: Arc<Mutex<()>>,
    /// One at a time hands dead letters over again, so that none goes twice.
    retrying: Arc<Mutex<()>>,
}

pub(super) fn router(state: AdminState) -> Router {
    let api = Api {
        state,
        installing: Arc::default(),
        retrying: Arc::default(),
    };
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/reload", post(reload))
        .route("/v1/why", get(why))
        .route("/v1/ota/update", post(request_update))
        .route("/v1/ota/passed", post(pass_trial))
        .route("/v1/apps", get(list).post(install))
        .route("/v1/apps/{name}", get(inspect).delete(remove))
        .route("/v1/apps/{name}/start", post(start))
        .route("/v1/apps/{name}/stop", post(stop))
        .route("/v1/upgrade", post(upgrade))
        .route("/v1/apps/{name}/rollback", post(rollback))
        .route("/v1/apps/{name}/pause", post(pause))
        .route("/v1/apps/{name}/resume", post(resume))
        .route("/v1/apps/{name}/drain", post(drain))
        .route("/v1/apps/{name}/restart", post(restart))
        .route("/v1/apps/{name}/logs", get(logs))
        .route("/v1/apps/{name}/package", get(package))
        .route("/v1/mappings", get(mappings::list))
        .route(
            "/v1/mappings/{name}",
            get(mappings::inspect)
                .put(mappings::install)
                .delete(mappings::remove),
        )
        .route("/v1/mappings/{name}/config", get(mappings::config))
        .route("/v1/why-mapping", get(mappings::why))
        .route("/v1/mqtt/clients", get(mqtt::clients))
        .route("/v1/mqtt/disconnect", post(mqtt::disconnect))
        .route("/v1/mqtt/forget", post(mqtt::forget))
        .route("/v1/mqtt/subscriptions", get(mqtt::subscriptions))
        .route("/v1/mqtt/retained", get(mqtt::retained))
        .route("/v1/mqtt/topics", get(mqtt::topics))
        .route(
            "/v1/dead-letters",
            get(dead_letters).delete(purge_dead_letters),
        )
        .route("/v1/dead-letters/{id}", get(dead_letter))
        .route("/v1/dead-letters/retry", post(retry_dead_letters))
        .fallback(|| async {
            Refusal::new(
                StatusCode::NOT_FOUND,
                "no such path; here are /v1/status, /v1/apps, /v1/mappings, /v1/mqtt, /v1/reload, /v1/why, /v1/why-mapping, /v1/ota and /v1/dead-letters",
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
pub(super) struct Refusal {
    status: StatusCode,
    error: String,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, error: impl Into<String>) -> Refusal {
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
            AppErrorKind::Conflict => StatusCode::CONFLICT,
            AppErrorKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            AppErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        };
        if status == StatusCode::INTERNAL_SERVER_ERROR {
            tracing::error!(%error, "an admin request failed");
        }
        Refusal::new(status, error.to_string())
    }
}

/// The app that a path names.
struct AppName(String);

impl<S: Send + Sync> FromRequestParts<S> for AppName {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<AppName, Refusal> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path(name)) => Ok(AppName(name)),
            Err(rejection) => Err(Refusal::new(
                StatusCode::BAD_REQUEST,
                format!("the app's name in the path: {}", rejection.body_text()),
            )),
        }
    }
}

pub(super) type Answer<T> = Result<Json<T>, Refusal>;

async fn status(State(api): State<Api>) -> Answer<serde_json::Value> {
    let status = api.state.status;
    blocking(move || Ok(status())).await.map(Json)
}

async fn reload(State(api): State<Api>) -> Answer<serde_json::Value> {
    let reload = api.state.reload;
    blocking(move || {
        reload().map_err(|error| Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, error))?;
        Ok(json!({ "reloaded": true }))
    })
    .await
    .map(Json)
}

/// The gateway may not update the machine itself: it asks whoever may.
async fn request_update(State(api): State<Api>) -> Answer<serde_json::Value> {
    let Some(file) = api.state.update_requests else {
        return Err(Refusal::new(
            StatusCode::CONFLICT,
            "this gateway has no channel to be updated from; set ota.channel",
        ));
    };
    blocking(move || match std::fs::write(&file, "") {
        Ok(()) => Ok(json!({ "requested": true })),
        Err(error) => Err(Refusal::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("{}: {error}", file.display()),
        )),
    })
    .await
    .map(Json)
}

async fn pass_trial(State(api): State<Api>) -> Answer<serde_json::Value> {
    blocking(move || {
        let passed = (api.state.pass_trial)()
            .map_err(|error| Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, error))?;
        Ok(json!({ "passed": passed }))
    })
    .await
    .map(Json)
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

async fn inspect(State(api): State<Api>, AppName(name): AppName) -> Answer<AppInfo> {
    with_app(api, name, Apps::inspect).await
}

async fn start(State(api): State<Api>, AppName(name): AppName) -> Answer<AppInfo> {
    with_app(api, name, Apps::start).await
}

async fn stop(State(api): State<Api>, AppName(name): AppName) -> Answer<AppInfo> {
    with_app(api, name, Apps::stop).await
}

async fn pause(State(api): State<Api>, AppName(name): AppName) -> Answer<AppInfo> {
    with_app(api, name, Apps::pause).await
}

async fn resume(State(api): State<Api>, AppName(name): AppName) -> Answer<AppInfo> {
    with_app(api, name, Apps::resume).await
}

#[derive(Deserialize)]
struct DrainQuery {
    /// Seconds that it may take.
    #[serde(default = "drain_seconds")]
    timeout: u32,
}

fn drain_seconds() -> u32 {
    60
}

async fn drain(
    State(api): State<Api>,
    AppName(name): AppName,
    query: QueryResult<DrainQuery>,
) -> Answer<AppInfo> {
    let DrainQuery { timeout } = parse(query, "?timeout=SECONDS")?;
    let patience = Duration::from_secs(timeout.into());
    with_app(api, name, move |apps, name| apps.drain(name, patience)).await
}

async fn rollback(State(api): State<Api>, AppName(name): AppName) -> Answer<AppInfo> {
    with_app(api, name, Apps::rollback).await
}

async fn restart(State(api): State<Api>, AppName(name): AppName) -> Answer<AppInfo> {
    with_app(api, name, Apps::restart).await
}

async fn remove(State(api): State<Api>, AppName(name): AppName) -> Answer<serde_json::Value> {
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
    AppName(name): AppName,
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

/// As [`install`] takes it.
async fn package(State(api): State<Api>, AppName(name): AppName) -> Result<Response, Refusal> {
    let apps = api.state.apps;
    let (manifest, component) = blocking(move || Ok(apps.package(&name)?)).await?;
    let length = [(MANIFEST_LENGTH, manifest.len().to_string())];
    let body = [manifest.into_bytes(), component].concat();
    Ok((length, body).into_response())
}

#[derive(Deserialize)]
struct DeadLettersQuery {
    topic: Option<String>,
    last: Option<usize>,
}

async fn dead_letters(
    State(api): State<Api>,
    query: Result<Query<DeadLettersQuery>, QueryRejection>,
) -> Answer<DeadLetterList> {
    let Query(DeadLettersQuery { topic, last }) = query.map_err(|rejection| {
        Refusal::new(
            StatusCode::BAD_REQUEST,
            format!(
                "?topic=FILTER&last=N take a topic filter and a number of letters: {}",
                rejection.body_text()
            ),
        )
    })?;
    let filter = topic.as_deref().map(topic_filter).transpose()?;
    let letters = api.state.dead_letters;
    blocking(move || {
        let found = letters.list(filter.as_ref(), last.unwrap_or(DEFAULT_DEAD_LETTERS));
        Ok(DeadLetterList {
            letters: found.iter().map(|(id, letter)| letter.info(*id)).collect(),
            left_out: letters.left_out(),
        })
    })
    .await
    .map(Json)
}

#[derive(Deserialize)]
struct WhyQuery {
    topic: String,
}

async fn why(
    State(api): State<Api>,
    query: Result<Query<WhyQuery>, QueryRejection>,
) -> Answer<Explanation> {
    let Query(WhyQuery { topic }) = query.map_err(|rejection| {
        let text = rejection.body_text();
        Refusal::new(
            StatusCode::BAD_REQUEST,
            format!("?topic=TOPIC takes a topic: {text}"),
        )
    })?;
    let topic = Topic::new(topic.clone()).map_err(|error| {
        Refusal::new(
            StatusCode::BAD_REQUEST,
            format!("the topic {topic:?}: {error}"),
        )
    })?;
    blocking(move || Ok((api.state.why)(&topic)))
        .await
        .map(Json)
}

fn topic_filter(text: &str) -> Result<TopicFilter, Refusal> {
    TopicFilter::new(text.to_owned()).map_err(|error| {
        Refusal::new(
            StatusCode::BAD_REQUEST,
            format!("the topic filter {text:?}: {error}"),
        )
    })
}

fn letter_id(text: &str) -> Result<u64, Refusal> {
    text.parse().map_err(|_| {
        Refusal::new(
            StatusCode::BAD_REQUEST,
            format!("{text:?} is no id of a dead letter: that is a number"),
        )
    })
}

async fn dead_letter(State(api): State<Api>, Path(id): Path<String>) -> Answer<DeadLetterInfo> {
    let id = letter_id(&id)?;
    let letter = api.state.dead_letters.get(id);
    let letter = letter.ok_or_else(|| Refusal::new(StatusCode::NOT_FOUND, no_such_letter(id)))?;
    Ok(Json(letter.info(id)))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RetryQuery {
    /// With commas between them.
    ids: Option<String>,
    topic: Option<String>,
    all: Option<bool>,
}

async fn retry_dead_letters(
    State(api): State<Api>,
    query: QueryResult<RetryQuery>,
) -> Answer<Retried> {
    const TAKES: &str = "one of ?ids=ID,ID, ?topic=FILTER and ?all=true";
    let AdminState {
        dead_letters,
        retry,
        ..
    } = api.state;
    let matching = |filter: Option<&TopicFilter>| -> Vec<u64> {
        let found = dead_letters.list(filter, usize::MAX);
        found.into_iter().map(|(id, _)| id).collect()
    };
    // Before the letters are looked for: those that another one has handed over are not there any more.
    let one_at_a_time = api.retrying.lock_owned().await;
    let ids = match parse(query, TAKES)? {
        RetryQuery {
            ids: Some(ids),
            topic: None,
            all: None,
        } => ids.split(',').map(letter_id).collect::<Result<_, _>>()?,
        RetryQuery {
            ids: None,
            topic: Some(topic),
            all: None,
        } => matching(Some(&topic_filter(&topic)?)),
        RetryQuery {
            ids: None,
            topic: None,
            all: Some(true),
        } => matching(None),
        _ => {
            let error = format!("this path takes {TAKES}");
            return Err(Refusal::new(StatusCode::BAD_REQUEST, error));
        }
    };
    blocking(move || {
        let retried = dead_letters.retry(ids, |letter| retry(letter));
        drop(one_at_a_time);
        Ok(retried)
    })
    .await
    .map(Json)
}

async fn purge_dead_letters(State(api): State<Api>) -> Answer<serde_json::Value> {
    let removed = api.state.dead_letters.purge();
    Ok(Json(json!({ "removed": removed })))
}

async fn install(
    State(api): State<Api>,
    headers: HeaderMap,
    body: Body,
) -> Result<(StatusCode, Json<AppInfo>), Refusal> {
    let installed = with_package(api, headers, body, Apps::install).await?;
    Ok((StatusCode::CREATED, Json(installed)))
}

async fn upgrade(State(api): State<Api>, headers: HeaderMap, body: Body) -> Answer<AppInfo> {
    with_package(api, headers, body, Apps::upgrade)
        .await
        .map(Json)
}

/// Does something with the manifest and the component in a body.
async fn with_package(
    api: Api,
    headers: HeaderMap,
    body: Body,
    what: impl FnOnce(&Apps, &str, &[u8]) -> Result<AppInfo, AppError> + Send + 'static,
) -> Result<AppInfo, Refusal> {
    let manifest_bytes = manifest_length(&headers)?;
    if let Some(announced) = content_length(&headers) {
        check_size(announced, manifest_bytes)?;
    }
    let _one_at_a_time = api.installing.lock().await;
    let max = manifest_bytes + MAX_COMPONENT_BYTES;
    let package = read_body(body, max, "package").await?;
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
    blocking(move || {
        let (manifest, component) = package.split_at(manifest_bytes);
        let manifest = std::str::from_utf8(manifest).map_err(|error| {
            Refusal::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                format!("manifest: not UTF-8: {error}"),
            )
        })?;
        Ok(what(&apps, manifest, component)?)
    })
    .await
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

/// `what` there must not be more of than `max` bytes.
pub(super) async fn read_body(body: Body, max: usize, what: &str) -> Result<Bytes, Refusal> {
    let read = axum::body::to_bytes(body, max);
    match tokio::time::timeout(BODY_TIMEOUT, read).await {
        Ok(Ok(package)) => Ok(package),
        Ok(Err(error)) if is_too_large(&error) => Err(Refusal::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the {what} has more than {max} bytes"),
        )),
        Ok(Err(error)) => Err(Refusal::new(
            StatusCode::BAD_REQUEST,
            format!("the body ended early: {error}"),
        )),
        Err(_) => Err(Refusal::new(
            StatusCode::REQUEST_TIMEOUT,
            format!(
                "the body did not arrive within {} s",
                BODY_TIMEOUT.as_secs()
            ),
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
pub(super) async fn blocking<T, F>(work: F) -> Result<T, Refusal>
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

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Instant;

    use http_body_util::{BodyExt, Full};
    use hyper::Request;
    use hyper_util::rt::TokioIo;
    use serde_json::Value;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;
    use tokio::sync::oneshot;
    use tokio::task::JoinHandle;

    use super::*;
    use crate::admin::{AdminListener, Client, ClientError, Retry};
    use crate::apps::tests::house::{guest, manifest};
    use crate::apps::{AppState, AppsConfig, Compiler};
    use crate::broker::Broker;
    use crate::broker::access::Access;
    use crate::config::{Config, Source};
    use crate::dead_letters::{DeadLetter, DeadLetters, Reason};
    use crate::event::{Event, Topic};
    use crate::gateway::{access_config, broker_config};
    use crate::mappings::{Mappings, MappingsConfig};
    use crate::pipeline::{NotJournaled, Pipeline, PipelineConfig, Routes, Sink};
    use crate::store::{Store, StoreConfig};
    use crate::why::Why;

    const MANIFEST: &str = r#"
        name = "thermo"
        version = "1.2.3"
        subscribe = ["plant/#"]
    "#;

    struct NoSink;

    impl Sink for NoSink {
        fn publish(&self, _: &str, _: Vec<Event>) -> Result<(), NotJournaled> {
            Ok(())
        }
    }

    /// A real API with real apps on a socket of its own.
    struct Served {
        folder: tempfile::TempDir,
        socket: PathBuf,
        dead_letters: Arc<DeadLetters>,
        stop: oneshot::Sender<()>,
        server: JoinHandle<()>,
    }

    fn served() -> Served {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&StoreConfig {
            path: folder.path().join("store"),
            map_bytes: 16 << 20,
        })
        .unwrap();
        let config = AppsConfig {
            compiler: Compiler::InProcess,
            ..AppsConfig::new(store.path()).unwrap()
        };
        let routes = Arc::new(Routes::default());
        let dead_letters = Arc::new(DeadLetters::new(Instant::now()));
        let pipeline = PipelineConfig::default();
        let pipeline = Pipeline::start(pipeline, routes.clone(), dead_letters.clone());
        let pipeline = Arc::new(pipeline.unwrap());
        let defaults = Config::load(Source {
            file: None,
            system_file: None,
            env: vec![("HOME".into(), folder.path().into())],
            overrides: Vec::new(),
            superuser: false,
        });
        let defaults = defaults.unwrap().config;
        let broker = Broker::start(
            broker_config(&defaults),
            Access::load(access_config(&defaults)).unwrap(),
            &[],
            None,
            pipeline.clone(),
            None,
            store.clone(),
            dead_letters.clone(),
        );
        let mappings = Mappings::open(
            MappingsConfig {
                preinstalled: None,
                singletons: Default::default(),
                queue_events: 10,
                max_batch_events: 10,
            },
            store.clone(),
            routes.clone(),
            Arc::new(NoSink),
            Arc::new(|| {}),
            dead_letters.clone(),
        )
        .unwrap();
        let apps = Apps::open(
            config,
            store,
            routes.clone(),
            Arc::new(NoSink),
            Arc::new(|| {}),
            dead_letters.clone(),
        )
        .unwrap();
        let socket = folder.path().join("admin.sock");
        let listener = AdminListener::bind(&socket).unwrap();
        let broker = Arc::new(broker.unwrap());
        let why = Why {
            routes,
            pipeline,
            apps: apps.clone(),
            broker: broker.clone(),
            dead_letters: dead_letters.clone(),
            journal: None,
            mappings: mappings.clone(),
        };
        let state = AdminState {
            apps,
            mappings,
            broker,
            dead_letters: dead_letters.clone(),
            why: Arc::new(move |topic| why.answer(topic)),
            pass_trial: Arc::new(|| Ok(false)),
            update_requests: None,
            retry: Arc::new(|letter| match letter.topic.as_str() {
                "bad" => Err("nobody wants it".to_owned()),
                _ => Ok(()),
            }),
            status: Arc::new(|| json!({ "version": "1" })),
            reload: Arc::new(|| Err("mqtt.auth.acl_file: acl.toml:3: wrong".into())),
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let server = tokio::spawn(crate::admin::serve(listener, state, async {
            stopped.await.ok();
        }));
        Served {
            folder,
            socket,
            dead_letters,
            stop,
            server,
        }
    }

    impl Served {
        fn client(&self) -> Client {
            Client::new(&self.socket)
        }

        async fn request(&self, request: Request<Full<Bytes>>) -> (u16, Value) {
            let stream = UnixStream::connect(&self.socket).await.unwrap();
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream))
                    .await
                    .unwrap();
            tokio::spawn(connection);
            let answer = sender.send_request(request).await.unwrap();
            let status = answer.status().as_u16();
            let body = answer.into_body().collect().await.unwrap().to_bytes();
            (status, serde_json::from_slice(&body).unwrap())
        }

        async fn call(&self, method: &str, path: &str) -> (u16, Value) {
            let request = Request::builder()
                .method(method)
                .uri(path)
                .header("host", "x");
            self.request(request.body(Full::default()).unwrap()).await
        }

        async fn post_package(&self, manifest_length: Option<&str>, body: &[u8]) -> (u16, String) {
            let mut request = Request::builder()
                .method("POST")
                .uri("/v1/apps")
                .header("host", "x");
            if let Some(length) = manifest_length {
                request = request.header(MANIFEST_LENGTH, length);
            }
            let body = Full::new(Bytes::copy_from_slice(body));
            let (status, answer) = self.request(request.body(body).unwrap()).await;
            (status, error(&answer))
        }
    }

    fn error(answer: &Value) -> String {
        answer["error"].as_str().unwrap_or_default().to_owned()
    }

    fn refused(outcome: Result<impl std::fmt::Debug, ClientError>) -> (u16, String) {
        match outcome.unwrap_err() {
            ClientError::Refused { status, message } => (status, message),
            other => panic!("{other}"),
        }
    }

    #[tokio::test]
    async fn the_status_is_what_the_gateway_says() {
        let served = served();
        let status = served.client().status().await.unwrap();
        assert_eq!(status, json!({ "version": "1" }));
    }

    fn drop_one(served: &Served, topic: &'static str, payload: &[u8]) {
        let topic = Topic::new(topic).unwrap();
        let letters = &served.dead_letters;
        letters.add(Reason::QueueFull, Instant::now(), || {
            DeadLetter::new(Reason::QueueFull, "pump", &topic, payload, 1)
        });
    }

    #[tokio::test]
    async fn dead_letters_are_listed_by_topic_and_purged() {
        let served = served();
        let client = served.client();
        assert_eq!(
            served.call("GET", "/v1/dead-letters").await,
            (200, json!({ "letters": [], "left_out": 0 }))
        );
        for (topic, payload) in [
            ("plant/ü x", &b"21.5"[..]),
            ("other", b"x"),
            ("plant/b", b"\xff"),
        ] {
            drop_one(&served, topic, payload);
        }
        let list = client.dead_letters(None, 2).await.unwrap();
        let topics: Vec<_> = list.letters.iter().map(|l| l.topic.as_str()).collect();
        assert_eq!(topics, ["other", "plant/b"]);
        assert_eq!(list.letters[1].payload_base64.as_deref(), Some("/w=="));
        let list = client.dead_letters(Some("plant/#"), 100).await.unwrap();
        assert_eq!(list.letters.len(), 2);
        let list = client.dead_letters(Some("plant/ü x"), 100).await.unwrap();
        let letter = &list.letters[0];
        assert_eq!(letter.payload.as_deref(), Some("21.5"));
        assert_eq!((letter.qos, letter.source.as_str()), (1, "pump"));
        assert_eq!(client.purge_dead_letters().await.unwrap(), 3);
        let list = client.dead_letters(None, 100).await.unwrap();
        assert!(list.letters.is_empty());
    }

    #[tokio::test]
    async fn a_dead_letter_is_shown_and_retried_by_its_id() {
        let served = served();
        let client = served.client();
        for topic in ["good/a", "bad", "good/b", "good/c"] {
            drop_one(&served, topic, b"x");
        }
        let list = client.dead_letters(None, 100).await.unwrap().letters;
        let ids: Vec<_> = list.iter().map(|letter| letter.id).collect();
        let shown = client.dead_letter(ids[1]).await.unwrap();
        assert_eq!(shown, list[1]);
        let (status, message) = refused(client.dead_letter(99).await);
        assert_eq!(status, 404);
        assert!(
            message.contains("no dead letter has the id 99"),
            "{message}"
        );

        let outcome = client
            .retry_dead_letters(&Retry::Ids(vec![ids[0], ids[1], 99]))
            .await;
        let outcome = outcome.unwrap();
        assert_eq!(outcome.retried, 1);
        let refusals: Vec<_> = outcome
            .refused
            .iter()
            .map(|one| (one.id, &*one.error))
            .collect();
        assert_eq!(refusals[0], (ids[1], "nobody wants it"));
        assert_eq!(refusals[1].0, 99);
        let by_topic = Retry::Topic("good/b".to_owned());
        assert_eq!(
            client.retry_dead_letters(&by_topic).await.unwrap().retried,
            1
        );
        let outcome = client.retry_dead_letters(&Retry::All).await.unwrap();
        assert_eq!((outcome.retried, outcome.refused.len()), (1, 1));
        let left = client.dead_letters(None, 100).await.unwrap().letters;
        assert_eq!(left, [list[1].clone()]);
        for query in [
            "",
            "?ids=",
            "?ids=1,x",
            "?all=false",
            "?all=true&ids=1",
            "?topic=a/%23/b",
        ] {
            let (status, answer) = served
                .call("POST", &format!("/v1/dead-letters/retry{query}"))
                .await;
            assert_eq!(status, 400, "{query}: {answer}");
        }
        assert_eq!(served.call("GET", "/v1/dead-letters/x").await.0, 400);
    }

    #[tokio::test]
    async fn a_wrong_question_about_dead_letters_is_answered_with_what_is_wrong() {
        let served = served();
        let refused = refused(served.client().dead_letters(Some("plant/#/x"), 5).await);
        assert_eq!(refused.0, 400);
        assert!(refused.1.contains("\"plant/#/x\""), "{}", refused.1);
        assert!(
            refused.1.contains("`#` must be the last level"),
            "{}",
            refused.1
        );
        let (status, answer) = served.call("GET", "/v1/dead-letters?last=many").await;
        assert_eq!(status, 400);
        assert!(error(&answer).contains("last=N"), "{answer}");
        let (status, _) = served.call("POST", "/v1/dead-letters").await;
        assert_eq!(status, 405);
    }

    #[tokio::test]
    async fn every_verb_on_an_unknown_app_is_a_404_that_names_it() {
        let served = served();
        let client = served.client();
        for outcome in [
            refused(client.inspect("no/such app").await),
            refused(client.start("no/such app").await),
            refused(client.stop("no/such app").await),
            refused(client.restart("no/such app").await),
            refused(client.remove("no/such app").await),
            refused(client.logs("no/such app", 5).await),
            refused(client.package("no/such app").await),
        ] {
            assert_eq!(outcome.0, 404);
            assert!(outcome.1.contains("\"no/such app\""), "{}", outcome.1);
        }
        assert!(client.list().await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn what_is_no_component_is_a_422_that_says_why() {
        let served = served();
        let client = served.client();
        let (status, message) = refused(client.install(MANIFEST, b"#!/bin/sh").await);
        assert_eq!(status, 422);
        assert!(
            message.contains("app thermo: this is not WebAssembly"),
            "{message}"
        );

        let module = wat::parse_str("(module)").unwrap();
        let (status, message) = refused(client.install(MANIFEST, &module).await);
        assert_eq!(status, 422);
        assert!(message.contains("core WebAssembly module"), "{message}");
        assert!(client.list().await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_wrong_manifest_is_a_422_with_its_line() {
        let served = served();
        let manifest = "name = \"a/b\"\nversion = \"1\"\nsubscribe = [\"a/#\"]\n";
        let (status, message) = refused(served.client().install(manifest, b"").await);
        assert_eq!(status, 422);
        assert!(message.starts_with("manifest: line 1: "), "{message}");

        let (status, message) = served.post_package(Some("2"), b"\xff\xffrest").await;
        assert_eq!(status, 422);
        assert!(message.contains("manifest: not UTF-8"), "{message}");
    }

    #[tokio::test]
    async fn a_package_that_cannot_be_taken_apart_says_what_it_lacks() {
        let served = served();
        for length in [None, Some("many"), Some("-1")] {
            let (status, message) = served.post_package(length, b"x").await;
            assert_eq!(status, 400);
            assert!(message.contains(MANIFEST_LENGTH), "{message}");
        }
        let (status, message) = served.post_package(Some("9"), b"short").await;
        assert_eq!(status, 400);
        assert!(message.contains("the whole body has 5"), "{message}");
    }

    #[tokio::test]
    async fn what_is_too_large_is_refused_before_it_is_read() {
        let served = served();
        let (status, _) = served.post_package(Some("65537"), b"x").await;
        assert_eq!(status, 413);

        let mut stream = UnixStream::connect(&served.socket).await.unwrap();
        let header = format!(
            "POST /v1/apps HTTP/1.1\r\nhost: x\r\n{MANIFEST_LENGTH}: 10\r\ncontent-length: {}\r\n\r\n",
            MAX_COMPONENT_BYTES + 11
        );
        stream.write_all(header.as_bytes()).await.unwrap();
        let mut answer = vec![0; 12];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(answer, b"HTTP/1.1 413");
    }

    #[tokio::test]
    async fn a_component_that_never_ends_is_cut_off() {
        let served = served();
        let stream = UnixStream::connect(&served.socket).await.unwrap();
        let (mut answer, mut body) = stream.into_split();
        let header = format!(
            "POST /v1/apps HTTP/1.1\r\nhost: x\r\n{MANIFEST_LENGTH}: 0\r\ntransfer-encoding: chunked\r\n\r\n"
        );
        let endless = tokio::spawn(async move {
            body.write_all(header.as_bytes()).await.unwrap();
            let mut chunk = b"100000\r\n".to_vec();
            chunk.resize(chunk.len() + (1 << 20), 0);
            chunk.extend_from_slice(b"\r\n");
            while body.write_all(&chunk).await.is_ok() {}
        });
        let mut status = vec![0; 12];
        answer.read_exact(&mut status).await.unwrap();
        assert_eq!(status, b"HTTP/1.1 413");
        drop(answer);
        endless.await.unwrap();
    }

    #[tokio::test]
    async fn errors_of_the_protocol_are_json_too() {
        let served = served();
        let (status, answer) = served.call("GET", "/v2/apps").await;
        assert_eq!(status, 404);
        assert!(error(&answer).contains("/v1/apps"));

        let (status, answer) = served.call("PUT", "/v1/apps").await;
        assert_eq!(status, 405);
        assert!(!error(&answer).is_empty());

        let (status, answer) = served.call("GET", "/v1/apps/x/logs?last=all").await;
        assert_eq!(status, 400);
        assert!(error(&answer).contains("?last=N"));

        let (status, answer) = served.call("GET", "/v1/apps/%ff").await;
        assert_eq!(status, 400);
        assert!(!error(&answer).is_empty());
    }

    #[tokio::test]
    async fn an_app_goes_through_its_life_on_request() {
        let served = served();
        let client = served.client();
        let manifest = manifest("thermo") + "[config]\ngreeting = \"hello\"\n";
        let app = client.install(&manifest, &guest("")).await.unwrap();
        assert_eq!(app.state, AppState::Running, "{:?}", app.reason);
        assert_eq!(client.list().await.unwrap()[0].name, "thermo");
        assert_eq!(client.inspect("thermo").await.unwrap().version, "1.0.0");

        let log = client.logs("thermo", 100).await.unwrap();
        assert!(log.iter().any(|line| line.message == "hello"), "{log:?}");
        let (text, component) = client.package("thermo").await.unwrap();
        assert_eq!((text, component), (manifest, guest("")));
        let last = client.logs("thermo", 1).await.unwrap();
        assert_eq!(last.len(), 1);
        // The gateway itself may have added one meanwhile.
        assert!(last[0].sequence >= log[log.len() - 1].sequence, "{last:?}");

        let app = client.stop("thermo").await.unwrap();
        assert_eq!(app.state, AppState::Stopped);
        let app = client.start("thermo").await.unwrap();
        assert_eq!(app.state, AppState::Running);
        let app = client.restart("thermo").await.unwrap();
        assert_eq!(app.state, AppState::Running);
        client.remove("thermo").await.unwrap();
        assert_eq!(refused(client.inspect("thermo").await).0, 404);
    }

    #[tokio::test]
    async fn a_reload_that_fails_says_which_file_is_wrong() {
        let served = served();
        let (status, message) = refused(served.client().reload().await);
        assert_eq!(status, 422);
        assert_eq!(message, "mqtt.auth.acl_file: acl.toml:3: wrong");
        assert_eq!(served.call("GET", "/v1/reload").await.0, 405);
    }

    #[tokio::test]
    async fn an_app_that_does_not_come_up_is_installed_and_says_why() {
        let served = served();
        let client = served.client();
        let (manifest, component) = (manifest("broken"), guest("unreachable"));
        let app = client.install(&manifest, &component).await.unwrap();
        assert_ne!(app.state, AppState::Running);
        assert!(app.reason.is_some());
        assert_eq!(client.list().await.unwrap().len(), 1);
    }

    #[tokio::test]
    async fn where_no_gateway_runs_the_client_names_the_socket_and_the_command() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("admin.sock");
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        for path in [socket, folder.path().join("missing.sock")] {
            let message = Client::new(&path).status().await.unwrap_err().to_string();
            assert!(message.contains(path.to_str().unwrap()), "{message}");
            assert!(message.contains("`headgate run`"), "{message}");
        }
    }

    #[tokio::test]
    async fn what_answers_but_is_no_gateway_is_no_crash() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("other.sock");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let other = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream
                .write_all(b"220 mail.example.org ESMTP\r\n")
                .await
                .unwrap();
        });
        let error = Client::new(&path).status().await.unwrap_err();
        assert!(matches!(error, ClientError::BrokeOff { .. }), "{error}");
        other.await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_mqtt_lists_answer_and_say_what_is_wrong_with_a_query() {
        let served = served();
        for list in ["clients", "subscriptions", "retained", "topics"] {
            let (status, body) = served.call("GET", &format!("/v1/mqtt/{list}?max=1")).await;
            let empty = json!({ "items": [], "truncated": false });
            assert_eq!((status, body), (200, empty), "{list}");
            let (status, body) = served.call("GET", &format!("/v1/mqtt/{list}?max=x")).await;
            assert_eq!(status, 400);
            assert!(body["error"].as_str().unwrap().contains("?max=N"), "{body}");
        }
        let (status, body) = served.call("GET", "/v1/mqtt/retained?filter=a%23").await;
        assert_eq!(status, 400);
        assert!(body["error"].as_str().unwrap().contains("a#"), "{body}");
        let error = served
            .client()
            .disconnect("no/such client")
            .await
            .unwrap_err();
        assert!(error.to_string().contains("headgate clients"), "{error}");
    }

    #[tokio::test]
    async fn after_the_shutdown_the_socket_is_gone() {
        let served = served();
        let idle = UnixStream::connect(&served.socket).await.unwrap();
        served.client().status().await.unwrap();
        served.stop.send(()).unwrap();
        served.server.await.unwrap();
        assert!(!served.socket.exists());
        drop((idle, served.folder));
    }
}
