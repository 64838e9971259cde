//! Who may connect, and who may do what: as devices and those who operate a gateway meet it.

use std::io::Write;
use std::process::{Output, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::hmac;
use serde_json::{Value, json};

use crate::gateway::{Gateway, Home, PATIENCE, finished};
use crate::mosquitto;
use crate::wire::{CONNACK, DISCONNECT, Packet, Wire, connect_packet_with, packet, string};

const CLEAN: u8 = 0x02;
const PASSWORD: u8 = 0x40;
const USER: u8 = 0x80;

/// CONNACK: user name or password is wrong, not authorized, and wait; in MQTT 5 and in 3.1.1.
const BAD_LOGIN: (u8, u8) = (0x86, 4);
const NOT_AUTHORIZED: (u8, u8) = (0x87, 5);
const TOO_OFTEN: (u8, u8) = (0x9f, 3);

pub const SECRET: &str = "0123456789abcdef0123456789abcdef";

fn home() -> Home {
    Home::new()
        .set("mqtt.auth.anonymous", "never")
        .set("mqtt.auth.password_file", "passwords")
        .set("mqtt.auth.max_failures_per_minute", 0)
}

fn write(home: &Home, name: &str, text: &str) {
    std::fs::write(home.path().join(name), text).unwrap();
}

/// `headgate user add NAME …`, with the password on standard input.
fn add_user(home: &Home, args: &[&str], password: &str) -> Output {
    let args = [&["user", "add", "--password-stdin"], args].concat();
    let mut child = home
        .command(&args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // It may refuse the name before it reads.
    let _ = writeln!(stdin, "{password}");
    drop(stdin);
    finished(child, PATIENCE)
}

fn must_add_user(home: &Home, args: &[&str], password: &str) {
    let output = add_user(home, args, password);
    assert!(output.status.success(), "{output:?}");
}

fn connect(level: u8, id: &str, login: Option<(&str, &str)>) -> Vec<u8> {
    let (flags, rest) = match login {
        // In 3.1.1 a password needs a user name, if only an empty one.
        Some(("", password)) if level == 5 => (PASSWORD, string(password)),
        Some((user, "")) => (USER, string(user)),
        Some((user, password)) => (USER | PASSWORD, [string(user), string(password)].concat()),
        None => (0, Vec::new()),
    };
    connect_packet_with(level, id, 0, flags | CLEAN, &rest)
}

/// The code of the CONNACK.
fn code(gateway: &Gateway, level: u8, login: Option<(&str, &str)>) -> u8 {
    let mut wire = Wire::open(gateway);
    wire.send(&connect(level, "", login));
    let packet = wire.next();
    assert_eq!(packet.kind(), CONNACK, "{packet:?}");
    packet.body[1]
}

/// The codes of the CONNACKs in MQTT 5 and 3.1.1.
fn codes(gateway: &Gateway, login: Option<(&str, &str)>) -> (u8, u8) {
    (code(gateway, 5, login), code(gateway, 4, login))
}

pub fn logged_in(gateway: &Gateway, id: &str, login: (&str, &str)) -> Wire {
    let mut wire = Wire::open(gateway);
    wire.send(&connect(5, id, Some(login)));
    wire.accepted();
    wire
}

/// A SUBSCRIBE of MQTT 5 for one filter; the reason code that answers it.
fn subscribe(wire: &mut Wire, filter: &str) -> u8 {
    let body = [&[0, 1, 0][..], &string(filter), &[1]].concat();
    wire.send(&packet(0x82, &body));
    *wire.next().body.last().unwrap()
}

/// A PUBLISH of MQTT 5 at QoS 1; the reason code of its PUBACK.
fn publish(wire: &mut Wire, topic: &str, payload: &str) -> u8 {
    let body = [&string(topic)[..], &[0, 7, 0], payload.as_bytes()].concat();
    wire.send(&packet(0x32, &body));
    let ack = wire.next();
    ack.body.get(2).copied().unwrap_or(0)
}

/// Topic of the next message, which has QoS 1.
fn next_topic(wire: &mut Wire) -> String {
    wire.next_message().topic().to_owned()
}

fn assert_logged_out(packet: Packet) {
    assert_eq!(
        (packet.kind(), packet.body[0]),
        (DISCONNECT, 0x87),
        "{packet:?}"
    );
}

pub fn now_s() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    now.as_secs()
}

fn token(header: Value, claims: Value, secret: &[u8]) -> String {
    let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let message = format!("{}.{}", part(header), part(claims));
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
    let sign = hmac::sign(&key, message.as_bytes());
    format!("{message}.{}", URL_SAFE_NO_PAD.encode(sign))
}

pub fn hs256(claims: Value) -> String {
    token(json!({ "alg": "HS256" }), claims, SECRET.as_bytes())
}

#[test]
fn only_who_knows_a_password_gets_in() {
    let home = home();
    must_add_user(&home, &["anna", "--groups", "night,operators"], "größer");
    must_add_user(&home, &["otto"], "o");
    let gateway = home.start();
    assert_eq!(codes(&gateway, Some(("anna", "größer"))), (0, 0));
    for wrong in [
        ("anna", "o"),
        ("anna", ""),
        ("uwe", "o"),
        ("", "o"),
        ("Anna", "größer"),
    ] {
        assert_eq!(codes(&gateway, Some(wrong)), BAD_LOGIN, "{wrong:?}");
    }
    assert_eq!(codes(&gateway, None), NOT_AUTHORIZED);
    mosquitto::publish(&gateway, &["-u", "otto", "-P", "o", "-t", "a", "-m", "x"]);

    let (_, metrics) = gateway.http("/metrics");
    for line in [
        "headgate_mqtt_failed_logins_total{reason=\"anonymous\"} 2",
        "headgate_mqtt_failed_logins_total{reason=\"wrong_password\"} 4",
        "headgate_mqtt_failed_logins_total{reason=\"unknown_user\"} 6",
    ] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
    gateway.until_logged("wrong password for user \"anna\"");
    assert!(!gateway.log().contains("größer"));

    let users = gateway.json(&["user", "list"]);
    assert_eq!(
        users,
        json!([
            { "name": "anna", "groups": ["night", "operators"] },
            { "name": "otto", "groups": [] },
        ])
    );
}

#[test]
fn users_come_and_go_while_the_gateway_runs() {
    let home = home();
    must_add_user(&home, &["anna"], "a");
    must_add_user(&home, &["otto"], "o");
    let gateway = home.start();
    let mut anna = logged_in(&gateway, "1", ("anna", "a"));
    let mut otto = logged_in(&gateway, "2", ("otto", "o"));

    must_add_user(&home, &["uwe"], "u");
    assert_eq!(code(&gateway, 5, Some(("uwe", "u"))), 0);
    must_add_user(&home, &["otto"], "new");
    assert_logged_out(otto.next());
    assert_eq!(code(&gateway, 5, Some(("otto", "o"))), BAD_LOGIN.0);
    assert_eq!(code(&gateway, 5, Some(("otto", "new"))), 0);
    anna.assert_quiet();

    let output = gateway.cli(&["user", "remove", "anna"]);
    assert!(output.status.success(), "{output:?}");
    assert_logged_out(anna.next());
    let error = gateway.cli_error(&["user", "remove", "anna"]);
    assert!(error.contains("no user \"anna\""), "{error}");
}

#[test]
fn odd_names_and_passwords_are_refused_before_anything_is_written() {
    let home = home();
    for (name, password, part) in [
        ("a:b", "x", "colon"),
        ("", "x", "empty"),
        ("@anonymous", "x", "begins with"),
        ("anna", "", "the password is empty"),
    ] {
        let output = add_user(&home, &[name], password);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(error.contains(part), "{error}");
    }
    assert!(!home.path().join("passwords").exists());
    let output = add_user(&Home::new(), &["anna"], "x");
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("set mqtt.auth.password_file"), "{error}");
}

#[test]
fn a_wrong_file_is_named_at_the_start_and_changes_nothing_later() {
    let home = home().set("mqtt.auth.acl_file", "acl.toml");
    must_add_user(&home, &["anna"], "a");
    write(
        &home,
        "acl.toml",
        "[[rule]]\nallow = [\"publish\"]\ntopics = [\"a/#/b\"]",
    );
    let error = home.refusal();
    assert!(
        error.contains("mqtt.auth.acl_file: ") && error.contains("acl.toml:3: "),
        "{error}"
    );

    write(
        &home,
        "acl.toml",
        "[[rule]]\nallow = [\"publish\"]\ntopics = [\"a\"]",
    );
    let gateway = home.start();
    let mut anna = logged_in(&gateway, "1", ("anna", "a"));
    write(&home, "passwords", "");
    write(&home, "acl.toml", "[[rules]]");
    let error = gateway.cli_error(&["reload"]);
    assert!(error.contains("acl.toml:1: "), "{error}");
    gateway.signal(libc::SIGHUP);
    gateway.until_logged("nothing was reloaded");
    assert_eq!(publish(&mut anna, "a", "x"), 0);
    assert_eq!(publish(&mut anna, "b", "x"), 0x87);

    write(
        &home,
        "acl.toml",
        "[[rule]]\nallow = [\"publish\"]\ntopics = [\"b\"]",
    );
    gateway.signal(libc::SIGHUP);
    assert_logged_out(anna.next());
}

#[test]
fn rules_decide_on_what_is_published_and_received() {
    let home = home().set("mqtt.auth.acl_file", "acl.toml");
    must_add_user(&home, &["press", "--groups", "machines"], "p");
    must_add_user(&home, &["olga"], "o");
    let rules = r##"
        [groups]
        operators = ["olga"]

        [[rule]]
        groups = ["machines"]
        allow = ["publish"]
        topics = ["plant/%u/#", "secret/%u"]

        [[rule]]
        groups = ["operators"]
        allow = ["subscribe"]
        topics = ["#"]

        [[rule]]
        users = ["olga"]
        deny = ["subscribe"]
        topics = ["secret/#"]

        [[rule]]
        allow = ["publish"]
        topics = ["client/%c/x"]
    "##;
    write(&home, "acl.toml", rules);
    let gateway = home.start();
    let mut press = logged_in(&gateway, "press-1", ("press", "p"));
    let mut olga = logged_in(&gateway, "olga-1", ("olga", "o"));
    assert_eq!(subscribe(&mut olga, "secret/press"), 0x80);
    assert_eq!(subscribe(&mut olga, "secret/+"), 0x80);
    assert_eq!(subscribe(&mut olga, "$share/g/secret/#"), 0x80);
    assert_eq!(subscribe(&mut olga, "#"), 1);
    assert_eq!(subscribe(&mut press, "#"), 0x80);

    assert_eq!(publish(&mut press, "secret/press", "hidden"), 0);
    assert_eq!(publish(&mut press, "plant/other/t", "no"), 0x87);
    assert_eq!(publish(&mut press, "plant/press/t", "seen"), 0);
    assert_eq!(next_topic(&mut olga), "plant/press/t");
    assert_eq!(publish(&mut olga, "plant/press/t", "no"), 0x87);
    assert_eq!(publish(&mut olga, "client/olga-1/x", "mine"), 0);
    assert_eq!(next_topic(&mut olga), "client/olga-1/x");

    for id in ["+", "#", "press-1/y", "$x"] {
        let mut odd = logged_in(&gateway, id, ("press", "p"));
        for topic in ["client/press-1/x", "client/press-1/y/x"] {
            assert_eq!(publish(&mut odd, topic, "no"), 0x87, "{id} {topic}");
        }
    }
    olga.assert_quiet();

    // From now on the same clients may do something else.
    write(&home, "acl.toml", &rules.replace("secret/#", "plant/#"));
    assert!(gateway.cli(&["reload"]).status.success());
    assert_eq!(publish(&mut press, "plant/press/t", "hidden"), 0);
    assert_eq!(publish(&mut press, "secret/press", "seen"), 0);
    assert_eq!(next_topic(&mut olga), "secret/press");
    olga.assert_quiet();
}

#[test]
fn a_token_lets_in_until_it_ends() {
    let home = home().set("mqtt.auth.jwt_key", "secret");
    write(&home, "secret", SECRET);
    must_add_user(&home, &["anna"], "a");
    let gateway = home.start();
    let later = now_s() + 1000;
    let good = hs256(json!({ "sub": "press", "exp": later }));
    assert_eq!(codes(&gateway, Some(("press", &good))), (0, 0));
    assert_eq!(codes(&gateway, Some(("", &good))).0, 0);
    assert_eq!(codes(&gateway, Some(("anna", "a"))), (0, 0));
    let claims = json!({ "sub": "press", "exp": later });
    for (why, bad) in [
        (
            "expired",
            hs256(json!({ "sub": "press", "exp": now_s() - 100 })),
        ),
        (
            "not yet",
            hs256(json!({ "sub": "press", "exp": later, "nbf": later })),
        ),
        ("no end", hs256(json!({ "sub": "press" }))),
        (
            "other key",
            token(json!({ "alg": "HS256" }), claims.clone(), &[b'x'; 32]),
        ),
        (
            "none",
            token(json!({ "alg": "none" }), claims.clone(), SECRET.as_bytes()),
        ),
        (
            "other algorithm",
            token(json!({ "alg": "RS256" }), claims, SECRET.as_bytes()),
        ),
    ] {
        assert_eq!(codes(&gateway, Some(("press", &bad))), BAD_LOGIN, "{why}");
    }
    assert_eq!(
        codes(&gateway, Some(("anna", &good))),
        BAD_LOGIN,
        "somebody else's"
    );

    // Tokens count for half a minute longer than they say.
    let ending = hs256(json!({ "sub": "press", "exp": now_s() - 28 }));
    let mut press = logged_in(&gateway, "1", ("press", &ending));
    assert_logged_out(press.next());

    let mut press = logged_in(&gateway, "2", ("press", &good));
    write(&home, "secret", &"y".repeat(40));
    assert!(gateway.cli(&["reload"]).status.success());
    assert_logged_out(press.next());
}

#[test]
fn a_public_key_is_not_taken_for_a_secret() {
    let home = home().set("mqtt.auth.jwt_key", "key.pem");
    let pem = rcgen::KeyPair::generate().unwrap().public_key_pem();
    write(&home, "key.pem", &pem);
    write(&home, "passwords", "");
    let gateway = home.start();
    let claims = json!({ "sub": "press", "exp": now_s() + 1000 });
    let confused = token(json!({ "alg": "HS256" }), claims, pem.as_bytes());
    assert_eq!(codes(&gateway, Some(("press", &confused))), BAD_LOGIN);
    gateway.until_logged("no key in the file of mqtt.auth.jwt_key is for algorithm");
}

#[test]
fn who_fails_too_often_has_to_wait_and_known_users_do_not() {
    let home = home().set("mqtt.auth.max_failures_per_minute", 3);
    must_add_user(&home, &["anna"], "a");
    must_add_user(&home, &["otto"], "o");
    let gateway = home.start();
    assert_eq!(code(&gateway, 5, Some(("anna", "a"))), 0);
    let wrong = || code(&gateway, 5, Some(("otto", "wrong")));
    assert_eq!([wrong(), wrong(), wrong()], [BAD_LOGIN.0; 3]);
    assert_eq!(codes(&gateway, Some(("otto", "wrong"))), TOO_OFTEN);
    assert_eq!(
        codes(&gateway, Some(("otto", "o"))),
        TOO_OFTEN,
        "nothing is given away"
    );
    assert_eq!(codes(&gateway, Some(("anna", "a"))), (0, 0));
}

#[test]
fn a_session_is_not_handed_to_another_user() {
    let home = home();
    must_add_user(&home, &["anna"], "a");
    must_add_user(&home, &["otto"], "o");
    let gateway = home.start();
    let kept = |user: &str, password: &str| {
        let rest = [string(user), string(password)].concat();
        let mut wire = Wire::open(&gateway);
        wire.send(&connect_packet_with(4, "same", 0, USER | PASSWORD, &rest));
        let packet = wire.next();
        assert_eq!(packet.kind(), CONNACK);
        (wire, packet.body)
    };
    let (mut anna, _) = kept("anna", "a");
    anna.subscribe("t", 1);
    anna.close();
    assert_eq!(kept("anna", "a").1, [1, 0], "her own");
    assert_eq!(kept("otto", "o").1, [0, 2], "somebody else's");
    assert_eq!(kept("anna", "a").1, [1, 0], "still hers");
}

#[test]
fn many_logins_at_once_are_all_served() {
    let home = home();
    must_add_user(&home, &["anna"], "a");
    let gateway = home.set("mqtt.connect_timeout_ms", 60_000).start();
    let mut wires: Vec<_> = (0..50)
        .map(|number| {
            let mut wire = Wire::open(&gateway);
            wire.send(&connect(5, &format!("c{number}"), Some(("anna", "a"))));
            wire
        })
        .collect();
    for wire in &mut wires {
        wire.accepted();
    }
}

#[test]
fn without_a_login_only_this_machine_gets_in_unless_the_configuration_says_more() {
    let gateway = Home::new().start();
    assert_eq!(codes(&gateway, None), (0, 0));
    assert_eq!(codes(&gateway, Some(("whoever", "whatever"))), (0, 0));
}

#[test]
fn a_client_id_with_a_session_is_its_users_until_it_is_forgotten() {
    let home = home();
    must_add_user(&home, &["press"], "p");
    must_add_user(&home, &["otto"], "o");
    let gateway = home.start();
    let id_code = |level, login| {
        let mut wire = Wire::open(&gateway);
        wire.send(&connect(level, "mine", Some(login)));
        wire.next().body[1]
    };
    let mut press = logged_in(&gateway, "mine", ("press", "p"));
    assert_eq!(id_code(5, ("otto", "o")), 0x85);
    assert_eq!(id_code(4, ("otto", "o")), 2);
    gateway.until_logged("in use by another user");
    assert_eq!(publish(&mut press, "a", "still here"), 0);
    press.close();
    gateway.until_status("clients", |s| s["broker"]["connected"].as_u64(), Some(0));
    assert_eq!(id_code(5, ("otto", "o")), 0);
    gateway.until_status("clients", |s| s["broker"]["connected"].as_u64(), Some(0));

    let rest = [string("press"), string("p")].concat();
    let mut kept = Wire::open(&gateway);
    kept.send(&connect_packet_with(4, "mine", 0, USER | PASSWORD, &rest));
    kept.accepted();
    kept.close();
    gateway.until_status("sessions", |s| s["broker"]["parked"].as_u64(), Some(1));
    assert_eq!(id_code(5, ("otto", "o")), 0x85);
    gateway.json(&["client", "forget", "mine"]);
    let error = gateway.cli_error(&["client", "forget", "mine"]);
    assert!(error.contains("no client \"mine\""), "{error}");
    assert_eq!(id_code(5, ("otto", "o")), 0);
}

#[test]
fn who_is_forgotten_while_connected_has_no_session_afterwards() {
    let home = home();
    must_add_user(&home, &["press"], "p");
    let gateway = home.start();
    let rest = [string("press"), string("p")].concat();
    let mut kept = Wire::open(&gateway);
    kept.send(&connect_packet_with(4, "mine", 0, USER | PASSWORD, &rest));
    kept.accepted();
    gateway.json(&["client", "forget", "mine"]);
    assert_eq!(kept.until_closed(), []);
    // At once, and for good.
    let gateway = gateway.kill().start();
    assert_eq!(gateway.status()["broker"]["parked"], 0);
}

#[test]
fn the_session_of_a_user_who_is_no_more_keeps_nobody_out() {
    let home = home();
    must_add_user(&home, &["press"], "p");
    must_add_user(&home, &["otto"], "o");
    let gateway = home.start();
    let rest = [string("press"), string("p")].concat();
    let mut kept = Wire::open(&gateway);
    kept.send(&connect_packet_with(4, "mine", 0, USER | PASSWORD, &rest));
    kept.accepted();
    kept.close();
    gateway.until_status("sessions", |s| s["broker"]["parked"].as_u64(), Some(1));
    let removed = finished(
        home.command(&["user", "remove", "press"]).spawn().unwrap(),
        PATIENCE,
    );
    assert!(removed.status.success(), "{removed:?}");
    gateway.cli(&["reload"]);
    let mut wire = Wire::open(&gateway);
    wire.send(&connect(5, "mine", Some(("otto", "o"))));
    wire.accepted();
}
