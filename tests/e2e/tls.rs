//! MQTT over TLS, with mosquitto's clients and with peers that are none.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::gateway::{Gateway, Home, PATIENCE, finished};
use crate::mosquitto;

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
    let gateway = home().set("mqtt.connect_timeout_ms", 500).start();
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
