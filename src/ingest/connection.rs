//! The I/O around one client's [`Session`].
//!
//! One after the other: read, hand over, wait until all is taken, acknowledge. So a client that is too
//! fast is slowed down through TCP, and what is in the gateway's hands of one client is one read.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use bytes::BytesMut;
use tokio::sync::watch;
use tokio::time::{sleep_until, timeout};

use super::frame::{Code, Hello, Refusal};
use super::session::{Event, Session, Step};
use super::socket::Socket;
use super::{Phase, Shared};
use crate::broker::{Door, Entrant, Intake, LoginRefused, Place};
use crate::pipeline::DedupKey;

/// A client that is connected.
struct Connection {
    socket: Socket,
    session: Session,
    input: BytesMut,
    /// For a large frame that has begun.
    place: Place,
    output: Vec<u8>,
    intake: Intake,
    /// Who it is, once it is let in.
    entrant: Option<Entrant>,
    /// The name that it gave itself; its address, if it gave none.
    name: String,
    /// By what its ids are told from those of others: user and name.
    source: String,
    changes: watch::Receiver<()>,
    peer: SocketAddr,
    /// Since when its handshake is awaited: from its first byte on, where none is needed.
    greeting_since: Option<Instant>,
    /// Why it is not let in, which it is not told.
    login_refused: Option<String>,
    shared: Arc<Shared>,
}

/// How a connection ends.
enum End {
    /// The client has closed it, or it broke.
    Gone(String),
    /// The client is told why.
    Refused(Refusal),
    /// Nothing more can be done for it.
    Closing,
}

impl From<Refusal> for End {
    fn from(refusal: Refusal) -> End {
        End::Refused(refusal)
    }
}

/// Serves a client until it goes.
pub(super) async fn serve(socket: Socket, peer: SocketAddr, shared: Arc<Shared>) {
    let needs_handshake = !shared.door.admits_anonymous(peer);
    let mut connection = Connection {
        socket,
        session: Session::new(shared.config.max_frame_bytes),
        input: BytesMut::new(),
        place: Place::default(),
        output: Vec::new(),
        intake: shared.door.intake(),
        entrant: None,
        name: peer.to_string(),
        source: String::new(),
        changes: shared.door.changes(),
        peer,
        greeting_since: needs_handshake.then(Instant::now),
        login_refused: None,
        shared,
    };
    let end = connection.until_end().await;
    connection.leave(end).await;
}

impl Connection {
    async fn until_end(&mut self) -> End {
        loop {
            let shared = self.shared.clone();
            let end = tokio::select! {
                end = self.turn() => end,
                () = shared.reaches(Phase::Closing) => return End::Closing,
            };
            if let Err(end) = end {
                return end;
            }
        }
    }

    /// One read, and what comes of it.
    async fn turn(&mut self) -> Result<(), End> {
        self.read().await?;
        let outcome = self.take().await;
        let taken = Instant::now();
        self.intake.flush_events(taken);
        self.intake.settled().await;
        self.session.taken(&mut self.output);
        outcome?;
        let written = self.socket.write(&mut self.output).await;
        written.map_err(|error| End::Gone(format!("write failed: {error}")))?;
        self.intake.eased().await;
        self.place.put_off(taken.elapsed());
        Ok(())
    }

    async fn read(&mut self) -> Result<(), End> {
        let shared = self.shared.clone();
        loop {
            let deadline = self.deadline();
            let count = tokio::select! {
                read = self.socket.read(&mut self.input), if !self.place.is_wanted() => read,
                permit = self.place.turn(), if self.place.is_wanted() => {
                    self.place.take(permit, shared.door.places(), Instant::now());
                    continue;
                }
                () = shared.reaches(Phase::Draining) => {
                    return Err(Refusal::new(Code::ShuttingDown, "the gateway is shutting down").into());
                }
                // The sender lives as long as the broker.
                Ok(()) = self.changes.changed() => {
                    self.check_login()?;
                    continue;
                }
                refusal = async {
                    match deadline {
                        Some((at, refusal)) => {
                            sleep_until(at.into()).await;
                            refusal
                        }
                        None => std::future::pending().await,
                    }
                } => return Err(refusal.into()),
            };
            match count {
                Ok(0) => return Err(End::Gone("the client closed the connection".into())),
                Ok(count) => {
                    self.greeting_since.get_or_insert_with(Instant::now);
                    self.shared.stats.bytes.fetch_add(count as u64, Relaxed);
                    return Ok(());
                }
                Err(error) => return Err(End::Gone(format!("connection failed: {error}"))),
            }
        }
    }

    /// Until when the client has to say something.
    fn deadline(&self) -> Option<(Instant, Refusal)> {
        let config = &self.shared.config;
        let refusal = |text: &str| Refusal::new(Code::TimedOut, text);
        // While it waits for its turn it can't be heard.
        let listens = !config.idle_timeout.is_zero() && !self.place.is_wanted();
        let idle = listens.then(|| {
            let text = "nothing has come for ingest.idle_timeout_s";
            (Instant::now() + config.idle_timeout, refusal(text))
        });
        let login = match &self.entrant {
            Some(entrant) => entrant.expires().map(|at| {
                (
                    at,
                    Refusal::new(Code::NotAuthorized, "the token has expired"),
                )
            }),
            None => self.greeting_since.map(|since| {
                let text = "no whole handshake has come within ingest.handshake_timeout_ms";
                (since + config.handshake_timeout, refusal(text))
            }),
        };
        let frame = self.place.deadline().map(|at| {
            let text = "a large frame has not come in whole in time";
            (at, refusal(text))
        });
        [idle, login, frame]
            .into_iter()
            .flatten()
            .min_by_key(|(at, _)| *at)
    }

    fn check_login(&self) -> Result<(), Refusal> {
        match &self.entrant {
            Some(entrant) if !self.shared.door.admits(entrant) => Err(Refusal::new(
                Code::NotAuthorized,
                "the login holds no longer: users, passwords, keys or certificates have changed",
            )),
            _ => Ok(()),
        }
    }

    /// Takes what has come in whole.
    async fn take(&mut self) -> Result<(), Refusal> {
        let now = Instant::now();
        let pressure = self.intake.pressure();
        let (mut accepted, mut denied) = (0, 0);
        let outcome = loop {
            match self.session.next(&mut self.input) {
                Ok(None) => break Ok(()),
                Ok(Some(Step::Event(event))) => {
                    accepted += 1;
                    let Event {
                        topic,
                        payload,
                        priority,
                        id,
                    } = event;
                    let treatment = self.intake.treatment(&topic);
                    let treatment = treatment.asked_for(priority.lane(pressure));
                    let source = &self.source;
                    let key = |topic: &_| Some(DedupKey::of_number(topic, source, id?));
                    self.intake
                        .publish_event(topic, payload, treatment, key, now);
                }
                Ok(Some(Step::Denied(event))) => {
                    denied += 1;
                    let door = &self.shared.door;
                    door.bury_denied(&self.name, &event.topic, &event.payload, now);
                }
                Ok(Some(Step::Login(hello))) => {
                    if let Err(refusal) = self.log_in(hello).await {
                        break Err(refusal);
                    }
                }
                Err(refusal) => break Err(refusal),
            }
        };
        if accepted + denied > 0 {
            self.place.leave();
        }
        let begun = self.session.begun_size(&self.input);
        let places = self.shared.door.places();
        self.place.adjust(begun, self.input.len(), places, now);
        let stats = &self.shared.stats;
        stats.accepted.fetch_add(accepted, Relaxed);
        stats.denied.fetch_add(denied, Relaxed);
        outcome
    }

    async fn log_in(&mut self, hello: Option<Hello>) -> Result<(), Refusal> {
        let token = hello.as_ref().map_or("", |hello| hello.token.as_str());
        // A JSON Web Token has no colon.
        let (user, password) = match token.split_once(':') {
            Some((user, password)) => (Some(user), Some(password)),
            None => (None, Some(token).filter(|token| !token.is_empty())),
        };
        let name = hello.as_ref().map_or("", |hello| hello.name.as_str());
        let door: &Door = &self.shared.door;
        let login = door.enter(
            name,
            user,
            password.map(str::as_bytes),
            self.socket.certificates(),
            self.peer,
        );
        let patience = self.shared.config.handshake_timeout;
        let entrant = match timeout(patience, login).await {
            Ok(Ok(entrant)) => entrant,
            Ok(Err(why)) => return Err(self.refused(&why)),
            Err(_) => return Err(self.refused(&LoginRefused::Busy)),
        };
        if hello.is_some() {
            self.name = name.to_owned();
        }
        self.source = match entrant.user() {
            Some(user) => format!("{user}\0{name}"),
            None => name.to_owned(),
        };
        self.session
            .admit(entrant.permissions.clone(), &mut self.output);
        if door.may_log() {
            tracing::info!(
                client = self.name,
                user = entrant.user(),
                peer = %self.peer,
                version = self.session.version().map(|version| version.as_str()),
                "ingest client connected"
            );
        }
        self.entrant = Some(entrant);
        Ok(())
    }

    /// The log learns why a client is not let in, and the client only that it isn't.
    fn refused(&mut self, why: &LoginRefused) -> Refusal {
        self.login_refused = Some(why.to_string());
        match why {
            LoginRefused::Busy => Refusal::new(Code::Busy, "too many logins at once; try again"),
            LoginRefused::LockedOut => {
                Refusal::new(Code::Busy, "too many failed logins; try again in a minute")
            }
            LoginRefused::Anonymous => Refusal::new(
                Code::NotAuthorized,
                "a token is needed to connect from here",
            ),
            _ => Refusal::new(Code::NotAuthorized, "the token does not count"),
        }
    }

    async fn leave(mut self, end: End) {
        let stats = &self.shared.stats;
        if self.entrant.is_none() {
            stats.refused.fetch_add(1, Relaxed);
        }
        let (client, peer) = (&self.name, self.peer);
        let may_log = self.shared.door.may_log();
        match &end {
            End::Refused(refusal) if refusal.code != Code::ShuttingDown => {
                stats.errors.fetch_add(1, Relaxed);
                let reason = self.login_refused.as_ref().unwrap_or(&refusal.text);
                if may_log {
                    tracing::warn!(client, %peer, reason, "ingest client refused");
                }
            }
            End::Refused(Refusal { text: reason, .. }) | End::Gone(reason) => {
                if may_log {
                    tracing::info!(client, %peer, reason, "ingest client disconnected");
                }
            }
            End::Closing => {}
        }
        if let End::Refused(refusal) = &end {
            self.session.refuse(refusal, &mut self.output);
            let shared = self.shared.clone();
            let last_words = async {
                if self.socket.write(&mut self.output).await.is_ok() {
                    self.socket.finish().await;
                }
            };
            tokio::select! {
                () = last_words => {}
                () = shared.reaches(Phase::Closing) => {}
            }
        }
        self.socket.end().await;
    }
}
