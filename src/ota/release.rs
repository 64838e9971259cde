//! A release: which system a channel offers, and for whom. `release.json` and, beside it, its signatures.
//!
//! The document is JSON with exactly the fields of [`Release`]; `release.json.sig` has one signature of its bytes a
//! line, in Nix's form `name:base64`. docs/ota.md has an example.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use nix_derivation::store_path::StorePath;
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::keys::{self, BadKey, TrustedKey, Verdict};
use super::version;

/// The only schema there is.
const SCHEMA: u64 = 1;

/// 2026-01-01. Before that no clock is right.
const CLOCK_WORKS_S: i64 = 1_767_225_600;

/// Far more than a release has to say.
pub const MAX_BYTES: usize = 64 * 1024;

/// Most letters of a product, a version or a seed.
const MAX_WORD_BYTES: usize = 128;

/// Of schema 1, besides `schema` and `rollout`.
const FIELDS: [&str; 8] = [
    "product",
    "version",
    "system",
    "toplevel",
    "created",
    "expires",
    "add_keys",
    "revoke_keys",
];

const ROLLOUT_FIELDS: [&str; 2] = ["percent", "seed"];

/// What a channel offers.
///
/// What a gateway remembers of one may be of a newer Headgate, so unknown fields are refused only in
/// [`Release::parse`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Release {
    pub schema: u64,
    /// What the system is for; a gateway takes only releases of its own product.
    pub product: String,
    pub version: String,
    /// As Nix names it: `aarch64-linux`.
    pub system: String,
    /// Store path of the system.
    pub toplevel: String,
    /// When it was signed. A gateway that has seen a release takes none that is older.
    pub created: Timestamp,
    /// From when on nobody takes it any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<Timestamp>,
    /// For some gateways only; for all if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<Rollout>,
    /// Keys that are trusted from now on: `name:base64`, or `name:base64@TIME`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub add_keys: Vec<String>,
    /// Names of keys that are not trusted any more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub revoke_keys: Vec<String>,
}

/// The part of the gateways that a release is for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rollout {
    /// 0 to 100.
    pub percent: f64,
    /// Another one draws the gateways anew.
    pub seed: String,
}

impl Eq for Rollout {}

impl Rollout {
    /// Where in the row a gateway stands: from 0 to less than 100. It is its turn once `percent` is beyond that.
    pub fn place(&self, gateway: &str) -> f64 {
        let mut hash = Sha256::new();
        hash.update(self.seed.as_bytes());
        hash.update([0]);
        hash.update(gateway.as_bytes());
        let digest = hash.finalize();
        let first = u32::from_be_bytes(*digest.first_chunk().expect("a SHA-256 has 32 bytes"));
        f64::from(first) / f64::from(u32::MAX) * 99.999_999
    }
}

/// Why a document is no release that this gateway takes.
#[derive(Debug, thiserror::Error)]
pub enum ReleaseError {
    #[error("is no release: {0}")]
    Unreadable(serde_path_to_error::Error<serde_json::Error>),
    #[error("is no release: something comes after the closing brace")]
    TrailingBytes,
    #[error("is longer than {MAX_BYTES} bytes, so it is no release")]
    TooLong,
    #[error(
        "has schema {0}, and this Headgate knows schema {SCHEMA}; update in steps, through a release that it knows"
    )]
    UnknownSchema(u64),
    #[error("has a field {0:?}, which schema {SCHEMA} does not have")]
    UnknownField(String),
    #[error("has a {field} that is none: {value:?}")]
    BadField { field: &'static str, value: String },
    #[error("has a toplevel that is no store path: {0:?}")]
    BadToplevel(String),
    #[error("has a key in add_keys that is none: {0}")]
    BadKey(#[from] BadKey),
    #[error(
        "is signed by none of the trusted keys ({trusted}); sign it with `headgate release sign`, or add its key to ota.trusted_keys"
    )]
    Unsigned { trusted: String },
    #[error(
        "is signed by the key {0}, which has expired; sign it with a key that is trusted today"
    )]
    ExpiredKey(String),
    #[error("is for the product {found:?}, and this gateway is {wanted:?} (ota.product)")]
    OtherProduct { found: String, wanted: String },
    #[error("is for {found}, and this gateway is {wanted}")]
    OtherSystem { found: String, wanted: String },
    #[error("has expired on {0}; sign it anew")]
    Expired(Timestamp),
    #[error(
        "is version {found}, older than {running}, which runs here; `--allow-downgrade` takes it nevertheless"
    )]
    Downgrade { found: String, running: String },
    #[error(
        "was made on {found}, before one that this gateway has seen ({seen}): somebody replays it, or it has to be signed anew"
    )]
    Replayed { found: Timestamp, seen: Timestamp },
    #[error(
        "says that it was made on {found}, and it is only {now}: see to the clock of whoever signs, or of this gateway"
    )]
    FromTheFuture { found: Timestamp, now: Timestamp },
    #[error(
        "calls itself {version}, as the system that runs here does, but is another one; give it a version of its own"
    )]
    SameVersion { version: String },
    #[error("is version {found}, and this gateway stays at {pin} (ota.pin)")]
    Pinned { found: String, pin: String },
}

/// What a gateway knows about itself when it looks at a release.
#[derive(Clone, Debug)]
pub struct Gateway<'a> {
    pub product: &'a str,
    /// As Nix names it.
    pub system: &'a str,
    /// Its place in rollouts follows from that.
    pub id: &'a str,
    /// Version and store path of the system that runs; the version is unknown of one that came with no release.
    pub version: Option<&'a str>,
    pub toplevel: &'a str,
    /// The version to stay at, if it is to stay.
    pub pin: Option<&'a str>,
    /// When the newest release that was ever taken in was made.
    pub newest_seen: Option<Timestamp>,
    pub allow_downgrade: bool,
}

/// What is to be done with a release that is in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Offer {
    /// It runs here.
    Running,
    /// For others, as yet.
    NotYet {
        percent: f64,
        place: f64,
    },
    Update,
}

impl Release {
    /// Reads a document whose signature is good.
    pub fn read(
        document: &[u8],
        signatures: &str,
        keys: &[TrustedKey],
        now: Timestamp,
    ) -> Result<Release, ReleaseError> {
        if document.len() > MAX_BYTES {
            return Err(ReleaseError::TooLong);
        }
        match keys::verify(document, signatures, keys, now) {
            Verdict::Good(_) => Release::parse(document),
            Verdict::Expired(name) => Err(ReleaseError::ExpiredKey(name)),
            Verdict::Bad => {
                let names: Vec<_> = keys.iter().map(|key| key.key.name.as_str()).collect();
                Err(ReleaseError::Unsigned {
                    trusted: names.join(", "),
                })
            }
        }
    }

    /// Reads a document, whoever has written it.
    pub fn parse(document: &[u8]) -> Result<Release, ReleaseError> {
        #[derive(Deserialize)]
        struct Schema {
            schema: u64,
            #[serde(default)]
            rollout: Option<BTreeMap<String, IgnoredAny>>,
            #[serde(flatten)]
            fields: BTreeMap<String, IgnoredAny>,
        }
        // Of another schema, the rest may be anything.
        let Schema {
            schema,
            rollout,
            fields,
        } = read_json(document)?;
        if schema != SCHEMA {
            return Err(ReleaseError::UnknownSchema(schema));
        }
        for (found, known) in [
            (fields, &FIELDS[..]),
            (rollout.unwrap_or_default(), &ROLLOUT_FIELDS[..]),
        ] {
            let mut names = found.into_keys();
            if let Some(name) = names.find(|name| !known.contains(&name.as_str())) {
                return Err(ReleaseError::UnknownField(
                    name.chars().take(MAX_WORD_BYTES).collect(),
                ));
            }
        }
        let release: Release = read_json(document)?;
        release.check()?;
        Ok(release)
    }

    /// The fields by themselves, without anything that they are compared with.
    pub fn check(&self) -> Result<(), ReleaseError> {
        for (field, value) in [
            ("product", &self.product),
            ("version", &self.version),
            ("system", &self.system),
        ] {
            if !is_word(value) {
                let value = value.chars().take(MAX_WORD_BYTES).collect();
                return Err(ReleaseError::BadField { field, value });
            }
        }
        if let Some(Rollout { percent, seed }) = &self.rollout {
            if !(0.0..=100.0).contains(percent) {
                return Err(ReleaseError::BadField {
                    field: "rollout.percent",
                    value: percent.to_string(),
                });
            }
            if seed.len() > MAX_WORD_BYTES {
                return Err(ReleaseError::BadField {
                    field: "rollout.seed",
                    value: seed.chars().take(MAX_WORD_BYTES).collect(),
                });
            }
        }
        self.toplevel()?;
        self.added_keys()?;
        Ok(())
    }

    pub fn toplevel(&self) -> Result<StorePath, ReleaseError> {
        StorePath::from_absolute_path(self.toplevel.as_bytes())
            .map_err(|_| ReleaseError::BadToplevel(self.toplevel.chars().take(300).collect()))
    }

    pub fn added_keys(&self) -> Result<Vec<TrustedKey>, ReleaseError> {
        let keys = self.add_keys.iter().map(|key| key.parse());
        Ok(keys.collect::<Result<_, BadKey>>()?)
    }

    /// Whether this gateway takes it.
    pub fn offer(&self, gateway: &Gateway<'_>, now: Timestamp) -> Result<Offer, ReleaseError> {
        if self.product != gateway.product {
            return Err(ReleaseError::OtherProduct {
                found: self.product.clone(),
                wanted: gateway.product.to_owned(),
            });
        }
        if self.system != gateway.system {
            return Err(ReleaseError::OtherSystem {
                found: self.system.clone(),
                wanted: gateway.system.to_owned(),
            });
        }
        if let Some(pin) = gateway.pin.filter(|pin| *pin != self.version) {
            return Err(ReleaseError::Pinned {
                found: self.version.clone(),
                pin: pin.to_owned(),
            });
        }
        if self.toplevel == gateway.toplevel {
            return Ok(Offer::Running);
        }
        self.check_created(now)?;
        if let Some(expires) = self.expires.filter(|expires| *expires <= now) {
            return Err(ReleaseError::Expired(expires));
        }
        if !gateway.allow_downgrade {
            self.is_newer(gateway)?;
        }
        if let Some(rollout) = &self.rollout {
            let place = rollout.place(gateway.id);
            if place >= rollout.percent {
                let percent = rollout.percent;
                return Ok(Offer::NotYet { percent, place });
            }
        }
        Ok(Offer::Update)
    }

    /// One from far ahead would make each later one look old. A clock that was never set can't tell.
    pub fn check_created(&self, now: Timestamp) -> Result<(), ReleaseError> {
        let latest = now
            .checked_add(SignedDuration::from_hours(24))
            .unwrap_or(now);
        if self.created > latest && now.as_second() >= CLOCK_WORKS_S {
            return Err(ReleaseError::FromTheFuture {
                found: self.created,
                now,
            });
        }
        Ok(())
    }

    fn is_newer(&self, gateway: &Gateway<'_>) -> Result<(), ReleaseError> {
        if let Some(running) = gateway.version {
            match version::compare(&self.version, running) {
                Ordering::Less => {
                    return Err(ReleaseError::Downgrade {
                        found: self.version.clone(),
                        running: running.to_owned(),
                    });
                }
                Ordering::Equal => {
                    return Err(ReleaseError::SameVersion {
                        version: self.version.clone(),
                    });
                }
                Ordering::Greater => {}
            }
        }
        match gateway.newest_seen {
            Some(seen) if self.created < seen => Err(ReleaseError::Replayed {
                found: self.created,
                seen,
            }),
            _ => Ok(()),
        }
    }
}

/// Whether a text can be a product, a version or a system. Versions become names of files.
pub fn is_word(text: &str) -> bool {
    let is_fine = |letter: char| letter.is_ascii_alphanumeric() || "._+-".contains(letter);
    text.len() <= MAX_WORD_BYTES
        && text.starts_with(|first: char| first.is_ascii_alphanumeric())
        && text.chars().all(is_fine)
}

/// With an error that says where in the document it is.
fn read_json<'d, T: Deserialize<'d>>(document: &'d [u8]) -> Result<T, ReleaseError> {
    let mut reader = serde_json::Deserializer::from_slice(document);
    let read = serde_path_to_error::deserialize(&mut reader).map_err(ReleaseError::Unreadable)?;
    reader.end().map_err(|_| ReleaseError::TrailingBytes)?;
    Ok(read)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ota::keys::SecretKey;

    const OLD: &str = "/nix/store/00000000000000000000000000000000-nixos-system-1";
    const NEW: &str = "/nix/store/11111111111111111111111111111111-nixos-system-2";

    fn at(time: &str) -> Timestamp {
        time.parse().unwrap()
    }

    fn release() -> Release {
        Release {
            schema: 1,
            product: "headgate".into(),
            version: "1.2.0".into(),
            system: "aarch64-linux".into(),
            toplevel: NEW.into(),
            created: at("2026-11-22T00:00:00Z"),
            expires: None,
            rollout: None,
            add_keys: Vec::new(),
            revoke_keys: Vec::new(),
        }
    }

    const GATEWAY: Gateway<'_> = Gateway {
        product: "headgate",
        system: "aarch64-linux",
        id: "0123456789abcdef0123456789abcdef",
        version: Some("1.1.0"),
        toplevel: OLD,
        pin: None,
        newest_seen: None,
        allow_downgrade: false,
    };

    fn offered(release: &Release, gateway: &Gateway<'_>) -> Result<Offer, String> {
        let now = at("2026-11-23T00:00:00Z");
        release
            .offer(gateway, now)
            .map_err(|error| error.to_string())
    }

    #[track_caller]
    fn is_refused(release: &Release, gateway: &Gateway<'_>, because: &str) {
        let error = offered(release, gateway).unwrap_err();
        assert!(error.contains(because), "{error}");
    }

    #[test]
    fn a_newer_one_of_the_same_product_and_system_is_taken() {
        assert_eq!(offered(&release(), &GATEWAY), Ok(Offer::Update));
        let running = Gateway {
            toplevel: NEW,
            version: Some("1.2.0"),
            ..GATEWAY
        };
        assert_eq!(offered(&release(), &running), Ok(Offer::Running));
        let unknown = Gateway {
            version: None,
            ..GATEWAY
        };
        assert_eq!(offered(&release(), &unknown), Ok(Offer::Update));
    }

    #[test]
    fn one_for_others_an_older_and_a_replayed_one_are_refused() {
        let release = release();
        is_refused(
            &release,
            &Gateway {
                product: "other",
                ..GATEWAY
            },
            "product",
        );
        is_refused(
            &release,
            &Gateway {
                system: "x86_64-linux",
                ..GATEWAY
            },
            "x86_64-linux",
        );
        is_refused(
            &release,
            &Gateway {
                version: Some("1.10.0"),
                ..GATEWAY
            },
            "older than 1.10.0",
        );
        is_refused(
            &release,
            &Gateway {
                version: Some("1.2.0"),
                ..GATEWAY
            },
            "version of its own",
        );
        is_refused(
            &release,
            &Gateway {
                pin: Some("1.1.0"),
                ..GATEWAY
            },
            "ota.pin",
        );
        let seen = Some(at("2026-11-22T00:00:01Z"));
        is_refused(
            &release,
            &Gateway {
                newest_seen: seen,
                ..GATEWAY
            },
            "replays",
        );
        let expired = Release {
            expires: Some(at("2026-11-23T00:00:00Z")),
            ..release.clone()
        };
        is_refused(&expired, &GATEWAY, "expired");
        let ahead = Release {
            created: at("2026-11-24T00:00:01Z"),
            ..release
        };
        is_refused(&ahead, &GATEWAY, "see to the clock");
        assert_eq!(
            ahead.offer(&GATEWAY, Timestamp::UNIX_EPOCH).unwrap(),
            Offer::Update
        );
    }

    #[test]
    fn an_older_one_is_taken_by_whoever_insists() {
        let insists = Gateway {
            version: Some("2.0"),
            allow_downgrade: true,
            ..GATEWAY
        };
        assert_eq!(offered(&release(), &insists), Ok(Offer::Update));
        let pinned = Gateway {
            pin: Some("1.2.0"),
            ..GATEWAY
        };
        assert_eq!(offered(&release(), &pinned), Ok(Offer::Update));
    }

    #[test]
    fn a_rollout_takes_its_part_of_the_gateways_and_only_ever_more() {
        let takes = |percent: f64, seed: &str, id: u32| {
            let seed = seed.to_owned();
            let release = Release {
                rollout: Some(Rollout { percent, seed }),
                ..release()
            };
            let gateway = Gateway {
                id: &format!("gateway {id}"),
                ..GATEWAY
            };
            offered(&release, &gateway) == Ok(Offer::Update)
        };
        let count = |percent, seed| (0..10_000).filter(|id| takes(percent, seed, *id)).count();
        assert_eq!(count(0.0, "a"), 0);
        assert_eq!(count(100.0, "a"), 10_000);
        let tenth = count(10.0, "a");
        assert!((900..1100).contains(&tenth), "{tenth}");
        assert!((0..10_000).all(|id| !takes(10.0, "a", id) || takes(30.0, "a", id)));
        let both = (0..10_000).filter(|id| takes(10.0, "a", *id) && takes(10.0, "b", *id));
        assert!((50..200).contains(&both.count()), "another seed draws anew");
    }

    #[test]
    fn only_what_is_signed_is_read() {
        let key = SecretKey::generate("plant-1").unwrap();
        let keys = [key.public().parse().unwrap()];
        let document = serde_json::to_vec(&release()).unwrap();
        let now = at("2026-11-23T00:00:00Z");
        let signature = key.sign(&document).to_nix_string();
        assert_eq!(
            Release::read(&document, &signature, &keys, now).unwrap(),
            release()
        );
        let mut forged = document.clone();
        *forged.last_mut().unwrap() = b' ';
        for (document, signature) in [
            (&forged, signature.as_str()),
            (&document, ""),
            (&document, "plant-1:AAAA"),
        ] {
            let error = Release::read(document, signature, &keys, now).unwrap_err();
            assert!(error.to_string().contains("plant-1"), "{error}");
        }
        let old = [format!("{}@2026-11-22T00:00:00Z", key.public())
            .parse()
            .unwrap()];
        let error = Release::read(&document, &signature, &old, now).unwrap_err();
        assert!(error.to_string().contains("has expired"), "{error}");
        let long = vec![b' '; MAX_BYTES + 1];
        assert!(Release::read(&long, &key.sign(&long).to_nix_string(), &keys, now).is_err());
    }

    #[test]
    fn what_is_no_release_is_refused_and_the_field_named() {
        let sound = serde_json::to_value(release()).unwrap();
        Release::parse(sound.to_string().as_bytes()).unwrap();
        for (field, value, named) in [
            ("schema", 2.into(), "schema 2"),
            ("schema", serde_json::Value::Null, "schema"),
            ("product", "".into(), "product"),
            ("version", "1/../2".into(), "version"),
            ("version", "..".into(), "version"),
            (
                "rollout",
                serde_json::json!({"percent": 1, "seed": "", "sed": ""}),
                "sed",
            ),
            ("version", "v".repeat(200).into(), "version"),
            ("system", serde_json::Value::Null, "system"),
            ("toplevel", "/etc/passwd".into(), "store path"),
            ("toplevel", "/nix/store/../../etc".into(), "store path"),
            ("toplevel", format!("{NEW}/bin").into(), "store path"),
            ("created", "yesterday".into(), "created"),
            ("expires", 5.into(), "expires"),
            ("expirse", "2027-01-01T00:00:00Z".into(), "expirse"),
            (
                "rollout",
                serde_json::json!({"percent": 101, "seed": ""}),
                "rollout.percent",
            ),
            (
                "rollout",
                serde_json::json!({"percent": -1, "seed": ""}),
                "rollout.percent",
            ),
            ("add_keys", serde_json::json!(["a"]), "add_keys"),
        ] {
            let mut broken = sound.clone();
            broken[field] = value;
            let error = Release::parse(broken.to_string().as_bytes())
                .unwrap_err()
                .to_string();
            assert!(error.contains(named), "{field}: {error}");
        }
        for document in [
            "",
            "null",
            "[]",
            "{}",
            "{\"schema\":1}",
            "{\"schema\":1,\"schema\":1}",
            &format!("{sound} {{}}"),
        ] {
            assert!(Release::parse(document.as_bytes()).is_err(), "{document}");
        }
    }
}
