//! The file that says where events go and where commands come from. `docs/uplink.md` describes it.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_nats::jetstream::stream::{self, DiscardPolicy};
use serde::Deserialize;
use toml::Spanned;

use super::subject::{Template, token};
use crate::cluster::{LONGEST_TTL, MOST_SHARDS, check_names};
use crate::event::TopicFilter;
use crate::regular_file::{FileError, Flaw, line_of, parse_toml, read_and_parse};
use crate::site;

/// Links to other machines.
#[derive(Clone, Debug, Default)]
pub struct Links {
    pub links: Vec<Link>,
}

#[derive(Clone, Debug)]
pub struct Link {
    pub name: String,
    pub kind: Kind,
    pub servers: Vec<String>,
    pub login: Login,
    pub tls: Tls,
    /// Most bytes on their way without an acknowledgement, for each of `ship`.
    pub max_inflight_bytes: usize,
    /// An event may go from the journal when the other side has had it for so long.
    pub hold: Duration,
    /// For what is asked of the other side, and for its acknowledgements.
    pub timeout: Duration,
    pub session: Session,
    pub ship: Vec<Ship>,
    pub take: Vec<Take>,
    /// The gateways of the site find each other there.
    pub cluster: Option<ClusterSettings>,
}

/// How the gateways of a site divide what there is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterSettings {
    pub shards: u16,
    pub lease_s: u32,
    pub replicas: u8,
}

/// How the gateway is a client of an MQTT broker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    pub client_id: String,
    pub keep_alive_s: u16,
    /// The broker keeps for so long what is to be taken from it while the gateway is away.
    pub expiry_s: u32,
    /// The largest packet that is taken from it.
    pub max_packet_bytes: u32,
    /// The protocol that TLS is to say it carries, where a broker shares its port with others.
    pub alpn: Option<String>,
}

/// What the other side is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    JetStream,
    Mqtt,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::JetStream => "jetstream",
            Kind::Mqtt => "mqtt",
        }
    }
}

/// How the gateway says who it is. Files are read at each attempt to connect.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Login {
    #[default]
    None,
    /// With a certificate in the place of a password.
    User(String),
    Password {
        user: String,
        file: PathBuf,
    },
    Token(PathBuf),
    Nkey(PathBuf),
    Credentials(PathBuf),
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tls {
    pub ca_file: Option<PathBuf>,
    /// The gateway's own certificate, and its key.
    pub own: Option<(PathBuf, PathBuf)>,
}

/// What is shipped.
#[derive(Clone, Debug)]
pub struct Ship {
    pub topics: Vec<TopicFilter>,
    /// Unique in its link: it names the cursor.
    pub name: String,
    pub to: Destination,
    /// Where to begin when there is no cursor yet.
    pub start: Start,
}

#[derive(Clone, Debug)]
pub enum Destination {
    Stream {
        stream: String,
        subject: Template,
        exclusive: bool,
        /// Made with these settings if it is not there.
        create: Option<Box<stream::Config>>,
    },
    Topic {
        prefixes: Prefixes,
        /// The broker is to keep the last message of each topic.
        retain: bool,
    },
}

impl Destination {
    pub fn retains(&self) -> bool {
        matches!(self, Destination::Topic { retain: true, .. })
    }

    /// Nobody else writes there.
    pub fn is_exclusive(&self) -> bool {
        matches!(
            self,
            Destination::Stream {
                exclusive: true,
                ..
            }
        )
    }
}

/// How a topic here becomes one at a broker, or the other way round.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prefixes {
    /// Taken away, where a topic begins with it.
    pub strip: String,
    /// Put before what is left.
    pub add: String,
}

impl Prefixes {
    pub fn apply(&self, topic: &str) -> String {
        format!(
            "{}{}",
            self.add,
            topic.strip_prefix(self.strip.as_str()).unwrap_or(topic)
        )
    }
}

/// Where a link begins that has never shipped anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Start {
    /// With what comes.
    #[default]
    New,
    /// With the oldest that there is.
    Oldest,
}

/// What is taken from the other side.
#[derive(Clone, Debug)]
pub struct Take {
    pub name: String,
    pub from: Source,
    /// Where to begin in a stream that nothing was taken from before.
    pub start: Start,
}

#[derive(Clone, Debug)]
pub enum Source {
    Stream {
        stream: String,
        subjects: Vec<String>,
        /// Put before the topic that the subject is.
        add: String,
        /// So many levels of it are left out first.
        skip_levels: usize,
    },
    Topics {
        filters: Vec<TopicFilter>,
        prefixes: Prefixes,
    },
}

/// Who this gateway is.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    pub gateway: &'a str,
    pub site: &'a str,
}

impl Links {
    pub fn read(path: &Path, place: Place<'_>) -> Result<Links, FileError> {
        let if_missing = "make it, or set uplink.links_file to \"\"";
        let mut links = read_and_parse(path, if_missing, |contents| parse(contents, place))?;
        // What it names lies beside it.
        let folder = path.parent().unwrap_or(Path::new(""));
        for link in &mut links.links {
            for file in link.files() {
                *file = folder.join(&*file);
            }
        }
        Ok(links)
    }

    /// All that is shipped, which the journal therefore is to have.
    pub fn topics(&self) -> Vec<TopicFilter> {
        let ships = self.links.iter().flat_map(|link| &link.ship);
        ships.flat_map(|ship| ship.topics.iter().cloned()).collect()
    }
}

impl Links {
    /// Whether this gateway is one of a site that shares work.
    pub fn share_work(&self) -> bool {
        self.links.iter().any(|link| link.cluster.is_some())
    }

    /// Whether events come by any of them.
    pub fn take_anything(&self) -> bool {
        self.links.iter().any(|link| !link.take.is_empty())
    }
}

impl Link {
    /// Marks in the journal what came by it.
    pub fn origin(&self) -> u32 {
        crc32c::crc32c(self.name.as_bytes())
    }

    /// Whether this is what the apps of the site get.
    pub fn is_shared(&self, ship: &Ship) -> bool {
        self.cluster.is_some() && ship.name == SITE
    }

    /// What of this gateway's the apps of the site get.
    pub fn shared_topics(&self) -> Vec<TopicFilter> {
        let shared = self.ship.iter().find(|ship| self.is_shared(ship));
        shared.map_or_else(Vec::new, |ship| ship.topics.clone())
    }

    fn files(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let login = match &mut self.login {
            Login::None | Login::User(_) => None,
            Login::Password { file, .. }
            | Login::Token(file)
            | Login::Nkey(file)
            | Login::Credentials(file) => Some(file),
        };
        let own = self.tls.own.as_mut();
        let own = own
            .into_iter()
            .flat_map(|(certificate, key)| [certificate, key]);
        login.into_iter().chain(&mut self.tls.ca_file).chain(own)
    }
}

/// The file as it stands there.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LinksFile {
    #[serde(default)]
    link: Vec<Spanned<LinkEntry>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LinkEntry {
    name: Spanned<String>,
    kind: Kind,
    servers: Spanned<Vec<Spanned<String>>>,
    user: Option<String>,
    password_file: Option<PathBuf>,
    token_file: Option<PathBuf>,
    nkey_file: Option<PathBuf>,
    credentials_file: Option<PathBuf>,
    ca_file: Option<PathBuf>,
    certificate_file: Option<PathBuf>,
    key_file: Option<PathBuf>,
    max_inflight_bytes: Option<Spanned<u64>>,
    hold_s: Option<Spanned<u64>>,
    timeout_ms: Option<Spanned<u64>>,
    client_id: Option<Spanned<String>>,
    keep_alive_s: Option<Spanned<u64>>,
    session_expiry_s: Option<Spanned<u64>>,
    max_packet_bytes: Option<Spanned<u64>>,
    alpn: Option<Spanned<String>>,
    #[serde(default)]
    ship: Vec<Spanned<ShipEntry>>,
    #[serde(default)]
    take: Vec<Spanned<TakeEntry>>,
    cluster: Option<Spanned<ClusterEntry>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ShipEntry {
    topics: Vec<Spanned<String>>,
    name: Option<Spanned<String>>,
    #[serde(default)]
    start: Start,
    stream: Option<Spanned<String>>,
    subject: Option<Spanned<String>>,
    exclusive: Option<Spanned<bool>>,
    create: Option<Spanned<Create>>,
    add_prefix: Option<Spanned<String>>,
    strip_prefix: Option<Spanned<String>>,
    retain: Option<Spanned<bool>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ClusterEntry {
    #[serde(default = "sixteen")]
    shards: u16,
    #[serde(default = "five")]
    lease_s: u32,
    #[serde(default = "three")]
    replicas: u8,
    /// What the gateways share.
    #[serde(default)]
    topics: Vec<Spanned<String>>,
    #[serde(default = "a_gibibyte")]
    max_bytes: u64,
    #[serde(default = "a_week")]
    max_age_s: u64,
}

/// The settings of a stream that the gateway makes.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Create {
    subjects: Option<Vec<String>>,
    #[serde(default = "three")]
    replicas: u8,
    max_bytes: Option<u64>,
    max_age_s: Option<u64>,
    duplicate_window_s: Option<u64>,
    /// What is done when it is full.
    #[serde(default)]
    discard: Discard,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Discard {
    #[default]
    Old,
    New,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TakeEntry {
    name: Option<Spanned<String>>,
    #[serde(default)]
    start: Start,
    stream: Option<Spanned<String>>,
    subjects: Option<Vec<Spanned<String>>>,
    skip_levels: Option<Spanned<usize>>,
    topics: Option<Vec<Spanned<String>>>,
    add_prefix: Option<Spanned<String>>,
    strip_prefix: Option<Spanned<String>>,
}

/// The cursor of what the gateways of a site share.
const SITE: &str = "site";

fn sixteen() -> u16 {
    16
}

fn five() -> u32 {
    5
}

fn a_gibibyte() -> u64 {
    1 << 30
}

fn a_week() -> u64 {
    7 * 86_400
}

fn three() -> u8 {
    3
}

fn ten_minutes() -> u64 {
    600
}

/// A flaw and where it is.
type At = (Range<usize>, String);

pub(super) fn parse(contents: &[u8], place: Place<'_>) -> Result<Links, Flaw> {
    let file: LinksFile = parse_toml(contents)?;
    let mut links: Vec<Link> = Vec::new();
    for entry in file.link {
        let span = entry.span();
        let flaw = |(span, reason): At| Flaw {
            line: Some(line_of(contents, span.start)),
            reason,
        };
        let link = link(entry.into_inner(), span.clone(), place).map_err(flaw)?;
        if links.iter().any(|other| other.name == link.name) {
            let reason = format!(
                "two links are named {:?}; their cursors go by it",
                link.name
            );
            return Err(flaw((span, reason)));
        }
        if link.cluster.is_some() && links.iter().any(|other| other.cluster.is_some()) {
            let reason = "two links have a cluster, and a site has one";
            return Err(flaw((span, reason.into())));
        }
        links.push(link);
    }
    Ok(Links { links })
}

fn link(entry: LinkEntry, span: Range<usize>, place: Place<'_>) -> Result<Link, At> {
    let name = name(entry.name)?;
    let login = login(
        [entry.token_file, entry.nkey_file, entry.credentials_file],
        entry.user,
        entry.password_file,
        entry.kind == Kind::Mqtt && entry.certificate_file.is_some(),
    )
    .map_err(|reason| (span.clone(), format!("link {name:?}: {reason}")))?;
    if entry.kind == Kind::Mqtt
        && !matches!(login, Login::None | Login::User(_) | Login::Password { .. })
    {
        let reason = format!("link {name:?}: an MQTT broker takes user and password_file");
        return Err((span, reason));
    }
    let own = match (entry.certificate_file, entry.key_file) {
        (Some(certificate), Some(key)) => Some((certificate, key)),
        (None, None) => None,
        _ => {
            let reason = format!("link {name:?}: certificate_file and key_file go together");
            return Err((span, reason));
        }
    };
    let is_plain = |server: &Spanned<String>| server.get_ref().starts_with("mqtt:");
    let plain = entry
        .servers
        .get_ref()
        .iter()
        .find(|server| is_plain(server));
    if let Some(plain) = plain
        && (entry.ca_file.is_some() || own.is_some() || entry.alpn.is_some())
    {
        let reason = format!(
            "server {:?} has no TLS, although the link has files or alpn for it: write mqtts://, or leave them out",
            plain.get_ref()
        );
        return Err((plain.span(), reason));
    }
    let servers = servers(entry.kind, entry.servers)?;
    let session = session(
        entry.kind,
        &name,
        place,
        entry.client_id,
        [
            ("keep_alive_s", entry.keep_alive_s),
            ("session_expiry_s", entry.session_expiry_s),
            ("max_packet_bytes", entry.max_packet_bytes),
        ],
        entry.alpn,
    )?;
    let mut ships: Vec<Ship> = Vec::new();
    for entry_of in entry.ship {
        let span = entry_of.span();
        let ship = ship(entry.kind, entry_of, place)?;
        for other in &ships {
            if other.name == ship.name {
                let reason = format!(
                    "link {name:?} ships twice as {:?}; give one of them a name of its own",
                    ship.name
                );
                return Err((span, reason));
            }
            if let (
                Destination::Stream {
                    stream, exclusive, ..
                },
                Destination::Stream {
                    stream: other,
                    exclusive: too,
                    ..
                },
            ) = (&ship.to, &other.to)
                && stream == other
                && (*exclusive || *too)
            {
                let reason = format!(
                    "stream {stream:?} is exclusive, so only one [[link.ship]] can write to it: put the topics of \
                     both into one, or set exclusive = false in both"
                );
                return Err((span, reason));
            }
        }
        ships.push(ship);
    }
    let mut takes: Vec<Take> = Vec::new();
    for entry_of in entry.take {
        let span = entry_of.span();
        let take = take(entry.kind, entry_of, place)?;
        if takes.iter().any(|other| other.name == take.name) {
            let reason = format!(
                "link {name:?} takes twice as {:?}; give one of them a name of its own",
                take.name
            );
            return Err((span, reason));
        }
        takes.push(take);
    }
    if ships.is_empty() && takes.is_empty() && entry.cluster.is_none() {
        let reason = format!("link {name:?} does nothing; add [[link.ship]] or [[link.take]]");
        return Err((span, reason));
    }
    if entry.kind == Kind::Mqtt {
        only_for(Kind::JetStream, "cluster", entry.cluster.as_ref())?;
    }
    let cluster = match entry.cluster {
        Some(entry) => {
            let span = entry.span();
            let (settings, shared) = cluster(entry, place)?;
            if let Some(shared) = shared {
                if ships.iter().any(|ship| ship.name == shared.name) {
                    let reason = format!(
                        "[[link.ship]] of link {name:?} has the name {SITE:?}, which is that of what the site shares"
                    );
                    return Err((span, reason));
                }
                let names = site::Names::new(place.site);
                for ship in &ships {
                    if let Destination::Stream { stream, .. } = &ship.to
                        && names.has(stream)
                    {
                        let reason = format!(
                            "stream {stream:?} of a [[link.ship]] is the cluster's own: name another one there"
                        );
                        return Err((span, reason));
                    }
                }
                ships.push(shared);
            }
            Some(settings)
        }
        None => None,
    };
    let number = |key, value, min, max, preset| {
        number(key, value, min, max).map(|value| value.unwrap_or(preset))
    };
    let max_inflight = number(
        "max_inflight_bytes",
        entry.max_inflight_bytes,
        64 << 10,
        1 << 30,
        8 << 20,
    )?;
    let hold_s = number("hold_s", entry.hold_s, 0, 30 * 86_400, 180)?;
    let timeout_ms = number("timeout_ms", entry.timeout_ms, 100, 600_000, 5_000)?;
    Ok(Link {
        name,
        kind: entry.kind,
        servers,
        login,
        tls: Tls {
            ca_file: entry.ca_file,
            own,
        },
        max_inflight_bytes: max_inflight as usize,
        hold: Duration::from_secs(hold_s),
        timeout: Duration::from_millis(timeout_ms),
        session,
        ship: ships,
        take: takes,
        cluster,
    })
}

/// What the site shares is shipped like anything else.
fn cluster(
    entry: Spanned<ClusterEntry>,
    place: Place<'_>,
) -> Result<(ClusterSettings, Option<Ship>), At> {
    let span = entry.span();
    let entry = entry.into_inner();
    let settings = ClusterSettings {
        shards: entry.shards,
        lease_s: entry.lease_s,
        replicas: entry.replicas,
    };
    check_names(place.site, place.gateway).map_err(|error| (span.clone(), error.to_string()))?;
    let in_range = |key, value: u64, min, max| {
        let value = Spanned::new(span.clone(), value);
        number(key, Some(value), min, max).map(drop)
    };
    in_range("shards", settings.shards.into(), 1, MOST_SHARDS.into())?;
    in_range("lease_s", settings.lease_s.into(), 1, LONGEST_TTL.as_secs())?;
    in_range("replicas", settings.replicas.into(), 1, 5)?;
    in_range("max_bytes", entry.max_bytes, 1 << 20, 1 << 50)?;
    in_range("max_age_s", entry.max_age_s, 60, 10 * 365 * 86_400)?;
    if entry.topics.is_empty() {
        return Ok((settings, None));
    }
    let template = Template::parse(site::Names::SUBJECT, place);
    let subject = template
        .map_err(|reason| (span.clone(), reason))?
        .in_shards(settings.shards);
    let stream = site::Names::new(place.site).events_stream(place.gateway);
    let create = stream::Config {
        name: stream.clone(),
        subjects: vec![subject.covering()],
        num_replicas: settings.replicas.into(),
        max_bytes: entry.max_bytes as i64,
        max_age: Duration::from_secs(entry.max_age_s),
        duplicate_window: Duration::from_secs(ten_minutes().min(entry.max_age_s)),
        discard: DiscardPolicy::Old,
        ..stream::Config::default()
    };
    let shared = Ship {
        topics: shipped(entry.topics, span)?,
        name: SITE.into(),
        to: Destination::Stream {
            stream,
            subject,
            exclusive: true,
            create: Some(Box::new(create)),
        },
        start: Start::New,
    };
    Ok((settings, Some(shared)))
}

fn session(
    kind: Kind,
    link: &str,
    place: Place<'_>,
    client_id: Option<Spanned<String>>,
    numbers: [(&str, Option<Spanned<u64>>); 3],
    alpn: Option<Spanned<String>>,
) -> Result<Session, At> {
    if kind != Kind::Mqtt {
        only_for(Kind::Mqtt, "client_id", client_id.as_ref())?;
        only_for(Kind::Mqtt, "alpn", alpn.as_ref())?;
        for (key, value) in &numbers {
            only_for(Kind::Mqtt, key, value.as_ref())?;
        }
    }
    let checked = |key: &str, value: Option<Spanned<String>>, most: usize| match value {
        Some(value) if !(1..=most).contains(&value.get_ref().len()) => {
            Err((value.span(), format!("{key} must have 1 to {most} bytes")))
        }
        value => Ok(value.map(Spanned::into_inner)),
    };
    let client_id = checked("client_id", client_id, 1024)?;
    let [(_, keep_alive), (_, expiry), (_, max_packet)] = numbers;
    let keep_alive = number("keep_alive_s", keep_alive, 5, 65_535)?;
    let expiry = number("session_expiry_s", expiry, 0, u64::from(u32::MAX))?;
    let max_packet = number("max_packet_bytes", max_packet, 1 << 10, 256 << 20)?;
    Ok(Session {
        client_id: match client_id {
            Some(client_id) => place.fill(&client_id),
            None => format!("headgate-{}-{link}", place.gateway),
        },
        keep_alive_s: keep_alive.unwrap_or(30) as u16,
        expiry_s: expiry.unwrap_or(86_400) as u32,
        max_packet_bytes: max_packet.unwrap_or(1 << 20) as u32,
        alpn: checked("alpn", alpn, 255)?,
    })
}

fn servers(kind: Kind, servers: Spanned<Vec<Spanned<String>>>) -> Result<Vec<String>, At> {
    let schemes: &[&str] = match kind {
        Kind::JetStream => &["nats", "tls"],
        Kind::Mqtt => &["mqtt", "mqtts"],
    };
    if servers.get_ref().is_empty() {
        let reason = format!("servers is empty; name one, as {}://host:port", schemes[0]);
        return Err((servers.span(), reason));
    }
    let servers = servers.into_inner().into_iter().map(|server| {
        let span = server.span();
        let server = server.into_inner();
        let flaw = |reason: String| (span.clone(), format!("server {server:?}: {reason}"));
        let uri: axum::http::Uri = server.parse().map_err(|error| flaw(format!("{error}")))?;
        let scheme = uri.scheme_str().unwrap_or_default();
        if !schemes.contains(&scheme) {
            return Err(flaw(format!("begins with {}://", schemes.join(":// or "))));
        }
        let authority = uri.authority().map_or("", |authority| authority.as_str());
        if authority.contains('@') {
            return Err(flaw(
                "passwords don't belong here: set user and password_file".into(),
            ));
        }
        let port = authority.rsplit_once(':').map(|(_, port)| port);
        // The end of an address of IPv6 is none.
        let port = port.filter(|port| !port.ends_with(']'));
        if port.is_some_and(|port| !port.parse().is_ok_and(|port: u16| port > 0)) {
            return Err(flaw("its port must be 1 to 65535".into()));
        }
        match uri.host().is_none_or(str::is_empty) || !matches!(uri.path(), "" | "/") {
            true => Err(flaw(format!("is {}://host:port", schemes[0]))),
            false => Ok(server),
        }
    });
    servers.collect()
}

fn login(
    [token, nkey, credentials]: [Option<PathBuf>; 3],
    user: Option<String>,
    password: Option<PathBuf>,
    with_certificate: bool,
) -> Result<Login, String> {
    let mut logins = vec![
        token.map(Login::Token),
        nkey.map(Login::Nkey),
        credentials.map(Login::Credentials),
    ];
    logins.push(match (user, password) {
        (Some(user), Some(file)) => Some(Login::Password { user, file }),
        (Some(user), None) if with_certificate => Some(Login::User(user)),
        (None, None) => None,
        _ => return Err("user and password_file go together".into()),
    });
    let mut logins = logins.into_iter().flatten();
    match (logins.next(), logins.next()) {
        (login, None) => Ok(login.unwrap_or_default()),
        _ => Err("more than one way to log in; leave one of user, token_file, nkey_file and credentials_file".into()),
    }
}

fn ship(kind: Kind, entry: Spanned<ShipEntry>, place: Place<'_>) -> Result<Ship, At> {
    let span = entry.span();
    let entry = entry.into_inner();
    let topics = shipped(entry.topics, span.clone())?;
    let to = match kind {
        Kind::JetStream => {
            only_for(Kind::Mqtt, "add_prefix", entry.add_prefix.as_ref())?;
            only_for(Kind::Mqtt, "strip_prefix", entry.strip_prefix.as_ref())?;
            only_for(Kind::Mqtt, "retain", entry.retain.as_ref())?;
            let Some(stream) = entry.stream else {
                return Err((
                    span,
                    "stream is missing: the name of the stream that gets these events".into(),
                ));
            };
            let stream = stream_name(stream, place)?;
            let subject = match entry.subject {
                Some(subject) => {
                    let span = subject.span();
                    Template::parse(subject.get_ref(), place).map_err(|reason| (span, reason))?
                }
                None => Template::parse("headgate.{gateway}.{topic}", place)
                    .map_err(|reason| (span, reason))?,
            };
            let create = entry.create.map(|entry| create(entry, &stream, &subject));
            let create = create.transpose()?;
            Destination::Stream {
                exclusive: entry.exclusive.is_none_or(Spanned::into_inner),
                stream,
                subject,
                create,
            }
        }
        Kind::Mqtt => {
            only_for(Kind::JetStream, "stream", entry.stream.as_ref())?;
            only_for(Kind::JetStream, "subject", entry.subject.as_ref())?;
            only_for(Kind::JetStream, "exclusive", entry.exclusive.as_ref())?;
            only_for(Kind::JetStream, "create", entry.create.as_ref())?;
            Destination::Topic {
                prefixes: Prefixes {
                    add: prefix("add_prefix", entry.add_prefix, place)?,
                    strip: prefix("strip_prefix", entry.strip_prefix, place)?,
                },
                retain: entry.retain.is_some_and(Spanned::into_inner),
            }
        }
    };
    let preset = match &to {
        Destination::Stream { stream, .. } => stream.clone(),
        Destination::Topic { .. } => "ship".into(),
    };
    Ok(Ship {
        topics,
        name: entry.name.map(name).transpose()?.unwrap_or(preset),
        to,
        start: entry.start,
    })
}

fn create(
    entry: Spanned<Create>,
    stream: &str,
    subject: &Template,
) -> Result<Box<stream::Config>, At> {
    let span = entry.span();
    let Create {
        subjects,
        replicas,
        max_bytes,
        max_age_s,
        duplicate_window_s,
        discard,
    } = entry.into_inner();
    let in_range = |key, value: Option<u64>, max| {
        number(
            key,
            value.map(|value| Spanned::new(span.clone(), value)),
            1,
            max,
        )
    };
    let decade = 10 * 365 * 86_400;
    let max_age_s = in_range("max_age_s", max_age_s, decade)?;
    // A server takes no window that is longer than the age.
    let longest_window = max_age_s.unwrap_or(decade);
    let window_s = in_range("duplicate_window_s", duplicate_window_s, longest_window)?;
    let covering = subject.covering();
    let subjects = subjects.unwrap_or_else(|| vec![covering.clone()]);
    if let Some(wrong) = subjects.iter().find(|one| !super::subject::is_filter(one)) {
        let reason = format!(
            "{wrong:?} in subjects is no subject: tokens with . between them, * for one, > for the rest"
        );
        return Err((span, reason));
    }
    if !super::stream::covers(&subjects, &covering) {
        let reason = format!("subjects has to cover what is shipped there, which is {covering:?}");
        return Err((span, reason));
    }
    in_range("replicas", Some(replicas.into()), 5)?;
    Ok(Box::new(stream::Config {
        name: stream.to_owned(),
        subjects,
        num_replicas: replicas.into(),
        max_bytes: in_range("max_bytes", max_bytes, i64::MAX as u64)?
            .map_or(-1, |bytes| bytes as i64),
        max_age: Duration::from_secs(max_age_s.unwrap_or(0)),
        duplicate_window: Duration::from_secs(
            window_s.unwrap_or_else(|| ten_minutes().min(longest_window)),
        ),
        discard: match discard {
            Discard::Old => DiscardPolicy::Old,
            Discard::New => DiscardPolicy::New,
        },
        ..stream::Config::default()
    }))
}

fn take(kind: Kind, entry: Spanned<TakeEntry>, place: Place<'_>) -> Result<Take, At> {
    let span = entry.span();
    let entry = entry.into_inner();
    let add = prefix("add_prefix", entry.add_prefix, place)?;
    let from = match kind {
        Kind::JetStream => {
            only_for(
                Kind::Mqtt,
                "topics",
                entry.topics.as_ref().and_then(|topics| topics.first()),
            )?;
            only_for(Kind::Mqtt, "strip_prefix", entry.strip_prefix.as_ref())?;
            let (Some(stream), Some(subjects)) = (entry.stream, entry.subjects) else {
                return Err((
                    span,
                    "stream and subjects say what is taken from where; one is missing".into(),
                ));
            };
            // As they are in what is shipped.
            let tokens = Place {
                gateway: &token(place.gateway),
                site: &token(place.site),
            };
            let subjects = subjects.into_iter().map(|subject| {
                let filled = tokens.fill(subject.get_ref());
                match super::subject::is_filter(&filled) {
                    true => Ok(filled),
                    false => Err((
                        subject.span(),
                        format!("{filled:?} is no subject: tokens with . between them, * for one, > for the rest"),
                    )),
                }
            });
            let subjects: Vec<String> = subjects.collect::<Result<_, _>>()?;
            let leaves_nothing = |skip: usize| {
                let short = |subject: &String| {
                    !subject.ends_with('>') && subject.split('.').count() <= skip
                };
                subjects.iter().find(|subject| short(subject))
            };
            let skip_levels = match entry.skip_levels {
                Some(skip) if let Some(subject) = leaves_nothing(*skip.get_ref()) => {
                    let reason = format!("skip_levels leaves nothing of {subject:?} for a topic");
                    return Err((skip.span(), reason));
                }
                skip => skip.map_or(0, Spanned::into_inner),
            };
            Source::Stream {
                stream: stream_name(stream, place)?,
                subjects,
                add,
                skip_levels,
            }
        }
        Kind::Mqtt => {
            only_for(Kind::JetStream, "stream", entry.stream.as_ref())?;
            let subjects = entry
                .subjects
                .as_ref()
                .and_then(|subjects| subjects.first());
            only_for(Kind::JetStream, "subjects", subjects)?;
            only_for(Kind::JetStream, "skip_levels", entry.skip_levels.as_ref())?;
            let topics = entry.topics.unwrap_or_default().into_iter().map(|topic| {
                let span = topic.span();
                let filled = place.fill(topic.get_ref());
                match filled.starts_with("$share/") {
                    true => Err((
                        span,
                        format!("{filled:?} is shared with others, and a link takes what is meant for this gateway"),
                    )),
                    false => Ok(Spanned::new(span, filled)),
                }
            });
            Source::Topics {
                filters: filters(topics.collect::<Result<_, _>>()?, span)?,
                prefixes: Prefixes {
                    add,
                    strip: prefix("strip_prefix", entry.strip_prefix, place)?,
                },
            }
        }
    };
    let preset = match &from {
        Source::Stream { stream, .. } => stream.clone(),
        Source::Topics { .. } => "take".into(),
    };
    Ok(Take {
        name: entry.name.map(name).transpose()?.unwrap_or(preset),
        from,
        start: entry.start,
    })
}

fn only_for<T>(kind: Kind, key: &str, value: Option<&Spanned<T>>) -> Result<(), At> {
    let Some(value) = value else {
        return Ok(());
    };
    let kind = kind.as_str();
    Err((
        value.span(),
        format!("{key} is for links of kind {kind:?}; leave it out"),
    ))
}

fn name(name: Spanned<String>) -> Result<String, At> {
    let is_part = |part: char| part.is_ascii_alphanumeric() || part == '-' || part == '_';
    let is_name = |name: &str| (1..=64).contains(&name.len()) && name.chars().all(is_part);
    match is_name(name.get_ref()) {
        true => Ok(name.into_inner()),
        false => Err((
            name.span(),
            format!(
                "name is {:?}, and must be 1 to 64 of A-Z, a-z, 0-9, - and _",
                name.get_ref()
            ),
        )),
    }
}

fn stream_name(stream: Spanned<String>, place: Place<'_>) -> Result<String, At> {
    let filled = place.fill(stream.get_ref());
    let is_legal =
        |part: char| !part.is_whitespace() && !part.is_control() && !".*>/\\{}".contains(part);
    match !filled.is_empty() && filled.len() <= 255 && filled.chars().all(is_legal) {
        true => Ok(filled),
        false => Err((
            stream.span(),
            format!(
                "{filled:?} is no name of a stream: 1 to 255 characters without space . * > / \\; {{gateway}} and \
                 {{site}} are filled in"
            ),
        )),
    }
}

/// Filters of what is shipped.
fn shipped(topics: Vec<Spanned<String>>, span: Range<usize>) -> Result<Vec<TopicFilter>, At> {
    if let Some(topic) = topics.iter().find(|topic| topic.get_ref().starts_with('$')) {
        let reason = format!(
            "topics has {:?}: what is on topics that begin with $ is not in the journal, and is not shipped",
            topic.get_ref()
        );
        return Err((topic.span(), reason));
    }
    filters(topics, span)
}

fn filters(topics: Vec<Spanned<String>>, span: Range<usize>) -> Result<Vec<TopicFilter>, At> {
    if topics.is_empty() {
        return Err((
            span,
            "topics is missing or empty; [\"#\"] stands for all topics".into(),
        ));
    }
    let topics = topics.into_iter().map(|topic| {
        let span = topic.span();
        let filter = TopicFilter::new(topic.get_ref().as_str());
        filter.map_err(|error| (span, format!("topics has {:?}: {error}", topic.get_ref())))
    });
    topics.collect()
}

fn prefix(key: &str, prefix: Option<Spanned<String>>, place: Place<'_>) -> Result<String, At> {
    let Some(prefix) = prefix else {
        return Ok(String::new());
    };
    let filled = place.fill(prefix.get_ref());
    match filled.contains(['+', '#', '\0', '{', '}']) || filled.len() > 1024 {
        true => Err((
            prefix.span(),
            format!(
                "{key} is {filled:?}, and must be the beginning of a topic, without + and #; {{gateway}} and {{site}} \
                 are filled in"
            ),
        )),
        false => Ok(filled),
    }
}

fn number(key: &str, value: Option<Spanned<u64>>, min: u64, max: u64) -> Result<Option<u64>, At> {
    match value {
        Some(value) if !(min..=max).contains(value.get_ref()) => Err((
            value.span(),
            format!("{key} is {}, and must be {min} to {max}", value.get_ref()),
        )),
        value => Ok(value.map(Spanned::into_inner)),
    }
}

impl Place<'_> {
    /// Puts the names in.
    pub fn fill(&self, text: &str) -> String {
        text.replace("{gateway}", self.gateway)
            .replace("{site}", self.site)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place<'static> = Place {
        gateway: "press-7",
        site: "north",
    };

    fn flaw(text: &str) -> (usize, String) {
        let flaw = parse(text.as_bytes(), PLACE).unwrap_err();
        (flaw.line.unwrap(), flaw.reason)
    }

    #[test]
    fn a_file_with_all_that_there_is() {
        let links = parse(
            br#"
            [[link]]
            name = "cloud"
            kind = "jetstream"
            servers = ["nats://10.0.0.1:4222", "tls://b:4222"]
            credentials_file = "cloud.creds"
            ca_file = "ca.pem"
            certificate_file = "own.pem"
            key_file = "own.key"
            max_inflight_bytes = 1048576
            hold_s = 60
            timeout_ms = 2000

            [[link.ship]]
            topics = ["plant/#", "alarms/#"]
            stream = "HEADGATE_{gateway}"
            subject = "site.{site}.{topic}"
            start = "oldest"
            create = { replicas = 1, max_bytes = 1000, discard = "new" }

            [[link.take]]
            stream = "COMMANDS"
            subjects = ["cmd.{gateway}.>"]
            add_prefix = "cmd/"
            skip_levels = 2

            [[link]]
            name = "hosted"
            kind = "mqtt"
            servers = ["mqtts://broker:8883"]
            user = "u"
            password_file = "/p"
            [[link.ship]]
            topics = ["plant/#"]
            add_prefix = "sites/{site}/"
            strip_prefix = "plant/"
            [[link.take]]
            topics = ["sites/{site}/cmd/#"]
            strip_prefix = "sites/north/"
            "#,
            PLACE,
        )
        .unwrap();
        let [cloud, hosted] = &links.links[..] else {
            panic!("two links");
        };
        assert_eq!(cloud.login, Login::Credentials("cloud.creds".into()));
        assert_eq!(cloud.ship[0].name, "HEADGATE_press-7");
        let Destination::Stream {
            exclusive: true,
            create: Some(create),
            ..
        } = &cloud.ship[0].to
        else {
            panic!("{:?}", cloud.ship[0].to);
        };
        assert_eq!(create.subjects, ["site.north.>"]);
        assert_eq!(
            (create.num_replicas, create.discard),
            (1, DiscardPolicy::New)
        );
        let Source::Stream { subjects, .. } = &cloud.take[0].from else {
            panic!("{:?}", cloud.take[0].from);
        };
        assert_eq!(subjects, &["cmd.press-7.>"]);
        let Destination::Topic { prefixes, retain } = &hosted.ship[0].to else {
            panic!("{:?}", hosted.ship[0].to);
        };
        assert_eq!(prefixes.apply("plant/a/b"), "sites/north/a/b");
        assert_eq!(prefixes.apply("a/plant/b"), "sites/north/a/plant/b");
        assert!(!retain);
        assert_eq!(hosted.session.client_id, "headgate-press-7-hosted");
        let Source::Topics { filters, .. } = &hosted.take[0].from else {
            panic!("{:?}", hosted.take[0].from);
        };
        assert_eq!(filters[0].as_str(), "sites/north/cmd/#");
        assert_eq!(links.topics().len(), 3);
    }

    #[test]
    fn each_wrong_link_gets_one_error_with_its_line() {
        let link = "[[link]]\nname = \"a\"\nkind = \"jetstream\"\nservers = [\"nats://h:1\"]\n";
        let ship = "[[link.ship]]\ntopics = [\"#\"]\nstream = \"S\"\n";
        let mqtt = "[[link]]\nname = \"a\"\nkind = \"mqtt\"\nservers = [\"mqtt://h\"]\n\
                    [[link.ship]]\ntopics = [\"#\"]\n";
        let cases = [
            (link.to_owned(), 1, "does nothing"),
            (
                format!("{link}[[link.ship]]\ntopics = [\"#\"]\n"),
                5,
                "stream is missing",
            ),
            (
                format!("{link}[[link.ship]]\ntopics = [\"a/#/b\"]\nstream = \"S\"\n"),
                6,
                "#",
            ),
            (
                format!("{link}[[link.ship]]\ntopics = []\nstream = \"S\"\n"),
                5,
                "empty",
            ),
            (format!("{link}{ship}subject = \"a b\"\n"), 8, "a b"),
            (format!("{link}{ship}{ship}"), 8, "twice"),
            (format!("{link}{ship}{ship}name = \"b\"\n"), 8, "exclusive"),
            (format!("{link}{ship}add_prefix = \"b\"\n"), 8, "mqtt"),
            (
                format!("{link}token_file = \"a\"\nnkey_file = \"b\"\n{ship}"),
                1,
                "more than one way",
            ),
            (format!("{link}user = \"a\"\n{ship}"), 1, "go together"),
            (format!("{link}key_file = \"a\"\n{ship}"), 1, "go together"),
            (
                format!("{link}timeout_ms = 1\n{ship}"),
                5,
                "timeout_ms is 1",
            ),
            (format!("{link}bogus = 1\n{ship}"), 5, "bogus"),
            (format!("{link}{ship}{link}{ship}"), 8, "two links"),
            (
                format!("{link}cluster = {{ lease_s = 0 }}\n"),
                5,
                "lease_s is 0",
            ),
            (format!("{link}cluster = {{ shards = 1, x = 1 }}\n"), 5, "x"),
            (
                format!("{link}cluster = {{ topics = [\"#\"] }}\n{ship}")
                    .replace("\"S\"", "\"HEADGATE_{site}_STATE\""),
                5,
                "the cluster's own",
            ),
            (
                format!("{link}{ship}create = {{ replicas = 6 }}\n"),
                8,
                "1 to 5",
            ),
            (
                format!("{link}{ship}create = {{ max_bytes = 0 }}\n"),
                8,
                "max_bytes is 0",
            ),
            (
                format!("{link}{ship}create = {{ max_age_s = 60, duplicate_window_s = 61 }}\n"),
                8,
                "1 to 60",
            ),
            (
                format!("{link}{ship}create = {{ subjects = [\"a..b\"] }}\n"),
                8,
                "no subject",
            ),
            (
                format!("{link}{ship}create = {{ subjects = [\"other.>\"] }}\n"),
                8,
                "has to cover",
            ),
            (
                format!("{link}{ship}").replace("nats://h:1", "http://h"),
                4,
                "nats:// or tls://",
            ),
            (
                format!("{link}{ship}").replace("nats://h:1", "nats://u:p@h"),
                4,
                "password_file",
            ),
            (
                format!("{link}{ship}").replace("\"nats://h:1\"", ""),
                4,
                "empty",
            ),
            (
                format!("{link}{ship}").replace("\"a\"", "\"a b\""),
                2,
                "name is",
            ),
            (
                format!("{link}{ship}").replace("\"S\"", "\"a.b\""),
                7,
                "no name of a stream",
            ),
            (
                format!("{link}[[link.take]]\nstream = \"S\"\n"),
                5,
                "subjects",
            ),
            (
                format!("{link}[[link.take]]\nstream = \"S\"\nsubjects = [\"a..b\"]\n"),
                7,
                "no subject",
            ),
            (
                format!("{link}client_id = \"a\"\n{ship}"),
                5,
                "client_id is for links of kind \"mqtt\"",
            ),
            (
                format!("{mqtt}retain = true\nstream = \"S\"\n"),
                8,
                "stream is for",
            ),
            (
                format!("{mqtt}[[link.take]]\ntopics = [\"$share/g/a\"]\n"),
                8,
                "shared with others",
            ),
            (format!("{mqtt}retain = 1\n"), 7, "boolean"),
            (
                mqtt.replace("[[link.ship]]", "alpn = \"\"\n[[link.ship]]")
                    .replace("mqtt://", "mqtts://"),
                5,
                "alpn must have",
            ),
            (
                mqtt.replace("[[link.ship]]", "ca_file = \"ca\"\n[[link.ship]]"),
                4,
                "write mqtts://",
            ),
        ];
        for (text, line, reason) in cases {
            let (found, said) = flaw(&text);
            assert!(said.contains(reason), "{text}\n{said}");
            assert_eq!(found, line, "{text}\n{said}");
        }
    }
}
