//! Runs every test and adds up what the test runner said.

use crate::child;
use crate::tree::Tree;
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

/// What the test runner's `test result:` lines add up to.
#[derive(Default, Debug, PartialEq, Eq)]
struct Summary {
    passed: u64,
    failed: u64,
    ignored: u64,
}

/// Runs the apps' tests, on this machine's own target, and then the workspace's; the second even if
/// the first fail, so that one run shows all.
pub fn run(tree: &Tree, args: &[String]) -> Result<()> {
    let mut summary = Summary::default();
    let apps_pass = run_suite(
        child::cargo()
            .current_dir(tree.apps())
            .env("CARGO_TARGET_DIR", tree.guest_target())
            .args(["test", "--release", "--workspace", "--no-fail-fast"]),
        &mut summary,
    )?;
    let gateway_passes = run_suite(
        child::cargo()
            .current_dir(&tree.root)
            .args(["test", "--release", "--workspace", "--no-fail-fast"])
            .args(args),
        &mut summary,
    )?;
    let Summary {
        passed,
        failed,
        ignored,
    } = summary;
    println!("\nAll suites: {passed} passed, {failed} failed, {ignored} ignored.");
    if !(apps_pass && gateway_passes) {
        bail!("tests failed");
    }
    Ok(())
}

/// True if the suite passes. Shows its output as it comes.
fn run_suite(command: &mut Command, summary: &mut Summary) -> Result<bool> {
    let shown = child::shown(command);
    let mut process = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {shown}"))?;
    let stdout = process
        .stdout
        .take()
        .context("the standard output was asked for as a pipe")?;
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line.with_context(|| format!("cannot read the output of {shown}"))?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        summary.add(&line);
    }
    Ok(process
        .wait()
        .with_context(|| format!("cannot wait for {shown}"))?
        .success())
}

impl Summary {
    /// Adds `line` if it is like `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
    fn add(&mut self, line: &str) {
        let Some((_, counts)) = line
            .strip_prefix("test result: ")
            .and_then(|rest| rest.split_once(". "))
        else {
            return;
        };
        for count in counts.split("; ") {
            match count.split_once(' ') {
                Some((number, "passed")) => self.passed += number.parse().unwrap_or(0),
                Some((number, "failed")) => self.failed += number.parse().unwrap_or(0),
                Some((number, "ignored")) => self.ignored += number.parse().unwrap_or(0),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod the_summary {
    use super::Summary;

    #[test]
    fn adds_up_the_result_lines_and_nothing_else() {
        let mut summary = Summary::default();
        for line in [
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.04s",
            "test says_5_passed; ... ok",
            "test result: FAILED. 4 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.04s",
        ] {
            summary.add(line);
        }
        assert_eq!(
            summary,
            Summary {
                passed: 7,
                failed: 2,
                ignored: 1
            }
        );
    }
}
