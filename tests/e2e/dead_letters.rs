//! `headgate dead-letters`.

use crate::gateway::{Home, assert_for_people};

#[test]
fn nothing_is_dropped_as_long_as_nothing_is() {
    let gateway = Home::new().start();
    assert_eq!(
        gateway.json(&["dead-letters"]),
        serde_json::json!({ "letters": [], "left_out": 0 })
    );
    let shown = gateway.cli(&["dead-letters", "--topic", "plant/#", "-n", "5"]);
    assert_eq!(String::from_utf8_lossy(&shown.stdout), "no dead letters\n");
    assert_eq!(
        gateway.json(&["dead-letters", "purge"]),
        serde_json::json!({ "removed": 0 })
    );
    let (_, metrics) = gateway.http("/metrics");
    assert!(
        metrics.contains("headgate_dead_letters_total{reason=\"queue_full\"} 0"),
        "{metrics}"
    );
}

#[test]
fn a_wrong_filter_is_refused_with_what_is_wrong_about_it() {
    let gateway = Home::new().start();
    let error = gateway.cli_error(&["dead-letters", "--topic", "plant/#/x"]);
    assert_for_people(&error);
    assert!(
        error.contains("plant/#/x") && error.contains("`#` must be the last"),
        "{error}"
    );
}
