//! `headgate config`: check, show and describe the configuration. Starts nothing, changes nothing.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::json;

use super::output::printable;
use crate::config::{Config, ConfigErrors, Origin, Problem, Resolved, Source};
use crate::gateway::{self, FileProblem};

/// Check, show and describe the configuration.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    #[command(subcommand)]
    command: ConfigCommand,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Check the file, the environment and the files that they name; all errors at once.
    ///
    /// The files are those of mqtt.auth and mqtt.tls. To read them, run this as root or as the
    /// gateway's own user.
    Check {
        /// Leave the files alone that the configuration names, such as where it is checked for another
        /// machine.
        #[arg(long)]
        no_files: bool,
    },
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
        ConfigCommand::Check { no_files } => match Config::load(source) {
            Ok(resolved) => {
                let problems = match no_files {
                    true => Vec::new(),
                    false => gateway::check_files(&resolved.config),
                };
                match problems.is_empty() {
                    true => fine(&resolved, json),
                    false => bad_files(&resolved, &problems, json),
                }
            }
            Err(errors) => bad(&errors, json),
        },
        ConfigCommand::Show => match Config::load(source) {
            Ok(resolved) if json => good(pretty(&values_json(&resolved))),
            Ok(resolved) => good(values_table(&resolved)),
            Err(errors) => bad(&errors, json),
        },
    }
}

fn fine(resolved: &Resolved, json: bool) -> Report {
    good(match json {
        true => pretty(&json!({"ok": true, "file": resolved.file, "problems": []})),
        false => format!("ok: {}\n", checked(resolved)),
    })
}

/// Where the key that names a file is set, and what a start would say.
fn bad_files(resolved: &Resolved, problems: &[FileProblem], json: bool) -> Report {
    let origin = |key: &str| {
        let mut settings = resolved.values().iter();
        let setting = settings.find(|setting| setting.key.name == key);
        setting.map_or(&Origin::Default, |setting| &setting.origin)
    };
    let lines = problems.iter().map(|FileProblem { key, error }| {
        let line = format!("{}: {error}", origin(key));
        printable(&line) + "\n"
    });
    let values = problems.iter().map(|FileProblem { key, error }| {
        found_json(origin(key), Some(key), &error.to_string(), None)
    });
    match json {
        true => bad_json(values.collect()),
        false => Report {
            stdout: String::new(),
            stderr: lines.collect(),
            ok: false,
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
    match json {
        true => bad_json(errors.0.iter().map(problem_json).collect()),
        false => Report {
            stdout: String::new(),
            stderr: format!("{errors}\n"),
            ok: false,
        },
    }
}

fn bad_json(problems: Vec<serde_json::Value>) -> Report {
    Report {
        stdout: pretty(&json!({"ok": false, "problems": problems})),
        stderr: String::new(),
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
    let fault = problem.fault.to_string();
    let key = problem.key.as_deref();
    found_json(&problem.origin, key, &fault, Some(&problem.remedy))
}

/// Without `help` where what to do is said with the problem.
fn found_json(
    origin: &Origin,
    key: Option<&str>,
    problem: &str,
    help: Option<&str>,
) -> serde_json::Value {
    let (file, position) = match origin {
        Origin::File { file, position } => (Some(file), *position),
        _ => (None, None),
    };
    json!({
        "origin": origin.to_string(),
        "file": file.map(|file| file.to_string_lossy()),
        "line": position.map(|position| position.line),
        "column": position.map(|position| position.column),
        "key": key,
        "problem": problem,
        "help": help,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const CHECK: ConfigCommand = ConfigCommand::Check { no_files: false };

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
        let report = report(&CHECK, source, false);
        assert!(report.ok);
        let file = folder.path().join("headgate.toml");
        assert_eq!(report.stdout, format!("ok: {}\n", file.display()));
        assert_eq!(report.stderr, "");
    }

    #[test]
    fn check_fails_with_every_error_on_standard_error() {
        let (folder, source) = with_file("[mqtt]\nlisten = 1883\nmax_inflight = 0\n");
        let report = report(&CHECK, source, false);
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
                 help: write max_inflight = 256 in [mqtt]\n"
            )
        );
    }

    #[test]
    fn check_as_json_gives_the_place_of_each_error() {
        let (_folder, source) = with_file("[mqtt]\nlisten = 1883\n");
        let report = report(&CHECK, source, true);
        assert!(!report.ok);
        let found: serde_json::Value = serde_json::from_str(&report.stdout).unwrap();
        assert_eq!(found["ok"], false);
        assert_eq!(found["problems"][0]["key"], "mqtt.listen");
        assert_eq!(found["problems"][0]["line"], 2);
        assert_eq!(found["problems"][0]["column"], 10);
    }

    #[test]
    fn check_reads_the_files_that_the_configuration_names() {
        let (folder, source) = with_file(
            "[mqtt.auth]\npassword_file = \"users\"\njwt_key = \"key\"\nacl_file = \"acl\"\n\
             [mqtt.tls]\nlisten = \"[::1]:8883\"\ncertificate = \"crt\"\nkey = \"tls.key\"\n",
        );
        let place = |name: &str| folder.path().join(name).display().to_string();
        let config = place("headgate.toml");
        let found = report(&CHECK, source.clone(), false);
        assert!(!found.ok);
        assert_eq!(found.stdout, "");
        let missing = "No such file or directory (os error 2)";
        let or_none = "make it, or set the key to \"\"";
        let expected = [
            format!(
                "{config}:2: mqtt.auth.password_file: {}: {missing}; make it with `headgate user add NAME`",
                place("users")
            ),
            format!(
                "{config}:3: mqtt.auth.jwt_key: {}: {missing}; {or_none}",
                place("key")
            ),
            format!(
                "{config}:4: mqtt.auth.acl_file: {}: {missing}; {or_none}",
                place("acl")
            ),
            format!(
                "{config}:7: mqtt.tls.certificate: {}: {missing}",
                place("crt")
            ),
        ];
        assert_eq!(found.stderr.lines().collect::<Vec<_>>(), expected);
        let no_files = ConfigCommand::Check { no_files: true };
        assert!(report(&no_files, source.clone(), false).ok);

        // With a byte-order mark, too.
        let write = |name: &str, text: &str| {
            fs::write(folder.path().join(name), format!("\u{feff}{text}")).unwrap();
        };
        let pair = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        write("crt", &pair.cert.pem());
        write("tls.key", &pair.signing_key.serialize_pem());
        write("users", "# none yet\n");
        write("key", &"k".repeat(32));
        write(
            "acl",
            "[[rule]]\nallow = [\"publish\"]\ntopics = [\"+#\"]\n",
        );
        let found = report(&CHECK, source.clone(), true);
        let found: serde_json::Value = serde_json::from_str(&found.stdout).unwrap();
        assert_eq!(found["ok"], false);
        let problems = found["problems"].as_array().unwrap();
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert_eq!(problems[0]["key"], "mqtt.auth.acl_file");
        assert_eq!(
            (&problems[0]["file"], &problems[0]["line"]),
            (&json!(config), &json!(4))
        );
        let problem = problems[0]["problem"].as_str().unwrap();
        assert!(
            problem.starts_with(&format!("mqtt.auth.acl_file: {}:3: ", place("acl"))),
            "{problem}"
        );

        write("acl", "[[rule]]\nallow = [\"publish\"]\ntopics = [\"#\"]\n");
        assert!(report(&CHECK, source.clone(), false).ok);
        let other = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        write("tls.key", &other.signing_key.serialize_pem());
        let found = report(&CHECK, source, false);
        assert!(
            found.stderr.starts_with(&format!("{config}:8: mqtt.tls: ")),
            "{}",
            found.stderr
        );
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
