//! What systemd says of a boot: `systemctl show`, `systemd-analyze` and its `security`.

use anyhow::{Context, Result};
use std::time::Duration;

/// When the gateway was started and ready, since the kernel was.
#[derive(Debug, PartialEq, Eq)]
pub struct Boot {
    /// When systemd began; before it the kernel and the initramfs ran.
    pub userspace: Duration,
    /// When the gateway's process began.
    pub started: Duration,
    /// When the gateway had told systemd that it was ready.
    pub ready: Duration,
}

/// What [`boot`] reads: a property of the manager, then two of the unit.
pub const BOOT: &str = "systemctl show -p UserspaceTimestampMonotonic; \
     systemctl show headgate.service -p ExecMainStartTimestampMonotonic,ActiveEnterTimestampMonotonic";

pub fn boot(properties: &str) -> Result<Boot> {
    let at = |name: &str| -> Result<Duration> {
        let value = property(properties, name)
            .with_context(|| format!("systemctl show gave no {name}: {properties}"))?;
        let micros = value
            .parse()
            .with_context(|| format!("{name}={value} is no number"))?;
        Ok(Duration::from_micros(micros))
    };
    Ok(Boot {
        userspace: at("UserspaceTimestampMonotonic")?,
        started: at("ExecMainStartTimestampMonotonic")?,
        ready: at("ActiveEnterTimestampMonotonic")?,
    })
}

/// The value of `NAME=VALUE`.
pub fn property<'a>(properties: &'a str, name: &str) -> Option<&'a str> {
    properties
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
}

/// The number of `→ Overall exposure level for headgate.service: 1.2 OK`.
pub fn exposure(text: &str) -> Result<f64> {
    text.lines()
        .find(|line| line.contains("Overall exposure level"))
        .and_then(|line| line.rsplit(": ").next()?.split_whitespace().next())
        .and_then(|number| number.parse().ok())
        .with_context(|| format!("systemd-analyze security gave no exposure level: {text}"))
}

/// The number of kB of `NAME:   1234 kB` in /proc/PID/status.
pub fn kilobytes(status: &str, name: &str) -> Result<u64> {
    status_field(status, name)
        .and_then(|value| value.strip_suffix(" kB")?.parse().ok())
        .with_context(|| format!("/proc/PID/status has no {name}: {status}"))
}

/// The value of `NAME:   VALUE` in /proc/PID/status.
pub fn status_field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(str::trim)
}

#[cfg(test)]
mod what_systemd_says {
    use super::*;

    #[test]
    fn of_a_boot() -> Result<()> {
        let properties = "UserspaceTimestampMonotonic=2100000\n\
            ExecMainStartTimestampMonotonic=5200000\nActiveEnterTimestampMonotonic=5450000\n";
        assert_eq!(
            boot(properties)?,
            Boot {
                userspace: Duration::from_millis(2100),
                started: Duration::from_millis(5200),
                ready: Duration::from_millis(5450),
            }
        );
        assert!(boot("UserspaceTimestampMonotonic=\n").is_err());
        Ok(())
    }

    #[test]
    fn of_the_exposure() -> Result<()> {
        let text = "  NAME\n\n→ Overall exposure level for headgate.service: 1.3 OK :-)\n";
        assert_eq!(exposure(text)?, 1.3);
        assert!(exposure("").is_err());
        Ok(())
    }

    #[test]
    fn and_the_kernel_of_memory() -> Result<()> {
        let status = "Name:\theadgate\nVmRSS:\t   23456 kB\nNoNewPrivs:\t1\n";
        assert_eq!(kilobytes(status, "VmRSS")?, 23456);
        assert_eq!(status_field(status, "NoNewPrivs"), Some("1"));
        assert!(kilobytes(status, "VmSwap").is_err());
        Ok(())
    }
}
