//! When an app starts, waits and gives up: a state machine without I/O. It takes events and the
//! time, and says what comes next; who runs the app does it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::status::{AppState, Restarts};

/// How patient the supervisor is.
#[derive(Clone, Copy, Debug)]
pub struct RestartPolicy {
    /// Pause after the first failure.
    pub first_pause: Duration,
    /// The pauses double up to this.
    pub longest_pause: Duration,
    /// After this long without a failure, the pauses begin at `first_pause` again.
    pub healthy: Duration,
    /// This many failures within `window` are enough.
    pub most_failures: usize,
    pub window: Duration,
}

impl Default for RestartPolicy {
    /// A fresh instance costs some 20 µs, so that the first pause is for whatever made the app
    /// fail: at that pace, failing costs the others less than a percent. The nine pauses before the
    /// tenth failure add up to 51 s, so that an app which fails whenever it starts is quarantined.
    fn default() -> RestartPolicy {
        RestartPolicy {
            first_pause: Duration::from_millis(100),
            longest_pause: Duration::from_secs(30),
            healthy: Duration::from_secs(60),
            most_failures: 10,
            window: Duration::from_secs(60),
        }
    }
}

/// The life of one app, as far as it needs to be known to decide what comes next.
#[derive(Debug)]
pub(super) struct Supervisor {
    policy: RestartPolicy,
    state: AppState,
    /// When the last failures were, oldest first; at most [`RestartPolicy::most_failures`].
    failures: VecDeque<Instant>,
    pause: Duration,
    /// In [`AppState::BackingOff`]: when to try again.
    retry_at: Option<Instant>,
    restarts: Restarts,
}

/// What follows from a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Call [`Supervisor::retry`] at this time.
    RetryAt(Instant),
    /// No more tries until somebody says so.
    Quarantine,
}

impl Supervisor {
    /// For what comes.
    pub(super) fn set_policy(&mut self, policy: RestartPolicy) {
        self.policy = policy;
    }

    pub(super) fn new(policy: RestartPolicy) -> Supervisor {
        Supervisor {
            policy,
            state: AppState::Installed,
            failures: VecDeque::new(),
            pause: policy.first_pause,
            retry_at: None,
            restarts: Restarts::default(),
        }
    }

    pub(super) fn state(&self) -> AppState {
        self.state
    }

    /// How often the app was started again after a failure.
    pub(super) fn restarts(&self) -> Restarts {
        self.restarts
    }

    /// Somebody wants the app to run, with a clean slate.
    pub(super) fn start(&mut self) {
        self.failures.clear();
        self.pause = self.policy.first_pause;
        self.retry_at = None;
        self.state = AppState::Starting;
    }

    /// The instance is made and `configure` went well.
    pub(super) fn started(&mut self) {
        debug_assert_eq!(self.state, AppState::Starting);
        self.state = AppState::Running;
    }

    /// The instance is lost because of what it was given, and is replaced at once.
    pub(super) fn replace(&mut self) {
        debug_assert_eq!(self.state, AppState::Running);
        self.restarts.trap += 1;
        self.state = AppState::Starting;
    }

    /// The instance has done its share and is replaced at once.
    pub(super) fn recycle(&mut self) {
        debug_assert_eq!(self.state, AppState::Running);
        self.restarts.recycle += 1;
        self.state = AppState::Starting;
    }

    /// The version before starts in the place of one that has failed on trial.
    pub(super) fn rolled_back(&mut self) {
        debug_assert_eq!(self.state, AppState::Starting);
        self.restarts.rollback += 1;
    }

    /// Nothing is handed to the app until [`Supervisor::resume`].
    pub(super) fn pause(&mut self) {
        self.retry_at = None;
        self.state = AppState::Paused;
    }

    /// `alive`: there still is an instance.
    pub(super) fn resume(&mut self, alive: bool) {
        debug_assert_eq!(self.state, AppState::Paused);
        self.state = match alive {
            true => AppState::Running,
            false => AppState::Starting,
        };
    }

    /// The instance could not be made, or fails with most of what it gets. `jitter`, from 0 to 1,
    /// varies the pause by a quarter, so that apps that failed together don't start together.
    pub(super) fn failed(&mut self, now: Instant, jitter: f64) -> Verdict {
        if let Some(last) = self.failures.back()
            && now.duration_since(*last) >= self.policy.healthy.max(self.pause)
        {
            self.pause = self.policy.first_pause;
        }
        while let Some(first) = self.failures.front()
            && now.duration_since(*first) >= self.policy.window
        {
            self.failures.pop_front();
        }
        self.failures.push_back(now);
        if self.failures.len() >= self.policy.most_failures {
            self.quarantine();
            return Verdict::Quarantine;
        }
        let retry_at = now + self.pause.mul_f64(0.75 + 0.5 * jitter);
        self.pause = (self.pause * 2).min(self.policy.longest_pause);
        self.retry_at = Some(retry_at);
        self.state = AppState::BackingOff;
        Verdict::RetryAt(retry_at)
    }

    /// Whether the pause is over: then the app is to be started again.
    pub(super) fn retry(&mut self, now: Instant) -> bool {
        let due = self.state == AppState::BackingOff && self.retry_at.is_some_and(|at| now >= at);
        if due {
            self.retry_at = None;
            self.restarts.failure += 1;
            self.state = AppState::Starting;
        }
        due
    }

    /// Another gateway of the site runs it.
    pub(super) fn stand_by(&mut self) {
        self.retry_at = None;
        self.state = AppState::Standby;
    }

    /// The app can't run at all.
    pub(super) fn quarantine(&mut self) {
        self.retry_at = None;
        self.state = AppState::Quarantined;
    }

    pub(super) fn stop(&mut self) {
        self.retry_at = None;
        self.state = AppState::Stopped;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn policy() -> RestartPolicy {
        RestartPolicy::default()
    }

    fn running() -> Supervisor {
        let mut app = Supervisor::new(policy());
        app.start();
        app.started();
        app
    }

    /// Lets the app fail now, and start again as soon as it may.
    fn fail_and_retry(app: &mut Supervisor, now: Instant) -> Option<Instant> {
        match app.failed(now, 0.5) {
            Verdict::Quarantine => None,
            Verdict::RetryAt(at) => {
                assert!(!app.retry(at - Duration::from_nanos(1)), "too early");
                assert!(app.retry(at));
                app.started();
                Some(at)
            }
        }
    }

    #[test]
    fn pauses_double_and_the_tenth_failure_in_a_minute_quarantines() {
        let mut app = running();
        let mut now = Instant::now();
        let mut pauses = Vec::new();
        while let Some(retry) = fail_and_retry(&mut app, now) {
            pauses.push((retry - now).as_millis());
            now = retry;
        }
        assert_eq!(
            pauses,
            [100, 200, 400, 800, 1600, 3200, 6400, 12_800, 25_600]
        );
        assert_eq!(app.state(), AppState::Quarantined);
        assert_eq!(app.restarts().failure, 9);
        assert!(
            !app.retry(now + Duration::from_secs(3600)),
            "it stays there"
        );
    }

    #[test]
    fn a_minute_of_health_resets_the_pause() {
        let mut app = running();
        let now = Instant::now();
        let mut last = now;
        for _ in 0..3 {
            last = fail_and_retry(&mut app, last).unwrap();
        }
        let later = last + policy().healthy;
        assert_eq!(
            app.failed(later, 0.5),
            Verdict::RetryAt(later + policy().first_pause)
        );
    }

    #[test]
    fn pauses_never_grow_beyond_the_longest() {
        let mut app = running();
        let mut now = Instant::now();
        // Slow enough to stay out of quarantine, too fast to count as healthy.
        for _ in 0..40 {
            let retry = fail_and_retry(&mut app, now).expect("not quarantined");
            assert!(retry - now <= policy().longest_pause);
            now = retry.max(now + Duration::from_secs(20));
        }
        assert_eq!(
            app.failed(now, 0.5),
            Verdict::RetryAt(now + policy().longest_pause)
        );
    }

    #[test]
    fn starting_a_quarantined_app_gives_it_a_clean_slate() {
        let mut app = running();
        let now = Instant::now();
        while app.failed(now, 0.5) != Verdict::Quarantine {}
        app.start();
        assert_eq!(app.state(), AppState::Starting);
        assert_eq!(
            app.failed(now, 0.5),
            Verdict::RetryAt(now + policy().first_pause)
        );
    }

    #[test]
    fn a_stopped_app_is_not_retried() {
        let mut app = running();
        let now = Instant::now();
        app.failed(now, 0.5);
        app.stop();
        assert!(!app.retry(now + policy().longest_pause));
        assert_eq!(app.state(), AppState::Stopped);
    }

    #[test]
    fn a_pause_varies_by_a_quarter() {
        let now = Instant::now();
        for (jitter, millis) in [(0.0, 75), (1.0, 125)] {
            let retry = Verdict::RetryAt(now + Duration::from_millis(millis));
            assert_eq!(running().failed(now, jitter), retry);
        }
    }

    #[test]
    fn a_paused_app_goes_on_with_what_it_has() {
        let mut app = running();
        app.pause();
        assert!(!app.retry(Instant::now()));
        app.resume(true);
        assert_eq!(app.state(), AppState::Running);
        app.pause();
        app.resume(false);
        assert_eq!(app.state(), AppState::Starting);
    }

    proptest! {
        /// However failures are spaced, no minute sees more than ten of them.
        #[test]
        fn no_minute_sees_more_than_ten_failures(gaps in prop::collection::vec(0u64..20_000, 1..200)) {
            let mut app = running();
            let mut now = Instant::now();
            let mut failures = Vec::new();
            for gap in gaps {
                failures.push(now);
                match fail_and_retry(&mut app, now) {
                    Some(retry) => now = retry + Duration::from_millis(gap),
                    None => break,
                }
            }
            for window in failures.windows(policy().most_failures + 1) {
                prop_assert!(*window.last().unwrap() - window[0] >= policy().window);
            }
        }
    }
}
