//! The `headgate` program: the gateway, and the command line that operates it.
#![deny(unsafe_code)]

use std::process::ExitCode;

/// Small payloads are allocated on one thread and freed on another, which is where this one is
/// fast.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Runs before the allocator and `main`. The allocator's first touch of its arena would otherwise get a
/// huge page whenever the kernel has one to hand, which is 32 MB where pages have 16 KiB; and so would
/// the first touch of an app's memory. What is huge once stays so.
// SAFETY: what the section holds is what the C library calls at start: functions that need nothing of
// this program to be ready.
#[allow(unsafe_code)]
#[used]
#[unsafe(link_section = ".init_array.00001")]
static BEFORE_MAIN: extern "C" fn() = disable_huge_pages;

extern "C" fn disable_huge_pages() {
    // SAFETY: no pointers are involved; on a kernel without this option, the call fails and changes
    // nothing.
    #[allow(unsafe_code)]
    unsafe {
        libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0);
    }
}

fn main() -> ExitCode {
    headgate::cli::main(std::env::args_os())
}
