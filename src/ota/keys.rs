//! Keys as Nix writes them: `name:base64`, Ed25519. A key that is trusted can have a day on which that ends.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;
use nix_narinfo::{KeyError, NixSignature, TrustedPublicKey};
use ring::rand::SystemRandom;
use ring::signature::{Ed25519KeyPair, KeyPair};

/// Most letters of a key's name.
const MAX_NAME_BYTES: usize = 128;

/// Why a text is no key.
#[derive(Debug, thiserror::Error)]
pub enum BadKey {
    #[error("{0}; a key is written as in Nix: name:base64")]
    Public(#[from] KeyError),
    #[error(
        "{0:?} is no name of a key; take letters, digits, dots, dashes and underscores, at most {MAX_NAME_BYTES}"
    )]
    Name(String),
    #[error("{0:?} after the @ is no time such as 2027-12-31T00:00:00Z")]
    Expiry(String),
    #[error(
        "this is no secret key: name:base64 of 64 bytes, as `headgate release keygen` or \
         `nix key generate-secret` writes it"
    )]
    Secret,
}

/// A key that can sign. Shows nothing of itself.
pub struct SecretKey {
    name: String,
    pair: Ed25519KeyPair,
    /// Seed and public key, as Nix writes them.
    bytes: [u8; 64],
}

impl SecretKey {
    pub fn generate(name: &str) -> Result<SecretKey, BadKey> {
        check_name(name)?;
        let mut seed = [0; 32];
        ring::rand::SecureRandom::fill(&SystemRandom::new(), &mut seed)
            .expect("the kernel has random numbers for whoever asks");
        let pair = Ed25519KeyPair::from_seed_unchecked(&seed).expect("32 bytes are a seed");
        let mut bytes = [0; 64];
        bytes[..32].copy_from_slice(&seed);
        bytes[32..].copy_from_slice(pair.public_key().as_ref());
        Ok(SecretKey {
            name: name.to_owned(),
            pair,
            bytes,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// As in a file for `nix copy`'s `secret-key`.
    pub fn to_text(&self) -> String {
        format!("{}:{}", self.name, STANDARD.encode(self.bytes))
    }

    /// What gateways trust.
    pub fn public(&self) -> String {
        format!("{}:{}", self.name, STANDARD.encode(self.pair.public_key()))
    }

    pub fn sign(&self, message: &[u8]) -> NixSignature {
        let signature = self.pair.sign(message);
        NixSignature::from_bytes(&self.name, signature.as_ref())
            .expect("a key's name was looked at, and a signature is never empty")
    }
}

impl FromStr for SecretKey {
    type Err = BadKey;

    fn from_str(text: &str) -> Result<SecretKey, BadKey> {
        let (name, encoded) = text.trim().split_once(':').ok_or(BadKey::Secret)?;
        check_name(name)?;
        let decoded = STANDARD.decode(encoded).map_err(|_| BadKey::Secret)?;
        let bytes: [u8; 64] = decoded.try_into().map_err(|_| BadKey::Secret)?;
        let pair = Ed25519KeyPair::from_seed_and_public_key(&bytes[..32], &bytes[32..])
            .map_err(|_| BadKey::Secret)?;
        Ok(SecretKey {
            name: name.to_owned(),
            pair,
            bytes,
        })
    }
}

fn check_name(name: &str) -> Result<(), BadKey> {
    let is_fine = |letter: char| letter.is_ascii_alphanumeric() || "._-".contains(letter);
    if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.chars().all(is_fine) {
        return Err(BadKey::Name(name.chars().take(MAX_NAME_BYTES).collect()));
    }
    Ok(())
}

/// A key that may sign releases and store paths: `name:base64`, or `name:base64@TIME` where TIME, as RFC 3339
/// has it, is the end of that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustedKey {
    pub key: TrustedPublicKey,
    pub expires: Option<Timestamp>,
}

impl TrustedKey {
    pub fn has_expired(&self, now: Timestamp) -> bool {
        self.expires.is_some_and(|expires| expires <= now)
    }
}

impl FromStr for TrustedKey {
    type Err = BadKey;

    fn from_str(text: &str) -> Result<TrustedKey, BadKey> {
        let (key, expires) = match text.split_once('@') {
            Some((key, time)) => match time.parse() {
                Ok(time) => (key, Some(time)),
                Err(_) => return Err(BadKey::Expiry(time.to_owned())),
            },
            None => (text, None),
        };
        let key = TrustedPublicKey::parse(key)?;
        check_name(&key.name)?;
        Ok(TrustedKey { key, expires })
    }
}

impl fmt::Display for TrustedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.key.name, STANDARD.encode(self.key.key))?;
        match self.expires {
            Some(expires) => write!(f, "@{expires}"),
            None => Ok(()),
        }
    }
}

/// What a signature is worth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// By the key of this name.
    Good(String),
    /// By a trusted key, but too late.
    Expired(String),
    /// By none of them.
    Bad,
}

/// Looks at signatures, one a line, of `message`; the best of them counts.
pub fn verify(message: &[u8], signatures: &str, keys: &[TrustedKey], now: Timestamp) -> Verdict {
    let mut best = Verdict::Bad;
    for signature in signatures.lines().map(str::trim) {
        let Ok(signature) = NixSignature::parse(signature) else {
            continue;
        };
        for key in keys {
            let signed = signature.verify(message, std::slice::from_ref(&key.key));
            match signed {
                Ok(true) if !key.has_expired(now) => return Verdict::Good(signature.key_name),
                Ok(true) => best = Verdict::Expired(signature.key_name.clone()),
                Ok(false) | Err(_) => {}
            }
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(time: &str) -> Timestamp {
        time.parse().unwrap()
    }

    fn trusted(text: &str) -> TrustedKey {
        text.parse().unwrap()
    }

    #[test]
    fn what_a_key_has_signed_its_public_half_verifies_and_no_other() {
        let key = SecretKey::generate("plant-1").unwrap();
        let other = SecretKey::generate("plant-1").unwrap();
        let now = at("2026-11-22T00:00:00Z");
        let read: SecretKey = key.to_text().parse().unwrap();
        assert_eq!(read.public(), key.public());
        let signature = read.sign(b"release").to_nix_string();
        let ours = [trusted(&other.public()), trusted(&key.public())];
        let good = Verdict::Good("plant-1".into());
        assert_eq!(verify(b"release", &signature, &ours, now), good);
        assert_eq!(verify(b"Release", &signature, &ours, now), Verdict::Bad);
        assert_eq!(
            verify(b"release", &signature, &ours[..1], now),
            Verdict::Bad
        );
        let among = format!("rubbish\nx:AAAA\n\n  {signature}\r\n");
        assert_eq!(verify(b"release", &among, &ours, now), good);
    }

    #[test]
    fn what_an_expired_key_has_signed_is_told_apart() {
        let key = SecretKey::generate("old").unwrap();
        let signature = key.sign(b"x").to_nix_string();
        let keys = [trusted(&format!("{}@2026-01-01T00:00:00Z", key.public()))];
        for (now, verdict) in [
            ("2025-12-31T23:59:59Z", Verdict::Good("old".into())),
            ("2026-01-01T00:00:00Z", Verdict::Expired("old".into())),
        ] {
            assert_eq!(verify(b"x", &signature, &keys, at(now)), verdict);
        }
        assert_eq!(trusted(&keys[0].to_string()), keys[0]);
    }

    #[test]
    fn what_is_no_key_is_refused_with_how_one_is_written() {
        let public = SecretKey::generate("a").unwrap().public();
        for text in [
            "",
            "a",
            ":",
            "a:",
            "a:AAAA",
            "a:!",
            &public[1..],
            &format!("a b{}", &public[1..]),
            &format!("{public}@tomorrow"),
            &format!("{public}@"),
        ] {
            assert!(text.parse::<TrustedKey>().is_err(), "{text}");
        }
        for text in ["", "a", &public, "a:AAAA", "a b:AAAA"] {
            assert!(text.parse::<SecretKey>().is_err(), "{text}");
        }
        assert!(SecretKey::generate("a:b").is_err());
    }
}
