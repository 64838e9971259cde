//! Developer commands, run as `cargo xtask …`. The same ones are behind `./dev`, which sets up what
//! they need first.

#![forbid(unsafe_code)]

mod child;
mod fuzz;
mod guest;
mod lint;
mod nix;
#[cfg(unix)]
mod ota_test;
mod tests;
mod tree;
#[cfg(unix)]
mod vm;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::env;
use tree::Tree;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Headgate's developer commands")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Builds every app in apps/ into target/apps/<name>/{<name>.wasm,manifest.toml}
    Apps,
    /// Builds all, then runs the gateway with the sample apps and a simulated plant
    Demo {
        /// Handed to `headgate demo`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Builds the apps, then runs every test
    Test {
        /// Handed to `cargo test --release --workspace`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Builds what ships (profile `dist`, which takes minutes), then measures it
    Bench {
        /// Handed to the benchmark
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Builds the gateway, then lets clients churn and flood for minutes beside one that must miss nothing
    Soak {
        /// Handed to the soak: --minutes, --seed
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Feeds the parsers and the MQTT session with bytes that nobody has thought of
    Fuzz {
        /// All, if none is named
        targets: Vec<String>,
        /// Of each target
        #[arg(long, default_value_t = 60)]
        seconds: u64,
    },
    /// Boots the gateway on an emulated aarch64 machine, cuts its power, boots it again
    #[cfg(unix)]
    VmTest(vm::Options),
    /// Updates the gateway over the air on an emulated aarch64 machine with UEFI, well and badly, and cuts its power
    #[cfg(unix)]
    OtaTest(ota_test::Options),
    /// Checks format, lints, and, where cargo-deny is installed, licences and advisories
    Lint,
    /// Checks what is written in Nix; with NIXPKGS=FOLDER evaluates it too
    Nix {
        /// Writes what is made from the module: docs/nixos-options.md and the tests' fixtures
        #[arg(long)]
        write: bool,
    },
}

fn main() -> Result<()> {
    let tree = Tree::find()?;
    match Cli::parse().command {
        Command::Apps => {
            for app in guest::build_apps(&tree)? {
                println!("{}", app.display());
            }
            Ok(())
        }
        Command::Demo { args } => {
            guest::build_apps(&tree)?;
            let mut demo = child::cargo();
            demo.args(["run", "--release", "--bin", "headgate", "--manifest-path"])
                .arg(tree.root.join("Cargo.toml"))
                .args(["--", "demo"])
                .args(args);
            if env::var_os("HEADGATE_DEMO_APPS").is_none() {
                demo.env("HEADGATE_DEMO_APPS", tree.apps_out());
            }
            child::replace(&mut demo)
        }
        Command::Test { args } => {
            guest::build_apps(&tree)?;
            tests::run(&tree, &args)
        }
        Command::Bench { args } => {
            guest::build_apps(&tree)?;
            run_beside_gateway(&tree, "dist", "headgate-bench", &args)
        }
        Command::Soak { args } => run_beside_gateway(&tree, "release", "headgate-soak", &args),
        Command::Fuzz { targets, seconds } => fuzz::run(&tree, &targets, seconds),
        #[cfg(unix)]
        Command::VmTest(options) => vm::run(&tree, &options),
        #[cfg(unix)]
        Command::OtaTest(options) => ota_test::run(&tree, &options),
        Command::Lint => lint::run(&tree),
        Command::Nix { write: true } => nix::run(&tree, nix::Made::Write),
        Command::Nix { write: false } => nix::run(&tree, nix::Made::Check),
    }
}

/// Runs a program that starts the gateway's binary, which lies beside its own.
fn run_beside_gateway(tree: &Tree, profile: &str, program: &str, args: &[String]) -> Result<()> {
    let manifest = tree.root.join("Cargo.toml");
    let cargo = |command: &str, program: &str| {
        let mut cargo = child::cargo();
        cargo
            .args([command, "--profile", profile, "--bin", program])
            .arg("--manifest-path")
            .arg(&manifest);
        cargo
    };
    child::run(&mut cargo("build", "headgate"))?;
    child::replace(cargo("run", program).arg("--").args(args))
}
