//! What gateways cost the servers that they are linked to, each alone: the figures that `docs/scale.md` multiplies.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use headgate::event::Topic;
use headgate::ingest::client::{Endpoint, Sender};
use headgate::ingest::frame::{Hello, Priority};
use serde_json::json;
use tempfile::TempDir;

use crate::nats::{Program, Servers};
use crate::process;
use crate::report::{Line, Section};
use crate::server::{Gateway, Site, free_address};
use crate::statistics::Rounds;
use crate::suite::{PAYLOAD_BYTES, Suite};

/// Enough that one more or less does not matter.
const CONNECTIONS: usize = 1000;
const STREAMS: usize = 100;
const EVENTS: u64 = 20_000;

/// How long something is looked at that does nothing.
const IDLE: Duration = Duration::from_secs(30);

const PATIENCE: Duration = Duration::from_secs(120);

impl Suite {
    pub(crate) fn fleet(&self) -> Result<Vec<Section>> {
        Program::New
            .find()
            .context("there is no nats-server below target/nats: `./dev setup` installs it")?;
        let [mut memory, mut stored, mut sent, mut idle, mut idle_site] = <[Rounds; 5]>::default();
        let [mut stream_memory, mut stream_cpu] = <[Rounds; 2]>::default();
        for _ in 0..self.rounds {
            memory.push(connections()?);
            let of_event = self.event()?;
            stored.push(of_event.0);
            sent.push(of_event.1);
            idle.push(self.idle_link("")?);
            idle_site.push(self.idle_link("cluster = { replicas = 1 }")?);
            let of_stream = streams()?;
            stream_memory.push(of_stream.0);
            stream_cpu.push(of_stream.1);
        }
        Ok(vec![Section {
            title: "Fleet: what a gateway costs upstream".to_owned(),
            conditions: format!(
                "{CONNECTIONS} clients that do nothing but answer pings on one nats-server; {EVENTS} events of \
                 {PAYLOAD_BYTES} B shipped by a gateway to an exclusive stream without replicas; a gateway whose link \
                 has nothing to do for {IDLE:?}, without a cluster and alone in one of 16 shards and 5 s lease; \
                 {STREAMS} streams of three replicas on three nats-servers, with nothing in them, over {IDLE:?}."
            ),
            lines: vec![
                Line::new("a connection: the server's memory", "KiB", memory),
                Line::new("an event: in the stream", "B", stored),
                Line::new("an event: on the connection, both ways", "B", sent),
                Line::new("an idle link: both ways", "B/s", idle),
                Line::new("the same with a cluster", "B/s", idle_site),
                Line::new(
                    "a stream: memory of the three servers",
                    "KiB",
                    stream_memory,
                ),
                Line::new("a stream: their CPU time", "µs/s", stream_cpu),
            ],
        }])
    }

    /// Bytes of an event in the stream, and on the connection.
    fn event(&self) -> Result<(f64, f64)> {
        let servers = Servers::single();
        let folder = TempDir::new()?;
        let ship = "[[link.ship]]\ntopics = ['#']\nstream = 'EVENTS'\ncreate = { replicas = 1 }\n";
        let (site, endpoint) = self.linked(&folder, &servers, ship)?;
        let gateway = site.start()?;
        let client = servers.client();
        let count = || client.messages("EVENTS");
        produce(&endpoint, 1)?;
        until(|| count() == 1);
        let before = traffic(&servers)?;
        produce(&endpoint, EVENTS)?;
        until(|| count() == EVENTS + 1);
        let connection = (traffic(&servers)? - before) / EVENTS as f64;
        let info = client.stream("EVENTS").context("the stream is gone")?;
        let bytes = info["state"]["bytes"].as_f64();
        gateway.stop()?;
        let stored = bytes.context("a stream has bytes")? / (EVENTS + 1) as f64;
        Ok((stored, connection))
    }

    /// Bytes a second of a link that has nothing to do.
    fn idle_link(&self, cluster: &str) -> Result<f64> {
        let servers = Servers::single();
        let folder = TempDir::new()?;
        let text = format!(
            "{cluster}\n[[link.ship]]\ntopics = ['#']\nstream = 'EVENTS'\ncreate = {{ replicas = 1 }}\n"
        );
        let (site, _) = self.linked(&folder, &servers, &text)?;
        let gateway = site.start()?;
        let client = servers.client();
        until(|| client.stream("EVENTS").is_some());
        if !cluster.is_empty() {
            until(|| is_in_office(&gateway));
        }
        let before = traffic(&servers)?;
        thread::sleep(IDLE);
        let bytes = traffic(&servers)? - before;
        gateway.stop()?;
        Ok(bytes / IDLE.as_secs_f64())
    }

    fn linked(&self, folder: &TempDir, servers: &Servers, more: &str) -> Result<(Site, Endpoint)> {
        let links = folder.path().join("links.toml");
        let urls = servers.urls();
        std::fs::write(
            &links,
            format!("[[link]]\nname = 'fleet'\nkind = 'jetstream'\nservers = {urls:?}\n{more}"),
        )?;
        let ingest = free_address()?;
        let site = Site::new(&self.gateway)?
            .set("HEADGATE_UPLINK_GATEWAY", "press-7".into())
            .set("HEADGATE_UPLINK_LINKS_FILE", links.display().to_string())
            .set("HEADGATE_INGEST_LISTEN", ingest.to_string());
        let endpoint = Endpoint {
            host: ingest.ip().to_string(),
            port: ingest.port(),
            tls: None,
        };
        Ok((site, endpoint))
    }
}

/// KiB of the server for each connection.
fn connections() -> Result<f64> {
    let servers = Servers::single();
    let pid = servers.process_id(0);
    let url = servers.urls().remove(0);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let before = process::resident_bytes(pid)?;
    let clients = runtime.block_on(async {
        let mut clients = Vec::new();
        for _ in 0..CONNECTIONS {
            let client = async_nats::connect(&url).await?;
            // As a link has one, for answers.
            clients.push((client.subscribe(client.new_inbox() + ".*").await?, client));
        }
        anyhow::Ok(clients)
    })?;
    thread::sleep(Duration::from_secs(2));
    let bytes = process::resident_bytes(pid)?.saturating_sub(before);
    drop(clients);
    Ok(bytes as f64 / 1024.0 / CONNECTIONS as f64)
}

/// KiB and microseconds a second of all servers for each stream.
fn streams() -> Result<(f64, f64)> {
    let servers = Servers::cluster();
    let client = servers.client();
    let each = || (0..servers.count()).map(|number| servers.process_id(number));
    let memory = || -> Result<f64> {
        let bytes = each().map(process::resident_bytes).sum::<Result<u64>>()?;
        Ok(bytes as f64 / 1024.0)
    };
    let cpu = || -> Result<Duration> {
        let before = each().map(process::cpu_time).sum::<Result<Duration>>()?;
        thread::sleep(IDLE);
        Ok(each().map(process::cpu_time).sum::<Result<Duration>>()? - before)
    };
    let (memory_before, cpu_before) = (memory()?, cpu()?);
    for number in 0..STREAMS {
        client.create(&json!({
            "name": format!("S{number}"), "subjects": [format!("s{number}.>")], "num_replicas": 3, "storage": "file",
        }));
    }
    thread::sleep(Duration::from_secs(5));
    let streams = STREAMS as f64;
    let more = cpu()?.saturating_sub(cpu_before).as_secs_f64() * 1e6 / IDLE.as_secs_f64();
    Ok(((memory()? - memory_before) / streams, more / streams))
}

fn produce(endpoint: &Endpoint, events: u64) -> Result<()> {
    let hello = Hello {
        name: "fleet".to_owned(),
        token: String::new(),
    };
    let mut sender = Sender::connect(endpoint.clone(), &hello, 1, PATIENCE, |_| ())?;
    let topic = Topic::new("plant/line1/temperature")?;
    for _ in 0..events {
        sender.send(Priority::Medium, &topic, &[b'x'; PAYLOAD_BYTES])?;
    }
    sender.finish()?;
    Ok(())
}

fn until(mut is_so: impl FnMut() -> bool) {
    while !is_so() {
        thread::sleep(Duration::from_millis(20));
    }
}

fn is_in_office(gateway: &Gateway<'_>) -> bool {
    let status = gateway.ask(&["cluster", "status"]);
    status.is_ok_and(|status| status["leads_with"].is_u64())
}

/// Bytes that have gone both ways on connections that are called as a gateway's are.
fn traffic(servers: &Servers) -> Result<f64> {
    let connections = servers
        .monitoring(0, "/connz")
        .map_err(anyhow::Error::msg)?;
    let connections = connections["connections"]
        .as_array()
        .context("no connections")?;
    let own = connections
        .iter()
        .filter(|connection| connection["name"] == "headgate");
    Ok(own
        .flat_map(|connection| [&connection["in_bytes"], &connection["out_bytes"]])
        .filter_map(|bytes| bytes.as_f64())
        .sum())
}
