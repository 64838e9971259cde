//! Updates from a cache that the real Nix has made, on a machine that is a folder: its boot loader is played by
//! the test, all else is the real program.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use headgate::ota::keys::SecretKey;
use jiff::{SignedDuration, Timestamp};
use nix_derivation::StorePath;
use serde_json::{Value, json};

use crate::gateway::{Home, PATIENCE, assert_for_people, eventually, finished};
use crate::nix::{Compressed, Nix};

const VENDOR: &str = "4a67b082-0a4c-41cf-b6c7-440b29bb8c4f";

/// A machine that can be updated.
struct Board {
    home: Home,
    nix: Nix,
    boots: u32,
    kernel: StorePath,
}

/// How a command has ended.
struct Ended {
    code: i32,
    /// Of `--json`.
    value: Value,
    error: String,
}

impl Board {
    /// Runs version 1.0.0, as its image came.
    fn new() -> Board {
        let mut nix = Nix::new();
        let home = Home::new();
        let root = home.path().join("root");
        let kernel = nix.add("linux", &[], |place| {
            fs::create_dir(place).unwrap();
            fs::write(place.join("Image"), crate::nix::noise(300_000)).unwrap();
            fs::write(place.join("initrd"), crate::nix::noise(200_000)).unwrap();
        });
        let public = nix.public_text();
        let home = home
            .set("ota.root", root.display())
            .set("ota.esp", root.join("boot").display())
            .set("ota.state", root.join("var/lib/headgate-ota").display())
            .set(
                "ota.channel",
                format!(
                    "file://{}",
                    root.parent().unwrap().join("channel").display()
                ),
            )
            .set("ota.trusted_keys", public)
            .set("ota.min_free_bytes", 0)
            .set("ota.reboot", "never")
            .set("ota.health.deadline_s", 10)
            .set("ota.health.settle_s", 0);
        let mut board = Board {
            home,
            nix,
            boots: 0,
            kernel,
        };
        for folder in [
            "nix/store",
            "nix/var/nix/profiles",
            "boot",
            "run",
            "etc",
            "proc/sys/kernel/random",
            "sys/firmware/efi/efivars",
        ] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        fs::write(
            root.join("etc/machine-id"),
            "0123456789abcdef0123456789abcdef\n",
        )
        .unwrap();
        let first = board.system("1.0.0");
        let cache = board.nix.cache(&[&first], Compressed::Zstd);
        drop(cache);
        for path in [board.kernel.clone(), first.clone()] {
            let copied = Command::new("cp")
                .arg("-a")
                .arg(board.nix.place_of(&path))
                .arg(root.join("nix/store"))
                .status();
            assert!(copied.unwrap().success());
        }
        board.link_generation(1, &first);
        board.ends_well(&[
            "boot",
            "install",
            "--offline",
            "--esp",
            &board.path("boot"),
            "--root",
            &board.path(""),
            &first.to_string(),
        ]);
        board.boot();
        board.ends_well(&[
            "boot",
            "bless",
            "--esp",
            &board.path("boot"),
            "--root",
            &board.path(""),
        ]);
        board.ends_well(&["ota", "commit"]);
        board
    }

    fn root(&self) -> PathBuf {
        self.home.path().join("root")
    }

    fn path(&self, below: &str) -> String {
        self.root().join(below).to_str().unwrap().to_owned()
    }

    fn link_generation(&self, number: u32, toplevel: &StorePath) {
        let link = self
            .root()
            .join(format!("nix/var/nix/profiles/system-{number}-link"));
        symlink(toplevel.to_string(), link).unwrap();
    }

    /// A system as NixOS builds it, as far as updates look into it.
    fn system(&mut self, version: &str) -> StorePath {
        let kernel = self.kernel.clone();
        let release = self.nix.file(
            "os-release",
            &[],
            format!("IMAGE_VERSION={version}\n").as_bytes(),
        );
        let (place_of_kernel, version) = (kernel.to_string(), version.to_owned());
        let os_release = self.nix.place_of(&release);
        let os_release = fs::read(os_release).unwrap();
        self.nix.add("nixos-system", &[&kernel], |place| {
            fs::create_dir_all(place.join("etc")).unwrap();
            fs::write(place.join("etc/os-release"), os_release).unwrap();
            let toplevel = format!(
                "/nix/store/{}",
                place.file_name().unwrap().to_str().unwrap()
            );
            let spec = json!({
                "org.nixos.bootspec.v1": {
                    "system": "aarch64-linux",
                    "label": format!("NixOS {version}"),
                    "kernel": format!("{place_of_kernel}/Image"),
                    "kernelParams": ["quiet"],
                    "initrd": format!("{place_of_kernel}/initrd"),
                    "init": format!("{toplevel}/init"),
                    "toplevel": toplevel,
                }
            });
            fs::write(place.join("boot.json"), spec.to_string()).unwrap();
            fs::write(place.join("init"), "#!/bin/sh\n").unwrap();
        })
    }

    /// Puts a release into the channel, and signs it.
    fn publish(&mut self, version: &str, arguments: &[&str]) -> StorePath {
        let toplevel = self.system(version);
        self.offer(version, &toplevel, arguments);
        toplevel
    }

    fn offer(&mut self, version: &str, toplevel: &StorePath, arguments: &[&str]) {
        let cache = self.nix.cache(&[toplevel], Compressed::Zstd);
        let channel = self.home.path().join("channel");
        if channel.exists() {
            fs::remove_dir_all(&channel).unwrap();
        }
        let release = json!({
            "schema": 1,
            "product": "headgate",
            "version": version,
            "system": format!("{}-linux", std::env::consts::ARCH),
            "toplevel": toplevel.to_string(),
        });
        fs::write(cache.path().join("release.json"), release.to_string()).unwrap();
        let (cache_path, secret) = (cache.path().to_str().unwrap(), self.nix.secret_file());
        let channel = channel.to_str().unwrap();
        let mut args = vec![
            "release",
            "sign",
            cache_path,
            "--output",
            channel,
            "--key-file",
            secret.to_str().unwrap(),
        ];
        args.extend(arguments);
        self.ends_well(&args);
    }

    /// Runs a command with the boot partition mounted.
    fn run(&self, args: &[&str]) -> Ended {
        let plain = self.home.command(&[&["--json"], args].concat());
        let esp = self.root().join("boot");
        let mut command = Command::new("unshare");
        command
            .args([
                "--map-root-user",
                "--mount",
                "sh",
                "-c",
                "mount --bind \"$0\" \"$0\" && exec \"$@\"",
            ])
            .arg(&esp)
            .arg(plain.get_program())
            .args(plain.get_args())
            .current_dir(self.home.path())
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap());
        for (name, value) in plain.get_envs() {
            command.env(name, value.unwrap());
        }
        ended(command)
    }

    #[track_caller]
    fn ends_well(&self, args: &[&str]) -> Value {
        let ended = self.run(args);
        assert_eq!(ended.code, 0, "{args:?}: {}", ended.error);
        ended.value
    }

    #[track_caller]
    fn fails(&self, args: &[&str], because: &str) {
        let ended = self.run(args);
        assert_eq!(ended.code, 1, "{args:?}: {}", ended.value);
        assert_for_people(&ended.error);
        assert!(ended.error.contains(because), "{args:?}: {}", ended.error);
    }

    fn status(&self) -> Value {
        self.ends_well(&["ota", "status"])
    }

    /// Names of the boot entries, in the order in which they are taken.
    fn entries(&self) -> Vec<String> {
        let list = self.ends_well(&[
            "boot",
            "list",
            "--esp",
            &self.path("boot"),
            "--root",
            &self.path(""),
        ]);
        let entries = list["entries"]
            .as_array()
            .unwrap_or_else(|| panic!("{list}"));
        let name = |entry: &Value| {
            let file = Path::new(entry["file"].as_str().unwrap());
            file.file_name().unwrap().to_str().unwrap().to_owned()
        };
        entries.iter().map(name).collect()
    }

    /// What firmware and systemd-boot do. Returns the version that runs.
    fn boot(&mut self) -> String {
        self.boots += 1;
        let root = self.root();
        let first = self.entries().remove(0);
        let (stem, counter) = match first.trim_end_matches(".conf").split_once('+') {
            Some((stem, counter)) => (stem.to_owned(), Some(counter.to_owned())),
            None => (first.trim_end_matches(".conf").to_owned(), None),
        };
        let entries = root.join("boot/loader/entries");
        let efivars = root.join("sys/firmware/efi/efivars");
        let set = |name: &str, value: Option<Vec<u8>>| {
            let file = efivars.join(format!("{name}-{VENDOR}"));
            match value {
                Some(value) => fs::write(file, [vec![6, 0, 0, 0], value].concat()).unwrap(),
                None => drop(fs::remove_file(file)),
            }
        };
        let utf16 = |text: &str| {
            text.encode_utf16()
                .chain([0])
                .flat_map(u16::to_le_bytes)
                .collect::<Vec<u8>>()
        };
        let counted = counter.map(|counter| {
            let (left, done) = counter.split_once('-').unwrap_or((&counter, "0"));
            let (left, done): (u32, u32) = (left.parse().unwrap(), done.parse().unwrap());
            let next = match left {
                0 => first.clone(),
                left => format!("{stem}+{}-{}.conf", left - 1, done + 1),
            };
            fs::rename(entries.join(&first), entries.join(&next)).unwrap();
            next
        });
        let file = counted.clone().unwrap_or_else(|| first.clone());
        set("LoaderInfo", Some(utf16("systemd-boot 257")));
        set("LoaderFeatures", Some(0x7fu64.to_le_bytes().to_vec()));
        set("LoaderEntrySelected", Some(utf16(&format!("{stem}.conf"))));
        set(
            "LoaderBootCountPath",
            counted.map(|name| utf16(&format!("\\loader\\entries\\{name}"))),
        );
        fs::write(
            root.join("proc/sys/kernel/random/boot_id"),
            format!("boot-{}\n", self.boots),
        )
        .unwrap();
        let text = fs::read_to_string(entries.join(&file)).unwrap();
        let init = text
            .split_whitespace()
            .find_map(|word| word.strip_prefix("init="))
            .unwrap();
        let toplevel = init.strip_suffix("/init").unwrap();
        for link in ["booted-system", "current-system"] {
            let link = root.join("run").join(link);
            drop(fs::remove_file(&link));
            symlink(toplevel, link).unwrap();
        }
        let version = self.status()["version"]
            .as_str()
            .unwrap_or("none")
            .to_owned();
        assert_ne!(version, "none", "the system that is booted is whole");
        version
    }

    /// Whatever the document says.
    fn sign_by_hand(&self, document: &Path) {
        let secret = fs::read_to_string(self.nix.secret_file()).unwrap();
        let key: SecretKey = secret.parse().unwrap();
        let signature = key.sign(&fs::read(document).unwrap()).to_string();
        fs::write(document.with_extension("json.sig"), signature).unwrap();
    }

    fn bless(&self) {
        self.ends_well(&[
            "boot",
            "bless",
            "--esp",
            &self.path("boot"),
            "--root",
            &self.path(""),
        ]);
    }

    /// How many store paths there are.
    fn store_paths(&self) -> usize {
        self.root().join("nix/store").read_dir().unwrap().count()
    }
}

fn ended(mut command: Command) -> Ended {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let output = finished(child, PATIENCE);
    let error = String::from_utf8(output.stderr).unwrap();
    Ended {
        code: output.status.code().expect("it was not killed"),
        value: serde_json::from_slice(&output.stdout).unwrap_or(Value::Null),
        error,
    }
}

#[test]
fn a_healthy_update_is_tried_and_stays() {
    let mut board = Board::new();
    board.publish("1.1.0", &[]);
    assert_eq!(board.ends_well(&["ota", "check"])["offer"], "update");
    let gateway = board.home.start();
    assert_eq!(board.ends_well(&["ota", "update"])["outcome"], "restart");
    assert_eq!(board.entries(), ["headgate-2+3.conf", "headgate-1.conf"]);
    gateway.kill();

    assert_eq!(board.boot(), "1.1.0");
    let gateway = board.home.start();
    assert_eq!(board.status()["on_probation"], true);
    assert!(board.home.store().join("lmdb-trial").exists());
    assert_eq!(
        board.ends_well(&["ota", "update"])["outcome"],
        "on_probation"
    );
    assert_eq!(board.ends_well(&["ota", "health"])["healthy"], true);
    assert_eq!(
        board.ends_well(&["ota", "commit"]),
        json!({}),
        "it is not blessed yet"
    );
    board.bless();
    assert_eq!(board.ends_well(&["ota", "commit"])["committed"], "1.1.0");
    assert!(!board.home.store().join("lmdb-trial").exists());
    let status = board.status();
    assert_eq!(
        (&status["phase"], &status["on_probation"]),
        (&json!("idle"), &json!(false))
    );
    gateway.kill();

    assert_eq!(board.boot(), "1.1.0");
    assert_eq!(board.entries(), ["headgate-2.conf", "headgate-1.conf"]);
    assert_eq!(board.ends_well(&["ota", "update"])["outcome"], "up_to_date");
}

#[test]
fn an_update_that_is_not_healthy_is_left_and_not_taken_again() {
    let mut board = Board::new();
    let store_paths = board.store_paths();
    board.publish("1.1.0", &[]);
    board.ends_well(&["ota", "update"]);
    for _ in 0..3 {
        assert_eq!(board.boot(), "1.1.0");
        // No gateway runs.
        board.fails(&["ota", "health"], "no gateway answers");
    }
    assert_eq!(board.boot(), "1.0.0");
    let value = board.ends_well(&["ota", "commit"]);
    assert_eq!(value["rolled_back"], "1.1.0");
    let rollback = &board.status()["last_rollback"];
    assert_eq!(rollback["version"], "1.1.0");
    assert!(
        rollback["reason"]
            .as_str()
            .unwrap()
            .contains("no gateway answers"),
        "{rollback}"
    );
    assert_eq!(board.entries(), ["headgate-1.conf"]);
    assert_eq!(board.store_paths(), store_paths, "what it brought is gone");

    board.fails(&["ota", "update"], "was left before: no gateway answers");
    assert_eq!(
        board.ends_well(&["ota", "update", "--retry"])["outcome"],
        "restart"
    );
    assert_eq!(board.boot(), "1.1.0");
}

#[test]
fn releases_that_must_not_be_taken_are_refused_with_the_reason() {
    let mut board = Board::new();
    let nothing = board.store_paths();
    board.publish("0.9.0", &[]);
    board.fails(&["ota", "update"], "older than 1.0.0");
    board.publish("1.0.0", &[]);
    board.fails(&["ota", "update"], "give it a version of its own");
    board.publish(
        "1.1.0",
        &[
            "--created",
            "2020-01-01T00:00:00Z",
            "--expires",
            "2020-02-01T00:00:00Z",
        ],
    );
    board.fails(&["ota", "update"], "has expired on 2020-02-01");

    let document = board.home.path().join("channel/release.json");
    board.publish("1.1.0", &[]);
    let text = fs::read_to_string(&document).unwrap();
    fs::write(&document, text.replace("1.1.0", "1.2.0")).unwrap();
    board.fails(
        &["ota", "update"],
        "signed by none of the trusted keys (test-1)",
    );
    for (sound, broken, because) in [
        ("headgate", "toaster", "is for the product"),
        ("-linux", "-darwin", "and this gateway is"),
        ("\"schema\": 1", "\"schema\": 2", "schema 2"),
    ] {
        fs::write(&document, text.replace(sound, broken)).unwrap();
        board.sign_by_hand(&document);
        board.fails(&["ota", "update"], because);
    }
    fs::remove_file(document.with_extension("json.sig")).unwrap();
    board.fails(&["ota", "update"], "release.json.sig");
    fs::remove_file(&document).unwrap();
    board.fails(&["ota", "update"], "release.json");
    assert_eq!(board.store_paths(), nothing, "nothing was fetched");
    assert_eq!(board.entries(), ["headgate-1.conf"]);
    assert!(
        board.status()["last_error"]
            .as_str()
            .unwrap()
            .contains("release.json")
    );
}

#[test]
fn an_old_release_that_comes_again_is_no_news() {
    let mut board = Board::new();
    let old = board.publish("1.1.0", &["--created", "2026-01-01T00:00:00Z"]);
    let channel = board.home.path().join("channel");
    let kept = board.home.path().join("old-channel");
    fs::rename(&channel, &kept).unwrap();
    board.publish("1.2.0", &["--created", "2026-02-01T00:00:00Z"]);
    board.ends_well(&["ota", "update"]);
    for _ in 0..3 {
        board.boot();
    }
    assert_eq!(board.boot(), "1.0.0");
    board.ends_well(&["ota", "commit"]);
    fs::remove_dir_all(&channel).unwrap();
    fs::rename(&kept, &channel).unwrap();
    board.fails(&["ota", "update"], "before one that this gateway has seen");
    // Signed anew, it may come.
    board.offer("1.1.0", &old, &[]);
    assert_eq!(board.ends_well(&["ota", "update"])["outcome"], "restart");
}

#[test]
fn a_key_that_a_release_adds_signs_the_next_one() {
    let mut board = Board::new();
    let secret = board.home.path().join("second.key");
    let value = board.ends_well(&["release", "keygen", "second", secret.to_str().unwrap()]);
    let public = value["public_key"].as_str().unwrap().to_owned();
    board.publish("1.1.0", &["--add-key", &public, "--revoke-key", "test-1"]);
    let gateway = board.home.start();
    board.ends_well(&["ota", "update"]);
    gateway.kill();
    board.boot();
    let gateway = board.home.start();
    board.ends_well(&["ota", "health"]);
    board.bless();
    board.ends_well(&["ota", "commit"]);
    gateway.kill();
    board.publish("1.2.0", &[]);
    board.fails(
        &["ota", "update"],
        "signed by none of the trusted keys (second)",
    );
    board.publish("1.2.0", &["--key-file", secret.to_str().unwrap()]);
    assert_eq!(board.ends_well(&["ota", "update"])["outcome"], "restart");
}

#[test]
fn a_rollout_leaves_out_those_whose_turn_it_is_not() {
    let mut board = Board::new();
    board.publish("1.1.0", &["--rollout", "0"]);
    assert_eq!(board.ends_well(&["ota", "update"])["outcome"], "not_yet");
    board.publish("1.1.0", &["--rollout", "100"]);
    assert_eq!(board.ends_well(&["ota", "update"])["outcome"], "restart");
}

#[test]
fn whoever_holds_or_pins_stays_where_it_is() {
    let mut board = Board::new();
    board.publish("1.1.0", &[]);
    board.ends_well(&["ota", "hold"]);
    board.fails(&["ota", "update"], "held since");
    board.ends_well(&["ota", "unhold"]);
    board.home = board.home.clone().set("ota.pin", "1.0.5");
    board.fails(&["ota", "update"], "release-1.0.5.json");
    board.home = board.home.clone().set("ota.pin", "1.1.0");
    assert_eq!(board.ends_well(&["ota", "update"])["outcome"], "restart");
}

#[test]
fn an_update_can_be_called_off_before_it_is_booted() {
    let mut board = Board::new();
    board.publish("1.1.0", &[]);
    board.ends_well(&["ota", "update"]);
    let value = board.ends_well(&["ota", "rollback", "--reason", "not today"]);
    assert_eq!(value["generation"], 1);
    assert_eq!(board.entries(), ["headgate-1.conf"]);
    assert_eq!(board.boot(), "1.0.0");
    board.fails(&["ota", "update"], "was left before: not today");
}

#[test]
fn a_release_can_not_take_the_last_key_away() {
    let mut board = Board::new();
    board.publish("1.1.0", &["--revoke-key", "test-1"]);
    board.fails(&["ota", "update"], "would leave no trusted key");
}

/// Has the machine run a version for good.
fn committed(board: &mut Board, version: &str) -> StorePath {
    let system = board.publish(version, &[]);
    board.ends_well(&["ota", "update"]);
    assert_eq!(board.boot(), version);
    board.bless();
    board.ends_well(&["ota", "commit"]);
    system
}

#[test]
fn a_system_that_comes_again_gets_a_generation_of_its_own() {
    let mut board = Board::new();
    let first = board.root().join("run/booted-system").read_link().unwrap();
    let first: StorePath = first.to_str().unwrap().parse().unwrap();
    committed(&mut board, "1.1.0");
    board.offer("1.2.0", &first, &[]);
    board.ends_well(&["ota", "update"]);
    assert_eq!(
        board.entries(),
        ["headgate-3+3.conf", "headgate-2.conf", "headgate-1.conf"]
    );
    for _ in 0..3 {
        board.boot();
    }
    assert_eq!(board.boot(), "1.1.0");
    board.ends_well(&["ota", "commit"]);
    assert_eq!(board.entries(), ["headgate-2.conf", "headgate-1.conf"]);
}

#[test]
fn room_is_made_and_a_withdrawn_release_is_given_up() {
    let mut board = Board::new();
    board.publish("1.1.0", &[]);
    let home = board.home.clone();
    board.home = home.clone().set("ota.min_free_bytes", "1048576GiB");
    board.fails(&["ota", "update"], "headgate ota gc");
    assert_eq!(board.status()["phase"], "fetching");
    board.ends_well(&["ota", "gc"]);
    board.home = home;
    board.publish("0.9.0", &[]);
    board.fails(&["ota", "update"], "older than 1.0.0");
    assert_eq!(board.status()["phase"], "idle");
}

#[test]
fn what_a_boot_entry_names_is_never_collected() {
    let mut board = Board::new();
    committed(&mut board, "1.1.0");
    let link = board.root().join("nix/var/nix/profiles/system-1-link");
    let system = link.read_link().unwrap();
    fs::remove_file(&link).unwrap();
    board.ends_well(&["ota", "gc"]);
    assert!(
        board
            .root()
            .join(system.strip_prefix("/").unwrap())
            .exists()
    );
    symlink("../../../store/relative", &link).unwrap();
    board.fails(&["ota", "gc"], "is no store path");
}

#[test]
fn keys_can_be_revoked_without_a_new_system() {
    let mut board = Board::new();
    let secret = board.home.path().join("second.key");
    let value = board.ends_well(&["release", "keygen", "second", secret.to_str().unwrap()]);
    let public = value["public_key"].as_str().unwrap().to_owned();
    let system = committed(&mut board, "1.1.0");
    let later = |hours| (Timestamp::now() + SignedDuration::from_hours(hours)).to_string();
    let keys = [
        "--add-key",
        &public,
        "--revoke-key",
        "test-1",
        "--created",
        &later(1),
    ];
    board.offer("1.1.0", &system, &keys);
    assert_eq!(board.ends_well(&["ota", "update"])["outcome"], "up_to_date");
    board.publish("1.2.0", &["--created", &later(2)]);
    board.fails(
        &["ota", "update"],
        "signed by none of the trusted keys (second)",
    );

    let ended = board.run(&["ota", "reset", "--yes"]);
    assert_eq!(ended.code, 0, "{}", ended.error);
    board.fails(&["ota", "update"], "no trusted key");
}

#[test]
fn a_release_that_is_signed_far_ahead_is_refused() {
    let mut board = Board::new();
    board.publish("1.1.0", &[]);
    let channel = board.home.path().join("channel");
    let signed = [
        "release",
        "sign",
        channel.to_str().unwrap(),
        "--created",
        "2100-01-01T00:00:00Z",
    ];
    let secret = board.nix.secret_file();
    let args = [&signed[..], &["--key-file", secret.to_str().unwrap()]].concat();
    board.fails(&args, "see to the clock");
    let document = channel.join("release.json");
    let text = fs::read_to_string(&document).unwrap();
    let mut release: Value = serde_json::from_str(&text).unwrap();
    release["created"] = json!("2100-01-01T00:00:00Z");
    fs::write(&document, release.to_string()).unwrap();
    board.sign_by_hand(&document);
    board.fails(&["ota", "update"], "see to the clock");
}

#[test]
fn a_release_is_not_copied_into_itself() {
    let mut board = Board::new();
    board.publish("1.1.0", &[]);
    let channel = board.home.path().join("channel");
    let (channel, inside) = (channel.to_str().unwrap(), channel.join("sub"));
    let secret = board.nix.secret_file();
    let secret = secret.to_str().unwrap();
    let args = [
        "release",
        "sign",
        channel,
        "--output",
        inside.to_str().unwrap(),
        "--key-file",
        secret,
    ];
    board.fails(&args, "within the release itself");
    let nar = fs::read_dir(format!("{channel}/nar"))
        .unwrap()
        .next()
        .unwrap();
    fs::remove_file(nar.unwrap().path()).unwrap();
    board.fails(
        &["release", "sign", channel, "--key-file", secret],
        ".narinfo names",
    );
}

#[test]
fn an_update_that_is_killed_leaves_nothing_behind() {
    let mut board = Board::new();
    let state = board.root().join("var/lib/headgate-ota");
    fs::write(state.join(".headgate-left"), "").unwrap();
    let odd = board
        .root()
        .join("nix/var/nix/profiles/system-18446744073709551615-link");
    symlink("/nix/store/nowhere", odd).unwrap();
    board.publish("1.1.0", &[]);
    assert_eq!(board.ends_well(&["ota", "update"])["outcome"], "restart");
    assert_eq!(board.entries(), ["headgate-2+3.conf", "headgate-1.conf"]);
    assert!(!state.join(".headgate-left").exists());
}

#[test]
fn going_back_by_hand_lasts() {
    let mut board = Board::new();
    board.publish("1.1.0", &[]);
    let gateway = board.home.start();
    board.ends_well(&["ota", "update"]);
    board.boot();
    board.bless();
    board.ends_well(&["ota", "commit"]);
    gateway.kill();
    board.fails(&["ota", "rollback", "--to", "7"], "no generation 7");
    let value = board.ends_well(&["ota", "rollback", "--reason", "the line stood still"]);
    assert_eq!(value["generation"], 1);
    assert_eq!(board.boot(), "1.0.0");
    board.fails(&["ota", "update"], "the line stood still");
    board.fails(&["ota", "rollback"], "no generation to go back to");
    board.ends_well(&["ota", "gc"]);
    assert_eq!(board.entries(), ["headgate-1.conf"]);
}

#[test]
fn what_the_machine_can_not_do_is_told_before_anything_is_fetched() {
    let mut board = Board::new();
    board.publish("1.1.0", &[]);
    let nothing = board.store_paths();
    // Not through `run`, which mounts the boot partition.
    let ended = ended(board.home.command(&["--json", "ota", "update"]));
    assert!(
        ended.error.contains("not mounted") || ended.error.contains("no partition"),
        "{}",
        ended.error
    );

    let lock = fs::File::create(board.root().join("var/lib/headgate-ota/lock")).unwrap();
    lock.lock().unwrap();
    board.fails(&["ota", "update"], "another update is under way");
    drop(lock);

    fs::create_dir_all(board.root().join("nix/var/nix/db")).unwrap();
    fs::write(board.root().join("nix/var/nix/db/db.sqlite"), "").unwrap();
    board.fails(&["ota", "update"], "ota.nix_store");
    fs::remove_file(board.root().join("nix/var/nix/db/db.sqlite")).unwrap();

    board.home = board.home.clone().set("ota.min_free_bytes", "1048576GiB");
    board.fails(&["ota", "update"], "ota.min_free_bytes");
    board.home = board.home.clone().set("ota.min_free_bytes", 0);

    let efivars = board.root().join("sys/firmware/efi/efivars");
    let features = efivars.join(format!("LoaderFeatures-{VENDOR}"));
    let sound = fs::read(&features).unwrap();
    fs::write(&features, [0; 12]).unwrap();
    board.fails(&["ota", "update"], "does not count boots");
    fs::write(&features, sound).unwrap();
    fs::remove_file(efivars.join(format!("LoaderBootCountPath-{VENDOR}"))).unwrap();
    board.fails(
        &["ota", "update"],
        "no boot of this machine has ever been counted",
    );
    assert_eq!(board.store_paths(), nothing);
}

#[test]
fn damage_in_the_store_is_found_and_repaired() {
    let mut board = Board::new();
    let new = board.publish("1.1.0", &[]);
    board.ends_well(&["ota", "update"]);
    let place = board
        .root()
        .join("nix/store")
        .join(new.to_basename())
        .join("init");
    let writable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&place, writable).unwrap();
    fs::write(&place, "rotten").unwrap();
    let ended = board.run(&["ota", "scrub"]);
    assert_eq!(
        (ended.code, &ended.value["damaged"]),
        (1, &json!([new.to_string()]))
    );
    board.ends_well(&["ota", "scrub", "--repair"]);
    assert_eq!(fs::read_to_string(&place).unwrap(), "#!/bin/sh\n");
    assert_eq!(board.ends_well(&["ota", "scrub"])["damaged"], json!([]));
}

#[test]
fn an_update_that_is_killed_goes_on_where_it_was() {
    let mut board = Board::new();
    board.publish("1.1.0", &[]);
    let mut random = fastrand::Rng::new();
    for _ in 0..20 {
        let command = board.home.command(&["ota", "update"]);
        let esp = board.root().join("boot");
        let mut child = Command::new("unshare")
            .args([
                "--map-root-user",
                "--mount",
                "sh",
                "-c",
                "mount --bind \"$0\" \"$0\" && exec \"$@\"",
            ])
            .arg(&esp)
            .arg(command.get_program())
            .args(command.get_args())
            .envs(
                command
                    .get_envs()
                    .filter_map(|(name, value)| Some((name, value?))),
            )
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(random.u64(0..60)));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(["1.0.0", "1.1.0"].contains(&board.status()["version"].as_str().unwrap()));
        assert!(board.entries().contains(&"headgate-1.conf".to_owned()));
    }
    let outcome = eventually("the lock to be free", || {
        let ended = board.run(&["ota", "update"]);
        (ended.code == 0).then(|| ended.value["outcome"].clone())
    });
    assert_eq!(outcome, "restart");
    assert_eq!(board.boot(), "1.1.0");
    let found = board.ends_well(&["ota", "scrub"]);
    assert_eq!(found["damaged"], json!([]));
}
