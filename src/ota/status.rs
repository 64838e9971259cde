//! How an update is, for people, programs and metrics.

use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::cache::Progress;
use super::machine;
use super::state::{self, Phase, Rollback, State, StateError};

/// In the folder of the state.
const FILE: &str = "download.json";

/// Of how long the rate is the average.
const RATE_OVER: Duration = Duration::from_secs(10);

/// How far a download is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Download {
    pub bytes_done: u64,
    pub bytes_total: u64,
    pub paths_done: u64,
    pub paths_total: u64,
    pub bytes_per_s: u64,
    /// None while nothing comes.
    pub seconds_left: Option<u64>,
}

impl fmt::Display for Download {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        write!(
            f,
            "{:.1} of {:.1} MiB, {} of {} store paths, {:.1} MiB/s",
            mib(self.bytes_done),
            mib(self.bytes_total),
            self.paths_done,
            self.paths_total,
            mib(self.bytes_per_s)
        )?;
        match self.seconds_left {
            Some(left) => write!(f, ", {} min {} s left", left / 60, left % 60),
            None => Ok(()),
        }
    }
}

/// Works out the rate.
pub struct Meter {
    /// When how many bytes had come.
    samples: std::collections::VecDeque<(Instant, u64)>,
}

impl Meter {
    pub fn new(now: Instant) -> Meter {
        Meter {
            samples: [(now, 0)].into(),
        }
    }

    /// Nothing before it is known how much there is to fetch.
    pub fn read(&mut self, progress: &Progress, now: Instant) -> Option<Download> {
        let paths_total = progress.paths_total.load(Ordering::Relaxed);
        if paths_total == 0 {
            return None;
        }
        let bytes_done = progress.bytes_done.load(Ordering::Relaxed);
        let bytes_total = progress.bytes_total.load(Ordering::Relaxed);
        self.samples.push_back((now, bytes_done));
        while self.samples.len() > 2 && now.duration_since(self.samples[1].0) >= RATE_OVER {
            self.samples.pop_front();
        }
        let (since, before) = self.samples[0];
        let seconds = now.duration_since(since).as_secs_f64();
        let bytes_per_s = match seconds > 0.0 {
            true => (bytes_done.saturating_sub(before) as f64 / seconds) as u64,
            false => 0,
        };
        Some(Download {
            bytes_done,
            bytes_total,
            paths_done: progress.paths_done.load(Ordering::Relaxed),
            paths_total,
            bytes_per_s,
            seconds_left: bytes_total
                .saturating_sub(bytes_done)
                .checked_div(bytes_per_s),
        })
    }
}

pub fn write(folder: &Path, download: &Download) -> Result<(), StateError> {
    let text = serde_json::to_vec(download).expect("numbers are JSON");
    state::replace(&folder.join(FILE), &text)
}

/// What `headgate ota status` shows.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Store path of the booted system.
    pub booted: Option<String>,
    pub version: Option<String>,
    /// idle, fetching or ready.
    pub phase: &'static str,
    /// Version that is under way.
    pub update: Option<String>,
    pub download: Option<Download>,
    /// Whether the system that runs may be left again.
    pub on_probation: bool,
    pub counts_boots: bool,
    pub held_since: Option<jiff::Timestamp>,
    pub last_check: Option<jiff::Timestamp>,
    pub last_error: Option<String>,
    pub last_rollback: Option<Rollback>,
}

impl Report {
    pub fn new(state: &State, folder: &Path, root: &Path) -> Report {
        let booted = machine::booted_system(root);
        let phase = match state.phase {
            Phase::Idle => "idle",
            Phase::Fetching { .. } => "fetching",
            Phase::Ready { .. } => "ready",
        };
        let download = match state.phase {
            Phase::Fetching { .. } => fs::read(folder.join(FILE)).ok(),
            Phase::Idle | Phase::Ready { .. } => None,
        };
        Report {
            version: booted
                .as_deref()
                .and_then(|booted| machine::version_of(root, booted)),
            phase,
            update: state.release().map(|release| release.version.clone()),
            download: download.and_then(|text| serde_json::from_slice(&text).ok()),
            on_probation: booted.is_some() && booted.as_deref() == state.on_trial(),
            counts_boots: state.counts_boots,
            held_since: state.held_since,
            last_check: state.last_check,
            last_error: state.last_error.clone(),
            last_rollback: state.last_rollback.clone(),
            booted,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unknown = "unknown";
        write!(
            f,
            "system     {}\nversion    {}\nupdate     {}",
            self.booted.as_deref().unwrap_or(unknown),
            self.version.as_deref().unwrap_or(unknown),
            match (&self.update, self.phase, self.on_probation) {
                (Some(version), _, true) => format!("{version} runs on probation"),
                (Some(version), "fetching", _) => format!("{version} is being fetched"),
                (Some(version), _, _) => format!("{version} is tried at the next boot"),
                (None, ..) => "none is under way".to_owned(),
            },
        )?;
        if let Some(download) = &self.download {
            write!(f, "\ndownload   {download}")?;
        }
        if !self.counts_boots {
            write!(
                f,
                "\nboots      none has been counted yet, and updates are off until one is"
            )?;
        }
        if let Some(since) = self.held_since {
            write!(
                f,
                "\nheld       since {since}; `headgate ota unhold` takes updates again"
            )?;
        }
        if let Some(check) = self.last_check {
            write!(f, "\nchecked    {check}")?;
        }
        if let Some(error) = &self.last_error {
            write!(f, "\nerror      {error}")?;
        }
        if let Some(Rollback {
            version,
            reason,
            at,
            ..
        }) = &self.last_rollback
        {
            write!(f, "\nleft again {version}, {at}: {reason}")?;
        }
        Ok(())
    }
}
