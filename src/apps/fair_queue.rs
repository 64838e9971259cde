//! Whose turn is next: weighted fair queueing. Each has a virtual time, which runs on while it works,
//! the slower the more weight it has, and the one that is furthest behind comes first. Without I/O.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::time::Duration;

/// How much somebody has worked, in nanoseconds at weight [`BASE_WEIGHT`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct VirtualTime(u64);

/// At this weight, virtual time is time.
pub(super) const BASE_WEIGHT: u32 = 100;

impl VirtualTime {
    /// After work of this length.
    pub(super) fn after(self, worked: Duration, weight: u32) -> VirtualTime {
        let worked = u64::try_from(worked.as_nanos()).unwrap_or(u64::MAX);
        let virtual_time = worked.saturating_mul(BASE_WEIGHT.into()) / u64::from(weight.max(1));
        VirtualTime(self.0.saturating_add(virtual_time))
    }
}

/// Those that wait for a turn.
pub(super) struct FairQueue<T> {
    waiting: BinaryHeap<Waiting<T>>,
    /// Of the one whose turn came last: who was away begins here, and can't make up for the time.
    now: VirtualTime,
    /// So that those with the same time come in the order in which they came.
    next: u64,
}

struct Waiting<T> {
    time: VirtualTime,
    number: u64,
    item: T,
}

impl<T> Default for FairQueue<T> {
    fn default() -> Self {
        FairQueue {
            waiting: BinaryHeap::new(),
            now: VirtualTime::default(),
            next: 0,
        }
    }
}

impl<T> FairQueue<T> {
    pub(super) fn push(&mut self, item: T, time: VirtualTime) {
        let time = time.max(self.now);
        let number = self.next;
        self.next += 1;
        self.waiting.push(Waiting { time, number, item });
    }

    /// The next one, with its virtual time.
    pub(super) fn pop(&mut self) -> Option<(T, VirtualTime)> {
        let Waiting { time, item, .. } = self.waiting.pop()?;
        self.now = time;
        Some((item, time))
    }
}

impl<T> Waiting<T> {
    fn rank(&self) -> (VirtualTime, u64) {
        (self.time, self.number)
    }
}

impl<T> PartialEq for Waiting<T> {
    fn eq(&self, other: &Self) -> bool {
        self.rank() == other.rank()
    }
}

impl<T> Eq for Waiting<T> {}

impl<T> PartialOrd for Waiting<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Waiting<T> {
    /// The heap hands out the greatest: the one with the least time.
    fn cmp(&self, other: &Self) -> Ordering {
        other.rank().cmp(&self.rank())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Turns that each of these gets while they all always want one: weight, and milliseconds a turn.
    fn turns(workers: &[(u32, u64)], rounds: usize) -> Vec<usize> {
        let mut queue = FairQueue::default();
        (0..workers.len()).for_each(|worker| queue.push(worker, VirtualTime::default()));
        let mut turns = vec![0; workers.len()];
        for _ in 0..rounds {
            let (worker, time) = queue.pop().unwrap();
            turns[worker] += 1;
            let (weight, millis) = workers[worker];
            queue.push(worker, time.after(Duration::from_millis(millis), weight));
        }
        turns
    }

    #[test]
    fn time_is_shared_by_weight_however_long_a_turn_is() {
        assert_eq!(turns(&[(100, 1), (100, 1)], 100), [50, 50]);
        let counted = turns(&[(300, 1), (100, 1)], 400);
        assert!((299..=301).contains(&counted[0]), "{counted:?}");
        // The greedy one has a hundredth of the turns, and half of the time.
        let counted = turns(&[(100, 1), (100, 100)], 1010);
        assert!((9..=11).contains(&counted[1]), "{counted:?}");
    }

    #[test]
    fn equals_come_in_the_order_in_which_they_came() {
        let mut queue = FairQueue::default();
        for item in ["a", "b", "c"] {
            queue.push(item, VirtualTime::default());
        }
        let order = [queue.pop(), queue.pop(), queue.pop()].map(|found| found.unwrap().0);
        assert_eq!(order, ["a", "b", "c"]);
        assert!(queue.pop().is_none());
    }

    #[test]
    fn who_was_away_does_not_make_up_for_it() {
        let mut queue = FairQueue::default();
        let late = VirtualTime::default().after(Duration::from_secs(10), BASE_WEIGHT);
        queue.push("busy", late);
        assert_eq!(queue.pop(), Some(("busy", late)));
        queue.push("busy", late.after(Duration::from_millis(1), BASE_WEIGHT));
        queue.push("away", VirtualTime::default());
        assert_eq!(queue.pop(), Some(("away", late)));
        let back = late.after(Duration::from_millis(2), BASE_WEIGHT);
        queue.push("away", back);
        assert_eq!(queue.pop().unwrap().0, "busy");
    }

    #[test]
    fn no_time_overflows() {
        let end = VirtualTime(u64::MAX - 1);
        assert_eq!(end.after(Duration::MAX, 0), VirtualTime(u64::MAX));
    }
}
