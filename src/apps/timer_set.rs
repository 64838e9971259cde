//! The timers of one instance: a state machine without I/O. It is told the time, says what is due
//! and when to look again.
//!
//! A timer has at most one event on its way: until the app has got it, it does not fire again. So an
//! app that is late finds one event for each timer, and not a queue full of them.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Shortest period, and soonest time to fire. An app can't be kept busier than a thousand events a
/// second and timer.
pub(super) const SHORTEST: Duration = Duration::from_millis(1);

/// The wall clock can be set, and nobody tells: with a timer that follows it, look this often.
const LOOK_AT_WALL_CLOCK: Duration = Duration::from_secs(1);

/// Beyond this, a timer is as good as none. `Instant` has no room for much more.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 86_400);

/// What both clocks say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    pub(super) instant: Instant,
    /// Nanoseconds since the Unix epoch.
    pub(super) unix_ns: u64,
}

/// What an app asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Interval(Duration),
    Once(Duration),
    /// Nanoseconds since the Unix epoch.
    Wall(u64),
    Cancel,
}

/// The requests of one call, by the timer's name.
pub(super) type Requests = BTreeMap<Box<str>, Request>;

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Fired {
    pub(super) name: Box<str>,
    /// When it was due, in nanoseconds since the Unix epoch.
    pub(super) due_unix_ns: u64,
}

#[derive(Debug, Default)]
pub(super) struct TimerSet {
    timers: BTreeMap<Box<str>, Timer>,
    /// Timers that are not spent.
    live: usize,
    /// Timers with an event on its way.
    on_the_way: usize,
}

#[derive(Debug)]
struct Timer {
    next: Next,
    /// Its event has not got to the app yet.
    on_the_way: bool,
}

#[derive(Debug)]
enum Next {
    Interval {
        period: Duration,
        at: Instant,
    },
    Once(Instant),
    Wall {
        unix_ns: u64,
        not_before: Instant,
    },
    /// Has fired for the last time. Stays until the app has got the event.
    Spent,
}

impl TimerSet {
    /// Timers that will fire.
    pub(super) fn len(&self) -> usize {
        self.live
    }

    /// Whether events are on their way.
    pub(super) fn has_fired(&self) -> bool {
        self.on_the_way > 0
    }

    /// Whether a timer of this name will fire, once `requests` are in force.
    pub(super) fn has(&self, requests: &Requests, name: &str) -> bool {
        match requests.get(name) {
            Some(request) => *request != Request::Cancel,
            None => self.timers.get(name).is_some_and(|timer| timer.is_live()),
        }
    }

    /// How many timers will fire, once `requests` are in force; and how many are kept then.
    pub(super) fn count(&self, requests: &Requests) -> (usize, usize) {
        let (mut live, mut kept) = (self.live, self.timers.len());
        for (name, request) in requests {
            let timer = self.timers.get(name);
            let is_live = timer.is_some_and(Timer::is_live);
            match request {
                Request::Cancel => live -= usize::from(is_live),
                _ => {
                    live += usize::from(!is_live);
                    kept += usize::from(timer.is_none());
                }
            }
        }
        (live, kept)
    }

    pub(super) fn apply(&mut self, requests: Requests, now: Now) {
        for (name, request) in requests {
            let at = |delay: Duration| now.instant + delay.clamp(SHORTEST, LONGEST);
            let next = match request {
                Request::Interval(period) => Next::Interval {
                    period: period.clamp(SHORTEST, LONGEST),
                    at: at(period),
                },
                Request::Once(delay) => Next::Once(at(delay)),
                Request::Wall(unix_ns) => Next::Wall {
                    unix_ns,
                    not_before: at(SHORTEST),
                },
                Request::Cancel => Next::Spent,
            };
            let before = self.timers.remove(&name);
            self.live -= usize::from(before.as_ref().is_some_and(Timer::is_live));
            let timer = Timer {
                next,
                on_the_way: before.is_some_and(|timer| timer.on_the_way),
            };
            self.live += usize::from(timer.is_live());
            if timer.is_live() || timer.on_the_way {
                self.timers.insert(name, timer);
            }
        }
    }

    /// When to call [`TimerSet::fire`]; none if never, as things stand.
    pub(super) fn next(&self, now: Now) -> Option<Instant> {
        self.timers
            .values()
            .filter(|timer| !timer.on_the_way)
            .filter_map(|timer| match timer.next {
                Next::Interval { at, .. } | Next::Once(at) => Some(at),
                Next::Wall {
                    unix_ns,
                    not_before,
                } => {
                    let left = Duration::from_nanos(unix_ns.saturating_sub(now.unix_ns));
                    Some(not_before.max(now.instant + left.min(LOOK_AT_WALL_CLOCK)))
                }
                Next::Spent => None,
            })
            .min()
    }

    /// What is due. [`TimerSet::arrived`] is to be called for each, when the app has got it.
    pub(super) fn fire(&mut self, now: Now) -> Vec<Fired> {
        let mut fired = Vec::new();
        for (name, timer) in &mut self.timers {
            if timer.on_the_way {
                continue;
            }
            let due = |at: Instant| {
                let late = now.instant.checked_duration_since(at)?;
                Some(now.unix_ns.saturating_sub(late.as_nanos() as u64))
            };
            let due_unix_ns = match timer.next {
                Next::Interval { at, .. } | Next::Once(at) => due(at),
                Next::Wall {
                    unix_ns,
                    not_before,
                } => (unix_ns <= now.unix_ns && not_before <= now.instant).then_some(unix_ns),
                Next::Spent => None,
            };
            let Some(due_unix_ns) = due_unix_ns else {
                continue;
            };
            timer.on_the_way = true;
            self.on_the_way += 1;
            if !matches!(timer.next, Next::Interval { .. }) {
                timer.next = Next::Spent;
                self.live -= 1;
            }
            fired.push(Fired {
                name: name.clone(),
                due_unix_ns,
            });
        }
        fired
    }

    /// The app has got the event of this timer, or never will. What an interval has missed by then
    /// is missed.
    pub(super) fn arrived(&mut self, name: &str, now: Now) {
        let Some(timer) = self.timers.get_mut(name).filter(|timer| timer.on_the_way) else {
            return;
        };
        timer.on_the_way = false;
        self.on_the_way -= 1;
        match &mut timer.next {
            Next::Interval { period, at } => *at = first_after(*at, *period, now.instant),
            Next::Spent => {
                self.timers.remove(name);
            }
            Next::Once(_) | Next::Wall { .. } => {}
        }
    }
}

impl Timer {
    fn is_live(&self) -> bool {
        !matches!(self.next, Next::Spent)
    }
}

/// The first of `at`, `at + period`, … that is not over.
fn first_after(at: Instant, period: Duration, now: Instant) -> Instant {
    let Some(late) = now.checked_duration_since(at) else {
        return at;
    };
    let periods = late.as_nanos() / period.as_nanos() + 1;
    at + Duration::from_nanos((periods * period.as_nanos()) as u64)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const START_NS: u64 = 1_763_725_320_000_000_000;

    struct Clock {
        start: Instant,
        now: Duration,
        /// How far the wall clock was set.
        set: i64,
    }

    impl Clock {
        fn new() -> Clock {
            Clock {
                start: Instant::now(),
                now: Duration::ZERO,
                set: 0,
            }
        }

        fn now(&self) -> Now {
            let unix_ns = START_NS + self.now.as_nanos() as u64;
            Now {
                instant: self.start + self.now,
                unix_ns: unix_ns.saturating_add_signed(self.set),
            }
        }

        fn after(&mut self, time: Duration) -> Now {
            self.now += time;
            self.now()
        }
    }

    fn requests<const N: usize>(requests: [(&str, Request); N]) -> Requests {
        let requests = requests.into_iter();
        requests
            .map(|(name, request)| (name.into(), request))
            .collect()
    }

    /// `name milliseconds since the start` of what fires now.
    fn fire(set: &mut TimerSet, now: Now) -> Vec<String> {
        let fired = set.fire(now);
        let line = |fired: &Fired| {
            let ms = (fired.due_unix_ns as i64 - START_NS as i64) / 1_000_000;
            format!("{} {ms}", fired.name)
        };
        fired.iter().map(line).collect()
    }

    #[test]
    fn an_interval_fires_each_time_and_keeps_its_pace() {
        let mut clock = Clock::new();
        let mut set = TimerSet::default();
        set.apply(requests([("a", Request::Interval(10 * MS))]), clock.now());
        assert_eq!(set.next(clock.now()), Some(clock.now().instant + 10 * MS));
        assert_eq!(fire(&mut set, clock.after(9 * MS)), [""; 0]);
        assert_eq!(fire(&mut set, clock.after(2 * MS)), ["a 10"]);
        set.arrived("a", clock.after(2 * MS));
        assert_eq!(fire(&mut set, clock.after(6 * MS)), [""; 0]);
        assert_eq!(fire(&mut set, clock.after(MS)), ["a 20"]);
    }

    #[test]
    fn an_app_that_is_late_gets_one_event_for_all_that_it_has_missed() {
        let mut clock = Clock::new();
        let mut set = TimerSet::default();
        set.apply(requests([("a", Request::Interval(10 * MS))]), clock.now());
        assert_eq!(fire(&mut set, clock.after(15 * MS)), ["a 10"]);
        // On its way: nobody has to wake up for it.
        assert_eq!(set.next(clock.now()), None);
        assert_eq!(fire(&mut set, clock.after(40 * MS)), [""; 0]);
        set.arrived("a", clock.now());
        assert_eq!(fire(&mut set, clock.now()), [""; 0]);
        assert_eq!(fire(&mut set, clock.after(5 * MS)), ["a 60"]);
    }

    #[test]
    fn a_timer_that_fires_once_is_gone_after_that() {
        let mut clock = Clock::new();
        let mut set = TimerSet::default();
        set.apply(
            requests([("a", Request::Once(Duration::ZERO))]),
            clock.now(),
        );
        assert_eq!(set.len(), 1);
        assert_eq!(
            fire(&mut set, clock.now()),
            [""; 0],
            "not within the millisecond"
        );
        assert_eq!(fire(&mut set, clock.after(MS)), ["a 1"]);
        assert_eq!((set.len(), set.has_fired()), (0, true));
        set.arrived("a", clock.now());
        assert_eq!((set.timers.len(), set.has_fired()), (0, false));
    }

    #[test]
    fn a_wall_timer_follows_the_clock_when_it_is_set() {
        let mut clock = Clock::new();
        let mut set = TimerSet::default();
        let hour = 3_600_000_000_000;
        set.apply(
            requests([("a", Request::Wall(START_NS + hour))]),
            clock.now(),
        );
        let look = set.next(clock.now()).unwrap();
        assert_eq!(look, clock.now().instant + LOOK_AT_WALL_CLOCK);
        assert_eq!(fire(&mut set, clock.after(2 * MS)), [""; 0]);
        clock.set = hour as i64;
        assert_eq!(fire(&mut set, clock.now()), ["a 3600000"]);
    }

    #[test]
    fn a_timer_that_is_set_again_while_its_event_is_on_its_way_waits_for_it() {
        let mut clock = Clock::new();
        let mut set = TimerSet::default();
        set.apply(requests([("a", Request::Once(MS))]), clock.now());
        assert_eq!(fire(&mut set, clock.after(MS)), ["a 1"]);
        set.apply(requests([("a", Request::Once(MS))]), clock.now());
        assert_eq!(fire(&mut set, clock.after(5 * MS)), [""; 0]);
        set.arrived("a", clock.now());
        assert_eq!(fire(&mut set, clock.now()), ["a 2"]);
    }

    #[test]
    fn times_beyond_all_measure_are_harmless() {
        let mut clock = Clock::new();
        let mut set = TimerSet::default();
        let longest = Duration::from_nanos(u64::MAX);
        set.apply(
            requests([
                ("a", Request::Interval(longest)),
                ("b", Request::Once(longest)),
                ("c", Request::Wall(u64::MAX)),
                ("d", Request::Wall(0)),
            ]),
            clock.now(),
        );
        assert_eq!(fire(&mut set, clock.after(MS)).len(), 1);
        assert_eq!(fire(&mut set, clock.after(LONGEST)).len(), 2);
        set.arrived("a", clock.now());
        assert!(set.next(clock.now()).is_some());
    }

    #[derive(Clone, Debug)]
    enum Step {
        Request(u8, Request),
        Pass(u64),
        Arrive(u8),
        SetClock(i32),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let ms = 0..50u64;
        let request = prop_oneof![
            (1..50u64).prop_map(|ms| Request::Interval(MS * ms as u32)),
            ms.clone().prop_map(|ms| Request::Once(MS * ms as u32)),
            ms.clone()
                .prop_map(|ms| Request::Wall(START_NS + ms * 1_000_000)),
            Just(Request::Cancel),
        ];
        let step = prop_oneof![
            (0..4u8, request).prop_map(|(name, request)| Step::Request(name, request)),
            ms.prop_map(Step::Pass),
            (0..4u8).prop_map(Step::Arrive),
            (-100..100i32).prop_map(Step::SetClock),
        ];
        prop::collection::vec(step, 0..100)
    }

    proptest! {
        /// Whoever looks when he is told to look misses nothing, and nothing fires before its time
        /// or twice at once.
        #[test]
        fn what_is_due_fires_once_and_the_next_look_is_never_too_late(steps in steps()) {
            let mut clock = Clock::new();
            let mut set = TimerSet::default();
            let mut on_the_way = std::collections::BTreeSet::new();
            for step in steps {
                match step {
                    Step::Request(name, request) => {
                        let requests = requests([(&name.to_string(), request)]);
                        let expected = set.count(&requests);
                        let has = set.has(&requests, &name.to_string());
                        set.apply(requests, clock.now());
                        prop_assert_eq!(set.len(), expected.0);
                        prop_assert_eq!(has, request != Request::Cancel);
                    }
                    Step::Pass(ms) => { clock.after(MS * ms as u32); }
                    Step::Arrive(name) => {
                        let name = name.to_string();
                        set.arrived(&name, clock.now());
                        on_the_way.remove(&name);
                    }
                    Step::SetClock(ms) => clock.set = i64::from(ms) * 1_000_000,
                }
                let now = clock.now();
                let next = set.next(now);
                let fired = set.fire(now);
                // A wall clock that was set back and forth may make the look too early, never too late.
                let is_due = next.is_some_and(|next| next <= now.instant);
                prop_assert_eq!(is_due, !fired.is_empty());
                for fired in fired {
                    prop_assert!(fired.due_unix_ns <= now.unix_ns.max(START_NS + 50_000_000));
                    prop_assert!(on_the_way.insert(fired.name.to_string()), "two at once");
                }
                prop_assert_eq!(set.has_fired(), !on_the_way.is_empty());
                let (live, kept) = set.count(&Requests::new());
                prop_assert_eq!(live, set.timers.values().filter(|timer| timer.is_live()).count());
                prop_assert!(kept <= 4 && live <= kept);
                prop_assert!(set.next(now).is_none_or(|next| next > now.instant));
            }
        }
    }
}
