//! From the address of a broker to a connection that it has accepted.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::http::Uri;
use bytes::BytesMut;
use rumqttc::v5::mqttbytes::v5::{
    ConnAck, Connect, ConnectProperties, ConnectReturnCode, Login as Credentials, Packet,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf, split};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::packets::{Incoming, take_packet};
use crate::event::via::LINK;
use crate::uplink::connection::{secret, whole};
use crate::uplink::links::{Link, Login, Tls};

/// Commands that are here and not on disk: the broker waits with the next then.
const RECEIVE_MAXIMUM: u16 = 256;

/// What an answer to CONNECT has at the most.
const MOST_ANSWER_BYTES: usize = 64 << 10;

pub(super) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// A connection that a broker has accepted.
pub(super) struct Dialled {
    pub(super) reader: ReadHalf<Box<dyn Io>>,
    pub(super) writer: WriteHalf<Box<dyn Io>>,
    /// What has come after the answer.
    pub(super) input: BytesMut,
    pub(super) terms: Terms,
}

/// What the broker allows.
#[derive(Debug)]
pub(super) struct Terms {
    /// It still knows what was subscribed to, and what was not acknowledged.
    pub(super) session_present: bool,
    /// Most messages that may be on their way.
    pub(super) receive_maximum: usize,
    pub(super) max_packet_bytes: usize,
    pub(super) keep_alive: Duration,
}

/// Connects to one of the link's servers.
pub(super) async fn dial(link: &Link, server: &str) -> Result<Dialled, String> {
    let dialling = async {
        let stream = connect(link, server).await?;
        greet(link, stream).await
    };
    match tokio::time::timeout(link.timeout, dialling).await {
        Ok(dialled) => dialled.map_err(|why| format!("{server}: {why}")),
        Err(_) => Err(format!("{server}: no answer within {:?}", link.timeout)),
    }
}

async fn connect(link: &Link, server: &str) -> Result<Box<dyn Io>, String> {
    let uri: Uri = server.parse().map_err(|error| format!("{error}"))?;
    let with_tls = uri.scheme_str() == Some("mqtts");
    let port = uri.port_u16().unwrap_or(if with_tls { 8883 } else { 1883 });
    let host = uri.host().unwrap_or_default();
    // As an address of IPv6 stands in a URL.
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let stream = TcpStream::connect((host, port))
        .await
        .map_err(|error| format!("can't connect: {error}"))?;
    // Acknowledgements are waited for. Where it can't be set it is slower.
    let _ = stream.set_nodelay(true);
    if !with_tls {
        return Ok(Box::new(stream));
    }
    let name = ServerName::try_from(host.to_owned()).map_err(|error| error.to_string())?;
    let config = tls(&link.tls, link.session.alpn.as_deref())?;
    let stream = TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
        .map_err(|error| format!("no TLS: {}{}", whole(&error), tls_hint(&error, &link.tls)))?;
    Ok(Box::new(stream))
}

/// What to look at.
fn tls_hint(error: &io::Error, tls: &Tls) -> String {
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref());
    match (cause, &tls.ca_file) {
        (Some(rustls::Error::InvalidCertificate(_)), Some(file)) => {
            format!("; ca_file of the link is {}", file.display())
        }
        (Some(rustls::Error::InvalidCertificate(_)), None) => {
            "; the link has no ca_file, so the system's authorities are trusted".into()
        }
        (Some(rustls::Error::AlertReceived(_)), _) => {
            "; look at certificate_file, key_file and alpn of the link".into()
        }
        _ => String::new(),
    }
}

fn tls(tls: &Tls, alpn: Option<&str>) -> Result<ClientConfig, String> {
    let mut roots = RootCertStore::empty();
    match &tls.ca_file {
        Some(file) => {
            for certificate in certificates(file)? {
                roots
                    .add(certificate)
                    .map_err(|error| format!("{}: {error}", file.display()))?;
            }
        }
        None => {
            let found = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(found.certs);
            if roots.is_empty() {
                return Err(
                    "the system has no certificates of authorities: set ca_file of the link".into(),
                );
            }
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots);
    let mut config = match &tls.own {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => {
            let chain = certificates(certificate)?;
            let private = PrivateKeyDer::from_pem_slice(secret(key)?.as_bytes())
                .map_err(|error| format!("{}: no private key: {error}", key.display()))?;
            builder
                .with_client_auth_cert(chain, private)
                .map_err(|error| {
                    format!("{} and {}: {error}", certificate.display(), key.display())
                })?
        }
    };
    config.alpn_protocols = alpn.iter().map(|alpn| alpn.as_bytes().to_vec()).collect();
    Ok(config)
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let text = secret(file)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(format!(
            "{}: no certificate in it; it is to be PEM",
            file.display()
        )),
        Err(error) => Err(format!("{}: {error}", file.display())),
    }
}

/// Says who it is, and waits until it is let in.
async fn greet(link: &Link, stream: Box<dyn Io>) -> Result<Dialled, String> {
    let credentials = match &link.login {
        Login::Password { user, file } => Some(Credentials::new(user.clone(), secret(file)?)),
        Login::User(user) => Some(Credentials::new(user.clone(), "")),
        _ => None,
    };
    let session = &link.session;
    // Who takes nothing has nothing to be kept.
    let takes = !link.take.is_empty();
    let connect = Connect {
        keep_alive: session.keep_alive_s,
        client_id: session.client_id.clone(),
        clean_start: !takes,
        properties: Some(ConnectProperties {
            session_expiry_interval: takes.then_some(session.expiry_s),
            receive_maximum: Some(RECEIVE_MAXIMUM),
            max_packet_size: Some(session.max_packet_bytes),
            user_properties: vec![(LINK.into(), link.name.clone())],
            ..ConnectProperties::new()
        }),
    };
    let (mut reader, mut writer) = split(stream);
    let mut input = BytesMut::new();
    Packet::Connect(connect, None, credentials)
        .write(&mut input, None)
        .map_err(|error| format!("can't greet it: {error}"))?;
    let greeted = async {
        writer.write_all(&input).await?;
        writer.flush().await
    };
    greeted
        .await
        .map_err(|error| format!("can't greet it: {error}"))?;
    input.clear();
    loop {
        if let Some(packet) = take_packet(&mut input, MOST_ANSWER_BYTES)? {
            let terms = terms(packet, link)?;
            return Ok(Dialled {
                reader,
                writer,
                input,
                terms,
            });
        }
        match reader.read_buf(&mut input).await {
            Ok(0) => {
                return Err(
                    "it closes the connection before it answers: it may not know MQTT 5.0, which links need, or want TLS \
                     (mqtts://)"
                        .into(),
                );
            }
            Ok(_) => {}
            // With TLS 1.3 a server says only now that it does not accept the certificate.
            Err(error) => {
                return Err(format!(
                    "no answer: {}{}",
                    whole(&error),
                    tls_hint(&error, &link.tls)
                ));
            }
        }
    }
}

fn terms(packet: Incoming, link: &Link) -> Result<Terms, String> {
    const TOO_OLD: &str = "it does not speak MQTT 5.0, which links need";
    let ConnAck {
        session_present,
        code,
        properties,
    } = match packet {
        Incoming::Other(packet) => match *packet {
            Packet::ConnAck(answer) => answer,
            other => return Err(format!("it does not answer, but sends {other:?}")),
        },
        Incoming::OldConnAck => return Err(TOO_OLD.into()),
        Incoming::Disconnect(reason) => {
            return Err(format!("it ends the connection: {}", reason.text()));
        }
        other => return Err(format!("it does not answer, but sends {other:?}")),
    };
    let all = properties.as_ref();
    let said = all.and_then(|all| all.reason_string.as_deref());
    let said = said.map_or(String::new(), |said| format!(": {said:?}"));
    match code {
        ConnectReturnCode::Success => {}
        ConnectReturnCode::UnsupportedProtocolVersion
        | ConnectReturnCode::RefusedProtocolVersion => return Err(TOO_OLD.into()),
        ConnectReturnCode::BadUserNamePassword | ConnectReturnCode::NotAuthorized => {
            return Err(format!(
                "it refuses the login ({code:?}{said}): look at user, password_file, certificate_file and client_id of \
                 the link"
            ));
        }
        ConnectReturnCode::ClientIdentifierNotValid => {
            return Err(format!(
                "it refuses client_id {:?}{said}",
                link.session.client_id
            ));
        }
        ConnectReturnCode::UseAnotherServer | ConnectReturnCode::ServerMoved => {
            let other = all.and_then(|all| all.server_reference.as_deref());
            return Err(format!(
                "it sends to another server ({}): change servers of the link",
                other.unwrap_or("it does not say which")
            ));
        }
        code => return Err(format!("it refuses the connection: {code:?}{said}")),
    }
    if all.and_then(|all| all.max_qos) == Some(0) {
        return Err("it acknowledges nothing (QoS 0 at the most), so events could be lost".into());
    }
    let retains = link.ship.iter().any(|ship| ship.to.retains());
    if retains && all.and_then(|all| all.retain_available) == Some(0) {
        return Err("it keeps no messages: leave retain = true out of [[link.ship]]".into());
    }
    let keep_alive_s = all.and_then(|all| all.server_keep_alive);
    let keep_alive_s = keep_alive_s.filter(|seconds| *seconds > 0);
    let receive_maximum = all.and_then(|all| all.receive_max);
    let max_packet_bytes = all.and_then(|all| all.max_packet_size);
    Ok(Terms {
        session_present,
        receive_maximum: usize::from(receive_maximum.unwrap_or(u16::MAX)),
        max_packet_bytes: max_packet_bytes.map_or(usize::MAX, |bytes| bytes as usize),
        keep_alive: Duration::from_secs(keep_alive_s.unwrap_or(link.session.keep_alive_s).into()),
    })
}
