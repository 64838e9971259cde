//! `headgate:app/timers`.

use std::time::Duration;

use wasmtime::StoreContextMut;
use wasmtime::component::{ComponentType, Linker, Lower, WasmStr};

use super::HostState;
use crate::apps::instance_timers::InstanceTimers;
use crate::apps::log::Complaint;
use crate::apps::timer_set::{Request, Requests, SHORTEST, TimerSet};

pub(super) const TIMERS: &str = "headgate:app/timers@0.1.0";

const MAX_NAME: usize = 64;

/// `timer-error`
#[derive(ComponentType, Lower)]
#[component(variant)]
pub(super) enum TimerError {
    #[component(name = "invalid-name")]
    InvalidName(String),
    #[component(name = "invalid-period")]
    InvalidPeriod(String),
    #[component(name = "limit-exceeded")]
    LimitExceeded,
}

pub(super) fn add_to_linker(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    let mut timers = linker.instance(TIMERS)?;
    for (function, request) in [
        (
            "set-interval",
            (|ns| Request::Interval(Duration::from_nanos(ns))) as fn(u64) -> Request,
        ),
        ("set-once", |ns| Request::Once(Duration::from_nanos(ns))),
        ("set-wall", Request::Wall),
    ] {
        timers.func_wrap(
            function,
            move |mut store: StoreContextMut<HostState>, (name, ns): (WasmStr, u64)| {
                let name = checked_name(&name.to_str(&store)?);
                let state = store.data_mut();
                let result = name.and_then(|name| state.set_timer(name, request(ns)));
                if result.is_err() {
                    state.call.tally.calls.timers += 1;
                }
                Ok((result,))
            },
        )?;
    }
    timers.func_wrap(
        "cancel",
        |mut store: StoreContextMut<HostState>, (name,): (WasmStr,)| {
            let name = checked_name(&name.to_str(&store)?);
            let state = store.data_mut();
            Ok((name.is_ok_and(|name| state.cancel_timer(name)),))
        },
    )
}

impl HostState {
    fn set_timer(&mut self, name: Box<str>, request: Request) -> Result<(), TimerError> {
        if let Request::Interval(period) = request
            && period < SHORTEST
        {
            return Err(TimerError::InvalidPeriod(format!(
                "a period of {} ns: 1000000 are the least",
                period.as_nanos()
            )));
        }
        let most = self.manifest.limits.timers;
        let requests = &mut self.call.staged(&self.manifest.limits).timers;
        let before = requests.insert(name.clone(), request);
        // A few may be spent and their events still on the way.
        let (live, kept) = look(&self.timers, |set| set.count(requests));
        if live <= most && kept <= 2 * most {
            return Ok(());
        }
        match before {
            Some(before) => requests.insert(name, before),
            None => requests.remove(&name),
        };
        self.log.complain(Complaint::Refused, || {
            format!("a timer was refused: `limits.timers` is {most}")
        });
        Err(TimerError::LimitExceeded)
    }

    fn cancel_timer(&mut self, name: Box<str>) -> bool {
        let requests = &mut self.call.staged(&self.manifest.limits).timers;
        let (had, is_set) = look(&self.timers, |set| {
            (set.has(requests, &name), set.has(&Requests::new(), &name))
        });
        if is_set {
            requests.insert(name, Request::Cancel);
        } else {
            requests.remove(&name);
        }
        had
    }

    pub(super) fn commit_timers(&mut self, requests: Requests) {
        if requests.is_empty() {
            return;
        }
        let services = &self.services;
        self.timers
            .get_or_insert_with(|| InstanceTimers::new(services.clone()))
            .commit(requests);
    }
}

fn look<R>(
    timers: &Option<std::sync::Arc<InstanceTimers>>,
    look: impl FnOnce(&TimerSet) -> R,
) -> R {
    match timers {
        Some(timers) => timers.with(look),
        None => look(&TimerSet::default()),
    }
}

/// A timer's name is a level of a topic.
fn checked_name(name: &str) -> Result<Box<str>, TimerError> {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || b"_.-".contains(&c);
    match (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(allowed) {
        true => Ok(name.into()),
        false => Err(TimerError::InvalidName(format!(
            "a timer's name has 1 to {MAX_NAME} of the characters A-Z a-z 0-9 _ . -"
        ))),
    }
}
