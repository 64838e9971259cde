//! Links to other machines: what is in the journal is shipped to NATS JetStream or to an MQTT broker, and commands
//! come from there.
//!
//! Knows the journal, and the door by which events come in; not where the journal's events came from.
//! `docs/uplink.md` describes the file with the links and what is promised.

mod connection;
mod feed;
mod jetstream;
mod keep_up;
mod links;
mod mqtt;
mod progress;
mod site;
mod stream;
mod subject;
mod take;
pub mod window;

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::broker::Door;
use crate::dead_letters::DeadLetters;
use crate::journal::Journal;
use crate::remote::Remote;
use crate::site::Workers;
use crate::store::Cursors;
use feed::{Feed, Sources};
use jetstream::Shipping;
pub(crate) use jetstream::{TIMESTAMP, VIA};
use keep_up::{PAUSES, keep_up};
use links::{Destination, Kind, Link, Source};
pub use links::{Links, Place};
use mqtt::Bridge;
use progress::{LinkProgress, ShipProgress, TakeProgress};
pub use progress::{LinkStatus, ShipStatus, TakeStatus};
pub(crate) use subject::{filters_of, topic_of};
use take::Taking;

/// What the links work with.
pub struct Rooms {
    pub journal: Journal,
    pub cursors: Cursors,
    pub dead_letters: Arc<DeadLetters>,
    pub door: Door,
    /// The names of this gateway and of its site.
    pub gateway: Arc<str>,
    pub site: Arc<str>,
    /// What is to be run once in the site, or once for each shard.
    pub workers: Workers,
}

/// The running links. They end when this is closed.
pub struct Uplink {
    links: Vec<Arc<LinkProgress>>,
    journal: Journal,
    /// To take nothing more, and to end.
    drain: watch::Sender<bool>,
    stop: watch::Sender<bool>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Uplink {
    /// Starts all links, in a thread of their own.
    pub fn start(links: Links, rooms: Rooms) -> io::Result<Uplink> {
        let (drain, draining) = watch::channel(false);
        let (stop, stopping) = watch::channel(false);
        let journal = rooms.journal.clone();
        rooms.door.know_own(&rooms.gateway);
        let sources = Sources {
            journal: rooms.journal,
            cursors: rooms.cursors,
            dead_letters: rooms.dead_letters,
            gateway: rooms.gateway,
            site: rooms.site,
        };
        let mut progress = Vec::new();
        let mut parts = Vec::new();
        for link in links.links {
            let part = Part::new(Arc::new(link), &sources, &rooms.door, &rooms.workers)?;
            progress.push(part.progress.clone());
            parts.push(part);
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let thread = std::thread::Builder::new()
            .name("uplink".into())
            .spawn(move || {
                runtime.block_on(async move {
                    let mut running = JoinSet::new();
                    for part in parts {
                        running.spawn(part.run(draining.clone(), stopping.clone()));
                    }
                    while running.join_next().await.is_some() {}
                });
            })?;
        Ok(Uplink {
            links: progress,
            journal,
            drain,
            stop,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// From now on nothing is taken from the other side.
    pub fn drain(&self) {
        self.drain.send_replace(true);
    }

    /// Writes the cursors, and ends. Blocks for half a second at the most.
    pub fn close(&self) {
        self.drain();
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.lock().take() {
            // A panic there has been reported by the panic hook.
            let _ = thread.join();
        }
    }

    pub fn status(&self) -> Vec<LinkStatus> {
        let (_, next) = self.journal.bounds();
        self.links.iter().map(|link| link.status(next)).collect()
    }

    /// Puts the counters into the `metrics` crate's recorder. To be called before a scrape.
    pub fn record_metrics(&self) {
        progress::record_metrics(&self.status());
    }
}

/// A link that is to run.
struct Part {
    link: Arc<Link>,
    feeds: Vec<Feed>,
    takes: Vec<(links::Take, Arc<TakeProgress>)>,
    progress: Arc<LinkProgress>,
    sources: Sources,
    door: Door,
    workers: Workers,
}

impl Part {
    fn new(link: Arc<Link>, sources: &Sources, door: &Door, workers: &Workers) -> io::Result<Part> {
        let mut feeds = Vec::new();
        for ship in &link.ship {
            let to = match &ship.to {
                Destination::Stream { stream, .. } => format!("stream {stream}"),
                Destination::Topic { prefixes, .. } => format!("{}#", prefixes.add),
            };
            let progress = Arc::new(ShipProgress::new(&ship.name, to));
            feeds.push(Feed::open(
                sources.clone(),
                link.clone(),
                ship.clone(),
                progress,
            )?);
        }
        let takes = link.take.iter().map(|take| {
            let from = match &take.from {
                Source::Stream { stream, .. } => format!("stream {stream}"),
                Source::Topics { filters, .. } => {
                    let filters: Vec<_> = filters.iter().map(|filter| filter.as_str()).collect();
                    filters.join(", ")
                }
            };
            (take.clone(), Arc::new(TakeProgress::new(&take.name, from)))
        });
        let takes: Vec<_> = takes.collect();
        let progress = Arc::new(LinkProgress::new(
            &link,
            feeds.iter().map(|feed| feed.progress.clone()).collect(),
            takes.iter().map(|(_, progress)| progress.clone()).collect(),
        ));
        Ok(Part {
            link,
            feeds,
            takes,
            progress,
            sources: sources.clone(),
            door: door.clone(),
            workers: workers.clone(),
        })
    }

    async fn run(self, drain: watch::Receiver<bool>, stop: watch::Receiver<bool>) {
        match self.link.kind {
            Kind::JetStream => self.run_jetstream(drain, stop).await,
            Kind::Mqtt => self.run_mqtt(drain, stop).await,
        }
    }

    async fn run_jetstream(self, drain: watch::Receiver<bool>, stop: watch::Receiver<bool>) {
        let (connection, state) = watch::channel(None);
        let remote = Arc::new(Remote::new(connection::PATIENCE));
        let mut running = JoinSet::new();
        for feed in self.feeds {
            let (link, progress) = (self.link.clone(), feed.progress.clone());
            let (again, mut feed) = (feed.again(), Some(feed));
            let (state, remote, stopping) = (state.clone(), remote.clone(), stop.clone());
            let shipping = move || {
                let feed = feed.take().map_or_else(&again, Ok)?;
                let shipping = Shipping::new(feed, state.clone(), remote.clone());
                Ok(shipping.run(stopping.clone()))
            };
            let tell = move |why: &str| progress.failed(&link.name, why);
            running.spawn(keep_up(shipping, tell, PAUSES, stop.clone()));
        }
        for (take, progress) in self.takes {
            let (link, told) = (self.link.clone(), progress.clone());
            let tell = move |why: &str| told.failed(&link.name, why);
            let (link, sources, door) =
                (self.link.clone(), self.sources.clone(), self.door.clone());
            let (state, remote, draining) = (state.clone(), remote.clone(), drain.clone());
            let taking = move || {
                let taking = Taking::new(
                    take.clone(),
                    link.clone(),
                    sources.clone(),
                    door.clone(),
                    state.clone(),
                    remote.clone(),
                    progress.clone(),
                );
                Ok(taking.run(draining.clone()))
            };
            running.spawn(keep_up(taking, tell, PAUSES, drain.clone()));
        }
        if let Some(settings) = self.link.cluster {
            let progress = self.progress.clone();
            let tell = move |why: &str| progress.failed(why);
            let part = site::Part {
                settings,
                topics: self.link.shared_topics(),
                gateway: self.sources.gateway,
                site: self.sources.site,
                progress: self.progress.clone(),
                workers: self.workers,
                dead_letters: self.sources.dead_letters,
                remote,
            };
            let (state, draining) = (state.clone(), drain.clone());
            let taking_part = move || {
                Ok(site::take_part(
                    part.clone(),
                    state.clone(),
                    draining.clone(),
                ))
            };
            running.spawn(keep_up(taking_part, tell, PAUSES, drain));
        }
        drop(state);
        let keep = connection::keep(self.link, connection, self.progress);
        tokio::select! {
            () = keep => {}
            () = async { while running.join_next().await.is_some() {} } => {}
        }
    }

    async fn run_mqtt(self, drain: watch::Receiver<bool>, stop: watch::Receiver<bool>) {
        let again: Vec<_> = self.feeds.iter().map(Feed::again).collect();
        let mut feeds = Some(self.feeds);
        let progress = self.progress.clone();
        let stopping = stop.clone();
        let bridge = move || {
            let feeds = match feeds.take() {
                Some(feeds) => feeds,
                None => again.iter().map(|open| open()).collect::<io::Result<_>>()?,
            };
            let bridge = Bridge::new(
                self.link.clone(),
                feeds,
                self.takes.clone(),
                self.sources.gateway.clone(),
                &self.door,
                self.progress.clone(),
            );
            Ok(bridge.run(drain.clone(), stopping.clone()))
        };
        keep_up(bridge, move |why| progress.failed(why), PAUSES, stop).await;
    }
}
