//! What other edges need of the broker: who may come in, and the way for what they send.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use rustls::pki_types::CertificateDer;
use tokio::sync::watch;

use super::Shared;
use super::access::{Identity, Login, LoginRefused, Permissions};
use super::certificate::CertificateNames;
use super::intake::Intake;
use super::large_packets::Places;
use crate::dead_letters::{DeadLetter, Reason};
use crate::event::Topic;

/// A way in beside MQTT, by the same rules. Cheap to clone.
#[derive(Clone)]
pub struct Door {
    shared: Arc<Shared>,
}

/// A client that was let in.
pub struct Entrant {
    identity: Identity,
    certificates: Option<Box<[CertificateDer<'static>]>>,
    pub permissions: Arc<Permissions>,
}

impl Entrant {
    pub fn user(&self) -> Option<&str> {
        self.identity.user()
    }

    /// When it has to log in again.
    pub fn expires(&self) -> Option<Instant> {
        self.identity.expires()
    }
}

impl Door {
    pub(super) fn new(shared: Arc<Shared>) -> Door {
        Door { shared }
    }

    /// Whether who shows nothing is let in from there.
    pub fn admits_anonymous(&self, peer: SocketAddr) -> bool {
        self.shared.access.admits_anonymous(peer)
    }

    /// Finds out who a client is that calls itself `name`. `certificates` are verified, its own first.
    pub async fn enter(
        &self,
        name: &str,
        user: Option<&str>,
        password: Option<&[u8]>,
        certificates: Option<&[CertificateDer<'static>]>,
        peer: SocketAddr,
    ) -> Result<Entrant, LoginRefused> {
        let own = certificates.and_then(<[_]>::first);
        let names = own.map(|own| CertificateNames::of(own));
        let login = Login {
            user,
            password,
            certificate: names.as_ref(),
            peer,
        };
        let identity = self.shared.access.log_in(login).await?;
        Ok(Entrant {
            permissions: self.shared.access.permissions(&identity, name),
            identity,
            certificates: certificates.map(Box::from),
        })
    }

    /// Whether it would still be let in. To be asked at each of [`Door::changes`].
    pub fn admits(&self, entrant: &Entrant) -> bool {
        let certificates = entrant.certificates.as_deref();
        self.shared.access.still_valid(&entrant.identity)
            && certificates.is_none_or(|certificates| self.shared.vouches_for(certificates))
    }

    /// Tells when users, keys, rules or certificates have been read anew.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.shared.access_changed.subscribe()
    }

    /// From now on what went out of this gateway does not come in again: what names it as one of those that it
    /// came over.
    pub fn know_own(&self, gateway: &Arc<str>) {
        // It has one name, as long as it runs.
        let _ = self.shared.gateway.set(gateway.clone());
    }

    pub fn intake(&self) -> Intake {
        Intake::new(self.shared.clone())
    }

    /// Keeps what a client must not publish as a dead letter.
    pub fn bury_denied(&self, client: &str, topic: &Topic, payload: &[u8], now: Instant) {
        let letters = &self.shared.mailboxes.dead_letters;
        letters.add(Reason::Denied, now, || {
            DeadLetter::new(Reason::Denied, client, topic, payload, 1)
        });
    }

    /// Where there is room for what is large and on its way in: that of MQTT clients, too.
    pub(crate) fn places(&self) -> &Places {
        &self.shared.places
    }

    /// Whether a line about a client may be logged: as many as MQTT has, together with it.
    pub fn may_log(&self) -> bool {
        self.shared.may_log()
    }
}
