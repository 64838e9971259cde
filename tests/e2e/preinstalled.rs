//! Apps that are compiled ahead of time and are part of the system.

use std::path::PathBuf;

use crate::apps::built;
use crate::gateway::Home;
use crate::mosquitto;
use crate::wire::Wire;

/// A home with a folder of apps that `headgate app compile` has made for this machine.
fn home(apps: &[&str]) -> (Home, PathBuf) {
    let home = Home::new();
    let folder = home.path().join("system");
    for app in apps {
        let output = folder.join(app);
        let status = home
            .command(&["app", "compile", "--name", app, "--output"])
            .arg(output)
            .arg(built(app))
            .status();
        assert!(status.unwrap().success());
    }
    (home.set("apps.preinstalled", folder.display()), folder)
}

#[test]
fn they_run_at_once_and_what_was_stopped_or_paused_stays_so_after_kill_9() {
    let (home, _) = home(&["overheat-alarm", "unit-convert"]);
    let gateway = home.start();
    let alarm = mosquitto::subscribe(&gateway, &["-t", "alarms/#", "-C", "1"]);
    mosquitto::publish(
        &gateway,
        &["-t", "plant/press/temperature", "-m", r#"{"value": 93.5}"#],
    );
    let alarm = alarm.line();
    assert!(alarm.contains("93.5"), "{alarm}");
    let app = gateway.app("overheat-alarm");
    assert_eq!(
        (&app["origin"], &app["state"]),
        (&"preinstalled".into(), &"running".into())
    );
    gateway.json(&["app", "stop", "unit-convert"]);

    let gateway = gateway.kill().start();
    assert_eq!(gateway.app("overheat-alarm")["state"], "running");
    assert_eq!(gateway.app("unit-convert")["state"], "stopped");
    gateway.json(&["app", "pause", "overheat-alarm"]);
    gateway.json(&["app", "start", "unit-convert"]);
    gateway.json(&["app", "pause", "unit-convert"]);
    gateway.json(&["app", "resume", "unit-convert"]);

    let gateway = gateway.kill().start();
    assert_eq!(gateway.app("overheat-alarm")["state"], "paused");
    assert_eq!(gateway.app("unit-convert")["state"], "running");
    let error = gateway.cli_error(&["app", "remove", "unit-convert"]);
    assert!(error.contains("is part of the system"), "{error}");
}

#[test]
fn one_that_is_damaged_is_named_and_the_others_run() {
    let (home, folder) = home(&["overheat-alarm", "unit-convert"]);
    let file = folder.join("unit-convert/unit-convert.cwasm");
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    let gateway = home.start();
    assert_eq!(gateway.app("overheat-alarm")["state"], "running");
    let app = gateway.app("unit-convert");
    assert_eq!(app["state"], "quarantined");
    let reason = app["reason"].as_str().unwrap();
    assert!(
        reason.contains("unit-convert.cwasm: it is damaged"),
        "{reason}"
    );
}

#[test]
fn what_is_there_as_compiled_code_only_can_not_be_replayed_and_the_error_says_what_to_do() {
    let (home, _) = home(&["unit-convert"]);
    let gateway = home.set("journal.topics", "#").start();
    Wire::connect(&gateway, "publisher").publish("plant/a", b"x");
    let replay = ["journal", "replay", "unit-convert"];
    let error = gateway.cli_error(&replay);
    assert!(
        error.contains("app unit-convert is part of the system")
            && error.contains("--package PATH"),
        "{error}"
    );
    let home = gateway.terminate().home;
    let output = home.command(&replay).output().unwrap();
    let same = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), same), (Some(1), error));
}

#[test]
fn a_folder_that_is_not_there_keeps_the_gateway_from_starting() {
    let home = Home::new().set("apps.preinstalled", "/nonexistent/apps");
    let message = home.refusal();
    assert!(message.contains("/nonexistent/apps"), "{message}");
}
