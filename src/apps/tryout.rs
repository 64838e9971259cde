//! A tryout: one app as the gateway would run it, but with a store that is thrown away, and handed
//! events by its developer instead of by the pipeline.
//!
//! Engine, limits, kept state, timers and supervision are those of [`Apps`]. What the app publishes
//! is collected, and goes to nobody.

use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tempfile::TempDir;

use super::app::App;
use super::instance_timers::TIMER_TOPICS;
use super::{AppError, AppInfo, AppState, Apps, AppsConfig, Compiler, LogLine};
use crate::dead_letters::{DeadLetter, DeadLetters};
use crate::event::{Batch, Event};
use crate::pipeline::{NotJournaled, Offer, Outlet, Routes, Sink};
use crate::store::{Store, StoreConfig};

/// Holds the largest component and as much as an app can keep. Address space, not memory.
const MAP_BYTES: usize = 1 << 30;

/// No tryout waits so long: each call has a deadline, and what fails too often is left alone.
const FOREVER: Duration = Duration::from_secs(30 * 24 * 3600);

/// An app on tryout.
pub struct Tryout {
    app: Arc<App>,
    apps: Apps,
    routes: Arc<Routes>,
    published: Arc<Published>,
    dead_letters: Arc<DeadLetters>,
    /// The first line of the log that nobody has taken yet.
    next_line: u64,
    /// Last, so that it is removed once all others have let go of it.
    _folder: TempDir,
}

#[derive(Default)]
struct Published(Mutex<Vec<Event>>);

impl Sink for Published {
    fn publish(&self, _source: &str, mut events: Vec<Event>) -> Result<(), NotJournaled> {
        self.0.lock().append(&mut events);
        Ok(())
    }
}

/// What has come of a batch, or of the start.
pub struct Outcome {
    /// In the order in which the app has handed them out.
    pub published: Vec<Event>,
    /// Since the last outcome. At most the last thousand lines.
    pub log: Vec<LogLine>,
    /// The events that the app could not handle, not even alone.
    pub failed: Vec<Arc<DeadLetter>>,
    /// After all that.
    pub app: AppInfo,
}

impl Outcome {
    /// Whether the app takes further events at once. Else the gateway would leave it alone for a
    /// while, or for good.
    pub fn goes_on(&self) -> bool {
        self.app.state == AppState::Running
    }
}

impl Tryout {
    /// Starts an app, which gets at most `batch_events` events a call.
    pub fn start(
        manifest: &str,
        component: &[u8],
        batch_events: usize,
        compiler: Compiler,
    ) -> Result<Tryout, AppError> {
        let folder = tempfile::Builder::new()
            .prefix("headgate-tryout-")
            .tempdir();
        let folder = folder.map_err(|source| file_error(std::env::temp_dir(), source))?;
        let path = folder.path().join("store");
        let defaults = AppsConfig::new(&path).map_err(|source| file_error(path.clone(), source))?;
        let store = Store::open(&StoreConfig {
            path,
            map_bytes: MAP_BYTES,
        })?;
        let routes = Arc::<Routes>::default();
        let published = Arc::<Published>::default();
        let dead_letters = Arc::new(DeadLetters::new(Instant::now()));
        let apps = Apps::open(
            AppsConfig {
                // One, so that a run is like the other.
                workers: 1,
                max_batch_events: batch_events,
                compiler,
                ..defaults
            },
            store,
            routes.clone(),
            published.clone(),
            Arc::new(|| {}),
            dead_letters.clone(),
        )?;
        let info = apps.install(manifest, component)?;
        Ok(Tryout {
            app: apps.control.app(&info.name)?,
            apps,
            routes,
            published,
            dead_letters,
            next_line: 0,
            _folder: folder,
        })
    }

    /// Whether the app gets events on `topic`: those that it subscribes to, and its timers'.
    pub fn takes(&self, topic: &str) -> bool {
        topic.starts_with(TIMER_TOPICS) || self.routes.load().is_wanted(topic)
    }

    /// What has come of the start.
    pub fn started(&mut self) -> Outcome {
        self.app.wait_until_settled(Instant::now() + FOREVER);
        self.outcome()
    }

    /// Hands the app events in one batch, and waits until it is done with them.
    pub fn hand_over(&mut self, mut batch: Batch) -> Outcome {
        // Full is only what holds more events of timers than it has room beside.
        while let Offer::Full(again) = self.app.offer(batch) {
            self.app.wait_until_done(Instant::now() + FOREVER);
            batch = again;
        }
        self.outcome()
    }

    fn outcome(&mut self) -> Outcome {
        self.app.wait_until_done(Instant::now() + FOREVER);
        let failed = self.dead_letters.list(None, usize::MAX);
        let failed = failed.into_iter().map(|(_, letter)| letter).collect();
        self.dead_letters.purge();
        let mut log = self.app.log().last(usize::MAX);
        log.retain(|line| line.sequence >= self.next_line);
        self.next_line = log.last().map_or(self.next_line, |line| line.sequence + 1);
        Outcome {
            published: mem::take(&mut self.published.0.lock()),
            log,
            failed,
            app: self.app.info(),
        }
    }
}

impl Drop for Tryout {
    fn drop(&mut self) {
        // The app, which goes later, must not keep the store's files in use until then.
        self.apps.shutdown(Instant::now(), || {});
    }
}

fn file_error(path: std::path::PathBuf, source: std::io::Error) -> AppError {
    AppError::File { path, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apps::tests::house::{guest, manifest};
    use crate::event::Topic;

    fn tryout(manifest: &str, component: &[u8]) -> Tryout {
        let mut tryout = Tryout::start(manifest, component, 64, Compiler::InProcess).unwrap();
        let started = tryout.started();
        assert!(started.goes_on(), "{:#?}", started.app);
        tryout
    }

    fn batch(topic: &str, payloads: &[&str]) -> Batch {
        let topic = Topic::new(topic.to_owned()).unwrap();
        let event = |payload: &&str| {
            let payload = payload.as_bytes().to_vec().into();
            Event::new(topic.clone(), payload, Instant::now())
        };
        payloads.iter().map(event).collect()
    }

    fn payloads(outcome: &Outcome) -> Vec<&str> {
        let payloads = outcome.published.iter().map(|event| &*event.payload);
        payloads.map(|p| std::str::from_utf8(p).unwrap()).collect()
    }

    #[test]
    fn what_an_app_publishes_is_there_when_the_batch_is_done() {
        let mut tryout = tryout(&manifest("a"), &guest(""));
        let outcome = tryout.hand_over(batch("a/in", &["x", "y"]));
        assert_eq!(payloads(&outcome), ["x", "y"]);
        assert_eq!((outcome.app.counters.batches, outcome.failed.len()), (1, 0));
        let outcome = tryout.hand_over(batch("a/in", &["z"]));
        assert_eq!(payloads(&outcome), ["z"]);
    }

    #[test]
    fn an_event_that_traps_is_named_and_the_others_are_handled() {
        let mut tryout = tryout(&manifest("a"), &guest(""));
        let outcome = tryout.hand_over(batch("a/in", &["U"]));
        assert_eq!(outcome.failed.len(), 1);
        let error = outcome.failed[0].error.as_deref().unwrap();
        assert!(error.contains("unreachable"), "{error}");
        assert!(outcome.goes_on());
        let outcome = tryout.hand_over(batch("a/in", &["x"]));
        assert_eq!(payloads(&outcome), ["x"]);
        assert!(outcome.failed.is_empty());
    }

    #[test]
    fn an_app_that_goes_on_failing_is_not_waited_for() {
        let mut tryout = tryout(&manifest("a"), &guest(""));
        let outcome = tryout.hand_over(batch("a/in", &["U"; 30]));
        assert!(!outcome.goes_on());
        assert_eq!(outcome.app.counters.failed, 10);
    }

    #[test]
    fn an_app_takes_what_it_subscribes_to_and_its_timers_events() {
        let mut tryout = tryout(&manifest("a"), &guest(""));
        assert!(tryout.takes("$timer/t"));
        assert!(tryout.takes("a/in"));
        assert!(!tryout.takes("a/out"));
        let outcome = tryout.hand_over(batch("$timer/t", &[""]));
        assert_eq!(outcome.app.counters.handled, 1);
    }

    #[test]
    fn nothing_is_left_behind() {
        let tryout = tryout(&manifest("a"), &guest(""));
        let folder = tryout._folder.path().to_owned();
        assert!(folder.exists());
        drop(tryout);
        assert!(!folder.exists());
    }
}
