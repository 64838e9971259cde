//! Systems are installed, blessed, condemned and removed, and the power goes at each step of it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::esp::interruption;
use super::*;

/// A machine's store and its EFI system partition.
struct Machine {
    folder: tempfile::TempDir,
}

/// All files of a folder with what is in them.
type Files = BTreeMap<PathBuf, String>;

fn toplevel(name: &str) -> String {
    format!("/nix/store/{:0>32}-nixos-system-{name}", name.len())
}

impl Machine {
    fn new() -> Machine {
        let machine = Machine {
            folder: tempfile::tempdir().unwrap(),
        };
        fs::create_dir_all(machine.esp().path()).unwrap();
        machine
    }

    fn root(&self) -> &Path {
        self.folder.path()
    }

    fn esp(&self) -> Esp {
        Esp::offline(self.root().join("boot"))
    }

    /// Puts a system into the store, with this kernel.
    fn system(&self, name: &str, kernel: &str) -> String {
        let toplevel = toplevel(name);
        let files = [
            (
                format!("/nix/store/{:0>32}-linux-{kernel}/Image", 1),
                format!("kernel {kernel}"),
            ),
            (
                format!("/nix/store/{:0>32}-initrd-{kernel}/initrd", 2),
                format!("initrd {kernel}"),
            ),
        ];
        let bootspec = json!({ "org.nixos.bootspec.v1": {
            "system": "aarch64-linux",
            "label": format!("NixOS {name}"),
            "kernel": files[0].0,
            "initrd": files[1].0,
            "kernelParams": ["panic=10"],
            "init": format!("{toplevel}/init"),
            "toplevel": toplevel,
        }});
        let boot_json = (format!("{toplevel}/boot.json"), bootspec.to_string());
        for (path, contents) in files.into_iter().chain([boot_json]) {
            let path = self.root().join(&path[1..]);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, contents).unwrap();
        }
        toplevel
    }

    fn install(&self, generation: u64, toplevel: &str) -> Result<Installed, BootError> {
        self.install_with(generation, toplevel, false)
    }

    fn install_with(
        &self,
        generation: u64,
        toplevel: &str,
        replaces: bool,
    ) -> Result<Installed, BootError> {
        install(
            &self.esp(),
            &Install {
                root: self.root(),
                toplevel,
                generation,
                tries: Some(3),
                version: None,
                replaces,
            },
        )
    }

    /// With generation 1, which is good.
    fn with_a_good_one() -> Machine {
        let machine = Machine::new();
        let toplevel = machine.system("a", "6.1");
        machine.install(1, &toplevel).unwrap();
        bless(&machine.esp(), 1).unwrap();
        machine
    }

    fn files(&self) -> Files {
        let mut files = Files::new();
        let mut folders = vec![self.esp().path().to_owned()];
        while let Some(folder) = folders.pop() {
            for file in fs::read_dir(folder).unwrap() {
                let path = file.unwrap().path();
                match path.is_dir() {
                    true => folders.push(path),
                    false => {
                        let below = path.strip_prefix(self.esp().path()).unwrap();
                        files.insert(below.to_owned(), fs::read_to_string(&path).unwrap());
                    }
                }
            }
        }
        files
    }

    /// The entries, as their files are called, in the order in which they are taken.
    fn entries(&self) -> Vec<String> {
        (self.esp().entries().unwrap().iter())
            .map(|entry| entry.file.file_name().unwrap().to_str().unwrap().to_owned())
            .collect()
    }

    /// What the machine boots next, which must be whole: with kernel and initrd of one system.
    fn boots(&self) -> u64 {
        let entries = self.esp().entries().unwrap();
        let first = &entries[0];
        assert_eq!(first.broken, None, "{first:?}");
        let text = fs::read_to_string(&first.file).unwrap();
        let file = |key: &str| {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(key))
                .unwrap();
            fs::read_to_string(self.esp().path().join(&line[2..])).unwrap()
        };
        let (kernel, initrd) = (file("linux"), file("initrd"));
        assert_eq!(
            kernel.strip_prefix("kernel "),
            initrd.strip_prefix("initrd ")
        );
        assert!(kernel.starts_with("kernel 6."), "{kernel}");
        first.generation
    }

    fn put(&self, file: &str, contents: &str) {
        let path = self.esp().path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, contents).unwrap();
    }
}

/// Does `change` on a machine that `prepare` makes, with the power cut after each of its steps: something
/// whole boots then, and when it is done again, all is as if it had not been cut. Says what booted.
fn cut_after_each_step(
    prepare: impl Fn() -> Machine,
    change: impl Fn(&Machine) -> Result<(), BootError>,
) -> Vec<u64> {
    let whole = prepare();
    change(&whole).unwrap();
    let expected = whole.files();
    let mut booted = Vec::new();
    loop {
        let machine = prepare();
        interruption::after(Some(booted.len()));
        let result = change(&machine);
        interruption::after(None);
        if result.is_ok() {
            assert_eq!(machine.files(), expected);
            return booted;
        }
        booted.push(machine.boots());
        change(&machine).unwrap();
        assert_eq!(
            machine.files(),
            expected,
            "after a cut at step {}",
            booted.len()
        );
    }
}

#[test]
fn a_system_is_installed_with_its_tries_and_boots_before_the_one_before() {
    let machine = Machine::with_a_good_one();
    let toplevel = machine.system("bb", "6.2");
    let installed = machine.install(2, &toplevel).unwrap();
    assert!(installed.is_new);
    assert_eq!(machine.entries(), ["headgate-2+3.conf", "headgate-1.conf"]);
    assert_eq!(machine.boots(), 2);
    let entry = &machine.esp().entries().unwrap()[0];
    assert_eq!(entry.toplevel.as_ref(), Some(&toplevel));
    assert_eq!(entry.title.as_deref(), Some("NixOS bb"));
}

#[test]
fn what_is_installed_already_stays_as_it_is_with_the_tries_that_it_has_had() {
    let machine = Machine::with_a_good_one();
    let toplevel = machine.system("bb", "6.2");
    machine.install(2, &toplevel).unwrap();
    let entries = machine.esp().path().join("loader/entries");
    fs::rename(
        entries.join("headgate-2+3.conf"),
        entries.join("headgate-2+1-2.conf"),
    )
    .unwrap();
    let before = machine.files();
    assert!(!machine.install(2, &toplevel).unwrap().is_new);
    assert_eq!(machine.files(), before);
}

#[test]
fn a_bad_generation_that_is_installed_again_gets_new_tries() {
    let machine = Machine::with_a_good_one();
    let toplevel = machine.system("bb", "6.2");
    machine.install(2, &toplevel).unwrap();
    condemn(&machine.esp(), 2).unwrap();
    assert_eq!(
        machine.entries(),
        ["headgate-1.conf", "headgate-2+0-100.conf"]
    );
    machine.install(2, &toplevel).unwrap();
    assert_eq!(machine.entries(), ["headgate-2+3.conf", "headgate-1.conf"]);
}

#[test]
fn systems_with_one_kernel_share_it_and_it_stays_until_the_last_of_them_goes() {
    let machine = Machine::with_a_good_one();
    let toplevel = machine.system("bb", "6.1");
    machine.install(2, &toplevel).unwrap();
    let kernels = machine.esp().path().join("EFI/headgate");
    let count = || fs::read_dir(&kernels).unwrap().count();
    assert_eq!(count(), 2);
    let third = machine.system("ccc", "6.3");
    machine.install(3, &third).unwrap();
    assert_eq!(count(), 4);
    remove(&machine.esp(), 1).unwrap();
    assert_eq!(count(), 4);
    remove(&machine.esp(), 2).unwrap();
    assert_eq!(count(), 2);
    assert_eq!(machine.boots(), 3);
}

#[test]
fn a_kernel_that_rotted_on_the_partition_is_written_again() {
    let machine = Machine::with_a_good_one();
    let kernels = machine.esp().path().join("EFI/headgate");
    for file in fs::read_dir(kernels).unwrap() {
        // As fsck.fat truncates what it finds linked twice.
        fs::write(file.unwrap().path(), "").unwrap();
    }
    let entry = &machine.esp().entries().unwrap()[0];
    assert!(
        entry.broken.as_ref().unwrap().contains("missing or empty"),
        "{entry:?}"
    );
    assert!(machine.install(1, &toplevel("a")).unwrap().is_new);
    assert_eq!(machine.boots(), 1);
    assert_eq!(
        machine.entries(),
        ["headgate-1.conf"],
        "it is as good as it was"
    );
}

#[test]
fn a_number_that_another_system_has_is_refused_unless_it_is_to_be_replaced() {
    let machine = Machine::with_a_good_one();
    let toplevel = machine.system("bb", "6.2");
    let before = machine.files();
    let error = machine.install(1, &toplevel).unwrap_err().to_string();
    assert!(
        error.contains("headgate-1.conf starts /nix/store/"),
        "{error}"
    );
    assert!(error.contains("generation 1 can't be both"), "{error}");
    assert_eq!(machine.files(), before);
    machine.install_with(1, &toplevel, true).unwrap();
    assert_eq!(machine.entries(), ["headgate-1+3.conf"]);
    assert_eq!(machine.boots(), 1);
}

#[test]
fn an_installation_cut_at_any_step_leaves_what_booted_and_is_finished_by_another_run() {
    let booted = cut_after_each_step(Machine::with_a_good_one, |machine| {
        let toplevel = machine.system("bb", "6.2");
        machine.install(2, &toplevel).map(|_| ())
    });
    assert!(booted.len() > 10, "{booted:?}");
    let first_new = booted
        .iter()
        .position(|generation| *generation == 2)
        .unwrap();
    assert!(
        booted[..first_new]
            .iter()
            .all(|generation| *generation == 1),
        "{booted:?}"
    );
    assert!(
        booted[first_new..]
            .iter()
            .all(|generation| *generation == 2),
        "{booted:?}"
    );
    assert!(
        first_new >= booted.len() - 2,
        "the entry comes last: {booted:?}"
    );
}

#[test]
fn an_installation_in_the_place_of_a_bad_or_other_one_can_be_cut_at_any_step() {
    let prepare = || {
        let machine = Machine::with_a_good_one();
        let toplevel = machine.system("bb", "6.2");
        machine.install(2, &toplevel).unwrap();
        condemn(&machine.esp(), 2).unwrap();
        machine
    };
    cut_after_each_step(prepare, |machine| {
        machine.install(2, &toplevel("bb")).map(|_| ())
    });
    cut_after_each_step(prepare, |machine| {
        let toplevel = machine.system("ccc", "6.3");
        machine.install_with(2, &toplevel, true).map(|_| ())
    });
}

#[test]
fn blessing_condemning_and_removing_can_be_cut_at_any_step() {
    let prepare = || {
        let machine = Machine::with_a_good_one();
        let toplevel = machine.system("bb", "6.2");
        machine.install(2, &toplevel).unwrap();
        machine
    };
    for change in [bless, condemn, remove] {
        let booted = cut_after_each_step(prepare, |machine| change(&machine.esp(), 2));
        assert!(booted.len() >= 2, "{booted:?}");
    }
}

#[test]
fn the_boot_loader_is_written_if_it_differs_and_can_be_cut_at_any_step() {
    let prepare = || {
        let machine = Machine::with_a_good_one();
        fs::write(machine.root().join("systemd-boot.efi"), "new").unwrap();
        fs::write(machine.root().join("loader.conf"), "default headgate-*\n").unwrap();
        machine.put("EFI/BOOT/BOOTAA64.EFI", "old");
        machine
    };
    let change = |machine: &Machine| {
        let loader_conf = machine.root().join("loader.conf");
        install_loader(
            &machine.esp(),
            &Loader {
                systemd_boot: &machine.root().join("systemd-boot.efi"),
                loader_conf: Some(&loader_conf),
                arch: "aa64",
            },
        )
    };
    cut_after_each_step(prepare, change);
    let machine = prepare();
    change(&machine).unwrap();
    let files = machine.files();
    for file in ["EFI/BOOT/BOOTAA64.EFI", "EFI/systemd/systemd-bootaa64.efi"] {
        assert_eq!(files[Path::new(file)], "new", "{file}");
    }
    interruption::after(Some(0));
    let again = change(&machine);
    interruption::after(None);
    again.expect("nothing differs, so nothing is written");
}

#[test]
fn of_two_entries_for_one_generation_one_is_left_and_the_good_one_stays_good() {
    // As a power cut in the middle of a renaming leaves them.
    let machine = Machine::with_a_good_one();
    let entries = machine.esp().path().join("loader/entries");
    fs::copy(
        entries.join("headgate-1.conf"),
        entries.join("headgate-1+2-1.conf"),
    )
    .unwrap();
    machine.install(1, &toplevel("a")).unwrap();
    assert_eq!(machine.entries(), ["headgate-1.conf"]);
    fs::copy(
        entries.join("headgate-1.conf"),
        entries.join("headgate-1+2-1.conf"),
    )
    .unwrap();
    bless(&machine.esp(), 1).unwrap();
    assert_eq!(machine.entries(), ["headgate-1.conf"]);
}

#[test]
fn of_two_entries_of_which_fsck_has_emptied_one_the_other_is_taken() {
    let machine = Machine::with_a_good_one();
    let entries = machine.esp().path().join("loader/entries");
    fs::rename(
        entries.join("headgate-1.conf"),
        entries.join("headgate-1+2-1.conf"),
    )
    .unwrap();
    machine.put("loader/entries/headgate-1.conf", "");
    assert_eq!(
        machine.entries(),
        ["headgate-1+2-1.conf", "headgate-1.conf"]
    );
    bless(&machine.esp(), 1).unwrap();
    assert_eq!(machine.entries(), ["headgate-1.conf"]);
    assert_eq!(machine.boots(), 1);
}

#[test]
fn files_of_others_are_left_alone_however_broken_and_their_kernels_too() {
    let machine = Machine::with_a_good_one();
    machine.put("loader/entries/nixos-generation-3.conf", "\u{0}\u{1}linux");
    machine.put(
        "loader/entries/mine.conf",
        "linux /EFI/headgate/mine-kernel.efi\n",
    );
    machine.put("EFI/headgate/mine-kernel.efi", "mine");
    machine.put("EFI/headgate/orphan-kernel.efi", "nobody's");
    fs::create_dir(machine.esp().path().join("loader/entries/headgate-9.conf")).unwrap();
    let toplevel = machine.system("bb", "6.2");
    machine.install(2, &toplevel).unwrap();
    let files = machine.files();
    assert!(files.contains_key(Path::new("loader/entries/nixos-generation-3.conf")));
    assert!(files.contains_key(Path::new("EFI/headgate/mine-kernel.efi")));
    assert!(!files.contains_key(Path::new("EFI/headgate/orphan-kernel.efi")));
    assert_eq!(machine.entries(), ["headgate-2+3.conf", "headgate-1.conf"]);
}

#[test]
fn the_last_entry_that_boots_is_neither_condemned_nor_removed() {
    let machine = Machine::with_a_good_one();
    machine.put("loader/entries/headgate-2.conf", "title without a kernel\n");
    let before = machine.files();
    for change in [condemn, remove] {
        let error = change(&machine.esp(), 1).unwrap_err().to_string();
        assert!(
            error.contains("no other entry that boots than generation 1"),
            "{error}"
        );
        assert_eq!(machine.files(), before);
    }
}

#[test]
fn a_generation_that_is_not_there_is_named() {
    let machine = Machine::with_a_good_one();
    for change in [bless, condemn] {
        let error = change(&machine.esp(), 5).unwrap_err().to_string();
        assert!(error.contains("no entry for generation 5"), "{error}");
    }
    remove(&machine.esp(), 5).unwrap();
}

#[test]
fn a_system_that_is_damaged_is_refused_before_anything_is_written() {
    let machine = Machine::with_a_good_one();
    let toplevel = machine.system("bb", "6.2");
    let before = machine.files();
    let kernel = machine
        .root()
        .join(format!("nix/store/{:0>32}-linux-6.2/Image", 1));
    let refused = || machine.install(2, &toplevel).unwrap_err().to_string();

    fs::write(&kernel, "").unwrap();
    assert!(
        refused().contains("linux-6.2/Image: it is empty"),
        "{}",
        refused()
    );
    fs::remove_file(&kernel).unwrap();
    assert!(refused().contains("opening /nix/store/"), "{}", refused());
    fs::write(
        machine.root().join(format!("{}/boot.json", &toplevel[1..])),
        "rubbish",
    )
    .unwrap();
    assert!(
        refused().contains("boot.json: expected value"),
        "{}",
        refused()
    );
    fs::remove_dir_all(machine.root().join(&toplevel[1..])).unwrap();
    assert!(
        refused().contains("boot.json: No such file"),
        "{}",
        refused()
    );
    let error = machine
        .install(2, "/run/current-system")
        .unwrap_err()
        .to_string();
    assert!(error.contains("a system is a store path"), "{error}");
    assert_eq!(machine.files(), before);
}

#[test]
fn a_folder_of_the_root_file_system_is_no_partition_and_neither_is_none() {
    let machine = Machine::new();
    let esp = Esp::new(machine.esp().path());
    let error = esp.entries().unwrap_err().to_string();
    assert!(error.contains("is not mounted there"), "{error}");
    let error = bless(&esp, 1).unwrap_err().to_string();
    assert!(error.contains("is not mounted there"), "{error}");
    let error = Esp::new(machine.root().join("efi"))
        .entries()
        .unwrap_err()
        .to_string();
    assert!(error.contains("/efi is not there"), "{error}");
    assert_eq!(machine.files(), Files::new());
}

#[test]
fn one_writes_at_a_time_and_the_other_is_told() {
    let machine = Machine::with_a_good_one();
    let esp = machine.esp();
    let writer = esp.writer().unwrap();
    let error = bless(&machine.esp(), 1).unwrap_err().to_string();
    assert!(error.contains("another program is writing"), "{error}");
    drop(writer);
    bless(&machine.esp(), 1).unwrap();
}
