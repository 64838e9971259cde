//! Every key of the configuration: name, type, default, allowed values, meaning.
//!
//! To add one, add a field here and use it in its room; then
//! `headgate config schema --markdown > docs/configuration.md`.

use std::path::PathBuf;

use super::key::{Check, Key, Kind, Preset, Section};
use super::resolve;
use super::section::section;
use super::value::{
    self, Anonymous, AppNames, ClientCertificates, ListenAddress, LogFormat, Lookup, RebootWhen,
};
use crate::event::TopicFilter;
use crate::ingest::frame::MOST_FRAME_BYTES;
use crate::ota::keys::TrustedKey;
use crate::ota::window::Windows;

// Sizes are kept as usize, and some may be larger than what 32 bits hold.
const _: () = assert!(usize::BITS >= 64);

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
const GIB: u64 = 1024 * MIB;

/// LMDB wants whole pages; 64 KiB is the largest page that Linux uses on the machines we run on.
const LARGEST_PAGE: u64 = 64 * KIB;

/// The largest packet that MQTT can frame: four length bytes of seven bits.
const MQTT_MAX_PACKET_BYTES: u64 = 268_435_455;

/// An hour: longer time-outs than that are slips of the pen.
const HOUR_MS: u64 = 3_600_000;

const fn integer(min: u64, max: u64) -> Kind {
    Kind::Integer { min, max }
}

const fn bytes(min: u64, max: u64) -> Kind {
    Kind::Bytes { min, max, whole: 1 }
}

const URL: Check = Check {
    expected: "a URL",
    allowed: "http://…, https://… or file:///…; nothing",
    check: |text| match text.contains(',') {
        true => Err("it has a comma".to_owned()),
        false => value::check_urls(text),
    },
};

const URLS: Check = Check {
    expected: "URLs with commas between them",
    allowed: "URL, URL; nothing",
    check: value::check_urls,
};

const PUBLIC_KEYS: Check = Check {
    expected: "public keys with commas between them",
    allowed: "name:base64, name:base64@2027-12-31T00:00:00Z; nothing",
    check: value::check_keys,
};

const WINDOWS: Check = Check {
    expected: "maintenance windows",
    allowed: "HH:MM-HH:MM; Mon..Fri HH:MM-HH:MM; nothing",
    check: value::check_windows,
};

const MAPPING_NAMES: Check = Check {
    expected: "names of mappings with commas between them",
    allowed: "mapping, mapping; nothing",
    check: value::check_mappings,
};

const WORD: Check = Check {
    expected: "a word of a release",
    allowed: "a word, or nothing",
    check: value::check_word,
};

/// The configuration, resolved and checked: one field a section of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub store: StoreConfig,
    pub mqtt: MqttConfig,
    pub pipeline: PipelineConfig,
    pub journal: JournalConfig,
    pub ingest: IngestConfig,
    pub apps: AppsConfig,
    pub mappings: MappingsConfig,
    pub uplink: UplinkConfig,
    pub ota: OtaConfig,
    pub metrics: MetricsConfig,
    pub admin: AdminConfig,
    pub log: LogConfig,
    pub shutdown: ShutdownConfig,
}

/// The sections, in the order in which they are resolved and shown. `admin` comes after `store`,
/// because its default lies inside the store.
pub(super) const SECTIONS: &[&Section] = &[
    &StoreConfig::SECTION,
    &MqttConfig::SECTION,
    &PipelineConfig::SECTION,
    &JournalConfig::SECTION,
    &IngestConfig::SECTION,
    &AppsConfig::SECTION,
    &MappingsConfig::SECTION,
    &UplinkConfig::SECTION,
    &OtaConfig::SECTION,
    &MetricsConfig::SECTION,
    &AdminConfig::SECTION,
    &LogConfig::SECTION,
    &ShutdownConfig::SECTION,
];

impl Config {
    pub(super) fn read(values: &impl Lookup) -> Config {
        Config {
            store: StoreConfig::read(values),
            mqtt: MqttConfig::read(values),
            pipeline: PipelineConfig::read(values),
            journal: JournalConfig::read(values),
            ingest: IngestConfig::read(values),
            apps: AppsConfig::read(values),
            mappings: MappingsConfig::read(values),
            uplink: UplinkConfig::read(values),
            ota: OtaConfig::read(values),
            metrics: MetricsConfig::read(values),
            admin: AdminConfig::read(values),
            log: LogConfig::read(values),
            shutdown: ShutdownConfig::read(values),
        }
    }
}

section! {
    /// Where the gateway keeps what must outlive it.
    StoreConfig = "store" {
        /// Folder of the database: apps, their state, sessions. Created if it is missing. One gateway
        /// a folder.
        path: PathBuf = Kind::Path { socket: false }, Preset::Derived {
            from: "$STATE_DIRECTORY, else $XDG_STATE_HOME/headgate; else /var/lib/headgate for root and ~/.local/state/headgate for others",
            example: "/var/lib/headgate",
            derive: resolve::default_store_path,
        };
        /// Most bytes that the database may grow to. It is address space, taken from the disk only
        /// as it fills. Rounded up to a multiple of 64 KiB.
        max_bytes: usize = Kind::Bytes { min: MIB, max: 256 * GIB, whole: LARGEST_PAGE }, Preset::Text("1GiB");
    }
}

section! {
    /// The MQTT listener without TLS (3.1.1 and 5 on one port), and how much one client may take up.
    MqttConfig = "mqtt" {
        /// Where MQTT clients connect without TLS. Port 0 takes a free port; "off" or "" has no such
        /// listener, and needs another one: of mqtt.tls or mqtt.websocket.
        listen: Option<ListenAddress> = Kind::Address, Preset::Text("127.0.0.1:1883");
        /// Most clients that are connected at a time.
        max_connections: usize = integer(1, 100_000), Preset::Text("1024");
        /// Largest packet taken from a client, in bytes; a client that sends a larger one is
        /// disconnected.
        max_packet_bytes: usize = bytes(64, MQTT_MAX_PACKET_BYTES), Preset::Text("1MiB");
        /// Milliseconds within which a new connection must have sent its CONNECT.
        connect_timeout_ms: u64 = integer(1, HOUR_MS), Preset::Text("5000");
        /// Milliseconds after which a client that takes no byte of what is sent to it is dropped.
        write_timeout_ms: u64 = integer(1, HOUR_MS), Preset::Text("10000");
        /// Longest keep-alive that a client may have, in seconds. An MQTT 5 client that asks for
        /// more is told this one. 0 sets no limit.
        max_keep_alive_s: u16 = integer(0, 65_535), Preset::Text("0");
        /// Most QoS 1 and 2 messages on their way to one client without its acknowledgement. An
        /// MQTT 5 client's own receive maximum can lower it.
        max_inflight: u16 = integer(1, 65_535), Preset::Text("256");
        /// Most QoS 2 messages that one client may have begun to send without their being completed.
        /// QoS 1 needs no such bound: a client is not read from while an acknowledgement is owed.
        receive_maximum: u16 = integer(1, 65_535), Preset::Text("1024");
        /// Most messages that wait for one client.
        max_queued_messages: usize = integer(1, 10_000_000), Preset::Text("100000");
        /// Most bytes of messages that wait for one client in memory.
        max_queued_bytes: usize = bytes(KIB, 4 * GIB), Preset::Text("16MiB");
        /// Most bytes of messages that wait in memory for all clients together.
        max_total_queued_bytes: usize = bytes(KIB, 64 * GIB), Preset::Text("128MiB");
        /// Most subscriptions of one client.
        max_subscriptions: usize = integer(1, 100_000), Preset::Text("1000");
        /// Most subscriptions of all clients together.
        max_total_subscriptions: usize = integer(1, 10_000_000), Preset::Text("100000");
        /// Longest that the session of a client that has gone is kept, in seconds.
        session_expiry_max_s: u32 = integer(0, 0xffff_ffff), Preset::Text("86400");
        /// Where MQTT 5 clients that ask for response information are told to expect responses, such
        /// as "response/%c"; %c stands for the client id. "" tells them nothing.
        response_information: String = Kind::OptionalTopic, Preset::Text("");
        /// Most retained messages of all topics. 0 keeps none.
        max_retained_messages: usize = integer(0, 10_000_000), Preset::Text("100000");
        /// Most bytes of retained messages: topics, payloads, properties and bookkeeping.
        max_retained_bytes: usize = bytes(0, 64 * GIB), Preset::Text("64MiB");
        /// Most bytes of packets over 64 KiB that are on their way in, of all clients together, with
        /// frames of ingest; the others wait their turn. One packet of max_packet_bytes always may.
        max_incoming_bytes: usize = bytes(64 * KIB, 64 * GIB), Preset::Text("64MiB");
        /// Most messages a second that one client may publish; it is read more slowly beyond that.
        /// 0 sets no limit.
        max_messages_per_s: u32 = integer(0, 10_000_000), Preset::Text("0");
        /// Most bytes a second that one client may send; it is read more slowly beyond that. 0 sets no
        /// limit.
        max_bytes_per_s: u64 = bytes(0, 64 * GIB), Preset::Text("0");
        /// Most bytes a second that all clients together may send. 0 sets no limit.
        max_total_bytes_per_s: u64 = bytes(0, 64 * GIB), Preset::Text("0");
        /// Seconds after which the topics below $SYS/broker are brought up to date. 0 has none.
        system_topics_every_s: u32 = integer(0, 86_400), Preset::Text("10");
        .. auth: AuthConfig;
        .. persistence: PersistenceConfig;
        .. tls: TlsConfig;
        .. websocket: WebSocketConfig;
    }
}

section! {
    /// What outlives the connection of an MQTT client, and the gateway: retained messages, and for
    /// clients that want their session kept, its subscriptions and the QoS 1 and 2 messages that
    /// come while they are away or too slow.
    PersistenceConfig = "mqtt.persistence" {
        /// Most bytes of messages that wait on disk for one client.
        max_bytes_per_client: usize = bytes(KIB, 64 * GIB), Preset::Text("64MiB");
        /// Most bytes of messages that wait on disk for all clients together. store.max_bytes has to
        /// be larger.
        max_bytes: usize = bytes(KIB, 256 * GIB), Preset::Text("256MiB");
        /// Whether a QoS 1 or 2 message that is retained, or that has to wait on disk, is
        /// acknowledged only when it is there.
        durable_acks: bool = Kind::Switch, Preset::Text("true");
    }
}

section! {
    /// Who may connect to the MQTT listeners, and who may do what. The files are read at the start, and
    /// again at `headgate reload` and SIGHUP.
    AuthConfig = "mqtt.auth" {
        /// Who may connect without a login: nobody (never), clients on this machine (loopback) or
        /// everybody (always).
        anonymous: Anonymous = Kind::Choice(Anonymous::NAMES), Preset::Text("loopback");
        /// File with users and the hashes of their passwords, which `headgate user` keeps. "" for none.
        password_file: Option<PathBuf> = Kind::OptionalPath, Preset::Text("");
        /// File with the keys that JSON Web Tokens, shown in the place of a password, are checked with:
        /// public keys as PEM, a JSON Web Key Set, or a secret. "" for none.
        jwt_key: Option<PathBuf> = Kind::OptionalPath, Preset::Text("");
        /// File with the rules, as TOML, about who may publish and subscribe to what. "" allows
        /// everything to everybody.
        acl_file: Option<PathBuf> = Kind::OptionalPath, Preset::Text("");
        /// Most logins a minute that may fail from one address, or for one user name; then both have to
        /// wait. 0 sets no limit.
        max_failures_per_minute: u32 = integer(0, 10_000), Preset::Text("10");
    }
}

section! {
    /// An MQTT listener with TLS 1.2 and 1.3. The files are read at the start, when they change
    /// and when the gateway is told to reload; connections that stand are not touched.
    TlsConfig = "mqtt.tls" {
        /// Where MQTT clients connect with TLS. Port 0 takes a free port; "off" or "" has no such
        /// listener.
        listen: Option<ListenAddress> = Kind::Address, Preset::Text("off");
        /// File with the certificate of the gateway and those that lead from it to the one that
        /// clients trust, as PEM.
        certificate: Option<PathBuf> = Kind::OptionalPath, Preset::Text("");
        /// File with the private key of the certificate, as PEM.
        key: Option<PathBuf> = Kind::OptionalPath, Preset::Text("");
        /// Whether clients must show a certificate: off (they are not asked), optional (one that is
        /// shown must be valid), required.
        client_certificates: ClientCertificates = Kind::Choice(ClientCertificates::NAMES), Preset::Text("off");
        /// File with the certificates of those that vouch for clients, as PEM.
        client_ca: Option<PathBuf> = Kind::OptionalPath, Preset::Text("");
        /// File with lists of revoked certificates of clients (CRLs), as PEM: one of each authority
        /// in client_ca and between it and the clients. A list counts beyond its time. "" for none.
        client_crl: Option<PathBuf> = Kind::OptionalPath, Preset::Text("");
    }
}

section! {
    /// MQTT over WebSocket, for browsers and for networks that let nothing else through.
    WebSocketConfig = "mqtt.websocket" {
        /// Where MQTT clients connect with WebSocket (ws). Port 0 takes a free port; "off" or "" has
        /// no such listener.
        listen: Option<ListenAddress> = Kind::Address, Preset::Text("off");
        /// Where MQTT clients connect with WebSocket and TLS (wss), with the certificate and the rules
        /// of mqtt.tls. Port 0 takes a free port; "off" or "" has no such listener.
        tls_listen: Option<ListenAddress> = Kind::Address, Preset::Text("off");
        /// Path of the URL that clients connect to.
        path: String = Kind::UrlPath, Preset::Text("/mqtt");
    }
}

section! {
    /// The way from the listeners to the apps.
    PipelineConfig = "pipeline" {
        /// Most events of the transactional lane that wait to be put into batches. Beyond that their
        /// publishers wait.
        queue_events: usize = integer(1, 4_194_304), Preset::Text("65536");
        /// File with rules, as TOML, about which lane the events of a topic take, whether they are in the
        /// journal, what tells their duplicates. Read at the start, and again at `headgate reload` and
        /// SIGHUP. "" has all events take the transactional lane.
        rules_file: Option<PathBuf> = Kind::OptionalPath, Preset::Text("");
        .. batch: BatchConfig;
        .. realtime: RealtimeConfig;
        .. windows: WindowsConfig;
        .. dedup: DedupConfig;
    }
}

section! {
    /// The realtime lane: its events come before all others. While it can't keep up, the other lanes stand
    /// back.
    RealtimeConfig = "pipeline.realtime" {
        /// Most events that wait to be handed to apps. Beyond that the oldest are dropped.
        queue_events: usize = integer(1, 4_194_304), Preset::Text("16384");
        /// Events that wait, here and in the queues of apps, from which on the lane can't keep up.
        max_waiting_events: usize = integer(1, 4_194_304), Preset::Text("5000");
        /// Milliseconds from an event's arrival until an app has handled it, from which on the lane can't
        /// keep up.
        max_latency_ms: u64 = integer(1, 60_000), Preset::Text("100");
        /// Percentage of the events that are dropped, from which on the lane can't keep up.
        max_dropped_percent: u32 = integer(1, 100), Preset::Text("2");
    }
}

section! {
    /// The windows of the batch lane, where the rule says nothing else: events of one topic that go to apps
    /// together.
    WindowsConfig = "pipeline.windows" {
        /// Most events that wait to be put into windows, and in windows. Beyond that the newest are dropped.
        queue_events: usize = integer(1, 4_194_304), Preset::Text("32768");
        /// Events with which a window closes.
        max_events: usize = integer(1, 4_096), Preset::Text("1000");
        /// Bytes of payloads with which a window closes.
        max_bytes: usize = bytes(1, 16 * MIB), Preset::Text("256KiB");
        /// Milliseconds after its first event with which a window closes.
        max_age_ms: u64 = integer(1, HOUR_MS), Preset::Text("5000");
    }
}

section! {
    /// How long duplicates are known, of events whose rule looks for them.
    DedupConfig = "pipeline.dedup" {
        /// Seconds for which an event is known.
        window_s: u64 = integer(1, 604_800), Preset::Text("3600");
        /// Most events that are known; the oldest is forgotten for a new one. Each takes up to 40 bytes of
        /// memory.
        max_keys: usize = integer(16, 100_000_000), Preset::Text("1000000");
    }
}

section! {
    /// When a batch of events is closed. A batch never waits while its app is idle.
    BatchConfig = "pipeline.batch" {
        /// Most events in a batch.
        max_events: usize = integer(1, 4096), Preset::Text("64");
        /// Microseconds after which a batch is closed, even if it isn't full.
        max_delay_us: u64 = integer(0, 1_000_000), Preset::Text("1000");
    }
}

section! {
    /// The journal: events that are on disk before their QoS 1 or 2 message is acknowledged, and that apps get
    /// again if a crash has kept them from finishing. In journal of store.path.
    JournalConfig = "journal" {
        /// Events on topics that match one of these filters go into it, whatever pipeline.rules_file says:
        /// topic filters with commas between them; "#" for all, "" for none.
        topics: Vec<TopicFilter> = Kind::TopicFilters, Preset::Text("");
        /// Most bytes of it. Beyond that the oldest segments are removed, those that no app has finished,
        /// too.
        max_bytes: u64 = bytes(MIB, 256 * GIB), Preset::Text("1GiB");
        /// Seconds after which an event is removed, if all apps have finished it; up to an eighth later, since
        /// segments are removed as a whole. 0 for no limit.
        max_age_s: u32 = integer(0, 0xffff_ffff), Preset::Text("0");
        /// Bytes after which a segment is followed by the next.
        segment_bytes: u64 = bytes(64 * 1024, GIB), Preset::Text("64MiB");
        /// Whether it is written through io_uring, where the kernel lets us.
        io_uring: bool = Kind::Switch, Preset::Text("true");
    }
}

section! {
    /// TCP ingest: events as frames, for producers that speak no MQTT. Their logins and rules are those of
    /// mqtt.auth.
    IngestConfig = "ingest" {
        /// Where producers connect. Port 0 takes a free port; "off" or "" has no such listener.
        listen: Option<ListenAddress> = Kind::Address, Preset::Text("off");
        /// Where producers connect with TLS, with the certificate and the rules of mqtt.tls. Port 0 takes a
        /// free port; "off" or "" has no such listener.
        tls_listen: Option<ListenAddress> = Kind::Address, Preset::Text("off");
        /// Most producers that are connected at a time.
        max_connections: usize = integer(1, 100_000), Preset::Text("256");
        /// Largest frame, in bytes after its length; a producer that sends a larger one is disconnected.
        max_frame_bytes: usize = bytes(64, MOST_FRAME_BYTES), Preset::Text("1MiB");
        /// Milliseconds within which a handshake must have come: from the connection on, or from its first
        /// byte on where mqtt.auth.anonymous lets producers in without one.
        handshake_timeout_ms: u64 = integer(1, HOUR_MS), Preset::Text("5000");
        /// Seconds after which a producer that has sent nothing is disconnected. 0 waits for ever.
        idle_timeout_s: u32 = integer(0, 86_400), Preset::Text("0");
        /// Whether connections without TLS are read through io_uring, where the kernel lets us.
        io_uring: bool = Kind::Switch, Preset::Text("true");
    }
}

section! {
    /// The WASM apps.
    AppsConfig = "apps" {
        /// Threads that run apps. 0 takes one for each CPU.
        workers: usize = integer(0, 256), Preset::Text("0");
        /// Most events that wait for one app.
        queue_events: usize = integer(1, 1_048_576), Preset::Text("8192");
        /// Milliseconds between the ticks by which the time of a running app is measured, and so how
        /// exactly its time limit is kept.
        epoch_ms: u64 = integer(1, 100), Preset::Text("5");
        /// Pages of 64 KiB of an app whose manifest has no limits.memory_pages.
        memory_pages: u32 = integer(1, 1024), Preset::Text("256");
        /// Most pages of 64 KiB that a manifest can ask for.
        max_memory_pages: u32 = integer(1, 1024), Preset::Text("1024");
        /// Milliseconds of CPU time that one call may take, of an app whose manifest has no
        /// limits.batch_deadline_ms.
        batch_deadline_ms: u64 = integer(1, 60_000), Preset::Text("100");
        /// Most milliseconds of CPU time a call that a manifest can ask for.
        max_batch_deadline_ms: u64 = integer(1, 60_000), Preset::Text("60000");
        /// Most bytes to keep that a manifest can ask for.
        max_kv_bytes: usize = bytes(0, 64 * MIB), Preset::Text("64MiB");
        /// Batches after which an instance is replaced by a fresh one, of an app whose manifest has no
        /// recycle.max_uses. 0 for never.
        max_uses: u64 = integer(0, u32::MAX as u64), Preset::Text("0");
        /// Whether components may have SIMD instructions. Where they may not, code that
        /// `headgate app compile` has made does not fit.
        simd: bool = Kind::Switch, Preset::Text("true");
        /// Instances for which address space is reserved at the start, 128 MiB for each: no more can live at
        /// a time, and an upgrade needs one more for a moment. Then a table has 100,000 elements at the
        /// most. 0 maps each instance when it is made, which takes no longer.
        pool_instances: u32 = integer(0, 1024), Preset::Text("0");
        /// Whether compiled components are kept in aot of store.path, for the next start.
        aot_cache: bool = Kind::Switch, Preset::Text("true");
        /// Milliseconds to make and configure an instance beyond which the app's log says so. 0 for
        /// never.
        cold_start_target_ms: u64 = integer(0, 60_000), Preset::Text("15");
        /// Folder of the apps that are part of the system: one folder an app, called as the app, with
        /// manifest.toml and what `headgate app compile` has made of the component (or, where the
        /// gateway can compile, the component). Read at each start, never written. Only root and the
        /// gateway's own user may be able to write there. Such an app can be stopped but not removed.
        /// "" for none.
        preinstalled: Option<PathBuf> = Kind::OptionalPath, Preset::Text("");
        /// Apps that may have GPIO lines, those that their manifests name: names with commas between
        /// them; "*" for all, "" for none. The gateway's user needs access to /dev/gpiochip*.
        gpio: AppNames = Kind::AppNames, Preset::Text("");
        /// Apps that may read the machine's sensors, those that their manifests name: names with commas
        /// between them; "*" for all, "" for none.
        sensors: AppNames = Kind::AppNames, Preset::Text("");
    }
}

section! {
    /// The mappings: the stream processors of the unified namespace, see docs/mappings.md.
    MappingsConfig = "mappings" {
        /// Folder of the mappings that are part of the system: one file a mapping, called as the mapping,
        /// with .yaml behind it. Read at each start, never written. "" for none.
        preinstalled: Option<PathBuf> = Kind::OptionalPath, Preset::Text("");
        /// Names of the mappings of which a site has one of each, with commas between them: the gateway that leads
        /// its cluster runs them, with the events of all. Without a cluster they are as the others. "" for none.
        singleton: Vec<String> = Kind::Checked(&MAPPING_NAMES), Preset::Text("");
        /// Most events that wait for the mappings.
        queue_events: usize = integer(1, 1_048_576), Preset::Text("8192");
    }
}

section! {
    /// Links to other machines, to which what is in the journal is shipped, and from which commands come.
    UplinkConfig = "uplink" {
        /// File with the links, as TOML. Read at the start. "" has none.
        links_file: Option<PathBuf> = Kind::OptionalPath, Preset::Text("");
        /// Name of this gateway: no other one on the other side of its links has it. "" for the machine's host name.
        gateway: String = Kind::Checked(&WORD), Preset::Text("");
        /// Name of the place with the gateways that belong together.
        site: String = Kind::Checked(&WORD), Preset::Text("site");
    }
}

section! {
    /// Over-the-air updates of the whole system, see docs/ota.md. Read by the unit that installs them, too.
    OtaConfig = "ota" {
        /// URL of the folder with release.json, which says what there is to run. "" has no updates.
        channel: String = Kind::Checked(&URL), Preset::Text("");
        /// Nix binary caches to fetch store paths from, in this order: URLs with commas between them. "" for
        /// the channel itself.
        caches: Vec<String> = Kind::Checked(&URLS), Preset::Text("");
        /// Ed25519 keys, one of which must have signed a release and each of its store paths: name:base64 as
        /// Nix writes them, with commas between them; name:base64@TIME is trusted up to then.
        trusted_keys: Vec<TrustedKey> = Kind::Checked(&PUBLIC_KEYS), Preset::Text("");
        /// Product whose releases fit this gateway.
        product: String = Kind::Checked(&WORD), Preset::Text("headgate");
        /// Version to stay at: release-VERSION.json of the channel is taken instead of release.json. "" for
        /// the newest.
        pin: String = Kind::Checked(&WORD), Preset::Text("");
        /// Systems to keep on the disk, the running one included.
        keep_generations: u32 = integer(2, 16), Preset::Text("3");
        /// Bytes that an update must leave free on the disk of the store.
        min_free_bytes: u64 = bytes(0, (1 << 20) * GIB), Preset::Text("256MiB");
        /// Most bytes a second that are fetched. 0 for no limit.
        max_bytes_per_second: u64 = bytes(0, 64 * GIB), Preset::Text("0");
        /// When the machine may restart into an update, in its own time zone: "02:00-05:00",
        /// "Sat,Sun 22:00-04:00", with ; between several. "" for at once.
        window: Windows = Kind::Checked(&WINDOWS), Preset::Text("");
        /// Whether an update restarts the machine: "window" in the next maintenance window, "never" leaves
        /// it to others.
        reboot: RebootWhen = Kind::Choice(RebootWhen::NAMES), Preset::Text("window");
        /// PEM file of the certificate authorities for https. "" for those that Mozilla trusts.
        ca_file: Option<PathBuf> = Kind::OptionalPath, Preset::Text("");
        /// HTTP proxy, which must allow CONNECT. "" for that of the variables http_proxy, https_proxy and no_proxy.
        proxy: String = Kind::Checked(&URL), Preset::Text("");
        /// How often a new system may be booted before the boot loader goes back to the one before.
        tries: u8 = integer(1, 9), Preset::Text("3");
        /// Where the EFI system partition is mounted.
        esp: PathBuf = Kind::Path { socket: false }, Preset::Text("/boot");
        /// Folder of what updates remember. Belongs to root.
        state: PathBuf = Kind::Path { socket: false }, Preset::Text("/var/lib/headgate-ota");
        /// Folder below which nix/store, run and sys are looked for.
        root: PathBuf = Kind::Path { socket: false }, Preset::Text("/");
        /// The program nix-store, with which paths are registered where Nix is installed. "" where it is not.
        nix_store: Option<PathBuf> = Kind::OptionalPath, Preset::Text("");
        .. health: HealthConfig;
    }
}

section! {
    /// When a new system counts as healthy, and stays.
    HealthConfig = "ota.health" {
        /// Seconds after which a system that is not healthy is left again.
        deadline_s: u32 = integer(10, 3600), Preset::Text("300");
        /// Seconds for which it must have been healthy without a break.
        settle_s: u32 = integer(0, 3600), Preset::Text("15");
        /// Percent of the events a second before the update that must flow again. 0 does not ask for any.
        min_flow_percent: u32 = integer(0, 100), Preset::Text("10");
    }
}

section! {
    /// The HTTP listener for `/metrics`, `/healthz` and `/readyz`.
    MetricsConfig = "metrics" {
        /// Where metrics are served. Port 0 takes a free port; "off" or "" serves none.
        listen: Option<ListenAddress> = Kind::Address, Preset::Text("127.0.0.1:9464");
    }
}

section! {
    /// The interface that the other `headgate` subcommands talk to.
    AdminConfig = "admin" {
        /// Unix socket of the admin API. Its path has at most 107 bytes.
        socket: PathBuf = Kind::Path { socket: true }, Preset::Derived {
            from: "$RUNTIME_DIRECTORY/admin.sock, else admin.sock in store.path",
            example: "/run/headgate/admin.sock",
            derive: resolve::default_admin_socket,
        };
    }
}

section! {
    /// The log, on standard error.
    LogConfig = "log" {
        /// Lines for people or JSON for machines.
        format: LogFormat = Kind::Choice(LogFormat::NAMES), Preset::Text("text");
        /// Which lines are logged: a level (off, error, warn, info, debug, trace), and levels of
        /// single modules after commas.
        level: String = Kind::LogFilter, Preset::Text("info");
    }
}

section! {
    /// How the gateway stops.
    ShutdownConfig = "shutdown" {
        /// Milliseconds that the gateway may take to finish its work after SIGTERM or SIGINT.
        timeout_ms: u64 = integer(1, 600_000), Preset::Text("5000");
    }
}

/// Defaults for the sections that don't depend on where the gateway runs.
macro_rules! defaults {
    ($($name:ident),*) => {
        $(impl Default for $name {
            fn default() -> Self {
                $name::read(&resolve::Presets)
            }
        })*
    };
}

defaults!(
    MqttConfig,
    PipelineConfig,
    BatchConfig,
    AuthConfig,
    TlsConfig,
    WebSocketConfig,
    AppsConfig,
    MappingsConfig,
    OtaConfig,
    MetricsConfig,
    LogConfig,
    ShutdownConfig
);

/// All keys, in the order of the sections.
pub fn keys() -> impl Iterator<Item = &'static Key> + Clone {
    SECTIONS.iter().flat_map(|section| section.all_keys())
}
