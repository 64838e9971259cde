//! The brokers that are measured, each a process of its own with a folder and ports of its own.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::reading::{self, Form};
use crate::stream::{Endpoint, SERVER_NAME};
use crate::wire;

/// How long a server may take to get ready, or to end when told to.
const PATIENCE: Duration = Duration::from_secs(30);

/// How often a server that starts is asked whether it is ready. Bounds how exact a start time is.
const ASKING: Duration = Duration::from_millis(1);

/// What mosquitto is told. Without limits on queues and unacknowledged messages it drops the fewest.
const MOSQUITTO_OPTIONS: &str = "allow_anonymous true
set_tcp_nodelay true
max_queued_messages 0
max_inflight_messages 0
log_type error
";

/// Has it write its database after each change, which is as often as it can.
const MOSQUITTO_PERSISTENCE: &str = "persistence true
autosave_on_changes true
autosave_interval 1
";

/// A process that ends with this value.
struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Process {
    /// What it says goes to `log`.
    fn start(command: &mut Command, name: &str, log: PathBuf) -> Result<Self> {
        let file = fs::File::create(&log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("can't start {}", command.get_program().display()))?;
        Ok(Process {
            child,
            name: name.to_owned(),
            log,
        })
    }

    /// Asks `ready` until it says yes.
    fn await_ready(&mut self, mut ready: impl FnMut() -> bool) -> Result<()> {
        let start = Instant::now();
        while !ready() {
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended with {status}:\n{}", self.name, self.last_words());
            }
            ensure!(
                start.elapsed() < PATIENCE,
                "{} is not ready after {PATIENCE:?}:\n{}",
                self.name,
                self.last_words()
            );
            thread::sleep(ASKING);
        }
        Ok(())
    }

    /// The end of what it has said.
    fn last_words(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// SIGTERM, and SIGKILL if that does not help.
    #[allow(unsafe_code)]
    fn stop(&mut self) -> io::Result<()> {
        if self.child.try_wait()?.is_some() {
            return Ok(());
        }
        if let Ok(pid) = i32::try_from(self.child.id()) {
            // SAFETY: the child has not been waited for, so its id is still its own.
            unsafe {
                libc::kill(pid, libc::SIGTERM);
            }
        }
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait()?.is_none() {
            if Instant::now() > deadline {
                self.child.kill()?;
                self.child.wait()?;
                break;
            }
            thread::sleep(ASKING);
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // There is nobody to tell; whatever is left ends with the benchmark's process group.
        let _ = self.stop();
    }
}

/// A broker under load.
pub trait Broker {
    fn endpoint(&self) -> Endpoint;
    fn pid(&self) -> u32;
}

/// A certificate for a server on this machine and its key, as files.
pub struct Certificate {
    folder: TempDir,
}

impl Certificate {
    pub fn new() -> Result<Self> {
        let folder = TempDir::new()?;
        let made = rcgen::generate_simple_self_signed([SERVER_NAME.to_owned()])?;
        let certificate = Certificate { folder };
        fs::write(certificate.path(), made.cert.pem())?;
        fs::write(certificate.key(), made.signing_key.serialize_pem())?;
        Ok(certificate)
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("server.crt")
    }

    fn key(&self) -> PathBuf {
        self.folder.path().join("server.key")
    }
}

/// mosquitto with a configuration of its own.
pub struct Mosquitto {
    process: Process,
    endpoint: Endpoint,
    _folder: TempDir,
}

impl Mosquitto {
    /// Where mosquitto is, if it is installed.
    pub fn find() -> Option<PathBuf> {
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path)
            .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/usr/local/sbin")])
            .map(|folder| folder.join("mosquitto"))
            .find(|program| program.is_file())
    }

    /// `mosquitto version 2.0.11` or so.
    pub fn version(program: &Path) -> Result<String> {
        let output = Command::new(program).arg("-h").output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().next().unwrap_or_default().trim().to_owned())
    }

    /// With a certificate, its only listener speaks TLS.
    pub fn start(program: &Path, certificate: Option<&Certificate>) -> Result<Self> {
        Mosquitto::start_with(program, certificate, "persistence false\n")
    }

    /// Keeps what it has on disk, as far as it does that.
    pub fn start_persistent(program: &Path) -> Result<Self> {
        Mosquitto::start_with(program, None, MOSQUITTO_PERSISTENCE)
    }

    fn start_with(
        program: &Path,
        certificate: Option<&Certificate>,
        persistence: &str,
    ) -> Result<Self> {
        let folder = TempDir::new()?;
        let address = free_address()?;
        let mut options = format!("listener {} {}\n", address.port(), address.ip());
        let mut endpoint = Endpoint::plain(address);
        if let Some(certificate) = certificate {
            options += &format!("certfile {}\n", certificate.path().display());
            options += &format!("keyfile {}\n", certificate.key().display());
            // Started by root, it would become a user who may not read these files.
            options += "user root\n";
            endpoint = Endpoint::trusting(address, &certificate.path())?;
        }
        options += MOSQUITTO_OPTIONS;
        options += persistence;
        if !persistence.contains("false") {
            options += &format!("persistence_location {}/\n", folder.path().display());
            options += "user root\n";
        }
        let config = folder.path().join("mosquitto.conf");
        fs::write(&config, options)?;
        let mut process = Process::start(
            Command::new(program).arg("-c").arg(&config),
            "mosquitto",
            folder.path().join("log"),
        )?;
        process.await_ready(|| wire::connect(&endpoint, "ready").is_ok())?;
        Ok(Mosquitto {
            process,
            endpoint,
            _folder: folder,
        })
    }
}

impl Broker for Mosquitto {
    fn endpoint(&self) -> Endpoint {
        self.endpoint.clone()
    }

    fn pid(&self) -> u32 {
        self.process.child.id()
    }
}

/// A gateway's folder and addresses. They outlive its process, so that it can be started again on
/// what it has stored.
pub struct Site {
    program: PathBuf,
    folder: TempDir,
    mqtt: Endpoint,
    metrics: SocketAddr,
    settings: Vec<(&'static str, String)>,
}

impl Site {
    /// An empty place for the gateway `program`.
    pub fn new(program: &Path) -> Result<Self> {
        ensure!(
            program.is_file(),
            "there is no gateway at {}: build it with `cargo build --release --workspace`, or name \
             another with --headgate",
            program.display()
        );
        Ok(Site {
            program: program.to_owned(),
            folder: TempDir::new()?,
            mqtt: Endpoint::plain(free_address()?),
            metrics: free_address()?,
            settings: Vec::new(),
        })
    }

    /// Lets clients connect with TLS.
    pub fn with_tls(mut self, certificate: &Certificate) -> Result<Self> {
        let address = free_address()?;
        self.mqtt = Endpoint::trusting(address, &certificate.path())?;
        let path = |path: PathBuf| path.display().to_string();
        Ok(self
            .set("HEADGATE_MQTT_LISTEN", free_address()?.to_string())
            .set("HEADGATE_MQTT_TLS_LISTEN", address.to_string())
            .set("HEADGATE_MQTT_TLS_CERTIFICATE", path(certificate.path()))
            .set("HEADGATE_MQTT_TLS_KEY", path(certificate.key())))
    }

    /// Sets a variable of the configuration.
    pub fn set(mut self, variable: &'static str, value: String) -> Self {
        self.settings.push((variable, value));
        self
    }

    /// Starts the gateway and waits until it says that it is ready.
    pub fn start(&self) -> Result<Gateway<'_>> {
        let start = Instant::now();
        let mut process = Process::start(
            self.command().arg("run"),
            "headgate run",
            self.folder.path().join("log"),
        )?;
        process.await_ready(|| self.is_ready())?;
        Ok(Gateway {
            process,
            site: self,
            ready_after: start.elapsed(),
        })
    }

    /// Removes the compiled apps, as if they had just been copied onto this machine.
    pub fn forget_compiled_apps(&self) -> Result<()> {
        let compiled = self.folder.path().join("store").join("aot");
        fs::remove_dir_all(&compiled)
            .with_context(|| format!("no compiled apps to remove at {}", compiled.display()))
    }

    fn command(&self) -> Command {
        let folder = self.folder.path();
        let mut command = Command::new(&self.program);
        command
            .env("HEADGATE_STORE_PATH", folder.join("store"))
            .env("HEADGATE_MQTT_LISTEN", self.mqtt.address.to_string())
            .env("HEADGATE_METRICS_LISTEN", self.metrics.to_string())
            .env("HEADGATE_ADMIN_SOCKET", folder.join("admin.sock"))
            .envs(
                self.settings
                    .iter()
                    .map(|(variable, value)| (variable, value)),
            );
        command
    }

    fn is_ready(&self) -> bool {
        let ask = || -> io::Result<bool> {
            let mut stream = TcpStream::connect(self.metrics)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream
                .write_all(b"GET /readyz HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n\r\n")?;
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer)?;
            Ok(answer.starts_with(b"HTTP/1.1 200"))
        };
        ask().unwrap_or(false)
    }
}

/// A gateway that runs.
pub struct Gateway<'a> {
    process: Process,
    site: &'a Site,
    /// From the start of its process until it said that it is ready.
    pub ready_after: Duration,
}

impl Gateway<'_> {
    /// Installs the app in `folder`: a manifest and a built component.
    pub fn install(&self, folder: &Path) -> Result<()> {
        let output = self
            .site
            .command()
            .args(["app", "install"])
            .arg(folder)
            .output()?;
        ensure!(
            output.status.success(),
            "installing {} failed:\n{}{}",
            folder.display(),
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    /// Installs a mapping.
    pub fn install_mapping(&self, file: &Path, name: &str) -> Result<()> {
        let command = ["mapping", "install", "--name", name];
        let output = self.site.command().args(command).arg(file).output()?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "installing {name} failed:\n{errors}"
        );
        Ok(())
    }

    /// What a command of the gateway says.
    pub fn ask(&self, command: &[&str]) -> Result<serde_json::Value> {
        let output = self.site.command().args(command).arg("--json").output()?;
        serde_json::from_slice(&output.stdout).with_context(|| format!("{command:?}"))
    }

    /// Ends it as `kill -9` does.
    pub fn kill(mut self) -> Result<()> {
        self.process.child.kill()?;
        self.process.child.wait()?;
        Ok(())
    }

    /// Events that its pipeline has taken in.
    pub fn accepted(&self) -> Result<u64> {
        let status = self.ask(&["status"])?;
        let accepted = status["pipeline"]["accepted"].as_u64();
        accepted.context("the status has no pipeline.accepted")
    }

    /// Waits until a message sent to `topic` has `results` answers under `filter`; tells when it had.
    pub fn await_results(&self, topic: &str, filter: &str, results: usize) -> Result<Instant> {
        self.await_results_of(Form::Measurement, topic, filter, results)
    }

    /// The same, of messages of this form.
    pub fn await_results_of(
        &self,
        form: Form,
        topic: &str,
        filter: &str,
        results: usize,
    ) -> Result<Instant> {
        // Of a publisher that no load has, so that a late result is not taken for one of a load.
        let (payload, ..) = reading::template(form, reading::MAX_PUBLISHERS - 1, 100)?;
        let (frame, ..) = wire::publish(topic, 0, &payload);
        let mut subscriber = wire::connect(&self.site.mqtt, "probe-subscriber")?;
        wire::subscribe(&mut subscriber, filter, 0)?;
        let mut receiver = wire::Connection::new(subscriber, Duration::from_millis(20))?;
        let mut publisher = wire::connect(&self.site.mqtt, "probe-publisher")?;
        let start = Instant::now();
        let answered = loop {
            publisher.write_all(&frame)?;
            let mut came = 0;
            while came < results
                && receiver.receive(
                    || (),
                    |(), _| {
                        came += 1;
                        Ok(())
                    },
                )?
            {}
            if came >= results {
                break Instant::now();
            }
            ensure!(
                start.elapsed() < PATIENCE,
                "{came} results instead of {results} came under {filter} for a message to {topic}:\n{}",
                self.process.last_words()
            );
        };
        Ok(answered)
    }

    /// All that it has said.
    pub fn log(&self) -> Result<String> {
        fs::read_to_string(&self.process.log).context("can't read the gateway's log")
    }

    /// Resident memory, in bytes.
    pub fn resident_bytes(&self) -> Result<u64> {
        crate::process::resident_bytes(self.pid())
    }

    /// Ends it as an operator would; an error if it does not end well.
    pub fn stop(mut self) -> Result<()> {
        self.process.stop()?;
        let status = self.process.child.wait()?;
        ensure!(
            status.success(),
            "the gateway ended with {status}:\n{}",
            self.process.last_words()
        );
        Ok(())
    }
}

impl Broker for Gateway<'_> {
    fn endpoint(&self) -> Endpoint {
        self.site.mqtt.clone()
    }

    fn pid(&self) -> u32 {
        self.process.child.id()
    }
}

/// An address that nobody listens on just now.
pub(crate) fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}
