//! `headgate:app/gpio`.

use std::collections::BTreeMap;

use wasmtime::StoreContextMut;
use wasmtime::component::{ComponentType, Linker, Lower, WasmStr};

use super::HostState;
use crate::apps::gpio::HeldLine;
use crate::apps::log::{Complaint, cut};

pub(super) const GPIO: &str = "headgate:app/gpio@0.1.0";

/// Of a wrong name, as much as an error repeats.
const SHOWN: usize = 64;

/// Outputs that a call has set, by the line's name.
pub(super) type Outputs = BTreeMap<Box<str>, bool>;

/// `gpio-error`
#[derive(ComponentType, Lower)]
#[component(variant)]
enum GpioError {
    #[component(name = "unknown-line")]
    UnknownLine,
    #[component(name = "not-an-output")]
    NotAnOutput,
    #[component(name = "failed")]
    Failed(String),
}

pub(super) fn add_to_linker(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    let mut gpio = linker.instance(GPIO)?;
    gpio.func_wrap(
        "get",
        |mut store: StoreContextMut<HostState>, (name,): (WasmStr,)| {
            let name = name.to_str(&store)?.into_owned();
            let state = store.data_mut();
            let result = state.line_value(&name);
            state.count_gpio(&name, &result);
            Ok((result,))
        },
    )?;
    gpio.func_wrap(
        "set",
        |mut store: StoreContextMut<HostState>, (name, value): (WasmStr, bool)| {
            let name = name.to_str(&store)?.into_owned();
            let state = store.data_mut();
            let result = state.set_line(&name, value);
            state.count_gpio(&name, &result);
            Ok((result,))
        },
    )
}

impl HostState {
    fn line(&self, name: &str) -> Result<&HeldLine, GpioError> {
        let line = self.devices.as_ref().and_then(|open| open.line(name));
        line.ok_or(GpioError::UnknownLine)
    }

    /// What a call has set is seen by that call at once.
    fn line_value(&self, name: &str) -> Result<bool, GpioError> {
        let line = self.line(name)?;
        let staged = self.call.staged.as_ref();
        if let Some(value) = staged.and_then(|staged| staged.outputs.get(name)) {
            return Ok(*value);
        }
        let value = line.value();
        value.map_err(|error| GpioError::Failed(error.to_string()))
    }

    fn set_line(&mut self, name: &str, value: bool) -> Result<(), GpioError> {
        if !self.line(name)?.is_output() {
            return Err(GpioError::NotAnOutput);
        }
        let outputs = &mut self.call.staged(&self.manifest.limits).outputs;
        outputs.insert(name.into(), value);
        Ok(())
    }

    fn count_gpio<T>(&mut self, name: &str, result: &Result<T, GpioError>) {
        let name = cut(name, SHOWN);
        let why = match result {
            Ok(_) => return,
            Err(GpioError::UnknownLine) => {
                format!("the manifest has no `[[gpio]]` with the name {name:?}")
            }
            Err(GpioError::NotAnOutput) => {
                format!("{name:?} can't be set: it is an input, says the manifest")
            }
            Err(GpioError::Failed(why)) => format!("{name:?} can't be read: {why}"),
        };
        self.call.tally.calls.gpio += 1;
        self.log
            .complain(Complaint::Line, || format!("a GPIO line: {why}"));
    }

    /// The call has ended well. An output that can't be set then is no fault of the call's.
    pub(super) fn commit_outputs(&mut self, outputs: Outputs) {
        for (name, value) in outputs {
            let Ok(line) = self.line(&name) else {
                continue;
            };
            if let Err(error) = line.set(value) {
                self.call.tally.unset_outputs += 1;
                self.log.complain(Complaint::Line, || {
                    format!("the GPIO line {name:?} can't be set: {error}")
                });
            }
        }
    }
}
