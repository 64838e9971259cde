//! Several gateways of a site as one: who is in, who leads, who acts for which shard of the topics. They
//! agree through a bucket on NATS JetStream servers, which must be the same for all of them.
//!
//! A gateway that can't reach the servers has no right to anything of this, from the end of its leases on,
//! and goes on alone with all that needs none. Told in `docs/cluster.md`.
//!
//! All that decides is without I/O ([`seat`], [`lease`], [`members`], [`shards`]); the task here asks the
//! bucket ([`kv`]) what they say, and others read what came of it in [`node::Node`].

pub mod claim;
pub mod clock;
pub mod kv;
pub mod lease;
pub mod members;
pub mod node;
pub mod seat;
pub mod shards;
pub mod status;

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::{self, kv::Watch};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{info, warn};

use crate::remote::{Failure, Remote};
pub use claim::LONGEST_TTL;
use kv::Bucket;
use lease::{Answer, Timing};
use node::{Node, View};
use seat::{Identity, Seat};
pub use shards::MOST_SHARDS;
pub use status::Status;

const SHORTEST_LEASE: Duration = Duration::from_secs(1);

#[derive(Clone, Debug)]
pub struct Config {
    pub site: String,
    pub gateway: String,
    /// The machine's name, to be told to others.
    pub host: String,
    /// Topics are divided into so many shards. The same on all gateways of the site.
    pub shards: u16,
    pub lease: Duration,
    /// Copies of the bucket.
    pub replicas: usize,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "uplink.site {0:?} can't name a bucket: letters, digits, - and _ only, at most 64 of them"
    )]
    Site(String),
    #[error("uplink.gateway {0:?} must have between 1 and 64 bytes")]
    Gateway(String),
    #[error("cluster.shards must be between 1 and {MOST_SHARDS}, not {0}")]
    Shards(u16),
    #[error("cluster.lease must be between {SHORTEST_LEASE:?} and {LONGEST_TTL:?}, not {0:?}")]
    Lease(Duration),
    #[error("cluster.replicas must be between 1 and 5, not {0}")]
    Replicas(usize),
}

impl Config {
    fn check(&self) -> Result<(), Error> {
        check_names(&self.site, &self.gateway)?;
        if !(1..=MOST_SHARDS).contains(&self.shards) {
            return Err(Error::Shards(self.shards));
        }
        if !(SHORTEST_LEASE..=LONGEST_TTL).contains(&self.lease) {
            return Err(Error::Lease(self.lease));
        }
        if !(1..=5).contains(&self.replicas) {
            return Err(Error::Replicas(self.replicas));
        }
        Ok(())
    }
}

/// Whether a cluster can have these.
pub fn check_names(site: &str, gateway: &str) -> Result<(), Error> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    let short = |name: &str| (1..=64).contains(&name.len());
    if !short(site) || !site.bytes().all(plain) {
        return Err(Error::Site(site.to_owned()));
    }
    match short(gateway) {
        true => Ok(()),
        false => Err(Error::Gateway(gateway.to_owned())),
    }
}

/// This gateway's part in the cluster. When it is dropped, its leases run out.
#[derive(Debug)]
pub struct Cluster {
    site: String,
    node: Arc<Node>,
    changed: watch::Receiver<()>,
    runs: watch::Sender<Option<Vec<String>>>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Cluster {
    /// Takes part from now on, as soon as the servers can be reached. To be called in a tokio runtime.
    pub fn start(config: Config, client: async_nats::Client) -> Result<Cluster, Error> {
        config.check()?;
        let site = config.site.clone();
        let timing = Timing { ttl: config.lease };
        let seed = fastrand::u64(..);
        let identity = Identity {
            gateway: config.gateway,
            instance: format!("{seed:016x}"),
            host: config.host,
            shards: config.shards,
            seed,
        };
        let node = Arc::new(Node::default());
        let (stop, stopping) = watch::channel(false);
        let (changes, changed) = watch::channel(());
        let (runs, runs_now) = watch::channel(None);
        let task = Task {
            bucket: format!("HEADGATE_{site}"),
            replicas: config.replicas,
            context: jetstream::new(client),
            remote: Remote::new(timing.patience()),
            seat: Seat::new(timing, identity),
            timing,
            node: node.clone(),
            changes,
            runs: runs_now,
            stopping,
            problem: None,
        };
        let task = tokio::spawn(task.run());
        Ok(Cluster {
            site,
            node,
            changed,
            runs,
            stop,
            task,
        })
    }

    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Tells when who may do what has changed.
    pub fn changed(&self) -> watch::Receiver<()> {
        self.changed.clone()
    }

    /// Is to be told what this gateway runs where it has the right to, so that the others know what nobody runs.
    pub fn runs(&self) -> watch::Sender<Option<Vec<String>>> {
        self.runs.clone()
    }

    pub fn status(&self) -> Status {
        Status::of(&self.site, &self.node.view(), clock::now())
    }

    /// Releases all that this gateway has, so that others need not wait; for a time-out of a call at most.
    pub async fn shutdown(mut self) {
        // The task may have ended: then there is nobody to be told.
        let _ = self.stop.send(true);
        if let Err(error) = (&mut self.task).await {
            warn!(%error, "the cluster's task has failed");
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.task.abort();
        self.node.publish(View::default());
    }
}

struct Task {
    bucket: String,
    replicas: usize,
    context: jetstream::Context,
    remote: Remote,
    seat: Seat,
    timing: Timing,
    node: Arc<Node>,
    changes: watch::Sender<()>,
    runs: watch::Receiver<Option<Vec<String>>>,
    stopping: watch::Receiver<bool>,
    problem: Option<String>,
}

impl Task {
    async fn run(mut self) {
        let mut pauses = self.remote.patience().pauses();
        loop {
            let why = match self.open().await {
                None => break,
                Some(Err(error)) => error,
                Some(Ok((bucket, watch))) => {
                    self.problem = None;
                    pauses = self.remote.patience().pauses();
                    match self.take_part(bucket, watch).await {
                        None => break,
                        Some(why) => why,
                    }
                }
            };
            if self.problem.as_ref() != Some(&why) {
                warn!(bucket = self.bucket, "cluster: {why}");
            }
            self.problem = Some(why);
            self.seat.lost(clock::now());
            self.publish();
            let pause = sleep(pauses.next().unwrap_or_default());
            tokio::select! {
                () = pause => {}
                () = stopped(&mut self.stopping) => break,
            }
        }
        self.node.publish(View::default());
        self.changes.send_replace(());
    }

    /// None if it is to stop.
    async fn open(&mut self) -> Option<Result<(Bucket, Watch), String>> {
        let opening = async {
            let bucket = Bucket::open(&self.context, &self.bucket, self.replicas).await?;
            let watch = bucket.watch().await?;
            Ok::<_, kv::Error>((bucket, watch))
        };
        tokio::select! {
            opened = self.remote.call(opening) => Some(opened.map_err(|failure| failure.to_string())),
            () = stopped(&mut self.stopping) => None,
        }
    }

    /// Until it is to stop, or the connection to the bucket is of no use any more, with the reason.
    async fn take_part(&mut self, bucket: Bucket, mut watch: Watch) -> Option<String> {
        let mut asked = FuturesUnordered::new();
        let mut caught_up = false;
        // Each renewal comes back by way of the watch.
        let mut heard = Instant::now();
        let mut give_up = None;
        self.seat.watch_begins();
        loop {
            for (key, ask) in self.seat.wake(clock::now()) {
                let (remote, bucket) = (&self.remote, &bucket);
                asked.push(async move {
                    let answer = remote.call(bucket.ask(&key, ask)).await;
                    (key, answer)
                });
            }
            publish(&self.seat, &self.problem, &self.node, &self.changes);
            if self.seat.is_over() {
                return None;
            }
            let now = clock::now();
            let next = self.seat.next(now).unwrap_or(now + self.timing.ttl);
            tokio::select! {
                Some((key, answer)) = asked.next() => {
                    let answer = match answer {
                        Ok(answer) => answer,
                        // There is no bucket, or nobody who could answer for it.
                        Err(Failure::Failed(error)) => return Some(error.to_string()),
                        Err(Failure::Busy(_) | Failure::TimedOut(_)) => Answer::Unknown,
                    };
                    self.seat.answered(&key, answer, clock::now());
                }
                entry = watch.next() => {
                    let entry = match entry {
                        Some(Ok(entry)) => entry,
                        Some(Err(error)) => return Some(format!("the watch has ended: {error}")),
                        None => return Some("the watch has ended".into()),
                    };
                    heard = Instant::now();
                    let is_last = entry.delta == 0;
                    if let Some((key, entry)) = kv::change(entry) {
                        self.seat.observed(key, entry, clock::now());
                    }
                    if is_last && !caught_up {
                        caught_up = true;
                        self.seat.watch_caught_up(clock::now());
                    }
                }
                Ok(()) = self.runs.changed() => {
                    let runs = self.runs.borrow_and_update().clone();
                    self.seat.tell(runs.unwrap_or_default());
                }
                () = sleep(next.saturating_sub(now)) => {}
                () = sleep_until(heard + self.timing.ttl) => {
                    return Some(format!("the servers have told nothing for {:?}", self.timing.ttl));
                }
                () = stopped(&mut self.stopping), if give_up.is_none() => {
                    self.seat.leave();
                    give_up = Some(Instant::now() + self.timing.call_timeout());
                }
                () = sleep_until(give_up.unwrap_or(heard)), if give_up.is_some() => return None,
            }
        }
    }

    fn publish(&self) {
        publish(&self.seat, &self.problem, &self.node, &self.changes);
    }
}

/// Tells the others, and the log what is news.
fn publish(seat: &Seat, problem: &Option<String>, node: &Node, changes: &watch::Sender<()>) {
    let view = View {
        problem: problem.clone(),
        ..seat.view(clock::now())
    };
    let before = node.view();
    if *before == view {
        return;
    }
    let led = before.leader.map(|holding| holding.token);
    let leads = view.leader.map(|holding| holding.token);
    if leads != led {
        match leads {
            Some(token) => info!(token, "cluster: this gateway leads the site"),
            None => info!("cluster: this gateway does not lead the site any more"),
        }
    }
    if let Some((objection, stands_back)) = &view.objection
        && before.objection != view.objection
    {
        warn!(stands_back, "cluster: {objection}");
    }
    if view.went_back && !before.went_back {
        warn!("cluster: {}", status::WENT_BACK);
    }
    let is_news = !before.says_the_same(&view);
    node.publish(view);
    if is_news {
        changes.send_replace(());
    }
}

/// Returns when it is to stop, also if nobody is left to say so.
async fn stopped(stopping: &mut watch::Receiver<bool>) {
    let _ = stopping.wait_for(|stop| *stop).await;
}
