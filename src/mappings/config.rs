//! The configuration of a mapping: upstream's YAML as it is, and what Headgate adds under `headgate`.

use std::fmt;
use std::time::Duration;

use rustc_hash::FxHashMap;

use super::topic;
use super::yaml::{self, Key, Kind, Node, Place, Resolved};

/// How long an expression may run, unless the file says otherwise. Upstream has 5 s, in which one bad
/// expression holds up everything; what people write takes microseconds.
pub const DEFAULT_TIME_LIMIT: Duration = Duration::from_millis(50);

const LONGEST_TIME_LIMIT: Duration = Duration::from_secs(5);

/// How long a message waits for earlier ones under `late: reorder`.
pub const DEFAULT_REORDER_WINDOW: Duration = Duration::from_secs(1);

const LONGEST_REORDER_WINDOW: Duration = Duration::from_secs(60);

/// Sources, and outputs, of one mapping.
pub const MAX_ENTRIES: usize = 10_000;

/// A mapping as its file has it, valid but for its expressions.
#[derive(Debug, Clone)]
pub struct Config {
    pub model_name: String,
    pub model_version: String,
    /// Where outputs go to, without the model and the path.
    pub output_topic: String,
    pub sources: Vec<SourceConfig>,
    /// In the order of the file, flattened.
    pub outputs: Vec<OutputConfig>,
    pub time_limit: Duration,
    /// To find the places in expressions.
    file: String,
}

#[derive(Debug, Clone)]
pub struct SourceConfig {
    pub alias: String,
    /// As the file has it.
    pub topic: String,
    /// From when on its value is too old to be used.
    pub max_age: Option<Duration>,
    pub late: Late,
    pub place: Place,
}

/// What becomes of a message that is older than its source's last one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Late {
    /// It becomes the source's value.
    #[default]
    Accept,
    /// It changes nothing.
    Drop,
    /// All messages wait that long for earlier ones; what comes even later changes nothing.
    Reorder(Duration),
}

#[derive(Debug, Clone)]
pub struct OutputConfig {
    /// The virtual path, with dots.
    pub path: String,
    pub expression: String,
    pub place: Place,
    scalar: Option<yaml::Scalar>,
}

/// Something that is probably a mistake, though upstream takes it.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Warning {
    pub place: Place,
    /// Of the output that it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    pub message: String,
}

/// Why a file can't be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{file}:{place}: {message}")]
pub struct ConfigError {
    pub file: String,
    pub place: Place,
    pub message: String,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.place)?;
        if let Some(path) = &self.path {
            write!(f, "mapping.{path}: ")?;
        }
        f.write_str(&self.message)
    }
}

const BODY_KEYS: [&str; 6] = [
    "mode",
    "model",
    "output_topic",
    "sources",
    "mapping",
    "headgate",
];

impl Config {
    /// Reads `text`: a stream_processor by itself, or a benthos file that has one somewhere. `file` is
    /// its name, for errors.
    pub fn parse(text: &str, file: &str) -> Result<(Config, Vec<Warning>), ConfigError> {
        let mut reader = Reader::default();
        reader
            .file(text)
            .map(|config| (config, reader.warnings))
            .map_err(|problem| ConfigError {
                file: file.to_owned(),
                place: problem.place,
                message: problem.message,
            })
    }

    /// Where the byte `offset` of an output's expression is in the file.
    pub(super) fn place_in(&self, output: &OutputConfig, offset: usize) -> Place {
        match &output.scalar {
            Some(scalar) => yaml::place_within(&self.file, output.place, scalar, offset),
            None => output.place,
        }
    }
}

struct Problem {
    place: Place,
    message: String,
}

fn problem<T>(place: Place, message: impl Into<String>) -> Result<T, Problem> {
    Err(Problem {
        place,
        message: message.into(),
    })
}

#[derive(Default)]
struct Reader {
    warnings: Vec<Warning>,
    /// Where the output of a path is in the list.
    paths: FxHashMap<String, usize>,
}

impl Reader {
    fn warn(&mut self, place: Place, message: String) {
        self.warnings.push(Warning {
            place,
            path: None,
            message,
        });
    }

    fn file(&mut self, text: &str) -> Result<Config, Problem> {
        let root = yaml::parse(text).map_err(|error| Problem {
            place: error.place,
            message: format!("not valid YAML: {}", error.message),
        })?;
        let mut found = Vec::new();
        find(&root, &mut found);
        let body = match found[..] {
            [one] => one,
            [] => match &root.kind {
                Kind::Mapping(members) if members.iter().any(|(key, _)| is_body(key)) => &root,
                _ => return problem(root.place, "there is no stream_processor in this file"),
            },
            [first, second, ..] => {
                return problem(
                    second.place,
                    format!(
                        "a second stream_processor; the first is in line {}: a mapping is made of one",
                        first.place.line
                    ),
                );
            }
        };
        self.body(body, text)
    }

    fn body(&mut self, body: &Node, file: &str) -> Result<Config, Problem> {
        known_keys(body, "", &BODY_KEYS)?;
        let place_of = |key: &str| body.get(key).map_or(body.place, |node| node.place);
        // Types before values, and values in upstream's order.
        let mode = string(body, "mode")?.unwrap_or("timeseries");
        let model = match body.get("model") {
            None => None,
            Some(model) => {
                members(model, "model")?;
                known_keys(model, "model.", &["name", "version"])?;
                Some(model)
            }
        };
        let model_string = |key| match model {
            None => Ok(""),
            Some(model) => string(model, key).map(Option::unwrap_or_default),
        };
        let (model_name, model_version) = (model_string("name")?, model_string("version")?);
        let output_topic = string(body, "output_topic")?.unwrap_or_default();
        let sources = match body.get("sources") {
            None => &[][..],
            Some(sources) => members(sources, "sources")?,
        };
        if mode.is_empty() {
            return problem(place_of("mode"), "mode is required");
        }
        if mode != "timeseries" {
            return problem(
                place_of("mode"),
                format!("unsupported mode: {mode} (only 'timeseries' is supported)"),
            );
        }
        if output_topic.is_empty() {
            return problem(place_of("output_topic"), "output_topic is required");
        }
        if model_name.is_empty() {
            return problem(place_of("model"), "model name is required");
        }
        if model_version.is_empty() {
            return problem(place_of("model"), "model version is required");
        }
        if sources.is_empty() {
            return problem(
                place_of("sources"),
                "at least one source mapping is required",
            );
        }
        if sources.len() > MAX_ENTRIES {
            return problem(
                place_of("sources"),
                format!("more than {MAX_ENTRIES} sources"),
            );
        }
        if let Err(what) = topic::check_location(output_topic) {
            self.warn(
                place_of("output_topic"),
                format!(
                    "output_topic {output_topic} is not as the Unified Namespace has it: {what}"
                ),
            );
        }
        let mut sources = sources
            .iter()
            .map(|(alias, node)| self.source(alias, node))
            .collect::<Result<Vec<_>, _>>()?;
        let mut outputs = Vec::new();
        if let Some(mapping) = body.get("mapping") {
            if !matches!(mapping.kind, Kind::Mapping(_)) {
                return problem(mapping.place, "mapping field must be an object");
            }
            self.outputs(mapping, "", &mut outputs)?;
        }
        let time_limit = match body.get("headgate") {
            None => DEFAULT_TIME_LIMIT,
            Some(additions) => self.additions(additions, &mut sources)?,
        };
        Ok(Config {
            model_name: model_name.to_owned(),
            model_version: model_version.to_owned(),
            output_topic: output_topic.to_owned(),
            sources,
            outputs,
            time_limit,
            file: file.to_owned(),
        })
    }

    fn source(&mut self, alias: &Key, node: &Node) -> Result<SourceConfig, Problem> {
        let Some(topic) = text(node) else {
            return problem(
                node.place,
                format!(
                    "sources.{} must be a topic, as a string; it is {}",
                    alias.text,
                    node.describe()
                ),
            );
        };
        let mqtt = topic::to_mqtt(topic);
        if mqtt.is_empty() || mqtt.contains(['+', '#', '\0']) {
            self.warn(
                node.place,
                format!(
                    "sources.{}: {topic:?} is no topic that a message can have (there are no \
                     wildcards here), so this source never gets a value",
                    alias.text
                ),
            );
        } else if let Err(what) = topic::check(&topic::to_umh(topic)) {
            self.warn(
                node.place,
                format!(
                    "sources.{}: {topic} is not as the Unified Namespace has it: {what}",
                    alias.text
                ),
            );
        }
        Ok(SourceConfig {
            alias: alias.text.clone(),
            topic: topic.to_owned(),
            max_age: None,
            late: Late::Accept,
            place: alias.place,
        })
    }

    fn outputs(
        &mut self,
        mapping: &Node,
        prefix: &str,
        outputs: &mut Vec<OutputConfig>,
    ) -> Result<(), Problem> {
        let Kind::Mapping(members) = &mapping.kind else {
            return Ok(());
        };
        for (key, node) in members {
            let path = if prefix.is_empty() {
                key.text.clone()
            } else {
                format!("{prefix}.{}", key.text)
            };
            let (expression, scalar) = match &node.kind {
                Kind::Mapping(_) => {
                    self.outputs(node, &path, outputs)?;
                    continue;
                }
                Kind::Sequence(_) => {
                    return problem(
                        node.place,
                        format!(
                            "mapping.{path} is a list, not an expression; as a string it is one: '[…]'"
                        ),
                    );
                }
                Kind::Scalar(scalar) => match scalar.resolve() {
                    Resolved::String(text) => (text.to_owned(), Some(scalar.clone())),
                    Resolved::Bool(is) => (is.to_string(), None),
                    Resolved::Number(number) => (
                        super::value::NumberText::new(number).as_str().to_owned(),
                        None,
                    ),
                    Resolved::Null => {
                        return problem(
                            node.place,
                            format!("mapping.{path} is empty: it needs an expression"),
                        );
                    }
                    Resolved::Date => {
                        return problem(
                            node.place,
                            format!(
                                "mapping.{path} is a date to YAML, not an expression; for a text \
                                 quote it twice: '\"{}\"'",
                                scalar.text
                            ),
                        );
                    }
                },
            };
            let output = OutputConfig {
                path,
                expression,
                place: node.place,
                scalar,
            };
            match self.paths.get(&output.path) {
                Some(&known) => {
                    self.warn(
                        key.place,
                        format!(
                            "mapping.{} is there already, in line {}: this one counts",
                            output.path, outputs[known].place.line
                        ),
                    );
                    outputs[known] = output;
                }
                None => {
                    self.paths.insert(output.path.clone(), outputs.len());
                    outputs.push(output);
                }
            }
            if outputs.len() > MAX_ENTRIES {
                return problem(mapping.place, format!("more than {MAX_ENTRIES} outputs"));
            }
        }
        Ok(())
    }

    /// `headgate`: the defaults for all sources, then single ones.
    fn additions(
        &mut self,
        additions: &Node,
        sources: &mut [SourceConfig],
    ) -> Result<Duration, Problem> {
        members(additions, "headgate")?;
        const OF_SOURCES: [&str; 3] = ["max_age", "late", "reorder_window"];
        known_keys(
            additions,
            "headgate.",
            &["max_age", "late", "reorder_window", "sources", "time_limit"],
        )?;
        let defaults = source_settings(additions, "headgate.", Settings::default())?;
        for source in &mut *sources {
            defaults.apply(source);
        }
        if let Some(single) = additions.get("sources") {
            for (alias, settings) in members(single, "headgate.sources")? {
                let prefix = format!("headgate.sources.{}.", alias.text);
                let Some(source) = sources.iter_mut().find(|source| source.alias == alias.text)
                else {
                    return problem(
                        alias.place,
                        format!("headgate.sources.{}: there is no such source", alias.text),
                    );
                };
                members(settings, prefix.trim_end_matches('.'))?;
                known_keys(settings, &prefix, &OF_SOURCES)?;
                source_settings(settings, &prefix, defaults)?.apply(source);
            }
        }
        Ok(
            duration(additions, "time_limit", "headgate.", LONGEST_TIME_LIMIT)?
                .unwrap_or(DEFAULT_TIME_LIMIT),
        )
    }
}

#[derive(Clone, Copy, Default)]
struct Settings {
    max_age: Option<Duration>,
    late: Late,
    window: Option<Duration>,
}

impl Settings {
    fn apply(&self, source: &mut SourceConfig) {
        source.max_age = self.max_age;
        source.late = match (self.late, self.window) {
            (Late::Reorder(_), Some(window)) => Late::Reorder(window),
            (late, _) => late,
        };
    }
}

fn source_settings(node: &Node, prefix: &str, defaults: Settings) -> Result<Settings, Problem> {
    let late = match string(node, "late")? {
        None => defaults.late,
        Some("accept") => Late::Accept,
        Some("drop") => Late::Drop,
        Some("reorder") => Late::Reorder(DEFAULT_REORDER_WINDOW),
        Some(other) => {
            return problem(
                node.get("late").expect("it has a value").place,
                format!("{prefix}late is {other:?}; it can be accept, drop or reorder"),
            );
        }
    };
    Ok(Settings {
        max_age: duration(node, "max_age", prefix, Duration::MAX)?.or(defaults.max_age),
        late,
        window: duration(node, "reorder_window", prefix, LONGEST_REORDER_WINDOW)?
            .or(defaults.window),
    })
}

fn is_body(key: &Key) -> bool {
    BODY_KEYS.contains(&key.text.as_str())
}

/// Every stream_processor in the tree.
fn find<'n>(node: &'n Node, found: &mut Vec<&'n Node>) {
    match &node.kind {
        Kind::Scalar(_) => {}
        Kind::Sequence(items) => items.iter().for_each(|item| find(item, found)),
        Kind::Mapping(members) => {
            for (key, value) in members {
                if key.text == "stream_processor" && matches!(value.kind, Kind::Mapping(_)) {
                    found.push(value);
                } else {
                    find(value, found);
                }
            }
        }
    }
}

fn members<'n>(node: &'n Node, name: &str) -> Result<&'n [(Key, Node)], Problem> {
    match &node.kind {
        Kind::Mapping(members) => Ok(members),
        _ => problem(
            node.place,
            format!("{name} must be a mapping; it is {}", node.describe()),
        ),
    }
}

fn known_keys(node: &Node, prefix: &str, known: &[&str]) -> Result<(), Problem> {
    for (key, _) in members(node, prefix.trim_end_matches('.'))? {
        if known.contains(&key.text.as_str()) {
            continue;
        }
        let near = crate::config::nearest(&key.text, known.iter().copied());
        return problem(
            key.place,
            match near {
                Some(near) => format!("unknown key {prefix}{}; is it {prefix}{near}?", key.text),
                None => format!(
                    "unknown key {prefix}{}; there are {}",
                    key.text,
                    known.join(", ")
                ),
            },
        );
    }
    Ok(())
}

fn text(node: &Node) -> Option<&str> {
    match &node.kind {
        Kind::Scalar(scalar) => match scalar.resolve() {
            Resolved::String(text) => Some(text),
            _ => None,
        },
        _ => None,
    }
}

fn string<'n>(node: &'n Node, key: &str) -> Result<Option<&'n str>, Problem> {
    let Some(value) = node.get(key) else {
        return Ok(None);
    };
    match text(value) {
        Some(text) => Ok(Some(text)),
        None => problem(
            value.place,
            format!(
                "{key} must be a string; it is {}: put it in quotes",
                value.describe()
            ),
        ),
    }
}

/// `500ms`, `5s`, `10m`, `1h`, `2d`.
fn duration(
    node: &Node,
    key: &str,
    prefix: &str,
    longest: Duration,
) -> Result<Option<Duration>, Problem> {
    let Some(value) = node.get(key) else {
        return Ok(None);
    };
    let parsed = text(value).and_then(|text| {
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let number: u64 = text[..digits].parse().ok()?;
        let unit = match text[digits..].trim_start() {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return None,
        };
        number.checked_mul(unit).map(Duration::from_millis)
    });
    match parsed {
        None => problem(
            value.place,
            format!("{prefix}{key} must be a time as in 500ms, 5s, 10m, 1h or 2d"),
        ),
        Some(Duration::ZERO) => problem(value.place, format!("{prefix}{key} must be more than 0")),
        Some(parsed) if parsed > longest => problem(
            value.place,
            format!("{prefix}{key} can be {longest:?} at most"),
        ),
        Some(parsed) => Ok(Some(parsed)),
    }
}
