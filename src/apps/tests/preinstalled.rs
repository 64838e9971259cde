//! Apps that are part of the system.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::house::*;
use crate::apps::{
    AppErrorKind, AppState, Apps, AppsConfig, Compiler, Origin, Target, compile_ahead,
};

/// A folder of preinstalled apps in a temporary folder that a house lives in too.
struct System {
    home: Arc<tempfile::TempDir>,
}

impl System {
    fn new() -> System {
        let home = Arc::new(tempfile::tempdir().unwrap());
        fs::create_dir(home.path().join("system")).unwrap();
        System { home }
    }

    fn folder(&self) -> PathBuf {
        self.home.path().join("system")
    }

    /// Puts in an app with `file`, called `app.wasm` or `app.cwasm`.
    fn add(&self, name: &str, file: &str, contents: &[u8]) -> PathBuf {
        let folder = self.folder().join(name);
        fs::create_dir_all(&folder).unwrap();
        let manifest = format!("component = \"app.wasm\"\n{}", manifest(name));
        fs::write(folder.join("manifest.toml"), manifest).unwrap();
        fs::write(folder.join(file), contents).unwrap();
        folder
    }

    /// Puts in an app, compiled for this machine.
    fn add_compiled(&self, name: &str) -> PathBuf {
        self.add(name, "app.cwasm", &compiled())
    }

    /// A gateway without a compiler.
    fn device(&self) -> House {
        House::at(self.home.clone(), self.config(Compiler::Absent))
    }

    fn config(&self, compiler: Compiler) -> impl FnOnce(&mut AppsConfig) + use<> {
        let folder = self.folder();
        move |config| {
            config.preinstalled = Some(folder);
            config.compiler = compiler;
        }
    }

    /// Why the only app here, called "a", doesn't run.
    fn reason(&self) -> String {
        let info = self.device().until_state("a", AppState::Quarantined);
        info.reason.unwrap()
    }
}

fn compiled() -> Vec<u8> {
    compile_ahead(&guest(""), &Target::new(None, None).unwrap()).unwrap()
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn a_precompiled_app_runs_without_a_compiler() {
    let system = System::new();
    system.add_compiled("a");
    let house = system.device();
    house.until_state("a", AppState::Running);
    house.assert_works("a");
    let info = house.info("a");
    assert_eq!(info.origin, Origin::Preinstalled);
    assert_eq!(info.component_bytes, guest("").len() as u64);
}

#[test]
fn a_component_is_compiled_where_there_is_a_compiler_and_kept_compiled() {
    let system = System::new();
    system.add("a", "app.wasm", &guest(""));
    let house = House::at(system.home.clone(), system.config(Compiler::InProcess));
    house.until_state("a", AppState::Running);
    house.assert_works("a");
    let house = house.reopen(system.config(Compiler::Absent));
    house.until_state("a", AppState::Running);
}

#[test]
fn without_a_compiler_a_component_says_what_to_do() {
    let system = System::new();
    system.add("a", "app.wasm", &guest(""));
    let reason = system.reason();
    assert!(reason.contains("this gateway has no compiler"), "{reason}");
    assert!(reason.contains("`headgate app compile`"), "{reason}");

    let error = system.device().apps.install(&manifest("b"), &guest(""));
    let error = error.unwrap_err();
    assert_eq!(error.kind(), AppErrorKind::Conflict);
    assert!(
        error
            .to_string()
            .starts_with("app b: this gateway has no compiler")
    );
}

#[test]
fn a_stopped_app_stays_stopped_and_starts_again() {
    let system = System::new();
    system.add_compiled("a");
    system.add_compiled("b");
    let house = system.device();
    assert_eq!(house.apps.stop("b").unwrap().state, AppState::Stopped);
    let house = house.reopen(system.config(Compiler::Absent));
    house.until_state("a", AppState::Running);
    assert_eq!(house.info("b").state, AppState::Stopped);
    assert_eq!(house.apps.start("b").unwrap().state, AppState::Running);
    house.assert_works("b");
    let house = house.reopen(system.config(Compiler::Absent));
    house.until_state("b", AppState::Running);
}

#[test]
fn it_can_be_neither_replaced_nor_removed() {
    let system = System::new();
    system.add_compiled("a");
    let house = House::at(system.home.clone(), system.config(Compiler::InProcess));
    for error in [
        house.apps.remove("a").unwrap_err(),
        house.apps.install(&manifest("a"), &guest("")).unwrap_err(),
    ] {
        assert_eq!(error.kind(), AppErrorKind::Conflict);
        assert!(
            error.to_string().contains("app a is part of the system"),
            "{error}"
        );
        assert!(
            error.to_string().contains("`headgate app stop a`"),
            "{error}"
        );
    }
    house.assert_works("a");
}

#[test]
fn it_hides_an_installed_app_of_its_name_and_gives_it_back_when_it_goes() {
    let system = System::new();
    let house = House::at(system.home.clone(), |_| {});
    house.install("a");
    let folder = system.add_compiled("a");
    let house = house.reopen(system.config(Compiler::InProcess));
    assert_eq!(house.info("a").origin, Origin::Preinstalled);
    assert_eq!(house.apps.list().len(), 1);
    fs::remove_dir_all(folder).unwrap();
    let house = house.reopen(system.config(Compiler::Absent));
    house.until_state("a", AppState::Running);
    assert_eq!(house.info("a").origin, Origin::Installed);
}

#[test]
fn a_damaged_file_never_runs_and_keeps_nobody_else_from_running() {
    let system = System::new();
    system.add_compiled("b");
    let mut file = compiled();
    let middle = file.len() / 2;
    file[middle] ^= 0x10;
    system.add("a", "app.cwasm", &file);
    let house = system.device();
    let reason = house
        .until_state("a", AppState::Quarantined)
        .reason
        .unwrap();
    assert!(
        reason.contains("a/app.cwasm: it is damaged (its checksum is wrong)"),
        "{reason}"
    );
    house.until_state("b", AppState::Running);
    house.assert_works("b");
    let error = house.apps.start("a").unwrap_err().to_string();
    assert!(error.contains("its checksum is wrong"), "{error}");
    drop(house);

    system.add("a", "app.cwasm", &compiled()[..100]);
    assert!(system.reason().contains("it is damaged"));
    system.add("a", "app.cwasm", &guest(""));
    assert!(system.reason().contains("it is no precompiled app"));
    system.add("a", "app.cwasm", b"");
    assert!(system.reason().contains("it is no precompiled app"));
}

#[test]
fn code_for_another_machine_is_refused_by_name() {
    let system = System::new();
    let other = match cfg!(target_arch = "x86_64") {
        true => "aarch64-unknown-linux-gnu",
        false => "x86_64-unknown-linux-gnu",
    };
    let target = Target::new(Some(other), None).unwrap();
    system.add(
        "a",
        "app.cwasm",
        &compile_ahead(&guest(""), &target).unwrap(),
    );
    let reason = system.reason();
    assert!(
        reason.contains(&format!("compiled for {other} (generic)")),
        "{reason}"
    );
    assert!(reason.contains("doesn't fit this gateway"), "{reason}");
}

#[test]
fn what_is_wrong_with_a_folder_is_named_with_its_file() {
    let system = System::new();
    let folder = system.add_compiled("a");
    fs::remove_file(folder.join("app.cwasm")).unwrap();
    assert!(
        system.reason().contains("app.cwasm nor "),
        "{}",
        system.reason()
    );

    fs::write(folder.join("manifest.toml"), manifest("b")).unwrap();
    let reason = system.reason();
    assert!(
        reason.contains("the app is called \"b\" there, and its folder \"a\""),
        "{reason}"
    );

    fs::write(folder.join("manifest.toml"), "name = \"a\"\nversion = 1\n").unwrap();
    assert!(
        system.reason().contains("a/manifest.toml: line 2"),
        "{}",
        system.reason()
    );

    fs::remove_file(folder.join("manifest.toml")).unwrap();
    assert!(
        system.reason().contains("a/manifest.toml: No such file"),
        "{}",
        system.reason()
    );
}

#[test]
fn what_others_could_have_written_is_not_run() {
    let system = System::new();
    let folder = system.add_compiled("a");
    for path in [
        folder.join("app.cwasm"),
        folder.join("manifest.toml"),
        folder.clone(),
    ] {
        let before = fs::metadata(&path).unwrap().permissions().mode();
        chmod(&path, before | 0o002);
        let reason = system.reason();
        assert!(reason.contains("others may write to"), "{reason}");
        assert!(
            reason.contains(&format!("chmod go-w {}", path.display())),
            "{reason}"
        );
        chmod(&path, before);
    }
    let house = system.device();
    house.until_state("a", AppState::Running);
}

#[test]
fn files_and_hidden_folders_beside_the_apps_do_not_count() {
    let system = System::new();
    fs::write(system.folder().join("README"), "").unwrap();
    fs::create_dir(system.folder().join(".git")).unwrap();
    assert!(system.device().apps.list().is_empty());
}

#[test]
fn a_folder_that_is_none_is_named() {
    let system = System::new();
    let error = |path: PathBuf| {
        let mut config = config(system.home.path());
        config.preinstalled = Some(path);
        let house = House::new();
        let opened = Apps::open(
            config,
            store(system.home.path()),
            house.routes.clone(),
            house.sink.clone(),
            Arc::new(|| {}),
            house.dead_letters.clone(),
        );
        match opened {
            Ok(_) => panic!("it was opened"),
            Err(error) => error.to_string(),
        }
    };
    let missing = system.home.path().join("missing");
    assert!(error(missing.clone()).contains(missing.to_str().unwrap()));
    let file = system.home.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(error(file).contains("not a folder"));
    chmod(&system.folder(), 0o777);
    assert!(error(system.folder()).contains("others may write to"));
}

#[test]
fn a_way_that_others_can_change_is_not_gone() {
    let system = System::new();
    let folder = system.add_compiled("a");
    // Behind a link, in a folder that anybody may write to.
    let open = system.home.path().join("open");
    fs::create_dir(&open).unwrap();
    fs::rename(folder.join("app.cwasm"), open.join("app.cwasm")).unwrap();
    std::os::unix::fs::symlink(open.join("app.cwasm"), folder.join("app.cwasm")).unwrap();
    chmod(&open, 0o777);
    let reason = system.reason();
    assert!(
        reason.contains(&format!("chmod go-w {}", open.display())),
        "{reason}"
    );
    chmod(&open, 0o755);
    let house = system.device();
    house.until_state("a", AppState::Running);
}

#[test]
fn what_is_no_regular_file_keeps_nobody_waiting() {
    let system = System::new();
    let folder = system.add_compiled("a");
    for name in ["app.cwasm", "manifest.toml"] {
        let path = folder.join(name);
        let kept = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let fifo = std::process::Command::new("mkfifo")
            .arg("-m600")
            .arg(&path)
            .status();
        assert!(fifo.unwrap().success());
        let reason = system.reason();
        assert!(
            reason.contains(&format!("{name}: not a regular file")),
            "{reason}"
        );
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        assert!(!system.reason().is_empty());
        fs::remove_file(&path).unwrap();
        fs::write(&path, kept).unwrap();
    }
}
