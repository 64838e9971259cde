//! One mapping at work: messages go in, outputs come out. It knows no clock and no network.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};

use super::analysis::{self, Analysed};
use super::config::{Config, ConfigError, Late, Warning};
use super::engine::{self, Failure};
use super::fast::{self, Sources as _};
use super::payload::{self, Reading, Refusal};
use super::topic;
use super::value::Value;
use crate::event::Topic;

/// Messages of one source that wait for earlier ones at most; beyond that the earliest goes on.
const MAX_WAITING: usize = 256;

/// After a run that was stopped (time, memory) an output rests for this many times the time limit, and
/// twice as long after each further one: so it takes a twentieth of the time at most.
const REST_FACTOR: u32 = 20;

const LONGEST_REST: Duration = Duration::from_secs(300);

/// Most time that the engine may take for one message; then all that needs it rests, as an output does that
/// was stopped. And for all results that are computed when a mapping is loaded.
const BUDGET: Duration = Duration::from_secs(1);

/// An evaluation that could not be stopped and took so many times the time limit counts as stopped.
const UNSTOPPABLE_FACTOR: u32 = 10;

/// Longest value that is shown, in bytes.
const SHOWN_BYTES: usize = 1000;

/// What came with a message beside topic and payload, and goes on with its outputs.
pub type Metadata = Arc<[(Box<str>, Box<str>)]>;

/// A mapping and its state.
#[derive(Debug)]
pub struct Mapping {
    sources: Vec<Source>,
    outputs: Vec<Output>,
    /// Sources by the MQTT form of their topic.
    by_topic: FxHashMap<Box<str>, Box<[usize]>>,
    /// Numbers of the outputs that depend on no source.
    statics: Box<[usize]>,
    budget: Budget,
    counters: Counters,
    /// Sources whose value has changed since [`Mapping::take_changed`].
    changed: Vec<usize>,
    scratch: Scratch,
}

#[derive(Debug)]
struct Source {
    alias: Box<str>,
    topic: Box<str>,
    max_age_ms: Option<u64>,
    late: Late,
    variable: Option<Variable>,
    is_changed: bool,
    /// Numbers of the outputs that read it, in their order.
    dependents: Box<[usize]>,
    /// Under `late: reorder`: messages by time stamp, and by arrival where that is the same.
    waiting: BTreeMap<(i64, u64), Waiting>,
    /// Of the last message that went on, under `late: reorder`.
    arrivals: u64,
}

#[derive(Debug, Clone)]
struct Waiting {
    value: Value,
    /// When it has waited long enough.
    until_ms: u64,
    metadata: Option<Metadata>,
}

/// A source's last value.
#[derive(Debug, Clone, PartialEq)]
pub struct Variable {
    pub value: Value,
    pub timestamp_ms: i64,
    /// When the message came in, in milliseconds since the Unix epoch.
    pub arrived_ms: u64,
}

#[derive(Debug)]
struct Output {
    path: Arc<str>,
    umh_topic: Arc<str>,
    topic: Topic,
    expression: Box<str>,
    analysed: Analysed,
    /// The result of an expression that can have only one.
    constant: Option<Result<Box<[u8]>, Failure>>,
    last: Option<Emission>,
    state: State,
    /// Runs in a row that were stopped.
    stopped: u32,
}

/// What became of an output when it last could have been emitted.
#[derive(Debug, Clone, PartialEq)]
enum State {
    /// Nothing has come in yet.
    Untouched,
    Emitted,
    Missing(usize),
    TooOld(usize),
    Failed(Failure),
    Resting {
        until_ms: u64,
        why: Failure,
    },
}

#[derive(Debug, Clone)]
struct Emission {
    at_ms: u64,
    timestamp_ms: i64,
    inputs: Vec<(usize, Variable)>,
}

/// The engine's time.
#[derive(Debug)]
struct Budget {
    /// Of one evaluation.
    time_limit: Duration,
    /// When the message came.
    now_ms: u64,
    /// Since then, for all outputs together.
    spent: Duration,
    /// Messages in a row for which it was not enough.
    overruns: u32,
    rests_until_ms: u64,
}

impl Budget {
    fn new(time_limit: Duration) -> Budget {
        Budget {
            time_limit,
            now_ms: 0,
            spent: Duration::ZERO,
            overruns: 0,
            rests_until_ms: 0,
        }
    }

    fn begin(&mut self, now_ms: u64) {
        self.now_ms = now_ms;
        self.spent = Duration::ZERO;
    }

    fn is_used_up(&self) -> bool {
        self.spent >= BUDGET || self.now_ms < self.rests_until_ms
    }

    fn end(&mut self) {
        if self.spent >= BUDGET {
            let rest = rest(BUDGET, self.overruns);
            self.rests_until_ms = self.now_ms + rest.as_millis() as u64;
            self.overruns += 1;
        } else if self.now_ms >= self.rests_until_ms {
            self.overruns = 0;
        }
    }
}

/// After having been stopped so many times in a row before.
fn rest(limit: Duration, stopped: u32) -> Duration {
    (limit * REST_FACTOR)
        .saturating_mul(1 << stopped.min(20))
        .min(LONGEST_REST)
}

#[derive(Debug, Default)]
struct Scratch {
    /// The payloads of one message's outputs, one after the other.
    bytes: Vec<u8>,
    /// Which output, and where its payload ends.
    parts: Vec<(usize, usize)>,
    touched: Vec<usize>,
}

/// What a mapping sends.
#[derive(Debug, Clone)]
pub struct Sent {
    pub topic: Topic,
    pub payload: Bytes,
    pub metadata: Option<Metadata>,
    /// Number of the output, for [`Mapping::outputs`].
    pub output: usize,
}

/// Upstream's counters. The times are nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Messages that have led to an output.
    pub messages_processed: u64,
    /// Messages that could not be read, and outputs that failed.
    pub messages_errored: u64,
    /// Messages that have led to no output.
    pub messages_dropped: u64,
    /// Evaluations that threw or had no result, also those whose failure was known.
    pub javascript_errors: u64,
    pub outputs_generated: u64,
    /// Messages that could not be read.
    pub invalid_data_type: u64,
    /// Messages that came too late, by the policy of their source.
    pub messages_late: u64,
    /// Evaluations by the engine, and their time: the fast path takes less than looking at a clock.
    pub javascript_executions: u64,
    pub javascript_execution_ns: u64,
    /// Messages whose time was taken (one of 64), and that time.
    pub messages_timed: u64,
    pub message_processing_ns: u64,
    /// Evaluations without the engine.
    pub fast_executions: u64,
    /// Evaluations that were stopped at a limit.
    pub stopped_executions: u64,
}

/// What an output is.
#[derive(Debug, Clone, Copy)]
pub struct OutputInfo<'a> {
    pub path: &'a str,
    pub topic: &'a Topic,
    pub umh_topic: &'a str,
    pub expression: &'a str,
    pub is_static: bool,
    pub is_volatile: bool,
    /// Whether it may run without the engine.
    pub is_fast: bool,
}

/// Why an output was last emitted or was not; see `headgate why`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    pub path: String,
    pub topic: String,
    pub expression: String,
    /// In words.
    pub state: String,
    pub is_emitting: bool,
    pub last: Option<LastEmission>,
    pub sources: Vec<SourceState>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LastEmission {
    pub at_ms: u64,
    pub timestamp_ms: i64,
    pub inputs: Vec<Input>,
}

/// A source's value when an output was emitted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Input {
    pub alias: String,
    pub value: String,
    pub timestamp_ms: i64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceState {
    pub alias: String,
    pub topic: String,
    pub value: Option<String>,
    pub timestamp_ms: Option<i64>,
    pub age_ms: Option<u64>,
    pub max_age_ms: Option<u64>,
}

/// A source's last value as it is kept on disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stored {
    pub alias: String,
    pub topic: String,
    /// JSON.
    pub value: String,
    pub timestamp_ms: i64,
    pub arrived_ms: u64,
}

impl fast::Sources for Vec<Source> {
    fn source(&self, number: usize) -> Option<&Value> {
        self[number]
            .variable
            .as_ref()
            .map(|variable| &variable.value)
    }
}

impl Mapping {
    /// Makes a mapping of its file's text; `file` is its name.
    pub fn load(text: &str, file: &str) -> Result<(Mapping, Vec<Warning>), ConfigError> {
        let (config, mut warnings) = Config::parse(text, file)?;
        let (mapping, further) = Mapping::new(&config, file)?;
        warnings.extend(further);
        warnings.sort_by_key(|warning| (warning.place.line, warning.place.column));
        Ok((mapping, warnings))
    }

    /// Analyses and compiles the expressions, and computes those that never change.
    pub fn new(config: &Config, file: &str) -> Result<(Mapping, Vec<Warning>), ConfigError> {
        let error = |place, message| ConfigError {
            file: file.to_owned(),
            place,
            message,
        };
        let aliases: Vec<&str> = config.sources.iter().map(|source| &*source.alias).collect();
        let expressions: Vec<&str> = config
            .outputs
            .iter()
            .map(|output| &*output.expression)
            .collect();
        let analysed = analysis::analyse(&expressions, &aliases).map_err(|problem| {
            error(
                Default::default(),
                format!("no thread for the analysis of expressions: {problem}"),
            )
        })?;
        let mut warnings = Vec::new();
        let mut outputs = Vec::with_capacity(analysed.len());
        let base = format!(
            "{}._{}_{}",
            config.output_topic, config.model_name, config.model_version
        );
        let mut left = BUDGET;
        for (output, analysed) in config.outputs.iter().zip(analysed) {
            let configured = output;
            let analysed = analysed.map_err(|refusal| {
                let place = config.place_in(output, refusal.offset.unwrap_or(0));
                let what = if refusal.is_compilation {
                    "failed to pre-compile expressions"
                } else {
                    "failed to analyze mappings"
                };
                error(
                    place,
                    format!("{what}: mapping '{}': {}", output.path, refusal.message),
                )
            })?;
            for finding in &analysed.findings {
                warnings.push(Warning {
                    place: config.place_in(output, finding.offset),
                    path: Some(output.path.clone()),
                    message: finding.message.clone(),
                });
            }
            let umh_topic = format!("{base}.{}", output.path);
            let topic = Topic::new(topic::to_mqtt(&umh_topic)).map_err(|problem| {
                error(
                    output.place,
                    format!("mapping '{}' goes to {umh_topic}: {problem}", output.path),
                )
            })?;
            let mut output = Output {
                path: output.path.as_str().into(),
                umh_topic: umh_topic.into(),
                topic,
                expression: output.expression.as_str().into(),
                analysed,
                constant: None,
                last: None,
                state: State::Untouched,
                stopped: 0,
            };
            if output.analysed.sources.is_empty()
                && !output.analysed.is_volatile
                && let Some(failure) = output.compute_constant(config.time_limit, &mut left)
            {
                warnings.push(Warning {
                    place: config.place_in(configured, 0),
                    path: Some(configured.path.clone()),
                    message: format!("it was stopped: {failure}"),
                });
            }
            outputs.push(output);
        }
        for (output, configured) in outputs.iter().zip(&config.outputs) {
            if let Some(Err(failure)) = &output.constant
                && output.analysed.findings.is_empty()
            {
                warnings.push(Warning {
                    place: configured.place,
                    path: Some(configured.path.clone()),
                    message: format!("it is never sent: {failure}"),
                });
            }
        }
        let sources = sources(config, &outputs, &mut warnings);
        let mut by_topic: FxHashMap<Box<str>, Vec<usize>> = FxHashMap::default();
        for (number, source) in sources.iter().enumerate() {
            let topic = topic::to_mqtt(&source.topic);
            by_topic.entry(topic.into()).or_default().push(number);
        }
        let statics = (0..outputs.len())
            .filter(|number| outputs[*number].analysed.sources.is_empty())
            .collect();
        Ok((
            Mapping {
                sources,
                outputs,
                by_topic: by_topic
                    .into_iter()
                    .map(|(topic, sources)| (topic, sources.into()))
                    .collect(),
                statics,
                budget: Budget::new(config.time_limit),
                counters: Counters::default(),
                changed: Vec::new(),
                scratch: Scratch::default(),
            },
            warnings,
        ))
    }

    /// The topics that it reads, as MQTT has them, each with the numbers of its sources.
    pub fn topics(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.by_topic
            .iter()
            .map(|(topic, sources)| (&**topic, &**sources))
    }

    pub fn outputs(&self) -> impl ExactSizeIterator<Item = OutputInfo<'_>> {
        self.outputs.iter().map(|output| OutputInfo {
            path: &output.path,
            topic: &output.topic,
            umh_topic: &output.umh_topic,
            expression: &output.expression,
            is_static: output.analysed.sources.is_empty(),
            is_volatile: output.analysed.is_volatile,
            is_fast: output.analysed.fast.is_some(),
        })
    }

    /// Aliases of the sources that an output reads.
    pub fn dependencies(&self, output: usize) -> impl Iterator<Item = &str> {
        self.outputs[output]
            .analysed
            .sources
            .iter()
            .map(|source| &*self.sources[*source].alias)
    }

    pub fn counters(&self) -> Counters {
        self.counters
    }

    pub fn active_variables(&self) -> usize {
        let known = |source: &&Source| source.variable.is_some();
        self.sources.iter().filter(known).count()
    }

    /// Leaves all expressions to the engine, to measure it.
    pub fn without_fast_path(mut self) -> Mapping {
        for output in &mut self.outputs {
            output.analysed.fast = None;
        }
        self
    }

    /// Takes a message on an MQTT topic; appends what it leads to. `now_ms` counts from the Unix epoch.
    pub fn on_message(
        &mut self,
        topic: &str,
        payload: &[u8],
        metadata: Option<&Metadata>,
        now_ms: u64,
        sent: &mut Vec<Sent>,
    ) -> Result<(), Refusal> {
        let reading = payload::read(payload);
        let Some(sources) = self.by_topic.get(topic) else {
            // Like upstream, which reads the payload before it looks at the topic.
            return match reading {
                Ok(_) => {
                    self.counters.messages_dropped += 1;
                    Ok(())
                }
                Err(refusal) => Err(self.refuse(refusal)),
            };
        };
        // Not borrowed: what follows changes the mapping. There is nearly always one.
        let sources: smallvec::SmallVec<[usize; 4]> = sources.iter().copied().collect();
        match reading {
            Ok(reading) => {
                self.on_reading(&sources, &reading, metadata, now_ms, sent);
                Ok(())
            }
            Err(refusal) => Err(self.refuse(refusal)),
        }
    }

    /// A message on one of its topics that can't be read.
    pub(super) fn refuse(&mut self, refusal: Refusal) -> Refusal {
        self.counters.messages_errored += 1;
        self.counters.invalid_data_type += 1;
        refusal
    }

    /// A message for these sources, which all have its topic.
    pub(super) fn on_reading(
        &mut self,
        sources: &[usize],
        reading: &Reading,
        metadata: Option<&Metadata>,
        now_ms: u64,
        sent: &mut Vec<Sent>,
    ) {
        const TIMED: u64 = 64;
        let counters = &self.counters;
        let messages = counters.messages_processed + counters.messages_dropped;
        let start = messages.is_multiple_of(TIMED).then(Instant::now);
        let before = sent.len();
        // All aliases of the topic are set before anything is evaluated.
        let mut touched = std::mem::take(&mut self.scratch.touched);
        touched.clear();
        let mut is_any_late = false;
        for &number in sources {
            let source = &mut self.sources[number];
            match source.late {
                Late::Accept => {}
                Late::Drop | Late::Reorder(_) if source.is_late(reading.timestamp_ms) => {
                    is_any_late = true;
                    continue;
                }
                Late::Drop => {}
                Late::Reorder(window) => {
                    source.wait(reading, now_ms, window, metadata);
                    continue;
                }
            }
            self.set(
                number,
                Variable {
                    value: reading.value.clone(),
                    timestamp_ms: reading.timestamp_ms,
                    arrived_ms: now_ms,
                },
            );
            touched.push(number);
        }
        if is_any_late {
            self.counters.messages_late += 1;
        }
        if !touched.is_empty() {
            self.emit(&touched, reading.timestamp_ms, metadata, now_ms, sent);
        }
        self.scratch.touched = touched;
        self.release(sources, now_ms, sent);
        if sent.len() > before {
            self.counters.messages_processed += 1;
        } else {
            self.counters.messages_dropped += 1;
        }
        if let Some(start) = start {
            self.counters.messages_timed += 1;
            self.counters.message_processing_ns += nanoseconds(start);
        }
    }

    /// How long a message may wait for earlier ones.
    pub fn longest_wait(&self) -> Duration {
        let windows = self.sources.iter().map(|source| match source.late {
            Late::Reorder(window) => window,
            Late::Accept | Late::Drop => Duration::ZERO,
        });
        windows.max().unwrap_or_default()
    }

    /// When [`Mapping::on_time`] has something to do, in milliseconds since the Unix epoch.
    pub fn next_time(&self) -> Option<u64> {
        self.sources.iter().filter_map(Source::next_time).min()
    }

    /// Lets messages go on that have waited long enough for earlier ones.
    pub fn on_time(&mut self, now_ms: u64, sent: &mut Vec<Sent>) {
        let waiting: Vec<usize> = (0..self.sources.len())
            .filter(|number| !self.sources[*number].waiting.is_empty())
            .collect();
        self.release(&waiting, now_ms, sent);
    }

    fn release(&mut self, sources: &[usize], now_ms: u64, sent: &mut Vec<Sent>) {
        for &number in sources {
            while let Some((timestamp_ms, waiting)) = self.sources[number].next_ready(now_ms) {
                self.set(
                    number,
                    Variable {
                        value: waiting.value,
                        timestamp_ms,
                        arrived_ms: now_ms,
                    },
                );
                self.emit(
                    &[number],
                    timestamp_ms,
                    waiting.metadata.as_ref(),
                    now_ms,
                    sent,
                );
            }
        }
    }

    fn set(&mut self, number: usize, variable: Variable) {
        let source = &mut self.sources[number];
        source.variable = Some(variable);
        if !source.is_changed {
            source.is_changed = true;
            self.changed.push(number);
        }
    }

    /// Evaluates the statics, and what reads the sources that were just set.
    fn emit(
        &mut self,
        touched: &[usize],
        timestamp_ms: i64,
        metadata: Option<&Metadata>,
        now_ms: u64,
        sent: &mut Vec<Sent>,
    ) {
        let Mapping {
            sources,
            outputs,
            statics,
            budget,
            counters,
            scratch,
            ..
        } = self;
        budget.begin(now_ms);
        scratch.bytes.clear();
        scratch.parts.clear();
        let mut evaluate = |number: usize| {
            let output: &mut Output = &mut outputs[number];
            if output.emit(sources, timestamp_ms, budget, counters, &mut scratch.bytes) {
                scratch.parts.push((number, scratch.bytes.len()));
            }
        };
        statics.iter().copied().for_each(&mut evaluate);
        match touched {
            [one] => sources[*one]
                .dependents
                .iter()
                .copied()
                .for_each(&mut evaluate),
            several => {
                let mut all: Vec<usize> = several
                    .iter()
                    .flat_map(|source| sources[*source].dependents.iter().copied())
                    .collect();
                all.sort_unstable();
                all.dedup();
                all.into_iter().for_each(&mut evaluate);
            }
        }
        budget.end();
        if scratch.parts.is_empty() {
            return;
        }
        // One allocation for all payloads; the last one needs no share in it.
        let mut rest = Bytes::copy_from_slice(&scratch.bytes);
        let mut start = 0;
        counters.outputs_generated += scratch.parts.len() as u64;
        for &(output, end) in &scratch.parts {
            let payload = if end == scratch.bytes.len() {
                std::mem::take(&mut rest)
            } else {
                rest.split_to(end - start)
            };
            sent.push(Sent {
                topic: outputs[output].topic.clone(),
                payload,
                metadata: metadata.cloned(),
                output,
            });
            start = end;
        }
    }

    // ---- what outlives it

    /// The last values of the sources that have changed since the last call.
    pub fn take_changed(&mut self) -> Vec<Stored> {
        let mut stored = Vec::with_capacity(self.changed.len());
        for number in self.changed.drain(..) {
            let source = &mut self.sources[number];
            source.is_changed = false;
            stored.extend(source.stored());
        }
        stored
    }

    /// The last values of all sources.
    pub fn variables(&self) -> impl Iterator<Item = Stored> {
        self.sources.iter().filter_map(Source::stored)
    }

    /// Sets what was stored, where there still is a source of that alias and topic.
    pub fn restore(&mut self, stored: impl IntoIterator<Item = Stored>) {
        let numbers = self.numbers();
        for stored in stored {
            if let Some(&number) = numbers.get(stored.alias.as_str())
                && *self.sources[number].topic == *stored.topic
                && let Some(value) = payload::read_value(stored.value.as_bytes())
            {
                self.sources[number].variable = Some(Variable {
                    value,
                    timestamp_ms: stored.timestamp_ms,
                    arrived_ms: stored.arrived_ms,
                });
            }
        }
    }

    /// Is from here on as it was loaded, but for its counts.
    pub fn forget(&mut self) {
        for source in &mut self.sources {
            source.variable = None;
            source.is_changed = false;
            source.waiting.clear();
            source.arrivals = 0;
        }
        for output in &mut self.outputs {
            output.last = None;
            output.state = State::Untouched;
            output.stopped = 0;
        }
        self.changed.clear();
        self.budget = Budget::new(self.budget.time_limit);
    }

    /// Takes over the values of the sources that have the same alias and topic in `old`, and its counts.
    pub fn adopt(&mut self, old: &Mapping) {
        let numbers = self.numbers();
        for source in &old.sources {
            if let Some(&number) = numbers.get(&*source.alias)
                && self.sources[number].topic == source.topic
            {
                let own = &mut self.sources[number];
                own.variable.clone_from(&source.variable);
                if let Late::Reorder(_) = own.late {
                    own.waiting.clone_from(&source.waiting);
                    own.arrivals = source.arrivals;
                }
            }
        }
        for number in &old.changed {
            let source = &old.sources[*number];
            if let Some(&number) = numbers.get(&*source.alias)
                && self.sources[number].topic == source.topic
                && !self.sources[number].is_changed
            {
                self.sources[number].is_changed = true;
                self.changed.push(number);
            }
        }
        self.counters = old.counters;
    }

    fn numbers(&self) -> FxHashMap<Box<str>, usize> {
        let named = self.sources.iter().enumerate();
        named
            .map(|(number, source)| (source.alias.clone(), number))
            .collect()
    }

    // ---- why

    /// All sources, in the order of the file.
    pub fn sources(&self, now_ms: u64) -> Vec<SourceState> {
        self.sources
            .iter()
            .map(|source| source.state(now_ms))
            .collect()
    }

    /// Why the output of this path was last emitted or was not.
    pub fn explain(&self, path: &str, now_ms: u64) -> Option<Explanation> {
        let output = self.outputs.iter().find(|output| *output.path == *path)?;
        Some(Explanation {
            path: output.path.to_string(),
            topic: output.topic.to_string(),
            expression: output.expression.to_string(),
            state: self.describe(output, now_ms),
            is_emitting: output.state == State::Emitted,
            last: output.last.as_ref().map(|last| LastEmission {
                at_ms: last.at_ms,
                timestamp_ms: last.timestamp_ms,
                inputs: last
                    .inputs
                    .iter()
                    .map(|(source, variable)| Input {
                        alias: self.sources[*source].alias.to_string(),
                        value: shown(&variable.value),
                        timestamp_ms: variable.timestamp_ms,
                    })
                    .collect(),
            }),
            sources: output
                .analysed
                .sources
                .iter()
                .map(|number| self.sources[*number].state(now_ms))
                .collect(),
        })
    }

    fn describe(&self, output: &Output, now_ms: u64) -> String {
        // What is missing now says more than what was missing when something last came.
        let reads = &output.analysed.sources;
        let missing: Vec<&str> = reads
            .iter()
            .map(|number| &self.sources[*number])
            .filter(|source| source.variable.is_none())
            .map(|source| &*source.alias)
            .collect();
        if !missing.is_empty() {
            return format!("waits for {}", missing.join(", "));
        }
        let is_old = |number: &&usize| self.sources[**number].is_too_old(now_ms);
        let state = match (reads.iter().find(is_old), &output.state) {
            (Some(number), _) => &State::TooOld(*number),
            (None, state) => state,
        };
        match state {
            State::Untouched => {
                "no message has come in since it was installed or the gateway started".to_owned()
            }
            State::Emitted => "emitted".to_owned(),
            State::Missing(source) => format!("waited for {}", self.sources[*source].alias),
            State::TooOld(source) => {
                let source = &self.sources[*source];
                let age = source
                    .variable
                    .as_ref()
                    .map_or(0, |variable| now_ms.saturating_sub(variable.arrived_ms));
                format!(
                    "{} is too old: its last value came {:?} ago, and {:?} is the most",
                    source.alias,
                    Duration::from_millis(age),
                    Duration::from_millis(source.max_age_ms.unwrap_or_default()),
                )
            }
            State::Failed(failure) => failure.to_string(),
            State::Resting { until_ms, why } => format!(
                "{why}; it rests for another {:?}",
                Duration::from_millis(until_ms.saturating_sub(now_ms))
            ),
        }
    }
}

impl Output {
    /// What it takes is taken off `left`; if nothing is, it is evaluated with each message. Returns by what it
    /// was stopped.
    fn compute_constant(&mut self, time_limit: Duration, left: &mut Duration) -> Option<Failure> {
        if left.is_zero() {
            return None;
        }
        let start = Instant::now();
        let time_limit = time_limit.min(*left);
        let mut bytes = Vec::new();
        let result = match &self.analysed.fast {
            Some(node) => match node.evaluate(&Vec::new()) {
                Ok(value) => value.write(&mut bytes),
                Err(fast::GiveUp) => engine::evaluate(
                    &self.analysed.script,
                    std::iter::empty(),
                    time_limit,
                    &mut bytes,
                ),
            },
            None => engine::evaluate(
                &self.analysed.script,
                std::iter::empty(),
                time_limit,
                &mut bytes,
            ),
        };
        *left = left.saturating_sub(start.elapsed());
        match result {
            // Perhaps another time: the machine may have been busy, or another script the cause.
            Err(stopped @ (Failure::TimeLimit(_) | Failure::Memory | Failure::NoEngine(_))) => {
                Some(stopped)
            }
            result => {
                self.constant = Some(result.map(|()| bytes.into()));
                None
            }
        }
    }

    /// Appends the payload, if there is one.
    fn emit(
        &mut self,
        sources: &Vec<Source>,
        timestamp_ms: i64,
        budget: &mut Budget,
        counters: &mut Counters,
        bytes: &mut Vec<u8>,
    ) -> bool {
        let Budget {
            now_ms, time_limit, ..
        } = *budget;
        for &number in &self.analysed.sources {
            let source = &sources[number];
            if source.variable.is_none() {
                self.state = State::Missing(number);
                return false;
            }
            if source.is_too_old(now_ms) {
                self.state = State::TooOld(number);
                return false;
            }
        }
        if let State::Resting { until_ms, .. } = &self.state
            && now_ms < *until_ms
        {
            counters.messages_errored += 1;
            return false;
        }
        let start = bytes.len();
        bytes.extend_from_slice(b"{\"value\":");
        match self.evaluate(sources, budget, counters, bytes) {
            Ok(()) => {
                bytes.extend_from_slice(b",\"timestamp_ms\":");
                bytes.extend_from_slice(itoa::Buffer::new().format(timestamp_ms).as_bytes());
                bytes.push(b'}');
                self.state = State::Emitted;
                self.stopped = 0;
                self.note(sources, timestamp_ms, now_ms);
                true
            }
            Err(failure) => {
                bytes.truncate(start);
                counters.messages_errored += 1;
                if matches!(
                    failure,
                    Failure::Thrown(_)
                        | Failure::Undefined
                        | Failure::Null
                        | Failure::TimeLimit(_)
                        | Failure::Overrun
                        | Failure::Memory
                        | Failure::NoEngine(_)
                ) {
                    counters.javascript_errors += 1;
                }
                if matches!(failure, Failure::TimeLimit(_) | Failure::Memory) {
                    counters.stopped_executions += 1;
                    let rest = rest(time_limit, self.stopped);
                    self.stopped += 1;
                    self.state = State::Resting {
                        until_ms: now_ms + rest.as_millis() as u64,
                        why: failure,
                    };
                } else {
                    self.state = State::Failed(failure);
                }
                false
            }
        }
    }

    fn evaluate(
        &self,
        sources: &Vec<Source>,
        budget: &mut Budget,
        counters: &mut Counters,
        bytes: &mut Vec<u8>,
    ) -> Result<(), Failure> {
        match &self.constant {
            Some(Ok(json)) => {
                bytes.extend_from_slice(json);
                return Ok(());
            }
            Some(Err(failure)) => return Err(failure.clone()),
            None => {}
        }
        if let Some(node) = &self.analysed.fast
            && let Ok(value) = node.evaluate(sources)
        {
            counters.fast_executions += 1;
            return value.write(bytes);
        }
        if budget.is_used_up() {
            return Err(Failure::Overrun);
        }
        let time_limit = budget.time_limit;
        let start = Instant::now();
        let variables = self.analysed.sources.iter().filter_map(|number| {
            let value = sources.source(*number)?;
            Some((&*sources[*number].alias, value))
        });
        let result = engine::evaluate(&self.analysed.script, variables, time_limit, bytes);
        counters.javascript_executions += 1;
        counters.javascript_execution_ns += nanoseconds(start);
        let took = start.elapsed();
        budget.spent += took;
        match took > time_limit * UNSTOPPABLE_FACTOR {
            true => Err(Failure::TimeLimit(time_limit)),
            false => result,
        }
    }

    fn note(&mut self, sources: &[Source], timestamp_ms: i64, now_ms: u64) {
        let last = self.last.get_or_insert_with(|| Emission {
            at_ms: now_ms,
            timestamp_ms,
            inputs: Vec::with_capacity(self.analysed.sources.len()),
        });
        last.at_ms = now_ms;
        last.timestamp_ms = timestamp_ms;
        last.inputs.clear();
        for &number in &self.analysed.sources {
            let variable = sources[number].variable.clone();
            last.inputs
                .extend(variable.map(|variable| (number, variable)));
        }
    }
}

impl Source {
    /// Older than what it has.
    fn is_late(&self, timestamp_ms: i64) -> bool {
        self.variable
            .as_ref()
            .is_some_and(|variable| timestamp_ms < variable.timestamp_ms)
    }

    fn wait(
        &mut self,
        reading: &Reading,
        now_ms: u64,
        window: Duration,
        metadata: Option<&Metadata>,
    ) {
        self.arrivals += 1;
        self.waiting.insert(
            (reading.timestamp_ms, self.arrivals),
            Waiting {
                value: reading.value.clone(),
                until_ms: now_ms + window.as_millis() as u64,
                metadata: metadata.cloned(),
            },
        );
    }

    /// Of those that wait, the earliest goes on when any has waited long enough: what comes before that
    /// one in time has come before it in the order, too.
    fn next_ready(&mut self, now_ms: u64) -> Option<(i64, Waiting)> {
        let is_due = self.next_time().is_some_and(|time| time <= now_ms);
        if !is_due && self.waiting.len() <= MAX_WAITING {
            return None;
        }
        let ((timestamp_ms, _), waiting) = self.waiting.pop_first()?;
        Some((timestamp_ms, waiting))
    }

    fn next_time(&self) -> Option<u64> {
        self.waiting.values().map(|waiting| waiting.until_ms).min()
    }

    fn is_too_old(&self, now_ms: u64) -> bool {
        let age = self
            .variable
            .as_ref()
            .map(|variable| now_ms.saturating_sub(variable.arrived_ms));
        age.zip(self.max_age_ms).is_some_and(|(age, max)| age > max)
    }

    fn stored(&self) -> Option<Stored> {
        let variable = self.variable.as_ref()?;
        Some(Stored {
            alias: self.alias.to_string(),
            topic: self.topic.to_string(),
            value: json(&variable.value),
            timestamp_ms: variable.timestamp_ms,
            arrived_ms: variable.arrived_ms,
        })
    }

    fn state(&self, now_ms: u64) -> SourceState {
        let variable = self.variable.as_ref();
        SourceState {
            alias: self.alias.to_string(),
            topic: self.topic.to_string(),
            value: variable.map(|variable| shown(&variable.value)),
            timestamp_ms: variable.map(|variable| variable.timestamp_ms),
            age_ms: variable.map(|variable| now_ms.saturating_sub(variable.arrived_ms)),
            max_age_ms: self.max_age_ms,
        }
    }
}

fn sources(config: &Config, outputs: &[Output], warnings: &mut Vec<Warning>) -> Vec<Source> {
    let mut dependents = vec![Vec::new(); config.sources.len()];
    for (number, output) in outputs.iter().enumerate() {
        for source in &output.analysed.sources {
            dependents[*source].push(number);
        }
    }
    config
        .sources
        .iter()
        .zip(dependents)
        .map(|(source, dependents)| {
            let problem = if analysis::BUILT_IN.contains(&&*source.alias) {
                Some("has the name of something built in, so no expression can read it")
            } else if !analysis::is_identifier(&source.alias) {
                Some("is no identifier of JavaScript, so no expression can read it")
            } else if dependents.is_empty() && !outputs.is_empty() {
                Some("is read by no expression")
            } else {
                None
            };
            if let Some(problem) = problem {
                warnings.push(Warning {
                    place: source.place,
                    path: None,
                    message: format!("source {} {problem}", source.alias),
                });
            }
            Source {
                alias: source.alias.as_str().into(),
                topic: source.topic.as_str().into(),
                max_age_ms: source
                    .max_age
                    .map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
                late: source.late,
                variable: None,
                is_changed: false,
                dependents: dependents.into(),
                waiting: BTreeMap::new(),
                arrivals: 0,
            }
        })
        .collect()
}

/// For people: the beginning of it, if it is long.
fn shown(value: &Value) -> String {
    let mut text = json(value);
    let bytes = text.len();
    if bytes > SHOWN_BYTES {
        text.truncate(text.floor_char_boundary(SHOWN_BYTES));
        text += &format!("… ({bytes} bytes)");
    }
    text
}

fn json(value: &Value) -> String {
    let mut bytes = Vec::new();
    payload::write_value(value, &mut bytes);
    String::from_utf8(bytes).expect("JSON is written as UTF-8")
}

fn nanoseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}
