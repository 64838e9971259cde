//! Several clients that keep the rules, in any order of events: connections that break, sessions that
//! are taken over, come back and run out, wills, share groups, acknowledgements that come late, time
//! that goes by. What must come of it is checked in `headgate::broker::rehearsal`.
#![no_main]

use headgate::broker::rehearsal::Rehearsal;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|steps: &[u8]| Rehearsal::play(steps));
