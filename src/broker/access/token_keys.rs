//! The file with the keys that tokens are checked with: public keys as PEM, a JSON Web Key Set, or a
//! secret.
//!
//! A key knows which algorithms it can be used with. What a token says about its algorithm only
//! chooses among these, so that no public key is ever taken for a secret.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ring::rand::SystemRandom;
use ring::{agreement, hmac, signature};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{AlgorithmIdentifier, SubjectPublicKeyInfoDer, alg_id};
use serde::Deserialize;

use super::file::Flaw;

/// A token is tried with each key that fits, so there may not be too many.
const MAX_KEYS: usize = 64;

/// Of RSA keys, what `ring` takes.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;

/// Shorter ones can be found by trying (RFC 7518, 3.2).
const MIN_SECRET_BYTES: usize = 32;
const MAX_SECRET_BYTES: usize = 1024;

const MAKE_SECRET: &str = "a secret is one line of 32 to 1024 visible characters, such as `openssl rand \
                           -hex 32` makes";

/// One key of the file.
#[derive(Debug)]
pub(super) struct TokenKey {
    /// Tokens that name a key id are checked with the key of that id alone.
    pub id: Option<String>,
    /// The only algorithm that it is for, if the file says so.
    algorithm: Option<String>,
    material: Material,
    /// Tells this key from others: SHA-256 of what it is made of.
    pub fingerprint: [u8; 32],
}

enum Material {
    Rsa { n: Vec<u8>, e: Vec<u8> },
    P256(Vec<u8>),
    P384(Vec<u8>),
    Ed25519(Vec<u8>),
    Secret(Vec<u8>),
}

impl std::fmt::Debug for Material {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Material::Rsa { .. } => "RSA",
            Material::P256(_) => "P-256",
            Material::P384(_) => "P-384",
            Material::Ed25519(_) => "Ed25519",
            Material::Secret(_) => "secret",
        })
    }
}

impl TokenKey {
    fn new(material: Material) -> TokenKey {
        let mut digest = ring::digest::Context::new(&ring::digest::SHA256);
        digest.update(format!("{material:?}").as_bytes());
        match &material {
            Material::Rsa { n, e } => {
                digest.update(n);
                digest.update(e);
            }
            Material::P256(bytes)
            | Material::P384(bytes)
            | Material::Ed25519(bytes)
            | Material::Secret(bytes) => digest.update(bytes),
        }
        let mut fingerprint = [0; 32];
        fingerprint.copy_from_slice(digest.finish().as_ref());
        TokenKey {
            id: None,
            algorithm: None,
            material,
            fingerprint,
        }
    }

    /// Whether a token with this algorithm can be checked with this key.
    pub(super) fn is_for(&self, algorithm: &str) -> bool {
        let fits = match self.material {
            Material::Rsa { .. } => matches!(algorithm, "RS256" | "RS384" | "RS512"),
            Material::P256(_) => algorithm == "ES256",
            Material::P384(_) => algorithm == "ES384",
            Material::Ed25519(_) => matches!(algorithm, "EdDSA" | "Ed25519"),
            Material::Secret(_) => matches!(algorithm, "HS256" | "HS384" | "HS512"),
        };
        fits && self.algorithm.as_ref().is_none_or(|only| only == algorithm)
    }

    /// Whether `sign` is this key's signature of `message`, made with `algorithm`.
    pub(super) fn verify(&self, algorithm: &str, message: &[u8], sign: &[u8]) -> bool {
        if !self.is_for(algorithm) {
            return false;
        }
        let public = |way: &'static dyn signature::VerificationAlgorithm, key: &[u8]| {
            signature::UnparsedPublicKey::new(way, key).verify(message, sign)
        };
        let verified = match &self.material {
            Material::Rsa { n, e } => {
                let way = match algorithm {
                    "RS256" => &signature::RSA_PKCS1_2048_8192_SHA256,
                    "RS384" => &signature::RSA_PKCS1_2048_8192_SHA384,
                    _ => &signature::RSA_PKCS1_2048_8192_SHA512,
                };
                signature::RsaPublicKeyComponents { n, e }.verify(way, message, sign)
            }
            Material::P256(key) => public(&signature::ECDSA_P256_SHA256_FIXED, key),
            Material::P384(key) => public(&signature::ECDSA_P384_SHA384_FIXED, key),
            Material::Ed25519(key) => public(&signature::ED25519, key),
            Material::Secret(secret) => {
                let way = match algorithm {
                    "HS256" => hmac::HMAC_SHA256,
                    "HS384" => hmac::HMAC_SHA384,
                    _ => hmac::HMAC_SHA512,
                };
                hmac::verify(&hmac::Key::new(way, secret), message, sign)
            }
        };
        verified.is_ok()
    }

    pub(super) fn is_secret(&self) -> bool {
        matches!(self.material, Material::Secret(_))
    }
}

/// The keys in a file, whichever of the three kinds it is.
pub(super) fn parse(contents: &[u8]) -> Result<Vec<TokenKey>, Flaw> {
    let flaw = |reason: String| Flaw { line: None, reason };
    let start = contents.trim_ascii_start();
    let keys = if contains(contents, b"-----BEGIN ") {
        from_pem(contents).map_err(flaw)?
    } else if start.starts_with(b"{") {
        from_jwks(contents)?
    } else {
        vec![from_secret(contents).map_err(flaw)?]
    };
    match keys.len() {
        0 => Err(flaw(
            "there is no key in it that tokens can be checked with".into(),
        )),
        1..=MAX_KEYS => Ok(keys),
        many => Err(flaw(format!("{many} keys; at most {MAX_KEYS} are allowed"))),
    }
}

fn contains(contents: &[u8], part: &[u8]) -> bool {
    contents.windows(part.len()).any(|window| window == part)
}

fn from_pem(contents: &[u8]) -> Result<Vec<TokenKey>, String> {
    if contains(contents, b"PRIVATE KEY-----") {
        return Err(
            "it holds a private key; whoever checks tokens needs the public one: `openssl pkey -in \
             FILE -pubout`"
                .into(),
        );
    }
    let keys: Vec<_> = SubjectPublicKeyInfoDer::pem_slice_iter(contents)
        .collect::<Result<_, _>>()
        .map_err(|error| match error {
            pem::Error::MissingSectionEnd { .. } => {
                "it is cut short: a key in PEM form ends with a line -----END PUBLIC KEY-----"
                    .into()
            }
            error => format!("not in PEM form: {error}"),
        })?;
    if keys.is_empty() {
        return Err(if contains(contents, b"BEGIN CERTIFICATE-----") {
            "it holds a certificate; take the public key out of it with `openssl x509 -in FILE -pubkey \
             -noout`"
                .into()
        } else if contains(contents, b"BEGIN RSA PUBLIC KEY-----") {
            "it holds a public key in RSA's own form; turn it with `openssl rsa -RSAPublicKey_in -in \
             FILE -pubout`"
                .into()
        } else {
            format!("it holds no public key (-----BEGIN {}-----)", "PUBLIC KEY")
        });
    }
    keys.iter()
        .map(|key| from_spki(key.as_ref()).map(TokenKey::new))
        .collect()
}

/// A SubjectPublicKeyInfo (RFC 5280, 4.1.2.7).
fn from_spki(der: &[u8]) -> Result<Material, String> {
    let parts = || {
        let (whole, rest) = element(SEQUENCE, der)?;
        let (algorithm, key) = element(SEQUENCE, whole)?;
        let (bits, after) = element(BIT_STRING, key)?;
        // Keys are whole bytes: no bits of the last one are unused.
        let key = bits.strip_prefix(&[0])?;
        (rest.is_empty() && after.is_empty()).then_some((algorithm, key))
    };
    let (algorithm, key) = parts().ok_or("the public key in it is damaged")?;
    let is = |known: AlgorithmIdentifier| algorithm == known.as_ref();
    if is(alg_id::RSA_ENCRYPTION) {
        let parts = || {
            let (whole, _) = element(SEQUENCE, key)?;
            let (n, rest) = element(INTEGER, whole)?;
            let (e, _) = element(INTEGER, rest)?;
            Some((n, e))
        };
        let (n, e) = parts().ok_or("the RSA key in it is damaged")?;
        rsa(n, e)
    } else if is(alg_id::ECDSA_P256) {
        curve_point(key, &agreement::ECDH_P256).map(Material::P256)
    } else if is(alg_id::ECDSA_P384) {
        curve_point(key, &agreement::ECDH_P384).map(Material::P384)
    } else if is(alg_id::ED25519) {
        ed25519(key)
    } else {
        Err(
            "a key of this kind can't be used; take RSA, ECDSA with P-256 or P-384, or Ed25519"
                .into(),
        )
    }
}

fn rsa(n: &[u8], e: &[u8]) -> Result<Material, String> {
    let without_zeros = |number: &[u8]| {
        let start = number.iter().position(|byte| *byte != 0);
        number[start.unwrap_or(number.len())..].to_vec()
    };
    let (n, e) = (without_zeros(n), without_zeros(e));
    let zeros = n.first().map_or(0, |byte| byte.leading_zeros() as usize);
    let bits = n.len() * 8 - zeros;
    if !RSA_BITS.contains(&bits) {
        return Err(format!(
            "an RSA key of {bits} bits; it must have 2048 to 8192"
        ));
    }
    if !(1..=5).contains(&e.len()) || e.last().is_none_or(|byte| byte % 2 == 0) || e == [1] {
        return Err("the exponent of the RSA key is none that can be used".into());
    }
    Ok(Material::Rsa { n, e })
}

/// An uncompressed point of a curve.
fn curve_point(point: &[u8], curve: &'static agreement::Algorithm) -> Result<Vec<u8>, String> {
    // `ring` looks at a key for signatures only together with a signature, but at one that a secret
    // is agreed with at once. It has the same form.
    let own = agreement::EphemeralPrivateKey::generate(curve, &SystemRandom::new())
        .map_err(|_| "the system gives no random numbers")?;
    let theirs = agreement::UnparsedPublicKey::new(curve, point);
    match agreement::agree_ephemeral(own, &theirs, |_| ()) {
        Ok(()) => Ok(point.to_vec()),
        Err(_) => {
            Err("the ECDSA key in it is damaged, compressed, or no point of its curve".into())
        }
    }
}

fn ed25519(key: &[u8]) -> Result<Material, String> {
    match key.len() {
        32 => Ok(Material::Ed25519(key.to_vec())),
        length => Err(format!("an Ed25519 key of {length} bytes; it has 32")),
    }
}

const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const SEQUENCE: u8 = 0x30;

/// The contents of the DER element of type `tag` that `input` begins with, and what follows it.
fn element(tag: u8, input: &[u8]) -> Option<(&[u8], &[u8])> {
    let (&found, rest) = input.split_first()?;
    let (&first, mut rest) = rest.split_first()?;
    let mut length = usize::from(first);
    if first >= 0x80 {
        let (digits, after) = rest.split_at_checked(usize::from(first & 0x7f))?;
        // Keys are far smaller than that, and an indefinite length is not DER.
        if digits.is_empty() || digits.len() > 3 {
            return None;
        }
        length = digits
            .iter()
            .fold(0, |sum, digit| sum << 8 | usize::from(*digit));
        rest = after;
    }
    (found == tag).then(|| rest.split_at_checked(length))?
}

/// A JSON Web Key Set (RFC 7517), or a single key.
#[derive(Deserialize)]
struct KeySet {
    keys: Vec<serde_json::Value>,
}

#[derive(Deserialize)]
struct Jwk {
    kty: String,
    kid: Option<String>,
    alg: Option<String>,
    #[serde(rename = "use")]
    usage: Option<String>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
    k: Option<String>,
    d: Option<serde_json::Value>,
}

fn from_jwks(contents: &[u8]) -> Result<Vec<TokenKey>, Flaw> {
    let json = |error: serde_json::Error| Flaw {
        line: (error.line() > 0).then_some(error.line()),
        reason: format!("not a JSON Web Key Set: {error}"),
    };
    let value: serde_json::Value = serde_json::from_slice(contents).map_err(json)?;
    let keys = match value.get("kty") {
        Some(_) => vec![value],
        None => serde_json::from_value::<KeySet>(value).map_err(json)?.keys,
    };
    let keys = keys.into_iter().enumerate().map(|(index, key)| {
        from_jwk(key).map_err(|reason| Flaw {
            line: None,
            reason: format!("key {} of the set: {reason}", index + 1),
        })
    });
    keys.filter_map(Result::transpose).collect()
}

/// None for a key that is for something else than signatures, or of a kind that isn't known here: a
/// set may hold such for others.
fn from_jwk(value: serde_json::Value) -> Result<Option<TokenKey>, String> {
    let jwk: Jwk = serde_json::from_value(value).map_err(|error| error.to_string())?;
    if jwk.usage.as_ref().is_some_and(|usage| usage != "sig") {
        return Ok(None);
    }
    if jwk.d.is_some() {
        return Err(
            "it is a private key; whoever checks tokens needs the public one, without `d`".into(),
        );
    }
    let field = |name: &str, text: &Option<String>| {
        let text = text
            .as_ref()
            .ok_or_else(|| format!("`{name}` is missing"))?;
        URL_SAFE_NO_PAD
            .decode(text.trim_end_matches('='))
            .map_err(|error| format!("`{name}` is not in base64url: {error}"))
    };
    let point = |bytes: usize, curve| {
        let (x, y) = (field("x", &jwk.x)?, field("y", &jwk.y)?);
        if x.len() != bytes {
            return Err(format!("`x` has {} bytes; it must have {bytes}", x.len()));
        }
        curve_point(&[&[4][..], &x, &y].concat(), curve)
    };
    let material = match (jwk.kty.as_str(), jwk.crv.as_deref()) {
        ("RSA", _) => rsa(&field("n", &jwk.n)?, &field("e", &jwk.e)?)?,
        ("EC", Some("P-256")) => Material::P256(point(32, &agreement::ECDH_P256)?),
        ("EC", Some("P-384")) => Material::P384(point(48, &agreement::ECDH_P384)?),
        ("OKP", Some("Ed25519")) => ed25519(&field("x", &jwk.x)?)?,
        ("oct", _) => {
            let secret = field("k", &jwk.k)?;
            if secret.len() < MIN_SECRET_BYTES {
                return Err(format!(
                    "`k` has {} bytes; a secret shorter than {MIN_SECRET_BYTES} can be found by trying",
                    secret.len()
                ));
            }
            Material::Secret(secret)
        }
        _ => return Ok(None),
    };
    Ok(Some(TokenKey {
        id: jwk.kid,
        algorithm: jwk.alg,
        ..TokenKey::new(material)
    }))
}

fn from_secret(contents: &[u8]) -> Result<TokenKey, String> {
    let line = contents.strip_suffix(b"\n").unwrap_or(contents);
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    if !line.iter().all(u8::is_ascii_graphic) {
        return Err(format!(
            "neither a public key in PEM form, nor a JSON Web Key Set, nor a secret: {MAKE_SECRET}"
        ));
    }
    if !(MIN_SECRET_BYTES..=MAX_SECRET_BYTES).contains(&line.len()) {
        return Err(format!("a secret of {} bytes; {MAKE_SECRET}", line.len()));
    }
    // Everybody may know a public key: as a secret it would let everybody in.
    if let Ok(der) = STANDARD.decode(line)
        && from_spki(&der).is_ok()
    {
        return Err(format!(
            "it is a public key without the lines -----BEGIN {0}----- and -----END {0}-----; add them",
            "PUBLIC KEY"
        ));
    }
    Ok(TokenKey::new(Material::Secret(line.to_vec())))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use rcgen::{KeyPair, PublicKeyData, SigningKey};

    fn reason(contents: impl AsRef<[u8]>) -> String {
        parse(contents.as_ref()).unwrap_err().reason
    }

    fn base64url(bytes: &[u8]) -> String {
        URL_SAFE_NO_PAD.encode(bytes)
    }

    #[test]
    fn public_keys_of_each_kind_are_read() {
        for (way, algorithm) in [
            (&rcgen::PKCS_ECDSA_P256_SHA256, "ES256"),
            (&rcgen::PKCS_ECDSA_P384_SHA384, "ES384"),
            (&rcgen::PKCS_ED25519, "EdDSA"),
        ] {
            let pair = KeyPair::generate_for(way).unwrap();
            let keys = parse(pair.public_key_pem().as_bytes()).unwrap();
            assert_eq!(keys.len(), 1);
            for other in ["RS256", "ES256", "ES384", "EdDSA", "HS256", "none", ""] {
                assert_eq!(
                    keys[0].is_for(other),
                    other == algorithm,
                    "{algorithm} {other}"
                );
            }
            let sign = pair.sign(b"m").unwrap();
            assert!(
                algorithm != "EdDSA" || keys[0].verify(algorithm, b"m", &sign),
                "the others sign in another form"
            );
        }
        let rsa = &parse(RSA.as_bytes()).unwrap()[0];
        let sign = STANDARD.decode(RSA_SIGNATURE).unwrap();
        assert!(rsa.verify("RS256", b"m", &sign));
        assert!(!rsa.verify("RS256", b"n", &sign) && !rsa.verify("RS512", b"m", &sign));
    }

    /// Made with `openssl genrsa 2048 | openssl rsa -pubout`.
    const RSA: &str = "-----BEGIN PUBLIC KEY-----\n\
MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEA9a9DwXJ+NPo/p1tQhktA\n\
fHRjIHjqd2+MdJlrhukoISSPdTs10XKpFrzcf/l7pTgcg07gtBt/9tYQxAzI4iDl\n\
d/MveaeNt+JwGygS+Rc1E/u+uCLS3UOIhrSGqNw1TDBCilGWXRr0JstvdRYJNy7+\n\
ajKSxfk39T1LPuLT/vW+GBVIbdCnbbEAODdazRl9L6RFAgtuNMzBPUeyTyaQjNza\n\
l1ryKBf208q68nvKEY589p0SY0TbgD+kVezeNPUp1Ck6sykxglJjxDzjpE3+gKtY\n\
xyaHnoI3T+4ntNKgt4gJmbRNEyR3JTAXb2S/OJcMckd70LKF1aoRPwSjCthyFdvG\n\
IwIDAQAB\n\
-----END PUBLIC KEY-----\n";

    /// Of "m", made with `openssl dgst -sha256 -sign`.
    const RSA_SIGNATURE: &str = "Wjc/CGH76+H/vGpXo3g/6f3eEpdirfrYZCzzSar6re+Cod1Xec2xnGTBuNRw06bVl0fJWGxjfUWGXafD4zMD53gV\
9Ux3h9lT2QR9Ewv28JTmuVF1sqUshUD39h/yRlTJjZOvFJ57Jkob4aj+1j6o+YeMRnxKeiokscOX/c4Lkt44LoTC\
GbcZiLw/tpP7QwootUul5/DDyb2ENbMSmaRyDdvffcLX9MYPDfCyGM6xyFQx/EB2FTAWiPP3gPHsBWIgGvcW7oTZ\
DJNCe+eYklvBxeTdS10Tek2SQKkZ04S8EpZ3nxVw40uha9esRq59fAN6LbdZFY3RSiBP8IUjtVgEjw==";

    #[test]
    fn several_keys_can_be_in_one_file() {
        let pem = |_| KeyPair::generate().unwrap().public_key_pem();
        let file: String = (0..3).map(pem).collect();
        assert_eq!(parse(file.as_bytes()).unwrap().len(), 3);
        let many: String = (0..65).map(|_| RSA).collect();
        assert!(reason(many).contains("at most 64"));
    }

    #[test]
    fn a_key_set_is_read_and_what_is_for_others_is_left_out() {
        let pair = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let x = base64url(pair.der_bytes());
        let set = json!({ "keys": [
            { "kty": "OKP", "crv": "Ed25519", "kid": "a", "x": x },
            { "kty": "OKP", "crv": "Ed448", "kid": "b", "x": "AA" },
            { "kty": "RSA", "use": "enc", "n": "AA", "e": "AQAB" },
            { "kty": "oct", "kid": "c", "alg": "HS512", "k": base64url(&[7; 32]) },
        ]});
        let keys = parse(set.to_string().as_bytes()).unwrap();
        assert_eq!(keys.len(), 2);
        assert_eq!(keys[0].id.as_deref(), Some("a"));
        assert!(keys[0].verify("EdDSA", b"m", &pair.sign(b"m").unwrap()));
        assert!(keys[1].is_for("HS512") && !keys[1].is_for("HS256"));
        let single = json!({ "kty": "OKP", "crv": "Ed25519", "x": x });
        assert_eq!(parse(single.to_string().as_bytes()).unwrap().len(), 1);
    }

    #[test]
    fn a_file_that_is_no_key_says_what_to_do() {
        let pair = KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new(vec!["x".into()]).unwrap();
        let certificate = certificate.self_signed(&pair).unwrap().pem();
        assert!(reason(pair.serialize_pem()).contains("-pubout"));
        assert!(reason(certificate).contains("openssl x509"));
        let pkcs1 = "-----BEGIN RSA PUBLIC KEY-----\nAAAA\n-----END RSA PUBLIC KEY-----\n";
        assert!(reason(pkcs1).contains("openssl rsa"));
        let cut = "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n";
        assert!(reason(cut).contains("damaged"));
        let cut = "-----BEGIN PUBLIC KEY-----\nAAAA\n";
        assert_eq!(
            reason(cut),
            "it is cut short: a key in PEM form ends with a line -----END PUBLIC KEY-----"
        );
        let not_base64 = "-----BEGIN PUBLIC KEY-----\n§\n-----END PUBLIC KEY-----\n";
        assert!(reason(not_base64).contains("not in PEM form: base64"));
        assert!(reason("short").contains("openssl rand"));
        assert!(
            reason("two lines\nare not a secret, however long they may be").contains("neither")
        );
        assert!(reason("").contains("secret of 0 bytes"));
        assert!(reason(r#"{"keys": []}"#).contains("no key"));
        assert!(
            reason(r#"{"keys": [{"kty":"RSA"}]}"#).contains("key 1 of the set: `n` is missing")
        );
        assert!(reason(r#"{"keys": [{"kty":"oct","k":"AAAA"}]}"#).contains("found by trying"));
        assert!(
            reason(r#"{"keys": [{"kty":"OKP","crv":"Ed25519","x":"AAAA","d":"AA"}]}"#)
                .contains("private")
        );
        assert!(reason(r#"{"keys": "#).contains("Key Set"));
    }

    #[test]
    fn a_point_that_is_not_on_the_curve_is_no_key() {
        for (way, name, bytes) in [
            (&rcgen::PKCS_ECDSA_P256_SHA256, "P-256", 32),
            (&rcgen::PKCS_ECDSA_P384_SHA384, "P-384", 48),
        ] {
            let pair = KeyPair::generate_for(way).unwrap();
            let (x, y) = pair.der_bytes()[1..].split_at(bytes);
            let key = |y: &[u8]| {
                let key = json!({ "kty": "EC", "crv": name, "x": base64url(x), "y": base64url(y) });
                key.to_string()
            };
            assert_eq!(parse(key(y).as_bytes()).unwrap().len(), 1);
            let mut beside = y.to_vec();
            beside[bytes - 1] ^= 1;
            let error = reason(key(&beside));
            assert!(error.contains("no point of its curve"), "{error}");
            assert!(reason(key(&y[1..])).contains("damaged"));
            assert!(reason(key(&[0; 48][..bytes])).contains("no point"));
        }
    }

    #[test]
    fn a_public_key_is_never_taken_for_a_secret() {
        let pem = KeyPair::generate_for(&rcgen::PKCS_ED25519)
            .unwrap()
            .public_key_pem();
        let bare: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
        assert!(reason(&bare).contains("add them"));
    }

    #[test]
    fn a_weak_rsa_key_is_refused() {
        let small = json!({ "kty": "RSA", "n": base64url(&[0xff; 128]), "e": "AQAB" });
        assert!(reason(small.to_string()).contains("1024 bits"));
        let even = json!({ "kty": "RSA", "n": base64url(&[0xff; 256]), "e": "Ag" });
        assert!(reason(even.to_string()).contains("exponent"));
    }

    proptest! {
        #[test]
        fn no_contents_panic(contents in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&contents);
            let _ = from_spki(&contents);
        }

        #[test]
        fn no_key_in_pem_form_panics(der in proptest::collection::vec(any::<u8>(), 0..80)) {
            let pem = format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n", STANDARD.encode(&der));
            let _ = parse(pem.as_bytes());
        }

        #[test]
        fn a_damaged_key_does_not_panic(at in 0usize..290, value: u8) {
            let mut der = SubjectPublicKeyInfoDer::from_pem_slice(RSA.as_bytes()).unwrap().to_vec();
            let at = at % der.len();
            der[at] = value;
            if let Ok(material) = from_spki(&der) {
                TokenKey::new(material).verify("RS256", b"m", &[0; 256]);
            }
        }
    }
}
