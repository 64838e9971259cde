//! `headgate dead-letters`: messages that a policy dropped.

use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::app::utc;
use super::output::{Output, one_line, printable};
use super::{FAILED, Global, small_runtime};
use crate::admin::{Client, DeadLetterList, Retry};
use crate::dead_letters::{DeadLetterInfo, MAX_PAYLOAD_BYTES, Retried};

/// Show the last messages that a full queue or another policy dropped
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct DeadLettersArgs {
    #[command(flatten)]
    list: ListArgs,
    #[command(subcommand)]
    command: Option<DeadLettersCommand>,
}

#[derive(Args)]
struct ListArgs {
    /// Only those whose topic matches
    #[arg(long, value_name = "FILTER")]
    topic: Option<String>,
    /// Show the last N
    #[arg(short = 'n', long = "last", value_name = "N", default_value_t = 100)]
    last: usize,
}

#[derive(Subcommand)]
enum DeadLettersCommand {
    /// Show the last ones: what is done if nothing is said
    List(ListArgs),
    /// Show one, whole
    Show {
        /// As `headgate dead-letters` shows it
        id: u64,
    },
    /// Hand over again: to the app that could not handle it, else to all that have subscribed to its topic
    ///
    /// What was handed over is a dead letter no more, and if it is dropped again another one. Exits with 1 if one
    /// can't be handed over.
    Retry(RetryArgs),
    /// Forget them
    Purge,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct RetryArgs {
    /// Those with these ids
    #[arg(value_name = "ID")]
    ids: Vec<u64>,
    /// Those whose topic matches
    #[arg(long, value_name = "FILTER")]
    topic: Option<String>,
    /// All of them
    #[arg(long)]
    all: bool,
}

pub(super) fn run(
    args: DeadLettersArgs,
    global: &Global,
    output: &Output,
) -> anyhow::Result<ExitCode> {
    let client = global.client()?;
    small_runtime()?.block_on(operate(args, &client, output))
}

async fn operate(
    args: DeadLettersArgs,
    client: &Client,
    output: &Output,
) -> anyhow::Result<ExitCode> {
    let command = args.command.unwrap_or(DeadLettersCommand::List(args.list));
    match command {
        DeadLettersCommand::Show { id } => show(&client.dead_letter(id).await?, output)?,
        DeadLettersCommand::Retry(which) => {
            let which = match which.topic {
                Some(filter) => Retry::Topic(filter),
                None if which.all => Retry::All,
                None => Retry::Ids(which.ids),
            };
            return retried(&client.retry_dead_letters(&which).await?, output);
        }
        DeadLettersCommand::List(ListArgs { topic, last }) => {
            let letters = client.dead_letters(topic.as_deref(), last).await?;
            list(letters, output)?;
        }
        DeadLettersCommand::Purge => {
            let removed = client.purge_dead_letters().await?;
            match output.json {
                true => output.value(&serde_json::json!({ "removed": removed })),
                false => output.text(format!("{removed} dead letters removed")),
            }?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn show(letter: &DeadLetterInfo, output: &Output) -> anyhow::Result<()> {
    if output.json {
        return output.value(letter);
    }
    output.text(whole(letter))
}

/// A letter in as many lines as it takes.
fn whole(letter: &DeadLetterInfo) -> String {
    let (payload, form) = match (&letter.payload, &letter.payload_base64) {
        (Some(text), _) => (printable(text), "text"),
        (None, base64) => (base64.clone().unwrap_or_default(), "Base64"),
    };
    let mut text = format!(
        "id       {}\ntime     {}\nreason   {}\nsource   {}\ntopic    {}\nqos      {}\n\
         payload  {} bytes, as {form}",
        letter.id,
        utc(letter.time_ms),
        letter.reason.as_str(),
        one_line(&letter.source),
        one_line(&letter.topic),
        letter.qos,
        letter.payload_bytes,
    );
    if letter.payload_bytes > MAX_PAYLOAD_BYTES as u64 {
        text.push_str(&format!("; the first {MAX_PAYLOAD_BYTES} were kept"));
    }
    text.push_str(&format!(":\n{payload}"));
    if let Some(error) = &letter.error {
        text.push_str(&format!("\nerror:\n{}", printable(error)));
    }
    text
}

fn retried(outcome: &Retried, output: &Output) -> anyhow::Result<ExitCode> {
    if output.json {
        output.value(outcome)?;
    } else {
        for refused in &outcome.refused {
            output.error_text(&format!("dead letter {}: {}", refused.id, refused.error));
        }
        output.text(format!("{} dead letters handed over", outcome.retried))?;
    }
    Ok(match outcome.refused.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(FAILED),
    })
}

fn list(list: DeadLetterList, output: &Output) -> anyhow::Result<()> {
    if output.json {
        return output.value(&list);
    }
    if list.letters.is_empty() {
        output.text("no dead letters")?;
    } else {
        let header = [
            "ID", "TIME", "REASON", "SOURCE", "TOPIC", "QOS", "BYTES", "PAYLOAD", "ERROR",
        ];
        let rows: Vec<_> = list.letters.iter().map(row).collect();
        output.table(header, &rows)?;
    }
    if list.left_out > 0 {
        output.text(format!(
            "{} more were dropped since the start, too many to be kept",
            list.left_out
        ))?;
    }
    Ok(())
}

fn row(letter: &DeadLetterInfo) -> [String; 9] {
    [
        letter.id.to_string(),
        utc(letter.time_ms),
        letter.reason.as_str().to_owned(),
        one_line(&letter.source),
        one_line(&letter.topic),
        letter.qos.to_string(),
        letter.payload_bytes.to_string(),
        beginning(letter),
        first_line(letter.error.as_deref().unwrap_or_default()),
    ]
}

/// So much of the payload that the table keeps its shape.
fn beginning(letter: &DeadLetterInfo) -> String {
    const SHOWN: usize = 40;
    let Some(text) = &letter.payload else {
        return "(binary; show it by its ID)".to_owned();
    };
    let line = one_line(text);
    match line.chars().count() > SHOWN {
        true => line.chars().take(SHOWN).chain(['…']).collect(),
        false => line,
    }
}

/// The rest is a backtrace.
fn first_line(text: &str) -> String {
    one_line(text.lines().next().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dead_letters::Reason;

    fn letter(payload: Option<&str>) -> DeadLetterInfo {
        DeadLetterInfo {
            id: 12,
            time_ms: 1_763_725_320_000,
            reason: Reason::QueueFull,
            source: "pump\x1b[2J".into(),
            topic: "plant/a\tb".into(),
            qos: 1,
            payload_bytes: 4,
            payload: payload.map(str::to_owned),
            error: Some("`handle` trapped\n  in main".into()),
            payload_base64: payload.is_none().then(|| "/w==".to_owned()),
        }
    }

    #[test]
    fn a_letter_is_one_line_whatever_is_in_it() {
        assert_eq!(
            row(&letter(Some("a\nb"))),
            [
                "12",
                "2025-11-21T11:42:00.000Z",
                "queue_full",
                "pump\u{fffd}[2J",
                "plant/a b",
                "1",
                "4",
                "a b",
                "`handle` trapped"
            ]
        );
        assert_eq!(row(&letter(None))[7], "(binary; show it by its ID)");
        let long = row(&letter(Some(&"ü".repeat(1000))));
        assert_eq!(long[7], "ü".repeat(40) + "…");
    }

    #[test]
    fn a_letter_is_shown_with_all_that_is_known_of_it() {
        let shown = whole(&letter(Some("a\nb\x1b[2J")));
        let lines: Vec<_> = shown.lines().collect();
        assert_eq!(lines[0], "id       12");
        assert_eq!(
            lines[6..],
            [
                "payload  4 bytes, as text:",
                "a",
                "b\u{fffd}[2J",
                "error:",
                "`handle` trapped",
                "  in main"
            ]
        );
        let binary = DeadLetterInfo {
            payload_bytes: 70_000,
            error: None,
            ..letter(None)
        };
        let shown = whole(&binary);
        let end = "payload  70000 bytes, as Base64; the first 65536 were kept:\n/w==";
        assert!(shown.ends_with(end), "{shown}");
    }
}
