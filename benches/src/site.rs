//! A site of several gateways: an app whose shards they divide among them, and how long it takes until another
//! gateway goes on with one that a site has once.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use headgate::event::Topic;
use headgate::ingest::client::{Endpoint, Sender};
use headgate::ingest::frame::{Hello, Priority};
use serde_json::Value;
use tempfile::TempDir;

use crate::nats::{Program, Servers};
use crate::process;
use crate::report::{Floor, Line, Section};
use crate::server::{Broker, Gateway, Site, free_address};
use crate::statistics::Rounds;
use crate::suite::Suite;

/// Adds up what meters count, and keeps it.
const APP: &str = "meter-total";

/// So many topics have an event in turns.
const METERS: usize = 600;

const SHARDS: u64 = 12;

/// For each run, whatever the number of gateways.
const EVENTS: usize = 60_000;

const LEASE: Duration = Duration::from_secs(5);

const PATIENCE: Duration = Duration::from_secs(120);

/// A gateway of the site that is to be started.
struct Member {
    site: Site,
    endpoint: Endpoint,
    _folder: TempDir,
}

impl Member {
    fn new(suite: &Suite, name: String, servers: &Servers) -> Result<Member> {
        let folder = TempDir::new()?;
        let links = folder.path().join("links.toml");
        let (urls, lease) = (servers.urls(), LEASE.as_secs());
        let replicas = servers.count();
        fs::write(
            &links,
            format!(
                "[[link]]\nname = 'site'\nkind = 'jetstream'\nservers = {urls:?}\n\
                 cluster = {{ shards = {SHARDS}, lease_s = {lease}, replicas = {replicas}, topics = ['plant/#'] }}\n"
            ),
        )?;
        let ingest = free_address()?;
        let site = Site::new(&suite.gateway)?
            .set("HEADGATE_UPLINK_GATEWAY", name)
            .set("HEADGATE_UPLINK_LINKS_FILE", links.display().to_string())
            .set("HEADGATE_INGEST_LISTEN", ingest.to_string());
        let endpoint = Endpoint {
            host: ingest.ip().to_string(),
            port: ingest.port(),
            tls: None,
        };
        Ok(Member {
            site,
            endpoint,
            _folder: folder,
        })
    }

    fn produce(&self, name: &str, events: usize) -> Result<()> {
        let hello = Hello {
            name: name.to_owned(),
            token: String::new(),
        };
        let mut sender = Sender::connect(self.endpoint.clone(), &hello, 1, PATIENCE, |_| ())?;
        let topics = (0..METERS).map(|meter| Topic::new(format!("plant/m{meter}/count")));
        let topics: Vec<Topic> = topics.collect::<Result<_, _>>()?;
        for number in 0..events {
            sender.send(Priority::Medium, &topics[number % METERS], b"1")?;
        }
        sender.finish()?;
        Ok(())
    }
}

/// What the site's app has handled on this gateway, and for how many seats it acts there.
fn handled(gateway: &Gateway<'_>) -> Result<(u64, usize)> {
    let app = gateway.ask(&["app", "inspect", APP])?;
    let handled = app["counters"]["handled"].as_u64();
    let status = gateway.ask(&["status"])?;
    let seats = status["uplink"][0]["seats"].as_array();
    let acts = |seat: &&Value| seat["acts"] == true;
    Ok((
        handled.context("the app has no counters")?,
        seats.map_or(0, |seats| seats.iter().filter(acts).count()),
    ))
}

fn until(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<Instant> {
    let began = Instant::now();
    while !is_so()? {
        ensure!(
            began.elapsed() < PATIENCE,
            "{what}: not within {PATIENCE:?}"
        );
        thread::sleep(Duration::from_millis(10));
    }
    Ok(Instant::now())
}

/// What one run gave.
struct Outcome {
    per_second: f64,
    gateways_us: f64,
    servers_us: f64,
}

impl Suite {
    pub(crate) fn site(&self) -> Result<Vec<Section>> {
        Program::New
            .find()
            .context("there is no nats-server below target/nats: `./dev setup` installs it")?;
        Ok(vec![self.scaling()?, self.failover()?])
    }

    /// The app with another placement.
    fn placed_app(&self, placement: &str) -> Result<TempDir> {
        let (source, folder) = (self.apps.join(APP), TempDir::new()?);
        let manifest = fs::read_to_string(source.join("manifest.toml"))
            .with_context(|| format!("{APP} is not built: `cargo xtask apps` does"))?;
        let manifest = format!("placement = {placement:?}\n{manifest}");
        fs::write(folder.path().join("manifest.toml"), manifest)?;
        let component = format!("{APP}.wasm");
        fs::copy(source.join(&component), folder.path().join(&component))?;
        Ok(folder)
    }

    fn scaling(&self) -> Result<Section> {
        let app = self.placed_app("partition")?;
        let mut sides: [[Rounds; 3]; 3] = Default::default();
        let mut wrong = Rounds::default();
        for _ in 0..self.rounds {
            for (side, gateways) in sides.iter_mut().zip(1..) {
                let outcome = self.spread(gateways, &app, &mut wrong)?;
                side[0].push(outcome.per_second);
                side[1].push(outcome.gateways_us);
                side[2].push(outcome.servers_us);
            }
        }
        let mut lines = Vec::new();
        for ([rate, gateways_us, servers_us], count) in sides.into_iter().zip(1..) {
            let plural = if count == 1 { "" } else { "s" };
            let of = |what: &str| format!("{count} gateway{plural}: {what}");
            lines.push(Line::new(of("handled"), "events/s", rate));
            lines.push(Line::new(of("their CPU time"), "µs/event", gateways_us));
            lines.push(Line::new(
                of("the server's CPU time"),
                "µs/event",
                servers_us,
            ));
        }
        let none = Line::new("not handled, or twice", "events", wrong);
        lines.push(none.with_floor(Floor::AtMost(0.0)));
        Ok(Section {
            title: "A site: an app in shards on one to three gateways".to_owned(),
            conditions: format!(
                "`{APP}` with `placement = \"partition\"`, {SHARDS} shards, {METERS} topics; one nats-server, streams \
                 without replicas. {EVENTS} events in all come in at all gateways by TCP ingest, are journaled, shipped, \
                 and read from the streams by the gateway whose shard it is; until all are handled. All processes and the \
                 producers share this machine's processors, so that more gateways can't be faster than one: what it costs is \
                 told by the CPU times."
            ),
            lines,
        })
    }

    fn spread(&self, gateways: usize, app: &TempDir, wrong: &mut Rounds) -> Result<Outcome> {
        let servers = Servers::single();
        let members = (0..gateways).map(|number| Member::new(self, format!("g{number}"), &servers));
        let members: Vec<Member> = members.collect::<Result<_>>()?;
        let started = members.iter().map(|member| member.site.start());
        let started: Vec<Gateway<'_>> = started.collect::<Result<_>>()?;
        for gateway in &started {
            gateway.install(app.path())?;
        }
        let sums = || -> Result<(u64, Vec<usize>)> {
            let each = started.iter().map(handled).collect::<Result<Vec<_>>>()?;
            Ok((
                each.iter().map(|(handled, _)| handled).sum(),
                each.iter().map(|(_, seats)| *seats).collect(),
            ))
        };
        until("the shards are divided", || {
            let (_, seats) = sums()?;
            Ok(seats.iter().sum::<usize>() as u64 == SHARDS && !seats.contains(&0))
        })?;
        let cpu = || -> Result<(Duration, Duration)> {
            let gateways = started
                .iter()
                .map(|gateway| process::cpu_time(gateway.pid()));
            Ok((
                gateways.sum::<Result<_>>()?,
                process::cpu_time(servers.process_id(0))?,
            ))
        };
        let (before, (timers, _)) = (cpu()?, sums()?);
        let began = Instant::now();
        thread::scope(|scope| -> Result<()> {
            let producing =
                |member| scope.spawn(move || Member::produce(member, "load", EVENTS / gateways));
            let producing: Vec<_> = members.iter().map(producing).collect();
            for producer in producing {
                producer.join().expect("it does not panic")?;
            }
            Ok(())
        })?;
        let mut last = 0;
        let ended = until("all is handled", || {
            last = sums()?.0 - timers;
            Ok(last >= EVENTS as u64)
        })?;
        let after = cpu()?;
        // What is handled twice is by then. The app has a timer, which fires every ten seconds.
        thread::sleep(Duration::from_millis(300));
        let more = (sums()?.0 - timers).saturating_sub(EVENTS as u64);
        wrong.push(more.saturating_sub(10 * gateways as u64) as f64);
        let each = |time: Duration| time.as_secs_f64() * 1e6 / EVENTS as f64;
        Ok(Outcome {
            per_second: EVENTS as f64 / (ended - began).as_secs_f64(),
            gateways_us: each(after.0 - before.0),
            servers_us: each(after.1 - before.1),
        })
    }

    fn failover(&self) -> Result<Section> {
        let app = self.placed_app("singleton")?;
        let [mut killed, mut ended] = <[Rounds; 2]>::default();
        for _ in 0..self.rounds {
            killed.push(self.fail_over(&app, true)?.as_secs_f64());
            ended.push(self.fail_over(&app, false)?.as_secs_f64());
        }
        let most = 2.0 * LEASE.as_secs_f64();
        Ok(Section {
            title: "A site: another gateway goes on".to_owned(),
            conditions: format!(
                "`{APP}` with `placement = \"singleton\"` on two gateways, three nats-servers, a lease of {LEASE:?}. From \
                 the end of the gateway that runs it until the other one has handled an event that came then."
            ),
            lines: vec![
                Line::new("after kill -9", "s", killed).with_floor(Floor::AtMost(most)),
                Line::new("after the order to stop", "s", ended).with_floor(Floor::AtMost(most)),
            ],
        })
    }

    fn fail_over(&self, app: &TempDir, by_force: bool) -> Result<Duration> {
        let servers = Servers::cluster();
        let members = ["a", "b"].map(|name| Member::new(self, name.to_owned(), &servers));
        let [one, other] = members;
        let (one, other) = (one?, other?);
        let gateways = [one.site.start()?, other.site.start()?];
        for gateway in &gateways {
            gateway.install(app.path())?;
        }
        let mut first = None;
        until("one leads", || {
            for (number, gateway) in gateways.iter().enumerate() {
                if handled(gateway)?.1 == 1 {
                    first = Some(number);
                }
            }
            Ok(first.is_some())
        })?;
        let [a, b] = gateways;
        let (leading, second, member) = match first {
            Some(0) => (a, b, &other),
            _ => (b, a, &one),
        };
        member.produce("before", 100)?;
        until("the first events", || Ok(handled(&leading)?.0 >= 100))?;
        let began = Instant::now();
        match by_force {
            true => leading.kill()?,
            false => leading.stop()?,
        }
        member.produce("after", 1)?;
        Ok(until("the event", || Ok(handled(&second)?.0 > 0))? - began)
    }
}
