//! Runs commands in the guest, over a virtio-serial port; tests/vm/guest/usr/local/lib/vm-agent is
//! the other end.

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

pub struct Agent {
    stream: UnixStream,
}

/// What a command in the guest came to.
pub struct Output {
    pub succeeded: bool,
    /// What it wrote to standard output and standard error.
    pub text: String,
}

impl Agent {
    pub fn new(stream: UnixStream) -> Self {
        Agent { stream }
    }

    /// What `command` wrote; an error if it fails in the guest.
    pub fn run(&mut self, command: &str, patience: Duration) -> Result<String> {
        let output = self.output(command, patience)?;
        ensure!(
            output.succeeded,
            "in the guest, `{command}` failed: {}",
            output.text
        );
        Ok(output.text)
    }

    /// Whatever became of `command`. The guest reads it when it has come so far; until then it waits.
    pub fn output(&mut self, command: &str, patience: Duration) -> Result<Output> {
        debug_assert!(!command.contains('\n'), "a command is one line");
        self.stream
            .write_all(format!("{command}\n").as_bytes())
            .and_then(|()| self.stream.flush())
            .with_context(|| format!("cannot send `{command}` to the guest"))?;
        let line = self
            .line(patience)
            .with_context(|| format!("no answer from the guest to `{command}`"))?;
        parse(&line).with_context(|| format!("the guest's answer to `{command}` is {line:?}"))
    }

    fn line(&mut self, patience: Duration) -> Result<String> {
        let deadline = Instant::now() + patience;
        let mut line = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("waited {} s in vain for it", patience.as_secs());
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut byte = [0];
            match self.stream.read(&mut byte) {
                Ok(0) => bail!("the machine has gone"),
                Ok(_) if byte == *b"\n" => return Ok(String::from_utf8(line)?),
                Ok(_) => line.extend(byte),
                Err(error)
                    if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind()) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// `STATUS BASE64`.
fn parse(line: &str) -> Result<Output> {
    let (status, output) = line.split_once(' ').context("there is no status")?;
    Ok(Output {
        succeeded: status.parse::<u32>()? == 0,
        text: String::from_utf8_lossy(&BASE64_STANDARD.decode(output.trim())?).into_owned(),
    })
}

#[cfg(test)]
mod an_answer {
    use super::*;

    #[test]
    fn has_a_status_and_text() -> Result<()> {
        let output = parse("0 YQpi")?;
        assert!(output.succeeded);
        assert_eq!(output.text, "a\nb");
        let failed = parse("127 ")?;
        assert!(!failed.succeeded);
        assert_eq!(failed.text, "");
        Ok(())
    }

    #[test]
    fn that_is_garbled_is_an_error() {
        for line in ["", "0", "x YQ==", "0 %%"] {
            assert!(parse(line).is_err(), "{line:?}");
        }
    }
}
