//! Guests that take their batches in columns.

use super::house::*;
use crate::apps::AppState;

/// Returns the columns as they came; but if the first payload begins with a digit, with one thing
/// about them changed.
const COLUMNS: &str = r#"(module
  (memory (export "memory") 8)
  (global $top (mut i32) (i32.const 4096))
  (func (export "cabi_realloc") (param i32 i32) (param $align i32) (param $size i32) (result i32)
    (local $at i32)
    (local.set $at
      (i32.and
        (i32.add (global.get $top) (i32.sub (local.get $align) (i32.const 1)))
        (i32.sub (i32.const 0) (local.get $align))))
    (global.set $top (i32.add (local.get $at) (local.get $size)))
    (local.get $at))
  (func (export "configure") (result i32) (i32.const 0))
  (func (export "cabi_post_handle-columns") (param i32) (global.set $top (i32.const 4096)))

  ;; result<event-columns, string> at 64
  (func (export "handle-columns")
    (param $topics i32) (param $topics_len i32) (param $topic_ends i32) (param $topic_ends_len i32)
    (param $payloads i32) (param $payloads_len i32)
    (param $payload_ends i32) (param $payload_ends_len i32)
    (param $timestamps i32) (param $timestamps_len i32) (result i32)
    (local $what i32)
    (local.set $what (i32.load8_u (local.get $payloads)))
    (i32.store8 (i32.const 64) (i32.const 0))

    ;; 1: a topic's end less than there are events
    (if (i32.eq (local.get $what) (i32.const 0x31))
      (then (local.set $topic_ends_len (i32.sub (local.get $topic_ends_len) (i32.const 1)))))
    ;; 2: the first payload ends far outside
    (if (i32.eq (local.get $what) (i32.const 0x32))
      (then (i32.store (local.get $payload_ends) (i32.const -1))))
    ;; 3: a byte of payloads that is no event's
    (if (i32.eq (local.get $what) (i32.const 0x33))
      (then (local.set $payloads_len (i32.add (local.get $payloads_len) (i32.const 1)))))
    ;; 4: a list that lies outside of the memory
    (if (i32.eq (local.get $what) (i32.const 0x34))
      (then (local.set $timestamps (i32.const 0x7ffffff8))))
    ;; 5: topics that are not UTF-8
    (if (i32.eq (local.get $what) (i32.const 0x35))
      (then (i32.store8 (local.get $topics) (i32.const 0xff))))
    ;; 6: an error
    (if (i32.eq (local.get $what) (i32.const 0x36))
      (then
        (i32.store8 (i32.const 64) (i32.const 1))
        (i32.store (i32.const 68) (local.get $payloads))
        (i32.store (i32.const 72) (local.get $payloads_len))
        (return (i32.const 64))))

    (i32.store (i32.const 68) (local.get $topics))
    (i32.store (i32.const 72) (local.get $topics_len))
    (i32.store (i32.const 76) (local.get $topic_ends))
    (i32.store (i32.const 80) (local.get $topic_ends_len))
    (i32.store (i32.const 84) (local.get $payloads))
    (i32.store (i32.const 88) (local.get $payloads_len))
    (i32.store (i32.const 92) (local.get $payload_ends))
    (i32.store (i32.const 96) (local.get $payload_ends_len))
    (i32.store (i32.const 100) (local.get $timestamps))
    (i32.store (i32.const 104) (local.get $timestamps_len))
    (i32.const 64)))"#;

fn house() -> House {
    let house = House::new();
    let component = component_for(COLUMNS, "app-columns");
    let info = house.apps.install(&manifest("a"), &component).unwrap();
    assert_eq!(info.state, AppState::Running, "{info:#?}");
    house
}

#[test]
fn columns_go_in_and_come_out() {
    let house = house();
    house.send("a/in", &["", "first", "\u{e4}", "last"]);
    house.until_done("a");
    let expected = ["a a/in ", "a a/in first", "a a/in \u{e4}", "a a/in last"];
    assert_eq!(house.sink.lines(), expected);
}

#[test]
fn wrong_columns_cost_the_event() {
    for (payload, expected, kills) in [
        (
            "1",
            "`handle-columns` returned no batch: the columns are not of one length",
            false,
        ),
        ("2", "does not end where it can", false),
        ("3", "the columns hold more than their events", false),
        ("4", "out of bounds", true),
        ("5", "utf-8", true),
        ("6 is an error", "returned an error: 6 is an error", false),
    ] {
        let house = house();
        house.send("a/in", &["before"]);
        house.until_done("a");
        house.send("a/in", &[payload]);
        let info = house.until_done("a");
        let error = info.last_error.unwrap();
        assert!(error.contains(expected), "{payload}: {error}");
        let counters = info.counters;
        assert_eq!((counters.handled, counters.failed), (1, 1), "{payload}");
        assert_eq!(info.restarts.trap > 0, kills, "{payload}: {error}");
        house.until_state("a", AppState::Running);
        house.send("a/in", &["after"]);
        house.until_done("a");
        assert_eq!(house.sink.lines(), ["a a/in before", "a a/in after"]);
    }
}

#[test]
fn the_signature_of_handle_columns_is_checked() {
    let house = House::new();
    let module = r#"(module
        (memory (export "memory") 1)
        (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) unreachable)
        (func (export "configure") (result i32) unreachable)
        (func (export "handle-columns") (param i32 i32) (result i32) unreachable))"#;
    let component = component_for(module, "other-columns");
    let error = house.apps.install(&manifest("a"), &component).unwrap_err();
    let error = error.to_string();
    let expected = "the export `handle-columns` has the wrong signature";
    assert!(error.contains(expected), "{error}");
}
