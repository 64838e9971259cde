//! What one client may do, as its session, its subscriptions and its connection see it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use arc_swap::ArcSwap;

use super::Identity;
use super::acl::ClientRules;
use crate::event::TopicFilter;

/// What one client may do. The rules can change while it is connected; the object stays the same.
#[derive(Debug)]
pub struct Permissions {
    /// None: everything.
    restricted: Option<Restricted>,
}

#[derive(Debug)]
struct Restricted {
    client: Client,
    rules: ArcSwap<ClientRules>,
    /// Set after the rules, so that what was worked out under it is never newer than what it says.
    generation: AtomicU64,
}

/// Whom permissions are worked out for, again at each reload.
#[derive(Debug)]
pub(super) struct Client {
    pub identity: Identity,
    pub client_id: String,
}

impl Permissions {
    /// Where there are no rules.
    pub fn everything() -> Arc<Permissions> {
        static EVERYTHING: LazyLock<Arc<Permissions>> =
            LazyLock::new(|| Arc::new(Permissions { restricted: None }));
        EVERYTHING.clone()
    }

    pub(super) fn restricted(client: Client, rules: ClientRules, generation: u64) -> Permissions {
        Permissions {
            restricted: Some(Restricted {
                client,
                rules: ArcSwap::from_pointee(rules),
                generation: AtomicU64::new(generation),
            }),
        }
    }

    /// Replaces the rules by what `rules_for` makes of the client.
    pub(super) fn update(&self, rules_for: impl FnOnce(&Client) -> ClientRules, generation: u64) {
        if let Some(restricted) = &self.restricted {
            let rules = rules_for(&restricted.client);
            restricted.rules.store(Arc::new(rules));
            restricted.generation.store(generation, Ordering::Release);
        }
    }

    /// Counts the reloads: answers that were remembered under another generation count no more.
    /// To be read before asking.
    pub fn generation(&self) -> u64 {
        let restricted = self.restricted.as_ref();
        restricted.map_or(0, |restricted| {
            restricted.generation.load(Ordering::Acquire)
        })
    }

    pub fn may_publish(&self, topic: &str) -> bool {
        let restricted = self.restricted.as_ref();
        restricted.is_none_or(|restricted| restricted.rules.load().may_publish(topic))
    }

    /// To be asked for each topic, whatever the subscription: a wildcard may match what is denied.
    pub fn may_receive(&self, topic: &str) -> bool {
        let restricted = self.restricted.as_ref();
        restricted.is_none_or(|restricted| restricted.rules.load().may_receive(topic))
    }

    /// False only if nothing that `filter` matches could ever be received. Of a shared subscription,
    /// it is the filter without `$share/GROUP/`.
    pub fn may_subscribe(&self, filter: &TopicFilter) -> bool {
        let restricted = self.restricted.as_ref();
        restricted.is_none_or(|restricted| restricted.rules.load().may_subscribe(filter))
    }
}
