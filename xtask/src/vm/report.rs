//! What was measured, as a section of docs/benchmarks.md.

use super::{bare, full};
use anyhow::{Context, Result};
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;

/// What may be resident at most, in MB.
const RESIDENT: f64 = 30.0;
const BINARY: f64 = 25.0;

const TITLE: &str = "## Boot on emulated aarch64";
const CONDITIONS: &str = "Written by `cargo xtask vm-test --write`. QEMU without KVM emulates every instruction, on the \
    cores of the machine above, so times say where a boot spends its time and not how long it takes on a board. \
    4 KiB pages: Debian with systemd and the unit as NixOS has it, 2 Cortex-A72, 1 GiB. 16 KiB pages: \
    the gateway alone from an initramfs, 2 Cortex-A76. The service is built without a compiler; \
    `overheat-alarm` and `unit-convert` are compiled ahead of time. Memory is VmRSS, idle, with both apps.";

struct Line {
    what: &'static str,
    measured: f64,
    unit: &'static str,
    at_most: Option<f64>,
}

pub struct Report {
    lines: Vec<Line>,
}

impl Report {
    pub fn new(binary: u64, full: &full::Measured, bare: &bare::Measured) -> Self {
        let line = |what, measured, unit| Line {
            what,
            measured,
            unit,
            at_most: None,
        };
        let limited = |what, measured, unit, at_most| Line {
            what,
            measured,
            unit,
            at_most: Some(at_most),
        };
        let boot = &full.boot;
        let seconds = |later: std::time::Duration, earlier: std::time::Duration| {
            later.saturating_sub(earlier).as_secs_f64()
        };
        let lines = vec![
            line(
                "4 KiB pages: kernel and initramfs",
                boot.userspace.as_secs_f64(),
                "s",
            ),
            line(
                "4 KiB pages: systemd, until it starts the gateway",
                seconds(boot.started, boot.userspace),
                "s",
            ),
            line(
                "4 KiB pages: gateway, until it is ready",
                seconds(boot.ready, boot.started),
                "s",
            ),
            line(
                "4 KiB pages: boot to gateway ready",
                boot.ready.as_secs_f64(),
                "s",
            ),
            line(
                "4 KiB pages: switched on to /readyz, from outside",
                full.ready[0].as_secs_f64(),
                "s",
            ),
            line(
                "4 KiB pages: the same after the power cut",
                full.ready[1].as_secs_f64(),
                "s",
            ),
            line(
                "16 KiB pages: switched on to /readyz, from outside",
                bare.ready.as_secs_f64(),
                "s",
            ),
            limited(
                "4 KiB pages: resident memory",
                full.resident,
                "MB",
                RESIDENT,
            ),
            limited(
                "16 KiB pages: resident memory",
                bare.resident,
                "MB",
                RESIDENT,
            ),
            limited("service, stripped", binary as f64 / 1e6, "MB", BINARY),
            limited(
                "exposure by `systemd-analyze security`",
                full.exposure,
                "of 10",
                full::EXPOSURE,
            ),
        ];
        Report { lines }
    }

    /// What is beyond its limit.
    pub fn missed(&self) -> Vec<String> {
        self.lines
            .iter()
            .filter_map(|line| {
                let at_most = line.at_most.filter(|at_most| line.measured > *at_most)?;
                let Line {
                    what,
                    measured,
                    unit,
                    ..
                } = line;
                Some(format!(
                    "{what}: {measured:.1} {unit}, at most {at_most:.1} allowed"
                ))
            })
            .collect()
    }

    pub fn section(&self) -> String {
        let mut text = format!(
            "{TITLE}\n\n{CONDITIONS}\n\n- Date: {}\n\n| | measured | | floor | |\n|---|---|---|---|---|\n",
            today()
        );
        for line in &self.lines {
            let floor = line
                .at_most
                .map(|limit| format!("≤ {limit:.1}"))
                .unwrap_or_default();
            let verdict = match line.at_most {
                Some(limit) if line.measured > limit => "NOT MET",
                Some(_) => "met",
                None => "",
            };
            let _ = writeln!(
                text,
                "| {} | {:.1} | {} | {floor} | {verdict} |",
                line.what, line.measured, line.unit
            );
        }
        text
    }

    /// Puts the section into `page`, in place of the one of an earlier run.
    pub fn write(&self, page: &Path) -> Result<()> {
        let old =
            fs::read_to_string(page).with_context(|| format!("cannot read {}", page.display()))?;
        fs::write(page, replaced(&old, &self.section()))
            .with_context(|| format!("cannot write {}", page.display()))
    }
}

/// In UTC, as everything on that page.
fn today() -> String {
    let date = Command::new("date")
        .args(["-u", "+%Y-%m-%d %H:%M UTC"])
        .output();
    let date = date.map(|date| String::from_utf8_lossy(&date.stdout).trim().to_owned());
    date.unwrap_or_else(|_| "unknown".to_owned())
}

/// `page` with `section` instead of the one that has its heading, or at its end.
fn replaced(page: &str, section: &str) -> String {
    let begin = format!("\n{TITLE}\n");
    let Some(at) = page.find(&begin) else {
        return format!("{}\n\n{section}", page.trim_end());
    };
    let (before, from) = (&page[..at], &page[at + begin.len()..]);
    let after = from.find("\n## ").map_or("", |end| &from[end..]);
    format!("{before}\n{section}{after}")
}

#[cfg(test)]
mod the_section {
    use super::*;

    #[test]
    fn is_replaced_in_place() {
        let section = format!("{TITLE}\n\nnew\n");
        let page = format!("# Page\n\n## One\n\n1\n\n{TITLE}\n\nold\n\n## Two\n\n2\n");
        let wanted = format!("# Page\n\n## One\n\n1\n\n{TITLE}\n\nnew\n\n## Two\n\n2\n");
        assert_eq!(replaced(&page, &section), wanted);
        assert_eq!(replaced(&wanted, &section), wanted);
        let last = format!("# Page\n\n{TITLE}\n\nold\n");
        assert_eq!(
            replaced(&last, &section),
            format!("# Page\n\n{TITLE}\n\nnew\n")
        );
    }

    #[test]
    fn is_added_at_the_end_of_a_page_without_it() {
        let section = format!("{TITLE}\n\nnew\n");
        assert_eq!(
            replaced("# Page\n", &section),
            format!("# Page\n\n{TITLE}\n\nnew\n")
        );
    }
}
