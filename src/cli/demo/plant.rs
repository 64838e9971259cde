//! The simulated plant: one MQTT client a production line, each with a temperature that wanders
//! and now and then overheats.
//!
//! The clients are real ones over TCP. Each publishes its temperature in turns in degrees Celsius,
//! which the alarm app reads, and in degrees Fahrenheit, which the conversion app reads.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rumqttc::{AsyncClient, ConnectionError, EventLoop, MqttOptions, QoS};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::ledger::{Ledger, Transition};

/// Publishes that wait for the connection of one sensor; beyond that the sensor falls behind.
const CHANNEL: usize = 256;

/// A sensor that has fallen further behind its schedule than this gives up what it has missed, so
/// that a hiccup isn't followed by a flood.
const MAX_LAG: Duration = Duration::from_secs(1);

/// How long a sensor may take to send what it has published and say goodbye.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(3);

/// What the plant does.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub broker: SocketAddr,
    pub sensors: usize,
    /// Of all sensors together.
    pub events_per_s: f64,
    pub alarm: AlarmRule,
}

/// When the alarm app raises and clears.
#[derive(Clone, Copy, Debug)]
pub struct AlarmRule {
    /// Raised at this temperature and above.
    pub threshold: f64,
    /// Cleared below this one.
    pub clear_below: f64,
}

/// A running plant.
pub struct Plant {
    stop: watch::Sender<bool>,
    sensors: JoinSet<()>,
}

impl Plant {
    /// Starts the sensors. One that loses its connection says so through `broken`.
    pub fn start(plan: Plan, ledger: &Arc<Ledger>, broken: &mpsc::Sender<String>) -> Plant {
        let (stop, stopping) = watch::channel(false);
        let mut sensors = JoinSet::new();
        let start = Instant::now();
        for line in 0..plan.sensors {
            let (client, connection) = connect(&format!("headgate-demo-line{}", line + 1), &plan);
            let sensor = Sensor {
                line,
                client,
                ledger: ledger.clone(),
                alarm: plan.alarm,
                raised: false,
                temperature: Temperature::new(line, plan.sensors, start),
                schedule: Schedule::new(line, &plan, start),
            };
            let (broken, stopping) = (broken.clone(), stopping.clone());
            sensors.spawn(async move {
                let name = format!("sensor of line {}", line + 1);
                let drive = tokio::spawn(drive(connection, name, broken, stopping.clone()));
                sensor.run(stopping).await;
                let _ = tokio::time::timeout(GOODBYE_TIMEOUT, drive).await;
            });
        }
        Plant { stop, sensors }
    }

    /// Lets the sensors send what they have published and disconnect.
    pub async fn stop(mut self) {
        self.stop.send_replace(true);
        while self.sensors.join_next().await.is_some() {}
    }
}

fn connect(client_id: &str, plan: &Plan) -> (AsyncClient, EventLoop) {
    let (host, port) = (plan.broker.ip().to_string(), plan.broker.port());
    let (client, mut connection) =
        AsyncClient::new(MqttOptions::new(client_id, host, port), CHANNEL);
    let mut network = connection.network_options();
    network.set_tcp_nodelay(true);
    connection.set_network_options(network);
    (client, connection)
}

/// Moves packets until the connection ends.
async fn drive(
    mut connection: EventLoop,
    name: String,
    broken: mpsc::Sender<String>,
    stopping: watch::Receiver<bool>,
) {
    let error = loop {
        if let Err(error) = connection.poll().await {
            break error;
        }
    };
    let said_goodbye = *stopping.borrow() || matches!(error, ConnectionError::RequestsDone);
    if !said_goodbye {
        // The first one to break is reported; the channel has room for it.
        let _ = broken.try_send(format!("{name}: lost its connection: {error}"));
    }
}

struct Sensor {
    /// From 0; in topics from 1.
    line: usize,
    client: AsyncClient,
    ledger: Arc<Ledger>,
    alarm: AlarmRule,
    raised: bool,
    temperature: Temperature,
    schedule: Schedule,
}

impl Sensor {
    async fn run(mut self, mut stopping: watch::Receiver<bool>) {
        let celsius_topic = format!("plant/line{}/temperature", self.line + 1);
        let fahrenheit_topic = format!("{celsius_topic}_f");
        for seq in 0.. {
            let due = tokio::time::Instant::from_std(self.schedule.next(Instant::now()));
            tokio::select! {
                biased;
                _ = stopping.changed() => break,
                () = tokio::time::sleep_until(due) => {}
            }
            let celsius = self.temperature.at(Instant::now());
            let is_celsius = seq % 2 == 0;
            let (topic, value) = if is_celsius {
                (&celsius_topic, celsius)
            } else {
                self.ledger.conversion_asked(self.line, seq);
                (&fahrenheit_topic, celsius.to_fahrenheit())
            };
            let publish = self
                .client
                .publish(topic, QoS::AtMostOnce, false, reading(value, seq));
            let published = tokio::select! {
                biased;
                published = publish => published.is_ok(),
                _ = stopping.changed() => false,
            };
            match (is_celsius, published) {
                (true, true) => {
                    let transition = self.transition(celsius);
                    self.ledger.temperature_sent(transition);
                }
                (false, false) => self.ledger.conversion_withdrawn(self.line, seq),
                _ => {}
            }
            if !published {
                break;
            }
        }
        // Fails only where the connection is gone already.
        let _ = tokio::time::timeout(GOODBYE_TIMEOUT, self.client.disconnect()).await;
    }

    /// The alarm that the app must make of `celsius`.
    fn transition(&mut self, celsius: Hundredths) -> Option<Transition> {
        let value = celsius.as_f64();
        if !self.raised && value >= self.alarm.threshold {
            self.raised = true;
            Some(Transition::Raised)
        } else if self.raised && value < self.alarm.clear_below {
            self.raised = false;
            Some(Transition::Cleared)
        } else {
            None
        }
    }
}

fn reading(value: Hundredths, seq: u64) -> String {
    let timestamp_ms = crate::event::unix_time_ns() / 1_000_000;
    format!(
        "{{\"value\":{}.{:02},\"timestamp_ms\":{timestamp_ms},\"seq\":{seq}}}",
        value.0 / 100,
        value.0 % 100
    )
}

/// When a sensor publishes: evenly, at its share of the plant's rate.
struct Schedule {
    origin: Instant,
    events_per_s: f64,
    published: u64,
}

impl Schedule {
    fn new(line: usize, plan: &Plan, start: Instant) -> Schedule {
        // The sensors take turns instead of publishing all at once.
        let turn = line as f64 / plan.events_per_s;
        Schedule {
            origin: start + Duration::from_secs_f64(turn),
            events_per_s: plan.events_per_s / plan.sensors as f64,
            published: 0,
        }
    }

    /// When the next event is due.
    fn next(&mut self, now: Instant) -> Instant {
        let since = Duration::from_secs_f64(self.published as f64 / self.events_per_s);
        let mut due = self.origin + since;
        let lag = now.saturating_duration_since(due);
        if lag > MAX_LAG {
            self.origin += lag;
            due += lag;
        }
        self.published += 1;
        due
    }
}

/// A temperature in hundredths of a degree, so that what is reckoned with here is exactly what the
/// text of the payload says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Hundredths(u32);

impl Hundredths {
    fn as_f64(self) -> f64 {
        f64::from(self.0) / 100.0
    }

    fn to_fahrenheit(self) -> Hundredths {
        Hundredths(self.0 * 9 / 5 + 3200)
    }
}

/// Where a line's temperature drifts to when all is well, in °C.
const NORMAL: f64 = 68.0;
/// Where it drifts to when it overheats: over the alarm app's threshold, which is 90.
const OVERHEATED: f64 = 96.0;
/// It covers 63 % of the way in this time.
const INERTIA: Duration = Duration::from_millis(1500);
/// How much it wanders in a second, in °C.
const WANDER: f64 = 0.8;
/// How long an overheating lasts before the line cools down.
const OVERHEATING: Duration = Duration::from_secs(6);
/// When line 1 overheats for the first time; the others follow at this distance, and so there is
/// something to see within ten seconds and from then on.
const FIRST_OVERHEATING: Duration = Duration::from_secs(2);
const BETWEEN_OVERHEATINGS: Duration = Duration::from_secs(3);

/// A random walk that is drawn back to a target.
struct Temperature {
    celsius: f64,
    at: Instant,
    /// The next change between well and overheated.
    turns: Instant,
    overheated: bool,
    /// From the end of an overheating to the next one, on average.
    pause: Duration,
    random: Random,
}

impl Temperature {
    fn new(line: usize, lines: usize, start: Instant) -> Temperature {
        Temperature {
            celsius: NORMAL,
            at: start,
            turns: start + FIRST_OVERHEATING + BETWEEN_OVERHEATINGS * line as u32,
            overheated: false,
            pause: BETWEEN_OVERHEATINGS * lines.clamp(5, 1000) as u32,
            random: Random(line as u64),
        }
    }

    fn at(&mut self, now: Instant) -> Hundredths {
        if now >= self.turns {
            self.overheated = !self.overheated;
            self.turns = now
                + if self.overheated {
                    OVERHEATING
                } else {
                    self.pause.mul_f64(0.5 + self.random.fraction())
                };
        }
        let target = if self.overheated { OVERHEATED } else { NORMAL };
        let passed_s = now.saturating_duration_since(self.at).as_secs_f64();
        let pull = 1.0 - (-passed_s / INERTIA.as_secs_f64()).exp();
        // Uniform in ±√3 has variance 1.
        let noise = (self.random.fraction() * 2.0 - 1.0) * 3f64.sqrt();
        self.celsius += (target - self.celsius) * pull + noise * WANDER * passed_s.min(1.0).sqrt();
        self.at = now;
        Hundredths((self.celsius.clamp(0.0, 200.0) * 100.0).round() as u32)
    }
}

/// SplitMix64 (<https://prng.di.unimi.it/splitmix64.c>): enough for noise, and reproducible.
struct Random(u64);

impl Random {
    /// From 0 up to 1.
    fn fraction(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        (z >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: Plan = Plan {
        broker: SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 1883),
        sensors: 20,
        events_per_s: 50_000.0,
        alarm: AlarmRule {
            threshold: 90.0,
            clear_below: 85.0,
        },
    };

    #[test]
    fn a_line_overheats_within_ten_seconds_and_cools_down_again() {
        for samples_per_s in [1, 50, 2500] {
            let start = Instant::now();
            let mut temperature = Temperature::new(0, 20, start);
            let mut at = |ms: u64| temperature.at(start + Duration::from_millis(ms)).as_f64();
            let step = 1000 / samples_per_s.min(1000);
            let values: Vec<f64> = (0..15_000).step_by(step).map(|ms| at(ms as u64)).collect();
            let hot = values.iter().position(|value| *value >= 90.0).unwrap();
            assert!(hot * step < 10_000, "hot after {} ms", hot * step);
            assert!(values[hot..].iter().any(|value| *value < 85.0));
        }
    }

    #[test]
    fn a_sensor_publishes_evenly_at_its_share_of_the_rate() {
        let start = Instant::now();
        let mut schedule = Schedule::new(3, &PLAN, start);
        let dues: Vec<Instant> = (0..2500).map(|_| schedule.next(start)).collect();
        let last = *dues.last().unwrap() - dues[0];
        assert!((last.as_secs_f64() - 2499.0 / 2500.0).abs() < 1e-6);
    }

    #[test]
    fn a_hiccup_is_not_followed_by_a_flood() {
        let start = Instant::now();
        let mut schedule = Schedule::new(0, &PLAN, start);
        let late = start + Duration::from_secs(60);
        assert_eq!(schedule.next(late), late);
        assert!(schedule.next(late) > late);
    }

    #[test]
    fn a_reading_says_exactly_what_is_reckoned_with() {
        for (hundredths, text) in [(9000, "90.00"), (6805, "68.05"), (7, "0.07")] {
            let payload = reading(Hundredths(hundredths), 4);
            let json: serde_json::Value = serde_json::from_str(&payload).unwrap();
            assert!(payload.starts_with(&format!("{{\"value\":{text},")));
            assert_eq!(
                json["value"].as_f64(),
                Some(Hundredths(hundredths).as_f64())
            );
            assert_eq!(json["seq"], 4);
        }
        assert_eq!(Hundredths(10_000).to_fahrenheit(), Hundredths(21_200));
    }
}
