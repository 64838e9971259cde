//! The HTTP API on the Unix socket, and the client that the command line uses.
//!
//! Knows how requests and answers look; what they mean is the business of the rooms behind it.
//! `docs/admin-api.md` describes the API for those who write clients of their own.

mod api;
mod client;
mod mappings;
mod mqtt;
mod socket;

use std::path::PathBuf;
use std::sync::Arc;

use crate::apps::Apps;
use crate::broker::Broker;
use crate::dead_letters::{DeadLetter, DeadLetters};
use crate::event::Topic;
use crate::mappings::Mappings;
use crate::why::Explanation;

pub use client::{Client, ClientError, DeadLetterList, Retry};
pub use socket::{AdminListener, SocketError};

/// Largest component that can be installed, in bytes.
pub const MAX_COMPONENT_BYTES: usize = 64 << 20;

/// Largest manifest that can be installed, in bytes.
pub const MAX_MANIFEST_BYTES: usize = 64 << 10;

/// Header of an install request: how many bytes at the head of the body are the manifest.
const MANIFEST_LENGTH: &str = "headgate-manifest-length";

/// Hands over a dead letter again, or says why it can't.
pub type RetryLetter = dyn Fn(&DeadLetter) -> Result<(), String> + Send + Sync;

/// What the API answers from.
#[derive(Clone)]
pub struct AdminState {
    pub apps: Apps,
    pub mappings: Mappings,
    pub broker: Arc<Broker>,
    pub dead_letters: Arc<DeadLetters>,
    /// Hands a dead letter over again; else says why not. May wait for whoever gets it.
    pub retry: Arc<RetryLetter>,
    /// What `GET /v1/status` answers: an object. May block for a moment.
    pub status: Arc<dyn Fn() -> serde_json::Value + Send + Sync>,
    /// What `POST /v1/reload` does; else, what is wrong with which file. May block for a moment.
    pub reload: Arc<dyn Fn() -> Result<(), String> + Send + Sync>,
    /// The system has passed its probation, so what it has stored stays; else, why it can't. False if it was on
    /// none.
    pub pass_trial: Arc<dyn Fn() -> Result<bool, String> + Send + Sync>,
    /// A file that is made to ask for an update of the machine; none if there is no channel.
    pub update_requests: Option<PathBuf>,
    /// What `GET /v1/why` answers.
    pub why: Arc<dyn Fn(&Topic) -> Explanation + Send + Sync>,
}

/// Answers requests until `shutdown` resolves; then lets those under way end, for at most two
/// seconds, and removes the socket.
pub async fn serve(listener: AdminListener, state: AdminState, shutdown: impl Future<Output = ()>) {
    crate::http::serve(listener, api::router(state), shutdown).await;
}
