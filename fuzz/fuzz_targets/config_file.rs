//! Any bytes are a configuration that keeps its promises, or errors that can be shown on a terminal.
#![no_main]

use std::cell::RefCell;
use std::io::{Seek, Write};

use headgate::config::{Config, Source};
use libfuzzer_sys::fuzz_target;
use tempfile::NamedTempFile;

fuzz_target!(|bytes: &[u8]| {
    thread_local! {
        static FILE: RefCell<NamedTempFile> = RefCell::new(NamedTempFile::new().unwrap());
    }
    FILE.with_borrow_mut(|file| {
        file.as_file().set_len(0).unwrap();
        file.rewind().unwrap();
        file.write_all(bytes).unwrap();
        let source = Source {
            file: Some(file.path().to_owned()),
            superuser: true,
            ..Source::default()
        };
        match Config::load(source) {
            Ok(resolved) => {
                let config = resolved.config;
                assert!((1..=4096).contains(&config.pipeline.batch.max_events));
                assert!(config.mqtt.max_packet_bytes >= 64);
                assert!(config.mqtt.receive_maximum > 0);
                assert!(config.store.path.is_absolute());
            }
            Err(errors) => {
                assert!(!errors.0.is_empty());
                let shown = errors.to_string();
                assert!(
                    !shown.chars().any(|c| c.is_control() && c != '\n'),
                    "{shown:?}"
                );
            }
        }
    });
});
