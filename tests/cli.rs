//! The command line as its users see it: the real program, its exit codes and its messages.

use std::fs::File;
use std::io::Write;
use std::os::fd::FromRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::termios::{LocalModes, tcgetattr};
use serde_json::Value;

/// `headgate` in `home`, with none of this process's own settings.
fn headgate(home: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_headgate"));
    command
        .args(args)
        .env_clear()
        .env("HOME", home)
        .env("XDG_STATE_HOME", home.join("state"))
        .current_dir(home);
    command
}

fn run(home: &Path, args: &[&str]) -> Output {
    headgate(home, args).output().unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

fn home() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn the_version_is_the_packages() {
    let output = run(home().path(), &["--version"]);
    assert!(output.status.success());
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        concat!("headgate ", env!("CARGO_PKG_VERSION"), "\n")
    );
}

#[test]
fn a_wrong_call_exits_with_2_and_says_what_is_wrong() {
    let home = home();
    for (args, culprit) in [
        (&["strat"][..], "strat"),
        (&["app", "instal", "x"], "instal"),
        (&["app", "inspect"], "<NAME>"),
        (&["app", "logs", "x", "-n", "many"], "many"),
        (&["demo", "--rate", "0"], "must be above 0"),
        (&["demo", "--rate", "fast"], "not a number"),
        (&["demo", "--sensors", "0"], "sensors"),
        (&["demo", "--duration", "-1"], "-1"),
        (&["run", "--mqtt"], "--mqtt"),
        (
            &["run", "--admin-socket", "a", "--socket", "b"],
            "--admin-socket",
        ),
    ] {
        let output = run(home.path(), args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(stderr(&output).contains(culprit), "{}", stderr(&output));
        assert!(output.stdout.is_empty(), "{args:?}");
    }
}

#[test]
fn with_json_errors_are_json_too() {
    let home = home();
    for (args, code) in [
        (&["--json", "status"][..], 1),
        (&["app", "list", "--json"], 1),
        (&["--json", "app", "install", "no-such-folder"], 1),
        (&["--json", "strat"], 2),
    ] {
        let output = run(home.path(), args);
        assert_eq!(output.status.code(), Some(code), "{args:?}");
        let error: Value = serde_json::from_slice(&output.stderr).unwrap();
        assert!(!error["error"].as_str().unwrap().is_empty());
    }
}

#[test]
fn where_no_gateway_runs_every_command_names_the_socket_and_how_to_start_one() {
    let home = home();
    for args in [
        &["status"][..],
        &["app", "list"],
        &["app", "inspect", "x"],
        &["app", "start", "x"],
        &["app", "stop", "x"],
        &["app", "restart", "x"],
        &["app", "remove", "x"],
        &["app", "logs", "x"],
        &["app", "logs", "x", "--follow"],
    ] {
        let output = run(home.path(), args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let socket = home.path().join("state/headgate/admin.sock");
        let message = stderr(&output);
        assert!(message.contains(socket.to_str().unwrap()), "{message}");
        assert!(message.contains("`headgate run`"), "{message}");
        assert_eq!(message.lines().count(), 1, "{message}");
    }
}

#[test]
fn the_socket_comes_from_the_flag_else_the_variable_else_the_file() {
    let home = home();
    let file = home.path().join("headgate.toml");
    std::fs::write(&file, "[admin]\nsocket = \"/from/file.sock\"\n").unwrap();
    let message = |flag: bool, variable: bool| {
        let mut args = vec!["status", "--config", file.to_str().unwrap()];
        if flag {
            args.extend(["--socket", "/from/flag.sock"]);
        }
        let mut command = headgate(home.path(), &args);
        if variable {
            command.env("HEADGATE_ADMIN_SOCKET", "/from/variable.sock");
        }
        stderr(&command.output().unwrap()).to_owned()
    };
    assert!(message(true, true).contains("/from/flag.sock"));
    assert!(message(false, true).contains("/from/variable.sock"));
    assert!(message(false, false).contains("/from/file.sock"));
}

#[test]
fn a_broken_configuration_is_named_before_anything_starts() {
    let home = home();
    let file = home.path().join("headgate.toml");
    std::fs::write(&file, "[mqtt]\nlisten = 1883\n").unwrap();
    for command in ["run", "status"] {
        let output = run(home.path(), &[command, "--config", file.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(1));
        let message = stderr(&output);
        assert!(message.contains("headgate.toml:2"), "{message}");
        assert!(message.contains("mqtt.listen"), "{message}");
    }
    let output = run(home.path(), &["run", "--log-level", "loud"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("--log-level"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn an_app_that_is_not_there_or_not_built_is_named() {
    let home = home();
    let output = run(home.path(), &["app", "install", "apps/none"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        stderr(&output),
        "headgate: apps/none: no such file or folder\n"
    );

    let app = home.path().join("apps/thermo");
    std::fs::create_dir_all(&app).unwrap();
    let manifest = "name = \"thermo\"\nversion = \"1.0.0\"\nsubscribe = [\"a/#\"]\n";
    std::fs::write(app.join("manifest.toml"), manifest).unwrap();
    let output = run(home.path(), &["app", "install", "apps/thermo"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("`headgate app build`"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn the_demo_without_its_apps_names_the_command_that_builds_them() {
    let home = home();
    for args in [
        &["demo", "--duration", "1"][..],
        &["demo", "--duration", "1", "--apps", "nowhere"],
    ] {
        let output = run(home.path(), args);
        assert_eq!(output.status.code(), Some(1));
        let message = stderr(&output);
        assert!(message.contains("`./dev demo`"), "{message}");
        assert!(message.contains("`cargo xtask apps`"), "{message}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let home = home();
    let mut child = headgate(home.path(), &["config", "schema"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stderr(&output), "");
}

#[test]
fn the_compiler_names_what_it_cannot_compile() {
    let home = home();
    std::fs::write(home.path().join("script.wasm"), "#!/bin/sh\n").unwrap();
    let args = ["app", "compile", "--output", "out", "script.wasm"];
    let output = run(home.path(), &args);
    assert_eq!(output.status.code(), Some(1));
    assert!(!stderr(&output).is_empty());
    assert!(!home.path().join("out").exists());
}

/// A component with which nothing is wrong but that it is none of an app.
const EMPTY_COMPONENT: &[u8] = b"\0asm\x0d\0\x01\0";

#[test]
fn compiling_ahead_names_the_target_the_cpu_and_the_app_that_are_wrong() {
    let home = home();
    let app = home.path().join("app");
    std::fs::create_dir(&app).unwrap();
    let manifest = "name = \"thermo\"\nversion = \"1.0.0\"\nsubscribe = [\"a\"]\n";
    std::fs::write(app.join("manifest.toml"), manifest).unwrap();
    std::fs::write(app.join("thermo.wasm"), EMPTY_COMPONENT).unwrap();
    let compile = |more: &[&str]| run(home.path(), &[&["app", "compile", "app"], more].concat());

    for (args, culprits) in [
        (
            &["--output", "out", "--target", "riscv64gc-unknown-linux-gnu"][..],
            &["riscv64gc", "aarch64-unknown-linux-gnu"][..],
        ),
        (
            &[
                "--output",
                "out",
                "--target",
                "aarch64-unknown-linux-gnu",
                "--cpu",
                "i7",
            ],
            &["\"i7\"", "cortex-a72"],
        ),
        (
            &["--output", "out", "--name", "other"],
            &["\"thermo\"", "\"other\""],
        ),
        (&["--output", "app"], &["app is not empty"]),
    ] {
        let output = compile(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        for culprit in culprits {
            assert!(stderr(&output).contains(culprit), "{}", stderr(&output));
        }
    }
    let output = compile(&["--output", "out"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("app thermo: the export `configure` is missing"),
        "{}",
        stderr(&output)
    );

    std::fs::write(app.join("thermo.wasm"), b"\0asm\x01\0\0\0").unwrap();
    let output = compile(&["--output", "out"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("app thermo: this is a core WebAssembly module"));
    assert!(!home.path().join("out").exists(), "nothing was written");
}

/// `headgate user add NAME … --file passwords`, with a password.
fn add_user(home: &Path, args: &[&str]) -> Output {
    let mut child = headgate(home, &["user", "add", "--file", "passwords"])
        .args(args)
        .arg("--password-stdin")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It may refuse what was asked for before it reads.
    let _ = child.stdin.take().unwrap().write_all(b"secret\n");
    child.wait_with_output().unwrap()
}

#[test]
fn the_groups_of_a_user_can_be_taken_away() {
    let home = home();
    let groups = || {
        let args = ["--json", "user", "list", "--file", "passwords"];
        let users: Value = serde_json::from_slice(&run(home.path(), &args).stdout).unwrap();
        users[0]["groups"].clone()
    };
    assert!(
        add_user(home.path(), &["anna", "--groups", "a,b"])
            .status
            .success()
    );
    assert!(add_user(home.path(), &["anna"]).status.success());
    assert_eq!(groups(), serde_json::json!(["a", "b"]));
    assert!(
        add_user(home.path(), &["anna", "--groups", ""])
            .status
            .success()
    );
    assert_eq!(groups(), serde_json::json!([]));
    let output = add_user(home.path(), &["anna", "--groups", "a,"]);
    assert!(!output.status.success());
    assert!(stderr(&output).contains("it is empty"), "{output:?}");
}

#[test]
fn a_password_file_that_was_named_is_not_blamed_on_the_configuration() {
    let output = run(home().path(), &["user", "list", "--file", "/nope"]);
    assert!(!output.status.success());
    let message = stderr(&output);
    assert!(message.starts_with("headgate: /nope: "), "{message}");
    assert!(message.contains("headgate user add"), "{message}");
}

/// Both ends of a new terminal: the one that types, and the one that programs have.
fn terminal() -> (File, File) {
    let (mut ours, mut theirs) = (0, 0);
    let nothing = std::ptr::null_mut();
    // SAFETY: the call writes to the first two places, and nulls stand for what it need not do.
    let made = unsafe {
        libc::openpty(
            &mut ours,
            &mut theirs,
            nothing,
            nothing.cast(),
            nothing.cast(),
        )
    };
    assert_eq!(made, 0);
    // SAFETY: both were just opened, and nobody else has them.
    unsafe { (File::from_raw_fd(ours), File::from_raw_fd(theirs)) }
}

#[test]
fn a_password_prompt_that_is_interrupted_leaves_the_terminal_as_it_was() {
    for by_key in [true, false] {
        let home = home();
        let (mut ours, theirs) = terminal();
        let end = || Stdio::from(theirs.try_clone().unwrap());
        let mut command = headgate(home.path(), &["user", "add", "anna", "--file", "passwords"]);
        command.stdin(end()).stdout(end()).stderr(Stdio::piped());
        // SAFETY: system calls that touch no memory.
        unsafe {
            command.pre_exec(|| {
                // A session whose terminal it is.
                libc::setsid();
                match libc::ioctl(0, libc::TIOCSCTTY, 0) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            });
        }
        let modes = || tcgetattr(&theirs).unwrap().local_modes;
        let before = modes();
        assert!(before.contains(LocalModes::ECHO));
        let mut child = command.spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while modes().contains(LocalModes::ECHO) {
            assert_eq!(child.try_wait().unwrap(), None);
            assert!(Instant::now() < deadline, "it never asks");
            std::thread::sleep(Duration::from_millis(2));
        }
        match by_key {
            true => ours.write_all(b"sec\x03").unwrap(),
            // SAFETY: a call that touches no memory, to this test's own child.
            false => assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGTERM) }, 0),
        }
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(modes(), before);
        assert!(!home.path().join("passwords").exists());
        assert!(
            stderr(&output).contains("nothing was changed"),
            "{output:?}"
        );
    }
}
