//! What the rest of the gateway knows of the cluster: a snapshot that is read without locks. The right to
//! act is checked against the clock with each reading, so that it ends in time even if nobody is there to
//! take it away.

use arc_swap::ArcSwap;

use super::clock::{self, Moment};
use super::lease::Holding;
use super::members::{Member, Objection};

/// The cluster as this gateway sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    pub gateway: String,
    pub instance: String,
    /// This gateway leads, until then.
    pub leader: Option<Holding>,
    /// Whose the leadership is, by name.
    pub leader_is: Option<String>,
    /// For each shard: this gateway acts for it, until then.
    pub shards: Vec<Option<Holding>>,
    pub shards_are: Vec<Option<String>>,
    pub members: Vec<Member>,
    /// If nothing is heard before, this gateway is alone from then on.
    pub connected_until: Moment,
    /// And whether it is this gateway that stands back.
    pub objection: Option<(Objection, bool)>,
    /// Somebody has made the bucket anew in such a way that tokens went back.
    pub went_back: bool,
    /// Why the servers can't be reached.
    pub problem: Option<String>,
}

impl View {
    /// Whether they differ in nothing but for how long.
    pub(super) fn says_the_same(&self, other: &View) -> bool {
        let timeless = |view: &View| {
            let mut view = view.clone();
            view.connected_until = Moment::ZERO;
            for holding in view.shards.iter_mut().chain([&mut view.leader]).flatten() {
                holding.until = Moment::ZERO;
            }
            view
        };
        timeless(self) == timeless(other)
    }
}

/// Shared by all who need to know. At first, and without a cluster, it is alone and has the right to nothing.
#[derive(Debug, Default)]
pub struct Node {
    view: ArcSwap<View>,
}

impl Node {
    /// The fencing token, if this gateway leads the site now.
    pub fn leads(&self) -> Option<u64> {
        valid(self.view.load().leader, clock::now())
    }

    /// The fencing token, if this gateway acts for the shard now.
    pub fn owns(&self, shard: u16) -> Option<u64> {
        let holding = self
            .view
            .load()
            .shards
            .get(usize::from(shard))
            .copied()
            .flatten();
        valid(holding, clock::now())
    }

    /// Whether it is a lease ago, or more, that the cluster has answered.
    pub fn is_alone(&self) -> bool {
        self.view.load().connected_until <= clock::now()
    }

    pub fn view(&self) -> std::sync::Arc<View> {
        self.view.load_full()
    }

    pub(super) fn publish(&self, view: View) {
        self.view.store(view.into());
    }
}

fn valid(holding: Option<Holding>, now: Moment) -> Option<u64> {
    holding
        .filter(|holding| now < holding.until)
        .map(|holding| holding.token)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_right_ends_by_the_clock_although_nobody_takes_it_away() {
        let node = Node::default();
        assert!(node.is_alone());
        assert_eq!((node.leads(), node.owns(0)), (None, None));
        let until = |until| Some(Holding { token: 7, until });
        let later = clock::now() + Duration::from_secs(60);
        node.publish(View {
            leader: until(later),
            shards: vec![until(clock::now()), until(later)],
            connected_until: later,
            ..View::default()
        });
        assert!(!node.is_alone());
        assert_eq!(node.leads(), Some(7));
        assert_eq!(
            [0, 1, 2].map(|shard| node.owns(shard)),
            [None, Some(7), None]
        );
    }
}
