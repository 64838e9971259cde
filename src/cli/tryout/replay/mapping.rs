//! A mapping in the place of an app.

use std::mem;
use std::path::Path;

use anyhow::{Context, bail};

use super::super::events::Writer;
use super::{MAPPING, Subject, Version};
use crate::admin::ClientError;
use crate::cli::output::Output;
use crate::cli::{Global, small_runtime};
use crate::config::Config;
use crate::event::Event;
use crate::mappings::{MAX_CONFIG_BYTES, Mapping, Sent, stored_config};
use crate::regular_file::RegularFile;
use crate::store::{Store, StoreConfig};

/// The file of a mapping.
pub(super) fn read(path: &Path) -> anyhow::Result<Subject> {
    let bytes = RegularFile::open(path, 0)
        .and_then(|file| file.read(MAX_CONFIG_BYTES as u64))
        .with_context(|| format!("cannot read {}", path.display()))?;
    let config =
        String::from_utf8(bytes).with_context(|| format!("{} is no text", path.display()))?;
    Ok(Subject::Mapping {
        name: path.display().to_string(),
        config,
    })
}

/// A mapping of a gateway: from that, or from what it has left on disk.
pub(super) fn installed(name: &str, global: &Global) -> anyhow::Result<Subject> {
    let bare = name.strip_prefix(MAPPING).unwrap_or(name);
    let client = global.client()?;
    let config = match small_runtime()?.block_on(client.mapping_config(bare)) {
        Err(not_running @ ClientError::NotRunning { .. }) => {
            let config = Config::load(global.source(Vec::new()))?.config;
            let path = &config.store.path;
            // Opening it would make it.
            if !path.join("lmdb").exists() {
                bail!(
                    "{not_running}; nor is there a store in {}: name the mapping's file with --package PATH",
                    path.display()
                );
            }
            let store = Store::open(&StoreConfig {
                path: path.clone(),
                map_bytes: config.store.max_bytes,
            });
            let store = store.with_context(|| not_running.to_string())?;
            stored_config(&store, config.mappings.preinstalled.as_deref(), bare)?
        }
        fetched => fetched?,
    };
    Ok(Subject::Mapping {
        name: name.to_owned(),
        config,
    })
}

/// One version of a mapping, which begins with no values.
pub(super) struct MappingVersion {
    name: String,
    mapping: Mapping,
    /// Errors name it.
    is_compared: bool,
    made: Vec<String>,
    taken: usize,
    unreadable: u64,
    published: usize,
}

impl MappingVersion {
    pub(super) fn start(
        name: String,
        config: &str,
        is_compared: bool,
    ) -> anyhow::Result<MappingVersion> {
        let (mapping, _) = Mapping::load(config, &name)?;
        Ok(MappingVersion {
            name,
            mapping,
            is_compared,
            made: Vec::new(),
            taken: 0,
            unreadable: 0,
            published: 0,
        })
    }

    fn note(&mut self, sent: Vec<Sent>, timestamp_ns: u64, writer: &Writer) {
        self.published += sent.len();
        for Sent { topic, payload, .. } in sent {
            let event = Event {
                timestamp_ns,
                ..Event::new(topic, payload, std::time::Instant::now())
            };
            self.made.push(writer.line(&event));
        }
    }
}

impl Version for MappingVersion {
    fn takes(&self, topic: &str) -> bool {
        self.mapping.topics().any(|(source, _)| source == topic)
    }

    fn name(&self) -> String {
        self.name.clone()
    }

    fn hand_over(&mut self, batch: &[(u64, Event)], writer: &Writer) -> bool {
        for (sequence, event) in batch {
            if !self.takes(event.topic.as_str()) {
                continue;
            }
            self.taken += 1;
            let mut sent = Vec::new();
            // Values are as old as they were then.
            let now_ms = event.timestamp_ns / 1_000_000;
            self.mapping.on_time(now_ms, &mut sent);
            let topic = event.topic.as_str();
            let read = self
                .mapping
                .on_message(topic, &event.payload, None, now_ms, &mut sent);
            if let Err(refusal) = read {
                self.unreadable += 1;
                let whose = match self.is_compared {
                    true => format!("{}: ", self.name),
                    false => String::new(),
                };
                eprintln!("{whose}sequence {sequence}: {topic}: {refusal}");
            }
            self.note(sent, event.timestamp_ns, writer);
        }
        true
    }

    fn take_made(&mut self) -> Vec<String> {
        mem::take(&mut self.made)
    }

    fn end(self: Box<Self>, events: usize, output: &Output) -> anyhow::Result<u64> {
        let counters = self.mapping.counters();
        let skipped = events - self.taken;
        if output.json {
            let summary = serde_json::json!({
                "mapping": self.name,
                "events": events,
                "skipped": skipped,
                "published": self.published,
                "counters": counters,
            });
            eprintln!("{}", serde_json::json!({ "summary": summary }));
        } else {
            eprintln!(
                "{}: {events} events, {skipped} skipped, {} could not be read; {} published, {} expressions failed",
                self.name, self.unreadable, self.published, counters.javascript_errors
            );
        }
        Ok(self.unreadable)
    }
}
