//! `headgate uplink`: how the links of the running gateway are.

use std::process::ExitCode;

use clap::Subcommand;
use serde_json::Value;

use super::output::{Output, printable};
use super::{FAILED, Global, small_runtime};

#[derive(Subcommand)]
pub(super) enum UplinkCommand {
    /// Show what each link has shipped and taken, and what keeps it
    ///
    /// Exits with 1 if a link is down or something goes wrong.
    Status,
}

pub(super) fn run(
    command: UplinkCommand,
    global: &Global,
    output: &Output,
) -> anyhow::Result<ExitCode> {
    let UplinkCommand::Status = command;
    let client = global.client()?;
    let mut status = small_runtime()?.block_on(client.status())?;
    let links = status["uplink"].take();
    let all = links.as_array().map_or(&[][..], Vec::as_slice);
    let fails = |part: &Value| !part["error"].is_null();
    let parts = |link: &Value, which: &str| link[which].as_array().cloned().unwrap_or_default();
    let is_well = all.iter().all(|link| {
        let mut all = parts(link, "ship").into_iter().chain(parts(link, "take"));
        link["connected"] == true && !fails(link) && !all.any(|part| fails(&part))
    });
    if output.json {
        output.value(&all)?;
    } else if all.is_empty() {
        output.text("there are no links; uplink.links_file names the file with them")?;
    }
    for link in all.iter().filter(|_| !output.json) {
        let state = if link["connected"] == true {
            "connected"
        } else {
            "down"
        };
        output.text(format!(
            "{} ({}): {state}",
            text(link, "name"),
            text(link, "kind")
        ))?;
        tell(output, link)?;
        for ship in parts(link, "ship") {
            output.text(format!(
                "  ships {} to {}: cursor {}, {} behind ({} s), {} on their way, {} shipped, acknowledged in {} us (p99)",
                text(&ship, "name"), text(&ship, "to"), ship["cursor"], ship["behind"], ship["behind_s"],
                ship["in_flight"], ship["events"], ship["ack_p99_us"],
            ))?;
            let odd = ["resent", "duplicates", "refused", "lost", "lost_upstream"];
            let odd: Vec<_> = odd.into_iter().filter(|key| ship[key] != 0).collect();
            for key in odd {
                output.text(format!("    {key}: {}", ship[key]))?;
            }
            tell(output, &ship)?;
        }
        for take in parts(link, "take") {
            output.text(format!(
                "  takes {} from {}: {} taken, {} refused",
                text(&take, "name"),
                text(&take, "from"),
                take["events"],
                take["refused"],
            ))?;
            tell(output, &take)?;
        }
    }
    Ok(if is_well {
        ExitCode::SUCCESS
    } else {
        FAILED.into()
    })
}

fn text(value: &Value, key: &str) -> String {
    printable(value[key].as_str().unwrap_or_default()).to_string()
}

fn tell(output: &Output, part: &Value) -> anyhow::Result<()> {
    match part["error"].as_str() {
        Some(error) => output.text(format!("    error: {error}")),
        None => Ok(()),
    }
}
