//! The composition root: from a [`Config`] to a running gateway, and down again.
//!
//! The only place that knows all rooms. They start in the order in which events flow backwards
//! (store, pipeline, edge, apps), so that nothing takes in what nobody could handle, and they stop
//! in the order in which events flow, so that what was taken in is handled.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};

use crate::admin::{self, AdminListener, AdminState};
use crate::apps::{
    AppError, AppInfo, AppState, Apps, AppsConfig, Defaults, EngineConfig, Limits, MostLimits,
};
use crate::broker::access::{Access, AccessConfig, AccessError};
use crate::broker::{
    Broker, BrokerConfig, ClientFiles, Listener, Protocols, TlsError, TlsFiles, TlsReloader,
};
use crate::config::{
    ClientCertificates, Config, IngestConfig, ListenAddress, MqttConfig, TlsConfig,
};
use crate::dead_letters::{DeadLetter, DeadLetters};
use crate::descriptors;
use crate::event::{Event, Lane, TopicFilter, via};
use crate::ingest::frame::largest_frame;
use crate::ingest::{self, Ingest};
use crate::journal::{self, Journal, JournalConfig, JournalError, Origin, Records, Recovered};
use crate::mappings::{MappingError, Mappings, MappingsConfig};
use crate::metrics::{self, Endpoints, Health, ListenError};
use crate::ota;
use crate::pipeline::{
    DedupKey, Latency, NotJournaled, Offer, Pipeline, PipelineConfig, Pressure, Routes, Rules,
    Sink, Step, Tap, Thresholds, WindowLimits,
};
use crate::regular_file::FileError;
use crate::store::{Standing, Store, StoreConfig, StoreError};
use crate::systemd;
use crate::uplink::{self, Links, Place, Uplink};
use crate::why::Why;

/// Why a gateway can't start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Apps(#[from] AppError),
    #[error(transparent)]
    Mappings(#[from] MappingError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Access(#[from] AccessError),
    #[error(transparent)]
    Admin(#[from] admin::SocketError),
    #[error("pipeline.rules_file: {0}")]
    Rules(FileError),
    #[error("uplink.links_file: {0}")]
    Links(FileError),
    #[error("can't start the links: {0}")]
    Uplink(std::io::Error),
    #[error("can't start a thread: {0}")]
    Thread(std::io::Error),
    #[error(
        "can't find out which program this is, to compile apps with it: {0}; is /proc mounted?"
    )]
    Program(std::io::Error),
}

/// Why files could not be read anew.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    #[error(transparent)]
    Access(#[from] AccessError),
    #[error("pipeline.rules_file: {0}; nothing was reloaded")]
    Rules(FileError),
    #[error(
        "pipeline.rules_file has a durable rule, and the gateway was started without a journal; nothing was \
         reloaded: restart it, or set durable = false"
    )]
    NoJournal,
    #[error("users, keys and all rules were reloaded, but not the certificates: {0}")]
    Tls(#[from] TlsError),
}

/// A gateway that is up: it takes events in from [`build`] on.
pub struct Gateway {
    store: Store,
    pipeline: Arc<Pipeline>,
    broker: Arc<Broker>,
    apps: Apps,
    mappings: Mappings,
    outputs: Arc<Outputs>,
    dead_letters: Arc<DeadLetters>,
    journal: Option<Journal>,
    uplink: Option<Arc<Uplink>>,
    ingest: Option<Arc<Ingest>>,
    health: Health,
    admin: AdminListener,
    addresses: MqttAddresses,
    metrics: Option<(SocketAddr, TcpListener)>,
    shutdown_timeout: Duration,
    started: Instant,
    config: Config,
    routes: Arc<Routes>,
    /// What links ship.
    shipped: Vec<TopicFilter>,
}

/// What the links may take to end: the longest wait in it is half a second.
const UPLINK_CLOSE: Duration = Duration::from_secs(2);

/// Beside the admin socket: systemd starts the unit that updates the machine once it is there.
const UPDATE_REQUEST: &str = "ota-requested";

/// Whether this system may be left again.
fn standing(config: &Config) -> Standing {
    let Some(system) = ota::booted_system(&config.ota.root) else {
        return Standing::Unknown { system: None };
    };
    match ota::State::read(&config.ota.state) {
        Ok(state) if state.on_trial() == Some(&system) => Standing::OnTrial {
            system,
            before: state.committed.map(|release| release.toplevel),
        },
        Ok(state) if state.is_committed(&system) => Standing::Passed { system },
        Ok(_) => Standing::Unknown {
            system: Some(system),
        },
        Err(error) => {
            // A copy harms nobody, whatever this system is.
            tracing::warn!(%error, "nobody knows whether this system is on probation");
            Standing::OnTrial {
                system,
                before: None,
            }
        }
    }
}

/// How many threads the edge and the admin API need: half of the machine's. The other half is for
/// apps; and fewer threads wake one another less, which is most of what a lone event costs.
pub fn edge_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |cpus| cpus.get().div_ceil(2))
}

/// Starts all rooms. Must be called in a tokio runtime.
pub async fn build(config: &Config) -> Result<Gateway, StartError> {
    let started = Instant::now();
    let has_ingest = config.ingest.listen.is_some() || config.ingest.tls_listen.is_some();
    let ingest_connections = match has_ingest {
        true => config.ingest.max_connections,
        false => 0,
    };
    descriptors::raise_limit(config.mqtt.max_connections + ingest_connections);
    let health = Health::default();
    // Files are read first: they are what is wrong more often.
    let access = Access::load(access_config(config))?;
    let links = read_links(config).map_err(StartError::Links)?;
    let shipped = links.topics();
    let rules = read_rules(config, shipped.clone()).map_err(StartError::Rules)?;
    let tls = tls(config)?;
    // Then the listeners: an address in use is found out before anything is touched.
    let (addresses, listeners) = mqtt_listeners(&config.mqtt, tls.clone()).await?;
    let ingest_listeners = ingest_listeners(&config.ingest, tls.clone()).await?;
    let metrics = match &config.metrics.listen {
        Some(address) => Some(listen(address, "metrics.listen").await?),
        None => None,
    };
    let store = {
        let (standing, store) = (standing(config), config.store.clone());
        let open = move || {
            let config = StoreConfig {
                path: store.path,
                map_bytes: store.max_bytes,
            };
            Store::open_as(&config, &standing)
        };
        tokio::task::spawn_blocking(open)
            .await
            .expect("opening the store does not panic")?
    };
    // After the store, whose lock says that no other gateway uses this folder.
    let admin = AdminListener::bind(&config.admin.socket)?;

    let wants_journal = rules.want_journal() || !links.links.is_empty();
    let wants_dedup = rules.want_dedup() || links.take_anything();
    let routes = Arc::new(Routes::default());
    routes.set_rules(rules);
    let dead_letters = Arc::new(DeadLetters::new(started));
    let pipeline = Pipeline::start(
        pipeline_config(config),
        routes.clone(),
        dead_letters.clone(),
    );
    let pipeline = Arc::new(pipeline.map_err(StartError::Thread)?);
    let (journal, recovered) = match wants_journal {
        true => {
            let config = journal_config(config);
            let open = tokio::task::spawn_blocking(|| Journal::open(config)).await;
            let (journal, recovered) = open.expect("opening the journal does not panic")?;
            (Some(journal), Some(recovered))
        }
        false => (None, None),
    };
    if let Some(recovered) = recovered.as_ref().filter(|_| wants_dedup) {
        restore_keys(recovered, &pipeline, config)?;
    }
    let outputs = Arc::new(Outputs {
        broker: OnceLock::new(),
        journal: journal.clone(),
        in_site: links.share_work(),
        runtime: Handle::current(),
        pipeline: pipeline.clone(),
        routes: routes.clone(),
        latency: Latency::default(),
    });
    let apps = {
        let config = AppsConfig {
            in_site: links.share_work(),
            ..apps_config(config).map_err(StartError::Program)?
        };
        let (store, outputs, progress) = (store.clone(), outputs.clone(), pipeline.progress());
        let (routes, letters) = (routes.clone(), dead_letters.clone());
        let open = move || Apps::open(config, store, routes, outputs, progress, letters);
        tokio::task::spawn_blocking(open)
            .await
            .expect("opening apps does not panic")?
    };
    let mappings = {
        let config = MappingsConfig {
            preinstalled: config.mappings.preinstalled.clone(),
            singletons: match links.share_work() {
                true => config.mappings.singleton.iter().cloned().collect(),
                false => BTreeSet::new(),
            },
            queue_events: config.mappings.queue_events,
            max_batch_events: config.pipeline.batch.max_events,
        };
        let (store, outputs, progress) = (store.clone(), outputs.clone(), pipeline.progress());
        let (routes, letters) = (routes.clone(), dead_letters.clone());
        let open = move || Mappings::open(config, store, routes, outputs, progress, letters);
        tokio::task::spawn_blocking(open)
            .await
            .expect("opening mappings does not panic")?
    };
    let broker = Broker::start(
        broker_config(config),
        access,
        &listeners,
        tls,
        pipeline.clone(),
        journal.clone(),
        store.clone(),
        dead_letters.clone(),
    )?;
    let broker = Arc::new(broker);
    outputs
        .broker
        .set(broker.clone())
        .unwrap_or_else(|_| unreachable!("set here and nowhere else"));
    // What was not finished before comes before what comes now.
    if let Some((journal, recovered)) = journal.as_ref().zip(recovered) {
        deliver_again(journal, &recovered, &pipeline, &apps).await?;
    }
    // The clients last: what they send waits for apps that are still starting.
    broker.listen(listeners);
    let ingest = has_ingest.then(|| {
        Ingest::start(
            ingest_config(&config.ingest),
            ingest_listeners,
            broker.door(),
        )
    });
    let ingest = ingest
        .transpose()
        .map_err(StartError::Thread)?
        .map(Arc::new);
    let uplink = match journal.clone().filter(|_| !links.links.is_empty()) {
        Some(journal) => {
            let rooms = uplink::Rooms {
                journal,
                cursors: store.cursors()?,
                dead_letters: dead_letters.clone(),
                door: broker.door(),
                gateway: gateway_name(config).into(),
                site: config.uplink.site.as_str().into(),
                workers: {
                    let (apps, mappings) = (apps.clone(), mappings.worker());
                    Arc::new(move || {
                        let mut workers = apps.placed();
                        workers.push(mappings.clone());
                        workers
                    })
                },
            };
            let uplink = Uplink::start(links, rooms).map_err(StartError::Uplink)?;
            Some(Arc::new(uplink))
        }
        None => None,
    };
    health.watch("pipeline", {
        let pipeline = pipeline.clone();
        move || {
            let responsive = pipeline.is_responsive();
            Box::pin(async move {
                match responsive {
                    true => Ok(()),
                    false => Err("events wait and nobody routes them".into()),
                }
            })
        }
    });
    let gateway = Gateway {
        store,
        pipeline,
        broker,
        apps,
        mappings,
        outputs,
        dead_letters,
        journal,
        uplink,
        ingest,
        health,
        admin,
        addresses,
        metrics,
        shutdown_timeout: Duration::from_millis(config.shutdown.timeout_ms),
        started,
        config: config.clone(),
        routes,
        shipped,
    };
    Ok(gateway)
}

/// Takes over by which keys the last run has told duplicates.
fn restore_keys(
    recovered: &Recovered,
    pipeline: &Pipeline,
    config: &Config,
) -> Result<(), JournalError> {
    let failed = |source| JournalError::File {
        path: config.store.path.join(journal::FOLDER),
        source,
    };
    let window = Duration::from_secs(config.pipeline.dedup.window_s);
    for key in recovered.keys(window).map_err(failed)? {
        let (key, age) = key.map_err(failed)?;
        pipeline.dedup().restore(DedupKey(key), age);
    }
    Ok(())
}

/// The links, as the file says now.
fn read_links(config: &Config) -> Result<Links, FileError> {
    let Some(path) = &config.uplink.links_file else {
        return Ok(Links::default());
    };
    let place = Place {
        gateway: &gateway_name(config),
        site: &config.uplink.site,
    };
    Links::read(path, place)
}

fn gateway_name(config: &Config) -> String {
    match config.uplink.gateway.as_str() {
        "" => rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned(),
        name => name.to_owned(),
    }
}

/// The rules, as the file says now. What is shipped is in the journal, too.
fn read_rules(config: &Config, shipped: Vec<TopicFilter>) -> Result<Rules, FileError> {
    let windows = &config.pipeline.windows;
    let limits = WindowLimits {
        events: windows.max_events,
        bytes: windows.max_bytes,
        age: Duration::from_millis(windows.max_age_ms),
    };
    let rules = match &config.pipeline.rules_file {
        Some(path) => Rules::read(path, limits)?,
        None => Vec::new(),
    };
    let durable = config.journal.topics.iter().cloned().chain(shipped);
    Ok(Rules::new(rules, durable.collect(), limits))
}

fn pipeline_config(config: &Config) -> PipelineConfig {
    let pipeline = &config.pipeline;
    PipelineConfig {
        queue_events: pipeline.queue_events,
        realtime_queue_events: pipeline.realtime.queue_events,
        batch_queue_events: pipeline.windows.queue_events,
        max_batch_events: pipeline.batch.max_events,
        max_batch_delay: Duration::from_micros(pipeline.batch.max_delay_us),
        thresholds: Thresholds {
            events: pipeline.realtime.max_waiting_events,
            latency: Duration::from_millis(pipeline.realtime.max_latency_ms),
            dropped_percent: pipeline.realtime.max_dropped_percent,
        },
        dedup_window: Duration::from_secs(pipeline.dedup.window_s),
        dedup_max_keys: pipeline.dedup.max_keys,
    }
}

/// Hands over what the journal has that was not finished, no faster than the apps take it.
async fn deliver_again(
    journal: &Journal,
    recovered: &Recovered,
    pipeline: &Pipeline,
    apps: &Apps,
) -> Result<(), JournalError> {
    /// Events after which apps are looked at.
    const AT_ONCE: usize = 256;
    let failed = |source| JournalError::File {
        path: journal.status().folder,
        source,
    };
    if recovered.is_empty() {
        return Ok(());
    }
    // What an app that still starts has no room for would have to be dropped.
    let starting = apps.clone();
    let settled = tokio::task::spawn_blocking(move || starting.wait_until_settled()).await;
    settled.expect("waiting for apps does not panic");
    let began = Instant::now();
    let mut tap = pipeline.tap();
    let (mut events, mut unchecked) = (0, 0);
    for chunk in recovered.chunks(journal).map_err(failed)? {
        let (records, receipt) = chunk.map_err(failed)?;
        for record in records {
            let treatment = tap.treatment(&record.topic);
            events += u64::from(treatment.wanted);
            unchecked += usize::from(treatment.wanted);
            let event = Event {
                receipt: Some(receipt.hold()),
                ..Event::at(record.topic, record.payload, began, record.timestamp_ns)
            };
            tap.add(event, treatment);
        }
        while !tap.flush() {
            tap.room().await;
        }
        if unchecked >= AT_ONCE {
            unchecked = 0;
            until_taken(pipeline, apps).await;
        }
    }
    if events > 0 {
        tracing::warn!(
            events,
            "delivered again what no app had finished when the gateway ended"
        );
    }
    Ok(())
}

/// Waits until the apps that run have room again, as long as they get on at all.
async fn until_taken(pipeline: &Pipeline, apps: &Apps) {
    const PATIENCE: Duration = Duration::from_secs(5);
    const LOOK: Duration = Duration::from_millis(1);
    let mut last = (u64::MAX, Instant::now());
    loop {
        let running = apps
            .list()
            .into_iter()
            .filter(|app| app.state == AppState::Running);
        let (mut waiting, mut is_full) = (pipeline.moving(), false);
        for app in running {
            waiting += app.counters.queued;
            is_full |= app.counters.queued > app.limits.queue_events as u64 / 2;
        }
        if !is_full && waiting <= 4096 {
            return;
        }
        if waiting != last.0 {
            last = (waiting, Instant::now());
        } else if last.1.elapsed() > PATIENCE {
            return;
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn journal_config(config: &Config) -> JournalConfig {
    let journal = &config.journal;
    JournalConfig {
        folder: config.store.path.join(journal::FOLDER),
        max_bytes: journal.max_bytes,
        max_age: Some(Duration::from_secs(journal.max_age_s.into())).filter(|age| !age.is_zero()),
        segment_bytes: journal.segment_bytes.min(journal.max_bytes / 4),
        io_uring: journal.io_uring,
    }
}

/// A file that the configuration names and that a gateway would not start with.
pub struct FileProblem {
    /// The key that names it.
    pub key: String,
    /// As it would be said at the start.
    pub error: StartError,
}

/// Reads the files that [`build`] does, and starts nothing.
pub fn check_files(config: &Config) -> Vec<FileProblem> {
    let all = access_config(config);
    let none = AccessConfig {
        password_file: None,
        jwt_key: None,
        acl_file: None,
        ..all.clone()
    };
    // One at a time: what is wrong with one hides nothing of the others.
    let one_each = [
        (
            "mqtt.auth.password_file",
            AccessConfig {
                password_file: all.password_file,
                ..none.clone()
            },
        ),
        (
            "mqtt.auth.jwt_key",
            AccessConfig {
                jwt_key: all.jwt_key,
                ..none.clone()
            },
        ),
        (
            "mqtt.auth.acl_file",
            AccessConfig {
                acl_file: all.acl_file,
                ..none
            },
        ),
    ];
    let access = one_each.into_iter().filter_map(|(key, file)| {
        let error = Access::load(file).err()?;
        Some(FileProblem {
            key: key.to_owned(),
            error: error.into(),
        })
    });
    let tls = tls(config).err().map(|error| FileProblem {
        key: match &error {
            TlsError::File { key, .. } => format!("mqtt.tls.{key}"),
            TlsError::Mismatch { .. } => "mqtt.tls.key".to_owned(),
        },
        error: error.into(),
    });
    let rules = read_rules(config, Vec::new())
        .err()
        .map(|error| FileProblem {
            key: "pipeline.rules_file".to_owned(),
            error: StartError::Rules(error),
        });
    let links = read_links(config).err().map(|error| FileProblem {
        key: "uplink.links_file".to_owned(),
        error: StartError::Links(error),
    });
    access.chain(tls).chain(rules).chain(links).collect()
}

/// Where MQTT clients connect.
#[derive(Clone, Copy)]
struct MqttAddresses {
    tcp: Option<SocketAddr>,
    tls: Option<SocketAddr>,
    websocket: Option<SocketAddr>,
    websocket_tls: Option<SocketAddr>,
}

/// What the listeners with TLS need, if there are any.
fn tls(config: &Config) -> Result<Option<Arc<TlsReloader>>, TlsError> {
    let with_tls = config.mqtt.tls.listen.is_some()
        || config.mqtt.websocket.tls_listen.is_some()
        || config.ingest.tls_listen.is_some();
    let load = || TlsReloader::load(tls_files(&config.mqtt.tls), SystemTime::now());
    with_tls.then(load).transpose()
}

/// Binds all listeners for MQTT.
async fn mqtt_listeners(
    config: &MqttConfig,
    tls: Option<Arc<TlsReloader>>,
) -> Result<(MqttAddresses, Vec<Listener>), StartError> {
    let path: Arc<str> = config.websocket.path.as_str().into();
    let mut listeners = Vec::new();
    let mut bind = async |address: Option<&ListenAddress>, key, tls, websocket| {
        let Some(address) = address else {
            return Ok(None);
        };
        let (address, socket) = listen(address, key).await?;
        let protocols = Protocols { tls, websocket };
        let listener = protocols.transport().as_str();
        tracing::info!(%address, listener, "listening for MQTT clients");
        listeners.push(Listener { socket, protocols });
        Ok::<_, ListenError>(Some(address))
    };
    let websocket = &config.websocket;
    let addresses = MqttAddresses {
        tcp: bind(config.listen.as_ref(), "mqtt.listen", None, None).await?,
        tls: bind(
            config.tls.listen.as_ref(),
            "mqtt.tls.listen",
            tls.clone(),
            None,
        )
        .await?,
        websocket: bind(
            websocket.listen.as_ref(),
            "mqtt.websocket.listen",
            None,
            Some(path.clone()),
        )
        .await?,
        websocket_tls: bind(
            websocket.tls_listen.as_ref(),
            "mqtt.websocket.tls_listen",
            tls,
            Some(path),
        )
        .await?,
    };
    Ok((addresses, listeners))
}

/// Binds the listeners for frames.
async fn ingest_listeners(
    config: &IngestConfig,
    tls: Option<Arc<TlsReloader>>,
) -> Result<Vec<ingest::Listener>, ListenError> {
    let mut listeners = Vec::new();
    for (address, key, tls) in [
        (&config.listen, "ingest.listen", None),
        (&config.tls_listen, "ingest.tls_listen", tls),
    ] {
        if let Some(address) = address {
            let (_, socket) = listen(address, key).await?;
            listeners.push(ingest::Listener { socket, tls });
        }
    }
    Ok(listeners)
}

/// TCP ingest as the configuration wants it.
pub fn ingest_config(config: &IngestConfig) -> ingest::IngestConfig {
    ingest::IngestConfig {
        max_connections: config.max_connections,
        max_frame_bytes: config.max_frame_bytes,
        handshake_timeout: Duration::from_millis(config.handshake_timeout_ms),
        idle_timeout: Duration::from_secs(config.idle_timeout_s.into()),
        io_uring: config.io_uring,
    }
}

/// The files of a configuration that has a listener with TLS.
fn tls_files(config: &TlsConfig) -> TlsFiles {
    const CHECKED: &str = "a configuration without this file was refused";
    let clients = match config.client_certificates {
        ClientCertificates::Off => None,
        wanted => Some(ClientFiles {
            ca: config.client_ca.clone().expect(CHECKED),
            crl: config.client_crl.clone(),
            required: wanted == ClientCertificates::Required,
        }),
    };
    TlsFiles {
        certificate: config.certificate.clone().expect(CHECKED),
        key: config.key.clone().expect(CHECKED),
        clients,
    }
}

/// Binds, and says which port it is where port 0 was asked for.
async fn listen(
    address: &ListenAddress,
    key: &'static str,
) -> Result<(SocketAddr, TcpListener), ListenError> {
    let bind = async {
        let listener = TcpListener::bind(address.as_pair()).await?;
        Ok((listener.local_addr()?, listener))
    };
    bind.await.map_err(|source| ListenError {
        key,
        address: address.to_string(),
        source,
    })
}

/// The edge as the configuration wants it.
pub fn broker_config(config: &Config) -> BrokerConfig {
    let mqtt = &config.mqtt;
    BrokerConfig {
        max_connections: mqtt.max_connections,
        max_packet_bytes: mqtt.max_packet_bytes,
        connect_timeout: Duration::from_millis(mqtt.connect_timeout_ms),
        write_timeout: Duration::from_millis(mqtt.write_timeout_ms),
        max_keep_alive: Duration::from_secs(mqtt.max_keep_alive_s.into()),
        max_inflight: mqtt.max_inflight,
        receive_maximum: mqtt.receive_maximum,
        max_queued_messages: mqtt.max_queued_messages,
        max_queued_bytes: mqtt.max_queued_bytes,
        max_total_queued_bytes: mqtt.max_total_queued_bytes,
        max_stored_bytes: mqtt.persistence.max_bytes_per_client,
        max_total_stored_bytes: mqtt.persistence.max_bytes as u64,
        durable_acks: mqtt.persistence.durable_acks,
        max_subscriptions: mqtt.max_subscriptions,
        session_expiry_max: Duration::from_secs(mqtt.session_expiry_max_s.into()),
        response_information: mqtt.response_information.clone(),
        max_retained_messages: mqtt.max_retained_messages,
        system_topics_every: Duration::from_secs(mqtt.system_topics_every_s.into()),
        max_retained_bytes: mqtt.max_retained_bytes,
        max_total_subscriptions: mqtt.max_total_subscriptions,
        max_incoming_bytes: mqtt.max_incoming_bytes,
        largest_incoming: largest_frame(config.ingest.max_frame_bytes).max(mqtt.max_packet_bytes),
        max_messages_per_s: mqtt.max_messages_per_s,
        max_bytes_per_s: mqtt.max_bytes_per_s,
        max_total_bytes_per_s: mqtt.max_total_bytes_per_s,
    }
}

/// Who may come in, as the configuration wants it.
pub fn access_config(config: &Config) -> AccessConfig {
    let auth = config.mqtt.auth.clone();
    AccessConfig {
        anonymous: auth.anonymous,
        password_file: auth.password_file,
        jwt_key: auth.jwt_key,
        acl_file: auth.acl_file,
        max_failures_per_minute: auth.max_failures_per_minute,
    }
}

fn apps_config(config: &Config) -> std::io::Result<AppsConfig> {
    let apps = &config.apps;
    Ok(AppsConfig {
        workers: apps.workers,
        defaults: Defaults {
            limits: Limits {
                memory_pages: apps.memory_pages,
                batch_deadline_ms: apps.batch_deadline_ms,
                ..Limits::new(apps.queue_events)
            },
            max_uses: Some(apps.max_uses).filter(|uses| *uses > 0),
        },
        most: MostLimits {
            memory_pages: apps.max_memory_pages,
            batch_deadline_ms: apps.max_batch_deadline_ms,
            kv_bytes: apps.max_kv_bytes,
        },
        engine: EngineConfig {
            simd: apps.simd,
            pool_instances: apps.pool_instances,
        },
        aot_cache: apps.aot_cache,
        cold_start_target: Some(Duration::from_millis(apps.cold_start_target_ms))
            .filter(|target| !target.is_zero()),
        epoch: Duration::from_millis(apps.epoch_ms),
        max_batch_events: config.pipeline.batch.max_events,
        preinstalled: apps.preinstalled.clone(),
        gpio: apps.gpio.clone(),
        sensors: apps.sensors.clone(),
        ..AppsConfig::new(&config.store.path)?
    })
}

/// Hands over again what was dropped: to the app alone that could not handle it, else to all that have
/// subscribed to it. Else says why not, and what to do. May wait for subscribers that are behind.
fn retry(
    letter: &DeadLetter,
    apps: &Apps,
    pipeline: &Pipeline,
    broker: &Broker,
) -> Result<(), String> {
    if !letter.reason.is_of_app() {
        if letter.topic.as_str().starts_with('$') {
            return Err("topics that begin with $ are the gateway's own".to_owned());
        }
        no_room(letter, apps, pipeline)?;
        return match broker.publish_again(letter) {
            true => Ok(()),
            false => Err("too many events wait for apps; try again later".to_owned()),
        };
    }
    let name = &letter.source;
    let app = apps.inspect(name).map_err(|error| error.to_string())?;
    if !matches!(app.state, AppState::Running | AppState::Paused) {
        return Err(format!(
            "app {name} is {}; retry when it runs (`headgate app start {name}`)",
            app.state
        ));
    }
    let event = Event::new(letter.topic.clone(), letter.payload.clone(), Instant::now());
    // What finds no room could push out something else.
    let has_room = app.counters.queued < app.limits.queue_events as u64;
    match has_room.then(|| pipeline.offer_to(name, event)).flatten() {
        Some(Offer::Taken) => Ok(()),
        Some(Offer::Full(_)) | None => Err(format!(
            "app {name} has no room: {} events wait for it; try again later",
            app.counters.queued
        )),
    }
}

/// Refuses a letter that would only be dropped again.
fn no_room(letter: &DeadLetter, apps: &Apps, pipeline: &Pipeline) -> Result<(), String> {
    let topic = letter.topic.as_str();
    let lane = pipeline.tap().treatment(&letter.topic).lane;
    if lane == Lane::Batch && pipeline.pressure() >= Pressure::Overload {
        return Err("the batch lane takes nothing now, because the realtime lane can't keep up; try again later".to_owned());
    }
    let is_full = |app: &AppInfo| {
        app.counters.queued >= app.limits.queue_events as u64
            && app.subscription_to(topic).is_some()
    };
    match apps.list().into_iter().find(is_full) {
        Some(app) => Err(format!(
            "app {} has no room: {} events wait for it; try again later",
            app.name, app.counters.queued
        )),
        None => Ok(()),
    }
}

/// Where what apps make goes: into the journal, to other apps, to the clients.
struct Outputs {
    /// Set once the edge is up; what an app makes before that has nobody to go to but apps.
    broker: OnceLock<Arc<Broker>>,
    journal: Option<Journal>,
    /// What is made here may come back by way of the site.
    in_site: bool,
    /// For waiting from the apps' threads.
    runtime: Handle,
    pipeline: Arc<Pipeline>,
    routes: Arc<Routes>,
    latency: Latency,
}

impl Outputs {
    /// Hands to the journal what of it is to be there. Waits while the disk is behind, so that what the
    /// events were made from is finished only after that.
    fn journal(&self, events: &mut [Event], tap: &mut Tap) -> Result<(), NotJournaled> {
        let Some(journal) = &self.journal else {
            return Ok(());
        };
        let mut records = Records::default();
        let receipt = journal.receipt();
        for event in events {
            if tap.treatment(&event.topic).durable {
                let hops = (self.in_site && event.hops > 0).then(|| via::of_hops(event.hops));
                let origin = hops.as_ref().map(|via| Origin { link: None, via });
                let (topic, payload) = (&event.topic, &event.payload);
                records.push(topic, payload, event.timestamp_ns, None, origin);
                event.receipt = Some(receipt.hold());
            }
        }
        if records.is_empty() {
            return Ok(());
        }
        match self
            .runtime
            .block_on(journal.append_unless_failing(&records, &receipt))
        {
            true => Ok(()),
            false => Err(NotJournaled),
        }
    }
}

impl Sink for Outputs {
    fn publish(&self, source: &str, mut events: Vec<Event>) -> Result<(), NotJournaled> {
        thread_local! {
            /// A tap remembers topics, so each worker thread keeps its own.
            static TAP: std::cell::RefCell<Option<Tap>> = const { std::cell::RefCell::new(None) };
        }
        let now = Instant::now();
        self.latency.record(
            events
                .iter()
                .map(|event| now.saturating_duration_since(event.received)),
        );
        let topics = events.iter().map(|event| &event.topic);
        let app = source.into();
        self.routes.traces.note(topics, &Step::Published { app });
        let journaled = TAP.with_borrow_mut(|tap| {
            let tap = tap.get_or_insert_with(|| self.pipeline.tap());
            let journaled = self.journal(&mut events, tap);
            for event in &mut events {
                let treatment = tap.treatment(&event.topic);
                match treatment.wanted {
                    true => tap.add(event.clone(), treatment),
                    false => tap.count_filtered(&event.topic, treatment),
                }
                // The clients' copy is no reason for it to come again.
                event.receipt = None;
            }
            tap.flush_feedback();
            journaled
        });
        if let Some(broker) = self.broker.get() {
            broker.publish(events);
        }
        journaled
    }
}

impl Gateway {
    /// The address of the MQTT listener without TLS, unless it is off.
    pub fn mqtt_addr(&self) -> Option<SocketAddr> {
        self.addresses.tcp
    }

    /// The address of the ingest listener without TLS, unless it is off.
    pub fn ingest_addr(&self) -> Option<SocketAddr> {
        self.ingest.as_ref()?.status().listen
    }

    /// The address of the metrics listener, unless it is off.
    pub fn metrics_addr(&self) -> Option<SocketAddr> {
        self.metrics.as_ref().map(|(address, _)| *address)
    }

    /// What reads anew the files that can change while the gateway runs. Blocks; if a file is wrong,
    /// everything stays as it was.
    pub fn reloader(&self) -> impl Fn() -> Result<(), ReloadError> + Send + Sync + use<> {
        let broker = self.broker.clone();
        let (config, routes) = (self.config.clone(), self.routes.clone());
        let (has_journal, shipped) = (self.journal.is_some(), self.shipped.clone());
        move || {
            // All files are read before the first is put into force.
            let rules = read_rules(&config, shipped.clone()).map_err(ReloadError::Rules);
            let rules = rules.and_then(|rules| match rules.want_journal() && !has_journal {
                true => Err(ReloadError::NoJournal),
                false => Ok(rules),
            });
            let rules = rules.inspect_err(|error| tracing::error!(%error))?;
            broker.reload_access().inspect_err(|error| {
                tracing::error!(%error, "nothing was reloaded");
            })?;
            routes.set_rules(rules);
            tracing::info!("users, keys and all rules reloaded");
            broker.reload_tls().inspect_err(|error| {
                tracing::error!(%error, "the certificates were not reloaded");
            })?;
            Ok(())
        }
    }

    pub fn apps(&self) -> &Apps {
        &self.apps
    }

    /// Runs until `shutdown` resolves, then drains: nothing is taken in any more, what was taken
    /// in goes through the apps, what they made is sent. Bounded by `shutdown.timeout_ms`.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let (stop, stopping) = watch::channel(false);
        let stopped = move || {
            let mut stopping = stopping.clone();
            async move {
                // An error means that the gateway is gone, which is a reason to stop too.
                let _ = stopping.wait_for(|stop| *stop).await;
            }
        };
        let status = {
            let (pipeline, broker) = (self.pipeline.clone(), self.broker.clone());
            let (outputs, health, started) =
                (self.outputs.clone(), self.health.clone(), self.started);
            let addresses = self.addresses;
            let metrics = self.metrics_addr();
            let store = self.store.path().to_owned();
            let (apps, mappings) = (self.apps.clone(), self.mappings.clone());
            let journal = self.journal.clone();
            let ingest = self.ingest.clone();
            let uplink = self.uplink.clone();
            Arc::new(move || {
                let latency = |quantile| outputs.latency.quantile(quantile).as_micros() as u64;
                serde_json::json!({
                    "version": env!("CARGO_PKG_VERSION"),
                    "ready": health.ready().is_ok(),
                    "uptime_s": started.elapsed().as_secs(),
                    "store": store,
                    "mqtt_listen": addresses.tcp,
                    "mqtt_tls_listen": addresses.tls,
                    "mqtt_websocket_listen": addresses.websocket,
                    "mqtt_websocket_tls_listen": addresses.websocket_tls,
                    "metrics_listen": metrics,
                    "broker": broker.stats(),
                    "pipeline": pipeline.status(),
                    "ingest": ingest.as_deref().map(Ingest::status),
                    "journal": journal.as_ref().map(Journal::status),
                    "uplink": uplink.as_deref().map(Uplink::status),
                    "latency_us": {
                        "count": outputs.latency.count(),
                        "p50": latency(0.5),
                        "p99": latency(0.99),
                        "max": latency(1.0),
                    },
                    "apps": apps.list().len(),
                    "mappings": mappings.status(),
                })
            })
        };
        let reloader = self.reloader();
        let retry = {
            let (apps, broker) = (self.apps.clone(), self.broker.clone());
            let pipeline = self.pipeline.clone();
            Arc::new(move |letter: &DeadLetter| retry(letter, &apps, &pipeline, &broker))
        };
        let reload = Arc::new(move || reloader().map_err(|error| error.to_string()));
        let (store, config) = (self.store.clone(), self.config.clone());
        let update_requests = match self.config.ota.channel.is_empty() {
            true => None,
            false => Some(self.config.admin.socket.with_file_name(UPDATE_REQUEST)),
        };
        let why = Why {
            routes: self.routes.clone(),
            pipeline: self.pipeline.clone(),
            apps: self.apps.clone(),
            mappings: self.mappings.clone(),
            broker: self.broker.clone(),
            dead_letters: self.dead_letters.clone(),
            journal: self.journal.clone(),
        };
        let admin = tokio::spawn(admin::serve(
            self.admin,
            AdminState {
                apps: self.apps.clone(),
                mappings: self.mappings.clone(),
                broker: self.broker.clone(),
                dead_letters: self.dead_letters.clone(),
                retry,
                status,
                reload,
                why: Arc::new(move |topic| why.answer(topic)),
                pass_trial: Arc::new(move || match standing(&config) {
                    Standing::Passed { .. } => {
                        store.pass_trial().map_err(|error| error.to_string())
                    }
                    Standing::OnTrial { .. } | Standing::Unknown { .. } => Ok(false),
                }),
                update_requests,
            },
            stopped(),
        ));
        let recorder = metrics::recorder();
        let exporter = match self.metrics {
            None => None,
            Some((address, listener)) => {
                tracing::info!(%address, "metrics at http://{address}/metrics");
                let (pipeline, broker) = (self.pipeline.clone(), self.broker.clone());
                let (outputs, apps) = (self.outputs.clone(), self.apps.clone());
                let mappings = self.mappings.clone();
                let dead_letters = self.dead_letters.clone();
                let journal = self.journal.clone();
                let ingest = self.ingest.clone();
                let uplink = self.uplink.clone();
                let updates = self.config.ota.clone();
                let publish = Arc::new(move || {
                    if !updates.channel.is_empty()
                        && let Err(error) = ota::metrics::record(&updates.state, &updates.root)
                    {
                        tracing::warn!(%error, "no metrics of updates");
                    }
                    journal.iter().for_each(Journal::record_metrics);
                    uplink.iter().for_each(|uplink| uplink.record_metrics());
                    broker.record_metrics();
                    ingest.iter().for_each(|ingest| ingest.record_metrics());
                    dead_letters.record_metrics();
                    pipeline.record_metrics();
                    outputs.latency.record_metrics();
                    apps.record_metrics();
                    mappings.record_metrics();
                });
                let apps = self.apps.clone();
                let endpoints = Endpoints {
                    recorder,
                    publish,
                    append: Arc::new(move |text| apps.render_measures(text)),
                    health: self.health.clone(),
                };
                let serve = metrics::serve(listener, endpoints, stopped());
                Some(tokio::spawn(serve))
            }
        };
        let watchdog = tokio::spawn(systemd::watchdog(self.health.clone()));
        let ready = {
            let (apps, health, started) = (self.apps.clone(), self.health.clone(), self.started);
            let mqtt = self.addresses.tcp.map(tracing::field::display);
            health.not_ready("apps", "starting");
            let (settled, all_settled) = oneshot::channel();
            // A thread of its own, and not the runtime's, whose end would wait for it.
            std::thread::spawn(move || {
                apps.wait_until_settled();
                // Nobody listens any more when the gateway is stopped before.
                let _ = settled.send(());
            });
            tokio::spawn(async move {
                if all_settled.await.is_err() {
                    return;
                }
                health.set_ready("apps");
                let took = started.elapsed().as_millis() as u64;
                tracing::info!(mqtt, ready_after_ms = took, "ready");
                systemd::ready();
            })
        };

        shutdown.await;
        ready.abort();

        tracing::info!("shutting down");
        // A little is left for the end of the process.
        let deadline = Instant::now() + self.shutdown_timeout * 9 / 10;
        self.health.drain();
        systemd::stopping();
        self.broker.drain();
        self.ingest.iter().for_each(|ingest| ingest.drain());
        self.uplink.iter().for_each(|uplink| uplink.drain());
        self.pipeline.drain();
        // What has come in reaches the apps,
        while self.pipeline.queued() > 0 && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // and they finish it: the last fifth of the time is for sending what they made.
        let apps = self.apps.clone();
        let apps_deadline = deadline - self.shutdown_timeout / 5;
        // Apps and mappings may feed each other.
        let is_busy = || {
            let works = |app: &AppInfo| app.state == AppState::Running && app.counters.queued > 0;
            self.pipeline.queued() > 0 || !self.mappings.is_idle() || apps.list().iter().any(works)
        };
        while self.mappings.status().installed > 0 && is_busy() && Instant::now() < apps_deadline {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let mappings = self.mappings.clone();
        let stopped_mappings = tokio::task::spawn_blocking(move || mappings.stop(apps_deadline));
        if stopped_mappings.await.is_err() {
            tracing::error!("stopping the mappings failed; their last values may be lost");
        }
        let journal = self.journal.clone();
        let stopped_apps = tokio::task::spawn_blocking(move || {
            // What they have to drop then comes again at the next start.
            apps.shutdown(apps_deadline, || journal.iter().for_each(Journal::freeze));
        });
        let stopped_apps = stopped_apps.await;
        if stopped_apps.is_err() {
            tracing::error!("stopping the apps failed; the last events may be lost");
        }
        let closed = tokio::time::timeout_at(deadline.into(), self.broker.close()).await;
        if closed.is_err() {
            tracing::warn!("some clients did not take their last messages in time");
        }
        if let Some(ingest) = self.ingest {
            let left = deadline.saturating_duration_since(Instant::now());
            let close = tokio::task::spawn_blocking(move || ingest.close());
            if tokio::time::timeout(left, close).await.is_err() {
                tracing::warn!("some ingest clients could not be told the end in time");
            }
        }
        if let Some(uplink) = self.uplink {
            let close = tokio::task::spawn_blocking(move || uplink.close());
            if tokio::time::timeout(UPLINK_CLOSE, close).await.is_err() {
                tracing::warn!(
                    "the links did not end in time; what they sent last may be sent again"
                );
            }
        }
        if let Some(journal) = self.journal {
            let left = deadline.saturating_duration_since(Instant::now());
            let close = tokio::task::spawn_blocking(move || journal.close());
            if tokio::time::timeout(left, close).await.is_err() {
                tracing::warn!("the journal's last write did not end in time");
            }
        }
        stop.send_replace(true);
        watchdog.abort();
        for task in [Some(admin), exporter].into_iter().flatten() {
            let left = deadline.saturating_duration_since(Instant::now());
            // What they answer now is of no use to anyone.
            let _ = tokio::time::timeout(left.max(Duration::from_millis(50)), task).await;
        }
        tracing::info!("stopped");
    }
}
