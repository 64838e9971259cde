//! Lines of GPIO chips: switches, relays, lamps. The manifest names them, and the gateway's
//! configuration (`apps.gpio`) lets the app have them.
//!
//! An edge of an input comes as an event: [`edge`] says of which line, and what it is now. Values are
//! logical: `true` is active, which is the low level if the manifest says `active_low`.
//!
//! ```toml
//! capabilities = ["gpio"]
//!
//! [[gpio]]
//! name = "door"
//! chip = "gpiochip0"
//! line = 17
//! direction = "input"
//!
//! [[gpio]]
//! name = "lamp"
//! chip = "gpiochip0"
//! line = 27
//! direction = "output"
//! ```
//!
//! ```
//! use headgate_sdk::{Event, gpio};
//!
//! # fn handle() -> Result<(), gpio::GpioError> {
//! // In `handle`:
//! # let event = Event { topic: "$gpio/door".into(), payload: b"1".to_vec(), timestamp: 0 };
//! if let Some(("door", open)) = gpio::edge(&event) {
//!     // event.timestamp is the kernel's time of the edge.
//!     gpio::set("lamp", open)?;
//! }
//! # Ok(())
//! # }
//! # handle().unwrap();
//! ```
//!
//! On the developer's machine outputs keep what they are set to, for the thread that sets them, and all
//! lines begin inactive: hand the app the edges of its inputs.

use crate::Event;

/// Why a line was not read or set.
pub use crate::bindings::headgate::app::gpio::GpioError;

/// The line of which this event is an edge, if it is one, and whether the line is active since.
pub fn edge(event: &Event) -> Option<(&str, bool)> {
    let name = event.topic.strip_prefix("$gpio/")?;
    Some((name, event.payload == b"1"))
}

/// What a line is now; of an output that this call has set, what it will be.
///
/// # Errors
/// If the manifest has no such line, or if the kernel can't read it.
pub fn get(name: &str) -> Result<bool, GpioError> {
    imp::get(name)
}

/// Sets an output. It changes when the call has ended well.
///
/// # Errors
/// If the manifest has no such line, or if that is an input.
pub fn set(name: &str, value: bool) -> Result<(), GpioError> {
    imp::set(name, value)
}

#[cfg(target_family = "wasm")]
mod imp {
    pub use crate::bindings::headgate::app::gpio::{get, set};
}

#[cfg(not(target_family = "wasm"))]
mod imp {
    use super::GpioError;
    use std::cell::RefCell;
    use std::collections::BTreeMap;

    thread_local! {
        static LINES: RefCell<BTreeMap<String, bool>> = const { RefCell::new(BTreeMap::new()) };
    }

    pub fn get(name: &str) -> Result<bool, GpioError> {
        Ok(LINES.with_borrow(|lines| lines.get(name).copied().unwrap_or_default()))
    }

    pub fn set(name: &str, value: bool) -> Result<(), GpioError> {
        LINES.with_borrow_mut(|lines| lines.insert(name.to_owned(), value));
        Ok(())
    }
}
