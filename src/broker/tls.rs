//! The certificate and the key of a TLS listener.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

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
        "mqtt.tls: the certificate {} and the key {} don't work together: {reason}; name the key \
         that the certificate was made for", .certificate.display(), .key.display()
    )]
    Mismatch {
        certificate: PathBuf,
        key: PathBuf,
        reason: String,
    },
}

/// Reads a chain of certificates, the server's own first, and its key, both as PEM. TLS 1.2 and 1.3.
pub fn server_config(certificate: &Path, key: &Path) -> Result<Arc<ServerConfig>, TlsError> {
    let unusable = |key, path: &Path, error: pem::Error, wanted| TlsError::File {
        key,
        path: path.to_owned(),
        reason: match error {
            pem::Error::Io(error) => error.to_string(),
            pem::Error::NoItemsFound => format!("no {wanted} in PEM form is in this file"),
            error => format!("{error}; it must hold a {wanted} in PEM form"),
        },
    };
    let bad_certificate = |error| unusable("certificate", certificate, error, "certificate");
    let chain: Vec<_> = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect)
        .map_err(bad_certificate)?;
    if chain.is_empty() {
        return Err(bad_certificate(pem::Error::NoItemsFound));
    }
    let private = PrivateKeyDer::from_pem_file(key)
        .map_err(|error| unusable("key", key, error, "private key"))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map(|builder| builder.with_no_client_auth())
        .and_then(|builder| builder.with_single_cert(chain, private));
    config.map(Arc::new).map_err(|error| TlsError::Mismatch {
        certificate: certificate.to_owned(),
        key: key.to_owned(),
        reason: error.to_string(),
    })
}
