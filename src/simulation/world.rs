//! The run of one schedule.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use fastrand::Rng;

use super::Bug;
use super::bucket::Bucket;
use super::gateway::{Gateway, TTL, rights};
use super::network::way;
use super::shipper::Shipper;
use super::stream::{Published, Stream};
use crate::cluster::claim::Key;
use crate::cluster::lease::{Answer, Ask, Entry};
use crate::uplink::window::Tail;

/// Faults come until then; after that all runs that is to run, and nothing fails.
const CALM: Duration = Duration::from_secs(60);
/// So long after that each right is somebody's: a lease runs out that another has left, those who are
/// gone are found to be, and the network takes its time.
const BOUND: Duration = Duration::from_secs(2 * TTL.as_secs() + 2);
const END: Duration = Duration::from_secs(90);
const CALL_TIMEOUT: Duration = Duration::from_millis(1250);

#[derive(Clone, Debug)]
enum Event {
    Start,
    Crash,
    Wake(u64),
    /// The connection has ended, or there was none.
    Connect,
    Asked {
        request: u64,
        key: Key,
        ask: Ask,
    },
    Answered {
        request: u64,
        answer: Answer,
    },
    News {
        watch: u64,
        key: Key,
        entry: Entry,
    },
    CaughtUp {
        watch: u64,
    },
    Journal,
    Ship(u64),
    Keep,
    Published {
        sequences: RangeInclusive<u64>,
        /// Under which new name; 0: none.
        renamed: u64,
        attempt: u64,
        follows: Option<u64>,
    },
    Acknowledged {
        sequences: RangeInclusive<u64>,
        attempt: u64,
        published: Published,
    },
    AskedTail(u64),
    FoundTail(u64, Tail),
    Pause(Duration),
    Cut(Duration),
    DeleteBucket,
    /// The servers have no leader for a while.
    Outage(Duration),
}

/// Which gateway it is for, in which run; none: the servers, or any run.
type At = (usize, Option<u64>);

pub(super) struct World {
    rng: Rng,
    bug: Bug,
    now: Duration,
    origin: Instant,
    queue: BinaryHeap<Reverse<(Duration, u64)>>,
    events: BTreeMap<u64, (At, Event)>,
    count: u64,
    gateways: Vec<Gateway>,
    bucket: Bucket,
    streams: Vec<Stream>,
    outage_until: Duration,
    exclusive: bool,
    same_name: bool,
    /// Who does not come back.
    gone: Option<usize>,
    /// The highest token of each right, and who had it.
    tokens: BTreeMap<Key, (u64, (usize, u64))>,
}

impl World {
    pub(super) fn new(seed: u64, bug: Bug) -> World {
        let mut rng = Rng::with_seed(seed);
        let exclusive = rng.bool() && bug != Bug::NewIdentities && bug != Bug::HighestCursor;
        let same_name = rng.u32(0..10) == 0;
        let count = rng.usize(2..5);
        let gateways = (0..count).map(|index| {
            let name = if same_name && index < 2 {
                "same".into()
            } else {
                format!("gateway-{index}")
            };
            // The margin is good for a tenth between any two of them.
            let mut rate = 1.0 + (rng.f64() - 0.5) * 0.09;
            if bug == Bug::FastClock && index == 0 {
                rate *= 1.5;
            }
            let offset = Duration::from_secs(rng.u64(0..1_000_000));
            Gateway::new(name, offset, rate, Shipper::new(exclusive, bug))
        });
        let gateways: Vec<Gateway> = gateways.collect();
        let gone = (rng.u32(0..4) == 0).then(|| rng.usize(0..count));
        let mut world = World {
            streams: gateways.iter().map(|_| Stream::default()).collect(),
            gateways,
            rng,
            bug,
            now: Duration::ZERO,
            origin: Instant::now(),
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            count: 0,
            bucket: Bucket::new(),
            outage_until: Duration::ZERO,
            exclusive,
            same_name,
            gone,
            tokens: BTreeMap::new(),
        };
        world.plan();
        world
    }

    /// Draws all that happens by itself.
    fn plan(&mut self) {
        let chaos = CALM.as_millis() as u64;
        for gateway in 0..self.gateways.len() {
            let begin = self.rng.u64(0..3000);
            self.at_ms(begin, gateway, Event::Start);
            for _ in 0..self.rng.u32(0..4) {
                let (when, how_long) = (self.rng.u64(0..chaos), self.rng.u64(100..15_000));
                self.at_ms(when, gateway, Event::Pause(Duration::from_millis(how_long)));
            }
            for _ in 0..self.rng.u32(0..4) {
                let (when, how_long) = (self.rng.u64(0..chaos), self.rng.u64(100..20_000));
                self.at_ms(when, gateway, Event::Cut(Duration::from_millis(how_long)));
            }
            for _ in 0..self.rng.u32(0..3) {
                let (when, how_long) = (self.rng.u64(0..chaos), self.rng.u64(10..15_000));
                self.at_ms(when, gateway, Event::Crash);
                self.at_ms((when + how_long).min(chaos), gateway, Event::Start);
            }
            for _ in 0..100 {
                let when = self.rng.u64(0..chaos + 2000);
                for _ in 0..self.rng.u32(1..4) {
                    self.at_ms(when, gateway, Event::Journal);
                }
            }
            for second in 0..END.as_secs() {
                let when = second * 1000 + self.rng.u64(0..1000);
                self.at_ms(when, gateway, Event::Keep);
            }
            let last = if self.gone == Some(gateway) {
                Event::Crash
            } else {
                Event::Start
            };
            self.at_ms(chaos, gateway, last);
        }
        for _ in 0..self.rng.u32(0..3) {
            let (when, how_long) = (self.rng.u64(0..chaos), self.rng.u64(100..6000));
            self.at_ms(when, 0, Event::Outage(Duration::from_millis(how_long)));
        }
        if self.rng.u32(0..3) == 0 {
            let when = self.rng.u64(0..chaos);
            self.at_ms(when, 0, Event::DeleteBucket);
        }
    }

    fn at_ms(&mut self, when: u64, gateway: usize, event: Event) {
        self.push(Duration::from_millis(when), (gateway, None), event);
    }

    fn push(&mut self, when: Duration, at: At, event: Event) {
        self.queue.push(Reverse((when.max(self.now), self.count)));
        self.events.insert(self.count, (at, event));
        self.count += 1;
    }

    fn is_calm(&self) -> bool {
        self.now >= CALM
    }

    /// Sends something from or to a gateway.
    fn send(&mut self, gateway: usize, event: &Event) {
        if self.now < self.gateways[gateway].cut_until {
            return;
        }
        let calm = self.is_calm();
        for delay in way(&mut self.rng, calm) {
            // What strays from before the calm is lost.
            if calm || self.now + delay < CALM + Duration::from_secs(1) {
                let run = self.gateways[gateway].run;
                self.push(self.now + delay, (gateway, Some(run)), event.clone());
            }
        }
    }

    pub(super) fn run(mut self) {
        let mut settled = false;
        while let Some(Reverse((when, number))) = self.queue.pop() {
            if when > END {
                break;
            }
            if !settled && when > CALM + BOUND {
                settled = true;
                self.check_all_rights_are_somebodys();
            }
            self.now = when;
            let (at, event) = self.events.remove(&number).expect("each event comes once");
            self.happens(at, event, number);
        }
        self.check_all_rights_are_somebodys();
        self.check_streams();
    }

    fn happens(&mut self, at: At, event: Event, number: u64) {
        let (index, run) = at;
        let reaches_servers = matches!(
            event,
            Event::Asked { .. } | Event::Published { .. } | Event::AskedTail(_)
        );
        if reaches_servers {
            // Also of a gateway that has crashed since. Without a leader nobody answers.
            if self.now >= self.outage_until {
                self.serve(index, event);
            }
            return;
        }
        let gateway = &mut self.gateways[index];
        if run.is_some_and(|run| run != gateway.run) {
            return;
        }
        if self.now < gateway.paused_until && !matches!(event, Event::Crash | Event::Cut(_)) {
            let resumed = gateway.paused_until;
            self.queue.push(Reverse((resumed, number)));
            self.events.insert(number, (at, event));
            return;
        }
        match event {
            Event::Outage(how_long) => self.outage_until = CALM.min(self.now + how_long),
            Event::DeleteBucket => {
                self.bucket.delete();
                (0..self.gateways.len()).for_each(|gateway| self.disconnect(gateway, self.now));
            }
            Event::Crash => gateway.crash(),
            Event::Start if gateway.seat.is_none() => {
                let instance = format!("{:08x}", self.rng.u32(..));
                let seed = self.rng.u64(..);
                self.gateways[index].start(instance, seed);
                self.disconnect(index, self.now);
                self.ship(index);
            }
            Event::Pause(how_long) => gateway.paused_until = CALM.min(self.now + how_long),
            Event::Cut(how_long) => {
                gateway.cut_until = CALM.min(self.now + how_long);
                let healed = gateway.cut_until;
                self.disconnect(index, healed);
            }
            Event::Journal => {
                gateway.shipper.journaled += 1;
                self.ship(index);
            }
            _ if gateway.seat.is_none() => {}
            event => self.runs(index, event),
        }
    }

    /// Something happens in a gateway that is up.
    fn runs(&mut self, index: usize, event: Event) {
        let now = self.now;
        let gateway = &mut self.gateways[index];
        let clock = gateway.clock(now);
        let Some(seat) = &mut gateway.seat else {
            return;
        };
        match event {
            Event::Wake(wake) if wake != gateway.wakes => return,
            Event::Wake(_) => {}
            Event::Connect => {
                if now < gateway.cut_until {
                    let healed = gateway.cut_until;
                    return self.disconnect(index, healed);
                }
                seat.lost(clock);
                seat.watch_begins();
                gateway.asked.clear();
                gateway.watch += 1;
                gateway.watching = true;
                gateway.news_until = now;
                let entries = self.bucket.open(self.bug == Bug::LowRevisions);
                for (key, entry) in entries {
                    self.tell(index, |watch| Event::News { watch, key, entry });
                }
                self.tell(index, |watch| Event::CaughtUp { watch });
            }
            Event::Answered { request, answer } => match gateway.asked.remove(&request) {
                Some(key) => seat.answered(&key, answer, clock),
                None => return,
            },
            Event::News { watch, key, entry } if watch == gateway.watch => {
                seat.observed(key, entry, clock)
            }
            Event::CaughtUp { watch } if watch == gateway.watch => seat.watch_caught_up(clock),
            Event::Ship(ship) if ship == gateway.ships => return self.ship(index),
            Event::Keep => return self.keep(index),
            Event::Acknowledged {
                sequences,
                attempt,
                published,
            } => {
                match published {
                    Published::Stored => gateway.shipper.acknowledged(&sequences, attempt),
                    Published::Refused => gateway.shipper.refused(attempt),
                }
                return self.ship(index);
            }
            Event::FoundTail(asked, tail) => {
                gateway.shipper.found_tail(asked, tail);
                return self.ship(index);
            }
            _ => return,
        }
        self.take_part(index);
    }

    /// Its connection is gone; there is a new one some time after that.
    fn disconnect(&mut self, index: usize, from: Duration) {
        let gateway = &mut self.gateways[index];
        gateway.watching = false;
        gateway.watch += 1;
        let run = gateway.run;
        let pause = Duration::from_millis(self.rng.u64(1..1500));
        self.push(from + pause, (index, Some(run)), Event::Connect);
    }

    /// Tells a gateway that watches, in order.
    fn tell(&mut self, index: usize, event: impl FnOnce(u64) -> Event) {
        let delay = Duration::from_micros(self.rng.u64(300..5000));
        let stall = !self.is_calm() && self.rng.u32(0..100) == 0;
        let stall = if stall {
            Duration::from_millis(self.rng.u64(10..2000))
        } else {
            Duration::ZERO
        };
        let gateway = &mut self.gateways[index];
        gateway.news_until = gateway.news_until.max(self.now + delay + stall);
        let (when, run) = (gateway.news_until, gateway.run);
        let event = event(gateway.watch);
        self.push(when, (index, Some(run)), event);
    }

    fn take_part(&mut self, index: usize) {
        let now = self.now;
        let gateway = &mut self.gateways[index];
        let clock = gateway.clock(now);
        let Some(seat) = &mut gateway.seat else {
            return;
        };
        // Without a connection nothing can be asked, and the view is as it was.
        let asks = if gateway.watching {
            seat.wake(clock)
        } else {
            Vec::new()
        };
        gateway.view = seat.view(clock);
        gateway.wakes += 1;
        let (wake, run) = (gateway.wakes, gateway.run);
        if let Some(next) = seat.next(clock).filter(|_| gateway.watching) {
            // Timers are a little late, and never early.
            let next = gateway.when(next) + Duration::from_micros(10);
            self.push(next, (index, Some(run)), Event::Wake(wake));
        }
        for (key, ask) in asks {
            let request = self.count;
            self.gateways[index].asked.insert(request, key.clone());
            self.send(index, &Event::Asked { request, key, ask });
            let timeout = Event::Answered {
                request,
                answer: Answer::Unknown,
            };
            self.push(now + CALL_TIMEOUT, (index, Some(run)), timeout);
        }
        self.check_rights_of(index);
    }

    fn serve(&mut self, index: usize, event: Event) {
        match event {
            Event::Asked { request, key, ask } => {
                let (answer, news) = self.bucket.ask(&key, ask);
                self.send(index, &Event::Answered { request, answer });
                let Some(entry) = news else { return };
                for watcher in 0..self.gateways.len() {
                    if self.gateways[watcher].watching {
                        let (key, entry) = (key.clone(), entry.clone());
                        self.tell(watcher, |watch| Event::News { watch, key, entry });
                    }
                }
            }
            Event::Published {
                sequences,
                renamed,
                attempt,
                follows,
            } => {
                let ids = sequences.clone().map(|sequence| (sequence, renamed));
                let published = self.streams[index].publish(ids, follows);
                self.send(
                    index,
                    &Event::Acknowledged {
                        sequences,
                        attempt,
                        published,
                    },
                );
            }
            Event::AskedTail(asked) => {
                let messages = &self.streams[index].messages;
                let tail = Tail {
                    number: messages.len() as u64,
                    ours: messages.last().copied(),
                };
                self.send(index, &Event::FoundTail(asked, tail));
            }
            _ => unreachable!("not for servers"),
        }
    }

    fn ship(&mut self, index: usize) {
        let gateway = &mut self.gateways[index];
        let instant = gateway.instant(self.origin, self.now);
        let batches = gateway.shipper.send(instant);
        let asks_tail = gateway.shipper.ask_tail(instant);
        let next = gateway
            .shipper
            .next()
            .map(|it| gateway.when(it - self.origin));
        gateway.ships += 1;
        let (ship, run) = (gateway.ships, gateway.run);
        for batch in batches {
            let renamed = if self.bug == Bug::NewIdentities {
                self.count
            } else {
                0
            };
            self.send(
                index,
                &Event::Published {
                    sequences: batch.sequences,
                    renamed,
                    attempt: batch.attempt,
                    follows: batch.follows,
                },
            );
        }
        if let Some(asked) = asks_tail {
            self.send(index, &Event::AskedTail(asked));
        }
        if let Some(next) = next {
            let next = next + Duration::from_micros(10);
            self.push(next, (index, Some(run)), Event::Ship(ship));
        }
    }

    fn keep(&mut self, index: usize) {
        let gateway = &mut self.gateways[index];
        let instant = gateway.instant(self.origin, self.now);
        gateway.shipper.keep(instant);
        let safe = gateway.shipper.safe;
        let mut stored = self.streams[index].messages.clone();
        stored.sort_unstable();
        stored.dedup();
        let lacks = (0..safe)
            .zip(stored)
            .find(|(sequence, stored)| sequence != stored);
        assert_eq!(
            lacks, None,
            "events of gateway {index} are lost that may go from the journal"
        );
    }

    fn check_rights_of(&mut self, index: usize) {
        for key in rights() {
            let gateway = &self.gateways[index];
            let Some(token) = gateway.acts(&key, self.now, self.bug) else {
                continue;
            };
            let holder = (index, gateway.run);
            match self.tokens.get(&key) {
                Some((_, before)) if *before == holder && self.tokens[&key].0 == token => {}
                Some((highest, before)) => assert!(
                    token > *highest,
                    "at {:?}: token {token} of {key:?} for {holder:?} is no higher than {highest} for {before:?}",
                    self.now
                ),
                None => {}
            }
            self.tokens.insert(key.clone(), (token, holder));
            for (other, gateway) in self
                .gateways
                .iter()
                .enumerate()
                .filter(|(other, _)| *other != index)
            {
                let acts = gateway.acts(&key, self.now, self.bug);
                assert_eq!(
                    acts, None,
                    "at {:?}: two act for {key:?}: {index} and {other}",
                    self.now
                );
            }
        }
    }

    fn check_all_rights_are_somebodys(&self) {
        for key in rights() {
            let acts = |gateway: &&Gateway| gateway.acts(&key, self.now, self.bug).is_some();
            let count = self.gateways.iter().filter(acts).count();
            assert_eq!(count, 1, "at {:?}: so many act for {key:?}", self.now);
        }
        let up = |gateway: &usize| self.gone != Some(*gateway);
        let told = |gateway: &usize| self.gateways[*gateway].view.objection.is_some();
        let rivals = self.same_name && up(&0) && up(&1);
        for gateway in (0..self.gateways.len()).filter(up) {
            assert_eq!(
                told(&gateway),
                rivals,
                "gateway {gateway} is told of two of one name"
            );
        }
    }

    fn check_streams(&self) {
        for (index, (gateway, stream)) in self.gateways.iter().zip(&self.streams).enumerate() {
            let mut stored = stream.messages.clone();
            if !self.exclusive {
                stored.sort_unstable();
            }
            for pair in stored.windows(2) {
                assert!(
                    pair[0] != pair[1],
                    "event {} of gateway {index} is there twice",
                    pair[0]
                );
                assert!(
                    pair[0] < pair[1],
                    "events of gateway {index} are out of order"
                );
            }
            if self.gone != Some(index) {
                let all: Vec<u64> = (0..gateway.shipper.journaled).collect();
                assert_eq!(stored, all, "events of gateway {index} are lost");
            }
        }
    }
}
