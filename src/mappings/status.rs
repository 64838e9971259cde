//! What the outside sees of the mappings: plain data, as it goes over the admin API.

use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, Counters, Explanation, SourceState};
use crate::store::StoreError;

/// All there is to say about a mapping.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MappingInfo {
    pub name: String,
    /// Part of the system: from the folder that `mappings.preinstalled` names.
    pub preinstalled: bool,
    /// The site has it once, and it does not run here now.
    #[serde(default)]
    pub standby: bool,
    /// When it was installed or, after a restart, loaded: milliseconds since the Unix epoch.
    pub since_ms: u64,
    /// What is probably a mistake, each with its place in the file.
    pub warnings: Vec<String>,
    /// Why it does not run.
    pub error: Option<String>,
    pub sources: Vec<SourceState>,
    /// In the order of the file.
    pub outputs: Vec<OutputStatus>,
    pub counters: Counters,
}

/// An output, and why it was last sent or was not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OutputStatus {
    pub mapping: String,
    #[serde(flatten)]
    pub explanation: Explanation,
}

/// All mappings together. It adds up: `offered = handled + dropped + queued`.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct MappingsStatus {
    pub installed: usize,
    /// Events that wait for them now, or are worked on.
    pub queued: u64,
    /// Events that came, since the start.
    pub offered: u64,
    pub handled: u64,
    /// For which there was no room.
    pub dropped: u64,
    /// Events that they made.
    pub published: u64,
    /// Attempts to store the values of sources that have failed.
    pub save_failures: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum MappingError {
    #[error(
        "{0:?} can't be a mapping's name: lower-case letters, digits and hyphens, 64 at the most, and no hyphen first"
    )]
    Name(String),
    #[error("there is no mapping {0}; `headgate mapping list` has those there are")]
    NotFound(String),
    #[error("no mapping has an output {0}; `headgate mapping inspect NAME` has those of a mapping")]
    NoOutput(String),
    #[error(
        "expressions of the mappings run all the time; try again later, or remove the one that `headgate mapping check` warns of"
    )]
    Busy,
    #[error("the mapping {name} does not run: {error}")]
    DoesNotRun { name: String, error: String },
    #[error(
        "the mapping {0} is part of the system: it changes with the system, or install yours under another name"
    )]
    Preinstalled(String),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("cannot read the folder {} (mappings.preinstalled): {source}", .path.display())]
    Folder { path: PathBuf, source: io::Error },
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
    #[error(transparent)]
    Store(#[from] StoreError),
}
