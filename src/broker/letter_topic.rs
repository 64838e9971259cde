//! What was dropped, for clients to see: `$headgate/dead-letters`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::fanout::Publisher;
use super::message::Message;
use super::{Phase, Shared};
use crate::event::Topic;

const TOPIC: &str = "$headgate/dead-letters";

/// New letters go together, so that a flood of them is no flood of wake-ups.
const GATHER: Duration = Duration::from_millis(100);

/// Publishes dead letters as they come, until the shutdown begins.
pub(super) async fn publish(shared: Arc<Shared>) {
    let topic = Topic::new(TOPIC).expect("it is a topic");
    let letters = &shared.mailboxes.dead_letters;
    let mut publisher = Publisher::new(shared.fanout.clone());
    let mut next = letters.next_id();
    loop {
        tokio::select! {
            () = letters.added() => tokio::time::sleep(GATHER).await,
            () = shared.leaves(Phase::Running) => return,
        }
        for (id, letter) in letters.since(next) {
            next = id + 1;
            // One that says that such a message was dropped would be dropped as well, and so on.
            if letter.topic == topic {
                continue;
            }
            let info = serde_json::to_vec(&letter.info(id)).expect("strings and numbers are JSON");
            publisher.add(&topic, info.len(), || {
                Message::new(topic.clone(), info.into())
            });
        }
        publisher.flush(Instant::now());
    }
}
