//! The gateway's broker against mosquitto: the same load on both, in turns.

use std::io::{Read, Write};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;

use crate::load::{Load, Outcome, Pace, Span};
use crate::process;
use crate::report::{Floor, Line, Section};
use crate::server::{Broker, Certificate, Mosquitto, Site};
use crate::statistics::{Rounds, figure};
use crate::stream::Stream;
use crate::suite::{PAYLOAD_BYTES, PUBLISHERS, STEADY_RATE, Suite, WINDOW, plant_topics};
use crate::wire;

pub(crate) const RECEIVED: &str = "received";
pub(crate) const LOST: &str = "lost";
const CPU: &str = "its CPU time";
const RATIO: &str = "headgate ÷ mosquitto";

/// Clients at one end where there are many.
const MANY: usize = 1_000;

/// Clients that only have to be there.
const IDLE_CLIENTS: usize = 10_000;

/// Files that a server and the generator have open besides the idle clients.
const OTHER_FILES: u64 = 200;

impl Suite {
    pub(crate) fn broker(&self, qos: u8, floor: f64) -> Result<Section> {
        let contest = self.against_mosquitto(None, |broker| Load {
            qos,
            ..self.load(broker)
        })?;
        let conditions = self.flat_out(qos);
        self.section(
            format!("Broker alone, QoS {qos}"),
            &conditions,
            contest,
            floor,
            qos > 0,
        )
    }

    pub(crate) fn tls(&self, qos: u8, floor: f64) -> Result<Section> {
        let certificate = Certificate::new()?;
        let contest = self.against_mosquitto(Some(&certificate), |broker| Load {
            qos,
            ..self.load(broker)
        })?;
        let conditions = format!(
            "{} Both sides of both brokers speak {}, with one ECDSA certificate.",
            self.flat_out(qos),
            contest.protection.join(" or ")
        );
        self.section(
            format!("Broker alone with TLS, QoS {qos}"),
            &conditions,
            contest,
            floor,
            qos > 0,
        )
    }

    pub(crate) fn topics(&self) -> Result<Section> {
        const TOPICS: usize = 1_000;
        let contest = self.against_mosquitto(None, |broker| Load {
            topics: plant_topics(TOPICS),
            filter: "plant/+/temperature_f".to_owned(),
            ..self.load(broker)
        })?;
        let conditions = format!(
            "{PUBLISHERS} publishers flat out for {:?} over {TOPICS} topics in turn, 1 subscriber to \
             `plant/+/temperature_f`, {PAYLOAD_BYTES} B, QoS 0.",
            self.time
        );
        let title = format!("{} topics", figure(TOPICS as f64));
        self.section(title, &conditions, contest, 1.0, false)
    }

    pub(crate) fn fan_out(&self) -> Result<Section> {
        // A count, not a time: what a broker without limits queues up in seconds takes it minutes to
        // deliver to so many.
        let messages = 150 * self.time.as_secs().max(1);
        let contest = self.against_mosquitto(None, |broker| Load {
            publishers: 1,
            topics: plant_topics(1),
            subscribers: MANY,
            span: Span::Messages(messages),
            ..self.load(broker)
        })?;
        let conditions = format!(
            "1 publisher sends {messages} messages flat out, {MANY} subscribers to `#`, {PAYLOAD_BYTES} B, \
             QoS 0; what is received counts once for each subscriber, CPU time once for each message \
             published."
        );
        let title = format!("Fan-out to {} subscribers", figure(MANY as f64));
        self.section(title, &conditions, contest, 1.0, false)
    }

    pub(crate) fn fan_in(&self) -> Result<Section> {
        // A count, not a time: what so many sockets hold in seconds takes a slow broker minutes.
        let messages = 100_000 * self.time.as_secs().max(1);
        let contest = self.against_mosquitto(None, |broker| Load {
            publishers: MANY,
            topics: plant_topics(MANY),
            span: Span::Messages(messages),
            ..self.load(broker)
        })?;
        let conditions = format!(
            "{MANY} publishers send {messages} messages in all, flat out, each on a topic of its own, 1 \
             subscriber to `#`, {PAYLOAD_BYTES} B, QoS 0."
        );
        let title = format!("{} publishers to one subscriber", figure(MANY as f64));
        self.section(title, &conditions, contest, 1.0, false)
    }

    pub(crate) fn steady(&self, qos: u8) -> Result<Section> {
        let contest = self.against_mosquitto(None, |broker| Load {
            qos,
            pace: Pace::PerSecond(STEADY_RATE),
            ..self.load(broker)
        })?;
        let mut lines = contest.ours.steady_lines("headgate");
        if let Some(theirs) = &contest.theirs {
            let theirs = theirs.steady_lines("mosquitto");
            for (line, other) in lines.iter_mut().zip(&theirs) {
                let compared = ["p50", "p99", CPU].map(|what| format!("headgate: {what}"));
                if compared.contains(&line.what) {
                    line.floor = Some(Floor::AtMost(other.measured.median()));
                }
            }
            lines.extend(theirs);
        }
        Ok(Section {
            title: format!(
                "Broker alone at {} messages/s, QoS {qos}",
                figure(STEADY_RATE as f64)
            ),
            conditions: format!(
                "{PUBLISHERS} publishers, {STEADY_RATE} evenly spaced messages/s in all for {:?}, 1 \
                 subscriber to `#`, {PAYLOAD_BYTES} B, QoS {qos} on both sides. From when a message was due to \
                 be published to when it was read from the subscriber's socket. The floors are \
                 mosquitto's figures. {}",
                self.time,
                self.mosquitto_conditions()?
            ),
            lines,
        })
    }

    /// Memory of brokers that many clients are connected to.
    pub(crate) fn connections(&self) -> Result<Section> {
        let title = format!("{} idle clients", figure(IDLE_CLIENTS as f64));
        let files = process::raise_open_files()?;
        if files < IDLE_CLIENTS as u64 + OTHER_FILES {
            return Ok(Section {
                title,
                conditions: format!(
                    "Not measured: a process may have {files} files open here (`ulimit -Hn`), and \
                     {} are needed.",
                    IDLE_CLIENTS as u64 + OTHER_FILES
                ),
                lines: Vec::new(),
            });
        }
        let mut ours = Crowd::default();
        let mut theirs = Crowd::default();
        for _ in 0..self.rounds {
            let most = IDLE_CLIENTS + 1;
            let site =
                Site::new(&self.gateway)?.set("HEADGATE_MQTT_MAX_CONNECTIONS", most.to_string());
            let gateway = site.start()?;
            ours.add(&gateway)?;
            gateway.stop()?;
            if let Some(program) = &self.mosquitto {
                theirs.add(&Mosquitto::start(program, None)?)?;
            }
        }
        let mut lines = ours.lines("headgate");
        for line in lines
            .iter_mut()
            .filter(|line| line.what != "headgate: none")
        {
            line.floor = Some(Floor::AtMost(150.0));
        }
        if self.mosquitto.is_some() {
            lines.extend(theirs.lines("mosquitto"));
        }
        Ok(Section {
            title,
            conditions: format!(
                "VmRSS with no client, with {IDLE_CLIENTS} connected ones (MQTT 3.1.1, clean session, no TLS), \
                 and when each has subscribed to a topic of its own and received a message of \
                 {PAYLOAD_BYTES} B on it. {}",
                self.mosquitto_conditions()?
            ),
            lines,
        })
    }

    fn flat_out(&self, qos: u8) -> String {
        let window = match qos {
            0 => String::new(),
            _ => format!(", up to {WINDOW} messages of a publisher unacknowledged"),
        };
        format!(
            "{PUBLISHERS} publishers flat out for {:?}, 1 subscriber to `#`, {PAYLOAD_BYTES} B, QoS {qos} on \
             both sides{window}.",
            self.time
        )
    }

    /// The same load on the gateway and, where it is installed, on mosquitto, in turns.
    fn against_mosquitto(
        &self,
        certificate: Option<&Certificate>,
        load: impl Fn(&dyn Broker) -> Load,
    ) -> Result<Contest> {
        let mut site = Site::new(&self.gateway)?;
        if let Some(certificate) = certificate {
            site = site.with_tls(certificate)?;
        }
        let gateway = site.start()?;
        let mosquitto = self
            .mosquitto
            .as_deref()
            .map(|program| Mosquitto::start(program, certificate))
            .transpose()?;
        let mut contest = Contest {
            ours: Side::default(),
            theirs: mosquitto.as_ref().map(|_| Side::default()),
            protection: Vec::new(),
        };
        let other = mosquitto.as_ref().map(|mosquitto| mosquitto as &dyn Broker);
        for broker in [Some(&gateway as &dyn Broker), other].into_iter().flatten() {
            let spoken = wire::connect(&broker.endpoint(), "protection")?.protection();
            contest.protection.extend(spoken);
        }
        contest.protection.dedup();
        for _ in 0..self.rounds {
            let outcome = load(&gateway).run().context("headgate under load")?;
            contest.ours.add(outcome);
            if let (Some(mosquitto), Some(theirs)) = (other, &mut contest.theirs) {
                theirs.add(load(mosquitto).run().context("mosquitto under load")?);
            }
        }
        gateway.stop()?;
        Ok(contest)
    }

    /// `floor`: how many times as fast as mosquitto the gateway has to be. `keeps_all`: whether it may
    /// lose nothing; at QoS 0 a broker may drop messages for a subscriber that does not keep up.
    fn section(
        &self,
        title: String,
        conditions: &str,
        contest: Contest,
        floor: f64,
        keeps_all: bool,
    ) -> Result<Section> {
        let mut lines = contest.ours.lines("headgate");
        if keeps_all {
            for line in &mut lines {
                if line.what == format!("headgate: {LOST}") {
                    line.floor = Some(Floor::AtMost(0.0));
                }
            }
        }
        if let Some(theirs) = contest.theirs {
            for line in &mut lines {
                if line.what == format!("headgate: {CPU}") {
                    line.floor = Some(Floor::AtMost(theirs.server_us.median()));
                }
            }
            lines.extend(theirs.lines("mosquitto"));
            let ratio = contest.ours.per_second.median() / theirs.per_second.median();
            let ratio = Line::new(RATIO, "times", [ratio].into_iter().collect());
            lines.push(ratio.with_floor(Floor::AtLeast(floor)));
        }
        Ok(Section {
            title,
            conditions: format!("{conditions} {}", self.mosquitto_conditions()?),
            lines,
        })
    }

    fn mosquitto_conditions(&self) -> Result<String> {
        match &self.mosquitto {
            Some(program) => Ok(format!(
                "{} with `max_queued_messages 0`, `max_inflight_messages 0` (both: no limit) and \
                 `set_tcp_nodelay true`; headgate with its defaults.",
                Mosquitto::version(program)?
            )),
            None => {
                Ok("mosquitto is not installed, so there is nothing to compare with.".to_owned())
            }
        }
    }
}

/// What came of the same load on two brokers.
struct Contest {
    ours: Side,
    theirs: Option<Side>,
    /// What TLS was spoken, if any.
    protection: Vec<String>,
}

/// What the rounds of one server gave.
#[derive(Default)]
pub(crate) struct Side {
    pub per_second: Rounds,
    pub server_us: Rounds,
    pub generator_us: Rounds,
    pub lost: Rounds,
    pub duplicates: Rounds,
    latency_us: [Rounds; QUANTILES.len()],
    lateness_us: Rounds,
}

const QUANTILES: [(&str, f64); 4] = [
    ("p50", 0.5),
    ("p99", 0.99),
    ("p99.9", 0.999),
    ("longest", 1.0),
];

impl Side {
    pub(crate) fn add(&mut self, outcome: Outcome) {
        self.per_second.push(outcome.per_second());
        self.server_us.push(outcome.server_us().unwrap_or_default());
        self.generator_us.push(outcome.generator_us());
        self.lost.push(outcome.lost as f64);
        self.duplicates.push(outcome.duplicates as f64);
        for (rounds, (_, quantile)) in self.latency_us.iter_mut().zip(QUANTILES) {
            rounds.push(microseconds(&outcome.latency, quantile));
        }
        self.lateness_us.push(microseconds(&outcome.lateness, 0.5));
    }

    /// A loss in any round is a loss: the median would hide it.
    pub(crate) fn lost_in_all(&self) -> Rounds {
        [self.lost.sum()].into_iter().collect()
    }

    pub(crate) fn lines(&self, name: &str) -> Vec<Line> {
        let line = |what: &str, unit, rounds: &Rounds| {
            Line::new(format!("{name}: {what}"), unit, rounds.clone())
        };
        let duplicates = [self.duplicates.sum()].into_iter().collect();
        vec![
            line(RECEIVED, "msg/s", &self.per_second),
            line(CPU, "µs/msg", &self.server_us),
            line("the generator's CPU time", "µs/msg", &self.generator_us),
            line(LOST, "messages in all rounds", &self.lost_in_all()),
            line("duplicates", "messages in all rounds", &duplicates),
        ]
    }

    /// Of a load with a steady pace.
    fn steady_lines(&self, name: &str) -> Vec<Line> {
        let line = |what: &str, unit, rounds: &Rounds| {
            Line::new(format!("{name}: {what}"), unit, rounds.clone())
        };
        let mut lines = Vec::new();
        for (rounds, (quantile, _)) in self.latency_us.iter().zip(QUANTILES) {
            lines.push(line(quantile, "µs", rounds));
        }
        let own = "of it the generator's own lateness, p50";
        lines.push(line(own, "µs", &self.lateness_us));
        lines.push(line(CPU, "µs/msg", &self.server_us));
        lines.push(line(LOST, "messages in all rounds", &self.lost_in_all()));
        lines
    }
}

fn microseconds(times: &Histogram<u64>, quantile: f64) -> f64 {
    times.value_at_quantile(quantile) as f64 / 1e3
}

/// A broker's memory, in MB, round by round.
#[derive(Default)]
struct Crowd {
    alone: Rounds,
    connected: Rounds,
    subscribed: Rounds,
}

impl Crowd {
    /// Connects everybody to `broker`.
    fn add(&mut self, broker: &dyn Broker) -> Result<()> {
        let megabytes = || -> Result<f64> {
            // What is given back to the system is given back by then.
            thread::sleep(Duration::from_secs(1));
            Ok(process::resident_bytes(broker.pid())? as f64 / 1e6)
        };
        let endpoint = broker.endpoint();
        self.alone.push(megabytes()?);
        let mut clients: Vec<Stream> = (0..IDLE_CLIENTS)
            .map(|index| wire::connect(&endpoint, &format!("idle-{index}")))
            .collect::<Result<_>>()?;
        self.connected.push(megabytes()?);
        let topic = |index: usize| format!("device/{index}/command");
        for (index, client) in clients.iter_mut().enumerate() {
            wire::subscribe(client, &topic(index), 0)?;
        }
        let mut publisher = wire::connect(&endpoint, "idle-publisher")?;
        for (index, client) in clients.iter_mut().enumerate() {
            let (message, ..) = wire::publish(&topic(index), 0, &[b'x'; PAYLOAD_BYTES]);
            publisher.write_all(&message)?;
            let mut came = vec![0; message.len()];
            client
                .read_exact(&mut came)
                .with_context(|| format!("nothing came for idle client {index}"))?;
            ensure!(came == message, "idle client {index} got {came:02x?}");
        }
        self.subscribed.push(megabytes()?);
        Ok(())
    }

    fn lines(&self, name: &str) -> Vec<Line> {
        [
            ("none", &self.alone),
            ("connected", &self.connected),
            ("subscribed, and used once", &self.subscribed),
        ]
        .map(|(what, rounds)| Line::new(format!("{name}: {what}"), "MB", rounds.clone()))
        .into()
    }
}
