//! A publisher and a subscriber that mind their own business while a test does something to the
//! gateway, and that must not feel it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::gateway::{Gateway, eventually};
use crate::wire::{Packet, Wire};

/// One message in so long: enough to notice a pause, little enough to leave the machine to the test.
const PACE: Duration = Duration::from_millis(2);

pub struct Neighbours {
    stop: Arc<AtomicBool>,
    received: Arc<AtomicU64>,
    publisher: JoinHandle<u64>,
    subscriber: JoinHandle<u64>,
}

impl Neighbours {
    /// Talk to each other through the broker.
    pub fn start(gateway: &Gateway) -> Neighbours {
        Neighbours::between(gateway, "neighbours/a", "neighbours/a")
    }

    /// Talk to each other through the app `unit-convert`, which is installed for them.
    pub fn start_through_app(gateway: &Gateway) -> Neighbours {
        gateway.install(&crate::apps::built("unit-convert"));
        let topic = "plant/neighbours/temperature_f";
        Neighbours::between(gateway, topic, &format!("converted/{topic}"))
    }

    fn between(gateway: &Gateway, topic: &str, filter: &str) -> Neighbours {
        let stop = Arc::<AtomicBool>::default();
        let received = Arc::<AtomicU64>::default();
        let mut wire = Wire::connect(gateway, "neighbour-subscriber");
        wire.subscribe(filter, 1);
        let subscriber = std::thread::spawn({
            let received = received.clone();
            move || {
                let mut next = 0;
                loop {
                    let message = wire.next_message();
                    let Some(number) = number(&message) else {
                        return next;
                    };
                    assert_eq!(number, next, "the neighbours' messages have a gap");
                    next += 1;
                    received.store(next, Ordering::SeqCst);
                }
            }
        });
        let mut wire = Wire::connect(gateway, "neighbour-publisher");
        let publisher = std::thread::spawn({
            let (stop, topic) = (stop.clone(), topic.to_owned());
            move || {
                let mut count = 0u64;
                while !stop.load(Ordering::SeqCst) {
                    let payload = format!("{{\"number\":{count},\"value\":50}}");
                    wire.publish(&topic, payload.as_bytes());
                    count += 1;
                    std::thread::sleep(PACE);
                }
                wire.publish(&topic, b"{\"number\":null,\"value\":50}");
                count
            }
        });
        let neighbours = Neighbours {
            stop,
            received,
            publisher,
            subscriber,
        };
        neighbours.assert_go_on();
        neighbours
    }

    /// Something published from now on arrives.
    pub fn assert_go_on(&self) {
        let before = self.received.load(Ordering::SeqCst);
        // The next one may be under way already, the one after that isn't.
        eventually("the neighbours' next messages", || {
            assert!(!self.subscriber.is_finished(), "a neighbour was cut off");
            assert!(!self.publisher.is_finished(), "a neighbour was cut off");
            (self.received.load(Ordering::SeqCst) >= before + 2).then_some(())
        });
    }

    /// All that was published has arrived, once and in order.
    pub fn assert_lost_nothing(self) {
        self.assert_go_on();
        self.stop.store(true, Ordering::SeqCst);
        let published = self.publisher.join().unwrap();
        assert_eq!(self.subscriber.join().unwrap(), published);
    }
}

/// None: it was the last one.
fn number(message: &Packet) -> Option<u64> {
    let body: serde_json::Value = serde_json::from_slice(message.payload()).unwrap();
    body["number"].as_u64()
}
