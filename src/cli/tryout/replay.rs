//! `headgate journal replay`: an app, or a mapping, is handed what the journal has, and nobody gets what it makes of it.

mod mapping;

use std::collections::BTreeSet;
use std::mem;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, bail};
use bytes::Bytes;
use clap::Args;
use serde_json::Value;

use super::difference::change;
use super::events::Writer;
use super::{Report, Summary, error_of, package, print, state};
use crate::admin::ClientError;
use crate::apps::{AppError, AppInfo, AppState, Compiler, Outcome, Tryout, stored_package};
use crate::cli::journal::{Place, found, topic_filter};
use crate::cli::output::{Output, printable};
use crate::cli::package::{Package, PackageError};
use crate::cli::{FAILED, Global, moment, small_runtime};
use crate::config::Config;
use crate::event::{Event, Topic, TopicFilter, unix_time_ns};
use crate::journal::{Entry, Reading, Record};
use crate::store::{Store, StoreConfig};

/// Before a mapping's name.
const MAPPING: &str = "mapping/";

/// A batch is handed over with so many bytes at the latest.
const BATCH_BYTES: usize = 4 << 20;

/// Topics that a difference names.
const TOPICS_NAMED: usize = 3;

/// Hand an app or a mapping what the journal has, and print what it would publish
///
/// Publishes nothing, and changes nothing: it runs here, as with `headgate app test`, beside the gateway or
/// without one. It begins with nothing kept; its timers run by the clock, while the events come as fast as it
/// takes them, with the timestamps that they have in the journal.
///
/// What it publishes is printed as lines of JSON, as `headgate app test` prints them; its log, events that failed
/// and a summary go to standard error. Exits with 1 if the app does not start, or if an event failed.
///
/// With --diff, another version gets the same events, and only what the two make differently is printed, batch
/// by batch: lines that begin with - are of the first one, those with + of the other one. Exits with 1 if there
/// are any.
#[derive(Args)]
pub(in crate::cli) struct ReplayArgs {
    /// Name of an app that is installed, or mapping/NAME. Needs no gateway that runs
    #[arg(required_unless_present = "package")]
    app: Option<String>,
    /// Take it from here instead: folder or component, as `headgate app test` takes them, or a mapping's .yaml
    #[arg(long, value_name = "PATH")]
    package: Option<PathBuf>,
    /// Compare with another version: folder or component, as `headgate app test` takes them, or a mapping's .yaml
    #[arg(long, value_name = "PATH")]
    diff: Option<PathBuf>,
    #[command(flatten)]
    place: Place,
    /// Begin with this sequence
    #[arg(long, value_name = "SEQUENCE", default_value_t = 0)]
    from: u64,
    /// End with this sequence
    #[arg(long, value_name = "SEQUENCE")]
    to: Option<u64>,
    /// Only events that came then or later: a time such as 2026-11-21T12:00:00Z, or a duration such as 30m, 24h
    /// or 7d back from now
    #[arg(long, value_name = "TIME", value_parser = moment_ns)]
    since: Option<u64>,
    /// Only events that came then or earlier
    #[arg(long, value_name = "TIME", value_parser = moment_ns)]
    until: Option<u64>,
    /// Only events whose topic matches
    #[arg(long, value_name = "FILTER", value_parser = topic_filter)]
    topic: Option<TopicFilter>,
    /// Events that the app gets at a time
    #[arg(long, value_name = "N", default_value_t = 64,
          value_parser = clap::value_parser!(u32).range(1..=100_000))]
    batch: u32,
}

fn moment_ns(text: &str) -> Result<u64, String> {
    moment::parse(text, unix_time_ns())
}

pub(in crate::cli) fn run(
    args: ReplayArgs,
    global: &Global,
    output: &Output,
) -> anyhow::Result<ExitCode> {
    if args.to.is_some_and(|to| to < args.from) {
        bail!("--to is before --from: nothing is between them");
    }
    let folder = args.place.find(global)?;
    let journal = found(&folder)?;
    let wanted = Wanted {
        // What comes from here on is for the next time.
        sequences: args.from
            ..=args
                .to
                .unwrap_or(u64::MAX)
                .min(journal.next.saturating_sub(1)),
        times: args.since.unwrap_or(0)..=args.until.unwrap_or(u64::MAX),
        topic: args.topic,
    };
    let first = match (&args.package, args.app.as_deref()) {
        (Some(path), name) => Subject::read(path, name)?,
        (None, name) => match name.unwrap_or_default() {
            name if name.starts_with(MAPPING) => mapping::installed(name, global)?,
            name => Subject::App(installed(name, global)?),
        },
    };
    let other = args.diff.as_deref().map(|path| Subject::read(path, None));
    let subjects: Vec<_> = [Some(first), other.transpose()?]
        .into_iter()
        .flatten()
        .collect();
    let writer = Writer::new();
    let is_compared = subjects.len() > 1;
    let start = |subject| -> anyhow::Result<Box<dyn Version>> {
        Ok(match subject {
            Subject::App(package) => {
                let batch = args.batch as usize;
                Box::new(AppVersion::start(&package, batch, is_compared, &writer)?)
            }
            Subject::Mapping { name, config } => {
                Box::new(mapping::MappingVersion::start(name, &config, is_compared)?)
            }
        })
    };
    let mut replay = Replay {
        versions: subjects
            .into_iter()
            .map(start)
            .collect::<anyhow::Result<_>>()?,
        writer,
        output,
        max_batch: args.batch as usize,
        batch: Vec::new(),
        batch_bytes: 0,
        events: 0,
        batches: 0,
        differing: 0,
    };
    let mut goes_on = true;
    for entry in Reading::open(&folder, args.from)? {
        let records = match entry.with_context(|| format!("cannot read {}", folder.display()))? {
            Entry::Events(records) => records,
            Entry::Problem { segment, problem } => {
                output.error_text(&format!("{}: {problem}", segment.display()));
                continue;
            }
        };
        let is_beyond = |record: &Record| record.sequence > *wanted.sequences.end();
        let ends = records.first().is_none_or(is_beyond);
        for record in records.iter().filter(|record| wanted.contains(record)) {
            goes_on = goes_on && replay.take(record)?;
        }
        if ends || !goes_on {
            break;
        }
    }
    if goes_on {
        replay.hand_over()?;
    }
    if replay.events == 0 && !output.json {
        eprintln!(
            "nothing to hand over: the journal has the sequences {} to {}, and none of these events is in the range",
            journal.first,
            journal.next.saturating_sub(1)
        );
    }
    replay.end()
}

/// What is handed events.
enum Subject {
    App(Package),
    Mapping {
        /// With [`MAPPING`] before it, or the file's.
        name: String,
        config: String,
    },
}

impl Subject {
    /// `name`: what it is to be called.
    fn read(path: &Path, name: Option<&str>) -> anyhow::Result<Subject> {
        if path
            .extension()
            .is_some_and(|end| end == "yaml" || end == "yml")
        {
            if let Some(name) = name.filter(|name| !name.starts_with(MAPPING)) {
                bail!("{} is a mapping's file, and {name} an app", path.display());
            }
            return mapping::read(path);
        }
        let package = package(path, None)?;
        if let Some(name) = name.filter(|name| *name != package.name) {
            bail!("the package is of app {}, and not of {name}", package.name);
        }
        Ok(Subject::App(package))
    }
}

/// The package of an installed app: from the gateway, or from what that has left on disk.
fn installed(name: &str, global: &Global) -> anyhow::Result<Package> {
    let client = global.client()?;
    let fetched = small_runtime()?.block_on(client.package(name));
    let (manifest, component) = match fetched {
        Err(not_running @ ClientError::NotRunning { .. }) => {
            let config = Config::load(global.source(Vec::new()))?.config;
            return without_gateway(name, &config, &not_running);
        }
        fetched => fetched?,
    };
    Ok(Package {
        name: name.to_owned(),
        manifest,
        component,
    })
}

fn without_gateway(name: &str, config: &Config, why: &ClientError) -> anyhow::Result<Package> {
    let preinstalled = config.apps.preinstalled.as_ref();
    let folder = preinstalled.map(|folder| folder.join(name));
    if let Some(folder) = folder.filter(|folder| folder.is_dir()) {
        return match Package::find(&folder, None) {
            Err(PackageError::Precompiled(_)) => {
                let name = name.to_owned();
                bail!(AppError::OnlyPrecompiled { name })
            }
            found => Ok(found?),
        };
    }
    let path = &config.store.path;
    // Opening it would make it.
    if !path.join("lmdb").exists() {
        bail!(
            "{why}; nor is there a store in {}: name the app's package with --package PATH",
            path.display()
        );
    }
    let store = Store::open(&StoreConfig {
        path: path.clone(),
        map_bytes: config.store.max_bytes,
    });
    let (manifest, component) = stored_package(&store.with_context(|| why.to_string())?, name)?;
    Ok(Package {
        name: name.to_owned(),
        manifest,
        component,
    })
}

/// Which events of the journal.
struct Wanted {
    sequences: RangeInclusive<u64>,
    /// Nanoseconds since 1970.
    times: RangeInclusive<u64>,
    topic: Option<TopicFilter>,
}

impl Wanted {
    fn contains(&self, record: &Record) -> bool {
        let topic = record.topic.as_str();
        self.sequences.contains(&record.sequence)
            && self.times.contains(&record.timestamp_ns)
            && self
                .topic
                .as_ref()
                .is_none_or(|filter| filter.matches(topic))
    }
}

/// The event as the app got it, or would have. A copy: what else was read with it need not stay.
fn event(record: &Record) -> Event {
    let topic = Topic::new(record.topic.as_str().to_owned()).expect("a topic is a topic");
    let payload = Bytes::copy_from_slice(&record.payload);
    Event {
        timestamp_ns: record.timestamp_ns,
        ..Event::new(topic, payload, Instant::now())
    }
}

/// One version of what is handed events.
trait Version {
    fn takes(&self, topic: &str) -> bool;

    fn name(&self) -> String;

    /// Returns whether it goes on.
    fn hand_over(&mut self, batch: &[(u64, Event)], writer: &Writer) -> bool;

    /// Lines of what it has published, and of what it failed with, since the last call.
    fn take_made(&mut self) -> Vec<String>;

    /// Prints a summary; of so many `events` in the range. Returns how many were not handled.
    fn end(self: Box<Self>, events: usize, output: &Output) -> anyhow::Result<u64>;
}

/// Of an app.
struct AppVersion {
    tryout: Tryout,
    report: Report,
    is_compared: bool,
    app: AppInfo,
    /// Lines of what it has published, and of what it failed with, that were not printed yet.
    made: Vec<String>,
    /// Events that it subscribes to, and those of them that it got.
    taken: usize,
    handed_over: usize,
}

impl AppVersion {
    fn start(
        package: &Package,
        batch: usize,
        is_compared: bool,
        writer: &Writer,
    ) -> anyhow::Result<AppVersion> {
        // It is somebody's own machine and time that the compiler takes.
        let compiler = Compiler::InProcess;
        let mut tryout = Tryout::start(&package.manifest, &package.component, batch, compiler)?;
        let started = tryout.started();
        let mut version = AppVersion {
            tryout,
            report: Report::default(),
            is_compared,
            app: started.app.clone(),
            made: Vec::new(),
            taken: 0,
            handed_over: 0,
        };
        if is_compared {
            version.report.whose = format!("{}: ", version.name());
        }
        version.note(&started, &[], writer);
        if !started.goes_on() {
            bail!("{} does not run: {}", version.name(), state(&version.app));
        }
        Ok(version)
    }

    fn note(&mut self, outcome: &Outcome, events: &[(u64, Event)], writer: &Writer) {
        self.report.outcome(outcome, |letter| {
            let whose = events.iter().find(|(_, event)| {
                event.topic == letter.topic && event.payload.starts_with(&letter.payload)
            });
            whose.map(|(sequence, _)| format!("sequence {sequence}"))
        });
        let published = outcome.published.iter();
        self.made.extend(published.map(|event| writer.line(event)));
        if self.is_compared {
            let failed = outcome.failed.iter().map(|letter| {
                // Without the backtrace, which is another one in other code.
                let error = error_of(letter).lines().next();
                serde_json::json!({ "failed": letter.topic.as_str(), "error": error }).to_string()
            });
            self.made.extend(failed);
        }
        self.app = outcome.app.clone();
    }
}

impl Version for AppVersion {
    fn takes(&self, topic: &str) -> bool {
        self.tryout.takes(topic)
    }

    fn name(&self) -> String {
        format!("{} {}", self.app.name, printable(&self.app.version))
    }

    fn hand_over(&mut self, batch: &[(u64, Event)], writer: &Writer) -> bool {
        let takes = |(_, event): &&(u64, Event)| self.takes(event.topic.as_str());
        let wanted: Vec<_> = batch.iter().filter(takes).cloned().collect();
        if wanted.is_empty() {
            return true;
        }
        self.taken += wanted.len();
        let events = wanted.iter().map(|(_, event)| event.clone()).collect();
        let outcome = self.tryout.hand_over(events);
        self.handed_over += wanted.len();
        self.note(&outcome, &wanted, writer);
        outcome.goes_on()
    }

    fn take_made(&mut self) -> Vec<String> {
        mem::take(&mut self.made)
    }

    fn end(self: Box<Self>, events: usize, output: &Output) -> anyhow::Result<u64> {
        let name = self.name();
        let AppVersion {
            tryout,
            app,
            taken,
            handed_over,
            ..
        } = *self;
        drop(tryout);
        let summary = Summary {
            app: &app.name,
            version: &app.version,
            events,
            skipped: events - taken,
            not_handed_over: taken - handed_over,
            counters: &app.counters,
            memory_pages: app.memory_pages,
        };
        summary.print(output)?;
        if app.state != AppState::Running {
            bail!("{name} fails too often to go on: {}", state(&app));
        }
        Ok(app.counters.failed + app.counters.dropped.total())
    }
}

/// One version, or two of which the outputs are compared.
struct Replay<'a> {
    versions: Vec<Box<dyn Version>>,
    writer: Writer,
    output: &'a Output,
    max_batch: usize,
    /// What a version subscribes to, with its sequences.
    batch: Vec<(u64, Event)>,
    batch_bytes: usize,
    /// In the range.
    events: usize,
    batches: usize,
    /// Batches of which the versions have made something else.
    differing: usize,
}

impl Replay<'_> {
    /// Returns whether all versions go on.
    fn take(&mut self, record: &Record) -> anyhow::Result<bool> {
        self.events += 1;
        let topic = record.topic.as_str();
        if self.versions.iter().any(|version| version.takes(topic)) {
            self.batch_bytes += record.topic.as_str().len() + record.payload.len();
            self.batch.push((record.sequence, event(record)));
        }
        if self.batch.len() < self.max_batch && self.batch_bytes < BATCH_BYTES {
            return Ok(true);
        }
        self.hand_over()
    }

    fn hand_over(&mut self) -> anyhow::Result<bool> {
        let batch = mem::take(&mut self.batch);
        self.batch_bytes = 0;
        let mut goes_on = true;
        for version in &mut self.versions {
            goes_on &= version.hand_over(&batch, &self.writer);
        }
        self.batches += usize::from(!batch.is_empty());
        let versions = self.versions.iter_mut();
        let made: Vec<_> = versions.map(|version| version.take_made()).collect();
        match &made[..] {
            [before, after] => self.compare(&batch, before, after)?,
            _ => print(made.into_iter().flatten(), self.output)?,
        }
        Ok(goes_on)
    }

    fn compare(
        &mut self,
        batch: &[(u64, Event)],
        before: &[String],
        after: &[String],
    ) -> anyhow::Result<()> {
        let Some(change) = change(before, after) else {
            return Ok(());
        };
        self.differing += 1;
        let sequences = batch.first().zip(batch.last());
        let sequences = sequences.map(|((first, _), (last, _))| (*first, *last));
        let topics: BTreeSet<_> = batch
            .iter()
            .map(|(_, event)| event.topic.as_str())
            .collect();
        if self.output.json {
            let parsed = |lines: &[&str]| {
                let lines = lines.iter().map(|line| serde_json::from_str(line));
                lines.collect::<Result<Vec<Value>, _>>()
            };
            return self.output.value_line(&serde_json::json!({
                "first": sequences.map(|(first, _)| first),
                "last": sequences.map(|(_, last)| last),
                "topics": topics,
                "before": parsed(&change.before)?,
                "after": parsed(&change.after)?,
            }));
        }
        let place = match sequences {
            None => "at the start".to_owned(),
            Some((first, last)) if first == last => format!("sequence {first}"),
            Some((first, last)) => format!("sequences {first} to {last}"),
        };
        let mut named: Vec<_> = topics.iter().copied().take(TOPICS_NAMED).collect();
        if topics.len() > TOPICS_NAMED {
            named.push("…");
        }
        let topics = printable(&named.join(", "));
        self.output
            .text(format!("{place}: {topics}{}", change.text()))
    }

    fn end(self) -> anyhow::Result<ExitCode> {
        let names: Vec<_> = self.versions.iter().map(|version| version.name()).collect();
        let mut lost = 0;
        for version in self.versions {
            lost = version.end(self.events, self.output)?;
        }
        if let [before, after] = &names[..] {
            let (batches, differing) = (self.batches, self.differing);
            if self.output.json {
                let counts = serde_json::json!({ "batches": batches, "differing": differing });
                eprintln!("{}", serde_json::json!({ "compared": counts }));
            } else {
                eprintln!("{before} and {after} differ in {differing} of {batches} batches");
            }
            return Ok(match differing {
                0 => ExitCode::SUCCESS,
                _ => ExitCode::from(FAILED),
            });
        }
        if lost > 0 {
            bail!("{lost} events were not handled");
        }
        Ok(ExitCode::SUCCESS)
    }
}
