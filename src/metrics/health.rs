//! Whether the gateway is alive (its loops respond) and whether it is ready (all rooms are up and
//! it isn't draining).

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

/// How long a loop may take to answer. Loops answer in microseconds; a second of silence is a hang
/// and not load, and stays under the smallest sensible `WatchdogSec`.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);

/// Asks one loop whether it is alive; `Err` says what is wrong.
pub type Check =
    Arc<dyn Fn() -> Pin<Box<dyn Future<Output = Result<(), String>> + Send>> + Send + Sync>;

/// Shared by the rooms that report and the endpoints that answer. Cheap to clone.
#[derive(Clone, Default)]
pub struct Health {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    checks: Vec<(&'static str, Check)>,
    /// Room → why it isn't ready yet.
    missing: BTreeMap<&'static str, String>,
    draining: bool,
}

impl Health {
    /// From now on `check` is asked whether the loop `name` is alive.
    pub fn watch<F>(&self, name: &'static str, check: F)
    where
        F: Fn() -> Pin<Box<dyn Future<Output = Result<(), String>> + Send>> + Send + Sync + 'static,
    {
        self.inner.lock().checks.push((name, Arc::new(check)));
    }

    /// `room` isn't ready, and why.
    pub fn not_ready(&self, room: &'static str, why: impl Into<String>) {
        self.inner.lock().missing.insert(room, why.into());
    }

    /// `room` is ready.
    pub fn set_ready(&self, room: &'static str) {
        self.inner.lock().missing.remove(room);
    }

    /// The gateway takes nothing more in; it won't be ready again.
    pub fn drain(&self) {
        self.inner.lock().draining = true;
    }

    /// Whether events can be taken in; else what is missing, one line a room.
    pub fn ready(&self) -> Result<(), Vec<String>> {
        let inner = self.inner.lock();
        let mut missing: Vec<String> = inner
            .missing
            .iter()
            .map(|(room, why)| format!("{room}: {why}"))
            .collect();
        if inner.draining {
            missing.insert(0, "draining".into());
        }
        if missing.is_empty() {
            Ok(())
        } else {
            Err(missing)
        }
    }

    /// Asks every loop at once; else which of them are not alive, one line a loop.
    pub async fn check(&self) -> Result<(), Vec<String>> {
        let checks = self.inner.lock().checks.clone();
        let asked: Vec<_> = checks
            .into_iter()
            .map(|(name, check)| {
                let answer = tokio::spawn(tokio::time::timeout(ANSWER_WITHIN, check()));
                (name, answer)
            })
            .collect();
        let mut failed = Vec::new();
        for (name, answer) in asked {
            match answer.await {
                Ok(Ok(Ok(()))) => {}
                Ok(Ok(Err(wrong))) => failed.push(format!("{name}: {wrong}")),
                Ok(Err(_)) => failed.push(format!(
                    "{name}: no answer within {} s",
                    ANSWER_WITHIN.as_secs()
                )),
                Err(_) => failed.push(format!("{name}: its health check panicked")),
            }
        }
        if failed.is_empty() {
            Ok(())
        } else {
            Err(failed)
        }
    }
}
