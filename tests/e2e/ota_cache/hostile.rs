//! Caches that lie, and archives that are made to harm: one clear error, and nothing of them in the store.

use std::fs;
use std::io::Write;
use std::path::Path;

use headgate::ota::cache::{self, CacheError, Caches, Progress, Settings, narinfo};
use headgate::ota::store_dir::StoreDir;
use nix_derivation::StorePath;
use nix_narinfo::{Compression, NarInfo};

use super::fetching::{caches, empty_root, file_url, settings, stored, update};
use super::forge::{Forge, file_nar, folder, path, sha256, words};
use crate::nix::{Compressed, Nix, noise};

/// The error, after which nothing is in the store.
fn refusal(caches: &Caches, path: &StorePath) -> String {
    let root = empty_root();
    let error = attempt(caches, root.path(), path).unwrap_err().to_string();
    assert_eq!(stored(root.path()), [""; 0], "{error}");
    assert!(
        !error.contains('\n') && error.contains(&path.to_string()),
        "{error}"
    );
    error
}

fn attempt(caches: &Caches, root: &Path, path: &StorePath) -> Result<(), CacheError> {
    let store = StoreDir::open(root).unwrap();
    let plan = cache::plan(caches, &store, path)?;
    cache::install(caches, &store, &plan, &Progress::default())
}

#[test]
fn a_narinfo_that_was_changed_is_not_believed() {
    let mut nix = Nix::new();
    let leaf = nix.file("leaf", &[], b"leaf");
    let other = nix.file("other", &[], b"other");
    let toplevel = nix.file("system", &[&leaf], leaf.to_string().as_bytes());
    let cache = nix.cache(&[&toplevel, &other], Compressed::None);
    let file = cache.path().join(narinfo::file_name(&toplevel));
    let sound = fs::read_to_string(&file).unwrap();
    let caches = caches(&nix, &[&file_url(cache.path())]);
    let field = |name: &str| {
        let line = sound
            .lines()
            .find(|line| line.starts_with(&format!("{name}:")))
            .unwrap();
        line.to_owned()
    };
    let other_info = fs::read_to_string(cache.path().join(narinfo::file_name(&other))).unwrap();
    let other_hash = other_info
        .lines()
        .find(|line| line.starts_with("NarHash"))
        .unwrap();
    let unsigned = "no trusted key (test-1) has signed it";
    let cases: Vec<(&str, String, &str)> = vec![
        (
            "unsigned",
            sound.replace(&format!("{}\n", field("Sig")), ""),
            "signed by: nobody",
        ),
        (
            "signature of something else",
            sound.replace(
                &field("Sig"),
                other_info.lines().find(|l| l.starts_with("Sig")).unwrap(),
            ),
            unsigned,
        ),
        (
            "other key's name",
            sound.replace("Sig: test-1", "Sig: cache.nixos.org-1"),
            "signed by: cache.nixos.org-1",
        ),
        (
            "no base64",
            sound.replace("Sig: test-1:", "Sig: test-1:!"),
            unsigned,
        ),
        (
            "other hash",
            sound.replace(&field("NarHash"), other_hash),
            unsigned,
        ),
        (
            "other size",
            sound.replace(&field("NarSize"), "NarSize: 1000000000000"),
            unsigned,
        ),
        (
            "size of nothing",
            sound.replace(&field("NarSize"), "NarSize: 0"),
            "no narinfo",
        ),
        (
            "size below nothing",
            sound.replace(&field("NarSize"), "NarSize: -1"),
            "no narinfo",
        ),
        (
            "huge size",
            sound.replace(&field("NarSize"), "NarSize: 99999999999999999999999"),
            "no narinfo",
        ),
        (
            "fewer references",
            sound.replace(&field("References"), "References: "),
            unsigned,
        ),
        (
            "more references",
            sound.replace(
                &field("References"),
                &format!("{} {}", field("References"), other.to_basename()),
            ),
            unsigned,
        ),
        (
            "reference elsewhere",
            sound.replace(&field("References"), "References: ../../etc/passwd"),
            "no narinfo",
        ),
        ("other path", other_info.clone(), "it describes"),
        (
            "other store",
            sound.replace("/nix/store/", "/gnu/store/"),
            "no narinfo",
        ),
        (
            "path elsewhere",
            sound.replace(
                &field("StorePath"),
                "StorePath: /nix/store/../../etc/passwd",
            ),
            "no narinfo",
        ),
        (
            "twice the same",
            format!("{sound}{}\n", field("NarHash")),
            "no narinfo",
        ),
        (
            "a web page",
            "<html>Log in to the hotel's network</html>".to_owned(),
            "no narinfo",
        ),
        ("nothing", String::new(), "no narinfo"),
        (
            "too much",
            format!("{sound}{}", "X: x\n".repeat(300_000)),
            "longer than 1048576 bytes",
        ),
    ];
    for (what, text, said) in cases {
        assert_ne!(text, sound, "{what}");
        fs::write(&file, text).unwrap();
        let error = refusal(&caches, &toplevel);
        assert!(error.contains(said), "{what}: {error}");
        assert!(error.contains(&file_url(&file)), "{what}: {error}");
    }
    fs::write(&file, sound).unwrap();
    update(&caches, empty_root().path(), &toplevel);
}

#[test]
fn what_nobody_signs_in_a_narinfo_can_do_no_harm() {
    let forge = Forge::new();
    let nar = file_nar(b"x");
    let sound = NarInfo::builder(path("x"), "x.nar", sha256(&nar), nar.len() as u64)
        .compression(Compression::None);
    forge.put("x.nar", &nar);
    for (what, info, said) in [
        (
            "url up",
            NarInfo::builder(path("x"), "../x.nar", sha256(&nar), nar.len() as u64)
                .compression(Compression::None),
            "no URL of a file in a cache",
        ),
        (
            "url elsewhere",
            NarInfo::builder(
                path("x"),
                "http://localhost:1/x",
                sha256(&nar),
                nar.len() as u64,
            )
            .compression(Compression::None),
            "no URL of a file in a cache",
        ),
        (
            "absolute url",
            NarInfo::builder(path("x"), "/etc/passwd", sha256(&nar), nar.len() as u64)
                .compression(Compression::None),
            "no URL of a file in a cache",
        ),
        (
            "no such file",
            NarInfo::builder(path("x"), "y.nar", sha256(&nar), nar.len() as u64)
                .compression(Compression::None),
            "no such file",
        ),
        (
            "bzip2",
            sound.clone().compression(Compression::Bzip2),
            "only zstd, xz and none",
        ),
        (
            "invented",
            sound
                .clone()
                .compression(Compression::Other("zip".to_owned())),
            "only zstd, xz and none",
        ),
        (
            "not compressed at all",
            sound.clone().compression(Compression::Zstd),
            "can't be decompressed",
        ),
        (
            "not compressed with xz",
            sound.clone().compression(Compression::Xz),
            "can't be decompressed",
        ),
        (
            "wrong FileSize",
            sound.clone().file_size(Some(1)),
            "instead of 1",
        ),
        (
            "wrong FileHash",
            sound.clone().file_hash(Some(sha256(b"y"))),
            "its FileHash is sha256:",
        ),
    ] {
        forge.describe(info);
        let error = refusal(&forge.caches(), &path("x"));
        assert!(error.contains(said), "{what}: {error}");
    }
    forge.describe(
        sound
            .file_size(Some(nar.len() as u64))
            .file_hash(Some(sha256(&nar))),
    );
    update(&forge.caches(), empty_root().path(), &path("x"));
}

#[test]
fn a_cache_for_another_store_or_none_at_all_is_refused() {
    let forge = Forge::new();
    forge.nar("x", &file_nar(b"x"));
    for (info, said) in [
        (
            &b"StoreDir: /gnu/store\n"[..],
            "for the store directory \"/gnu/store\"",
        ),
        (
            b"WantMassQuery: 1\nStoreDir: /nix/store/sub\n",
            "for the store directory",
        ),
        (b"\xff\xfe", "no text"),
    ] {
        forge.put("nix-cache-info", info);
        assert!(refusal(&forge.caches(), &path("x")).contains(said));
    }
    fs::remove_file(forge.cache.path().join("nix-cache-info")).unwrap();
    assert!(refusal(&forge.caches(), &path("x")).contains("it is no Nix binary cache"));
}

#[test]
fn archives_that_nix_would_not_write_are_refused() {
    let file: &[&[u8]] = &[b"(", b"type", b"regular", b"contents", b"x", b")"];
    let head: &[&[u8]] = &[b"nix-archive-1"];
    let deep = {
        let open: &[&[u8]] = &[
            b"(",
            b"type",
            b"directory",
            b"entry",
            b"(",
            b"name",
            b"d",
            b"node",
        ];
        let close: &[&[u8]] = &[b")", b")"];
        words(&[head, &open.repeat(1000), file, &close.repeat(1000)].concat())
    };
    let link = |target: &[u8]| {
        words(&[
            b"nix-archive-1",
            b"(",
            b"type",
            b"symlink",
            b"target",
            target,
            b")",
        ])
    };
    let sound = folder(&[(b"a", b"1"), (b"b", b"2")]);
    let mut padded = words(&[head, file].concat());
    let position = padded.len() - 23;
    padded[position] = 1;
    let mut huge = words(&[b"nix-archive-1", b"(", b"type", b"regular", b"contents"]);
    huge.extend(u64::MAX.to_le_bytes());
    let mut huge_name = words(&[
        b"nix-archive-1",
        b"(",
        b"type",
        b"directory",
        b"entry",
        b"(",
        b"name",
    ]);
    huge_name.extend((1u64 << 40).to_le_bytes());
    let long = [b'n'; 256];
    let far = [b't'; 5000];
    for (what, nar, said) in [
        (
            "truncated",
            sound[..sound.len() - 8].to_vec(),
            "unexpected end",
        ),
        (
            "in the middle",
            sound[..sound.len() / 2].to_vec(),
            "unexpected end",
        ),
        ("trailing", [&sound[..], &[0; 8]].concat(), "trailing bytes"),
        (
            "unsorted",
            folder(&[(b"b", b"1"), (b"a", b"2")]),
            "not sorted",
        ),
        (
            "twice the same name",
            folder(&[(b"a", b"1"), (b"a", b"2")]),
            "not sorted",
        ),
        ("up", folder(&[(b"..", b"1")]), "invalid entry name"),
        ("here", folder(&[(b".", b"1")]), "invalid entry name"),
        ("slash", folder(&[(b"a/b", b"1")]), "invalid entry name"),
        (
            "absolute",
            folder(&[(b"/etc/passwd", b"1")]),
            "invalid entry name",
        ),
        ("nul", folder(&[(b"a\0b", b"1")]), "invalid entry name"),
        ("no name", folder(&[(b"", b"1")]), "invalid entry name"),
        ("long name", folder(&[(&long, b"1")]), "name or link target"),
        ("long target", link(&far), "name or link target"),
        ("no target", link(b""), "name or link target"),
        ("1,000 folders deep", deep, "nesting"),
        ("padding", padded, "padding"),
        ("huge file", huge, "unexpected end"),
        ("huge name", huge_name, "1099511627776 bytes"),
        ("not an archive", noise(1000), "bad magic"),
        (
            "another version",
            words(&[&[&b"nix-archive-2"[..]], file].concat()),
            "bad magic",
        ),
        (
            "device",
            words(&[b"nix-archive-1", b"(", b"type", b"device", b")"]),
            "it is no NAR",
        ),
    ] {
        let forge = Forge::new();
        forge.nar("x", &nar);
        let error = refusal(&forge.caches(), &path("x"));
        assert!(error.contains(said), "{what}: {error}");
        assert!(error.contains("/x.nar"), "{what}: {error}");
    }
    let forge = Forge::new();
    forge.nar("x", &sound);
    update(&forge.caches(), empty_root().path(), &path("x"));
}

#[test]
fn a_nar_that_is_another_than_was_signed_is_refused() {
    let forge = Forge::new();
    let info = forge.nar("x", &folder(&[(b"a", b"1")]));
    forge.put("x.nar", &folder(&[(b"a", b"2")]));
    let error = refusal(&forge.caches(), info.store_path());
    assert!(
        error.contains("its NarHash is sha256:") && error.contains("but the narinfo says"),
        "{error}"
    );
    forge.put("x.nar", &file_nar(b"shorter"));
    assert!(refusal(&forge.caches(), info.store_path()).contains("its NarSize is"));
    forge.put("x.nar", &file_nar(&noise(5_000_000)));
    assert!(refusal(&forge.caches(), info.store_path()).contains("longer than"));
}

/// How much of the NAR is ever written is bounded by what was signed.
#[test]
fn bombs_do_not_go_off() {
    let forge = Forge::new();
    let nar = file_nar(&vec![0; 300_000_000]);
    let bomb = zstd::encode_all(&nar[..], 3).unwrap();
    assert!(bomb.len() < 50_000);
    forge.put("x.nar", &bomb);
    let info = |compression| {
        NarInfo::builder(path("x"), "x.nar", sha256(&nar), 1000).compression(compression)
    };
    forge.describe(info(Compression::Zstd));
    assert!(refusal(&forge.caches(), &path("x")).contains("longer than 1000 bytes"));
    let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 0);
    xz.write_all(&nar[..50_000_000]).unwrap();
    forge.put("x.nar", &xz.finish().unwrap());
    forge.describe(info(Compression::Xz));
    assert!(refusal(&forge.caches(), &path("x")).contains("longer than 1000 bytes"));
}

#[test]
fn decompressors_may_not_ask_for_much_memory() {
    let forge = Forge::new();
    let nar = file_nar(&noise(40_000_000));
    let info = |compression| {
        NarInfo::builder(path("x"), "x.nar", sha256(&nar), nar.len() as u64)
            .compression(compression)
    };
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(25).unwrap();
    encoder.write_all(&nar).unwrap();
    forge.put("x.nar", &encoder.finish().unwrap());
    forge.describe(info(Compression::Zstd));
    assert!(refusal(&forge.caches(), &path("x")).contains("windows of more than 8 MiB"));
    let mut options = liblzma::stream::LzmaOptions::new_preset(0).unwrap();
    options.dict_size(32 << 20);
    let mut filters = liblzma::stream::Filters::new();
    filters.lzma2(&options);
    let stream =
        liblzma::stream::Stream::new_stream_encoder(&filters, liblzma::stream::Check::Crc64)
            .unwrap();
    let mut xz = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
    xz.write_all(&nar[..1_000_000]).unwrap();
    forge.put("x.nar", &xz.finish().unwrap());
    forge.describe(info(Compression::Xz));
    assert!(refusal(&forge.caches(), &path("x")).contains("windows of more than 8 MiB"));
}

#[test]
fn bytes_behind_the_compressed_ones_are_refused() {
    let nar = file_nar(b"x");
    let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
    xz.write_all(&nar).unwrap();
    for (compression, compressed) in [
        (Compression::Zstd, zstd::encode_all(&nar[..], 3).unwrap()),
        (Compression::Xz, xz.finish().unwrap()),
    ] {
        let forge = Forge::new();
        let put = |bytes: &[u8]| {
            forge.put("x.nar", bytes);
            forge.describe(
                NarInfo::builder(path("x"), "x.nar", sha256(&nar), nar.len() as u64)
                    .compression(compression.clone()),
            );
        };
        put(&[&compressed[..], b"junk and more"].concat());
        refusal(&forge.caches(), &path("x"));
        put(&compressed[..compressed.len() - 5]);
        refusal(&forge.caches(), &path("x"));
        put(&compressed);
        update(&forge.caches(), empty_root().path(), &path("x"));
    }
}

#[test]
fn a_file_that_is_no_file_does_not_hold_the_update() {
    let forge = Forge::new();
    let info = forge.nar("x", &file_nar(b"x"));
    let nar = forge.cache.path().join("x.nar");
    fs::remove_file(&nar).unwrap();
    assert!(
        std::process::Command::new("mkfifo")
            .arg(&nar)
            .status()
            .unwrap()
            .success()
    );
    assert!(refusal(&forge.caches(), info.store_path()).contains("no regular file"));
    fs::remove_file(&nar).unwrap();
    fs::create_dir(&nar).unwrap();
    assert!(refusal(&forge.caches(), info.store_path()).contains("no regular file"));
}

#[test]
fn settings_without_which_nothing_can_be_believed_are_refused() {
    let nix = Nix::new();
    let with = |change: fn(&mut Settings)| {
        let mut settings = settings(&nix, &["file:///nowhere"]);
        change(&mut settings);
        Caches::new(settings).err().unwrap().to_string()
    };
    assert!(with(|settings| settings.urls.clear()).contains("ota.caches"));
    assert!(with(|settings| settings.trusted_keys.clear()).contains("ota.trusted_keys"));
    assert!(with(|settings| settings.urls.push("ftp://x".to_owned())).contains("ftp://x"));
    assert!(
        with(|settings| settings.ca_file = Some("/nowhere.pem".into())).contains("/nowhere.pem")
    );
    assert!(with(|settings| settings.proxy = Some("what://".to_owned())).contains("what://"));
}
