//! What the site's streams and subjects are called.

use super::Seat;
use crate::event::TopicFilter;
use crate::uplink::filters_of;

/// With more of them, it is less to look at each event here.
const MOST_FILTERS: usize = 16;

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

    /// Whether the stream is one of the site's.
    pub fn has(&self, stream: &str) -> bool {
        stream == self.log_stream() || stream.starts_with(&self.events_streams())
    }

    fn events_streams(&self) -> String {
        format!("HEADGATE_{}_EVENTS_", self.site)
    }

    /// The stream to which a gateway ships for the site.
    pub fn events_stream(&self, gateway: &str) -> String {
        let mut name = self.events_streams();
        for byte in gateway.bytes() {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' => name.push(byte.into()),
                // As in the keys of the cluster's bucket.
                _ => name.push_str(&format!("={byte:02x}")),
            }
        }
        name
    }

    /// All of what gateways ship for the site.
    pub(super) fn all_events(&self) -> String {
        format!("headgate-site.{}.>", self.site)
    }

    /// What of it a seat gets that wants these topics: filters of which no two match the same, as servers want it.
    pub(super) fn events(&self, seat: Seat, wanted: &[TopicFilter]) -> Vec<String> {
        let before = match seat {
            Seat::Whole => format!("headgate-site.{}.*.*.", self.site),
            Seat::Shard(shard) => format!("headgate-site.{}.*.{shard}.", self.site),
        };
        let subjects = wanted.iter().flat_map(filters_of);
        let subjects: Vec<String> = subjects
            .map(|subject| format!("{before}{subject}"))
            .collect();
        let apart = (1..subjects.len()).all(|at| {
            subjects[..at]
                .iter()
                .all(|other| !overlap(other, &subjects[at]))
        });
        match apart && !subjects.is_empty() && subjects.len() <= MOST_FILTERS {
            true => subjects,
            false => vec![format!("{before}>")],
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

/// Those of which none of `shipped` has anything.
pub(super) fn not_shipped<'a>(
    wanted: &'a [TopicFilter],
    shipped: &[TopicFilter],
) -> impl Iterator<Item = &'a TopicFilter> {
    let shipped: Vec<String> = shipped.iter().flat_map(filters_of).collect();
    wanted.iter().filter(move |filter| {
        let wanted = filters_of(filter);
        !wanted
            .iter()
            .any(|wanted| shipped.iter().any(|shipped| overlap(wanted, shipped)))
    })
}

/// Whether there is a subject that both filters match.
fn overlap(one: &str, other: &str) -> bool {
    let (mut one, mut other) = (one.split('.'), other.split('.'));
    loop {
        match (one.next(), other.next()) {
            (Some(">"), Some(_)) | (Some(_), Some(">")) | (None, None) => return true,
            (Some("*"), Some(_)) | (Some(_), Some("*")) => {}
            (Some(a), Some(b)) if a == b => {}
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(seat: Seat, topics: &[&str]) -> Vec<String> {
        let wanted: Vec<_> = topics
            .iter()
            .map(|topic| TopicFilter::new(*topic).unwrap())
            .collect();
        Names::new("hall").events(seat, &wanted)
    }

    #[test]
    fn what_nobody_ships_is_found() {
        let filters = |filters: &[&'static str]| -> Vec<TopicFilter> {
            let filters = filters.iter().map(|filter| TopicFilter::new(*filter));
            filters.collect::<Result<_, _>>().unwrap()
        };
        let wanted = filters(&["plant/#", "plant/+/heat", "lab/x", "#", "line/1"]);
        let missing = |shipped: &[&'static str]| -> Vec<String> {
            let shipped = filters(shipped);
            let missing = not_shipped(&wanted, &shipped);
            missing.map(|filter| filter.to_string()).collect()
        };
        assert_eq!(missing(&["plant/1/#", "lab/+"]), ["line/1"]);
        assert_eq!(missing(&["#"]), [""; 0]);
        assert_eq!(missing(&[]).len(), wanted.len());
    }

    #[test]
    fn a_seat_gets_what_its_worker_wants() {
        assert_eq!(
            events(Seat::Whole, &["a/+/b c", "x/#"]),
            [
                "headgate-site.hall.*.*.a.*.b%20c",
                "headgate-site.hall.*.*.x",
                "headgate-site.hall.*.*.x.>"
            ]
        );
        assert_eq!(events(Seat::Shard(7), &["#"]), ["headgate-site.hall.*.7.>"]);
    }

    #[test]
    fn where_filters_overlap_it_gets_all() {
        for topics in [
            &["a/+", "a/b"][..],
            &["a/#", "a"],
            &["+/b", "a/+"],
            &["a", "a"],
            &[],
        ] {
            assert_eq!(
                events(Seat::Whole, topics),
                ["headgate-site.hall.*.*.>"],
                "{topics:?}"
            );
        }
    }

    #[test]
    fn each_gateway_has_a_stream_of_its_own() {
        let names = Names::new("hall");
        assert_eq!(
            names.events_stream("press-7"),
            "HEADGATE_hall_EVENTS_press-7"
        );
        assert_eq!(
            names.events_stream("press.7"),
            "HEADGATE_hall_EVENTS_press=2e7"
        );
        assert_eq!(
            names.log("a.b", Seat::Shard(3)),
            "headgate-state.hall.a=b.3"
        );
    }
}
