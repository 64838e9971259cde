//! Links to other machines: what is in the journal is shipped to NATS JetStream or to an MQTT broker, and commands
//! come from there.
//!
//! Knows the journal, and the door by which events come in; not where the journal's events came from.
//! `docs/uplink.md` describes the file with the links and what is promised.

mod connection;
mod feed;
mod jetstream;
mod links;
mod mqtt;
mod progress;
mod site;
mod stream;
mod subject;
mod take;
pub mod window;

use std::io;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::thread::JoinHandle;

use futures_util::FutureExt;
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
pub(crate) use jetstream::TIMESTAMP;
use links::{Destination, Kind, Link, Source};
pub use links::{Links, Place};
use mqtt::Bridge;
use progress::{LinkProgress, ShipProgress, TakeProgress};
pub use progress::{LinkStatus, ShipStatus, TakeStatus};
pub(crate) use subject::{filters_of, topic_of};
use take::Taking;

/// Whatever it stumbled over, it would again.
const DEFECT: &str = "a defect of the gateway has ended this, the log says where; it begins anew when the gateway is restarted";

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
            let (to, exclusive) = match &ship.to {
                Destination::Stream {
                    stream, exclusive, ..
                } => (format!("stream {stream}"), *exclusive),
                Destination::Topic { prefixes, .. } => (format!("{}#", prefixes.add), false),
            };
            let progress = Arc::new(ShipProgress::new(&ship.name, to));
            feeds.push(Feed::open(
                sources.clone(),
                link.clone(),
                ship.clone(),
                exclusive,
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
            Kind::JetStream => {
                let (connection, state) = watch::channel(None);
                let remote = Arc::new(Remote::new(connection::PATIENCE));
                let mut running = JoinSet::new();
                for feed in self.feeds {
                    let (link, progress) = (self.link.clone(), feed.progress.clone());
                    let shipping = Shipping::new(feed, state.clone(), remote.clone());
                    let shipping = AssertUnwindSafe(shipping.run(stop.clone())).catch_unwind();
                    running.spawn(async move {
                        if shipping.await.is_err() {
                            progress.failed(&link.name, DEFECT);
                        }
                    });
                }
                for (take, progress) in self.takes {
                    let link = self.link.clone();
                    let taking = Taking::new(
                        take,
                        link.clone(),
                        self.sources.clone(),
                        self.door.clone(),
                        state.clone(),
                        remote.clone(),
                        progress.clone(),
                    );
                    let taking = AssertUnwindSafe(taking.run(drain.clone())).catch_unwind();
                    running.spawn(async move {
                        if taking.await.is_err() {
                            progress.failed(&link.name, DEFECT);
                        }
                    });
                }
                if let Some(settings) = self.link.cluster {
                    let part = site::Part {
                        settings,
                        gateway: self.sources.gateway.clone(),
                        site: self.sources.site.clone(),
                        progress: self.progress.clone(),
                        workers: self.workers,
                        remote: remote.clone(),
                    };
                    running.spawn(site::take_part(part, state.clone(), drain));
                }
                drop(state);
                let keep = connection::keep(self.link.clone(), connection, self.progress.clone());
                tokio::select! {
                    () = keep => {}
                    () = async { while running.join_next().await.is_some() {} } => {}
                }
            }
            Kind::Mqtt => {
                let progress = self.progress.clone();
                let bridge = Bridge::new(
                    self.link,
                    self.feeds,
                    self.takes,
                    self.sources.gateway,
                    &self.door,
                    self.progress,
                );
                let running = AssertUnwindSafe(bridge.run(drain, stop)).catch_unwind();
                if running.await.is_err() {
                    progress.failed(DEFECT);
                }
            }
        }
    }
}
