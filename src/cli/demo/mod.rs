//! `headgate demo`: the real gateway with the sample apps, and a simulated plant that feeds it over
//! TCP.

mod ledger;
mod observer;
mod plant;
mod view;

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use parking_lot::Mutex;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use super::output::Output;
use super::package::Package;
use super::run::{runtime, stop_signal};
use crate::admin::Client;
use crate::apps::{AppInfo, AppState};
use crate::config::{Config, LogFormat, Override, Source};
use crate::{gateway, logging};
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

/// The demo shows what happens; of the gateway's log only what is wrong is of interest.
const LOG_LEVEL: &str = "warn";

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
    let packages = sample_apps(args.apps.as_deref())?;
    let store = tempfile::Builder::new()
        .prefix("headgate-demo-")
        .tempdir()
        .context("making a temporary folder for the store")?;
    let runtime = runtime()?;
    if !output.json {
        output.text("Starting the gateway and compiling the sample apps.")?;
    }
    let summary = runtime.block_on(demonstrate(&args, &packages, store.path(), output.json))?;
    summary.print(output)?;
    if summary.lost > 0 {
        bail!("{} results were lost", summary.lost);
    }
    Ok(ExitCode::SUCCESS)
}

/// The packages of the sample apps in `folder`, else from where they are installed or built.
fn sample_apps(folder: Option<&Path>) -> anyhow::Result<Vec<Package>> {
    let folder = match folder {
        Some(folder) => folder.to_owned(),
        None => find_apps()?,
    };
    [ALARM_APP, CONVERT_APP]
        .into_iter()
        .map(|name| Package::find(&folder.join(name), None))
        .collect::<Result<_, _>>()
        .with_context(|| {
            format!(
                "the sample apps are not all in {}; `./dev demo` builds them, or `cargo xtask apps`",
                folder.display()
            )
        })
}

/// Starts the gateway, installs the apps, runs the plant, and stops all of it again.
async fn demonstrate(
    args: &DemoArgs,
    packages: &[Package],
    store: &Path,
    json: bool,
) -> anyhow::Result<Summary> {
    let mut hangup = signal(SignalKind::hangup()).context("listening for SIGHUP")?;
    let stop = stop_signal()?;
    // A terminal that is closed ends the demo too, so that its store doesn't stay behind.
    let mut stop = pin!(async {
        tokio::select! {
            () = stop => {}
            _ = hangup.recv() => {}
        }
    });
    let mut notes = Vec::new();
    let config = configuration(store, &mut notes)?;
    let live = View::is_live(args.plain, json);
    let log = Log::start(live)?;
    let gateway = gateway::build(&config).await?;
    let broker = gateway
        .mqtt_addr()
        .context("the demo's MQTT listener is off")?;
    let places = Places {
        mqtt: broker,
        metrics: gateway.metrics_addr(),
        socket: config.admin.socket.clone(),
        notes,
    };
    let (quit, quitting) = oneshot::channel::<()>();
    let gateway = tokio::spawn(gateway.run(async {
        // An error means that the demo is gone, which is a reason to stop too.
        let _ = quitting.await;
    }));

    let client = Client::new(&config.admin.socket);
    let watched = async {
        let alarm = tokio::select! {
            alarm = install(&client, packages) => alarm?,
            () = &mut stop => bail!("interrupted before the plant was started"),
        };
        let plan = Plan {
            broker,
            sensors: args.sensors.into(),
            events_per_s: args.rate,
            alarm,
        };
        let duration = args.duration.map(Duration::from_secs);
        // Gives the terminal back when it goes.
        let view = View::new(args.plain, json, places)?;
        watch(plan, duration, &client, &view, &mut stop).await
    }
    .await;
    // The gateway is told to stop, whether that went well or not.
    let _ = quit.send(());
    let stopped = gateway.await;
    log.print_if_kept();
    let watched = watched?;
    stopped.context("the gateway broke down")?;
    Ok(watched)
}

/// Installs the sample apps the way a user does; they must run.
async fn install(client: &Client, packages: &[Package]) -> anyhow::Result<AlarmRule> {
    let mut rule = None;
    for package in packages {
        let app = client
            .install(&package.manifest, &package.component)
            .await
            .with_context(|| format!("installing {}", package.name))?;
        if app.state != AppState::Running {
            let reason = app.reason.as_deref().unwrap_or("no reason given");
            bail!("{} does not run: {}: {reason}", app.name, app.state);
        }
        if app.name == ALARM_APP {
            rule = Some(alarm_rule(&app)?);
        }
    }
    rule.with_context(|| format!("{ALARM_APP} is not among the sample apps"))
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

/// `usual` if nobody listens there, else 0, which takes a free port.
fn port(usual: u16, what: &str, notes: &mut Vec<String>) -> u16 {
    if TcpListener::bind((Ipv4Addr::LOCALHOST, usual)).is_ok() {
        return usual;
    }
    notes.push(format!(
        "Port {usual} is taken, so {what} is on another one here."
    ));
    0
}

/// The defaults, whatever this machine's file and environment say, in a store of its own.
fn configuration(store: &Path, notes: &mut Vec<String>) -> anyhow::Result<Config> {
    let set = |key, value: OsString| Override {
        key,
        value,
        flag: "demo",
    };
    let local = |port: u16| OsString::from(format!("127.0.0.1:{port}"));
    let mqtt = port(USUAL_MQTT_PORT, "MQTT", notes);
    let metrics = port(USUAL_METRICS_PORT, "the metrics endpoint", notes);
    let source = Source {
        overrides: vec![
            set("store.path", store.into()),
            set("mqtt.listen", local(mqtt)),
            set("metrics.listen", local(metrics)),
        ],
        ..Source::default()
    };
    Ok(Config::load(source)?.config)
}

/// Lines of the gateway's log that are kept while the live view has the terminal.
const KEPT_LOG_LINES: usize = 100;

/// Where the gateway's warnings go: to standard error, or, while the live view has the terminal,
/// into memory until it is given back.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<VecDeque<String>>>);

impl Log {
    fn start(live: bool) -> anyhow::Result<Log> {
        let log = Log::default();
        if live {
            let writer = log.clone();
            logging::init_to(LOG_LEVEL, LogFormat::Text, true, move || writer.clone())?;
        } else {
            logging::init(LOG_LEVEL, LogFormat::Text)?;
        }
        Ok(log)
    }

    fn print_if_kept(&self) {
        for line in self.0.lock().drain(..) {
            eprint!("{line}");
        }
    }
}

impl io::Write for Log {
    /// Takes whole lines: that is how they are logged.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut lines = self.0.lock();
        if lines.len() == KEPT_LOG_LINES {
            lines.pop_front();
        }
        lines.push_back(String::from_utf8_lossy(line).into_owned());
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs the plant against the gateway until its time is up, `stop` resolves, or something breaks;
/// then waits for what is still on its way.
async fn watch(
    plan: Plan,
    duration: Option<Duration>,
    client: &Client,
    view: &View,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<Summary> {
    let ledger = Arc::new(Ledger::new(plan.sensors));
    let (broken, mut breakage) = mpsc::channel(1);
    let observer = Observer::start(plan.broker, ledger.clone(), broken.clone()).await?;
    let start = Instant::now();
    let plant = Plant::start(plan, &ledger, &broken);

    let mut stop = pin!(stop);
    let mut tick = tokio::time::interval(view.interval());
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    tick.tick().await;
    let end = async {
        match duration {
            Some(duration) => tokio::time::sleep(duration).await,
            None => std::future::pending().await,
        }
    };
    let mut end = pin!(end);
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
    let totals = ledger.totals();
    Ok(Summary {
        elapsed_s: elapsed.as_secs_f64(),
        totals,
        lost: totals.missing() + unread,
        latency: ledger.latencies(),
        apps,
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
