//! Upgrades of apps as their operator sees them, and the end of the gateway in the middle of one.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::Value;

use crate::apps::{Package, guest, guest_with, manifest};
use crate::gateway::{Gateway, Home};
use crate::wire::Wire;

/// `package`, but of another version, and with another component if there is one.
fn version(package: &Package, version: &str, component: Option<&[u8]>) -> Package {
    let read = |file| std::fs::read(package.path().join(file)).unwrap();
    let manifest = String::from_utf8(read("manifest.toml")).unwrap();
    let manifest = manifest.replace("\"1.0.0\"", &format!("{version:?}"));
    match component {
        Some(component) => Package::new(&manifest, component),
        None => Package::new(&manifest, read("app.wasm")),
    }
}

fn upgrade(gateway: &Gateway, package: &Package) {
    gateway.json(&["app", "upgrade", package.as_str()]);
}

/// Sets a flag when it goes.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn while_messages_come_an_upgrade_loses_none_and_a_bad_one_goes_back() {
    let gateway = Home::new().start();
    let scale = |factor| Package::multiplier("scale", "in", "out/", factor);
    let first = scale(2);
    gateway.install(first.path());
    let mut subscriber = Wire::connect(&gateway, "subscriber");
    subscriber.subscribe("out/#", 1);
    let results = thread::spawn(move || {
        let mut results = Vec::new();
        loop {
            let body: Value = serde_json::from_slice(subscriber.next_message().payload()).unwrap();
            match body["number"].as_u64() {
                Some(number) => results.push((number, body["value"].as_f64().unwrap())),
                None => return results,
            }
        }
    });
    let ends = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut publisher = Wire::connect(&gateway, "publisher");
            let mut number = 0;
            while !ends.load(Ordering::Relaxed) {
                let reading = format!("{{\"number\":{number},\"value\":1}}");
                publisher.publish("in/x", reading.as_bytes());
                number += 1;
            }
            publisher.publish("in/x", b"{\"number\":\"last\",\"value\":1}");
        });
        // Ends the publisher, even if an assertion fails.
        let _ends = Ends(&ends);
        let handled = |app: &Value| app["counters"]["handled"].as_u64().unwrap();
        gateway.until_app("scale", "some events", |app| handled(app) > 1000);
        upgrade(&gateway, &version(&scale(3), "2.0.0", None));
        gateway.until_app("scale", "the end of the trial", |app| {
            app["trial_batches_left"].is_null()
        });
        // Comes up, and traps on the first message. By then the command may be back, or not.
        let traps = guest_with("0x55", "0x7b");
        let bad = version(&first, "3.0.0", Some(&traps));
        gateway.cli(&["app", "upgrade", bad.as_str()]);
        let app = gateway.until_app("scale", "the rollback", |app| {
            app["restarts"]["rollback"] == 1
        });
        assert_eq!(app["version"], "2.0.0");
    });
    let results = results.join().unwrap();
    for (expected, (number, _)) in results.iter().enumerate() {
        assert_eq!(*number, expected as u64, "each once, in order");
    }
    let switched = results.iter().position(|(_, value)| *value == 3.0).unwrap();
    assert!(results[..switched].iter().all(|(_, value)| *value == 2.0));
    assert!(results[switched..].iter().all(|(_, value)| *value == 3.0));
    let app = gateway.app("scale");
    assert_eq!(app["counters"]["failed"], 0, "{app:#}");
    gateway.assert_adds_up();
}

#[test]
fn the_command_says_why_a_version_does_not_come_up_and_goes_back_on_request() {
    let gateway = Home::new().start();
    let first = Package::new(&manifest("a"), guest(""));
    let error = gateway.cli_error(&["app", "upgrade", first.as_str()]);
    assert!(error.contains("no app is called \"a\""), "{error}");
    gateway.install(first.path());
    let broken = version(&first, "2.0.0", Some(&guest("(unreachable)")));
    let error = gateway.cli_error(&["app", "upgrade", broken.as_str()]);
    assert!(
        error.contains("app a: version 2.0.0 failed on trial, and version 1.0.0 is back"),
        "{error}"
    );
    let greedy = manifest("a").replace("\"1.0.0\"", "\"2.0.0\"");
    let greedy = Package::new(&greedy.replace("= 64", "= 1025"), guest(""));
    let error = gateway.cli_error(&["app", "upgrade", greedy.as_str()]);
    assert!(
        error.contains("`limits.memory_pages`: 1025 is out of range"),
        "{error}"
    );
    assert_eq!(gateway.app("a")["version"], "1.0.0");

    upgrade(&gateway, &version(&first, "2.0.0", None));
    let app = gateway.app("a");
    assert_eq!(
        (&app["version"], &app["previous_version"]),
        (&"2.0.0".into(), &"1.0.0".into())
    );
    let third = version(&first, "3.0.0", None);
    let error = gateway.cli_error(&["app", "upgrade", third.as_str()]);
    assert!(error.contains("on trial still"), "{error}");
    gateway.json(&["app", "rollback", "a"]);
    assert_eq!(gateway.app("a")["version"], "1.0.0");
}

#[test]
fn a_manifest_that_asks_for_more_than_the_gateway_allows_is_refused_then_and_later() {
    let home = Home::new().set("apps.max_memory_pages", 128);
    let gateway = home.start();
    let ask = |pages| {
        let manifest = manifest("a").replace("= 64", &format!("= {pages}"));
        Package::new(&manifest, guest(""))
    };
    let error = gateway.cli_error(&["app", "install", ask(129).as_str()]);
    assert!(
        error.contains("app a: `limits.memory_pages` is 129, and this gateway allows 128"),
        "{error}"
    );
    assert!(error.contains("apps.max_memory_pages"), "{error}");
    gateway.install(ask(128).path());
    let gateway = gateway.kill().set("apps.max_memory_pages", 100).start();
    let app = gateway.until_app("a", "quarantined", |app| app["state"] == "quarantined");
    assert!(
        app["reason"].as_str().unwrap().contains("allows 100"),
        "{app:#}"
    );
    let error = gateway.cli_error(&["app", "start", "a"]);
    assert!(error.contains("allows 100"), "{error}");
}

#[test]
fn kill_9_in_the_middle_of_installing_upgrading_and_removing_leaves_a_whole_store() {
    let first = Package::new(&manifest("a"), guest(""));
    let second = version(&first, "2.0.0", Some(&guest("(nop)")));
    let commands = [
        vec!["app", "install", first.as_str()],
        vec!["app", "upgrade", second.as_str()],
        vec!["app", "rollback", "a"],
        vec!["app", "remove", "a"],
    ];
    let mut home = Home::new();
    for round in 0..100 {
        let gateway = home.start();
        let command = &commands[fastrand::usize(..commands.len())];
        // At a random point, so neither the command nor the time is a matter of waiting for something.
        let at = Duration::from_micros(fastrand::u64(..60_000));
        let mut cli = home_command(&gateway, command);
        thread::sleep(at);
        home = gateway.kill();
        cli.wait().unwrap();

        let gateway = home.start();
        let apps = gateway.json(&["app", "list"]);
        let apps = apps.as_array().unwrap();
        let context = format!("round {round}, {command:?} after {at:?}: {apps:#?}");
        assert!(apps.len() <= 1, "{context}");
        if let [app] = &apps[..] {
            assert!(
                ["1.0.0", "2.0.0"].contains(&app["version"].as_str().unwrap()),
                "{context}"
            );
            let app = gateway.until_app("a", "running", |app| app["state"] == "running");
            assert_eq!(app["name"], "a", "{context}");
            // It works, whichever version it is.
            let before = app["counters"]["handled"].as_u64().unwrap();
            Wire::connect(&gateway, "c").publish("a/in", b"hello");
            gateway.until_app("a", "the event", |app| {
                app["counters"]["handled"].as_u64().unwrap() > before
            });
        }
        home = gateway.kill();
    }
    // And all can be done still.
    let gateway = home.start();
    if !gateway
        .json(&["app", "list"])
        .as_array()
        .unwrap()
        .is_empty()
    {
        gateway.json(&["app", "remove", "a"]);
    }
    gateway.install(first.path());
    upgrade(&gateway, &second);
    gateway.json(&["app", "remove", "a"]);
    // What a compiler has left that outlived its gateway goes with the next start.
    let gateway = gateway.kill().start();
    let left = std::fs::read_dir(gateway.home().store().join("aot")).unwrap();
    assert_eq!(left.count(), 0);
}

/// A small file system in a gateway's store. Needs root.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// None: this user may not mount.
    fn at(folder: &Path) -> Option<SmallDisk> {
        std::fs::create_dir_all(folder).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=16m,mode=700", "tmpfs"]);
        let mounted = mount.arg(folder).output();
        let mounted = mounted.is_ok_and(|output| output.status.success());
        mounted.then(|| SmallDisk(folder.to_owned()))
    }

    /// Leaves no room.
    fn fill(&self) {
        let mut file = std::fs::File::create(self.0.join("filler")).unwrap();
        while file.write_all(&[0; 4096]).is_ok() {}
    }

    fn free(&self) {
        std::fs::remove_file(self.0.join("filler")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

#[test]
fn on_a_full_disk_installing_and_upgrading_fail_and_what_runs_goes_on() {
    let home = Home::new();
    let Some(disk) = SmallDisk::at(&home.store()) else {
        eprintln!("SKIPPED: mounting a file system needs root");
        return;
    };
    let gateway = home.start();
    let first = Package::new(&manifest("a"), guest(""));
    gateway.install(first.path());
    disk.fill();
    let second = version(&first, "2.0.0", Some(&guest("(nop)")));
    let other = Package::new(&manifest("b"), guest("(nop) (nop)"));
    for (verb, package) in [("upgrade", &second), ("install", &other)] {
        let error = gateway.cli_error(&["app", verb, package.as_str()]);
        assert!(
            error.contains("No space left on device") || error.contains("os error 28"),
            "{verb}: {error}"
        );
    }
    let apps = gateway.json(&["app", "list"]);
    assert_eq!(apps.as_array().unwrap().len(), 1, "{apps:#}");
    let works = |gateway: &Gateway, expected: &str| {
        let app = gateway.until_app("a", "running", |app| app["state"] == "running");
        assert_eq!(app["version"], expected);
        let before = app["counters"]["handled"].as_u64().unwrap();
        Wire::connect(gateway, "c").publish("a/in", b"hello");
        gateway.until_app("a", "the event", |app| {
            app["counters"]["handled"].as_u64().unwrap() > before
        });
    };
    works(&gateway, "1.0.0");
    disk.free();
    upgrade(&gateway, &second);
    works(&gateway, "2.0.0");
    let gateway = gateway.kill().start();
    works(&gateway, "2.0.0");
    gateway.terminate();
}

/// The command, under way.
fn home_command(gateway: &Gateway, args: &[&str]) -> Child {
    let mut command = gateway.home().command(args);
    command.stdout(Stdio::null());
    command.stderr(Stdio::null());
    command.spawn().unwrap()
}
