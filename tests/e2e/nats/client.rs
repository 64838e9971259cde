//! What a test asks servers for, past the gateway.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::jetstream::consumer::{AckPolicy, pull};
use async_nats::jetstream::{self, Context};
use async_nats::{ConnectOptions, HeaderMap};
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::runtime::{self, Runtime};
use tokio::time::timeout;

use super::{PATIENCE, eventually};

/// For the next message of a stream that has more.
const NEXT: Duration = Duration::from_secs(20);

/// Of JetStream's API: there is no such stream.
const NO_STREAM: u64 = 10059;

/// A client whose calls wait. Clones are the same connection.
#[derive(Clone)]
pub struct Client {
    runtime: Arc<Runtime>,
    jetstream: Context,
}

/// A message as a stream has it.
#[derive(Clone, Debug)]
pub struct Stored {
    pub subject: String,
    pub headers: HeaderMap,
    pub payload: Vec<u8>,
}

impl Stored {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.as_str())
    }

    /// That a gateway has given it.
    pub fn id(&self) -> &str {
        let id = self.header("Nats-Msg-Id");
        id.or_else(|| self.header("Headgate-Id"))
            .expect("it has an id")
    }
}

impl Client {
    pub fn connect(urls: &[String], options: ConnectOptions) -> Client {
        let runtime = runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build();
        let runtime = Arc::new(runtime.unwrap());
        let client = eventually("a connection", || {
            let connection = options.clone().connect(urls);
            runtime
                .block_on(connection)
                .map_err(|error| error.to_string())
        });
        let entered = runtime.enter();
        let jetstream = jetstream::ContextBuilder::new()
            .timeout(Duration::from_secs(2))
            .build(client);
        drop(entered);
        Client { runtime, jetstream }
    }

    /// What JetStream's API answers; asked again while there is nobody who could.
    pub fn ask(&self, subject: &str, request: &Value) -> Value {
        eventually(subject, || {
            let answer = self.jetstream.request(subject.to_owned(), request);
            let answer: Value = self
                .runtime
                .block_on(answer)
                .map_err(|error| error.to_string())?;
            // Those that are there need a while to find each other.
            let busy = matches!(answer["error"]["code"].as_u64(), Some(503))
                || answer["error"]["err_code"] == 10005;
            if busy {
                Err(answer.to_string())
            } else {
                Ok(answer)
            }
        })
    }

    fn done(&self, subject: &str, request: &Value) -> Value {
        let answer = self.ask(subject, request);
        assert!(answer.get("error").is_none(), "{subject}: {answer}");
        answer
    }

    /// Makes a stream: `{"name": …, "subjects": […], …}`.
    pub fn create(&self, config: &Value) {
        self.done(&format!("STREAM.CREATE.{}", name(config)), config);
    }

    pub fn update(&self, config: &Value) {
        self.done(&format!("STREAM.UPDATE.{}", name(config)), config);
    }

    pub fn delete(&self, stream: &str) {
        self.done(&format!("STREAM.DELETE.{stream}"), &json!({}));
    }

    pub fn purge(&self, stream: &str) {
        self.done(&format!("STREAM.PURGE.{stream}"), &json!({}));
    }

    /// Configuration and state of a stream, if there is such.
    pub fn stream(&self, name: &str) -> Option<Value> {
        let answer = self.ask(&format!("STREAM.INFO.{name}"), &json!({}));
        if answer["error"]["err_code"] == NO_STREAM {
            return None;
        }
        assert!(answer.get("error").is_none(), "{name}: {answer}");
        Some(answer)
    }

    pub fn messages(&self, stream: &str) -> u64 {
        let info = self.stream(stream);
        info.map_or(0, |info| info["state"]["messages"].as_u64().unwrap())
    }

    /// Waits until the stream has so many messages or more, as long as it gets some.
    pub fn until_messages(&self, stream: &str, count: u64) {
        let (mut found, mut since) = (0, Instant::now());
        loop {
            let now = self.messages(stream);
            if now >= count {
                return;
            }
            if now != found {
                (found, since) = (now, Instant::now());
            }
            assert!(
                since.elapsed() < PATIENCE,
                "{count} messages in {stream}: it stays at {found}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Publishes, and waits until the stream has it.
    pub fn publish(&self, subject: &str, payload: &[u8]) {
        let (subject, payload) = (subject.to_owned(), payload.to_vec());
        let published = async { self.jetstream.publish(subject, payload.into()).await?.await };
        self.runtime.block_on(published).unwrap();
    }

    /// All that is in a stream, in its order.
    pub fn contents(&self, stream: &str) -> Vec<Stored> {
        eventually(&format!("what is in {stream}"), || {
            let count = self.messages(stream) as usize;
            // While servers choose a leader, it may end in the middle.
            let read = self.runtime.block_on(self.read(stream, count));
            read.map_err(|error| error.to_string())
        })
    }

    async fn read(&self, stream: &str, count: usize) -> Result<Vec<Stored>, async_nats::Error> {
        let config = pull::Config {
            ack_policy: AckPolicy::None,
            memory_storage: true,
            num_replicas: 1,
            ..pull::Config::default()
        };
        let jetstream = &self.jetstream;
        let consumer = jetstream.create_consumer_on_stream(config, stream).await?;
        let mut messages = consumer.messages().await?;
        let mut stored = Vec::with_capacity(count);
        while stored.len() < count {
            let next = timeout(NEXT, messages.next()).await;
            let next = next.map_err(|_| format!("of {count} messages only {}", stored.len()))?;
            let message = next.ok_or("it has ended")??;
            stored.push(Stored {
                subject: message.subject.to_string(),
                headers: message.headers.clone().unwrap_or_default(),
                payload: message.payload.to_vec(),
            });
        }
        Ok(stored)
    }
}

fn name(config: &Value) -> &str {
    config["name"].as_str().expect("a stream has a name")
}
