//! TCP ingest, in this process: from a socket to an outlet that does nothing.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use headgate::broker::Broker;
use headgate::broker::access::Access;
use headgate::config::{Config, Override, Source};
use headgate::dead_letters::DeadLetters;
use headgate::event::{Batch, TopicFilter};
use headgate::gateway;
use headgate::ingest::frame::{Answer, Hello, Priority, write_frame};
use headgate::ingest::{Ingest, Listener};
use headgate::pipeline::{Offer, Outlet, Pipeline, PipelineConfig, Route, Routes};
use headgate::store::{Store, StoreConfig};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

use crate::process;
use crate::report::{Floor, Line, Section};
use crate::statistics::Rounds;
use crate::suite::{PAYLOAD_BYTES, Suite, plant_topics};

/// Topics that the frames are on, in turns.
const TOPICS: usize = 16;

/// Frames that are made once and sent over and over.
const CHUNK: usize = 2_000;

/// What the floors of TCP ingest are.
const FLOOR: Floor = Floor::AtLeast(2_000_000.0);

/// Counts what it is offered, and drops it.
#[derive(Default)]
struct NoOp(AtomicU64);

impl Outlet for NoOp {
    fn name(&self) -> &str {
        "no-op"
    }

    fn is_idle(&self) -> bool {
        false
    }

    fn offer(&self, batch: Batch) -> Offer {
        self.0.fetch_add(batch.len() as u64, Ordering::Relaxed);
        Offer::Taken
    }
}

/// A gateway without apps and MQTT listeners.
struct House {
    ingest: Ingest,
    pipeline: Arc<Pipeline>,
    outlet: Arc<NoOp>,
    address: SocketAddr,
    _broker: Broker,
    _runtime: Runtime,
    _folder: TempDir,
}

impl House {
    fn new(io_uring: bool) -> Result<House> {
        let folder = TempDir::new()?;
        let set = |key, value: &str| Override {
            key,
            value: value.into(),
            flag: "none",
        };
        let config = Config::load(Source {
            file: None,
            system_file: None,
            env: vec![("HOME".into(), folder.path().into())],
            overrides: vec![set("ingest.io_uring", &io_uring.to_string())],
            superuser: false,
        })?
        .config;
        let started = Instant::now();
        let outlet = Arc::<NoOp>::default();
        let routes = Arc::<Routes>::default();
        routes.replace(
            "no-op",
            vec![Route {
                filter: TopicFilter::new("plant/#")?,
                outlet: outlet.clone(),
            }],
        );
        let letters = Arc::new(DeadLetters::new(started));
        let pipeline = Pipeline::start(PipelineConfig::default(), routes, letters.clone())?;
        let pipeline = Arc::new(pipeline);
        let store = Store::open(&StoreConfig {
            path: folder.path().join("store"),
            map_bytes: config.store.max_bytes,
        })?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let (broker, ingest) = runtime.block_on(async {
            let broker = Broker::start(
                gateway::broker_config(&config),
                Access::load(gateway::access_config(&config))?,
                &[],
                None,
                pipeline.clone(),
                None,
                store,
                letters,
            )?;
            let listener = Listener {
                socket: TcpListener::bind("127.0.0.1:0").await?,
                tls: None,
            };
            let config = gateway::ingest_config(&config.ingest);
            let ingest = Ingest::start(config, vec![listener], broker.door())?;
            anyhow::Ok((broker, ingest))
        })?;
        Ok(House {
            address: ingest.status().listen.context("it listens")?,
            ingest,
            pipeline,
            outlet,
            _broker: broker,
            _runtime: runtime,
            _folder: folder,
        })
    }
}

impl Drop for House {
    fn drop(&mut self) {
        self.ingest.close();
    }
}

/// What one load has given.
struct Outcome {
    per_second: f64,
    cpu_us: f64,
    lost: u64,
}

impl Suite {
    pub(crate) fn ingest(&self) -> Result<Section> {
        let uring = House::new(true)?;
        let epoll = House::new(false)?;
        let sides = [
            ("version 2, with acknowledgements", &uring, true),
            ("version 1", &uring, false),
            ("version 2, without io_uring", &epoll, true),
        ];
        let mut rates: [Rounds; 3] = Default::default();
        let mut cpu: [Rounds; 3] = Default::default();
        let mut lost = Rounds::default();
        for _ in 0..self.rounds {
            for (index, (_, house, acknowledged)) in sides.iter().enumerate() {
                let outcome = flat_out(house, *acknowledged, self.time)?;
                rates[index].push(outcome.per_second);
                cpu[index].push(outcome.cpu_us);
                lost.push(outcome.lost as f64);
            }
        }
        let mut lines = Vec::new();
        for (((what, ..), rate), cpu) in sides.into_iter().zip(rates).zip(cpu) {
            lines.push(Line::new(what, "frames/s", rate).with_floor(FLOOR));
            lines.push(Line::new(
                format!("{what}: CPU time of all"),
                "µs/frame",
                cpu,
            ));
        }
        lines.push(Line::new("lost", "frames", lost).with_floor(Floor::AtMost(0.0)));
        Ok(Section {
            title: "TCP ingest".to_owned(),
            conditions: format!(
                "One producer flat out over loopback for {:?}, frames with {PAYLOAD_BYTES} B of payload on {TOPICS} \
                 topics → ingest → pipeline → an outlet that counts and drops. All in one process, the producer's \
                 thread too; the time ends when the last frame has reached the outlet. Io: {}, and {}.",
                self.time,
                uring.ingest.status().io,
                epoll.ingest.status().io,
            ),
            lines,
        })
    }
}

/// Sends as much as goes for `time`, and waits until the outlet has it.
fn flat_out(house: &House, with_ids: bool, time: Duration) -> Result<Outcome> {
    let mut chunk = Vec::new();
    let mut ids = Vec::new();
    let topics = plant_topics(TOPICS);
    for number in 0..CHUNK {
        // After length, priority and topic_len.
        ids.push(chunk.len() + 7);
        let topic = topics[number % TOPICS].as_bytes();
        let id = with_ids.then_some(0);
        let payload = [b'x'; PAYLOAD_BYTES];
        write_frame(Priority::Medium, id, topic, &payload, &mut chunk);
    }
    let mut socket = TcpStream::connect(house.address)?;
    if with_ids {
        let mut hello = Vec::new();
        let (name, token) = ("bench".to_owned(), String::new());
        Hello { name, token }.write(&mut hello);
        socket.write_all(&hello)?;
        socket.read_exact(&mut [0; 5])?;
    }
    let before = house.outlet.0.load(Ordering::Relaxed);
    let cpu_before = process::cpu_time(std::process::id())?;
    let began = Instant::now();
    let sent = thread::scope(|scope| -> Result<u64> {
        let mut answers = socket.try_clone()?;
        let acknowledged = scope.spawn(move || read_answers(&mut answers));
        let mut sent = 0;
        while began.elapsed() < time {
            if with_ids {
                for (id, at) in (sent + 1..).zip(&ids) {
                    chunk[*at..at + 8].copy_from_slice(&u64::to_be_bytes(id));
                }
            }
            socket.write_all(&chunk)?;
            sent += CHUNK as u64;
        }
        socket.shutdown(std::net::Shutdown::Write)?;
        let last = acknowledged.join().expect("it does not panic")?;
        ensure!(!with_ids || last == sent, "acknowledged {last} of {sent}");
        Ok(sent)
    })?;
    while house.pipeline.queued() > 0 {
        thread::yield_now();
    }
    let took = began.elapsed().as_secs_f64();
    let cpu = process::cpu_time(std::process::id())? - cpu_before;
    let reached = house.outlet.0.load(Ordering::Relaxed) - before;
    Ok(Outcome {
        per_second: reached as f64 / took,
        cpu_us: cpu.as_secs_f64() * 1e6 / sent as f64,
        lost: sent - reached,
    })
}

/// The last id that is acknowledged before the connection ends.
fn read_answers(socket: &mut TcpStream) -> Result<u64> {
    let mut last = 0;
    let mut input = Vec::new();
    let mut bytes = [0; 4096];
    loop {
        let count = socket.read(&mut bytes)?;
        if count == 0 {
            return Ok(last);
        }
        input.extend_from_slice(&bytes[..count]);
        while let Ok(Some((answer, size))) = Answer::first(&input) {
            input.drain(..size);
            match answer {
                Answer::Ack { id } => last = id,
                other => anyhow::bail!("{other:?}"),
            }
        }
    }
}
