//! Which segments are too old.
//!
//! The wall clock may jump, so it is asked only about what an earlier run has left; what this run has written is
//! measured with a clock that only goes forward.

use std::time::{Duration, Instant};

use super::segment::Segment;
use crate::event::unix_time_ns;

/// A segment takes in events for this part of the greatest age: so much longer than it the oldest event of one
/// may stay.
const PARTS: u32 = 8;

/// How old events may become.
#[derive(Clone, Copy)]
pub(super) struct Retention {
    max_age: Duration,
    /// When this run has begun.
    opened: Instant,
}

/// A moment by both clocks.
#[derive(Clone, Copy)]
pub(super) struct Now {
    pub(super) instant: Instant,
    /// Nanoseconds since 1970.
    pub(super) wall_ns: u64,
}

impl Now {
    pub(super) fn read() -> Now {
        Now {
            instant: Instant::now(),
            wall_ns: unix_time_ns(),
        }
    }
}

impl Retention {
    pub(super) fn new(max_age: Duration) -> Retention {
        Retention {
            max_age,
            opened: Instant::now(),
        }
    }

    /// Whether a segment that was begun at `begun` is to take in no more.
    pub(super) fn is_full(&self, begun: Instant, now: Now) -> bool {
        now.instant.saturating_duration_since(begun) >= self.max_age / PARTS
    }

    /// Whether all events in a segment are too old.
    pub(super) fn is_over(&self, segment: &Segment, now: Now) -> bool {
        self.age(segment, now) >= self.max_age
    }

    /// How long ago the newest event of a segment came, at least.
    fn age(&self, segment: &Segment, now: Now) -> Duration {
        if let Some(written) = segment.written {
            return now.instant.saturating_duration_since(written);
        }
        // The clock may have been set back in between.
        let known_ns = [segment.begun_ns, segment.ended_ns].into_iter().flatten();
        // What lies in the future was said by a clock that was wrong.
        let ended_ns = known_ns.filter(|ns| *ns <= now.wall_ns).max();
        let by_wall = ended_ns.map_or(0, |ended_ns| now.wall_ns - ended_ns);
        // Whatever the clocks say, it came before this run.
        let this_run = now.instant.saturating_duration_since(self.opened);
        Duration::from_nanos(by_wall).max(this_run)
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn ns(hours: u64) -> u64 {
        HOUR.as_nanos() as u64 * hours
    }

    /// Of an earlier run, begun and ended when the clock showed these hours.
    fn left(begun: u64, ended: u64) -> Segment {
        Segment {
            first: 0,
            path: PathBuf::new(),
            bytes: 0,
            begun_ns: Some(ns(begun)),
            ended_ns: Some(ns(ended)),
            written: None,
        }
    }

    fn retention() -> Retention {
        Retention::new(24 * HOUR)
    }

    /// So many hours after the start, when the clock shows this hour.
    fn now(retention: &Retention, hours: u32, wall_hour: u64) -> Now {
        Now {
            instant: retention.opened + hours * HOUR,
            wall_ns: ns(wall_hour),
        }
    }

    #[test]
    fn a_segment_is_as_old_as_its_newest_event() {
        let retention = retention();
        let over = |wall_hour| retention.is_over(&left(50, 90), now(&retention, 0, wall_hour));
        assert!(!over(113));
        assert!(over(114));
    }

    #[test]
    fn what_this_run_has_written_ages_by_a_clock_that_can_not_be_set() {
        let retention = retention();
        let segment = Segment {
            written: Some(retention.opened + HOUR),
            ..left(101, 101)
        };
        for wall_hour in [0, 101, 5000] {
            let over = |hours| retention.is_over(&segment, now(&retention, hours, wall_hour));
            assert_eq!((over(24), over(25)), (false, true), "{wall_hour}");
        }
    }

    #[test]
    fn a_clock_that_was_set_back_removes_nothing_early_and_holds_up_nothing_for_ever() {
        let retention = retention();
        let over = |begun, ended, hours, wall_hour| {
            retention.is_over(&left(begun, ended), now(&retention, hours, wall_hour))
        };
        // It showed 110 at the end, and then 100, where the next segment was begun.
        assert!(!over(109, 100, 0, 101));
        assert!(!over(109, 100, 20, 132), "its events may have come at 109");
        assert!(over(109, 100, 20, 133));
        // It shows 100 now.
        assert!(!over(109, 110, 23, 123));
        assert!(over(109, 110, 24, 124));
        // It showed a time that is far away.
        assert!(!over(900_000, 900_001, 23, 124));
        assert!(over(900_000, 900_001, 24, 125));
    }

    #[test]
    fn a_clock_that_began_in_1970_does_not_make_old_what_came_before() {
        let retention = retention();
        let over = |wall_hour| retention.is_over(&left(99, 0), now(&retention, 0, wall_hour));
        assert!(!over(1) && !over(122));
        assert!(over(123));
    }

    #[test]
    fn a_header_that_can_not_be_read_counts_for_nothing() {
        let retention = retention();
        let unknown = Segment {
            begun_ns: None,
            ended_ns: None,
            ..left(0, 0)
        };
        let over = |hours| retention.is_over(&unknown, now(&retention, hours, 5000));
        assert!(!over(23));
        assert!(over(24));
    }
}
