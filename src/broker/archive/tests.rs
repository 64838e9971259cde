//! The archive over a real store.

use std::path::Path;

use bytes::Bytes;
use rumqttd::protocol::QoS;

use super::*;
use crate::broker::stored::tests::{message, session};
use crate::store::StoreConfig;

const PLENTY: u64 = 1 << 30;

fn store_of(folder: &Path, map_bytes: usize) -> Store {
    Store::open(&StoreConfig {
        path: folder.join("store"),
        map_bytes,
    })
    .unwrap()
}

fn opened(folder: &Path) -> (Archive, Restored) {
    Archive::open(store_of(folder, 64 << 20), PLENTY).unwrap()
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
    assert_eq!(restored.queued[&number], (2, 9));
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
    archive.sync_blocking().unwrap();
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
                archive.sync_blocking().unwrap();
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
    archive.sync_blocking().unwrap();
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
    archive.sync_blocking().unwrap();
    assert_eq!(archive.queued_bytes(), 0);
    assert_eq!(archive.shared.commits.load(Ordering::Relaxed), before);
}

#[test]
fn what_is_queued_is_bounded_over_all_sessions_and_restarts() {
    let folder = tempfile::tempdir().unwrap();
    const MAX: u64 = 100_000;
    let open = || Archive::open(store_of(folder.path(), 64 << 20), MAX).unwrap();
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
    archive.sync_blocking().unwrap();
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
    archive.sync_blocking().unwrap();
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
