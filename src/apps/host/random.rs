//! `wasi:random`. What is called insecure there is as good as the rest: the kernel's.

use ring::rand::{SecureRandom, SystemRandom};
use wasmtime::StoreContextMut;
use wasmtime::component::Linker;

use super::{HostState, Interruption};

pub(super) const SECURE: &str = "wasi:random/random@0.2.0";
pub(super) const INSECURE: &str = "wasi:random/insecure@0.2.0";
pub(super) const SEED: &str = "wasi:random/insecure-seed@0.2.0";

/// Most bytes that one call gets. The interface knows no error: asking for more is a trap.
pub(super) const MAX_RANDOM_BYTES: u64 = 64 << 10;

pub(super) fn add_to_linker(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    for (interface, bytes, number) in [
        (SECURE, "get-random-bytes", "get-random-u64"),
        (
            INSECURE,
            "get-insecure-random-bytes",
            "get-insecure-random-u64",
        ),
    ] {
        let mut interface = linker.instance(interface)?;
        interface.func_wrap(bytes, |_: StoreContextMut<HostState>, (count,): (u64,)| {
            if count > MAX_RANDOM_BYTES {
                return Err(Interruption::Random { wanted: count }.into());
            }
            let mut bytes = vec![0; count as usize];
            fill(&mut bytes)?;
            Ok((bytes,))
        })?;
        interface.func_wrap(number, |_: StoreContextMut<HostState>, (): ()| {
            Ok((number_of_bits()?,))
        })?;
    }
    linker
        .instance(SEED)?
        .func_wrap("insecure-seed", |_: StoreContextMut<HostState>, (): ()| {
            Ok(((number_of_bits()?, number_of_bits()?),))
        })
}

fn number_of_bits() -> wasmtime::Result<u64> {
    let mut bytes = [0; 8];
    fill(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

fn fill(bytes: &mut [u8]) -> wasmtime::Result<()> {
    SystemRandom::new()
        .fill(bytes)
        .map_err(|_| wasmtime::Error::msg("the kernel has no random numbers"))
}
