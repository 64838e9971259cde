//! Any bytes are a file of links that can be run, or an error that names its line.
#![no_main]

use std::cell::RefCell;
use std::io::{Seek, Write};

use headgate::uplink::{Links, Place};
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
        let place = Place {
            gateway: "press.7",
            site: "north",
        };
        match Links::read(file.path(), place) {
            Ok(links) => {
                for link in &links.links {
                    assert!(!link.servers.is_empty());
                    assert!(!link.name.is_empty());
                }
            }
            Err(error) => {
                let shown = error.to_string();
                assert!(
                    !shown.chars().any(|c| c.is_control() && c != '\n'),
                    "{shown:?}"
                );
            }
        }
    });
});
