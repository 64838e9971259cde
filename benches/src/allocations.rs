//! Counts what a thread allocates.

use std::alloc::{GlobalAlloc, Layout};
use std::cell::Cell;

/// An allocator that counts, for each thread by itself: that costs next to nothing.
pub struct Counting<A>(pub A);

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
    static BYTES: Cell<u64> = const { Cell::new(0) };
}

/// How often this thread has allocated, and how many bytes.
pub fn so_far() -> (u64, u64) {
    (COUNT.get(), BYTES.get())
}

fn count(size: usize) {
    // Neither needs a destructor, so they are there until the thread's very end.
    COUNT.set(COUNT.get() + 1);
    BYTES.set(BYTES.get() + size as u64);
}

// SAFETY: all is left to the allocator within.
#[allow(unsafe_code)]
unsafe impl<A: GlobalAlloc> GlobalAlloc for Counting<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as the caller promises.
        unsafe { self.0.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as the caller promises.
        unsafe { self.0.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { self.0.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        // SAFETY: as the caller promises.
        unsafe { self.0.realloc(pointer, layout, size) }
    }
}
