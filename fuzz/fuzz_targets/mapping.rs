//! Any file and any messages: an error for people, or outputs that are JSON, within the time that was
//! allowed.
#![no_main]

use std::time::{Duration, Instant};

use headgate::mappings::{Mapping, to_mqtt};
use libfuzzer_sys::fuzz_target;

/// What an expression may take, a few times over: sanitizers are slow.
const PATIENCE: Duration = Duration::from_secs(2);

const SOURCES: [&str; 3] = ["umh.v1.x._raw.a", "umh.v1.x._raw.b", "umh.v1.x._raw.c"];

fuzz_target!(|input: (bool, &str, Vec<(u8, &[u8])>)| {
    let (is_file, text, messages) = input;
    // Whole files seldom get as far as an expression.
    let file = if is_file {
        text.to_owned()
    } else {
        let literal: String = text.lines().map(|line| format!("    {line}\n")).collect();
        format!(
            "model: {{ name: m, version: v1 }}\noutput_topic: umh.v1.x\nheadgate: {{ time_limit: 20ms }}\n\
             sources: {{ a: {}, b: {}, c: {} }}\nmapping:\n  out: |-\n{literal}  also: a + b\n",
            SOURCES[0], SOURCES[1], SOURCES[2],
        )
    };
    let began = Instant::now();
    let (mut mapping, warnings) = match Mapping::load(&file, "fuzz.yaml") {
        Ok(loaded) => loaded,
        Err(error) => {
            assert!(!error.message.is_empty());
            // A line of YAML may also end in a lone carriage return, and the end of the file is one after the last.
            let breaks = file
                .bytes()
                .filter(|byte| matches!(byte, b'\n' | b'\r'))
                .count();
            assert!(error.place.line <= breaks + 2);
            return;
        }
    };
    assert!(warnings.iter().all(|warning| !warning.message.is_empty()));
    let mut sent = Vec::new();
    for (number, (source, payload)) in messages.iter().enumerate().take(8) {
        let topic = to_mqtt(SOURCES[usize::from(*source) % SOURCES.len()]);
        // Nobody needs to know why a payload is refused.
        let _ = mapping.on_message(&topic, payload, None, number as u64, &mut sent);
    }
    for sent in &sent {
        assert!(sent.payload.starts_with(b"{\"value\":"));
        assert!(str::from_utf8(&sent.payload).is_ok());
    }
    let stored: Vec<_> = mapping.variables().collect();
    mapping.restore(stored.clone());
    assert_eq!(mapping.variables().collect::<Vec<_>>(), stored);
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
});
