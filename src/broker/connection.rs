//! The I/O around one client's [`Session`]: a socket, a mailbox, a timer.
//!
//! One task a client. It reads only while it may write and while the pipeline takes what comes in,
//! so that a client that is too fast is slowed down through TCP. It pauses for subscribers that are
//! behind, but only for those that make progress; see [`super::mailbox`].

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::{Buf, BytesMut};
use rumqttd::protocol::{ConnectReturnCode, DisconnectReasonCode, Packet, QoS};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::access::{Identity, Login, LoginRefused, Permissions};
use super::certificate::CertificateNames;
use super::codec::{self, DecodeError, Decoder, Encoder, Incoming, Version};
use super::doorway::Guest;
use super::fanout::Subscriber;
use super::intake::Intake;
use super::large_packets::Place;
use super::listener::{Protocols, Transport};
use super::mailbox::Mailbox;
use super::message::{Delivery, Message, SessionKey};
use super::rate::RateLimit;
use super::reasons::Ending;
use super::registry::{AttachError, Details, Eviction, Online, Parked};
use super::session::{Close, ConnectRefused, ConnectRequest, Effect, Session, Ticket};
use super::stream::Stream;
use super::subscription::Subscription;
use super::{Phase, Shared, end_session};
use crate::dead_letters::Reason;
use crate::event::unix_time_ns;
use crate::store::StoreError;

/// A connection's read buffer starts small, since most are idle most of the time, and doubles up to
/// the larger size while reads fill it.
const SMALL_READ: usize = 2 * 1024;
const LARGE_READ: usize = 64 * 1024;

/// No more is taken out of the mailbox while so much waits to be written.
const WRITE_AHEAD: usize = 64 * 1024;

/// Deliveries that are taken out of the mailbox at once.
const TAKEN_AT_ONCE: usize = 512;

/// How long a closing connection may take to send its last bytes.
const LAST_WRITE: Duration = Duration::from_secs(1);

/// A connection that has been idle for so long gives its large buffers back.
const IDLE: Duration = Duration::from_secs(10);

/// Serves a client until it goes. Each stage has its state in a place of its own, which it gives back:
/// most clients are connected and idle most of the time, and there may be thousands.
pub(super) async fn serve(
    socket: TcpStream,
    protocols: Protocols,
    peer: SocketAddr,
    guest: Guest,
    shared: Arc<Shared>,
) {
    let Some(first) = Box::pin(meet(socket, protocols, peer, guest, &shared)).await else {
        return;
    };
    let Some((connection, online)) = Box::pin(admit(first, shared)).await else {
        return;
    };
    Box::pin(connection.run(online)).await;
}

/// A socket from which a CONNECT has come.
struct First {
    wire: Wire,
    version: Version,
    connect: Packet,
}

/// Waits for the CONNECT.
async fn meet(
    socket: TcpStream,
    protocols: Protocols,
    peer: SocketAddr,
    guest: Guest,
    shared: &Shared,
) -> Option<Box<First>> {
    // Without it, small acks wait for the peer's delayed acks.
    if let Err(error) = socket.set_nodelay(true) {
        tracing::debug!(%peer, %error, "can't set TCP_NODELAY");
    }
    let transport = protocols.transport();
    let stream = match protocols.stream(socket) {
        Ok(stream) => stream,
        Err(error) => {
            tracing::error!(%peer, %error, "can't begin TLS");
            return None;
        }
    };
    let mut wire = Wire {
        stream,
        decoder: Decoder::new(shared.config.max_packet_bytes),
        input: BytesMut::new(),
        read_size: SMALL_READ,
        output: BytesMut::new(),
        first_bytes: 0,
        transport,
        peer,
    };
    let stats = shared.stats.of(transport);
    let patience = shared.config.connect_timeout;
    let connect = tokio::select! {
        connect = timeout(patience, wire.first_packet()) => connect,
        () = guest.shown_out() => Ok(Err(FirstPacketError::NoPlace)),
        () = shared.leaves(Phase::Running) => return None,
    };
    if wire.stream.is_handshaking() {
        stats.tls_failures.fetch_add(1, Ordering::Relaxed);
    }
    match connect {
        Ok(Ok(connect)) => {
            if !guest.stay() {
                stats.refused.fetch_add(1, Ordering::Relaxed);
                return None;
            }
            let version = wire.decoder.version().expect("a packet has been decoded");
            return Some(Box::new(First {
                wire,
                version,
                connect,
            }));
        }
        Ok(Err(error)) => {
            stats.refused.fetch_add(1, Ordering::Relaxed);
            if shared.may_log() {
                let listener = transport.as_str();
                tracing::info!(%peer, listener, %error, "connection refused before CONNECT");
            }
            if matches!(&error, FirstPacketError::Io(error) if error.kind() == io::ErrorKind::InvalidData)
            {
                // TLS or HTTP has told the client why.
                wire.write_last(guest).await;
            } else if matches!(
                error,
                FirstPacketError::Decode(DecodeError::UnsupportedVersion { .. })
            ) {
                // A 3.1.1 CONNACK with "unacceptable protocol version" is what every client reads.
                wire.output.extend_from_slice(&[0x20, 2, 0, 1]);
                wire.write_last(guest).await;
            } else if let FirstPacketError::Decode(error) = &error
                && wire.decoder.version() == Some(Version::V5)
            {
                let code = match error {
                    DecodeError::Protocol(_) => ConnectReturnCode::ProtocolError,
                    _ => ConnectReturnCode::MalformedPacket,
                };
                let text = error.to_string();
                let refused = ConnectRefused { code, text };
                Encoder::new(Version::V5).connack_refused(&refused, &mut wire.output);
                wire.write_last(guest).await;
            }
        }
        Err(_) => {
            stats.refused.fetch_add(1, Ordering::Relaxed);
            if shared.may_log() {
                let listener = transport.as_str();
                tracing::info!(%peer, listener, "connection closed: no CONNECT within mqtt.connect_timeout_ms");
            }
        }
    }
    None
}

/// Answers the CONNECT. None: the client is not let in.
async fn admit(first: Box<First>, shared: Arc<Shared>) -> Option<(Box<Connection>, Arc<Online>)> {
    let First {
        mut wire,
        version,
        connect,
    } = *first;
    let peer = wire.peer;
    let key = shared.next_key.fetch_add(1, Ordering::Relaxed);
    let stats = &shared.stats;
    stats.connects.fetch_add(1, Ordering::Relaxed);
    stats.packets_received.fetch_add(1, Ordering::Relaxed);
    let first_bytes = wire.first_bytes;
    stats
        .bytes_received
        .fetch_add(first_bytes, Ordering::Relaxed);
    let assign_id = || shared.assign_client_id(key);
    let mut request = match ConnectRequest::new(version, connect, key, &shared.limits, assign_id) {
        Ok(request) => request,
        Err(refused) => {
            refuse(wire, version, peer, &shared, refused).await;
            return None;
        }
    };
    let client_id = request.client_id.clone();
    let certificate = wire.stream.certificate_names();
    let identity = tokio::select! {
        outcome = log_in(&request, certificate.as_ref(), peer, &shared) => outcome,
        () = shared.leaves(Phase::Running) => return None,
    };
    let identity = match identity {
        Ok(identity) => identity,
        Err(refused) => {
            answer_refused(wire, version, &shared, refused).await;
            return None;
        }
    };
    request.user = identity.user().map(str::to_owned);
    let permissions = shared.access.permissions(&identity, &client_id);
    if let Some(topic) = request.will_topic()
        && !permissions.may_publish(topic.as_str())
    {
        let refused = ConnectRefused {
            code: ConnectReturnCode::NotAuthorized,
            text: format!("{client_id:?} may not publish its will on {topic}"),
        };
        refuse(wire, version, peer, &shared, refused).await;
        return None;
    }
    let max = shared.config.max_connections;
    let counts = |user: &str| shared.may_log_in(user);
    let attached = shared
        .registry
        .attach(&client_id, &identity, counts, max)
        .await;
    let (online, parked) = match attached {
        Ok(attached) => attached,
        Err(error) => {
            let refused = match error {
                AttachError::Full => ConnectRefused {
                    code: busy(version, ConnectReturnCode::ServerBusy),
                    text: format!("mqtt.max_connections ({max}) are connected already"),
                },
                AttachError::OtherUser => ConnectRefused {
                    code: ConnectReturnCode::ClientIdentifierNotValid,
                    text: format!("the client id {client_id:?} is in use by another user"),
                },
            };
            refuse(wire, version, peer, &shared, refused).await;
            return None;
        }
    };
    if !shared.access.still_valid(&identity) {
        // A reload came between the login and the registration, where it could not be seen.
        online.evict(Eviction::LoggedOut);
    }
    let now = Instant::now();
    let parked = match parked {
        Some(parked)
            if request.clean_start
                || parked.expires <= now
                // A session of nobody's does not become somebody's.
                || parked.session.user() != identity.user() =>
        {
            shared.end_parked(&client_id, parked).await;
            None
        }
        parked => parked,
    };
    let (key, session, mailbox) = match parked {
        Some(parked) => {
            let mut session = parked.session;
            session.resume(request, permissions.clone(), now, &mut wire.output);
            // Its subscriptions go by what the client may do now.
            for (subscription, options) in session.subscriptions() {
                let subscriber = Subscriber {
                    key: session.key(),
                    mailbox: parked.mailbox.clone(),
                    permissions: permissions.clone(),
                    options: *options,
                };
                shared.fanout.subscribe(subscription, subscriber);
            }
            parked.mailbox.set_online();
            (session.key(), session, parked.mailbox)
        }
        None => {
            let limits = shared.limits.clone();
            let permissions = permissions.clone();
            let session = Session::new(request, permissions, key, limits, now, &mut wire.output);
            let is_kept = !session.session_expiry().is_zero();
            let mailbox = Mailbox::new(key, &client_id, is_kept, shared.mailboxes.clone());
            (key, session, Arc::new(mailbox))
        }
    };
    if shared.may_log() {
        let names = wire.stream.certificate_names();
        tracing::info!(
            client = client_id,
            user = identity.user(),
            login = identity.proof(),
            %peer,
            listener = wire.transport.as_str(),
            version = version.as_str(),
            certificate = names.and_then(|names| names.common_name),
            "client connected"
        );
    }
    let clients = &shared.stats.of(wire.transport).clients;
    clients.fetch_add(1, Ordering::Relaxed);
    let (connections, _) = shared.registry.counts();
    let most = &shared.stats.most_connections;
    most.fetch_max(connections as u64, Ordering::Relaxed);
    let mut connection = Box::new(Connection {
        wire,
        session,
        key,
        mailbox,
        permissions,
        identity,
        intake: Intake::new(shared.clone()),
        rate: RateLimit::new(shared.config.max_messages_per_s.into(), now),
        byte_rate: RateLimit::new(shared.config.max_bytes_per_s, now),
        paused_with_all: None,
        effects: Vec::new(),
        tickets: Vec::new(),
        taken: VecDeque::new(),
        retained_due: VecDeque::new(),
        retained: VecDeque::new(),
        // A client need not wait for its CONNACK: more may have come together with CONNECT.
        has_input: true,
        place: Place::default(),
        deaf: None,
        owes_sync: false,
        is_record_old: false,
        last_progress: now,
        client_id: client_id.clone(),
        shared: shared.clone(),
    });
    let details = Details {
        key: connection.key,
        peer,
        version,
        since_unix_ms: unix_time_ns() / 1_000_000,
        keep_alive: connection.session.keep_alive(),
        session_expiry: connection.session.session_expiry(),
        mailbox: connection.mailbox.clone(),
        inflight: AtomicUsize::new(0),
        certificates: connection.wire.stream.certificates().map(Box::from),
    };
    // Set here and nowhere else.
    let _ = online.details.set(details);
    if let Some(certificates) = connection.wire.stream.certificates()
        && !shared.vouches_for(certificates)
    {
        // The files changed after the handshake and before this connection could be seen.
        online.evict(Eviction::LoggedOut);
    }
    connection.spend_bytes(first_bytes);
    connection.store_session();
    Some((connection, online))
}

/// Finds out who the client is. The log learns why it is not let in, and the client only that it
/// isn't.
async fn log_in(
    request: &ConnectRequest,
    certificate: Option<&CertificateNames>,
    peer: SocketAddr,
    shared: &Shared,
) -> Result<Identity, ConnectRefused> {
    let given = request.login.as_ref();
    let user = given.map(|login| login.username.as_str());
    let password = given.map(|login| login.password.as_bytes());
    let login = Login {
        user: user.filter(|user| !user.is_empty()),
        password: password.filter(|password| !password.is_empty()),
        certificate,
        peer,
    };
    let patience = shared.config.connect_timeout;
    let outcome = timeout(patience, shared.access.log_in(login)).await;
    let (code, text) = match &outcome {
        Ok(Ok(_)) => (ConnectReturnCode::Success, ""),
        Ok(Err(LoginRefused::Anonymous)) => (
            ConnectReturnCode::NotAuthorized,
            "a login is needed to connect from here",
        ),
        Ok(Err(LoginRefused::LockedOut)) => (
            busy(request.version, ConnectReturnCode::ConnectionRateExceeded),
            "too many failed logins; try again in a minute",
        ),
        Ok(Err(LoginRefused::Busy)) => (
            busy(request.version, ConnectReturnCode::ServerBusy),
            "too many logins at once; try again",
        ),
        Ok(Err(_)) => (
            ConnectReturnCode::BadUserNamePassword,
            "the user name or the password is wrong",
        ),
        Err(_) => (
            busy(request.version, ConnectReturnCode::ServerBusy),
            "too many logins at once; try again",
        ),
    };
    let reason = match outcome {
        Ok(Ok(identity)) => return Ok(identity),
        Ok(Err(refused)) => refused.to_string(),
        Err(_) => "too many logins at once: it had no turn within mqtt.connect_timeout_ms".into(),
    };
    if shared.may_log() {
        tracing::warn!(client = request.client_id, %peer, %reason, "login refused");
    }
    Err(ConnectRefused {
        code,
        text: text.into(),
    })
}

/// MQTT 3.1.1 has one code for all that passes by waiting.
fn busy(version: Version, code: ConnectReturnCode) -> ConnectReturnCode {
    match version {
        Version::V4 => ConnectReturnCode::ServiceUnavailable,
        Version::V5 => code,
    }
}

/// Logs and answers a CONNECT that can't be accepted.
async fn refuse(
    wire: Wire,
    version: Version,
    peer: SocketAddr,
    shared: &Shared,
    refused: ConnectRefused,
) {
    if shared.may_log() {
        let listener = wire.transport.as_str();
        tracing::info!(%peer, listener, error = %refused, "connection refused");
    }
    answer_refused(wire, version, shared, refused).await;
}

/// Answers a CONNECT that can't be accepted.
async fn answer_refused(
    mut wire: Wire,
    version: Version,
    shared: &Shared,
    refused: ConnectRefused,
) {
    let stats = shared.stats.of(wire.transport);
    stats.refused.fetch_add(1, Ordering::Relaxed);
    let refusals = &shared.stats.refusals;
    refusals.count(wire.transport, refused.code);
    Encoder::new(version).connack_refused(&refused, &mut wire.output);
    let peer = wire.peer;
    wire.write_last(shared.doorway.enter(peer.ip())).await;
}

/// A socket with its buffers.
struct Wire {
    stream: Stream,
    decoder: Decoder,
    input: BytesMut,
    read_size: usize,
    output: BytesMut,
    /// Bytes that came in until the first packet was whole.
    first_bytes: u64,
    transport: Transport,
    peer: SocketAddr,
}

#[derive(Debug, thiserror::Error)]
enum FirstPacketError {
    #[error(transparent)]
    Decode(#[from] DecodeError),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it took its time, and its place was needed for another (mqtt.max_connections)")]
    NoPlace,
}

impl Wire {
    async fn first_packet(&mut self) -> Result<Packet, FirstPacketError> {
        loop {
            match self.decoder.next(&mut self.input)? {
                Some(Incoming::Control(packet)) => return Ok(packet),
                Some(Incoming::Publish(_)) => unreachable!("the decoder wants CONNECT first"),
                None => {}
            }
            if !self.stream.ready(true, false).await? {
                self.stream.flush()?;
                continue;
            }
            match self.read() {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(count) => self.first_bytes += count as u64,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Reads once. 0 bytes: the client has closed.
    fn read(&mut self) -> io::Result<usize> {
        if self.input.is_empty() && self.input.capacity() > self.read_size {
            // Nothing refers to the buffer any more, or whoever does keeps it alive.
            self.input.clear();
        }
        self.input.reserve(self.read_size);
        let count = self.stream.try_read(&mut self.input)?;
        if count >= self.read_size {
            self.read_size = (self.read_size * 2).min(LARGE_READ);
        }
        Ok(count)
    }

    /// Lets an idle connection's buffers go.
    fn shrink(&mut self) {
        self.read_size = SMALL_READ;
        if self.input.is_empty() {
            self.input = BytesMut::new();
        }
        if self.output.is_empty() {
            self.output = BytesMut::new();
        }
    }

    /// Writes what the socket takes now. Returns how much.
    fn write(&mut self) -> io::Result<usize> {
        let mut written = 0;
        while !self.output.is_empty() {
            match self.stream.try_write(&self.output) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    self.output.advance(count);
                    written += count;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        if self.output.is_empty() && self.output.capacity() <= SMALL_READ {
            self.output = BytesMut::new();
        }
        self.stream.flush()?;
        Ok(written)
    }

    /// Whether nothing waits to be sent.
    fn is_sent(&self) -> bool {
        self.output.is_empty() && !self.stream.is_sending()
    }

    /// Sends the rest, if the client takes it soon and nobody else needs its place, and ends the
    /// connection in an orderly way.
    async fn write_last(&mut self, guest: Guest) {
        let send = async {
            while !self.is_sent() {
                self.stream.ready(false, true).await?;
                self.write()?;
            }
            self.stream.shut_down().await?;
            // What the client sent and nobody will read would make the kernel reset the
            // connection, and the client might never see our last packet.
            loop {
                self.stream.ready(true, false).await?;
                self.input.clear();
                match self.read() {
                    Ok(0) => return io::Result::Ok(()),
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
        };
        // Whether it worked makes no difference: the connection is closed.
        tokio::select! {
            _ = timeout(LAST_WRITE, send) => {}
            () = guest.shown_out() => {}
        }
    }
}

/// A connected client.
struct Connection {
    wire: Wire,
    session: Session,
    key: SessionKey,
    mailbox: Arc<Mailbox>,
    permissions: Arc<Permissions>,
    identity: Identity,
    /// The way of what it publishes.
    intake: Intake,
    /// Of messages, and of bytes.
    rate: RateLimit,
    byte_rate: RateLimit,
    /// Until when nothing is read because all clients together send too much.
    paused_with_all: Option<Instant>,
    effects: Vec<Effect>,
    /// Messages that were handed on, but not yet acknowledged.
    tickets: Vec<Ticket>,
    /// Taken out of the mailbox, not yet given to the session.
    taken: VecDeque<Delivery>,
    /// New subscriptions whose retained messages have not been looked up, and those that have been.
    /// They come before what is in the mailbox, and don't count against its bounds.
    retained_due: VecDeque<Subscription>,
    retained: VecDeque<Delivery>,
    /// What has come in may hold whole packets that were left for later.
    has_input: bool,
    /// For the packet that is coming in.
    place: Place,
    /// Why nothing can be sent to the client any more. What it has sent, a DISCONNECT perhaps, still
    /// counts.
    deaf: Option<String>,
    /// A retained message of the last read is on its way to the disk, and is acknowledged when it is
    /// there.
    owes_sync: bool,
    /// The store knows of messages in flight that are acknowledged by now.
    is_record_old: bool,
    /// When the client last took bytes, or there were none for it.
    last_progress: Instant,
    client_id: String,
    shared: Arc<Shared>,
}

/// How a connection ended.
enum End {
    Close(Close),
    Evicted(Eviction),
    /// The token that the client logged in with holds no longer.
    Expired,
    ShutDown,
    /// The client went without a word, or stopped reading.
    Lost(String),
}

impl Eviction {
    /// What the client hears of it.
    fn told(self) -> (DisconnectReasonCode, &'static str) {
        match self {
            Eviction::TakenOver => (
                DisconnectReasonCode::SessionTakenOver,
                "another connection uses this client id",
            ),
            Eviction::ByOperator => (
                DisconnectReasonCode::AdministrativeAction,
                "disconnected by an operator",
            ),
            Eviction::Forgotten => (
                DisconnectReasonCode::AdministrativeAction,
                "disconnected and forgotten by an operator",
            ),
            Eviction::LoggedOut => (
                DisconnectReasonCode::NotAuthorized,
                "the login holds no longer: users, passwords, keys or certificates have changed",
            ),
        }
    }
}

impl Connection {
    async fn run(mut self: Box<Self>, online: Arc<Online>) {
        let end = self.until_end(&online).await;
        Box::pin(self.leave(end, &online)).await;
    }

    /// Leaves behind what the client's session, will and subscribers are owed.
    async fn leave(mut self: Box<Self>, end: End, online: &Online) {
        let now = Instant::now();
        let (reason, text) = match &end {
            End::Close(Close::ByClient) => (None, "disconnected by the client"),
            End::Close(Close::Refused(text)) | End::Lost(text) => (None, text.as_str()),
            End::Evicted(why) => {
                let (reason, text) = why.told();
                (Some(reason), text)
            }
            End::Expired => (
                Some(DisconnectReasonCode::NotAuthorized),
                "the token of the login has expired",
            ),
            End::ShutDown => (
                Some(DisconnectReasonCode::ServerShuttingDown),
                "the gateway is shutting down",
            ),
        };
        if let Some(reason) = reason {
            self.session.refuse(reason, text, &mut self.wire.output);
        }
        let ending = match (self.session.refused(), &end) {
            (Some(reason), _) => Ending::Refused(reason),
            (None, End::Close(_)) => Ending::ByClient,
            (None, _) => Ending::Lost,
        };
        let endings = &self.shared.stats.endings;
        endings.count(self.wire.transport, ending);
        if self.shared.may_log() {
            tracing::info!(
                client = self.client_id,
                reason = text,
                "client disconnected"
            );
        }
        let expiry = match end {
            End::Evicted(Eviction::Forgotten) => Duration::ZERO,
            _ => self.session.session_expiry(),
        };
        let will = self.session.on_connection_lost();
        // In a shutdown nobody is told that somebody has gone: all have.
        let will = will.filter(|_| !matches!(end, End::ShutDown));
        let will = self
            .shared
            .allowed_will(will, &self.session, &self.mailbox, now);
        let will = match will {
            Some(will) if !expiry.is_zero() && !will.delay.is_zero() => {
                Some((now + will.delay, will))
            }
            Some(will) => {
                self.publish(will.into_message(now), now);
                self.flush(now);
                None
            }
            None => None,
        };
        self.intake.in_pipeline().await;
        let Connection {
            mut wire,
            mut session,
            key,
            mailbox,
            taken,
            client_id,
            shared,
            ..
        } = *self;
        mailbox.put_back(taken);
        if expiry.is_zero() {
            end_session(&shared.fanout, &client_id, &mut session, &mailbox, now);
            shared.registry.detach(&client_id, online, None, 0);
        } else {
            mailbox.put_back(session.park());
            shared.share_out(&session, &mailbox, now);
            mailbox.set_offline();
            let expires = now + expiry;
            if let Some(archive) = mailbox.archive() {
                let next = mailbox.next_sequence();
                archive.put_session(
                    &client_id,
                    session.record(Some(expires), next, will.as_ref()),
                );
                archive.remove(key, session.take_done().into_iter());
            }
            let parked = Parked {
                session,
                mailbox,
                expires,
                will,
            };
            let max = shared.config.max_connections;
            let evicted = shared
                .registry
                .detach(&client_id, online, Some(parked), max);
            if let Some((client, parked)) = evicted {
                tracing::warn!(
                    client,
                    "session dropped: more clients than mqtt.max_connections are away"
                );
                shared.end_parked(&client, parked).await;
            }
        }
        let clients = &shared.stats.of(wire.transport).clients;
        clients.fetch_sub(1, Ordering::Relaxed);
        if !matches!(end, End::Lost(_)) {
            let guest = shared.doorway.enter(wire.peer.ip());
            wire.write_last(guest).await;
        }
    }

    async fn until_end(&mut self, online: &Online) -> End {
        if self.session.refused().is_some() {
            let text = "the client's maximum packet size leaves no room for CONNACK";
            return End::Close(Close::Refused(text.into()));
        }
        let shared = self.shared.clone();
        let timer = tokio::time::sleep(Duration::MAX);
        tokio::pin!(timer);
        loop {
            if let Some(why) = online.eviction() {
                return End::Evicted(why);
            }
            let now = Instant::now();
            if self.retained.is_empty()
                && let Some(subscription) = self.retained_due.pop_front()
            {
                // One filter a turn: with many retained messages, it takes a while.
                let fanout = &shared.fanout;
                let permissions = &self.permissions;
                fanout.retained_for(&subscription, permissions, now, &mut self.retained);
                tokio::task::yield_now().await;
            }
            if let Err(error) = self.fill_output(now) {
                return End::Lost(format!("messages that wait for it can't be read: {error}"));
            }
            self.tidy_archive();
            self.bury(now);
            self.count_written();
            if let Some(details) = online.details.get() {
                let inflight = self.session.inflight();
                details.inflight.store(inflight, Ordering::Relaxed);
            }
            if self.deaf.is_some() {
                self.wire.output.clear();
            }
            match self.wire.write() {
                Ok(written) if written > 0 || self.wire.output.is_empty() => {
                    self.last_progress = now;
                    let bytes = &shared.stats.bytes_sent;
                    bytes.fetch_add(written as u64, Ordering::Relaxed);
                }
                Ok(_) => {}
                Err(error) => {
                    self.deaf.get_or_insert(format!("write failed: {error}"));
                }
            }
            let phase = shared.phase();
            let more = self.has_more_to_send();
            // What a session that is kept still owes its client, the store will have.
            let is_kept = self.mailbox.archive().is_some();
            let is_done = self.wire.is_sent() && !more && !self.session.awaits_acks();
            if phase == Phase::Closing && (is_kept || is_done) {
                return End::ShutDown;
            }
            // The socket takes more at once.
            let goes_on = self.wire.output.is_empty() && more;

            self.paused_with_all = self.paused_with_all.filter(|until| *until > now);
            let paused = [
                self.rate.paused_until(),
                self.byte_rate.paused_until(),
                self.paused_with_all,
            ];
            let paused = paused.into_iter().flatten().max();
            self.intake.behind.retain(|mailbox| mailbox.is_pressed());
            let stuck = !self.tickets.is_empty();
            // In a shutdown only for acknowledgements.
            let reads = (phase == Phase::Running || self.session.awaits_acks())
                && paused.is_none()
                && self.intake.behind.is_empty()
                && !stuck
                && !self.place.is_wanted()
                && self.wire.output.len() < WRITE_AHEAD;
            if reads && (self.has_input || self.deaf.is_some()) && !self.has_to_wait() {
                let end = match self.has_input {
                    true => self.on_input(),
                    false => self.on_readable(),
                };
                match end {
                    Some(end) => return end,
                    None => continue,
                }
            }
            if paused.is_some() || stuck || !self.intake.behind.is_empty() {
                self.place.excuse(&shared.places, paused.unwrap_or(now));
            }
            let writes = self.deaf.is_none() && !self.wire.is_sent();
            let write_deadline = writes.then(|| self.last_progress + shared.config.write_timeout);
            // While nothing is read, nothing can be heard: the keep-alive is not counted.
            let heard_deadline = if reads { self.session.deadline() } else { None };
            let idle_deadline = (self.wire.read_size > SMALL_READ).then(|| now + IDLE);
            let login_deadline = self.identity.expires();
            let packet_deadline = self.place.deadline();
            let deadline = [
                write_deadline,
                heard_deadline,
                packet_deadline,
                paused,
                idle_deadline,
                login_deadline,
            ]
            .into_iter()
            .flatten()
            .min();
            if let Some(deadline) = deadline {
                // Moving a timer costs more than being woken early once in a while.
                let set = timer.deadline().into_std();
                if deadline < set || set <= now {
                    timer.as_mut().reset(deadline.into());
                }
            }
            let behind = self.intake.behind.first().cloned();
            tokio::select! {
                biased;
                () = online.bell.heard() => {}
                readable = self.wire.stream.ready(reads, writes) => match readable {
                    Ok(true) if !self.has_to_wait() => {
                        if let Some(end) = self.on_readable() {
                            return end;
                        }
                    }
                    Ok(_) => {}
                    Err(error) => return End::Lost(format!("connection failed: {error}")),
                },
                () = self.mailbox.filled.heard(), if self.wants_deliveries() => {}
                () = self.intake.settled(), if !self.intake.is_settled() => self.acknowledge(),
                permit = self.place.turn(), if self.place.is_wanted() => {
                    self.place.take(permit, &shared.places, Instant::now());
                }
                () = async { behind.as_ref().expect("checked").eased().await }, if behind.is_some() => {}
                () = tokio::task::yield_now(), if goes_on => {}
                () = &mut timer, if deadline.is_some() => {
                    let now = Instant::now();
                    self.rate.refill(now);
                    self.byte_rate.refill(now);
                    if login_deadline.is_some_and(|deadline| deadline <= now) {
                        return End::Expired;
                    }
                    if write_deadline.is_some_and(|deadline| deadline <= now) {
                        return End::Lost(
                            "the client takes no bytes (mqtt.write_timeout_ms)".into(),
                        );
                    }
                    if packet_deadline.is_some_and(|deadline| deadline <= now) {
                        return self.too_slow();
                    }
                    if reads && let Some(Effect::Close(close)) =
                        self.session.on_timeout(now, &mut self.wire.output)
                    {
                        return End::Close(close);
                    }
                    self.wire.shrink();
                }
            }
        }
    }

    /// Whether the session takes what is in the mailbox now.
    fn wants_deliveries(&self) -> bool {
        self.deaf.is_none() && self.wire.output.len() < WRITE_AHEAD && !self.session.is_congested()
    }

    /// Whether there is something that the session would take.
    fn has_more_to_send(&self) -> bool {
        let empty = self.taken.is_empty()
            && self.retained.is_empty()
            && self.retained_due.is_empty()
            && self.mailbox.is_empty();
        self.wants_deliveries() && !empty
    }

    /// Whether a subscriber of this client's last topics has to catch up before more is read.
    fn has_to_wait(&mut self) -> bool {
        self.intake.has_to_wait(Some(&self.mailbox))
    }

    /// Moves deliveries from the mailbox through the session into the output.
    fn fill_output(&mut self, now: Instant) -> Result<(), StoreError> {
        while self.wants_deliveries() {
            let Some(delivery) = self.retained.pop_front() else {
                break;
            };
            self.session.deliver(delivery, now, &mut self.wire.output);
        }
        if !self.retained.is_empty() || !self.retained_due.is_empty() {
            return Ok(());
        }
        if self.wants_deliveries() && self.taken.is_empty() {
            self.mailbox.take(TAKEN_AT_ONCE, &mut self.taken)?;
        }
        // What comes from the disk and has expired there has done so by then.
        let now = if self.taken.is_empty() {
            now
        } else {
            Instant::now()
        };
        while self.wants_deliveries() {
            let Some(delivery) = self.taken.pop_front() else {
                break;
            };
            self.session.deliver(delivery, now, &mut self.wire.output);
        }
        Ok(())
    }

    fn count_written(&mut self) {
        let written = self.session.take_written();
        if written.packets > 0 {
            let stats = &self.shared.stats;
            stats
                .packets_sent
                .fetch_add(written.packets, Ordering::Relaxed);
            let publishes = &stats.messages_sent;
            publishes.fetch_add(written.publishes, Ordering::Relaxed);
            let payloads = &stats.publish_bytes_sent;
            payloads.fetch_add(written.payload_bytes, Ordering::Relaxed);
        }
    }

    /// What the session could not send.
    fn bury(&mut self, now: Instant) {
        for (reason, message) in self.session.take_undeliverable() {
            self.mailbox.dead_letter(reason, &message, now);
        }
    }

    /// Removes from the archive what has been delivered.
    fn tidy_archive(&mut self) {
        let done = self.session.take_done();
        if let Some(archive) = self.mailbox.archive().filter(|_| !done.is_empty()) {
            archive.remove(self.key, done.into_iter());
        }
        if self.is_record_old && !self.session.awaits_acks() {
            self.store_session();
        }
    }

    /// Tells the archive what the session is, if it outlives the connection.
    fn store_session(&mut self) {
        self.is_record_old = self.session.awaits_acks();
        if let Some(archive) = self.mailbox.archive() {
            let record = self
                .session
                .record(None, self.mailbox.next_sequence(), None);
            archive.put_session(&self.client_id, record);
        }
    }

    fn on_readable(&mut self) -> Option<End> {
        let count = match (self.wire.read(), &mut self.deaf) {
            (Ok(0) | Err(_), Some(why)) => return Some(End::Lost(std::mem::take(why))),
            (Ok(0), None) => return Some(End::Lost("the client closed the connection".into())),
            (Ok(count), _) => count,
            (Err(error), _) if error.kind() == io::ErrorKind::WouldBlock => return None,
            // It is told why, as after any other rule that it breaks.
            (Err(error), _) if error.kind() == io::ErrorKind::InvalidData => {
                return Some(End::Close(Close::Refused(error.to_string())));
            }
            (Err(error), _) => return Some(End::Lost(format!("read failed: {error}"))),
        };
        let bytes = &self.shared.stats.bytes_received;
        bytes.fetch_add(count as u64, Ordering::Relaxed);
        self.spend_bytes(count as u64);
        let end = self.on_input();
        // One that sends little need not keep a buffer until it sends again.
        if self.wire.read_size == SMALL_READ && self.wire.input.is_empty() {
            self.wire.input = BytesMut::new();
        }
        end
    }

    /// The packet that the client has begun takes more time than a place for it is given.
    fn too_slow(&mut self) -> End {
        let reason = DisconnectReasonCode::QuotaExceeded;
        let text = "a large packet has not come in whole in time (mqtt.max_incoming_bytes)";
        self.session.refuse(reason, text, &mut self.wire.output);
        End::Close(Close::Refused(text.to_owned()))
    }

    fn spend_bytes(&mut self, count: u64) {
        let config = &self.shared.config;
        // Without limits, no time is read.
        if config.max_bytes_per_s > 0 || config.max_total_bytes_per_s > 0 {
            let now = Instant::now();
            self.byte_rate.spend(count, now);
            if config.max_total_bytes_per_s > 0 {
                let mut total = self.shared.total_byte_rate.lock();
                total.spend(count, now);
                self.paused_with_all = total.paused_until();
            }
        }
    }

    /// Works on the packets that have come in whole: on all, or on as many as the client may send now.
    fn on_input(&mut self) -> Option<End> {
        let now = Instant::now();
        let mut packets = 0;
        let mut publishes = 0;
        let room = self.rate.room();
        self.has_input = false;
        let mut goodbye = BytesMut::new();
        let running = self.shared.phase() == Phase::Running;
        loop {
            if publishes == room {
                self.has_input = !self.wire.input.is_empty();
                break;
            }
            let written = self.wire.output.len();
            let output = &mut self.wire.output;
            match self.wire.decoder.next(&mut self.wire.input) {
                Ok(Some(packet)) => {
                    packets += 1;
                    self.place.leave();
                    publishes += u64::from(matches!(packet, Incoming::Publish(_)));
                    if running || packet.ends_something() {
                        let effects = &mut self.effects;
                        self.session.on_packet(packet, now, output, effects);
                    }
                }
                Ok(None) => {
                    let begun = codec::begun_size(&self.wire.input);
                    let bytes = self.wire.input.len();
                    self.place.adjust(begun, bytes, &self.shared.places, now);
                    break;
                }
                Err(error) => {
                    let close = self.session.on_decode_error(&error, output);
                    self.effects.push(close);
                }
            }
            if let Some(Effect::Close(_)) = self.effects.last() {
                // What came before it is still acknowledged, and nothing may follow a DISCONNECT.
                goodbye = self.wire.output.split_off(written);
                break;
            }
        }
        let stats = &self.shared.stats;
        stats.packets_received.fetch_add(packets, Ordering::Relaxed);
        self.rate.spend(publishes, now);
        let end = self.apply(now);
        self.wire.output.extend_from_slice(&goodbye);
        end
    }

    /// Does what the session asked for.
    fn apply(&mut self, now: Instant) -> Option<End> {
        let mut effects = std::mem::take(&mut self.effects);
        let mut end = None;
        let mut published = 0;
        let mut payload_bytes = 0;
        for effect in effects.drain(..) {
            match effect {
                Effect::Publish { message, ticket } => {
                    published += 1;
                    payload_bytes += message.payload.len() as u64;
                    self.publish(message, now);
                    self.tickets.push(ticket);
                }
                Effect::Denied {
                    topic,
                    payload,
                    qos,
                } => {
                    let denied = &self.shared.stats.messages_denied;
                    denied.fetch_add(1, Ordering::Relaxed);
                    tracing::debug!(client = self.client_id, %topic, "publish denied");
                    let message = Message {
                        qos,
                        ..Message::new(topic, payload)
                    };
                    self.mailbox.dead_letter(Reason::Denied, &message, now);
                }
                Effect::Subscribe(subscriptions) => {
                    self.flush(now);
                    for subscription in subscriptions {
                        let subscriber = Subscriber {
                            key: self.key,
                            mailbox: self.mailbox.clone(),
                            permissions: self.permissions.clone(),
                            options: subscription.options,
                        };
                        self.shared.fanout.subscribe(&subscription.key, subscriber);
                        if subscription.send_retained {
                            self.retained_due.push_back(subscription);
                        }
                    }
                    self.store_session();
                }
                Effect::Unsubscribe(subscriptions) => {
                    self.flush(now);
                    self.shared.fanout.unsubscribe(self.key, &subscriptions);
                    self.store_session();
                }
                Effect::Close(close) => {
                    end = Some(End::Close(close));
                    break;
                }
            }
        }
        self.effects = effects;
        if published > 0 {
            let stats = &self.shared.stats;
            stats
                .messages_received
                .fetch_add(published, Ordering::Relaxed);
            let payloads = &stats.publish_bytes_received;
            payloads.fetch_add(payload_bytes, Ordering::Relaxed);
            self.flush(now);
        }
        end
    }

    /// Collects a message for everyone who is to get it.
    fn publish(&mut self, message: Message, now: Instant) {
        if message.retain {
            self.owes_sync |= message.qos != QoS::AtMostOnce;
            if let Err(error) = self.shared.fanout.retain(&message, now) {
                self.mailbox
                    .dead_letter(Reason::RetainedFull, &message, now);
                if self.shared.may_log() {
                    tracing::warn!(client = self.client_id, topic = %message.topic, %error);
                }
            }
        }
        self.intake.publish_message(message, now);
    }

    /// Hands over what was collected.
    fn flush(&mut self, now: Instant) {
        let owes_sync = std::mem::take(&mut self.owes_sync);
        self.intake.flush(owes_sync, now);
        // Waiting for itself, a client would never read what it waits for.
        let own = &self.mailbox;
        self.intake
            .behind
            .retain(|mailbox| !Arc::ptr_eq(mailbox, own));
        self.acknowledge();
    }

    /// Acknowledges what was published, once the pipeline has it and what is to be on disk is there. Until
    /// then, tickets are left and nothing is read; what is to be sent goes on being sent, since the pipeline
    /// may wait for just that.
    fn acknowledge(&mut self) {
        if self.intake.is_settled() {
            for ticket in self.tickets.drain(..) {
                self.session.accepted(ticket, &mut self.wire.output);
            }
        }
    }
}
