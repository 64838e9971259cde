//! `headgate app …`: install and operate apps.

#[cfg(feature = "compiler")]
use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;

use super::output::{Output, printable};
use super::package::PackageArgs;
use super::{Global, small_runtime};
use crate::admin::Client;
use crate::apps::{AppCounters, AppInfo, LogLine};

/// How often `logs --follow` asks for new lines.
const FOLLOW_EVERY: Duration = Duration::from_millis(500);

/// Lines that `logs --follow` asks for at a time; what an app writes beyond that in one turn is
/// skipped, and said to be.
const FOLLOW_LINES: usize = 1000;

#[derive(Subcommand)]
pub(super) enum AppCommand {
    /// Install an app and start it; an app of the same name is replaced
    Install {
        #[command(flatten)]
        package: PackageArgs,
    },
    /// Have another version of an installed app take over; if it fails with one of its first
    /// batches, the version before comes back
    Upgrade {
        #[command(flatten)]
        package: PackageArgs,
    },
    /// Go back to the version before the last upgrade
    Rollback { name: String },
    /// List the installed apps
    List,
    /// Show all there is to know about an app
    Inspect { name: String },
    /// Start a stopped or quarantined app
    Start { name: String },
    /// Stop an app; it stays stopped when the gateway restarts
    Stop { name: String },
    /// Let what comes for an app wait, until it is resumed
    Pause { name: String },
    /// Have a paused app go on
    Resume { name: String },
    /// Let an app finish all that waits, and stop it; stop drops what it has not done in 2 seconds
    Drain {
        name: String,
        /// Drop what it has not done by then
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        timeout: u32,
    },
    /// Give an app a fresh instance
    Restart { name: String },
    /// Stop an app and forget it
    Remove { name: String },
    /// Show what an app has logged
    Logs {
        name: String,
        /// Show the last N lines
        #[arg(short = 'n', long = "lines", value_name = "N", default_value_t = 100)]
        lines: usize,
        /// Go on showing lines as they come
        #[arg(short, long)]
        follow: bool,
    },
    #[cfg(feature = "compiler")]
    New(super::new::NewArgs),
    #[cfg(feature = "compiler")]
    Build(super::build::BuildArgs),
    #[cfg(feature = "compiler")]
    Test(super::tryout::TestArgs),
    #[cfg(feature = "compiler")]
    Compile(super::compile::CompileArgs),
    /// Compile a component for this machine: what the gateway runs in a process of its own
    #[cfg(feature = "compiler")]
    #[command(hide = true)]
    CompileHere {
        input: PathBuf,
        #[arg(long)]
        output: PathBuf,
        #[arg(long)]
        no_simd: bool,
    },
}

pub(super) fn run(command: AppCommand, global: &Global, output: &Output) -> anyhow::Result<()> {
    #[cfg(feature = "compiler")]
    let command = match command {
        AppCommand::New(args) => return super::new::run(args, output),
        AppCommand::Build(args) => return super::build::run(args, output),
        AppCommand::Test(args) => return super::tryout::run(args, output),
        AppCommand::Compile(args) => return super::compile::run(args, output),
        AppCommand::CompileHere {
            input,
            output: compiled,
            no_simd,
        } => {
            let compiled = crate::apps::compile_here(&input, &compiled, !no_simd);
            return compiled.map_err(anyhow::Error::msg);
        }
        other => other,
    };
    let client = global.client()?;
    small_runtime()?.block_on(operate(command, &client, output))
}

async fn operate(command: AppCommand, client: &Client, output: &Output) -> anyhow::Result<()> {
    match command {
        AppCommand::Install { package } => {
            let package = package.find()?;
            let installed = client.install(&package.manifest, &package.component);
            outcome(&installed.await?, output)
        }
        AppCommand::Upgrade { package } => {
            let package = package.find()?;
            let upgraded = client.upgrade(&package.manifest, &package.component);
            outcome(&upgraded.await?, output)
        }
        AppCommand::Rollback { name } => outcome(&client.rollback(&name).await?, output),
        AppCommand::List => list(client.list().await?, output),
        AppCommand::Inspect { name } => inspect(&client.inspect(&name).await?, output),
        AppCommand::Start { name } => outcome(&client.start(&name).await?, output),
        AppCommand::Stop { name } => outcome(&client.stop(&name).await?, output),
        AppCommand::Pause { name } => outcome(&client.pause(&name).await?, output),
        AppCommand::Resume { name } => outcome(&client.resume(&name).await?, output),
        AppCommand::Drain { name, timeout } => {
            let timeout = Duration::from_secs(timeout.into());
            outcome(&client.drain(&name, timeout).await?, output)
        }
        AppCommand::Restart { name } => outcome(&client.restart(&name).await?, output),
        AppCommand::Remove { name } => {
            client.remove(&name).await?;
            if output.json {
                output.value(&serde_json::json!({ "removed": name }))
            } else {
                output.text(format!("{name} removed"))
            }
        }
        AppCommand::Logs {
            name,
            lines,
            follow: false,
        } => {
            let lines = client.logs(&name, lines).await?;
            if output.json {
                output.value(&lines)
            } else {
                lines
                    .iter()
                    .try_for_each(|line| output.text(log_text(line)))
            }
        }
        AppCommand::Logs {
            name,
            lines,
            follow: true,
        } => follow(&name, lines, client, output).await,
        #[cfg(feature = "compiler")]
        AppCommand::New(_)
        | AppCommand::Build(_)
        | AppCommand::Test(_)
        | AppCommand::Compile(_)
        | AppCommand::CompileHere { .. } => unreachable!("needs no gateway"),
    }
}

/// Prints what became of an app that was installed, started, stopped or restarted.
fn outcome(app: &AppInfo, output: &Output) -> anyhow::Result<()> {
    if output.json {
        return output.value(app);
    }
    let version = printable(&app.version);
    match &app.reason {
        Some(reason) => output.text(format!(
            "{} {version} {}: {}",
            app.name,
            app.state,
            printable(reason)
        )),
        None => output.text(format!("{} {version} {}", app.name, app.state)),
    }
}

fn list(apps: Vec<AppInfo>, output: &Output) -> anyhow::Result<()> {
    if output.json {
        return output.value(&apps);
    }
    if apps.is_empty() {
        return output.text("no apps; install one with `headgate app install PATH`");
    }
    let header = [
        "NAME",
        "VERSION",
        "STATE",
        "HANDLED",
        "PUBLISHED",
        "FAILED",
        "DROPPED",
    ];
    let rows: Vec<_> = apps
        .iter()
        .map(|app| {
            [
                printable(&app.name),
                printable(&app.version),
                app.state.to_string(),
                app.counters.handled.to_string(),
                app.counters.published.to_string(),
                app.counters.failed.to_string(),
                app.counters.dropped.total().to_string(),
            ]
        })
        .collect();
    output.table(header, &rows)
}

fn inspect(app: &AppInfo, output: &Output) -> anyhow::Result<()> {
    if output.json {
        return output.value(app);
    }
    let counters = &app.counters;
    let limits = &app.limits;
    let optional = |text: &Option<String>| text.as_deref().map(printable);
    let config = app
        .config
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect::<Vec<_>>()
        .join(" ");
    let rows = [
        ("name", Some(app.name.clone())),
        ("version", Some(app.version.clone())),
        (
            "on trial",
            app.trial_batches_left
                .map(|left| format!("for {left} more batches")),
        ),
        ("previous", app.previous_version.clone()),
        ("description", optional(&app.description)),
        ("origin", Some(app.origin.to_string())),
        ("state", Some(app.state.to_string())),
        ("reason", optional(&app.reason)),
        ("since", Some(format!("{} ago", ago(app.since_ms)))),
        ("breaker", Some(app.breaker.as_str().to_owned())),
        (
            "restarts",
            Some(format!(
                "{} ({} after a trap, {} after a pause, {} back to the version before, {} recycled)",
                app.restarts.total(),
                app.restarts.trap,
                app.restarts.failure,
                app.restarts.rollback,
                app.restarts.recycle
            )),
        ),
        ("last error", optional(&app.last_error)),
        (
            "component",
            Some(format!(
                "sha256:{} ({} bytes)",
                app.component_sha256, app.component_bytes
            )),
        ),
        ("subscribe", Some(app.subscribe.join(" "))),
        ("publish", Some(app.publish.join(" "))),
        ("config", Some(config)),
        (
            "limits",
            Some(format!(
                "{} memory pages, {} ms a batch, {} events queued, {} published a batch, {} log \
                 lines a batch, {} bytes kept, {} calls about them a batch, {} timers, {} table \
                 elements, {} core instances, weight {}",
                limits.memory_pages,
                limits.batch_deadline_ms,
                limits.queue_events,
                limits.publish_per_batch,
                limits.log_per_batch,
                limits.kv_bytes,
                limits.kv_per_batch,
                limits.timers,
                limits.table_elements,
                limits.instances,
                limits.weight
            )),
        ),
        (
            "memory",
            Some(format!(
                "{} pages of 64 KiB, {} at the most",
                app.memory_pages, app.peak_memory_pages
            )),
        ),
        (
            "cold start",
            app.cold_start_seconds
                .map(|seconds| format!("{:.3} ms", seconds * 1e3)),
        ),
        (
            "kept",
            Some(format!(
                "{} bytes under {} keys, {}",
                app.kv.bytes,
                app.kv.keys,
                match app.kv.synced {
                    true => "all on disk",
                    false => "not all on disk yet",
                }
            )),
        ),
        ("timers", Some(app.timers.to_string())),
        (
            "devices",
            Some(format!("{} GPIO lines, {} sensors", app.lines, app.sensors)),
        ),
        (
            "events in",
            Some(format!(
                "{} offered = {} handled + {} failed + {} dropped + {} queued",
                counters.offered,
                counters.handled,
                counters.failed,
                counters.dropped.total(),
                counters.queued
            )),
        ),
        (
            "events out",
            Some(format!(
                "{} published, {} denied, {} over quota",
                counters.published, counters.denied, counters.over_publish_quota
            )),
        ),
        ("refused", Some(refused(counters))),
        (
            "batches",
            Some(format!(
                "{}, {} of them tried again, {} µs each",
                counters.batches,
                counters.retried,
                counters.handle_ns / counters.batches.max(1) / 1000
            )),
        ),
    ];
    for (label, value) in rows {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            output.text(format!("{label:<12} {}", printable(&value)))?;
        }
    }
    Ok(())
}

/// What an app was refused, besides outputs.
pub(super) fn refused(counters: &AppCounters) -> String {
    let calls = &counters.refused_calls;
    format!(
        "{} log lines, {} memory growths, {} calls about kept state, {} timers, {} metrics, {} GPIO \
         lines",
        counters.over_log_quota,
        counters.refused_growth,
        calls.kv_bytes + calls.kv_per_batch + calls.kv_invalid,
        calls.timers,
        calls.metrics,
        calls.gpio
    )
}

/// How long ago `unix_ms` was, in the largest unit that says enough.
fn ago(unix_ms: u64) -> String {
    let now_ms = crate::event::unix_time_ns() / 1_000_000;
    let seconds = now_ms.saturating_sub(unix_ms) / 1000;
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// Prints the last `lines` lines, then each new one as it comes, until interrupted.
async fn follow(name: &str, lines: usize, client: &Client, output: &Output) -> anyhow::Result<()> {
    let show = |line: &LogLine| {
        if output.json {
            output.value_line(line)
        } else {
            output.text(log_text(line))
        }
    };
    // Even where none is to be shown, the last one says where the new ones begin.
    let last = client.logs(name, lines.max(1)).await?;
    last.iter()
        .skip(last.len().saturating_sub(lines))
        .try_for_each(show)?;
    let mut next = last.last().map_or(0, |line| line.sequence + 1);
    loop {
        tokio::time::sleep(FOLLOW_EVERY).await;
        let lines = client.logs(name, FOLLOW_LINES).await?;
        // An app that was removed and installed anew has a new log.
        if lines.last().is_none_or(|last| last.sequence + 1 < next) {
            next = 0;
        }
        let from = next;
        for line in lines.iter().filter(|line| line.sequence >= from) {
            if line.sequence > next && !output.json {
                output.text(format!("({} lines skipped)", line.sequence - next))?;
            }
            show(line)?;
            next = line.sequence + 1;
        }
    }
}

/// A line of an app's log, for people.
pub(super) fn log_text(line: &LogLine) -> String {
    let context = match line.context.as_str() {
        "" => String::new(),
        context => format!("{}: ", printable(context)),
    };
    format!(
        "{} {:<8} {context}{}",
        utc(line.time_ms),
        line.level.as_str(),
        // Indented, so that no message can pass for more than one.
        printable(&line.message).replace('\n', "\n    ")
    )
}

/// A time in milliseconds since the Unix epoch, as RFC 3339 has it.
pub(super) fn utc(unix_ms: u64) -> String {
    let (days, ms) = (unix_ms / 86_400_000, unix_ms % 86_400_000);
    // Howard Hinnant's civil_from_days: years begin in March, so that leap days come last.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute) = (ms / 3_600_000, ms / 60_000 % 60);
    let (second, milli) = (ms / 1000 % 60, ms % 1000);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milli:03}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_log_lines_are_utc() {
        for (unix_ms, expected) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_001, "2000-02-29T00:00:00.001Z"),
            (1_763_725_320_000, "2025-11-21T11:42:00.000Z"),
            (1_735_689_599_999, "2024-12-31T23:59:59.999Z"),
        ] {
            assert_eq!(utc(unix_ms), expected);
        }
    }
}
