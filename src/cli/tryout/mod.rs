//! Apps in the gateway's engine, without a gateway: `headgate app test` hands them events from a file,
//! `headgate journal replay` those of the journal.

mod difference;
mod replay;

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::Args;
use serde::Serialize;

use self::difference::difference;
use super::app::{log_text, refused};
use super::build::{build, is_source};
use super::events::{self, Line, Writer};
use super::output::{Output, printable};
use super::package::Package;
use crate::apps::{AppCounters, AppInfo, Compiler, LogLine, Outcome, Tryout};
use crate::dead_letters::DeadLetter;
pub(super) use replay::{ReplayArgs, run as replay};

/// Run an app with events from a file, and print what it publishes
///
/// Needs no running gateway: the app runs here, in the gateway's engine and under its manifest's
/// limits, with nothing kept from run to run. Events are lines of JSON:
///
///   {"topic": "plant/line1/temperature", "payload": "21.5"}
///
/// with payload (text), payload_base64 or payload_json (any JSON), or none of them for an empty
/// payload; and timestamp_ns (since 1970; now, if it is left out). An event that the app does not
/// subscribe to is skipped and named. Timers run by the clock; an event on $timer/NAME stands for the
/// timer's.
///
/// What the app publishes is printed as such lines, without a timestamp_ns that is the time of this
/// run. The log, events that failed and a summary go to standard error. Exits with 1 if the app does not
/// start, if an event failed or did not reach it, or if something else was published than expected.
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub(super) struct TestArgs {
    /// Folder with Cargo.toml and manifest.toml, which is built first; folder with manifest.toml and
    /// component; or component
    #[arg(default_value = ".")]
    path: PathBuf,
    /// Manifest to use instead of the one in the folder
    #[arg(long, value_name = "FILE")]
    manifest: Option<PathBuf>,
    /// Events to hand over; - for standard input [default: events.jsonl in the folder, if it is
    /// there, else standard input]
    #[arg(long, value_name = "FILE")]
    events: Option<PathBuf>,
    /// Compare with this file instead of printing. Lines as above; a timestamp_ns that is left out can
    /// be any, payload_json is compared as JSON
    #[arg(long, value_name = "FILE")]
    expect: Option<PathBuf>,
    /// Events that the app gets at a time
    #[arg(long, value_name = "N", default_value_t = 64,
          value_parser = clap::value_parser!(u32).range(1..=100_000))]
    batch: u32,
}

/// In a folder, the events that are handed over if none are named.
const EVENTS_FILE: &str = "events.jsonl";

pub(super) fn run(args: TestArgs, output: &Output) -> anyhow::Result<()> {
    let source = Source::choose(args.events, &args.path)?;
    let lines = source.read()?;
    let expected = args.expect.as_deref().map(events::read_file).transpose()?;
    let package = package(&args.path, args.manifest.as_deref())?;

    let batch = args.batch as usize;
    // Here it is the developer's machine, and the developer's time, that the compiler takes.
    let compiler = Compiler::InProcess;
    let mut tryout = Tryout::start(&package.manifest, &package.component, batch, compiler)?;
    let source = source.name();
    let mut report = Report::default();
    let writer = Writer::new();
    // If it is to be compared, else it is printed.
    let mut published = Vec::new();
    let mut publish = |outcome: &Outcome| match expected {
        Some(_) => {
            published.extend_from_slice(&outcome.published);
            Ok(())
        }
        None => print(outcome.published.iter().map(|e| writer.line(e)), output),
    };
    let started = tryout.started();
    report.outcome(&started, |_| None);
    publish(&started)?;
    if !started.goes_on() {
        bail!("{} does not run: {}", package.name, state(&started.app));
    }

    let (taken, skipped): (Vec<&Line>, Vec<&Line>) = lines
        .iter()
        .partition(|line| tryout.takes(line.topic.as_str()));
    for line in &skipped {
        eprintln!(
            "{source}, line {}: skipped: the app does not subscribe to {}",
            line.number,
            printable(line.topic.as_str())
        );
    }
    let mut app = started.app;
    let (mut handed_over, mut goes_on) = (0, true);
    for lines in taken.chunks(batch) {
        let outcome = tryout.hand_over(lines.iter().map(|line| line.event()).collect());
        report.outcome(&outcome, |letter| {
            let whose = lines.iter().find(|line| {
                line.topic == letter.topic && line.event().payload.starts_with(&letter.payload)
            });
            whose.map(|line| format!("{source}, line {}", line.number))
        });
        publish(&outcome)?;
        handed_over += lines.len();
        goes_on = outcome.goes_on();
        app = outcome.app;
        if !goes_on {
            break;
        }
    }
    drop(tryout);

    let summary = Summary {
        app: &app.name,
        version: &app.version,
        events: lines.len(),
        skipped: skipped.len(),
        not_handed_over: taken.len() - handed_over,
        counters: &app.counters,
        memory_pages: app.memory_pages,
    };
    summary.print(output)?;
    if !goes_on {
        bail!("{} fails too often to go on: {}", app.name, state(&app));
    }
    let lost = app.counters.failed + app.counters.dropped.total();
    if lost > 0 {
        bail!("{lost} of {} events were not handled", taken.len());
    }
    if let (Some(expected), Some(file)) = (expected, &args.expect) {
        let file = file.display().to_string();
        if let Some(text) = difference(&file, &expected, &published, &writer) {
            bail!(
                "{} publishes something else than expected: {text}",
                app.name
            );
        }
    }
    Ok(())
}

/// The package at `path`; if it is in Rust, it is built first, so that what runs is what was written.
fn package(path: &Path, manifest: Option<&Path>) -> anyhow::Result<Package> {
    let built = is_source(path).then(|| build(path)).transpose()?;
    let path = built
        .as_ref()
        .map_or(path, |built| built.component.as_path());
    Ok(Package::find(path, manifest)?)
}

fn state(app: &AppInfo) -> String {
    match &app.reason {
        Some(reason) => format!("{}: {reason}", app.state),
        None => app.state.to_string(),
    }
}

/// Where events come from.
enum Source {
    File(PathBuf),
    Stdin,
}

impl Source {
    fn choose(named: Option<PathBuf>, app: &Path) -> anyhow::Result<Source> {
        match named {
            Some(path) if path.as_os_str() == "-" => return Ok(Source::Stdin),
            Some(path) => return Ok(Source::File(path)),
            None => {}
        }
        let beside = app.join(EVENTS_FILE);
        if beside.exists() {
            return Ok(Source::File(beside));
        }
        if io::stdin().is_terminal() {
            bail!(
                "{}: there is no {EVENTS_FILE} in this folder; name a file of events with --events \
                 FILE, or hand them in as standard input",
                app.display()
            );
        }
        Ok(Source::Stdin)
    }

    fn name(&self) -> String {
        match self {
            Source::File(path) => path.display().to_string(),
            Source::Stdin => "standard input".to_owned(),
        }
    }

    fn read(&self) -> anyhow::Result<Vec<Line>> {
        Ok(match self {
            Source::File(path) => events::read_file(path)?,
            Source::Stdin => events::read_stdin()?,
        })
    }
}

fn print(lines: impl Iterator<Item = String>, output: &Output) -> anyhow::Result<()> {
    let lines: Vec<_> = lines.collect();
    match lines.is_empty() {
        true => Ok(()),
        false => output.text(lines.join("\n")),
    }
}

/// Tells what an app logs and fails with while it runs.
#[derive(Default)]
struct Report {
    /// Before each line: which version it is, if there are two.
    whose: String,
    /// The sequence of the log line that should come next.
    next_log_line: u64,
}

impl Report {
    /// `place` finds an event that has failed.
    fn outcome(&mut self, outcome: &Outcome, place: impl Fn(&DeadLetter) -> Option<String>) {
        for line in &outcome.log {
            self.log_line(line);
        }
        for letter in &outcome.failed {
            let place = place(letter).unwrap_or_else(|| letter.topic.to_string());
            eprintln!(
                "{}{}: failed: {}",
                self.whose,
                printable(&place),
                printable(error_of(letter))
            );
        }
    }

    fn log_line(&mut self, line: &LogLine) {
        let missing = line.sequence - self.next_log_line;
        if missing > 0 {
            eprintln!("{}({missing} lines skipped)", self.whose);
        }
        self.next_log_line = line.sequence + 1;
        eprintln!("{}{}", self.whose, log_text(line));
    }
}

fn error_of(letter: &DeadLetter) -> &str {
    letter.error.as_deref().unwrap_or("no reason given")
}

#[derive(Serialize)]
struct Summary<'a> {
    app: &'a str,
    version: &'a str,
    events: usize,
    /// Not subscribed to.
    skipped: usize,
    /// Because the app had failed too often by then.
    not_handed_over: usize,
    counters: &'a AppCounters,
    memory_pages: u64,
}

impl Summary<'_> {
    fn print(&self, output: &Output) -> anyhow::Result<()> {
        if output.json {
            eprintln!(
                "{}",
                serde_json::to_string(&serde_json::json!({ "summary": self }))?
            );
            return Ok(());
        }
        let counters = self.counters;
        eprintln!(
            "{} {}: {} events, {} skipped, {} handled, {} failed, {} dropped, {} not handed over; {} \
             batches, {} of them tried again",
            self.app,
            printable(self.version),
            self.events,
            self.skipped,
            counters.handled,
            counters.failed,
            counters.dropped.total(),
            self.not_handed_over,
            counters.batches,
            counters.retried,
        );
        eprintln!(
            "{} published, {} denied, {} over quota; refused: {}; {} pages of memory",
            counters.published,
            counters.denied,
            counters.over_publish_quota,
            refused(counters),
            self.memory_pages,
        );
        Ok(())
    }
}
