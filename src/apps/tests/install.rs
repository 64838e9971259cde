//! What `install` takes and what it refuses.

use super::house::*;
use crate::apps::{AppErrorKind, AppState};

/// The error of an install that must fail and leave nothing behind.
fn refused(component: &[u8]) -> String {
    let house = House::new();
    house.install("other");
    let error = house
        .apps
        .install(&manifest("culprit"), component)
        .unwrap_err();
    assert_eq!(error.kind(), AppErrorKind::Invalid, "{error}");
    let names: Vec<_> = house.apps.list().into_iter().map(|app| app.name).collect();
    assert_eq!(names, ["other"]);
    house.assert_works("other");
    let house = house.reopen(|_| {});
    assert_eq!(house.apps.list().len(), 1, "nothing was stored");
    error.to_string()
}

#[test]
fn an_installed_app_runs_and_its_outputs_leave() {
    let house = House::new();
    let info = house.install("a");
    assert_eq!(info.state, AppState::Running);
    assert_eq!(
        (&*info.version, &*info.subscribe),
        ("1.0.0", &["a/in".to_owned()][..])
    );
    assert!(info.memory_pages > 0);
    house.send("a/in", &["x", "y"]);
    let info = house.until_done("a");
    assert_eq!((info.counters.handled, info.counters.published), (2, 2));
    assert_eq!(house.sink.lines(), ["a a/in x", "a a/in y"]);
}

#[test]
fn what_is_not_wasm_is_refused() {
    let error = refused(b"\x7fELF and so on");
    assert!(
        error.starts_with("app culprit: this is not WebAssembly"),
        "{error}"
    );
    let text = refused(b"(component)");
    assert!(text.contains("in binary form"), "{text}");
}

#[test]
fn a_core_module_is_refused_with_the_way_to_a_component() {
    let error = refused(&wat::parse_str("(module)").unwrap());
    assert!(
        error.starts_with("app culprit: this is a core WebAssembly module"),
        "{error}"
    );
    assert!(error.contains("wasm-tools component new"), "{error}");
    assert!(error.contains("headgate app build"), "{error}");
}

#[test]
fn a_component_that_is_cut_short_is_refused() {
    let whole = guest("");
    let error = refused(&whole[..whole.len() / 2]);
    assert!(
        error.starts_with("app culprit: not a valid component:"),
        "{error}"
    );
}

#[test]
fn an_empty_component_misses_its_first_export() {
    let error = refused(&wat::parse_str("(component)").unwrap());
    assert!(
        error.contains("the export `configure` is missing"),
        "{error}"
    );
}

const CONFIGURE_ONLY: &str = r#"
    (memory (export "memory") 1)
    (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) unreachable)
    (func (export "configure") (result i32) unreachable)
"#;

#[test]
fn a_missing_export_is_named() {
    let error = refused(&component_for(
        &format!("(module {CONFIGURE_ONLY})"),
        "no-handle",
    ));
    assert!(error.contains("the export `handle` is missing"), "{error}");
    assert!(
        error.contains("handle: func(batch: list<event>)"),
        "{error}"
    );
}

#[test]
fn an_import_outside_the_world_is_named() {
    let module = format!(
        r#"(module (import "test:caller/telephone" "call" (func (param i32 i32))) {CONFIGURE_ONLY})"#
    );
    let error = refused(&component_for(&module, "caller"));
    assert!(
        error.contains("it imports `test:caller/telephone`"),
        "{error}"
    );
    assert!(error.contains("wasi:logging/logging"), "{error}");
}

#[test]
fn a_function_that_a_known_interface_does_not_have_is_named() {
    let component = wat::parse_str(
        r#"(component
            (import "wasi:logging/logging@0.1.0-draft" (instance (export "shout" (func)))))"#,
    );
    let error = refused(&component.unwrap());
    assert!(
        error.contains("it imports `wasi:logging/logging@0.1.0-draft#shout`"),
        "{error}"
    );
}

#[test]
fn an_import_of_another_signature_is_named() {
    let component = wat::parse_str(
        r#"(component
            (import "wasi:logging/logging@0.1.0-draft" (instance (export "log" (func)))))"#,
    );
    let error = refused(&component.unwrap());
    assert!(
        error.contains("import `wasi:logging/logging@0.1.0-draft` doesn't fit"),
        "{error}"
    );
}

#[test]
fn a_wrong_signature_is_named() {
    let module = format!(
        r#"(module {CONFIGURE_ONLY}
            (func (export "handle") (param i32 i32) (result i32) unreachable))"#
    );
    let error = refused(&component_for(&module, "other-handle"));
    assert!(
        error.contains("the export `handle` has the wrong signature"),
        "{error}"
    );
    assert!(error.contains("-> result<list<event>, string>"), "{error}");
}

#[test]
fn a_manifest_with_a_slash_in_its_name_or_a_wrong_filter_is_refused() {
    let house = House::new();
    for (manifest, expected) in [
        (manifest("a/b"), "manifest: line 1: `name`: \"a/b\""),
        (
            manifest("a").replace("a/in", "a/#/in"),
            "manifest: line 3: `subscribe`: \"a/#/in\"",
        ),
    ] {
        let error = house.apps.install(&manifest, &guest("")).unwrap_err();
        assert_eq!(error.kind(), AppErrorKind::Invalid);
        assert!(error.to_string().contains(expected), "{error}");
    }
    assert_eq!(house.apps.list(), []);
}

#[test]
fn an_app_of_the_same_name_is_replaced_in_place() {
    let house = House::new();
    house.install("a");
    house.send("a/in", &["one"]);
    house.until_done("a");
    let newer = manifest("a")
        .replace("1.0.0", "1.1.0")
        .replace("\"a/in\"", "\"a/new\"");
    let info = house.apps.install(&newer, &guest("nop")).unwrap();
    assert_eq!((info.state, &*info.version), (AppState::Running, "1.1.0"));
    assert_eq!(info.counters.handled, 1, "counters go on");
    assert!(
        house.offer("a/in", &["gone"]).is_empty(),
        "old routes are gone"
    );
    house.send("a/new", &["two"]);
    assert_eq!(house.until_done("a").counters.handled, 2);
    assert_eq!(house.apps.list().len(), 1);

    let house = house.reopen(|_| {});
    assert_eq!(house.info("a").version, "1.1.0");
    let compiled = std::fs::read_dir(house.folder.path().join("store/aot")).unwrap();
    assert_eq!(compiled.count(), 1, "the old component's code is gone");
}

#[test]
fn an_upgrade_that_is_refused_leaves_the_old_version_running() {
    let house = House::new();
    house.install("a");
    house.apps.install(&manifest("a"), b"rubbish").unwrap_err();
    house.assert_works("a");
}
