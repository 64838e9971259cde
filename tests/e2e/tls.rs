//! MQTT over TLS, with mosquitto's clients and with peers that are none.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateRevocationListParams,
    CertifiedIssuer, DnType, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
    SerialNumber, date_time_ymd,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::gateway::{Gateway, Home, PATIENCE, finished};
use crate::mosquitto;
use crate::neighbours::Neighbours;
use crate::websocket;

/// A home whose gateway has a certificate for localhost.
fn home() -> Home {
    let home = Home::new();
    let pair = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    fs::write(certificate(&home), pair.cert.pem()).unwrap();
    fs::write(key(&home), pair.signing_key.serialize_pem()).unwrap();
    home.set("mqtt.tls.listen", "127.0.0.1:0")
        .set("mqtt.tls.certificate", "mqtt.crt")
        .set("mqtt.tls.key", "mqtt.key")
}

fn certificate(home: &Home) -> PathBuf {
    home.path().join("mqtt.crt")
}

fn key(home: &Home) -> PathBuf {
    home.path().join("mqtt.key")
}

fn address(gateway: &Gateway) -> SocketAddr {
    let status = gateway.status();
    status["mqtt_tls_listen"].as_str().unwrap().parse().unwrap()
}

/// `PROGRAM ARGS` against the TLS listener, trusting the gateway's certificate.
fn client(gateway: &Gateway, program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command
        .args(["-h", "localhost"])
        .args(["-p", &address(gateway).port().to_string()])
        .arg("--cafile")
        .arg(certificate(gateway.home()))
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn publish(gateway: &Gateway, args: &[&str]) {
    let child = client(gateway, "mosquitto_pub", args).spawn().unwrap();
    let output = finished(child, PATIENCE);
    assert!(output.status.success(), "{args:?}: {output:?}");
}

#[test]
fn both_versions_of_tls_carry_messages_of_every_size_and_qos() {
    let gateway = home().start();
    let large = "x".repeat(1_000_000);
    let file = gateway.home().path().join("large");
    fs::write(&file, &large).unwrap();
    let subscriber = gateway.until_subscribed(1, || {
        let args = ["-t", "a/#", "-q", "2", "-C", "5"];
        client(&gateway, "mosquitto_sub", &args).spawn().unwrap()
    });
    publish(
        &gateway,
        &["-t", "a/1", "-m", "one", "--tls-version", "tlsv1.2"],
    );
    publish(
        &gateway,
        &[
            "-t",
            "a/2",
            "-m",
            "two",
            "-q",
            "1",
            "--tls-version",
            "tlsv1.3",
        ],
    );
    publish(&gateway, &["-t", "a/3", "-m", "three", "-q", "2"]);
    publish(
        &gateway,
        &["-t", "a/4", "-q", "1", "-f", file.to_str().unwrap()],
    );
    // And from one listener to the other.
    mosquitto::publish(&gateway, &["-t", "a/5", "-m", "plain"]);
    let output = finished(subscriber, PATIENCE);
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 5);
    assert_eq!(lines[..3], ["one", "two", "three"]);
    assert_eq!(lines[3].len(), large.len());
    assert_eq!(lines[4], "plain");
}

#[test]
fn a_client_that_does_not_trust_the_certificate_stays_out() {
    let gateway = home().start();
    let other = certificate(&home());
    let args = ["-t", "a", "-m", "x", "--cafile", other.to_str().unwrap()];
    let child = client(&gateway, "mosquitto_pub", &args).spawn().unwrap();
    assert!(!finished(child, PATIENCE).status.success());
    publish(&gateway, &["-t", "a", "-m", "x"]);
}

#[test]
fn who_speaks_no_tls_is_cut_off_and_disturbs_nobody() {
    let gateway = home().set("mqtt.connect_timeout_ms", 5000).start();
    for bytes in [
        b"\x10\x0c\0\x04MQTT\x04\x02\0\x3c\0\0".as_slice(),
        b"GET / HTTP/1.1\r\n\r\n",
        &[0x16, 3, 1, 0xff, 0xff, 1, 0xff],
        b"",
    ] {
        let mut stream = TcpStream::connect(address(&gateway)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(bytes).unwrap();
        // An alert at most, and then the end: at once, or after mqtt.connect_timeout_ms.
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
        publish(&gateway, &["-t", "a", "-m", "x", "-q", "1"]);
    }
}

/// A TLS connection to `address`, trusting `certificate`.
fn connect(address: SocketAddr, certificate: &Path) -> StreamOwned<ClientConnection, TcpStream> {
    let mut roots = RootCertStore::empty();
    let certificate = CertificateDer::from_pem_file(certificate).unwrap();
    roots.add(certificate).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = "localhost".try_into().unwrap();
    let session = ClientConnection::new(Arc::new(config), name).unwrap();
    let socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    StreamOwned::new(session, socket)
}

#[test]
fn websocket_goes_over_tls_too() {
    let gateway = home()
        .set("mqtt.tls.listen", "off")
        .set("mqtt.websocket.tls_listen", "127.0.0.1:0")
        .start();
    let status = gateway.status();
    let address = status["mqtt_websocket_tls_listen"].as_str().unwrap();
    let socket = connect(address.parse().unwrap(), &certificate(gateway.home()));
    let mut browser = websocket::Client::connect(socket, "browser");
    browser.subscribe("a/#", 1);
    mosquitto::publish(&gateway, &["-t", "a/b", "-m", "plain"]);
    assert_eq!(browser.next().payload(), b"plain");
    let large = vec![b'x'; 1_000_000];
    browser.publish("b", &large);
    browser.publish("a/c", &large);
    assert_eq!(browser.next().payload().len(), large.len());
    gateway.until_logged("listener=\"wss\"");
}

#[test]
fn a_handshake_that_stalls_or_fails_is_counted() {
    let gateway = home().set("mqtt.connect_timeout_ms", 5000).start();
    let mut silent = TcpStream::connect(address(&gateway)).unwrap();
    silent.read_to_end(&mut Vec::new()).unwrap();
    let mut no_tls = TcpStream::connect(address(&gateway)).unwrap();
    no_tls.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let mut alert = Vec::new();
    no_tls.read_to_end(&mut alert).unwrap();
    assert_eq!(alert[0], 21, "{alert:?}");
    publish(&gateway, &["-t", "a", "-m", "x"]);
    let (_, metrics) = gateway.http("/metrics");
    let failures = "headgate_mqtt_tls_handshake_failures_total{listener=\"tls\"} 2";
    assert!(metrics.contains(failures), "{metrics}");
    let elsewhere = "headgate_mqtt_tls_handshake_failures_total{listener=\"tcp\"}";
    assert!(!metrics.contains(elsewhere), "{metrics}");
}

#[test]
fn a_gateway_can_listen_with_tls_alone() {
    let gateway = home().set("mqtt.listen", "off").start();
    publish(&gateway, &["-t", "a", "-m", "x"]);
    assert!(gateway.status()["mqtt_listen"].is_null());
    assert!(gateway.json(&["status"])["mqtt_listen"].is_null());
    let (_, metrics) = gateway.http("/metrics");
    assert!(!metrics.contains("listener=\"tcp\""), "{metrics}");
    assert!(gateway.terminate().log.contains("ready"));
}

/// Who vouches for clients.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    pub fn new(name: &str) -> Authority {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        let issuer = CertifiedIssuer::self_signed(params, key).unwrap();
        Authority { issuer }
    }

    /// Writes NAME.crt and NAME.key; the arguments by which mosquitto's clients use them.
    pub fn issue(
        &self,
        home: &Home,
        name: &str,
        set: impl FnOnce(&mut CertificateParams),
    ) -> Vec<String> {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        set(&mut params);
        let certificate = self.sign(params, &key);
        let path = |kind: &str| home.path().join(format!("{name}.{kind}"));
        fs::write(path("crt"), certificate.pem()).unwrap();
        fs::write(path("key"), key.serialize_pem()).unwrap();
        ["--cert".into(), path("crt").display().to_string()]
            .into_iter()
            .chain(["--key".into(), path("key").display().to_string()])
            .collect()
    }

    pub fn sign(&self, params: CertificateParams, key: &KeyPair) -> Certificate {
        params.signed_by(key, &self.issuer).unwrap()
    }

    /// Its own certificate, by which it is trusted.
    pub fn pem(&self) -> String {
        self.issuer.pem()
    }

    pub fn revoke(&self, serial: &[u8]) -> String {
        let now = date_time_ymd(2026, 1, 1);
        let list = CertificateRevocationListParams {
            this_update: now,
            next_update: date_time_ymd(2100, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![RevokedCertParams {
                serial_number: SerialNumber::from_slice(serial),
                revocation_time: now,
                reason_code: None,
                invalidity_date: None,
            }],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&self.issuer).unwrap().pem().unwrap()
    }
}

/// Whether a client with these further arguments gets a message through.
fn gets_in(gateway: &Gateway, args: &[String]) -> bool {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let args = [&["-t", "a", "-m", "x", "-q", "1"], &args[..]].concat();
    let child = client(gateway, "mosquitto_pub", &args).spawn().unwrap();
    finished(child, PATIENCE).status.success()
}

pub fn mutual(wanted: &str, authority: &Authority) -> Home {
    let home = home()
        .set("mqtt.tls.client_certificates", wanted)
        .set("mqtt.tls.client_ca", "clients.crt");
    fs::write(home.path().join("clients.crt"), authority.issuer.pem()).unwrap();
    home
}

#[test]
fn only_clients_with_a_valid_certificate_get_in_where_one_is_required() {
    let authority = Authority::new("plant");
    let gateway = mutual("required", &authority).start();
    let home = gateway.home();
    let good = authority.issue(home, "press", |_| {});
    let stranger = Authority::new("plant").issue(home, "stranger", |_| {});
    let expired = authority.issue(home, "expired", |params| {
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2021, 1, 1);
    });
    assert!(gets_in(&gateway, &good));
    gateway.until_logged("certificate=\"press\"");
    assert!(!gets_in(&gateway, &[]));
    gateway.until_logged("peer sent no certificates");
    assert!(!gets_in(&gateway, &stranger));
    gateway.until_logged("invalid peer certificate");
    assert!(!gets_in(&gateway, &expired));
    gateway.until_logged("certificate expired");
    assert!(gets_in(&gateway, &good));
}

#[test]
fn where_a_certificate_is_optional_none_is_better_than_a_wrong_one() {
    let authority = Authority::new("plant");
    let gateway = mutual("optional", &authority).start();
    let stranger = Authority::new("plant").issue(gateway.home(), "stranger", |_| {});
    assert!(gets_in(&gateway, &[]));
    assert!(gets_in(
        &gateway,
        &authority.issue(gateway.home(), "press", |_| {})
    ));
    assert!(!gets_in(&gateway, &stranger));
}

#[test]
fn a_certificate_takes_the_place_of_a_login() {
    let authority = Authority::new("plant");
    let home = mutual("optional", &authority).set("mqtt.auth.anonymous", "never");
    let gateway = home.start();
    assert!(!gets_in(&gateway, &[]));
    gateway.until_logged("nobody may connect without a login");
    let press = authority.issue(&home, "press", |_| {});
    assert!(gets_in(&gateway, &press));
    gateway.until_logged("user=\"press\" login=\"certificate\"");
}

#[test]
fn a_certificate_on_the_revocation_list_holds_no_more_from_the_moment_it_is_listed() {
    let authority = Authority::new("plant");
    let home = mutual("required", &authority).set("mqtt.tls.client_crl", "revoked.pem");
    let list = home.path().join("revoked.pem");
    fs::write(&list, authority.revoke(&[9])).unwrap();
    let gateway = home.start();
    let one = authority.issue(&home, "one", |params| {
        params.serial_number = Some(SerialNumber::from_slice(&[1]));
    });
    let nine = authority.issue(&home, "nine", |params| {
        params.serial_number = Some(SerialNumber::from_slice(&[9]));
    });
    let two = authority.issue(&home, "two", |_| {});
    assert!(gets_in(&gateway, &one));
    assert!(!gets_in(&gateway, &nine));
    let listen = |args: &[String]| {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let args = [&["-t", "a"], &args[..]].concat();
        client(&gateway, "mosquitto_sub", &args).spawn().unwrap()
    };
    let mut listeners = [listen(&one), listen(&two)];
    gateway.until_status("subscriptions", subscriptions, Some(2));
    replace(&list, &authority.revoke(&[1]));
    gateway.until_logged("the files of mqtt.tls have changed");
    gateway.until_status("subscriptions", subscriptions, Some(1));
    assert!(gateway.log().contains("the login holds no longer"));
    assert!(!gets_in(&gateway, &one));
    assert!(gets_in(&gateway, &nine));
    for listener in &mut listeners {
        listener.kill().unwrap();
        listener.wait().unwrap();
    }
}

fn subscriptions(status: &serde_json::Value) -> Option<u64> {
    status["broker"]["subscriptions"].as_u64()
}

#[test]
fn files_for_client_certificates_that_cannot_be_used_are_named() {
    let authority = Authority::new("plant");
    let home = mutual("required", &authority);
    fs::copy(key(&home), home.path().join("clients.crt")).unwrap();
    let message = home.refusal();
    assert!(
        message.contains("mqtt.tls.client_ca: clients.crt: no certificate in PEM form"),
        "{message}"
    );
    let home = mutual("required", &authority).set("mqtt.tls.client_crl", "clients.crt");
    let message = home.refusal();
    assert!(
        message.contains("mqtt.tls.client_crl: clients.crt: no revocation list in PEM form"),
        "{message}"
    );
    let message = home.set("mqtt.tls.client_ca", "").refusal();
    assert!(
        message.contains("certificates can't be checked without mqtt.tls.client_ca"),
        "{message}"
    );
}

/// As certbot and its like do it.
fn replace(path: &Path, contents: &str) {
    let new = path.with_extension("new");
    fs::write(&new, contents).unwrap();
    fs::rename(new, path).unwrap();
}

#[test]
fn a_new_certificate_is_taken_and_connected_clients_go_on() {
    let gateway = home().start();
    let neighbours = Neighbours::start(&gateway);
    let old = gateway.home().path().join("old.crt");
    fs::copy(certificate(gateway.home()), &old).unwrap();
    let subscriber = gateway.until_subscribed(1, || {
        let args = ["-t", "held", "-C", "2"];
        client(&gateway, "mosquitto_sub", &args).spawn().unwrap()
    });
    publish(&gateway, &["-t", "held", "-m", "before"]);

    // The key alone fits nothing, and is not tried for long.
    let pair = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    replace(&key(gateway.home()), &pair.signing_key.serialize_pem());
    gateway.until_logged("can't be used: the old ones stay in use");
    gateway.until_logged("don't belong together");
    let old_trust = ["--cafile".to_owned(), old.display().to_string()];
    assert!(gets_in(&gateway, &old_trust));

    replace(&certificate(gateway.home()), &pair.cert.pem());
    gateway.until_logged("new connections get the new certificate");
    assert!(!gets_in(&gateway, &old_trust));
    publish(&gateway, &["-t", "held", "-m", "after"]);
    let output = finished(subscriber, PATIENCE);
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "before\nafter\n");
    assert_eq!(gateway.log().matches("can't be used").count(), 1);
    let (_, metrics) = gateway.http("/metrics");
    assert!(
        metrics.contains("headgate_mqtt_tls_reload_failures_total 1"),
        "{metrics}"
    );
    neighbours.assert_lost_nothing();
}

#[test]
fn a_certificate_that_expires_soon_is_warned_of_and_its_end_is_in_the_metrics() {
    let home = home();
    let key_pair = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(["localhost".to_owned()]).unwrap();
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2021, 1, 1);
    let expired = params.self_signed(&key_pair).unwrap();
    fs::write(certificate(&home), expired.pem()).unwrap();
    fs::write(key(&home), key_pair.serialize_pem()).unwrap();
    let gateway = home.start();
    gateway.until_logged("the TLS certificate has expired at 2021-01-01T00:00:00Z");
    let (_, metrics) = gateway.http("/metrics");
    let expiry = "headgate_mqtt_tls_certificate_expiry_seconds 1609459200";
    assert!(metrics.contains(expiry), "{metrics}");
}

#[test]
fn a_certificate_or_key_that_cannot_be_used_is_named() {
    let refusal = |home: &Home| home.refusal();

    let good = home();
    fs::remove_file(key(&good)).unwrap();
    let message = refusal(&good);
    assert!(
        message.contains("mqtt.tls.key: mqtt.key: No such file"),
        "{message}"
    );

    let good = home();
    fs::copy(certificate(&good), key(&good)).unwrap();
    let message = refusal(&good);
    assert!(
        message.contains("mqtt.tls.key: mqtt.key: no private key in PEM form"),
        "{message}"
    );

    let good = home();
    fs::write(certificate(&good), "").unwrap();
    let message = refusal(&good);
    assert!(
        message.contains("mqtt.tls.certificate: mqtt.crt: no certificate in PEM"),
        "{message}"
    );

    let good = home();
    fs::copy(key(&home()), key(&good)).unwrap();
    let message = refusal(&good);
    assert!(message.contains("don't belong together"), "{message}");

    let good = home();
    fs::write(
        key(&good),
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n",
    )
    .unwrap();
    let message = refusal(&good);
    assert!(message.contains("the key is encrypted"), "{message}");

    let good = home();
    fs::remove_file(key(&good)).unwrap();
    assert!(
        Command::new("mkfifo")
            .arg(key(&good))
            .status()
            .unwrap()
            .success()
    );
    let message = refusal(&good);
    assert!(
        message.contains("mqtt.tls.key: mqtt.key: not a regular file"),
        "{message}"
    );

    let good = home();
    let text = fs::read_to_string(certificate(&good)).unwrap();
    fs::write(certificate(&good), text.replace("MI", "!!")).unwrap();
    let message = refusal(&good);
    assert!(
        message.contains("mqtt.tls.certificate: mqtt.crt"),
        "{message}"
    );
}
