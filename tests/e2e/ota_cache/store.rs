//! The store on disk: what is collected, what is found damaged, what interruptions leave.

use std::env;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use headgate::ota::cache::{self, CacheError, Progress};
use headgate::ota::store_dir::{Scrubbed, StoreDir, StoreError};
use nix_derivation::StorePath;

use super::fetching::{assert_same, caches, empty_root, file_url, stored, update};
use crate::nix::{Compressed, Nix, noise};

#[test]
fn only_what_no_root_needs_is_collected() {
    let mut nix = Nix::new();
    let shared = nix.file("shared", &[], b"shared");
    let old_only = nix.file("old", &[&shared], shared.to_string().as_bytes());
    let old = nix.file(
        "system-1",
        &[&old_only, &shared],
        old_only.to_string().as_bytes(),
    );
    let deep = nix.file("deep", &[&shared], shared.to_string().as_bytes());
    let new_only = nix.zoo("new", &[&deep]);
    let new = nix.file("system-2", &[&new_only], new_only.to_string().as_bytes());
    let cache = nix.cache(&[&old, &new], Compressed::Zstd);
    let caches = caches(&nix, &[&file_url(cache.path())]);
    let root = empty_root();
    update(&caches, root.path(), &old);
    update(&caches, root.path(), &new);
    // Of others, which keep things beside.
    fs::create_dir(root.path().join("nix/store/.links")).unwrap();
    let store = StoreDir::open(root.path()).unwrap();

    assert!(
        store
            .unreachable(&[old.clone(), new.clone()])
            .unwrap()
            .is_empty()
    );
    let mut garbage = store.unreachable(std::slice::from_ref(&new)).unwrap();
    let mut expected = vec![old.clone(), old_only.clone()];
    garbage.sort();
    expected.sort();
    assert_eq!(garbage, expected);
    store.remove(&garbage).unwrap();
    assert_eq!(stored(root.path()).len(), 5);
    for path in [&shared, &deep, &new_only, &new] {
        assert_same(&nix, root.path(), path);
    }
    assert!(
        store.known(&old).unwrap().is_none(),
        "nor is anything written down about it"
    );
}

#[test]
fn references_that_nobody_has_written_down_are_found_in_the_files() {
    let root = empty_root();
    let store_folder = root.path().join("nix/store");
    let name = |letter: &str, name: &str| format!("{}-{name}", letter.repeat(32));
    let (leaf, kept, system) = (name("1", "leaf"), name("2", "kept"), name("3", "system"));
    fs::write(store_folder.join(&leaf), "leaf").unwrap();
    fs::create_dir(store_folder.join(&kept)).unwrap();
    symlink(
        format!("/nix/store/{leaf}"),
        store_folder.join(&kept).join("link"),
    )
    .unwrap();
    fs::write(
        store_folder.join(&system),
        format!("exec /nix/store/{kept}/bin/x"),
    )
    .unwrap();
    fs::write(store_folder.join(name("4", "garbage")), "").unwrap();
    let store = StoreDir::open(root.path()).unwrap();
    let path = |name: &str| StorePath::from_basename(name.as_bytes()).unwrap();
    assert_eq!(
        store.unreachable(&[path(&system)]).unwrap(),
        [path(&name("4", "garbage"))]
    );
    assert_eq!(store.scrub(&path(&kept)).unwrap(), Scrubbed::Unknown);
}

#[test]
fn the_images_registration_says_what_its_paths_are() {
    let root = empty_root();
    let path: StorePath = format!("/nix/store/{}-x", "1".repeat(32)).parse().unwrap();
    let store = StoreDir::open(root.path()).unwrap();
    fs::write(store.place_of(&path), "x").unwrap();
    let state = root.path().join("nix/var/headgate");
    fs::create_dir_all(&state).unwrap();
    let hash =
        super::forge::sha256(&crate::nix::dump(&store.place_of(&path))).to_nix_base16_string();
    let hex = hash.strip_prefix("sha256:").unwrap();
    fs::write(
        state.join("registration"),
        format!("{path}\n{hex}\n120\n\n1\n{path}\n"),
    )
    .unwrap();
    let store = StoreDir::open(root.path()).unwrap();
    assert_eq!(store.scrub(&path).unwrap(), Scrubbed::Sound);
    assert_eq!(
        store.references(&path).unwrap(),
        std::slice::from_ref(&path)
    );
    fs::write(store.place_of(&path), "y").unwrap();
    assert_eq!(store.scrub(&path).unwrap(), Scrubbed::Damaged);
    fs::write(state.join("registration"), "nonsense\n").unwrap();
    let error = StoreDir::open(root.path()).unwrap_err();
    assert!(
        matches!(&error, StoreError::Registration { line: 1, .. }),
        "{error}"
    );
}

#[test]
fn damage_is_found_and_repaired() {
    let mut nix = Nix::new();
    let zoo = nix.zoo("zoo", &[]);
    let file = nix.file("file", &[&zoo], zoo.to_string().as_bytes());
    let cache = nix.cache(&[&file], Compressed::Xz);
    let caches = caches(&nix, &[&file_url(cache.path())]);
    let root = empty_root();
    update(&caches, root.path(), &file);
    let store = StoreDir::open(root.path()).unwrap();
    for path in [&zoo, &file] {
        assert_eq!(store.scrub(path).unwrap(), Scrubbed::Sound);
    }
    let damage = |place: &Path, content: &[u8]| {
        fs::set_permissions(place, Permissions::from_mode(0o644)).unwrap();
        fs::write(place, content).unwrap();
    };
    damage(&store.place_of(&zoo).join("large"), b"bit rot");
    damage(&store.place_of(&file), b"");
    for path in [&zoo, &file] {
        assert_eq!(store.scrub(path).unwrap(), Scrubbed::Damaged);
    }
    cache::repair(
        &caches,
        &store,
        &[zoo.clone(), file.clone()],
        &Progress::default(),
    )
    .unwrap();
    for path in [&zoo, &file] {
        assert_eq!(store.scrub(path).unwrap(), Scrubbed::Sound);
        assert_same(&nix, root.path(), path);
    }
    assert_eq!(stored(root.path()).len(), 2);
}

#[test]
fn leftovers_are_swept_and_nothing_else() {
    let root = empty_root();
    let store_folder = root.path().join("nix/store");
    let narinfos = root.path().join("nix/var/headgate/narinfo");
    fs::create_dir_all(&narinfos).unwrap();
    let left = store_folder.join(".headgate-0123456789abcdef");
    fs::create_dir_all(left.join("a/b")).unwrap();
    fs::write(left.join("a/b/c"), "").unwrap();
    for folder in [left.join("a/b"), left.join("a"), left.clone()] {
        fs::set_permissions(folder, Permissions::from_mode(0o555)).unwrap();
    }
    fs::write(store_folder.join(".headgate-fedcba9876543210"), "").unwrap();
    fs::write(narinfos.join(".headgate-0"), "").unwrap();
    fs::write(narinfos.join("x.narinfo"), "").unwrap();
    fs::create_dir(store_folder.join(".links")).unwrap();
    StoreDir::open(root.path()).unwrap().sweep().unwrap();
    assert_eq!(stored(root.path()), [".links"]);
    assert_eq!(fs::read_dir(narinfos).unwrap().count(), 1);
}

#[test]
fn a_root_without_a_store_is_named() {
    let error = StoreDir::open(Path::new("/nowhere"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("/nowhere/nix/store"), "{error}");
}

/// What the test after this one kills.
#[test]
#[ignore = "run by another test"]
fn an_update_to_be_killed() {
    let Ok(root) = env::var("KILLED_ROOT") else {
        return;
    };
    let [url, key, path] =
        ["URL", "KEY", "PATH"].map(|name| env::var(format!("KILLED_{name}")).unwrap());
    let caches = cache::Caches::new(cache::Settings {
        urls: vec![url],
        trusted_keys: vec![key.parse().unwrap()],
        ..cache::Settings::default()
    })
    .unwrap();
    update(&caches, Path::new(&root), &path.parse().unwrap());
}

#[test]
fn whenever_an_update_is_killed_each_path_is_there_as_a_whole_or_not_at_all() {
    let mut nix = Nix::new();
    let parts: Vec<StorePath> = (0..60)
        .map(|part| nix.file(&format!("part-{part}"), &[], &noise(2_000_000 + part)))
        .collect();
    let toplevel = nix.file("system", &parts.iter().collect::<Vec<_>>(), b"");
    let cache = nix.cache(&[&toplevel], Compressed::Zstd);
    let url = file_url(cache.path());
    let key = nix.public_text();
    let mut random = fastrand::Rng::with_seed(8);
    let mut interrupted = 0;
    for _ in 0..12 {
        let root = empty_root();
        let mut updating = Command::new(env::current_exe().unwrap())
            .args([
                "--exact",
                "ota_cache::store::an_update_to_be_killed",
                "--ignored",
            ])
            .env("KILLED_ROOT", root.path())
            .env("KILLED_URL", &url)
            .env("KILLED_KEY", &key)
            .env("KILLED_PATH", toplevel.to_string())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        thread::sleep(Duration::from_millis(random.u64(20..600)));
        updating.kill().unwrap();
        interrupted += usize::from(!updating.wait().unwrap().success());
        let store = StoreDir::open(root.path()).unwrap();
        for path in store.paths().unwrap() {
            assert_eq!(store.scrub(&path).unwrap(), Scrubbed::Sound, "{path}");
        }
        store.sweep().unwrap();
        assert_eq!(stored(root.path()).len(), store.paths().unwrap().len());
        update(&caches(&nix, &[&url]), root.path(), &toplevel);
        for path in parts.iter().chain([&toplevel]) {
            assert_eq!(store.scrub(path).unwrap(), Scrubbed::Sound);
        }
    }
    assert!(interrupted > 0, "not one was interrupted");
}

#[test]
fn a_full_disk_leaves_no_half_path_and_is_named() {
    let mut nix = Nix::new();
    let small: Vec<StorePath> = (0..5)
        .map(|n| nix.file(&format!("small-{n}"), &[], b"small"))
        .collect();
    let large = nix.file("large", &[], &noise(20_000_000));
    let mut references: Vec<&StorePath> = small.iter().collect();
    references.push(&large);
    let toplevel = nix.file("system", &references, b"");
    let cache = nix.cache(&[&toplevel], Compressed::Zstd);
    let caches = caches(&nix, &[&file_url(cache.path())]);
    // From where not even a folder fits to where all but the large path does.
    for size in ["16k", "64k", "1m", "10m", "19m"] {
        let root = tempfile::tempdir().unwrap();
        let Some(_disk) = Disk::mount(root.path(), size) else {
            eprintln!("not tested: file systems can't be mounted here");
            return;
        };
        fs::create_dir_all(root.path().join("nix/store")).unwrap();
        let store = StoreDir::open(root.path()).unwrap();
        let plan = cache::plan(&caches, &store, &toplevel).unwrap();
        let error = cache::install(&caches, &store, &plan, &Progress::default()).unwrap_err();
        assert!(
            matches!(error, CacheError::Store(StoreError::Full { .. })),
            "{size}: {error}"
        );
        assert!(error.to_string().contains("no space is left"), "{error}");
        for path in store.paths().unwrap() {
            assert_eq!(store.scrub(&path).unwrap(), Scrubbed::Sound);
        }
        assert_eq!(
            stored(root.path()).len(),
            store.paths().unwrap().len(),
            "{size}"
        );
    }
}

/// A small disk, as long as it is held.
struct Disk<'a>(&'a Path);

impl<'a> Disk<'a> {
    fn mount(at: &'a Path, size: &str) -> Option<Self> {
        let mounted = Command::new("mount")
            .args([
                "-t",
                "tmpfs",
                "-o",
                &format!("size={size}"),
                "headgate-test",
            ])
            .arg(at)
            .status();
        mounted
            .is_ok_and(|status| status.success())
            .then_some(Self(at))
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}
