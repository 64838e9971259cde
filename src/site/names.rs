//! What the site's streams and subjects are called.

use super::Seat;

/// Of one site.
#[derive(Clone, Debug)]
pub struct Names {
    site: String,
}

impl Names {
    pub fn new(site: &str) -> Names {
        Names { site: site.into() }
    }

    /// The template of the subjects of what a gateway ships for the site.
    /// The number of the shard comes before the topic.
    pub const SUBJECT: &'static str = "headgate-site.{site}.{gateway}.{topic}";

    /// So many tokens come before the topic then.
    pub(super) const BEFORE_TOPIC: usize = 4;

    /// The stream to which a gateway ships for the site.
    pub fn events_stream(&self, gateway: &str) -> String {
        let mut name = format!("HEADGATE_{}_EVENTS_", self.site);
        for byte in gateway.bytes() {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' => name.push(byte.into()),
                // As in the keys of the cluster's bucket.
                _ => name.push_str(&format!("={byte:02x}")),
            }
        }
        name
    }

    /// All of what a shard's gateways ship; of all shards if it is none.
    pub(super) fn events(&self, seat: Seat) -> String {
        match seat {
            Seat::Whole => format!("headgate-site.{}.>", self.site),
            Seat::Shard(shard) => format!("headgate-site.{}.*.{shard}.>", self.site),
        }
    }

    /// The stream of the logs.
    pub(super) fn log_stream(&self) -> String {
        format!("HEADGATE_{}_STATE", self.site)
    }

    pub(super) fn logs(&self) -> String {
        format!("headgate-state.{}.>", self.site)
    }

    /// The subject of a log.
    pub(super) fn log(&self, worker: &str, seat: Seat) -> String {
        let seat = match seat {
            Seat::Whole => "whole".to_owned(),
            Seat::Shard(shard) => shard.to_string(),
        };
        // Names of apps have dots.
        let worker = worker.replace('.', "=");
        format!("headgate-state.{}.{worker}.{seat}", self.site)
    }
}
