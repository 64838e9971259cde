//! What a developer of apps does: begins one, builds it, tries it on events, installs it; in Rust and
//! in Python.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::apps::{Package, keeper};
use crate::gateway::{Home, assert_for_people, finished};
use crate::wire::Wire;

/// A compiler may have to build a few crates, or to chew on 18 MB.
const COMPILER_PATIENCE: Duration = Duration::from_secs(600);

fn here() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Runs a command to its end; shows what it said if that was not as expected.
fn run(command: &mut Command) -> Output {
    let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    finished(command.spawn().unwrap(), COMPILER_PATIENCE)
}

fn succeeds(command: &mut Command) -> Output {
    let output = run(command);
    assert!(
        output.status.success(),
        "{command:?}: {}",
        text(&output.stderr)
    );
    output
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// What `headgate app test ARGS` prints to standard output and error, with its exit code.
fn app_test(home: &Home, args: &[&str]) -> (Option<i32>, String, String) {
    let output = run(&mut home.command(&[&["app", "test"], args].concat()));
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert_for_people(stderr);
    (output.status.code(), stdout.to_owned(), stderr.to_owned())
}

fn write(home: &Home, file: &str, lines: &[&str]) -> String {
    let path = home.path().join(file);
    std::fs::write(&path, lines.join("\n")).unwrap();
    path.to_str().unwrap().to_owned()
}

/// As [`Package::obedient`], but it may publish what it gets.
fn echo() -> Package {
    Package::self_feeding("echo")
}

// ---- Trying an app on events ----

#[test]
fn events_from_a_file_become_lines_on_standard_output() {
    let (home, app) = (Home::new(), echo());
    let events = write(
        &home,
        "events.jsonl",
        &[
            r#"{"topic":"echo/in","payload":"x"}"#,
            r#"{"topic":"elsewhere","payload":"y"}"#,
            "",
            r#"{"topic":"echo/in","payload_base64":"AP8=","timestamp_ns":7}"#,
        ],
    );
    let args = [app.as_str(), "--events", &events];
    let (code, stdout, stderr) = app_test(&home, &args);
    assert_eq!(code, Some(0), "{stderr}");
    assert_eq!(
        stdout,
        "{\"topic\":\"echo/in\",\"payload\":\"x\"}\n\
         {\"topic\":\"echo/in\",\"payload_base64\":\"AP8=\",\"timestamp_ns\":7}\n"
    );
    assert!(stderr.contains("line 2: skipped: the app does not subscribe to elsewhere"));
    assert!(
        stderr.contains("3 events, 1 skipped, 2 handled, 0 failed"),
        "{stderr}"
    );

    let expected = write(&home, "expected.jsonl", &[&stdout]);
    let with = |more: &[&str]| app_test(&home, &[&args, more].concat());
    let (code, stdout, stderr) = with(&["--expect", &expected]);
    assert_eq!((code, &*stdout), (Some(0), ""), "{stderr}");

    write(
        &home,
        "expected.jsonl",
        &[r#"{"topic":"echo/in","payload":"z"}"#],
    );
    let (code, _, stderr) = with(&["--expect", &expected]);
    assert_eq!(code, Some(1));
    assert!(
        stderr.contains("expected.jsonl, line 1:\n- {\"topic\":\"echo/in\",\"payload\":\"z\"}\n+")
    );

    let (code, _, stderr) = with(&["--json", "--batch", "1"]);
    assert_eq!(code, Some(0));
    let summary = stderr.lines().find(|line| line.starts_with("{\"summary\""));
    let summary: Value = serde_json::from_str(summary.unwrap()).unwrap();
    assert_eq!(summary["summary"]["counters"]["batches"], 2);
}

#[test]
fn events_come_from_standard_input_too_and_wrong_ones_are_named() {
    let (home, app) = (Home::new(), echo());
    let mut command = home.command(&["app", "test", app.as_str()]);
    command.stdin(Stdio::piped());
    let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let line = b"{\"topic\":\"echo/in\",\"payload\":\"x\"}\n";
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), line).unwrap();
    assert_eq!(finished(child, COMPILER_PATIENCE).stdout, line);

    let events = write(
        &home,
        "e.jsonl",
        &[r#"{"topic":"echo/in"}"#, r#"{"topic":"echo/+"}"#],
    );
    let (code, stdout, stderr) = app_test(&home, &[app.as_str(), "--events", &events]);
    assert_eq!((code, &*stdout), (Some(1), ""));
    assert!(stderr.contains("e.jsonl, line 2: `topic`"), "{stderr}");
    let (code, _, stderr) = app_test(&home, &[app.as_str(), "--events", "nowhere.jsonl"]);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("nowhere.jsonl"), "{stderr}");
}

#[test]
fn what_fails_in_the_gateway_fails_here_and_is_named_with_its_line() {
    let (home, app) = (Home::new(), echo());
    for (event, why) in [
        ("U", "unreachable"),
        (
            "L",
            "took more CPU time than `limits.batch_deadline_ms` (20) allows",
        ),
        ("E", "`handle` returned an error: no thanks"),
    ] {
        let line = format!(r#"{{"topic":"echo/in","payload":"{event}"}}"#);
        let good = r#"{"topic":"echo/in","payload":"x"}"#;
        let events = write(&home, "events.jsonl", &[good, &line, good]);
        let args = [app.as_str(), "--batch", "1", "--events", &events];
        let (code, stdout, stderr) = app_test(&home, &args);
        assert_eq!(code, Some(1), "{stderr}");
        assert_eq!(stdout.lines().count(), 2, "the others are handled");
        assert!(
            stderr.contains("events.jsonl, line 2: failed: "),
            "{stderr}"
        );
        assert!(stderr.contains(why), "{stderr}");
        assert!(
            stderr.contains("1 of 3 events were not handled"),
            "{stderr}"
        );
    }

    let line = r#"{"topic":"echo/in","payload":"U"}"#;
    let events = write(&home, "events.jsonl", &[line; 100]);
    let (code, _, stderr) = app_test(&home, &[app.as_str(), "--events", &events]);
    assert_eq!(code, Some(1));
    assert!(
        stderr.contains("fails too often to go on: backing-off"),
        "{stderr}"
    );
}

#[test]
fn what_an_app_keeps_lasts_for_one_run_and_timers_can_be_stood_in_for() {
    let home = Home::new();
    let manifest = "name = \"k\"\nversion = \"1.0.0\"\ncomponent = \"app.wasm\"\n\
                    subscribe = [\"k/in\"]\npublish = [\"out\"]\n";
    let app = Package::new(manifest, keeper());
    let increment = r#"{"topic":"k/in","payload":"in"}"#;
    let timer = r#"{"topic":"$timer/t","payload":""}"#;
    let get = r#"{"topic":"k/in","payload":"gn"}"#;
    let events = write(&home, "events.jsonl", &[increment, timer, get]);
    for _run in 0..2 {
        let (code, stdout, stderr) = app_test(&home, &[app.as_str(), "--events", &events]);
        assert_eq!(code, Some(0), "{stderr}");
        let expected = ["", "$timer/t", "1"]
            .map(|payload| serde_json::json!({ "topic": "out", "payload": payload }));
        let lines = stdout
            .lines()
            .map(|line| serde_json::from_str(line).unwrap());
        assert_eq!(lines.collect::<Vec<serde_json::Value>>(), expected);
    }
}

// ---- In Rust ----

/// `headgate ARGS` with what cargo needs. `HOME` is not this test's: cargo is below the real one.
fn with_cargo(home: &Home, target: &Path, args: &[&str]) -> Command {
    let mut command = home.command(args);
    for name in [
        "PATH",
        "HOME",
        "CARGO",
        "CARGO_HOME",
        "RUSTUP_HOME",
        "RUSTUP_TOOLCHAIN",
        "GUEST_TOOLCHAIN",
    ] {
        match std::env::var_os(name) {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    // What the apps in this repository are built from is on this machine.
    command
        .env("CARGO_TARGET_DIR", target)
        .env("CARGO_NET_OFFLINE", "true");
    command
}

#[test]
fn a_new_project_builds_passes_its_tests_and_runs_in_the_gateway() {
    // Always the same place, so that its dependencies are built once.
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("new-project");
    let (project, target) = (folder.join("press"), folder.join("target"));
    let _ = std::fs::remove_dir_all(&project);
    std::fs::create_dir_all(&folder).unwrap();
    let path = project.to_str().unwrap();
    let gateway = Home::new().start();
    let home = gateway.home();

    let new = ["app", "new", "press", "--path", path];
    succeeds(&mut home.command(&new));
    let again = run(&mut home.command(&new));
    assert_eq!(again.status.code(), Some(1));
    assert!(text(&again.stderr).contains("is there already"));
    // The versions that the apps in this repository have.
    std::fs::copy(here().join("apps/Cargo.lock"), project.join("Cargo.lock")).unwrap();

    let output = succeeds(&mut with_cargo(home, &target, &["app", "test", path]));
    assert_eq!(
        text(&output.stdout),
        "{\"topic\":\"high/plant/press/temperature\",\
         \"payload\":\"{\\\"value\\\":93.5,\\\"threshold\\\":90.0}\",\
         \"timestamp_ns\":1767225601000000000}\n"
    );
    assert!(text(&output.stderr).contains("skipped: plant/oven/temperature"));

    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let test = with_cargo(home, &target, &[]);
    let mut native = Command::new(cargo);
    native
        .env_clear()
        .args(["test", "--quiet"])
        .current_dir(&project);
    for (name, value) in test.get_envs() {
        if let Some(value) = value {
            native.env(name, value);
        }
    }
    succeeds(native.env("HEADGATE", env!("CARGO_BIN_EXE_headgate")));

    succeeds(&mut with_cargo(home, &target, &["app", "install", path]));
    gateway.until_app("press", "running", |app| app["state"] == "running");
    let mut wire = Wire::connect(&gateway, "c");
    wire.subscribe("high/#", 0);
    wire.publish("plant/a/temperature", b"{\"value\": 99}");
    let payload = br#"{"value":99.0,"threshold":90.0}"#;
    assert_eq!(wire.next_message().payload(), payload);

    // A change that breaks it is told by its own test.
    std::fs::write(project.join("expected.jsonl"), "").unwrap();
    let failing = run(&mut native);
    assert!(!failing.status.success());
    let said = [text(&failing.stdout), text(&failing.stderr)].concat();
    assert!(
        said.contains("publishes something else than expected"),
        "{said}"
    );
}

#[test]
fn what_can_not_be_built_is_named() {
    let home = Home::new();
    let target = home.path().join("target");
    let folder = home.path().join("app");
    std::fs::create_dir(&folder).unwrap();
    let build = || {
        let output = run(&mut with_cargo(&home, &target, &["app", "build", "app"]));
        assert_eq!(output.status.code(), Some(1));
        text(&output.stderr).to_owned()
    };
    assert!(build().contains("app/manifest.toml"));
    let manifest = "name = \"a\"\nversion = \"1.0.0\"\nsubscribe = [\"a\"]\n";
    std::fs::write(folder.join("manifest.toml"), manifest).unwrap();
    assert!(build().contains("app: there is no Cargo.toml in this folder"));
    let package = "[package]\nname = \"a\"\nedition = \"2024\"\n[workspace]\n";
    std::fs::write(folder.join("Cargo.toml"), package).unwrap();
    std::fs::create_dir(folder.join("src")).unwrap();
    std::fs::write(folder.join("src/lib.rs"), "fn wrong( {}").unwrap();
    assert!(build().contains("`crate-type = [\"cdylib\", \"lib\"]`"));
    let library = format!("{package}[lib]\ncrate-type = [\"cdylib\", \"lib\"]\n");
    std::fs::write(folder.join("Cargo.toml"), library).unwrap();
    assert!(build().contains("app a: cargo has failed; see above"));
    std::fs::write(folder.join("src/lib.rs"), "").unwrap();
    assert!(build().contains("does the crate use headgate_sdk's `app` attribute"));
}

// ---- In Python ----

/// The version that docs/apps-in-python.md names.
const COMPONENTIZE_PY: &str = "componentize-py==0.25.1";

/// The program that makes components of Python, installed if need be. None where there is no Python to
/// install it with.
fn componentize_py() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(COMPONENTIZE_PY);
    let program = folder.join("bin/componentize-py");
    if program.exists() {
        return Some(program);
    }
    let mut venv = Command::new("python3");
    let made = venv.args(["-m", "venv", "--clear"]).arg(&folder).output();
    if !made.is_ok_and(|output| output.status.success()) {
        return None;
    }
    let mut pip = Command::new(folder.join("bin/pip"));
    succeeds(pip.args(["install", "--quiet", COMPONENTIZE_PY]));
    Some(program)
}

#[test]
fn the_app_in_python_does_what_is_expected() {
    let Some(componentize_py) = componentize_py() else {
        eprintln!(
            "SKIPPED: python3 with venv and pip is needed to build the app in Python (Debian: apt-get \
             install python3-venv)"
        );
        return;
    };
    let home = Home::new();
    let sources = here().join("examples/python");
    let app = home.path().join("mean");
    std::fs::create_dir(&app).unwrap();
    for file in ["manifest.toml", "events.jsonl", "expected.jsonl"] {
        std::fs::copy(sources.join(file), app.join(file)).unwrap();
    }
    succeeds(
        Command::new(sources.join("build.sh"))
            .arg(app.join("mean.wasm"))
            .env("COMPONENTIZE_PY", componentize_py),
    );
    let expected = app.join("expected.jsonl");
    let args = [
        app.to_str().unwrap(),
        "--expect",
        expected.to_str().unwrap(),
    ];
    let (code, _, stderr) = app_test(&home, &args);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(
        stderr.contains("plant/oven/temperature: skipped: "),
        "{stderr}"
    );
}
