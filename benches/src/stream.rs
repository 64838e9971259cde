//! A connection's bytes, with TLS or without: the same socket options for every broker.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};

/// Whom certificates are made for.
pub const SERVER_NAME: &str = "localhost";

/// What one read takes from the socket, as much as what it gives without TLS.
const READ_BYTES: usize = 256 * 1024;

/// Where a broker is, and what to trust if TLS is spoken there.
#[derive(Clone, Debug)]
pub struct Endpoint {
    pub address: SocketAddr,
    tls: Option<Arc<ClientConfig>>,
}

impl Endpoint {
    pub fn plain(address: SocketAddr) -> Endpoint {
        Endpoint { address, tls: None }
    }

    /// With TLS, trusting the certificates in a PEM file.
    pub fn trusting(address: SocketAddr, certificates: &Path) -> Result<Endpoint> {
        let name = || certificates.display().to_string();
        let pem = fs::read(certificates).with_context(name)?;
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(&pem) {
            roots.add(certificate.with_context(name)?)?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Endpoint {
            address,
            tls: Some(Arc::new(config)),
        })
    }
}

/// One connection.
pub enum Stream {
    Plain(TcpStream),
    Tls(Box<Tls>),
}

pub struct Tls {
    session: ClientConnection,
    socket: TcpStream,
    /// Read from the socket and not yet decrypted: what lies between the two places.
    encrypted: Vec<u8>,
    from: usize,
    to: usize,
}

impl Stream {
    /// Connects, and shakes hands. `patience`: how long a read or a write may take.
    pub fn open(broker: &Endpoint, patience: Duration) -> Result<Stream> {
        let address = broker.address;
        let socket =
            TcpStream::connect(address).with_context(|| format!("can't connect to {address}"))?;
        socket.set_nodelay(true)?;
        socket.set_write_timeout(Some(patience))?;
        socket.set_read_timeout(Some(patience))?;
        let Some(config) = &broker.tls else {
            return Ok(Stream::Plain(socket));
        };
        let mut session =
            ClientConnection::new(config.clone(), ServerName::try_from(SERVER_NAME)?)?;
        while session.is_handshaking() {
            session
                .complete_io(&mut &socket)
                .with_context(|| format!("no TLS handshake with {address}"))?;
        }
        Ok(Stream::Tls(Box::new(Tls {
            session,
            socket,
            encrypted: vec![0; READ_BYTES],
            from: 0,
            to: 0,
        })))
    }

    pub fn socket(&self) -> &TcpStream {
        match self {
            Stream::Plain(socket) => socket,
            Stream::Tls(tls) => &tls.socket,
        }
    }

    /// What protects it: version and cipher suite.
    pub fn protection(&self) -> Option<String> {
        let Stream::Tls(tls) = self else { return None };
        let version = tls.session.protocol_version()?;
        let suite = tls.session.negotiated_cipher_suite()?.suite();
        Some(format!(
            "{} with {}",
            version.as_str().unwrap_or("TLS"),
            suite.as_str().unwrap_or("an unknown suite")
        ))
    }
}

impl Read for Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Plain(socket) => socket.read(into),
            Stream::Tls(tls) => tls.read(into),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Plain(socket) => socket.write(bytes),
            Stream::Tls(tls) => tls.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Tls {
    /// Fills `into` as far as what one read of the socket brings allows.
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        loop {
            match self.session.reader().read(&mut into[filled..]) {
                // The end, if it is in order; or `into` is full.
                Ok(0) => return Ok(filled),
                Ok(count) => {
                    filled += count;
                    continue;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            if self.from == self.to {
                if filled > 0 {
                    return Ok(filled);
                }
                self.from = 0;
                self.to = self.socket.read(&mut self.encrypted)?;
                if self.to == 0 {
                    return Ok(0);
                }
            }
            let mut encrypted = &self.encrypted[self.from..self.to];
            self.from += self.session.read_tls(&mut encrypted)?;
            self.session
                .process_new_packets()
                .map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.session.writer().write(bytes)?;
        while self.session.wants_write() {
            self.session.write_tls(&mut self.socket)?;
        }
        Ok(count)
    }
}
