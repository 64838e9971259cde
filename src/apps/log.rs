//! The log of one app: its own lines and those that the gateway writes about it. The last ones are
//! kept for `headgate app logs`; all go to the gateway's log.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::status::{LogLevel, LogLine};
use crate::event::unix_time_ns;

/// Lines that are kept.
const MOST_LINES: usize = 1000;

/// Longest message and longest context, in bytes. With [`MOST_LINES`], a log has at most 4.4 MB.
pub(super) const MAX_MESSAGE: usize = 4096;
pub(super) const MAX_CONTEXT: usize = 256;

/// The context of what the gateway says.
const GATEWAY: &str = "headgate";

/// How often a complaint of one kind is repeated.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60);

pub(super) struct AppLog {
    app: Arc<str>,
    lines: Mutex<VecDeque<LogLine>>,
    /// When each kind of complaint was last made.
    complained: Mutex<[Option<Instant>; Complaint::COUNT]>,
}

/// What an app does over and over when it does it once.
#[derive(Clone, Copy)]
pub(super) enum Complaint {
    /// Publishes what it may not.
    Denied,
    /// Publishes more than it may.
    OverQuota,
    /// Returns errors from `handle`.
    BatchFailed,
    /// Calls the host with what that does not take.
    Refused,
    /// Uses a GPIO line that it can't.
    Line,
    /// Has a sensor that can't be read.
    Sensor,
}

impl Complaint {
    const COUNT: usize = 6;
}

impl AppLog {
    pub(super) fn new(app: Arc<str>) -> AppLog {
        AppLog {
            app,
            lines: Mutex::default(),
            complained: Mutex::default(),
        }
    }

    /// A line from the app.
    pub(super) fn app_line(&self, level: LogLevel, context: &str, message: &str) {
        let context = cut(context, MAX_CONTEXT);
        let message = cut(message, MAX_MESSAGE);
        let app = &*self.app;
        match level {
            LogLevel::Trace => tracing::trace!(target: "app", app, context, "{message}"),
            LogLevel::Debug => tracing::debug!(target: "app", app, context, "{message}"),
            LogLevel::Info => tracing::info!(target: "app", app, context, "{message}"),
            LogLevel::Warn => tracing::warn!(target: "app", app, context, "{message}"),
            LogLevel::Error | LogLevel::Critical => {
                tracing::error!(target: "app", app, context, %level, "{message}");
            }
        }
        self.keep(level, context, message);
    }

    /// A line of the gateway's own. It can be as long as an app's error is: it is cut too.
    pub(super) fn gateway_line(&self, level: LogLevel, message: &str) {
        let message = cut(message, MAX_MESSAGE);
        let app = &*self.app;
        match level {
            LogLevel::Trace | LogLevel::Debug => tracing::debug!(app, "app {app}: {message}"),
            LogLevel::Info => tracing::info!(app, "app {app}: {message}"),
            LogLevel::Warn => tracing::warn!(app, "app {app}: {message}"),
            LogLevel::Error | LogLevel::Critical => tracing::error!(app, "app {app}: {message}"),
        }
        self.keep(level, GATEWAY, message);
    }

    /// Complains, once in a while for each kind: what repeats is counted anyway.
    pub(super) fn complain(&self, kind: Complaint, message: impl FnOnce() -> String) {
        let now = Instant::now();
        {
            let mut complained = self.complained.lock();
            let last = &mut complained[kind as usize];
            if last.is_some_and(|last| now.duration_since(last) < COMPLAIN_EVERY) {
                return;
            }
            *last = Some(now);
        }
        self.gateway_line(LogLevel::Warn, &message());
    }

    /// The last `last_n` lines, oldest first.
    pub(super) fn last(&self, last_n: usize) -> Vec<LogLine> {
        let lines = self.lines.lock();
        let skip = lines.len().saturating_sub(last_n);
        lines.iter().skip(skip).cloned().collect()
    }

    fn keep(&self, level: LogLevel, context: &str, message: &str) {
        let mut line = LogLine {
            sequence: 0,
            time_ms: unix_time_ns() / 1_000_000,
            level,
            context: context.to_owned(),
            message: message.to_owned(),
        };
        let mut lines = self.lines.lock();
        if let Some(last) = lines.back() {
            line.sequence = last.sequence + 1;
        }
        if lines.len() == MOST_LINES {
            lines.pop_front();
        }
        lines.push_back(line);
    }
}

/// The beginning of `text`, at most `max` bytes of it.
pub(super) fn cut(text: &str, max: usize) -> &str {
    &text[..text.floor_char_boundary(max)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_thousand_lines_are_kept_in_order() {
        let log = AppLog::new("a".into());
        for number in 0..1500 {
            log.app_line(LogLevel::Info, "", &number.to_string());
        }
        let numbers: Vec<_> = log.last(3).into_iter().map(|line| line.message).collect();
        assert_eq!(numbers, ["1497", "1498", "1499"]);
        assert_eq!(log.last(1)[0].sequence, 1499);
        let all = log.last(usize::MAX);
        assert_eq!(all.len(), 1000);
        assert_eq!(all[0].message, "500");
    }

    #[test]
    fn long_lines_are_cut_between_characters() {
        let log = AppLog::new("a".into());
        log.app_line(LogLevel::Warn, &"ü".repeat(1000), &"€".repeat(5000));
        let line = &log.last(1)[0];
        assert_eq!(line.context, "ü".repeat(128));
        assert_eq!(line.message, "€".repeat(1365));
    }

    #[test]
    fn complaints_are_not_repeated_within_a_minute() {
        let log = AppLog::new("a".into());
        for topic in ["x", "y"] {
            log.complain(Complaint::Denied, || format!("denied {topic}"));
            log.complain(Complaint::OverQuota, || format!("too many on {topic}"));
        }
        let lines = log.last(10);
        let messages: Vec<_> = lines.iter().map(|line| &*line.message).collect();
        assert_eq!(messages, ["denied x", "too many on x"]);
        assert_eq!(lines[0].context, "headgate");
    }
}
