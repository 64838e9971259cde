//! From one version of an app to the next between two batches, and back if the next one fails.

use std::time::Instant;

use super::{App, Generation, Inside, Note, Package};
use crate::apps::engine::LoadedComponent;
use crate::apps::kv::Kept;
use crate::apps::manifest::Manifest;
use crate::apps::status::{AppState, LogLevel};

/// The version before, as long as there is a way back.
#[derive(Clone)]
pub(in crate::apps) struct Previous {
    pub(in crate::apps) package: Package,
    /// None: it has to be loaded first.
    pub(in crate::apps) component: Option<LoadedComponent>,
    /// What the app had kept, if the next version keeps it in another format.
    pub(in crate::apps) kept: Option<Kept>,
    /// Batches that the next version has to do well still, if it is on trial: until then a failure
    /// brings this one back. With 0, all that counts is its start.
    pub(in crate::apps) trial: Option<u32>,
}

impl Previous {
    pub(super) fn version(&self) -> String {
        self.package.version().to_owned()
    }
}

/// A version that is to take over.
pub(in crate::apps) struct Successor {
    pub(in crate::apps) package: Package,
    pub(in crate::apps) component: LoadedComponent,
    /// What there is to go back to.
    pub(in crate::apps) previous: Option<Previous>,
    /// What the app is to find in the place of what it keeps now.
    pub(in crate::apps) kept: Option<Kept>,
}

/// An app that gets no turn until this goes.
pub(in crate::apps) struct Held<'a>(&'a App);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut inside = self.0.inside.lock();
        inside.held = false;
        if inside.is_up() {
            self.0.schedule(&mut inside);
        }
    }
}

impl App {
    pub(in crate::apps) fn previous(&self) -> Option<Previous> {
        self.inside.lock().previous.clone()
    }

    pub(in crate::apps) fn is_on_trial(&self) -> bool {
        self.inside.lock().trial().is_some()
    }

    /// Tells a version that comes from the store how it got there.
    pub(in crate::apps) fn set_previous(&self, previous: Option<Previous>) {
        self.inside.lock().previous = previous;
    }

    /// Has what comes wait, from the end of the present call on. None: the call did not end in time,
    /// and all goes on.
    pub(in crate::apps) fn hold(&self, deadline: Instant) -> Option<Held<'_>> {
        self.inside.lock().held = true;
        let held = Held(self);
        self.wait_while(deadline, |inside| inside.scheduled);
        let is_at_rest = !self.inside.lock().scheduled;
        is_at_rest.then_some(held)
    }

    /// Ends the present call, as if it had failed.
    pub(in crate::apps) fn interrupt(&self) {
        self.watch.set_abort(true);
    }

    /// Puts another version into the place of the present one: at once if the app is stopped, else
    /// between two batches. What waits, waits for the new one. The old instance is there until the
    /// new one is configured; then it goes.
    pub(in crate::apps) fn switch(&self, to: Successor) {
        let mut inside = self.inside.lock();
        let state = inside.supervisor.state();
        if let Some(kept) = to.kept {
            self.services.state.restore(kept);
            self.services.state.reopen();
        }
        inside.package = to.package;
        inside.previous = to.previous;
        if state == AppState::Stopped {
            inside.component = None;
            return;
        }
        inside.starts_paused |= state == AppState::Paused;
        // A line has one holder at a time, so the old instance can't stay while the new one starts.
        let wants_lines = |manifest: &Manifest| !manifest.devices.gpio.is_empty();
        let keeps = !inside.manifest().is_some_and(wants_lines);
        self.begin(inside, to.component, keeps);
    }

    /// A start of this generation went well, or so many batches.
    pub(super) fn passed(
        &self,
        inside: &mut Inside,
        generation: Generation,
        batches: u32,
    ) -> Option<Note> {
        if generation != inside.generation {
            return None;
        }
        let previous = inside.previous.as_mut()?;
        let left = previous.trial?.saturating_sub(batches);
        previous.trial = Some(left).filter(|left| *left > 0);
        if previous.trial.is_some() {
            return None;
        }
        // Both are in the store, for who wants to go back later.
        previous.component = None;
        previous.kept = None;
        let component = inside.package.component;
        self.shared.upkeep.trust(&self.name, component);
        let message = format!("version {} has passed its trial", inside.package.version());
        Some(Note(LogLevel::Info, message))
    }

    /// The new version has failed on trial: the one before takes over again.
    pub(super) fn roll_back(&self, inside: &mut Inside, reason: &str) -> Option<Note> {
        let previous = inside.previous.take()?;
        let failed = inside.package.version().to_owned();
        let component = std::mem::replace(&mut inside.package, previous.package).component;
        inside.component = previous.component;
        let restored = previous.kept.map(|kept| {
            let state = self.services.state.clone();
            state.restore(kept);
            state
        });
        inside.start_afresh(self.shared.restart);
        inside.supervisor.rolled_back();
        inside.reroutes = true;
        let message = format!(
            "version {failed} failed on trial, and version {} is back: {reason}",
            inside.package.version()
        );
        inside.last_error = Some(message.clone());
        inside.enter(None);
        self.shared
            .upkeep
            .roll_back(&self.name, component, restored);
        if inside.component.is_none()
            && let Some(this) = self.this.upgrade()
        {
            self.shared.upkeep.load(this, inside.generation);
        }
        Some(Note(LogLevel::Error, message))
    }
}

impl Inside {
    /// Whether a failure of this generation is for the version before to mend.
    pub(super) fn fails_trial(&self, generation: Generation) -> bool {
        self.trial().is_some() && generation == self.generation
    }

    /// Batches that have to go well still, if the package is on trial.
    pub(super) fn trial(&self) -> Option<u32> {
        self.previous.as_ref()?.trial
    }
}
