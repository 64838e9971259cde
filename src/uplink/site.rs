//! This gateway's part in the cluster of its site, on the connection of a link.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;

use super::connection::{State, told_to_stop, until_up};
use super::links::ClusterSettings;
use super::progress::LinkProgress;
use super::stream;
use crate::cluster::{Cluster, Config};
use crate::dead_letters::DeadLetters;
use crate::event::TopicFilter;
use crate::remote::Remote;
use crate::site::{Names, Room, Workers};

/// A gateway of a site.
#[derive(Clone)]
pub(super) struct Part {
    pub(super) settings: ClusterSettings,
    pub(super) topics: Vec<TopicFilter>,
    pub(super) gateway: Arc<str>,
    pub(super) site: Arc<str>,
    pub(super) progress: Arc<LinkProgress>,
    pub(super) workers: Workers,
    pub(super) dead_letters: Arc<DeadLetters>,
    pub(super) remote: Arc<Remote>,
}

/// Takes part whenever there is a connection, until the gateway ends.
pub(super) async fn take_part(part: Part, mut state: State, mut stop: watch::Receiver<bool>) {
    let Part {
        settings,
        topics,
        gateway,
        site,
        progress,
        workers,
        dead_letters,
        remote,
    } = part;
    let config = Config {
        site: site.to_string(),
        gateway: gateway.to_string(),
        host: rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned(),
        shards: settings.shards,
        lease: Duration::from_secs(settings.lease_s.into()),
        replicas: settings.replicas.into(),
    };
    loop {
        let connected = tokio::select! {
            connected = until_up(&mut state) => connected,
            () = told_to_stop(&mut stop) => return,
        };
        let Some(connected) = connected else {
            return;
        };
        let room = Room {
            context: stream::context(&connected.client),
            remote: remote.clone(),
            names: Names::new(&site),
            gateway: gateway.clone(),
            topics: topics.clone(),
            dead_letters: dead_letters.clone(),
            replicas: config.replicas,
            max_payload: connected.client.server_info().max_payload,
        };
        let cluster = match Cluster::start(config.clone(), connected.client) {
            Ok(cluster) => cluster,
            Err(error) => {
                progress.failed(&error.to_string());
                return;
            }
        };
        let (node, runs, changed) = (cluster.node().clone(), cluster.runs(), cluster.changed());
        *progress.cluster.lock() = Some(cluster);
        let (end_seats, ending) = watch::channel(false);
        let seats = progress.seats.clone();
        // It ends with this.
        let mut acting = JoinSet::new();
        acting.spawn(seats.run(room, workers.clone(), node, runs, changed, ending));
        // A connection that is merely lost comes back, and the cluster with it.
        let given_up = async {
            let _ = state.wait_for(Option::is_none).await;
        };
        let mut defect = None;
        tokio::select! {
            () = given_up => {}
            () = told_to_stop(&mut stop) => {}
            Some(Err(error)) = acting.join_next() => defect = Some(error),
        }
        // Rights are given back when nothing is done on their grounds any more.
        end_seats.send_replace(true);
        while let Some(ended) = acting.join_next().await {
            defect = defect.or(ended.err());
        }
        let cluster = progress.cluster.lock().take();
        if let Some(cluster) = cluster {
            cluster.shutdown().await;
        }
        if let Some(error) = defect {
            std::panic::resume_unwind(error.into_panic());
        }
    }
}
