//! Where a value comes from, and so where an error in it is to be mended.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Built in.
    Default,
    /// A default that follows an environment variable which isn't Headgate's own, such as
    /// `STATE_DIRECTORY`.
    DefaultFrom(&'static str),
    /// The configuration file; without a position, the file as a whole.
    File {
        file: Arc<Path>,
        position: Option<Position>,
    },
    /// An environment variable, by name.
    Variable(String),
    /// A command line flag, with its dashes.
    Flag(String),
}

/// A place in a file. Both count from 1; columns count characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    pub line: usize,
    pub column: usize,
}

impl Position {
    /// The position of byte `offset` of `text`; of the end for an offset beyond it.
    pub(super) fn in_text(text: &str, offset: usize) -> Position {
        let before = text
            .char_indices()
            .take_while(|(start, letter)| start + letter.len_utf8() <= offset)
            .map(|(_, letter)| letter);
        let mut position = Position { line: 1, column: 1 };
        for letter in before {
            if letter == '\n' {
                position.line += 1;
                position.column = 1;
            } else {
                position.column += 1;
            }
        }
        position
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::DefaultFrom(variable) => write!(f, "default from ${variable}"),
            Origin::File {
                file,
                position: Some(position),
            } => write!(f, "{}:{}", file.display(), position.line),
            Origin::File {
                file,
                position: None,
            } => write!(f, "{}", file.display()),
            Origin::Variable(name) => write!(f, "env {}", name.escape_debug()),
            Origin::Flag(name) => write!(f, "flag {name}"),
        }
    }
}
