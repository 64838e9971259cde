//! What the process itself uses, read from procfs when somebody asks.

use std::fmt::Write;

/// procfs counts CPU time in `USER_HZ`, which is 100 on every Linux that Headgate runs on.
const TICKS_PER_SECOND: f64 = 100.0;

/// What procfs says about this process.
pub struct Usage {
    pub resident_memory_bytes: u64,
    /// The most that it ever was.
    pub peak_memory_bytes: u64,
    /// User and system time of all threads, since the start.
    pub cpu_seconds: f64,
    pub threads: u64,
}

impl Usage {
    /// `None` where procfs isn't mounted.
    pub fn now() -> Option<Usage> {
        let status = std::fs::read_to_string("/proc/self/status").ok()?;
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        Some(Usage {
            resident_memory_bytes: status_field(&status, "VmRSS:")? * 1024,
            peak_memory_bytes: status_field(&status, "VmHWM:")? * 1024,
            threads: status_field(&status, "Threads:")?,
            cpu_seconds: cpu_ticks(&stat)? as f64 / TICKS_PER_SECOND,
        })
    }
}

/// The number behind `name` in `/proc/self/status`; memory stands there in KiB.
fn status_field(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// utime + stime, fields 14 and 15 of `/proc/self/stat`. The process name, field 2, may hold
/// spaces and parentheses, so counting starts behind its last parenthesis.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

/// Appends the process's metrics to `text`, in Prometheus' text format.
pub fn render(text: &mut String) {
    let mut metric = |name: &str, kind: &str, help: &str, value: &dyn std::fmt::Display| {
        let bare = name.split('{').next().unwrap_or(name);
        writeln!(
            text,
            "# HELP {bare} {help}\n# TYPE {bare} {kind}\n{name} {value}\n"
        )
        .expect("writing to a String does not fail");
    };
    metric(
        concat!(
            "headgate_build_info{version=\"",
            env!("CARGO_PKG_VERSION"),
            "\"}"
        ),
        "gauge",
        "The version that runs.",
        &1,
    );
    let Some(usage) = Usage::now() else {
        return;
    };
    metric(
        "headgate_process_resident_memory_bytes",
        "gauge",
        "Memory of the process that is in RAM.",
        &usage.resident_memory_bytes,
    );
    metric(
        "headgate_process_cpu_seconds_total",
        "counter",
        "User and system CPU time of all threads.",
        &usage.cpu_seconds,
    );
    metric(
        "headgate_process_threads",
        "gauge",
        "Threads of the process.",
        &usage.threads,
    );
    if let Ok(descriptors) = std::fs::read_dir("/proc/self/fd") {
        metric(
            "headgate_process_open_fds",
            "gauge",
            "Open file descriptors.",
            &descriptors.count(),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_found_behind_a_process_name_with_spaces_and_parentheses() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 3 0 100 0 0";
        assert_eq!(cpu_ticks(stat), Some(300));
    }

    #[test]
    fn resident_memory_is_in_bytes() {
        let mut text = String::new();
        render(&mut text);
        let line = text
            .lines()
            .find(|line| line.starts_with("headgate_process_resident_memory_bytes "))
            .unwrap();
        let bytes: u64 = line.split(' ').nth(1).unwrap().parse().unwrap();
        assert!((1 << 20..1 << 40).contains(&bytes), "{bytes}");
    }
}
