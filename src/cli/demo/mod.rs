//! `headgate demo`: the real gateway with the sample apps, and a simulated plant that feeds it over
//! TCP.

mod ledger;
mod observer;
mod plant;
mod view;

use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use tokio::sync::mpsc;

use super::output::Output;
use super::package::Package;
use super::run::stop_signal;
use crate::admin::Client;
use crate::apps::AppInfo;
use crate::config::{Config, LogFormat, Override, Source};
use ledger::{Ledger, Totals};
use observer::Observer;
use plant::{AlarmRule, Plan, Plant};
use view::{Frame, Places, Summary, View};

/// Raises alarms over the plant's temperatures.
const ALARM_APP: &str = "overheat-alarm";
/// Converts the plant's temperatures in °F. Each of them has one result, so these are timed and
/// missed.
const CONVERT_APP: &str = "unit-convert";

const USUAL_MQTT_PORT: u16 = 1883;
const USUAL_METRICS_PORT: u16 = 9464;

/// Once the sensors have stopped, results may take this long from one to the next.
const DRAIN_QUIET: Duration = Duration::from_secs(2);
const DRAIN_POLL: Duration = Duration::from_millis(20);

/// Run the gateway with sample apps and a simulated plant, and watch
///
/// The sensors of the plant are real MQTT clients over TCP. Nothing of the demo outlives it. Exits
/// with 1 if an event was lost.
#[derive(Args)]
pub(super) struct DemoArgs {
    /// Seconds to run [default: until Ctrl-C]
    #[arg(long, value_name = "SECS", value_parser = clap::value_parser!(u64).range(1..))]
    duration: Option<u64>,
    /// Events a second, of all sensors together
    #[arg(long, value_name = "EVENTS_PER_S", default_value = "1000", value_parser = events_per_s)]
    rate: f64,
    /// Sensors: MQTT clients that publish
    #[arg(long, value_name = "N", default_value_t = 20,
          value_parser = clap::value_parser!(u16).range(1..=1000))]
    sensors: u16,
    /// Folder of the built sample apps [default: share/headgate/apps beside the program's folder,
    /// else target/apps]
    #[arg(long, value_name = "DIR", env = "HEADGATE_DEMO_APPS")]
    apps: Option<PathBuf>,
    /// Print a line a second, even on a terminal
    #[arg(long)]
    plain: bool,
}

/// More than any machine of today takes in over a thousand connections; beyond it the schedule's
/// arithmetic loses its sense.
const MAX_EVENTS_PER_S: f64 = 10_000_000.0;

fn events_per_s(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(rate) if rate > 0.0 && rate <= MAX_EVENTS_PER_S => Ok(rate),
        Ok(_) => Err(format!("must be above 0 and at most {MAX_EVENTS_PER_S}")),
        Err(_) => Err("not a number".into()),
    }
}

pub(super) fn run(args: DemoArgs, output: &Output) -> anyhow::Result<ExitCode> {
    let apps = match &args.apps {
        Some(folder) => folder.clone(),
        None => find_apps()?,
    };
    let packages = [ALARM_APP, CONVERT_APP]
        .map(|name| Package::find(&apps.join(name), None, None))
        .into_iter()
        .collect::<Result<Vec<_>, _>>()
        .with_context(|| {
            format!(
                "{} holds no sample apps; `./dev demo` builds them, or `cargo xtask apps`",
                apps.display()
            )
        })?;
    let store = tempfile::Builder::new()
        .prefix("headgate-demo-")
        .tempdir()
        .context("making a temporary folder for the store")?;
    let mut notes = Vec::new();
    let mqtt_port = free_port(USUAL_MQTT_PORT, "MQTT", &mut notes)?;
    let metrics_port = free_port(USUAL_METRICS_PORT, "metrics", &mut notes)?;
    let config = configuration(store.path(), mqtt_port, metrics_port)?;
    let places = Places {
        mqtt_port,
        metrics_port,
        socket: config.admin.socket.clone(),
        notes,
    };
    todo!()
}

/// Where the sample apps are, when nobody says.
fn find_apps() -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe().context("finding the program's folder")?;
    let installed = program
        .parent()
        .map(|folder| folder.join("../share/headgate/apps"));
    let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| OsString::from("target"));
    let built = Path::new(&target).join("apps");
    let candidates: Vec<PathBuf> = installed.into_iter().chain([built]).collect();
    if let Some(found) = candidates.iter().find(|folder| folder.is_dir()) {
        return Ok(found.clone());
    }
    let looked: Vec<_> = candidates
        .iter()
        .map(|folder| folder.display().to_string())
        .collect();
    bail!(
        "the sample apps are not in {}; `./dev demo` builds them, or `cargo xtask apps`, or name \
         their folder with --apps DIR",
        looked.join(" nor in ")
    )
}

/// `usual` if nobody listens there, else one that is free.
fn free_port(usual: u16, what: &str, notes: &mut Vec<String>) -> anyhow::Result<u16> {
    if TcpListener::bind((Ipv4Addr::LOCALHOST, usual)).is_ok() {
        return Ok(usual);
    }
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .and_then(|listener| listener.local_addr())
        .context("finding a free port")?
        .port();
    notes.push(format!(
        "Port {usual} is taken, so {what} is on port {port} here."
    ));
    Ok(port)
}

/// The defaults, whatever this machine's file and environment say, in a store of its own.
fn configuration(store: &Path, mqtt_port: u16, metrics_port: u16) -> anyhow::Result<Config> {
    let set = |key, value: OsString| Override {
        key,
        value,
        flag: "demo",
    };
    let local = |port| OsString::from(format!("127.0.0.1:{port}"));
    let source = Source {
        overrides: vec![
            set("store.path", store.into()),
            set("mqtt.listen", local(mqtt_port)),
            set("metrics.listen", local(metrics_port)),
        ],
        ..Source::default()
    };
    Ok(Config::load(source)?.config)
}

/// What the plant and its observer did.
struct Watched {
    ledger: Arc<Ledger>,
    apps: Vec<AppInfo>,
    elapsed: Duration,
    /// Readings that the alarm app never handled.
    unread: u64,
}

/// Runs the plant against the gateway until its time is up, `stop` resolves, or something breaks;
/// then waits for what is still on its way.
async fn watch(
    plan: Plan,
    duration: Option<Duration>,
    client: &Client,
    view: &View,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<Watched> {
    let ledger = Arc::new(Ledger::new(plan.sensors));
    let (broken, mut breakage) = mpsc::channel(1);
    let observer = Observer::start(plan.broker, ledger.clone(), broken.clone()).await?;
    let start = Instant::now();
    let plant = Plant::start(plan, &ledger, &broken);

    let mut stop = std::pin::pin!(stop);
    let mut tick = tokio::time::interval(view.interval());
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    tick.tick().await;
    let end = async {
        match duration {
            Some(duration) => tokio::time::sleep(duration).await,
            None => std::future::pending().await,
        }
    };
    let mut end = std::pin::pin!(end);
    let mut before = (start, Totals::default());
    loop {
        tokio::select! {
            () = &mut end => break,
            () = &mut stop => break,
            Some(what) = breakage.recv() => bail!("{what}"),
            _ = tick.tick() => {}
        }
        ledger.give_up_overdue(Instant::now());
        let apps = client.list().await?;
        let (now, totals) = (Instant::now(), ledger.totals());
        let seconds = (now - before.0).as_secs_f64();
        view.show(&Frame {
            elapsed: now - start,
            duration,
            sensors: plan.sensors,
            events_in_per_s: totals.sent.saturating_sub(before.1.sent) as f64 / seconds,
            results_out_per_s: totals.results().saturating_sub(before.1.results()) as f64 / seconds,
            totals,
            latency: ledger.take_recent(),
            apps: &apps,
            alarms: &observer.alarms,
        })?;
        before = (now, totals);
    }
    plant.stop().await;
    let elapsed = start.elapsed();
    let (apps, unread) = drain(&ledger, client).await?;
    observer.stop();
    Ok(Watched {
        ledger,
        apps,
        elapsed,
        unread,
    })
}

/// Waits until all results have come and the alarm app has read all of its readings, or nothing
/// moves any more.
async fn drain(ledger: &Ledger, client: &Client) -> anyhow::Result<(Vec<AppInfo>, u64)> {
    let mut moved = Instant::now();
    let mut missing_before = None;
    loop {
        let apps = client.list().await?;
        let totals = ledger.totals();
        let unread = totals
            .sent_temperatures
            .saturating_sub(read_by_alarm_app(&apps));
        let missing = (totals.missing(), unread);
        if missing == (0, 0) || moved.elapsed() > DRAIN_QUIET {
            return Ok((apps, unread));
        }
        if missing_before.replace(missing) != Some(missing) {
            moved = Instant::now();
        }
        tokio::time::sleep(DRAIN_POLL).await;
    }
}

fn read_by_alarm_app(apps: &[AppInfo]) -> u64 {
    apps.iter()
        .find(|app| app.name == ALARM_APP)
        .map_or(0, |app| app.counters.handled)
}

/// The thresholds that the alarm app was installed with.
fn alarm_rule(app: &AppInfo) -> anyhow::Result<AlarmRule> {
    let number = |key: &str| -> anyhow::Result<f64> {
        let text = app
            .config
            .get(key)
            .with_context(|| format!("{ALARM_APP}: its manifest has no {key} in [config]"))?;
        text.parse()
            .with_context(|| format!("{ALARM_APP}: {key} = {text:?} in [config]"))
    };
    let threshold = number("threshold")?;
    Ok(AlarmRule {
        threshold,
        clear_below: threshold - number("hysteresis")?,
    })
}
