//! The model of a stream: it takes a batch as a whole or not at all. One that says what it follows is taken only
//! there; of others what it has is left out by message id. What it has stored it keeps.

use std::collections::HashSet;

/// Which event of its gateway's journal, and if it is sent under a new name, the how many-th.
pub(super) type MessageId = (u64, u64);

#[derive(Default)]
pub(super) struct Stream {
    /// Their sequences in the journal.
    pub(super) messages: Vec<u64>,
    ids: HashSet<MessageId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Published {
    Stored,
    /// It does not come after the message that was expected.
    Refused,
}

impl Stream {
    pub(super) fn publish(
        &mut self,
        batch: impl Iterator<Item = MessageId>,
        follows: Option<u64>,
    ) -> Published {
        match follows {
            Some(last) if last != self.messages.len() as u64 => return Published::Refused,
            Some(_) => self.messages.extend(batch.map(|id| id.0)),
            None => {
                let new = batch.filter(|id| self.ids.insert(*id));
                self.messages.extend(new.map(|id| id.0));
            }
        }
        Published::Stored
    }
}
