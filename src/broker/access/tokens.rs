//! JSON Web Tokens in the place of a password (RFC 7519, signed as in RFC 7515).

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::Deserialize;

use super::file::{self, Flaw};
use super::passwords::MAX_NAME_BYTES;
use super::shortened;
use super::token_keys::{self, TokenKey};

/// Tokens of that size carry more than a login.
const MAX_TOKEN_BYTES: usize = 16 << 10;

/// How far the clock of whoever makes the tokens may be from ours.
const LEEWAY: Duration = Duration::from_secs(30);

/// The keys that tokens are checked with.
#[derive(Debug)]
pub(super) struct TokenKeys(Vec<TokenKey>);

/// What a token that was checked says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Token {
    pub user: String,
    pub groups: Vec<String>,
    /// With the leeway. None: later than this machine's clock can tell.
    pub expires: Option<SystemTime>,
    /// Of the key that signed it.
    pub key: [u8; 32],
}

/// Why a token lets nobody in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error("it is no JSON Web Token: {0}")]
    Malformed(&'static str),
    #[error("no key in the file of mqtt.auth.jwt_key is for algorithm {algorithm:?}{}", and_id(.key_id))]
    NoKey {
        algorithm: String,
        key_id: Option<String>,
    },
    #[error("its signature is not of a key in the file of mqtt.auth.jwt_key")]
    Signature,
    #[error("its claims can't be used: {0}")]
    Claims(String),
    #[error("it expired {0} s ago")]
    Expired(u64),
    #[error("it is valid in {0} s only; is the clock of this machine right?")]
    NotYet(u64),
}

fn and_id(id: &Option<String>) -> String {
    match id {
        Some(id) => format!(" and key id {id:?}"),
        None => String::new(),
    }
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    /// Names extensions that must be understood; there are none here.
    crit: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Claims {
    sub: String,
    /// Seconds since 1970, perhaps with a fraction.
    exp: f64,
    nbf: Option<f64>,
    #[serde(default)]
    groups: Vec<String>,
}

/// Whether a password can only be meant as a token: three parts, the first of which is JSON.
pub(super) fn looks_like_token(password: &[u8]) -> bool {
    password.starts_with(b"eyJ") && password.iter().filter(|byte| **byte == b'.').count() == 2
}

impl TokenKeys {
    pub(super) fn parse(contents: &[u8]) -> Result<TokenKeys, Flaw> {
        token_keys::parse(contents).map(TokenKeys)
    }

    pub(super) fn warn_if_open(&self, path: &Path) {
        if self.0.iter().any(TokenKey::is_secret) {
            file::warn_if_open("mqtt.auth.jwt_key", path);
        }
    }

    pub(super) fn has(&self, fingerprint: &[u8; 32]) -> bool {
        self.0.iter().any(|key| key.fingerprint == *fingerprint)
    }

    pub(super) fn verify(&self, token: &[u8], now: SystemTime) -> Result<Token, TokenError> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(TokenError::Malformed("it has more than 16 KiB"));
        }
        let dot = |text: &[u8]| text.iter().rposition(|byte| *byte == b'.');
        let no_parts = TokenError::Malformed("it has not three parts with dots between");
        let end = dot(token).ok_or(no_parts.clone())?;
        let (message, sign) = (&token[..end], &token[end + 1..]);
        let middle = dot(message).ok_or(no_parts)?;
        let (header, claims) = (&message[..middle], &message[middle + 1..]);

        let header: Header = serde_json::from_slice(&decoded(header)?)
            .map_err(|_| TokenError::Malformed("its header is no JSON object with `alg`"))?;
        if header.crit.is_some() {
            return Err(TokenError::Malformed("it needs an extension (`crit`)"));
        }
        let key = self.signer(&header, message, &decoded(sign)?)?;
        let claims: Claims = serde_json::from_slice(&decoded(claims)?)
            .map_err(|error| TokenError::Claims(error.to_string()))?;
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        check_times(&claims, now)?;
        let Claims {
            sub, exp, groups, ..
        } = claims;
        if sub.is_empty() || sub.len() > MAX_NAME_BYTES || sub.contains(char::is_control) {
            return Err(TokenError::Claims(format!(
                "`sub`, the user, must have 1 to {MAX_NAME_BYTES} bytes and no control characters"
            )));
        }
        let expires = Duration::try_from_secs_f64(exp.max(0.0)).ok();
        Ok(Token {
            user: sub,
            groups,
            expires: expires.and_then(|since| UNIX_EPOCH.checked_add(since)?.checked_add(LEEWAY)),
            key: key.fingerprint,
        })
    }

    /// The key that `sign` is of.
    fn signer(
        &self,
        header: &Header,
        message: &[u8],
        sign: &[u8],
    ) -> Result<&TokenKey, TokenError> {
        let named = |key: &&TokenKey| match (&header.kid, &key.id) {
            (Some(wanted), Some(id)) => wanted == id,
            _ => true,
        };
        let fitting = || {
            self.0
                .iter()
                .filter(named)
                .filter(|key| key.is_for(&header.alg))
        };
        if fitting().next().is_none() {
            return Err(TokenError::NoKey {
                algorithm: shortened(&header.alg),
                key_id: header.kid.as_deref().map(shortened),
            });
        }
        fitting()
            .find(|key| key.verify(&header.alg, message, sign))
            .ok_or(TokenError::Signature)
    }
}

fn decoded(part: &[u8]) -> Result<Vec<u8>, TokenError> {
    URL_SAFE_NO_PAD
        .decode(part)
        .map_err(|_| TokenError::Malformed("a part of it is not in base64url"))
}

fn check_times(claims: &Claims, now: Duration) -> Result<(), TokenError> {
    let (now, leeway) = (now.as_secs_f64(), LEEWAY.as_secs_f64());
    let late = now - claims.exp;
    if late >= leeway {
        return Err(TokenError::Expired(late as u64));
    }
    let early = claims.nbf.map_or(0.0, |nbf| nbf - now);
    if early > leeway {
        return Err(TokenError::NotYet(early.ceil() as u64));
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;
    use rcgen::{KeyPair, SigningKey};
    use ring::hmac;
    use serde_json::{Value, json};

    use super::*;

    pub(crate) const SECRET: &str = "0123456789abcdef0123456789abcdef";

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(2_000_000_000)
    }

    fn claims() -> Value {
        json!({ "sub": "press", "exp": 2_000_000_100, "groups": ["a", "b"] })
    }

    fn signed(header: Value, claims: Value, sign: impl FnOnce(&[u8]) -> Vec<u8>) -> String {
        let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let message = format!("{}.{}", part(header), part(claims));
        let sign = URL_SAFE_NO_PAD.encode(sign(message.as_bytes()));
        format!("{message}.{sign}")
    }

    fn hmac_of(secret: &[u8]) -> impl Fn(&[u8]) -> Vec<u8> {
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
        move |message| hmac::sign(&key, message).as_ref().to_vec()
    }

    /// With HS256 and [`SECRET`].
    pub(crate) fn hs256(claims: Value) -> String {
        signed(
            json!({ "alg": "HS256" }),
            claims,
            hmac_of(SECRET.as_bytes()),
        )
    }

    fn verify(keys: &str, token: &str) -> Result<Token, TokenError> {
        let keys = TokenKeys::parse(keys.as_bytes()).unwrap();
        keys.verify(token.as_bytes(), now())
    }

    #[test]
    fn a_token_says_who_it_is_for() {
        let token = verify(SECRET, &hs256(claims())).unwrap();
        assert_eq!(token.user, "press");
        assert_eq!(token.groups, ["a", "b"]);
        assert_eq!(token.expires, Some(now() + Duration::from_secs(130)));
        let forever = json!({ "sub": "x", "exp": 1e300 });
        assert_eq!(verify(SECRET, &hs256(forever)).unwrap().expires, None);
    }

    #[test]
    fn each_kind_of_signature_is_checked() {
        let ed = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let token = signed(json!({ "alg": "EdDSA" }), claims(), |m| ed.sign(m).unwrap());
        assert!(verify(&ed.public_key_pem(), &token).is_ok());
        let other = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        assert_eq!(
            verify(&other.public_key_pem(), &token),
            Err(TokenError::Signature)
        );

        let random = ring::rand::SystemRandom::new();
        let way = &ring::signature::ECDSA_P256_SHA256_FIXED_SIGNING;
        let ec = KeyPair::generate().unwrap();
        let pair =
            ring::signature::EcdsaKeyPair::from_pkcs8(way, &ec.serialize_der(), &random).unwrap();
        let sign = |m: &[u8]| pair.sign(&random, m).unwrap().as_ref().to_vec();
        let token = signed(json!({ "alg": "ES256" }), claims(), sign);
        assert!(verify(&ec.public_key_pem(), &token).is_ok());
    }

    #[test]
    fn a_public_key_is_no_secret_and_no_algorithm_is_none() {
        let pem = KeyPair::generate().unwrap().public_key_pem();
        let confused = signed(json!({ "alg": "HS256" }), claims(), hmac_of(pem.as_bytes()));
        assert!(matches!(
            verify(&pem, &confused),
            Err(TokenError::NoKey { .. })
        ));
        for algorithm in ["none", "None", "NONE", "", "RS256", "ES256"] {
            let token = signed(json!({ "alg": algorithm }), claims(), |_| Vec::new());
            let refused = verify(SECRET, &token);
            assert!(
                matches!(refused, Err(TokenError::NoKey { .. })),
                "{algorithm}"
            );
        }
        assert!(verify(&pem, &signed(json!({}), claims(), |_| Vec::new())).is_err());
    }

    #[test]
    fn a_token_holds_from_nbf_to_exp_and_half_a_minute_more() {
        let start = 2_000_000_000u64;
        let at = |exp: u64, nbf: u64| {
            verify(
                SECRET,
                &hs256(json!({ "sub": "x", "exp": exp, "nbf": nbf })),
            )
            .map(|_| ())
        };
        assert_eq!(at(start + 10, start - 10), Ok(()));
        assert_eq!(at(start - 29, 0), Ok(()));
        assert_eq!(at(start - 30, 0), Err(TokenError::Expired(30)));
        assert_eq!(at(start + 100, start + 30), Ok(()));
        assert_eq!(at(start + 100, start + 31), Err(TokenError::NotYet(31)));
        assert_eq!(at(0, 0), Err(TokenError::Expired(start)));
    }

    #[test]
    fn claims_of_the_wrong_type_let_nobody_in() {
        for claims in [
            json!({ "sub": "x" }),
            json!({ "exp": 2_000_000_100 }),
            json!({ "sub": "x", "exp": "2000000100" }),
            json!({ "sub": "x", "exp": null }),
            json!({ "sub": "x", "exp": 2_000_000_100, "nbf": "0" }),
            json!({ "sub": 7, "exp": 2_000_000_100 }),
            json!({ "sub": "", "exp": 2_000_000_100 }),
            json!({ "sub": "a\nb", "exp": 2_000_000_100 }),
            json!({ "sub": "x".repeat(257), "exp": 2_000_000_100 }),
            json!({ "sub": "x", "exp": 2_000_000_100, "groups": "admin" }),
            json!([]),
        ] {
            let refused = verify(SECRET, &hs256(claims.clone()));
            assert!(
                matches!(refused, Err(TokenError::Claims(_))),
                "{claims}: {refused:?}"
            );
        }
    }

    #[test]
    fn a_key_id_chooses_the_key() {
        let key = |id: &str, byte: u8| json!({ "kty": "oct", "kid": id, "k": URL_SAFE_NO_PAD.encode([byte; 32]) });
        let set = json!({ "keys": [key("old", 1), key("new", 2)] }).to_string();
        let token = |id: Option<&str>, byte: u8| {
            signed(
                json!({ "alg": "HS256", "kid": id }),
                claims(),
                hmac_of(&[byte; 32]),
            )
        };
        assert!(verify(&set, &token(Some("old"), 1)).is_ok());
        assert!(verify(&set, &token(None, 2)).is_ok());
        assert_eq!(
            verify(&set, &token(Some("old"), 2)),
            Err(TokenError::Signature)
        );
        let unknown = verify(&set, &token(Some("x"), 1)).unwrap_err();
        assert!(unknown.to_string().contains("key id \"x\""), "{unknown}");
    }

    #[test]
    fn what_is_no_token_is_told_from_one() {
        assert!(looks_like_token(hs256(claims()).as_bytes()));
        for password in ["secret", "a.b.c", "eyJ.x", "eyJ.a.b.c", ""] {
            assert!(!looks_like_token(password.as_bytes()), "{password}");
        }
        let critical = signed(
            json!({ "alg": "HS256", "crit": ["b64"] }),
            claims(),
            hmac_of(SECRET.as_bytes()),
        );
        let long = "a".repeat(MAX_TOKEN_BYTES + 1);
        for token in ["", "a", "a.b", "eyJ.!.a", "a.b.c.d", &critical, &long] {
            let refused = verify(SECRET, token);
            assert!(
                matches!(refused, Err(TokenError::Malformed(_))),
                "{token}: {refused:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_token_panics_and_no_damaged_one_is_valid(at in 0usize..200, byte: u8) {
            let good = hs256(claims());
            let mut bytes = good.clone().into_bytes();
            let at = at % bytes.len();
            bytes[at] = byte;
            let keys = TokenKeys::parse(SECRET.as_bytes()).unwrap();
            let verified = keys.verify(&bytes, now());
            prop_assert_eq!(verified.is_ok(), bytes == good.as_bytes());
        }

        #[test]
        fn no_times_panic(exp in any::<f64>(), nbf in any::<f64>()) {
            let _ = verify(SECRET, &hs256(json!({ "sub": "x", "exp": exp, "nbf": nbf })));
        }
    }
}
