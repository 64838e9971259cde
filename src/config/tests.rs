//! What a user meets: files, variables and flags in, a configuration or errors out.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::key::Kind;
use super::*;

/// What is said of `text` as `headgate.toml`, with each error cut down to "line:column: key: error".
fn errors_in(text: impl AsRef<[u8]>) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("headgate.toml");
    fs::write(&file, text).unwrap();
    short(Config::load(source(Some(file.clone()), &[])), &file)
}

/// Stands in no message.
const NO_FILE: &str = "/no/file";

fn short(result: Result<Resolved, ConfigErrors>, file: &Path) -> Vec<String> {
    let prefix = format!("{}:", file.display());
    match result {
        Ok(_) => Vec::new(),
        Err(errors) => errors
            .0
            .iter()
            .map(|problem| {
                problem
                    .to_string()
                    .replace(&prefix, "")
                    .replace("\n  help", "; help")
            })
            .collect(),
    }
}

fn loaded(text: &str) -> Resolved {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("headgate.toml");
    fs::write(&file, text).unwrap();
    Config::load(source(Some(file), &[])).unwrap_or_else(|errors| panic!("{errors}"))
}

fn source(file: Option<PathBuf>, env: &[(&str, &str)]) -> Source {
    Source {
        file,
        env: [("HOME", "/home/ada")]
            .iter()
            .chain(env)
            .map(|(name, value)| (name.into(), value.into()))
            .collect(),
        ..Source::default()
    }
}

fn with_env(env: &[(&str, &str)]) -> Result<Resolved, ConfigErrors> {
    Config::load(source(None, env))
}

fn errors_of_env(env: &[(&str, &str)]) -> Vec<String> {
    short(with_env(env), Path::new(NO_FILE))
}

fn origin_of<'r>(resolved: &'r Resolved, key: &str) -> &'r Origin {
    let setting = resolved
        .values()
        .iter()
        .find(|setting| setting.key.name == key);
    &setting.unwrap().origin
}

#[test]
fn without_file_and_variables_the_defaults_are_in_force() {
    let resolved = with_env(&[]).unwrap();
    let config = &resolved.config;
    let listen = config.mqtt.listen.as_ref().unwrap();
    assert_eq!(listen.to_string(), "127.0.0.1:1883");
    assert_eq!(listen.as_pair(), ("127.0.0.1", 1883));
    assert_eq!(config.mqtt.max_packet_bytes, 1 << 20);
    assert_eq!(config.store.max_bytes, 1 << 30);
    assert_eq!(
        config.store.path,
        Path::new("/home/ada/.local/state/headgate")
    );
    assert_eq!(
        config.admin.socket,
        Path::new("/home/ada/.local/state/headgate/admin.sock")
    );
    assert_eq!(config.pipeline.batch.max_events, 64);
    assert_eq!(config.log.format, LogFormat::Text);
    assert_eq!(
        config.metrics.listen.as_ref().map(ToString::to_string),
        Some("127.0.0.1:9464".to_owned())
    );
    assert_eq!(resolved.file, None);
}

#[test]
fn each_section_has_the_defaults_of_the_table() {
    let config = with_env(&[]).unwrap().config;
    assert_eq!(config.mqtt, MqttConfig::default());
    assert_eq!(config.pipeline, PipelineConfig::default());
    assert_eq!(config.pipeline.batch, BatchConfig::default());
    assert_eq!(config.apps, AppsConfig::default());
    assert_eq!(config.metrics, MetricsConfig::default());
    assert_eq!(config.log, LogConfig::default());
    assert_eq!(config.shutdown, ShutdownConfig::default());
}

#[test]
fn flags_win_over_variables_over_the_file_over_defaults() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("headgate.toml");
    fs::write(
        &file,
        "[mqtt]\nmax_inflight = 1\nreceive_maximum = 2\nmax_subscriptions = 3\n",
    )
    .unwrap();
    let mut source = source(
        Some(file),
        &[
            ("HEADGATE_MQTT_MAX_INFLIGHT", "10"),
            ("HEADGATE_MQTT_RECEIVE_MAXIMUM", "20"),
        ],
    );
    source.overrides.push(Override {
        key: "mqtt.max_inflight",
        value: "100".into(),
        flag: "--max-inflight",
    });
    let resolved = Config::load(source).unwrap();
    assert_eq!(resolved.config.mqtt.max_inflight, 100);
    assert_eq!(resolved.config.mqtt.receive_maximum, 20);
    assert_eq!(resolved.config.mqtt.max_subscriptions, 3);
    assert_eq!(resolved.config.mqtt.max_connections, 1024);
    let origin = |key| origin_of(&resolved, key).to_string();
    assert_eq!(origin("mqtt.max_inflight"), "flag --max-inflight");
    assert_eq!(
        origin("mqtt.receive_maximum"),
        "env HEADGATE_MQTT_RECEIVE_MAXIMUM"
    );
    assert!(origin("mqtt.max_subscriptions").ends_with("headgate.toml:4"));
    assert_eq!(origin("mqtt.max_connections"), "default");
}

#[test]
fn the_file_can_be_named_by_a_variable() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("other.toml");
    fs::write(&file, "mqtt.max_inflight = 7\n").unwrap();
    let resolved = with_env(&[("HEADGATE_CONFIG", file.to_str().unwrap())]).unwrap();
    assert_eq!(resolved.config.mqtt.max_inflight, 7);
    assert_eq!(resolved.file, Some(file));
}

#[test]
fn the_system_file_is_read_if_it_exists_and_no_other_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("headgate.toml");
    let mut source = source(None, &[]);
    source.system_file = Some(file.clone());
    assert_eq!(Config::load(source.clone()).unwrap().file, None);
    fs::write(&file, "[apps]\nworkers = 3\n").unwrap();
    assert_eq!(Config::load(source).unwrap().config.apps.workers, 3);
}

#[test]
fn sizes_are_numbers_or_have_units() {
    let text = "[mqtt]\nmax_packet_bytes = 4096\nmax_queued_bytes = \"3 MiB\"\n[store]\nmax_bytes = \"512MiB\"\n";
    let config = loaded(text).config;
    assert_eq!(config.mqtt.max_packet_bytes, 4096);
    assert_eq!(config.mqtt.max_queued_bytes, 3 << 20);
    assert_eq!(config.store.max_bytes, 512 << 20);
}

#[test]
fn the_size_of_the_store_is_rounded_up_to_whole_pages() {
    let config = loaded("store.max_bytes = 10_000_000\n").config;
    assert_eq!(config.store.max_bytes, 10_027_008);
    assert_eq!(config.store.max_bytes % 65_536, 0);
}

#[test]
fn the_listener_without_tls_can_be_switched_off_where_there_is_another() {
    for text in ["off", ""] {
        let text = format!("mqtt.listen = \"{text}\"\nmqtt.websocket.listen = \"[::1]:8083\"");
        let config = loaded(&text).config;
        assert_eq!(config.mqtt.listen, None);
        assert!(config.mqtt.websocket.listen.is_some());
    }
    let errors = errors_in("[mqtt]\nlisten = \"off\"\n[metrics]\nlisten = \"127.0.0.1:9464\"");
    assert_eq!(
        errors,
        [
            "2:10: mqtt.listen: no MQTT client could connect: mqtt.listen, mqtt.tls.listen, \
             mqtt.websocket.listen, mqtt.websocket.tls_listen are all off; help: set one of them to \
             where clients connect, such as mqtt.listen to \"127.0.0.1:1883\""
        ]
    );
    // What is wrong with the other is enough.
    let errors = errors_in("mqtt.listen = \"off\"\nmqtt.websocket.listen = \"nowhere\"");
    assert_eq!(errors.len(), 1, "{errors:?}");
}

#[test]
fn the_metrics_listener_can_be_switched_off() {
    for text in ["metrics.listen = \"off\"", "metrics.listen = \"\""] {
        assert_eq!(loaded(text).config.metrics.listen, None);
    }
    let config = with_env(&[("HEADGATE_METRICS_LISTEN", "")]).unwrap().config;
    assert_eq!(config.metrics.listen, None);
}

#[test]
fn ipv6_addresses_stand_in_brackets() {
    let config = loaded("mqtt.listen = \"[::1]:1884\"").config;
    let listen = config.mqtt.listen.unwrap();
    assert_eq!(listen.as_pair(), ("::1", 1884));
    assert_eq!(listen.to_string(), "[::1]:1884");
}

#[test]
fn the_store_goes_where_systemd_or_xdg_say() {
    let path = |env: &[(&str, &str)], superuser| {
        let mut source = source(None, env);
        source.superuser = superuser;
        Config::load(source).unwrap().config.store.path
    };
    let systemd = ("STATE_DIRECTORY", "/var/lib/a:/var/lib/b");
    let xdg = ("XDG_STATE_HOME", "/state");
    assert_eq!(path(&[systemd, xdg], true), Path::new("/var/lib/a"));
    assert_eq!(path(&[xdg], false), Path::new("/state/headgate"));
    assert_eq!(path(&[], true), Path::new("/var/lib/headgate"));
    let relative = ("XDG_STATE_HOME", "state");
    assert_eq!(
        path(&[relative], false),
        Path::new("/home/ada/.local/state/headgate")
    );
}

#[test]
fn the_admin_socket_goes_where_systemd_says_or_into_the_store() {
    let env = [("RUNTIME_DIRECTORY", "/run/headgate:/run/other")];
    let resolved = with_env(&env).unwrap();
    let socket = &resolved.config.admin.socket;
    assert_eq!(socket, Path::new("/run/headgate/admin.sock"));
    assert_eq!(
        origin_of(&resolved, "admin.socket").to_string(),
        "default from $RUNTIME_DIRECTORY"
    );
    let config = with_env(&[("HEADGATE_STORE_PATH", "/data")])
        .unwrap()
        .config;
    assert_eq!(config.admin.socket, Path::new("/data/admin.sock"));
}

#[test]
fn without_a_home_the_store_needs_a_path() {
    let errors = short(Config::load(Source::default()), Path::new(NO_FILE));
    assert_eq!(
        errors,
        [
            "default: store.path: nothing says where to keep the store: $HOME is not set; \
             help: set store.path in the configuration file or HEADGATE_STORE_PATH=/var/lib/headgate"
        ]
    );
}

#[test]
fn a_relative_path_counts_from_the_folder_of_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("headgate.toml");
    fs::write(&file, "store.path = \"state\"").unwrap();
    let config = Config::load(source(Some(file), &[])).unwrap().config;
    assert_eq!(config.store.path, folder.path().join("state"));
    let config = with_env(&[("HEADGATE_STORE_PATH", "state")])
        .unwrap()
        .config;
    assert_eq!(config.store.path, Path::new("state"));
}

#[test]
fn every_value_at_both_ends_of_its_range_is_usable() {
    for end in [0, 1] {
        for key in keys() {
            let (min, max) = match key.kind {
                Kind::Integer { min, max } | Kind::Bytes { min, max, .. } => (min, max),
                _ => continue,
            };
            let value = if end == 0 { min } else { max };
            // A queue of one app that holds the largest batch.
            let apps = ("HEADGATE_APPS_QUEUE_EVENTS", "1048576");
            let variable = key.variable();
            let own = (variable.as_str(), value.to_string());
            let mut env = vec![(own.0, own.1.as_str())];
            if own.0 != apps.0 {
                env.push(apps);
            } else {
                env.push(("HEADGATE_PIPELINE_BATCH_MAX_EVENTS", "1"));
            }
            let resolved = with_env(&env).unwrap_or_else(|errors| panic!("{errors}"));
            let setting = resolved
                .values()
                .iter()
                .find(|found| found.key.name == key.name);
            assert_eq!(setting.unwrap().value.to_json(), value, "{}", key.name);
            for outside in [i128::from(min) - 1, i128::from(max) + 1] {
                let outside = outside.to_string();
                let errors = errors_of_env(&[(own.0, &outside)]);
                let is_size = matches!(key.kind, Kind::Bytes { .. }) && outside.starts_with('-');
                let wanted = if is_size {
                    "is no size"
                } else {
                    "is out of range"
                };
                assert!(errors[0].contains(wanted), "{errors:?}");
            }
        }
    }
}

#[test]
fn every_key_is_named_by_one_variable_and_has_a_description() {
    let mut variables: Vec<_> = keys().map(Key::variable).collect();
    variables.sort();
    variables.dedup();
    assert_eq!(variables.len(), keys().count());
    assert!(variables.contains(&"HEADGATE_PIPELINE_BATCH_MAX_EVENTS".to_owned()));
    for key in keys() {
        assert!(key.description().ends_with('.'), "{}", key.name);
    }
}

#[test]
fn an_unknown_key_is_named_with_the_nearest_one() {
    assert_eq!(
        errors_in("[mqtt]\n  lisen = \"127.0.0.1:1883\"\n"),
        ["2:3: mqtt.lisen: unknown key; help: did you mean mqtt.listen?"]
    );
    assert_eq!(
        errors_in("[mqtt]\nmax-connections = 5\n"),
        ["2:1: mqtt.max-connections: unknown key; help: did you mean mqtt.max_connections?"]
    );
}

#[test]
fn a_key_in_the_wrong_table_is_sent_to_the_right_one() {
    assert_eq!(
        errors_in("[pipeline]\nmax_delay_us = 5\n"),
        [
            "2:1: pipeline.max_delay_us: unknown key; help: did you mean pipeline.batch.max_delay_us?"
        ]
    );
    assert_eq!(
        errors_in("max_inflight = 5\n"),
        ["1:1: max_inflight: unknown key; help: did you mean mqtt.max_inflight?"]
    );
}

#[test]
fn a_key_like_no_other_gets_a_way_to_list_them() {
    assert_eq!(
        errors_in("colour = \"red\"\n"),
        [
            "1:1: colour: unknown key; help: remove it; headgate config schema --markdown lists all keys"
        ]
    );
}

#[test]
fn an_unknown_table_is_one_error_and_not_one_for_each_key_in_it() {
    assert_eq!(
        errors_in("[mqqt]\nlisten = \"x\"\nmax_inflight = 3\n"),
        ["1:2: mqqt: unknown table; help: did you mean [mqtt]?"]
    );
    assert_eq!(
        errors_in("[pipeline.bach]\nmax_events = 3\n"),
        ["1:11: pipeline.bach: unknown table; help: did you mean [pipeline.batch]?"]
    );
}

#[test]
fn an_unknown_variable_is_named_with_the_nearest_one() {
    assert_eq!(
        errors_of_env(&[("HEADGATE_MQTT_LISEN", "x"), ("HEADGATE_COLOUR", "red")]),
        [
            "env HEADGATE_COLOUR: no key has this variable; \
             help: unset HEADGATE_COLOUR; headgate config schema --markdown lists all keys",
            "env HEADGATE_MQTT_LISEN: no key has this variable; \
             help: did you mean HEADGATE_MQTT_LISTEN?",
        ]
    );
}

#[test]
fn variables_of_the_demo_and_of_other_programs_are_left_alone() {
    let env = [
        ("HEADGATE_DEMO_RATE", "5"),
        ("MQTT_LISTEN", "x"),
        ("HEADGATECONFIG", "x"),
    ];
    assert!(with_env(&env).is_ok());
}

#[test]
fn a_wrong_type_says_what_is_expected_what_was_found_and_what_to_write() {
    assert_eq!(
        errors_in("[mqtt]\nlisten = 1883\nmax_inflight = \"32\"\nmax_packet_bytes = true\n"),
        [
            "2:10: mqtt.listen: expected \"host:port\" in quotes, found the integer 1883; \
             help: write listen = \"127.0.0.1:1883\" in [mqtt]",
            "3:16: mqtt.max_inflight: expected an integer, found the string \"32\"; \
             help: write max_inflight = 256 in [mqtt]",
            "4:20: mqtt.max_packet_bytes: expected a number of bytes or a string such as \"16MiB\", \
             found the boolean true; help: write max_packet_bytes = \"1MiB\" in [mqtt]",
        ]
    );
    assert_eq!(
        errors_in("[pipeline.batch]\nmax_events = 6.4e1\n[store]\npath = [\"/a\"]\n"),
        [
            "2:14: pipeline.batch.max_events: expected an integer, found the float 6.4e1; \
             help: write max_events = 64 in [pipeline.batch]",
            "4:8: store.path: expected a path in quotes, found an array; \
             help: write path = \"/var/lib/headgate\" in [store]",
        ]
    );
    assert_eq!(
        errors_of_env(&[("HEADGATE_MQTT_MAX_INFLIGHT", "many")]),
        [
            "env HEADGATE_MQTT_MAX_INFLIGHT: mqtt.max_inflight: expected an integer, found \"many\"; \
          help: set HEADGATE_MQTT_MAX_INFLIGHT=256"
        ]
    );
}

#[test]
fn a_value_in_the_place_of_a_table_and_the_other_way_round_are_wrong_types() {
    assert_eq!(
        errors_in("mqtt = 1883\n"),
        ["1:8: mqtt: expected a table, found the integer 1883; \
          help: write [mqtt] on a line of its own, and its keys below"]
    );
    assert_eq!(
        errors_in("[[mqtt]]\nlisten = \"127.0.0.1:1883\"\n").len(),
        1
    );
    assert_eq!(
        errors_in("[mqtt.listen]\nport = 1883\n"),
        [
            "1:1: mqtt.listen: expected \"host:port\" in quotes, found a table; \
          help: write listen = \"127.0.0.1:1883\" in [mqtt]"
        ]
    );
}

#[test]
fn a_value_out_of_range_says_the_range() {
    assert_eq!(
        errors_in(
            "[mqtt]\nmax_inflight = 65536\nmax_connections = -1\nmax_packet_bytes = \"1GiB\"\n"
        ),
        [
            "2:16: mqtt.max_inflight: 65536 is out of range: 1 to 65535; \
             help: write max_inflight = 256 in [mqtt]",
            "3:19: mqtt.max_connections: -1 is out of range: 1 to 100000; \
             help: write max_connections = 1024 in [mqtt]",
            "4:20: mqtt.max_packet_bytes: 1GiB is out of range: 64 to 268435455; \
             help: write max_packet_bytes = \"1MiB\" in [mqtt]",
        ]
    );
    let nines = "9".repeat(100);
    let errors = errors_in(format!("apps.workers = {nines}\n"));
    assert_eq!(
        errors,
        [
            "1:16: apps.workers: 999999999999999999999999… is out of range: 0 to 256; \
          help: write workers = 0 in [apps]"
        ]
    );
    let errors = errors_of_env(&[("HEADGATE_APPS_WORKERS", &nines)]);
    assert!(
        errors[0].contains("is out of range: 0 to 256"),
        "{errors:?}"
    );
}

#[test]
fn a_store_below_one_mebibyte_is_refused() {
    assert_eq!(
        errors_in("store.max_bytes = \"64KiB\"\n"),
        [
            "1:19: store.max_bytes: 64KiB is out of range: 1MiB to 256GiB; \
          help: write max_bytes = \"1GiB\" in [store]"
        ]
    );
}

#[test]
fn a_size_says_which_units_there_are() {
    for (text, why) in [
        ("1GB", "the units are B, KiB, MiB and GiB"),
        ("GiB", "it must be a whole number and a unit"),
        ("1.5GiB", "it must be a whole number and a unit"),
        ("", "it must be a whole number and a unit"),
        ("99999999999GiB", "it is too large to count"),
    ] {
        let errors = errors_of_env(&[("HEADGATE_STORE_MAX_BYTES", text)]);
        assert_eq!(
            errors,
            [format!(
                "env HEADGATE_STORE_MAX_BYTES: store.max_bytes: \"{text}\" is no size: {why}; \
                 help: set HEADGATE_STORE_MAX_BYTES=1GiB"
            )]
        );
    }
}

#[test]
fn an_address_says_what_is_wrong_with_it() {
    for (text, why) in [
        ("127.0.0.1", AddressError::NoPort),
        ("127.0.0.1:", AddressError::NoPort),
        ("[::1]", AddressError::NoPort),
        ("127.0.0.1:mqtt", AddressError::BadPort),
        ("127.0.0.1:65536", AddressError::BadPort),
        ("127.0.0.1:+1", AddressError::BadPort),
        (":1883", AddressError::NoHost),
        ("1883", AddressError::NoHost),
        ("::1:1883", AddressError::BareIpv6),
        ("::", AddressError::BareIpv6),
        ("127.0.0.300:1883", AddressError::BadHost),
        ("my host:1883", AddressError::BadHost),
        ("[gateway]:1883", AddressError::BadHost),
        ("tcp://gateway:1883", AddressError::BadHost),
        ("off", AddressError::NoPort),
    ] {
        assert_eq!(text.parse::<ListenAddress>(), Err(why), "{text}");
    }
    assert_eq!(
        errors_of_env(&[("HEADGATE_MQTT_LISTEN", "127.0.0.1")]),
        [
            "env HEADGATE_MQTT_LISTEN: mqtt.listen: \"127.0.0.1\" is no address: the port is missing; \
          help: set HEADGATE_MQTT_LISTEN=127.0.0.1:1883"
        ]
    );
}

#[test]
fn a_word_that_is_no_choice_gets_the_list_of_choices() {
    assert_eq!(
        errors_in("log.format = \"xml\"\n"),
        [
            "1:14: log.format: \"xml\" is none of \"text\", \"json\"; help: write format = \"text\" in [log]"
        ]
    );
}

#[test]
fn a_log_level_must_exist() {
    for good in [
        "debug",
        "off",
        "info,headgate::broker=trace",
        "WARN",
        "headgate[span]=debug",
    ] {
        assert!(with_env(&[("HEADGATE_LOG_LEVEL", good)]).is_ok(), "{good}");
    }
    assert_eq!(
        errors_of_env(&[("HEADGATE_LOG_LEVEL", "inof")]),
        [
            "env HEADGATE_LOG_LEVEL: log.level: \"inof\" is no log filter: no level \"inof\"; \
          did you mean info?; help: set HEADGATE_LOG_LEVEL=info"
        ]
    );
    for bad in ["", "info,loud", "headgate=loud", "a=b=c", "[[["] {
        let errors = errors_of_env(&[("HEADGATE_LOG_LEVEL", bad)]);
        assert!(errors[0].contains("is no log filter"), "{bad}: {errors:?}");
    }
}

#[test]
fn apps_are_named_one_by_one_or_all_at_once() {
    let gpio = |text| {
        with_env(&[("HEADGATE_APPS_GPIO", text)])
            .unwrap()
            .config
            .apps
            .gpio
    };
    for (text, a, b) in [
        ("", false, false),
        ("a", true, false),
        (" a ,b.c-d_e,b", true, true),
        ("*", true, true),
        (" * ", true, true),
        ("ab", false, false),
    ] {
        let apps = gpio(text);
        assert_eq!((apps.contains("a"), apps.contains("b")), (a, b), "{text:?}");
    }
    assert_eq!(
        errors_in("apps.sensors = \"a, Door\"\n"),
        [
            "1:16: apps.sensors: \"Door\" is no name of an app: names have the characters a-z 0-9 _ . - \
          and commas between them; help: write sensors = \"\" in [apps]"
        ]
    );
    for bad in ["a,,b", "a,*", "a b", "**", ",", ".a"] {
        let errors = errors_of_env(&[("HEADGATE_APPS_GPIO", bad)]);
        assert!(
            errors[0].contains("is no name of an app"),
            "{bad}: {errors:?}"
        );
    }
}

#[test]
fn a_path_that_no_file_can_have_is_refused() {
    assert_eq!(
        errors_in("store.path = \"~/headgate\"\n"),
        [
            "1:14: store.path: \"~/headgate\" is no usable path: ~ means your home folder only to a shell; \
          help: write path = \"/var/lib/headgate\" in [store]"
        ]
    );
    assert!(errors_in("store.path = \"\"\n")[0].contains("it is empty"));
    assert!(errors_in("store.path = \"a\\u0000b\"\n")[0].contains("control character"));
    assert!(errors_in("store.path = \"C:\\new\"\n")[0].contains("control character"));
}

#[test]
fn mqtt_and_metrics_cant_have_the_same_port() {
    let errors =
        errors_in("[mqtt]\nlisten = \"127.0.0.1:5000\"\n[metrics]\nlisten = \"127.0.0.1:5000\"\n");
    assert_eq!(errors.len(), 1);
    assert!(
        errors[0].starts_with(
            "4:10: metrics.listen: MQTT on 127.0.0.1:5000 (2) and metrics on 127.0.0.1:5000 (4)"
        ),
        "{errors:?}"
    );
    for (mqtt, metrics, collide) in [
        ("0.0.0.0:5000", "127.0.0.1:5000", true),
        ("[::]:5000", "127.0.0.1:5000", true),
        ("localhost:5000", "127.0.0.1:5000", true),
        ("gateway:5000", "GATEWAY:5000", true),
        ("[::ffff:127.0.0.1]:5000", "127.0.0.1:5000", true),
        ("127.0.0.2:5000", "127.0.0.1:5000", false),
        ("127.0.0.1:0", "127.0.0.1:0", false),
        ("127.0.0.1:5000", "127.0.0.1:5001", false),
        ("127.0.0.1:5000", "off", false),
    ] {
        let found = with_env(&[
            ("HEADGATE_MQTT_LISTEN", mqtt),
            ("HEADGATE_METRICS_LISTEN", metrics),
        ]);
        assert_eq!(found.is_err(), collide, "{mqtt} and {metrics}");
    }
}

#[test]
fn the_listener_with_tls_has_a_port_of_its_own_too() {
    let tls = "[mqtt.tls]\ncertificate = \"c\"\nkey = \"k\"\nlisten = ";
    assert!(
        loaded(&format!("{tls}\"[::]:8883\""))
            .config
            .mqtt
            .tls
            .listen
            .is_some()
    );
    for (port, other) in [(1883, "MQTT on"), (9464, "metrics on")] {
        let errors = errors_in(format!("{tls}\"0.0.0.0:{port}\""));
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert!(
            errors[0].contains("MQTT with TLS on 0.0.0.0:"),
            "{errors:?}"
        );
        assert!(errors[0].contains(other), "{errors:?}");
    }
}

#[test]
fn tls_needs_a_certificate_and_a_key() {
    let errors = errors_in("[mqtt.tls]\nlisten = \"[::]:8883\"\ncertificate = \"mqtt.crt\"");
    assert_eq!(
        errors,
        [
            "2:10: mqtt.tls.listen: TLS needs mqtt.tls.key, and it is not set; help: set \
             mqtt.tls.key to the file with the certificate's private key, such as \
             /etc/headgate/mqtt.key, or mqtt.tls.listen to \"off\""
        ]
    );
    let errors = errors_of_env(&[("HEADGATE_MQTT_TLS_LISTEN", "[::]:8883")]);
    assert_eq!(errors.len(), 2, "{errors:?}");
    let none = loaded("[mqtt.tls]\ncertificate = \"\"").config.mqtt.tls;
    assert_eq!((none.certificate, none.key), (None, None));
}

#[test]
fn websocket_with_tls_uses_the_files_of_tls() {
    let errors = errors_in("[mqtt.websocket]\ntls_listen = \"[::]:8084\"");
    assert_eq!(errors.len(), 2, "{errors:?}");
    assert!(
        errors[0].contains("mqtt.websocket.tls_listen: TLS needs mqtt.tls.certificate"),
        "{errors:?}"
    );
    let errors = errors_in("[mqtt.websocket]\nlisten = \"127.0.0.1:1883\"");
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert!(errors[0].contains("MQTT over WebSocket on"), "{errors:?}");
}

#[test]
fn the_path_of_the_websocket_is_one_that_browsers_send_as_it_is() {
    for path in ["/", "/mqtt", "/plant/7%20a"] {
        let text = format!("[mqtt.websocket]\npath = \"{path}\"");
        assert_eq!(loaded(&text).config.mqtt.websocket.path, path);
    }
    for (path, why) in [
        ("", "begin with /"),
        ("mqtt", "begin with /"),
        ("/a b", "must be escaped"),
        ("/a?b", "must be escaped"),
        ("/a#b", "must be escaped"),
        ("/ä", "must be escaped"),
        (&format!("/{}", "a".repeat(256)), "longer"),
    ] {
        let errors = errors_in(format!("[mqtt.websocket]\npath = \"{path}\""));
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert!(errors[0].contains(why), "{errors:?}");
    }
}

#[test]
fn certificates_of_clients_need_somebody_who_vouches_for_them_and_somebody_who_asks() {
    let ca = "client_ca = \"ca.crt\"";
    for wanted in ["required", "optional"] {
        let wanted = format!("[mqtt.tls]\nclient_certificates = \"{wanted}\"");
        let errors = errors_in(&wanted);
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert!(
            errors[0].contains("mqtt.tls.client_certificates: certificates can't be checked"),
            "{errors:?}"
        );
        assert!(
            loaded(&format!("{wanted}\n{ca}"))
                .config
                .mqtt
                .tls
                .client_ca
                .is_some()
        );
    }
    for key in ["client_ca", "client_crl"] {
        let errors = errors_in(format!("[mqtt.tls]\n{key} = \"file\""));
        assert_eq!(errors.len(), 1, "{errors:?}");
        assert!(
            errors[0].contains(&format!("mqtt.tls.{key}: clients are not asked")),
            "{errors:?}"
        );
    }
}

#[test]
fn a_conflict_with_a_default_blames_what_was_set() {
    let errors = errors_of_env(&[("HEADGATE_MQTT_LISTEN", "127.0.0.1:9464")]);
    assert_eq!(errors.len(), 1);
    assert!(
        errors[0].starts_with("env HEADGATE_MQTT_LISTEN: mqtt.listen: MQTT on 127.0.0.1:9464"),
        "{errors:?}"
    );
}

#[test]
fn a_socket_path_must_fit_into_its_107_bytes() {
    let path = |bytes: usize| format!("/{}", "s".repeat(bytes - 1));
    assert!(with_env(&[("HEADGATE_ADMIN_SOCKET", &path(107))]).is_ok());
    let errors = errors_of_env(&[("HEADGATE_ADMIN_SOCKET", &path(108))]);
    assert!(errors[0].contains("it has 108 bytes, and that of a Unix socket at most 107"));
    let errors = errors_of_env(&[("HEADGATE_STORE_PATH", &path(100))]);
    assert!(
        errors[0].starts_with("env HEADGATE_STORE_PATH: store.path: "),
        "{errors:?}"
    );
    assert!(
        errors[0].contains("set admin.socket to a shorter path"),
        "{errors:?}"
    );
}

#[test]
fn the_socket_cant_be_the_folder_of_the_store() {
    let errors = errors_in("[store]\npath = \"/data\"\n[admin]\nsocket = \"/data\"\n");
    assert_eq!(
        errors,
        [
            "4:10: admin.socket: the socket can't be where the store's folder is; \
          help: leave admin.socket out to have it in that folder"
        ]
    );
}

#[test]
fn a_batch_must_fit_into_the_queue_of_an_app() {
    let errors = errors_in("[apps]\nqueue_events = 10\n");
    assert_eq!(errors.len(), 1);
    assert!(
        errors[0].ends_with("help: set apps.queue_events to 64 or more"),
        "{errors:?}"
    );
}

#[test]
fn all_problems_are_reported_at_once_in_the_order_of_file_variables_flags() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("headgate.toml");
    fs::write(
        &file,
        "[store]\nmax_bytes = 1\n[mqtt]\nlisen = \"x\"\nlisten = 5\n",
    )
    .unwrap();
    let mut source = source(Some(file.clone()), &[("HEADGATE_APPS_EPOCH_MS", "0")]);
    source.overrides.push(Override {
        key: "log.level",
        value: "loud".into(),
        flag: "--log-level",
    });
    let errors = short(Config::load(source), &file);
    let starts = [
        "2:13: store.max_bytes: ",
        "4:1: mqtt.lisen: ",
        "5:10: mqtt.listen: ",
        "env HEADGATE_APPS_EPOCH_MS: apps.epoch_ms: ",
        "flag --log-level: log.level: ",
    ];
    assert_eq!(errors.len(), starts.len(), "{errors:?}");
    for (error, start) in errors.iter().zip(starts) {
        assert!(error.starts_with(start), "{error}");
    }
}

#[test]
fn a_wrong_value_in_the_file_is_an_error_even_if_a_variable_overrides_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("headgate.toml");
    fs::write(&file, "apps.workers = -1\n").unwrap();
    let source = source(Some(file.clone()), &[("HEADGATE_APPS_WORKERS", "2")]);
    assert_eq!(short(Config::load(source), &file).len(), 1);
}

#[test]
fn a_flag_for_a_key_that_does_not_exist_is_an_error() {
    let mut source = source(None, &[]);
    source.overrides.push(Override {
        key: "mqtt.colour",
        value: "red".into(),
        flag: "--colour",
    });
    let errors = short(Config::load(source), Path::new(NO_FILE));
    assert!(
        errors[0].starts_with("flag --colour: mqtt.colour: unknown key"),
        "{errors:?}"
    );
}

#[test]
fn a_key_that_stands_there_twice_is_named_beside_the_other_errors() {
    let errors = errors_in("[mqtt]\nmax_inflight = 1\nmax_inflight = 2\nlisten = 3\n");
    assert_eq!(
        errors,
        [
            "3:1: invalid TOML: duplicate key; help: a key can be set once: remove one of the two",
            "4:10: mqtt.listen: expected \"host:port\" in quotes, found the integer 3; \
             help: write listen = \"127.0.0.1:1883\" in [mqtt]",
        ]
    );
    let errors = errors_in("[mqtt]\nmax_inflight = 1\n[log]\n[mqtt]\n");
    assert_eq!(errors.len(), 1);
    assert!(errors[0].starts_with("4:"), "{errors:?}");
}

#[test]
fn a_syntax_error_has_a_line_and_hides_what_follows_from_it() {
    let errors = errors_in("[mqtt]\nlisten = 127.0.0.1:1883\nmax_inflight = 3\n");
    assert_eq!(
        errors,
        ["2:15: invalid TOML: invalid float; \
          help: put the value in quotes: listen = \"127.0.0.1:1883\""]
    );
    let errors = errors_in("[mqtt\nlisten = \"127.0.0.1:1883\"\n");
    assert_eq!(errors.len(), 1, "{errors:?}");
    assert!(errors[0].starts_with("1:"), "{errors:?}");
    for text in [
        "listen",
        "= 5",
        "a = \"b",
        "a = [1, 2",
        "a = {b = 1",
        "a = 'b\n'",
        "\u{0}",
    ] {
        let errors = errors_in(text);
        assert!(errors[0].contains("invalid TOML"), "{text}: {errors:?}");
    }
}

#[test]
fn two_syntax_errors_in_two_lines_are_both_named() {
    let errors = errors_in("[mqtt]\nlisten = 127.0.0.1:1883\n[log]\nlevel = info\n");
    assert_eq!(errors.len(), 2, "{errors:?}");
    assert!(errors[1].starts_with("4:"), "{errors:?}");
}

#[test]
fn columns_count_characters() {
    assert_eq!(
        errors_in("# é\nmqtt = { \"größe\" = 1 }\n"),
        ["2:10: mqtt.\"größe\": unknown key; help: remove it; \
          headgate config schema --markdown lists all keys"]
    );
}

#[test]
fn a_file_that_is_not_utf_8_is_refused_with_the_place() {
    assert_eq!(
        errors_in(b"[log]\nlevel = \"\xff\"\n"),
        [
            "2:10: this file is not UTF-8; help: save the file in UTF-8; the first wrong byte is at this place"
        ]
    );
}

#[test]
fn files_written_on_windows_are_read() {
    let config = loaded("\u{feff}[mqtt]\r\nmax_inflight = 5\r\n").config;
    assert_eq!(config.mqtt.max_inflight, 5);
}

#[test]
fn a_missing_file_is_an_error_when_it_was_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("missing.toml");
    let errors = Config::load(source(Some(file.clone()), &[])).unwrap_err();
    let text = errors.to_string();
    assert!(
        text.starts_with(&format!("{}: can't read this file: ", file.display())),
        "{text}"
    );
    assert!(text.contains("--config or HEADGATE_CONFIG"), "{text}");
}

#[test]
fn a_folder_in_the_place_of_the_file_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let errors = Config::load(source(Some(folder.path().to_owned()), &[])).unwrap_err();
    assert_eq!(
        errors.to_string(),
        format!(
            "{}: this is a folder, not a file\n  help: name the file in it",
            folder.path().display()
        )
    );
}

#[test]
fn a_file_without_end_is_not_read_to_its_end() {
    let errors = Config::load(source(Some("/dev/zero".into()), &[])).unwrap_err();
    assert!(
        errors.to_string().contains("larger than 262144 bytes"),
        "{errors}"
    );
}

#[test]
fn an_empty_file_is_fine() {
    assert_eq!(loaded("").config, with_env(&[]).unwrap().config);
}

#[test]
fn errors_dont_carry_control_characters_to_the_terminal() {
    let errors = errors_in("\"\\u001b[31m\" = 1\nlog.format = \"\\u001b[31m\"\n");
    assert_eq!(errors.len(), 2);
    let has_escape = errors.iter().any(|error| error.contains('\u{1b}'));
    assert!(!has_escape, "{errors:?}");
}

#[test]
fn values_that_are_not_utf_8_are_errors_except_in_paths() {
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt;
    let wild = OsString::from_vec(b"/data/\xff".to_vec());
    let mut with_path = source(None, &[]);
    with_path
        .env
        .push(("HEADGATE_STORE_PATH".into(), wild.clone()));
    let config = Config::load(with_path).unwrap().config;
    assert_eq!(config.store.path.as_os_str(), wild);
    let mut with_level = source(None, &[]);
    with_level.env.push(("HEADGATE_LOG_LEVEL".into(), wild));
    assert!(Config::load(with_level).is_err());
}

#[test]
fn the_file_in_the_documentation_sets_every_key_to_its_default() {
    let document = markdown();
    let (_, file) = document.rsplit_once("```toml\n").unwrap();
    let (file, _) = file.split_once("```").unwrap();
    let resolved = loaded(file);
    assert!(
        resolved
            .values()
            .iter()
            .all(|setting| matches!(setting.origin, Origin::File { .. }))
    );
    let mut config = resolved.config;
    let defaults = with_env(&[]).unwrap().config;
    config.store.path.clone_from(&defaults.store.path);
    config.admin.socket.clone_from(&defaults.admin.socket);
    assert_eq!(config, defaults);
}

/// Lines that are nearly TOML, so that more than the parser is tried out.
fn nearly_toml() -> impl Strategy<Value = String> {
    let name = prop::sample::select(vec![
        "store",
        "path",
        "mqtt",
        "listen",
        "pipeline",
        "batch",
        "max_events",
        "log",
        "level",
        "admin",
        "socket",
        "metrics",
        "max_bytes",
        "\"\"",
        "é",
    ]);
    let value = prop_oneof![
        any::<i64>().prop_map(|number| number.to_string()),
        any::<f64>().prop_map(|number| number.to_string()),
        "[ -~é]{0,12}".prop_map(|text| format!("{text:?}")),
        "[0-9.:\\[\\]a-z]{0,12}".prop_map(|text| format!("'{text}'")),
        Just("{}".to_owned()),
        Just("[[1], {a = 2}]".to_owned()),
        Just("1979-05-27T07:32:00Z".to_owned()),
        "[ -~]{0,8}",
    ];
    let dotted = prop::collection::vec(name, 1..4).prop_map(|names| names.join("."));
    let line = prop_oneof![
        dotted.clone().prop_map(|name| format!("[{name}]")),
        dotted.clone().prop_map(|name| format!("[[{name}]]")),
        (dotted, value).prop_map(|(name, value)| format!("{name} = {value}")),
    ];
    prop::collection::vec(line, 0..12).prop_map(|lines| lines.join("\n"))
}

/// Either a configuration or errors that say where they are and what to do.
fn is_answered(bytes: &[u8]) -> Result<(), TestCaseError> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("headgate.toml");
    fs::write(&file, bytes)?;
    if let Err(errors) = Config::load(source(Some(file), &[])) {
        prop_assert!(!errors.0.is_empty());
        for problem in &errors.0 {
            prop_assert!(!problem.remedy.is_empty());
            prop_assert!(matches!(problem.origin, Origin::File { .. }), "{}", problem);
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn any_bytes_give_a_configuration_or_errors(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        is_answered(&bytes)?;
    }

    #[test]
    fn any_text_gives_a_configuration_or_errors(text in "\\PC{0,100}") {
        is_answered(text.as_bytes())?;
    }

    #[test]
    fn anything_like_toml_gives_a_configuration_or_errors(text in nearly_toml()) {
        is_answered(text.as_bytes())?;
    }

    #[test]
    fn any_value_of_a_variable_gives_a_configuration_or_errors(
        index in 0..100_usize,
        value in prop_oneof!["\\PC{0,40}", "[0-9]{1,30}", "[0-9A-Za-z.:=,\\[\\]{}/-]{0,30}"],
    ) {
        let key = keys().cycle().nth(index).expect("there are keys");
        let variable = key.variable();
        if let Err(errors) = with_env(&[(&variable, &value)]) {
            prop_assert!(!errors.to_string().is_empty());
        }
    }
}
