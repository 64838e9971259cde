//! What was measured, as a table in the terminal and as a page of the documentation.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::statistics::{Rounds, figure};

/// What a median must reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Floor {
    AtLeast(f64),
    AtMost(f64),
}

impl Floor {
    fn is_met(self, value: f64) -> bool {
        match self {
            Floor::AtLeast(floor) => value >= floor,
            Floor::AtMost(floor) => value <= floor,
        }
    }

    fn words(self) -> String {
        match self {
            Floor::AtLeast(floor) => format!("≥ {}", figure(floor)),
            Floor::AtMost(floor) => format!("≤ {}", figure(floor)),
        }
    }
}

/// One measured thing.
#[derive(Clone, Debug)]
pub struct Line {
    pub what: String,
    pub unit: &'static str,
    pub measured: Rounds,
    pub floor: Option<Floor>,
}

impl Line {
    pub fn new(what: impl Into<String>, unit: &'static str, measured: Rounds) -> Self {
        Line {
            what: what.into(),
            unit,
            measured,
            floor: None,
        }
    }

    pub fn with_floor(self, floor: Floor) -> Self {
        Line {
            floor: Some(floor),
            ..self
        }
    }

    /// Whether the median meets the floor; none if there is no floor.
    pub fn is_met(&self) -> Option<bool> {
        self.floor.map(|floor| floor.is_met(self.measured.median()))
    }

    fn cells(&self) -> [String; 5] {
        [
            self.what.clone(),
            self.measured.to_string(),
            self.unit.to_owned(),
            self.floor.map(Floor::words).unwrap_or_default(),
            match self.is_met() {
                Some(true) => "met",
                Some(false) => "NOT MET",
                None => "",
            }
            .to_owned(),
        ]
    }
}

/// Lines that belong together, with what a reader must know to judge them.
#[derive(Clone, Debug)]
pub struct Section {
    pub title: String,
    pub conditions: String,
    pub lines: Vec<Line>,
}

/// A section as plain text, in columns.
pub fn terminal(section: &Section) -> String {
    let rows: Vec<_> = section.lines.iter().map(Line::cells).collect();
    let mut widths = [0; 5];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = format!("\n{}\n", section.title);
    for row in rows {
        let mut line = String::from(" ");
        for (cell, width) in row.iter().zip(widths) {
            let padding = width - cell.chars().count();
            line.push(' ');
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', padding + 1));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// The whole page.
pub fn page(machine: &Machine, command: &str, sections: &[Section]) -> String {
    let mut text = String::from(
        "# Benchmarks\n\nWritten by `cargo xtask bench --write`; every number was measured in that run. \
         A figure is the median of the rounds with the smallest and the largest in brackets. Servers \
         that are compared take turns within a round. The load generator (`benches/`) runs on the same \
         cores as what it measures.\n\n",
    );
    for (what, value) in [
        ("Processor", &machine.processor),
        ("Memory", &machine.memory),
        ("System", &machine.system),
        ("Date", &machine.date),
        ("Commit", &machine.commit),
    ] {
        let _ = writeln!(text, "- {what}: {value}");
    }
    let _ = writeln!(text, "- Command: `{command}`");
    for section in sections {
        let _ = writeln!(text, "\n## {}\n\n{}\n", section.title, section.conditions);
        text.push_str("| | measured | | floor | |\n|---|---|---|---|---|\n");
        for line in &section.lines {
            let _ = writeln!(text, "| {} |", line.cells().join(" | "));
        }
    }
    text
}

/// The section of `page` that `cargo xtask vm-test --write` has put there, with the empty line before
/// it; empty if there is none.
pub fn boot_section(page: &str) -> &str {
    let Some(begin) = page.find("\n## Boot on emulated aarch64\n") else {
        return "";
    };
    let end = page[begin + 1..]
        .find("\n## ")
        .map_or(page.len(), |end| begin + 1 + end);
    &page[begin..end]
}

/// Where a run took place.
#[derive(Clone, Debug)]
pub struct Machine {
    pub processor: String,
    pub memory: String,
    pub system: String,
    pub date: String,
    pub commit: String,
}

impl Machine {
    /// This machine, and the commit of the repository at `root`.
    pub fn this(root: &Path) -> Result<Self> {
        let cores = std::thread::available_parallelism()?;
        let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
        let model = field(&cpuinfo, "model name")
            .or_else(|| field(&cpuinfo, "Model"))
            .unwrap_or_else(|| "unknown".to_owned());
        let meminfo = fs::read_to_string("/proc/meminfo")?;
        let kib: f64 = field(&meminfo, "MemTotal")
            .and_then(|text| text.trim_end_matches("kB").trim().parse().ok())
            .context("/proc/meminfo has no MemTotal")?;
        let changed = !said_by(root, "git", &["status", "--porcelain", "-uno"]).is_empty();
        let commit = said_by(root, "git", &["rev-parse", "--short=12", "HEAD"]);
        Ok(Machine {
            processor: format!("{model}, {cores} cores"),
            memory: format!("{} GiB", figure(kib / f64::from(1 << 20))),
            system: said_by(root, "uname", &["-srm"]),
            date: said_by(root, "date", &["-u", "+%Y-%m-%d %H:%M UTC"]),
            commit: match commit.as_str() {
                "" => "unknown".to_owned(),
                commit if changed => format!("{commit}, with local changes"),
                commit => commit.to_owned(),
            },
        })
    }
}

fn field(text: &str, name: &str) -> Option<String> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map(|(_, value)| value.trim().to_owned())
}

/// The first line that a program prints; empty if it can't be run or fails.
fn said_by(folder: &Path, program: &str, arguments: &[&str]) -> String {
    Command::new(program)
        .args(arguments)
        .current_dir(folder)
        .output()
        .ok()
        .filter(|output| output.status.success())
        .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(value: f64, floor: Floor) -> Line {
        Line::new("speed", "msg/s", [value].into_iter().collect()).with_floor(floor)
    }

    #[test]
    fn a_floor_that_is_missed_stands_out() {
        assert_eq!(line(5.0, Floor::AtLeast(5.0)).is_met(), Some(true));
        assert_eq!(line(4.9, Floor::AtLeast(5.0)).is_met(), Some(false));
        assert_eq!(line(0.0, Floor::AtMost(0.0)).is_met(), Some(true));
        let section = Section {
            title: "Broker".to_owned(),
            conditions: "QoS 0.".to_owned(),
            lines: vec![line(1234.0, Floor::AtLeast(300_000.0))],
        };
        let text = terminal(&section);
        assert!(text.contains("1,234") && text.contains("≥ 300,000") && text.contains("NOT MET"));
        let machine = Machine {
            processor: "cpu".to_owned(),
            memory: "1 GiB".to_owned(),
            system: "Linux".to_owned(),
            date: "today".to_owned(),
            commit: "abc".to_owned(),
        };
        let page = page(&machine, "bench", &[section]);
        assert!(page.contains("| speed | 1,234 | msg/s | ≥ 300,000 | NOT MET |"));
    }

    #[test]
    fn the_boot_tests_section_is_found_in_a_page() {
        let section = "\n## Boot on emulated aarch64\n\nslow\n";
        for page in [
            format!("# Page\n{section}"),
            format!("# Page\n{section}\n## More\n"),
        ] {
            assert_eq!(boot_section(&page), section);
        }
        assert_eq!(boot_section("# Page\n"), "");
    }
}
