//! The manifest's `[config]` table, typed at the place where it is read.

use std::any::type_name;
use std::fmt;
use std::str::FromStr;

/// The manifest's `[config]` table. Every value arrives as text, whatever it was in the manifest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Config {
    /// Few and read once, at start: a scan beats a map.
    entries: Vec<(String, String)>,
}

/// A key of `[config]` that is missing, unknown or of no use; the text names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError(String);

impl Config {
    /// The value of `key`.
    ///
    /// # Errors
    /// If the key is missing or its value is no `T`.
    pub fn get<T: FromStr>(&self, key: &str) -> Result<T, ConfigError> {
        self.get_opt(key)?
            .ok_or_else(|| ConfigError(format!("config.{key}: is missing")))
    }

    /// The value of `key`, or `default` if the manifest does not set it.
    ///
    /// # Errors
    /// If the value is no `T`.
    pub fn get_or<T: FromStr>(&self, key: &str, default: T) -> Result<T, ConfigError> {
        Ok(self.get_opt(key)?.unwrap_or(default))
    }

    /// The value of `key`, or none if the manifest does not set it.
    ///
    /// # Errors
    /// If the value is no `T`.
    pub fn get_opt<T: FromStr>(&self, key: &str) -> Result<Option<T>, ConfigError> {
        let Some((_, text)) = self.entries.iter().find(|(name, _)| name == key) else {
            return Ok(None);
        };
        match text.parse() {
            Ok(value) => Ok(Some(value)),
            Err(_) => Err(self.invalid(key, format_args!("is no {}", short_type_name::<T>()))),
        }
    }

    /// An error that names `key` and its value: `config.threshold = "NaN": <why>`.
    pub fn invalid(&self, key: &str, why: impl fmt::Display) -> ConfigError {
        match self.entries.iter().find(|(name, _)| name == key) {
            Some((_, text)) => ConfigError(format!("config.{key} = {text:?}: {why}")),
            None => ConfigError(format!("config.{key}: {why}")),
        }
    }

    /// Makes sure that the manifest sets no key but `known` ones, so that a misspelt key is an
    /// error and not a silently used default.
    ///
    /// # Errors
    /// Names the first unknown key and the known ones.
    pub fn deny_unknown(&self, known: &[&str]) -> Result<(), ConfigError> {
        match self
            .entries
            .iter()
            .find(|(name, _)| !known.contains(&name.as_str()))
        {
            None => Ok(()),
            Some((name, _)) => Err(ConfigError(format!(
                "config.{name}: unknown key; this app knows {}",
                known.join(", ")
            ))),
        }
    }
}

impl<K: Into<String>, V: Into<String>, const N: usize> From<[(K, V); N]> for Config {
    fn from(entries: [(K, V); N]) -> Self {
        entries.into_iter().collect()
    }
}

impl<K: Into<String>, V: Into<String>> FromIterator<(K, V)> for Config {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        Config {
            entries: entries
                .into_iter()
                .map(|(key, value)| (key.into(), value.into()))
                .collect(),
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ConfigError {}

/// So that `?` works in [`crate::App::configure`].
impl From<ConfigError> for String {
    fn from(error: ConfigError) -> String {
        error.0
    }
}

fn short_type_name<T>() -> &'static str {
    let name = type_name::<T>();
    name.rsplit("::").next().unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_parsed_as_the_type_that_is_asked_for() {
        let config = Config::from([("threshold", "90.5"), ("limit", "7"), ("on", "true")]);
        assert_eq!(config.get("threshold"), Ok(90.5));
        assert_eq!(config.get("limit"), Ok(7_usize));
        assert_eq!(config.get("on"), Ok(true));
        assert_eq!(config.get("on"), Ok("true".to_string()));
    }

    #[test]
    fn a_missing_key_is_named_unless_there_is_a_default() {
        let config = Config::default();
        let error = config.get::<f64>("threshold").unwrap_err();
        assert_eq!(error.to_string(), "config.threshold: is missing");
        assert_eq!(config.get_or("threshold", 90.0), Ok(90.0));
        assert_eq!(config.get_opt::<f64>("threshold"), Ok(None));
    }

    #[test]
    fn a_value_of_the_wrong_type_is_named_even_where_there_is_a_default() {
        let config = Config::from([("threshold", "hot")]);
        let expected = r#"config.threshold = "hot": is no f64"#;
        assert_eq!(
            config.get::<f64>("threshold").unwrap_err().to_string(),
            expected
        );
        assert_eq!(
            config.get_or("threshold", 90.0).unwrap_err().to_string(),
            expected
        );
    }

    #[test]
    fn a_misspelt_key_is_named_together_with_the_known_ones() {
        let config = Config::from([("treshold", "90")]);
        let error = String::from(
            config
                .deny_unknown(&["threshold", "hysteresis"])
                .unwrap_err(),
        );
        assert_eq!(
            error,
            "config.treshold: unknown key; this app knows threshold, hysteresis"
        );
        assert_eq!(config.deny_unknown(&["treshold"]), Ok(()));
    }
}
