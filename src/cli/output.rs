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

    /// Prints an error and what lies behind it, as far as it doesn't say so itself.
    pub fn error(&self, error: &anyhow::Error) {
        self.error_text(&with_causes(error));
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

fn with_causes(error: &anyhow::Error) -> String {
    let mut message = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !message.contains(&cause) {
            message.push_str(": ");
            message.push_str(&cause);
        }
    }
    message
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
    fn a_cause_is_told_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("a.toml: {source}; make it readable")]
        struct Unreadable {
            source: io::Error,
        }
        let source = io::Error::other("no permission");
        let error = anyhow::Error::new(Unreadable { source }).context("starting");
        assert_eq!(
            with_causes(&error),
            "starting: a.toml: no permission; make it readable"
        );
    }

    #[test]
    fn escape_sequences_do_not_reach_the_terminal() {
        assert_eq!(
            printable("\x1b[2Jhi\r\u{9b}x\n\tend"),
            "\u{fffd}[2Jhi\u{fffd}\u{fffd}x\n\tend"
        );
    }
}
