//! What apps measure themselves.

use super::house::*;
use crate::apps::AppState;

fn text(house: &House) -> String {
    let mut text = String::new();
    house.apps.render_measures(&mut text);
    text
}

#[test]
fn what_an_app_measures_is_in_the_metrics_until_the_app_is_removed() {
    let house = House::new();
    house.install_keeper("a", "");
    assert_eq!(text(&house), "");
    assert_eq!(house.ask("a", &["mseen", "mseen", "plevel"]), ["", "", ""]);
    let measured = text(&house);
    for line in [
        "headgate_app_counter_total{app=\"a\",name=\"seen\"} 14",
        "headgate_app_gauge{app=\"a\",name=\"level\"} 2.5",
    ] {
        assert!(measured.lines().any(|found| found == line), "{measured}");
    }
    house.apps.restart("a").unwrap();
    assert_eq!(text(&house), measured);
    house.apps.remove("a").unwrap();
    assert_eq!(text(&house), "");
}

#[test]
fn a_call_that_fails_measures_nothing() {
    let house = House::new();
    house.install_keeper("a", "batch_deadline_ms = 20");
    for (round, end) in ["E", "U", "Z"].into_iter().enumerate() {
        house.ask("a", &["mseen", end]);
        let failed = round as u64 + 1;
        house.eventually("a", "the failure", |info| info.counters.failed == failed);
        house.until_state("a", AppState::Running);
        // Of three calls with the word, the one that went well.
        let line = format!(
            "headgate_app_counter_total{{app=\"a\",name=\"seen\"}} {}",
            7 * failed
        );
        assert!(
            text(&house).lines().any(|found| found == line),
            "{end}: {}",
            text(&house)
        );
    }
}

#[test]
fn bad_names_and_values_are_refused_and_counted() {
    let house = House::new();
    house.install_keeper("a", "");
    const INVALID_NAME: &str = "0";
    const INVALID_VALUE: &str = "1";
    const OTHER_KIND: &str = "2";
    const LIMIT: &str = "3";
    let long = format!("m{}", "x".repeat(100_000));
    assert_eq!(
        house.ask("a", &["m", "mA", "ma\"}", &long, "qnan", "mok", "pok"]),
        [
            INVALID_NAME,
            INVALID_NAME,
            INVALID_NAME,
            INVALID_NAME,
            INVALID_VALUE,
            "",
            OTHER_KIND
        ]
    );
    let many: Vec<_> = (0..70).map(|number| format!("mn{number}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let answers = house.ask("a", &many);
    assert_eq!(
        answers.iter().filter(|answer| *answer == LIMIT).count(),
        70 - 63
    );
    assert_eq!(house.info("a").counters.refused_calls.metrics, 6 + 7);
    assert_eq!(
        text(&house)
            .lines()
            .filter(|line| line.contains("counter_total{"))
            .count(),
        64
    );
}
