//! `headgate dead-letters`: messages that a policy dropped.

use clap::{Args, Subcommand};

use super::app::utc;
use super::output::{Output, one_line};
use super::{Global, small_runtime};
use crate::admin::{Client, DeadLetterList};
use crate::dead_letters::DeadLetterInfo;

/// Show the last messages that a full queue or another policy dropped
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct DeadLettersArgs {
    /// Only those whose topic matches
    #[arg(long, value_name = "FILTER")]
    topic: Option<String>,
    /// Show the last N
    #[arg(short = 'n', long = "last", value_name = "N", default_value_t = 100)]
    last: usize,
    #[command(subcommand)]
    command: Option<DeadLettersCommand>,
}

#[derive(Subcommand)]
enum DeadLettersCommand {
    /// Forget them
    Purge,
}

pub(super) fn run(args: DeadLettersArgs, global: &Global, output: &Output) -> anyhow::Result<()> {
    let client = global.client()?;
    small_runtime()?.block_on(operate(args, &client, output))
}

async fn operate(args: DeadLettersArgs, client: &Client, output: &Output) -> anyhow::Result<()> {
    match args.command {
        None => list(
            client
                .dead_letters(args.topic.as_deref(), args.last)
                .await?,
            output,
        ),
        Some(DeadLettersCommand::Purge) => {
            let removed = client.purge_dead_letters().await?;
            match output.json {
                true => output.value(&serde_json::json!({ "removed": removed })),
                false => output.text(format!("{removed} dead letters removed")),
            }
        }
    }
}

fn list(list: DeadLetterList, output: &Output) -> anyhow::Result<()> {
    if output.json {
        return output.value(&list);
    }
    if list.letters.is_empty() {
        output.text("no dead letters")?;
    } else {
        let header = [
            "TIME", "REASON", "SOURCE", "TOPIC", "QOS", "BYTES", "PAYLOAD", "ERROR",
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

fn row(letter: &DeadLetterInfo) -> [String; 8] {
    [
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
        return "(binary; --json shows it)".to_owned();
    };
    let line = one_line(text);
    match line.chars().count() > SHOWN {
        true => line.chars().take(SHOWN).chain(['…']).collect(),
        false => line,
    }
}

/// The rest is a backtrace, which --json shows.
fn first_line(text: &str) -> String {
    one_line(text.lines().next().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dead_letters::Reason;

    fn letter(payload: Option<&str>) -> DeadLetterInfo {
        DeadLetterInfo {
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
        assert_eq!(row(&letter(None))[6], "(binary; --json shows it)");
        let long = row(&letter(Some(&"ü".repeat(1000))));
        assert_eq!(long[6], "ü".repeat(40) + "…");
    }
}
