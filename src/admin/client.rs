//! The client side of the admin API: one connection a request, over the gateway's socket.

use std::fmt::Write;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;

use super::MANIFEST_LENGTH;
use crate::apps::{AppInfo, LogLine};
use crate::broker::Listed;
use crate::dead_letters::{DeadLetterInfo, Retried};
use crate::mappings::{MappingInfo, OutputStatus};
use crate::why::Explanation;

/// For what only looks something up.
const LOOK_UP_TIMEOUT: Duration = Duration::from_secs(10);

/// For what waits for subscribers that are behind: half a second for each letter, but then that one is slow, and
/// nobody waits for it.
const RETRY_TIMEOUT: Duration = Duration::from_secs(60);

/// For what may compile a component: 1 s a megabyte on a desktop, ten times that on a small board
/// that is busy.
const COMPILE_TIMEOUT: Duration = Duration::from_secs(300);

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error(
        "no gateway answers on {}; start one with `headgate run`, or name its socket with \
         --socket PATH", .socket.display()
    )]
    NotRunning { socket: PathBuf },
    #[error(
        "not permitted to open {}; the gateway's socket belongs to the user that runs it, so run \
         this command as that user", .socket.display()
    )]
    NotPermitted { socket: PathBuf },
    #[error("cannot reach the gateway on {}: {source}", .socket.display())]
    Unreachable { socket: PathBuf, source: io::Error },
    #[error("the gateway on {} did not answer within {} s", .socket.display(), .after.as_secs())]
    TimedOut { socket: PathBuf, after: Duration },
    #[error(
        "the connection to the gateway on {} broke off: {reason}", .socket.display()
    )]
    BrokeOff { socket: PathBuf, reason: String },
    /// The gateway's own words.
    #[error("{message}")]
    Refused { status: u16, message: String },
}

/// Which dead letters are handed over again.
#[derive(Clone, Debug)]
pub enum Retry {
    Ids(Vec<u64>),
    /// Those whose topic matches this filter.
    Topic(String),
    All,
}

/// What `GET /v1/dead-letters` answers.
#[derive(Debug, Serialize, Deserialize)]
pub struct DeadLetterList {
    /// Oldest first.
    pub letters: Vec<DeadLetterInfo>,
    /// How many messages were dropped since the start and not kept, because they were too many.
    pub left_out: u64,
}

/// Talks to the gateway that listens on a socket.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    pub fn new(socket: impl Into<PathBuf>) -> Client {
        Client {
            socket: socket.into(),
        }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub async fn status(&self) -> Result<serde_json::Value, ClientError> {
        self.request(Method::GET, "/v1/status", LOOK_UP_TIMEOUT)
            .await
    }

    /// Makes the gateway read anew the files that can change while it runs.
    pub async fn reload(&self) -> Result<(), ClientError> {
        let _: serde_json::Value = self
            .request(Method::POST, "/v1/reload", LOOK_UP_TIMEOUT)
            .await?;
        Ok(())
    }

    /// Asks for an update of the machine.
    pub async fn request_update(&self) -> Result<(), ClientError> {
        let _: serde_json::Value = self
            .request(Method::POST, "/v1/ota/update", LOOK_UP_TIMEOUT)
            .await?;
        Ok(())
    }

    /// What the system on probation has stored stays.
    pub async fn pass_trial(&self) -> Result<(), ClientError> {
        let _: serde_json::Value = self
            .request(Method::POST, "/v1/ota/passed", LOOK_UP_TIMEOUT)
            .await?;
        Ok(())
    }

    /// All apps, by name.
    pub async fn list(&self) -> Result<Vec<AppInfo>, ClientError> {
        #[derive(Deserialize)]
        struct AppList {
            apps: Vec<AppInfo>,
        }
        let list: AppList = self
            .request(Method::GET, "/v1/apps", LOOK_UP_TIMEOUT)
            .await?;
        Ok(list.apps)
    }

    pub async fn inspect(&self, name: &str) -> Result<AppInfo, ClientError> {
        self.request(Method::GET, &app_path(name, ""), LOOK_UP_TIMEOUT)
            .await
    }

    /// Installs a package; an app of the same name is replaced.
    pub async fn install(&self, manifest: &str, component: &[u8]) -> Result<AppInfo, ClientError> {
        self.send_package("/v1/apps", manifest, component).await
    }

    /// Has another version of an installed app take over.
    pub async fn upgrade(&self, manifest: &str, component: &[u8]) -> Result<AppInfo, ClientError> {
        self.send_package("/v1/upgrade", manifest, component).await
    }

    /// Has the version before the last upgrade take over again.
    pub async fn rollback(&self, name: &str) -> Result<AppInfo, ClientError> {
        self.request(Method::POST, &app_path(name, "/rollback"), COMPILE_TIMEOUT)
            .await
    }

    async fn send_package(
        &self,
        path: &str,
        manifest: &str,
        component: &[u8],
    ) -> Result<AppInfo, ClientError> {
        let mut package = Vec::with_capacity(manifest.len() + component.len());
        package.extend_from_slice(manifest.as_bytes());
        package.extend_from_slice(component);
        let request = Request::builder()
            .method(Method::POST)
            .uri(path)
            .header(MANIFEST_LENGTH, manifest.len())
            .body(Full::new(Bytes::from(package)));
        self.send(request, COMPILE_TIMEOUT).await
    }

    pub async fn start(&self, name: &str) -> Result<AppInfo, ClientError> {
        self.request(Method::POST, &app_path(name, "/start"), COMPILE_TIMEOUT)
            .await
    }

    pub async fn stop(&self, name: &str) -> Result<AppInfo, ClientError> {
        self.request(Method::POST, &app_path(name, "/stop"), COMPILE_TIMEOUT)
            .await
    }

    pub async fn pause(&self, name: &str) -> Result<AppInfo, ClientError> {
        self.request(Method::POST, &app_path(name, "/pause"), LOOK_UP_TIMEOUT)
            .await
    }

    pub async fn resume(&self, name: &str) -> Result<AppInfo, ClientError> {
        self.request(Method::POST, &app_path(name, "/resume"), COMPILE_TIMEOUT)
            .await
    }

    /// Lets an app finish what waits, for `timeout` at most, and stops it.
    pub async fn drain(&self, name: &str, timeout: Duration) -> Result<AppInfo, ClientError> {
        let path = app_path(name, &format!("/drain?timeout={}", timeout.as_secs()));
        self.request(Method::POST, &path, timeout + LOOK_UP_TIMEOUT)
            .await
    }

    pub async fn restart(&self, name: &str) -> Result<AppInfo, ClientError> {
        self.request(Method::POST, &app_path(name, "/restart"), COMPILE_TIMEOUT)
            .await
    }

    pub async fn remove(&self, name: &str) -> Result<(), ClientError> {
        let _: serde_json::Value = self
            .request(Method::DELETE, &app_path(name, ""), COMPILE_TIMEOUT)
            .await?;
        Ok(())
    }

    /// The manifest of an app and its component.
    pub async fn package(&self, name: &str) -> Result<(String, Vec<u8>), ClientError> {
        let request = Request::builder()
            .method(Method::GET)
            .uri(app_path(name, "/package"))
            .body(Full::default());
        let answer = self.answer(request, LOOK_UP_TIMEOUT).await?;
        let length = answer.headers().get(MANIFEST_LENGTH);
        let length = length.and_then(|length| length.to_str().ok()?.parse().ok());
        let body = answer.body();
        let (manifest, component) = length
            .and_then(|length| body.split_at_checked(length))
            .ok_or_else(|| self.broke_off("what it has sent is no package"))?;
        let manifest = std::str::from_utf8(manifest).map_err(|error| self.broke_off(error))?;
        Ok((manifest.to_owned(), component.to_vec()))
    }

    /// The last `last` lines of an app's log, oldest first.
    pub async fn logs(&self, name: &str, last: usize) -> Result<Vec<LogLine>, ClientError> {
        #[derive(Deserialize)]
        struct Lines {
            lines: Vec<LogLine>,
        }
        let path = app_path(name, &format!("/logs?last={last}"));
        let lines: Lines = self.request(Method::GET, &path, LOOK_UP_TIMEOUT).await?;
        Ok(lines.lines)
    }

    /// One of the lists below `/v1/mqtt`, narrowed by `query`.
    pub async fn mqtt_list<T: DeserializeOwned>(
        &self,
        list: &str,
        query: &[(&str, &str)],
    ) -> Result<Listed<T>, ClientError> {
        let path = with_query(&format!("/v1/mqtt/{list}"), query);
        self.request(Method::GET, &path, LOOK_UP_TIMEOUT).await
    }

    /// Ends the connection of an MQTT client.
    pub async fn disconnect(&self, client_id: &str) -> Result<(), ClientError> {
        let path = with_query("/v1/mqtt/disconnect", &[("client", client_id)]);
        let _: serde_json::Value = self.request(Method::POST, &path, LOOK_UP_TIMEOUT).await?;
        Ok(())
    }

    /// Ends the connection of an MQTT client, and its session.
    pub async fn forget(&self, client_id: &str) -> Result<(), ClientError> {
        let path = with_query("/v1/mqtt/forget", &[("client", client_id)]);
        let _: serde_json::Value = self.request(Method::POST, &path, LOOK_UP_TIMEOUT).await?;
        Ok(())
    }

    /// All mappings, by name.
    pub async fn mappings(&self) -> Result<Vec<MappingInfo>, ClientError> {
        #[derive(Deserialize)]
        struct MappingList {
            mappings: Vec<MappingInfo>,
        }
        let list: MappingList = self
            .request(Method::GET, "/v1/mappings", LOOK_UP_TIMEOUT)
            .await?;
        Ok(list.mappings)
    }

    pub async fn mapping(&self, name: &str) -> Result<MappingInfo, ClientError> {
        self.request(Method::GET, &mapping_path(name), LOOK_UP_TIMEOUT)
            .await
    }

    /// Installs a mapping; one of the same name is replaced, and its values are taken over.
    pub async fn install_mapping(
        &self,
        name: &str,
        config: &str,
    ) -> Result<MappingInfo, ClientError> {
        let request = Request::builder()
            .method(Method::PUT)
            .uri(mapping_path(name))
            .body(Full::new(Bytes::copy_from_slice(config.as_bytes())));
        self.send(request, COMPILE_TIMEOUT).await
    }

    /// The configuration of a mapping.
    pub async fn mapping_config(&self, name: &str) -> Result<String, ClientError> {
        let request = Request::builder()
            .method(Method::GET)
            .uri(mapping_path(name) + "/config")
            .body(Full::default());
        let answer = self.answer(request, LOOK_UP_TIMEOUT).await?;
        String::from_utf8(answer.body().to_vec()).map_err(|error| self.broke_off(error))
    }

    pub async fn remove_mapping(&self, name: &str) -> Result<(), ClientError> {
        let _: serde_json::Value = self
            .request(Method::DELETE, &mapping_path(name), LOOK_UP_TIMEOUT)
            .await?;
        Ok(())
    }

    /// Why outputs of mappings were sent last, or were not: `NAME`, `NAME/VIRTUAL.PATH` or `VIRTUAL.PATH`.
    pub async fn why_mapping(&self, path: &str) -> Result<Vec<OutputStatus>, ClientError> {
        let path = with_query("/v1/why-mapping", &[("path", path)]);
        self.request(Method::GET, &path, LOOK_UP_TIMEOUT).await
    }

    /// What became of the last events on a topic, and why.
    pub async fn why(&self, topic: &str) -> Result<Explanation, ClientError> {
        let path = with_query("/v1/why", &[("topic", topic)]);
        self.request(Method::GET, &path, LOOK_UP_TIMEOUT).await
    }

    /// The last `last` dead letters under a topic filter.
    pub async fn dead_letters(
        &self,
        topic: Option<&str>,
        last: usize,
    ) -> Result<DeadLetterList, ClientError> {
        let last = last.to_string();
        let mut query = vec![("last", last.as_str())];
        query.extend(topic.map(|topic| ("topic", topic)));
        let path = with_query("/v1/dead-letters", &query);
        self.request(Method::GET, &path, LOOK_UP_TIMEOUT).await
    }

    pub async fn dead_letter(&self, id: u64) -> Result<DeadLetterInfo, ClientError> {
        let path = format!("/v1/dead-letters/{id}");
        self.request(Method::GET, &path, LOOK_UP_TIMEOUT).await
    }

    /// Has dead letters handed over again.
    pub async fn retry_dead_letters(&self, which: &Retry) -> Result<Retried, ClientError> {
        let ids;
        let query = match which {
            Retry::Ids(numbers) => {
                let numbers: Vec<_> = numbers.iter().map(u64::to_string).collect();
                ids = numbers.join(",");
                ("ids", ids.as_str())
            }
            Retry::Topic(filter) => ("topic", filter.as_str()),
            Retry::All => ("all", "true"),
        };
        let path = with_query("/v1/dead-letters/retry", &[query]);
        self.request(Method::POST, &path, RETRY_TIMEOUT).await
    }

    /// Forgets the dead letters. Returns how many there were.
    pub async fn purge_dead_letters(&self) -> Result<usize, ClientError> {
        #[derive(Deserialize)]
        struct Purged {
            removed: usize,
        }
        let purged: Purged = self
            .request(Method::DELETE, "/v1/dead-letters", LOOK_UP_TIMEOUT)
            .await?;
        Ok(purged.removed)
    }

    async fn request<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        within: Duration,
    ) -> Result<T, ClientError> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .body(Full::default());
        self.send(request, within).await
    }

    async fn send<T: DeserializeOwned>(
        &self,
        request: hyper::http::Result<Request<Full<Bytes>>>,
        within: Duration,
    ) -> Result<T, ClientError> {
        let answer = self.answer(request, within).await?;
        serde_json::from_slice(answer.body()).map_err(|error| self.broke_off(error))
    }

    /// An answer that is no refusal.
    async fn answer(
        &self,
        request: hyper::http::Result<Request<Full<Bytes>>>,
        within: Duration,
    ) -> Result<Response<Bytes>, ClientError> {
        let mut request = request.map_err(|error| self.broke_off(error))?;
        request.headers_mut().insert(
            hyper::header::HOST,
            hyper::header::HeaderValue::from_static("headgate"),
        );
        let exchange = tokio::time::timeout(within, self.exchange(request));
        let answer = exchange.await.map_err(|_| ClientError::TimedOut {
            socket: self.socket.clone(),
            after: within,
        })??;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        #[derive(Deserialize)]
        struct Refusal {
            error: String,
        }
        let message = match serde_json::from_slice::<Refusal>(answer.body()) {
            Ok(refusal) => refusal.error,
            Err(_) => format!("the gateway answered {status} without a reason"),
        };
        Err(ClientError::Refused {
            status: status.as_u16(),
            message,
        })
    }

    async fn exchange(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<Response<Bytes>, ClientError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|source| self.unreachable(source))?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.broke_off(error))?;
        let exchange = async {
            let (head, body) = sender.send_request(request).await?.into_parts();
            let body = body.collect().await?.to_bytes();
            Ok(Response::from_parts(head, body))
        };
        tokio::pin!(exchange);
        let exchanged: hyper::Result<_> = tokio::select! {
            exchanged = &mut exchange => exchanged,
            // The connection has ended; what it has read still stands in the exchange.
            _ = connection => exchange.await,
        };
        exchanged.map_err(|error| self.broke_off(error))
    }

    fn unreachable(&self, source: io::Error) -> ClientError {
        let socket = self.socket.clone();
        match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                ClientError::NotRunning { socket }
            }
            io::ErrorKind::PermissionDenied => ClientError::NotPermitted { socket },
            _ => ClientError::Unreachable { socket, source },
        }
    }

    fn broke_off(&self, error: impl std::fmt::Display) -> ClientError {
        ClientError::BrokeOff {
            socket: self.socket.clone(),
            reason: error.to_string(),
        }
    }
}

/// The path of the app `name`, which may hold anything that a user has typed.
fn app_path(name: &str, rest: &str) -> String {
    let mut path = String::from("/v1/apps/");
    push_escaped(&mut path, name);
    path + rest
}

fn mapping_path(name: &str) -> String {
    let mut path = String::from("/v1/mappings/");
    push_escaped(&mut path, name);
    path
}

fn with_query(path: &str, query: &[(&str, &str)]) -> String {
    let mut path = path.to_owned();
    for (at, (name, value)) in query.iter().enumerate() {
        path.push(if at == 0 { '?' } else { '&' });
        path.push_str(name);
        path.push('=');
        push_escaped(&mut path, value);
    }
    path
}

/// Text in a path or a query (RFC 3986, 2.1).
fn push_escaped(path: &mut String, text: &str) {
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_') {
            path.push(char::from(byte));
        } else {
            write!(path, "%{byte:02X}").expect("writing to a String does not fail");
        }
    }
}
