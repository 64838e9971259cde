//! The archive over a real store.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use bytes::Bytes;
use proptest::prelude::*;
use rumqttd::protocol::QoS;

use super::*;
use crate::broker::stored::tests::{message, session};
use crate::dead_letters::{DeadLetter, Reason};
use crate::store::StoreConfig;

const PLENTY: u64 = 1 << 30;

fn store_of(folder: &Path, map_bytes: usize) -> Store {
    let config = StoreConfig {
        path: folder.join("store"),
        map_bytes,
    };
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match Store::open(&config) {
            // A process that another test is about to start has a copy of the lock until it is
            // started.
            Err(StoreError::InUse { .. }) if Instant::now() < deadline => std::thread::yield_now(),
            Ok(store) => return store,
            Err(error) => panic!("{error}"),
        }
    }
}

fn opened(folder: &Path) -> (Archive, Restored) {
    open_with(store_of(folder, 64 << 20), PLENTY)
}

fn open_with(store: Store, max_queued_bytes: u64) -> (Archive, Restored) {
    let dead_letters = Arc::new(DeadLetters::new(Instant::now()));
    Archive::open(store, max_queued_bytes, dead_letters).unwrap()
}

fn sync(archive: &Archive) -> Result<(), ArchiveError> {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.unwrap().block_on(archive.synced())
}

fn delivery(text: impl Into<Bytes>) -> Delivery {
    Delivery {
        message: Arc::new(Message {
            payload: text.into(),
            ..message("plant/line1")
        }),
        qos: QoS::AtLeastOnce,
        retain: false,
        subscription_ids: None,
        group: None,
        sequence: 0,
        is_stored: false,
    }
}

fn numbered(sequence: u64) -> Delivery {
    delivery(sequence.to_string())
}

/// The sequences that are queued, after a look at what belongs to them.
fn sequences(archive: &Archive, number: u64) -> Vec<u64> {
    let read = archive.read(number, 0, usize::MAX, usize::MAX).unwrap();
    for (sequence, delivery) in &read {
        assert_eq!(*delivery.message.payload, *sequence.to_string().as_bytes());
    }
    read.into_iter().map(|(sequence, _)| sequence).collect()
}

#[test]
fn what_was_asked_for_is_there_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let (archive, restored) = opened(folder.path());
    assert!(restored.sessions.is_empty() && restored.retained.is_empty());
    let number = restored.first_number;
    archive.put_session("pump", session(number));
    archive.put_session("fan", session(number + 1));
    for sequence in 0..10 {
        assert!(archive.append(number, sequence, numbered(sequence)));
    }
    archive.remove(number, [0, 1, 5].into_iter());
    archive.retain(Arc::new(message("a/b")));
    archive.retain(Arc::new(message("a/c")));
    archive.forget_retained(&message("a/c").topic);
    archive.remove_session("fan", number + 1);
    archive.close();

    let (archive, restored) = opened(folder.path());
    let [(client_id, record)] = &restored.sessions[..] else {
        panic!("{restored:?}");
    };
    assert_eq!((client_id.as_str(), record.number), ("pump", number));
    assert_eq!(record.next_sequence, 10);
    assert_eq!(restored.queued[&number].0, 2..10);
    assert_eq!(sequences(&archive, number), [2, 3, 4, 6, 7, 8, 9]);
    assert_eq!(restored.retained.len(), 1);
    assert_eq!(restored.retained[0].topic.as_str(), "a/b");
    assert!(restored.first_number > number + 1);
}

#[test]
fn readers_see_what_is_not_on_disk_yet_and_not_what_is_removed() {
    let folder = tempfile::tempdir().unwrap();
    let (archive, _) = opened(folder.path());
    for sequence in 0..5 {
        assert!(archive.append(7, sequence, numbered(sequence)));
    }
    sync(&archive).unwrap();
    for sequence in 5..8 {
        assert!(archive.append(7, sequence, numbered(sequence)));
    }
    assert!(archive.append(8, 0, numbered(0)));
    archive.remove(7, [1, 6].into_iter());
    assert_eq!(sequences(&archive, 7), [0, 2, 3, 4, 5, 7]);
    let some = archive.read(7, 2, 3, usize::MAX).unwrap();
    assert_eq!(some.iter().map(|(s, _)| *s).collect::<Vec<_>>(), [2, 3, 4]);
    let one = archive.read(7, 3, 100, 1).unwrap();
    assert_eq!(one.len(), 1);
    assert!(archive.read(7, 8, 100, usize::MAX).unwrap().is_empty());
    assert!(archive.read(9, 0, 100, usize::MAX).unwrap().is_empty());
}

#[test]
fn many_changes_go_to_disk_in_few_transactions() {
    let folder = tempfile::tempdir().unwrap();
    let (archive, _) = opened(folder.path());
    const THREADS: u64 = 8;
    const EACH: u64 = 2_000;
    std::thread::scope(|scope| {
        for number in 0..THREADS {
            let archive = &archive;
            scope.spawn(move || {
                for sequence in 0..EACH {
                    assert!(archive.append(number, sequence, numbered(sequence)));
                }
                sync(archive).unwrap();
            });
        }
    });
    assert!(archive.is_synced());
    let commits = archive.shared.commits.load(Ordering::Relaxed);
    assert!(commits < 2 * THREADS + 20, "{commits} commits");
    for number in 0..THREADS {
        assert_eq!(sequences(&archive, number).len() as u64, EACH);
    }
}

#[test]
fn what_is_taken_back_in_time_is_never_written() {
    let folder = tempfile::tempdir().unwrap();
    let (archive, _) = opened(folder.path());
    archive.retain(Arc::new(message("a/b")));
    sync(&archive).unwrap();
    let before = archive.shared.commits.load(Ordering::Relaxed);
    {
        // The writer can't take anything while this is held.
        let mut state = archive.shared.state.lock();
        let waiting = Waiting {
            delivery: numbered(0),
            cost: 100,
            maybe_written: false,
        };
        state.waiting.append((1, 0), waiting);
        assert_eq!(state.queued_bytes(), 100);
    }
    archive.remove(1, [0].into_iter());
    sync(&archive).unwrap();
    assert_eq!(archive.queued_bytes(), 0);
    assert_eq!(archive.shared.commits.load(Ordering::Relaxed), before);
}

#[test]
fn what_is_queued_is_bounded_over_all_sessions_and_restarts() {
    let folder = tempfile::tempdir().unwrap();
    const MAX: u64 = 100_000;
    let open = || open_with(store_of(folder.path(), 64 << 20), MAX);
    let (archive, restored) = open();
    let number = restored.first_number;
    archive.put_session("pump", session(number));
    let mut taken = 0;
    while archive.append(number, taken, numbered(taken)) {
        taken += 1;
        assert!(archive.queued_bytes() <= MAX);
    }
    assert!(taken > 500, "{taken}");
    archive.close();

    let (archive, _) = open();
    let bytes = archive.queued_bytes();
    assert!(bytes > MAX / 3 && bytes <= MAX, "{bytes}");
    archive.remove(number, 0..taken);
    sync(&archive).unwrap();
    assert_eq!(archive.queued_bytes(), 0);
    assert!(archive.append(number, taken, numbered(taken)));
}

#[test]
fn a_session_goes_with_all_that_is_queued_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let (archive, restored) = opened(folder.path());
    let number = restored.first_number;
    archive.put_session("pump", session(number));
    const MANY: u64 = 2 * REMOVED_AT_ONCE as u64 + 1;
    for sequence in 0..MANY {
        assert!(archive.append(number, sequence, numbered(sequence)));
    }
    sync(&archive).unwrap();
    archive.remove_session("pump", number);
    // Another client has taken the name meanwhile.
    archive.put_session("pump", session(number + 1));
    archive.remove_session("pump", number);
    assert!(archive.append(number + 1, 0, numbered(0)));
    archive.close();

    let (archive, restored) = opened(folder.path());
    assert_eq!(restored.sessions.len(), 1);
    assert_eq!(restored.sessions[0].1.number, number + 1);
    assert!(sequences(&archive, number).is_empty());
    assert_eq!(sequences(&archive, number + 1), [0]);
}

#[tokio::test]
async fn whoever_waits_for_the_disk_is_told_when_it_is_done() {
    let folder = tempfile::tempdir().unwrap();
    let (archive, _) = opened(folder.path());
    archive.retain(Arc::new(message("a/b")));
    assert!(!archive.is_synced());
    archive.synced().await.unwrap();
    assert!(archive.is_synced());
    let other = archive.clone();
    archive.close();
    other.retain(Arc::new(message("a/b")));
    assert!(matches!(other.synced().await, Err(ArchiveError::Closed)));
    assert!(!other.append(1, 1, numbered(1)));
}

#[test]
fn records_that_cannot_be_read_are_left_out_and_left_in_place() {
    let folder = tempfile::tempdir().unwrap();
    let (archive, restored) = opened(folder.path());
    let number = restored.first_number;
    for (index, client_id) in ["broken", "pump"].into_iter().enumerate() {
        let number = number + index as u64;
        archive.put_session(client_id, session(number));
        for sequence in 0..4 {
            assert!(archive.append(number, sequence, numbered(sequence)));
        }
    }
    archive.retain(Arc::new(message("a/b")));
    archive.retain(Arc::new(message("a/c")));
    archive
        .shared
        .dead_letters
        .add(Reason::Expired, Instant::now(), || {
            DeadLetter::new(Reason::Expired, "pump", &message("a/b").topic, b"x", 1)
        });
    archive.close();
    let store = store_of(folder.path(), 64 << 20);
    let mut changes = store.write_mqtt().unwrap();
    changes.put_session("broken", b"\x01rubbish").unwrap();
    changes.put_queued(number + 1, 1, b"").unwrap();
    changes.put_queued(number + 1, 2, b"\x09later").unwrap();
    changes.put_retained("a/b", &[1; 300]).unwrap();
    changes.put_dead_letter(0, b"x").unwrap();
    changes.commit().unwrap();
    drop(store);

    for _ in 0..2 {
        let (archive, restored) = opened(folder.path());
        assert_eq!(restored.sessions.len(), 1);
        assert_eq!(restored.sessions[0].0, "pump");
        assert_eq!(restored.retained.len(), 1);
        assert_eq!(restored.retained[0].topic.as_str(), "a/c");
        assert_eq!(archive.shared.dead_letters.list(None, 10), []);
        assert!(restored.first_number > number + 1);
        let damaged = || archive.shared.damaged.load(Ordering::Relaxed);
        assert_eq!(damaged(), 3);
        for _ in 0..2 {
            assert_eq!(sequences(&archive, number + 1), [0, 3]);
            assert_eq!(damaged(), 5);
        }
        // They may belong to what can't be read.
        assert_eq!(sequences(&archive, number), [0, 1, 2, 3]);
        archive.close();
    }

    let (archive, restored) = opened(folder.path());
    let new = restored.first_number;
    archive.put_session("broken", session(new));
    archive.retain(Arc::new(message("a/b")));
    archive.close();
    let (archive, restored) = opened(folder.path());
    assert_eq!(restored.sessions.len(), 2);
    assert_eq!(restored.retained.len(), 2);
    sync(&archive).unwrap();
    until("what belongs to nobody is gone", || {
        sequences(&archive, number).is_empty()
    });
}

/// Waits for something that the writer does by itself.
fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}: not within 30 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn what_ended_while_no_gateway_ran_is_not_restored() {
    let folder = tempfile::tempdir().unwrap();
    let (archive, restored) = opened(folder.path());
    let number = restored.first_number;
    let soon = Instant::now() + Duration::from_secs(60);
    let mut ended = session(number);
    ended.expires = Some(soon);
    ended.will = Some(StoredWill {
        message: Arc::new(message("gone")),
        life: None,
        due: soon + Duration::from_secs(60),
    });
    archive.put_session("ended", ended);
    assert!(archive.append(number, 0, numbered(0)));
    archive.put_session("pump", session(number + 1));
    archive.retain(Arc::new(Message {
        expires: Some(soon),
        ..message("a/b")
    }));
    archive.close();

    let store = store_of(folder.path(), 64 << 20);
    let dead_letters = Arc::new(DeadLetters::new(Instant::now()));
    let clock = Clock::read();
    let later = Clock {
        unix_ms: clock.unix_ms + 61_000,
        ..clock
    };
    let (state, restored, _) = restore::restore(&store, &dead_letters, later).unwrap();
    let archive = Archive::start(store, PLENTY, dead_letters, state, 0).unwrap();
    assert_eq!(restored.sessions.len(), 1);
    assert_eq!(restored.sessions[0].0, "pump");
    assert_eq!(restored.wills.len(), 1);
    assert_eq!(restored.retained.len(), 0);
    archive.close();
    let (archive, restored) = opened(folder.path());
    assert_eq!(restored.wills.len(), 0);
    assert!(sequences(&archive, number).is_empty());
    assert_eq!(archive.queued_bytes(), 0);
}

#[test]
fn dead_letters_outlive_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let (archive, _) = opened(folder.path());
    for number in 0..3 {
        archive
            .shared
            .dead_letters
            .add(Reason::QueueFull, Instant::now(), || {
                let payload = [b'0' + number];
                DeadLetter::new(
                    Reason::QueueFull,
                    "pump",
                    &message("a/b").topic,
                    &payload,
                    1,
                )
            });
    }
    let before = archive.shared.dead_letters.list(None, 10);
    archive.close();
    let (archive, _) = opened(folder.path());
    assert_eq!(archive.shared.dead_letters.list(None, 10), before);
    assert_eq!(before.len(), 3);
    archive.shared.dead_letters.purge();
    archive.close();
    let (archive, _) = opened(folder.path());
    assert_eq!(archive.shared.dead_letters.list(None, 10), []);
}

#[test]
fn a_store_that_is_nearly_full_takes_no_more_deliveries_until_there_is_room() {
    let folder = tempfile::tempdir().unwrap();
    let open = || open_with(store_of(folder.path(), 2 << 20), PLENTY);
    let (archive, restored) = open();
    let number = restored.first_number;
    archive.put_session("pump", session(number));
    let mut taken = 0;
    while archive.append(number, taken, delivery(vec![b'x'; 700])) {
        taken += 1;
        if taken % 50 == 0 {
            sync(&archive).unwrap();
        }
    }
    assert!(taken > 1000, "{taken}");
    let all = |archive: &Archive| {
        let read = archive.read(number, 0, usize::MAX, usize::MAX).unwrap();
        read.len() as u64
    };
    assert_eq!(all(&archive), taken);
    // There is room for other things, such as the end of some of it.
    archive.put_session("fan", session(number + 1));
    archive.retain(Arc::new(message("a/b")));
    sync(&archive).unwrap();
    archive.close();

    let (archive, _) = open();
    assert_eq!(all(&archive), taken);
    archive.retain(Arc::new(message("a/c")));
    sync(&archive).unwrap();
    assert!(!archive.append(number, taken, numbered(taken)));
    archive.remove(number, 0..taken / 2);
    sync(&archive).unwrap();
    assert!(archive.append(number, taken, numbered(taken)));
    archive.remove_session("pump", number);
    sync(&archive).unwrap();
    assert_eq!(archive.queued_bytes(), 0);
    assert_eq!(archive.shared.failures.load(Ordering::Relaxed), 0);
}

#[test]
fn what_cannot_be_written_waits_and_is_written_when_there_is_room() {
    let folder = tempfile::tempdir().unwrap();
    let (archive, restored) = open_with(store_of(folder.path(), 1 << 20), PLENTY);
    let number = restored.first_number;
    archive.put_session("pump", session(number));
    assert!(archive.append(number, 0, numbered(0)));
    sync(&archive).unwrap();
    let topics = ["large/a", "large/b", "large/c"];
    for topic in topics {
        archive.retain(Arc::new(Message {
            payload: vec![7; 400_000].into(),
            ..message(topic)
        }));
    }
    archive.remove(number, [0].into_iter());
    archive.put_session("fan", session(number + 1));
    let error = sync(&archive).unwrap_err();
    assert!(error.to_string().contains("store.max_bytes"), "{error}");
    assert!(!archive.is_synced());
    assert!(archive.shared.failures.load(Ordering::Relaxed) >= 1);
    // Nothing more is taken, but what is known stays known, and what makes room is written.
    assert!(!archive.append(number, 1, numbered(1)));
    assert!(sequences(&archive, number).is_empty());
    assert_eq!(archive.queued_bytes(), 0);
    sync(&archive).unwrap_err();

    archive.forget_retained(&message(topics[0]).topic);
    until("it is written", || sync(&archive).is_ok());
    assert!(archive.append(number, 1, numbered(1)));
    archive.close();
    let (archive, restored) = open_with(store_of(folder.path(), 1 << 20), PLENTY);
    assert_eq!(restored.sessions.len(), 2);
    assert_eq!(restored.retained.len(), 2);
    assert_eq!(sequences(&archive, number), [1]);
}

#[test]
fn a_gateway_whose_store_stays_full_ends_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let (archive, _) = open_with(store_of(folder.path(), 1 << 20), PLENTY);
    archive.retain(Arc::new(Message {
        payload: vec![7; 2_000_000].into(),
        ..message("large")
    }));
    let other = archive.clone();
    archive.close();
    assert!(matches!(sync(&other), Err(ArchiveError::NotWritten(_))));
}

#[test]
fn readers_get_everything_once_and_in_order_while_it_is_written() {
    const SESSIONS: u64 = 3;
    const EACH: u64 = 4_000;
    let folder = tempfile::tempdir().unwrap();
    let (archive, _) = opened(folder.path());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (archive, done) = (&archive, &done);
        let mut threads = Vec::new();
        for number in 1..=SESSIONS {
            threads.push(scope.spawn(move || {
                for sequence in 0..EACH {
                    assert!(archive.append(number, sequence, numbered(sequence)));
                }
            }));
            threads.push(scope.spawn(move || {
                let mut next = 0;
                while next < EACH {
                    // Now and then from the beginning: what was removed must stay away.
                    let from = if next % 3 == 0 { 0 } else { next };
                    let read = archive.read(number, from, 100, usize::MAX).unwrap();
                    for (sequence, delivery) in &read {
                        assert_eq!(*sequence, next, "session {number}");
                        assert_eq!(*delivery.message.payload, *sequence.to_string().as_bytes());
                        next += 1;
                    }
                    archive.remove(number, read.iter().map(|(sequence, _)| *sequence));
                }
            }));
        }
        scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                sync(archive).unwrap();
            }
        });
        for thread in threads {
            thread.join().unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
    sync(&archive).unwrap();
    assert_eq!(archive.queued_bytes(), 0);
    for number in 1..=SESSIONS {
        assert!(sequences(&archive, number).is_empty());
    }
}

#[derive(Clone, Debug)]
enum Step {
    Append {
        session: u64,
        count: u64,
    },
    Remove {
        session: u64,
        of: Vec<prop::sample::Index>,
    },
    EndSession {
        session: u64,
    },
    Read {
        session: u64,
        from: u64,
        max: usize,
    },
    Sync,
    Reopen,
}

fn any_step() -> impl Strategy<Value = Step> {
    let session = 0..3u64;
    prop_oneof![
        5 => (session.clone(), 1..8u64)
            .prop_map(|(session, count)| Step::Append { session, count }),
        4 => (session.clone(), prop::collection::vec(any::<prop::sample::Index>(), 1..6))
            .prop_map(|(session, of)| Step::Remove { session, of }),
        1 => session.clone().prop_map(|session| Step::EndSession { session }),
        4 => (session, 0..30u64, 1..10usize)
            .prop_map(|(session, from, max)| Step::Read { session, from, max }),
        2 => Just(Step::Sync),
        1 => Just(Step::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn the_archive_agrees_with_a_map(steps in prop::collection::vec(any_step(), 1..50)) {
        let folder = tempfile::tempdir().unwrap();
        let (mut archive, restored) = opened(folder.path());
        let mut next_number = restored.first_number;
        // By client: number, next sequence, and what is queued.
        let mut model: Vec<(u64, u64, BTreeSet<u64>)> = Vec::new();
        for client in 0..3 {
            archive.put_session(&format!("c{client}"), session(next_number));
            model.push((next_number, 0, BTreeSet::new()));
            next_number += 1;
        }
        for step in steps {
            match step {
                Step::Append { session, count } => {
                    let (number, next, queued) = &mut model[session as usize];
                    for _ in 0..count {
                        prop_assert!(archive.append(*number, *next, numbered(*next)));
                        queued.insert(*next);
                        *next += 1;
                    }
                }
                Step::Remove { session, of } => {
                    let (number, _, queued) = &mut model[session as usize];
                    if queued.is_empty() {
                        continue;
                    }
                    let chosen: Vec<u64> = of
                        .iter()
                        .map(|index| *queued.iter().nth(index.index(queued.len())).unwrap())
                        .collect();
                    queued.retain(|sequence| !chosen.contains(sequence));
                    archive.remove(*number, chosen.into_iter());
                }
                Step::EndSession { session: client } => {
                    let (number, next, queued) = &mut model[client as usize];
                    let client_id = format!("c{client}");
                    archive.remove_session(&client_id, *number);
                    (*number, *next) = (next_number, 0);
                    queued.clear();
                    archive.put_session(&client_id, session(next_number));
                    next_number += 1;
                }
                Step::Read { session, from, max } => {
                    let (number, _, queued) = &model[session as usize];
                    let read = archive.read(*number, from, max, usize::MAX).unwrap();
                    let read: Vec<u64> = read.iter().map(|(sequence, _)| *sequence).collect();
                    let expected: Vec<u64> = queued.range(from..).take(max).copied().collect();
                    prop_assert_eq!(read, expected);
                }
                Step::Sync => sync(&archive).unwrap(),
                Step::Reopen => {
                    archive.close();
                    let restored;
                    (archive, restored) = opened(folder.path());
                    prop_assert_eq!(restored.sessions.len(), 3);
                    next_number = restored.first_number;
                }
            }
        }
        for (number, _, queued) in &model {
            prop_assert_eq!(sequences(&archive, *number), Vec::from_iter(queued.clone()));
        }
        sync(&archive).unwrap();
        let everything_is_gone = model.iter().all(|(_, _, queued)| queued.is_empty());
        prop_assert_eq!(archive.queued_bytes() == 0, everything_is_gone);
    }
}

/// How far the killed process keeps behind with removing.
const BEHIND: u64 = 20;

/// The folder that [`a_process_to_be_killed`] works in.
const FOLDER_VARIABLE: &str = "HEADGATE_TEST_ARCHIVE";

#[test]
#[ignore = "what the next test runs in a process of its own"]
fn a_process_to_be_killed() {
    let Some(folder) = std::env::var_os(FOLDER_VARIABLE) else {
        return;
    };
    let (archive, restored) = opened(Path::new(&folder));
    let (number, mut sequence) = match &restored.sessions[..] {
        [(_, pump)] => (pump.number, pump.next_sequence),
        _ => (restored.first_number, 0),
    };
    archive.put_session("pump", session(number));
    loop {
        for _ in 0..=sequence % 7 {
            assert!(archive.append(number, sequence, numbered(sequence)));
            archive.retain(Arc::new(Message {
                payload: sequence.to_string().into(),
                ..message("last")
            }));
            if let Some(old) = sequence.checked_sub(BEHIND) {
                archive.remove(number, [old].into_iter());
            }
            sequence += 1;
        }
        sync(&archive).unwrap();
        println!("durable {}", sequence - 1);
    }
}

#[test]
fn kill_9_at_any_time_loses_nothing_that_was_synced() {
    let folder = tempfile::tempdir().unwrap();
    let mut durable = 0;
    for round in 0..8u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture"])
            .arg(module_path!().split_once("::").unwrap().1.to_owned() + "::a_process_to_be_killed")
            .env(FOLDER_VARIABLE, folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let last = |line: std::io::Result<String>| {
            let line = line.unwrap();
            let (_, sequence) = line.split_once("durable ")?;
            sequence.parse::<u64>().ok()
        };
        let in_time = lines.by_ref().filter_map(last).nth(10 + 7 * round as usize);
        durable = in_time.expect("the process runs").max(durable);
        std::thread::sleep(Duration::from_micros(700 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        durable = lines.filter_map(last).last().unwrap_or(0).max(durable);

        let (archive, restored) = opened(folder.path());
        let [(_, pump)] = &restored.sessions[..] else {
            panic!("{restored:?}");
        };
        let queued = sequences(&archive, pump.number);
        let (first, last) = (queued[0], *queued.last().unwrap());
        assert!(last >= durable, "{last} of {durable}");
        assert!(
            first + BEHIND > durable,
            "{first} was removed before {durable} was synced"
        );
        assert_eq!(queued, Vec::from_iter(first..=last));
        // A transaction may lie between a change and the next one, but never in one.
        let behind = queued.len() as u64;
        assert!((BEHIND..=BEHIND + 1).contains(&behind), "{behind} behind");
        let retained: u64 = std::str::from_utf8(&restored.retained[0].payload)
            .unwrap()
            .parse()
            .unwrap();
        assert!(
            retained == last || retained + 1 == last,
            "{retained}, {last}"
        );
        archive.close();
    }
}
