//! How a gateway says who it is to a server.

use std::path::Path;

use async_nats::ConnectOptions;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use nkeys::KeyPair;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa};

use super::*;
use crate::nats::{Link, Program, Servers};

/// Lets the test in, beside the user in question.
const TEST_USER: &str = "{ user: test, password: test }";

fn test_user() -> ConnectOptions {
    ConnectOptions::with_user_and_password("test".into(), "test".into())
}

/// The server lets a gateway in that has `right` in its file, and none that has `wrong`; that is told so.
fn assert_right_and_wrong(
    client: &Client,
    url: &str,
    link: &str,
    [right, wrong]: [&str; 2],
    told: &str,
) {
    client.create(&stream(1));
    let home = home(&[url.to_owned()], link, SHIP);
    let file = home.path().join("login");
    fs::write(&file, wrong).unwrap();
    let gateway = home.start();
    publish(&gateway, 0..100);
    until_told(&gateway, told);
    assert_eq!(client.messages(EVENTS), 0);
    // The file is read anew each time.
    fs::write(&file, right).unwrap();
    assert_eq!(assert_shipped(gateway.home(), client), 100);
}

/// The same of a server with this configuration.
fn assert_logs_in(config: &str, test: ConnectOptions, link: &str, files: [&str; 2]) {
    let servers = Servers::start(Program::New, 1, config);
    let client = servers.client_with(test);
    assert_right_and_wrong(
        &client,
        &servers.urls()[0],
        link,
        files,
        "refuses the login",
    );
}

#[test]
fn a_user_with_the_right_password_gets_in() {
    let config =
        format!("authorization {{ users: [ {TEST_USER}, {{ user: press, password: secret }} ] }}");
    let link = "user = 'press'\npassword_file = 'login'";
    assert_logs_in(&config, test_user(), link, ["secret\n", "guess\n"]);
}

#[test]
fn the_right_token_gets_in() {
    let (config, test) = (
        "authorization { token: secret }",
        ConnectOptions::with_token("secret".into()),
    );
    assert_logs_in(
        config,
        test,
        "token_file = 'login'",
        ["secret\n", "guess\n"],
    );
}

#[test]
fn the_right_nkey_gets_in() {
    let (right, wrong) = (KeyPair::new_user(), KeyPair::new_user());
    let config = format!(
        "authorization {{ users: [ {TEST_USER}, {{ nkey: {} }} ] }}",
        right.public_key()
    );
    let [right, wrong] = [right, wrong].map(|pair| pair.seed().unwrap());
    assert_logs_in(
        &config,
        test_user(),
        "nkey_file = 'login'",
        [&right, &wrong],
    );
}

/// What an issuer says about a subject: <https://docs.nats.io/running-a-nats-service/configuration/securing_nats/auth_intro/jwt>
fn jwt(issuer: &KeyPair, subject: &KeyPair, nats: Value) -> String {
    let encode = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let claims = json!({
        "jti": subject.public_key(), "iat": 1_767_225_600, "iss": issuer.public_key(), "name": "test",
        "sub": subject.public_key(), "nats": nats,
    });
    let text = format!(
        "{}.{}",
        encode(json!({ "typ": "JWT", "alg": "ed25519-nkey" })),
        encode(claims)
    );
    let signature = issuer.sign(text.as_bytes()).unwrap();
    format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature))
}

/// A `.creds` file of a new user of the account.
fn credentials(account: &KeyPair) -> String {
    let user = KeyPair::new_user();
    let nats = json!({
        "pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1, "type": "user", "version": 2,
    });
    format!(
        "-----BEGIN NATS USER JWT-----\n{}\n------END NATS USER JWT------\n\n\
         -----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n",
        jwt(account, &user, nats),
        user.seed().unwrap(),
    )
}

#[test]
fn credentials_of_the_right_account_get_in() {
    let (operator, account, stranger) = (
        KeyPair::new_operator(),
        KeyPair::new_account(),
        KeyPair::new_account(),
    );
    let operator_jwt = jwt(
        &operator,
        &operator,
        json!({ "type": "operator", "version": 2 }),
    );
    let of_account = |account: &KeyPair, storage: i64| {
        let limits = json!({
            "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true, "conn": -1,
            "leaf": -1, "mem_storage": storage, "disk_storage": storage, "streams": -1, "consumer": -1,
        });
        jwt(
            &operator,
            account,
            json!({ "limits": limits, "type": "account", "version": 2 }),
        )
    };
    let account_jwt = of_account(&account, -1);
    // The server's own, which can't have streams.
    let system = KeyPair::new_account();
    let system_jwt = of_account(&system, 0);
    let config = format!(
        "operator: {operator_jwt}\nsystem_account: {}\nresolver: MEMORY\n\
         resolver_preload: {{ {}: {account_jwt}, {}: {system_jwt} }}",
        system.public_key(),
        account.public_key(),
        system.public_key(),
    );
    let test = ConnectOptions::with_credentials(&credentials(&account)).unwrap();
    let files = [credentials(&account), credentials(&stranger)];
    assert_logs_in(
        &config,
        test,
        "credentials_file = 'login'",
        [&files[0], &files[1]],
    );
}

/// The certificate of a new authority, and two of its own with their keys: for a server that is called localhost and
/// for a client.
fn make_certificates(folder: &Path) -> String {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority =
        CertifiedIssuer::self_signed(params, rcgen::KeyPair::generate().unwrap()).unwrap();
    for name in ["server", "client"] {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &authority).unwrap();
        fs::write(folder.join(format!("{name}.crt")), certificate.pem()).unwrap();
        fs::write(folder.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    }
    fs::write(folder.join("ca.crt"), authority.pem()).unwrap();
    authority.pem()
}

/// A server that wants TLS, and a certificate of its clients.
fn with_tls(folder: &Path) -> Servers {
    let file = |name: &str| folder.join(name);
    let config = format!(
        "tls {{ cert_file: {:?}, key_file: {:?}, ca_file: {:?}, verify: true }}",
        file("server.crt"),
        file("server.key"),
        file("ca.crt"),
    );
    Servers::start(Program::New, 1, &config)
}

/// There the server has the name that is in its certificate.
fn way_to(servers: &Servers) -> (Link, String) {
    let way = Link::new("127.0.0.1:0".parse().unwrap(), servers.addresses());
    let url = format!("tls://localhost:{}", way.address().port());
    (way, url)
}

#[test]
fn over_tls_gateway_and_server_check_each_other() {
    let (folder, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (right, wrong) = (
        make_certificates(folder.path()),
        make_certificates(elsewhere.path()),
    );
    let servers = with_tls(folder.path());
    let file = |name: &str| folder.path().join(name);
    let [ca, certificate, key] = ["ca.crt", "client.crt", "client.key"].map(file);
    let (_way, url) = way_to(&servers);
    let test = ConnectOptions::new()
        .add_root_certificates(ca)
        .add_client_certificate(certificate.clone(), key.clone());
    let client = Client::connect(std::slice::from_ref(&url), test);
    let link = format!("ca_file = 'login'\ncertificate_file = {certificate:?}\nkey_file = {key:?}");
    assert_right_and_wrong(&client, &url, &link, [&right, &wrong], "certificate");
}

#[test]
fn over_tls_a_way_that_stalls_with_much_to_be_sent_is_left_for_another_one() {
    let folder = tempfile::tempdir().unwrap();
    make_certificates(folder.path());
    let servers = with_tls(folder.path());
    let [ca, certificate, key] =
        ["ca.crt", "client.crt", "client.key"].map(|name| folder.path().join(name));
    let [(mut first, first_url), (mut second, second_url)] = [way_to(&servers), way_to(&servers)];
    second.cut();
    let login = format!("ca_file = {ca:?}\ncertificate_file = {certificate:?}\nkey_file = {key:?}");
    let gateway = home(
        &[first_url, second_url],
        &format!("{login}\nmax_inflight_bytes = 268435456\ntimeout_ms = 3000"),
        "[[link.ship]]\ntopics = ['plant/#']\nstream = 'PLANT'\ncreate = { replicas = 1 }",
    )
    .start();
    let events = |count: usize| {
        publish(&gateway, std::iter::repeat_n("x".repeat(100_000), count));
    };
    let until_shipped = |count: usize| {
        eventually("all shipped", || {
            (gateway.status()["uplink"][0]["ship"][0]["events"] == count).then_some(())
        });
    };
    // More and more may be on its way as long as all goes well.
    events(300);
    until_shipped(300);
    first.stall();
    second.heal();
    // More than the buffers in between take.
    events(700);
    until_shipped(1000);
}
