//! The real program, started by a test and gone with it.

use std::fmt::Debug;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::Value;
use tempfile::TempDir;

/// Longer than anything here takes on a machine that is busy with other things.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Asks again until there is an answer.
pub fn eventually<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "{what}: never came");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What outlives a gateway: its folder and its settings.
#[derive(Clone)]
pub struct Home {
    folder: Arc<TempDir>,
    settings: Vec<(String, String)>,
    program: PathBuf,
}

impl Home {
    pub fn new() -> Home {
        let home = Home {
            folder: Arc::new(tempfile::tempdir().unwrap()),
            settings: Vec::new(),
            program: env!("CARGO_BIN_EXE_headgate").into(),
        };
        let store = home.store();
        home.set("store.path", store.display())
            .set("mqtt.listen", "127.0.0.1:0")
            .set("metrics.listen", "127.0.0.1:0")
    }

    /// Sets a key of the configuration, through its variable.
    pub fn set(mut self, key: &str, value: impl ToString) -> Home {
        let variable = format!("HEADGATE_{}", key.replace('.', "_").to_uppercase());
        self.settings.retain(|(known, _)| *known != variable);
        self.settings.push((variable, value.to_string()));
        self
    }

    /// Runs another copy of the program.
    pub fn with_program(self, program: PathBuf) -> Home {
        Home { program, ..self }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn store(&self) -> PathBuf {
        self.path().join("store")
    }

    /// Of the journal.
    pub fn first_segment(&self) -> PathBuf {
        self.store().join("journal/00000000000000000000.journal")
    }

    /// `headgate ARGS` in this folder, with these settings and none of this process's own.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(args)
            .env_clear()
            .env("HOME", self.path())
            .envs(self.settings.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .current_dir(self.path());
        command
    }

    /// Starts a gateway and waits until it says that it is ready.
    pub fn start(&self) -> Gateway {
        Gateway::start(self, &["run"], &[])
    }

    /// The same, told by `service_manager` to do more.
    pub fn start_with(&self, args: &[&str], service_manager: &[(&str, &str)]) -> Gateway {
        Gateway::start(self, args, service_manager)
    }

    /// What `headgate run` says when it refuses to start. Fails if it starts, or if what it says
    /// isn't for people.
    pub fn refusal(&self) -> String {
        self.refusal_of(self.command(&["run"]))
    }

    pub fn refusal_of(&self, mut command: Command) -> String {
        let child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let output = finished(child, PATIENCE);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{message}");
        assert_for_people(&message);
        let said = message
            .lines()
            .find(|line| line.starts_with("headgate: "))
            .unwrap_or_else(|| panic!("no error in: {message}"));
        let at = message.find(said).unwrap();
        message[at..].to_owned()
    }
}

/// An error is a sentence and not a dump.
pub fn assert_for_people(message: &str) {
    for dump in ["panicked", "RUST_BACKTRACE", "stack backtrace", "unwrap()"] {
        assert!(!message.contains(dump), "{message}");
    }
}

/// The output of a process that must end by itself.
pub fn finished(mut child: Child, within: Duration) -> Output {
    let read = |pipe: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut all = Vec::new();
            if let Some(mut pipe) = pipe {
                pipe.read_to_end(&mut all).unwrap();
            }
            all
        })
    };
    let stdout = read(child.stdout.take().map(|pipe| Box::new(pipe) as _));
    let stderr = read(child.stderr.take().map(|pipe| Box::new(pipe) as _));
    let deadline = Instant::now() + within;
    let mut status = None;
    while status.is_none() && Instant::now() < deadline {
        status = child.try_wait().unwrap();
        std::thread::sleep(Duration::from_millis(2));
    }
    let in_time = status.is_some();
    if !in_time {
        child.kill().unwrap();
    }
    let status = child.wait().unwrap();
    let output = Output {
        status,
        stdout: stdout.join().unwrap(),
        stderr: stderr.join().unwrap(),
    };
    assert!(in_time, "still ran after {within:?}: {output:?}");
    output
}

/// A running gateway. Killed when it is dropped.
pub struct Gateway {
    process: Child,
    home: Home,
    mqtt: SocketAddr,
    metrics: SocketAddr,
    log: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
    service_manager: ServiceManager,
}

/// How a gateway ended that was asked to.
pub struct Stopped {
    pub status: ExitStatus,
    pub took: Duration,
    pub log: String,
    pub home: Home,
}

impl Gateway {
    fn start(home: &Home, args: &[&str], extra: &[(&str, &str)]) -> Gateway {
        let service_manager = ServiceManager::listen(home.path());
        let mut process = home
            .command(args)
            .envs(extra.iter().copied())
            .env("NOTIFY_SOCKET", &service_manager.path)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::<Mutex<String>>::default();
        let stderr = process.stderr.take().unwrap();
        let reader = std::thread::spawn({
            let log = log.clone();
            move || {
                for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
                    let mut log = log.lock();
                    log.push_str(&String::from_utf8_lossy(&line));
                    log.push('\n');
                }
            }
        });
        let mut gateway = Gateway {
            process,
            home: home.clone(),
            mqtt: ([127, 0, 0, 1], 0).into(),
            metrics: ([127, 0, 0, 1], 0).into(),
            log,
            reader: Some(reader),
            service_manager,
        };
        gateway.wait_until_ready();
        let status = gateway.status();
        let address = |key: &str| status[key].as_str().unwrap_or_default().parse();
        if let Ok(mqtt) = address("mqtt_listen") {
            gateway.mqtt = mqtt;
        }
        if let Ok(metrics) = address("metrics_listen") {
            gateway.metrics = metrics;
        }
        gateway
    }

    fn wait_until_ready(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.service_manager.was_told("READY=1") {
            if let Some(status) = self.process.try_wait().unwrap() {
                panic!("the gateway ended at the start with {status}");
            }
            assert!(Instant::now() < deadline, "the gateway is never ready");
        }
    }

    pub fn home(&self) -> &Home {
        &self.home
    }

    pub fn mqtt(&self) -> SocketAddr {
        self.mqtt
    }

    pub fn service_manager(&mut self) -> &mut ServiceManager {
        &mut self.service_manager
    }

    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// What it has logged so far.
    pub fn log(&self) -> String {
        self.log.lock().clone()
    }

    pub fn until_logged(&self, what: &str) {
        eventually(what, || self.log.lock().contains(what).then_some(()));
    }

    // ---- The command line ----

    /// Runs `headgate ARGS` against this gateway.
    pub fn cli(&self, args: &[&str]) -> Output {
        let mut command = self.home.command(args);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        finished(child.spawn().unwrap(), PATIENCE)
    }

    /// What the command prints as JSON.
    pub fn json(&self, args: &[&str]) -> Value {
        let output = self.cli(&[&["--json"], args].concat());
        assert!(output.status.success(), "{args:?}: {output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// What a command that must fail says.
    pub fn cli_error(&self, args: &[&str]) -> String {
        let output = self.cli(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {output:?}");
        let message = String::from_utf8(output.stderr).unwrap();
        assert_for_people(&message);
        message
    }

    /// Installs the app in `folder`, which must then run.
    pub fn install(&self, folder: &Path) {
        let app = self.json(&["app", "install", folder.to_str().unwrap()]);
        assert_eq!(app["state"], "running", "{app:#}");
    }

    pub fn app(&self, name: &str) -> Value {
        self.json(&["app", "inspect", name])
    }

    pub fn until_app(&self, name: &str, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        let path = format!("/v1/apps/{name}");
        let mut last = Value::Null;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            last = self.admin(&path);
            if is(&last) {
                return last;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        panic!("{name}: {what} never came: {last:#}");
    }

    // ---- What it says about itself ----

    /// `GET`s from the admin API; what `headgate status` and its like do, without a process each.
    pub fn admin(&self, path: &str) -> Value {
        let socket = UnixStream::connect(self.home.store().join("admin.sock")).unwrap();
        let (_, body) = http_get(socket, path);
        serde_json::from_str(&body).unwrap()
    }

    pub fn status(&self) -> Value {
        self.admin("/v1/status")
    }

    /// `GET`s from the metrics listener: status and body.
    pub fn http(&self, path: &str) -> (u16, String) {
        http_get(TcpStream::connect(self.metrics).unwrap(), path)
    }

    pub fn until_status<T: PartialEq + Debug>(
        &self,
        what: &str,
        get: impl Fn(&Value) -> T,
        wanted: T,
    ) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.status();
            let found = get(&status);
            if found == wanted {
                return;
            }
            let late = Instant::now() >= deadline;
            assert!(
                !late,
                "{what}: {found:?} instead of {wanted:?} in {status:#}"
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Runs `client` and waits until it has subscribed to `count` filters.
    pub fn until_subscribed<T>(&self, count: u64, client: impl FnOnce() -> T) -> T {
        let subscriptions = |status: &Value| status["broker"]["subscriptions"].as_u64().unwrap();
        let before = subscriptions(&self.status());
        let client = client();
        self.until_status("subscriptions", subscriptions, before + count);
        client
    }

    /// Waits until nothing is under way, and checks that every event is accounted for.
    pub fn assert_adds_up(&self) -> Value {
        let get = |value: &Value, key: &str| value[key].as_u64().unwrap();
        let mut seen = Value::Null;
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let status = self.status();
            let apps = self.admin("/v1/apps")["apps"].clone();
            let pipeline = &status["pipeline"];
            let lanes = pipeline["lanes"].as_object().unwrap();
            let pipeline_adds_up = lanes.values().all(|lane| {
                let of = |key: &str| get(lane, key);
                let ends = [
                    "filtered",
                    "deduplicated",
                    "handed_over",
                    "looped",
                    "overflowed",
                    "shed",
                ];
                of("queued") == 0
                    && of("accepted") + of("copies") == ends.iter().map(|end| of(end)).sum::<u64>()
            });
            let apps_add_up = apps.as_array().unwrap().iter().all(|app| {
                let counters = &app["counters"];
                let of = |key: &str| get(counters, key);
                let dropped = counters["dropped"].as_object().unwrap();
                let dropped: u64 = dropped.values().map(|count| count.as_u64().unwrap()).sum();
                of("offered") == of("handled") + of("failed") + dropped + of("queued")
            });
            let of = |key: &str| get(&status["mappings"], key);
            let mappings_add_up = of("offered") == of("handled") + of("dropped") + of("queued");
            if pipeline_adds_up && apps_add_up && mappings_add_up {
                return status;
            }
            let mappings = &status["mappings"];
            seen = serde_json::json!({ "pipeline": pipeline, "apps": apps, "mappings": mappings });
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("the counters don't add up: {seen:#}");
    }

    // ---- Its end ----

    /// As `kill -9` does it.
    pub fn kill(self) -> Home {
        self.home.clone()
    }

    /// Asks it to stop, and waits until it has.
    pub fn terminate(mut self) -> Stopped {
        let started = Instant::now();
        self.signal(libc::SIGTERM);
        let status = eventually("the end of the gateway", || {
            self.process.try_wait().unwrap()
        });
        let took = started.elapsed();
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        Stopped {
            status,
            took,
            log: self.log(),
            home: self.home.clone(),
        }
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: a call that touches no memory. The process is this test's own child and has not
        // been waited for, so its id is still its.
        #[allow(unsafe_code)]
        let result = unsafe { libc::kill(self.id() as i32, signal) };
        assert_eq!(result, 0);
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        // It may be gone already, and nobody is left to tell.
        let _ = self.process.kill();
        let _ = self.process.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        let log = self.log.lock();
        if std::thread::panicking() {
            eprintln!("---- the gateway's log ----\n{log}");
        } else {
            assert!(!log.contains("panicked at"), "{log}");
        }
    }
}

fn http_get(mut stream: impl Read + Write, path: &str) -> (u16, String) {
    let request = format!("GET {path} HTTP/1.1\r\nhost: headgate\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let chunked = head.to_lowercase().contains("transfer-encoding: chunked");
    (
        status,
        if chunked {
            unchunked(body)
        } else {
            body.into()
        },
    )
}

fn unchunked(mut body: &str) -> String {
    let mut whole = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        whole.push_str(&rest[..size]);
        body = rest[size..].trim_start_matches("\r\n");
    }
    whole
}

/// The other end of `sd_notify`.
pub struct ServiceManager {
    path: PathBuf,
    socket: UnixDatagram,
    told: Vec<String>,
}

impl ServiceManager {
    fn listen(folder: &Path) -> ServiceManager {
        let path = folder.join("notify.sock");
        // One of an earlier start.
        let _ = std::fs::remove_file(&path);
        let socket = UnixDatagram::bind(&path).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        ServiceManager {
            path,
            socket,
            told: Vec::new(),
        }
    }

    /// Whether it was told so, after waiting a little.
    pub fn was_told(&mut self, what: &str) -> bool {
        let mut message = [0; 4096];
        if let Ok(length) = self.socket.recv(&mut message) {
            let text = std::str::from_utf8(&message[..length]).unwrap();
            self.told.extend(text.lines().map(str::to_owned));
        }
        self.told.iter().any(|line| line == what)
    }

    pub fn until_told(&mut self, what: &str) {
        eventually(what, || self.was_told(what).then_some(()));
    }
}
