//! What alert rules and the dashboard ask for is what the gateway serves.

use std::collections::BTreeSet;

use crate::apps::built;
use crate::gateway::Home;

/// The names of metrics in a text.
fn names(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c: char| !is_part(c));
    let names = words.filter(|word| word.starts_with("headgate_"));
    names.map(str::to_owned).collect()
}

#[test]
fn every_metric_that_alerts_and_the_dashboard_use_is_served() {
    let gateway = Home::new().start();
    gateway.install(&built("unit-convert"));
    let (_, metrics) = gateway.http("/metrics");
    let served: BTreeSet<_> = metrics
        .lines()
        .filter_map(|line| line.split(['{', ' ']).next())
        .collect();
    let docs = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    for file in ["alerts.yml", "alerts.test.yml", "grafana-dashboard.json"] {
        let used = names(&std::fs::read_to_string(docs.join(file)).unwrap());
        assert!(used.len() > 5, "{file}: {used:?}");
        for name in used {
            assert!(served.contains(&*name), "{file}: {name} is not served");
        }
    }
}
