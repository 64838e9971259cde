//! Tests of apps, for `cargo test`: natively, and in the gateway's own engine.
//!
//! [`Harness`] runs an app as a plain struct, with a host that is kept in memory: what the app
//! publishes, logs, keeps, counts and sets timers for can be looked at, and time passes when the test
//! says so.
//!
//! ```
//! use std::time::Duration;
//! use headgate_sdk::testing::{Harness, event};
//! use headgate_sdk::{App, Config, Event, timer};
//!
//! /// Publishes every second how many events there were.
//! struct Rate(u32);
//!
//! impl App for Rate {
//!     fn configure(_: &Config) -> Result<Self, String> {
//!         timer::every("tell", Duration::from_secs(1)).map_err(|error| error.to_string())?;
//!         Ok(Rate(0))
//!     }
//!
//!     fn handle(&mut self, batch: Vec<Event>) -> Result<Vec<Event>, String> {
//!         let mut outputs = Vec::new();
//!         for event in batch {
//!             match timer::name(&event) {
//!                 Some(_) => {
//!                     let rate = std::mem::take(&mut self.0).to_string();
//!                     outputs.push(Event { topic: "rate".into(), payload: rate.into(), timestamp: 0 });
//!                 }
//!                 None => self.0 += 1,
//!             }
//!         }
//!         Ok(outputs)
//!     }
//! }
//!
//! let mut app = Harness::<Rate>::start(&Config::default()).unwrap();
//! app.handle([event("a", "x"), event("b", "y")]).unwrap();
//! let published = app.advance(Duration::from_secs(2)).unwrap();
//! assert_eq!(published, [event("rate", "2"), event("rate", "0")]);
//! ```
//!
//! The manifest's limits and permissions are not known here. [`in_gateway`] has them.

use std::env;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::native::{self, Clock, Host};
pub use crate::native::{LogLine, Metric};
use crate::{App, Config, Event};

/// 2026-01-01T00:00:00Z, where the clock of a harness begins.
pub const START_UNIX_NS: u64 = 1_767_225_600_000_000_000;

/// An app, and a host of its own. One a thread.
///
/// A call that returns an error leaves no trace in what is kept, in timers and in metrics, as in the
/// gateway.
pub struct Harness<A> {
    app: A,
}

/// An event as a test writes it, without a timestamp.
pub fn event(topic: &str, payload: impl AsRef<[u8]>) -> Event {
    Event {
        topic: topic.to_string(),
        payload: payload.as_ref().to_vec(),
        timestamp: 0,
    }
}

impl<A: App> Harness<A> {
    /// Starts the app with nothing kept.
    ///
    /// # Errors
    /// What [`App::configure`] returned.
    pub fn start(config: &Config) -> Result<Self, String> {
        native::with(|host| {
            *host = Host {
                clock: Some(Clock {
                    monotonic: Duration::ZERO,
                    unix_ns: START_UNIX_NS,
                }),
                published: Some(Vec::new()),
                ..Host::default()
            }
        });
        Self::configure(config)
    }

    /// Replaces the instance, as the gateway does after a trap, an upgrade and a power cut: what is
    /// kept stays, what is in memory goes, timers are set anew.
    ///
    /// # Errors
    /// What [`App::configure`] returned.
    pub fn restart(self, config: &Config) -> Result<Self, String> {
        drop(self);
        native::with(|host| host.state.timers.clear());
        Self::configure(config)
    }

    fn configure(config: &Config) -> Result<Self, String> {
        let app = as_call(|| A::configure(config))?;
        Ok(Harness { app })
    }

    /// Hands the app a batch. Returns what it has published from inside the call, and then what
    /// `handle` returned.
    ///
    /// # Errors
    /// What [`App::handle`] returned.
    pub fn handle(&mut self, batch: impl IntoIterator<Item = Event>) -> Result<Vec<Event>, String> {
        let results = as_call(|| self.app.handle(batch.into_iter().collect()))?;
        let mut published = take_published();
        published.extend(results);
        Ok(published)
    }

    /// Has time pass, and hands the app the events of the timers that are due meanwhile, each at its
    /// time and in a batch of its own. Returns what it has published.
    ///
    /// # Errors
    /// What [`App::handle`] returned; the time stands where that was.
    pub fn advance(&mut self, by: Duration) -> Result<Vec<Event>, String> {
        let end = crate::clock::monotonic() + by;
        let mut published = Vec::new();
        while let Some(event) = native::with(|host| next_timer(host, end)) {
            published.extend(self.handle([event])?);
        }
        native::with(|host| move_clock(host, end));
        Ok(published)
    }

    /// The app itself.
    pub fn app(&mut self) -> &mut A {
        &mut self.app
    }

    /// The timers that are set, by name.
    pub fn timers(&self) -> Vec<String> {
        native::with(|host| host.state.timers.keys().cloned().collect())
    }

    /// What was recorded under `name`, if anything was.
    pub fn metric(&self, name: &str) -> Option<Metric> {
        native::with(|host| host.state.metrics.get(name).cloned())
    }

    /// The lines that were logged since this was last asked.
    pub fn take_log(&mut self) -> Vec<LogLine> {
        native::with(|host| std::mem::take(&mut host.log))
    }
}

/// Runs what the gateway takes for one call: if it fails, its traces are wiped out.
fn as_call<R>(call: impl FnOnce() -> Result<R, String>) -> Result<R, String> {
    let before = native::with(|host| host.state.clone());
    let result = call();
    if result.is_err() {
        native::with(|host| host.state = before);
        take_published();
    }
    result
}

fn take_published() -> Vec<Event> {
    native::with(|host| match &mut host.published {
        Some(published) => std::mem::take(published),
        None => Vec::new(),
    })
}

/// Moves the clock to the next timer that is due until `end`, and takes its event.
fn next_timer(host: &mut Host, end: Duration) -> Option<Event> {
    let timers = host.state.timers.iter();
    let (name, timer) = timers
        .filter(|(_, timer)| timer.due <= end)
        .min_by_key(|(_, timer)| timer.due)?;
    let (name, timer) = (name.clone(), *timer);
    move_clock(host, timer.due);
    match timer.period {
        Some(period) => {
            let timer = host.state.timers.get_mut(&name)?;
            timer.due += period;
        }
        None => {
            host.state.timers.remove(&name);
        }
    }
    Some(Event {
        topic: format!("$timer/{name}"),
        payload: Vec::new(),
        timestamp: host.clock?.unix_ns,
    })
}

fn move_clock(host: &mut Host, to: Duration) {
    if let Some(clock) = &mut host.clock {
        clock.advance(to.saturating_sub(clock.monotonic));
    }
}

/// Runs the app in `folder` in the gateway's engine, under its manifest's limits: hands it the events
/// of `events.jsonl` and compares with `expected.jsonl`. It is built first.
///
/// Calls `headgate app test`: the program `headgate` must be on the path, or named by the variable
/// `HEADGATE`. In a test of the app's:
///
/// ```no_run
/// headgate_sdk::testing::in_gateway(std::env!("CARGO_MANIFEST_DIR"));
/// ```
///
/// # Panics
/// If the app does something else than what is expected, with what that is; or if it can't be run.
pub fn in_gateway(folder: impl AsRef<Path>) {
    let folder = folder.as_ref();
    let program = env::var_os("HEADGATE").unwrap_or_else(|| "headgate".into());
    let output = Command::new(&program)
        .args(["app", "test", "--events"])
        .arg(folder.join("events.jsonl"))
        .arg("--expect")
        .arg(folder.join("expected.jsonl"))
        .arg(folder)
        .output();
    match output {
        Ok(output) => assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        ),
        Err(error) => panic!(
            "cannot run {program:?} ({error}): put Headgate's program on the path or name it with \
             HEADGATE=FILE; `cargo test --lib` leaves this test out"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::Bucket;
    use crate::{info, metrics, publish, timer};

    /// Does what an event's payload says.
    struct Puppet(u32);

    impl App for Puppet {
        fn configure(config: &Config) -> Result<Self, String> {
            timer::once("hello", Duration::from_secs(5)).map_err(|e| e.to_string())?;
            Ok(Puppet(config.get_or("start", 0)?))
        }

        fn handle(&mut self, batch: Vec<Event>) -> Result<Vec<Event>, String> {
            let kept = Bucket::open("")?;
            let mut outputs = Vec::new();
            for event in batch {
                self.0 += 1;
                match &*event.payload {
                    b"keep" => {
                        kept.increment("kept", 1)?;
                    }
                    b"fail" => return Err("as told".to_string()),
                    b"count" => metrics::count("told", 1).map_err(|e| e.to_string())?,
                    b"say" => {
                        info!("told by {}", event.topic);
                        publish(&[super::event("said", "")]).map_err(|e| e.to_string())?;
                    }
                    _ => outputs.push(event),
                }
            }
            Ok(outputs)
        }
    }

    fn start() -> Harness<Puppet> {
        Harness::start(&Config::default()).unwrap()
    }

    fn kept() -> Option<Vec<u8>> {
        Bucket::open("").unwrap().get("kept").unwrap()
    }

    #[test]
    fn what_is_published_inside_a_call_comes_before_what_it_returns() {
        let mut app = start();
        let published = app.handle([event("a", "x"), event("b", "say")]).unwrap();
        assert_eq!(published, [event("said", ""), event("a", "x")]);
        let log = app.take_log();
        assert_eq!((log.len(), &*log[0].message), (1, "told by b"));
        assert!(app.take_log().is_empty());
    }

    #[test]
    fn a_call_that_fails_leaves_no_trace() {
        let mut app = start();
        app.handle([event("a", "keep"), event("a", "count")])
            .unwrap();
        let batch = ["keep", "count", "say", "fail"].map(|told| event("a", told));
        assert_eq!(app.handle(batch).unwrap_err(), "as told");
        assert_eq!(kept().as_deref(), Some(&b"1"[..]));
        assert_eq!(app.metric("told"), Some(Metric::Counter(1)));
        assert_eq!(app.handle([]).unwrap(), []);
        assert_eq!(app.app().0, 6, "what is in memory stays");
    }

    #[test]
    fn a_restart_keeps_what_is_kept_and_no_more() {
        let mut app = start();
        app.handle([event("a", "keep")]).unwrap();
        app.advance(Duration::from_secs(10)).unwrap();
        assert_eq!(app.timers(), [""; 0]);
        let mut app = app.restart(&Config::from([("start", "7")])).unwrap();
        assert_eq!((app.app().0, app.timers()), (7, vec!["hello".to_string()]));
        assert_eq!(kept().as_deref(), Some(&b"1"[..]));
        let app = Harness::<Puppet>::start(&Config::default()).unwrap();
        assert_eq!((kept(), app.metric("told")), (None, None));
    }

    #[test]
    fn timers_come_when_time_has_passed_and_not_before() {
        let mut app = start();
        assert_eq!(app.advance(Duration::from_millis(4999)).unwrap(), []);
        let came = app.advance(Duration::from_millis(1)).unwrap();
        assert_eq!(came[0].topic, "$timer/hello");
        assert_eq!(came[0].timestamp, START_UNIX_NS + 5_000_000_000);
        assert_eq!(crate::clock::unix_time_ns(), came[0].timestamp);
        timer::every("a", Duration::from_secs(2)).unwrap();
        timer::at("b", START_UNIX_NS + 8_000_000_000).unwrap();
        let came = app.advance(Duration::from_secs(4)).unwrap();
        let came: Vec<_> = came.iter().map(|event| &*event.topic).collect();
        assert_eq!(came, ["$timer/a", "$timer/b", "$timer/a"]);
        assert!(timer::cancel("a"));
        assert!(!timer::cancel("a"));
        assert_eq!(app.advance(Duration::from_secs(60)).unwrap(), []);
    }

    #[test]
    fn what_the_gateway_refuses_is_refused_here() {
        let _app = start();
        assert!(timer::every("a/b", Duration::from_secs(1)).is_err());
        assert!(timer::every("a", Duration::from_micros(1)).is_err());
        assert!(metrics::count("Told", 1).is_err());
        assert!(metrics::gauge("told", f64::NAN).is_err());
        metrics::gauge("told", 1.0).unwrap();
        assert!(metrics::count("told", 1).is_err());
        assert!(Bucket::open("a b").is_err());
        let bucket = Bucket::open("").unwrap();
        assert!(bucket.set("", b"").is_err());
        assert!(bucket.set(&"k".repeat(256), b"").is_err());
        assert!(bucket.set("k", &[0; 65_537]).is_err());
        assert!(publish(&[event("a/#", "")]).is_err());
    }
}
