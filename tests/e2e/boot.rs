//! `headgate boot` as NixOS calls it, on a partition that is mounted, full, read-only or not there.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::gateway::Home;

/// A machine: store, profile, EFI variables and EFI system partition below one folder.
struct Machine {
    home: Home,
    is_mounted: bool,
}

impl Machine {
    /// With a partition of this size. None: this user may not mount.
    fn new(size: &str) -> Option<Machine> {
        let mut machine = Machine::without_partition();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]);
        let mounted = mount.arg(machine.esp()).output();
        machine.is_mounted = mounted.is_ok_and(|output| output.status.success());
        if !machine.is_mounted {
            eprintln!("SKIPPED: mounting a file system needs root");
        }
        machine.is_mounted.then_some(machine)
    }

    fn without_partition() -> Machine {
        let machine = Machine {
            home: Home::new(),
            is_mounted: false,
        };
        for folder in ["boot", "run", "nix/var/nix/profiles"] {
            fs::create_dir_all(machine.root().join(folder)).unwrap();
        }
        machine
    }

    fn root(&self) -> &Path {
        self.home.path()
    }

    fn esp(&self) -> PathBuf {
        self.root().join("boot")
    }

    /// Builds a system with a kernel of `kernel_bytes`, as this generation.
    fn system(&self, generation: u64, name: &str, kernel_bytes: usize) -> String {
        let store = |name: &str| format!("/nix/store/{:0>32}-{name}", 0);
        let toplevel = store(name);
        let files = [
            (
                format!("{}/Image", store(&format!("linux-{name}"))),
                vec![b'k'; kernel_bytes],
            ),
            (
                format!("{}/initrd", store(&format!("initrd-{name}"))),
                b"initrd".to_vec(),
            ),
        ];
        let bootspec = json!({ "org.nixos.bootspec.v1": {
            "system": "aarch64-linux",
            "label": format!("NixOS {name}"),
            "kernel": files[0].0,
            "kernelParams": ["panic=10"],
            "initrd": files[1].0,
            "init": format!("{toplevel}/init"),
            "toplevel": toplevel,
        }});
        let boot_json = (
            format!("{toplevel}/boot.json"),
            bootspec.to_string().into_bytes(),
        );
        for (path, contents) in files.into_iter().chain([boot_json]) {
            let path = self.root().join(&path[1..]);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, contents).unwrap();
        }
        self.forget(generation);
        symlink(&toplevel, self.link(generation)).unwrap();
        toplevel
    }

    fn link(&self, generation: u64) -> PathBuf {
        let links = self.root().join("nix/var/nix/profiles");
        links.join(format!("system-{generation}-link"))
    }

    /// As `nix-env --delete-generations` does.
    fn forget(&self, generation: u64) {
        let _ = fs::remove_file(self.link(generation));
    }

    fn headgate(&self, args: &[&str]) -> Result<String, String> {
        let mut command = self.home.command(&["boot"]);
        command.args(args);
        command
            .arg("--root")
            .arg(self.root())
            .arg("--esp")
            .arg(self.esp());
        let output = command.output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        match output.status.success() {
            true => Ok(text(output.stdout)),
            false => Err(text(output.stderr)),
        }
    }

    fn list(&self) -> Value {
        serde_json::from_str(&self.headgate(&["list", "--json"]).unwrap()).unwrap()
    }

    /// Generations and their states, in the order in which they are booted.
    fn states(&self) -> Vec<(u64, String)> {
        let list = self.list();
        let entries = list["entries"].as_array().unwrap().iter();
        entries
            .map(|entry| {
                let state = entry["state"].as_str().unwrap().to_owned();
                (entry["generation"].as_u64().unwrap(), state)
            })
            .collect()
    }

    /// As if systemd-boot had started it.
    fn started(&self, entry: &str) {
        let efivars = self.root().join("sys/firmware/efi/efivars");
        fs::create_dir_all(&efivars).unwrap();
        for (name, value) in [
            ("LoaderEntrySelected", entry),
            ("LoaderInfo", "systemd-boot 257"),
        ] {
            let units = value.encode_utf16().chain([0]).flat_map(u16::to_le_bytes);
            let bytes: Vec<u8> = [6, 0, 0, 0].into_iter().chain(units).collect();
            let name = format!("{name}-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f");
            fs::write(efivars.join(name), bytes).unwrap();
        }
    }

    fn remount(&self, options: &str) {
        let mut mount = Command::new("mount");
        mount.args(["-o", &format!("remount,{options}")]);
        assert!(mount.arg(self.esp()).status().unwrap().success());
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.is_mounted {
            let _ = Command::new("umount")
                .arg("--lazy")
                .arg(self.esp())
                .status();
        }
    }
}

fn states(expected: &[(u64, &str)]) -> Vec<(u64, String)> {
    (expected.iter())
        .map(|(generation, state)| (*generation, (*state).to_owned()))
        .collect()
}

#[test]
fn a_switch_puts_the_new_generation_on_probation_and_blessing_ends_that() {
    let Some(machine) = Machine::new("8m") else {
        return;
    };
    for (generation, name) in [(1, "one"), (2, "two")] {
        let toplevel = machine.system(generation, name, 1000);
        let said = machine.headgate(&["install", &toplevel]).unwrap();
        assert!(said.contains(&toplevel), "{said}");
        machine.started(&format!("headgate-{generation}.conf"));
        if generation == 1 {
            let said = machine.headgate(&["bless"]).unwrap();
            assert_eq!(said, "generation 1 is good\n");
        }
    }
    assert_eq!(
        machine.states(),
        states(&[(2, "on probation"), (1, "good")])
    );
    let list = machine.list();
    assert_eq!(list["running"], 2);
    assert_eq!(list["counting"], "not-renamed", "its tries are all there");
    let said = machine.headgate(&["list"]).unwrap();
    assert!(said.contains("on probation  running  NixOS two"), "{said}");
}

#[test]
fn generations_that_the_profile_has_no_more_go_and_their_numbers_can_come_again() {
    let Some(machine) = Machine::new("8m") else {
        return;
    };
    for (generation, name) in [(1, "one"), (2, "two"), (3, "three")] {
        let toplevel = machine.system(generation, name, 1000);
        machine.headgate(&["install", &toplevel]).unwrap();
    }
    machine.started("headgate-1.conf");
    machine.forget(1);
    machine.forget(2);
    let toplevel = machine.system(3, "another", 1000);
    let said = machine.headgate(&["install", &toplevel]).unwrap();
    assert!(said.contains("removed generation 2"), "{said}");
    let kept = machine.list();
    let kept: Vec<&Value> = kept["entries"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| &e["toplevel"])
        .collect();
    assert_eq!(
        kept.len(),
        2,
        "the new one, and the one that runs: {kept:?}"
    );
    assert_eq!(kept[0], &toplevel);
}

#[test]
fn with_the_first_entry_comes_one_for_what_runs_so_that_there_is_a_way_back() {
    let Some(machine) = Machine::new("8m") else {
        return;
    };
    let before = machine.system(41, "before", 1000);
    symlink(&before, machine.root().join("run/booted-system")).unwrap();
    let toplevel = machine.system(42, "after", 1000);
    machine.headgate(&["install", &toplevel]).unwrap();
    assert_eq!(
        machine.states(),
        states(&[(42, "on probation"), (41, "good")])
    );
}

#[test]
fn a_system_that_is_in_no_generation_is_refused_with_the_remedy() {
    let Some(machine) = Machine::new("8m") else {
        return;
    };
    let toplevel = machine.system(1, "one", 1000);
    machine.forget(1);
    let error = machine.headgate(&["install", &toplevel]).unwrap_err();
    assert!(error.contains("no system-N-link in "), "{error}");
    assert!(error.contains("give --generation"), "{error}");
    machine
        .headgate(&["install", "--generation", "7", &toplevel])
        .unwrap();
}

#[test]
fn a_full_partition_is_found_out_before_the_first_byte() {
    let Some(machine) = Machine::new("1m") else {
        return;
    };
    let toplevel = machine.system(1, "one", 400_000);
    machine.headgate(&["install", &toplevel]).unwrap();
    machine.headgate(&["bless", "--generation", "1"]).unwrap();
    let toplevel = machine.system(2, "two", 900_000);
    let error = machine.headgate(&["install", &toplevel]).unwrap_err();
    assert!(error.contains("boot is full: 9"), "{error}");
    assert!(error.contains("headgate ota gc"), "{error}");
    assert_eq!(machine.states(), states(&[(1, "good")]));
    let kernels = fs::read_dir(machine.esp().join("EFI/headgate")).unwrap();
    assert_eq!(kernels.count(), 2, "kernel and initrd of the first");
    // With room it is as if nothing had been.
    machine.remount("size=4m");
    machine.headgate(&["install", &toplevel]).unwrap();
    assert_eq!(
        machine.states(),
        states(&[(2, "on probation"), (1, "good")])
    );
}

#[test]
fn what_an_interrupted_run_has_left_makes_room_for_the_next_one() {
    let Some(machine) = Machine::new("1m") else {
        return;
    };
    let toplevel = machine.system(1, "one", 600_000);
    let left = machine.esp().join("EFI/headgate/.headgate-unfinished");
    fs::create_dir_all(left.parent().unwrap()).unwrap();
    fs::write(&left, vec![0; 800_000]).unwrap();
    machine.headgate(&["install", &toplevel]).unwrap();
    assert!(!left.exists());
}

#[test]
fn a_read_only_partition_is_named_with_what_makes_it_so() {
    let Some(machine) = Machine::new("8m") else {
        return;
    };
    let toplevel = machine.system(1, "one", 1000);
    machine.remount("ro");
    let error = machine.headgate(&["install", &toplevel]).unwrap_err();
    assert!(error.contains("boot is read-only"), "{error}");
    assert!(error.contains("fsck.fat"), "{error}");
}

#[test]
fn a_partition_that_is_not_mounted_is_told_from_an_empty_one() {
    let machine = Machine::without_partition();
    let toplevel = machine.system(1, "one", 1000);
    for args in [
        &["install", &toplevel][..],
        &["list"],
        &["bless", "--generation", "1"],
    ] {
        let error = machine.headgate(args).unwrap_err();
        assert!(error.contains("not mounted there"), "{args:?}: {error}");
    }
    assert_eq!(fs::read_dir(machine.esp()).unwrap().count(), 0);
}
