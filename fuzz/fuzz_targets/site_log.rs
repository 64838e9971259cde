//! Any messages are a log of what a worker keeps, or are told to be none; and what was read is written as it was.
#![no_main]

use headgate::site::log::{Part, Replay};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|messages: Vec<Vec<u8>>| {
    let mut replay = Replay::default();
    for message in messages {
        match Part::decode(&message) {
            Ok(part) => {
                assert_eq!(Part::decode(&part.encode()).as_ref(), Ok(&part));
                replay.add(part);
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
    let image = replay.image();
    assert!(image.entries.len() <= 1 << 20);
});
