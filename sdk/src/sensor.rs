//! Sensors that the kernel knows (IIO and hwmon). The manifest names them and says how often they are
//! read, and the gateway's configuration (`apps.sensors`) lets the app have them. Each reading comes as an
//! event.
//!
//! ```toml
//! capabilities = ["sensors"]
//!
//! [[sensor]]
//! name = "cpu"
//! device = "cpu_thermal"
//! channel = "temp1_input"
//! interval_ms = 5000
//! ```
//!
//! ```
//! use headgate_sdk::{Event, sensor};
//!
//! // In `handle`:
//! # let event = Event { topic: "$sensor/cpu".into(), payload: b"48.312".to_vec(), timestamp: 0 };
//! if let Some(("cpu", celsius)) = sensor::reading(&event) {
//!     // event.timestamp is the time when it was read.
//! #   assert_eq!(celsius, 48.312);
//! }
//! ```

use crate::Event;

/// The sensor of which this event is a reading, if it is one, and the value.
pub fn reading(event: &Event) -> Option<(&str, f64)> {
    let name = event.topic.strip_prefix("$sensor/")?;
    let text = std::str::from_utf8(&event.payload).ok()?;
    Some((name, text.parse().ok()?))
}
