//! `headgate config`: check, show and describe the configuration. Starts nothing, changes nothing.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::json;

use crate::config::{Config, ConfigErrors, Origin, Problem, Resolved, Source};

/// Check, show and describe the configuration.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    #[command(subcommand)]
    command: ConfigCommand,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Check the file and the environment; all errors at once.
    Check,
    /// Print the values in force and where each comes from.
    Show,
    /// Print a JSON schema of the configuration file.
    Schema {
        /// Print the documentation of all keys instead.
        #[arg(long)]
        markdown: bool,
    },
}

/// What a subcommand prints, and whether it went well.
struct Report {
    stdout: String,
    stderr: String,
    ok: bool,
}

/// Runs the subcommand on what `source` makes up, with output as JSON if `json`.
pub fn run(args: ConfigArgs, source: Source, json: bool) -> anyhow::Result<ExitCode> {
    let report = report(&args.command, source, json);
    print(io::stdout().lock(), &report.stdout)?;
    print(io::stderr().lock(), &report.stderr)?;
    Ok(if report.ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// A reader that has seen enough (`headgate config show | head`) is no error.
fn print(mut stream: impl Write, text: &str) -> io::Result<()> {
    match stream.write_all(text.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

fn report(command: &ConfigCommand, source: Source, json: bool) -> Report {
    match command {
        ConfigCommand::Schema { markdown: true } => good(crate::config::markdown()),
        ConfigCommand::Schema { markdown: false } => good(pretty(&crate::config::json_schema())),
        ConfigCommand::Check => match Config::load(source) {
            Ok(resolved) if json => good(pretty(&json!({
                "ok": true,
                "file": resolved.file,
                "problems": [],
            }))),
            Ok(resolved) => good(format!("ok: {}\n", checked(&resolved))),
            Err(errors) => bad(&errors, json),
        },
        ConfigCommand::Show => match Config::load(source) {
            Ok(resolved) if json => good(pretty(&values_json(&resolved))),
            Ok(resolved) => good(values_table(&resolved)),
            Err(errors) => bad(&errors, json),
        },
    }
}

fn good(stdout: String) -> Report {
    Report {
        stdout,
        stderr: String::new(),
        ok: true,
    }
}

fn bad(errors: &ConfigErrors, json: bool) -> Report {
    let (stdout, stderr) = if json {
        let problems: Vec<_> = errors.0.iter().map(problem_json).collect();
        (
            pretty(&json!({"ok": false, "problems": problems})),
            String::new(),
        )
    } else {
        (String::new(), format!("{errors}\n"))
    };
    Report {
        stdout,
        stderr,
        ok: false,
    }
}

fn pretty(value: &serde_json::Value) -> String {
    format!("{value:#}\n")
}

fn checked(resolved: &Resolved) -> String {
    match &resolved.file {
        Some(file) => file.display().to_string(),
        None => "no configuration file".to_owned(),
    }
}

/// Valid TOML: it can be saved as a configuration file.
fn values_table(resolved: &Resolved) -> String {
    let assignments: Vec<_> = resolved
        .values()
        .iter()
        .map(|setting| format!("{} = {}", setting.key.name, setting.value.to_toml()))
        .collect();
    let width = assignments
        .iter()
        .map(|assignment| assignment.chars().count())
        .max()
        .unwrap_or(0);
    let mut table = String::new();
    for (assignment, setting) in assignments.iter().zip(resolved.values()) {
        // Writing to a String can't fail.
        let _ = writeln!(table, "{assignment:width$}  # {}", setting.origin);
    }
    table
}

fn values_json(resolved: &Resolved) -> serde_json::Value {
    let values: Vec<_> = resolved
        .values()
        .iter()
        .map(|setting| {
            json!({
                "key": setting.key.name,
                "value": setting.value.to_json(),
                "origin": setting.origin.to_string(),
            })
        })
        .collect();
    json!({"file": resolved.file, "values": values})
}

fn problem_json(problem: &Problem) -> serde_json::Value {
    let (file, position) = match &problem.origin {
        Origin::File { file, position } => (Some(file), *position),
        _ => (None, None),
    };
    json!({
        "origin": problem.origin.to_string(),
        "file": file.map(|file| file.to_string_lossy()),
        "line": position.map(|position| position.line),
        "column": position.map(|position| position.column),
        "key": problem.key,
        "problem": problem.fault.to_string(),
        "help": problem.remedy,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn with_file(text: &str) -> (tempfile::TempDir, Source) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("headgate.toml");
        fs::write(&file, text).unwrap();
        let source = Source {
            file: Some(file),
            env: vec![("HOME".into(), "/home/ada".into())],
            ..Source::default()
        };
        (folder, source)
    }

    #[test]
    fn check_names_the_file_that_is_fine() {
        let (folder, source) = with_file("[log]\nlevel = \"debug\"\n");
        let report = report(&ConfigCommand::Check, source, false);
        assert!(report.ok);
        let file = folder.path().join("headgate.toml");
        assert_eq!(report.stdout, format!("ok: {}\n", file.display()));
        assert_eq!(report.stderr, "");
    }

    #[test]
    fn check_fails_with_every_error_on_standard_error() {
        let (folder, source) = with_file("[mqtt]\nlisten = 1883\nmax_inflight = 0\n");
        let report = report(&ConfigCommand::Check, source, false);
        assert!(!report.ok);
        assert_eq!(report.stdout, "");
        let file = folder.path().join("headgate.toml");
        let file = file.display();
        assert_eq!(
            report.stderr,
            format!(
                "{file}:2:10: mqtt.listen: expected \"host:port\" in quotes, found the integer 1883\n  \
                 help: write listen = \"127.0.0.1:1883\" in [mqtt]\n\
                 {file}:3:16: mqtt.max_inflight: 0 is out of range: 1 to 65535\n  \
                 help: write max_inflight = 32 in [mqtt]\n"
            )
        );
    }

    #[test]
    fn check_as_json_gives_the_place_of_each_error() {
        let (_folder, source) = with_file("[mqtt]\nlisten = 1883\n");
        let report = report(&ConfigCommand::Check, source, true);
        assert!(!report.ok);
        let found: serde_json::Value = serde_json::from_str(&report.stdout).unwrap();
        assert_eq!(found["ok"], false);
        assert_eq!(found["problems"][0]["key"], "mqtt.listen");
        assert_eq!(found["problems"][0]["line"], 2);
        assert_eq!(found["problems"][0]["column"], 10);
    }

    #[test]
    fn show_aligns_values_and_names_the_origin_of_each() {
        let (_folder, mut source) = with_file("[mqtt]\nmax_inflight = 64\n");
        source
            .env
            .push(("HEADGATE_LOG_LEVEL".into(), "warn".into()));
        let report = report(&ConfigCommand::Show, source, false);
        assert!(report.ok);
        let line = |key: &str| {
            let line = report.stdout.lines().find(|line| line.starts_with(key));
            let (assignment, origin) = line.unwrap().split_once("  # ").unwrap();
            (assignment.trim_end().to_owned(), origin.to_owned())
        };
        assert_eq!(line("mqtt.max_inflight").0, "mqtt.max_inflight = 64");
        assert!(line("mqtt.max_inflight").1.ends_with("headgate.toml:2"));
        assert_eq!(
            line("log.level"),
            (
                "log.level = \"warn\"".to_owned(),
                "env HEADGATE_LOG_LEVEL".to_owned()
            )
        );
        assert_eq!(line("store.max_bytes").1, "default");
        let columns: Vec<_> = report
            .stdout
            .lines()
            .map(|line| line.find("  # "))
            .collect();
        assert!(columns.windows(2).all(|pair| pair[0] == pair[1]));
    }

    #[test]
    fn what_show_prints_is_a_file_with_the_same_values() {
        let (_folder, source) = with_file("[metrics]\nlisten = \"off\"\n");
        let before = Config::load(source.clone()).unwrap().config;
        let shown = report(&ConfigCommand::Show, source, false).stdout;
        let (_folder, source) = with_file(&shown);
        assert_eq!(Config::load(source).unwrap().config, before);
    }

    #[test]
    fn show_as_json_lists_key_value_and_origin() {
        let (_folder, source) = with_file("");
        let report = report(&ConfigCommand::Show, source, true);
        let found: serde_json::Value = serde_json::from_str(&report.stdout).unwrap();
        let values = found["values"].as_array().unwrap();
        assert_eq!(values.len(), crate::config::keys().count());
        let size = values
            .iter()
            .find(|value| value["key"] == "store.max_bytes");
        assert_eq!(
            size,
            Some(&json!({"key": "store.max_bytes", "value": 1 << 30, "origin": "default"}))
        );
    }

    #[test]
    fn a_reader_that_closes_the_pipe_is_no_error() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        assert!(print(Closed, "text").is_ok());
    }
}
