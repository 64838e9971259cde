//! One gateway acts for one seat: from the log to the worker, from the streams to the worker, and what that
//! keeps to the log again.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_nats::jetstream::Context;
use tokio::sync::Notify;

use super::feed::{Arrived, Feed, Sources};
use super::log::{Change, Positions};
use super::names::Names;
use super::outstanding::Outstanding;
use super::record::{Broken, Record};
use super::{Seat, SharedState, Worker};
use crate::dead_letters::DeadLetters;
use crate::event::{Batch, TopicFilter};
use crate::remote::Remote;

/// Events that are handed over at once.
const AT_ONCE: usize = 256;

/// How often is looked whether a worker without room has some again.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// How long changes gather before they are written.
const GATHER: Duration = Duration::from_millis(5);

/// How often is looked whether the log has got limits.
const LOOK_AT_LIMITS: Duration = Duration::from_secs(10);

/// No two sittings of this process have the same number.
static SITTINGS: AtomicU64 = AtomicU64::new(1);

/// What a sitting needs.
pub(crate) struct Room {
    pub(crate) context: Context,
    pub(crate) remote: Arc<Remote>,
    pub(crate) names: Names,
    pub(crate) gateway: Arc<str>,
    /// What this gateway ships for the site.
    pub(crate) topics: Vec<TopicFilter>,
    pub(crate) dead_letters: Arc<DeadLetters>,
    pub(crate) replicas: usize,
    /// Of the servers.
    pub(crate) max_payload: usize,
}

/// Takes the worker's seat away when the sitting is over, however that comes.
struct Sits<'a> {
    worker: &'a dyn Worker,
    number: u64,
}

impl Drop for Sits<'_> {
    fn drop(&mut self) {
        self.worker.rise(self.number);
    }
}

/// Acts for a seat until that can't go on; the caller drops this when it is to end at once. `may_act` is asked
/// before each event is handed over, `begun` is called when the worker has the seat, and `stop` returns when it is
/// to come to an end in order.
pub(super) async fn sit(
    room: &Room,
    worker: &dyn Worker,
    (seat, token): (Seat, u64),
    may_act: impl Fn() -> bool,
    begun: impl FnOnce(),
    stop: impl Future<Output = ()>,
) -> Result<(), Broken> {
    let (record, image) = Record::take_over(
        room.context.clone(),
        &room.remote,
        &room.names,
        room.replicas,
        room.max_payload,
        (worker.name(), seat),
        (&room.gateway, token),
    )
    .await?;
    let subscriptions = worker.subscriptions();
    let sources = Sources {
        context: room.context.clone(),
        remote: room.remote.clone(),
        all: room.names.all_events(),
        subjects: room.names.events(seat, &subscriptions),
        before_topic: Names::BEFORE_TOPIC,
        subscriptions,
        worker: worker.name().to_owned(),
        dead_letters: room.dead_letters.clone(),
    };
    let mut feed = Feed::new(sources, image.positions.clone());
    let number = SITTINGS.fetch_add(1, Ordering::Relaxed);
    let changed = Arc::new(Notify::new());
    let outstanding = Arc::new(Outstanding::default());
    let state = worker.sit(seat, number, image.entries, changed.clone());
    let _sits = Sits { worker, number };
    begun();

    let mut keeping = Keeping {
        record,
        state,
        positions: image.positions,
    };
    let mut waiting: Batch = Vec::new();
    let mut ending = false;
    let mut looks = tokio::time::interval(LOOK_AT_LIMITS);
    tokio::pin!(stop);
    loop {
        if outstanding.is_abandoned() {
            return Err(Broken::Failed("the worker gave events back".into()));
        }
        if !may_act() || (ending && outstanding.is_empty()) {
            return Ok(());
        }
        if !waiting.is_empty()
            && let Err(back) = worker.offer(std::mem::take(&mut waiting))
        {
            waiting = back;
        }
        let takes = waiting.is_empty() && outstanding.has_room() && !ending;
        tokio::select! {
            () = &mut stop, if !ending => {
                ending = true;
                waiting.clear();
            }
            () = changed.notified() => {
                tokio::time::sleep(GATHER).await;
                keeping.write(&feed).await?;
                if keeping.record.is_long() {
                    keeping.write(&feed).await?;
                }
            }
            arrived = feed.next(), if takes => {
                gather(&mut waiting, arrived?, &mut feed, number, &outstanding);
            }
            () = outstanding.changed() => {}
            _ = looks.tick() => keeping.record.check_limits().await?,
            () = tokio::time::sleep(LOOK_AGAIN), if !waiting.is_empty() => {}
        }
    }
}

fn gather(
    batch: &mut Batch,
    first: Arrived,
    feed: &mut Feed,
    sitting: u64,
    outstanding: &Arc<Outstanding>,
) {
    batch.extend(first.event(sitting, outstanding));
    while batch.len() < AT_ONCE
        && outstanding.has_room()
        && let Some(more) = feed.more()
    {
        batch.extend(more.event(sitting, outstanding));
    }
}

/// What the worker keeps, on its way to the log.
struct Keeping<'a> {
    record: Record<'a>,
    state: Arc<dyn SharedState>,
    positions: Positions,
}

impl Keeping<'_> {
    async fn write(&mut self, feed: &Feed) -> Result<(), Broken> {
        let Some(changes) = self.state.take(self.record.is_long()) else {
            return Ok(());
        };
        let places = changes
            .receipts
            .iter()
            .filter_map(|receipt| receipt.place());
        let positions = feed.positions(places);
        self.positions
            .extend(positions.iter().map(|(stream, at)| (stream.clone(), *at)));
        let change = Change {
            replaces: changes.replaces,
            entries: changes.entries.clone(),
            positions: match changes.replaces {
                true => self.positions.clone(),
                false => positions,
            },
        };
        match self.record.append(change).await {
            Ok(()) => {
                self.state.written(changes, true);
                Ok(())
            }
            // Somebody has deleted it. All that was in it is here.
            Err(Broken::Gone) => {
                self.state.written(changes, false);
                self.record.make_anew().await?;
                Ok(())
            }
            Err(broken) => Err(broken),
        }
    }
}
