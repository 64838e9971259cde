//! What `headgate cluster status` shows.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::clock::Moment;
use super::members::Member;
use super::node::View;

pub(super) const WENT_BACK: &str = "somebody has made the bucket anew, so that fencing tokens would begin again: \
                                    delete it, and a gateway makes it as it has to be";

/// The cluster as one gateway sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub site: String,
    pub gateway: String,
    /// Whether the servers have answered within a lease.
    pub connected: bool,
    /// Whose the leadership is, as far as is known.
    pub leader: Option<String>,
    /// The fencing token, if this gateway leads.
    pub leads_with: Option<u64>,
    pub shards: u16,
    /// Those that this gateway acts for.
    pub owned: Vec<u16>,
    /// How many shards each gateway has.
    pub owners: BTreeMap<String, u16>,
    pub members: Vec<Member>,
    /// Two gateways of one name, or such that divide topics otherwise: this one does nothing until that is mended.
    pub stands_back: bool,
    pub problem: Option<String>,
}

impl Status {
    pub(super) fn of(site: &str, view: &View, now: Moment) -> Status {
        let mut owners = BTreeMap::new();
        for owner in view.shards_are.iter().flatten() {
            *owners.entry(owner.clone()).or_default() += 1;
        }
        let owned = (0..)
            .zip(&view.shards)
            .filter(|(_, holding)| holding.is_some_and(|it| now < it.until));
        let objection = view.objection.as_ref();
        let went_back = view.went_back.then(|| WENT_BACK.to_owned());
        Status {
            site: site.into(),
            gateway: view.gateway.clone(),
            connected: now < view.connected_until,
            leader: view.leader_is.clone(),
            leads_with: view.leader.filter(|it| now < it.until).map(|it| it.token),
            shards: view.shards.len() as u16,
            owned: owned.map(|(shard, _)| shard).collect(),
            owners,
            members: view.members.clone(),
            stands_back: objection.is_some_and(|(_, stands_back)| *stands_back),
            problem: objection
                .map(|(objection, _)| objection.to_string())
                .or(went_back)
                .or(view.problem.clone()),
        }
    }
}
