//! Any document: an error for people, or a release whose parts can be used.
#![no_main]

use headgate::ota::release::Release;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|document: &[u8]| {
    match Release::parse(document) {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(release) => {
            let toplevel = release.toplevel().unwrap().to_absolute_path();
            assert_eq!(toplevel, release.toplevel);
            assert_eq!(release.added_keys().unwrap().len(), release.add_keys.len());
            if let Some(rollout) = &release.rollout {
                assert!((0.0..100.0).contains(&rollout.place("gateway")));
            }
            let again = serde_json::to_vec(&release).unwrap();
            assert_eq!(Release::parse(&again).unwrap(), release);
        }
    }
});
