//! Write apps for Headgate, the edge gateway, in Rust.
//!
//! An app gets the events that match its manifest's `subscribe` filters, a batch at a time, and
//! returns the events that are to be published. It is a `cdylib` that is compiled for
//! `wasm32-unknown-unknown` and wrapped as a WebAssembly component; it sees nothing of the machine
//! that it runs on but its configuration, a log, the events, what it keeps in [`kv`], and the
//! [`clock`]. It can set a [`timer`], count in [`metrics`], and, where the gateway lets it, use lines of
//! [`gpio`] and read a [`sensor`].
//!
//! ```
//! use headgate_sdk::{App, Config, Event, info};
//!
//! struct Doubler {
//!     factor: f64,
//! }
//!
//! #[headgate_sdk::app]
//! impl App for Doubler {
//!     fn configure(config: &Config) -> Result<Self, String> {
//!         Ok(Doubler { factor: config.get_or("factor", 2.0)? })
//!     }
//!
//!     fn handle(&mut self, batch: Vec<Event>) -> Result<Vec<Event>, String> {
//!         let mut outputs = Vec::with_capacity(batch.len());
//!         for event in batch {
//!             match std::str::from_utf8(&event.payload).ok().and_then(|text| text.parse::<f64>().ok()) {
//!                 Some(value) => outputs.push(Event {
//!                     topic: format!("doubled/{}", event.topic),
//!                     payload: (value * self.factor).to_string().into_bytes(),
//!                     timestamp: event.timestamp,
//!                 }),
//!                 None => info!("{}: not a number, skipped", event.topic),
//!             }
//!         }
//!         Ok(outputs)
//!     }
//! }
//!
//! // On the developer's machine an app is a plain struct, so its tests need no host:
//! let mut app = Doubler::configure(&Config::from([("factor", "3")])).unwrap();
//! let event = Event { topic: "a".into(), payload: b"14".to_vec(), timestamp: 0 };
//! assert_eq!(app.handle(vec![event]).unwrap()[0].payload, b"42");
//! ```
//!
//! Beside `Cargo.toml` (`crate-type = ["cdylib"]`) an app has a `manifest.toml`:
//!
//! ```toml
//! name = "doubler"
//! version = "0.1.0"
//! subscribe = ["plant/+/count"]
//! publish = ["doubled/#"]
//!
//! [config]
//! factor = 3
//! ```

#![deny(unsafe_code)]

// `#[app]` names this crate, in its own tests too.
extern crate self as headgate_sdk;

#[cfg(all(any(target_family = "wasm", test), feature = "allocator"))]
mod allocator;
pub mod clock;
#[cfg(any(target_family = "wasm", test))]
mod columns;
mod config;
pub mod gpio;
mod guest;
#[cfg(feature = "json")]
mod json;
pub mod kv;
mod log;
pub mod metrics;
#[cfg(not(target_family = "wasm"))]
mod native;
mod rate_limit;
pub mod sensor;
#[cfg(not(target_family = "wasm"))]
pub mod testing;
pub mod timer;

pub use config::{Config, ConfigError};
pub use guest::{App, PublishError, publish};
/// Makes the type of an `impl App for …` the app of this component. Once in a crate, in whatever module.
pub use headgate_sdk_macros::app;
#[cfg(feature = "json")]
pub use json::JsonError;
pub use log::{Level, log};
pub use rate_limit::RateLimit;

/// One message: a topic, a payload, and the time in nanoseconds since 1970-01-01T00:00:00Z.
///
/// On an output a timestamp of 0 stands for "now".
pub use bindings::headgate::app::types::Event;

/// What [`export!`] expands to needs this; apps do not.
#[doc(hidden)]
#[cfg(target_family = "wasm")]
pub use {
    columns::Columns,
    guest::{Slot, load_config},
};

/// The bindings of the world `app-columns` in `wit/world.wit`.
#[doc(hidden)]
#[allow(clippy::too_many_arguments, missing_docs, unsafe_code)] // All of it is generated.
pub mod bindings {
    wit_bindgen::generate!({
        path: "../wit",
        world: "app-columns",
        generate_all,
        pub_export_macro: true,
        export_macro_name: "export_component",
        additional_derives: [PartialEq],
    });
}
