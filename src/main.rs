//! The `headgate` program: the gateway, and the command line that operates it.
#![deny(unsafe_code)]

use std::process::ExitCode;

/// Small payloads are allocated on one thread and freed on another, which is where this one is
/// fast.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    headgate::cli::main(std::env::args_os())
}
