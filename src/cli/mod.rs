//! The command line: parsing, one file a subcommand, what is printed, exit codes.
//!
//! Subcommands other than `run` and `demo` talk to a running gateway through its admin socket.
//! Exit codes: 0 done, 1 failed, 2 called wrongly.

mod app;
mod boot;
#[cfg(feature = "compiler")]
mod build;
#[cfg(feature = "compiler")]
mod compile;
mod config;
mod dead_letters;
mod demo;
// Most of it is for `headgate app test`.
#[cfg_attr(not(feature = "compiler"), allow(dead_code))]
mod events;
mod journal;
mod mapping;
#[cfg(feature = "compiler")]
mod moment;
mod mqtt;
#[cfg(feature = "compiler")]
mod new;
mod ota;
mod output;
mod package;
mod prompt;
mod release;
mod reload;
mod run;
mod send;
mod status;
#[cfg(feature = "compiler")]
mod tryout;
mod uplink;
mod user;
mod why;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::admin::Client;
use crate::config::{Config, Override, Source};
use output::{Output, StdoutClosed};

const FAILED: u8 = 1;
const CALLED_WRONGLY: u8 = 2;

#[derive(Parser)]
#[command(
    name = "headgate",
    version,
    about = "Edge gateway: MQTT in, WASM apps in batches, MQTT out",
    subcommand_required = true,
    arg_required_else_help = true
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// What every subcommand takes.
#[derive(Args)]
struct Global {
    /// Print JSON, errors too
    #[arg(long, global = true)]
    json: bool,
    /// Configuration file [env: HEADGATE_CONFIG] [default: /etc/headgate/headgate.toml, if it is
    /// there]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Admin socket of the gateway [env: HEADGATE_ADMIN_SOCKET] [default: admin.socket of the
    /// configuration]
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    Run(run::RunArgs),
    /// Install and operate apps
    #[command(subcommand)]
    App(app::AppCommand),
    /// Check, test, install and operate mappings
    #[command(subcommand)]
    Mapping(mapping::MappingCommand),
    Status(status::StatusArgs),
    #[command(flatten)]
    Mqtt(mqtt::MqttCommand),
    Send(send::SendArgs),
    DeadLetters(dead_letters::DeadLettersArgs),
    Why(why::WhyArgs),
    /// Look at the journal, which has durable events on disk
    #[command(subcommand)]
    Journal(journal::JournalCommand),
    /// Look at the links to other machines
    #[command(subcommand)]
    Uplink(uplink::UplinkCommand),
    /// Look at the gateways of the site
    #[command(subcommand)]
    Cluster(uplink::ClusterCommand),
    Reload(reload::ReloadArgs),
    /// Write, list and bless boot entries
    #[command(subcommand)]
    Boot(boot::BootCommand),
    /// Keep the users of the password file
    #[command(subcommand)]
    User(user::UserCommand),
    Config(config::ConfigArgs),
    /// Update the whole system over the air, and go back
    #[command(subcommand)]
    Ota(ota::OtaCommand),
    /// Make releases that gateways can be updated to
    #[command(subcommand)]
    Release(release::ReleaseCommand),
    Demo(demo::DemoArgs),
}

impl Global {
    fn source(&self, mut overrides: Vec<Override>) -> Source {
        if let Some(socket) = &self.socket {
            overrides.push(Override {
                key: "admin.socket",
                value: socket.into(),
                flag: "--socket",
            });
        }
        Source::of_process(self.config.clone(), overrides)
    }

    /// A client of the gateway that `--socket` names, else of the configured one.
    fn client(&self) -> anyhow::Result<Client> {
        if let Some(socket) = &self.socket {
            return Ok(Client::new(socket));
        }
        let resolved = Config::load(self.source(Vec::new()))?;
        Ok(Client::new(resolved.config.admin.socket))
    }
}

/// Runs the command that `args` spell; `args` starts with the program's name.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => return refuse(&error, args.iter().any(|arg| arg == "--json")),
    };
    let output = Output::new(cli.global.json);
    let outcome = match cli.command {
        Command::Run(args) => run::run(args, &cli.global).map(succeed),
        Command::App(command) => app::run(command, &cli.global, &output).map(succeed),
        Command::Mapping(command) => mapping::run(command, &cli.global, &output),
        Command::Status(args) => status::run(args, &cli.global, &output).map(succeed),
        Command::Mqtt(command) => mqtt::run(command, &cli.global, &output).map(succeed),
        Command::Send(args) => send::run(args, &cli.global, &output).map(succeed),
        Command::DeadLetters(args) => dead_letters::run(args, &cli.global, &output),
        Command::Why(args) => why::run(args, &cli.global, &output).map(succeed),
        Command::Journal(command) => journal::run(command, &cli.global, &output),
        Command::Uplink(command) => uplink::run(command, &cli.global, &output),
        Command::Cluster(command) => uplink::cluster(command, &cli.global, &output),
        Command::Reload(args) => reload::run(args, &cli.global, &output).map(succeed),
        Command::Boot(command) => boot::run(command, &output).map(succeed),
        Command::User(command) => user::run(command, &cli.global, &output).map(succeed),
        Command::Config(args) => config::run(args, cli.global.source(Vec::new()), output.json),
        Command::Ota(command) => ota::run(command, &cli.global, &output),
        Command::Release(command) => release::run(command, &output).map(succeed),
        Command::Demo(args) => demo::run(args, &output),
    };
    match outcome {
        Ok(code) => code,
        // Whoever read our output, `head` for one, has seen enough.
        Err(error) if error.is::<StdoutClosed>() => ExitCode::SUCCESS,
        Err(error) => {
            output.error(&error);
            ExitCode::from(FAILED)
        }
    }
}

fn succeed((): ()) -> ExitCode {
    ExitCode::SUCCESS
}

/// Answers a call that can't be parsed, and `--help` and `--version`, which clap treats as such.
fn refuse(error: &clap::Error, json: bool) -> ExitCode {
    if json && error.use_stderr() {
        let message = error.render().to_string();
        let message = message.trim().trim_start_matches("error: ");
        Output::new(true).error_text(message);
    } else {
        // Nobody is left to tell if this fails.
        let _ = error.print();
    }
    if error.use_stderr() {
        ExitCode::from(CALLED_WRONGLY)
    } else {
        ExitCode::SUCCESS
    }
}

/// A runtime for a command that only waits for an answer.
fn small_runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
