//! The guest's allocator. A batch is allocated and freed as a whole, event for event, and the next one is
//! much like it. So small blocks that are freed are kept for the next of their size, which costs a few
//! instructions; a general allocator is behind that.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout};
use std::cell::UnsafeCell;
use std::ptr::{self, NonNull};

/// Blocks are as large as a multiple of this, and aligned to it.
const STEP: usize = 16;

/// The largest blocks that are kept.
const MAX_BLOCK: usize = 1024;

/// Most bytes in kept blocks of one size.
const MAX_KEPT: usize = 32 << 10;

/// Keeps small blocks before it gives them back to `A`. For one thread only.
struct Keeping<A> {
    free: UnsafeCell<[FreeList; MAX_BLOCK / STEP]>,
    behind: A,
}

#[derive(Clone, Copy)]
struct FreeList {
    /// The first block; in it stands which one is the next.
    first: Option<NonNull<Block>>,
    blocks: usize,
}

struct Block {
    next: Option<NonNull<Block>>,
}

impl<A> Keeping<A> {
    const fn new(behind: A) -> Keeping<A> {
        let empty = FreeList {
            first: None,
            blocks: 0,
        };
        Keeping {
            free: UnsafeCell::new([empty; MAX_BLOCK / STEP]),
            behind,
        }
    }
}

impl<A: GlobalAlloc> Keeping<A> {
    /// What the allocator behind gives; if it has nothing more, after it has got all blocks back.
    ///
    /// # Safety
    /// As for `get`, which must not come back here.
    unsafe fn behind(&self, get: impl Fn(&A) -> *mut u8) -> *mut u8 {
        let block = get(&self.behind);
        if !block.is_null() {
            return block;
        }
        for class in 0..MAX_BLOCK / STEP {
            // SAFETY: as in `alloc`; each block in the list is a whole one of this size, and free.
            unsafe {
                let list = &mut (*self.free.get())[class];
                while let Some(block) = list.first {
                    list.first = block.as_ref().next;
                    self.behind.dealloc(block.as_ptr().cast(), whole(class));
                }
                list.blocks = 0;
            }
        }
        get(&self.behind)
    }
}

/// Which list a block is from, if from any. The size of a layout is never 0.
fn class(layout: Layout) -> Option<usize> {
    (layout.size() <= MAX_BLOCK && layout.align() <= STEP).then(|| (layout.size() - 1) / STEP)
}

/// What the allocator behind gives for a block of this list.
fn whole(class: usize) -> Layout {
    let layout = Layout::from_size_align((class + 1) * STEP, STEP);
    layout.expect("the step is a power of two")
}

// SAFETY: each block is a whole one of the allocator behind, at least as large and as aligned as the layout
// asks for; it is either in use or in the list of its size, never both.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Keeping<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(class) = class(layout) else {
            // SAFETY: handed on as it came.
            return unsafe { self.behind(|behind| behind.alloc(layout)) };
        };
        // SAFETY: there is one thread, and nothing in here calls back.
        let list = unsafe { &mut (*self.free.get())[class] };
        match list.first {
            Some(block) => {
                // SAFETY: a block in the list is free, and was written when it came there.
                list.first = unsafe { block.as_ref().next };
                list.blocks -= 1;
                block.as_ptr().cast()
            }
            // SAFETY: its size is not 0.
            None => unsafe { self.behind(|behind| behind.alloc(whole(class))) },
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        let Some(class) = class(layout) else {
            // SAFETY: handed on as it came.
            return unsafe { self.behind.dealloc(block, layout) };
        };
        // SAFETY: as in `alloc`.
        let list = unsafe { &mut (*self.free.get())[class] };
        if (list.blocks + 1) * (class + 1) * STEP > MAX_KEPT {
            // SAFETY: with this layout it was allocated.
            return unsafe { self.behind.dealloc(block, whole(class)) };
        }
        let block = block.cast::<Block>();
        // SAFETY: it is the caller's no longer, has room for a pointer and is aligned for one.
        unsafe { block.write(Block { next: list.first }) };
        list.first = NonNull::new(block);
        list.blocks += 1;
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promise.
        let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        match (class(layout), class(new)) {
            // SAFETY: handed on as it came.
            (None, None) => unsafe { self.behind(|behind| behind.realloc(block, layout, size)) },
            (old, new) if old == new => block,
            _ => {
                // SAFETY: as the caller could do it.
                unsafe {
                    let moved = self.alloc(new);
                    if !moved.is_null() {
                        ptr::copy_nonoverlapping(block, moved, layout.size().min(size));
                        self.dealloc(block, layout);
                    }
                    moved
                }
            }
        }
    }
}

#[cfg(target_family = "wasm")]
mod global {
    use talc::wasm::{WasmDynamicTalc, new_wasm_dynamic_allocator};

    use super::Keeping;

    #[cfg(target_feature = "atomics")]
    compile_error!("headgate-sdk's allocator is for one thread; turn its feature `allocator` off");

    // SAFETY: a module without atomics has one thread.
    unsafe impl<A> Sync for Keeping<A> {}

    #[global_allocator]
    static ALLOCATOR: Keeping<WasmDynamicTalc> = Keeping::new(new_wasm_dynamic_allocator());
}

#[cfg(test)]
mod tests {
    use std::alloc::System;
    use std::cell::Cell;

    use proptest::prelude::*;

    use super::*;

    /// Counts the bytes that are with it, and gives no more than a million.
    struct Counting(Cell<usize>);

    const ALL: usize = 1_000_000;

    // SAFETY: the system's, and a count.
    unsafe impl GlobalAlloc for Counting {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            if self.0.get() + layout.size() > ALL {
                return ptr::null_mut();
            }
            self.0.set(self.0.get() + layout.size());
            unsafe { System.alloc(layout) }
        }

        unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
            self.0.set(self.0.get() - layout.size());
            unsafe { System.dealloc(block, layout) }
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Alloc { size: usize, align: usize },
        Realloc { which: usize, size: usize },
        Free { which: usize },
    }

    fn step() -> impl Strategy<Value = Step> {
        let size = prop_oneof![1usize..200, 900usize..1200, Just(16), Just(1024)];
        prop_oneof![
            (size.clone(), 0u32..7).prop_map(|(size, align)| Step::Alloc {
                size,
                align: 1 << align
            }),
            (any::<usize>(), size).prop_map(|(which, size)| Step::Realloc { which, size }),
            any::<usize>().prop_map(|which| Step::Free { which }),
        ]
    }

    proptest! {
        #[test]
        fn blocks_are_aligned_keep_what_is_in_them_and_do_not_overlap(
            steps in prop::collection::vec(step(), 0..300)
        ) {
            let allocator = Keeping::new(Counting(Cell::new(0)));
            let mut live: Vec<(*mut u8, Layout, u8)> = Vec::new();
            let mut used = 0;
            for (number, step) in steps.into_iter().enumerate() {
                let mark = number as u8;
                match step {
                    Step::Alloc { size, align } => {
                        let layout = Layout::from_size_align(size, align).unwrap();
                        let block = unsafe { allocator.alloc(layout) };
                        prop_assert_eq!(block.align_offset(align), 0);
                        unsafe { block.write_bytes(mark, size) };
                        live.push((block, layout, mark));
                        used += size;
                    }
                    Step::Realloc { which, size } if !live.is_empty() => {
                        let which = which % live.len();
                        let (block, layout, mark) = live[which];
                        let moved = unsafe { allocator.realloc(block, layout, size) };
                        let both = layout.size().min(size);
                        let kept = unsafe { std::slice::from_raw_parts(moved, both) };
                        prop_assert!(kept.iter().all(|byte| *byte == mark));
                        unsafe { moved.write_bytes(mark, size) };
                        used = used - layout.size() + size;
                        live[which].0 = moved;
                        live[which].1 = Layout::from_size_align(size, layout.align()).unwrap();
                    }
                    Step::Free { which } if !live.is_empty() => {
                        let (block, layout, mark) = live.swap_remove(which % live.len());
                        let bytes = unsafe { std::slice::from_raw_parts(block, layout.size()) };
                        prop_assert!(bytes.iter().all(|byte| *byte == mark));
                        unsafe { allocator.dealloc(block, layout) };
                        used -= layout.size();
                    }
                    _ => {}
                }
            }
            for (block, layout, mark) in live {
                let bytes = unsafe { std::slice::from_raw_parts(block, layout.size()) };
                prop_assert!(bytes.iter().all(|byte| *byte == mark));
                unsafe { allocator.dealloc(block, layout) };
                used -= layout.size();
            }
            prop_assert_eq!(used, 0);
            prop_assert!(allocator.behind.0.get() <= MAX_KEPT * MAX_BLOCK / STEP);
        }
    }

    #[test]
    fn what_is_kept_of_one_size_is_bounded() {
        let allocator = Keeping::new(Counting(Cell::new(0)));
        let layout = Layout::from_size_align(100, 1).unwrap();
        let blocks: Vec<_> = (0..5_000)
            .map(|_| unsafe { allocator.alloc(layout) })
            .collect();
        for block in blocks {
            unsafe { allocator.dealloc(block, layout) };
        }
        let kept = allocator.behind.0.get();
        assert!((MAX_KEPT - 112..=MAX_KEPT).contains(&kept), "{kept}");
        assert_eq!(kept % 112, 0);
    }

    #[test]
    fn what_is_kept_is_given_back_before_memory_runs_out() {
        let layout = |size| Layout::from_size_align(size, 1).unwrap();
        let allocator = Keeping::new(Counting(Cell::new(0)));
        let kept = |allocator: &Keeping<Counting>| {
            let blocks: Vec<_> = (0..100)
                .map(|_| unsafe { allocator.alloc(layout(160)) })
                .collect();
            for block in blocks {
                unsafe { allocator.dealloc(block, layout(160)) };
            }
            allocator.behind.0.get()
        };
        assert_eq!(kept(&allocator), 16_000);
        let large = unsafe { allocator.alloc(layout(ALL)) };
        assert!(!large.is_null());
        assert!(unsafe { allocator.alloc(layout(16)) }.is_null());
        unsafe { allocator.dealloc(large, layout(ALL)) };

        let large = unsafe { allocator.alloc(layout(2000)) };
        assert_eq!(kept(&allocator), 18_000);
        // The system's realloc, made of these, has both for a moment.
        let grown = unsafe { allocator.realloc(large, layout(2000), ALL - 2000) };
        assert!(!grown.is_null());
        unsafe { allocator.dealloc(grown, layout(ALL - 2000)) };
        assert_eq!(allocator.behind.0.get(), 0);
    }

    #[test]
    fn a_block_that_was_freed_is_used_again() {
        let allocator = Keeping::new(Counting(Cell::new(0)));
        let layout = |size| Layout::from_size_align(size, 8).unwrap();
        let block = unsafe { allocator.alloc(layout(33)) };
        unsafe { allocator.dealloc(block, layout(33)) };
        assert_eq!(unsafe { allocator.alloc(layout(48)) }, block);
    }
}
