//! Which client id belongs to whom: connected sessions, parked sessions, takeover.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use tokio::sync::{Notify, watch};

use super::mailbox::Mailbox;
use super::message::SessionKey;
use super::session::Session;

/// All client ids in use.
#[derive(Debug, Default)]
pub struct Registry {
    slots: Mutex<FxHashMap<String, Slot>>,
    /// A session was parked.
    pub parked: Notify,
}

#[derive(Debug)]
enum Slot {
    Online(Arc<Online>),
    Parked(Box<Parked>),
}

/// A connection that holds a client id.
#[derive(Debug)]
pub struct Online {
    /// Another connection wants the client id.
    pub taken_over: Notify,
    gone: watch::Sender<bool>,
}

/// A session whose client is away.
#[derive(Debug)]
pub struct Parked {
    pub session: Session,
    pub mailbox: Arc<Mailbox>,
    pub key: SessionKey,
    pub expires: Instant,
}

impl Registry {
    /// Takes the client id, away from another connection if need be, and with it what is parked
    /// under it. None: `max` clients are connected already.
    pub async fn attach(
        &self,
        client_id: &str,
        max: usize,
    ) -> Option<(Arc<Online>, Option<Parked>)> {
        loop {
            let holder = {
                let mut slots = self.slots.lock();
                match slots.get(client_id) {
                    Some(Slot::Online(holder)) => holder.clone(),
                    _ if online_count(&slots) >= max => return None,
                    _ => {
                        let online = Arc::new(Online {
                            taken_over: Notify::new(),
                            gone: watch::Sender::new(false),
                        });
                        let before =
                            slots.insert(client_id.to_owned(), Slot::Online(online.clone()));
                        let parked = match before {
                            Some(Slot::Parked(parked)) => Some(*parked),
                            _ => None,
                        };
                        return Some((online, parked));
                    }
                }
            };
            holder.taken_over.notify_one();
            // Its connection never drops the sender without saying so first.
            let _ = holder.gone.subscribe().wait_for(|gone| *gone).await;
        }
    }

    /// Gives the client id back, leaving `parked` under it. With `max` parked sessions there
    /// already, the one that would have expired first has to go: it is returned with its client id.
    pub fn detach(
        &self,
        client_id: &str,
        online: &Online,
        parked: Option<Parked>,
        max: usize,
    ) -> Option<(String, Parked)> {
        let mut slots = self.slots.lock();
        let mut evicted = None;
        if parked.is_some() {
            self.parked.notify_one();
        }
        if parked.is_some() && slots.len() - online_count(&slots) >= max {
            let expiries = slots.iter().filter_map(|(id, slot)| match slot {
                Slot::Parked(parked) => Some((parked.expires, id)),
                Slot::Online(_) => None,
            });
            let first = expiries.min().map(|(_, id)| id.clone());
            evicted = first.and_then(|id| match slots.remove(&id) {
                Some(Slot::Parked(parked)) => Some((id, *parked)),
                _ => None,
            });
        }
        match parked {
            Some(parked) => {
                slots.insert(client_id.to_owned(), Slot::Parked(Box::new(parked)));
            }
            None => {
                slots.remove(client_id);
            }
        }
        drop(slots);
        online.gone.send_replace(true);
        evicted
    }

    /// When the next parked session's time is up.
    pub fn next_expiry(&self) -> Option<Instant> {
        let slots = self.slots.lock();
        let expiries = slots.values().filter_map(|slot| match slot {
            Slot::Parked(parked) => Some(parked.expires),
            Slot::Online(_) => None,
        });
        expiries.min()
    }

    /// Takes out the parked sessions whose time is up, with their client ids.
    pub fn expire(&self, now: Instant) -> Vec<(String, Parked)> {
        let is_over = |_: &String, slot: &mut Slot| match slot {
            Slot::Parked(parked) => parked.expires <= now,
            Slot::Online(_) => false,
        };
        let mut slots = self.slots.lock();
        let over = slots.extract_if(is_over);
        let parked = over.filter_map(|(id, slot)| match slot {
            Slot::Parked(parked) => Some((id, *parked)),
            Slot::Online(_) => None,
        });
        parked.collect()
    }

    /// Connected clients and parked sessions.
    pub fn counts(&self) -> (usize, usize) {
        let slots = self.slots.lock();
        let online = online_count(&slots);
        (online, slots.len() - online)
    }
}

/// Counting is fine here: it happens once a connection, on at most some thousand slots.
fn online_count(slots: &FxHashMap<String, Slot>) -> usize {
    slots
        .values()
        .filter(|slot| matches!(slot, Slot::Online(_)))
        .count()
}
