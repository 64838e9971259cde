//! The connection of one link to its NATS servers, kept up.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_nats::{Client, ClientError, ConnectOptions, Event, ServerError};
use tokio::sync::{Notify, watch};
use tokio::time::timeout;

use super::links::{Link, Login};
use super::progress::LinkProgress;
use crate::regular_file::RegularFile;
use crate::remote::Patience;

/// The oldest server that has all that is asked of it.
const OLDEST: (i64, i64, i64) = (2, 9, 0);

/// Servers that are silent for so long are asked whether they still are there; twice, then they are not.
const PING: Duration = Duration::from_secs(2);

/// The client tries for so long to get its connection back; then one is made that reads all files anew and says in
/// detail what is wrong. No lease outlasts that.
const RECONNECTING: Duration = Duration::from_secs(60);

const REFUSED: &str = "the server refuses the login, which it had taken before";

/// A connection that is to be made anew ends within this time, or it is left.
const ENDING: Duration = Duration::from_secs(1);

/// How often the connection is looked at, whatever is told of it.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Acknowledgements of all that can be on its way, and more.
const WAITING_MESSAGES: usize = 1 << 16;

/// No password or key is longer.
const MAX_SECRET_BYTES: u64 = 64 << 10;

/// What the others of a link see of its connection.
#[derive(Clone)]
pub(super) struct Connected {
    pub(super) client: Client,
    /// Counts up when it was lost, and comes back by itself: what was on its way may not have arrived.
    pub(super) number: u64,
    pub(super) up: bool,
    /// To be notified when nothing comes by it, although something is due.
    pub(super) silent: Arc<Notify>,
}

pub(super) type State = watch::Receiver<Option<Connected>>;

/// Whether it is no longer the connection with this number.
pub(super) fn is_other(state: &Option<Connected>, number: u64) -> bool {
    state.as_ref().is_none_or(|state| state.number != number)
}

/// Waits until that is so, or the link ends.
pub(super) async fn has_changed(state: &mut State, number: u64) {
    let _ = state.wait_for(|state| is_other(state, number)).await;
}

/// Waits for a connection. None: the link ends with the gateway.
pub(super) async fn until_up(state: &mut State) -> Option<Connected> {
    let up = |state: &Option<Connected>| state.as_ref().is_some_and(|state| state.up);
    state
        .wait_for(up)
        .await
        .ok()
        .and_then(|state| state.clone())
}

/// Waits until the gateway ends.
pub(super) async fn told_to_stop(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Between attempts to reach a server: it is tried often, as somebody waits for what could not be sent.
pub(super) const PATIENCE: Patience = Patience {
    timeout: Duration::from_secs(5),
    first_pause: Duration::from_millis(50),
    longest_pause: Duration::from_millis(700),
    at_once: 64,
};

/// Connects, and again whenever that is of use, until it is dropped.
pub(super) async fn keep(
    link: Arc<Link>,
    state: watch::Sender<Option<Connected>>,
    progress: Arc<LinkProgress>,
) {
    let mut pauses = PATIENCE.pauses();
    let mut number = 0;
    let silent = Arc::new(Notify::new());
    loop {
        let (sender, mut events) = watch::channel(Seen::default());
        let began = tokio::time::Instant::now();
        match connect(&link, sender).await {
            Ok(client) => {
                tracing::info!(
                    link = link.name,
                    server = client.server_info().server_name,
                    "connected"
                );
                progress.connected();
                let mut down_since = None;
                loop {
                    let seen = events.borrow_and_update().clone();
                    if let Some(why) = seen.refused {
                        progress.failed(&why);
                        break;
                    }
                    let connected = Connected {
                        client: client.clone(),
                        number: number + seen.lost,
                        // What is told of events may be told late.
                        up: client.connection_state() == async_nats::connection::State::Connected,
                        silent: silent.clone(),
                    };
                    if connected.up {
                        down_since = None;
                        match &seen.denied {
                            None => progress.connected(),
                            Some(why) => progress.failed(why),
                        }
                    } else {
                        progress.disconnected();
                        if let Some(why) = &seen.unreachable {
                            let servers = link.servers.join(", ");
                            progress.failed(&format!("can't connect to {servers}: {why}"));
                        }
                        let since = *down_since.get_or_insert_with(tokio::time::Instant::now);
                        if since.elapsed() > RECONNECTING {
                            break;
                        }
                    }
                    state.send_replace(Some(connected));
                    tokio::select! {
                        changed = timeout(LOOK_EVERY, events.changed()) => if let Ok(Err(_)) = changed {
                            break;
                        },
                        () = silent.notified() => if !is_made_anew(&client, &mut events).await {
                            progress.failed("the connection is stuck: another one is made");
                            break;
                        },
                    }
                }
                number += events.borrow().lost + 1;
                state.send_replace(None);
            }
            Err(why) => progress.failed(&why),
        }
        progress.disconnected();
        if began.elapsed() > Duration::from_secs(10) {
            pauses = PATIENCE.pauses();
        }
        tokio::time::sleep(pauses.next().unwrap_or(PATIENCE.longest_pause)).await;
    }
}

/// Whether the client has ended its connection, to make another one. Where much is still to be sent, and nobody takes
/// it, it waits for ever to say farewell over TLS.
async fn is_made_anew(client: &Client, events: &mut watch::Receiver<Seen>) -> bool {
    let lost = events.borrow().lost;
    let ended = async {
        // It fails only where there is nobody to be asked any more.
        let asked = client.force_reconnect().await.is_ok();
        asked && events.wait_for(|seen| seen.lost > lost).await.is_ok()
    };
    timeout(ENDING, ended).await == Ok(true)
}

/// What the client has told of its connection.
#[derive(Clone, Debug)]
struct Seen {
    up: bool,
    /// How often it was lost.
    lost: u64,
    /// Why it is not to be had: files are to be read anew.
    refused: Option<String>,
    /// Why the client does not get it back.
    unreachable: Option<String>,
    /// What the server lets nobody do with this login.
    denied: Option<String>,
}

impl Default for Seen {
    fn default() -> Seen {
        Seen {
            up: true,
            lost: 0,
            refused: None,
            unreachable: None,
            denied: None,
        }
    }
}

async fn connect(link: &Link, seen: watch::Sender<Seen>) -> Result<Client, String> {
    let options = options(link)?
        .name("headgate")
        .ping_interval(PING)
        .connection_timeout(link.timeout)
        .request_timeout(Some(link.timeout))
        .subscription_capacity(WAITING_MESSAGES)
        .reconnect_delay_callback(|attempt| {
            let mut pauses = PATIENCE.pauses();
            pauses
                .nth(attempt.saturating_sub(1).min(10))
                .unwrap_or(PATIENCE.longest_pause)
        })
        .event_callback(move |event| {
            seen.send_modify(|seen| match event {
                Event::Connected => {
                    (seen.up, seen.unreachable, seen.denied) = (true, None, None);
                }
                Event::Disconnected | Event::Closed => {
                    seen.lost += u64::from(seen.up);
                    seen.up = false;
                }
                Event::ServerError(ServerError::AuthorizationViolation) => {
                    seen.refused = Some(REFUSED.into());
                }
                Event::ServerError(ServerError::Other(error))
                    if error.to_ascii_lowercase().contains("permissions violation") =>
                {
                    seen.denied = Some(format!(
                        "the server says {error:?}: give the link's user the permission"
                    ));
                }
                Event::ServerError(ServerError::Other(error))
                    if error.to_ascii_lowercase().contains("authentication") =>
                {
                    seen.refused = Some(format!("the server says {error:?}"));
                }
                // The kind of what went wrong with an attempt to get the connection back.
                Event::ClientError(ClientError::Other(kind)) => {
                    let is_refused = ["authorization", "authentication", "tls"]
                        .iter()
                        .any(|word| kind.to_ascii_lowercase().contains(word));
                    match is_refused {
                        true => seen.refused = Some(format!("{REFUSED} ({kind})")),
                        false => seen.unreachable = Some(kind),
                    }
                }
                _ => {}
            });
            async {}
        });
    let connecting = options.connect(link.servers.as_slice());
    let servers = link.servers.join(", ");
    let client = timeout(link.timeout * 2, connecting)
        .await
        .map_err(|_| format!("no answer from {servers} within {:?}", link.timeout * 2))?
        .map_err(|error| match error.kind() {
            async_nats::ConnectErrorKind::AuthorizationViolation
            | async_nats::ConnectErrorKind::Authentication => {
                format!(
                    "{servers} refuses the login ({error}): look at {} of the link",
                    login_keys(&link.login)
                )
            }
            _ => format!("can't connect to {servers}: {}", whole(&error)),
        })?;
    let (major, minor, patch) = OLDEST;
    if !client.is_server_compatible(major, minor, patch) {
        return Err(format!(
            "{servers} is nats-server {}, which is too old: {major}.{minor} is the oldest that will do",
            client.server_info().version
        ));
    }
    Ok(client)
}

/// An error with its causes, where it does not name them itself.
pub(super) fn whole(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

fn login_keys(login: &Login) -> &'static str {
    match login {
        Login::None => "user, token_file, nkey_file or credentials_file, of which there is none,",
        Login::User(_) | Login::Password { .. } => "user and password_file",
        Login::Token(_) => "token_file",
        Login::Nkey(_) => "nkey_file",
        Login::Credentials(_) => "credentials_file",
    }
}

fn options(link: &Link) -> Result<ConnectOptions, String> {
    let options = ConnectOptions::new();
    let mut options = match &link.login {
        // The latter is of MQTT brokers only.
        Login::None | Login::User(_) => options,
        Login::Password { user, file } => options.user_and_password(user.clone(), secret(file)?),
        Login::Token(file) => options.token(secret(file)?),
        Login::Nkey(file) => {
            let seed = secret(file)?;
            if nkeys::KeyPair::from_seed(&seed).is_err() {
                return Err(format!(
                    "{}: is no seed of an nkey; it begins with SU",
                    file.display()
                ));
            }
            options.nkey(seed)
        }
        // They end with a line end, or aren't any.
        Login::Credentials(file) => {
            options
                .credentials(&(secret(file)? + "\n"))
                .map_err(|error| {
                    format!(
                        "{}: no credentials, as `nsc generate creds` makes them: {error}",
                        file.display()
                    )
                })?
        }
    };
    if let Some(file) = &link.tls.ca_file {
        readable(file)?;
        options = options
            .add_root_certificates(file.clone())
            .require_tls(true);
    }
    if let Some((certificate, key)) = &link.tls.own {
        readable(certificate)?;
        readable(key)?;
        options = options.add_client_certificate(certificate.clone(), key.clone());
    }
    Ok(options)
}

/// What stands in a file, without the white space around it.
pub(super) fn secret(file: &Path) -> Result<String, String> {
    let named = |error: String| format!("{}: {error}", file.display());
    let read = RegularFile::open(file, 0).and_then(|opened| opened.read(MAX_SECRET_BYTES));
    let text = read.map_err(|error| named(error.to_string()))?;
    let text = String::from_utf8(text).map_err(|_| named("not UTF-8".into()))?;
    match text.trim() {
        "" => Err(named("is empty".into())),
        text => Ok(text.to_owned()),
    }
}

fn readable(file: &Path) -> Result<(), String> {
    let opened = RegularFile::open(file, 0).map_err(io::Error::other);
    opened
        .map(drop)
        .map_err(|error| format!("{}: {error}", file.display()))
}
