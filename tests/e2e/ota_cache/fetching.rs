//! What an update fetches is what Nix has put into the cache.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use headgate::ota::cache::{self, Caches, Plan, Progress, Settings};
use headgate::ota::store_dir::StoreDir;
use nix_derivation::StorePath;
use tempfile::TempDir;

use super::server::Server;
use crate::nix::{Compressed, Nix, dump, noise};

/// A gateway's root folder with an empty store.
pub fn empty_root() -> TempDir {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir_all(root.path().join("nix/store")).unwrap();
    root
}

pub fn caches(nix: &Nix, urls: &[&str]) -> Caches {
    Caches::new(settings(nix, urls)).unwrap()
}

pub fn settings(nix: &Nix, urls: &[&str]) -> Settings {
    Settings {
        urls: urls.iter().map(|url| (*url).to_owned()).collect(),
        trusted_keys: vec![nix.public.clone()],
        ..Settings::default()
    }
}

pub fn file_url(folder: &Path) -> String {
    format!("file://{}", folder.display())
}

/// Plans and installs, and returns the plan.
pub fn update(caches: &Caches, root: &Path, toplevel: &StorePath) -> Plan {
    let store = StoreDir::open(root).unwrap();
    let plan = cache::plan(caches, &store, toplevel).unwrap();
    cache::install(caches, &store, &plan, &Progress::default()).unwrap();
    plan
}

/// That a path is, bit for bit, what Nix has, in the form in which stores have it.
pub fn assert_same(nix: &Nix, root: &Path, path: &StorePath) {
    let place = StoreDir::open(root).unwrap().place_of(path);
    assert!(dump(&place) == dump(&nix.place_of(path)), "{path}");
    assert_canonical(&place);
}

fn assert_canonical(place: &Path) {
    let metadata = place.symlink_metadata().unwrap();
    assert_eq!(
        (metadata.mtime(), metadata.mtime_nsec()),
        (1, 0),
        "{place:?}"
    );
    if !metadata.is_symlink() {
        let mode = metadata.mode() & 0o7777;
        assert!(
            mode == 0o555 || (mode == 0o444 && metadata.is_file()),
            "{place:?}: {mode:o}"
        );
    }
    if metadata.is_dir() {
        for entry in fs::read_dir(place).unwrap() {
            assert_canonical(&entry.unwrap().path());
        }
    }
}

/// What is in a store, and that nothing else is.
pub fn stored(root: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(root.join("nix/store"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn every_path_of_a_closure_is_what_nix_has_however_it_is_compressed() {
    for compressed in [Compressed::Zstd, Compressed::Xz, Compressed::None] {
        let mut nix = Nix::new();
        let leaf = nix.file("leaf", &[], b"leaf");
        let zoo = nix.zoo("zoo", &[&leaf]);
        let other = nix.file("other", &[], b"not of the closure");
        let toplevel = nix.file("system", &[&zoo], zoo.to_string().as_bytes());
        let cache = nix.cache(&[&toplevel, &other], compressed);
        let root = empty_root();
        let plan = update(
            &caches(&nix, &[&file_url(cache.path())]),
            root.path(),
            &toplevel,
        );
        assert_eq!(plan.missing.len(), 3);
        for path in [&leaf, &zoo, &toplevel] {
            assert_same(&nix, root.path(), path);
        }
        assert_eq!(stored(root.path()).len(), 3);
    }
}

#[test]
fn only_what_is_missing_is_fetched_and_a_second_time_nothing() {
    let mut nix = Nix::new();
    let leaf = nix.file("leaf", &[], b"leaf");
    let old = nix.zoo("zoo", &[&leaf]);
    let first = nix.file("system-1", &[&old], b"1");
    let new = nix.file("new", &[&leaf], b"new");
    let second = nix.file("system-2", &[&old, &new], b"2");
    let cache = nix.cache(&[&first, &second], Compressed::Zstd);
    let server = Server::new(cache.path());
    let caches = caches(&nix, &[&server.url()]);
    let root = empty_root();

    assert_eq!(update(&caches, root.path(), &first).missing.len(), 3);
    assert_eq!((server.count(".narinfo"), server.nars().len()), (3, 3));

    assert_eq!(update(&caches, root.path(), &second).missing.len(), 2);
    assert_eq!((server.count(".narinfo"), server.nars().len()), (5, 5));
    assert_same(&nix, root.path(), &new);

    let asked = server.requests().len();
    assert!(update(&caches, root.path(), &second).missing.is_empty());
    assert_eq!(server.requests().len(), asked, "not even a question");
}

#[test]
fn one_package_of_500_costs_a_fiftieth_of_the_bytes_at_most() {
    let mut nix = Nix::new();
    let packages: Vec<StorePath> = (0..499)
        .map(|number| nix.file(&format!("package-{number}"), &[], &noise(20_000 + number)))
        .collect();
    let mut references: Vec<&StorePath> = packages.iter().collect();
    let text = |paths: &[&StorePath]| {
        paths
            .iter()
            .map(|path| format!("{path}\n"))
            .collect::<String>()
    };
    let first = nix.file("system-1", &references, text(&references).as_bytes());
    let changed = nix.file("package-250-changed", &[], &noise(30_000));
    references[250] = &changed;
    let second = nix.file("system-2", &references, text(&references).as_bytes());
    let cache = nix.cache(&[&first, &second], Compressed::Zstd);
    let server = Server::new(cache.path());
    let caches = caches(&nix, &[&server.url()]);
    let root = empty_root();

    assert_eq!(update(&caches, root.path(), &first).missing.len(), 500);
    let all = server.body_bytes();
    let plan = update(&caches, root.path(), &second);
    let more = server.body_bytes() - all;
    assert_eq!(plan.missing.len(), 2);
    assert_eq!(plan.closure.len(), 500);
    assert!(more * 50 <= all, "{more} of {all}");
}

#[test]
fn a_path_that_is_there_without_what_it_needs_is_completed() {
    let mut nix = Nix::new();
    let leaf = nix.file("leaf", &[], b"leaf");
    let middle = nix.file("middle", &[&leaf], leaf.to_string().as_bytes());
    let toplevel = nix.file("system", &[&middle], middle.to_string().as_bytes());
    let cache = nix.cache(&[&toplevel], Compressed::Zstd);
    let caches = caches(&nix, &[&file_url(cache.path())]);
    let root = empty_root();
    update(&caches, root.path(), &toplevel);
    let store = StoreDir::open(root.path()).unwrap();
    store.remove(std::slice::from_ref(&leaf)).unwrap();
    let plan = update(&caches, root.path(), &toplevel);
    assert_eq!(plan.missing.len(), 1);
    assert_same(&nix, root.path(), &leaf);

    // Nor if nobody has written down what it needs.
    fs::remove_dir_all(root.path().join("nix/var/headgate")).unwrap();
    store.remove(std::slice::from_ref(&leaf)).unwrap();
    assert_eq!(update(&caches, root.path(), &toplevel).missing.len(), 1);
    assert_eq!(
        store.references(&toplevel).unwrap(),
        std::slice::from_ref(&middle)
    );
    assert!(
        store.known(&middle).unwrap().is_some(),
        "now it is written down"
    );
}
