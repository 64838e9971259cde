//! Whether a system is healthy: what the gateway says about itself, compared with what it said before the update.
//!
//! [`Probation`] is told what is seen and when, and says when it has seen enough.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Fewer events than this within the deadline say nothing about whether they flow.
const TELLING_EVENTS: f64 = 10.0;

/// What the gateway did before the update.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Baseline {
    /// Since its start, on average.
    pub events_per_s: f64,
    /// Apps that ran.
    pub running_apps: Vec<String>,
}

/// What the gateway does now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Look {
    /// The service, its listeners and its store.
    pub ready: bool,
    pub uptime: Duration,
    /// Since its start.
    pub accepted_events: u64,
    pub apps: Vec<AppLook>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct AppLook {
    pub name: String,
    /// As `headgate app list` has it.
    pub state: String,
    /// Whether it is to run.
    pub wanted: bool,
}

#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub deadline: Duration,
    /// It must have been healthy without a break for so long.
    pub settle: Duration,
    pub min_flow_percent: u32,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Judgement {
    /// Too early to say, and what is still missing; nothing if it only has to stay so.
    Wait(Vec<String>),
    Healthy,
    /// And what was missing at the end.
    Unhealthy(Vec<String>),
}

/// A new system, from its start on.
pub struct Probation {
    limits: Limits,
    baseline: Baseline,
    healthy_since: Option<Duration>,
}

impl Probation {
    pub fn new(limits: Limits, baseline: Baseline) -> Probation {
        Probation {
            limits,
            baseline,
            healthy_since: None,
        }
    }

    /// `now` counts from when probation began. A gateway that can't be asked is an `Err` with the reason.
    pub fn on_look(&mut self, look: Result<&Look, String>, now: Duration) -> Judgement {
        let missing = match look {
            Ok(look) => self.missing(look),
            Err(reason) => vec![reason],
        };
        if missing.is_empty() {
            let since = *self.healthy_since.get_or_insert(now);
            if now.saturating_sub(since) >= self.limits.settle {
                return Judgement::Healthy;
            }
        } else {
            self.healthy_since = None;
        }
        if now < self.limits.deadline {
            Judgement::Wait(missing)
        } else if missing.is_empty() {
            let settle = self.limits.settle.as_secs();
            Judgement::Unhealthy(vec![format!(
                "it was not healthy for {settle} s without a break"
            )])
        } else {
            Judgement::Unhealthy(missing)
        }
    }

    /// What keeps it from being healthy.
    fn missing(&self, look: &Look) -> Vec<String> {
        let mut missing = Vec::new();
        if !look.ready {
            missing.push("the gateway is not ready".to_owned());
        }
        for app in &look.apps {
            let ran = self.baseline.running_apps.contains(&app.name);
            if app.wanted && app.state != "running" && (ran || app.state != "starting") {
                missing.push(format!("app {} is {}", app.name, app.state));
            }
        }
        if let Some(flow) = self.missing_flow(look) {
            missing.push(flow);
        }
        missing
    }

    fn missing_flow(&self, look: &Look) -> Option<String> {
        let before = self.baseline.events_per_s;
        let wanted = before * f64::from(self.limits.min_flow_percent) / 100.0;
        if wanted == 0.0 || before * self.limits.deadline.as_secs_f64() < TELLING_EVENTS {
            return None;
        }
        let now = look.accepted_events as f64 / look.uptime.as_secs_f64().max(1.0);
        (now < wanted).then(|| {
            format!("{now:.1} events a second come in, and {before:.1} did before the update")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        deadline: Duration::from_secs(300),
        settle: Duration::from_secs(15),
        min_flow_percent: 10,
    };

    fn app(name: &str, state: &str) -> AppLook {
        AppLook {
            name: name.into(),
            state: state.into(),
            wanted: true,
        }
    }

    fn fine() -> Look {
        Look {
            ready: true,
            uptime: Duration::from_secs(10),
            accepted_events: 100,
            apps: vec![app("a", "running")],
        }
    }

    fn at(probation: &mut Probation, look: &Look, seconds: u64) -> Judgement {
        probation.on_look(Ok(look), Duration::from_secs(seconds))
    }

    #[test]
    fn what_is_healthy_without_a_break_is_healthy() {
        let mut probation = Probation::new(LIMITS, Baseline::default());
        let not_ready = Look {
            ready: false,
            ..fine()
        };
        let wait = Judgement::Wait(Vec::new());
        assert_eq!(at(&mut probation, &fine(), 0), wait);
        assert_eq!(at(&mut probation, &fine(), 14), wait);
        assert_ne!(at(&mut probation, &not_ready, 14), wait);
        assert_eq!(at(&mut probation, &fine(), 20), wait);
        assert_eq!(at(&mut probation, &fine(), 34), wait);
        assert_eq!(at(&mut probation, &fine(), 35), Judgement::Healthy);
    }

    #[test]
    fn what_is_missing_at_the_deadline_is_the_reason() {
        let baseline = Baseline {
            events_per_s: 5.0,
            running_apps: vec!["a".into()],
        };
        let stopped = Look {
            apps: vec![app("a", "failed"), app("b", "starting")],
            ..fine()
        };
        let silent = Look {
            accepted_events: 4,
            ..fine()
        };
        for (look, reason) in [
            (Err("cannot connect".to_owned()), "cannot connect"),
            (
                Ok(&Look {
                    ready: false,
                    ..fine()
                }),
                "the gateway is not ready",
            ),
            (Ok(&stopped), "app a is failed"),
            (
                Ok(&silent),
                "0.4 events a second come in, and 5.0 did before the update",
            ),
        ] {
            let mut probation = Probation::new(LIMITS, baseline.clone());
            let early = probation.on_look(look.clone(), Duration::ZERO);
            assert_eq!(early, Judgement::Wait(vec![reason.to_owned()]));
            let late = probation.on_look(look, LIMITS.deadline);
            assert_eq!(late, Judgement::Unhealthy(vec![reason.to_owned()]));
        }
    }

    #[test]
    fn nobody_waits_for_events_where_none_flowed_or_none_are_asked_for() {
        let silent = Look {
            accepted_events: 0,
            ..fine()
        };
        for (events_per_s, min_flow_percent) in [(0.0, 10), (0.01, 10), (1000.0, 0)] {
            let limits = Limits {
                min_flow_percent,
                ..LIMITS
            };
            let baseline = Baseline {
                events_per_s,
                running_apps: Vec::new(),
            };
            let mut probation = Probation::new(limits, baseline);
            at(&mut probation, &silent, 0);
            assert_eq!(at(&mut probation, &silent, 15), Judgement::Healthy);
        }
    }

    #[test]
    fn an_app_that_is_to_be_stopped_may_be() {
        let look = Look {
            apps: vec![AppLook {
                wanted: false,
                ..app("a", "stopped")
            }],
            ..fine()
        };
        let mut probation = Probation::new(LIMITS, Baseline::default());
        at(&mut probation, &look, 0);
        assert_eq!(at(&mut probation, &look, 15), Judgement::Healthy);
    }

    #[test]
    fn one_that_is_healthy_only_by_moments_is_not() {
        let mut probation = Probation::new(LIMITS, Baseline::default());
        at(&mut probation, &fine(), 299);
        let late = at(&mut probation, &fine(), 300);
        assert!(matches!(late, Judgement::Unhealthy(reasons) if reasons[0].contains("15 s")));
    }
}
