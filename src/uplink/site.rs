//! This gateway's part in the cluster of its site, on the connection of a link.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::connection::{State, told_to_stop, until_up};
use super::links::ClusterSettings;
use super::progress::LinkProgress;
use crate::cluster::{Cluster, Config};

/// Takes part whenever there is a connection, until the gateway ends.
pub(super) async fn take_part(
    settings: ClusterSettings,
    gateway: Arc<str>,
    site: Arc<str>,
    mut state: State,
    progress: Arc<LinkProgress>,
    mut stop: watch::Receiver<bool>,
) {
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
        match Cluster::start(config.clone(), connected.client) {
            Ok(cluster) => *progress.cluster.lock() = Some(cluster),
            Err(error) => {
                progress.failed(&error.to_string());
                return;
            }
        }
        // A connection that is merely lost comes back, and the cluster with it.
        let given_up = async {
            let _ = state.wait_for(Option::is_none).await;
        };
        tokio::select! {
            () = given_up => {}
            () = told_to_stop(&mut stop) => {}
        }
        let cluster = progress.cluster.lock().take();
        if let Some(cluster) = cluster {
            cluster.shutdown().await;
        }
    }
}
