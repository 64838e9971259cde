//! The ways to a cache: TLS, proxies.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use headgate::ota::cache::{Caches, Settings};
use nix_derivation::StorePath;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use tempfile::TempDir;

use super::fetching::{assert_same, empty_root, settings, update};
use super::server::{Answer, Server};
use crate::nix::{Compressed, Nix};

fn site() -> (Nix, StorePath, TempDir) {
    let mut nix = Nix::new();
    let path = nix.zoo("zoo", &[]);
    let cache = nix.cache(&[&path], Compressed::Zstd);
    (nix, path, cache)
}

/// A server's configuration for localhost, and the authority to trust, as PEM.
fn authority() -> (ServerConfig, String) {
    let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let root = params.self_signed(&key).unwrap();
    let issuer = Issuer::new(params, key);
    let own = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["localhost".to_owned()])
        .unwrap()
        .signed_by(&own, &issuer)
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::try_from(own.serialize_der()).unwrap(),
        )
        .unwrap();
    (config, root.pem())
}

#[test]
fn https_is_taken_from_servers_that_the_ca_file_vouches_for() {
    let (nix, path, cache) = site();
    let (config, pem) = authority();
    let server = Server::tls(cache.path(), config, |_| Answer::Serve);
    let ca = tempfile::NamedTempFile::new().unwrap();
    fs::write(ca.path(), pem).unwrap();
    let trusting = Settings {
        ca_file: Some(ca.path().to_owned()),
        ..settings(&nix, &[&server.url()])
    };
    let root = empty_root();
    update(&Caches::new(trusting).unwrap(), root.path(), &path);
    assert_same(&nix, root.path(), &path);

    let wary = Settings {
        retries: 0,
        ..settings(&nix, &[&server.url()])
    };
    let url = format!("{}/release.json", server.url());
    let error = Caches::new(wary)
        .unwrap()
        .document(&url, 1)
        .unwrap_err()
        .to_string();
    assert!(error.contains("certificate"), "{error}");

    fs::write(ca.path(), "no certificate").unwrap();
    let empty = Settings {
        ca_file: Some(ca.path().to_owned()),
        ..settings(&nix, &[&server.url()])
    };
    assert!(
        Caches::new(empty)
            .err()
            .unwrap()
            .to_string()
            .contains("no certificate in it")
    );
}

#[test]
fn a_redirect_from_https_to_http_is_refused() {
    let (nix, _, cache) = site();
    let plain = Server::new(cache.path());
    let to = format!("{}/nix-cache-info", plain.url());
    let (config, pem) = authority();
    let server = Server::tls(cache.path(), config, move |_| Answer::Redirect(to.clone()));
    let ca = tempfile::NamedTempFile::new().unwrap();
    fs::write(ca.path(), pem).unwrap();
    let caches = Caches::new(Settings {
        ca_file: Some(ca.path().to_owned()),
        ..settings(&nix, &[&server.url()])
    })
    .unwrap();
    let url = format!("{}/nix-cache-info", server.url());
    let error = caches.document(&url, 1000).unwrap_err().to_string();
    assert!(error.contains("redirects from https to http://"), "{error}");
    assert!(plain.requests().is_empty());
}

/// A proxy that leads every tunnel to one server, whatever host was asked for, and remembers what that was.
fn proxy(to: String) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let asked = Arc::new(Mutex::new(Vec::new()));
    let remembered = asked.clone();
    thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            let mut reader = BufReader::new(client.try_clone().unwrap());
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            remembered.lock().unwrap().push(line.trim().to_owned());
            while line.trim() != "" {
                line.clear();
                reader.read_line(&mut line).unwrap();
            }
            let (mut up, mut down) = (client.try_clone().unwrap(), client);
            down.write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
            let mut server = TcpStream::connect(&to).unwrap();
            let mut back = server.try_clone().unwrap();
            thread::spawn(move || io::copy(&mut up, &mut server));
            thread::spawn(move || io::copy(&mut back, &mut down));
        }
    });
    (url, asked)
}

#[test]
fn a_proxy_is_asked_instead_of_the_cache() {
    let (nix, path, cache) = site();
    let server = Server::new(cache.path());
    let (url, asked) = proxy(server.url().replace("http://", ""));
    let caches = Caches::new(Settings {
        proxy: Some(url),
        ..settings(&nix, &["http://cache.invalid"])
    })
    .unwrap();
    let root = empty_root();
    update(&caches, root.path(), &path);
    assert_same(&nix, root.path(), &path);
    let asked = asked.lock().unwrap();
    assert!(!asked.is_empty());
    assert!(
        asked
            .iter()
            .all(|line| line.starts_with("CONNECT cache.invalid:80")),
        "{asked:?}"
    );
}
