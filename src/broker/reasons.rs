//! Why connections end and are refused, counted by listener and by the reason code that MQTT 5 has for it.

use parking_lot::Mutex;
use rumqttd::protocol::{ConnectReturnCode, DisconnectReasonCode};

use super::listener::Transport;

/// Counts of one kind of ending. There are few reasons, so that looking at each is fine.
#[derive(Debug)]
pub struct Reasons<R>(Mutex<Vec<(Transport, R, u64)>>);

impl<R> Default for Reasons<R> {
    fn default() -> Self {
        Reasons(Mutex::default())
    }
}

/// Why a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// DISCONNECT from the client.
    ByClient,
    /// No DISCONNECT: the client or the network went away, or the client took nothing any more.
    Lost,
    /// By the gateway.
    Refused(DisconnectReasonCode),
}

impl Ending {
    fn name(self) -> String {
        match self {
            Ending::ByClient => "normal_disconnection".into(),
            Ending::Lost => "connection_lost".into(),
            Ending::Refused(code) => snake_case(&format!("{code:?}")),
        }
    }
}

impl<R: Copy + PartialEq> Reasons<R> {
    pub fn count(&self, transport: Transport, reason: R) {
        let mut counts = self.0.lock();
        let mut known = counts.iter_mut();
        match known.find(|(on, why, _)| (*on, *why) == (transport, reason)) {
            Some((_, _, count)) => *count += 1,
            None => counts.push((transport, reason, 1)),
        }
    }

    fn for_each(&self, mut found: impl FnMut(&'static str, R, u64)) {
        for &(transport, reason, count) in self.0.lock().iter() {
            found(transport.as_str(), reason, count);
        }
    }
}

/// Puts the counts into the `metrics` crate's recorder.
pub fn record(endings: &Reasons<Ending>, refusals: &Reasons<ConnectReturnCode>) {
    endings.for_each(|listener, reason, count| {
        metrics::counter!(
            "headgate_mqtt_disconnections_total", "listener" => listener, "reason" => reason.name()
        )
        .absolute(count);
    });
    refusals.for_each(|listener, code, count| {
        metrics::counter!(
            "headgate_mqtt_refused_connects_total",
            "listener" => listener, "reason" => snake_case(&format!("{code:?}"))
        )
        .absolute(count);
    });
}

/// `SessionTakenOver` → `session_taken_over`.
fn snake_case(name: &str) -> String {
    let mut snake = String::new();
    for letter in name.chars() {
        if letter.is_ascii_uppercase() && !snake.is_empty() {
            snake.push('_');
        }
        snake.push(letter.to_ascii_lowercase());
    }
    snake
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_written_as_labels_are() {
        let taken_over = Ending::Refused(DisconnectReasonCode::SessionTakenOver);
        assert_eq!(taken_over.name(), "session_taken_over");
        assert_eq!(Ending::Lost.name(), "connection_lost");
    }
}
