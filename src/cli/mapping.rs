//! `headgate mapping …`: check, test, install and operate mappings.

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::app::utc;
use super::output::{Output, one_line, printable};
use super::{FAILED, Global, small_runtime};
use crate::admin::Client;
use crate::event::unix_time_ns;
use crate::mappings::{
    MAX_CONFIG_BYTES, Mapping, MappingInfo, OutputStatus, Warning, to_mqtt, to_umh,
};
use crate::regular_file::RegularFile;

/// Longest file of cases, in bytes.
const MAX_CASES_BYTES: u64 = 1 << 30;

#[derive(Subcommand)]
pub(super) enum MappingCommand {
    /// Install a mapping; one of the same name is replaced between two batches, and the values of its sources stay
    Install {
        #[command(flatten)]
        file: FileArgs,
        /// Its name [default: the file's, without .yaml]
        #[arg(long)]
        name: Option<String>,
    },
    /// List the mappings
    List,
    /// Show all there is to know about a mapping
    Inspect { name: String },
    /// Forget a mapping and the values of its sources
    Remove { name: String },
    /// Say what is wrong with a mapping's file, without a gateway
    Check {
        #[command(flatten)]
        file: FileArgs,
    },
    /// Run cases through a mapping's file, without a gateway
    ///
    /// Each line of CASES is a JSON object with `inputs`, a list of messages ({"topic": …, "payload": …}), and
    /// `outputs`, for each input the list of messages that it is to lead to, in any order. Each case begins with no
    /// values. What differs is printed, lines that begin with - were wanted, those with + have come; then it exits
    /// with 1. A case without `outputs` is printed with those that it has: so cases are made. `"volatile": true`
    /// compares topics only. Topics are as UMH has them or as MQTT has them.
    Test {
        #[command(flatten)]
        file: FileArgs,
        /// JSON lines; - for standard input
        cases: PathBuf,
    },
}

#[derive(Args)]
pub(super) struct FileArgs {
    /// YAML: a stream_processor, or a benthos pipeline that has one
    file: PathBuf,
    /// Take warnings for errors
    #[arg(long)]
    strict: bool,
}

pub(super) fn run(
    command: MappingCommand,
    global: &Global,
    output: &Output,
) -> anyhow::Result<ExitCode> {
    match command {
        MappingCommand::Check { file } => check(&file, output),
        MappingCommand::Test { file, cases } => test(&file, &cases, output),
        command => {
            let client = global.client()?;
            small_runtime()?.block_on(operate(command, &client, output))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn operate(command: MappingCommand, client: &Client, output: &Output) -> anyhow::Result<()> {
    match command {
        MappingCommand::Install { file, name } => {
            let stem = || Some(file.file.file_stem()?.to_str()?.to_owned());
            let Some(name) = name.or_else(stem) else {
                bail!("name the mapping with --name");
            };
            let (text, _, warnings) = file.load()?;
            file.warn(&warnings)?;
            let installed = client.install_mapping(&name, &text).await?;
            if output.json {
                return output.value(&installed);
            }
            output.text(format!(
                "{name} installed: {} sources, {} outputs",
                installed.sources.len(),
                installed.outputs.len()
            ))
        }
        MappingCommand::List => list(&client.mappings().await?, output),
        MappingCommand::Inspect { name } => inspect(&client.mapping(&name).await?, output),
        MappingCommand::Remove { name } => {
            client.remove_mapping(&name).await?;
            match output.json {
                true => output.value(&json!({ "removed": name })),
                false => output.text(format!("{name} removed")),
            }
        }
        MappingCommand::Check { .. } | MappingCommand::Test { .. } => {
            unreachable!("needs no gateway")
        }
    }
}

impl FileArgs {
    fn load(&self) -> anyhow::Result<(String, Mapping, Vec<Warning>)> {
        let text = read(&self.file, MAX_CONFIG_BYTES as u64)?;
        let name = self.file.display().to_string();
        let (mapping, warnings) = Mapping::load(&text, &name)?;
        Ok((text, mapping, warnings))
    }

    /// Prints what is probably a mistake; fails if that is not to be.
    fn warn(&self, warnings: &[Warning]) -> anyhow::Result<()> {
        let file = self.file.display();
        for warning in warnings {
            eprintln!("warning: {file}:{}", one_line(&warning.to_string()));
        }
        match self.strict && !warnings.is_empty() {
            true => bail!(
                "{file}: {} warnings, and --strict was given",
                warnings.len()
            ),
            false => Ok(()),
        }
    }
}

fn read(path: &Path, max: u64) -> anyhow::Result<String> {
    let bytes = match path.as_os_str() == "-" {
        true => {
            let mut bytes = Vec::new();
            io::Read::read_to_end(&mut io::Read::take(io::stdin(), max), &mut bytes)?;
            bytes
        }
        false => RegularFile::open(path, 0)
            .and_then(|file| file.read(max))
            .with_context(|| format!("cannot read {}", path.display()))?,
    };
    String::from_utf8(bytes).with_context(|| format!("{} is no text", path.display()))
}

fn check(file: &FileArgs, output: &Output) -> anyhow::Result<ExitCode> {
    let (_, mapping, warnings) = file.load()?;
    if output.json {
        let outputs: Vec<_> = mapping
            .outputs()
            .map(|output| {
                json!({
                    "path": output.path,
                    "topic": output.topic.as_str(),
                    "expression": output.expression,
                    "static": output.is_static,
                    "volatile": output.is_volatile,
                    "compiled": output.is_fast,
                })
            })
            .collect();
        output.value(&json!({ "warnings": warnings, "outputs": outputs }))?;
        let failed = file.strict && !warnings.is_empty();
        return Ok(ExitCode::from(if failed { FAILED } else { 0 }));
    }
    let rows: Vec<_> = mapping
        .outputs()
        .map(|output| {
            let kind = match (output.is_static, output.is_volatile) {
                (true, false) => "static",
                (true, true) => "static, volatile",
                (false, false) => "dynamic",
                (false, true) => "dynamic, volatile",
            };
            let by = match output.is_fast {
                true => "compiled",
                false => "engine",
            };
            [
                printable(output.path),
                kind.to_owned(),
                by.to_owned(),
                printable(output.topic.as_str()),
            ]
        })
        .collect();
    output.table(["OUTPUT", "KIND", "RUN BY", "TOPIC"], &rows)?;
    file.warn(&warnings)?;
    Ok(ExitCode::SUCCESS)
}

#[derive(Deserialize)]
struct Case {
    name: Option<String>,
    inputs: Vec<Message>,
    outputs: Option<Vec<Vec<Message>>>,
    #[serde(default)]
    volatile: bool,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Message {
    topic: String,
    payload: String,
}

fn test(file: &FileArgs, cases: &Path, output: &Output) -> anyhow::Result<ExitCode> {
    let (text, _, warnings) = file.load()?;
    file.warn(&warnings)?;
    let lines = read(cases, MAX_CASES_BYTES)?;
    let (mut passed, mut failed, mut made) = (0, Vec::new(), 0);
    for (number, line) in lines.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let place = format!("{}:{}", cases.display(), number + 1);
        let case: Case = serde_json::from_str(line).with_context(|| {
            format!("{place}: this is no case; see `headgate mapping test --help`")
        })?;
        let name = case.name.clone().unwrap_or_else(|| place.clone());
        let come = outputs_of(&text, &file.file.display().to_string(), &case.inputs)?;
        let Some(wanted) = &case.outputs else {
            let mut value: serde_json::Value = serde_json::from_str(line)?;
            value["outputs"] = serde_json::to_value(&come)?;
            output.value_line(&value)?;
            made += 1;
            continue;
        };
        if wanted.len() != case.inputs.len() {
            bail!(
                "{place}: {} inputs, and outputs for {} of them; `outputs` has a list for each input",
                case.inputs.len(),
                wanted.len()
            );
        }
        let differences = differences(&come, wanted, case.volatile);
        if differences.is_empty() {
            passed += 1;
            continue;
        }
        if !output.json {
            output.text(printable(&name))?;
            for difference in &differences {
                output.text(format!("  {}", one_line(difference)))?;
            }
        }
        failed.push(json!({ "case": name, "differences": differences }));
    }
    io::stdout().flush()?;
    if output.json && made == 0 {
        output.value(&json!({ "passed": passed, "failed": failed }))?;
    } else if made == 0 {
        output.text(format!("{passed} passed, {} failed", failed.len()))?;
    }
    if passed + failed.len() + made == 0 {
        bail!("{}: there is no case in it", cases.display());
    }
    Ok(ExitCode::from(if failed.is_empty() { 0 } else { FAILED }))
}

/// What a mapping without any values makes of messages, for each of them in the order of their topics.
fn outputs_of(config: &str, file: &str, inputs: &[Message]) -> anyhow::Result<Vec<Vec<Message>>> {
    let (mut mapping, _) = Mapping::load(config, file)?;
    let mut sent = Vec::new();
    let mut all = Vec::new();
    for Message { topic, payload } in inputs {
        let now_ms = unix_time_ns() / 1_000_000;
        let topic = to_mqtt(topic);
        // What can't be read leads to nothing, as in a gateway.
        let _ = mapping.on_message(&topic, payload.as_bytes(), None, now_ms, &mut sent);
        let mut outputs: Vec<_> = sent
            .drain(..)
            .map(|sent| Message {
                topic: to_umh(sent.topic.as_str()),
                payload: String::from_utf8_lossy(&sent.payload).into_owned(),
            })
            .collect();
        outputs.sort();
        all.push(outputs);
    }
    Ok(all)
}

fn differences(come: &[Vec<Message>], wanted: &[Vec<Message>], shape_only: bool) -> Vec<String> {
    let seen = |messages: &[Message]| {
        let mut seen: Vec<_> = messages
            .iter()
            .map(|message| Message {
                topic: to_umh(&message.topic),
                payload: match shape_only {
                    true => String::new(),
                    false => message.payload.clone(),
                },
            })
            .collect();
        seen.sort();
        seen
    };
    let mut found = Vec::new();
    for (input, (come, wanted)) in come.iter().zip(wanted).enumerate() {
        let (come, wanted) = (seen(come), seen(wanted));
        let line = |sign, message: &Message| {
            let Message { topic, payload } = message;
            format!("{sign} input {}: {topic} {payload}", input + 1)
        };
        let missing = wanted.iter().filter(|message| !come.contains(message));
        found.extend(missing.map(|message| line('-', message)));
        let further = come.iter().filter(|message| !wanted.contains(message));
        found.extend(further.map(|message| line('+', message)));
    }
    found
}

fn list(mappings: &[MappingInfo], output: &Output) -> anyhow::Result<()> {
    if output.json {
        return output.value(&mappings);
    }
    if mappings.is_empty() {
        return output.text("no mappings; install one with `headgate mapping install FILE`");
    }
    let rows: Vec<_> = mappings
        .iter()
        .map(|mapping| {
            let state = match (&mapping.error, mapping.standby, mapping.preinstalled) {
                (Some(_), ..) => "does not run",
                (None, true, _) => "standby",
                (None, false, true) => "part of the system",
                (None, false, false) => "installed",
            };
            [
                mapping.name.clone(),
                state.to_owned(),
                mapping.sources.len().to_string(),
                mapping.outputs.len().to_string(),
                mapping.counters.messages_processed.to_string(),
                mapping.counters.outputs_generated.to_string(),
                mapping.counters.messages_errored.to_string(),
            ]
        })
        .collect();
    let header = [
        "NAME",
        "STATE",
        "SOURCES",
        "OUTPUTS",
        "PROCESSED",
        "GENERATED",
        "ERRORS",
    ];
    output.table(header, &rows)
}

fn inspect(mapping: &MappingInfo, output: &Output) -> anyhow::Result<()> {
    if output.json {
        return output.value(mapping);
    }
    output.text(format!("name      {}", mapping.name))?;
    output.text(format!("since     {}", utc(mapping.since_ms)))?;
    if let Some(error) = &mapping.error {
        return output.text(format!("does not run: {}", printable(error)));
    }
    if mapping.standby {
        output.text("standby   another gateway of the site runs it, or nobody: see `headgate cluster status`")?;
    }
    let counters = &mapping.counters;
    output.text(format!(
        "messages  {} processed, {} errored ({} could not be read), {} dropped, {} late",
        counters.messages_processed,
        counters.messages_errored,
        counters.invalid_data_type,
        counters.messages_dropped,
        counters.messages_late
    ))?;
    for warning in &mapping.warnings {
        output.text(format!("warning   {}", one_line(warning)))?;
    }
    output.text("")?;
    let dash = || "-".to_owned();
    let rows: Vec<_> = mapping
        .sources
        .iter()
        .map(|source| {
            [
                printable(&source.alias),
                source.value.as_deref().map_or_else(dash, one_line),
                source
                    .age_ms
                    .map_or_else(dash, |age| format!("{:.1} s", age as f64 / 1e3)),
                printable(&source.topic),
            ]
        })
        .collect();
    output.table(["SOURCE", "VALUE", "AGE", "TOPIC"], &rows)?;
    output.text("")?;
    let rows: Vec<_> = mapping
        .outputs
        .iter()
        .map(|OutputStatus { explanation, .. }| {
            [
                printable(&explanation.path),
                one_line(&explanation.expression),
                one_line(&explanation.state),
            ]
        })
        .collect();
    output.table(["OUTPUT", "EXPRESSION", "STATE"], &rows)
}

/// Why outputs were sent last, or were not.
pub(super) fn explain(outputs: &[OutputStatus], output: &Output) -> anyhow::Result<()> {
    if output.json {
        return output.value(&outputs);
    }
    for (
        number,
        OutputStatus {
            mapping,
            explanation,
        },
    ) in outputs.iter().enumerate()
    {
        if number > 0 {
            output.text("")?;
        }
        output.text(format!(
            "output       {mapping}/{}",
            printable(&explanation.path)
        ))?;
        output.text(format!("topic        {}", printable(&explanation.topic)))?;
        output.text(format!(
            "expression   {}",
            one_line(&explanation.expression)
        ))?;
        output.text(format!("state        {}", one_line(&explanation.state)))?;
        match &explanation.last {
            None => output.text("last sent    never since the gateway's start")?,
            Some(last) => {
                let inputs = last
                    .inputs
                    .iter()
                    .map(|input| format!("{} = {}", input.alias, input.value));
                let inputs: Vec<_> = inputs.collect();
                output.text(format!("last sent    {}", utc(last.at_ms)))?;
                output.text(format!("made of      {}", one_line(&inputs.join(", "))))?;
            }
        }
        for source in &explanation.sources {
            let value = match (&source.value, source.age_ms) {
                (Some(value), Some(age)) => format!("{value}, {:.1} s ago", age as f64 / 1e3),
                _ => "no value yet".to_owned(),
            };
            let text = format!("{}: {value} ({})", source.alias, source.topic);
            output.text(format!("source       {}", one_line(&text)))?;
        }
    }
    Ok(())
}
