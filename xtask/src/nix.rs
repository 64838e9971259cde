//! Checks what is written in Nix: that it parses, its format and lints, and, where $NIXPKGS names a
//! nixpkgs, all that can be said without building anything.

mod evaluation;
mod hardening;
mod tools;

use crate::tree::Tree;
use anyhow::{Context, Result, bail, ensure};
use evaluation::Evaluator;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Names the nixpkgs to evaluate against; flake.lock says which one that should be.
const NIXPKGS_VARIABLE: &str = "NIXPKGS";

/// Older ones lack functions that nixpkgs' library asks for.
const EVALUATES_SINCE: (u32, u32) = (2, 18);

/// What to do with files that are made from others.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Made {
    /// Complain about those that are not current.
    Check,
    Write,
}

pub fn run(tree: &Tree, made: Made) -> Result<()> {
    let files = nix_files(&tree.root)?;
    let mut left_out = Vec::new();

    let version = nix_version();
    match version {
        Some(_) => parse(tree, &files)?,
        None => left_out.push(
            "whether the files parse: nix-instantiate is not installed (as root on Debian: apt-get \
             install nix-bin; elsewhere: https://nixos.org/download)"
                .to_owned(),
        ),
    }
    tools::format(tree, &files)?;
    tools::find_dead_code(tree, &files)?;
    if !tools::lint(tree)? {
        left_out.push("lints: statix is not installed (`nix develop` has it)".to_owned());
    }
    if !hardening::check(tree)? {
        left_out.push("how exposed the service is: systemd-analyze is not installed".to_owned());
    }

    match evaluator(version)? {
        Ok(evaluator) => left_out.extend(evaluation::run(tree, &evaluator, made)?),
        Err(reason) if made == Made::Write => bail!("nothing can be written: {reason}"),
        Err(reason) => left_out.push(format!(
            "what the module and the flake evaluate to: {reason}"
        )),
    }

    for what in left_out {
        eprintln!("nix: not checked: {what}");
    }
    Ok(())
}

/// The evaluator, or why there is none.
fn evaluator(version: Option<(u32, u32)>) -> Result<Result<Evaluator, String>> {
    let Some((major, minor)) = version else {
        return Ok(Err("nix-instantiate is not installed".to_owned()));
    };
    if (major, minor) < EVALUATES_SINCE {
        return Ok(Err(format!(
            "this Nix is {major}.{minor}, and {}.{} or newer is needed",
            EVALUATES_SINCE.0, EVALUATES_SINCE.1
        )));
    }
    let Some(nixpkgs) = env::var_os(NIXPKGS_VARIABLE).filter(|value| !value.is_empty()) else {
        return Ok(Err(format!(
            "{NIXPKGS_VARIABLE} names no nixpkgs; set it to the path that `nix flake metadata --json \
             github:NixOS/nixpkgs/REV` gives, with the REV in flake.lock"
        )));
    };
    let nixpkgs = PathBuf::from(nixpkgs);
    ensure!(
        nixpkgs.join("flake.nix").is_file(),
        "{NIXPKGS_VARIABLE}={}: there is no flake.nix; name the root of a nixpkgs",
        nixpkgs.display()
    );
    Ok(Ok(Evaluator::new(nixpkgs)))
}

/// Every Nix file of the source tree, by name.
fn nix_files(root: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    collect(root, &mut files)?;
    files.sort();
    Ok(files)
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let cannot_list = || format!("cannot list {}", folder.display());
    for entry in folder.read_dir().with_context(cannot_list)? {
        let entry = entry.with_context(cannot_list)?;
        let path = entry.path();
        let name = entry.file_name();
        let is_hidden = name.to_string_lossy().starts_with('.');
        // Links are those to what Nix has built.
        let kind = entry.file_type().with_context(cannot_list)?;
        if kind.is_dir() && !is_hidden && name != "target" {
            collect(&path, files)?;
        } else if kind.is_file() && path.extension().is_some_and(|extension| extension == "nix") {
            files.push(path);
        }
    }
    Ok(())
}

/// Nix stops at the first mistake, and says where it is.
fn parse(tree: &Tree, files: &[PathBuf]) -> Result<()> {
    pass(
        Command::new("nix-instantiate")
            .arg("--parse")
            .args(files.iter().map(|file| relative(tree, file)))
            .current_dir(&tree.root)
            // Parsing takes no store, and so no right to make one.
            .env("NIX_REMOTE", "dummy://")
            .stdout(Stdio::null()),
        "a Nix file has a mistake, see above",
    )
}

/// Runs `command`, which says itself what is wrong. Its arguments are too many to be shown.
fn pass(command: &mut Command, complaint: &'static str) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot start {}", command.get_program().display()))?;
    ensure!(status.success(), complaint);
    Ok(())
}

/// As a user in the source tree would name it.
fn relative(tree: &Tree, file: &Path) -> PathBuf {
    file.strip_prefix(&tree.root).unwrap_or(file).to_owned()
}

/// The version of `nix-instantiate`, if it is installed.
fn nix_version() -> Option<(u32, u32)> {
    let output = Command::new("nix-instantiate")
        .arg("--version")
        .stderr(Stdio::null())
        .output()
        .ok()?;
    parse_version(&String::from_utf8_lossy(&output.stdout))
}

/// Of `nix-instantiate (Nix) 2.26.3`.
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let version = text.trim().rsplit(' ').next()?;
    let mut numbers = version.split('.').map(|number| {
        let digits = number.find(|c: char| !c.is_ascii_digit());
        number[..digits.unwrap_or(number.len())].parse().ok()
    });
    Some((numbers.next()??, numbers.next()??))
}

/// Compares `text` with what `file` has, or writes it there.
fn keep_current(tree: &Tree, file: &Path, text: &str, made: Made) -> Result<()> {
    if fs::read_to_string(file).is_ok_and(|old| old == text) {
        return Ok(());
    }
    let shown = relative(tree, file);
    match made {
        Made::Check => bail!(
            "{} is not what Nix makes of the source; run: cargo xtask nix --write",
            shown.display()
        ),
        Made::Write => {
            if let Some(folder) = file.parent() {
                fs::create_dir_all(folder)
                    .with_context(|| format!("cannot create {}", folder.display()))?;
            }
            fs::write(file, text).with_context(|| format!("cannot write {}", shown.display()))?;
            eprintln!("nix: wrote {}", shown.display());
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_nix_are_read() {
        for (text, expected) in [
            ("nix-instantiate (Nix) 2.26.3\n", Some((2, 26))),
            ("nix-instantiate (Nix) 2.8.0", Some((2, 8))),
            ("nix-instantiate (Nix) 2.31pre20250101_abc", Some((2, 31))),
            ("nix-instantiate (Lix, like Nix) 2.93.0", Some((2, 93))),
            ("nix-instantiate", None),
            ("", None),
        ] {
            assert_eq!(parse_version(text), expected, "{text}");
        }
    }

    #[test]
    fn nix_files_are_found_but_not_among_what_is_built() {
        let root = tempfile::tempdir().unwrap();
        for file in [
            "flake.nix",
            "modules/a.nix",
            "modules/a.toml",
            "target/b.nix",
            ".direnv/c.nix",
        ] {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let found = nix_files(root.path()).unwrap();
        let expected = ["flake.nix", "modules/a.nix"].map(|file| root.path().join(file));
        assert_eq!(found, expected);
    }

    #[test]
    fn a_file_that_is_not_current_is_told_with_the_remedy() {
        let root = tempfile::tempdir().unwrap();
        let tree = Tree {
            root: root.path().to_owned(),
            target: root.path().join("target"),
        };
        let file = root.path().join("docs/options.md");
        let error = keep_current(&tree, &file, "new", Made::Check).unwrap_err();
        assert_eq!(
            error.to_string(),
            "docs/options.md is not what Nix makes of the source; run: cargo xtask nix --write"
        );
        keep_current(&tree, &file, "new", Made::Write).unwrap();
        keep_current(&tree, &file, "new", Made::Check).unwrap();
    }
}
