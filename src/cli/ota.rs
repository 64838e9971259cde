//! `headgate ota`: updates of the whole system. What changes the machine needs root; the gateway itself only asks
//! for it.

use std::io::IsTerminal;
use std::num::NonZeroU64;
use std::process::{Command, ExitCode};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};
use jiff::{Timestamp, Zoned};
use serde_json::json;

use super::output::{Output, one_line};
use super::{FAILED, Global, small_runtime};
use crate::admin::Client;
use crate::apps::AppState;
use crate::config::{Config, OtaConfig, RebootWhen};
use crate::ota::agent::{Agent, Checked, Outcome, Settings, Wish};
use crate::ota::cache::Progress;
use crate::ota::health::{AppLook, Baseline, Judgement, Limits, Look, Probation};
use crate::ota::release::Offer;
use crate::ota::state::{Phase, State};
use crate::ota::{self, status};

/// Between two looks at how a download or a gateway is.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// For another command that has the lock: what takes long only holds it while nothing is ready to be booted.
const PATIENCE: Duration = Duration::from_secs(60);

/// For events that must not be handled twice to be handled, before the machine restarts.
const QUIET_PATIENCE: Duration = Duration::from_secs(60);

#[derive(Subcommand)]
pub(super) enum OtaCommand {
    /// Look what the channel offers, and change nothing
    Check,
    Update(UpdateArgs),
    /// Show what runs, what is under way, and what was left again
    Status,
    /// Go back to the generation before, at the next boot
    Rollback {
        /// Its number, of `headgate boot list`
        #[arg(long, value_name = "N")]
        to: Option<u64>,
        /// Why, for whoever looks at the status later
        #[arg(
            long,
            value_name = "TEXT",
            default_value = "somebody went back by hand"
        )]
        reason: String,
        /// Restart the machine
        #[arg(long)]
        reboot: bool,
    },
    /// Take no updates until `headgate ota unhold`
    Hold,
    /// Take updates again
    Unhold,
    /// Wait until the gateway is healthy; for the unit that decides about a new system
    Health,
    /// Note why this boot of a new system is given up, and restart the machine
    Failed,
    /// Note that a new system has passed; for the unit that runs after each boot
    Commit,
    /// Remove generations beyond ota.keep_generations, and store paths that nobody needs
    Gc,
    /// Hash the store paths of all generations
    Scrub {
        /// Fetch those that are damaged anew
        #[arg(long)]
        repair: bool,
    },
    /// Remove what the gateway has stored: apps, state, sessions, journal, keys of releases
    ///
    /// The system stays as it is. The gateway must be stopped.
    Reset {
        /// Do it
        #[arg(long)]
        yes: bool,
    },
}

/// Fetch and install what the channel offers
///
/// As root, does it; as anybody else, asks the gateway to have it done. The new system is booted in the next
/// maintenance window, and left again if it is not healthy.
#[derive(Args)]
pub(super) struct UpdateArgs {
    /// Take an older version, too
    #[arg(long)]
    allow_downgrade: bool,
    /// Take a system that was left before, too
    #[arg(long)]
    retry: bool,
    /// When to restart the machine [default: ota.reboot]
    #[arg(long, value_enum)]
    reboot: Option<Reboot>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Reboot {
    /// At once
    Now,
    /// In the next maintenance window
    Window,
    Never,
}

pub(super) fn run(
    command: OtaCommand,
    global: &Global,
    output: &Output,
) -> anyhow::Result<ExitCode> {
    let config = Config::load(global.source(Vec::new()))?.config;
    let client = global.client()?;
    match command {
        OtaCommand::Status => return status(&config.ota, output).map(|()| ExitCode::SUCCESS),
        OtaCommand::Update(_)
            if !rustix::process::geteuid().is_root() && config.ota.root.as_os_str() == "/" =>
        {
            small_runtime()?.block_on(client.request_update())?;
            return output
                .text(
                    "The gateway has asked for the update; `headgate ota status` shows how it is.",
                )
                .map(|()| ExitCode::SUCCESS);
        }
        OtaCommand::Reset { yes } => return reset(yes, &config, output),
        _ => {}
    }
    // The units of the others could not, and need not.
    if matches!(
        command,
        OtaCommand::Update(_)
            | OtaCommand::Rollback { .. }
            | OtaCommand::Commit
            | OtaCommand::Gc
            | OtaCommand::Scrub { repair: true }
    ) {
        ota::make_store_writable(&config.ota.root)?;
    }
    if matches!(command, OtaCommand::Health) {
        return health(&config.ota, &client, output).map(|()| ExitCode::SUCCESS);
    }
    // What runs by itself after a boot may come upon another.
    let patience = match command {
        OtaCommand::Commit | OtaCommand::Failed => PATIENCE,
        _ => Duration::ZERO,
    };
    let mut agent = Agent::open(settings(&config.ota), Timestamp::now(), patience)?;
    match command {
        OtaCommand::Check => check(&mut agent, output)?,
        OtaCommand::Update(args) => update(agent, &args, &config.ota, &client, output)?,
        OtaCommand::Rollback { to, reason, reboot } => {
            let generation = agent.roll_back(to, &reason)?;
            say(
                output,
                json!({ "generation": generation }),
                format!("Generation {generation} is booted next."),
            )?;
            if reboot {
                restart()?;
            }
        }
        OtaCommand::Hold => {
            agent.state.held_since.get_or_insert(agent.now());
            agent.save()?;
            say(
                output,
                json!({ "held": true }),
                "No updates until `headgate ota unhold`.".into(),
            )?;
        }
        OtaCommand::Unhold => {
            agent.state.held_since = None;
            agent.save()?;
            say(
                output,
                json!({ "held": false }),
                "Updates are taken again.".into(),
            )?;
        }
        OtaCommand::Failed => failed(agent, output)?,
        OtaCommand::Commit => commit(agent, &client, output)?,
        OtaCommand::Gc => {
            let (generations, paths) = agent.collect()?;
            let text = format!("{generations} generations and {paths} store paths are gone.");
            say(
                output,
                json!({ "generations": generations, "paths": paths }),
                text,
            )?;
        }
        OtaCommand::Scrub { repair } => return scrub(&agent, repair, output),
        OtaCommand::Status | OtaCommand::Health | OtaCommand::Reset { .. } => {
            unreachable!("done above")
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn settings(config: &OtaConfig) -> Settings {
    let some = |text: &String| Some(text.clone()).filter(|text| !text.is_empty());
    Settings {
        channel: config.channel.clone(),
        caches: config.caches.clone(),
        trusted_keys: config.trusted_keys.clone(),
        product: config.product.clone(),
        pin: some(&config.pin),
        keep_generations: config.keep_generations as usize,
        min_free_bytes: config.min_free_bytes,
        bytes_per_second: NonZeroU64::new(config.max_bytes_per_second),
        ca_file: config.ca_file.clone(),
        proxy: some(&config.proxy),
        tries: config.tries,
        esp: config.esp.clone(),
        state: config.state.clone(),
        root: config.root.clone(),
        nix_store: config.nix_store.clone(),
    }
}

/// A line for people, or JSON.
fn say(output: &Output, value: serde_json::Value, text: String) -> anyhow::Result<()> {
    match output.json {
        true => output.value(&value),
        false => output.text(text),
    }
}

fn check(agent: &mut Agent, output: &Output) -> anyhow::Result<()> {
    let Checked { release, offer } = agent.check(Wish::default())?;
    agent.save()?;
    let was_left = agent.state.failed.contains(&release.toplevel);
    let text = match &offer {
        Offer::Update if was_left => format!(
            "Version {} was left before, and is not taken again but by `headgate ota update --retry`.",
            release.version
        ),
        Offer::Running => format!("Version {} is the newest, and runs.", release.version),
        Offer::NotYet { percent, place } => not_yet(&release.version, *percent, *place),
        Offer::Update => format!(
            "Version {} can be installed: `headgate ota update`.",
            release.version
        ),
    };
    let offered = match offer {
        Offer::Running => "running",
        Offer::NotYet { .. } => "not_yet",
        Offer::Update if was_left => "left_before",
        Offer::Update => "update",
    };
    say(
        output,
        json!({ "release": release, "offer": offered }),
        text,
    )
}

fn not_yet(version: &str, percent: f64, place: f64) -> String {
    format!(
        "Version {version} is for {percent} % of the gateways as yet, and this one stands at {place:.1} %."
    )
}

fn update(
    mut agent: Agent,
    args: &UpdateArgs,
    config: &OtaConfig,
    client: &Client,
    output: &Output,
) -> anyhow::Result<()> {
    let wish = Wish {
        allow_downgrade: args.allow_downgrade,
        retry: args.retry,
    };
    let progress = Progress::default();
    let outcome = std::thread::scope(|scope| {
        let reporter = scope.spawn(|| report(&progress, config, output));
        let outcome = agent.update(wish, &progress, || baseline(client));
        progress.cancel.store(true, Ordering::Relaxed);
        reporter.thread().unpark();
        // What it shows is of no consequence to the update.
        let _ = reporter.join();
        outcome
    })?;
    if let Some((value, text)) = settle(&agent, &outcome, client)? {
        return say(output, value, text);
    }
    let (word, text) = match &outcome {
        Outcome::NotYet {
            version,
            percent,
            place,
        } => ("not_yet", not_yet(version, *percent, *place)),
        Outcome::Restart { version } => (
            "restart",
            format!("Version {version} is installed, and is tried at the next boot."),
        ),
        Outcome::OnProbation { version } => (
            "on_probation",
            format!("Version {version} runs, and has to show that it is healthy."),
        ),
        _ => ("up_to_date", "The newest release runs.".to_owned()),
    };
    say(output, json!({ "outcome": word }), text)?;
    if matches!(outcome, Outcome::Restart { .. }) {
        let when = args.reboot.unwrap_or(match config.reboot {
            RebootWhen::Window => Reboot::Window,
            RebootWhen::Never => Reboot::Never,
        });
        let clock_is_behind = Timestamp::now() < agent.now();
        if clock_is_behind && when == Reboot::Window && !config.window.is_always() {
            return output.text(
                "The clock is behind the newest release, so nobody knows whether this is a maintenance window.",
            );
        }
        if let Some(since) = agent.state.held_since {
            return output.text(format!(
                "Updates are held since {since}, so the machine does not restart."
            ));
        }
        // Whoever runs next must find the lock free.
        drop(agent);
        restart_when_allowed(when, config, client, output)?;
    }
    Ok(())
}

/// Shows the download, on the terminal and in the file that `headgate ota status` and the metrics read.
fn report(progress: &Progress, config: &OtaConfig, output: &Output) {
    let mut meter = status::Meter::new(Instant::now());
    let shows = !output.json && std::io::stderr().is_terminal();
    loop {
        let is_over = progress.cancel.load(Ordering::Relaxed);
        let download = meter.read(progress, Instant::now());
        if let Some(download) = &download {
            if let Err(error) = status::write(&config.state, download) {
                tracing::warn!(%error, "the download's progress can't be shown");
            }
            if shows {
                eprint!("\r\u{1b}[K{download}");
            }
        }
        if is_over {
            if shows && download.is_some() {
                eprintln!();
            }
            return;
        }
        std::thread::park_timeout(LOOK_EVERY);
    }
}

fn restart_when_allowed(
    when: Reboot,
    config: &OtaConfig,
    client: &Client,
    output: &Output,
) -> anyhow::Result<()> {
    let is_time = match when {
        Reboot::Now => true,
        Reboot::Never => false,
        Reboot::Window => config.window.contains(Zoned::now().datetime()),
    };
    if !is_time {
        if when == Reboot::Window {
            output.text(format!(
                "The machine restarts in the next maintenance window ({}).",
                config.window
            ))?;
        }
        return Ok(());
    }
    if when == Reboot::Window && !is_quiet(client)? {
        return output.text(format!(
            "Transactional events have waited for {} s, so the machine does not restart yet.",
            QUIET_PATIENCE.as_secs()
        ));
    }
    restart()
}

/// Whether no transactional event waits; waits for that for a while. A gateway that does not answer has none.
fn is_quiet(client: &Client) -> anyhow::Result<bool> {
    let runtime = small_runtime()?;
    let begin = Instant::now();
    loop {
        let status = runtime.block_on(client.status());
        let waiting = status
            .ok()
            .and_then(|status| status["pipeline"]["lanes"]["transactional"]["queued"].as_u64());
        if waiting.unwrap_or(0) == 0 {
            return Ok(true);
        }
        if begin.elapsed() >= QUIET_PATIENCE {
            return Ok(false);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

fn restart() -> anyhow::Result<()> {
    let status = Command::new("systemctl")
        .arg("reboot")
        .status()
        .context("starting `systemctl reboot`")?;
    ensure!(
        status.success(),
        "`systemctl reboot` failed; restart the machine by hand"
    );
    Ok(())
}

/// What the gateway does now, to be compared with what the next system does. Nothing if it does not answer.
fn baseline(client: &Client) -> Baseline {
    match look(client) {
        Ok(look) => Baseline {
            events_per_s: look.accepted_events as f64 / look.uptime.as_secs_f64().max(1.0),
            running_apps: look
                .apps
                .into_iter()
                .filter(|app| app.state == "running")
                .map(|app| app.name)
                .collect(),
        },
        Err(_) => Baseline::default(),
    }
}

fn look(client: &Client) -> Result<Look, String> {
    let runtime = small_runtime().map_err(|error| error.to_string())?;
    let (status, apps) = runtime
        .block_on(async { Ok((client.status().await?, client.list().await?)) })
        .map_err(|error: crate::admin::ClientError| error.to_string())?;
    Ok(Look {
        ready: status["ready"] == true,
        uptime: Duration::from_secs(status["uptime_s"].as_u64().unwrap_or(0)),
        accepted_events: status["pipeline"]["accepted"].as_u64().unwrap_or(0),
        apps: apps
            .into_iter()
            .map(|app| AppLook {
                // One on standby runs on another gateway.
                wanted: !matches!(
                    app.state,
                    AppState::Stopped | AppState::Paused | AppState::Standby
                ),
                state: app.state.to_string(),
                name: app.name,
            })
            .collect(),
    })
}

/// Waits for the verdict. Nothing is locked meanwhile.
fn health(config: &OtaConfig, client: &Client, output: &Output) -> anyhow::Result<()> {
    let booted = ota::booted_system(&config.root);
    let baseline = match State::read(&config.state)?.phase {
        Phase::Ready {
            release, baseline, ..
        } if booted.as_ref() == Some(&release.toplevel) => Some(baseline),
        _ => None,
    };
    let is_update = baseline.is_some();
    let limits = Limits {
        deadline: Duration::from_secs(config.health.deadline_s.into()),
        settle: Duration::from_secs(config.health.settle_s.into()),
        min_flow_percent: config.health.min_flow_percent,
    };
    let mut probation = Probation::new(limits, baseline.unwrap_or_default());
    let begin = Instant::now();
    let mut told = Vec::new();
    let missing = loop {
        let look = look(client);
        match probation.on_look(look.as_ref().map_err(Clone::clone), begin.elapsed()) {
            Judgement::Healthy => {
                say(
                    output,
                    json!({ "healthy": true }),
                    "The gateway is healthy.".into(),
                )?;
                return Ok(());
            }
            Judgement::Unhealthy(missing) => break missing,
            Judgement::Wait(missing) => {
                if missing != told && !output.json {
                    let what = if missing.is_empty() {
                        "it is healthy, and has to stay so".to_owned()
                    } else {
                        missing.join("; ")
                    };
                    eprintln!("waiting: {}", one_line(&what));
                    told = missing;
                }
                std::thread::sleep(LOOK_EVERY);
            }
        }
    };
    let reason = one_line(&missing.join("; "));
    if is_update {
        let mut agent = Agent::open(settings(config), Timestamp::now(), PATIENCE)?;
        agent.state.on_failure(&reason);
        agent.save()?;
    }
    bail!(
        "not healthy within {} s: {reason}",
        limits.deadline.as_secs()
    );
}

/// What has failed was written down by whoever looked, or is a unit that boot-complete.target needs. A machine that
/// has only a bad system, as one whose image was never healthy, stays up for somebody to look at it.
fn failed(mut agent: Agent, output: &Output) -> anyhow::Result<()> {
    let booted = agent.machine.booted()?;
    if let Phase::Ready {
        failure: None,
        release,
        ..
    } = &agent.state.phase
        && release.toplevel == booted
    {
        let reason = what_failed()?;
        agent.state.on_failure(&reason);
        agent.save()?;
        say(output, json!({ "reason": reason }), reason)?;
    }
    match agent.machine.esp.entries()?.first() {
        Some(next) if !next.is_bad() => restart(),
        _ => output.text("There is no system to go back to, so the machine stays up."),
    }
}

fn what_failed() -> anyhow::Result<String> {
    let units = Command::new("systemctl")
        .args([
            "list-units",
            "--state=failed",
            "--plain",
            "--no-legend",
            "--no-pager",
        ])
        .output()
        .context("starting `systemctl list-units`")?;
    let units = String::from_utf8_lossy(&units.stdout);
    let names: Vec<&str> = units
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    Ok(match names.as_slice() {
        [] => "boot-complete.target was not reached in time".to_owned(),
        names => format!("units have failed: {}", names.join(", ")),
    })
}

/// After each boot: what the boot entries say becomes what is remembered.
fn commit(mut agent: Agent, client: &Client, output: &Output) -> anyhow::Result<()> {
    // Told by whoever wants to update.
    let _ = agent.note_counting();
    agent.save()?;
    let outcome = match agent.state.phase {
        Phase::Ready { .. } => agent.go_on(&Progress::default(), || baseline(client))?,
        Phase::Idle | Phase::Fetching { .. } => Outcome::UpToDate,
    };
    match settle(&agent, &outcome, client)? {
        Some((value, text)) => say(output, value, text),
        None if agent.state.is_committed(&agent.machine.booted()?) => {
            // It may have missed it when it was committed.
            tell_passed(client);
            say(output, json!({}), "There is nothing to commit.".into())
        }
        None => say(output, json!({}), "There is nothing to commit.".into()),
    }
}

/// What follows from an update that has come to its end, one way or the other, and how to say it. Nothing if it
/// hasn't.
fn settle(
    agent: &Agent,
    outcome: &Outcome,
    client: &Client,
) -> anyhow::Result<Option<(serde_json::Value, String)>> {
    Ok(match outcome {
        Outcome::Committed { version } => {
            tell_passed(client);
            let (generations, paths) = agent.collect()?;
            Some((
                json!({ "outcome": "committed", "committed": version, "generations": generations, "paths": paths }),
                format!(
                    "Version {version} has passed; {generations} generations and {paths} store paths are gone."
                ),
            ))
        }
        Outcome::RolledBack { version, reason } => {
            let (_, paths) = agent.collect()?;
            Some((
                json!({ "outcome": "rolled_back", "rolled_back": version, "reason": reason, "paths": paths }),
                format!(
                    "Version {version} was left again: {reason}; {paths} store paths are gone."
                ),
            ))
        }
        _ => None,
    })
}

/// What the gateway has stored on probation stays. One that is down finds out when it starts.
fn tell_passed(client: &Client) {
    let told = small_runtime().map(|runtime| runtime.block_on(client.pass_trial()));
    if let Ok(Err(error)) = told {
        eprintln!("the gateway does not know yet that its system stays: {error}");
    }
}

fn scrub(agent: &Agent, repair: bool, output: &Output) -> anyhow::Result<ExitCode> {
    let found = agent.scrub(repair, &Progress::default())?;
    let damaged: Vec<String> = found
        .damaged
        .iter()
        .map(|path| path.to_absolute_path())
        .collect();
    let text = match (damaged.len(), repair) {
        (0, _) => format!("{} store paths are as they should be.", found.sound),
        (_, true) => format!("Fetched anew: {}", damaged.join(", ")),
        (_, false) => format!(
            "Damaged: {}; `headgate ota scrub --repair` fetches them anew",
            damaged.join(", ")
        ),
    };
    let text = match found.broken_entries.as_slice() {
        [] => text,
        broken => format!(
            "{text}\nBoot entries that start nothing: {}",
            broken.join("; ")
        ),
    };
    let text = match found.unknown {
        0 => text,
        unknown => {
            format!("{text}\nOf {unknown} store paths nobody has written down what they should be.")
        }
    };
    let value = json!({
        "sound": found.sound,
        "damaged": damaged,
        "repaired": repair,
        "unknown": found.unknown,
        "broken_entries": found.broken_entries,
    });
    say(output, value, text)?;
    let is_sound = damaged.is_empty() && found.broken_entries.is_empty();
    Ok(ExitCode::from(if is_sound || repair { 0 } else { FAILED }))
}

fn status(config: &OtaConfig, output: &Output) -> anyhow::Result<()> {
    let state = State::read(&config.state)?;
    let report = status::Report::new(&state, &config.state, &config.root);
    match output.json {
        true => output.value(&report),
        false => output.text(report),
    }
}

fn reset(yes: bool, config: &Config, output: &Output) -> anyhow::Result<ExitCode> {
    let folder = &config.store.path;
    if !yes {
        bail!(
            "this removes all that the gateway keeps in {}: apps, their state, sessions, retained messages, the journal; --yes does it",
            folder.display()
        );
    }
    let agent = match config.ota.state.exists() {
        true => Some(Agent::open(
            settings(&config.ota),
            Timestamp::now(),
            Duration::ZERO,
        )?),
        false => None,
    };
    crate::store::erase(folder)?;
    if let Some(mut agent) = agent {
        agent.state = State {
            added_keys: Vec::new(),
            held_since: None,
            last_rollback: None,
            failed: Vec::new(),
            last_check: None,
            last_error: None,
            // What the machine can does not change, old releases stay old, and what was revoked stays so.
            ..agent.state
        };
        agent.save()?;
    }
    say(
        output,
        json!({ "reset": folder }),
        format!("{} is empty.", folder.display()),
    )?;
    Ok(ExitCode::SUCCESS)
}
