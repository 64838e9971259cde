//! What is measured, in which order, and which floor it has to meet.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use tempfile::TempDir;

use crate::load::{Load, Outcome, Pace, Span};
use crate::process;
use crate::report::{Floor, Line, Section};
use crate::server::{Broker, Gateway, Mosquitto, Site};
use crate::statistics::{Rounds, figure};

const PUBLISHERS: usize = 4;
const PAYLOAD_BYTES: usize = 100;

/// Unacknowledged messages of a publisher at QoS 1.
const WINDOW: u16 = 1000;

/// The app that results are measured through, and an other that only has to be there.
const CONVERTING_APP: &str = "unit-convert";
const OTHER_APP: &str = "overheat-alarm";

/// What the app takes in and hands out.
const APP_TOPIC: &str = "plant/probe/temperature_f";
const APP_RESULTS: &str = "converted/#";

/// The parts of the suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// The broker alone, at QoS 0 and 1, against mosquitto.
    Broker,
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
    /// One message to 50 subscribers.
    FanOut,
    /// One, two and four apps on the same topics.
    Apps,
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
            Part::Broker => Ok(vec![self.broker(0, 5.0)?, self.broker(1, 4.0)?]),
            Part::App => self.app().map(|section| vec![section]),
            Part::Latency => self.latency().map(|section| vec![section]),
            Part::Idle => self.idle().map(|section| vec![section]),
            Part::Start => self.start().map(|section| vec![section]),
            Part::Topics => self.topics().map(|section| vec![section]),
            Part::FanOut => self.fan_out().map(|section| vec![section]),
            Part::Apps => self.many_apps().map(|section| vec![section]),
        }
    }

    /// Flat out on the plant's topics, one subscriber to everything.
    fn load(&self, broker: &dyn Broker) -> Load {
        Load {
            broker: broker.address(),
            publishers: PUBLISHERS,
            topics: plant_topics(PUBLISHERS),
            subscribers: 1,
            filter: "#".to_owned(),
            qos: 0,
            window: WINDOW,
            payload_bytes: PAYLOAD_BYTES,
            pace: Pace::FlatOut,
            span: Span::Time(self.time),
            copies: 1,
            server: Some(broker.pid()),
        }
    }

    fn broker(&self, qos: u8, floor: f64) -> Result<Section> {
        let mut section = self.against_mosquitto(|broker| Load {
            qos,
            ..self.load(broker)
        })?;
        section.title = format!("Broker alone, QoS {qos}");
        section.conditions = format!(
            "{PUBLISHERS} publishers flat out for {:?}, 1 subscriber to `#`, {PAYLOAD_BYTES} B, QoS \
             {qos} on both sides{}. {}",
            self.time,
            match qos {
                0 => String::new(),
                _ => format!(", up to {WINDOW} messages of a publisher unacknowledged"),
            },
            self.mosquitto_conditions()?
        );
        for line in &mut section.lines {
            if line.what == RATIO {
                line.floor = Some(Floor::AtLeast(floor));
            }
            // QoS 0 allows a broker to drop messages for a subscriber that does not keep up.
            if qos == 1 && line.what == format!("headgate: {LOST}") {
                line.floor = Some(Floor::AtMost(0.0));
            }
        }
        Ok(section)
    }

    fn topics(&self) -> Result<Section> {
        const TOPICS: usize = 1_000;
        let mut section = self.against_mosquitto(|broker| Load {
            topics: plant_topics(TOPICS),
            filter: "plant/+/temperature_f".to_owned(),
            ..self.load(broker)
        })?;
        section.title = format!("{} topics", figure(TOPICS as f64));
        section.conditions = format!(
            "{PUBLISHERS} publishers flat out for {:?} over {TOPICS} topics in turn, 1 subscriber to \
             `plant/+/temperature_f`, {PAYLOAD_BYTES} B, QoS 0. {}",
            self.time,
            self.mosquitto_conditions()?
        );
        Ok(section)
    }

    fn fan_out(&self) -> Result<Section> {
        const SUBSCRIBERS: usize = 50;
        // A count, not a time: what a broker without limits queues up in seconds takes it minutes to
        // deliver to so many.
        let messages = 10_000 * self.time.as_secs().max(1);
        let mut section = self.against_mosquitto(|broker| Load {
            publishers: 1,
            topics: plant_topics(1),
            subscribers: SUBSCRIBERS,
            span: Span::Messages(messages),
            ..self.load(broker)
        })?;
        section.title = format!("Fan-out to {SUBSCRIBERS} subscribers");
        section.conditions = format!(
            "1 publisher sends {} messages flat out, {SUBSCRIBERS} subscribers to `#`, {PAYLOAD_BYTES} B, QoS \
             0; what is received counts once for each subscriber, CPU time once for each message \
             published. {}",
            figure(messages as f64),
            self.mosquitto_conditions()?
        );
        Ok(section)
    }

    /// The same load on the gateway and, where it is installed, on mosquitto, in turns.
    fn against_mosquitto(&self, load: impl Fn(&dyn Broker) -> Load) -> Result<Section> {
        let site = Site::new(&self.gateway)?;
        let gateway = site.start()?;
        let mosquitto = self
            .mosquitto
            .as_deref()
            .map(Mosquitto::start)
            .transpose()?;
        let mut ours = Side::default();
        let mut theirs = Side::default();
        for _ in 0..self.rounds {
            ours.add(load(&gateway).run().context("headgate under load")?);
            if let Some(mosquitto) = &mosquitto {
                theirs.add(load(mosquitto).run().context("mosquitto under load")?);
            }
        }
        gateway.stop()?;
        let mut lines = ours.lines("headgate");
        if mosquitto.is_some() {
            lines.extend(theirs.lines("mosquitto"));
            let ratio = ours.per_second.median() / theirs.per_second.median();
            lines.push(Line::new(RATIO, "times", [ratio].into_iter().collect()));
        }
        Ok(Section {
            title: String::new(),
            conditions: String::new(),
            lines,
        })
    }

    fn mosquitto_conditions(&self) -> Result<String> {
        match &self.mosquitto {
            Some(program) => Ok(format!(
                "{} with `max_queued_messages 0`, `max_inflight_messages 0` (both: no limit) and \
                 `set_tcp_nodelay true`.",
                Mosquitto::version(program)?
            )),
            None => {
                Ok("mosquitto is not installed, so there is nothing to compare with.".to_owned())
            }
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
        const RATE: u64 = 5_000;
        let site = Site::new(&self.gateway)?;
        let gateway = self.with_apps(&site, &[CONVERTING_APP])?;
        let [mut p50, mut p99, mut p999, mut worst, mut own] = <[Rounds; 5]>::default();
        let mut side = Side::default();
        for _ in 0..self.rounds {
            let outcome = Load {
                pace: Pace::PerSecond(RATE),
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
                figure(RATE as f64)
            ),
            conditions: format!(
                "{PUBLISHERS} publishers, {RATE} evenly spaced events/s in all for {:?}, `{CONVERTING_APP}`, \
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

    fn app_load(&self, gateway: &Gateway<'_>) -> Load {
        Load {
            filter: APP_RESULTS.to_owned(),
            ..self.load(gateway)
        }
    }

    /// Starts a gateway with these apps, which answer when this returns.
    fn with_apps<'a>(&self, site: &'a Site, apps: &[&str]) -> Result<Gateway<'a>> {
        let gateway = site.start()?;
        self.install(&gateway, apps)?;
        Ok(gateway)
    }

    fn install(&self, gateway: &Gateway<'_>, apps: &[&str]) -> Result<()> {
        for app in apps {
            gateway.install(&self.apps.join(app))?;
        }
        gateway.await_results(APP_TOPIC, APP_RESULTS, 1)?;
        Ok(())
    }

    /// The converting app under another name.
    fn copied_app(&self, copy: usize) -> Result<TempDir> {
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

const RECEIVED: &str = "received";
const LOST: &str = "lost";
const RATIO: &str = "headgate ÷ mosquitto";

/// What the rounds of one server gave.
#[derive(Default)]
struct Side {
    per_second: Rounds,
    server_us: Rounds,
    generator_us: Rounds,
    lost: Rounds,
    duplicates: Rounds,
}

impl Side {
    fn add(&mut self, outcome: Outcome) {
        self.per_second.push(outcome.per_second());
        self.server_us.push(outcome.server_us().unwrap_or_default());
        self.generator_us.push(outcome.generator_us());
        self.lost.push(outcome.lost as f64);
        self.duplicates.push(outcome.duplicates as f64);
    }

    /// A loss in any round is a loss: the median would hide it.
    fn lost_in_all(&self) -> Rounds {
        [self.lost.sum()].into_iter().collect()
    }

    fn lines(&self, name: &str) -> Vec<Line> {
        let duplicates = [self.duplicates.sum()].into_iter().collect();
        vec![
            Line::new(
                format!("{name}: {RECEIVED}"),
                "msg/s",
                self.per_second.clone(),
            ),
            Line::new(
                format!("{name}: its CPU time"),
                "µs/msg",
                self.server_us.clone(),
            ),
            Line::new(
                format!("{name}: the generator's CPU time"),
                "µs/msg",
                self.generator_us.clone(),
            ),
            Line::new(
                format!("{name}: {LOST}"),
                "messages in all rounds",
                self.lost_in_all(),
            ),
            Line::new(
                format!("{name}: duplicates"),
                "messages in all rounds",
                duplicates,
            ),
        ]
    }
}

/// Topics that the converting app takes in.
fn plant_topics(count: usize) -> Vec<String> {
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
