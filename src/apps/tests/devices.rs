//! GPIO lines and sensors, on a board and in a sysfs that the test makes.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::house::*;
use crate::apps::gpio::{Chips, Edge, Line};
use crate::apps::manifest::{Direction, GpioLine};
use crate::apps::{AppErrorKind, AppInfo, AppState};
use crate::config::AppNames;
use crate::event::unix_time_ns;

/// A machine with GPIO lines and sensors.
struct Machine {
    board: Board,
    sysfs: tempfile::TempDir,
}

/// Lines by their names, as far as somebody has them.
#[derive(Clone, Debug, Default)]
struct Board(Arc<Mutex<Lines>>);

#[derive(Debug, Default)]
struct Lines {
    taken: BTreeMap<String, Taken>,
    /// What all lines are, unless they are set.
    level: bool,
    is_unplugged: bool,
    /// Outputs can't be set.
    is_stuck: bool,
    requests: usize,
}

#[derive(Debug)]
struct Taken {
    level: Option<bool>,
    /// The way for edges.
    to_line: UnixStream,
}

struct BoardLine {
    board: Board,
    name: String,
    edges: UnixStream,
    sequence: Mutex<u32>,
}

const RISING: u8 = 1;
const FALLING: u8 = 0;
/// The kernel has dropped an edge.
const MISSED: u8 = 2;
const GONE: u8 = 3;

impl Board {
    fn taken(&self) -> Vec<String> {
        self.0.lock().taken.keys().cloned().collect()
    }

    fn level(&self, name: &str) -> Option<bool> {
        self.0.lock().taken[name].level
    }

    fn edges(&self, name: &str, edges: &[u8]) {
        let mut to_line = self.0.lock().taken[name].to_line.try_clone().unwrap();
        to_line.write_all(edges).unwrap();
    }
}

impl Chips for Board {
    fn request(&self, line: &GpioLine, consumer: &str) -> Result<Box<dyn Line>, String> {
        let mut lines = self.0.lock();
        lines.requests += 1;
        if lines.is_unplugged {
            return Err("there is no chip".into());
        }
        let name = line.name.to_string();
        if lines.taken.contains_key(&name) {
            return Err(format!("somebody has it already, says {consumer}"));
        }
        let (to_line, edges) = UnixStream::pair().unwrap();
        edges.set_nonblocking(true).unwrap();
        let level = match line.direction {
            Direction::Output { initial } => Some(initial),
            Direction::Input { .. } => None,
        };
        lines.taken.insert(name.clone(), Taken { level, to_line });
        Ok(Box::new(BoardLine {
            board: self.clone(),
            name,
            edges,
            sequence: Mutex::new(0),
        }))
    }
}

impl Line for BoardLine {
    fn value(&self) -> io::Result<bool> {
        let lines = self.board.0.lock();
        Ok(lines.taken[&self.name].level.unwrap_or(lines.level))
    }

    fn set(&self, value: bool) -> io::Result<()> {
        let mut lines = self.board.0.lock();
        if lines.is_stuck {
            return Err(io::Error::other("stuck"));
        }
        lines.taken.get_mut(&self.name).unwrap().level = Some(value);
        Ok(())
    }

    fn next_edge(&self) -> io::Result<Option<Edge>> {
        let mut sequence = self.sequence.lock();
        loop {
            let mut byte = [0];
            match (&self.edges).read_exact(&mut byte) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
            *sequence += 1;
            match byte[0] {
                MISSED => continue,
                GONE => return Err(io::Error::other("No such device")),
                edge => {
                    return Ok(Some(Edge {
                        rising: edge == RISING,
                        unix_ns: 1000 + u64::from(*sequence),
                        sequence: *sequence,
                    }));
                }
            }
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.edges.as_fd()
    }
}

impl Drop for BoardLine {
    fn drop(&mut self) {
        self.board.0.lock().taken.remove(&self.name);
    }
}

impl Machine {
    fn new() -> Machine {
        Machine {
            board: Board::default(),
            sysfs: tempfile::tempdir().unwrap(),
        }
    }

    fn house(&self) -> House {
        House::with(|config| self.join(config))
    }

    fn join(&self, config: &mut crate::apps::AppsConfig) {
        config.gpio = AppNames::All;
        config.sensors = AppNames::All;
        config.chips = Arc::new(self.board.clone());
        config.sysfs = self.sysfs.path().to_owned();
        config.restart.first_pause = Duration::from_millis(1);
        config.restart.longest_pause = Duration::from_millis(1);
        config.restart.most_failures = 1000;
    }

    /// The file of a hwmon device's channel.
    fn channel(&self, device: &str, channel: &str) -> PathBuf {
        let folder = self.sysfs.path().join("class/hwmon").join(device);
        fs::create_dir_all(&folder).unwrap();
        folder.join(channel)
    }
}

/// A keeper with these devices.
fn device_manifest(name: &str, limits: &str, devices: &str) -> String {
    let manifest = keeper_manifest(name, limits);
    format!("capabilities = [\"gpio\", \"sensors\"]\n{manifest}{devices}")
}

const INPUT: &str =
    "[[gpio]]\nname = \"door\"\nchip = \"board\"\nline = 1\ndirection = \"input\"\n";
const OUTPUT: &str =
    "[[gpio]]\nname = \"lamp\"\nchip = \"board\"\nline = 2\ndirection = \"output\"\n";

fn sensor(name: &str, device: &str) -> String {
    format!(
        "[[sensor]]\nname = {name:?}\ndevice = {device:?}\nchannel = \"temp1_input\"\n\
         interval_ms = 10\n"
    )
}

fn install(house: &House, name: &str, devices: &str) -> AppInfo {
    let manifest = device_manifest(name, "batch_deadline_ms = 1000", devices);
    house.apps.install(&manifest, &keeper("")).unwrap()
}

/// Descriptors and sensors that the threads look after.
fn watched(house: &House) -> (usize, usize) {
    let devices = &house.apps.control.shared.devices;
    (devices.watcher.len(), devices.sensors.len())
}

#[test]
fn an_edge_comes_as_an_event_with_the_kernels_time() {
    let machine = Machine::new();
    let house = machine.house();
    let info = install(&house, "a", INPUT);
    assert_eq!((info.state, info.lines), (AppState::Running, 1));
    machine.board.edges("door", &[RISING, FALLING]);
    let info = house.eventually("a", "both", |info| info.counters.handled == 2);
    assert_eq!(info.counters.devices.edges, 2);
    assert_eq!(
        house.sink.lines(),
        ["a out $gpio/door=1", "a out $gpio/door=0"]
    );
    let times: Vec<_> = house.sink.events().iter().map(|e| e.timestamp_ns).collect();
    assert_eq!(times, [1001, 1002]);
}

#[test]
fn a_line_without_edges_is_read_and_not_waited_for() {
    let machine = Machine::new();
    let house = machine.house();
    install(&house, "a", &format!("{INPUT}edges = \"none\"\n"));
    assert_eq!(watched(&house), (0, 0));
    assert_eq!(house.ask("a", &["adoor"]), ["0"]);
    machine.board.0.lock().level = true;
    assert_eq!(house.ask("a", &["adoor"]), ["1"]);
}

#[test]
fn an_output_changes_when_the_call_has_ended_well() {
    let machine = Machine::new();
    let house = machine.house();
    install(&house, "a", &format!("{OUTPUT}initial = true\n"));
    assert_eq!(machine.board.level("lamp"), Some(true));
    assert_eq!(
        house.ask("a", &["alamp", "xlamp", "alamp"]),
        ["1", "", "0"],
        "a call sees what it has set"
    );
    assert_eq!(machine.board.level("lamp"), Some(false));
    // The first half goes well alone, the other one does not.
    house.ask("a", &["adoor", "alamp", "Alamp", "E"]);
    house.eventually("a", "the failure", |info| info.counters.failed == 1);
    assert_eq!(machine.board.level("lamp"), Some(true));
    house.ask("a", &["U"]);
    house.eventually("a", "a fresh instance", |info| {
        info.state == AppState::Running && info.counters.failed == 2
    });
    assert_eq!(machine.board.level("lamp"), Some(true), "as `initial` says");
}

#[test]
fn lines_that_are_not_there_or_can_not_be_set_are_refused_and_counted() {
    let machine = Machine::new();
    let house = machine.house();
    install(&house, "a", &format!("{INPUT}{OUTPUT}"));
    const UNKNOWN: &str = "0";
    const NOT_AN_OUTPUT: &str = "1";
    assert_eq!(
        house.ask("a", &["agate", "Agate", "Adoor", "Alamp"]),
        ["7", UNKNOWN, NOT_AN_OUTPUT, ""]
    );
    assert_eq!(house.info("a").counters.refused_calls.gpio, 3);
    machine.board.0.lock().is_stuck = true;
    assert_eq!(house.ask("a", &["xlamp"]), [""]);
    assert_eq!(house.info("a").counters.devices.unset_outputs, 1);
    let log = house.apps.logs("a", 10).unwrap();
    let complaint = |text: &str| log.iter().any(|line| line.message.contains(text));
    assert!(
        complaint("no `[[gpio]]` with the name \"gate\""),
        "{log:#?}"
    );
}

#[test]
fn devices_go_with_the_instance_on_every_way_out() {
    let machine = Machine::new();
    fs::write(machine.channel("hwmon0", "temp1_input"), "1000").unwrap();
    let house = machine.house();
    let devices = format!("{INPUT}{OUTPUT}{}", sensor("cpu", "hwmon0"));
    let manifest = device_manifest("a", "batch_deadline_ms = 20", &devices);
    let version = |version: &str| manifest.replace("1.0.0", version);
    house.apps.install(&manifest, &keeper("")).unwrap();
    let held = |why: &str| {
        let info = house.until_state("a", AppState::Running);
        assert_eq!((info.lines, info.sensors), (2, 1), "{why}");
        assert_eq!(machine.board.taken(), ["door", "lamp"], "{why}");
        assert_eq!(watched(&house), (1, 1), "{why}");
    };
    let gone = |why: &str| {
        assert_eq!(machine.board.taken(), [""; 0], "{why}");
        assert_eq!(watched(&house), (0, 0), "{why}");
    };
    held("install");
    for word in ["U", "Z", "R"] {
        let failed = house.info("a").counters.failed;
        house.send("a/in", &[word]);
        house.eventually("a", "the failure", |info| info.counters.failed > failed);
        held(word);
    }
    house.apps.pause("a").unwrap();
    assert_eq!(watched(&house), (1, 1), "pause");
    house.apps.resume("a").unwrap();
    held("resume");
    house.apps.restart("a").unwrap();
    held("restart");
    house.apps.install(&version("2.0.0"), &keeper("")).unwrap();
    held("upgrade");
    house.apps.stop("a").unwrap();
    gone("stop");
    assert_eq!((house.info("a").lines, house.info("a").sensors), (0, 0));
    house.apps.start("a").unwrap();
    held("start");
    house.apps.drain("a", Duration::from_secs(30)).unwrap();
    gone("drain");
    house.apps.start("a").unwrap();
    held("start");
    // Fails until the breaker opens, with a pause after that which no test outlasts.
    let patient = version("3.0.0") + "[restart]\nfirst_pause_ms = 3600000\nretries = 0\n";
    house.apps.install(&patient, &keeper("")).unwrap();
    // At once, for readings that are handled meanwhile count for the app.
    house.send("a/in", &["U"; 40]);
    house.eventually("a", "a pause", |info| {
        info.state == AppState::BackingOff && info.lines == 0
    });
    gone("back-off");
    house.apps.install(&version("4.0.0"), &keeper("")).unwrap();
    // It fails with those that wait still, too.
    house.eventually("a", "its lines", |info| {
        info.counters.queued == 0 && info.state == AppState::Running && info.lines == 2
    });
    held("upgrade after back-off");
    house.apps.remove("a").unwrap();
    gone("remove");
    // `configure` runs into an endless loop.
    let info = house.apps.install(&patient, &keeper("Z.")).unwrap();
    assert_eq!(info.state, AppState::BackingOff, "{info:#?}");
    gone("a start that fails");
    house.apps.install(&manifest, &keeper("")).unwrap();
    held("install");
    drop(house);
    assert_eq!(machine.board.taken(), [""; 0], "shutdown");
}

#[test]
fn a_line_that_can_not_be_had_fails_the_start_until_it_can() {
    let machine = Machine::new();
    machine.board.0.lock().is_unplugged = true;
    let house = machine.house();
    let info = install(&house, "a", &format!("{OUTPUT}{INPUT}"));
    assert_ne!(info.state, AppState::Running);
    let error = info.last_error.unwrap();
    assert_eq!(
        error,
        "the GPIO line \"lamp\" (line 2 of board) can't be had: there is no chip"
    );
    house.eventually("a", "another try", |info| info.restarts.failure > 1);
    machine.board.0.lock().is_unplugged = false;
    house.until_state("a", AppState::Running);
    // Of an app that gets only one of its lines, the other one is given back.
    let two = INPUT.replace("door", "gate").replace("= 1", "= 3") + INPUT;
    install(&house, "b", &two);
    let info = house.eventually("b", "the error", |info| info.last_error.is_some());
    let error = info.last_error.unwrap();
    assert!(
        error.contains("\"door\" (line 1 of board) can't be had: somebody has it already, says b"),
        "{error}"
    );
    house.apps.stop("b").unwrap();
    assert_eq!(machine.board.taken(), ["door", "lamp"]);
}

#[test]
fn a_line_that_goes_with_its_chip_is_taken_again_by_a_fresh_instance() {
    let machine = Machine::new();
    let house = machine.house();
    install(&house, "a", INPUT);
    machine.board.0.lock().is_unplugged = true;
    machine.board.edges("door", &[RISING, GONE]);
    let info = house.eventually("a", "another try", |info| info.restarts.failure > 1);
    assert_eq!(info.counters.devices.edges, 1);
    assert_eq!(machine.board.taken(), [""; 0]);
    machine.board.0.lock().is_unplugged = false;
    house.until_state("a", AppState::Running);
    machine.board.edges("door", &[FALLING]);
    house.eventually("a", "both", |info| info.counters.handled == 2);
    let log = house.apps.logs("a", 100).unwrap();
    let told = |line: &crate::apps::LogLine| line.message.contains("\"door\" is gone: No such");
    assert!(log.iter().any(told), "{log:#?}");
}

#[test]
fn a_line_that_chatters_fills_its_apps_queue_and_hinders_no_other() {
    let machine = Machine::new();
    let house = machine.house();
    house.install_keeper("other", "batch_deadline_ms = 1000");
    let limits = "batch_deadline_ms = 2000\nqueue_events = 5";
    let manifest = device_manifest("a", limits, INPUT);
    house.apps.install(&manifest, &keeper("")).unwrap();
    // Hangs in a call meanwhile.
    house.send("a/in", &["Zx"]);
    let mut edges = vec![RISING; 1000];
    edges[500] = MISSED;
    machine.board.edges("door", &edges);
    let info = house.eventually("a", "all of them", |info| {
        info.counters.devices.edges == 999
    });
    assert_eq!(info.counters.devices.missed_edges, 1);
    // In the call is the word; a batch that finds the queue empty is taken whole.
    assert!(info.counters.queued <= 1 + 64, "{:#?}", info.counters);
    assert!(info.counters.dropped.queue_full >= 999 - 64);
    assert_eq!(house.ask("other", &["skone", "gk"]), ["", "one"]);
}

#[test]
fn an_app_gets_no_capability_that_the_configuration_does_not_give_it() {
    let machine = Machine::new();
    let only = |names: &[&str]| AppNames::Only(names.iter().map(|n| n.to_string()).collect());
    let house = House::with(|config| {
        machine.join(config);
        config.gpio = only(&["a"]);
    });
    let denied = device_manifest("b", "", INPUT);
    let error = house.apps.install(&denied, &keeper("")).unwrap_err();
    assert_eq!(error.kind(), AppErrorKind::Conflict);
    assert_eq!(
        error.to_string(),
        "app b: manifest: line 1: `capabilities`: this gateway doesn't let it have \"gpio\"; name it \
         in `apps.gpio` of the gateway's configuration, or take this out of the manifest"
    );
    assert!(house.apps.list().is_empty());
    install(&house, "a", INPUT);
    assert_eq!(machine.board.taken(), ["door"]);

    // What is taken back holds from the next start on, whatever the operator tries.
    let house = house.reopen(|config| {
        machine.join(config);
        config.sensors = only(&["b"]);
    });
    let info = house.info("a");
    assert_eq!(info.state, AppState::Quarantined);
    assert!(info.reason.unwrap().contains("`apps.sensors`"));
    let error = house.apps.start("a").unwrap_err();
    assert!(error.to_string().contains("`apps.sensors`"), "{error}");
    assert_eq!(machine.board.taken(), [""; 0]);
    let house = house.reopen(|config| machine.join(config));
    house.until_state("a", AppState::Running);
    assert_eq!(machine.board.taken(), ["door"]);
}

#[test]
fn readings_come_as_events_and_go_on_when_the_sensor_comes_back() {
    let machine = Machine::new();
    let house = machine.house();
    let begin = unix_time_ns();
    install(&house, "a", &sensor("cpu", "hwmon0"));
    let info = house.eventually("a", "failures", |info| {
        info.counters.devices.failed_readings > 1
    });
    assert_eq!((info.state, info.sensors), (AppState::Running, 1));
    let log = house.apps.logs("a", 100).unwrap();
    let told: Vec<_> = log
        .iter()
        .filter(|line| {
            line.message
                .contains("the sensor \"cpu\" can't be read: there is no device \"hwmon0\"")
        })
        .collect();
    assert_eq!(told.len(), 1, "{log:#?}");

    let write = |path: &Path, text: &str| {
        // Whole at once, as the kernel's files are.
        let draft = machine.sysfs.path().join("draft");
        fs::write(&draft, text).unwrap();
        fs::rename(&draft, path).unwrap();
    };
    let file = machine.channel("hwmon0", "temp1_input");
    write(&file, "48312\n");
    house.eventually("a", "readings", |info| info.counters.handled > 1);
    let readings = house.sink.events();
    assert_eq!(readings[0].payload, "$sensor/cpu=48.312");
    assert!((begin..=unix_time_ns()).contains(&readings[0].timestamp_ns));

    fs::remove_file(&file).unwrap();
    let failed = house.info("a").counters.devices.failed_readings;
    house.eventually("a", "failures", |info| {
        info.counters.devices.failed_readings > failed + 1
    });
    write(&file, "-5000\n");
    house.eventually("a", "the sensor", |_| {
        let events = house.sink.events();
        events
            .last()
            .is_some_and(|event| event.payload == "$sensor/cpu=-5")
    });
}

#[test]
fn a_sensor_that_blocks_hinders_no_other() {
    let machine = Machine::new();
    // Whoever opens such a file waits until somebody writes.
    let stuck = machine.channel("hwmon0", "temp1_input");
    let made = Command::new("mkfifo").arg(&stuck).status().unwrap();
    assert!(made.success());
    fs::write(machine.channel("hwmon1", "temp1_input"), "1000").unwrap();
    let house = machine.house();
    let both = sensor("stuck", "hwmon0") + &sensor("also", "hwmon0");
    install(&house, "a", &both);
    install(&house, "b", &sensor("good", "hwmon1"));
    house.eventually("b", "readings", |info| info.counters.handled > 5);
    assert_eq!(house.info("a").counters.devices.readings, 0);
    house.apps.remove("a").unwrap();
    assert_eq!(watched(&house), (0, 1));
    house.eventually("b", "more", |info| info.counters.handled > 10);
    // The thread comes back, and what it brings is nobody's.
    fs::write(&stuck, "1000").unwrap();
    fs::remove_file(&stuck).unwrap();
    house.eventually("b", "more", |info| info.counters.handled > 20);
    assert!(
        house
            .sink
            .lines()
            .iter()
            .all(|line| line == "b out $sensor/good=1")
    );
}
