//! MQTT clients outside of the machine.

use anyhow::{Context, Result, bail, ensure};
use rumqttc::{Client, Connection, Event, Incoming, MqttOptions, Publish, QoS};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

/// Most requests that wait in a client.
const QUEUE: usize = 100;

fn connect(name: &str, port: u16) -> (Client, Connection) {
    let mut options = MqttOptions::new(name, "127.0.0.1", port);
    options.set_keep_alive(Duration::from_secs(30));
    Client::new(options, QUEUE)
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
