//! When which sensor is to be read: a state machine without I/O. It is told the time, and what has
//! been read.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct SensorId(u64);

#[derive(Debug, Default)]
pub(super) struct Schedule {
    entries: BTreeMap<SensorId, Entry>,
    /// Those that nobody reads at the moment.
    due: BTreeSet<(Instant, SensorId)>,
    /// Devices that are being read, and by whom. Stays when the sensor goes, until that read has
    /// ended.
    busy: BTreeMap<SensorId, Box<str>>,
    last_id: u64,
}

#[derive(Debug)]
struct Entry {
    device: Box<str>,
    interval: Duration,
    at: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Now. [`Schedule::done`] is to be called afterwards.
    Read(SensorId),
    /// Look again then, or when something has changed.
    At(Instant),
    /// Look again when something has changed.
    Never,
}

impl Schedule {
    /// A sensor is to be read every `interval` (not zero), for the first time at once.
    pub(super) fn add(&mut self, device: &str, interval: Duration, now: Instant) -> SensorId {
        self.last_id += 1;
        let id = SensorId(self.last_id);
        let entry = Entry {
            device: device.into(),
            interval,
            at: now,
        };
        self.entries.insert(id, entry);
        self.due.insert((now, id));
        id
    }

    pub(super) fn remove(&mut self, id: SensorId) {
        if let Some(entry) = self.entries.remove(&id) {
            self.due.remove(&(entry.at, id));
        }
    }

    /// What to do now. A sensor whose device is being read waits for that.
    pub(super) fn next(&mut self, now: Instant) -> Next {
        let busy = &self.busy;
        let entries = &self.entries;
        let free = self.due.iter().find(|(_, id)| {
            let device = entries.get(id).map(|entry| &entry.device);
            device.is_some_and(|device| !busy.values().any(|other| other == device))
        });
        let Some(&(at, id)) = free else {
            return Next::Never;
        };
        if at > now {
            return Next::At(at);
        }
        self.due.remove(&(at, id));
        if let Some(entry) = self.entries.get(&id) {
            self.busy.insert(id, entry.device.clone());
        }
        Next::Read(id)
    }

    /// The sensor was read. What it has missed meanwhile is missed. False: it was removed.
    pub(super) fn done(&mut self, id: SensorId, now: Instant) -> bool {
        self.busy.remove(&id);
        let Some(entry) = self.entries.get_mut(&id) else {
            return false;
        };
        let late = now.saturating_duration_since(entry.at).as_nanos();
        let intervals = late / entry.interval.as_nanos() + 1;
        entry.at += Duration::from_nanos((intervals * entry.interval.as_nanos()) as u64);
        self.due.insert((entry.at, id));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_sensor_is_read_at_once_and_then_at_its_pace() {
        let start = Instant::now();
        let mut schedule = Schedule::default();
        assert_eq!(schedule.next(start), Next::Never);
        let id = schedule.add("a", 10 * MS, start);
        assert_eq!(schedule.next(start), Next::Read(id));
        assert_eq!(schedule.next(start), Next::Never);
        assert!(schedule.done(id, start + 3 * MS));
        assert_eq!(schedule.next(start + 9 * MS), Next::At(start + 10 * MS));
        assert_eq!(schedule.next(start + 10 * MS), Next::Read(id));
    }

    #[test]
    fn what_a_slow_sensor_has_missed_is_missed() {
        let start = Instant::now();
        let mut schedule = Schedule::default();
        let id = schedule.add("a", 10 * MS, start);
        assert_eq!(schedule.next(start), Next::Read(id));
        assert!(schedule.done(id, start + 35 * MS));
        assert_eq!(schedule.next(start + 35 * MS), Next::At(start + 40 * MS));
    }

    #[test]
    fn a_device_is_read_by_one_at_a_time_and_hinders_no_other() {
        let start = Instant::now();
        let mut schedule = Schedule::default();
        let stuck = schedule.add("a", 10 * MS, start);
        let waits = schedule.add("a", 10 * MS, start);
        let other = schedule.add("b", 10 * MS, start);
        assert_eq!(schedule.next(start), Next::Read(stuck));
        assert_eq!(schedule.next(start), Next::Read(other));
        assert_eq!(schedule.next(start), Next::Never);
        assert!(schedule.done(other, start));
        assert_eq!(schedule.next(start + 10 * MS), Next::Read(other));
        assert!(schedule.done(stuck, start + 10 * MS));
        assert_eq!(schedule.next(start + 10 * MS), Next::Read(waits));
    }

    #[test]
    fn a_sensor_that_is_removed_while_it_is_read_keeps_its_device_until_then() {
        let start = Instant::now();
        let mut schedule = Schedule::default();
        let gone = schedule.add("a", 10 * MS, start);
        assert_eq!(schedule.next(start), Next::Read(gone));
        schedule.remove(gone);
        let fresh = schedule.add("a", 10 * MS, start);
        assert_eq!(schedule.next(start), Next::Never);
        assert!(!schedule.done(gone, start));
        assert_eq!(schedule.next(start), Next::Read(fresh));
        schedule.remove(fresh);
        assert!(!schedule.done(fresh, start));
        assert_eq!(schedule.next(start + 20 * MS), Next::Never);
        assert!(schedule.busy.is_empty() && schedule.entries.is_empty());
    }
}
