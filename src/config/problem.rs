//! What can be wrong with a configuration, and what to do about it.

use std::fmt;
use std::io;

use super::origin::Origin;
use super::value::{AddressError, SizeError};
use crate::event::TopicError;

/// Everything that is wrong with a configuration. Displayed as one or two lines a problem.
#[derive(Debug, thiserror::Error)]
pub struct ConfigErrors(pub Vec<Problem>);

/// One thing that is wrong.
#[derive(Debug)]
pub struct Problem {
    /// Where it stands.
    pub origin: Origin,
    /// The dotted key, table or variable; None if the file as a whole is meant.
    pub key: Option<String>,
    pub fault: Fault,
    /// What to do.
    pub remedy: String,
}

/// Why a value or a file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error("can't read this file: {0}")]
    Unreadable(#[source] io::Error),
    #[error("this is a folder, not a file")]
    IsFolder,
    #[error("this file is larger than {limit} bytes")]
    FileTooLarge { limit: u64 },
    #[error("this file is not UTF-8")]
    FileNotUtf8,
    #[error("invalid TOML: {0}")]
    Syntax(String),
    #[error("unknown key")]
    UnknownKey,
    #[error("unknown table")]
    UnknownTable,
    #[error("no key has this variable")]
    UnknownVariable,
    #[error("expected {expected}, found {found}")]
    WrongType { expected: String, found: String },
    #[error("{found} is out of range: {allowed}")]
    OutOfRange { found: String, allowed: String },
    #[error("{found} is none of {allowed}")]
    NotAChoice { found: String, allowed: String },
    #[error("{found} is no address: {error}")]
    BadAddress { found: String, error: AddressError },
    #[error("{found} is no topic name: {error}")]
    BadTopic { found: String, error: TopicError },
    #[error("{found} is no size: {error}")]
    BadSize { found: String, error: SizeError },
    #[error("{found} is no log filter: {why}")]
    BadLogFilter { found: String, why: String },
    #[error(
        "{found} is no name of an app: names have the characters a-z 0-9 _ . - and commas between them"
    )]
    BadAppName { found: String },
    #[error("{found} is no topic filter: {why}")]
    BadTopicFilter { found: String, why: String },
    #[error("{found}: {why}")]
    BadText { found: String, why: String },
    #[error("{found} is no usable path: {why}")]
    BadPath { found: String, why: String },
    #[error("this value is not UTF-8")]
    ValueNotUtf8,
    #[error("nothing says where to keep the store: $HOME is not set")]
    NoStoreFolder,
    #[error("{0}")]
    Conflict(String),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.origin {
            Origin::File {
                file,
                position: Some(position),
            } => write!(
                f,
                "{}:{}:{}",
                file.display(),
                position.line,
                position.column
            )?,
            origin => write!(f, "{origin}")?,
        }
        if let Some(key) = &self.key {
            write!(f, ": {key}")?;
        }
        write!(f, ": {}\n  help: {}", self.fault, self.remedy)
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            problem.fmt(f)?;
        }
        Ok(())
    }
}

/// Most characters of a wrong value that an error repeats.
const QUOTED_CHARS: usize = 60;

/// `text` in quotes, for an error: shortened, and with control characters escaped, so that a file
/// can't write to the terminal of whoever checks it.
pub(super) fn quoted(text: &str) -> String {
    format!("\"{}\"", excerpt(text))
}

/// The start of `text`, with control characters escaped.
pub(super) fn excerpt(text: &str) -> String {
    let mut shown = printable(text.chars().take(QUOTED_CHARS));
    if text.chars().nth(QUOTED_CHARS).is_some() {
        shown.push('…');
    }
    shown
}

/// Characters as they are, save those that a terminal would act on or not show.
pub(super) fn printable(characters: impl Iterator<Item = char>) -> String {
    let mut shown = String::new();
    for character in characters {
        match character {
            '\'' | '"' | '\\' => shown.push(character),
            other => shown.extend(other.escape_debug()),
        }
    }
    shown
}
