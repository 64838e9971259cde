//! The manifest of an app: who it is, what it reads, what it may publish, what it may use.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::event::TopicFilter;

/// The file name of a manifest in an app's folder.
pub const MANIFEST_FILE: &str = "manifest.toml";

/// A checked manifest.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    pub name: String,
    pub version: String,
    pub description: Option<String>,
    /// File name of the component, beside the manifest.
    pub component: String,
    pub subscribe: Vec<TopicFilter>,
    pub publish: Vec<TopicFilter>,
    pub config: BTreeMap<String, String>,
    pub limits: Limits,
}

/// What an app may use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Linear memory, in pages of 64 KiB.
    pub memory_pages: u32,
    /// CPU time of one call, in milliseconds.
    pub batch_deadline_ms: u64,
    /// Events that may wait.
    pub queue_events: usize,
    /// Events that one call may publish.
    pub publish_per_batch: u32,
    /// Lines that one call may log.
    pub log_per_batch: u32,
}

/// Says which key is wrong, on which line, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{message}", .line.map(|line| format!("line {line}: ")).unwrap_or_default())]
pub struct ManifestError {
    /// Line in the manifest, from 1.
    pub line: Option<usize>,
    pub message: String,
}

impl Manifest {
    /// Reads and checks a manifest. `default_queue_events` stands in for `limits.queue_events`.
    pub fn parse(text: &str, default_queue_events: usize) -> Result<Manifest, ManifestError> {
        let _ = (text, default_queue_events);
        unimplemented!()
    }
}
