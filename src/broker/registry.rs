//! Which client id belongs to whom: connected sessions, parked sessions, takeover.

use std::cmp::Reverse;
use std::net::SocketAddr;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use rustls::pki_types::CertificateDer;
use tokio::sync::{Notify, watch};

use super::access::Identity;
use super::bell::Bell;
use super::codec::Version;
use super::mailbox::Mailbox;
use super::message::SessionKey;
use super::session::{Session, Will};

/// All client ids in use.
#[derive(Debug, Default)]
pub struct Registry {
    slots: Mutex<Slots>,
    /// A session was parked.
    pub parked: Notify,
}

#[derive(Debug, Default)]
struct Slots {
    by_client_id: FxHashMap<String, Slot>,
    /// How many of them are online.
    online: usize,
}

#[derive(Debug)]
enum Slot {
    Online(Arc<Online>),
    Parked(Box<Parked>),
}

/// A connection that holds a client id.
#[derive(Debug)]
pub struct Online {
    /// Set once the session is known.
    pub details: OnceLock<Details>,
    /// Whose connection it is.
    identity: Identity,
    eviction: OnceLock<Eviction>,
    /// Rung when it is evicted, and when the broker begins to drain or to close.
    pub bell: Bell,
    gone: watch::Sender<bool>,
}

/// What there is to know of a connected client.
#[derive(Debug)]
pub struct Details {
    pub key: SessionKey,
    pub peer: SocketAddr,
    pub version: Version,
    pub since_unix_ms: u64,
    pub keep_alive: Option<Duration>,
    pub session_expiry: Duration,
    pub mailbox: Arc<Mailbox>,
    /// Messages that it has to acknowledge. Kept up to date by its connection.
    pub inflight: AtomicUsize,
    /// Of a client that has shown one, its own first.
    pub certificates: Option<Box<[CertificateDer<'static>]>>,
}

/// Why a connection has to end although its client wants to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Eviction {
    /// Another connection wants the client id.
    TakenOver,
    /// An operator says so.
    ByOperator,
    /// As before, and nothing of the session is to be kept.
    Forgotten,
    /// The user is there no more, or has another password, or the key of the token is gone, or
    /// nobody vouches for the certificate any more.
    LoggedOut,
}

/// Why a client id is not to be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachError {
    /// As many as may be are connected already.
    Full,
    /// It is another user's, who is connected or has a session.
    OtherUser,
}

impl Online {
    /// Ends the connection soon. The first reason counts.
    pub fn evict(&self, why: Eviction) {
        if self.eviction.set(why).is_ok() {
            self.bell.ring();
        }
    }

    /// As [`Online::evict`], and waits until the connection is gone.
    async fn evict_and_wait(&self, why: Eviction) {
        self.evict(why);
        // Its connection never drops the sender without saying so first.
        let _ = self.gone.subscribe().wait_for(|gone| *gone).await;
    }

    /// Why the connection has to end, if it has to.
    pub fn eviction(&self) -> Option<Eviction> {
        self.eviction.get().copied()
    }
}

/// A session whose client is away.
#[derive(Debug)]
pub struct Parked {
    pub session: Session,
    pub mailbox: Arc<Mailbox>,
    pub expires: Instant,
    /// Published at that time, or when the session ends (MQTT 5.0, 3.1.3.2.2).
    pub will: Option<(Instant, Will)>,
}

impl Parked {
    fn next_event(&self) -> Instant {
        match &self.will {
            Some((due, _)) => self.expires.min(*due),
            None => self.expires,
        }
    }
}

/// What time has brought for a parked session.
#[derive(Debug)]
pub enum Due {
    /// Its will is to be published, if it may be; it stays.
    Will(Will, bool, Arc<Mailbox>),
    /// It is over.
    Expired(String, Box<Parked>),
}

impl Registry {
    /// Takes the client id, away from another connection if need be, and with it what is parked
    /// under it. What belongs to another user is not to be had while that user `counts`, and what
    /// belongs to nobody may be had by anybody. At most `max` are connected.
    pub async fn attach(
        &self,
        client_id: &str,
        identity: &Identity,
        counts: impl Fn(&str) -> bool,
        max: usize,
    ) -> Result<(Arc<Online>, Option<Parked>), AttachError> {
        let is_other = |user: Option<&str>| user != identity.user() && user.is_some_and(&counts);
        loop {
            let holder = {
                let mut slots = self.slots.lock();
                match slots.by_client_id.get(client_id) {
                    Some(Slot::Online(holder)) if is_other(holder.identity.user()) => {
                        return Err(AttachError::OtherUser);
                    }
                    Some(Slot::Parked(parked)) if is_other(parked.session.user()) => {
                        return Err(AttachError::OtherUser);
                    }
                    Some(Slot::Online(holder)) => holder.clone(),
                    _ if slots.online >= max => return Err(AttachError::Full),
                    _ => {
                        let online = Arc::new(Online {
                            details: OnceLock::new(),
                            identity: identity.clone(),
                            eviction: OnceLock::new(),
                            bell: Bell::default(),
                            gone: watch::Sender::new(false),
                        });
                        slots.online += 1;
                        let slot = Slot::Online(online.clone());
                        let before = slots.by_client_id.insert(client_id.to_owned(), slot);
                        let parked = match before {
                            Some(Slot::Parked(parked)) => Some(*parked),
                            _ => None,
                        };
                        return Ok((online, parked));
                    }
                }
            };
            holder.evict_and_wait(Eviction::TakenOver).await;
        }
    }

    /// Puts in a session of an earlier run of the gateway.
    pub fn restore(&self, client_id: String, parked: Parked) {
        let slot = Slot::Parked(Box::new(parked));
        self.slots.lock().by_client_id.insert(client_id, slot);
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
        slots.online -= 1;
        let mut evicted = None;
        match parked {
            Some(parked) => {
                self.parked.notify_one();
                // Its own slot is counted with those that are away by now.
                if slots.by_client_id.len() - slots.online > max {
                    evicted = slots.take_first_to_expire();
                }
                let slot = Slot::Parked(Box::new(parked));
                slots.by_client_id.insert(client_id.to_owned(), slot);
            }
            None => {
                slots.by_client_id.remove(client_id);
            }
        }
        drop(slots);
        online.gone.send_replace(true);
        evicted
    }

    /// Ends the connections of those whose login `holds` no more.
    pub fn log_out_unless(&self, holds: impl Fn(&Identity) -> bool) {
        let slots = self.slots.lock();
        for online in slots.online() {
            if !holds(&online.identity) {
                online.evict(Eviction::LoggedOut);
            }
        }
    }

    /// Ends the connections of those whose certificates `hold` no more.
    pub fn log_out_unless_certified(&self, hold: impl Fn(&[CertificateDer<'static>]) -> bool) {
        // Checking signatures takes time, and clients come and go meanwhile.
        let online: Vec<_> = self.slots.lock().online().cloned().collect();
        for online in online {
            let details = online.details.get();
            let certificates = details.and_then(|details| details.certificates.as_deref());
            if certificates.is_some_and(|certificates| !hold(certificates)) {
                online.evict(Eviction::LoggedOut);
            }
        }
    }

    /// Takes out the session of a client that is away.
    pub fn take_parked(&self, client_id: &str) -> Option<Parked> {
        self.slots.lock().take_parked(client_id)
    }

    /// When the next parked session's time is up, or its will's.
    pub fn next_due(&self) -> Option<Instant> {
        let slots = self.slots.lock();
        slots.parked().map(|(_, parked)| parked.next_event()).min()
    }

    /// Takes out the parked sessions whose time is up, with their client ids, and the wills that are
    /// due of those that stay.
    pub fn take_due(&self, now: Instant) -> Vec<Due> {
        let mut slots = self.slots.lock();
        let mut due = Vec::new();
        slots.by_client_id.retain(|_, slot| {
            if let Slot::Parked(parked) = slot
                && parked.expires > now
                && parked.will.as_ref().is_some_and(|(due, _)| *due <= now)
                && let Some((_, will)) = parked.will.take()
            {
                let is_allowed = parked.session.allows(&will);
                due.push(Due::Will(will, is_allowed, parked.mailbox.clone()));
            }
            true
        });
        let is_over =
            |_: &String, slot: &mut Slot| matches!(slot, Slot::Parked(p) if p.expires <= now);
        let over = slots.by_client_id.extract_if(is_over);
        due.extend(over.filter_map(|(id, slot)| match slot {
            Slot::Parked(parked) => Some(Due::Expired(id, parked)),
            Slot::Online(_) => None,
        }));
        due
    }

    /// Ends the connection of a client. False: it is not connected.
    pub fn evict(&self, client_id: &str, why: Eviction) -> bool {
        match self.slots.lock().by_client_id.get(client_id) {
            Some(Slot::Online(online)) => {
                online.evict(why);
                true
            }
            _ => false,
        }
    }

    /// As [`Registry::evict`], and waits until the connection is gone.
    pub async fn evict_and_wait(&self, client_id: &str, why: Eviction) -> bool {
        let holder = match self.slots.lock().by_client_id.get(client_id) {
            Some(Slot::Online(online)) => online.clone(),
            _ => return false,
        };
        holder.evict_and_wait(why).await;
        true
    }

    /// Calls `online` or `parked` with each client id.
    pub fn for_each(
        &self,
        mut online: impl FnMut(&str, &Details),
        mut parked: impl FnMut(&str, &Parked),
    ) {
        for (client_id, slot) in &self.slots.lock().by_client_id {
            match slot {
                Slot::Parked(slot) => parked(client_id, slot),
                Slot::Online(slot) => {
                    if let Some(details) = slot.details.get() {
                        online(client_id, details);
                    }
                }
            }
        }
    }

    /// Wakes the task of every connection.
    pub fn ring_all(&self) {
        for online in self.slots.lock().online() {
            online.bell.ring();
        }
    }

    /// Connected clients and parked sessions.
    pub fn counts(&self) -> (usize, usize) {
        let slots = self.slots.lock();
        (slots.online, slots.by_client_id.len() - slots.online)
    }
}

impl Slots {
    fn online(&self) -> impl Iterator<Item = &Arc<Online>> {
        self.by_client_id.values().filter_map(|slot| match slot {
            Slot::Online(online) => Some(online),
            Slot::Parked(_) => None,
        })
    }

    fn parked(&self) -> impl Iterator<Item = (&String, &Parked)> {
        self.by_client_id
            .iter()
            .filter_map(|(id, slot)| match slot {
                Slot::Parked(parked) => Some((id, &**parked)),
                Slot::Online(_) => None,
            })
    }

    fn take_parked(&mut self, client_id: &str) -> Option<Parked> {
        match self.by_client_id.remove(client_id)? {
            Slot::Parked(parked) => Some(*parked),
            online @ Slot::Online(_) => {
                self.by_client_id.insert(client_id.to_owned(), online);
                None
            }
        }
    }

    /// Of the sessions of the user who has most of them: one user must not push out the others'.
    fn take_first_to_expire(&mut self) -> Option<(String, Parked)> {
        let mut users: FxHashMap<Option<&str>, usize> = FxHashMap::default();
        for (_, parked) in self.parked() {
            *users.entry(parked.session.user()).or_default() += 1;
        }
        let (_, id) = self
            .parked()
            .map(|(id, parked)| {
                let of_user = users[&parked.session.user()];
                ((Reverse(of_user), parked.expires), id.clone())
            })
            .min()?;
        let parked = self.take_parked(&id)?;
        Some((id, parked))
    }
}
