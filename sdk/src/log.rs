//! The gateway's log, through `wasi:logging`. On the developer's machine it is standard error.

use std::fmt;

/// How grave a log line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Level {
    Trace,
    Debug,
    Info,
    Warn,
    Error,
    Critical,
}

/// Writes one line to the gateway's log. Use the macros; `context` is the module that speaks.
///
/// The gateway takes as many lines in a batch as the manifest's `limits.log_per_batch` says
/// (64 unless it is set), drops the rest and counts them.
pub fn log(level: Level, context: &str, message: fmt::Arguments<'_>) {
    write(level, context, &message.to_string());
}

#[cfg(target_family = "wasm")]
fn write(level: Level, context: &str, message: &str) {
    use crate::bindings::wasi::logging::logging;
    let level = match level {
        Level::Trace => logging::Level::Trace,
        Level::Debug => logging::Level::Debug,
        Level::Info => logging::Level::Info,
        Level::Warn => logging::Level::Warn,
        Level::Error => logging::Level::Error,
        Level::Critical => logging::Level::Critical,
    };
    logging::log(level, context, message);
}

#[cfg(not(target_family = "wasm"))]
fn write(level: Level, context: &str, message: &str) {
    // A test that fails shows it.
    eprintln!("{level:?} {context}: {message}");
    crate::native::with(|host| {
        // Only a harness empties it.
        if host.published.is_some() {
            host.log.push(crate::native::LogLine {
                level,
                context: context.to_string(),
                message: message.to_string(),
            });
        }
    });
}

/// Logs with [`Level::Trace`]; the arguments are those of [`format!`].
#[macro_export]
macro_rules! trace {
    ($($arg:tt)+) => { $crate::log($crate::Level::Trace, module_path!(), format_args!($($arg)+)) };
}

/// Logs with [`Level::Debug`]; the arguments are those of [`format!`].
#[macro_export]
macro_rules! debug {
    ($($arg:tt)+) => { $crate::log($crate::Level::Debug, module_path!(), format_args!($($arg)+)) };
}

/// Logs with [`Level::Info`]; the arguments are those of [`format!`].
#[macro_export]
macro_rules! info {
    ($($arg:tt)+) => { $crate::log($crate::Level::Info, module_path!(), format_args!($($arg)+)) };
}

/// Logs with [`Level::Warn`]; the arguments are those of [`format!`].
#[macro_export]
macro_rules! warn {
    ($($arg:tt)+) => { $crate::log($crate::Level::Warn, module_path!(), format_args!($($arg)+)) };
}

/// Logs with [`Level::Error`]; the arguments are those of [`format!`].
#[macro_export]
macro_rules! error {
    ($($arg:tt)+) => { $crate::log($crate::Level::Error, module_path!(), format_args!($($arg)+)) };
}
