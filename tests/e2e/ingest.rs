//! TCP ingest as producers have it: frames over real sockets.

use std::collections::HashSet;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use headgate::ingest::frame::{Answer, Code, Hello, Priority, write_frame};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::Value;
use socket2::SockRef;

use crate::access::{SECRET, hs256, now_s};
use crate::apps::built;
use crate::gateway::{Gateway, Home, PATIENCE, eventually, finished};
use crate::journal;
use crate::overload::resident;
use crate::tls::{Authority, mutual};
use crate::wire::Wire;

fn home() -> Home {
    Home::new().set("ingest.listen", "127.0.0.1:0")
}

/// The same, with a user `press` whose password is `secret`.
fn home_with_login() -> Home {
    let home = home().set("mqtt.auth.anonymous", "never");
    let mut command = home.command(&[
        "user",
        "add",
        "--password-stdin",
        "press",
        "--file",
        "users",
    ]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"secret\n").unwrap();
    assert!(child.wait().unwrap().success());
    home.set("mqtt.auth.password_file", "users")
}

fn address(gateway: &Gateway) -> SocketAddr {
    let status = gateway.status();
    status["ingest"]["listen"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap()
}

/// A frame as EventStreamCore's producers write it.
fn v1(topic: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    write_frame(Priority::Medium, None, topic, payload, &mut frame);
    frame
}

fn v2(id: u64, topic: &str, payload: &str) -> Vec<u8> {
    frame(Priority::Medium, id, topic, payload)
}

/// Of version 2.
pub fn frame(priority: Priority, id: u64, topic: &str, payload: &str) -> Vec<u8> {
    let mut frame = Vec::new();
    let (topic, payload) = (topic.as_bytes(), payload.as_bytes());
    write_frame(priority, Some(id), topic, payload, &mut frame);
    frame
}

fn hello(name: &str, token: &str) -> Vec<u8> {
    let (name, token) = (name.to_owned(), token.to_owned());
    let mut bytes = Vec::new();
    Hello { name, token }.write(&mut bytes).unwrap();
    bytes
}

/// One connection.
pub struct Producer {
    socket: TcpStream,
    input: Vec<u8>,
}

impl Producer {
    fn connect(gateway: &Gateway) -> Producer {
        let socket = TcpStream::connect(address(gateway)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Producer {
            socket,
            input: Vec::new(),
        }
    }

    /// With version 2.
    pub fn greet(gateway: &Gateway, name: &str) -> Producer {
        let mut producer = Producer::connect(gateway);
        producer.send(&hello(name, ""));
        assert!(matches!(producer.next(), Some(Answer::Welcome { .. })));
        producer
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    /// The next answer; none if the gateway has closed the connection.
    fn next(&mut self) -> Option<Answer> {
        loop {
            if let Some((answer, size)) = Answer::first(&self.input).unwrap() {
                self.input.drain(..size);
                return Some(answer);
            }
            let mut bytes = [0; 4096];
            match self.socket.read(&mut bytes) {
                Ok(0) => return None,
                Ok(count) => self.input.extend_from_slice(&bytes[..count]),
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Waits until all up to `id` is acknowledged.
    pub fn until_acknowledged(&mut self, id: u64) {
        loop {
            match self.next() {
                Some(Answer::Ack { id: acknowledged }) if acknowledged >= id => return,
                Some(Answer::Ack { .. }) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    fn until_refused(&mut self) -> (u8, String) {
        loop {
            match self.next() {
                Some(Answer::Refused { code, text }) => {
                    assert_eq!(self.next(), None, "the connection is closed");
                    return (code, text);
                }
                Some(_) => {}
                None => panic!("closed without a word"),
            }
        }
    }
}

/// The payloads in the journal.
fn journaled(home: &Home) -> HashSet<String> {
    let payload = |record: &Value| record["payload"].as_str().unwrap().to_owned();
    journal::records(home).iter().map(payload).collect()
}

fn send_in_both_ways(gateway: &Gateway) {
    let mut subscriber = Wire::connect(gateway, "subscriber");
    subscriber.subscribe("plant/#", 1);
    gateway.install(&built("relay"));
    subscriber.subscribe("relayed/#", 0);
    let mut producer = Producer::connect(gateway);
    // In pieces, as networks have it.
    for piece in [v1(b"plant/a", b"old"), v1(b"relay/a", b"through")]
        .concat()
        .chunks(5)
    {
        producer.send(piece);
    }
    let message = subscriber.next_message();
    assert_eq!(
        (message.topic(), message.payload()),
        ("plant/a", &b"old"[..])
    );
    assert_eq!(subscriber.next_message().payload(), b"through");
    let mut producer = Producer::greet(gateway, "press");
    let large = "x".repeat(1 << 20);
    producer.send(&[v2(1, "plant/b", "new"), v2(5, "plant/b", &large[..900_000])].concat());
    assert_eq!(subscriber.next_message().payload(), b"new");
    assert_eq!(subscriber.next_message().payload().len(), 900_000);
    producer.until_acknowledged(5);
    let status = gateway.assert_adds_up();
    let ingest = &status["ingest"];
    assert_eq!(
        (&ingest["accepted"], &ingest["denied"], &ingest["frames"]),
        (&4.into(), &0.into(), &4.into())
    );
    // What the app has made went through, too.
    assert_eq!(status["pipeline"]["accepted"], 5);
    let (_, metrics) = gateway.http("/metrics");
    assert!(
        metrics.contains("headgate_ingest_frames_total{result=\"accepted\"} 4"),
        "{metrics}"
    );
}

#[test]
fn frames_of_both_versions_reach_subscribers_and_apps() {
    let gateway = home().start();
    assert!(gateway.log().contains("listening for frames"));
    send_in_both_ways(&gateway);
}

#[test]
fn without_io_uring_all_is_the_same() {
    let gateway = home().set("ingest.io_uring", "false").start();
    assert_eq!(gateway.status()["ingest"]["io"], "epoll");
    send_in_both_ways(&gateway);
}

#[test]
fn many_frames_at_once_all_arrive_in_their_order() {
    let gateway = home().start();
    let mut subscriber = Wire::connect(&gateway, "subscriber");
    subscriber.subscribe("t/#", 1);
    const COUNT: u64 = 50_000;
    let mut producer = Producer::greet(&gateway, "press");
    let mut sender = producer.socket.try_clone().unwrap();
    let sending = thread::spawn(move || {
        for chunk in (1..=COUNT).collect::<Vec<_>>().chunks(1000) {
            let frames: Vec<_> = chunk
                .iter()
                .flat_map(|id| v2(*id, &format!("t/{}", id % 7), &id.to_string()))
                .collect();
            sender.write_all(&frames).unwrap();
        }
    });
    for id in 1..=COUNT {
        assert_eq!(
            subscriber.next_message().payload(),
            id.to_string().as_bytes()
        );
    }
    sending.join().unwrap();
    producer.until_acknowledged(COUNT);
    gateway.assert_adds_up();
}

#[test]
fn what_was_acknowledged_is_on_disk_whenever_the_gateway_is_killed() {
    let mut home = home().set("journal.topics", "plant/#");
    let mut acknowledged = HashSet::new();
    for round in 0..15u64 {
        let gateway = home.start();
        let progress = AtomicU64::new(0);
        let rounds: Vec<u64> = thread::scope(|scope| {
            let producers: Vec<_> = (0..3u64)
                .map(|client| {
                    let (gateway, progress) = (&gateway, &progress);
                    scope.spawn(move || produce_until_the_end(gateway, client, round, progress))
                })
                .collect();
            while progress.load(Ordering::SeqCst) < 200 + 50 * round {
                thread::yield_now();
            }
            gateway.signal(libc::SIGKILL);
            let ids = producers.into_iter().map(|one| one.join().unwrap());
            ids.collect()
        });
        home = gateway.kill();
        for (client, last) in rounds.into_iter().enumerate() {
            acknowledged.extend((1..=last).map(|id| format!("{client}-{round}-{id}")));
        }
        let on_disk = journaled(&home);
        let lost: Vec<_> = acknowledged.difference(&on_disk).collect();
        assert!(lost.is_empty(), "{lost:?}");
    }
}

/// Sends without waiting for anything. Returns the last id that was acknowledged.
fn produce_until_the_end(gateway: &Gateway, client: u64, round: u64, progress: &AtomicU64) -> u64 {
    let mut producer = Producer::greet(gateway, &format!("client{client}"));
    let mut sender = producer.socket.try_clone().unwrap();
    let sending = thread::spawn(move || {
        for id in 1.. {
            let frame = v2(id, "plant/a", &format!("{client}-{round}-{id}"));
            if sender.write_all(&frame).is_err() {
                return;
            }
        }
    });
    let mut last = 0;
    while let Some(answer) = producer.next() {
        let Answer::Ack { id } = answer else {
            panic!("{answer:?}");
        };
        progress.fetch_add(id - last, Ordering::SeqCst);
        last = id;
    }
    sending.join().unwrap();
    last
}

#[test]
fn an_acknowledgement_waits_for_the_disk() {
    let gateway = home().set("journal.topics", "plant/#").start();
    // In the place of the first segment.
    let segment = gateway.home().first_segment();
    fs::create_dir(&segment).unwrap();
    let mut producer = Producer::greet(&gateway, "press");
    producer.send(&v2(1, "plant/a", "x"));
    gateway.until_logged("the journal can't be written");
    let mut other = Producer::greet(&gateway, "other");
    other.send(&v2(1, "elsewhere", "y"));
    other.until_acknowledged(1);
    producer.socket.set_nonblocking(true).unwrap();
    let nothing = producer.socket.read(&mut [0]).unwrap_err();
    assert_eq!(nothing.kind(), ErrorKind::WouldBlock);
    producer.socket.set_nonblocking(false).unwrap();
    fs::remove_dir(&segment).unwrap();
    producer.until_acknowledged(1);
}

#[test]
fn what_comes_again_under_the_same_name_and_id_is_a_duplicate() {
    let home = home();
    let rules = "[[rule]]\ntopics = ['orders/#']\ndedup = 'id'\n";
    fs::write(home.path().join("rules.toml"), rules).unwrap();
    let gateway = home.set("pipeline.rules_file", "rules.toml").start();
    for (name, ids) in [("a", [1, 2]), ("a", [2, 3]), ("b", [2, 3])] {
        let mut producer = Producer::greet(&gateway, name);
        let frames = ids.map(|id| v2(id, "orders/x", "same"));
        producer.send(&frames.concat());
        producer.until_acknowledged(ids[1]);
    }
    let status = gateway.assert_adds_up();
    let lane = &status["pipeline"]["lanes"]["transactional"];
    assert_eq!(
        (&lane["accepted"], &lane["deduplicated"]),
        (&6.into(), &1.into())
    );
    assert_eq!(status["journal"]["events"], 5);
}

#[test]
fn a_priority_chooses_the_lane_and_a_rule_only_raises_it() {
    let home = home();
    let rules = "[[rule]]\ntopics = ['raised']\nlane = 'realtime'\n\
                 [[rule]]\ntopics = ['low']\nlane = 'batch'\n";
    fs::write(home.path().join("rules.toml"), rules).unwrap();
    let gateway = home.set("pipeline.rules_file", "rules.toml").start();
    let mut producer = Producer::connect(&gateway);
    for (topic, priority) in [
        ("free", Priority::Batch),
        ("free", Priority::Low),
        ("free", Priority::Medium),
        ("free", Priority::High),
        ("free", Priority::Critical),
        ("raised", Priority::Batch),
        ("low", Priority::Batch),
        ("low", Priority::Critical),
    ] {
        let mut frame = Vec::new();
        write_frame(priority, None, topic.as_bytes(), b"", &mut frame);
        producer.send(&frame);
    }
    let accepted = |status: &Value| {
        let lanes = &status["pipeline"]["lanes"];
        ["realtime", "transactional", "batch"].map(|lane| lanes[lane]["accepted"].clone())
    };
    let expected = [4, 2, 2].map(Value::from);
    gateway.until_status("all events", accepted, expected);
}

#[test]
fn each_bad_input_ends_its_connection_with_one_clear_word_and_no_other() {
    let gateway = home()
        .set("ingest.max_frame_bytes", 4096)
        .set("ingest.handshake_timeout_ms", 300)
        .start();
    let mut neighbour = Producer::greet(&gateway, "neighbour");
    let good = v2(1, "a", "x");
    let with = |bad: &[u8]| [hello("bad", ""), good.clone(), bad.to_vec()].concat();
    let too_large = vec![b'x'; 5000];
    for (bytes, code, text) in [
        (with(&[0; 4]), Code::Malformed, "length 0"),
        (
            with(&[0xff; 4]),
            Code::TooLarge,
            "ingest.max_frame_bytes is 4096",
        ),
        (
            with(&v2(2, "a", str::from_utf8(&too_large).unwrap())),
            Code::TooLarge,
            "length 5012",
        ),
        (
            with(b"\0\0\0\x0b\x02\0\0\0\0\0\0\0\0\0\x02"),
            Code::BadTopic,
            "topic_len is 0",
        ),
        (
            with(b"\0\0\0\x0c\x02\0\x09\0\0\0\0\0\0\0\x02t"),
            Code::Malformed,
            "topic_len is 9",
        ),
        (
            with(b"\0\0\0\x0c\x07\0\x01\0\0\0\0\0\0\0\x02t"),
            Code::Malformed,
            "priority is 7",
        ),
        (
            with(b"\0\0\0\x0c\x02\0\x01\0\0\0\0\0\0\0\x02\xff"),
            Code::BadTopic,
            "UTF-8",
        ),
        (with(&v2(2, "a/+", "")), Code::BadTopic, "\"a/+\""),
        (with(&v2(1, "a", "")), Code::BadId, "id 1 comes after 1"),
        (
            b"HGI2\0\0\xff\xff".to_vec(),
            Code::Malformed,
            "a handshake of 65535 bytes",
        ),
        (
            b"HGI2\0\0\0\x05\0\0\0\0\0".to_vec(),
            Code::Malformed,
            "name",
        ),
        // Slow.
        (
            b"HGI2\0\0".to_vec(),
            Code::TimedOut,
            "ingest.handshake_timeout_ms",
        ),
    ] {
        let mut producer = Producer::connect(&gateway);
        producer.send(&bytes);
        let refused = producer.until_refused();
        assert_eq!(refused.0, code as u8, "{refused:?}");
        assert!(refused.1.contains(text), "{refused:?}");
        gateway.until_logged(&format!("reason={:?}", refused.1));
    }
    // Version 1 has no words: it is closed, and the log has the reason.
    for (bytes, reason) in [
        (vec![0; 4], "a frame of length 0"),
        (b"HGI1\0\0\0\0".to_vec(), "a frame of length 1212631345"),
        (b"\0\0\0\x04\x02\0\x01\xff".to_vec(), "UTF-8"),
        (v1(b"b/#", b""), "b/#"),
    ] {
        let mut producer = Producer::connect(&gateway);
        producer.send(&bytes);
        assert_eq!(producer.next(), None);
        gateway.until_logged(reason);
    }
    // Half a frame is nothing.
    let mut producer = Producer::greet(&gateway, "half");
    producer.send(&good[..good.len() - 1]);
    producer.socket.shutdown(Shutdown::Write).unwrap();
    assert_eq!(producer.next(), None);

    neighbour.send(&v2(7, "a", "still here"));
    neighbour.until_acknowledged(7);
    gateway.until_status(
        "connections",
        |status| status["ingest"]["connections"].clone(),
        1.into(),
    );
    let status = gateway.assert_adds_up();
    // The neighbour's, and the good one before each bad one.
    assert_eq!(status["ingest"]["accepted"], 10);
    assert_eq!(status["ingest"]["errors"], 16);
}

#[test]
fn who_is_not_known_is_not_let_in() {
    let gateway = home_with_login().start();
    for token in ["", "press:wrong", "nobody:secret", "a.b.c"] {
        let mut producer = Producer::connect(&gateway);
        producer.send(&hello("press", token));
        let (code, text) = producer.until_refused();
        assert_eq!(code, Code::NotAuthorized as u8, "{token:?}: {text}");
        assert!(!text.contains("press"), "{text}");
    }
    gateway.until_logged("wrong password for user");
    let mut old = Producer::connect(&gateway);
    old.send(&v1(b"a", b"x"));
    assert_eq!(old.next(), None);
    gateway.until_logged("mqtt.auth.anonymous");
    let mut producer = Producer::connect(&gateway);
    producer.send(&[hello("press", "press:secret"), v2(1, "a", "x")].concat());
    assert!(matches!(producer.next(), Some(Answer::Welcome { .. })));
    producer.until_acknowledged(1);
    // One who is known no more has to go.
    fs::write(gateway.home().path().join("users"), "").unwrap();
    gateway.json(&["reload"]);
    let (code, text) = producer.until_refused();
    assert_eq!(code, Code::NotAuthorized as u8, "{text}");
}

#[test]
fn a_silent_connection_to_a_gateway_that_wants_a_login_does_not_stay() {
    let gateway = home_with_login()
        .set("ingest.handshake_timeout_ms", 100)
        .start();
    assert_eq!(Producer::connect(&gateway).next(), None);
    gateway.until_logged("ingest.handshake_timeout_ms");
}

#[test]
fn what_a_client_must_not_publish_is_a_dead_letter_and_is_acknowledged() {
    let home = home();
    let acl =
        "[[rule]]\nallow = [\"publish\", \"subscribe\"]\ntopics = [\"own/%c/#\", \"open/#\"]\n";
    fs::write(home.path().join("acl.toml"), acl).unwrap();
    let gateway = home.set("mqtt.auth.acl_file", "acl.toml").start();
    let mut producer = Producer::greet(&gateway, "press");
    let topics = ["own/press/a", "own/other/a", "$SYS/a", "open/a"];
    let frames = topics.iter().zip(1..).map(|(topic, id)| v2(id, topic, "x"));
    producer.send(&frames.collect::<Vec<_>>().concat());
    producer.until_acknowledged(4);
    let ingest = &gateway.assert_adds_up()["ingest"];
    assert_eq!(
        (&ingest["accepted"], &ingest["denied"]),
        (&2.into(), &2.into())
    );
    let letters = gateway.json(&["dead-letters"]);
    let letters = letters["letters"].as_array().unwrap().clone();
    let denied = |letter: &&Value| letter["reason"] == "denied" && letter["source"] == "press";
    assert_eq!(letters.iter().filter(denied).count(), 2, "{letters:?}");
}

#[test]
fn there_are_no_more_connections_than_the_configuration_allows() {
    let gateway = home().set("ingest.max_connections", 1).start();
    let mut first = Producer::greet(&gateway, "first");
    assert_eq!(Producer::connect(&gateway).next(), None);
    gateway.until_logged("ingest.max_connections");
    first.send(&v2(1, "a", "x"));
    first.until_acknowledged(1);
    drop(first);
    eventually("room for another", || {
        let mut another = Producer::connect(&gateway);
        another.socket.write_all(&hello("another", "")).ok()?;
        another.next()
    });
}

#[test]
fn an_app_that_is_behind_slows_its_producers_down_and_loses_nothing() {
    let gateway = home()
        .set("pipeline.queue_events", 256)
        .set("apps.queue_events", 256)
        .start();
    gateway.install(&built("relay"));
    const COUNT: u64 = 20_000;
    let mut producer = Producer::greet(&gateway, "press");
    let frames: Vec<_> = (1..=COUNT).flat_map(|id| v2(id, "relay/a", "x")).collect();
    let mut sender = producer.socket.try_clone().unwrap();
    let sending = thread::spawn(move || sender.write_all(&frames).unwrap());
    producer.until_acknowledged(COUNT);
    sending.join().unwrap();
    gateway.until_app("relay", "all events", |app| {
        app["counters"]["handled"] == COUNT
    });
    gateway.assert_adds_up();
}

#[test]
fn a_gateway_that_stops_acknowledges_what_it_has_taken_and_says_goodbye() {
    let gateway = home().set("journal.topics", "#").start();
    let mut producer = Producer::greet(&gateway, "press");
    producer.send(&v2(1, "a", "x"));
    producer.until_acknowledged(1);
    let mut old = Producer::connect(&gateway);
    old.send(&v1(b"a", b"x"));
    gateway.until_status(
        "frames",
        |status| status["ingest"]["frames"].clone(),
        2.into(),
    );
    let stopped = gateway.terminate();
    assert!(stopped.status.success(), "{}", stopped.log);
    assert_eq!(producer.until_refused().0, Code::ShuttingDown as u8);
    assert_eq!(old.next(), None);
}

// ---- headgate send ----

/// `headgate send ARGS` with these lines.
fn send(gateway: &Gateway, args: &[&str], lines: &str) -> std::process::Output {
    let address = address(gateway).to_string();
    let args = [&["--json", "send", "--address", &address], args].concat();
    let mut command = gateway.home().command(&args);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let lines = lines.to_owned();
    // It may end before it has read all.
    let writing = thread::spawn(move || drop(stdin.write_all(lines.as_bytes())));
    let output = finished(child, PATIENCE);
    writing.join().unwrap();
    output
}

#[test]
fn send_sends_lines_and_says_how_many_were_acknowledged() {
    let gateway = home_with_login().start();
    let token = gateway.home().path().join("token");
    fs::write(&token, "press:secret\n").unwrap();
    let token = ["--token-file", token.to_str().unwrap()];
    let events =
        "{\"topic\":\"a\",\"payload\":\"1\"}\n\n{\"topic\":\"b\",\"payload_base64\":\"/w==\"}\n";
    let output = send(&gateway, &token, events);
    assert!(output.status.success(), "{output:?}");
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&summary["sent"], &summary["acknowledged"]),
        (&2.into(), &2.into())
    );
    let lines: String = (0..5000).map(|number| format!("{number}\n")).collect();
    let output = send(&gateway, &[&token[..], &["--topic", "t"]].concat(), &lines);
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(summary["acknowledged"], 5000);
    assert_eq!(gateway.assert_adds_up()["ingest"]["accepted"], 5002);

    let output = send(&gateway, &token, "{\"topic\":\"a\"}\n{\"topic\":\"a/#\"}\n");
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("standard input, line 2"), "{error}");
    let output = send(&gateway, &[], "{\"topic\":\"a\"}\n");
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("a token is needed"), "{error}");
}

#[test]
fn send_comes_back_after_kill_9_and_no_event_is_lost_or_taken_twice() {
    let home = home();
    let rules = "[[rule]]\ntopics = ['plant/#']\ndedup = 'id'\n";
    fs::write(home.path().join("rules.toml"), rules).unwrap();
    let gateway = home.set("pipeline.rules_file", "rules.toml").start();
    let address = address(&gateway).to_string();
    let home = gateway.home().clone().set("ingest.listen", &address);
    let args = [
        "--json",
        "send",
        "--address",
        &address,
        "--topic",
        "plant/a",
    ];
    let mut command = home.command(&args);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // Lines come for as long as gateways are killed.
    let (killed, all_killed) = mpsc::channel::<()>();
    let writing = thread::spawn(move || {
        let mut count = 0;
        while all_killed.try_recv() != Err(TryRecvError::Disconnected) {
            for number in count..count + 1000 {
                writeln!(stdin, "{number}").unwrap();
            }
            count += 1000;
        }
        count
    });
    let mut gateway = gateway;
    for part in 1..=3u64 {
        let frames = |status: &Value| status["ingest"]["frames"].as_u64() >= Some(part * 5000);
        gateway.until_status("some frames", frames, true);
        gateway = gateway.kill().set("ingest.listen", &address).start();
    }
    drop(killed);
    let count: usize = writing.join().unwrap();
    let output = finished(child, PATIENCE);
    assert!(output.status.success(), "{output:?}");
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(summary["acknowledged"], count);
    // Each is there once: what came again was known.
    assert_eq!(journal::records(gateway.home()).len(), count);
    assert_eq!(journaled(gateway.home()).len(), count);
}

#[test]
fn send_speaks_tls() {
    let home = home();
    let pair = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let certificate = home.path().join("mqtt.crt");
    fs::write(&certificate, pair.cert.pem()).unwrap();
    fs::write(
        home.path().join("mqtt.key"),
        pair.signing_key.serialize_pem(),
    )
    .unwrap();
    let gateway = home
        .set("ingest.tls_listen", "127.0.0.1:0")
        .set("mqtt.tls.certificate", "mqtt.crt")
        .set("mqtt.tls.key", "mqtt.key")
        .start();
    let status = gateway.status();
    let address: SocketAddr = status["ingest"]["tls_listen"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    let lines: String = (0..20_000).map(|number| format!("{number}\n")).collect();
    fs::write(gateway.home().path().join("lines"), lines).unwrap();
    let summary = gateway.json(&[
        "send",
        "--address",
        &format!("localhost:{}", address.port()),
        "--tls-ca",
        certificate.to_str().unwrap(),
        "--topic",
        "t",
        "--file",
        "lines",
    ]);
    assert_eq!(summary["acknowledged"], 20_000);
}

#[test]
fn send_says_where_nobody_listens() {
    let home = Home::new();
    let output = home
        .command(&["send", "--address", "127.0.0.1:1"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("127.0.0.1:1"), "{error}");
    let output = home.command(&["send"]).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("--address"), "{error}");
}

#[test]
fn a_connection_ends_with_its_token_and_what_came_before_is_acknowledged() {
    for io_uring in ["true", "false"] {
        let home = home()
            .set("mqtt.auth.anonymous", "never")
            .set("mqtt.auth.jwt_key", "secret")
            .set("ingest.io_uring", io_uring);
        fs::write(home.path().join("secret"), SECRET).unwrap();
        let gateway = home.start();
        // Tokens count for half a minute longer than they say.
        let ends_in = |seconds: i64| {
            let end = now_s() as i64 - 30 + seconds;
            hs256(serde_json::json!({ "sub": "press", "exp": end }))
        };
        let mut producer = Producer::connect(&gateway);
        producer.send(&hello("press", &ends_in(3)));
        assert!(matches!(producer.next(), Some(Answer::Welcome { .. })));
        producer.send(&v2(1, "plant/a", "x"));
        producer.until_acknowledged(1);
        // In the middle of a frame.
        producer.send(&v2(2, "plant/a", "x")[..9]);
        let (code, text) = producer.until_refused();
        assert_eq!(code, Code::NotAuthorized as u8);
        assert_eq!(text, "the token has expired");
        let mut late = Producer::connect(&gateway);
        late.send(&hello("press", &ends_in(0)));
        assert_eq!(late.until_refused().0, Code::NotAuthorized as u8);
        let status = gateway.assert_adds_up();
        assert_eq!(status["ingest"]["accepted"], 1);
    }
}

#[test]
fn who_is_silent_for_too_long_has_to_go_and_who_says_something_stays() {
    for io_uring in ["true", "false"] {
        let gateway = home()
            .set("ingest.idle_timeout_s", 1)
            .set("ingest.io_uring", io_uring)
            .start();
        let mut silent = Producer::greet(&gateway, "silent");
        let mut half = Producer::greet(&gateway, "half");
        half.send(&v2(1, "plant/a", "x")[..9]);
        let mut busy = Producer::greet(&gateway, "busy");
        let mut old = Producer::connect(&gateway);
        old.send(&v1(b"plant/a", b"x"));
        let began = Instant::now();
        let mut id = 0;
        while began.elapsed() < Duration::from_secs(3) {
            id += 1;
            busy.send(&v2(id, "plant/a", "x"));
            busy.until_acknowledged(id);
            thread::sleep(Duration::from_millis(100));
        }
        for producer in [&mut silent, &mut half] {
            let (code, text) = producer.until_refused();
            assert_eq!(code, Code::TimedOut as u8);
            assert!(text.contains("ingest.idle_timeout_s"), "{text}");
        }
        assert_eq!(old.next(), None);
        let status = gateway.assert_adds_up();
        assert_eq!(status["ingest"]["connections"], 1, "the busy one");
        assert_eq!(status["ingest"]["accepted"], id + 1);
    }
}

#[test]
fn a_client_certificate_lets_in_takes_the_place_of_a_token_and_can_be_revoked() {
    let authority = Authority::new("plant");
    let home = mutual("optional", &authority)
        .set("mqtt.auth.anonymous", "never")
        .set("mqtt.auth.acl_file", "acl")
        .set("mqtt.tls.client_crl", "revoked.pem")
        .set("ingest.tls_listen", "127.0.0.1:0");
    fs::write(
        home.path().join("acl"),
        "[[rule]]\nusers = [\"press\"]\nallow = [\"publish\"]\ntopics = [\"press/#\"]\n",
    )
    .unwrap();
    fs::write(home.path().join("revoked.pem"), authority.revoke(&[9])).unwrap();
    let gateway = home.start();
    authority.issue(&home, "press", |params| {
        params.serial_number = Some(vec![7].into())
    });
    Authority::new("plant").issue(&home, "stranger", |_| {});
    let greet = |name: Option<&str>| {
        let mut stream = tls_stream(&gateway, name);
        let _ = stream.write_all(&hello("press", ""));
        stream
    };
    // Read whole answers until there are no more.
    let rest = |stream: &mut TlsStream| {
        let mut bytes = Vec::new();
        // A reset or an alert is an end, too.
        let _ = stream.read_to_end(&mut bytes);
        bytes
    };
    let refused = |bytes: &[u8]| {
        matches!(
            Answer::first(bytes), Ok(Some((Answer::Refused { code, .. }, _))) if code == Code::NotAuthorized as u8
        )
    };
    assert!(
        refused(&rest(&mut greet(None))),
        "neither token nor certificate"
    );
    assert_eq!(
        rest(&mut greet(Some("stranger"))),
        b"",
        "no handshake of TLS"
    );
    let mut press = greet(Some("press"));
    press.write_all(&v2(1, "press/a", "x")).unwrap();
    press.write_all(&v2(2, "oven/a", "x")).unwrap();
    let counted = |status: &Value| {
        [
            status["ingest"]["accepted"].clone(),
            status["ingest"]["denied"].clone(),
        ]
    };
    gateway.until_status("both", counted, [1, 1].map(Value::from));
    // From the moment at which it is listed.
    fs::write(home.path().join("revoked.pem"), authority.revoke(&[7])).unwrap();
    gateway.json(&["reload"]);
    let mut answers = &rest(&mut press)[..];
    let mut last = None;
    while let Ok(Some((answer, size))) = Answer::first(answers) {
        answers = &answers[size..];
        last = Some(answer);
    }
    let code = match last {
        Some(Answer::Refused { code, .. }) => code,
        other => panic!("{other:?}"),
    };
    assert_eq!(code, Code::NotAuthorized as u8);
    assert_eq!(rest(&mut greet(Some("press"))), b"");
}

type TlsStream = StreamOwned<ClientConnection, TcpStream>;

/// To the listener with TLS, with the certificate of that name.
fn tls_stream(gateway: &Gateway, name: Option<&str>) -> TlsStream {
    let read = |kind: &str| {
        let name = name.expect("asked for with a name only");
        fs::read(gateway.home().path().join(format!("{name}.{kind}"))).unwrap()
    };
    let mut trusted = RootCertStore::empty();
    let own = fs::read(gateway.home().path().join("mqtt.crt")).unwrap();
    trusted
        .add(CertificateDer::from_pem_slice(&own).unwrap())
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(trusted);
    let config = match name {
        None => config.with_no_client_auth(),
        Some(_) => {
            let certificate = CertificateDer::from_pem_slice(&read("crt")).unwrap();
            let key = PrivateKeyDer::from_pem_slice(&read("key")).unwrap();
            config
                .with_client_auth_cert(vec![certificate], key)
                .unwrap()
        }
    };
    let status = gateway.status();
    let address = status["ingest"]["tls_listen"].as_str().unwrap();
    let socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let server = "localhost".try_into().unwrap();
    StreamOwned::new(
        ClientConnection::new(Arc::new(config), server).unwrap(),
        socket,
    )
}

#[test]
fn a_thousand_large_frames_that_never_end_take_no_more_memory_than_they_may() {
    const CLIENTS: usize = 1_000;
    let gateway = home()
        .set("ingest.max_connections", CLIENTS + 10)
        .set("mqtt.write_timeout_ms", 2_000)
        .start();
    let mut other = Producer::greet(&gateway, "other");
    let before = resident(&gateway);
    let large = v2(1, "plant/a", &"x".repeat(1_000_000));
    let half_received = &large[..large.len() - 1];
    let mut clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let producer = Producer::greet(&gateway, &format!("client{client}"));
            // So that what the gateway does not read stays with us.
            SockRef::from(&producer.socket)
                .set_send_buffer_size(16 << 10)
                .unwrap();
            producer.socket.set_nonblocking(true).unwrap();
            (producer.socket, 0)
        })
        .collect();
    let (mut most, mut id) = (0, 0);
    let deadline = Instant::now() + 2 * PATIENCE;
    while !clients.is_empty() {
        assert!(Instant::now() < deadline, "{} stay", clients.len());
        clients.retain_mut(|(socket, sent)| {
            while *sent < half_received.len() {
                match socket.write(&half_received[*sent..]) {
                    Ok(count) => *sent += count,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(_) => return false,
                }
            }
            // The gateway says why it closes, and then that it does.
            match socket.read(&mut [0; 1024]) {
                Ok(0) => false,
                Ok(_) => true,
                Err(error) => error.kind() == ErrorKind::WouldBlock,
            }
        });
        // Meanwhile others go on.
        id += 1;
        other.send(&v2(id, "plant/a", "x"));
        other.until_acknowledged(id);
        most = most.max(resident(&gateway).saturating_sub(before));
    }
    let status = gateway.status();
    println!(
        "{CLIENTS} connections have sent {} bytes; {} MiB more at the most; {id} other frames meanwhile",
        status["ingest"]["bytes"],
        most >> 20
    );
    // mqtt.max_incoming_bytes, and for each connection what it may have without a place.
    assert!(most < (64 << 20) + CLIENTS as u64 * (192 << 10), "{most}");
    // There is room again.
    other.send(&v2(id + 1, "plant/a", &"x".repeat(1_000_000)));
    other.until_acknowledged(id + 1);
    assert_eq!(status["ingest"]["accepted"], id);
    assert_eq!(status["ingest"]["errors"], CLIENTS);
    gateway.assert_adds_up();
}

#[test]
fn large_frames_come_in_one_after_the_other_where_there_is_room_for_one() {
    let gateway = home()
        .set("mqtt.max_incoming_bytes", "64KiB")
        .set("mqtt.max_packet_bytes", "64KiB")
        .start();
    let large = v2(1, "plant/a", &"x".repeat(1_000_000));
    thread::scope(|scope| {
        for client in 0..10 {
            let (gateway, large) = (&gateway, &large);
            scope.spawn(move || {
                let mut producer = Producer::greet(gateway, &format!("client{client}"));
                producer.send(large);
                producer.until_acknowledged(1);
            });
        }
    });
    assert_eq!(gateway.assert_adds_up()["ingest"]["accepted"], 10);
}
