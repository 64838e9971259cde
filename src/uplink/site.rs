//! This gateway's part in the cluster of its site, on the connection of a link.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::connection::{State, told_to_stop, until_up};
use super::links::ClusterSettings;
use super::progress::LinkProgress;
use super::stream;
use crate::cluster::{Cluster, Config};
use crate::remote::Remote;
use crate::site::{Names, Room, Workers};

/// A gateway of a site.
pub(super) struct Part {
    pub(super) settings: ClusterSettings,
    pub(super) gateway: Arc<str>,
    pub(super) site: Arc<str>,
    pub(super) progress: Arc<LinkProgress>,
    pub(super) workers: Workers,
    pub(super) remote: Arc<Remote>,
}

/// Takes part whenever there is a connection, until the gateway ends.
pub(super) async fn take_part(part: Part, mut state: State, mut stop: watch::Receiver<bool>) {
    let Part {
        settings,
        gateway,
        site,
        progress,
        workers,
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
        let (node, changed) = (cluster.node().clone(), cluster.changed());
        *progress.cluster.lock() = Some(cluster);
        let (end_seats, ending) = watch::channel(false);
        let seats = progress.seats.clone();
        let seats = seats.run(room, workers.clone(), node, changed, ending);
        let seats = tokio::spawn(seats);
        // A connection that is merely lost comes back, and the cluster with it.
        let given_up = async {
            let _ = state.wait_for(Option::is_none).await;
        };
        tokio::select! {
            () = given_up => {}
            () = told_to_stop(&mut stop) => {}
        }
        // Rights are given back when nothing is done on their grounds any more.
        end_seats.send_replace(true);
        if let Err(error) = seats.await {
            progress.failed(&format!("what acts for the site has failed: {error}"));
        }
        let cluster = progress.cluster.lock().take();
        if let Some(cluster) = cluster {
            cluster.shutdown().await;
        }
    }
}
