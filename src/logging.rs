//! Where log lines go and what they look like: standard error, as text or as JSON.

use std::io::{self, IsTerminal, Write};

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
    let layer = tracing_subscriber::fmt::layer();
    match format {
        LogFormat::Text => registry
            .with(layer.with_writer(OneLine(writer)).with_ansi(ansi))
            .try_init(),
        LogFormat::Json => registry
            .with(
                layer
                    .with_writer(writer)
                    .json()
                    .flatten_event(true)
                    .with_ansi(false),
            )
            .try_init(),
    }
    .map_err(|_| LoggingError::Twice)
}

/// Keeps each event on one line: topics and what apps log may hold line ends, and must not be able
/// to forge a line. Escape sequences are `tracing_subscriber`'s own here, it escapes those of others.
struct OneLine<W>(W);

impl<'w, W: MakeWriter<'w>> MakeWriter<'w> for OneLine<W> {
    type Writer = OneLine<W::Writer>;

    fn make_writer(&'w self) -> Self::Writer {
        OneLine(self.0.make_writer())
    }

    fn make_writer_for(&'w self, meta: &tracing::Metadata<'_>) -> Self::Writer {
        OneLine(self.0.make_writer_for(meta))
    }
}

impl<W: Write> Write for OneLine<W> {
    /// `event` is a whole one, with its line end.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = event.strip_suffix(b"\n").unwrap_or(event);
        if !text.iter().any(|byte| matches!(byte, b'\n' | b'\r')) {
            self.0.write_all(event)?;
            return Ok(event.len());
        }
        let mut line = Vec::with_capacity(event.len() + 16);
        for byte in text {
            match byte {
                b'\n' => line.extend(b"\\n"),
                b'\r' => line.extend(b"\\r"),
                byte => line.push(*byte),
            }
        }
        line.push(b'\n');
        self.0.write_all(&line)?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// `level` as a filter, in which the router stays silent whatever `level` says: its tracing
/// halves its throughput. The NATS client tells only what nobody else does, unless `level` names it.
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
    let level = match level.contains("async_nats") {
        true => level.to_owned(),
        false => format!("{level},async_nats=error"),
    };
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
    fn an_event_with_line_ends_in_it_stays_on_one_line() {
        let mut writer = OneLine(Vec::new());
        writer.write_all(b"a topic\r\nFORGED\n").unwrap();
        writer.write_all(b"plain\n").unwrap();
        assert_eq!(writer.0, b"a topic\\r\\nFORGED\nplain\n");
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
