//! A client that sends any bytes, in any pieces, while messages come for it, time goes by and its
//! connection breaks. What must hold meanwhile is checked in `headgate::broker::fuzzing`.
#![no_main]

use std::time::Duration;

use headgate::broker::fuzzing::Client;
use libfuzzer_sys::fuzz_target;

/// A clean session, a kept one, and one with a will; in 3.1.1 and in 5.
const CONNECTS: [&[u8]; 5] = [
    b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x3c\x00\x01c",
    b"\x10\x0d\x00\x04MQTT\x04\x00\x00\x3c\x00\x01c",
    b"\x10\x13\x00\x04MQTT\x04\x0e\x00\x3c\x00\x01c\x00\x01w\x00\x01m",
    b"\x10\x0e\x00\x04MQTT\x05\x02\x00\x3c\x00\x00\x01c",
    b"\x10\x13\x00\x04MQTT\x05\x00\x00\x3c\x05\x11\x00\x00\x00\x63\x00\x01c",
];

fuzz_target!(|steps: &[u8]| {
    let mut client = Client::default();
    let mut steps = steps.iter().copied();
    while let Some(step) = steps.next() {
        let argument = steps.next().unwrap_or(0);
        match step % 16 {
            0 => client.receive(CONNECTS[usize::from(argument) % CONNECTS.len()]),
            1 => client.reconnect(CONNECTS[usize::from(argument) % CONNECTS.len()]),
            2 => client.wait(Duration::from_millis(u64::from(argument) * 500)),
            3 | 4 => client.deliver(argument, b"payload"),
            5 => client.deliver(argument, &[b'x'; 2000]),
            // Any bytes, as many as the argument says.
            _ => {
                let bytes: Vec<u8> = steps.by_ref().take(argument.into()).collect();
                client.receive(&bytes);
            }
        }
    }
});
