//! Lays defaults, file, environment and flags over one another, and checks what came out.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::file;
use super::key::{Derived, Key, Preset, VARIABLE_PREFIX};
use super::origin::Origin;
use super::problem::{ConfigErrors, Fault, Problem, quoted};
use super::suggest;
use super::tree::{self, Config};
use super::value::{ListenAddress, Lookup, MAX_SOCKET_PATH_BYTES, Value};

/// The file that is read when nothing names another one.
pub const SYSTEM_FILE: &str = "/etc/headgate/headgate.toml";

/// Names the file in the place of `--config`.
const FILE_VARIABLE: &str = "HEADGATE_CONFIG";

/// Variables that start like Headgate's own and belong to the demo.
const DEMO_PREFIX: &str = "HEADGATE_DEMO_";

/// What the configuration is made of, besides the defaults. Plain data, so that nothing depends on
/// the environment of the process behind the caller's back.
#[derive(Clone, Debug, Default)]
pub struct Source {
    /// From `--config`.
    pub file: Option<PathBuf>,
    /// Read, if it exists, when neither `file` nor `HEADGATE_CONFIG` names another.
    pub system_file: Option<PathBuf>,
    pub env: Vec<(OsString, OsString)>,
    /// From the command line. These win over everything else.
    pub overrides: Vec<Override>,
    /// Runs as root, which moves the default of `store.path`.
    pub superuser: bool,
}

/// A value that a command line flag gives to a key.
#[derive(Clone, Debug)]
pub struct Override {
    /// Dotted key.
    pub key: &'static str,
    pub value: OsString,
    /// The flag as the user knows it, with dashes.
    pub flag: &'static str,
}

/// The configuration, and where each of its values comes from.
#[derive(Clone, Debug)]
pub struct Resolved {
    pub config: Config,
    /// The file that was read, if there was one.
    pub file: Option<PathBuf>,
    settings: Vec<Setting>,
}

/// The value of a key.
#[derive(Clone, Debug)]
pub struct Setting {
    pub key: &'static Key,
    pub value: Value,
    pub origin: Origin,
}

impl Source {
    /// What this process was started with.
    pub fn of_process(file: Option<PathBuf>, overrides: Vec<Override>) -> Source {
        Source {
            file,
            system_file: Some(PathBuf::from(SYSTEM_FILE)),
            env: std::env::vars_os().collect(),
            overrides,
            // The owner of its entry in /proc is the effective user of a process.
            superuser: std::fs::metadata("/proc/self").is_ok_and(|entry| entry.uid() == 0),
        }
    }

    /// The file to read, if any.
    fn chosen_file(&self) -> Option<PathBuf> {
        let named = |file: &PathBuf| !matches!(file.try_exists(), Ok(false));
        self.file
            .clone()
            .or_else(|| variable(&self.env, FILE_VARIABLE).map(PathBuf::from))
            .or_else(|| self.system_file.clone().filter(named))
    }
}

impl Resolved {
    /// All values, in the order of the documentation.
    pub fn values(&self) -> &[Setting] {
        &self.settings
    }
}

impl Config {
    /// Resolves and checks the configuration. The errors are all that there are, not only the first.
    pub fn load(source: Source) -> Result<Resolved, ConfigErrors> {
        let mut resolver = Resolver::default();
        let file = source.chosen_file();
        if let Some(path) = &file {
            resolver.read_file(path);
        }
        resolver.read_env(&source.env);
        resolver.read_overrides(&source.overrides);
        resolver.fill_in_presets(&source);
        resolver.check_combinations();
        resolver.finish(file)
    }
}

#[derive(Default)]
struct Resolver {
    settings: Settings,
    /// Keys with a wrong value somewhere. What else is said about them is of no use.
    failed: BTreeSet<&'static str>,
    problems: Vec<Problem>,
}

/// By dotted key.
#[derive(Default)]
struct Settings(BTreeMap<&'static str, Setting>);

impl Lookup for Settings {
    fn value(&self, name: &str) -> Option<Value> {
        self.0.get(name).map(|setting| setting.value.clone())
    }
}

impl Resolver {
    fn read_file(&mut self, path: &Path) {
        let contents = file::read(path);
        for problem in &contents.problems {
            let key = problem.key.as_deref().and_then(known_key);
            self.failed.extend(key.map(|key| key.name));
        }
        self.problems.extend(contents.problems);
        for setting in contents.settings {
            self.set(setting.key, setting.value, setting.origin);
        }
    }

    fn read_env(&mut self, env: &[(OsString, OsString)]) {
        let mut ours: Vec<_> = env
            .iter()
            .map(|(name, value)| (name.to_string_lossy(), value))
            .filter(|(name, _)| name.starts_with(VARIABLE_PREFIX))
            .filter(|(name, _)| name != FILE_VARIABLE && !name.starts_with(DEMO_PREFIX))
            .collect();
        // The environment has no order that a user could know.
        ours.sort();
        let known: BTreeMap<String, &'static Key> =
            tree::keys().map(|key| (key.variable(), key)).collect();
        for (name, value) in ours {
            let origin = Origin::Variable(name.clone().into_owned());
            match known.get(name.as_ref()) {
                Some(key) => {
                    let remedy = format!("set {name}={}", key.example());
                    self.read_value(key, value, origin, remedy);
                }
                None => {
                    let remedy = match suggest::nearest(&name, known.keys().map(String::as_str)) {
                        Some(near) => format!("did you mean {near}?"),
                        None => format!(
                            "unset {}; headgate config schema --markdown lists all keys",
                            name.escape_debug()
                        ),
                    };
                    self.problems.push(Problem {
                        origin,
                        key: None,
                        fault: Fault::UnknownVariable,
                        remedy,
                    });
                }
            }
        }
    }

    fn read_overrides(&mut self, overrides: &[Override]) {
        for Override { key, value, flag } in overrides {
            let origin = Origin::Flag((*flag).to_owned());
            match known_key(key) {
                Some(key) => {
                    let remedy = format!("write {flag} {}", key.example());
                    self.read_value(key, value, origin, remedy);
                }
                None => self.problems.push(Problem {
                    origin,
                    key: Some((*key).to_owned()),
                    fault: Fault::UnknownKey,
                    remedy: "this is a mistake in headgate: please report it".to_owned(),
                }),
            }
        }
    }

    fn read_value(&mut self, key: &'static Key, value: &OsStr, origin: Origin, remedy: String) {
        match key.kind.read_os(value) {
            Ok(value) => self.set(key, value, origin),
            Err(fault) => {
                self.failed.insert(key.name);
                self.problems.push(Problem {
                    origin,
                    key: Some(key.name.to_owned()),
                    fault,
                    remedy,
                });
            }
        }
    }

    /// Later layers win.
    fn set(&mut self, key: &'static Key, value: Value, origin: Origin) {
        let setting = Setting { key, value, origin };
        self.settings.0.insert(key.name, setting);
    }

    fn fill_in_presets(&mut self, source: &Source) {
        for name in &self.failed {
            self.settings.0.remove(name);
        }
        for key in tree::keys() {
            if self.settings.0.contains_key(key.name) || self.failed.contains(key.name) {
                continue;
            }
            let surroundings = Surroundings {
                env: &source.env,
                superuser: source.superuser,
                store_path: self.path("store.path"),
            };
            let preset = match key.preset {
                Preset::Text(text) => Some(
                    key.kind
                        .read_text(text)
                        .map(|value| (value, Origin::Default)),
                ),
                Preset::Derived { derive, .. } => derive(&surroundings)
                    .map(|path| path.map(|(path, origin)| (Value::Path(path), origin))),
            };
            match preset {
                Some(Ok((value, origin))) => self.set(key, value, origin),
                Some(Err(fault)) => self.problems.push(Problem {
                    origin: Origin::Default,
                    key: Some(key.name.to_owned()),
                    fault,
                    remedy: format!(
                        "set {} in the configuration file or {}={}",
                        key.name,
                        key.variable(),
                        key.example()
                    ),
                }),
                None => {}
            }
        }
    }

    /// What each value allows by itself and not together with another.
    fn check_combinations(&mut self) {
        self.check_listeners();
        self.check_some_listener();
        self.check_tls();
        self.check_client_certificates();
        self.check_socket();
        self.check_queues();
    }

    fn check_listeners(&mut self) {
        const LISTENERS: [(&str, &str); 7] = [
            ("mqtt.listen", "MQTT"),
            ("mqtt.tls.listen", "MQTT with TLS"),
            ("mqtt.websocket.listen", "MQTT over WebSocket"),
            ("mqtt.websocket.tls_listen", "MQTT over WebSocket with TLS"),
            ("ingest.listen", "ingest"),
            ("ingest.tls_listen", "ingest with TLS"),
            ("metrics.listen", "metrics"),
        ];
        for (index, (later, later_name)) in LISTENERS.iter().enumerate() {
            for (earlier, earlier_name) in &LISTENERS[..index] {
                let (Some(one), Some(other)) = (self.address(earlier), self.address(later)) else {
                    continue;
                };
                if !one.collides_with(other) {
                    continue;
                }
                let fault = Fault::Conflict(format!(
                    "{earlier_name} on {one} ({}) and {later_name} on {other} ({}) can't have the same port",
                    self.origin_of(earlier),
                    self.origin_of(later),
                ));
                let remedy = "give one of them another port".to_owned();
                self.conflict(&[later, earlier], fault, remedy);
            }
        }
    }

    fn check_some_listener(&mut self) {
        const LISTENERS: [&str; 4] = [
            "mqtt.listen",
            "mqtt.tls.listen",
            "mqtt.websocket.listen",
            "mqtt.websocket.tls_listen",
        ];
        let is_off = |key: &&str| {
            let setting = self.settings.0.get(key);
            setting.is_some_and(|setting| setting.value == Value::Address(None))
        };
        if LISTENERS.iter().all(is_off) {
            self.conflict(
                &LISTENERS,
                Fault::Conflict(format!(
                    "no MQTT client could connect: {} are all off",
                    LISTENERS.join(", ")
                )),
                "set one of them to where clients connect, such as mqtt.listen to \"127.0.0.1:1883\""
                    .to_owned(),
            );
        }
    }

    fn check_tls(&mut self) {
        let listeners = [
            "mqtt.tls.listen",
            "mqtt.websocket.tls_listen",
            "ingest.tls_listen",
        ];
        let Some(listen) = listeners
            .into_iter()
            .find(|listen| self.address(listen).is_some())
        else {
            return;
        };
        for (key, file) in [
            (
                "mqtt.tls.certificate",
                "the certificate, such as /etc/headgate/mqtt.crt",
            ),
            (
                "mqtt.tls.key",
                "the certificate's private key, such as /etc/headgate/mqtt.key",
            ),
        ] {
            if self
                .path(key)
                .is_some_and(|path| path.as_os_str().is_empty())
            {
                self.problems.push(Problem {
                    origin: self.origin_of(listen).clone(),
                    key: Some(listen.to_owned()),
                    fault: Fault::Conflict(format!("TLS needs {key}, and it is not set")),
                    remedy: format!("set {key} to the file with {file}, or {listen} to \"off\""),
                });
            }
        }
    }

    fn check_client_certificates(&mut self) {
        const CA: &str = "mqtt.tls.client_ca";
        const CRL: &str = "mqtt.tls.client_crl";
        const WANTED: &str = "mqtt.tls.client_certificates";
        let is_set = |key| {
            let path = self.path(key);
            path.is_some_and(|path| !path.as_os_str().is_empty())
        };
        let (ca, crl) = (is_set(CA), is_set(CRL));
        let wanted = match self.settings.0.get(WANTED).map(|setting| &setting.value) {
            Some(Value::Text(wanted)) => wanted != "off",
            _ => return,
        };
        if wanted && !ca {
            self.conflict(
                &[WANTED],
                Fault::Conflict(format!("certificates can't be checked without {CA}")),
                format!(
                    "set {CA} to a file with the certificates of those that vouch for clients, \
                     such as /etc/headgate/clients-ca.crt, or {WANTED} to \"off\""
                ),
            );
        }
        for (key, set) in [(CA, ca), (CRL, crl)] {
            if set && !wanted {
                self.conflict(
                    &[key, WANTED],
                    Fault::Conflict(format!("clients are not asked for certificates ({WANTED})")),
                    format!("set {WANTED} to \"required\" or \"optional\", or leave {key} out"),
                );
            }
        }
    }

    fn check_socket(&mut self) {
        let Some(socket) = self.path("admin.socket") else {
            return;
        };
        let bytes = socket.as_os_str().len();
        if bytes > MAX_SOCKET_PATH_BYTES {
            let fault = Fault::BadPath {
                found: quoted(&socket.to_string_lossy()),
                why: format!(
                    "it has {bytes} bytes, and that of a Unix socket at most {MAX_SOCKET_PATH_BYTES}"
                ),
            };
            let remedy =
                "set admin.socket to a shorter path, such as /run/headgate/admin.sock".to_owned();
            self.conflict(&["admin.socket", "store.path"], fault, remedy);
        } else if self.path("store.path") == Some(socket) {
            let fault = Fault::Conflict("the socket can't be where the store's folder is".into());
            let remedy = "leave admin.socket out to have it in that folder".to_owned();
            self.conflict(&["admin.socket", "store.path"], fault, remedy);
        }
    }

    fn check_queues(&mut self) {
        let (Some(batch), Some(queue)) = (
            self.integer("pipeline.batch.max_events"),
            self.integer("apps.queue_events"),
        ) else {
            return;
        };
        if batch > queue {
            let fault = Fault::Conflict(format!(
                "a batch of {batch} events (pipeline.batch.max_events, {}) never fits into an app's queue of {queue} (apps.queue_events, {})",
                self.origin_of("pipeline.batch.max_events"),
                self.origin_of("apps.queue_events"),
            ));
            let remedy = format!("set apps.queue_events to {batch} or more");
            self.conflict(
                &["apps.queue_events", "pipeline.batch.max_events"],
                fault,
                remedy,
            );
        }
    }

    /// Blames the first of `keys` that somebody has set.
    fn conflict(&mut self, keys: &[&'static str], fault: Fault, remedy: String) {
        let blamed = keys
            .iter()
            .find(|key| *self.origin_of(key) != Origin::Default)
            .or(keys.first());
        if let Some(key) = blamed {
            self.problems.push(Problem {
                origin: self.origin_of(key).clone(),
                key: Some((*key).to_owned()),
                fault,
                remedy,
            });
        }
    }

    fn finish(self, file: Option<PathBuf>) -> Result<Resolved, ConfigErrors> {
        if !self.problems.is_empty() {
            return Err(ConfigErrors(self.problems));
        }
        let config = Config::read(&self.settings);
        let mut by_name = self.settings.0;
        Ok(Resolved {
            config,
            file,
            settings: tree::keys()
                .filter_map(|key| by_name.remove(key.name))
                .collect(),
        })
    }

    fn origin_of(&self, key: &str) -> &Origin {
        self.settings
            .0
            .get(key)
            .map_or(&Origin::Default, |setting| &setting.origin)
    }

    fn path(&self, key: &str) -> Option<&Path> {
        match &self.settings.0.get(key)?.value {
            Value::Path(path) => Some(path),
            _ => None,
        }
    }

    fn address(&self, key: &str) -> Option<&ListenAddress> {
        match &self.settings.0.get(key)?.value {
            Value::Address(address) => address.as_ref(),
            _ => None,
        }
    }

    fn integer(&self, key: &str) -> Option<u64> {
        match self.settings.0.get(key)?.value {
            Value::Integer(number) => Some(number),
            _ => None,
        }
    }
}

fn known_key(name: &str) -> Option<&'static Key> {
    tree::keys().find(|key| key.name == name)
}

/// An environment variable that isn't empty.
fn variable<'e>(env: &'e [(OsString, OsString)], name: &str) -> Option<&'e OsStr> {
    env.iter()
        .find(|(known, value)| known == name && !value.is_empty())
        .map(|(_, value)| value.as_os_str())
}

/// What defaults are derived from.
pub struct Surroundings<'a> {
    env: &'a [(OsString, OsString)],
    superuser: bool,
    /// None while there is none that could be used.
    store_path: Option<&'a Path>,
}

impl Surroundings<'_> {
    fn folder(&self, variable_name: &str) -> Option<PathBuf> {
        variable(self.env, variable_name).map(PathBuf::from)
    }

    /// A folder that systemd made for the service: the first one of a list.
    fn systemd_folder(&self, variable_name: &str) -> Option<PathBuf> {
        let list = variable(self.env, variable_name)?;
        let first = list.as_bytes().split(|byte| *byte == b':').next()?;
        (!first.is_empty()).then(|| PathBuf::from(OsString::from_vec(first.to_vec())))
    }
}

pub(super) fn default_store_path(surroundings: &Surroundings) -> Option<Derived> {
    if let Some(folder) = surroundings.systemd_folder("STATE_DIRECTORY") {
        return Some(Ok((folder, Origin::DefaultFrom("STATE_DIRECTORY"))));
    }
    // The XDG base directory specification wants relative paths to be ignored.
    let state = surroundings.folder("XDG_STATE_HOME");
    if let Some(folder) = state.filter(|folder| folder.is_absolute()) {
        let origin = Origin::DefaultFrom("XDG_STATE_HOME");
        return Some(Ok((folder.join("headgate"), origin)));
    }
    if surroundings.superuser {
        return Some(Ok((PathBuf::from("/var/lib/headgate"), Origin::Default)));
    }
    Some(match surroundings.folder("HOME") {
        Some(home) => Ok((
            home.join(".local/state/headgate"),
            Origin::DefaultFrom("HOME"),
        )),
        None => Err(Fault::NoStoreFolder),
    })
}

pub(super) fn default_admin_socket(surroundings: &Surroundings) -> Option<Derived> {
    const SOCKET: &str = "admin.sock";
    match surroundings.systemd_folder("RUNTIME_DIRECTORY") {
        Some(folder) => Some(Ok((
            folder.join(SOCKET),
            Origin::DefaultFrom("RUNTIME_DIRECTORY"),
        ))),
        None => surroundings
            .store_path
            .map(|store| Ok((store.join(SOCKET), Origin::Default))),
    }
}

/// The built-in defaults that depend on nothing, for the sections that have only such.
pub(super) struct Presets;

impl Lookup for Presets {
    fn value(&self, name: &str) -> Option<Value> {
        let key = known_key(name)?;
        match key.preset {
            Preset::Text(text) => key.kind.read_text(text).ok(),
            Preset::Derived { .. } => None,
        }
    }
}
