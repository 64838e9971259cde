//! The client at the other end: takes the apps' results off the broker and enters them into the
//! books.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use parking_lot::Mutex;
use rumqttc::{
    AsyncClient, Event, EventLoop, MqttOptions, Packet, Publish, QoS, SubscribeFilter,
    SubscribeReasonCode,
};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::ledger::{Ledger, Transition};

/// Alarms that are kept for the view.
const LAST_ALARMS: usize = 8;

/// How long the broker may take to accept the subscriptions.
const SUBSCRIBE_TIMEOUT: Duration = Duration::from_secs(5);

/// What the alarm app publishes.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
pub struct Alarm {
    /// "raised" or "cleared".
    pub state: String,
    pub topic: String,
    pub value: f64,
}

/// What the conversion app keeps of a reading.
#[derive(Deserialize)]
struct Converted {
    seq: u64,
}

/// The alarms of late, newest first. The view takes them out as it shows them.
#[derive(Clone, Default)]
pub struct Alarms(Arc<Mutex<VecDeque<Alarm>>>);

impl Alarms {
    fn push(&self, alarm: Alarm) {
        let mut alarms = self.0.lock();
        alarms.truncate(LAST_ALARMS - 1);
        alarms.push_front(alarm);
    }

    /// Newest first.
    pub fn last(&self) -> Vec<Alarm> {
        self.0.lock().iter().cloned().collect()
    }

    /// Takes out those that came since the last call, oldest first.
    pub fn take(&self) -> Vec<Alarm> {
        self.0.lock().drain(..).rev().collect()
    }
}

/// A subscriber to all that the apps publish.
pub struct Observer {
    pub alarms: Alarms,
    task: JoinHandle<()>,
}

impl Observer {
    /// Connects and subscribes; returns once the broker has confirmed it. If the connection is
    /// lost later, `broken` is told.
    pub async fn start(
        broker: SocketAddr,
        ledger: Arc<Ledger>,
        broken: mpsc::Sender<String>,
    ) -> anyhow::Result<Observer> {
        let mut options = MqttOptions::new(
            "headgate-demo-observer",
            broker.ip().to_string(),
            broker.port(),
        );
        options.set_keep_alive(Duration::from_secs(30));
        let (client, mut connection) = AsyncClient::new(options, 8);
        tokio::time::timeout(SUBSCRIBE_TIMEOUT, subscribe(&client, &mut connection))
            .await
            .map_err(|_| anyhow::anyhow!("no answer within {} s", SUBSCRIBE_TIMEOUT.as_secs()))
            .flatten()
            .with_context(|| format!("subscribing to the results on {broker}"))?;
        let alarms = Alarms::default();
        let task = tokio::spawn({
            let alarms = alarms.clone();
            async move {
                // Dropped, it would end the connection.
                let _client = client;
                let error = observe(connection, &ledger, &alarms).await;
                let _ = broken.try_send(format!("observer: lost its connection: {error}"));
            }
        });
        Ok(Observer { alarms, task })
    }

    pub fn stop(self) {
        self.task.abort();
    }
}

async fn subscribe(client: &AsyncClient, connection: &mut EventLoop) -> anyhow::Result<()> {
    let filters = ["alarms/#", "converted/#"]
        .map(|filter| SubscribeFilter::new(filter.into(), QoS::AtMostOnce));
    client.subscribe_many(filters).await?;
    loop {
        if let Event::Incoming(Packet::SubAck(confirmed)) = connection.poll().await? {
            if confirmed
                .return_codes
                .contains(&SubscribeReasonCode::Failure)
            {
                bail!("the broker refuses the subscription");
            }
            return Ok(());
        }
    }
}

async fn observe(
    mut connection: EventLoop,
    ledger: &Ledger,
    alarms: &Alarms,
) -> rumqttc::ConnectionError {
    loop {
        match connection.poll().await {
            Ok(Event::Incoming(Packet::Publish(result))) => enter(&result, ledger, alarms),
            Ok(_) => {}
            Err(error) => return error,
        }
    }
}

/// Enters a result. Those that the plant's readings did not cause, a user's at the keyboard for
/// one, are shown but don't count.
fn enter(result: &Publish, ledger: &Ledger, alarms: &Alarms) {
    let now = Instant::now();
    if let Some(line) = line_of(&result.topic, "converted/", "/temperature_f") {
        if let Ok(Converted { seq }) = serde_json::from_slice(&result.payload) {
            ledger.conversion_came(line, seq, now);
        }
    } else if let Ok(alarm) = serde_json::from_slice::<Alarm>(&result.payload) {
        if line_of(&result.topic, "alarms/", "/temperature").is_some() {
            match alarm.state.as_str() {
                "raised" => ledger.alarm_came(Transition::Raised),
                "cleared" => ledger.alarm_came(Transition::Cleared),
                _ => {}
            }
        }
        alarms.push(alarm);
    }
}

/// The line, from 0, in `{prefix}plant/line{number}{suffix}`.
fn line_of(topic: &str, prefix: &str, suffix: &str) -> Option<usize> {
    let number = topic
        .strip_prefix(prefix)?
        .strip_prefix("plant/line")?
        .strip_suffix(suffix)?;
    number.parse::<usize>().ok()?.checked_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn publish(topic: &str, payload: &str) -> Publish {
        Publish::new(topic, QoS::AtMostOnce, payload)
    }

    #[test]
    fn results_of_the_plants_readings_are_entered() {
        let (ledger, alarms) = (Ledger::new(2), Alarms::default());
        ledger.conversion_asked(1, 7);
        enter(
            &publish(
                "converted/plant/line2/temperature_f",
                r#"{"value":20.5,"unit":"celsius","seq":7}"#,
            ),
            &ledger,
            &alarms,
        );
        let alarm = r#"{"alarm":"overheat","state":"raised","value":93.5,"topic":"plant/line1/temperature"}"#;
        enter(
            &publish("alarms/plant/line1/temperature", alarm),
            &ledger,
            &alarms,
        );
        let totals = ledger.totals();
        assert_eq!((totals.answered, totals.alarms_raised), (1, 1));
        assert_eq!(alarms.last()[0].value, 93.5);
    }

    #[test]
    fn what_a_user_publishes_by_hand_is_shown_but_not_counted() {
        let (ledger, alarms) = (Ledger::new(1), Alarms::default());
        let alarm = r#"{"state":"raised","value":93.5,"topic":"plant/press/temperature"}"#;
        enter(
            &publish("alarms/plant/press/temperature", alarm),
            &ledger,
            &alarms,
        );
        enter(
            &publish("converted/plant/line1/temperature_f", "no json"),
            &ledger,
            &alarms,
        );
        enter(
            &publish("converted/plant/line0/temperature_f", r#"{"seq":0}"#),
            &ledger,
            &alarms,
        );
        assert_eq!(ledger.totals(), Default::default());
        assert_eq!(alarms.last().len(), 1);
    }

    #[test]
    fn the_last_alarms_are_kept_newest_first() {
        let alarms = Alarms::default();
        for value in 0..20 {
            alarms.push(Alarm {
                state: "raised".into(),
                topic: "t".into(),
                value: f64::from(value),
            });
        }
        let values: Vec<f64> = alarms.last().iter().map(|alarm| alarm.value).collect();
        assert_eq!(values, [19.0, 18.0, 17.0, 16.0, 15.0, 14.0, 13.0, 12.0]);
        assert_eq!(alarms.take()[0].value, 12.0);
        assert!(alarms.last().is_empty());
    }
}
