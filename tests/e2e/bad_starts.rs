//! A gateway that can't start says why: exit code 1, and one error that names what is wrong.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use crate::gateway::Home;
use crate::mosquitto;

/// What is said about a configuration file, which is named and not repeated here.
fn refusal_of_file(text: &str) -> String {
    let home = Home::new();
    let file = home.path().join("headgate.toml");
    std::fs::write(&file, text).unwrap();
    let command = home.command(&["run", "--config", file.to_str().unwrap()]);
    let message = home.refusal_of(command);
    let place = format!("{}:", file.display());
    assert!(message.contains(&place), "{message}");
    assert!(!home.store().exists(), "nothing was touched");
    message.replace(&place, "FILE:")
}

#[test]
fn an_unknown_key_is_named_with_its_line_and_the_key_that_was_meant() {
    let message = refusal_of_file("[mqtt]\n\nlissten = \"127.0.0.1:1883\"\n");
    assert!(
        message.contains("FILE:3:1: mqtt.lissten: unknown key"),
        "{message}"
    );
    assert!(message.contains("mqtt.listen"), "{message}");
    let message = refusal_of_file("[pipline.batch]\nmax_events = 1\n");
    assert!(message.contains("FILE:1"), "{message}");
    assert!(message.contains("pipeline"), "{message}");
}

#[test]
fn a_value_of_the_wrong_type_is_named_with_its_line_and_what_is_expected() {
    let message = refusal_of_file("[pipeline.batch]\nmax_events = \"many\"\n");
    assert!(
        message.contains("FILE:2:14: pipeline.batch.max_events"),
        "{message}"
    );
    assert!(message.contains("expected"), "{message}");
}

#[test]
fn an_impossible_value_is_named_with_what_is_allowed() {
    let message = refusal_of_file("[pipeline.batch]\nmax_events = 0\n");
    assert!(message.contains("FILE:2"), "{message}");
    assert!(message.contains("1 to 4096"), "{message}");
}

#[test]
fn a_file_that_is_no_toml_is_named_with_the_line() {
    let message = refusal_of_file("[mqtt]\nlisten = \n");
    assert!(message.contains("FILE:2"), "{message}");
    assert!(message.contains("invalid TOML"), "{message}");
}

#[test]
fn every_mistake_is_told_at_once() {
    let message = refusal_of_file("[mqtt]\nlissten = 1\nmax_connections = -1\n[log]\nformat = 1\n");
    for place in ["FILE:2", "FILE:3", "FILE:5"] {
        assert!(message.contains(place), "{message}");
    }
}

#[test]
fn a_variable_that_is_wrong_or_unknown_is_named() {
    let message = Home::new().set("mqtt.max_connections", "lots").refusal();
    assert!(
        message.contains("HEADGATE_MQTT_MAX_CONNECTIONS"),
        "{message}"
    );
    let message = Home::new().set("mqtt.max_conections", "1").refusal();
    assert!(
        message.contains("HEADGATE_MQTT_MAX_CONECTIONS"),
        "{message}"
    );
    assert!(
        message.contains("HEADGATE_MQTT_MAX_CONNECTIONS"),
        "{message}"
    );
}

#[test]
fn a_configuration_file_that_is_not_there_is_named() {
    let home = Home::new();
    let message = home.refusal_of(home.command(&["run", "--config", "no/such.toml"]));
    assert!(message.contains("no/such.toml"), "{message}");
}

#[test]
fn a_port_in_use_is_named_with_its_key() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    for key in ["mqtt.listen", "metrics.listen"] {
        let home = Home::new().set(key, address);
        let message = home.refusal();
        assert!(message.contains(key), "{message}");
        assert!(message.contains(&address.to_string()), "{message}");
        assert!(message.contains("another process listens"), "{message}");
        assert!(!home.store().exists(), "nothing was touched");
    }
}

#[test]
fn an_admin_socket_of_another_gateway_is_left_to_it() {
    let gateway = Home::new().start();
    let socket = gateway.home().store().join("admin.sock");
    let message = Home::new().set("admin.socket", socket.display()).refusal();
    assert!(message.contains("admin.socket"), "{message}");
    assert!(message.contains(socket.to_str().unwrap()), "{message}");
    assert_eq!(
        gateway.json(&["status"])["ready"],
        true,
        "the first one still answers"
    );
}

#[test]
fn a_second_gateway_on_the_same_store_is_told_which_process_has_it() {
    let gateway = Home::new().start();
    let message = gateway.home().refusal();
    let store = gateway.home().store();
    assert!(message.contains(store.to_str().unwrap()), "{message}");
    let process = format!("process {}", gateway.id());
    assert!(message.contains(&process), "{message}");
    let subscriber = mosquitto::subscribe(&gateway, &["-t", "a"]);
    mosquitto::publish(&gateway, &["-t", "a", "-m", "still here"]);
    assert_eq!(subscriber.line(), "still here");
}

/// Starts with a store that somebody has prepared; what is said about it, with its path.
fn refusal_of_store(prepare: impl FnOnce(&Path)) -> String {
    let home = Home::new();
    prepare(&home.store());
    let message = home.refusal();
    let store = home.store();
    assert!(message.contains(store.to_str().unwrap()), "{message}");
    message
}

#[test]
fn a_store_that_is_a_file_is_named() {
    let message = refusal_of_store(|store| std::fs::write(store, "").unwrap());
    assert!(message.contains("not a folder"), "{message}");
    assert!(message.contains("store.path"), "{message}");
}

#[test]
fn a_store_below_a_file_is_named() {
    let home = Home::new().set("store.path", "file/store");
    std::fs::write(home.path().join("file"), "").unwrap();
    let message = home.refusal();
    assert!(message.contains("file/store"), "{message}");
    assert!(message.contains("store.path"), "{message}");
}

#[test]
fn a_store_where_nothing_can_be_written_is_named() {
    const NOBODY: u32 = 65_534;
    const OWNER_READS_ONLY: u32 = 0o500;
    let mut home = Home::new().set("store.path", "locked/store");
    // Root may write everywhere, so for root somebody else tries, who has to get at the program.
    let program = home.path().join("headgate");
    std::fs::copy(env!("CARGO_BIN_EXE_headgate"), &program).unwrap();
    home = home.with_program(program);
    let set_mode = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    set_mode(home.path(), 0o755);
    let locked = home.path().join("locked");
    std::fs::create_dir(&locked).unwrap();
    set_mode(&locked, OWNER_READS_ONLY);
    let mut command: Command = home.command(&["run"]);
    // SAFETY: a call that can't fail and touches no memory.
    #[allow(unsafe_code)]
    if unsafe { libc::geteuid() } == 0 {
        command.uid(NOBODY);
    }
    let message = home.refusal_of(command);
    set_mode(&locked, 0o700);
    assert!(message.contains("locked/store"), "{message}");
    assert!(message.contains("ermission denied"), "{message}");
    assert!(message.contains("let the gateway's user"), "{message}");
}

#[test]
fn a_store_with_something_else_in_the_place_of_its_files_is_named() {
    for file in ["lock", "lmdb/data.mdb"] {
        refusal_of_store(|store| std::fs::create_dir_all(store.join(file)).unwrap());
    }
    refusal_of_store(|store| {
        std::fs::create_dir_all(store).unwrap();
        std::fs::write(store.join("lmdb"), "").unwrap();
    });
}

#[test]
fn a_store_full_of_rubbish_is_named() {
    let message = refusal_of_store(|store| {
        std::fs::create_dir_all(store.join("lmdb")).unwrap();
        std::fs::write(store.join("lmdb/data.mdb"), [0x5a; 20_000]).unwrap();
    });
    assert!(message.contains("damaged"), "{message}");
}

#[test]
fn a_store_of_a_newer_schema_is_named_with_both_versions_and_stays_as_it_is() {
    let home = Home::new().start().kill();
    set_schema(&home.store(), 7);
    for _ in 0..2 {
        let message = home.refusal();
        assert!(
            message.contains(home.store().to_str().unwrap()),
            "{message}"
        );
        assert!(message.contains("version 7"), "{message}");
        assert!(message.contains("up to 1"), "{message}");
    }
    set_schema(&home.store(), 1);
    home.start();
}

fn set_schema(store: &Path, version: u32) {
    use heed::CommitOrAbort;
    use heed::types::{Bytes, Str};
    let mut options = heed::EnvOpenOptions::new();
    options.max_dbs(32);
    // SAFETY: no gateway runs on this store.
    #[allow(unsafe_code)]
    let env = unsafe { options.open(store.join("lmdb")) }.unwrap();
    let txn = env.write_txn().unwrap();
    env.create_databases_and_commit(txn, |opener, txn| -> heed::Result<_> {
        let meta = opener.create_database::<Str, Bytes>(txn, Some("meta"))?;
        meta.put(txn, "schema", &version.to_le_bytes())?;
        Ok(CommitOrAbort::<_, ()>::Commit(meta))
    })
    .unwrap();
    env.prepare_for_closing().wait();
}
