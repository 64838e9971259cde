//! `headgate journal`: what is on disk. Reads the files themselves, with a gateway that writes them or
//! without.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use clap::{Args, Subcommand};
use serde::Serialize;

use super::app::utc;
use super::output::{Output, one_line};
use super::{FAILED, Global};
use crate::config::Config;
use crate::event::{FilterError, TopicFilter};
use crate::journal::{self, Entry, Reading, Record};

/// Look at the journal: events that are on disk before they are acknowledged (journal.topics)
#[derive(Subcommand)]
pub(super) enum JournalCommand {
    /// Say how much there is
    Stat(Place),
    /// Show the last events
    Tail(TailArgs),
    /// Read all of it and check all checksums
    ///
    /// Exits with 1 if events are damaged or missing. The end of a segment that a crash has cut short is told of,
    /// but is no damage: nothing of it was acknowledged.
    Verify(Place),
    #[cfg(feature = "compiler")]
    Replay(super::tryout::ReplayArgs),
}

#[derive(Args)]
pub(super) struct Place {
    /// Folder of the journal [default: journal in store.path]
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
}

#[derive(Args)]
pub(super) struct TailArgs {
    #[command(flatten)]
    place: Place,
    /// Show the last N
    #[arg(short = 'n', long = "last", value_name = "N", default_value_t = 20)]
    last: usize,
    /// Only those whose topic matches
    #[arg(long, value_name = "FILTER", value_parser = topic_filter)]
    topic: Option<TopicFilter>,
}

pub(super) fn run(
    command: JournalCommand,
    global: &Global,
    output: &Output,
) -> anyhow::Result<ExitCode> {
    match command {
        JournalCommand::Stat(place) => stat(&place.find(global)?, output).map(super::succeed),
        JournalCommand::Tail(args) => tail(&args, global, output).map(super::succeed),
        JournalCommand::Verify(place) => verify(&place.find(global)?, output),
        #[cfg(feature = "compiler")]
        JournalCommand::Replay(args) => super::tryout::replay(args, global, output),
    }
}

impl Place {
    pub(super) fn find(&self, global: &Global) -> anyhow::Result<PathBuf> {
        if let Some(folder) = &self.folder {
            return Ok(folder.clone());
        }
        let config = Config::load(global.source(Vec::new()))?.config;
        Ok(config.store.path.join(journal::FOLDER))
    }
}

pub(super) fn found(folder: &Path) -> anyhow::Result<journal::Stat> {
    let stat = journal::stat(folder);
    let stat = stat.with_context(|| format!("cannot read {}", folder.display()))?;
    stat.with_context(|| {
        format!(
            "there is no journal in {}: journal.topics and durable rules (pipeline.rules_file) say which events go into one",
            folder.display()
        )
    })
}

pub(super) fn topic_filter(text: &str) -> Result<TopicFilter, FilterError> {
    TopicFilter::new(text.to_owned())
}

fn stat(folder: &Path, output: &Output) -> anyhow::Result<()> {
    let stat = found(folder)?;
    if output.json {
        return output.value(&stat);
    }
    output.text(format!(
        "events     {} to {}\nunfinished {}\nsegments   {}, {} bytes together",
        stat.first,
        stat.next.saturating_sub(1),
        stat.next - stat.finished,
        stat.segments,
        stat.bytes
    ))
}

fn tail(args: &TailArgs, global: &Global, output: &Output) -> anyhow::Result<()> {
    let folder = args.place.find(global)?;
    let next = found(&folder)?.next;
    let from = match args.topic {
        Some(_) => 0,
        None => next.saturating_sub(args.last as u64),
    };
    let mut last = VecDeque::new();
    for entry in Reading::open(&folder, from)? {
        let records = match entry? {
            Entry::Events(records) => records,
            Entry::Problem { segment, problem } => {
                output.error_text(&format!("{}: {problem}", segment.display()));
                continue;
            }
        };
        for record in records {
            let topic = record.topic.as_str();
            if args
                .topic
                .as_ref()
                .is_none_or(|filter| filter.matches(topic))
            {
                last.push_back(record);
            }
        }
        last.drain(..last.len().saturating_sub(args.last));
    }
    if output.json {
        return last
            .iter()
            .try_for_each(|record| output.value_line(&Line::from(record)));
    }
    let rows: Vec<_> = last
        .iter()
        .map(|record| {
            [
                record.sequence.to_string(),
                utc(record.timestamp_ns / 1_000_000),
                one_line(record.topic.as_str()),
                one_line(&String::from_utf8_lossy(&record.payload)),
            ]
        })
        .collect();
    output.table(["SEQUENCE", "TIME", "TOPIC", "PAYLOAD"], &rows)
}

/// An event as `--json` has it.
#[derive(Serialize)]
struct Line<'a> {
    sequence: u64,
    timestamp_ns: u64,
    topic: &'a str,
    /// Text, if it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    payload: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload_base64: Option<String>,
}

impl<'a> From<&'a Record> for Line<'a> {
    fn from(record: &'a Record) -> Line<'a> {
        let payload = std::str::from_utf8(&record.payload).ok();
        Line {
            sequence: record.sequence,
            timestamp_ns: record.timestamp_ns,
            topic: record.topic.as_str(),
            payload,
            payload_base64: payload.is_none().then(|| STANDARD.encode(&record.payload)),
        }
    }
}

fn verify(folder: &Path, output: &Output) -> anyhow::Result<ExitCode> {
    found(folder)?;
    let mut events = 0;
    let mut lost = 0;
    let mut problems = Vec::new();
    for entry in Reading::open(folder, 0)? {
        match entry.with_context(|| format!("cannot read {}", folder.display()))? {
            Entry::Events(records) => events += records.len() as u64,
            Entry::Problem { segment, problem } => {
                lost += problem.lost();
                problems.push((segment, problem));
            }
        }
    }
    let is_whole = problems.iter().all(|(_, problem)| !problem.is_loss());
    if output.json {
        let problems: Vec<_> = problems
            .iter()
            .map(|(segment, problem)| {
                serde_json::json!({
                    "segment": segment,
                    "problem": problem.to_string(),
                    "lost": problem.lost(),
                })
            })
            .collect();
        output.value(&serde_json::json!({
            "events": events, "lost": lost, "whole": is_whole, "problems": problems,
        }))?;
    } else {
        for (segment, problem) in &problems {
            output.text(format!("{}: {problem}", segment.display()))?;
        }
        output.text(match is_whole {
            true => format!("{events} events, all whole"),
            false => format!("{events} events are whole, {lost} are lost"),
        })?;
    }
    Ok(if is_whole {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(FAILED)
    })
}
