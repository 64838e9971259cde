//! Evidence for a choice: should messages fan out through rumqttd's router, or through Headgate's
//! own trie with a bounded mailbox a session?
//!
//! Both are driven in process by the same scenarios. Each measurement runs in a process of its own,
//! so that memory is counted from nothing, and the two sides take turns.

mod mailbox;
mod router;
mod scenarios;

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use headgate_bench::statistics::Rounds;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What carries messages from publishers to subscribers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Side {
    /// rumqttd's router, 4 segments of 4 MiB a filter.
    Router,
    /// rumqttd's router with the smallest segments that hold a few messages: 2 of 1 KiB.
    RouterTiny,
    /// Headgate's trie and a bounded mailbox a subscriber.
    Trie,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Scenario {
    /// 10,000 subscribers, each to a topic of its own: memory of each.
    IdleOwnTopics,
    /// 10,000 subscribers to the same filter: memory of each.
    IdleSameFilter,
    /// One publisher to one subscriber.
    OneToOne,
    /// One publisher to ten subscribers.
    OneToTen,
    /// A publisher that nothing slows down, a subscriber that works 1 µs a message.
    Flood,
    /// A million topics under one wildcard subscription.
    ManyTopics,
    /// 20,000 filters subscribed, used once and unsubscribed, as response topics are.
    PassingFilters,
}

#[derive(Parser)]
#[command(about = "Compares rumqttd's router with a trie and mailboxes, for fan-out in process")]
struct Arguments {
    /// Rounds of each measurement; the sides take turns.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Only these scenarios.
    #[arg(long)]
    scenario: Vec<Scenario>,
    /// Divides every count, for a quick look.
    #[arg(long, default_value_t = 1)]
    shrink: usize,
    /// Measures this side once, in this process.
    #[arg(long, hide = true)]
    alone: Option<Side>,
}

fn main() -> Result<()> {
    without_huge_pages();
    let arguments = Arguments::parse();
    let scenarios = if arguments.scenario.is_empty() {
        Scenario::value_variants().to_vec()
    } else {
        arguments.scenario.clone()
    };
    if let Some(side) = arguments.alone {
        for scenario in scenarios {
            for (name, value) in scenarios::run(side, scenario, arguments.shrink)? {
                println!("{name}\t{value}");
            }
        }
        return Ok(());
    }
    for scenario in scenarios {
        let mut measured: BTreeMap<(String, Side), Rounds> = BTreeMap::new();
        let mut names = Vec::new();
        for _ in 0..arguments.rounds {
            for side in sides(scenario) {
                for (name, value) in in_own_process(*side, scenario, arguments.shrink)? {
                    if !names.contains(&name) {
                        names.push(name.clone());
                    }
                    measured.entry((name, *side)).or_default().push(value);
                }
            }
        }
        println!("\n{}", word(scenario));
        for name in names {
            for side in sides(scenario) {
                if let Some(rounds) = measured.get(&(name.clone(), *side)) {
                    println!("  {name:55} {:12} {rounds}", word(*side));
                }
            }
        }
    }
    Ok(())
}

/// As the gateway does at its start: memory that was only touched at one end must not count in
/// pages of 2 MiB. The processes that this one starts inherit it.
#[allow(unsafe_code)]
fn without_huge_pages() {
    // SAFETY: PR_SET_THP_DISABLE takes four integers and changes nothing but a flag of this process.
    unsafe {
        libc::prctl(libc::PR_SET_THP_DISABLE, 1_u64, 0_u64, 0_u64, 0_u64);
    }
}

/// Segment sizes change how much memory is held, not how fast it is filled.
fn sides(scenario: Scenario) -> &'static [Side] {
    match scenario {
        Scenario::OneToOne | Scenario::OneToTen | Scenario::Flood => &[Side::Router, Side::Trie],
        _ => &[Side::Router, Side::RouterTiny, Side::Trie],
    }
}

fn word(value: impl ValueEnum) -> String {
    value
        .to_possible_value()
        .map(|value| value.get_name().to_owned())
        .unwrap_or_default()
}

fn in_own_process(side: Side, scenario: Scenario, shrink: usize) -> Result<Vec<(String, f64)>> {
    let output = Command::new(std::env::current_exe()?)
        .args(["--alone", &word(side), "--scenario", &word(scenario)])
        .args(["--shrink", &shrink.to_string()])
        .output()?;
    ensure!(
        output.status.success(),
        "{} {} failed: {}",
        word(side),
        word(scenario),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout)?
        .lines()
        .map(|line| {
            let (name, value) = line.split_once('\t').context("a line without a tab")?;
            Ok((name.to_owned(), value.parse()?))
        })
        .collect()
}
