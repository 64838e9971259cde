//! Who may connect, and who may do what.
//!
//! Knows passwords, certificates, tokens and rules, each in a file of its own that can be read again
//! while the gateway runs; knows no sockets and no sessions. `docs/access.md` has the formats.

mod acl;
mod file;
mod filters;
mod login_queue;
pub mod passwords;
mod permissions;
mod throttle;
mod token_keys;
mod tokens;
mod verified;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Instant, SystemTime};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use super::certificate::CertificateNames;
use crate::config::Anonymous;
use acl::{Acl, ClientRules, Subject};
use login_queue::LoginQueue;
use passwords::Passwords;
use permissions::Client;
use throttle::{Suspect, Throttle};
use tokens::TokenKeys;
use verified::Verified;

pub use permissions::Permissions;
pub use tokens::TokenError;

/// Passwords that are checked at a time. Each takes 7 MiB and a core for the time of a login; the
/// others wait, within `mqtt.connect_timeout_ms`.
const CHECKED_AT_ONCE: usize = 2;

const PASSWORD_FILE: &str = "mqtt.auth.password_file";
const JWT_KEY: &str = "mqtt.auth.jwt_key";
const ACL_FILE: &str = "mqtt.auth.acl_file";

/// The keys of `mqtt.auth` in the configuration.
#[derive(Clone, Debug)]
pub struct AccessConfig {
    pub anonymous: Anonymous,
    pub password_file: Option<PathBuf>,
    pub jwt_key: Option<PathBuf>,
    pub acl_file: Option<PathBuf>,
    /// Per source address and per user name. 0: no limit.
    pub max_failures_per_minute: u32,
}

/// A file that can't be used. Names the key of the configuration, the file, and the line.
#[derive(Debug, thiserror::Error)]
#[error("{key}: {place}: {reason}")]
pub struct AccessError {
    key: &'static str,
    /// `path` or `path:line`.
    place: String,
    reason: String,
}

/// What a client shows when it connects.
#[derive(Clone, Copy, Debug)]
pub struct Login<'a> {
    pub user: Option<&'a str>,
    pub password: Option<&'a [u8]>,
    /// Of a certificate that has been verified.
    pub certificate: Option<&'a CertificateNames>,
    pub peer: SocketAddr,
}

impl CertificateNames {
    /// The common name, else the first alternative name.
    fn user(&self) -> Option<&str> {
        let names = self.common_name.iter().chain(&self.alternative_names);
        let mut names = names.map(String::as_str);
        names.find(|name| {
            let fits = (1..=passwords::MAX_NAME_BYTES).contains(&name.len());
            fits && !name.contains(char::is_control)
        })
    }
}

/// Who a client is.
#[derive(Clone, Debug)]
pub struct Identity {
    /// None: anonymous.
    user: Option<Arc<str>>,
    proof: Proof,
    expires: Option<Instant>,
}

/// How it was found out who a client is.
#[derive(Clone, Debug)]
enum Proof {
    Nothing,
    /// It was, before the gateway was started.
    Remembered,
    Certificate,
    Password {
        hash: Arc<str>,
    },
    Token {
        /// Tells the key that signed it from others.
        key: [u8; 32],
        groups: Arc<[String]>,
    },
}

impl Identity {
    /// Whose session was kept from an earlier run of the gateway. What a token said of groups is not.
    pub fn remembered(user: Option<&str>) -> Identity {
        Identity {
            user: user.map(Arc::from),
            proof: match user {
                Some(_) => Proof::Remembered,
                None => Proof::Nothing,
            },
            expires: None,
        }
    }

    /// The user name that was proven; none for an anonymous client.
    pub fn user(&self) -> Option<&str> {
        self.user.as_deref()
    }

    /// When the client has to log in again. Only a token has an end.
    pub fn expires(&self) -> Option<Instant> {
        self.expires
    }

    /// For the log.
    pub fn proof(&self) -> &'static str {
        match self.proof {
            Proof::Nothing => "anonymous",
            Proof::Remembered => "remembered",
            Proof::Certificate => "certificate",
            Proof::Password { .. } => "password",
            Proof::Token { .. } => "token",
        }
    }
}

/// Why a client is not let in. For the log: a client is not to be told which it was.
#[derive(Debug, thiserror::Error)]
pub enum LoginRefused {
    #[error("nobody may connect without a login from this address (mqtt.auth.anonymous)")]
    Anonymous,
    #[error("no user {user:?} in the file of {PASSWORD_FILE}")]
    UnknownUser { user: String },
    #[error("wrong password for user {user:?}")]
    WrongPassword { user: String },
    #[error("user {user:?} gave no password")]
    NoPassword { user: String },
    #[error("a password without a user name")]
    NoUser,
    #[error("the token does not count: {0}")]
    Token(TokenError),
    #[error("user {given:?} showed the token of {proven:?}")]
    OtherUser { given: String, proven: String },
    #[error("too many failed logins of this address or user (mqtt.auth.max_failures_per_minute)")]
    LockedOut,
    #[error("too many logins from this address wait to be checked")]
    Busy,
}

/// Why logins fail, as the metrics name it.
const REASONS: [&str; 7] = [
    "anonymous",
    "unknown_user",
    "wrong_password",
    "token",
    "other_user",
    "locked_out",
    "busy",
];

impl LoginRefused {
    /// One of [`REASONS`].
    fn reason(&self) -> &'static str {
        match self {
            LoginRefused::Anonymous => "anonymous",
            LoginRefused::UnknownUser { .. } | LoginRefused::NoUser => "unknown_user",
            LoginRefused::WrongPassword { .. } | LoginRefused::NoPassword { .. } => {
                "wrong_password"
            }
            LoginRefused::Token(_) => "token",
            LoginRefused::OtherUser { .. } => "other_user",
            LoginRefused::LockedOut => "locked_out",
            LoginRefused::Busy => "busy",
        }
    }
}

/// Decides on logins, and hands out permissions. One for the gateway.
#[derive(Debug)]
pub struct Access {
    config: AccessConfig,
    files: ArcSwap<Files>,
    /// Of everybody who has permissions that depend on rules. Locked while they change, so that no
    /// client gets old ones meanwhile.
    clients: Mutex<Clients>,
    throttle: Arc<Mutex<Throttle>>,
    checking: Arc<Semaphore>,
    queue: LoginQueue,
    verified: Arc<Verified>,
    failed: [AtomicU64; REASONS.len()],
}

/// What stands in the files.
#[derive(Debug)]
struct Files {
    passwords: Option<Passwords>,
    tokens: Option<TokenKeys>,
    acl: Option<Acl>,
}

#[derive(Debug, Default)]
struct Clients {
    /// The number of reloads.
    generation: u64,
    permissions: Vec<Weak<Permissions>>,
    /// The length at which those that are gone are taken out.
    crowded: usize,
}

impl Files {
    fn load(config: &AccessConfig) -> Result<Files, AccessError> {
        let passwords = config.password_file.as_ref().map(|path| {
            file::warn_if_open(PASSWORD_FILE, path);
            file::load(PASSWORD_FILE, path, Passwords::parse)
        });
        let tokens = config.jwt_key.as_ref().map(|path| {
            let keys = file::load(JWT_KEY, path, TokenKeys::parse)?;
            keys.warn_if_open(path);
            Ok(keys)
        });
        let acl = config.acl_file.as_ref();
        let acl = acl.map(|path| file::load(ACL_FILE, path, Acl::parse));
        Ok(Files {
            passwords: passwords.transpose()?,
            tokens: tokens.transpose()?,
            acl: acl.transpose()?,
        })
    }

    /// Whether who has proven to be `identity` could still do so.
    fn vouch_for(&self, identity: &Identity) -> bool {
        match &identity.proof {
            Proof::Nothing | Proof::Remembered | Proof::Certificate => true,
            Proof::Password { hash } => {
                let user = self.passwords.as_ref().zip(identity.user());
                let user = user.and_then(|(passwords, user)| passwords.get(user));
                user.is_some_and(|user| user.hash == *hash)
            }
            Proof::Token { key, .. } => self.tokens.as_ref().is_some_and(|keys| keys.has(key)),
        }
    }

    /// What the rules come to for a client: nothing for a user that the password file had and has no
    /// more. One whose password or key has changed is the same user still: what waits for its session
    /// goes by its name, until it logs in again.
    fn rules_for(&self, client: &Client) -> ClientRules {
        let Client {
            identity,
            client_id,
        } = client;
        let user = self.passwords.as_ref().zip(identity.user());
        let user = user.and_then(|(passwords, user)| passwords.get(user));
        let is_gone = user.is_none() && matches!(identity.proof, Proof::Password { .. });
        let Some(acl) = self.acl.as_ref().filter(|_| !is_gone) else {
            return ClientRules::default();
        };
        // However a user was shown, it is in its groups.
        let mut groups = user.map_or_else(Vec::new, |user| user.groups.clone());
        if let Proof::Token { groups: more, .. } = &identity.proof {
            groups.extend(more.iter().cloned());
        }
        acl.for_client(&Subject {
            user: identity.user(),
            client_id,
            groups: &groups,
        })
    }
}

impl Access {
    /// Reads the files that `config` names.
    pub fn load(config: AccessConfig) -> Result<Access, AccessError> {
        let files = Files::load(&config)?;
        Ok(Access {
            files: ArcSwap::from_pointee(files),
            clients: Mutex::default(),
            throttle: Arc::new(Mutex::new(Throttle::new(config.max_failures_per_minute))),
            checking: Arc::new(Semaphore::new(CHECKED_AT_ONCE)),
            queue: LoginQueue::default(),
            verified: Arc::default(),
            failed: Default::default(),
            config,
        })
    }

    /// Reads the files anew and gives everybody new permissions. If a file is wrong, everything stays
    /// as it was. Blocks for as long as reading takes.
    pub fn reload(&self) -> Result<(), AccessError> {
        let files = Arc::new(Files::load(&self.config)?);
        let mut clients = self.clients.lock();
        self.files.store(files.clone());
        clients.generation += 1;
        let generation = clients.generation;
        clients.permissions.retain(|permissions| {
            let Some(permissions) = permissions.upgrade() else {
                return false;
            };
            permissions.update(|client| files.rules_for(client), generation);
            true
        });
        Ok(())
    }

    /// Whether who once logged in so could still do so: the user is there, with the same password; the
    /// key of the token is.
    pub fn still_valid(&self, identity: &Identity) -> bool {
        self.files.load().vouch_for(identity)
    }

    /// Whether `user` has a password, or may have a token.
    pub fn may_know(&self, user: &str) -> bool {
        let files = self.files.load();
        let passwords = files.passwords.as_ref();
        files.tokens.is_some() || passwords.is_some_and(|passwords| passwords.get(user).is_some())
    }

    /// What a client may do from now on.
    pub fn permissions(&self, identity: &Identity, client_id: &str) -> Arc<Permissions> {
        // Whether there are rules is a matter of the configuration, which is read once.
        if self.config.acl_file.is_none() {
            return Permissions::everything();
        }
        let client = Client {
            identity: identity.clone(),
            client_id: client_id.to_owned(),
        };
        let mut clients = self.clients.lock();
        let rules = self.files.load().rules_for(&client);
        let generation = clients.generation;
        let permissions = Arc::new(Permissions::restricted(client, rules, generation));
        clients.add(&permissions);
        permissions
    }

    /// Whether a client that shows nothing is let in from there.
    pub fn admits_anonymous(&self, peer: SocketAddr) -> bool {
        match self.config.anonymous {
            Anonymous::Never => false,
            Anonymous::Loopback => peer.ip().to_canonical().is_loopback(),
            Anonymous::Always => true,
        }
    }

    /// Finds out who a client is. A password takes its time, on a thread of its own, and waits until
    /// it is its turn.
    pub async fn log_in(&self, login: Login<'_>) -> Result<Identity, LoginRefused> {
        let outcome = self.identify(login).await;
        if let Err(refused) = &outcome {
            let counters = REASONS.iter().zip(&self.failed);
            for (_, counter) in counters.filter(|(reason, _)| **reason == refused.reason()) {
                counter.fetch_add(1, Ordering::Relaxed);
            }
        }
        outcome
    }

    /// Failed logins since the start, by reason.
    pub fn failed_logins(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let counts = self
            .failed
            .iter()
            .map(|count| count.load(Ordering::Relaxed));
        REASONS.into_iter().zip(counts)
    }

    async fn identify(&self, login: Login<'_>) -> Result<Identity, LoginRefused> {
        let files = self.files.load_full();
        let certified = login.certificate.and_then(CertificateNames::user);
        // Where nothing can check them, a user name and a password say nothing.
        if files.passwords.is_some() || files.tokens.is_some() {
            match (login.user, login.password) {
                (user, Some(password)) => {
                    let is_token = files.passwords.is_none() || tokens::looks_like_token(password);
                    return match &files.tokens {
                        Some(keys) if is_token => self.check_token(keys, login, password),
                        _ => {
                            let user = user.ok_or(LoginRefused::NoUser)?;
                            self.check_password(&files, user, password, login).await
                        }
                    };
                }
                (Some(user), None) if certified != Some(user) => {
                    let user = shortened(user);
                    return Err(LoginRefused::NoPassword { user });
                }
                _ => {}
            }
        }
        if let Some(user) = certified {
            return Ok(Identity {
                user: Some(user.into()),
                proof: Proof::Certificate,
                expires: None,
            });
        }
        match self.admits_anonymous(login.peer) {
            true => Ok(Identity {
                user: None,
                proof: Proof::Nothing,
                expires: None,
            }),
            false => Err(LoginRefused::Anonymous),
        }
    }

    /// A right token is let in whoever has failed before: nobody finds one by trying.
    fn check_token(
        &self,
        keys: &TokenKeys,
        login: Login<'_>,
        token: &[u8],
    ) -> Result<Identity, LoginRefused> {
        let now = SystemTime::now();
        let checked = keys.verify(token, now).map_err(LoginRefused::Token);
        let checked = checked.and_then(|token| match login.user {
            Some(given) if given != token.user => Err(LoginRefused::OtherUser {
                given: shortened(given),
                proven: token.user,
            }),
            _ => Ok(token),
        });
        let token = match checked {
            Ok(token) => token,
            Err(refused) => {
                let suspect = Suspect {
                    address: login.peer.ip(),
                    user: None,
                };
                let mut throttle = self.throttle.lock();
                let is_locked_out = throttle.is_locked_out(suspect, Instant::now());
                throttle.failed(suspect, Instant::now());
                return Err(match is_locked_out {
                    true => LoginRefused::LockedOut,
                    false => refused,
                });
            }
        };
        let left = token
            .expires
            .map(|at| at.duration_since(now).unwrap_or_default());
        Ok(Identity {
            user: Some(token.user.into()),
            proof: Proof::Token {
                key: token.key,
                groups: token.groups.into(),
            },
            expires: left.and_then(|left| Instant::now().checked_add(left)),
        })
    }

    async fn check_password(
        &self,
        files: &Files,
        user: &str,
        password: &[u8],
        login: Login<'_>,
    ) -> Result<Identity, LoginRefused> {
        let suspect = Suspect {
            address: login.peer.ip(),
            user: Some(user),
        };
        let refuse_locked_out = || match self.throttle.lock().is_locked_out(suspect, Instant::now())
        {
            true => Err(LoginRefused::LockedOut),
            false => Ok(()),
        };
        refuse_locked_out()?;
        let known = files.passwords.as_ref().and_then(|file| file.get(user));
        if let Some(known) = known
            && self.verified.knows(user, &known.hash, password)
        {
            return Ok(Identity {
                user: Some(user.into()),
                proof: Proof::Password {
                    hash: known.hash.clone(),
                },
                expires: None,
            });
        }
        let _place = self
            .queue
            .enter(login.peer.ip())
            .ok_or(LoginRefused::Busy)?;
        let turn = self.checking.clone().acquire_owned().await;
        // Those who waited at the same time may have failed meanwhile.
        refuse_locked_out()?;
        let passwords = files.passwords.as_ref();
        let hash = passwords
            .and_then(|passwords| passwords.get(user))
            .map(|user| user.hash.clone());
        let right = tokio::task::spawn_blocking({
            let (throttle, verified) = (self.throttle.clone(), self.verified.clone());
            let (hash, password) = (hash.clone(), password.to_owned());
            let (address, user) = (login.peer.ip(), user.to_owned());
            move || {
                // Held here, and not by the connection, which may be gone before the work is done. What
                // came of it counts all the same: else no login would ever be in time on a machine that
                // is too busy for one.
                let _turn = turn;
                let right = passwords::verify(hash.as_deref(), &password);
                let suspect = Suspect {
                    address,
                    user: Some(&user),
                };
                match hash {
                    Some(hash) if right => {
                        throttle.lock().succeeded(suspect, Instant::now());
                        verified.remember(&user, &hash, &password);
                    }
                    _ => throttle.lock().failed(suspect, Instant::now()),
                }
                right
            }
        });
        let right = right.await.unwrap_or(false);
        match hash {
            Some(hash) if right => Ok(Identity {
                user: Some(user.into()),
                proof: Proof::Password { hash },
                expires: None,
            }),
            hash => {
                let user = shortened(user);
                Err(match hash {
                    Some(_) => LoginRefused::WrongPassword { user },
                    None => LoginRefused::UnknownUser { user },
                })
            }
        }
    }
}

impl Clients {
    fn add(&mut self, permissions: &Arc<Permissions>) {
        if self.permissions.len() >= self.crowded {
            self.permissions.retain(|client| client.strong_count() > 0);
            self.crowded = (2 * self.permissions.len()).max(64);
        }
        self.permissions.push(Arc::downgrade(permissions));
    }
}

/// As much of what a stranger wrote as goes into the log.
fn shortened(text: &str) -> String {
    text.chars().take(64).collect()
}

impl Passwords {
    /// Reads a password file, for those who list it or change it.
    pub fn load(path: &std::path::Path) -> Result<Passwords, file::FileError> {
        file::read(path, file::MAKE_PASSWORD_FILE, Passwords::parse)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;
    use tempfile::TempDir;

    use super::passwords::tests::cheap_hash;
    use super::tokens::tests::{SECRET, hs256};
    use super::*;
    use crate::event::TopicFilter;

    const FAR_FUTURE: u64 = 4_000_000_000;

    /// A folder with the three files, and a gate that reads those that are named.
    struct House {
        folder: TempDir,
        config: AccessConfig,
    }

    impl House {
        fn new() -> House {
            let folder = tempfile::tempdir().unwrap();
            let config = AccessConfig {
                anonymous: Anonymous::Loopback,
                password_file: None,
                jwt_key: None,
                acl_file: None,
                max_failures_per_minute: 0,
            };
            House { folder, config }
        }

        fn with_passwords(mut self, text: &str) -> House {
            self.config.password_file = Some(self.write("passwords", text));
            self
        }

        fn with_tokens(mut self) -> House {
            self.config.jwt_key = Some(self.write("secret", SECRET));
            self
        }

        fn with_rules(mut self, text: &str) -> House {
            self.config.acl_file = Some(self.write("acl.toml", text));
            self
        }

        fn write(&self, name: &str, text: &str) -> PathBuf {
            let path = self.folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        }

        fn access(&self) -> Access {
            Access::load(self.config.clone()).unwrap()
        }
    }

    fn anna_and_otto() -> String {
        format!("anna:{}:night\notto:{}\n", cheap_hash("a"), cheap_hash("o"))
    }

    fn nobody(peer: &str) -> Login<'static> {
        Login {
            user: None,
            password: None,
            certificate: None,
            peer: peer.parse().unwrap(),
        }
    }

    fn login<'a>(user: &'a str, password: &'a str) -> Login<'a> {
        Login {
            user: Some(user).filter(|user| !user.is_empty()),
            password: Some(password.as_bytes()),
            ..nobody("192.0.2.1:5000")
        }
    }

    fn reason(outcome: Result<Identity, LoginRefused>) -> &'static str {
        outcome.unwrap_err().reason()
    }

    #[tokio::test]
    async fn who_may_come_without_a_name_is_configured() {
        let local = [
            "127.0.0.1:1",
            "127.9.9.9:1",
            "[::1]:1",
            "[::ffff:127.0.0.1]:1",
        ];
        let remote = ["192.0.2.1:1", "[2001:db8::1]:1", "0.0.0.0:1"];
        for (anonymous, here, there) in [
            (Anonymous::Never, false, false),
            (Anonymous::Loopback, true, false),
            (Anonymous::Always, true, true),
        ] {
            let mut house = House::new();
            house.config.anonymous = anonymous;
            let access = house.access();
            for (peers, expected) in [(&local[..], here), (&remote[..], there)] {
                for peer in peers {
                    let outcome = access.log_in(nobody(peer)).await;
                    assert_eq!(outcome.is_ok(), expected, "{anonymous:?} {peer}");
                }
            }
        }
    }

    #[tokio::test]
    async fn where_nothing_checks_a_password_it_says_nothing() {
        let access = House::new().access();
        let here = Login {
            peer: "127.0.0.1:1".parse().unwrap(),
            ..login("anna", "whatever")
        };
        assert_eq!(access.log_in(here).await.unwrap().user(), None);
        assert_eq!(reason(access.log_in(login("anna", "x")).await), "anonymous");
    }

    #[tokio::test]
    async fn a_password_has_to_be_right() {
        let access = House::new().with_passwords(&anna_and_otto()).access();
        let anna = access.log_in(login("anna", "a")).await.unwrap();
        assert_eq!((anna.user(), anna.proof()), (Some("anna"), "password"));
        assert_eq!(
            reason(access.log_in(login("anna", "o")).await),
            "wrong_password"
        );
        assert_eq!(
            reason(access.log_in(login("Anna", "a")).await),
            "unknown_user"
        );
        assert_eq!(reason(access.log_in(login("", "a")).await), "unknown_user");
        let no_password = Login {
            password: None,
            ..login("anna", "")
        };
        assert_eq!(reason(access.log_in(no_password).await), "wrong_password");
        let local_but_wrong = Login {
            peer: "127.0.0.1:1".parse().unwrap(),
            ..login("anna", "x")
        };
        assert_eq!(
            reason(access.log_in(local_but_wrong).await),
            "wrong_password"
        );
        assert_eq!(
            access.failed_logins().map(|(_, count)| count).sum::<u64>(),
            5
        );
        assert!(access.log_in(nobody("127.0.0.1:1")).await.is_ok());
    }

    #[tokio::test]
    async fn a_token_takes_the_place_of_a_password() {
        let house = House::new().with_passwords(&anna_and_otto()).with_tokens();
        let access = house.access();
        let token = hs256(json!({ "sub": "press", "exp": FAR_FUTURE, "groups": ["g"] }));
        for user in ["", "press"] {
            let press = access.log_in(login(user, &token)).await.unwrap();
            assert_eq!((press.user(), press.proof()), (Some("press"), "token"));
            assert!(press.expires().is_some());
        }
        assert_eq!(
            reason(access.log_in(login("anna", &token)).await),
            "other_user"
        );
        let old = hs256(json!({ "sub": "press", "exp": 1000 }));
        assert_eq!(reason(access.log_in(login("press", &old)).await), "token");
        assert!(access.log_in(login("anna", "a")).await.is_ok());
    }

    #[tokio::test]
    async fn a_certificate_has_a_name() {
        let access = House::new().with_passwords(&anna_and_otto()).access();
        let names = |common_name: Option<&str>, alternative: &[&str]| CertificateNames {
            common_name: common_name.map(str::to_owned),
            alternative_names: alternative.iter().map(|&name| name.to_owned()).collect(),
        };
        for (names, user) in [
            (names(Some("press"), &["other"]), Some("press")),
            (names(None, &["press.example", "b"]), Some("press.example")),
            (names(Some(""), &["press"]), Some("press")),
            (names(Some("a\nb"), &[]), None),
        ] {
            let shown = Login {
                certificate: Some(&names),
                ..nobody("192.0.2.1:1")
            };
            let outcome = access.log_in(shown).await;
            assert_eq!(
                outcome
                    .ok()
                    .and_then(|identity| identity.user().map(str::to_owned))
                    .as_deref(),
                user
            );
        }
        let press = names(Some("press"), &[]);
        let with = |user, password: Option<&'static str>| Login {
            user,
            password: password.map(str::as_bytes),
            certificate: Some(&press),
            ..nobody("192.0.2.1:1")
        };
        let named = access.log_in(with(Some("press"), None)).await.unwrap();
        assert_eq!(named.proof(), "certificate");
        assert!(access.log_in(with(Some("anna"), None)).await.is_err());
        assert!(access.log_in(with(Some("anna"), Some("x"))).await.is_err());
        let both = access.log_in(with(Some("anna"), Some("a"))).await.unwrap();
        assert_eq!((both.user(), both.proof()), (Some("anna"), "password"));
    }

    #[tokio::test]
    async fn who_fails_too_often_is_not_listened_to() {
        let mut house = House::new().with_passwords(&anna_and_otto()).with_tokens();
        house.config.max_failures_per_minute = 2;
        let access = house.access();
        for _ in 0..2 {
            assert_eq!(
                reason(access.log_in(login("anna", "x")).await),
                "wrong_password"
            );
        }
        assert_eq!(
            reason(access.log_in(login("anna", "x")).await),
            "locked_out"
        );
        assert_eq!(
            reason(access.log_in(login("anna", "a")).await),
            "locked_out"
        );
        let token = hs256(json!({ "sub": "press", "exp": FAR_FUTURE }));
        assert!(access.log_in(login("press", &token)).await.is_ok());
        assert_eq!(
            reason(access.log_in(login("press", "eyJ.a.b")).await),
            "locked_out"
        );
        let elsewhere = Login {
            peer: "198.51.100.1:1".parse().unwrap(),
            ..login("otto", "o")
        };
        assert!(access.log_in(elsewhere).await.is_ok());
    }

    #[tokio::test]
    async fn logins_at_once_are_checked_two_at_a_time() {
        let access = Arc::new(House::new().with_passwords(&anna_and_otto()).access());
        let logins: Vec<_> = (0..50)
            .map(|_| {
                let access = access.clone();
                tokio::spawn(async move { access.log_in(login("anna", "a")).await.is_ok() })
            })
            .collect();
        for outcome in logins {
            assert!(outcome.await.unwrap());
        }
        assert_eq!(access.checking.available_permits(), CHECKED_AT_ONCE);
    }

    const NIGHT_ONLY: &str =
        "[[rule]]\ngroups = [\"night\"]\nallow = [\"publish\"]\ntopics = [\"n/#\"]";

    #[tokio::test]
    async fn a_reload_changes_the_permissions_of_those_who_are_there() {
        let house = House::new()
            .with_passwords(&anna_and_otto())
            .with_rules(NIGHT_ONLY);
        let access = house.access();
        let (anna, otto) = (
            access.log_in(login("anna", "a")).await.unwrap(),
            access.log_in(login("otto", "o")).await.unwrap(),
        );
        let (of_anna, of_otto) = (
            access.permissions(&anna, "1"),
            access.permissions(&otto, "2"),
        );
        assert!(of_anna.may_publish("n/x") && !of_otto.may_publish("n/x"));
        let before = of_anna.generation();

        house.write(
            "passwords",
            &anna_and_otto()
                .replace(":night", "")
                .replace("otto:", "uwe:"),
        );
        access.reload().unwrap();
        assert!(!of_anna.may_publish("n/x"), "the group is gone");
        assert!(access.still_valid(&anna) && !access.still_valid(&otto));
        assert!(of_anna.generation() > before);

        house.write(
            "acl.toml",
            "[[rule]]\nallow = [\"publish\"]\ntopics = [\"#\"]",
        );
        access.reload().unwrap();
        assert!(of_anna.may_publish("n/x"));
        assert!(!of_otto.may_publish("n/x"), "no longer a user");

        house.write("passwords", &format!("anna:{}", cheap_hash("new")));
        access.reload().unwrap();
        assert!(!access.still_valid(&anna));
        assert!(access.log_in(login("anna", "a")).await.is_err());
        assert!(access.log_in(login("anna", "new")).await.is_ok());
    }

    #[tokio::test]
    async fn a_wrong_file_leaves_everything_as_it_was() {
        let house = House::new()
            .with_passwords(&anna_and_otto())
            .with_rules(NIGHT_ONLY);
        let access = house.access();
        let anna = access.log_in(login("anna", "a")).await.unwrap();
        let permissions = access.permissions(&anna, "1");
        house.write("passwords", "");
        house.write(
            "acl.toml",
            "[[rule]]\nallow = [\"publish\"]\n\ntopics = [\"a/#/b\"]",
        );
        let error = access.reload().unwrap_err().to_string();
        let path = house.folder.path().join("acl.toml");
        assert!(
            error.starts_with(&format!("mqtt.auth.acl_file: {}:4: ", path.display())),
            "{error}"
        );
        assert!(access.still_valid(&anna), "not half of it either");
        assert!(permissions.may_publish("n/x"));
        assert_eq!(permissions.generation(), 0);
        std::fs::remove_file(path).unwrap();
        assert!(access.reload().is_err());
    }

    #[tokio::test]
    async fn a_token_counts_as_long_as_its_key_does() {
        let house = House::new().with_tokens();
        let access = house.access();
        let token = hs256(json!({ "sub": "press", "exp": FAR_FUTURE }));
        let press = access.log_in(login("", &token)).await.unwrap();
        access.reload().unwrap();
        assert!(access.still_valid(&press));
        house.write("secret", &"x".repeat(32));
        access.reload().unwrap();
        assert!(!access.still_valid(&press));
    }

    #[test]
    fn without_rules_everything_is_allowed_and_costs_nothing() {
        let access = House::new().access();
        let anonymous = Identity {
            user: None,
            proof: Proof::Nothing,
            expires: None,
        };
        let permissions = access.permissions(&anonymous, "c");
        assert!(permissions.may_publish("a") && permissions.may_receive("$SYS/x"));
        assert!(permissions.may_subscribe(&TopicFilter::new("#").unwrap()));
        assert!(Arc::ptr_eq(&permissions, &Permissions::everything()));
        assert!(access.clients.lock().permissions.is_empty());
    }

    #[test]
    fn clients_that_are_gone_take_no_room() {
        let access = House::new().with_rules(NIGHT_ONLY).access();
        let anonymous = Identity {
            user: None,
            proof: Proof::Nothing,
            expires: None,
        };
        for _ in 0..10_000 {
            access.permissions(&anonymous, "c");
        }
        assert!(access.clients.lock().permissions.capacity() < 1000);
    }

    #[test]
    fn a_file_that_is_missing_is_named_with_its_key() {
        let mut house = House::new();
        let missing = Path::new("/nowhere/passwords").to_owned();
        house.config.password_file = Some(missing);
        let error = Access::load(house.config).unwrap_err().to_string();
        assert!(
            error.starts_with("mqtt.auth.password_file: /nowhere/passwords: No such file"),
            "{error}"
        );
    }
}
