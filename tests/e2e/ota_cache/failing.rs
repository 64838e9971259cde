//! Servers and connections that fail: what is fetched is right all the same, or there is one clear error.

use std::fs;
use std::num::NonZeroU64;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use headgate::ota::cache::{self, CacheError, Caches, Fault, Progress, Settings};
use headgate::ota::store_dir::StoreDir;
use nix_derivation::StorePath;
use tempfile::TempDir;

use super::fetching::{assert_same, empty_root, file_url, settings, stored, update};
use super::server::{Answer, Request, Server};
use crate::nix::{Compressed, Nix, noise};

const SIZE: usize = 6_000_000;

/// A cache with one path of 6 MB.
struct Site {
    nix: Nix,
    path: StorePath,
    cache: TempDir,
}

fn site() -> Site {
    let mut nix = Nix::new();
    let path = nix.file("large", &[], &noise(SIZE));
    let cache = nix.cache(&[&path], Compressed::Zstd);
    Site { nix, path, cache }
}

fn is_nar(request: &Request) -> bool {
    request.path.starts_with("/nar/")
}

fn patient(site: &Site, urls: &[&str]) -> Settings {
    Settings {
        retries: 2,
        stall: Duration::from_millis(400),
        ..settings(&site.nix, urls)
    }
}

/// Plans and installs, where one of both fails.
fn failure(settings: Settings, root: &Path, path: &StorePath) -> CacheError {
    let caches = Caches::new(settings).unwrap();
    let store = StoreDir::open(root).unwrap();
    let outcome = cache::plan(&caches, &store, path)
        .and_then(|plan| cache::install(&caches, &store, &plan, &Progress::default()));
    assert_eq!(stored(root), [""; 0], "nothing is left of what failed");
    outcome.unwrap_err()
}

fn assert_fetched(site: &Site, server: &Server) {
    let root = empty_root();
    let caches = Caches::new(patient(site, &[&server.url()])).unwrap();
    update(&caches, root.path(), &site.path);
    assert_same(&site.nix, root.path(), &site.path);
}

#[test]
fn a_connection_that_breaks_goes_on_where_it_was() {
    for broken in [
        Answer::Reset(4_000_000),
        Answer::Cut(4_000_000),
        Answer::Stall(4_000_000),
    ] {
        let site = site();
        let is_reset = matches!(broken, Answer::Reset(_));
        let server = Server::with(site.cache.path(), move |request| {
            if is_nar(request) && request.from.is_none() {
                broken.clone()
            } else {
                Answer::Serve
            }
        });
        assert_fetched(&site, &server);
        let nars = server.nars();
        assert_eq!(nars.len(), 2, "{nars:?}");
        // A reset throws away what was sent and not yet read, and how much that is depends on who was faster.
        let least = if is_reset { 1 } else { 1_000_000 };
        assert!(nars[1].from.is_some_and(|from| from >= least), "{nars:?}");
        assert!(is_reset || server.body_bytes() < (SIZE + SIZE / 2) as u64);
    }
}

#[test]
fn a_server_that_knows_no_ranges_is_read_from_the_start_again() {
    let site = site();
    let server = Server::with(site.cache.path(), |request| {
        match (is_nar(request), request.before) {
            (true, 0) => Answer::Cut(3_000_000),
            (true, _) => Answer::Whole,
            _ => Answer::Serve,
        }
    });
    assert_fetched(&site, &server);
}

#[test]
fn errors_of_a_server_that_pass_are_waited_for() {
    let site = site();
    let server = Server::with(site.cache.path(), |request| match request.before {
        0 => Answer::Status(500),
        1 => Answer::Status(503),
        _ => Answer::Serve,
    });
    assert_fetched(&site, &server);
}

#[test]
fn bytes_of_two_different_files_are_fetched_once_more_from_the_start() {
    let site = site();
    let other = site.cache.path().join("other");
    fs::write(&other, noise(SIZE * 2)).unwrap();
    let server = Server::with(site.cache.path(), |request| {
        match (is_nar(request), request.before) {
            (true, 0) => Answer::Cut(3_000_000),
            // As long as the first one, so that only its hash tells.
            (true, 1) => Answer::Other("nar/../forged".to_owned()),
            _ => Answer::Serve,
        }
    });
    let nar = fs::read_dir(site.cache.path().join("nar"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let length = fs::metadata(nar).unwrap().len() as usize;
    fs::write(site.cache.path().join("forged"), noise(length)).unwrap();
    assert_fetched(&site, &server);
    assert_eq!(server.nars().len(), 3);
    assert_eq!(server.nars()[2].from, None);
}

/// What a first cache does wrong, and what the error about it says.
fn wrongs() -> Vec<(&'static str, Answer, &'static str)> {
    vec![
        ("resets", Answer::Reset(10), "the connection failed"),
        (
            "stalls",
            Answer::Stall(10),
            "hardly a byte came within 0.4 s",
        ),
        ("ends early", Answer::Cut(10), "the connection failed"),
        ("is broken", Answer::Status(500), "status 500"),
        ("forbids", Answer::Status(401), "status 401"),
        (
            "has not got it",
            Answer::Status(404),
            "no such file (status 404)",
        ),
        (
            "serves another file",
            Answer::Body(noise(5000)),
            "instead of",
        ),
        ("says it is longer", Answer::Longer(10), "instead of"),
        (
            "compresses once more",
            Answer::Encoded("gzip"),
            "encoded as \"gzip\"",
        ),
        (
            "redirects to nonsense",
            Answer::Redirect("gopher://x".to_owned()),
            "it redirects to",
        ),
    ]
}

#[test]
fn what_one_cache_does_wrong_the_next_one_makes_good() {
    let site = site();
    for (what, answer, _) in wrongs() {
        let bad = Server::with(site.cache.path(), move |request| {
            if is_nar(request) {
                answer.clone()
            } else {
                Answer::Serve
            }
        });
        let good = Server::new(site.cache.path());
        let root = empty_root();
        let caches = Caches::new(patient(&site, &[&bad.url(), &good.url()])).unwrap();
        update(&caches, root.path(), &site.path);
        assert_same(&site.nix, root.path(), &site.path);
        assert_eq!(good.nars().len(), 1, "{what}");
        assert_eq!(
            good.count(".narinfo"),
            1,
            "{what}: only for the path whose NAR failed"
        );
    }
}

#[test]
fn without_another_cache_the_error_names_the_file_and_what_is_wrong_with_it() {
    let site = site();
    for (what, answer, said) in wrongs() {
        let bad = Server::with(site.cache.path(), move |request| {
            if is_nar(request) {
                answer.clone()
            } else {
                Answer::Serve
            }
        });
        let root = empty_root();
        let error = failure(patient(&site, &[&bad.url()]), root.path(), &site.path).to_string();
        assert!(
            error.contains(&format!("{}/nar/", bad.url())),
            "{what}: {error}"
        );
        assert!(
            error.contains(&site.path.to_string()) && error.contains(said),
            "{what}: {error}"
        );
        assert!(bad.nars().len() <= 3, "{what}: a bounded number of tries");
    }
}

#[test]
fn a_range_that_begins_elsewhere_is_refused() {
    let site = site();
    let server = Server::with(site.cache.path(), |request| {
        match (is_nar(request), request.from) {
            (true, None) => Answer::Cut(3_000_000),
            (true, Some(_)) => Answer::WrongRange,
            _ => Answer::Serve,
        }
    });
    let root = empty_root();
    let error = failure(patient(&site, &[&server.url()]), root.path(), &site.path).to_string();
    assert!(
        error.contains("answered a request for the bytes from"),
        "{error}"
    );
}

#[test]
fn redirects_are_followed_but_not_for_ever() {
    let site = site();
    let target = Server::new(site.cache.path());
    let url = target.url();
    let server = Server::with(site.cache.path(), move |request| {
        Answer::Redirect(format!("{url}{}", request.path))
    });
    assert_fetched(&site, &server);
    assert!(target.count(".narinfo") == 1 && target.nars().len() == 1);

    let server = Server::with(site.cache.path(), |request| {
        Answer::Redirect(request.path.clone())
    });
    let root = empty_root();
    let error = failure(patient(&site, &[&server.url()]), root.path(), &site.path).to_string();
    assert!(error.contains("redirects more than 10 times"), "{error}");
}

#[test]
fn the_errors_of_all_caches_are_told() {
    let site = site();
    let empty = tempfile::tempdir().unwrap();
    let missing = Server::with(site.cache.path(), |request| {
        if request.path.ends_with(".narinfo") {
            Answer::Status(404)
        } else {
            Answer::Serve
        }
    });
    let urls = [file_url(empty.path()), missing.url()];
    let root = empty_root();
    let error = failure(
        patient(&site, &[&urls[0], &urls[1]]),
        root.path(),
        &site.path,
    )
    .to_string();
    for said in [
        format!("no cache gives {}", site.path),
        format!("{}/nix-cache-info: it is no Nix binary cache", urls[0]),
        format!("{}/", urls[1]),
        "status 404".to_owned(),
    ] {
        assert!(error.contains(&said), "{said} in: {error}");
    }
}

#[test]
fn a_cache_that_is_out_of_reach_is_not_asked_for_each_path() {
    let mut nix = Nix::new();
    let paths: Vec<StorePath> = (0..40)
        .map(|i| nix.file(&format!("p{i}"), &[], b"x"))
        .collect();
    let toplevel = nix.file("system", &paths.iter().collect::<Vec<_>>(), b"");
    let cache = nix.cache(&[&toplevel], Compressed::None);
    let dead = Server::with(cache.path(), |request| {
        if request.path.ends_with("nix-cache-info") {
            Answer::Serve
        } else {
            Answer::Status(503)
        }
    });
    let settings = Settings {
        retries: 1,
        ..settings(&nix, &[&dead.url(), &file_url(cache.path())])
    };
    let root = empty_root();
    update(&Caches::new(settings).unwrap(), root.path(), &toplevel);
    assert!(
        dead.count(".narinfo") <= 2 * 16,
        "{}",
        dead.count(".narinfo")
    );
}

#[test]
fn a_download_goes_on_after_a_restart() {
    let site = site();
    let spool = tempfile::tempdir().unwrap();
    let kept = |settings| Settings {
        spool: Some(spool.path().join("spool")),
        ..settings
    };
    let root = empty_root();
    let cut = Server::with(site.cache.path(), |request| {
        if is_nar(request) {
            Answer::Cut(5_000_000)
        } else {
            Answer::Serve
        }
    });
    let once = Settings {
        retries: 0,
        ..patient(&site, &[&cut.url()])
    };
    failure(kept(once), root.path(), &site.path);

    let server = Server::new(site.cache.path());
    let caches = Caches::new(kept(patient(&site, &[&server.url()]))).unwrap();
    update(&caches, root.path(), &site.path);
    assert_same(&site.nix, root.path(), &site.path);
    assert!(
        server.nars()[0].from.is_some_and(|from| from > 4_000_000),
        "{:?}",
        server.nars()
    );
    assert_eq!(fs::read_dir(spool.path().join("spool")).unwrap().count(), 0);
}

#[test]
fn what_was_kept_and_is_damaged_is_fetched_anew() {
    let site = site();
    let spool = tempfile::tempdir().unwrap();
    let kept = |settings| Settings {
        spool: Some(spool.path().to_owned()),
        ..settings
    };
    let root = empty_root();
    let cut = Server::with(site.cache.path(), |request| {
        if is_nar(request) {
            Answer::Cut(5_000_000)
        } else {
            Answer::Serve
        }
    });
    let once = Settings {
        retries: 0,
        ..patient(&site, &[&cut.url()])
    };
    failure(kept(once), root.path(), &site.path);
    let file = fs::read_dir(spool.path())
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    let mut bytes = fs::read(&file).unwrap();
    bytes[1_000_000] ^= 1;
    fs::write(&file, bytes).unwrap();

    let server = Server::new(site.cache.path());
    let caches = Caches::new(kept(patient(&site, &[&server.url()]))).unwrap();
    update(&caches, root.path(), &site.path);
    assert_same(&site.nix, root.path(), &site.path);
    assert_eq!(fs::read_dir(spool.path()).unwrap().count(), 0);
}

#[test]
fn who_cancels_need_not_wait() {
    let site = site();
    let server = Server::with(site.cache.path(), |request| {
        if is_nar(request) {
            Answer::Status(503)
        } else {
            Answer::Serve
        }
    });
    let caches = Caches::new(Settings {
        retries: 1000,
        ..patient(&site, &[&server.url()])
    })
    .unwrap();
    let root = empty_root();
    let store = StoreDir::open(root.path()).unwrap();
    let plan = cache::plan(&caches, &store, &site.path).unwrap();
    let progress = Progress::default();
    std::thread::scope(|scope| {
        let installing = scope.spawn(|| cache::install(&caches, &store, &plan, &progress));
        while server.nars().is_empty() {
            std::thread::yield_now();
        }
        progress.cancel.store(true, Ordering::Relaxed);
        assert!(matches!(
            installing.join().unwrap(),
            Err(CacheError::Cancelled)
        ));
    });
    assert_eq!(stored(root.path()), [""; 0]);
}

#[test]
fn the_bandwidth_limit_is_kept() {
    let site = site();
    let server = Server::new(site.cache.path());
    let caches = Caches::new(Settings {
        bytes_per_second: NonZeroU64::new(4_000_000),
        ..settings(&site.nix, &[&server.url()])
    })
    .unwrap();
    let root = empty_root();
    let started = Instant::now();
    update(&caches, root.path(), &site.path);
    let least = Duration::from_secs_f64(SIZE as f64 / 4e6 * 0.9);
    assert!(started.elapsed() > least, "{:?}", started.elapsed());
}

#[test]
fn documents_are_small_or_refused() {
    let site = site();
    fs::write(site.cache.path().join("release.json"), "{}").unwrap();
    let server = Server::new(site.cache.path());
    let caches = Caches::new(settings(&site.nix, &[&server.url()])).unwrap();
    for base in [server.url(), file_url(site.cache.path())] {
        let url = format!("{base}/release.json");
        assert_eq!(caches.document(&url, 2).unwrap(), b"{}");
        let too_long = caches.document(&url, 1).unwrap_err();
        assert!(matches!(
            too_long,
            CacheError::Document {
                fault: Fault::TooLong { limit: 1 },
                ..
            }
        ));
        assert!(too_long.to_string().starts_with(&url), "{too_long}");
        assert!(caches.document(&format!("{base}/nothing"), 1).is_err());
    }
}
