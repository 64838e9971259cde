//! The guest's allocator. A batch is allocated and freed as a whole, event for event, which `std`'s
//! general one makes slower than it needs to be.

use talc::wasm::{WasmDynamicTalc, new_wasm_dynamic_allocator};

#[global_allocator]
static ALLOCATOR: WasmDynamicTalc = new_wasm_dynamic_allocator();
