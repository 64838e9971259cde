//! The load generator: publishers that send readings, subscribers that account for each of them.

use std::io::{self, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;

use crate::crowd;
use crate::reading::{self, Finder, Form};
use crate::stream::{Endpoint, Stream};
use crate::wire::{self, Connection};

/// About how many bytes of frames a publisher prepares and writes at once.
const CHUNK_BYTES: usize = 32 * 1024;

/// Of how many messages one has its latency taken when publishers send flat out.
const LATENCY_SAMPLE: u64 = 16;

/// How long bytes may gather in sockets when publishers send flat out: latencies don't count then.
const GATHERING: Duration = Duration::from_micros(500);

/// How long a subscriber waits for more once everything has been sent. What has not come by then is
/// lost.
const SILENCE: Duration = Duration::from_secs(3);

/// How often a waiting thread looks whether it should end.
pub(crate) const LOOK: Duration = Duration::from_millis(100);

/// How long a publisher waits for the acknowledgements of what it has sent.
const ACK_PATIENCE: Duration = Duration::from_secs(30);

/// Connections of a kind that have a thread each. Where there are more, one thread serves all: a
/// thousand threads would take the CPU away from the broker.
const THREADS: usize = 50;

/// When publishers send.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pace {
    /// As fast as the broker takes it.
    FlatOut,
    /// So many messages a second in all, evenly spaced. The schedule does not wait for anything: a
    /// latency counts from when a message was due, not from when it got out.
    PerSecond(u64),
}

impl Pace {
    fn gathering(self) -> Option<Duration> {
        (self == Pace::FlatOut).then_some(GATHERING)
    }
}

/// When publishers stop.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Span {
    /// After so many messages in all.
    Messages(u64),
    Time(Duration),
}

/// What to send, and what is expected of it at the other end.
#[derive(Clone, Debug)]
pub struct Load {
    pub broker: Endpoint,
    pub publishers: usize,
    /// Publishers share them out and go through theirs in turn.
    pub topics: Vec<String>,
    pub subscribers: usize,
    pub filter: String,
    /// Of publishers and subscribers.
    pub qos: u8,
    /// Messages that a publisher may have unacknowledged at QoS 1 and 2.
    pub window: u16,
    pub payload_bytes: usize,
    pub form: Form,
    pub pace: Pace,
    pub span: Span,
    /// How many results each message has for each subscriber: more than one if several apps take it.
    pub copies: u64,
    /// The process whose CPU time is taken.
    pub server: Option<u32>,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub sent: u64,
    /// By all subscribers.
    pub received: u64,
    /// Messages that a subscriber should have got and did not, summed over subscribers.
    pub lost: u64,
    /// Messages that a subscriber got more often than it should have.
    pub duplicates: u64,
    /// Messages that came after a later one of the same publisher.
    pub reordered: u64,
    /// From the first message sent to the last one received.
    pub elapsed: Duration,
    /// Nanoseconds from publish to receipt.
    pub latency: Histogram<u64>,
    /// Nanoseconds by which the generator itself was late on its schedule. Part of the latency.
    pub lateness: Histogram<u64>,
    pub generator_cpu: Duration,
    pub server_cpu: Option<Duration>,
}

impl Outcome {
    /// Messages a second that all subscribers together received.
    pub fn per_second(&self) -> f64 {
        self.received as f64 / self.elapsed.as_secs_f64()
    }

    /// Microseconds of the generator's CPU time for each message sent.
    pub fn generator_us(&self) -> f64 {
        self.generator_cpu.as_secs_f64() * 1e6 / self.sent.max(1) as f64
    }

    /// Microseconds of the server's CPU time for each message sent.
    pub fn server_us(&self) -> Option<f64> {
        self.server_cpu
            .map(|cpu| cpu.as_secs_f64() * 1e6 / self.sent.max(1) as f64)
    }
}

/// What the threads of one run share.
pub(crate) struct Course {
    /// Set by whoever fails, so that nobody waits for the others for ever.
    pub failed: AtomicBool,
    /// Messages sent by all publishers; they are all sent when `sending` is 0.
    pub sent: AtomicU64,
    /// Publishers that have not finished.
    pub sending: AtomicU64,
}

impl Load {
    /// Runs it. Everybody is connected and subscribed before the first message is sent.
    pub fn run(&self) -> Result<Outcome> {
        ensure!(self.qos <= 2, "there is no QoS {}", self.qos);
        ensure!(self.window > 0, "the window can't be 0");
        ensure!(
            (1..reading::MAX_PUBLISHERS).contains(&self.publishers),
            "there can be 1 to {} publishers",
            reading::MAX_PUBLISHERS - 1
        );
        ensure!(
            self.topics.len() >= self.publishers,
            "there must be a topic for each publisher"
        );
        let course = Arc::new(Course {
            failed: AtomicBool::new(false),
            sent: AtomicU64::new(0),
            sending: AtomicU64::new(self.publishers as u64),
        });
        // A load's clients must not throw out those of another that runs at the same time.
        let name = format!("load-{}-{:x}", std::process::id(), reading::now_ns());
        let mut subscribers = Vec::new();
        for index in 0..self.subscribers {
            let mut stream = wire::connect(&self.broker, &format!("{name}-subscriber-{index}"))?;
            wire::subscribe(&mut stream, &self.filter, self.qos)?;
            subscribers.push(Subscriber::new(self, stream, course.clone())?);
        }
        let mut publishers = Vec::new();
        for index in 0..self.publishers {
            let stream = wire::connect(&self.broker, &format!("{name}-publisher-{index}"))?;
            publishers.push(Publisher::new(self, index, stream)?);
        }

        let paced = matches!(self.pace, Pace::PerSecond(_));
        let sending_threads = match self.publishers {
            _ if paced => 1,
            many if many > THREADS => 1,
            few => few,
        };
        let gate = Arc::new(Barrier::new(sending_threads + 1));
        let receiving = if self.subscribers > THREADS {
            let (course, gathering) = (course.clone(), self.pace.gathering());
            vec![spawn("subscribers", move || {
                crowd::receive(subscribers, &course, gathering)
            })?]
        } else {
            subscribers
                .into_iter()
                .map(|subscriber| spawn("subscriber", move || Ok(vec![subscriber.run()?])))
                .collect::<Result<Vec<_>>>()?
        };
        let (load, started, shared) = (self.clone(), gate.clone(), course.clone());
        let sending = match self.pace {
            Pace::PerSecond(rate) => vec![spawn("pacer", move || {
                load.send_paced(rate, publishers, &shared, &started)
            })?],
            Pace::FlatOut if self.publishers > THREADS => vec![spawn("publishers", move || {
                crowd::send(&load, publishers, &shared, &started)
            })?],
            Pace::FlatOut => publishers
                .into_iter()
                .map(|publisher| {
                    let (load, course, gate) = (self.clone(), course.clone(), gate.clone());
                    spawn("publisher", move || {
                        load.send_flat_out(publisher, &course, &gate)
                    })
                })
                .collect::<Result<Vec<_>>>()?,
        };

        let server_cpu = self.server.map(crate::process::cpu_time).transpose()?;
        let generator_cpu = crate::process::cpu_time(std::process::id())?;
        let start = Instant::now();
        gate.wait();

        let mut outcome = Outcome {
            sent: 0,
            received: 0,
            lost: 0,
            duplicates: 0,
            reordered: 0,
            elapsed: Duration::ZERO,
            latency: histogram(),
            lateness: histogram(),
            generator_cpu: Duration::ZERO,
            server_cpu: None,
        };
        let mut sent_by = vec![0; self.publishers];
        let mut connections = Vec::new();
        let mut failure = None;
        for thread in sending {
            match thread.join().expect("a publisher does not panic") {
                Ok(sent) => {
                    for (publisher, count) in sent.counts {
                        sent_by[publisher] = count;
                    }
                    outcome.lateness.add(sent.lateness)?;
                    connections.extend(sent.connections);
                }
                Err(error) => {
                    course.failed.store(true, Ordering::Relaxed);
                    failure.get_or_insert(error);
                }
            }
        }
        outcome.sent = sent_by.iter().sum();
        let mut last = start;
        for thread in receiving {
            match thread.join().expect("a subscriber does not panic") {
                Ok(tallies) => {
                    for tally in tallies {
                        outcome.received += tally.received;
                        outcome.lost += tally.missing(&sent_by, self.copies);
                        outcome.duplicates += tally.duplicates;
                        outcome.reordered += tally.reordered;
                        if let Some(latency) = tally.latency {
                            outcome.latency.add(latency)?;
                        }
                        last = last.max(tally.last);
                    }
                }
                Err(error) => {
                    failure.get_or_insert(error);
                }
            }
        }
        if let Some(error) = failure {
            return Err(error);
        }
        if self.subscribers == 0 {
            last = Instant::now();
        }
        drop(connections);
        outcome.elapsed = last - start;
        outcome.generator_cpu = crate::process::cpu_time(std::process::id())? - generator_cpu;
        outcome.server_cpu = match (self.server, server_cpu) {
            (Some(server), Some(before)) => Some(crate::process::cpu_time(server)? - before),
            _ => None,
        };
        Ok(outcome)
    }

    fn send_flat_out(
        &self,
        mut publisher: Publisher,
        course: &Course,
        gate: &Barrier,
    ) -> Result<Sent> {
        let quota = self.quota(publisher.index);
        gate.wait();
        let deadline = self.deadline();
        while publisher.sent < quota {
            let now = Instant::now();
            if deadline.is_some_and(|deadline| now >= deadline)
                || course.failed.load(Ordering::Relaxed)
            {
                break;
            }
            let mut count = quota - publisher.sent;
            if self.qos > 0 {
                // Half a window at a time: the broker has the other half to work on meanwhile.
                let half = u64::from(self.window).div_ceil(2);
                publisher.await_acks(u64::from(self.window) - half)?;
                count = count.min(half);
            }
            let time = reading::time_digits(reading::nanoseconds_at(now));
            publisher.send(count, &time)?;
        }
        course.sent.fetch_add(publisher.sent, Ordering::Relaxed);
        course.sending.fetch_sub(1, Ordering::Release);
        if self.qos > 0 {
            publisher.await_acks(0)?;
        }
        Ok(Sent::by(vec![publisher], histogram()))
    }

    /// Messages that a publisher sends at most.
    pub(crate) fn quota(&self, index: usize) -> u64 {
        match self.span {
            Span::Messages(all) => share(all, index, self.publishers),
            Span::Time(_) => reading::MAX_SEQUENCE,
        }
    }

    /// When publishers stop that start now.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match self.span {
            Span::Time(time) => Some(Instant::now() + time),
            Span::Messages(_) => None,
        }
    }

    /// One thread for all publishers: each wake-up of a thread of its own would cost CPU time that
    /// belongs to the broker.
    fn send_paced(
        &self,
        rate: u64,
        mut publishers: Vec<Publisher>,
        course: &Course,
        gate: &Barrier,
    ) -> Result<Sent> {
        ensure!(rate > 0, "a rate can't be 0");
        precise_sleeps();
        let total = match self.span {
            Span::Messages(all) => all,
            Span::Time(time) => (time.as_secs_f64() * rate as f64) as u64,
        };
        let mut lateness = histogram();
        let due_after = |message: u64| Duration::from_nanos(message * 1_000_000_000 / rate);
        gate.wait();
        let start = Instant::now();
        let mut message = 0;
        while message < total {
            let due = start + due_after(message);
            let now = Instant::now();
            if let Some(wait) = due
                .checked_duration_since(now)
                .filter(|wait| !wait.is_zero())
            {
                thread::sleep(wait);
                continue;
            }
            if course.failed.load(Ordering::Relaxed) {
                break;
            }
            lateness.saturating_record((now - due).as_nanos() as u64);
            let publisher = &mut publishers[(message % self.publishers as u64) as usize];
            if self.qos > 0 {
                publisher.await_acks(u64::from(self.window) - 1)?;
            }
            publisher.send(1, &reading::time_digits(reading::nanoseconds_at(due)))?;
            message += 1;
        }
        course.sent.fetch_add(message, Ordering::Relaxed);
        course.sending.store(0, Ordering::Release);
        if self.qos > 0 {
            for publisher in &mut publishers {
                publisher.await_acks(0)?;
            }
        }
        Ok(Sent::by(publishers, lateness))
    }
}

/// What a sending thread has done. Its connections stay open until everything has been received.
pub(crate) struct Sent {
    counts: Vec<(usize, u64)>,
    connections: Vec<Connection>,
    lateness: Histogram<u64>,
}

impl Sent {
    pub(crate) fn by(publishers: Vec<Publisher>, lateness: Histogram<u64>) -> Sent {
        Sent {
            counts: publishers.iter().map(|one| (one.index, one.sent)).collect(),
            connections: publishers.into_iter().map(|one| one.connection).collect(),
            lateness,
        }
    }
}

/// One connection that publishes, with its frames made in advance.
pub(crate) struct Publisher {
    pub(crate) index: usize,
    connection: Connection,
    frames: Vec<u8>,
    /// Where each frame begins; one more for the end of the last.
    starts: Vec<usize>,
    /// Within a frame, from its end: topics differ in length, payloads don't.
    identifier_from_end: usize,
    sequence_from_end: usize,
    time_from_end: usize,
    pub(crate) sent: u64,
    /// QoS 1: of which PUBACK has come; QoS 2: PUBCOMP.
    acked: u64,
    qos: u8,
}

impl Publisher {
    fn new(load: &Load, index: usize, stream: Stream) -> Result<Self> {
        let (payload, sequence_at, time_at) =
            reading::template(load.form, index, load.payload_bytes)?;
        let own: Vec<&String> = load
            .topics
            .iter()
            .skip(index)
            .step_by(load.publishers)
            .collect();
        let mut frames = Vec::new();
        let mut starts = Vec::new();
        // Whole turns through the topics, so that the chunk's end joins its beginning.
        while frames.len() < CHUNK_BYTES {
            for topic in &own {
                starts.push(frames.len());
                frames.extend(wire::publish(topic, load.qos, &payload).0);
            }
        }
        starts.push(frames.len());
        Ok(Publisher {
            index,
            connection: Connection::new(stream, ACK_PATIENCE)?.gathering(load.pace.gathering()),
            frames,
            starts,
            identifier_from_end: payload.len() + 2,
            sequence_from_end: payload.len() - sequence_at,
            time_from_end: payload.len() - time_at,
            sent: 0,
            acked: 0,
            qos: load.qos,
        })
    }

    /// Sends `count` messages or as many as are left before the end of the prepared frames.
    fn send(&mut self, count: u64, time: &[u8; reading::TIME_DIGITS]) -> Result<()> {
        let prepared = self.prepare(count, time);
        self.connection
            .stream()
            .write_all(&self.frames[prepared])
            .context("the broker does not take messages in")
    }

    /// Makes the next `count` messages or as many as are left before the end of the prepared frames,
    /// which count as sent, and says where they lie.
    pub(crate) fn prepare(
        &mut self,
        count: u64,
        time: &[u8; reading::TIME_DIGITS],
    ) -> Range<usize> {
        let prepared = self.starts.len() - 1;
        let first = (self.sent % prepared as u64) as usize;
        let count = (count as usize).min(prepared - first);
        for frame in first..first + count {
            let end = self.starts[frame + 1];
            let at = end - self.sequence_from_end;
            reading::write_sequence(&mut self.frames[at..at + 9], self.sent);
            let at = end - self.time_from_end;
            self.frames[at..at + reading::TIME_DIGITS].copy_from_slice(time);
            if self.qos > 0 {
                let identifier = (self.sent % 65_535) as u16 + 1;
                let at = end - self.identifier_from_end;
                self.frames[at..at + 2].copy_from_slice(&identifier.to_be_bytes());
            }
            self.sent += 1;
        }
        self.starts[first]..self.starts[first + count]
    }

    pub(crate) fn socket(&mut self) -> &TcpStream {
        self.connection.stream().socket()
    }

    /// Writes what has been prepared, as far as the broker takes it.
    pub(crate) fn write(&mut self, prepared: Range<usize>) -> io::Result<usize> {
        self.connection.stream().write(&self.frames[prepared])
    }

    /// Waits until at most `outstanding` messages are without an acknowledgement.
    fn await_acks(&mut self, outstanding: u64) -> Result<()> {
        let mut releases = Vec::new();
        while self.sent - self.acked > outstanding {
            let acked = &mut self.acked;
            let came = self.connection.receive(
                || (),
                |(), frame| {
                    match frame.kind() {
                        wire::PUBACK | wire::PUBCOMP => *acked += 1,
                        wire::PUBREC => {
                            releases.extend([wire::PUBREL | 0b10, 2]);
                            releases.extend(frame.acknowledged()?);
                        }
                        _ => {}
                    }
                    Ok(())
                },
            )?;
            if !came {
                bail!(
                    "{} messages of publisher {} were not acknowledged within {ACK_PATIENCE:?}",
                    self.sent - self.acked,
                    self.index
                );
            }
            if !releases.is_empty() {
                self.connection
                    .stream()
                    .write_all(&releases)
                    .context("the broker does not take releases in")?;
                releases.clear();
            }
        }
        Ok(())
    }
}

/// One connection that receives and keeps account.
pub(crate) struct Subscriber {
    connection: Connection,
    course: Arc<Course>,
    publishers: usize,
    copies: u64,
    sampling: u64,
    finder: Finder,
    acks: Vec<u8>,
    tally: Tally,
    /// When it was seen that everything has been sent.
    all_sent: Option<Instant>,
}

/// What a subscriber has received.
pub(crate) struct Tally {
    received: u64,
    duplicates: u64,
    reordered: u64,
    /// A bit for each sequence number of each publisher; not kept if several copies are expected.
    seen: Vec<Vec<u64>>,
    /// The next sequence number of each publisher, if none is lost.
    next: Vec<u64>,
    /// Only once there is one: it is large, and there may be many subscribers.
    latency: Option<Histogram<u64>>,
    last: Instant,
}

impl Subscriber {
    fn new(load: &Load, stream: Stream, course: Arc<Course>) -> Result<Self> {
        // A crowd's thread lets bytes gather for all of them at once.
        let gathering = load
            .pace
            .gathering()
            .filter(|_| load.subscribers <= THREADS);
        Ok(Subscriber {
            connection: Connection::new(stream, LOOK)?.gathering(gathering),
            course,
            publishers: load.publishers,
            copies: load.copies,
            sampling: match load.pace {
                Pace::FlatOut => LATENCY_SAMPLE,
                Pace::PerSecond(_) => 1,
            },
            finder: Finder::of(load.form),
            acks: Vec::new(),
            tally: Tally::new(),
            all_sent: None,
        })
    }

    fn run(mut self) -> Result<Tally> {
        loop {
            let came = self.receive()?;
            if self.course.failed.load(Ordering::Relaxed) || self.is_done(came) {
                return Ok(self.tally);
            }
        }
    }

    pub(crate) fn socket(&mut self) -> &TcpStream {
        self.connection.stream().socket()
    }

    pub(crate) fn is_drained(&self) -> bool {
        self.connection.is_drained()
    }

    pub(crate) fn into_tally(self) -> Tally {
        self.tally
    }

    /// Waits, reads once, counts and acknowledges. False if nothing came.
    pub(crate) fn receive(&mut self) -> Result<bool> {
        let Subscriber {
            connection,
            finder,
            acks,
            tally,
            ..
        } = self;
        let (publishers, copies, sampling) = (self.publishers, self.copies, self.sampling);
        let came = connection.receive(Instant::now, |now, frame| {
            match frame.kind() {
                wire::PUBLISH => {}
                wire::PUBREL => {
                    acks.extend([wire::PUBCOMP, 2]);
                    acks.extend(frame.acknowledged()?);
                    return Ok(());
                }
                _ => return Ok(()),
            }
            let (identifier, payload) = frame.publish()?;
            if frame.qos() > 0 {
                let kind = if frame.qos() == 1 {
                    wire::PUBACK
                } else {
                    wire::PUBREC
                };
                acks.extend([kind, 2]);
                acks.extend(identifier.to_be_bytes());
            }
            let (publisher, sequence) = finder.sequence(payload).with_context(|| {
                format!(
                    "a message without a sequence number came: {}",
                    String::from_utf8_lossy(payload)
                )
            })?;
            // A late result of an earlier probe is not one of this load.
            if publisher >= publishers {
                return Ok(());
            }
            tally.count(publisher, sequence, copies);
            if tally.received.is_multiple_of(sampling)
                && let Some(sent) = finder.time(payload)
            {
                let received = reading::nanoseconds_at(*now);
                tally
                    .latency
                    .get_or_insert_with(histogram)
                    .saturating_record(received.saturating_sub(sent).max(1));
            }
            tally.last = *now;
            Ok(())
        })?;
        if !acks.is_empty() {
            connection
                .stream()
                .write_all(acks)
                .context("the broker does not take acknowledgements in")?;
            acks.clear();
        }
        Ok(came)
    }

    /// Whether it has got everything, or need not wait any longer: `came` says whether something has
    /// just come.
    pub(crate) fn is_done(&mut self, came: bool) -> bool {
        if self.course.sending.load(Ordering::Acquire) > 0 {
            return false;
        }
        let finished = *self.all_sent.get_or_insert_with(Instant::now);
        let expected = self.course.sent.load(Ordering::Relaxed) * self.copies;
        let silent_since = finished.max(self.tally.last);
        self.tally.received >= expected || !came && silent_since.elapsed() > SILENCE
    }
}

impl Tally {
    fn new() -> Tally {
        Tally {
            received: 0,
            duplicates: 0,
            reordered: 0,
            seen: Vec::new(),
            next: Vec::new(),
            latency: None,
            last: Instant::now(),
        }
    }

    #[inline]
    fn count(&mut self, publisher: usize, sequence: u64, copies: u64) {
        self.received += 1;
        if copies > 1 {
            return;
        }
        if publisher >= self.seen.len() {
            self.seen.resize_with(publisher + 1, Vec::new);
            self.next.resize(publisher + 1, 0);
        }
        let (word, bit) = ((sequence / 64) as usize, 1_u64 << (sequence % 64));
        let seen = &mut self.seen[publisher];
        if word >= seen.len() {
            seen.resize((word + 1).next_power_of_two(), 0);
        }
        if seen[word] & bit != 0 {
            self.duplicates += 1;
            return;
        }
        seen[word] |= bit;
        if sequence < self.next[publisher] {
            self.reordered += 1;
        } else {
            self.next[publisher] = sequence + 1;
        }
    }

    /// Messages that should have come and did not.
    fn missing(&self, sent_by: &[u64], copies: u64) -> u64 {
        let distinct = self.received - self.duplicates;
        (sent_by.iter().sum::<u64>() * copies).saturating_sub(distinct)
    }
}

/// The part of `all` that falls to the publisher with this index.
fn share(all: u64, index: usize, publishers: usize) -> u64 {
    let publishers = publishers as u64;
    all / publishers + u64::from((index as u64) < all % publishers)
}

/// From 1 ns to more than an hour, with three significant digits.
pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 1 << 42, 3).expect("these bounds are valid")
}

fn spawn<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<thread::JoinHandle<T>> {
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .context("can't start a thread")
}

/// Has the kernel wake this thread when it asked to be woken, not up to 50 µs later.
#[allow(unsafe_code)]
pub(crate) fn precise_sleeps() {
    // SAFETY: PR_SET_TIMERSLACK takes one integer and changes nothing but this thread's timer slack.
    unsafe {
        libc::prctl(libc::PR_SET_TIMERSLACK, 1_u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{SocketAddr, TcpListener};

    fn load(broker: SocketAddr) -> Load {
        Load {
            broker: Endpoint::plain(broker),
            publishers: 3,
            topics: (0..7).map(|line| format!("plant/line{line}/t")).collect(),
            subscribers: 2,
            filter: "plant/#".to_owned(),
            qos: 0,
            window: 10,
            payload_bytes: 100,
            form: Form::Measurement,
            pace: Pace::FlatOut,
            span: Span::Messages(1_000),
            copies: 1,
            server: Some(std::process::id()),
        }
    }

    fn sink() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || crate::sink::serve(listener));
        address
    }

    #[test]
    fn every_message_is_accounted_for_at_every_qos_and_pace() {
        for qos in [0, 1, 2] {
            for pace in [Pace::FlatOut, Pace::PerSecond(20_000)] {
                let outcome = Load {
                    qos,
                    pace,
                    ..load(sink())
                }
                .run()
                .unwrap();
                assert_eq!(outcome.sent, 1_000);
                assert_eq!(outcome.received, 2_000);
                assert_eq!((outcome.lost, outcome.duplicates), (0, 0));
                assert!(!outcome.latency.is_empty());
            }
        }
    }

    #[test]
    fn every_message_of_a_crowd_is_accounted_for() {
        let many = THREADS + 1;
        for (publishers, subscribers, sent) in [(many, 1, 20_000), (1, many, 1_000)] {
            let outcome = Load {
                publishers,
                subscribers,
                topics: (0..many)
                    .map(|line| format!("plant/line{line}/t"))
                    .collect(),
                span: Span::Messages(sent),
                ..load(sink())
            }
            .run()
            .unwrap();
            assert_eq!(outcome.sent, sent);
            assert_eq!(outcome.received, sent * subscribers as u64);
            assert_eq!((outcome.lost, outcome.duplicates), (0, 0));
        }
    }

    #[test]
    fn what_is_lost_or_doubled_is_noticed() {
        let mut tally = Tally::new();
        for sequence in [0, 1, 3, 2, 3, 70] {
            tally.count(5, sequence, 1);
        }
        assert_eq!(tally.duplicates, 1);
        assert_eq!(tally.reordered, 1);
        assert_eq!(tally.missing(&[0, 0, 0, 0, 0, 71], 1), 66);
    }

    #[test]
    fn a_broker_that_is_not_there_is_named() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let error = load(address).run().unwrap_err();
        assert!(error.to_string().contains(&address.to_string()));
    }
}
