//! What the TLS listeners need from files: the gateway's certificate and key, and whom it trusts to
//! vouch for clients.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ServerSessionMemoryCache, VerifierBuilderError, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig};

use super::certificate::Validity;
use crate::regular_file::{RegularFile, without_mark};

/// Why there can be no TLS. Names the key of the configuration and the file.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("mqtt.tls.{key}: {}: {reason}", .path.display())]
    File {
        key: &'static str,
        path: PathBuf,
        reason: String,
    },
    #[error(
        "mqtt.tls: the certificate {} and the key {} don't belong together; name the key that the \
         certificate was made for", .certificate.display(), .key.display()
    )]
    Mismatch { certificate: PathBuf, key: PathBuf },
}

/// The files of `mqtt.tls`.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// A chain of certificates, the gateway's own first.
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// None: clients are not asked for certificates.
    pub clients: Option<ClientFiles>,
}

/// How the certificates of clients are checked.
#[derive(Clone, Debug)]
pub struct ClientFiles {
    /// Certificates of those who vouch for clients.
    pub ca: PathBuf,
    /// Certificates that are not valid any more.
    pub crl: Option<PathBuf>,
    /// Whether a client must have a certificate.
    pub required: bool,
}

/// TLS as the files want it.
pub(super) struct LoadedTls {
    pub config: Arc<ServerConfig>,
    /// Checks the certificates of clients, if they are asked for any.
    pub clients: Option<Arc<dyn ClientCertVerifier>>,
    /// Of the gateway's certificate.
    pub validity: Validity,
}

/// Sessions that clients may resume: those that reconnect soon save a signature. A kilobyte or two
/// each.
const RESUMABLE_SESSIONS: usize = 256;

impl TlsFiles {
    pub(super) fn paths(&self) -> impl Iterator<Item = &Path> {
        let clients = self.clients.as_ref();
        let ca = clients.map(|clients| clients.ca.as_path());
        let crl = clients.and_then(|clients| clients.crl.as_deref());
        [self.certificate.as_path(), self.key.as_path()]
            .into_iter()
            .chain(ca)
            .chain(crl)
    }

    /// Reads all files. TLS 1.2 and 1.3.
    pub(super) fn load(&self) -> Result<LoadedTls, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let chain = certificates("certificate", &self.certificate)?;
        let private = private_key(&self.key)?;
        let clients = self.clients.as_ref();
        let clients = clients.map(|clients| clients.verifier(provider.clone()));
        let clients = clients.transpose()?;
        let verifier = clients.clone();
        let verifier = verifier.unwrap_or_else(WebPkiClientVerifier::no_client_auth);
        let unusable = |reason: &dyn std::fmt::Debug| TlsError::File {
            key: "certificate",
            path: self.certificate.clone(),
            reason: format!("it holds no certificate that can be used: {reason:?}"),
        };
        let validity = chain.first().and_then(|own| Validity::of(own));
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map(|builder| builder.with_client_cert_verifier(verifier))
            .and_then(|builder| builder.with_single_cert(chain, private));
        let mut config = config.map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => TlsError::Mismatch {
                certificate: self.certificate.clone(),
                key: self.key.clone(),
            },
            rustls::Error::InvalidCertificate(problem) => unusable(&problem),
            other => TlsError::File {
                key: "key",
                path: self.key.clone(),
                reason: format!(
                    "a key of this kind can't be used ({other}); take ECDSA with P-256 or P-384, \
                     Ed25519, or RSA of at least 2048 bits"
                ),
            },
        })?;
        config.session_storage = ServerSessionMemoryCache::new(RESUMABLE_SESSIONS);
        Ok(LoadedTls {
            config: Arc::new(config),
            clients,
            validity: validity.ok_or_else(|| unusable(&"no X.509"))?,
        })
    }
}

impl ClientFiles {
    fn verifier(
        &self,
        provider: Arc<CryptoProvider>,
    ) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
        let unusable = |key, path: &Path, error: &dyn std::fmt::Display| TlsError::File {
            key,
            path: path.to_owned(),
            reason: format!("it can't be used: {error}"),
        };
        let mut roots = RootCertStore::empty();
        for certificate in certificates("client_ca", &self.ca)? {
            roots
                .add(certificate)
                .map_err(|error| unusable("client_ca", &self.ca, &error))?;
        }
        let mut builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
        if let Some(crl) = &self.crl {
            let lists: Vec<CertificateRevocationListDer> =
                read_all("client_crl", crl, "revocation list")?;
            builder = builder.with_crls(lists);
        }
        if !self.required {
            builder = builder.allow_unauthenticated();
        }
        builder.build().map_err(|error| match (&error, &self.crl) {
            (VerifierBuilderError::InvalidCrl(_), Some(crl)) => unusable("client_crl", crl, &error),
            _ => unusable("client_ca", &self.ca, &error),
        })
    }
}

fn certificates(key: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    read_all(key, path, "certificate")
}

/// All items of a kind in a file, of which there must be one.
fn read_all<T: PemObject>(
    key: &'static str,
    path: &Path,
    wanted: &str,
) -> Result<Vec<T>, TlsError> {
    let (bytes, _) = read(key, path)?;
    let unusable = |error| parse_error(key, path, error, wanted);
    let all: Vec<_> = T::pem_slice_iter(&bytes)
        .collect::<Result<_, _>>()
        .map_err(unusable)?;
    match all.is_empty() {
        true => Err(unusable(pem::Error::NoItemsFound)),
        false => Ok(all),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let (bytes, mode) = read("key", path)?;
    if bytes
        .windows(ENCRYPTED.len())
        .any(|window| window == ENCRYPTED)
    {
        return Err(TlsError::File {
            key: "key",
            path: path.to_owned(),
            reason:
                "the key is encrypted, and nobody is there to say the password: decrypt it with \
                     `openssl pkey -in FILE -out FILE`, and keep it from others with chmod 600"
                    .into(),
        });
    }
    let private = PrivateKeyDer::from_pem_slice(&bytes)
        .map_err(|error| parse_error("key", path, error, "private key"))?;
    warn_if_open(path, mode);
    Ok(private)
}

/// In the first lines of keys that take a password, of either form.
const ENCRYPTED: &[u8] = b"ENCRYPTED";

/// A chain of certificates has some kilobytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The contents and the mode of a file that a key of the configuration names.
fn read(key: &'static str, path: &Path) -> Result<(Vec<u8>, u32), TlsError> {
    let contents = RegularFile::open(path, 0).and_then(|file| {
        let mode = file.metadata().permissions().mode();
        Ok((without_mark(&file.read(MAX_FILE_BYTES)?).to_owned(), mode))
    });
    contents.map_err(|error| TlsError::File {
        key,
        path: path.to_owned(),
        reason: error.to_string(),
    })
}

fn parse_error(key: &'static str, path: &Path, error: pem::Error, wanted: &str) -> TlsError {
    let reason = match error {
        pem::Error::NoItemsFound => format!("no {wanted} in PEM form is in this file"),
        pem::Error::MissingSectionEnd { .. } => {
            format!("it is cut short: a {wanted} in PEM form ends with a line -----END …-----")
        }
        error => format!("{error}; it must hold a {wanted} in PEM form"),
    };
    TlsError::File {
        key,
        path: path.to_owned(),
        reason,
    }
}

/// A key that others can read may be known to them.
fn warn_if_open(key: &Path, mode: u32) {
    if mode & 0o007 != 0 {
        tracing::warn!(
            path = %key.display(),
            "everybody on this machine can get at the TLS key (mode {:o}); run: chmod o= FILE",
            mode & 0o777
        );
    }
}
