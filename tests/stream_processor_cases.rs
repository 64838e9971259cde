//! Mappings give what upstream's stream processor gives, but for a table of defects that are mended.
//!
//! A case says what upstream made of a mapping and some messages. A difference must be covered by a row
//! of the table below, which is the one in `docs/mappings.md`: a class of defect, with a condition as
//! narrow as it can be put, and examples. The examples must differ, so that no row outlives its reason.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, fs};

use headgate::mappings::{Mapping, Metadata, to_mqtt};
use serde::Deserialize;

const OUTPUT_TOPIC: &str = "umh.v1.corpA.plant-A.aawd";

#[derive(Deserialize)]
struct Case {
    group: String,
    name: String,
    sources: BTreeMap<String, String>,
    #[serde(default)]
    mapping: serde_json::Value,
    #[serde(default)]
    inputs: Option<Vec<Message>>,
    #[serde(default)]
    config_error: Option<String>,
    #[serde(default)]
    kind: Option<BTreeMap<String, String>>,
    #[serde(default)]
    deps: Option<BTreeMap<String, BTreeSet<String>>>,
    #[serde(default)]
    outputs: Option<Vec<Option<Vec<Message>>>>,
    /// Depends on time, randomness or the order of Go's maps.
    #[serde(default)]
    volatile: bool,
}

#[derive(Deserialize)]
struct Message {
    /// None if the message has no umh_topic.
    #[serde(default)]
    topic: Option<String>,
    payload: String,
    #[serde(default)]
    meta: Option<BTreeMap<String, String>>,
}

/// What a path gave for one input, and what it was expected to.
#[derive(Debug, PartialEq)]
struct Difference {
    path: String,
    /// The input, or none if it is about the analysis.
    input: Option<usize>,
    upstream: String,
    headgate: String,
    /// Values that the path needs and that had not come in.
    is_waiting: bool,
}

/// Where a difference is looked at.
struct Context<'a> {
    case: &'a Case,
    mapping: &'a Mapping,
    expression: &'a str,
    /// What upstream takes for the sources of the path, and what Headgate does.
    upstream_reads: BTreeSet<String>,
    reads: BTreeSet<String>,
    warnings: &'a [String],
    /// What `headgate why` says of the path.
    state: String,
}

struct Row {
    id: &'static str,
    /// Cases of the repository that differ because of it.
    examples: &'static [&'static str],
    covers: fn(&Context, &Difference) -> bool,
}

const ROWS: &[Row] = &[
    Row {
        id: "D1",
        examples: &["template literal", "template literal beside arithmetic"],
        covers: |context, difference| {
            context.expression.contains("${") && reads_more(context, difference)
        },
    },
    Row {
        id: "D2",
        examples: &[
            "object literal",
            "arrow function",
            "new",
            "optional chaining",
            "spread",
            "sequence",
            "compound assignment",
        ],
        covers: |context, difference| {
            !context.expression.contains("${") && reads_more(context, difference)
        },
    },
    Row {
        id: "D4",
        examples: &["constructor of a constructor"],
        covers: |context, difference| {
            difference.headgate == NOTHING && context.state.contains("eval is not supported")
        },
    },
    Row {
        id: "D5",
        examples: &["assigned in one output, read in another"],
        covers: |context, difference| {
            // What was assigned stays for ever.
            difference.headgate == NOTHING
                && context.state.ends_with(" is not defined")
                && context
                    .warnings
                    .iter()
                    .any(|warning| warning.contains("lasts no longer than this evaluation"))
        },
    },
    Row {
        id: "D6",
        examples: &["two aliases of one topic"],
        covers: |context, difference| {
            // Only one of them is set.
            let Some(input) = difference.input else {
                return false;
            };
            let message = &context.case.inputs.as_ref().unwrap()[input];
            let aliases: Vec<_> = context
                .case
                .sources
                .iter()
                .filter(|(_, source)| message.topic.as_ref() == Some(source))
                .map(|(alias, _)| alias)
                .collect();
            difference.upstream == NOTHING
                && aliases.len() > 1
                && aliases.iter().any(|alias| context.reads.contains(*alias))
        },
    },
    Row {
        id: "D8",
        examples: &["source named like something built in"],
        covers: |context, difference| {
            // Its value is put over what is built in.
            difference.upstream == NOTHING
                && context
                    .warnings
                    .iter()
                    .any(|warning| warning.contains("has the name of something built in"))
        },
    },
];

const NOTHING: &str = "nothing";

/// Upstream overlooks sources, so it never emits, or without waiting for all values.
fn reads_more(context: &Context, difference: &Difference) -> bool {
    let overlooks =
        context.upstream_reads.is_subset(&context.reads) && context.upstream_reads != context.reads;
    let is_consequence = difference.input.is_none()
        || difference.upstream == NOTHING
        || difference.headgate == NOTHING && difference.is_waiting;
    overlooks && is_consequence
}

/// What came of a case.
struct Judgement {
    /// Differences that no row covers.
    uncovered: Vec<String>,
    rows: BTreeSet<&'static str>,
}

fn judge(case: &Case) -> Judgement {
    let mut judgement = Judgement {
        uncovered: Vec::new(),
        rows: BTreeSet::new(),
    };
    let (mut mapping, warnings) = match (Mapping::load(&yaml(case), &case.name), &case.config_error)
    {
        (Err(error), None) => {
            judgement
                .uncovered
                .push(format!("upstream takes it; Headgate: {error}"));
            return judgement;
        }
        (Ok(_), Some(error)) => {
            judgement
                .uncovered
                .push(format!("Headgate takes it; upstream: {error}"));
            return judgement;
        }
        (Err(error), Some(upstream)) => {
            let message = error.to_string();
            let differs = SHARED_WORDS
                .iter()
                .find(|words| upstream.contains(**words) && !message.contains(**words));
            if differs.is_some() {
                judgement
                    .uncovered
                    .push(format!("upstream: {upstream}; Headgate: {message}"));
            }
            return judgement;
        }
        (Ok(loaded), None) => loaded,
    };
    let warnings: Vec<String> = warnings.iter().map(ToString::to_string).collect();
    let outputs: Vec<(String, String, String)> = mapping
        .outputs()
        .map(|output| {
            (
                output.path.to_owned(),
                output.umh_topic.to_owned(),
                output.expression.to_owned(),
            )
        })
        .collect();
    let mut differences = Vec::new();

    let reads: BTreeMap<&str, BTreeSet<String>> = outputs
        .iter()
        .enumerate()
        .map(|(number, (path, ..))| {
            let reads = mapping.dependencies(number).map(str::to_owned).collect();
            (path.as_str(), reads)
        })
        .collect();
    let upstream_reads = |path: &str| -> BTreeSet<String> {
        let deps = case.deps.as_ref().and_then(|deps| deps.get(path));
        deps.cloned().unwrap_or_default()
    };
    if case.kind.is_some() {
        for (path, ..) in &outputs {
            let (upstream, headgate) = (upstream_reads(path), &reads[path.as_str()]);
            if upstream != *headgate {
                differences.push(Difference {
                    path: path.clone(),
                    input: None,
                    upstream: format!("reads {upstream:?}"),
                    headgate: format!("reads {headgate:?}"),
                    is_waiting: false,
                });
            }
        }
    }

    let mut known = BTreeSet::new();
    let inputs = case.inputs.as_deref().unwrap_or_default();
    for (number, input) in inputs.iter().enumerate() {
        let mut sent = Vec::new();
        let metadata: Metadata = input
            .meta
            .iter()
            .flatten()
            .map(|(key, value)| (key.as_str().into(), value.as_str().into()))
            .collect();
        if let Some(topic) = &input.topic {
            let taken = mapping.on_message(
                &to_mqtt(topic),
                input.payload.as_bytes(),
                Some(&metadata),
                1_700_000_000_000 + number as u64,
                &mut sent,
            );
            if taken.is_ok() {
                let aliases = case.sources.iter().filter(|(_, source)| *source == topic);
                known.extend(aliases.map(|(alias, _)| alias.clone()));
            }
        }
        let expected = case
            .outputs
            .as_ref()
            .and_then(|outputs| outputs.get(number))
            .and_then(Option::as_deref)
            .unwrap_or_default();
        for (output, (path, umh_topic, _)) in outputs.iter().enumerate() {
            let upstream = expected
                .iter()
                .find(|message| message.topic.as_deref() == Some(umh_topic))
                .map(|message| (message.payload.clone(), meta(message.meta.iter().flatten())));
            let headgate = sent.iter().find(|sent| sent.output == output).map(|sent| {
                let pairs = sent.metadata.iter().flat_map(|metadata| metadata.iter());
                (
                    String::from_utf8(sent.payload.to_vec()).unwrap(),
                    meta(pairs.map(|(key, value)| (&**key, &**value))),
                )
            });
            let is_same = if case.volatile {
                upstream.as_ref().map(shape) == headgate.as_ref().map(shape)
            } else {
                upstream == headgate
            };
            if !is_same {
                differences.push(Difference {
                    path: path.clone(),
                    input: Some(number),
                    upstream: upstream
                        .map_or(NOTHING.to_owned(), |(payload, meta)| payload + &meta),
                    headgate: headgate
                        .map_or(NOTHING.to_owned(), |(payload, meta)| payload + &meta),
                    is_waiting: !reads[path.as_str()].is_subset(&known),
                });
            }
        }
        for topic in expected.iter().filter_map(|message| message.topic.as_ref()) {
            if !outputs.iter().any(|(_, known, _)| known == topic) {
                judgement
                    .uncovered
                    .push(format!("input {number}: only upstream sends to {topic}"));
            }
        }
    }

    for difference in differences {
        let (_, _, expression) = outputs
            .iter()
            .find(|(path, ..)| *path == difference.path)
            .unwrap();
        let context = Context {
            case,
            mapping: &mapping,
            expression,
            upstream_reads: upstream_reads(&difference.path),
            reads: reads[difference.path.as_str()].clone(),
            warnings: &warnings,
            state: mapping
                .explain(&difference.path, 1_700_000_001_000)
                .unwrap()
                .state,
        };
        match ROWS.iter().find(|row| (row.covers)(&context, &difference)) {
            Some(row) => {
                judgement.rows.insert(row.id);
            }
            None => judgement.uncovered.push(format!(
                "{difference:?} ({}; {})",
                context.state,
                context.mapping.outputs().len()
            )),
        }
    }
    judgement
}

/// What both say in the same words.
const SHARED_WORDS: &[&str] = &[
    "mode is required",
    "unsupported mode",
    "output_topic is required",
    "model name is required",
    "model version is required",
    "at least one source mapping is required",
    "empty expression",
    "multiple statements not allowed",
    "only expressions are allowed, not statements",
    "function expressions are not allowed in mappings",
];

fn meta<'a>(
    pairs: impl IntoIterator<Item = (impl AsRef<str> + 'a, impl AsRef<str> + 'a)>,
) -> String {
    let sorted: BTreeMap<String, String> = pairs
        .into_iter()
        .map(|(key, value)| (key.as_ref().to_owned(), value.as_ref().to_owned()))
        .filter(|(key, _)| key != "umh_topic")
        .collect();
    if sorted.is_empty() {
        String::new()
    } else {
        format!(" {sorted:?}")
    }
}

/// The types in a payload.
fn shape((payload, _): &(String, String)) -> String {
    fn of(value: &serde_json::Value, text: &mut String) {
        match value {
            serde_json::Value::Null => text.push_str("null"),
            serde_json::Value::Bool(_) => text.push_str("bool"),
            serde_json::Value::Number(_) => text.push_str("number"),
            serde_json::Value::String(_) => text.push_str("string"),
            serde_json::Value::Array(_) => text.push_str("array"),
            serde_json::Value::Object(members) => {
                for (key, value) in members {
                    write!(text, "{key}:").unwrap();
                    of(value, text);
                    text.push(' ');
                }
            }
        }
    }
    let mut text = String::new();
    of(&serde_json::from_str(payload).unwrap(), &mut text);
    text
}

/// JSON is YAML.
fn yaml(case: &Case) -> String {
    let mut body = serde_json::json!({
        "mode": "timeseries",
        "model": { "name": "pump", "version": "v1" },
        "output_topic": OUTPUT_TOPIC,
        "sources": case.sources,
    });
    if !case.mapping.is_null() {
        body["mapping"] = case.mapping.clone();
    }
    serde_json::json!({ "stream_processor": body }).to_string()
}

fn cases(file: &Path) -> Vec<Case> {
    let text =
        fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    text.lines()
        .filter(|line| !line.trim().is_empty())
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect()
}

fn project() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn run(file: &Path) {
    let cases = cases(file);
    let mut failed = 0;
    let mut covered: BTreeMap<&str, usize> = BTreeMap::new();
    for case in &cases {
        let judgement = judge(case);
        if !judgement.uncovered.is_empty() {
            failed += 1;
            println!("{} | {} | {}", case.group, case.name, case.mapping);
            for difference in &judgement.uncovered {
                println!("    {difference}");
            }
        }
        for row in judgement.rows {
            *covered.entry(row).or_default() += 1;
        }
    }
    println!(
        "{}: {} cases, {failed} differ and are in no row of the table; by row: {covered:?}",
        file.display(),
        cases.len(),
    );
    assert_eq!(
        failed, 0,
        "cases that differ and are in no row of the table"
    );
}

#[test]
fn stream_processor_cases() {
    run(&project().join("tests/cases/stream_processor.jsonl"));
    let file = match env::var_os("STREAM_PROCESSOR_CASES") {
        Some(file) => PathBuf::from(file),
        None => {
            let file = project().join("../shared/data/stream_processor_cases.jsonl");
            if !file.exists() {
                println!(
                    "{} is not there: only the project's own cases ran",
                    file.display()
                );
                return;
            }
            file
        }
    };
    run(&file);
}

#[test]
fn each_row_of_the_table_still_has_its_difference() {
    let cases = cases(&project().join("tests/cases/stream_processor.jsonl"));
    for row in ROWS {
        assert!(!row.examples.is_empty(), "{} has an example", row.id);
        for example in row.examples {
            let case = cases
                .iter()
                .find(|case| case.name == *example)
                .unwrap_or_else(|| panic!("{}: there is no case {example:?}", row.id));
            assert!(
                judge(case).rows.contains(row.id),
                "{}: the case {example:?} does not differ any more",
                row.id
            );
        }
    }
}

#[test]
fn the_table_in_the_documentation_has_the_same_rows() {
    let text = fs::read_to_string(project().join("docs/mappings.md")).unwrap();
    let documented: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("| D"))
        .collect();
    let ids: Vec<&str> = documented
        .iter()
        .map(|line| line.split('|').nth(1).unwrap().trim())
        .collect();
    let rows: Vec<&str> = ROWS.iter().map(|row| row.id).collect();
    assert_eq!(ids, rows);
    for (row, line) in ROWS.iter().zip(documented) {
        for example in row.examples {
            assert!(
                line.contains(example),
                "{}: {example:?} is not in {line}",
                row.id
            );
        }
    }
}
