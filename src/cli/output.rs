//! What a command prints: text for people, JSON for programs, errors on stderr.

use std::fmt::Display;
use std::io::{self, Write};

use serde::Serialize;

/// Whoever reads the output has closed it: a reason to stop, not to complain.
#[derive(Debug, thiserror::Error)]
#[error("standard output is closed")]
pub struct StdoutClosed;

/// How this call was asked to print.
pub struct Output {
    pub json: bool,
}

impl Output {
    pub fn new(json: bool) -> Output {
        Output { json }
    }

    /// Prints `text`, which may have several lines, and ends the last one.
    pub fn text(&self, text: impl Display) -> anyhow::Result<()> {
        print(&format!("{text}\n"))
    }

    /// Prints `value` as JSON.
    pub fn value(&self, value: &impl Serialize) -> anyhow::Result<()> {
        self.text(serde_json::to_string_pretty(value)?)
    }

    /// Prints `value` as one line of JSON: for output that never ends.
    pub fn value_line(&self, value: &impl Serialize) -> anyhow::Result<()> {
        self.text(serde_json::to_string(value)?)
    }

    /// Prints rows in columns as wide as they need to be.
    pub fn table<const N: usize>(
        &self,
        header: [&str; N],
        rows: &[[String; N]],
    ) -> anyhow::Result<()> {
        self.text(table(header, rows))
    }

    /// Prints an error and what lies behind it.
    pub fn error(&self, error: &anyhow::Error) {
        self.error_text(&whole_story(error));
    }

    pub fn error_text(&self, message: &str) {
        let mut stderr = io::stderr().lock();
        // Nobody is left to tell if this fails.
        let _ = if self.json {
            writeln!(stderr, "{}", serde_json::json!({ "error": message }))
        } else {
            writeln!(stderr, "headgate: {}", printable(message))
        };
    }
}

/// `error` and its causes, less the causes that it quotes already.
fn whole_story(error: &anyhow::Error) -> String {
    let mut story = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !story.contains(&cause) {
            story = format!("{story}: {cause}");
        }
    }
    story
}

/// Writes `text` to standard output as it is.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(StdoutClosed.into()),
        Err(error) => Err(anyhow::Error::new(error).context("writing to standard output")),
        Ok(()) => Ok(()),
    }
}

fn table<const N: usize>(header: [&str; N], rows: &[[String; N]]) -> String {
    let header = header.map(str::to_owned);
    let widths: [usize; N] = std::array::from_fn(|column| {
        let lines = std::iter::once(&header).chain(rows);
        lines
            .map(|line| line[column].chars().count())
            .max()
            .unwrap_or(0)
    });
    let mut text = String::new();
    for line in std::iter::once(&header).chain(rows) {
        for (cell, width) in line.iter().zip(widths) {
            text.push_str(cell);
            text.extend(std::iter::repeat_n(' ', width + 2 - cell.chars().count()));
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text.pop();
    text
}

/// `text` without control characters other than line ends and tabs: what an app logs, or an
/// error repeats, must not be able to drive the terminal.
pub fn printable(text: &str) -> String {
    text.chars()
        .map(|c| {
            if c.is_control() && c != '\n' && c != '\t' {
                char::REPLACEMENT_CHARACTER
            } else {
                c
            }
        })
        .collect()
}

/// [`printable`], in one line of a table.
pub fn one_line(text: &str) -> String {
    printable(text).replace(['\n', '\t'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["a".into(), "1".into()], ["größer".into(), "22".into()]];
        assert_eq!(
            table(["NAME", "N"], &rows),
            "NAME    N\na       1\ngrößer  22"
        );
    }

    #[test]
    fn an_error_tells_its_causes_once_each() {
        let cause = || std::io::Error::other("disk on fire");
        let quoting = anyhow::Error::new(cause()).context("cannot read a.toml: disk on fire");
        assert_eq!(whole_story(&quoting), "cannot read a.toml: disk on fire");
        let plain = anyhow::Error::new(cause()).context("cannot read a.toml");
        assert_eq!(whole_story(&plain), "cannot read a.toml: disk on fire");
    }

    #[test]
    fn escape_sequences_do_not_reach_the_terminal() {
        assert_eq!(
            printable("\x1b[2Jhi\r\u{9b}x\n\tend"),
            "\u{fffd}[2Jhi\u{fffd}\u{fffd}x\n\tend"
        );
    }
}
