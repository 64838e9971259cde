//! Runs the benchmarks, or a single load by hand.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};
use headgate_bench::allocations::Counting;
use headgate_bench::load::{Load, Pace, Span};
use headgate_bench::reading::Form;
use headgate_bench::report::{self, Machine};
use headgate_bench::server::Mosquitto;
use headgate_bench::statistics::figure;
use headgate_bench::stream::Endpoint;
use headgate_bench::suite::{self, Part, Suite};

/// As the gateway has it: a part of it runs in this process.
#[global_allocator]
static ALLOCATOR: Counting<mimalloc::MiMalloc> = Counting(mimalloc::MiMalloc);

#[derive(Parser)]
#[command(about = "Benchmarks of Headgate, with a load generator of its own")]
#[command(args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    suite: SuiteArguments,
}

#[derive(Subcommand)]
enum Command {
    /// Puts one load on a broker that runs already, and prints what came of it.
    Load(LoadArguments),
    /// Fetches a closure from a binary cache into the store below a folder, and prints seconds and peak
    /// memory in bytes.
    Fetch {
        url: String,
        key: String,
        root: PathBuf,
        toplevel: String,
    },
    /// Stands in for a broker and does the least possible: shows what the load generator can do.
    Sink {
        #[arg(long, default_value = "127.0.0.1:1884")]
        listen: SocketAddr,
    },
}

#[derive(Args)]
struct SuiteArguments {
    /// One round, each load for a second.
    #[arg(long)]
    quick: bool,
    /// Rounds of each measurement; servers that are compared take turns.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds that each load lasts.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Measures only these parts.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Part>,
    /// Writes docs/benchmarks.md.
    #[arg(long, conflicts_with_all = ["only", "quick"])]
    write: bool,
    /// The gateway to measure [default: headgate beside this program].
    #[arg(long)]
    headgate: Option<PathBuf>,
    /// The folder of built apps [default: target/apps].
    #[arg(long)]
    apps: Option<PathBuf>,
}

#[derive(Args)]
struct LoadArguments {
    /// The broker's address.
    #[arg(long, default_value = "127.0.0.1:1883")]
    broker: SocketAddr,
    /// Speaks TLS, and trusts the certificates in this file, for the name localhost.
    #[arg(long, value_name = "FILE")]
    cafile: Option<PathBuf>,
    #[arg(long, default_value_t = 4)]
    publishers: usize,
    #[arg(long, default_value_t = 1)]
    subscribers: usize,
    /// Topics to publish to, named after the placeholder {}.
    #[arg(long, default_value_t = 4)]
    topics: usize,
    #[arg(long, default_value = "plant/line{}/temperature_f")]
    topic: String,
    /// What the subscribers subscribe to.
    #[arg(long, default_value = "#")]
    filter: String,
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=2))]
    qos: u8,
    /// Messages that a publisher may have unacknowledged at QoS 1 and 2.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u16).range(1..))]
    window: u16,
    /// Bytes of a payload.
    #[arg(long, default_value_t = 100)]
    size: usize,
    /// Messages a second of all publishers; as fast as the broker takes them if not given.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    rate: Option<u64>,
    #[arg(long, default_value_t = 4)]
    seconds: u64,
    /// Messages of all publishers; instead of --seconds.
    #[arg(long, conflicts_with = "seconds")]
    count: Option<u64>,
    /// Results that each message has: the number of apps that take it.
    #[arg(long, default_value_t = 1)]
    copies: u64,
    /// The broker's process: its CPU time is reported too.
    #[arg(long)]
    pid: Option<u32>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    match arguments.command {
        Some(Command::Load(load)) => run_load(load),
        Some(Command::Fetch {
            url,
            key,
            root,
            toplevel,
        }) => {
            let (seconds, peak_bytes) = headgate_bench::ota::fetch(&url, &key, &root, &toplevel)?;
            println!("{seconds} {peak_bytes}");
            Ok(())
        }
        Some(Command::Sink { listen }) => {
            let listener =
                TcpListener::bind(listen).with_context(|| format!("can't listen on {listen}"))?;
            headgate_bench::sink::serve(listener)
        }
        None => run_suite(arguments.suite),
    }
}

fn run_suite(arguments: SuiteArguments) -> Result<()> {
    let root = suite::workspace_root()?;
    let beside = std::env::current_exe()?.with_file_name("headgate");
    let suite = Suite {
        gateway: arguments.headgate.unwrap_or(beside),
        apps: arguments.apps.unwrap_or_else(|| root.join("target/apps")),
        mosquitto: Mosquitto::find(),
        rounds: if arguments.quick { 1 } else { arguments.rounds },
        time: Duration::from_secs(if arguments.quick {
            1
        } else {
            arguments.seconds
        }),
    };
    ensure!(suite.rounds > 0, "--rounds can't be 0");
    let parts = if arguments.only.is_empty() {
        Part::value_variants()
    } else {
        &arguments.only
    };
    let machine = Machine::this(&root)?;
    println!(
        "{}, {}, {}; commit {}",
        machine.processor, machine.memory, machine.system, machine.commit
    );
    let mut sections = Vec::new();
    for part in parts {
        for section in suite.run(*part)? {
            print!("{}", report::terminal(&section));
            sections.push(section);
        }
    }
    if arguments.write {
        let page = root.join("docs/benchmarks.md");
        let options: Vec<String> = std::env::args().skip(1).collect();
        let command = format!("cargo xtask bench {}", options.join(" "));
        fs::create_dir_all(root.join("docs"))?;
        let old = fs::read_to_string(&page).unwrap_or_default();
        let new = report::page(&machine, &command, &sections) + report::boot_section(&old);
        fs::write(&page, new).with_context(|| format!("can't write {}", page.display()))?;
        println!("\nwritten to {}", page.display());
    }
    let missed = sections
        .iter()
        .flat_map(|section| &section.lines)
        .filter(|line| line.is_met() == Some(false))
        .count();
    ensure!(missed == 0, "floors not met: {missed}");
    Ok(())
}

fn run_load(arguments: LoadArguments) -> Result<()> {
    let outcome = Load {
        broker: match arguments.cafile {
            Some(file) => Endpoint::trusting(arguments.broker, &file)?,
            None => Endpoint::plain(arguments.broker),
        },
        publishers: arguments.publishers,
        topics: (0..arguments.topics)
            .map(|topic| arguments.topic.replace("{}", &topic.to_string()))
            .collect(),
        subscribers: arguments.subscribers,
        filter: arguments.filter,
        qos: arguments.qos,
        window: arguments.window,
        payload_bytes: arguments.size,
        form: Form::Measurement,
        pace: arguments.rate.map_or(Pace::FlatOut, Pace::PerSecond),
        span: arguments.count.map_or(
            Span::Time(Duration::from_secs(arguments.seconds)),
            Span::Messages,
        ),
        copies: arguments.copies,
        server: arguments.pid,
    }
    .run()?;
    println!(
        "sent {}, received {} ({} msg/s), lost {}, duplicates {}, out of order {}",
        figure(outcome.sent as f64),
        figure(outcome.received as f64),
        figure(outcome.per_second()),
        figure(outcome.lost as f64),
        figure(outcome.duplicates as f64),
        figure(outcome.reordered as f64),
    );
    print!(
        "CPU a message: generator {} µs",
        figure(outcome.generator_us())
    );
    if let Some(server) = outcome.server_us() {
        print!(", server {} µs", figure(server));
    }
    println!();
    for (what, times) in [
        ("latency", &outcome.latency),
        ("of it the generator's own lateness", &outcome.lateness),
    ] {
        if times.is_empty() {
            continue;
        }
        let at = |quantile| figure(times.value_at_quantile(quantile) as f64 / 1e3);
        println!(
            "{what} in µs: p50 {}, p90 {}, p99 {}, p99.9 {}, longest {}",
            at(0.5),
            at(0.9),
            at(0.99),
            at(0.999),
            at(1.0)
        );
    }
    Ok(())
}
