//! The mappings of which a site has one of each, as long as this gateway is to run them. Their events come out of
//! the site's streams, and the values of their sources go to the site's log, not to this gateway's store.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::Notify;

use super::kept::Sitting;
use super::{Inside, Part, Shared};
use crate::event::{Batch, Event, Lane, TopicFilter};
use crate::mappings::Sent;
use crate::pipeline::{Queued, event_bytes};
use crate::site::{Entries, Placement, Seat, SharedState, Worker};

/// No app can have this name.
const NAME: &str = "=mappings";

/// What is said of each output of a mapping that another gateway runs.
pub(super) const STANDS_BY: &str = "another gateway of the site runs it, or nobody has the right to now: see `headgate cluster status`";

impl Shared {
    /// Whether a mapping of this name is one that the site has once.
    pub(super) fn is_singleton(&self, name: &str) -> bool {
        self.config.singletons.contains(name)
    }

    /// Has those of the site begin with what is kept for them, or forget all if they are not to run here.
    pub(super) fn take_seat(&self, sitting: Option<Arc<Sitting>>) {
        let sitting = sitting.filter(|sitting| !sitting.is_over());
        let mut inside = self.inside.lock();
        let Inside { site, .. } = &mut *inside;
        for (name, mapping) in site.set.iter_mut() {
            mapping.forget();
            if let Some(sitting) = &sitting {
                mapping.restore(sitting.values(name));
            }
        }
        site.receipts.clear();
        inside.sitting = sitting;
    }

    /// Has those of the site handle their events. Returns how many of these were handled, and how many events
    /// were made.
    pub(super) fn act_for_site(&self, mut batch: Batch, sent: &mut Vec<Sent>) -> (usize, usize) {
        let sitting = self.inside.lock().sitting.clone();
        let number = sitting.as_deref().map(Sitting::number);
        let others: Batch = batch
            .extract_if(.., |event| event.sitting() != number)
            .collect();
        self.leave(&others);
        let Some(sitting) = sitting else {
            return (0, 0);
        };
        let site: fn(&mut Inside) -> &mut Part = |inside| &mut inside.site;
        let Some(handled) = self.handle(&batch, site, || sitting.is_over(), sent) else {
            self.leave(&batch);
            return (0, 0);
        };
        let mut inside = self.inside.lock();
        let site = site(&mut inside);
        if handled.journaled {
            let nothing_waits = site.set.next_time().is_none();
            let finished = site.finished(nothing_waits).into_iter();
            let finished = finished.map(|(_, receipt)| receipt).collect();
            let mut values = Vec::new();
            for (name, mapping) in site.set.iter_mut() {
                let changed = mapping.take_changed().into_iter();
                values.extend(changed.map(|stored| (name, stored)));
            }
            sitting.keep(values, finished);
        } else {
            // Also those of events that have waited for earlier ones until now.
            let receipts = site.receipts.iter();
            receipts.for_each(|(_, receipt)| receipt.abandon());
        }
        (batch.len(), handled.published)
    }

    /// Their sitting is over. Whoever acts for it next gets them.
    fn leave(&self, batch: &[Event]) {
        let mut waiting = self.waiting.lock();
        waiting.in_hand -= batch.len();
        self.drop_at_the_end(&mut waiting, batch);
    }

    fn seat_changed(&self) {
        self.waiting.lock().seat_changed = true;
        self.wake.notify_one();
    }
}

/// None of these waits for an expression that runs.
impl Worker for Shared {
    fn name(&self) -> &str {
        NAME
    }

    fn placement(&self) -> Placement {
        let waiting = self.waiting.lock();
        let sitting = waiting.sitting.as_deref();
        match waiting.subscriptions.is_empty() && !sitting.is_some_and(Sitting::is_to_forget) {
            true => Placement::Everywhere,
            false => Placement::Singleton,
        }
    }

    fn subscriptions(&self) -> Vec<TopicFilter> {
        self.waiting.lock().subscriptions.clone()
    }

    fn is_wanted(&self) -> bool {
        self.waiting.lock().ends.is_none()
    }

    fn sit(
        &self,
        _: Seat,
        number: u64,
        kept: Entries,
        changed: Arc<Notify>,
    ) -> Arc<dyn SharedState> {
        let mut waiting = self.waiting.lock();
        let before = waiting.sitting.as_deref();
        before.inspect(|before| before.end());
        let sitting = Arc::new(Sitting::new(number, kept, changed, before));
        waiting.sitting = Some(sitting.clone());
        drop(waiting);
        self.seat_changed();
        Arc::new(sitting)
    }

    fn rise(&self, number: u64) {
        let sitting = self.waiting.lock().sitting.clone();
        // Another one may have begun.
        if let Some(sitting) = sitting.filter(|sitting| sitting.number() == number) {
            sitting.end();
            self.seat_changed();
        }
    }

    fn offer(&self, batch: Batch) -> Result<(), Batch> {
        let bytes = batch.iter().map(event_bytes).sum();
        let bound = self.config.queue_events;
        let mut waiting = self.waiting.lock();
        let has_room = waiting
            .queue
            .has_room(Lane::Transactional, batch.len(), bytes, bound);
        if waiting.ends.is_some() || !has_room {
            return Err(batch);
        }
        waiting.counts.offered += batch.len() as u64;
        waiting.queue.push(Lane::Transactional, Queued::new(batch));
        self.idle.store(false, Ordering::Release);
        drop(waiting);
        self.wake.notify_one();
        Ok(())
    }
}
