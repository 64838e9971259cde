//! MQTT clients outside of the machine.

use super::machine::log_bytes;
use anyhow::{Context, Result, anyhow, bail, ensure};
use rumqttc::{Client, Connection, Event, Incoming, MqttOptions, Outgoing, Publish, QoS};
use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Most requests that wait in a client.
const QUEUE: usize = 100;

/// Of readings with a number.
const IN_FLIGHT: u16 = 10;

fn options(name: &str, port: u16) -> MqttOptions {
    let mut options = MqttOptions::new(name, "127.0.0.1", port);
    options.set_keep_alive(Duration::from_secs(30));
    options
}

fn connect(name: &str, port: u16) -> (Client, Connection) {
    Client::new(options(name, port), QUEUE)
}

/// A client that has subscribed, and can publish.
pub struct Subscriber {
    client: Client,
    received: Receiver<Publish>,
}

impl Subscriber {
    /// Returns when the gateway has confirmed the subscription.
    pub fn connect(port: u16, filter: &str, patience: Duration) -> Result<Self> {
        let (client, mut connection) = connect("vm-test", port);
        client.subscribe(filter, QoS::AtLeastOnce)?;
        let (confirm, confirmed) = channel();
        let (send, received) = channel();
        thread::spawn(move || {
            for event in connection.iter() {
                let is_over = match event {
                    Ok(Event::Incoming(Incoming::SubAck(_))) => confirm.send(Ok(())).is_err(),
                    Ok(Event::Incoming(Incoming::Publish(publish))) => send.send(publish).is_err(),
                    Ok(_) => false,
                    Err(error) => {
                        // Nobody listens any more if it comes later.
                        let _ = confirm.send(Err(error));
                        true
                    }
                };
                if is_over {
                    break;
                }
            }
        });
        confirmed
            .recv_timeout(patience)
            .with_context(|| format!("no subscription to {filter} within {patience:?}"))?
            .with_context(|| format!("cannot subscribe to {filter} on port {port}"))?;
        Ok(Subscriber { client, received })
    }

    pub fn publish(&self, topic: &str, payload: &str) -> Result<()> {
        self.client
            .publish(topic, QoS::AtLeastOnce, false, payload)
            .with_context(|| format!("cannot publish to {topic}"))
    }

    /// The next message; it must be on `topic` and have `part` in it.
    pub fn expect(&self, topic: &str, part: &str, patience: Duration) -> Result<()> {
        let message = match self.received.recv_timeout(patience) {
            Ok(message) => message,
            Err(RecvTimeoutError::Timeout) => bail!(
                "waited {} s in vain for a message on {topic}",
                patience.as_secs()
            ),
            Err(RecvTimeoutError::Disconnected) => {
                bail!("the gateway closed the connection while a message on {topic} was waited for")
            }
        };
        let payload = String::from_utf8_lossy(&message.payload);
        ensure!(
            message.topic == topic && payload.contains(part),
            "a message with {part} on {topic} was waited for, and {payload} came on {}",
            message.topic
        );
        Ok(())
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        // The connection may be gone.
        let _ = self.client.try_disconnect();
    }
}

/// Publishes numbered readings at QoS 1 as fast as the gateway acknowledges them, until the connection ends.
pub struct Numbered {
    acknowledged: Arc<AtomicUsize>,
    thread: JoinHandle<Result<Vec<u64>>>,
    /// Without one the connection would end with the last reading.
    _client: Client,
}

impl Numbered {
    /// `log` is that of the gateway's disk.
    pub fn start(port: u16, number: usize, topic: &'static str, most: u64, log: &Path) -> Self {
        let mut options = options(&format!("vm-test-{number}"), port);
        // So that the disk is written often, and a few at a time.
        options.set_inflight(IN_FLIGHT);
        let (client, connection) = Client::new(options, QUEUE);
        let publisher = client.clone();
        thread::spawn(move || {
            for reading in 1..=most {
                let payload = format!(r#"{{"value":68,"client":{number},"number":{reading}}}"#);
                if publisher
                    .publish(topic, QoS::AtLeastOnce, false, payload)
                    .is_err()
                {
                    break;
                }
            }
        });
        let acknowledged = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&acknowledged);
        let log = log.to_owned();
        Numbered {
            acknowledged,
            thread: thread::spawn(move || note_acknowledgements(connection, &log, &count)),
            _client: client,
        }
    }

    pub fn acknowledged(&self) -> usize {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// To be called when the machine is gone: the length of the log when the first, second, … reading was
    /// acknowledged.
    pub fn end(self) -> Result<Vec<u64>> {
        let noted = self.thread.join();
        noted.map_err(|_| anyhow!("a client of the load has panicked"))?
    }
}

fn note_acknowledgements(
    mut connection: Connection,
    log: &Path,
    count: &AtomicUsize,
) -> Result<Vec<u64>> {
    let mut acknowledged = Vec::new();
    let mut sent = VecDeque::new();
    for event in connection.iter() {
        match event {
            Ok(Event::Outgoing(Outgoing::Publish(packet))) => sent.push_back(packet),
            Ok(Event::Incoming(Incoming::PubAck(ack))) => {
                acknowledged.push(log_bytes(log)?);
                // Readings are counted, so acknowledgements must come in order. [MQTT-4.6.0-2]
                let first = sent.pop_front();
                ensure!(
                    first == Some(ack.pkid),
                    "packet {first:?} was to be acknowledged, and {} was",
                    ack.pkid
                );
                count.store(acknowledged.len(), Ordering::Relaxed);
            }
            Ok(_) => {}
            Err(_) => break,
        }
    }
    Ok(acknowledged)
}

/// Publishes at QoS 1 as fast as the gateway confirms, until the connection ends.
pub struct Load {
    confirmed: Arc<AtomicU64>,
}

impl Load {
    pub fn start(port: u16, topic: &'static str, payload: &'static str) -> Self {
        let (client, mut connection) = connect("vm-test-load", port);
        let confirmed = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&confirmed);
        thread::spawn(move || {
            while client
                .publish(topic, QoS::AtLeastOnce, false, payload)
                .is_ok()
            {}
        });
        thread::spawn(move || {
            for event in connection.iter() {
                match event {
                    Ok(Event::Incoming(Incoming::PubAck(_))) => {
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(_) => {}
                    // With the connection the publishing thread ends, too.
                    Err(_) => break,
                }
            }
        });
        Load { confirmed }
    }

    /// How many messages the gateway has confirmed.
    pub fn confirmed(&self) -> u64 {
        self.confirmed.load(Ordering::Relaxed)
    }
}
