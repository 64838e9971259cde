//! What links have done, for people, scripts and metrics.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
use serde::Serialize;

use super::links::Link;
use super::window::Acknowledged;
use crate::cluster::{self, Cluster};
use crate::event::unix_time_ns;
use crate::pipeline::Latency;
use crate::site::{Missing, SeatStatus, Seats};

/// A link.
pub(super) struct LinkProgress {
    pub(super) name: String,
    pub(super) kind: &'static str,
    connected: AtomicBool,
    connections: AtomicU64,
    error: Mutex<Option<String>>,
    pub(super) ships: Vec<Arc<ShipProgress>>,
    pub(super) takes: Vec<Arc<TakeProgress>>,
    in_site: bool,
    /// While it takes part in that.
    pub(super) cluster: Mutex<Option<Cluster>>,
    /// For what of the site this gateway acts.
    pub(super) seats: Seats,
}

/// What is shipped to one destination.
#[derive(Default)]
pub(super) struct ShipProgress {
    pub(super) name: String,
    pub(super) to: String,
    /// All events before this one were taken by the other side.
    pub(super) cursor: AtomicU64,
    /// All events before this one are safe there.
    pub(super) safe: AtomicU64,
    pub(super) events: AtomicU64,
    pub(super) bytes: AtomicU64,
    /// Sent again: nobody knew whether they had arrived.
    pub(super) resent: AtomicU64,
    /// Of them those that had.
    pub(super) duplicates: AtomicU64,
    /// Those that the other side never takes: dead letters.
    pub(super) refused: AtomicU64,
    /// Gone from the journal before they were shipped.
    pub(super) lost: AtomicU64,
    /// What the other side had acknowledged and then lost.
    pub(super) lost_upstream: AtomicU64,
    pub(super) in_flight: AtomicU64,
    pub(super) latency: Latency,
    /// When the oldest event came that waits: nanoseconds since 1970; 0 if none does.
    pub(super) oldest_ns: AtomicU64,
    error: Mutex<Option<String>>,
}

#[derive(Default)]
pub(super) struct TakeProgress {
    pub(super) name: String,
    pub(super) from: String,
    pub(super) events: AtomicU64,
    pub(super) bytes: AtomicU64,
    /// What can be no event here: its topic.
    pub(super) refused: AtomicU64,
    error: Mutex<Option<String>>,
}

/// A link, as `headgate uplink status` shows it. Totals are since the start.
#[derive(Clone, Debug, Serialize)]
pub struct LinkStatus {
    pub name: String,
    pub kind: &'static str,
    pub connected: bool,
    pub connections: u64,
    /// What went wrong last, until it goes well again.
    pub error: Option<String>,
    pub ship: Vec<ShipStatus>,
    pub take: Vec<TakeStatus>,
    /// Of the site, where this link has it.
    pub cluster: Option<cluster::Status>,
    /// Whether the link has `cluster`.
    pub in_site: bool,
    /// For what of the site this gateway acts.
    pub seats: Vec<SeatStatus>,
    /// What another one is to run, and doesn't.
    pub missing: Vec<Missing>,
}

#[derive(Clone, Debug, Serialize)]
pub struct ShipStatus {
    pub name: String,
    pub to: String,
    pub cursor: u64,
    pub safe: u64,
    /// Events of the journal that it has not come past.
    pub behind: u64,
    /// How old the oldest event is that waits.
    pub behind_s: f64,
    pub in_flight: u64,
    pub events: u64,
    pub bytes: u64,
    pub resent: u64,
    pub duplicates: u64,
    pub refused: u64,
    pub lost: u64,
    pub lost_upstream: u64,
    pub ack_p50_us: u64,
    pub ack_p99_us: u64,
    pub error: Option<String>,
}

#[derive(Clone, Debug, Serialize)]
pub struct TakeStatus {
    pub name: String,
    pub from: String,
    pub events: u64,
    pub bytes: u64,
    pub refused: u64,
    pub error: Option<String>,
}

/// Sets what went wrong; true if that is news.
fn set(error: &Mutex<Option<String>>, why: &str) -> bool {
    let mut error = error.lock();
    let is_news = error.as_deref() != Some(why);
    if is_news {
        *error = Some(why.to_owned());
    }
    is_news
}

impl LinkProgress {
    pub(super) fn new(
        link: &Link,
        ships: Vec<Arc<ShipProgress>>,
        takes: Vec<Arc<TakeProgress>>,
    ) -> LinkProgress {
        LinkProgress {
            name: link.name.clone(),
            kind: link.kind.as_str(),
            connected: AtomicBool::new(false),
            connections: AtomicU64::new(0),
            error: Mutex::new(None),
            ships,
            takes,
            in_site: link.cluster.is_some(),
            cluster: Mutex::new(None),
            seats: Seats::default(),
        }
    }

    pub(super) fn connected(&self) {
        if !self.connected.swap(true, Ordering::Relaxed) {
            self.connections.fetch_add(1, Ordering::Relaxed);
        }
        *self.error.lock() = None;
    }

    pub(super) fn disconnected(&self) {
        if self.connected.swap(false, Ordering::Relaxed) {
            tracing::warn!(
                link = self.name,
                "the link is down; what it is to ship stays in the journal"
            );
        }
    }

    pub(super) fn failed(&self, why: &str) {
        if set(&self.error, why) {
            tracing::error!(link = self.name, "{why}");
        }
    }

    /// `next`: the event that the journal gets next.
    pub(super) fn status(&self, next: u64) -> LinkStatus {
        LinkStatus {
            name: self.name.clone(),
            kind: self.kind,
            connected: self.connected.load(Ordering::Relaxed),
            connections: self.connections.load(Ordering::Relaxed),
            error: self.error.lock().clone(),
            ship: self.ships.iter().map(|ship| ship.status(next)).collect(),
            take: self.takes.iter().map(|take| take.status()).collect(),
            cluster: self.cluster.lock().as_ref().map(Cluster::status),
            in_site: self.in_site,
            seats: self.seats.status(),
            missing: self.seats.missing(),
        }
    }
}

impl ShipProgress {
    pub(super) fn new(name: &str, to: String) -> ShipProgress {
        ShipProgress {
            name: name.to_owned(),
            to,
            ..ShipProgress::default()
        }
    }

    pub(super) fn failed(&self, link: &str, why: &str) {
        if set(&self.error, why) {
            tracing::error!(link, ship = self.name, "{why}");
        }
    }

    pub(super) fn acknowledged(&self, acknowledged: Acknowledged, duplicate: bool) {
        let latency = acknowledged.sent.map(|sent| sent.elapsed());
        let latencies = latency.into_iter().cycle().take(acknowledged.events);
        self.latency.record(latencies);
        self.events
            .fetch_add(acknowledged.events as u64, Ordering::Relaxed);
        self.bytes
            .fetch_add(acknowledged.bytes as u64, Ordering::Relaxed);
        self.duplicates
            .fetch_add(u64::from(duplicate), Ordering::Relaxed);
        let mut error = self.error.lock();
        if error.is_some() {
            *error = None;
        }
    }

    fn status(&self, next: u64) -> ShipStatus {
        let get = |value: &AtomicU64| value.load(Ordering::Relaxed);
        let cursor = get(&self.cursor);
        let behind_ns = match get(&self.oldest_ns) {
            0 => 0,
            oldest_ns => unix_time_ns().saturating_sub(oldest_ns),
        };
        ShipStatus {
            name: self.name.clone(),
            to: self.to.clone(),
            cursor,
            safe: get(&self.safe),
            behind: next.saturating_sub(cursor),
            behind_s: (behind_ns / 1_000_000) as f64 / 1e3,
            in_flight: get(&self.in_flight),
            events: get(&self.events),
            bytes: get(&self.bytes),
            resent: get(&self.resent),
            duplicates: get(&self.duplicates),
            refused: get(&self.refused),
            lost: get(&self.lost),
            lost_upstream: get(&self.lost_upstream),
            ack_p50_us: self.latency.quantile(0.5).as_micros() as u64,
            ack_p99_us: self.latency.quantile(0.99).as_micros() as u64,
            error: self.error.lock().clone(),
        }
    }
}

impl TakeProgress {
    pub(super) fn new(name: &str, from: String) -> TakeProgress {
        TakeProgress {
            name: name.to_owned(),
            from,
            ..TakeProgress::default()
        }
    }

    pub(super) fn failed(&self, link: &str, why: &str) {
        if set(&self.error, why) {
            tracing::error!(link, take = self.name, "{why}");
        }
    }

    pub(super) fn went_well(&self) {
        let mut error = self.error.lock();
        if error.is_some() {
            *error = None;
        }
    }

    fn status(&self) -> TakeStatus {
        let get = |value: &AtomicU64| value.load(Ordering::Relaxed);
        TakeStatus {
            name: self.name.clone(),
            from: self.from.clone(),
            events: get(&self.events),
            bytes: get(&self.bytes),
            refused: get(&self.refused),
            error: self.error.lock().clone(),
        }
    }
}

/// Puts the counters into the `metrics` crate's recorder.
pub(super) fn record_metrics(links: &[LinkStatus]) {
    for link in links {
        let name = link.name.clone();
        metrics::gauge!("headgate_uplink_connected", "link" => name.clone())
            .set(f64::from(u8::from(link.connected)));
        metrics::counter!("headgate_uplink_connections_total", "link" => name.clone())
            .absolute(link.connections);
        if let Some(cluster) = &link.cluster {
            let set = |metric: &'static str, value: f64| metrics::gauge!(metric).set(value);
            set(
                "headgate_cluster_connected",
                f64::from(u8::from(cluster.connected)),
            );
            set(
                "headgate_cluster_leader",
                f64::from(u8::from(cluster.leads_with.is_some())),
            );
            set("headgate_cluster_members", cluster.members.len() as f64);
            set("headgate_cluster_owned_shards", cluster.owned.len() as f64);
            let acting = link.seats.iter().filter(|seat| seat.acts).count();
            let failing = link.seats.iter().filter(|seat| seat.problem.is_some());
            set("headgate_cluster_acting_seats", acting as f64);
            set("headgate_cluster_failing_seats", failing.count() as f64);
            set("headgate_cluster_missing_apps", link.missing.len() as f64);
        }
        for ship in &link.ship {
            let labels = [("link", name.clone()), ("ship", ship.name.clone())];
            let count =
                |metric: &'static str, value| metrics::counter!(metric, &labels).absolute(value);
            count("headgate_uplink_shipped_events_total", ship.events);
            count("headgate_uplink_shipped_bytes_total", ship.bytes);
            count("headgate_uplink_resent_events_total", ship.resent);
            count("headgate_uplink_duplicate_events_total", ship.duplicates);
            count("headgate_uplink_refused_events_total", ship.refused);
            count("headgate_uplink_lost_events_total", ship.lost);
            count(
                "headgate_uplink_lost_upstream_events_total",
                ship.lost_upstream,
            );
            let set = |metric: &'static str, value| metrics::gauge!(metric, &labels).set(value);
            set("headgate_uplink_behind_events", ship.behind as f64);
            set("headgate_uplink_behind_seconds", ship.behind_s);
            set("headgate_uplink_in_flight_events", ship.in_flight as f64);
            for (quantile, us) in [("0.5", ship.ack_p50_us), ("0.99", ship.ack_p99_us)] {
                let labels = [
                    labels[0].clone(),
                    labels[1].clone(),
                    ("quantile", quantile.to_owned()),
                ];
                metrics::gauge!("headgate_uplink_acknowledgement_seconds", &labels)
                    .set(us as f64 / 1e6);
            }
        }
        for take in &link.take {
            let labels = [("link", name.clone()), ("take", take.name.clone())];
            let count =
                |metric: &'static str, value| metrics::counter!(metric, &labels).absolute(value);
            count("headgate_uplink_taken_events_total", take.events);
            count("headgate_uplink_taken_bytes_total", take.bytes);
            count("headgate_uplink_taken_refused_events_total", take.refused);
        }
    }
}
