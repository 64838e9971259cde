//! Any text is a manifest that keeps its promises, or an error for people.
#![no_main]

use headgate::apps::{Defaults, Manifest};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    match Manifest::parse(text, &Defaults::new(100)) {
        Ok(manifest) => {
            let name = manifest.name.as_bytes();
            assert!((1..=64).contains(&name.len()));
            assert!(name[0].is_ascii_lowercase() || name[0].is_ascii_digit());
            assert!(!manifest.component.contains('/') && !manifest.component.is_empty());
            // None will do for an app that has a device.
            assert!(manifest.subscribe.len() <= 64);
            assert!(manifest.state_version > 0);
            assert!((1..=1024).contains(&manifest.limits.memory_pages));
            assert!((1..=60_000).contains(&manifest.limits.batch_deadline_ms));
            assert!(manifest.limits.queue_events > 0);
        }
        Err(error) => {
            let lines = text.split('\n').count();
            assert!(error.line.is_none_or(|line| (1..=lines).contains(&line)));
            assert!(!error.message.is_empty());
        }
    }
});
