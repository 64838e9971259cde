//! An app of which a site has one, or one for each shard of its topics, as long as this gateway is to act
//! for that. Its events come out of the site's streams, and what it keeps for them goes to the site's log.

use std::sync::Arc;

use tokio::sync::Notify;

use super::{App, Inside, Offer};
use crate::apps::kv::{AppState as KeptState, Kept};
use crate::apps::manifest::Manifest;
use crate::apps::status::{AppState, LogLevel};
use crate::event::{Batch, Event, Lane, TopicFilter};
use crate::pipeline::{Outlet, event_bytes};
use crate::site::{Placement, Seat, SharedState, Worker};

const STANDS_BY: &str = "another gateway of the site runs it, or nobody has the right to now: see `headgate cluster status`";

impl App {
    /// Whether where it runs is not this gateway's alone to say.
    pub(super) fn is_placed(&self, manifest: &Manifest) -> bool {
        self.shared.in_site && manifest.placement != Placement::Everywhere
    }

    /// Whether the gateways of a site share what it keeps.
    pub(in crate::apps) fn is_shared(&self) -> bool {
        let inside = self.inside.lock();
        inside
            .manifest()
            .is_some_and(|manifest| self.is_placed(manifest))
    }

    /// For how many shards it acts.
    pub(super) fn shards(&self) -> u64 {
        let seats = self.services.seats.lock();
        (seats.sittings.len() - usize::from(seats.whole.is_some())) as u64
    }

    pub(super) fn waits_for_seat(&self, inside: &Inside) -> bool {
        let is_singleton = |manifest: &Manifest| manifest.placement == Placement::Singleton;
        self.shared.in_site
            && inside.manifest().is_some_and(is_singleton)
            && self.services.seats.lock().whole.is_none()
    }

    pub(super) fn stand_by(&self, inside: &mut Inside) {
        inside.supervisor.stand_by();
        inside.enter(Some(STANDS_BY.into()));
    }

    /// The sitting is over for which these are. Whoever acts for it next gets them.
    pub(super) fn leave(&self, batch: Batch) {
        let mut inside = self.inside.lock();
        inside.in_call = 0;
        inside.realtime.call = None;
        inside.counters.dropped.stopped += batch.len() as u64;
        give_back(&batch);
        self.after_change(inside, None);
    }

    fn sit_whole(&self) {
        let mut inside = self.inside.lock();
        if inside.supervisor.state() != AppState::Standby {
            return;
        }
        if let Some(component) = inside.component.clone() {
            self.begin(inside, component, false);
        } else {
            // It is being loaded.
            inside.supervisor.start();
            inside.enter(None);
        }
    }

    fn rise_whole(&self) {
        let mut inside = self.inside.lock();
        if !inside.keeps_events() {
            return;
        }
        inside.starts_paused |= inside.supervisor.state() == AppState::Paused;
        inside.draining = false;
        self.stand_by(&mut inside);
        inside.close();
        self.watch.set_abort(true);
        let progress = inside.take_refused();
        self.update_idle(&inside);
        self.schedule(&mut inside);
        drop(inside);
        self.changed.notify_all();
        self.tell_progress(progress);
        self.log
            .gateway_line(LogLevel::Info, "does not act for the site any more");
    }
}

impl Worker for App {
    fn name(&self) -> &str {
        Outlet::name(self)
    }

    fn placement(&self) -> Placement {
        let inside = self.inside.lock();
        inside
            .manifest()
            .map_or(Placement::Everywhere, |manifest| manifest.placement)
    }

    fn subscriptions(&self) -> Vec<TopicFilter> {
        let inside = self.inside.lock();
        inside
            .manifest()
            .map_or_else(Vec::new, |manifest| manifest.subscribe.clone())
    }

    fn is_wanted(&self) -> bool {
        let inside = self.inside.lock();
        let state = inside.supervisor.state();
        !inside.draining
            && !matches!(
                state,
                AppState::Installed | AppState::Stopped | AppState::Quarantined
            )
    }

    fn sit(
        &self,
        seat: Seat,
        sitting: u64,
        kept: Kept,
        changed: Arc<Notify>,
    ) -> Arc<dyn SharedState> {
        let state = KeptState::shared(self.name.clone(), kept, changed);
        let mut seats = self.services.seats.lock();
        seats.sittings.insert(sitting, state.clone());
        if seat == Seat::Whole {
            seats.whole = Some(state.clone());
        }
        drop(seats);
        if seat == Seat::Whole {
            self.log.gateway_line(LogLevel::Info, "acts for the site");
            self.sit_whole();
        }
        Arc::new(state)
    }

    fn rise(&self, sitting: u64) {
        let mut seats = self.services.seats.lock();
        let Some(state) = seats.sittings.remove(&sitting) else {
            return;
        };
        // Another sitting may have begun.
        let is_whole = seats
            .whole
            .take_if(|whole| Arc::ptr_eq(whole, &state))
            .is_some();
        drop(seats);
        state.seal();
        if is_whole {
            self.rise_whole();
        }
    }

    fn offer(&self, batch: Batch) -> Result<(), Batch> {
        let inside = self.inside.lock();
        let bytes = batch.iter().map(event_bytes).sum();
        if !inside.is_open() || !inside.has_room(Lane::Transactional, batch.len(), bytes) {
            return Err(batch);
        }
        drop(inside);
        match Outlet::offer(self, batch) {
            Offer::Taken => Ok(()),
            Offer::Full(batch) => Err(batch),
        }
    }
}

/// Whoever acts for their sitting next is to get these.
pub(super) fn give_back(batch: &[Event]) {
    for event in batch {
        if let Some(receipt) = &event.receipt
            && receipt.place().is_some()
        {
            receipt.abandon();
        }
    }
}

/// Takes out of the batch all from the first event on that is not of the same sitting as those before.
pub(super) fn split_off_others(batch: &mut Batch) -> Batch {
    let sitting = batch.first().and_then(Event::sitting);
    let same = |event: &&Event| event.sitting() == sitting;
    let first = batch.iter().take_while(same).count();
    batch.split_off(first)
}
