//! Which seats this gateway has, going by its rights in the cluster, and a task for each of them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::names::not_shipped;
use super::record::Broken;
use super::sitting::{self, Room};
use super::{Placement, Seat, Worker};
use crate::cluster::node::Node;
use crate::event::TopicFilter;

/// How often it is looked who there is and what may be done, if nobody tells.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// After so long it is as if it had never failed.
const STEADY: Duration = Duration::from_secs(10);

/// What has been handled may take so long to be written when the gateway ends.
const ENDING: Duration = Duration::from_millis(500);

/// A seat that this gateway has, or is to have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeatStatus {
    /// An app, or `=mappings` for those that the site has once.
    pub name: String,
    /// None: the whole site.
    pub shard: Option<u16>,
    /// Whether it has begun.
    pub acts: bool,
    pub problem: Option<String>,
}

impl SeatStatus {
    fn new(name: &str, seat: Seat) -> SeatStatus {
        SeatStatus {
            name: name.to_owned(),
            shard: match seat {
                Seat::Whole => None,
                Seat::Shard(shard) => Some(shard),
            },
            acts: false,
            problem: None,
        }
    }
}

/// What runs here where this gateway has the right to, and not where another one has it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Missing {
    /// As in [`SeatStatus`].
    pub name: String,
    /// The gateway that has the right.
    pub gateway: String,
}

/// What is to be run in the site, as of now.
pub type Workers = Arc<dyn Fn() -> Vec<Arc<dyn Worker>> + Send + Sync>;

/// The seats, for whoever asks.
#[derive(Clone, Default)]
pub struct Seats {
    seats: Arc<Mutex<BTreeMap<(String, Seat), SeatStatus>>>,
    missing: Arc<Mutex<BTreeSet<Missing>>>,
}

impl Seats {
    pub fn missing(&self) -> Vec<Missing> {
        self.missing.lock().iter().cloned().collect()
    }

    pub fn status(&self) -> Vec<SeatStatus> {
        self.seats.lock().values().cloned().collect()
    }

    /// Takes seats and leaves them as the cluster says, until `stop`.
    pub(crate) async fn run(
        self,
        room: Room,
        workers: Workers,
        node: Arc<Node>,
        runs: watch::Sender<Option<Vec<String>>>,
        mut changed: watch::Receiver<()>,
        mut stop: watch::Receiver<bool>,
    ) {
        let mut units = Units {
            room: Arc::new(room),
            node,
            runs,
            seats: self,
            running: BTreeMap::new(),
            tasks: JoinSet::new(),
        };
        while !*stop.borrow() {
            units.adjust(workers());
            tokio::select! {
                _ = timeout(LOOK_EVERY, changed.changed()) => {}
                _ = stop.wait_for(|stop| *stop) => {}
            }
        }
        units.end().await;
    }
}

struct Units {
    room: Arc<Room>,
    node: Arc<Node>,
    runs: watch::Sender<Option<Vec<String>>>,
    seats: Seats,
    running: BTreeMap<(String, Seat), Running>,
    tasks: JoinSet<()>,
}

/// A seat with its task.
struct Running {
    unit: Unit,
    task: tokio::task::AbortHandle,
    stop: watch::Sender<bool>,
}

/// What a seat goes by. If any of it changes, it is another one.
#[derive(Clone)]
struct Unit {
    worker: Arc<dyn Worker>,
    seat: Seat,
    token: u64,
    subscriptions: Vec<TopicFilter>,
}

impl PartialEq for Unit {
    fn eq(&self, other: &Unit) -> bool {
        Arc::ptr_eq(&self.worker, &other.worker)
            && (self.seat, self.token) == (other.seat, other.token)
            && self.subscriptions == other.subscriptions
    }
}

impl Drop for Units {
    fn drop(&mut self) {
        self.seats.seats.lock().clear();
        self.seats.missing.lock().clear();
    }
}

impl Units {
    fn adjust(&mut self, workers: Vec<Arc<dyn Worker>>) {
        self.compare(&workers);
        let (mut wanted, mut idle) = (BTreeMap::new(), Vec::new());
        for worker in workers {
            for (seat, token) in self.rights(worker.placement()) {
                if !worker.is_wanted() {
                    idle.push((worker.name().to_owned(), seat));
                    continue;
                }
                let unit = Unit {
                    seat,
                    token,
                    subscriptions: worker.subscriptions(),
                    worker: worker.clone(),
                };
                wanted.insert((worker.name().to_owned(), seat), unit);
            }
        }
        while self.tasks.try_join_next().is_some() {}
        let seats = &self.seats.seats;
        self.running.retain(|key, running| {
            let stays = wanted.get(key) == Some(&running.unit) && !running.task.is_finished();
            if !stays {
                running.task.abort();
            }
            stays
        });
        seats.lock().retain(|key, _| self.running.contains_key(key));
        for (name, seat) in idle {
            let problem = format!(
                "it is stopped or in quarantine on this gateway, which is the one to run it: `headgate app start {name}`"
            );
            let status = SeatStatus {
                problem: Some(problem),
                ..SeatStatus::new(&name, seat)
            };
            seats.lock().insert((name, seat), status);
        }
        for (key, unit) in wanted {
            if self.running.contains_key(&key) {
                continue;
            }
            let is_first = self.running.keys().all(|(name, _)| *name != key.0);
            let not_shipped = not_shipped(&unit.subscriptions, &self.room.topics);
            for filter in not_shipped.filter(|_| is_first) {
                tracing::warn!(
                    app = key.0,
                    %filter,
                    "this gateway ships nothing of what the app subscribes to: unless another one does, add it to \
                     `cluster.topics` of the link"
                );
            }
            let (stop, stopping) = watch::channel(false);
            let status = SeatStatus::new(&key.0, unit.seat);
            self.seats.seats.lock().insert(key.clone(), status);
            let act = act(
                self.room.clone(),
                self.node.clone(),
                unit.clone(),
                self.seats.clone(),
                stopping,
            );
            let task = self.tasks.spawn(act);
            self.running.insert(key, Running { unit, task, stop });
        }
    }

    /// Tells the others what runs here, and finds what does not run where it is to.
    fn compare(&self, workers: &[Arc<dyn Worker>]) {
        let placed = workers
            .iter()
            .filter(|worker| worker.placement() != Placement::Everywhere && worker.is_wanted());
        let placed: Vec<_> = placed
            .map(|worker| (worker.name(), worker.placement()))
            .collect();
        let mut names: Vec<_> = placed.iter().map(|(name, _)| (*name).to_owned()).collect();
        names.sort_unstable();
        self.runs.send_if_modified(|runs| {
            let names = Some(names);
            let is_news = *runs != names;
            *runs = names;
            is_news
        });
        let view = self.node.view();
        // More than one, if two have one name.
        let mut others: BTreeMap<&str, Option<BTreeSet<&str>>> = BTreeMap::new();
        for member in view.members.iter().filter(|member| member.alive) {
            let runs = member.runs.iter().flatten().map(String::as_str);
            let known = others
                .entry(&member.gateway)
                .or_insert_with(|| Some(BTreeSet::new()));
            match member.runs {
                Some(_) => known
                    .iter_mut()
                    .for_each(|known| known.extend(runs.clone())),
                None => *known = None,
            }
        }
        others.remove(view.gateway.as_str());
        let mut missing = BTreeSet::new();
        for (gateway, runs) in others {
            let Some(runs) = runs else { continue };
            let is_theirs = |holder: &Option<String>| holder.as_deref() == Some(gateway);
            for (name, placement) in &placed {
                let is_to_run = match placement {
                    Placement::Everywhere => false,
                    Placement::Singleton => is_theirs(&view.leader_is),
                    Placement::Partition => view.shards_are.iter().any(is_theirs),
                };
                if is_to_run && !runs.contains(name) {
                    missing.insert(Missing {
                        name: (*name).to_owned(),
                        gateway: gateway.to_owned(),
                    });
                }
            }
        }
        *self.seats.missing.lock() = missing;
    }

    fn rights(&self, placement: Placement) -> Vec<(Seat, u64)> {
        match placement {
            Placement::Everywhere => Vec::new(),
            Placement::Singleton => {
                let token = self.node.leads();
                token
                    .map(|token| (Seat::Whole, token))
                    .into_iter()
                    .collect()
            }
            Placement::Partition => {
                let shards = self.node.view().shards.len() as u16;
                let owned = |shard| Some((Seat::Shard(shard), self.node.owns(shard)?));
                (0..shards).filter_map(owned).collect()
            }
        }
    }

    /// Has all come to their end, so that nobody has to do again what was done here.
    async fn end(mut self) {
        for running in self.running.values() {
            running.stop.send_replace(true);
        }
        let all = async { while self.tasks.join_next().await.is_some() {} };
        if timeout(ENDING, all).await.is_err() {
            tracing::warn!(
                "what apps of the site have handled last is handled again by another gateway"
            );
        }
    }
}

fn right(node: &Node, seat: Seat) -> Option<u64> {
    match seat {
        Seat::Whole => node.leads(),
        Seat::Shard(shard) => node.owns(shard),
    }
}

/// Acts for a seat, beginning anew whenever that is to be, until it is stopped.
async fn act(
    room: Arc<Room>,
    node: Arc<Node>,
    unit: Unit,
    seats: Seats,
    mut stop: watch::Receiver<bool>,
) {
    let Unit {
        worker,
        seat,
        token,
        ..
    } = unit;
    let key = (worker.name().to_owned(), seat);
    let tell = |acts: bool, problem: Option<String>| {
        if let Some(status) = seats.seats.lock().get_mut(&key) {
            if let Some(problem) = &problem
                && status.problem.as_ref() != Some(problem)
            {
                tracing::warn!(app = key.0, ?seat, "can't act for the site: {problem}");
            }
            (status.acts, status.problem) = (acts, problem);
        }
    };
    let mut pauses = room.remote.patience().pauses();
    let may_act = || right(&node, seat) == Some(token);
    while may_act() && !*stop.borrow() {
        let mut stopping = stop.clone();
        let stopped = async move {
            let _ = stopping.wait_for(|stop| *stop).await;
        };
        let begun = || {
            tell(true, None);
            tracing::info!(app = key.0, ?seat, token, "acts for the site");
        };
        let began = Instant::now();
        let sat = sitting::sit(
            &room,
            worker.as_ref(),
            (seat, token),
            may_act,
            begun,
            stopped,
        );
        match sat.await {
            Ok(()) => tell(false, None),
            Err(Broken::Fenced(why) | Broken::Failed(why)) => tell(false, Some(why)),
            Err(Broken::Gone) => tell(false, Some("the log of what is kept was deleted".into())),
        }
        if began.elapsed() > STEADY {
            pauses = room.remote.patience().pauses();
        }
        let pause = pauses.next().unwrap_or_default();
        let _ = timeout(pause, stop.wait_for(|stop| *stop)).await;
    }
}
