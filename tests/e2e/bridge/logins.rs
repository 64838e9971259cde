//! Who is let in, and by whom.

use std::io::Read;
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;

use rcgen::{CertificateParams, KeyPair, date_time_ymd};
use rustls::crypto::ring;
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::*;
use crate::gateway::PATIENCE;
use crate::tls::Authority;
use broker::OddBroker;

fn with_password(folder: &Path) {
    let file = folder.join("passwords");
    let made = std::process::Command::new("mosquitto_passwd")
        .args(["-b", "-c"])
        .arg(&file)
        .args(["press", "right"])
        .status()
        .unwrap();
    assert!(made.success());
    // mosquitto may run as another user.
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    fs::set_permissions(&file, permissions).unwrap();
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(folder, permissions).unwrap();
}

#[test]
fn a_wrong_password_is_told_and_the_right_one_holds_without_a_restart() {
    let config = "allow_anonymous false\npassword_file {folder}/passwords";
    let mosquitto = Mosquitto::start(config, with_password);
    let more = "user = 'press'\npassword_file = 'password'";
    let home = home(&[mosquitto.url()], more, SHIP);
    fs::write(home.path().join("password"), "wrong\n").unwrap();
    let gateway = home.start();
    publish(&gateway, ["x"]);
    until_told(&gateway, "refuses the login");
    until_told(&gateway, "password_file");
    assert!(!gateway.cli(&["uplink", "status"]).status.success());
    fs::write(home.path().join("password"), "right\n").unwrap();
    until_connected(&gateway);
    eventually("the event", || {
        (gateway.status()["uplink"][0]["ship"][0]["events"] == 1).then_some(())
    });
    let gateway = self::home(&[mosquitto.url()], more, SHIP).start();
    until_told(&gateway, "password: no such file");
}

/// mosquitto with TLS, whose certificate is made by `authority`.
fn with_tls(authority: &Authority, set: impl FnOnce(&mut CertificateParams)) -> Mosquitto {
    broker_with_tls(authority, "allow_anonymous true", set)
}

fn broker_with_tls(
    authority: &Authority,
    more: &str,
    set: impl FnOnce(&mut CertificateParams),
) -> Mosquitto {
    let config = format!("certfile {{folder}}/broker.crt\nkeyfile {{folder}}/broker.key\n{more}");
    Mosquitto::start(&config, |folder| {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(["localhost".to_owned()]).unwrap();
        set(&mut params);
        let certificate = authority.sign(params, &key);
        fs::write(folder.join("broker.crt"), certificate.pem()).unwrap();
        fs::write(folder.join("broker.key"), key.serialize_pem()).unwrap();
        fs::write(folder.join("ca.pem"), authority.pem()).unwrap();
        for file in ["broker.crt", "broker.key", "ca.pem", "."] {
            let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            fs::set_permissions(folder.join(file), permissions).unwrap();
        }
    })
}

fn home_with_tls(mosquitto: &Mosquitto, trusted: &Authority) -> Home {
    let url = format!("mqtts://localhost:{}", mosquitto.address().port());
    let home = home(&[url], "ca_file = 'ca.pem'", SHIP);
    fs::write(home.path().join("ca.pem"), trusted.pem()).unwrap();
    home
}

#[test]
fn with_tls_only_a_broker_is_trusted_that_the_authority_vouches_for() {
    let authority = Authority::new("brokers");
    let mosquitto = with_tls(&authority, |_| {});
    let gateway = home_with_tls(&mosquitto, &authority).start();
    publish(&gateway, ["x"]);
    eventually("the event", || {
        (gateway.status()["uplink"][0]["ship"][0]["events"] == 1).then_some(())
    });
    let gateway = home_with_tls(&mosquitto, &Authority::new("brokers")).start();
    until_told(&gateway, "invalid peer certificate");
    until_told(&gateway, "ca.pem");
    let expired = with_tls(&authority, |params| {
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2021, 1, 1);
    });
    let gateway = home_with_tls(&expired, &authority).start();
    until_told(&gateway, "certificate expired");
}

#[test]
fn a_certificate_stands_for_a_password_where_the_broker_wants_one() {
    let authority = Authority::new("devices");
    let config = "allow_anonymous false\nrequire_certificate true\nuse_identity_as_username true\ncafile {folder}/ca.pem";
    let mosquitto = broker_with_tls(&authority, config, |_| {});
    let url = format!("mqtts://localhost:{}", mosquitto.address().port());
    let start = |signed_by: Option<&Authority>| {
        let own = "certificate_file = 'press.crt'\nkey_file = 'press.key'";
        let own = signed_by.map_or("", |_| own);
        let home = home(
            std::slice::from_ref(&url),
            &format!("ca_file = 'ca.pem'\n{own}"),
            SHIP,
        );
        fs::write(home.path().join("ca.pem"), authority.pem()).unwrap();
        if let Some(signer) = signed_by {
            signer.issue(&home, "press", |_| {});
        }
        home.start()
    };
    let gateway = start(Some(&authority));
    publish(&gateway, ["x"]);
    eventually("the event", || {
        (gateway.status()["uplink"][0]["ship"][0]["events"] == 1).then_some(())
    });
    for wrong in [None, Some(&Authority::new("devices"))] {
        until_told(&start(wrong), "certificate_file, key_file");
    }
    fs::write(gateway.home().path().join("press.key"), "no key").unwrap();
    let gateway = gateway.kill().start();
    until_told(&gateway, "press.key: no private key");
}

#[test]
fn the_protocol_is_named_where_a_broker_shares_its_port() {
    let authority = Authority::new("brokers");
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(["localhost".to_owned()]).unwrap();
    let chain = vec![authority.sign(params, &key).der().clone()];
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, PrivatePkcs8KeyDer::from(key.serialize_der()).into())
        .unwrap();
    config.alpn_protocols = vec![b"x-amzn-mqtt-ca".to_vec()];
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = [format!(
        "mqtts://localhost:{}",
        listener.local_addr().unwrap().port()
    )];
    let (said, hears) = std::sync::mpsc::channel();
    // It ends with the tests.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let server = ServerConnection::new(config.clone()).unwrap();
            let mut stream = StreamOwned::new(server, stream.unwrap());
            let mut first = [0];
            if stream.read_exact(&mut first).is_ok() {
                let protocol = stream.conn.alpn_protocol().map(<[u8]>::to_vec);
                // The test may have heard enough.
                let _ = said.send((protocol, first[0]));
            }
        }
    });
    let start = |alpn: &str| {
        let home = home(&url, &format!("ca_file = 'ca.pem'\nalpn = {alpn:?}"), SHIP);
        fs::write(home.path().join("ca.pem"), authority.pem()).unwrap();
        home.start()
    };
    until_told(&start("mqtt"), "alpn of the link");
    let _gateway = start("x-amzn-mqtt-ca");
    let (protocol, first) = hears.recv_timeout(PATIENCE).unwrap();
    assert_eq!(protocol.as_deref(), Some(&b"x-amzn-mqtt-ca"[..]));
    assert_eq!(first, 0x10, "CONNECT");
}

#[test]
fn a_broker_that_only_knows_an_older_mqtt_is_told_from_one_that_is_down() {
    // CONNACK of MQTT 3.1.1: unacceptable protocol version.
    let old = OddBroker::that_greets_with(&[0x20, 2, 0, 1]);
    let gateway = home(&[old.url()], "", SHIP).start();
    until_told(&gateway, "does not speak mqtt 5.0");
    let mute = OddBroker::that_greets_with(&[]);
    let gateway = home(&[mute.url()], "", SHIP).start();
    until_told(&gateway, "may not know mqtt 5.0");
    let web = OddBroker::that_greets_with(b"HTTP/1.1 400 Bad Request\r\n\r\n");
    let gateway = home(&[web.url()], "", SHIP).start();
    until_told(&gateway, "no mqtt");
    let nobody = format!("mqtt://{}", broker::free_address());
    let gateway = home(&[nobody], "", SHIP).start();
    until_told(&gateway, "connection refused");
}

#[test]
fn where_the_first_server_is_down_the_next_one_is_taken() {
    let mosquitto = Mosquitto::open();
    let nobody = format!("mqtt://{}", broker::free_address());
    let gateway = home(&[nobody, mosquitto.url()], "", SHIP).start();
    publish(&gateway, ["x"]);
    eventually("the event", || {
        (gateway.status()["uplink"][0]["ship"][0]["events"] == 1).then_some(())
    });
}

#[test]
fn two_gateways_with_one_client_id_are_told_so() {
    // Headgate says why it hangs up, mosquitto does not.
    let cloud = Home::new().start();
    let mosquitto = Mosquitto::open();
    for url in [format!("mqtt://{}", cloud.mqtt()), mosquitto.url()] {
        let url = [url];
        let [first, second] = [home(&url, "", SHIP).start(), home(&url, "", SHIP).start()];
        until_told(&first, "headgate-press-hosted");
        until_told(&second, "headgate-press-hosted");
    }
}
