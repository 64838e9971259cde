//! Where log lines go and what they look like: standard error, as text or as JSON.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::LogFormat;

#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    #[error(
        "log.level = \"{level}\": {reason}; use error, warn, info, debug or trace, or directives \
         like \"info,headgate::apps=debug\""
    )]
    Level { level: String, reason: String },
    #[error("logging is set up already")]
    Twice,
}

/// Sends this process's log lines to standard error. Once per process.
///
/// `level` is a level or a list of `tracing` directives.
pub fn init(level: &str, format: LogFormat) -> Result<(), LoggingError> {
    let ansi = std::io::stderr().is_terminal();
    init_to(level, format, ansi, std::io::stderr)
}

/// Like [`init`], but to `writer`, and in colour if `ansi`.
pub fn init_to<W>(level: &str, format: LogFormat, ansi: bool, writer: W) -> Result<(), LoggingError>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let registry = tracing_subscriber::registry().with(filter(level)?);
    let layer = tracing_subscriber::fmt::layer().with_writer(writer);
    match format {
        LogFormat::Text => registry.with(layer.with_ansi(ansi)).try_init(),
        LogFormat::Json => registry
            .with(layer.json().flatten_event(true).with_ansi(false))
            .try_init(),
    }
    .map_err(|_| LoggingError::Twice)
}

/// `level` as a filter, in which the router stays silent whatever `level` says: its tracing
/// halves its throughput.
fn filter(level: &str) -> Result<EnvFilter, LoggingError> {
    let refuse = |reason: String| LoggingError::Level {
        level: level.to_owned(),
        reason,
    };
    if level.trim().is_empty() {
        return Err(refuse("it is empty".into()));
    }
    // A bare word that is no level would be taken for the name of a crate, and silence the rest.
    let bare_word = !level.contains(['=', ',', ':', '[']);
    if bare_word {
        level
            .parse::<tracing_subscriber::filter::LevelFilter>()
            .map_err(|_| refuse("no such level".into()))?;
    }
    let silence = "rumqttd=off"
        .parse()
        .expect("a constant directive is valid");
    EnvFilter::builder()
        .parse(level)
        .map(|filter| filter.add_directive(silence))
        .map_err(|error| refuse(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_router_is_silent_at_every_level() {
        for level in ["trace", "info,rumqttd=trace", "headgate=debug"] {
            let filter = filter(level).unwrap().to_string();
            assert!(filter.contains("rumqttd=off"), "{level}: {filter}");
            assert!(!filter.contains("rumqttd=trace"), "{level}: {filter}");
        }
    }

    #[test]
    fn a_level_that_does_not_exist_is_named() {
        for level in ["loud", "", "headgate=loud"] {
            let error = filter(level).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("log.level = \"{level}\"")),
                "{error}"
            );
            assert!(error.contains("use error, warn, info"), "{error}");
        }
    }
}
