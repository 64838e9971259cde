//! The journal as its users see it, on a real disk, whole and damaged.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::event::Topic;

const PATIENCE: Duration = Duration::from_secs(30);

fn config(folder: &TempDir) -> JournalConfig {
    JournalConfig {
        folder: folder.path().join(FOLDER),
        max_bytes: 1 << 30,
        max_age: None,
        segment_bytes: 1 << 20,
        io_uring: true,
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

fn open(config: &JournalConfig) -> (Journal, Recovered) {
    Journal::open(config.clone()).unwrap()
}

/// Appends events with these payloads in one go.
fn append(journal: &Journal, payloads: &[&str]) -> (Receipt, u64) {
    let mut records = Records::default();
    for payload in payloads {
        let topic = Topic::new("plant/a").unwrap();
        records.push(&topic, payload.as_bytes(), 7, None, None);
    }
    let receipt = journal.receipt();
    let next = journal.try_append(&records, &receipt).unwrap();
    (receipt, next)
}

fn synced(journal: &Journal, next: u64) -> bool {
    let synced = async { tokio::time::timeout(PATIENCE, journal.synced(next)).await };
    runtime().block_on(synced).unwrap()
}

/// Appends what is on disk when this returns, one frame each, and is not finished.
fn write(journal: &Journal, payloads: &[&str]) -> Vec<Receipt> {
    let appended: Vec<_> = payloads.iter().map(|one| append(journal, &[one])).collect();
    let (receipts, positions): (Vec<_>, Vec<_>) = appended.into_iter().unzip();
    assert!(synced(journal, *positions.last().unwrap()));
    receipts
}

/// Ends, with these events unfinished.
fn leave<T>(journal: &Journal, unfinished: T) {
    journal.freeze();
    journal.close();
    drop(unfinished);
}

/// Waits until a write has failed.
fn until_failing(journal: &Journal) {
    let deadline = Instant::now() + PATIENCE;
    while journal.status().failures == 0 {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
}

/// Waits until the journal is so.
fn until(journal: &Journal, what: &str, is_so: impl Fn(&JournalStatus) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so(&journal.status()) {
        assert!(Instant::now() < deadline, "{what}: {:?}", journal.status());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Makes a segment look as if it had been begun then.
fn set_begun(segment: &Segment, begun_ns: u64) {
    let header = frame::segment_header(segment.first, begun_ns);
    let file = OpenOptions::new().write(true).open(&segment.path).unwrap();
    file.write_all_at(&header, 0).unwrap();
}

/// What a journal has: payloads, by sequence, and what is wrong.
fn read(folder: &Path) -> (Vec<(u64, String)>, Vec<Problem>) {
    let (mut events, mut problems) = (Vec::new(), Vec::new());
    for entry in Reading::open(folder, 0).unwrap() {
        match entry.unwrap() {
            Entry::Events(records) => events.extend(records.into_iter().map(|record| {
                assert_eq!((record.topic.as_str(), record.timestamp_ns), ("plant/a", 7));
                let payload = String::from_utf8(record.payload.to_vec()).unwrap();
                (record.sequence, payload)
            })),
            Entry::Problem { problem, .. } => problems.push(problem),
        }
    }
    (events, problems)
}

fn recovered(journal: &Journal, recovered: &Recovered) -> Vec<String> {
    let chunks = recovered.chunks(journal).unwrap();
    let records = chunks.flat_map(|chunk| chunk.unwrap().0);
    let payload = |record: Record| String::from_utf8(record.payload.to_vec()).unwrap();
    records.map(payload).collect()
}

fn only_segment(config: &JournalConfig) -> PathBuf {
    let segments = segment::list(&config.folder).unwrap();
    assert_eq!(segments.len(), 1, "{segments:?}");
    segments[0].path.clone()
}

#[test]
fn what_is_synced_is_there_after_a_new_start_and_what_was_not_finished_comes_again() {
    for io_uring in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let config = JournalConfig {
            io_uring,
            ..config(&folder)
        };
        let (journal, nothing) = open(&config);
        assert_eq!(recovered(&journal, &nothing), [""; 0]);
        let (first, _) = append(&journal, &["a", "b"]);
        let (second, _) = append(&journal, &["c"]);
        let (third, next) = append(&journal, &["d", ""]);
        assert!(synced(&journal, next));
        // Out of order, and the second one not at all.
        drop(third);
        drop(first);
        journal.freeze();
        drop(second);
        journal.close();
        let events: Vec<_> = ["a", "b", "c", "d", ""]
            .into_iter()
            .map(str::to_owned)
            .collect();
        let events: Vec<_> = (0..).zip(events).collect();
        assert_eq!(read(&config.folder), (events, vec![]));

        let (journal, again) = open(&config);
        assert_eq!(recovered(&journal, &again), ["c", "d", ""]);
        // All finished now.
        assert_eq!(journal.status().finished, 5);
        journal.close();
        let (journal, again) = open(&config);
        assert_eq!(recovered(&journal, &again), [""; 0]);
        let (_receipt, next) = append(&journal, &["e"]);
        assert_eq!(next, 6);
        journal.close();
    }
}

#[test]
fn what_a_crash_has_left_of_the_last_write_is_told_of_and_never_read() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder);
    let (journal, _) = open(&config);
    let receipts = write(&journal, &["first", "second"]);
    let before = fs::metadata(only_segment(&config)).unwrap().len();
    let last = write(&journal, &["the last one"]);
    leave(&journal, (receipts, last));
    let path = only_segment(&config);
    let whole = fs::read(&path).unwrap();
    let whole = &whole[..before as usize + 32 + 14 + 7 + 12];
    let kept: Vec<_> = [(0, "first".to_owned()), (1, "second".to_owned())].into();
    for length in before..whole.len() as u64 {
        fs::write(&path, &whole[..length as usize]).unwrap();
        let (events, problems) = read(&config.folder);
        assert_eq!(events, kept, "cut at {length}");
        let torn = Problem::Torn {
            at: before,
            bytes: length - before,
        };
        let expected = Vec::from_iter((length > before).then_some(torn));
        assert_eq!(problems, expected, "cut at {length}");
        // Zeros, for a file that has its length already but not its contents.
        let mut zeros = whole[..length as usize].to_vec();
        zeros.resize(whole.len() + 5000, 0);
        fs::write(&path, &zeros).unwrap();
        assert_eq!(read(&config.folder).0, kept, "zeros from {length} on");
    }
    let (journal, again) = open(&config);
    assert_eq!(recovered(&journal, &again), ["first", "second"]);
    let (_receipt, next) = append(&journal, &["new"]);
    assert!(next > 4, "no number is given twice: {next}");
    journal.close();
    let (events, problems) = read(&config.folder);
    assert_eq!(events.last().unwrap(), &(next - 1, "new".to_owned()));
    assert!(
        problems.iter().all(|problem| !problem.is_loss()),
        "{problems:?}"
    );
}

#[test]
fn a_segment_without_a_cursor_does_not_finish_what_is_in_the_one_before() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder);
    let (journal, _) = open(&config);
    let receipts = write(&journal, &["a", "b"]);
    leave(&journal, receipts);
    // As a crash leaves one that was just begun: without contents, or with half of its header.
    let whole = frame::segment_header(2, 0);
    for length in [0, 20, whole.len()] {
        fs::write(segment::path(&config.folder, 2), &whole[..length]).unwrap();
        let (journal, again) = open(&config);
        let chunks = again.chunks(&journal).unwrap().map(Result::unwrap);
        let (records, receipts): (Vec<_>, Vec<_>) = chunks.unzip();
        assert_eq!(records.concat().len(), 2, "{length}");
        leave(&journal, receipts);
    }
}

#[test]
fn what_is_no_segment_does_not_count() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder);
    let (journal, _) = open(&config);
    drop(write(&journal, &["a"]));
    journal.close();
    for name in [
        "7.journal",
        "+0000000000000000007.journal",
        "99999999999999999999.journal",
        "x",
        ".journal",
    ] {
        fs::write(config.folder.join(name), "x").unwrap();
    }
    fs::create_dir(segment::path(&config.folder, 7)).unwrap();
    assert_eq!(read(&config.folder), (vec![(0, "a".to_owned())], vec![]));
    let (journal, again) = open(&config);
    assert_eq!(
        (recovered(&journal, &again).len(), journal.status().next),
        (0, 1)
    );
    journal.close();
}

#[test]
fn a_bit_that_flipped_costs_its_frame_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder);
    let (journal, _) = open(&config);
    let receipts = write(&journal, &["first"]);
    let begin = fs::metadata(only_segment(&config)).unwrap().len();
    let second = write(&journal, &["second"]);
    let end = fs::metadata(only_segment(&config)).unwrap().len();
    let third = write(&journal, &["third"]);
    leave(&journal, (receipts, second, third));
    let path = only_segment(&config);
    let whole = fs::read(&path).unwrap();
    for position in begin..end {
        let mut damaged = whole.clone();
        damaged[position as usize] ^= 0x10;
        fs::write(&path, &damaged).unwrap();
        let (events, problems) = read(&config.folder);
        let others = [(0, "first".to_owned()), (2, "third".to_owned())];
        assert_eq!(events, others, "byte {position}");
        let [Problem::Damage { at, lost, .. }] = &problems[..] else {
            panic!("byte {position}: {problems:?}");
        };
        assert_eq!((*at, lost.clone()), (begin, 1..2), "byte {position}");
    }
}

#[test]
fn a_segment_that_is_gone_is_missed() {
    let folder = tempfile::tempdir().unwrap();
    let config = JournalConfig {
        segment_bytes: 1,
        ..config(&folder)
    };
    let (journal, _) = open(&config);
    let _receipts: Vec<_> = ["a", "b", "c", "d"]
        .iter()
        .map(|payload| write(&journal, &[payload]))
        .collect();
    journal.freeze();
    journal.close();
    let segments = segment::list(&config.folder).unwrap();
    assert_eq!(segments.len(), 4);
    fs::remove_file(&segments[1].path).unwrap();
    let (events, problems) = read(&config.folder);
    let sequences: Vec<_> = events.iter().map(|(sequence, _)| *sequence).collect();
    assert_eq!(sequences, [0, 2, 3]);
    assert_eq!(problems, [Problem::Missing { lost: 1..2 }]);
}

#[test]
fn the_oldest_segments_make_room_and_what_nobody_had_finished_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    let config = JournalConfig {
        segment_bytes: 1000,
        max_bytes: 5000,
        ..config(&folder)
    };
    let (journal, _) = open(&config);
    let payload = "x".repeat(900);
    let first = write(&journal, &[&payload]);
    drop(first);
    let kept: Vec<_> = (0..20).map(|_| write(&journal, &[&payload])).collect();
    let status = journal.status();
    assert!(status.bytes <= 6000, "{status:?}");
    assert_eq!(status.finished, 1);
    assert_eq!(status.lost_unfinished, status.first - 1, "{status:?}");
    let bytes: u64 = segment::list(&config.folder)
        .unwrap()
        .iter()
        .map(|one| one.bytes)
        .sum();
    assert_eq!(bytes, status.bytes);
    leave(&journal, kept);
    let (journal, again) = open(&config);
    let payloads = recovered(&journal, &again);
    assert_eq!(payloads.len() as u64, 21 - status.first);
    journal.close();
}

#[test]
fn what_is_finished_and_older_than_allowed_is_removed_and_what_no_app_has_finished_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let config = JournalConfig {
        segment_bytes: 1,
        max_age: Some(Duration::from_secs(3600)),
        ..config(&folder)
    };
    let (journal, _) = open(&config);
    let first = write(&journal, &["a"]);
    let second = write(&journal, &["b"]);
    // Said with the third one: a cursor of its own would begin a segment.
    drop((first, second));
    let third = write(&journal, &["c"]);
    let fourth = write(&journal, &["d"]);
    leave(&journal, (third, fourth));
    // The first three were over two hours ago, as the beginning of the fourth says.
    let segments = segment::list(&config.folder).unwrap();
    assert_eq!(segments.len(), 4);
    let two_hours_ago = unix_time_ns() - 2 * 3_600_000_000_000;
    for segment in &segments {
        set_begun(segment, two_hours_ago);
    }
    let (journal, again) = open(&config);
    until(&journal, "two are gone", |status| status.segments == 2);
    assert_eq!(journal.status().lost_unfinished, 0);
    assert_eq!(recovered(&journal, &again), ["c", "d"]);
    // All are finished now; the last event came this very minute.
    until(&journal, "the third is gone", |status| status.first == 3);
    journal.close();
    assert_eq!(read(&config.folder), (vec![(3, "d".to_owned())], vec![]));
}

#[test]
fn when_nothing_new_comes_all_goes_in_time_and_no_sequence_is_given_again() {
    let folder = tempfile::tempdir().unwrap();
    let config = JournalConfig {
        max_age: Some(Duration::from_secs(1)),
        ..config(&folder)
    };
    let (journal, _) = open(&config);
    let unfinished = write(&journal, &["a", "b"]);
    // Each in a segment of its own, since the one before takes in no more.
    until(&journal, "another segment", |_| {
        drop(write(&journal, &["c"]));
        segment::list(&config.folder).unwrap().len() > 1
    });
    assert_eq!(journal.status().first, 0, "a and b are not finished");
    drop(unfinished);
    let next = journal.status().next;
    until(&journal, "all are gone", |status| status.first == next);
    assert_eq!(journal.status().segments, 1);
    journal.close();
    assert_eq!(read(&config.folder), (vec![], vec![]));
    let (journal, again) = open(&config);
    assert_eq!(recovered(&journal, &again), [""; 0]);
    assert_eq!(append(&journal, &["new"]).1, next + 1);
    journal.close();
}

#[test]
fn nothing_is_synced_while_the_disk_refuses_and_all_is_when_it_does_not() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder);
    let (journal, _) = open(&config);
    // In the place of the segment.
    let path = segment::path(&config.folder, 0);
    fs::create_dir(&path).unwrap();
    let (_receipt, next) = append(&journal, &["a"]);
    until_failing(&journal);
    let status = journal.status();
    assert_eq!((status.next, status.durable), (1, 0), "{status:?}");
    assert!(status.error.is_some(), "{status:?}");
    fs::remove_dir(&path).unwrap();
    assert!(synced(&journal, next));
    assert_eq!(journal.status().error, None);
    journal.close();
    assert_eq!(read(&config.folder).0, [(0, "a".to_owned())]);
}

#[test]
fn what_waits_for_a_disk_that_refuses_has_a_bound_and_comes_after_it() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder);
    let (journal, _) = open(&config);
    let path = segment::path(&config.folder, 0);
    fs::create_dir(&path).unwrap();
    let payload = "x".repeat(8 << 20);
    // With the writer, which has found out that it can't write it.
    append(&journal, &["first"]);
    until_failing(&journal);
    let append = |payload: &str| {
        let mut records = Records::default();
        records.push(
            &Topic::new("plant/a").unwrap(),
            payload.as_bytes(),
            7,
            None,
            None,
        );
        Box::pin(journal.append(records, journal.receipt(), || {}))
    };
    let mut waiting: Vec<_> = (0..12).map(|_| append(&payload)).collect();
    let appended = journal.status().next;
    assert_eq!(appended, 9);
    // Who gives up has not sent it.
    let gone = append("gone");
    drop(gone);
    waiting.push(append("last"));
    fs::remove_dir(&path).unwrap();
    let all = async {
        for one in waiting {
            assert!(tokio::time::timeout(PATIENCE, one).await.unwrap());
        }
    };
    runtime().block_on(all);
    journal.close();
    let (events, problems) = read(&config.folder);
    assert_eq!((events.len(), problems), (14, vec![]));
    assert_eq!(events[13].1, "last");
}

#[test]
fn who_must_not_wait_for_a_disk_that_refuses_is_told_when_there_is_no_room() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder);
    let (journal, _) = open(&config);
    fs::create_dir(segment::path(&config.folder, 0)).unwrap();
    // With the writer, which has found out that it can't write it.
    append(&journal, &["first"]);
    until_failing(&journal);
    let mut records = Records::default();
    let payload = vec![b'x'; 8 << 20];
    records.push(&Topic::new("plant/a").unwrap(), &payload, 7, None, None);
    let append_until_full = async {
        let mut taken = 0;
        while journal
            .append_unless_failing(&records, &journal.receipt())
            .await
        {
            taken += 1;
        }
        taken
    };
    let taken = async { tokio::time::timeout(PATIENCE, append_until_full).await };
    let taken = runtime().block_on(taken).unwrap();
    assert_eq!(taken, 8);
    assert_eq!(journal.status().refused, 1);
    assert_eq!(journal.status().next, 1 + taken);
    journal.close();
}

#[test]
fn a_cursor_is_never_ahead_of_what_is_on_disk() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder);
    let (journal, _) = open(&config);
    let path = segment::path(&config.folder, 0);
    fs::create_dir(&path).unwrap();
    let (first, _) = append(&journal, &["a", "b"]);
    until_failing(&journal);
    let (second, next) = append(&journal, &["c"]);
    // Finished, and nothing of it is on disk.
    drop((first, second));
    assert_eq!(journal.status().finished, 3);
    fs::remove_dir(&path).unwrap();
    assert!(synced(&journal, next));
    journal.close();
    let mut end = 0;
    for segment in segment::list(&config.folder).unwrap() {
        let mut reader = Reader::open(&segment).unwrap();
        loop {
            match reader.next().unwrap() {
                Next::Frame(header, Frame::Events(_)) => end = header.next(),
                Next::Frame(_, Frame::Cursor(cursor)) => assert!(cursor <= end, "{cursor} > {end}"),
                Next::End => break,
                other => panic!("{other:?}"),
            }
        }
    }
    assert_eq!(end, 3);
}

#[test]
fn a_segment_that_was_cut_short_in_the_middle_of_the_journal_is_a_loss() {
    let folder = tempfile::tempdir().unwrap();
    let config = JournalConfig {
        segment_bytes: 500,
        ..config(&folder)
    };
    let (journal, _) = open(&config);
    let receipts: Vec<_> = (0..30).map(|_| write(&journal, &["a payload"])).collect();
    leave(&journal, receipts);
    let segments = segment::list(&config.folder).unwrap();
    assert!(segments.len() > 2);
    let file = OpenOptions::new()
        .write(true)
        .open(&segments[0].path)
        .unwrap();
    // In the middle of the second event's frame.
    file.set_len(32 + 40 + 55 + 20).unwrap();
    let (events, problems) = read(&config.folder);
    let lost: u64 = problems.iter().map(Problem::lost).sum();
    assert_eq!(events.len() as u64 + lost, 30, "{problems:?}");
    assert!(lost > 0);
}

#[test]
fn a_journal_that_can_not_be_written_at_the_end_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder);
    let (journal, _) = open(&config);
    fs::create_dir(segment::path(&config.folder, 0)).unwrap();
    let (_receipt, next) = append(&journal, &["a"]);
    journal.close();
    assert!(!synced(&journal, next));
}

#[test]
fn a_write_that_was_made_twice_is_read_once() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder);
    let (journal, _) = open(&config);
    let receipts = write(&journal, &["a", "b"]);
    leave(&journal, receipts);
    // As after an fdatasync that failed: the same events begin the next segment.
    let mut records = Records::default();
    records.push(&Topic::new("plant/a").unwrap(), b"b", 7, None, None);
    let mut next = frame::segment_header(1, 0).to_vec();
    records.write(1, 0, records.checksum(), &mut next);
    fs::write(segment::path(&config.folder, 1), next).unwrap();
    let expected = [(0, "a".to_owned()), (1, "b".to_owned())];
    assert_eq!(read(&config.folder), (expected.to_vec(), vec![]));
}

#[test]
fn many_who_wait_share_a_write() {
    let folder = tempfile::tempdir().unwrap();
    let (journal, _) = open(&config(&folder));
    let appended: Vec<_> = (0..5000).map(|_| append(&journal, &["x"])).collect();
    assert!(synced(&journal, 5000));
    let commits = journal.status().commits;
    assert!(commits < 2500, "{commits}");
    drop(appended);
    journal.close();
}

#[test]
fn keys_come_back_with_their_age_and_only_as_old_as_they_are_wanted() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder);
    let (journal, _) = open(&config);
    let now = unix_time_ns();
    let hours_ago = |hours: u64| now - hours * 3_600_000_000_000;
    let topic = Topic::new("plant/a").unwrap();
    let mut records = Records::default();
    records.push(&topic, b"without", hours_ago(1), None, None);
    records.push(&topic, b"with", hours_ago(1), Some([7; 16]), None);
    // The clock was wrong.
    records.push(
        &topic,
        b"to come",
        now + 3_600_000_000_000,
        Some([8; 16]),
        None,
    );
    let receipt = journal.receipt();
    let next = journal.try_append(&records, &receipt).unwrap();
    assert!(synced(&journal, next));
    journal.freeze();
    journal.close();

    let (journal, recovered) = open(&config);
    let keys = recovered.keys(Duration::from_secs(7_200)).unwrap();
    let keys: Vec<_> = keys.map(Result::unwrap).collect();
    assert_eq!(
        keys.iter().map(|(key, _)| key[0]).collect::<Vec<_>>(),
        [7, 8]
    );
    assert!(
        (3600..3700).contains(&keys[0].1.as_secs()),
        "{:?}",
        keys[0].1
    );
    assert_eq!(keys[1].1, Duration::ZERO);
    let mut payloads = Vec::new();
    for entry in Reading::open(&config.folder, 0).unwrap() {
        if let Entry::Events(records) = entry.unwrap() {
            payloads.extend(records.into_iter().map(|record| record.payload));
        }
    }
    assert_eq!(payloads, ["without", "with", "to come"]);
    journal.close();
}

#[test]
fn a_clock_that_was_set_back_and_put_right_makes_no_key_older_than_one_before_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(&folder);
    config.segment_bytes = 1;
    let (journal, _) = open(&config);
    let now = unix_time_ns();
    let topic = Topic::new("plant/a").unwrap();
    // Half an hour ago, and then by a clock that was three hours late.
    for (key, minutes_ago) in [(1, 30), (2, 200), (3, 190)] {
        let mut records = Records::default();
        let at = now - minutes_ago * 60_000_000_000;
        records.push(&topic, b"x", at, Some([key; 16]), None);
        let receipt = journal.receipt();
        let next = journal.try_append(&records, &receipt).unwrap();
        assert!(synced(&journal, next));
    }
    journal.freeze();
    journal.close();
    let (journal, recovered) = open(&config);
    let keys = recovered.keys(Duration::from_secs(3_600)).unwrap();
    let keys: Vec<_> = keys.map(Result::unwrap).collect();
    let found: Vec<_> = keys
        .iter()
        .map(|(key, age)| (key[0], age.as_secs() / 60))
        .collect();
    assert_eq!(found, [(1, 30), (2, 30), (3, 30)]);
    journal.close();
}

#[test]
fn keys_are_looked_for_from_the_segment_on_in_which_their_time_begins() {
    let folder = tempfile::tempdir().unwrap();
    let path = |first| segment::path(folder.path(), first);
    for (first, time) in [(0, 100), (10, 200), (20, 300)] {
        fs::write(path(first), frame::segment_header(first, time)).unwrap();
    }
    let first_since = |time| {
        let segments = segment::list(folder.path()).unwrap();
        segment::first_since(&segments, time, 2000)
    };
    assert_eq!(first_since(50), 0);
    assert_eq!(first_since(199), 0);
    assert_eq!(first_since(200), 10);
    assert_eq!(first_since(1000), 20);
    // Begun when the clock was late: what came before it may be of that time, too.
    let segments = |begun: &[u64]| {
        for (index, time) in begun.iter().enumerate() {
            let first = 10 * index as u64;
            fs::write(path(first), frame::segment_header(first, *time)).unwrap();
        }
    };
    segments(&[300, 100, 200]);
    assert_eq!(first_since(250), 0);
    // Begun when it was early.
    segments(&[100, 5000, 200]);
    assert_eq!(first_since(150), 10);
    segments(&[100, 5000, 6000]);
    assert_eq!(first_since(150), 0);
    segments(&[100, 200, 300]);
    // Of one that can't be read, nobody knows.
    fs::write(path(20), b"rubbish").unwrap();
    assert_eq!(first_since(1000), 10);
    fs::write(path(20), b"").unwrap();
    assert_eq!(first_since(1000), 10);
}

#[test]
fn it_is_said_when_events_are_on_their_way_and_never_of_those_that_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder);
    let (journal, _) = open(&config);
    // In the place of its first segment, so that nothing can be written.
    fs::create_dir(segment::path(&config.folder, 0)).unwrap();
    let on_their_way = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let append = |bytes: usize| {
        let mut records = Records::default();
        records.push(
            &Topic::new("plant/a").unwrap(),
            &vec![0; bytes],
            7,
            None,
            None,
        );
        let count = on_their_way.clone();
        journal.append(records, journal.receipt(), move || {
            count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        })
    };
    let waiting: Vec<_> = (0..12).map(|_| append(8 << 20)).collect();
    let appended = journal.status().next as usize;
    assert!(appended < 12, "{appended}");
    assert_eq!(
        on_their_way.load(std::sync::atomic::Ordering::SeqCst),
        appended
    );
    drop(waiting);
    assert_eq!(
        on_their_way.load(std::sync::atomic::Ordering::SeqCst),
        appended
    );
    journal.close();
}

#[test]
fn where_an_event_came_from_stands_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder);
    let (journal, _) = open(&config);
    let origins = [
        (None, ""),
        (Some(7), ""),
        (None, "a"),
        (Some(u32::MAX), "a,b"),
    ];
    let mut records = Records::default();
    for (link, via) in origins {
        let origin = Some(Origin { link, via });
        let key = link.map(|_| [9; 16]);
        records.push(&Topic::new("plant/a").unwrap(), b"x", 7, key, origin);
    }
    let mut follower = journal.follow(0).unwrap();
    let receipt = journal.receipt();
    let next = journal.try_append(&records, &receipt).unwrap();
    assert!(synced(&journal, next));
    let Some(Followed::Events(found)) = follower.read().unwrap() else {
        panic!("they are on disk");
    };
    let found: Vec<_> = found.iter().map(|one| (one.link, &*one.via)).collect();
    assert_eq!(found, origins);
    journal.close();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever happens to the file, what is read was written, in its order.
    #[test]
    fn nothing_is_read_that_was_not_written(
        frames in prop::collection::vec(prop::collection::vec("[a-z]{0,40}", 1..4), 1..8),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<[u8; 5]>()), 0..4),
        cut in any::<prop::sample::Index>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = segment::path(folder.path(), 0);
        let mut bytes = frame::segment_header(0, 0).to_vec();
        let mut written = Vec::new();
        for payloads in &frames {
            let mut records = Records::default();
            let first = written.len() as u64;
            for payload in payloads {
                records.push(&Topic::new("plant/a").unwrap(), payload.as_bytes(), 7, None, None);
                written.push((written.len() as u64, payload.clone()));
            }
            records.write(first, 0, records.checksum(), &mut bytes);
            frame::write_cursor(0, written.len() as u64, 0, &mut bytes);
        }
        fs::write(&path, &bytes).unwrap();
        prop_assert_eq!(read(folder.path()), (written.clone(), vec![]));
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        for (position, garbage) in &damage {
            file.write_all_at(garbage, position.index(bytes.len()) as u64).unwrap();
        }
        file.set_len(cut.index(bytes.len() + 1) as u64).unwrap();
        let (events, _) = read(folder.path());
        prop_assert!(events.is_sorted_by_key(|(sequence, _)| *sequence));
        for event in events {
            prop_assert!(written.contains(&event), "{:?}", event);
        }
        // And a gateway opens it.
        let config = JournalConfig {
            folder: folder.path().to_owned(),
            io_uring: false,
            ..config(&folder)
        };
        let (journal, again) = open(&config);
        recovered(&journal, &again);
        journal.close();
    }
}

/// All that a follower has to read now: the payloads, and how many events are lost.
fn followed(follower: &mut Follower) -> (Vec<String>, u64) {
    let (mut payloads, mut lost) = (Vec::new(), 0);
    while let Some(next) = follower.read().unwrap() {
        match next {
            Followed::Events(records) => payloads.extend(
                records
                    .iter()
                    .map(|record| String::from_utf8(record.payload.to_vec()).unwrap()),
            ),
            Followed::Lost(range) => lost += range.end - range.start,
        }
    }
    (payloads, lost)
}

#[test]
fn a_follower_reads_what_there_is_and_then_what_comes_through_all_segments() {
    let folder = TempDir::new().unwrap();
    let config = JournalConfig {
        segment_bytes: 200,
        ..config(&folder)
    };
    let (journal, _) = open(&config);
    leave(&journal, write(&journal, &["a", "b"]));
    let (journal, _) = open(&config);
    let mut follower = journal.follow(1).unwrap();
    assert_eq!(followed(&mut follower), (vec!["b".into()], 0));
    let mut kept = Vec::new();
    for round in 0..40 {
        let payload = format!("round {round}");
        kept.push(write(&journal, &[&payload]));
        assert!(runtime().block_on(follower.ready()));
        assert_eq!(followed(&mut follower), (vec![payload], 0));
    }
    assert!(journal.status().segments > 5);
    assert_eq!(follower.position(), 42);
    leave(&journal, kept);
    assert!(
        !runtime().block_on(follower.ready()),
        "nothing comes any more"
    );
}

#[test]
fn a_follower_of_an_empty_journal_finds_its_first_event() {
    let folder = TempDir::new().unwrap();
    let (journal, _) = open(&config(&folder));
    let mut follower = journal.follow(0).unwrap();
    assert_eq!(followed(&mut follower), (vec![], 0));
    let kept = write(&journal, &["a"]);
    assert_eq!(followed(&mut follower), (vec!["a".into()], 0));
    leave(&journal, kept);
}

#[test]
fn a_follower_that_is_too_slow_learns_what_it_has_missed() {
    let folder = TempDir::new().unwrap();
    let config = JournalConfig {
        segment_bytes: 200,
        max_bytes: 1000,
        ..config(&folder)
    };
    let (journal, _) = open(&config);
    let mut follower = journal.follow(0).unwrap();
    for round in 0..100 {
        drop(write(&journal, &[&format!("round {round}")]));
    }
    let first = journal.bounds().0;
    assert!(first > 50);
    let (payloads, lost) = followed(&mut follower);
    assert_eq!(lost, first);
    assert_eq!(payloads.len() as u64, 100 - first);
    leave(&journal, ());
}

#[test]
fn damage_costs_a_follower_what_it_hits_and_a_torn_end_nothing() {
    let folder = TempDir::new().unwrap();
    let config = config(&folder);
    let (journal, _) = open(&config);
    leave(&journal, write(&journal, &["a", "b", "c"]));
    let path = segment::list(&config.folder).unwrap()[0].path.clone();
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes
        .windows(9)
        .position(|window| window == b"plant/ab\0" || window.starts_with(b"plant/ab"));
    bytes[at.unwrap()] ^= 1;
    bytes.extend_from_slice(b"torn");
    fs::write(&path, bytes).unwrap();
    let (journal, _) = open(&config);
    let kept = write(&journal, &["d"]);
    let mut follower = journal.follow(0).unwrap();
    let (payloads, lost) = followed(&mut follower);
    assert_eq!(
        (payloads, lost),
        (vec!["a".into(), "c".into(), "d".into()], 1)
    );
    leave(&journal, kept);
}

#[test]
fn a_segment_that_is_begun_anew_under_a_follower_costs_it_nothing() {
    let folder = TempDir::new().unwrap();
    let config = config(&folder);
    let (journal, _) = open(&config);
    leave(&journal, write(&journal, &["a", "b"]));
    // After it numbers are left out, so that a follower looks for more at once.
    let mut file = OpenOptions::new()
        .append(true)
        .open(only_segment(&config))
        .unwrap();
    std::io::Write::write_all(&mut file, &[7; 100]).unwrap();
    // A run that finishes what is there and gets nothing new leaves a segment without events.
    let (journal, again) = open(&config);
    assert_eq!(recovered(&journal, &again), ["a", "b"]);
    leave(&journal, ());
    let empty = segment::list(&config.folder).unwrap().pop().unwrap();
    let (journal, _) = open(&config);
    assert_eq!(journal.bounds().1, empty.first);
    let mut follower = journal.follow(0).unwrap();
    assert_eq!(followed(&mut follower), (vec!["a".into(), "b".into()], 0));
    assert_eq!(follower.position(), empty.first);
    for payload in ["c", "d", "e"] {
        let kept = write(&journal, &[payload]);
        assert_eq!(followed(&mut follower), (vec![payload.into()], 0));
        drop(kept);
    }
    assert_eq!(segment::list(&config.folder).unwrap().len(), 2);
    leave(&journal, ());
}

#[test]
fn a_follower_tells_of_what_this_run_has_written_and_is_gone() {
    let folder = TempDir::new().unwrap();
    let (journal, _) = open(&config(&folder));
    // More than is read at once.
    let payload = "x".repeat(100_000);
    let kept = write(&journal, &[payload.as_str(); 5]);
    let mut follower = journal.follow(0).unwrap();
    assert!(matches!(follower.read(), Ok(Some(Followed::Events(_)))));
    let path = only_segment(&config(&folder));
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(250_000).unwrap();
    assert_eq!(followed(&mut follower), (vec![payload], 3));
    assert_eq!(follower.position(), 5);
    leave(&journal, kept);
}

#[test]
fn what_somebody_holds_does_not_go_on_account_of_its_age() {
    let folder = TempDir::new().unwrap();
    let config = JournalConfig {
        max_age: Some(Duration::from_millis(1)),
        ..config(&folder)
    };
    let (journal, _) = open(&config);
    journal.hold("link", 1);
    drop(write(&journal, &["a", "b"]));
    // Of two looks the second one sees what the first one's new segment left.
    until(&journal, "a new segment", |status| status.finished == 2);
    drop(write(&journal, &["c"]));
    let mut follower = journal.follow(1).unwrap();
    assert_eq!(followed(&mut follower), (vec!["b".into(), "c".into()], 0));
    journal.hold("link", 3);
    until(&journal, "nothing old", |status| status.first == 3);
    leave(&journal, ());
}

#[test]
fn a_follower_loses_nothing_of_what_is_written_while_it_reads() {
    let folder = TempDir::new().unwrap();
    let (journal, _) = open(&config(&folder));
    let payload = "x".repeat(200_000);
    // No more than may wait to be written.
    let events = 300;
    let writes = {
        let journal = journal.clone();
        std::thread::spawn(move || {
            let payloads = [payload.as_str(); 10];
            for _ in 0..events / 10 {
                drop(append(&journal, &payloads));
            }
        })
    };
    let mut follower = journal.follow(0).unwrap();
    let mut read = 0;
    while read < events {
        let ready = async { tokio::time::timeout(PATIENCE, follower.ready()).await };
        assert!(runtime().block_on(ready).unwrap());
        let (payloads, lost) = followed(&mut follower);
        assert_eq!(lost, 0);
        read += payloads.len();
        assert_eq!(follower.position(), read as u64);
    }
    writes.join().unwrap();
    leave(&journal, ());
}
