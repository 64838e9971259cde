//! What a mapping does over time: ages, late messages, restarts, new versions, explanations, many of them.

use std::time::Duration;

use crate::mappings::{Mapping, Sent, Set};

fn file(additions: &str, mapping: &str) -> String {
    format!(
        "input: {{ uns: {{}} }}\npipeline:\n  processors:\n    - stream_processor:\n        model: {{ name: m, version: v1 }}\n        \
         output_topic: umh.v1.x\n        headgate: {additions}\n        sources: {{ a: umh.v1.x._raw.a, b: \
         umh/v1/x/_raw/b }}\n        mapping: {mapping}\n"
    )
}

fn load(additions: &str, mapping: &str) -> Mapping {
    match Mapping::load(&file(additions, mapping), "m.yaml") {
        Ok((mapping, _)) => mapping,
        Err(error) => panic!("{error}"),
    }
}

/// What a message leads to: paths and values.
fn send(
    mapping: &mut Mapping,
    alias: &str,
    value: &str,
    timestamp_ms: i64,
    now_ms: u64,
) -> Vec<String> {
    let mut sent = Vec::new();
    let payload = format!("{{\"value\":{value},\"timestamp_ms\":{timestamp_ms}}}");
    let topic = format!("umh/v1/x/_raw/{alias}");
    mapping
        .on_message(&topic, payload.as_bytes(), None, now_ms, &mut sent)
        .unwrap();
    texts(&sent)
}

fn texts(sent: &[Sent]) -> Vec<String> {
    sent.iter()
        .map(|sent| {
            let topic = sent.topic.as_str().strip_prefix("umh/v1/x/_m_v1/").unwrap();
            format!("{topic} {}", str::from_utf8(&sent.payload).unwrap())
        })
        .collect()
}

const NONE: [&str; 0] = [];

#[test]
fn a_value_that_is_too_old_is_not_used_and_named() {
    let mut mapping = load(
        "{ max_age: 5s, sources: { b: { max_age: 1h } } }",
        "{ sum: a + b, b: b }",
    );
    assert_eq!(send(&mut mapping, "a", "1", 1, 1_000), NONE);
    assert_eq!(
        send(&mut mapping, "b", "2", 2, 6_000),
        [
            "sum {\"value\":3,\"timestamp_ms\":2}",
            "b {\"value\":2,\"timestamp_ms\":2}"
        ]
    );
    assert_eq!(
        send(&mut mapping, "b", "2", 3, 6_001),
        ["b {\"value\":2,\"timestamp_ms\":3}"]
    );
    let why = mapping.explain("sum", 7_000).unwrap();
    assert_eq!(
        why.state,
        "a is too old: its last value came 6s ago, and 5s is the most"
    );
    assert!(!why.is_emitting);
    let last = why.last.unwrap();
    assert_eq!((last.at_ms, last.timestamp_ms), (6_000, 2));
    assert_eq!(
        (last.inputs[0].alias.as_str(), last.inputs[0].value.as_str()),
        ("a", "1")
    );
    assert_eq!(
        (why.sources[0].age_ms, why.sources[0].max_age_ms),
        (Some(6_000), Some(5_000))
    );
    assert!(!send(&mut mapping, "a", "1", 4, 8_000).is_empty());
    assert_eq!(mapping.explain("sum", 9_000).unwrap().state, "emitted");
}

#[test]
fn what_an_output_waits_for_is_named() {
    let mut mapping = load("{}", "{ sum: a + b }");
    assert_eq!(mapping.explain("sum", 0).unwrap().state, "waits for a, b");
    send(&mut mapping, "b", "1", 1, 0);
    assert_eq!(mapping.explain("sum", 0).unwrap().state, "waits for a");
    assert_eq!(mapping.explain("other", 0), None);
}

#[test]
fn late_messages_are_taken_dropped_or_put_in_order() {
    let mut mapping = load("{}", "{ a: a }");
    send(&mut mapping, "a", "1", 10, 0);
    assert_eq!(
        send(&mut mapping, "a", "2", 5, 0),
        ["a {\"value\":2,\"timestamp_ms\":5}"]
    );

    let mut mapping = load("{ late: drop }", "{ a: a }");
    send(&mut mapping, "a", "1", 10, 0);
    assert_eq!(send(&mut mapping, "a", "2", 5, 0), NONE);
    assert_eq!(
        send(&mut mapping, "a", "3", 10, 0),
        ["a {\"value\":3,\"timestamp_ms\":10}"]
    );
    assert_eq!(mapping.counters().messages_late, 1);

    let mut mapping = load("{ late: reorder, reorder_window: 100ms }", "{ a: a }");
    for (timestamp_ms, now_ms) in [(10, 0), (30, 10), (20, 20)] {
        assert_eq!(send(&mut mapping, "a", "1", timestamp_ms, now_ms), NONE);
    }
    assert_eq!(mapping.next_time(), Some(100));
    let mut sent = Vec::new();
    mapping.on_time(99, &mut sent);
    assert_eq!(texts(&sent), NONE);
    mapping.on_time(110, &mut sent);
    let order = [10, 20, 30].map(|time| format!("a {{\"value\":1,\"timestamp_ms\":{time}}}"));
    assert_eq!(texts(&sent), order);
    assert_eq!(mapping.next_time(), None);
    // Earlier than what has gone on.
    assert_eq!(send(&mut mapping, "a", "1", 25, 120), NONE);
    assert_eq!(
        (mapping.next_time(), mapping.counters().messages_late),
        (None, 1)
    );
    // More than may wait push each other on.
    let mut gone = 0;
    for number in 0..1_000 {
        gone += send(&mut mapping, "a", "1", 1_000 + number, 130).len();
    }
    assert_eq!(gone, 1_000 - 256);
}

#[test]
fn values_outlive_a_restart_and_a_new_version() {
    let mut first = load("{}", "{ sum: a + b }");
    send(&mut first, "a", "{\"k\": [1, -0, \"é\"]}", 1, 5);
    let changed = first.take_changed();
    assert_eq!(changed.len(), 1);
    assert!(first.take_changed().is_empty());
    let mut second = load("{ max_age: 1s }", "{ k: 'a.k', b: b }");
    second.restore(changed);
    assert!(second.take_changed().is_empty());
    assert_eq!(second.active_variables(), 1);
    let variables: Vec<_> = second.variables().collect();
    assert_eq!(variables, first.variables().collect::<Vec<_>>());
    assert_eq!(variables[0].value, "{\"k\":[1,-0,\"é\"]}");
    assert_eq!(second.explain("k", 6).unwrap().sources[0].age_ms, Some(1));

    let mut set = Set::default();
    set.install("m", first);
    let mut sent = Vec::new();
    let payload = b"{\"value\":\"x\",\"timestamp_ms\":2}";
    set.on_message("umh/v1/x/_raw/b", payload, None, 6, &mut sent)
        .unwrap();
    assert_eq!(sent.len(), 1);
    set.install("m", load("{}", "{ both: '[b, a.k]' }"));
    assert_eq!(set.get("m").unwrap().active_variables(), 2);
    // What was not stored yet is still to be.
    assert_eq!(set.get_mut("m").unwrap().take_changed().len(), 1);
    sent.clear();
    set.on_message("umh/v1/x/_raw/b", payload, None, 7, &mut sent)
        .unwrap();
    assert_eq!(
        texts(&sent),
        ["both {\"value\":[\"x\",[1,-0,\"é\"]],\"timestamp_ms\":2}"]
    );
    assert!(set.wants("umh/v1/x/_raw/a"));
    set.remove("m");
    assert!(!set.wants("umh/v1/x/_raw/a"));
}

#[test]
fn a_message_reaches_each_mapping_that_reads_its_topic_and_no_other() {
    let mut set = Set::default();
    for number in 0..100 {
        set.install(
            &format!("m{number}"),
            load("{}", &format!("{{ a: a + {number} }}")),
        );
    }
    set.install("other", load("{}", "{ b: b }"));
    let mut sent = Vec::new();
    let payload = b"{\"value\":1,\"timestamp_ms\":2}";
    set.on_message("umh/v1/x/_raw/a", payload, None, 6, &mut sent)
        .unwrap();
    assert_eq!(sent.len(), 100);
    set.on_message("umh/v1/x/_raw/none", b"nothing", None, 6, &mut sent)
        .unwrap();
    assert!(
        set.on_message("umh/v1/x/_raw/b", b"nothing", None, 6, &mut sent)
            .is_err()
    );
    assert!(
        set.iter()
            .all(|(_, mapping)| mapping.counters().invalid_data_type == 1)
    );
}

#[test]
fn a_mapping_warns_of_what_is_probably_a_mistake() {
    let text = file(
        "{}",
        "{ p: pres + a, q: 'a = 5', r: '() => a', s: 'eval(a)', t: '{a: 1}', u: 1 / 0, v: typeof c, w: a }",
    )
    .replace("sources: {", "sources: { Math: umh.v1.x._raw.m, my-var: factory.v, ");
    let (_, warnings) = Mapping::load(&text, "m.yaml").unwrap();
    let text: Vec<String> = warnings.iter().map(ToString::to_string).collect();
    for expected in [
        "sources.my-var: factory.v is not as the Unified Namespace has it",
        "source Math has the name of something built in",
        "source my-var is no identifier of JavaScript",
        "source b is read by no expression",
        "mapping.p: pres is neither a source nor known to JavaScript, so this throws",
        "mapping.q: a is assigned to, which lasts no longer than this evaluation",
        "mapping.r: the result is a function, which is never sent",
        "mapping.s: eval is blocked",
        "mapping.t: this is a block, not an object",
        "mapping.u: it is never sent: the result is or has in it inf",
    ] {
        assert!(
            text.iter().any(|warning| warning.contains(expected)),
            "{expected}: {text:#?}"
        );
    }
    assert!(
        !text
            .iter()
            .any(|warning| warning.contains("mapping.v") || warning.contains("mapping.w"))
    );
}

#[test]
fn a_constant_is_computed_once_and_chance_each_time() {
    let mut mapping = load(
        "{}",
        "{ constant: '[1].map(x => x + 1)', chance: Math.random(), time: Date.now() }",
    );
    let first = send(&mut mapping, "a", "1", 1, 0);
    let second = send(&mut mapping, "a", "1", 1, 0);
    assert_eq!(first[0], second[0]);
    assert_ne!(first[1], second[1]);
    let counters = mapping.counters();
    assert_eq!(counters.javascript_executions, 4);
    assert_eq!(counters.outputs_generated, 6);
    assert_eq!(counters.messages_processed, 2);
    assert!(Duration::from_nanos(counters.javascript_execution_ns) > Duration::ZERO);
}
