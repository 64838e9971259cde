//! What is known about a key: the words in which [`super::tree`] declares them.

use std::path::PathBuf;

use super::origin::Origin;
use super::problem::Fault;
use super::resolve::Surroundings;

/// One setting.
#[derive(Debug)]
pub struct Key {
    /// Dotted: `mqtt.listen`.
    pub name: &'static str,
    pub(super) description: &'static str,
    pub(super) kind: Kind,
    pub(super) preset: Preset,
}

/// A table of the configuration file.
#[derive(Debug)]
pub struct Section {
    /// Dotted: `pipeline.batch`.
    pub(super) table: &'static str,
    pub(super) about: &'static str,
    pub(super) keys: &'static [Key],
    /// Tables inside this one.
    pub(super) inner: &'static [&'static Section],
}

/// What a value must be.
#[derive(Debug)]
pub enum Kind {
    Integer {
        min: u64,
        max: u64,
    },
    /// A number of bytes, or a string with a unit: `"16MiB"`. Rounded up to a multiple of `whole`.
    Bytes {
        min: u64,
        max: u64,
        whole: u64,
    },
    /// A path; that of a Unix socket is limited in length.
    Path {
        socket: bool,
    },
    /// A path, or "" for none.
    OptionalPath,
    /// A topic name, in which %c stands for a client id, or "" for none.
    OptionalTopic,
    /// `host:port`, or "off" or "" for none.
    Address,
    /// true or false.
    Switch,
    /// A path in a URL.
    UrlPath,
    /// One of a few words.
    Choice(&'static [&'static str]),
    /// Directives of tracing's `EnvFilter`.
    LogFilter,
    /// Names of apps with commas between them, "*" for all, or "" for none.
    AppNames,
    /// Topic filters with commas between them, or "" for none.
    TopicFilters,
    /// What another room reads; "" is always allowed.
    Checked(&'static Check),
}

/// A text with a form of its own.
#[derive(Debug)]
pub struct Check {
    /// What it must be: "an http, https or file URL".
    pub(super) expected: &'static str,
    /// Which values are allowed, in short.
    pub(super) allowed: &'static str,
    /// Why a text is none.
    pub(super) check: fn(&str) -> Result<(), String>,
}

/// The value of a key that nobody sets.
pub enum Preset {
    /// As one would write it in an environment variable.
    Text(&'static str),
    /// Worked out from where the gateway runs.
    Derived {
        /// How, for the documentation.
        from: &'static str,
        /// A value for error messages and the documentation.
        example: &'static str,
        /// None if that isn't worth an error of its own, because another key failed first.
        derive: fn(&Surroundings) -> Option<Derived>,
    },
}

/// A default that was worked out, and what it follows from.
pub(super) type Derived = Result<(PathBuf, Origin), Fault>;

impl std::fmt::Debug for Preset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Preset::Text(text) => f.write_str(text),
            Preset::Derived { from, .. } => f.write_str(from),
        }
    }
}

impl Key {
    /// The environment variable that sets this key: `HEADGATE_MQTT_LISTEN`.
    pub fn variable(&self) -> String {
        let mut variable = String::from(VARIABLE_PREFIX);
        variable.extend(self.name.chars().map(|letter| match letter {
            '.' => '_',
            letter => letter.to_ascii_uppercase(),
        }));
        variable
    }

    /// What the key means, in one line, with its unit.
    pub fn description(&self) -> String {
        one_line(self.description)
    }

    /// The table and the key in it: `("pipeline.batch", "max_events")`.
    pub(super) fn split(&self) -> (&'static str, &'static str) {
        self.name.rsplit_once('.').unwrap_or(("", self.name))
    }

    /// A valid value, as one would write it in an environment variable.
    pub(super) fn example(&self) -> &'static str {
        match self.preset {
            Preset::Text(text) => text,
            Preset::Derived { example, .. } => example,
        }
    }

    /// A valid value, as one would write it in the file.
    pub(super) fn toml_example(&self) -> String {
        match self.kind {
            Kind::Integer { .. } | Kind::Switch => self.example().to_owned(),
            _ => toml::Value::from(self.example()).to_string(),
        }
    }
}

impl Section {
    /// Its own keys and those of the tables in it. Tables are two deep at most.
    pub(super) fn all_keys(&'static self) -> impl Iterator<Item = &'static Key> + Clone {
        let inner = self.inner.iter().flat_map(|section| section.keys);
        self.keys.iter().chain(inner)
    }

    pub(super) fn about(&self) -> String {
        one_line(self.about)
    }
}

/// Every environment variable of Headgate starts so.
pub(super) const VARIABLE_PREFIX: &str = "HEADGATE_";

/// A doc comment of several lines, as one.
fn one_line(doc: &str) -> String {
    doc.split_whitespace().collect::<Vec<_>>().join(" ")
}
