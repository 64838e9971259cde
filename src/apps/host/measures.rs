//! `headgate:app/metrics`.

use wasmtime::StoreContextMut;
use wasmtime::component::{ComponentType, Linker, Lower, WasmStr};

use super::HostState;
use crate::apps::log::Complaint;
use crate::apps::measures::{BadSample, MAX_MEASURES, Sample};

pub(super) const METRICS: &str = "headgate:app/metrics@0.1.0";

/// `metric-error`
#[derive(ComponentType, Lower)]
#[component(variant)]
enum MetricError {
    #[component(name = "invalid-name")]
    InvalidName(String),
    #[component(name = "invalid-value")]
    InvalidValue,
    #[component(name = "other-kind")]
    OtherKind,
    #[component(name = "limit-exceeded")]
    LimitExceeded,
}

pub(super) fn add_to_linker(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    let mut metrics = linker.instance(METRICS)?;
    metrics.func_wrap(
        "counter-add",
        |store: StoreContextMut<HostState>, (name, count): (WasmStr, u64)| {
            record(store, name, Sample::Count(count))
        },
    )?;
    metrics.func_wrap(
        "gauge-set",
        |store: StoreContextMut<HostState>, (name, value): (WasmStr, f64)| {
            record(store, name, Sample::Level(value))
        },
    )?;
    metrics.func_wrap(
        "histogram-record",
        |store: StoreContextMut<HostState>, (name, value): (WasmStr, f64)| {
            record(store, name, Sample::Observation(value))
        },
    )
}

fn record(
    mut store: StoreContextMut<HostState>,
    name: WasmStr,
    sample: Sample,
) -> wasmtime::Result<(Result<(), MetricError>,)> {
    // One byte more than a name may have shows as well as all of them that it is too long.
    let name = super::cut(&name.to_str(&store)?, 65).to_owned();
    let state = store.data_mut();
    let staged = &mut state.call.staged(&state.manifest.limits).measures;
    let result = state.services.measures.lock().stage(staged, &name, sample);
    Ok((result.map_err(|error| state.refused_sample(error)),))
}

impl HostState {
    fn refused_sample(&mut self, error: BadSample) -> MetricError {
        self.call.tally.calls.metrics += 1;
        let (why, error) = match error {
            BadSample::Name => {
                let why = "its name is not [a-z_][a-z0-9_]{0,63}";
                (why.to_owned(), MetricError::InvalidName(why.to_owned()))
            }
            BadSample::NotFinite => (
                "its value is no finite number".to_owned(),
                MetricError::InvalidValue,
            ),
            BadSample::OtherKind => (
                "one of another kind has its name".to_owned(),
                MetricError::OtherKind,
            ),
            BadSample::TooMany => (
                format!("an app has {MAX_MEASURES} at most"),
                MetricError::LimitExceeded,
            ),
        };
        self.log.complain(Complaint::Refused, || {
            format!("a metric was refused: {why}")
        });
        error
    }
}
