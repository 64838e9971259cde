//! Shipping events to a stream of a real cluster of three NATS servers, beside NATS's own client.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use async_nats::{ConnectOptions, HeaderMap};
use futures_util::StreamExt;
use hdrhistogram::Histogram;
use headgate::event::Topic;
use headgate::ingest::client::{Endpoint, Sender};
use headgate::ingest::frame::{Hello, Priority};
use serde_json::json;
use tempfile::TempDir;
use tokio::runtime::{self, Runtime};
use tokio::sync::Semaphore;

use crate::load::precise_sleeps;
use crate::nats::{Client, Link, Program, Servers};
use crate::process;
use crate::report::{Floor, Line, Section};
use crate::server::{Broker, Gateway, Site, free_address};
use crate::statistics::Rounds;
use crate::suite::{PAYLOAD_BYTES, Suite};

/// Where the gateway ships to, and where the peer publishes.
const STREAM: &str = "HEADGATE_bench";
const PEER_STREAM: &str = "PEER";

/// What a producer may be ahead of the stream: enough that the uplink never waits for it.
const AHEAD: u64 = 50_000;

/// Messages of the peer that are not acknowledged.
const PEER_WINDOW: u32 = 16_384;

/// Events a second while times are taken.
const STEADY_RATE: u64 = 10_000;

/// For so long they are sent before times are taken.
const WARMING: Duration = Duration::from_secs(1);

const SETTLING: Duration = Duration::from_secs(3);

/// What waits in the journal when the link returns.
const BACKLOG: u64 = 1_000_000;

/// For so long the link is cut at least: attempts to connect are then as rare as they get.
const OUTAGE: Duration = Duration::from_secs(10);

const PATIENCE: Duration = Duration::from_secs(120);

/// Three servers on loopback with a stream of three replicas for each side, both led by the first server.
struct Upstream {
    servers: Servers,
    client: Client,
    folder: TempDir,
}

impl Upstream {
    fn start() -> Result<Upstream> {
        Program::New
            .find()
            .context("there is no nats-server below target/nats: `./dev setup` installs it")?;
        let servers = Servers::cluster();
        let client = servers.client();
        for (stream, subjects) in [(STREAM, "headgate.>"), (PEER_STREAM, "peer.>")] {
            client.create(&json!({
                "name": stream, "subjects": [subjects], "num_replicas": 3, "storage": "file",
                "max_bytes": 3_u64 << 30, "allow_atomic": true,
            }));
            while servers.leader_of(&client, stream) != 0 {
                let request = json!({ "placement": { "preferred": "n0" } });
                client.ask(&format!("STREAM.LEADER.STEPDOWN.{stream}"), &request);
                thread::sleep(Duration::from_millis(100));
            }
        }
        Ok(Upstream {
            servers,
            client,
            folder: TempDir::new()?,
        })
    }

    /// A gateway that journals everything and ships it to the server at `url`, and where it takes frames.
    fn site(&self, suite: &Suite, url: &str) -> Result<(Site, Endpoint)> {
        let links = self.folder.path().join("links.toml");
        let text = format!(
            "[[link]]\nname = 'cluster'\nkind = 'jetstream'\nservers = ['{url}']\n\
             [[link.ship]]\ntopics = ['#']\nstream = '{STREAM}'\nsubject = 'headgate.{{gateway}}.{{topic}}'\n\
             exclusive = true\n"
        );
        fs::write(&links, text)?;
        let ingest = free_address()?;
        let site = Site::new(&suite.gateway)?
            .set("HEADGATE_JOURNAL_TOPICS", "#".into())
            .set("HEADGATE_UPLINK_GATEWAY", "bench".into())
            .set("HEADGATE_UPLINK_LINKS_FILE", links.display().to_string())
            .set("HEADGATE_INGEST_LISTEN", ingest.to_string());
        let endpoint = Endpoint {
            host: ingest.ip().to_string(),
            port: ingest.port(),
            tls: None,
        };
        Ok((site, endpoint))
    }

    fn last_sequence(&self, stream: &str) -> Result<u64> {
        let info = self.client.stream(stream).context("the stream is gone")?;
        let last = info["state"]["last_seq"].as_u64();
        last.context("a stream has a last sequence number")
    }

    /// When the stream has got as far.
    fn until(&self, stream: &str, sequence: u64) -> Result<Instant> {
        let began = Instant::now();
        loop {
            let last = self.last_sequence(stream)?;
            if last >= sequence {
                return Ok(Instant::now());
            }
            ensure!(
                began.elapsed() < PATIENCE,
                "{stream} is at {last} and never came to {sequence}"
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// CPU time of all servers.
    fn cpu(&self) -> Result<Duration> {
        let servers = 0..self.servers.count();
        let times = servers.map(|number| process::cpu_time(self.servers.process_id(number)));
        times.sum()
    }
}

/// Sends events of the usual size that begin with a number, in order.
struct Producer {
    sender: Sender,
    topic: Topic,
    payload: [u8; PAYLOAD_BYTES],
}

impl Producer {
    fn connect(endpoint: &Endpoint, name: &str) -> Result<Producer> {
        let hello = Hello {
            name: name.to_owned(),
            token: String::new(),
        };
        let sender = Sender::connect(endpoint.clone(), &hello, 1, PATIENCE, |_| ())?;
        Ok(Producer {
            sender,
            topic: Topic::new("plant/line1/temperature")?,
            payload: [b'x'; PAYLOAD_BYTES],
        })
    }

    fn send(&mut self, number: u64) -> Result<()> {
        self.payload[..8].copy_from_slice(&number.to_be_bytes());
        self.sender
            .send(Priority::Medium, &self.topic, &self.payload)?;
        Ok(())
    }
}

/// Sends so many events at once, evenly spaced, until `enough`; each has when it was due, in nanoseconds since `epoch`.
/// Returns how many.
fn send_steadily(
    endpoint: &Endpoint,
    name: &str,
    epoch: Instant,
    at_once: u64,
    enough: impl Fn() -> bool,
) -> Result<u64> {
    precise_sleeps();
    let mut producer = Producer::connect(endpoint, name)?;
    let began = Instant::now();
    let mut sent = 0;
    while !enough() {
        let due = began + Duration::from_nanos(sent * 1_000_000_000 / STEADY_RATE);
        if let Some(wait) = due.checked_duration_since(Instant::now()) {
            thread::sleep(wait);
        }
        for _ in 0..at_once {
            producer.send((due - epoch).as_nanos() as u64)?;
        }
        producer.sender.flush()?;
        sent += at_once;
    }
    producer.sender.finish()?;
    Ok(sent)
}

/// What flat out gave.
struct Outcome {
    per_second: f64,
    client_us: f64,
    servers_us: f64,
}

impl Suite {
    pub(crate) fn uplink(&self) -> Result<Vec<Section>> {
        let shipping = self.shipping()?;
        settle();
        let acked = self.acked()?;
        settle();
        Ok(vec![shipping, acked, self.resuming()?])
    }

    fn shipping(&self) -> Result<Section> {
        let upstream = Upstream::start()?;
        let url = &upstream.servers.urls()[0];
        let (site, endpoint) = upstream.site(self, url)?;
        let gateway = site.start()?;
        let runtime = runtime()?;
        let [mut rate, mut peer_rate, mut ratio, mut wrong] = <[Rounds; 4]>::default();
        let [mut cpu, mut servers_cpu, mut peer_servers_cpu] = <[Rounds; 3]>::default();
        for round in 0..self.rounds {
            let ours = self.ship(&upstream, &gateway, &endpoint, &mut wrong)?;
            let began = (Instant::now(), upstream.cpu()?);
            let sent = runtime.block_on(publish(url, round, self.time))?;
            let peer = sent as f64 / began.0.elapsed().as_secs_f64();
            let peer_servers = (upstream.cpu()? - began.1).as_secs_f64() * 1e6 / sent as f64;
            rate.push(ours.per_second);
            cpu.push(ours.client_us);
            servers_cpu.push(ours.servers_us);
            peer_rate.push(peer);
            peer_servers_cpu.push(peer_servers);
            ratio.push(ours.per_second / peer);
        }
        gateway.stop()?;
        Ok(Section {
            title: "Uplink: shipping to a replicated stream".to_owned(),
            conditions: format!(
                "Three nats-server processes on loopback, a stream of three replicas in files. A producer sends events \
                 of {PAYLOAD_BYTES} B for {:?} through TCP ingest, at most {AHEAD} ahead of the stream; each is \
                 journaled (fdatasync) and shipped from there, until the last is in the stream, as its leader says \
                 when a quorum has it. The peer, in turns: async-nats in the benchmark's process, without a journal, \
                 same size, message by message, each with `Nats-Msg-Id`, {PEER_WINDOW} not acknowledged, until the last \
                 acknowledgement. Both are connected to the leader.",
                self.time
            ),
            lines: vec![
                Line::new("shipped", "events/s", rate).with_floor(Floor::AtLeast(100_000.0)),
                Line::new("missing from the stream, or too many", "events", wrong)
                    .with_floor(Floor::AtMost(0.0)),
                Line::new("async-nats alone", "events/s", peer_rate),
                Line::new("shipped ÷ that", "×", ratio),
                Line::new("the gateway's CPU time", "µs/event", cpu),
                Line::new("the servers' CPU time", "µs/event", servers_cpu),
                Line::new(
                    "the same for async-nats alone",
                    "µs/event",
                    peer_servers_cpu,
                ),
            ],
        })
    }

    fn ship(
        &self,
        upstream: &Upstream,
        gateway: &Gateway<'_>,
        endpoint: &Endpoint,
        wrong: &mut Rounds,
    ) -> Result<Outcome> {
        let before = upstream.last_sequence(STREAM)?;
        let (began, servers_cpu) = (Instant::now(), upstream.cpu()?);
        let cpu = process::cpu_time(gateway.pid())?;
        let mut producer = Producer::connect(endpoint, "flat-out")?;
        let mut sent = 0;
        while began.elapsed() < self.time {
            for _ in 0..1_000 {
                producer.send(sent)?;
                sent += 1;
            }
            if sent >= AHEAD {
                upstream.until(STREAM, before + sent - AHEAD)?;
            }
        }
        producer.sender.finish()?;
        let took = upstream.until(STREAM, before + sent)? - began;
        let each = |time: Duration| time.as_secs_f64() * 1e6 / sent as f64;
        let outcome = Outcome {
            per_second: sent as f64 / took.as_secs_f64(),
            client_us: each(process::cpu_time(gateway.pid())? - cpu),
            servers_us: each(upstream.cpu()? - servers_cpu),
        };
        // What comes twice comes by then.
        thread::sleep(Duration::from_millis(200));
        let came = upstream.last_sequence(STREAM)? - before;
        wrong.push(came.abs_diff(sent) as f64);
        Ok(outcome)
    }

    /// From a producer's write until the event is in the stream.
    fn acked(&self) -> Result<Section> {
        let upstream = Upstream::start()?;
        let url = &upstream.servers.urls()[0];
        let (site, endpoint) = upstream.site(self, url)?;
        let gateway = site.start()?;
        let runtime = runtime()?;
        let [mut p50, mut p99, mut longest] = <[Rounds; 3]>::default();
        // The first events of a gateway and of a stream find nothing made for them yet.
        let warming = Instant::now();
        let enough = || warming.elapsed() >= WARMING;
        let sent = send_steadily(&endpoint, "warming", warming, 1, enough)?;
        upstream.until(STREAM, sent)?;
        for round in 0..self.rounds {
            let epoch = Instant::now();
            let before = upstream.last_sequence(STREAM)?;
            let observer = runtime.block_on(observe(url))?;
            let count = self.time.as_secs() * STEADY_RATE * 9 / 10;
            let (times, sent) = thread::scope(|scope| -> Result<_> {
                let sending = scope.spawn(|| {
                    let began = Instant::now();
                    let enough = || began.elapsed() >= self.time;
                    send_steadily(&endpoint, &format!("steady-{round}"), epoch, 1, enough)
                });
                let times = runtime.block_on(times(observer, epoch, count))?;
                Ok((times, sending.join().expect("it does not panic")?))
            })?;
            upstream.until(STREAM, before + sent)?;
            let at = |quantile| times.value_at_quantile(quantile) as f64 / 1e6;
            p50.push(at(0.5));
            p99.push(at(0.99));
            longest.push(at(1.0));
        }
        gateway.stop()?;
        Ok(Section {
            title: format!("Uplink: published to acknowledged at {STEADY_RATE}/s"),
            conditions: format!(
                "As before, with {STEADY_RATE} evenly spaced events/s for {:?}, after {WARMING:?} of the same: from when an event was due to be sent \
                 until a consumer of the stream had it, which gets what a quorum has. So it is a little longer than \
                 until the acknowledgement.",
                self.time
            ),
            lines: vec![
                Line::new("p50", "ms", p50),
                Line::new("p99", "ms", p99).with_floor(Floor::AtMost(20.0)),
                Line::new("longest", "ms", longest),
            ],
        })
    }

    fn resuming(&self) -> Result<Section> {
        let upstream = Upstream::start()?;
        let server = upstream.servers.addresses()[0];
        let mut link = Link::new(upstream.servers.spare_address(0), vec![server]);
        let (site, endpoint) = upstream.site(self, &link.url())?;
        let gateway = site.start()?;
        let [mut resumed, mut rate, mut wrong] = <[Rounds; 3]>::default();
        let mut sent_before = upstream.last_sequence(STREAM)?;
        for round in 0..self.rounds {
            // That the link is up.
            let mut producer = Producer::connect(&endpoint, "backlog")?;
            producer.send(0)?;
            producer.sender.finish()?;
            sent_before += 1;
            upstream.until(STREAM, sent_before)?;
            link.cut();
            let cut = Instant::now();
            for number in 0..BACKLOG {
                producer.send(number)?;
            }
            producer.sender.finish()?;
            let enough = AtomicBool::new(false);
            let sent = thread::scope(|scope| -> Result<u64> {
                let sending = scope.spawn(|| {
                    let name = format!("new-{round}");
                    let enough = || enough.load(Ordering::Relaxed);
                    send_steadily(&endpoint, &name, cut, STEADY_RATE / 1_000, enough)
                });
                thread::sleep(OUTAGE.saturating_sub(cut.elapsed()));
                let healed = Instant::now();
                link.heal();
                let drained = upstream.until(STREAM, sent_before + 1).and_then(|first| {
                    let all = upstream.until(STREAM, sent_before + BACKLOG)?;
                    Ok((first, all))
                });
                enough.store(true, Ordering::Relaxed);
                let sent = sending.join().expect("it does not panic")?;
                let (first, all) = drained?;
                resumed.push((first - healed).as_secs_f64());
                rate.push(BACKLOG as f64 / (all - first).as_secs_f64());
                Ok(sent)
            })?;
            sent_before += BACKLOG + sent;
            upstream.until(STREAM, sent_before)?;
            thread::sleep(Duration::from_millis(200));
            wrong.push(upstream.last_sequence(STREAM)?.abs_diff(sent_before) as f64);
        }
        gateway.stop()?;
        Ok(Section {
            title: "Uplink: after an outage".to_owned(),
            conditions: format!(
                "As before, through a TCP proxy that is cut for {OUTAGE:?} or more (connections end, new ones are \
                 refused). {BACKLOG} events are journaled meanwhile, and {STEADY_RATE}/s more until the end, some each millisecond. From when \
                 the proxy listens again until the first event is in the stream; and from then until the whole \
                 backlog is."
            ),
            lines: vec![
                Line::new("resumed after", "s", resumed).with_floor(Floor::AtMost(2.0)),
                Line::new("backlog drained", "events/s", rate)
                    .with_floor(Floor::AtLeast(100_000.0)),
                Line::new("missing from the stream, or too many", "events", wrong)
                    .with_floor(Floor::AtMost(0.0)),
            ],
        })
    }
}

/// The gigabytes that a part has left and removed keep the disk busy for a while.
fn settle() {
    rustix::fs::sync();
    thread::sleep(SETTLING);
}

fn runtime() -> Result<Runtime> {
    let mut builder = runtime::Builder::new_multi_thread();
    Ok(builder.worker_threads(2).enable_all().build()?)
}

/// Publishes for `time` with NATS's own client; how many messages were acknowledged. All are.
async fn publish(url: &str, round: usize, time: Duration) -> Result<u64> {
    let options = ConnectOptions::new().subscription_capacity(2 * PEER_WINDOW as usize);
    let client = options.connect(url).await?;
    let inbox = client.new_inbox();
    let mut acks = client.subscribe(format!("{inbox}.*")).await?;
    let room = Semaphore::new(PEER_WINDOW as usize);
    let payload = bytes::Bytes::from_static(&[b'x'; PAYLOAD_BYTES]);
    let reply = format!("{inbox}.a");
    let publishing = async {
        let began = Instant::now();
        let mut sent = 0;
        while began.elapsed() < time {
            room.acquire_many(64).await?.forget();
            for _ in 0..64 {
                let mut headers = HeaderMap::new();
                headers.insert("Nats-Msg-Id", format!("bench/{round:016x}/{sent}"));
                headers.insert("Headgate-Timestamp", "1767225601000000000");
                let (subject, reply) = ("peer.plant.line1.temperature", reply.clone());
                client
                    .publish_with_reply_and_headers(subject, reply, headers, payload.clone())
                    .await?;
                sent += 1;
            }
        }
        anyhow::Ok(sent)
    };
    let receiving = async {
        while let Some(ack) = acks.next().await {
            let refused = ack.payload.windows(7).any(|part| part == b"\"error\"");
            ensure!(!refused && ack.status.is_none(), "refused: {ack:?}");
            room.add_permits(1);
        }
        Err::<u64, _>(anyhow::anyhow!("the connection is gone"))
    };
    let finishing = async {
        let sent = publishing.await?;
        // All permits are back when all is acknowledged.
        let all = room.acquire_many(PEER_WINDOW);
        let all = tokio::time::timeout(PATIENCE, all).await;
        all.context("acknowledgements are missing")??.forget();
        Ok(sent)
    };
    tokio::select! {
        sent = finishing => sent,
        Err(error) = receiving => Err(error),
    }
}

/// Gets what the stream gets from now on, when it has it.
async fn observe(url: &str) -> Result<async_nats::Subscriber> {
    let client = async_nats::connect(url).await?;
    let inbox = client.new_inbox();
    let messages = client.subscribe(inbox.clone()).await?;
    let request = json!({
        "stream_name": STREAM,
        "config": {
            "deliver_subject": inbox, "deliver_policy": "new", "ack_policy": "none", "num_replicas": 1,
            "mem_storage": true,
        },
    });
    let jetstream = async_nats::jetstream::new(client);
    let subject = format!("CONSUMER.CREATE.{STREAM}");
    let answer: serde_json::Value = jetstream.request(subject, &request).await?;
    ensure!(answer.get("error").is_none(), "{answer}");
    Ok(messages)
}

/// How old `count` events are when they come, in nanoseconds.
async fn times(
    mut messages: async_nats::Subscriber,
    epoch: Instant,
    count: u64,
) -> Result<Histogram<u64>> {
    let mut times = Histogram::new_with_max(120_000_000_000, 3)?;
    for _ in 0..count {
        let message = tokio::time::timeout(PATIENCE, messages.next()).await?;
        let message = message.context("the connection is gone")?;
        let due = message
            .payload
            .first_chunk()
            .context("a number comes first")?;
        let due = epoch + Duration::from_nanos(u64::from_be_bytes(*due));
        times.saturating_record(due.elapsed().as_nanos() as u64);
    }
    Ok(times)
}
