//! The certificate and the key of a TLS listener.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::regular_file::RegularFile;

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

/// Reads a chain of certificates, the server's own first, and its key, both as PEM. TLS 1.2 and 1.3.
pub fn server_config(certificate: &Path, key: &Path) -> Result<Arc<ServerConfig>, TlsError> {
    let (chain, _) = read("certificate", certificate)?;
    let unusable = |error| parse_error("certificate", certificate, error, "certificate");
    let chain: Vec<_> = CertificateDer::pem_slice_iter(&chain)
        .collect::<Result<_, _>>()
        .map_err(unusable)?;
    if chain.is_empty() {
        return Err(unusable(pem::Error::NoItemsFound));
    }
    let (private, mode) = read("key", key)?;
    if private
        .windows(ENCRYPTED.len())
        .any(|window| window == ENCRYPTED)
    {
        return Err(TlsError::File {
            key: "key",
            path: key.to_owned(),
            reason:
                "the key is encrypted, and nobody is there to say the password: decrypt it with \
                     `openssl pkey -in FILE -out FILE`, and keep it from others with chmod 600"
                    .into(),
        });
    }
    let private = PrivateKeyDer::from_pem_slice(&private)
        .map_err(|error| parse_error("key", key, error, "private key"))?;
    warn_if_open(key, mode);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map(|builder| builder.with_no_client_auth())
        .and_then(|builder| builder.with_single_cert(chain, private));
    config.map(Arc::new).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => TlsError::Mismatch {
            certificate: certificate.to_owned(),
            key: key.to_owned(),
        },
        rustls::Error::InvalidCertificate(problem) => TlsError::File {
            key: "certificate",
            path: certificate.to_owned(),
            reason: format!("it holds no certificate that can be used: {problem:?}"),
        },
        other => TlsError::File {
            key: "key",
            path: key.to_owned(),
            reason: format!(
                "a key of this kind can't be used ({other}); take ECDSA with P-256 or P-384, \
                 Ed25519, or RSA of at least 2048 bits"
            ),
        },
    })
}

/// In the first lines of keys that take a password, of either form.
const ENCRYPTED: &[u8] = b"ENCRYPTED";

/// A chain of certificates has some kilobytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The contents and the mode of a file that a key of the configuration names.
fn read(key: &'static str, path: &Path) -> Result<(Vec<u8>, u32), TlsError> {
    let contents = RegularFile::open(path, 0).and_then(|file| {
        let mode = file.metadata().permissions().mode();
        Ok((file.read(MAX_FILE_BYTES)?, mode))
    });
    contents.map_err(|error| TlsError::File {
        key,
        path: path.to_owned(),
        reason: error.to_string(),
    })
}

fn parse_error(
    key: &'static str,
    path: &Path,
    error: pem::Error,
    wanted: &'static str,
) -> TlsError {
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
