//! `wasi:clocks`, for reading.

use std::sync::LazyLock;
use std::time::Instant;

use wasmtime::StoreContextMut;
use wasmtime::component::{ComponentType, Linker, Lower};

use super::HostState;
use crate::event::unix_time_ns;

pub(super) const MONOTONIC: &str = "wasi:clocks/monotonic-clock@0.2.0";
pub(super) const WALL: &str = "wasi:clocks/wall-clock@0.2.0";

/// What apps' monotonic clock counts from.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Of both clocks, as the kernel has it.
const RESOLUTION_NS: u32 = 1;

#[derive(ComponentType, Lower)]
#[component(record)]
struct Datetime {
    seconds: u64,
    nanoseconds: u32,
}

pub(super) fn add_to_linker(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    let mut monotonic = linker.instance(MONOTONIC)?;
    monotonic.func_wrap("now", |_: StoreContextMut<HostState>, (): ()| {
        Ok((START.elapsed().as_nanos() as u64,))
    })?;
    monotonic.func_wrap("resolution", |_: StoreContextMut<HostState>, (): ()| {
        Ok((u64::from(RESOLUTION_NS),))
    })?;

    let mut wall = linker.instance(WALL)?;
    wall.func_wrap("now", |_: StoreContextMut<HostState>, (): ()| {
        let now = unix_time_ns();
        Ok((Datetime {
            seconds: now / 1_000_000_000,
            nanoseconds: (now % 1_000_000_000) as u32,
        },))
    })?;
    wall.func_wrap("resolution", |_: StoreContextMut<HostState>, (): ()| {
        Ok((Datetime {
            seconds: 0,
            nanoseconds: RESOLUTION_NS,
        },))
    })
}
