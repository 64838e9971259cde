//! Values: from TOML or text, checked against what their key allows, to the types that rooms read.

use std::ffi::OsStr;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use toml::de::DeValue;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;

use super::key::Kind;
use super::problem::{Fault, quoted};
use super::suggest;
use crate::event::{Topic, TopicFilter};
use crate::mappings::check_name;
use crate::ota::keys::TrustedKey;
use crate::ota::window::Windows;

/// A value that its key allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    Integer(u64),
    /// A number of bytes.
    Bytes(u64),
    /// Empty where there is none.
    Path(PathBuf),
    /// None where the listener is off.
    Address(Option<ListenAddress>),
    Switch(bool),
    Text(String),
}

/// Where to listen: a host name or address, and a port.
///
/// `as_pair` is what `bind` takes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ListenAddress {
    /// Without brackets if it is an IPv6 address.
    pub host: String,
    /// 0 takes a free port.
    pub port: u16,
}

/// Which apps may do something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AppNames {
    All,
    Only(Vec<String>),
}

impl Default for AppNames {
    fn default() -> AppNames {
        AppNames::Only(Vec::new())
    }
}

impl AppNames {
    pub fn contains(&self, app: &str) -> bool {
        match self {
            AppNames::All => true,
            AppNames::Only(names) => names.iter().any(|name| name == app),
        }
    }

    fn of_text(text: &str) -> AppNames {
        match text.trim() {
            "*" => AppNames::All,
            text => AppNames::Only(names_in(text).map(str::to_owned).collect()),
        }
    }
}

/// What is between the commas; nothing of nothing.
fn names_in(text: &str) -> impl Iterator<Item = &str> {
    let names = text.split(',').map(str::trim);
    names.filter(move |_| !text.trim().is_empty())
}

/// How the log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// From where clients may connect without a login.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anonymous {
    Never,
    /// From this machine.
    Loopback,
    Always,
}

/// Whether clients show certificates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientCertificates {
    /// They are not asked.
    Off,
    /// One that is shown must be valid.
    Optional,
    Required,
}

/// When an update that is installed is booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RebootWhen {
    /// In the next maintenance window.
    Window,
    /// When somebody restarts the machine.
    Never,
}

/// Why a text is no `host:port`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    #[error("the port is missing")]
    NoPort,
    #[error("the port must be a number from 0 to 65535")]
    BadPort,
    #[error("the host is missing (0.0.0.0 listens on all interfaces)")]
    NoHost,
    #[error("an IPv6 address needs brackets, as in [::1]:1883")]
    BareIpv6,
    #[error("the host is neither a name nor an IP address")]
    BadHost,
}

/// Why a text is no number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    #[error("it must be a whole number and a unit")]
    NoNumber,
    #[error("the units are B, KiB, MiB and GiB")]
    BadUnit,
    #[error("it is too large to count")]
    TooLarge,
}

/// Bytes of a socket's path that fit into `sun_path`, without its closing NUL.
pub(super) const MAX_SOCKET_PATH_BYTES: usize = 107;

/// Far more than anybody types.
const MAX_URL_PATH_BYTES: usize = 256;

/// Units of sizes, largest first.
const UNITS: [(&str, u64); 4] = [
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("B", 1),
];

impl Kind {
    /// What a value must be, for errors.
    pub(super) fn expected(&self) -> String {
        match self {
            Kind::Integer { .. } => "an integer".to_owned(),
            Kind::Bytes { .. } => "a number of bytes or a string such as \"16MiB\"".to_owned(),
            Kind::Path { .. } | Kind::OptionalPath => "a path in quotes".to_owned(),
            Kind::OptionalTopic => "a topic name in quotes".to_owned(),
            Kind::Address => "\"host:port\" in quotes".to_owned(),
            Kind::Switch => "true or false".to_owned(),
            Kind::UrlPath => "a path that begins with / in quotes".to_owned(),
            Kind::Choice(words) => format!("one of {}", listed(words)),
            Kind::LogFilter => "a log level in quotes".to_owned(),
            Kind::AppNames => "names of apps, with commas between them, in quotes".to_owned(),
            Kind::TopicFilters => "topic filters, with commas between them, in quotes".to_owned(),
            Kind::Checked(check) => format!("{}, in quotes", check.expected),
        }
    }

    /// Which values are allowed, for errors and the documentation.
    pub(super) fn allowed(&self) -> String {
        match self {
            Kind::Integer { min, max } => format!("{min} to {max}"),
            Kind::Bytes { min, max, .. } => {
                format!("{} to {}", size_text(*min), size_text(*max))
            }
            Kind::Path { socket: false } => "a path".to_owned(),
            Kind::Path { socket: true } => {
                format!("a path of at most {MAX_SOCKET_PATH_BYTES} bytes")
            }
            Kind::OptionalPath => "a path, or nothing".to_owned(),
            Kind::OptionalTopic => "a topic name, or nothing".to_owned(),
            Kind::Address => "host:port, off".to_owned(),
            Kind::Switch => "true, false".to_owned(),
            Kind::UrlPath => "/path".to_owned(),
            Kind::Choice(words) => words.join(", "),
            Kind::LogFilter => "level, module=level".to_owned(),
            Kind::AppNames => "app, app; *; nothing".to_owned(),
            Kind::TopicFilters => "filter, filter; nothing".to_owned(),
            Kind::Checked(check) => check.allowed.to_owned(),
        }
    }

    /// Reads a value of the configuration file. Relative paths count from `folder`, where the file
    /// lies.
    pub(super) fn read_toml(&self, value: &DeValue<'_>, folder: &Path) -> Result<Value, Fault> {
        match (self, value) {
            (Kind::Integer { .. } | Kind::Bytes { .. }, DeValue::Integer(integer)) => {
                match i128::from_str_radix(integer.as_str(), integer.radix()) {
                    Ok(number) => self.in_range(number, integer.to_string()),
                    // The parser has seen to the digits, so there are too many of them.
                    Err(_) => Err(self.out_of_range(shortened(&integer.to_string()))),
                }
            }
            (Kind::Switch, DeValue::Boolean(on)) => Ok(Value::Switch(*on)),
            (Kind::Integer { .. } | Kind::Switch, DeValue::String(_)) => {
                Err(self.wrong_type(describe(value)))
            }
            (Kind::Path { .. } | Kind::OptionalPath, DeValue::String(text)) => {
                match self.read_text(text)? {
                    Value::Path(path) if !path.as_os_str().is_empty() => {
                        Ok(Value::Path(folder.join(path)))
                    }
                    other => Ok(other),
                }
            }
            (_, DeValue::String(text)) => self.read_text(text),
            _ => Err(self.wrong_type(describe(value))),
        }
    }

    /// Reads the value of an environment variable or of a flag.
    pub(super) fn read_os(&self, value: &OsStr) -> Result<Value, Fault> {
        match (self, value.to_str()) {
            (_, Some(text)) => self.read_text(text),
            (Kind::Path { .. } | Kind::OptionalPath, None) => Ok(Value::Path(PathBuf::from(value))),
            (_, None) => Err(Fault::ValueNotUtf8),
        }
    }

    pub(super) fn read_text(&self, text: &str) -> Result<Value, Fault> {
        match self {
            Kind::Integer { .. } => match text.parse() {
                Ok(number) => self.in_range(number, text.to_owned()),
                Err(_) if is_digits(text.strip_prefix('-').unwrap_or(text)) => {
                    Err(self.out_of_range(shortened(text)))
                }
                Err(_) => Err(self.wrong_type(quoted(text))),
            },
            Kind::Bytes { .. } => match parse_size(text) {
                Ok(number) => self.in_range(i128::from(number), text.to_owned()),
                Err(error) => Err(Fault::BadSize {
                    found: quoted(text),
                    error,
                }),
            },
            Kind::OptionalTopic if text.is_empty() => Ok(Value::Text(String::new())),
            Kind::OptionalTopic => match Topic::new(text.to_owned()) {
                Ok(_) => Ok(Value::Text(text.to_owned())),
                Err(error) => Err(Fault::BadTopic {
                    found: quoted(text),
                    error,
                }),
            },
            Kind::OptionalPath if text.is_empty() => Ok(Value::Path(PathBuf::new())),
            Kind::Path { .. } | Kind::OptionalPath => read_path(text),
            Kind::Address if text.is_empty() || text == "off" => Ok(Value::Address(None)),
            Kind::Address => match text.parse() {
                Ok(address) => Ok(Value::Address(Some(address))),
                Err(error) => Err(Fault::BadAddress {
                    found: quoted(text),
                    error,
                }),
            },
            Kind::Switch => match text.parse() {
                Ok(on) => Ok(Value::Switch(on)),
                Err(_) => Err(self.wrong_type(quoted(text))),
            },
            Kind::UrlPath => read_url_path(text),
            Kind::Choice(words) if words.contains(&text) => Ok(Value::Text(text.to_owned())),
            Kind::Choice(words) => Err(Fault::NotAChoice {
                found: quoted(text),
                allowed: listed(words),
            }),
            Kind::LogFilter => match check_log_filter(text) {
                Ok(()) => Ok(Value::Text(text.to_owned())),
                Err(why) => Err(Fault::BadLogFilter {
                    found: quoted(text),
                    why,
                }),
            },
            Kind::AppNames => read_app_names(text),
            Kind::TopicFilters => read_topic_filters(text),
            Kind::Checked(_) if text.is_empty() => Ok(Value::Text(String::new())),
            Kind::Checked(kind) => match (kind.check)(text) {
                Ok(()) => Ok(Value::Text(text.to_owned())),
                Err(why) => Err(Fault::BadText {
                    found: quoted(text),
                    why,
                }),
            },
        }
    }

    fn in_range(&self, number: i128, found: String) -> Result<Value, Fault> {
        let fits = |min: u64, max: u64| {
            let number = u64::try_from(number).ok();
            number.filter(|number| (min..=max).contains(number))
        };
        let value = match *self {
            Kind::Integer { min, max } => fits(min, max).map(Value::Integer),
            Kind::Bytes { min, max, whole } => fits(min, max)
                .and_then(|number| number.checked_next_multiple_of(whole))
                .map(Value::Bytes),
            _ => return Err(self.wrong_type(found)),
        };
        value.ok_or_else(|| self.out_of_range(found))
    }

    fn out_of_range(&self, found: String) -> Fault {
        Fault::OutOfRange {
            found,
            allowed: self.allowed(),
        }
    }

    fn wrong_type(&self, found: String) -> Fault {
        Fault::WrongType {
            expected: self.expected(),
            found,
        }
    }
}

impl Value {
    /// As in a TOML file.
    pub fn to_toml(&self) -> String {
        match self {
            Value::Integer(number) => number.to_string(),
            Value::Bytes(number) => match size_text(*number) {
                text if is_digits(&text) => text,
                text => format!("\"{text}\""),
            },
            Value::Path(path) => toml::Value::from(path.to_string_lossy().as_ref()).to_string(),
            Value::Address(address) => toml::Value::from(address_text(address)).to_string(),
            Value::Switch(on) => on.to_string(),
            Value::Text(text) => toml::Value::from(text.as_str()).to_string(),
        }
    }

    /// As in JSON; sizes are numbers of bytes.
    pub fn to_json(&self) -> serde_json::Value {
        match self {
            Value::Integer(number) | Value::Bytes(number) => (*number).into(),
            Value::Path(path) => path.to_string_lossy().into(),
            Value::Address(address) => address_text(address).into(),
            Value::Switch(on) => (*on).into(),
            Value::Text(text) => text.as_str().into(),
        }
    }
}

fn address_text(address: &Option<ListenAddress>) -> String {
    match address {
        Some(address) => address.to_string(),
        None => "off".to_owned(),
    }
}

impl ListenAddress {
    /// What `TcpListener::bind` takes.
    pub fn as_pair(&self) -> (&str, u16) {
        (&self.host, self.port)
    }

    /// Two listeners can't have both addresses.
    pub(super) fn collides_with(&self, other: &ListenAddress) -> bool {
        if self.port != other.port || self.port == 0 {
            return false;
        }
        let (ours, theirs) = (Interface::of(&self.host), Interface::of(&other.host));
        ours == theirs || ours == Interface::All || theirs == Interface::All
    }
}

/// What a host listens on, as far as one can tell without asking the resolver.
#[derive(PartialEq, Eq)]
enum Interface {
    All,
    One(IpAddr),
    Named(String),
}

impl Interface {
    fn of(host: &str) -> Interface {
        match host.parse::<IpAddr>() {
            Ok(ip) if ip.is_unspecified() => Interface::All,
            Ok(ip) => Interface::One(ip.to_canonical()),
            Err(_) if host.eq_ignore_ascii_case("localhost") => {
                Interface::One(IpAddr::from([127, 0, 0, 1]))
            }
            Err(_) => Interface::Named(host.to_ascii_lowercase()),
        }
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl FromStr for ListenAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let (host, port) = match text.rsplit_once(':') {
            Some(parts) => parts,
            None if is_digits(text) => return Err(AddressError::NoHost),
            None => return Err(AddressError::NoPort),
        };
        let host = match host.strip_prefix('[') {
            Some(rest) => {
                let Some(inner) = rest.strip_suffix(']') else {
                    return Err(if text.ends_with(']') {
                        AddressError::NoPort
                    } else {
                        AddressError::BadHost
                    });
                };
                inner
                    .parse::<Ipv6Addr>()
                    .map_err(|_| AddressError::BadHost)?;
                inner
            }
            None if text.parse::<Ipv6Addr>().is_ok() || host.parse::<Ipv6Addr>().is_ok() => {
                return Err(AddressError::BareIpv6);
            }
            None if host.is_empty() => return Err(AddressError::NoHost),
            None if !is_host(host) => return Err(AddressError::BadHost),
            None => host,
        };
        if port.is_empty() {
            return Err(AddressError::NoPort);
        }
        if !is_digits(port) {
            return Err(AddressError::BadPort);
        }
        Ok(ListenAddress {
            host: host.to_owned(),
            port: port.parse().map_err(|_| AddressError::BadPort)?,
        })
    }
}

/// Longest host name that DNS can carry.
const MAX_HOST_BYTES: usize = 253;

fn is_host(host: &str) -> bool {
    let is_name = host.len() <= MAX_HOST_BYTES
        && host.split('.').all(|label| {
            !label.is_empty()
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
        });
    // Only digits and dots: a slip in an IPv4 address rather than a name.
    let looks_like_ip = host
        .bytes()
        .all(|byte| byte.is_ascii_digit() || byte == b'.');
    is_name && (!looks_like_ip || host.parse::<IpAddr>().is_ok())
}

impl LogFormat {
    pub(super) const NAMES: &'static [&'static str] = &["text", "json"];
}

impl Anonymous {
    pub(super) const NAMES: &'static [&'static str] = &["never", "loopback", "always"];
}

impl RebootWhen {
    pub(super) const NAMES: &'static [&'static str] = &["window", "never"];
}

impl ClientCertificates {
    pub(super) const NAMES: &'static [&'static str] = &["off", "optional", "required"];
}

/// Finds values by dotted key, for the structs of [`super::tree`].
pub trait Lookup {
    fn value(&self, name: &str) -> Option<Value>;
}

/// A type that a field of the configuration can have.
pub trait FieldType: Sized {
    fn from_value(value: Value) -> Option<Self>;
}

/// The field that key `name` fills.
pub(super) fn field<T: FieldType>(values: &impl Lookup, name: &str) -> T {
    values
        .value(name)
        .and_then(T::from_value)
        .expect("each key has a value, and its field's type holds all values that it allows")
}

macro_rules! integer_fields {
    ($($type:ty),*) => {
        $(impl FieldType for $type {
            fn from_value(value: Value) -> Option<Self> {
                match value {
                    Value::Integer(number) | Value::Bytes(number) => number.try_into().ok(),
                    _ => None,
                }
            }
        })*
    };
}

integer_fields!(u8, u16, u32, u64, usize);

impl FieldType for PathBuf {
    fn from_value(value: Value) -> Option<Self> {
        match value {
            Value::Path(path) => Some(path),
            _ => None,
        }
    }
}

impl FieldType for Option<PathBuf> {
    fn from_value(value: Value) -> Option<Self> {
        match value {
            Value::Path(path) if path.as_os_str().is_empty() => Some(None),
            Value::Path(path) => Some(Some(path)),
            _ => None,
        }
    }
}

impl FieldType for String {
    fn from_value(value: Value) -> Option<Self> {
        match value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }
}

impl FieldType for ListenAddress {
    fn from_value(value: Value) -> Option<Self> {
        match value {
            Value::Address(address) => address,
            _ => None,
        }
    }
}

impl FieldType for Option<ListenAddress> {
    fn from_value(value: Value) -> Option<Self> {
        match value {
            Value::Address(address) => Some(address),
            _ => None,
        }
    }
}

impl FieldType for bool {
    fn from_value(value: Value) -> Option<Self> {
        match value {
            Value::Switch(on) => Some(on),
            _ => None,
        }
    }
}

impl FieldType for AppNames {
    fn from_value(value: Value) -> Option<Self> {
        match value {
            Value::Text(text) => Some(AppNames::of_text(&text)),
            _ => None,
        }
    }
}

impl FieldType for Vec<TopicFilter> {
    fn from_value(value: Value) -> Option<Self> {
        match value {
            Value::Text(text) => names_in(&text)
                .map(|filter| TopicFilter::new(filter.to_owned()).ok())
                .collect(),
            _ => None,
        }
    }
}

impl FieldType for Vec<String> {
    fn from_value(value: Value) -> Option<Self> {
        match value {
            Value::Text(text) => Some(names_in(&text).map(str::to_owned).collect()),
            _ => None,
        }
    }
}

impl FieldType for Vec<TrustedKey> {
    fn from_value(value: Value) -> Option<Self> {
        match value {
            Value::Text(text) => names_in(&text).map(|key| key.parse().ok()).collect(),
            _ => None,
        }
    }
}

impl FieldType for Windows {
    fn from_value(value: Value) -> Option<Self> {
        match value {
            Value::Text(text) => text.parse().ok(),
            _ => None,
        }
    }
}

impl FieldType for RebootWhen {
    fn from_value(value: Value) -> Option<Self> {
        match value {
            Value::Text(text) if text == "window" => Some(RebootWhen::Window),
            Value::Text(text) if text == "never" => Some(RebootWhen::Never),
            _ => None,
        }
    }
}

impl FieldType for LogFormat {
    fn from_value(value: Value) -> Option<Self> {
        match value {
            Value::Text(text) if text == "text" => Some(LogFormat::Text),
            Value::Text(text) if text == "json" => Some(LogFormat::Json),
            _ => None,
        }
    }
}

impl FieldType for Anonymous {
    fn from_value(value: Value) -> Option<Self> {
        match value {
            Value::Text(text) => match text.as_str() {
                "never" => Some(Anonymous::Never),
                "loopback" => Some(Anonymous::Loopback),
                "always" => Some(Anonymous::Always),
                _ => None,
            },
            _ => None,
        }
    }
}

impl FieldType for ClientCertificates {
    fn from_value(value: Value) -> Option<Self> {
        match value {
            Value::Text(text) => match text.as_str() {
                "off" => Some(ClientCertificates::Off),
                "optional" => Some(ClientCertificates::Optional),
                "required" => Some(ClientCertificates::Required),
                _ => None,
            },
            _ => None,
        }
    }
}

/// URLs of caches and channels, with commas between them.
pub(super) fn check_urls(text: &str) -> Result<(), String> {
    for url in names_in(text) {
        let rest = ["http://", "https://", "file:///"]
            .iter()
            .find_map(|scheme| url.strip_prefix(scheme));
        match rest {
            None => {
                return Err(format!(
                    "{} has none of the schemes http://, https:// and file:///",
                    quoted(url)
                ));
            }
            Some("") => return Err(format!("{} names nothing", quoted(url))),
            Some(rest) if !rest.bytes().all(|byte| byte.is_ascii_graphic()) => {
                return Err(format!(
                    "{} has a character that must be escaped in a URL",
                    quoted(url)
                ));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

pub(super) fn check_keys(text: &str) -> Result<(), String> {
    names_in(text).try_for_each(|key| match key.parse::<TrustedKey>() {
        Ok(_) => Ok(()),
        Err(error) => Err(error.to_string()),
    })
}

pub(super) fn check_mappings(text: &str) -> Result<(), String> {
    names_in(text).try_for_each(|name| check_name(name).map_err(|error| error.to_string()))
}

pub(super) fn check_windows(text: &str) -> Result<(), String> {
    text.parse::<Windows>()
        .map(|_| ())
        .map_err(|error| error.to_string())
}

/// A product or a version, as a release has it.
pub(super) fn check_word(text: &str) -> Result<(), String> {
    crate::ota::release::is_word(text)
        .then_some(())
        .ok_or_else(|| "take letters, digits, dots, dashes, plus signs and underscores".to_owned())
}

fn read_topic_filters(text: &str) -> Result<Value, Fault> {
    for filter in names_in(text) {
        if let Err(error) = TopicFilter::new(filter.to_owned()) {
            return Err(Fault::BadTopicFilter {
                found: quoted(filter),
                why: error.to_string(),
            });
        }
    }
    Ok(Value::Text(text.to_owned()))
}

fn read_app_names(text: &str) -> Result<Value, Fault> {
    // As the manifest has it.
    let is_name = |name: &str| {
        let letter = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
        name.bytes().next().is_some_and(letter)
            && name.bytes().all(|c| letter(c) || b"_.-".contains(&c))
    };
    let mut names = names_in(text);
    match names.find(|name| !is_name(name)) {
        Some(wrong) if text.trim() != "*" => Err(Fault::BadAppName {
            found: quoted(wrong),
        }),
        _ => Ok(Value::Text(text.to_owned())),
    }
}

fn read_path(text: &str) -> Result<Value, Fault> {
    let refused = |why: &str| {
        Err(Fault::BadPath {
            found: quoted(text),
            why: why.to_owned(),
        })
    };
    if text.is_empty() {
        refused("it is empty")
    } else if text.contains(char::is_control) {
        refused(
            "it contains a control character; in TOML, a backslash stands for itself only in 'single quotes'",
        )
    } else if text == "~" || text.starts_with("~/") {
        refused("~ means your home folder only to a shell")
    } else {
        Ok(Value::Path(PathBuf::from(text)))
    }
}

/// A path as browsers send it: what they would escape, or take for the end of the path, is refused.
fn read_url_path(text: &str) -> Result<Value, Fault> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~%!$&'()*+,;=:@".contains(&byte);
    let why = if !text.starts_with('/') {
        "it doesn't begin with /"
    } else if text.len() > MAX_URL_PATH_BYTES {
        "it is longer than 256 bytes"
    } else if !text.bytes().all(plain) {
        "it contains a character that must be escaped as % and two digits in a URL"
    } else {
        return Ok(Value::Text(text.to_owned()));
    };
    Err(Fault::BadPath {
        found: quoted(text),
        why: why.to_owned(),
    })
}

/// A size such as `512MiB`, `1 GiB` or `4096`, in bytes.
fn parse_size(text: &str) -> Result<u64, SizeError> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(SizeError::NoNumber);
    }
    let unit = match unit.strip_prefix(' ').unwrap_or(unit) {
        "" => "B",
        unit if unit.starts_with(['.', '_', ',']) => return Err(SizeError::NoNumber),
        unit => unit,
    };
    let (_, factor) = UNITS
        .iter()
        .find(|(name, _)| *name == unit)
        .ok_or(SizeError::BadUnit)?;
    number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(*factor))
        .ok_or(SizeError::TooLarge)
}

/// `bytes` in the largest unit that leaves a whole number; only digits if that is a byte.
fn size_text(bytes: u64) -> String {
    for (unit, factor) in UNITS {
        if factor > 1 && bytes > 0 && bytes.is_multiple_of(factor) {
            return format!("{}{unit}", bytes / factor);
        }
    }
    bytes.to_string()
}

/// `EnvFilter` takes a misspelt level for the name of a module, and then logs nothing. So a word
/// that stands alone must be a level here.
fn check_log_filter(text: &str) -> Result<(), String> {
    if text.is_empty() {
        return Err("it is empty".to_owned());
    }
    EnvFilter::try_new(text).map_err(|error| error.to_string())?;
    for directive in text.split(',').map(str::trim) {
        let is_word = !directive.contains(['=', '[', ']', '{', '}']);
        if is_word && directive.parse::<LevelFilter>().is_err() {
            let close = suggest::nearest(directive, LEVELS.iter().copied());
            return Err(match close {
                Some(level) => format!("no level {}; did you mean {level}?", quoted(directive)),
                None => format!("no level {}", quoted(directive)),
            });
        }
    }
    Ok(())
}

const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn listed(words: &[&str]) -> String {
    words
        .iter()
        .map(|word| format!("\"{word}\""))
        .collect::<Vec<_>>()
        .join(", ")
}

/// Most digits of a number that an error repeats.
const SHOWN_DIGITS: usize = 24;

fn shortened(digits: &str) -> String {
    if digits.len() <= SHOWN_DIGITS {
        digits.to_owned()
    } else {
        let start: String = digits.chars().take(SHOWN_DIGITS).collect();
        format!("{start}…")
    }
}

/// What stands in a file where something else was expected.
pub(super) fn describe(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) => format!("the string {}", quoted(text)),
        DeValue::Integer(integer) => format!("the integer {}", shortened(&integer.to_string())),
        DeValue::Float(float) => format!("the float {}", shortened(&float.to_string())),
        DeValue::Boolean(boolean) => format!("the boolean {boolean}"),
        DeValue::Datetime(datetime) => format!("the date {datetime}"),
        DeValue::Array(_) => "an array".to_owned(),
        DeValue::Table(_) => "a table".to_owned(),
    }
}
