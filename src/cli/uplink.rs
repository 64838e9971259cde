//! `headgate uplink`: how the links of the running gateway are.

use std::process::ExitCode;

use anyhow::bail;
use clap::Subcommand;
use serde_json::Value;

use super::output::{Output, printable};
use super::{FAILED, Global, small_runtime};
use crate::site::{Missing, SeatStatus};

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

#[derive(Subcommand)]
pub(super) enum ClusterCommand {
    /// Show who is there, who leads, and who acts for how many shards of the topics
    ///
    /// Exits with 1 if the servers of the cluster can't be reached or something is wrong.
    Status,
}

/// As it is shown.
#[derive(serde::Serialize)]
struct ClusterStatus {
    #[serde(flatten)]
    cluster: crate::cluster::Status,
    /// For what this gateway acts.
    seats: Vec<SeatStatus>,
    /// What another gateway is to run, and doesn't.
    missing: Vec<Missing>,
}

pub(super) fn cluster(
    command: ClusterCommand,
    global: &Global,
    output: &Output,
) -> anyhow::Result<ExitCode> {
    let ClusterCommand::Status = command;
    let client = global.client()?;
    let status = small_runtime()?.block_on(client.status())?;
    let links = status["uplink"].as_array().cloned().unwrap_or_default();
    let Some(mut link) = links.into_iter().find(|link| link["in_site"] == true) else {
        bail!("this gateway takes part in no cluster; `cluster` in a [[link]] says that it is to");
    };
    if link["cluster"].is_null() {
        let why = match link["error"].as_str() {
            Some(error) => format!(": {}", printable(error)),
            None => String::new(),
        };
        bail!(
            "alone: the link {} has no connection to the servers of the cluster{why}",
            text(&link, "name")
        );
    }
    let status = ClusterStatus {
        cluster: serde_json::from_value(link["cluster"].take())?,
        seats: serde_json::from_value(link["seats"].take())?,
        missing: serde_json::from_value(link["missing"].take())?,
    };
    let is_well = status.cluster.connected
        && status.cluster.problem.is_none()
        && status.missing.is_empty()
        && status.seats.iter().all(|seat| seat.problem.is_none());
    if output.json {
        output.value(&status)?;
    } else {
        let ClusterStatus {
            cluster: status,
            seats,
            missing,
        } = status;
        let state = if status.connected {
            "connected"
        } else {
            "alone"
        };
        output.text(format!(
            "{} in site {}: {state}",
            status.gateway, status.site
        ))?;
        let leader = status.leader.as_deref().unwrap_or("nobody");
        output.text(match status.leads_with {
            Some(token) => format!("  leads, with token {token}"),
            None if !status.connected => "  nobody is known to lead".to_owned(),
            None => format!("  {leader} leads"),
        })?;
        for member in &status.members {
            let shards = status.owners.get(&member.gateway).copied().unwrap_or(0);
            let state = if member.alive { "" } else { ", gone" };
            output.text(format!(
                "  {} on {}: {shards} of {} shards{state}",
                member.gateway, member.host, status.shards
            ))?;
        }
        for seat in seats {
            let what = match seat.shard {
                None => "the site".to_owned(),
                Some(shard) => format!("shard {shard}"),
            };
            let state = if seat.acts { "acts" } else { "is to act" };
            output.text(format!(
                "  {} {state} here for {what}",
                printable(&seat.name)
            ))?;
            if let Some(problem) = &seat.problem {
                output.text(format!("    problem: {}", printable(problem)))?;
            }
        }
        for Missing { name, gateway } in missing {
            output.text(format!(
                "  problem: {} runs nowhere for what is {gateway}'s: install it there, too, or start it",
                printable(&name)
            ))?;
        }
        if let Some(problem) = &status.problem {
            output.text(format!("  problem: {problem}"))?;
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
