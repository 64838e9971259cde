//! Debian's mosquitto clients, as a user runs them.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

use crate::gateway::{Gateway, PATIENCE, finished};

fn command(gateway: &Gateway, program: &str) -> Command {
    let mut command = Command::new(program);
    let address = gateway.mqtt();
    command
        .args(["-h", &address.ip().to_string()])
        .args(["-p", &address.port().to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn spawn(mut command: Command) -> Child {
    command.spawn().unwrap_or_else(|error| {
        panic!(
            "these tests need mosquitto_pub and mosquitto_sub (on Debian, as root: apt-get install \
             mosquitto-clients; `./dev setup` does it): {error}"
        )
    })
}

/// Runs `mosquitto_pub ARGS`, which must work.
pub fn publish(gateway: &Gateway, args: &[&str]) {
    let mut command = command(gateway, "mosquitto_pub");
    command.args(args);
    let output = finished(spawn(command), PATIENCE);
    assert!(output.status.success(), "{args:?}: {output:?}");
    // It says so here, and exits with 0, when the gateway refuses a message.
    assert!(output.stderr.is_empty(), "{args:?}: {output:?}");
}

/// Runs `mosquitto_sub ARGS`, which must end by itself; what it prints.
pub fn subscribe_until_done(gateway: &Gateway, args: &[&str]) -> Vec<String> {
    let mut command = command(gateway, "mosquitto_sub");
    command.args(args);
    let output = finished(spawn(command), PATIENCE);
    assert!(output.status.success(), "{args:?}: {output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(str::to_owned).collect()
}

/// A `mosquitto_sub` that runs.
pub struct Subscriber {
    process: Child,
    lines: Receiver<String>,
}

/// Starts `mosquitto_sub ARGS`, with one topic filter in them, and waits until it has subscribed.
pub fn subscribe(gateway: &Gateway, args: &[&str]) -> Subscriber {
    let mut process = gateway.until_subscribed(1, || {
        let mut command = command(gateway, "mosquitto_sub");
        command.args(args);
        spawn(command)
    });
    let stdout = BufReader::new(process.stdout.take().unwrap());
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        for line in stdout.lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    Subscriber { process, lines }
}

impl Subscriber {
    /// The next line that it prints.
    pub fn line(&self) -> String {
        self.lines
            .recv_timeout(PATIENCE)
            .expect("mosquitto_sub prints a message")
    }

    /// What it has printed and nobody has looked at.
    pub fn lines_so_far(&self) -> Vec<String> {
        self.lines.try_iter().collect()
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: a call that touches no memory. The process is this test's own child and has not been waited
        // for, so its id is still its.
        #[allow(unsafe_code)]
        let result = unsafe { libc::kill(self.process.id() as i32, signal) };
        assert_eq!(result, 0);
    }

    /// As `kill -9` does it.
    pub fn kill(self) {}

    /// Goes, and waits until the gateway has seen it: the next subscriber isn't taken for this one.
    pub fn leave(self, gateway: &Gateway) {
        let clients = |status: &serde_json::Value| status["broker"]["connected"].as_u64().unwrap();
        let before = clients(&gateway.status());
        drop(self);
        gateway.until_status("clients", clients, before - 1);
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
