//! A gateway under churn, takeovers and floods for minutes, beside clients that must not feel it.
//!
//! Ends with 0 if these got every message as its QoS says, and the gateway's memory and open files have
//! not grown from the first third of the time to the last.
#![deny(unsafe_code)]

mod chaos;
mod client;
mod dice;
mod steady;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use dice::Dice;
use headgate_bench::process;
use headgate_bench::server::{Broker, Gateway, Site};
use headgate_bench::statistics::{Rounds, figure};
use steady::Steady;

/// Troublemakers at a time.
const TROUBLEMAKERS: u64 = 8;

/// The part of the time, in per cent, that memory is given to fill what is bounded: mailboxes, caches,
/// kept sessions, the allocator's reserves.
const WARM_UP_PERCENT: u32 = 20;

/// What memory may grow by between the first and the last third: measured between samples of a steady
/// state, whose floods come by chance.
const GROWTH_PERCENT: f64 = 5.0;
const GROWTH_BYTES: f64 = 4e6;

/// The same of open files: each troublemaker opens up to 20 at a time. That none stays is seen afterwards.
const GROWTH_FILES: f64 = 80.0;

/// How long closed connections may linger when the trouble is over: the gateway waits for a CONNECT, and
/// for a client that takes no byte.
const SETTLING: Duration = Duration::from_secs(60);

/// How often the gateway is looked at.
const LOOK: Duration = Duration::from_secs(1);

#[derive(Parser)]
#[command(about = "Churn, takeovers and floods, beside an observer that misses nothing")]
struct Arguments {
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// The same seed does the same things, as far as time allows [default: by the clock].
    #[arg(long)]
    seed: Option<u64>,
    /// The gateway [default: headgate beside this program].
    #[arg(long)]
    headgate: Option<PathBuf>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let time =
        Duration::try_from_secs_f64(arguments.minutes * 60.0).context("--minutes is not a time")?;
    ensure!(
        time >= Duration::from_secs(10),
        "--minutes: at least 10 s are needed"
    );
    let seed = match arguments.seed {
        Some(seed) => seed,
        None => std::time::UNIX_EPOCH.elapsed()?.as_secs(),
    };
    let beside = std::env::current_exe()?.with_file_name("headgate");
    println!("{} minutes, --seed {seed}", arguments.minutes);
    process::raise_open_files()?;
    let site = Site::new(&arguments.headgate.unwrap_or(beside))?
        // Those who are refused are many, and each would be a line.
        .set("HEADGATE_LOG_LEVEL", "error".to_owned())
        .set("HEADGATE_MQTT_CONNECT_TIMEOUT_MS", "2000".to_owned())
        .set("HEADGATE_MQTT_WRITE_TIMEOUT_MS", "2000".to_owned())
        // So that mailboxes of absent clients are full within the warm-up.
        .set("HEADGATE_MQTT_MAX_QUEUED_BYTES", "1MiB".to_owned());
    let gateway = site.start()?;
    soak(&gateway, time, seed).with_context(|| {
        let log = gateway.log().unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        format!(
            "--seed {seed}; the gateway's last words:\n{}",
            lines[lines.len().saturating_sub(20)..].join("\n")
        )
    })?;
    let log = gateway.log()?;
    ensure!(
        !log.contains("panicked"),
        "a thread of the gateway has panicked:\n{log}"
    );
    gateway.stop()?;
    println!("held");
    Ok(())
}

fn soak(gateway: &Gateway<'_>, time: Duration, seed: u64) -> Result<()> {
    let broker = &gateway.endpoint();
    let steady = &Steady::default();
    let tally = &chaos::Tally::default();
    let [is_observed, is_wandered, is_calm] = &<[AtomicBool; 3]>::default();
    let files_before = process::open_files(gateway.pid())?;
    thread::scope(|scope| {
        let observer = scope.spawn(|| steady::observe(broker, steady, is_observed));
        let wanderer = scope.spawn(|| steady::wander(broker, steady, Dice::new(seed), is_wandered));
        let are_there =
            || is_observed.load(Ordering::Relaxed) && is_wandered.load(Ordering::Relaxed);
        while !are_there() && !observer.is_finished() && !wanderer.is_finished() {
            thread::sleep(Duration::from_millis(1));
        }
        let publisher = scope.spawn(|| steady::publish(broker, steady));
        for number in 1..=TROUBLEMAKERS {
            let dice = Dice::new(seed.wrapping_add(number << 32));
            scope.spawn(move || chaos::run(broker, dice, tally, is_calm));
        }

        let mut memory = Vec::new();
        let mut files = Vec::new();
        let start = Instant::now();
        let mut looked = Ok(());
        while start.elapsed() < time
            && !(observer.is_finished() || wanderer.is_finished() || publisher.is_finished())
        {
            thread::sleep(LOOK);
            looked = look(gateway, &mut memory, &mut files);
            if looked.is_err() {
                break;
            }
        }
        is_calm.store(true, Ordering::Relaxed);
        steady.is_ending.store(true, Ordering::Relaxed);
        let published = publisher.join().expect("the publisher does not panic")?;
        let observed = observer.join().expect("the observer does not panic");
        let wandered = wanderer.join().expect("the wanderer does not panic");
        looked?;
        let observed = observed.context("the observer")?;
        let wandered = wandered.context("the one that comes and goes")?;

        println!(
            "published at QoS 0, 1, 2: {:?}; longest wait for an acknowledgement {} ms",
            published.messages,
            published.longest_wait.as_millis()
        );
        println!("observer: every one, once, in order");
        println!(
            "one that comes and goes: every one of QoS 1 and 2 over {} connections, {} of QoS 1 repeated",
            wandered.connections, wandered.repeated
        );
        ensure!(observed.messages == published.messages, "the counts differ");
        for line in tally.lines() {
            println!("{line}");
        }
        let memory_holds = is_flat("memory, MB", &memory, 1e6, |first| {
            first * GROWTH_PERCENT / 100.0 + GROWTH_BYTES
        });
        let files_hold = is_flat("open files", &files, 1.0, |_| GROWTH_FILES);
        ensure!(memory_holds, "memory has grown");
        ensure!(files_hold, "the number of open files has grown");
        Ok(())
    })?;

    let calm = Instant::now();
    loop {
        let files = process::open_files(gateway.pid())?;
        if files <= files_before {
            println!("open files afterwards: {files}, as before");
            return Ok(());
        }
        if calm.elapsed() > SETTLING {
            bail!(
                "{files} files are open after {SETTLING:?} without a client; {files_before} were before"
            );
        }
        thread::sleep(LOOK);
    }
}

fn look(gateway: &Gateway<'_>, memory: &mut Vec<f64>, files: &mut Vec<f64>) -> Result<()> {
    let resident = gateway.resident_bytes().context("the gateway has ended")?;
    memory.push(resident as f64);
    files.push(process::open_files(gateway.pid())? as f64);
    Ok(())
}

/// Prints the thirds after the warm-up; whether the last is not above the first by more than it may be.
fn is_flat(what: &str, samples: &[f64], unit: f64, may_grow: impl Fn(f64) -> f64) -> bool {
    let warm = &samples[samples.len() * WARM_UP_PERCENT as usize / 100..];
    let third = warm.len() / 3;
    let median = |samples: &[f64]| samples.iter().copied().collect::<Rounds>().median();
    let thirds = [
        median(&warm[..third]),
        median(&warm[third..2 * third]),
        median(&warm[2 * third..]),
    ];
    let most = thirds[0] + may_grow(thirds[0]);
    let holds = thirds[2] <= most;
    println!(
        "{what}: medians of the thirds {}, {}, {}; the last may be {}: {}",
        figure(thirds[0] / unit),
        figure(thirds[1] / unit),
        figure(thirds[2] / unit),
        figure(most / unit),
        if holds { "held" } else { "NOT HELD" }
    );
    holds
}
