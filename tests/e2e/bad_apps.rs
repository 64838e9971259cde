//! Apps that are broken or hostile: the error says whose it is and what it was, and another app
//! goes on and loses nothing.

use serde_json::Value;

use crate::apps::{self, Package, guest, manifest};
use crate::gateway::{Gateway, Home};
use crate::neighbours::Neighbours;
use crate::wire::Wire;

/// A gateway on which `unit-convert` works, and goes on working through `test`.
fn beside_a_working_app(test: impl FnOnce(&Gateway)) {
    let gateway = Home::new().start();
    let neighbours = Neighbours::start_through_app(&gateway);
    test(&gateway);
    neighbours.assert_lost_nothing();
    assert_eq!(restarts(&gateway.app("unit-convert")), 0);
    gateway.assert_adds_up();
}

/// How often an instance was replaced.
fn restarts(app: &Value) -> u64 {
    let by_reason = app["restarts"].as_object().unwrap().values();
    by_reason.map(|count| count.as_u64().unwrap()).sum()
}

#[test]
fn what_is_no_app_is_refused_with_its_name_and_the_reason() {
    let manifest = manifest("culprit");
    let with = |from: &str, to: &str| Package::new(&manifest.replace(from, to), guest(""));
    let not_built = Package::without_component(&manifest);
    let cases = [
        (
            Package::new(&manifest, "#!/bin/sh\n"),
            &["app culprit: ", "this is not WebAssembly"][..],
        ),
        (
            Package::new(&manifest, apps::core_module()),
            &[
                "app culprit: ",
                "a core WebAssembly module, not a component",
            ],
        ),
        (
            Package::new(&manifest, apps::without_handle()),
            &["app culprit: ", "the export `handle` is missing"],
        ),
        (
            Package::new(&manifest, apps::caller()),
            &["app culprit: ", "it imports `test:worlds/telephone`"],
        ),
        (
            Package::new(&manifest, &guest("")[..2000]),
            &["app culprit: ", "not a valid component"],
        ),
        (
            with("culprit/in", "culprit/#/in"),
            &["manifest.toml: line 4", "`subscribe`"],
        ),
        (
            with("culprit/#", "a+"),
            &["manifest.toml: line 5", "`publish`"],
        ),
        (
            with("\"culprit\"", "\"cul/prit\""),
            &["manifest.toml: line 1", "`name`", "cul/prit"],
        ),
        (
            with("version", "verzion"),
            &["manifest.toml: line 2", "`verzion`"],
        ),
        (
            with("memory_pages = 64", "memory_pages = 0"),
            &["line 7", "`limits.memory_pages`"],
        ),
        (
            with("app.wasm", "other.wasm"),
            &["app culprit: other.wasm", "`headgate app build`"],
        ),
        (
            not_built,
            &["app culprit: app.wasm", "`headgate app build`"],
        ),
    ];
    beside_a_working_app(|gateway| {
        for (package, expected) in &cases {
            let message = gateway.cli_error(&["app", "install", package.as_str()]);
            for part in *expected {
                assert!(message.contains(part), "expected {part:?} in {message:?}");
            }
        }
        let apps = gateway.json(&["app", "list"]);
        assert_eq!(apps.as_array().unwrap().len(), 1, "{apps:#}");
    });
}

#[test]
fn an_app_whose_configure_goes_wrong_is_installed_and_says_why_it_does_not_run() {
    const RETURN_ERROR: &str = "(i32.store8 (i32.const 0) (i32.const 1))
        (i32.store (i32.const 4) (i32.const 1040))
        (i32.store (i32.const 8) (i32.const 9))
        (return (i32.const 0))";
    beside_a_working_app(|gateway| {
        for (configure, expected) in [
            ("unreachable", "`configure` trapped: wasm `unreachable`"),
            ("(loop $ever (br $ever))", "`limits.batch_deadline_ms` (20)"),
            (
                "(drop (call $recurse (i64.const 0)))",
                "overflowed its stack",
            ),
            (
                "(loop $ever (drop (memory.grow (i32.const 1))) (br $ever))",
                "`limits.memory_pages`",
            ),
            (RETURN_ERROR, "`configure` returned an error: no thanks"),
        ] {
            let package = Package::new(&manifest("culprit"), guest(configure));
            let output = gateway.cli(&["app", "install", package.as_str()]);
            assert!(output.status.success(), "{output:?}");
            let told = String::from_utf8(output.stdout).unwrap();
            assert!(told.starts_with("culprit 1.0.0 "), "{told}");
            assert!(told.contains(expected), "{configure}: {told}");
            let app = gateway.until_app("culprit", "another try", |app| {
                restarts(app) > 0 && app["last_error"].is_string()
            });
            assert!(
                app["last_error"].as_str().unwrap().contains(expected),
                "{app:#}"
            );
            let list = gateway.cli(&["app", "list"]);
            let list = String::from_utf8(list.stdout).unwrap();
            let line = list
                .lines()
                .find(|line| line.starts_with("culprit "))
                .unwrap();
            assert!(!line.contains("running"), "{line}");
            gateway.json(&["app", "remove", "culprit"]);
        }
    });
}

/// Sends `payload` to an obedient app beside one that works; how the app is after that.
fn misbehave(payload: &str, is_over: impl Fn(&Value) -> bool) -> Value {
    let mut outcome = Value::Null;
    beside_a_working_app(|gateway| {
        let package = Package::obedient("culprit");
        gateway.install(package.path());
        let mut wire = Wire::connect(gateway, "c");
        wire.publish("culprit/in", payload.as_bytes());
        outcome = gateway.until_app("culprit", "the end of it", is_over);
        // It comes back by itself, and works.
        gateway.until_app("culprit", "running", |app| app["state"] == "running");
        let handled = gateway.app("culprit")["counters"]["handled"]
            .as_u64()
            .unwrap();
        wire.publish("culprit/in", b"hello");
        gateway.until_app("culprit", "work", |app| {
            app["counters"]["handled"].as_u64() == Some(handled + 1)
        });
        outcome["log"] = gateway.json(&["app", "logs", "culprit"]);
    });
    outcome
}

/// After what costs the batch and the instance.
fn assert_fails_with(payload: &str, expected: &str) {
    let app = misbehave(payload, |app| app["counters"]["failed"] == 1);
    // It was tried twice.
    assert_eq!(restarts(&app), 2);
    assert!(
        app["last_error"].as_str().unwrap().contains(expected),
        "{app:#}"
    );
    let lines = app["log"].as_array().unwrap();
    let told = |line: &&Value| line["message"].as_str().unwrap().contains(expected);
    assert_eq!(
        lines.iter().find(told).unwrap()["context"],
        "headgate",
        "{app:#}"
    );
}

#[test]
fn an_app_that_traps_is_replaced() {
    assert_fails_with("U", "`handle` trapped: wasm `unreachable`");
}

#[test]
fn an_app_that_loops_for_ever_is_ended_at_its_deadline() {
    assert_fails_with("L", "`limits.batch_deadline_ms` (20)");
}

#[test]
fn an_app_that_grows_without_bound_is_stopped_at_its_limit() {
    assert_fails_with("G", "`limits.memory_pages` is 64");
}

#[test]
fn an_app_that_overflows_its_stack_is_replaced() {
    assert_fails_with("S", "overflowed its stack");
}

#[test]
fn an_app_that_publishes_a_hundred_thousand_times_a_batch_to_itself_meets_its_quota() {
    beside_a_working_app(|gateway| {
        let manifest = manifest("culprit").replace("deadline_ms = 20", "deadline_ms = 60000");
        let package = Package::new(&manifest, guest(""));
        gateway.install(package.path());
        Wire::connect(gateway, "c").publish("culprit/in", b"P");
        let app = gateway.until_app("culprit", "its first batch", |app| {
            app["counters"]["batches"].as_u64() > Some(0)
        });
        let count = |counter: &str| app["counters"][counter].as_u64().unwrap();
        let (batches, published) = (count("batches"), count("published"));
        assert_eq!(published, 4096 * batches);
        assert_eq!(count("over_publish_quota"), (100_000 - 4096) * batches);
        gateway.until_app("culprit", "its next batches, of what it published", |app| {
            app["counters"]["batches"].as_u64() > Some(batches + 10)
        });
        let stopped = gateway.json(&["app", "stop", "culprit"]);
        assert_eq!(stopped["state"], "stopped");
    });
}

#[test]
fn an_app_that_takes_every_event_and_fails_on_it_takes_none_from_the_others() {
    // The first byte of what the neighbours send, in the place of the guest's word for a trap and
    // for an endless loop.
    const BRACE: &str = "(i32.const 0x7b)";
    for word in ["(i32.const 0x55)", "(i32.const 0x4c)"] {
        beside_a_working_app(|gateway| {
            let manifest = manifest("culprit").replace("culprit/in", "#");
            let guest = crate::apps::guest_with(word, BRACE);
            let package = Package::new(&manifest, guest);
            gateway.cli(&["app", "install", package.as_str()]);
            gateway.until_app("culprit", "its third failure", |app| {
                app["counters"]["failed"].as_u64() >= Some(3)
            });
        });
    }
}

#[test]
fn a_manifest_that_is_a_folder_and_a_path_that_is_not_there_are_named() {
    let gateway = Home::new().start();
    let message = gateway.cli_error(&["app", "install", "no/such/app"]);
    assert!(message.contains("no/such/app"), "{message}");
    let package = Package::obedient("a");
    let manifest = package.path().join("manifest.toml");
    std::fs::remove_file(&manifest).unwrap();
    let message = gateway.cli_error(&["app", "install", package.as_str()]);
    assert!(message.contains(package.as_str()), "{message}");
    std::fs::create_dir(&manifest).unwrap();
    let message = gateway.cli_error(&["app", "install", package.as_str()]);
    assert!(message.contains(manifest.to_str().unwrap()), "{message}");
}

#[test]
fn commands_about_an_app_that_is_not_installed_name_it() {
    let gateway = Home::new().start();
    for command in ["inspect", "start", "stop", "restart", "remove", "logs"] {
        let message = gateway.cli_error(&["app", command, "ghost"]);
        assert!(message.contains("\"ghost\""), "{message}");
        assert!(message.contains("`headgate app list`"), "{message}");
    }
}
