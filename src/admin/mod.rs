//! The HTTP API on the Unix socket, and its client.

pub mod socket;

pub use socket::{AdminListener, SocketError};
