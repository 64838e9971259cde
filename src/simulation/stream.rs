//! The model of a stream: it stores what is new, tells what it has by message id, and heeds the expected
//! last sequence. What it has stored it keeps.

use std::collections::HashMap;

/// Which event of its gateway's journal, and if it is sent under a new name, the how many-th.
pub(super) type MessageId = (u64, u64);

#[derive(Default)]
pub(super) struct Stream {
    /// Their sequences in the journal.
    pub(super) messages: Vec<u64>,
    ids: HashMap<MessageId, ()>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Published {
    Stored,
    /// It does not come after the message that was expected.
    Refused,
}

impl Stream {
    pub(super) fn publish(&mut self, id: MessageId, follows: Option<u64>) -> Published {
        if self.ids.contains_key(&id) {
            return Published::Stored;
        }
        if follows.is_some_and(|last| last != self.messages.len() as u64) {
            return Published::Refused;
        }
        self.ids.insert(id, ());
        self.messages.push(id.0);
        Published::Stored
    }
}
