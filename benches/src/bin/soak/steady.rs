//! Those who must not feel what the others do: a publisher, an observer that stays, and one that comes
//! and goes.

use std::collections::HashSet;
use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use headgate_bench::stream::Endpoint;
use headgate_bench::wire::{self, Connection};

use crate::client::{self, Connect, acknowledgement};
use crate::dice::Dice;

/// One message in so long: it is the others that load the gateway.
const PACE: Duration = Duration::from_millis(3);

/// Messages that may be without their acknowledgement before the publisher waits.
const WINDOW: u64 = 500;

/// How long nothing may come for somebody who waits for something.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long one read may wait.
const LOOK: Duration = Duration::from_millis(1);

/// What those who observe subscribe to.
const FILTER: &str = "steady/#";

/// What all agree on.
#[derive(Default)]
pub struct Steady {
    pub is_ending: AtomicBool,
    /// Messages published at each QoS, once that is final.
    published: Mutex<Option<[u64; 3]>>,
}

impl Steady {
    fn published(&self) -> Option<[u64; 3]> {
        *self.published.lock().expect("nobody panics with it")
    }
}

/// What a client that publishes has done.
pub struct Published {
    pub messages: [u64; 3],
    /// The longest that it waited for an acknowledgement.
    pub longest_wait: Duration,
}

/// Numbered messages at each QoS in turn, until the end.
pub fn publish(broker: &Endpoint, steady: &Steady) -> Result<Published> {
    let (stream, _) = Connect::as_client("steady-publisher").open(broker, PATIENCE)?;
    let mut connection = Connection::new(stream, LOOK)?;
    let mut messages = [0; 3];
    let (mut sent, mut acked) = (0, 0);
    let mut due = Instant::now();
    let mut last_ack = due;
    let mut longest_wait = Duration::ZERO;
    loop {
        let is_ending = steady.is_ending.load(Ordering::Relaxed);
        if is_ending && sent == acked {
            *steady.published.lock().expect("nobody panics with it") = Some(messages);
            return Ok(Published {
                messages,
                longest_wait,
            });
        }
        if !is_ending && Instant::now() >= due && sent - acked < WINDOW {
            let qos = (messages.iter().sum::<u64>() % 3) as usize;
            let number = messages[qos].to_string();
            messages[qos] += 1;
            let id = (sent % 65_535) as u16 + 1;
            if qos > 0 {
                if sent == acked {
                    last_ack = Instant::now();
                }
                sent += 1;
            }
            let topic = format!("steady/{qos}");
            let packet = client::publish(false, &topic, qos as u8, id, number.as_bytes(), false);
            connection.stream().write_all(&packet)?;
            due = (due + PACE).max(Instant::now() - PACE);
        }
        let mut releases = Vec::new();
        connection.receive(
            || (),
            |(), frame| {
                match frame.kind() {
                    wire::PUBACK | wire::PUBCOMP => {
                        acked += 1;
                        longest_wait = longest_wait.max(last_ack.elapsed());
                        last_ack = Instant::now();
                    }
                    wire::PUBREC => {
                        let id = frame.acknowledged()?;
                        releases.extend(acknowledgement(wire::PUBREL, id));
                    }
                    _ => {}
                }
                Ok(())
            },
        )?;
        connection.stream().write_all(&releases)?;
        ensure!(
            sent == acked || last_ack.elapsed() < PATIENCE,
            "the steady publisher waits for {} acknowledgements for {PATIENCE:?}",
            sent - acked
        );
    }
}

/// What one that receives has seen.
#[derive(Default, Clone, Copy)]
pub struct Received {
    /// Of each QoS, every one once.
    pub messages: [u64; 3],
    /// At QoS 1, where they are allowed.
    pub repeated: u64,
    pub connections: u64,
}

impl Received {
    /// `may_repeat`: at QoS 1, what was not acknowledged before the connection broke.
    fn count(&mut self, qos: usize, number: u64, may_repeat: bool) -> Result<()> {
        let next = &mut self.messages[qos];
        if qos == 1 && may_repeat && number < *next {
            self.repeated += 1;
            return Ok(());
        }
        // What is lost at QoS 0 is lost for an observer that was connected, too.
        ensure!(
            number == *next,
            "at QoS {qos} message {number} came instead of {next}"
        );
        *next += 1;
        Ok(())
    }
}

/// Sees every message of each QoS once and in order.
pub fn observe(broker: &Endpoint, steady: &Steady, is_there: &AtomicBool) -> Result<Received> {
    let (mut stream, _) = Connect::as_client("steady-observer").open(broker, PATIENCE)?;
    wire::subscribe(&mut stream, FILTER, 2)?;
    let mut observer = Observer::new(Connection::new(stream, LOOK)?, Received::default());
    is_there.store(true, Ordering::Relaxed);
    let mut last = (Instant::now(), observer.received.messages);
    loop {
        observer.step(true, false)?;
        let messages = observer.received.messages;
        if steady.published() == Some(messages) {
            return Ok(observer.received);
        }
        if messages != last.1 {
            last = (Instant::now(), messages);
        }
        ensure!(
            last.0.elapsed() < PATIENCE,
            "nothing has come for the observer for {PATIENCE:?}: it has {messages:?} of {:?}",
            steady.published()
        );
    }
}

/// Loses its connection in all ways, and gets every message of QoS 2 once, of QoS 1 at least once.
pub fn wander(
    broker: &Endpoint,
    steady: &Steady,
    mut dice: Dice,
    is_there: &AtomicBool,
) -> Result<Received> {
    const STAY: Duration = Duration::from_secs(3);
    const AWAY: Duration = Duration::from_secs(2);
    let connect = Connect {
        is_clean: false,
        ..Connect::as_client("steady-wanderer")
    };
    let (mut stream, _) = connect.open(broker, PATIENCE)?;
    wire::subscribe(&mut stream, FILTER, 2)?;
    let mut observer = Observer::new(Connection::new(stream, LOOK)?, Received::default());
    is_there.store(true, Ordering::Relaxed);
    let mut last = (Instant::now(), observer.received.messages);
    loop {
        let leave = Instant::now() + dice.pause(STAY);
        // Towards the end it acknowledges nothing any more.
        let silence = leave - dice.pause(STAY / 20);
        while Instant::now() < leave {
            observer.step(Instant::now() < silence, true)?;
            let messages = observer.received.messages;
            if steady
                .published()
                .is_some_and(|all| all[1..] == messages[1..])
            {
                return Ok(observer.received);
            }
            if messages != last.1 {
                last = (Instant::now(), messages);
            }
            ensure!(
                last.0.elapsed() < PATIENCE,
                "nothing has come for the one that comes and goes for {PATIENCE:?}: it has \
                 {messages:?} of {:?}",
                steady.published()
            );
        }
        let old = match dice.below(3) {
            0 => {
                client::reset(observer.connection.stream().socket());
                None
            }
            1 => None,
            // The new connection takes the session over.
            _ => Some(()),
        };
        let (received, begun) = (observer.received, std::mem::take(&mut observer.begun));
        let kept = old.map(|()| observer);
        if kept.is_none() {
            std::thread::sleep(dice.pause(AWAY));
        }
        let (stream, is_present) = connect.open(broker, PATIENCE).context("coming back")?;
        drop(kept);
        ensure!(
            is_present,
            "the session of the one that comes and goes was not kept"
        );
        observer = Observer::new(Connection::new(stream, LOOK)?, received);
        observer.begun = begun;
        // What comes at QoS 0 meanwhile is lost rightly.
        observer.has_gaps = true;
    }
}

struct Observer {
    connection: Connection,
    received: Received,
    /// QoS 2 messages that have come and are not released: when one comes again it is no new one.
    begun: HashSet<[u8; 2]>,
    has_gaps: bool,
}

impl Observer {
    fn new(connection: Connection, mut received: Received) -> Observer {
        received.connections += 1;
        Observer {
            connection,
            received,
            begun: HashSet::new(),
            has_gaps: false,
        }
    }

    fn step(&mut self, acknowledges: bool, may_repeat: bool) -> Result<()> {
        let mut answers = Vec::new();
        let Observer {
            connection,
            received,
            begun,
            has_gaps,
        } = self;
        connection.receive(
            || (),
            |(), frame| {
                match frame.kind() {
                    wire::PUBLISH => {}
                    wire::PUBREL => {
                        let id = frame.acknowledged()?;
                        if acknowledges {
                            begun.remove(&id);
                            answers.extend(acknowledgement(wire::PUBCOMP, id));
                        }
                        return Ok(());
                    }
                    _ => return Ok(()),
                }
                let (id, payload) = frame.publish()?;
                let id = id.to_be_bytes();
                let number = std::str::from_utf8(payload)?.parse()?;
                match frame.qos() {
                    0 if *has_gaps => {}
                    0 => received.count(0, number, may_repeat)?,
                    1 => {
                        received.count(1, number, may_repeat)?;
                        if acknowledges {
                            answers.extend(acknowledgement(wire::PUBACK, id));
                        }
                    }
                    2 => {
                        if begun.insert(id) {
                            received.count(2, number, may_repeat)?;
                        } else if !may_repeat {
                            bail!("message {number} came twice at QoS 2");
                        }
                        if acknowledges {
                            answers.extend(acknowledgement(wire::PUBREC, id));
                        }
                    }
                    other => bail!("a message of QoS {other} came"),
                }
                Ok(())
            },
        )?;
        connection.stream().write_all(&answers)?;
        Ok(())
    }
}
