//! Format, lints, licences, and what is made for images.

use crate::child;
use crate::nix;
use crate::tree::Tree;
use anyhow::Result;
use std::process::{Command, Stdio};

pub fn run(tree: &Tree) -> Result<()> {
    let cargo = |dir: &std::path::Path| {
        let mut cargo = child::cargo();
        cargo.current_dir(dir);
        cargo
    };
    let (root, apps) = (&tree.root, &tree.apps());
    for workspace in [root, apps] {
        child::run(cargo(workspace).args(["fmt", "--all", "--", "--check"]))?;
    }
    let clippy = [
        "clippy",
        "--release",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ];
    child::run(cargo(root).args(clippy))?;
    child::run(
        cargo(apps)
            .env("CARGO_TARGET_DIR", tree.guest_target())
            .args(clippy),
    )?;

    nix::run(tree, nix::Made::Check)?;

    // What they lack they name.
    child::run(Command::new(root.join("tests/images/run")).arg("--skip-missing"))?;

    if is_installed("promtool") {
        for args in [
            ["check", "rules", "docs/alerts.yml"],
            ["test", "rules", "docs/alerts.test.yml"],
        ] {
            child::run(Command::new("promtool").args(args).current_dir(root))?;
        }
    } else {
        eprintln!("promtool is not installed: docs/alerts.yml is not checked");
    }

    if is_installed("cargo-deny") {
        for workspace in [root, apps] {
            let mut deny = cargo(workspace);
            child::run(
                deny.args(["deny", "check", "--config"])
                    .arg(root.join("deny.toml")),
            )?;
        }
    } else {
        eprintln!("cargo-deny is not installed: licences and advisories are not checked");
    }
    Ok(())
}

fn is_installed(program: &str) -> bool {
    let mut version = Command::new(program);
    version
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    version.status().is_ok_and(|status| status.success())
}
