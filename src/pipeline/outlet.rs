//! Where batches go.

use std::sync::Arc;

use crate::event::{Batch, TopicFilter};

/// Something that works on batches: an app, a mapping.
pub trait Outlet: Send + Sync {
    /// For logs and metrics.
    fn name(&self) -> &str;

    /// Nothing is queued and nothing is being worked on: a batch that is offered now starts at
    /// once, so there is no gain in letting it grow.
    fn is_idle(&self) -> bool;

    /// Hands over a batch. Never blocks. The outlet accounts for what it takes.
    fn offer(&self, batch: Batch) -> Offer;
}

/// What became of an offered batch.
#[derive(Debug)]
pub enum Offer {
    /// The outlet has it.
    Taken,
    /// The queue is full but moving: offer it again when the outlet calls the waker that the
    /// pipeline gave it, or a little later.
    Full(Batch),
    /// The outlet does not take events now (stopped, backing off with a full queue): drop it.
    Refused(Batch),
}

/// Events whose topic matches `filter` go to `outlet`.
#[derive(Clone)]
pub struct Route {
    pub filter: TopicFilter,
    pub outlet: Arc<dyn Outlet>,
}
