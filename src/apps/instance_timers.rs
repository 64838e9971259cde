//! The timers of a live instance, and their way to the thread that rings them and to the app's
//! queue. When the instance goes, they go.

use std::sync::{Arc, Weak};
use std::time::Instant;

use bytes::Bytes;
use parking_lot::Mutex;

use super::services::{AppServices, Share};
use super::timer::AlarmId;
use super::timer_set::{Fired, Now, Requests, TimerSet};
use crate::event::{Event, Lane, Topic, unix_time_ns};

/// The topics of timers' events begin with this. Nobody else can publish below it to an app, for no
/// app can subscribe to it.
pub(super) const TIMER_TOPICS: &str = "$timer/";

pub(super) struct InstanceTimers {
    services: Arc<AppServices>,
    id: AlarmId,
    this: Weak<InstanceTimers>,
    inside: Mutex<Inside>,
}

struct Inside {
    set: TimerSet,
    /// When the thread is to ring.
    alarm: Option<Instant>,
    count: Share,
}

impl InstanceTimers {
    pub(super) fn new(services: Arc<AppServices>) -> Arc<InstanceTimers> {
        Arc::new_cyclic(|this| InstanceTimers {
            id: services.alarms.new_id(),
            this: this.clone(),
            inside: Mutex::new(Inside {
                set: TimerSet::default(),
                alarm: None,
                count: services.timers.share(),
            }),
            services,
        })
    }

    /// Looks at the timers.
    pub(super) fn with<R>(&self, look: impl FnOnce(&TimerSet) -> R) -> R {
        look(&self.inside.lock().set)
    }

    /// A call has ended well: what it has asked for is in force.
    pub(super) fn commit(&self, requests: Requests) {
        let mut inside = self.inside.lock();
        inside.set.apply(requests, read_clocks());
        self.set_alarm(&mut inside);
    }

    /// The app gets this batch now.
    pub(super) fn arrive(&self, batch: &[Event]) {
        let mut inside = self.inside.lock();
        if !inside.set.has_fired() {
            return;
        }
        let now = read_clocks();
        for event in batch {
            if let Some(name) = event.topic.as_str().strip_prefix(TIMER_TOPICS) {
                inside.set.arrived(name, now);
            }
        }
        self.set_alarm(&mut inside);
    }

    /// Called by the thread when it is time.
    pub(super) fn ring(&self) {
        let fired = {
            let mut inside = self.inside.lock();
            inside.alarm = None;
            let fired = inside.set.fire(read_clocks());
            self.set_alarm(&mut inside);
            fired
        };
        if fired.is_empty() {
            return;
        }
        let batch: Vec<_> = fired.iter().map(event).collect();
        let app = self.services.app.upgrade();
        let taken = app.is_some_and(|app| app.timers_fired(batch));
        if !taken {
            let mut inside = self.inside.lock();
            let now = read_clocks();
            for fired in fired {
                inside.set.arrived(&fired.name, now);
            }
            self.set_alarm(&mut inside);
        }
    }

    fn set_alarm(&self, inside: &mut Inside) {
        let next = inside.set.next(read_clocks());
        if next != inside.alarm {
            let alarms = &self.services.alarms;
            alarms.change(self.id, inside.alarm, next, &self.this);
            inside.alarm = next;
        }
        let timers = inside.set.len();
        inside.count.set(timers);
    }
}

impl Drop for InstanceTimers {
    fn drop(&mut self) {
        let alarm = self.inside.get_mut().alarm;
        let alarms = &self.services.alarms;
        alarms.change(self.id, alarm, None, &self.this);
    }
}

fn event(fired: &Fired) -> Event {
    let topic = Topic::new(format!("{TIMER_TOPICS}{}", fired.name));
    Event {
        topic: topic.expect("a timer's name is a topic level"),
        payload: Bytes::new(),
        timestamp_ns: fired.due_unix_ns,
        received: Instant::now(),
        hops: 0,
        lane: Lane::default(),
        retries: None,
        receipt: None,
    }
}

fn read_clocks() -> Now {
    Now {
        instant: Instant::now(),
        unix_ns: unix_time_ns(),
    }
}
