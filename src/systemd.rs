//! What the service manager is told: ready, stopping, and that the gateway is still alive.
//!
//! Outside of systemd (no `NOTIFY_SOCKET`) all of it does nothing.

use std::time::Duration;

use sd_notify::NotifyState;

use crate::metrics::Health;

/// The gateway takes events in from now on.
pub fn ready() {
    tell(&[NotifyState::Ready]);
}

/// The gateway drains and will exit.
pub fn stopping() {
    tell(&[NotifyState::Stopping]);
}

/// Pings the watchdog at half of what `WatchdogSec=` allows, but only while `health` passes, so
/// that a gateway whose loops hang is restarted. Returns at once where no watchdog is asked for.
pub async fn watchdog(health: Health) {
    let Some(period) = sd_notify::watchdog_enabled() else {
        return;
    };
    ping_while_healthy(period, health, || tell(&[NotifyState::Watchdog])).await;
}

async fn ping_while_healthy(period: Duration, health: Health, mut ping: impl FnMut()) {
    let mut due = tokio::time::interval((period / 2).max(Duration::from_millis(1)));
    due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        due.tick().await;
        match health.check().await {
            Ok(()) => ping(),
            Err(failed) => {
                tracing::error!(?failed, "not alive: withholding the watchdog ping");
            }
        }
    }
}

fn tell(state: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "could not notify the service manager");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use tokio::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn the_watchdog_is_pinged_only_while_the_health_check_passes() {
        let alive = Arc::new(AtomicBool::new(true));
        let health = Health::default();
        let (checked, mut checks) = mpsc::unbounded_channel();
        health.watch("loop", {
            let alive = alive.clone();
            move || {
                let alive = alive.load(Ordering::Relaxed);
                let checked = checked.clone();
                Box::pin(async move {
                    checked.send(alive).ok();
                    if alive { Ok(()) } else { Err("hangs".into()) }
                })
            }
        });
        let (pinged, mut pings) = mpsc::unbounded_channel();
        let watchdog = tokio::spawn(ping_while_healthy(
            Duration::from_millis(2),
            health,
            move || {
                pinged.send(()).ok();
            },
        ));
        pings.recv().await.unwrap();

        alive.store(false, Ordering::Relaxed);
        while checks.recv().await.unwrap() {}
        while pings.try_recv().is_ok() {}
        for _ in 0..3 {
            assert!(!checks.recv().await.unwrap());
        }
        assert!(pings.try_recv().is_err());
        watchdog.abort();
    }
}
