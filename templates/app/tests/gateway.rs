//! The component in the gateway's engine, under the limits of manifest.toml.

#[test]
fn the_events_bring_what_is_expected() {
    headgate_sdk::testing::in_gateway(env!("CARGO_MANIFEST_DIR"));
}
