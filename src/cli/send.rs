//! `headgate send`: events from a file or from other programs, through TCP ingest.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};

use super::Global;
use super::events;
use super::output::Output;
use crate::config::{Config, ListenAddress};
use crate::event::{Topic, unix_time_ns};
use crate::ingest::client::{Endpoint, Sender};
use crate::ingest::frame::{Hello, MOST_FRAME_BYTES, Priority};
use crate::regular_file::RegularFile;

/// A token, and a certificate or two.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Send events to a gateway, and wait until it has taken them
///
/// Each line is an event as `headgate app test` has it, such as {"topic":"a/b","payload":"x"}; with --topic, a
/// line is a payload. An event is sent again, over a new connection if need be, until the gateway acknowledges
/// it: when it is on disk, for topics of the journal. Exits with 1 if some were not acknowledged.
#[derive(Args)]
pub(super) struct SendArgs {
    /// Where the gateway takes frames [default: ingest.listen of the configuration]
    #[arg(long, value_name = "HOST:PORT")]
    address: Option<String>,
    /// Lines to send; - for standard input
    #[arg(long, value_name = "FILE", default_value = "-")]
    file: PathBuf,
    /// Each line is a payload for this topic
    #[arg(long, value_name = "TOPIC", value_parser = |text: &str| Topic::new(text.to_owned()))]
    topic: Option<Topic>,
    /// The lane that the events ask for
    #[arg(long, value_enum, default_value = "medium")]
    priority: Priority,
    /// What the gateway calls this client
    #[arg(long, default_value = "headgate-send")]
    name: String,
    /// File with a JSON Web Token, or with USER:PASSWORD
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Speak TLS, and trust the certificates in this file
    #[arg(long, value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// Most events a second [default: as fast as the gateway takes them]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rate: Option<u32>,
    /// Seconds for which it is tried to reach a gateway that is gone
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    patience: u64,
}

pub(super) fn run(args: SendArgs, global: &Global, output: &Output) -> anyhow::Result<()> {
    let endpoint = endpoint(&args, global)?;
    let hello = Hello {
        name: args.name.clone(),
        token: args
            .token_file
            .as_deref()
            .map(token)
            .transpose()?
            .unwrap_or_default(),
    };
    let input: Box<dyn Read> = match args.file.to_str() {
        Some("-") => Box::new(io::stdin()),
        _ => Box::new(File::open(&args.file).with_context(|| args.file.display().to_string())?),
    };
    let json = output.json;
    let on_loss = move |error: &_| Output::new(json).error_text(&format!("{error}; trying again"));
    let patience = Duration::from_secs(args.patience);
    let began = Instant::now();
    // No other run under this name has had these ids, unless the clock was turned back.
    let mut sender = Sender::connect(endpoint, &hello, unix_time_ns().max(1), patience, on_loss)?;
    let outcome = send_all(&args, input, &mut sender);
    // What was right before a line that was wrong is sent all the same.
    let finished = sender.finish();
    let seconds = began.elapsed().as_secs_f64();
    let acknowledged = sender.acknowledged();
    let sent = acknowledged + sender.unacknowledged() as u64;
    let per_second = acknowledged as f64 / seconds;
    if output.json {
        output.value(&serde_json::json!({
            "sent": sent,
            "acknowledged": acknowledged,
            "seconds": seconds,
            "events_per_second": per_second,
        }))?;
    } else {
        output.text(format!(
            "sent {sent}, acknowledged {acknowledged}, in {seconds:.2} s: {per_second:.0} events/s"
        ))?;
    }
    outcome?;
    finished?;
    Ok(())
}

fn send_all(args: &SendArgs, input: Box<dyn Read>, sender: &mut Sender) -> anyhow::Result<()> {
    let name = match args.file.to_str() {
        Some("-") => "standard input".to_owned(),
        _ => args.file.display().to_string(),
    };
    let mut reader = BufReader::with_capacity(64 << 10, input);
    let mut line = Vec::new();
    let began = Instant::now();
    for number in 1.. {
        if !reader.buffer().contains(&b'\n') {
            // The next line may be long in coming.
            sender.flush()?;
        }
        line.clear();
        let mut bounded = reader.by_ref().take(MOST_FRAME_BYTES);
        bounded
            .read_until(b'\n', &mut line)
            .with_context(|| name.clone())?;
        if line.is_empty() {
            break;
        }
        if line.len() as u64 == MOST_FRAME_BYTES {
            bail!("{name}, line {number}: longer than any frame can be");
        }
        let line = line.strip_suffix(b"\n").unwrap_or(&line);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let at = || format!("{name}, line {number}");
        match &args.topic {
            Some(topic) => sender.send(args.priority, topic, line).with_context(at)?,
            None if line.trim_ascii().is_empty() => continue,
            None => {
                let parsed = events::parse_line(number, line.trim_ascii());
                let event = parsed.map_err(anyhow::Error::msg).with_context(at)?.event();
                let sent = sender.send(args.priority, &event.topic, &event.payload);
                sent.with_context(at)?;
            }
        }
        if let Some(rate) = args.rate {
            let due = began + Duration::from_secs_f64(number as f64 / f64::from(rate));
            if let Some(early) = due.checked_duration_since(Instant::now()) {
                sender.flush()?;
                std::thread::sleep(early);
            }
        }
    }
    Ok(())
}

fn endpoint(args: &SendArgs, global: &Global) -> anyhow::Result<Endpoint> {
    let address: ListenAddress = match &args.address {
        Some(address) => address
            .parse()
            .with_context(|| format!("--address {address}"))?,
        None => {
            let config = Config::load(global.source(Vec::new()))?.config;
            let listen = match args.tls_ca {
                Some(_) => config.ingest.tls_listen,
                None => config.ingest.listen,
            };
            listen.context(
                "ingest is off in this configuration; say where to send to with --address",
            )?
        }
    };
    let (host, port) = address.as_pair();
    Ok(Endpoint {
        host: host.to_owned(),
        port,
        tls: args.tls_ca.as_deref().map(trusting).transpose()?,
    })
}

/// What a file holds, without the line end that editors leave.
fn token(path: &Path) -> anyhow::Result<String> {
    let read = || anyhow::Ok(String::from_utf8(contents(path)?)?);
    let token = read().with_context(|| path.display().to_string())?;
    Ok(token.trim_end_matches(['\r', '\n']).to_owned())
}

fn contents(path: &Path) -> anyhow::Result<Vec<u8>> {
    Ok(RegularFile::open(path, 0)?.read(MAX_FILE_BYTES)?)
}

fn trusting(path: &Path) -> anyhow::Result<Arc<ClientConfig>> {
    let read = || {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(&contents(path)?) {
            roots.add(certificate?)?;
        }
        if roots.is_empty() {
            bail!("no certificate in PEM form is in this file");
        }
        Ok(roots)
    };
    let roots = read().with_context(|| path.display().to_string())?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}
