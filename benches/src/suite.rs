//! What is measured, in which order, and which floor it has to meet.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use tempfile::TempDir;

use crate::contest::{LOST, RECEIVED, Side};
use crate::load::{Load, Pace, Span};
use crate::process;
use crate::reading::Form;
use crate::report::{Floor, Line, Section};
use crate::server::{Broker, Gateway, Site};
use crate::statistics::{Rounds, figure};

pub(crate) const PUBLISHERS: usize = 4;
pub(crate) const PAYLOAD_BYTES: usize = 100;

/// Unacknowledged messages of a publisher at QoS 1 and 2.
pub(crate) const WINDOW: u16 = 1000;

/// A steady load that leaves every broker time.
pub(crate) const STEADY_RATE: u64 = 5_000;

/// The app that results are measured through, and an other that only has to be there.
pub(crate) const CONVERTING_APP: &str = "unit-convert";
const OTHER_APP: &str = "overheat-alarm";

/// What the app takes in and hands out.
const APP_TOPIC: &str = "plant/probe/temperature_f";
const APP_RESULTS: &str = "converted/#";

/// The parts of the suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// The broker alone, at QoS 0, 1 and 2, against mosquitto.
    Broker,
    /// The broker alone with TLS, at QoS 0 and 1, against mosquitto.
    Tls,
    /// Latency and CPU time of the broker alone at a steady rate, against mosquitto.
    Steady,
    /// From a publisher through an app to a subscriber, flat out.
    App,
    /// Latency through an app at a steady rate.
    Latency,
    /// Memory and CPU of a gateway with nothing to do.
    Idle,
    /// From the start of the process to readiness.
    Start,
    /// 1,000 topics under one wildcard subscription.
    Topics,
    /// One message to 1,000 subscribers.
    FanOut,
    /// 1,000 publishers to one subscriber.
    FanIn,
    /// Memory with 10,000 clients that have nothing to do.
    Connections,
    /// One, two and four apps on the same topics.
    Apps,
    /// Calls into an app, without the edge.
    Calls,
    /// From the start of an app to its first result, and a fresh instance.
    ColdStart,
    /// QoS 1 that is acknowledged when it is on disk.
    Durable,
    /// Hand-over between threads, duplicates, QoS 0 into the tap, the realtime lane.
    Lanes,
    /// Mappings, from bytes to bytes.
    Mappings,
    /// Frames over TCP to an outlet that does nothing.
    Ingest,
    /// Shipping to a replicated stream of NATS JetStream, against its own client.
    Uplink,
    /// Several gateways of a site: shards, failover.
    Site,
    /// What a gateway costs the servers that it is linked to.
    Fleet,
    /// Over-the-air updates from a binary cache, against `nix copy`.
    Ota,
    /// Memory and start of a gateway with 100 apps.
    HundredApps,
    /// A good app beside bad ones.
    Neighbours,
}

/// How to measure.
pub struct Suite {
    pub gateway: PathBuf,
    /// The folder of built apps.
    pub apps: PathBuf,
    pub mosquitto: Option<PathBuf>,
    pub rounds: usize,
    /// How long each load lasts.
    pub time: Duration,
}

impl Suite {
    /// Measures one part.
    pub fn run(&self, part: Part) -> Result<Vec<Section>> {
        match part {
            Part::Broker => Ok(vec![
                self.broker(0, 5.0)?,
                self.broker(1, 5.0)?,
                self.broker(2, 3.0)?,
            ]),
            Part::Tls => Ok(vec![self.tls(0, 2.0)?, self.tls(1, 2.0)?]),
            Part::Steady => Ok(vec![self.steady(0)?, self.steady(1)?]),
            Part::App => self.app().map(|section| vec![section]),
            Part::Latency => self.latency().map(|section| vec![section]),
            Part::Idle => self.idle().map(|section| vec![section]),
            Part::Start => self.start().map(|section| vec![section]),
            Part::Topics => self.topics().map(|section| vec![section]),
            Part::FanOut => self.fan_out().map(|section| vec![section]),
            Part::FanIn => self.fan_in().map(|section| vec![section]),
            Part::Connections => self.connections().map(|section| vec![section]),
            Part::Apps => self.many_apps().map(|section| vec![section]),
            Part::Calls => self.calls().map(|section| vec![section]),
            Part::ColdStart => self.cold_starts().map(|section| vec![section]),
            Part::Durable => self.durable().map(|section| vec![section]),
            Part::Lanes => self.lanes(),
            Part::Mappings => self.mappings(),
            Part::Ingest => self.ingest().map(|section| vec![section]),
            Part::Uplink => self.uplink(),
            Part::Site => self.site(),
            Part::Fleet => self.fleet(),
            Part::Ota => self.ota(),
            Part::HundredApps => self.hundred_apps().map(|section| vec![section]),
            Part::Neighbours => self.neighbours().map(|section| vec![section]),
        }
    }

    /// Flat out on the plant's topics, one subscriber to everything.
    pub(crate) fn load(&self, broker: &dyn Broker) -> Load {
        Load {
            broker: broker.endpoint(),
            publishers: PUBLISHERS,
            topics: plant_topics(PUBLISHERS),
            subscribers: 1,
            filter: "#".to_owned(),
            qos: 0,
            window: WINDOW,
            payload_bytes: PAYLOAD_BYTES,
            form: Form::Measurement,
            pace: Pace::FlatOut,
            span: Span::Time(self.time),
            copies: 1,
            server: Some(broker.pid()),
        }
    }

    fn app(&self) -> Result<Section> {
        let site = Site::new(&self.gateway)?;
        let gateway = self.with_apps(&site, &[CONVERTING_APP])?;
        let mut side = Side::default();
        for _ in 0..self.rounds {
            side.add(self.app_load(&gateway).run()?);
        }
        gateway.stop()?;
        let mut lines = side.lines("headgate");
        for line in &mut lines {
            line.floor = match line.what.strip_prefix("headgate: ") {
                Some(RECEIVED) => Some(Floor::AtLeast(300_000.0)),
                Some(LOST) => Some(Floor::AtMost(0.0)),
                _ => None,
            };
        }
        Ok(Section {
            title: "Through a WASM app".to_owned(),
            conditions: format!(
                "{PUBLISHERS} publishers flat out for {:?} → MQTT edge → `{CONVERTING_APP}` → broker → 1 \
                 subscriber to `{APP_RESULTS}`, {PAYLOAD_BYTES} B, QoS 0. Every result is accounted for.",
                self.time
            ),
            lines,
        })
    }

    fn latency(&self) -> Result<Section> {
        let site = Site::new(&self.gateway)?;
        let gateway = self.with_apps(&site, &[CONVERTING_APP])?;
        let [mut p50, mut p99, mut p999, mut worst, mut own] = <[Rounds; 5]>::default();
        let mut side = Side::default();
        for _ in 0..self.rounds {
            let outcome = Load {
                pace: Pace::PerSecond(STEADY_RATE),
                ..self.app_load(&gateway)
            }
            .run()?;
            let at = |quantile| outcome.latency.value_at_quantile(quantile) as f64 / 1e3;
            p50.push(at(0.5));
            p99.push(at(0.99));
            p999.push(at(0.999));
            worst.push(at(1.0));
            own.push(outcome.lateness.value_at_quantile(0.5) as f64 / 1e3);
            side.add(outcome);
        }
        gateway.stop()?;
        Ok(Section {
            title: format!(
                "Latency through a WASM app at {} events/s",
                figure(STEADY_RATE as f64)
            ),
            conditions: format!(
                "{PUBLISHERS} publishers, {STEADY_RATE} evenly spaced events/s in all for {:?}, `{CONVERTING_APP}`, \
                 1 subscriber, {PAYLOAD_BYTES} B, QoS 0. From when an event was due to be published to \
                 when its result was read from the subscriber's socket, so whatever the generator is late \
                 counts as latency.",
                self.time
            ),
            lines: vec![
                Line::new("p50", "µs", p50).with_floor(Floor::AtMost(300.0)),
                Line::new("p99", "µs", p99),
                Line::new("p99.9", "µs", p999),
                Line::new("longest", "µs", worst),
                Line::new("of it the generator's own lateness, p50", "µs", own),
                Line::new("gateway's CPU time", "µs/event", side.server_us.clone()),
                Line::new(LOST, "events in all rounds", side.lost_in_all())
                    .with_floor(Floor::AtMost(0.0)),
            ],
        })
    }

    fn idle(&self) -> Result<Section> {
        const SETTLING: Duration = Duration::from_secs(2);
        let watched = self.time.max(Duration::from_secs(10));
        let [mut memory, mut cpu] = <[Rounds; 2]>::default();
        for _ in 0..self.rounds {
            // The state of a gateway in the field: it was started with its apps installed.
            let site = Site::new(&self.gateway)?;
            self.with_apps(&site, &[CONVERTING_APP, OTHER_APP])?
                .stop()?;
            let gateway = site.start()?;
            gateway.await_results(APP_TOPIC, APP_RESULTS, 1)?;
            thread::sleep(SETTLING);
            let before = process::cpu_time(gateway.pid())?;
            thread::sleep(watched);
            let used = process::cpu_time(gateway.pid())? - before;
            cpu.push(used.as_secs_f64() / watched.as_secs_f64() * 100.0);
            memory.push(gateway.resident_bytes()? as f64 / 1e6);
            gateway.stop()?;
        }
        Ok(Section {
            title: "Idle".to_owned(),
            conditions: format!(
                "`{CONVERTING_APP}` and `{OTHER_APP}` run and have nothing to do. Memory is VmRSS. CPU time \
                 is counted over {watched:?}; the kernel counts it in ticks of 10 ms, so one tick is {} %. \
                 The floor is 0 % when rounded to whole per cents.",
                figure(1.0 / watched.as_secs_f64())
            ),
            lines: vec![
                Line::new("resident memory", "MB", memory).with_floor(Floor::AtMost(30.0)),
                Line::new("CPU", "%", cpu).with_floor(Floor::AtMost(0.49)),
            ],
        })
    }

    fn start(&self) -> Result<Section> {
        let site = Site::new(&self.gateway)?;
        let gateway = site.start()?;
        let empty: Rounds = [milliseconds(gateway.ready_after)].into_iter().collect();
        self.install(&gateway, &[CONVERTING_APP, OTHER_APP])?;
        gateway.stop()?;
        let [mut warm, mut warm_result, mut cold, mut cold_result] = <[Rounds; 4]>::default();
        for _ in 0..self.rounds {
            let measure = |ready: &mut Rounds, result: &mut Rounds| -> Result<()> {
                let start = std::time::Instant::now();
                let gateway = site.start()?;
                ready.push(milliseconds(gateway.ready_after));
                let answered = gateway.await_results(APP_TOPIC, APP_RESULTS, 1)?;
                result.push(milliseconds(answered - start));
                gateway.stop()
            };
            measure(&mut warm, &mut warm_result)?;
            site.forget_compiled_apps()?;
            measure(&mut cold, &mut cold_result)?;
        }
        Ok(Section {
            title: "Start".to_owned(),
            conditions: format!(
                "From the start of the process to the first 200 from `/readyz` (asked every millisecond), and \
                 to the first result that comes through an app (tried every 20 ms), with `{CONVERTING_APP}` \
                 and `{OTHER_APP}` installed. Warm: the apps are in the cache of compiled components. Cold: \
                 that cache was removed."
            ),
            lines: vec![
                Line::new("warm: ready", "ms", warm).with_floor(Floor::AtMost(150.0)),
                Line::new("warm: first result", "ms", warm_result),
                Line::new("cold: ready", "ms", cold),
                Line::new("cold: first result", "ms", cold_result),
                Line::new("empty store, no apps: ready", "ms", empty),
            ],
        })
    }

    fn many_apps(&self) -> Result<Section> {
        const COUNTS: [usize; 3] = [1, 2, 4];
        let sites = COUNTS
            .iter()
            .map(|_| Site::new(&self.gateway))
            .collect::<Result<Vec<_>>>()?;
        let mut gateways = Vec::new();
        for (site, count) in sites.iter().zip(COUNTS) {
            let gateway = site.start()?;
            for copy in 0..count {
                let copied = self.copied_app(copy)?;
                gateway.install(copied.path())?;
            }
            gateway.await_results(APP_TOPIC, APP_RESULTS, count)?;
            gateways.push(gateway);
        }
        let mut sides: [Side; 3] = Default::default();
        for _ in 0..self.rounds {
            for ((gateway, side), count) in gateways.iter().zip(&mut sides).zip(COUNTS) {
                let load = Load {
                    copies: count as u64,
                    ..self.app_load(gateway)
                };
                side.add(load.run()?);
            }
        }
        for gateway in gateways {
            gateway.stop()?;
        }
        let mut lines = Vec::new();
        for (side, count) in sides.into_iter().zip(COUNTS) {
            let name = match count {
                1 => "1 app".to_owned(),
                _ => format!("{count} apps"),
            };
            lines.extend(side.lines(&name));
        }
        Ok(Section {
            title: "Several apps on the same topics".to_owned(),
            conditions: format!(
                "As through one app, with 1, 2 and 4 copies of `{CONVERTING_APP}` under names of their own: \
                 each event has as many results as there are apps. Messages received are results; CPU time is \
                 for each event published. {:?} each.",
                self.time
            ),
            lines,
        })
    }

    pub(crate) fn app_load(&self, gateway: &Gateway<'_>) -> Load {
        Load {
            filter: APP_RESULTS.to_owned(),
            ..self.load(gateway)
        }
    }

    /// Starts a gateway with these apps, which answer when this returns.
    pub(crate) fn with_apps<'a>(&self, site: &'a Site, apps: &[&str]) -> Result<Gateway<'a>> {
        let gateway = site.start()?;
        self.install(&gateway, apps)?;
        Ok(gateway)
    }

    pub(crate) fn with_converting_app<'a>(&self, site: &'a Site) -> Result<Gateway<'a>> {
        self.with_apps(site, &[CONVERTING_APP])
    }

    /// Until so many apps answer.
    pub(crate) fn await_copies(&self, gateway: &Gateway<'_>, copies: usize) -> Result<()> {
        gateway.await_results(APP_TOPIC, APP_RESULTS, copies)?;
        Ok(())
    }

    fn install(&self, gateway: &Gateway<'_>, apps: &[&str]) -> Result<()> {
        for app in apps {
            gateway.install(&self.apps.join(app))?;
        }
        gateway.await_results(APP_TOPIC, APP_RESULTS, 1)?;
        Ok(())
    }

    /// The converting app under another name.
    pub(crate) fn copied_app(&self, copy: usize) -> Result<TempDir> {
        let source = self.apps.join(CONVERTING_APP);
        let name = format!("{CONVERTING_APP}-{copy}");
        let target = TempDir::new()?;
        let incomplete = || format!("{} is no built app", source.display());
        fs::copy(
            source.join(format!("{CONVERTING_APP}.wasm")),
            target.path().join(format!("{name}.wasm")),
        )
        .with_context(incomplete)?;
        let manifest = fs::read_to_string(source.join("manifest.toml")).with_context(incomplete)?;
        let renamed = manifest.replacen(
            &format!("name = \"{CONVERTING_APP}\""),
            &format!("name = \"{name}\""),
            1,
        );
        fs::write(target.path().join("manifest.toml"), renamed)?;
        Ok(target)
    }
}

/// Topics that the converting app takes in.
pub(crate) fn plant_topics(count: usize) -> Vec<String> {
    (0..count)
        .map(|line| format!("plant/line{line}/temperature_f"))
        .collect()
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// The folder that holds this workspace: the working directory or one above it.
pub fn workspace_root() -> Result<PathBuf> {
    let here = std::env::current_dir()?;
    here.ancestors()
        .find(|folder| folder.join("benches/Cargo.toml").is_file())
        .map(Path::to_owned)
        .context("run this inside Headgate's repository")
}
