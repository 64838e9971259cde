//! Programs that look at Nix files without evaluating them.

use super::{pass, relative};
use crate::child;
use crate::tree::Tree;
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// A program that cargo can install.
struct Tool {
    program: &'static str,
    package: &'static str,
    version: &'static str,
}

const NIXFMT: Tool = Tool {
    program: "nixfmt",
    package: "nixfmt_rs",
    version: "0.4.1",
};

const DEADNIX: Tool = Tool {
    program: "deadnix",
    package: "deadnix",
    version: "1.3.1",
};

pub fn format(tree: &Tree, files: &[PathBuf]) -> Result<()> {
    pass(
        NIXFMT
            .command(tree)?
            .arg("--check")
            .args(files.iter().map(|file| relative(tree, file))),
        "a Nix file is not formatted, see above; run: nixfmt FILE",
    )
}

pub fn find_dead_code(tree: &Tree, files: &[PathBuf]) -> Result<()> {
    pass(
        DEADNIX
            .command(tree)?
            .arg("--fail")
            .args(files.iter().map(|file| relative(tree, file))),
        "a Nix file binds what it does not use, see above; run: deadnix --edit FILE",
    )
}

/// False if there is no statix. Cargo can't install it: the package of that name is another program,
/// which has no list of lints either.
pub fn lint(tree: &Tree) -> Result<bool> {
    if !runs(Command::new("statix").arg("list")) {
        return Ok(false);
    }
    pass(
        Command::new("statix")
            .args(["check", "--format", "errfmt"])
            .current_dir(&tree.root),
        "statix has something against a Nix file, see above; run: statix fix FILE",
    )?;
    Ok(true)
}

impl Tool {
    /// The one on the path, else one that is installed below the target folder, once.
    fn command(&self, tree: &Tree) -> Result<Command> {
        let mut command = Command::new(self.program);
        if !runs(Command::new(self.program).arg("--version")) {
            command = Command::new(self.install(tree)?);
        }
        command.current_dir(&tree.root);
        Ok(command)
    }

    fn install(&self, tree: &Tree) -> Result<PathBuf> {
        let root = tree.target.join("tools");
        let program = root.join("bin").join(self.program);
        if program.is_file() {
            return Ok(program);
        }
        eprintln!(
            "nix: installing {} {} below {}; this takes a minute or two, once",
            self.package,
            self.version,
            relative(tree, &root).display()
        );
        child::run(
            child::cargo()
                .args([
                    "install",
                    "--quiet",
                    "--locked",
                    "--version",
                    self.version,
                    // Builds in half the time, and is fast enough for some dozens of files.
                    "--debug",
                    "--root",
                ])
                .arg(&root)
                .arg(self.package)
                // With a target folder of its own it does not wait for the cargo that runs this.
                .env("CARGO_TARGET_DIR", root.join("build")),
        )
        .with_context(|| {
            format!(
                "{} is needed to check Nix files; install {} and run this again",
                self.program, self.package
            )
        })?;
        Ok(program)
    }
}

fn runs(command: &mut Command) -> bool {
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}
