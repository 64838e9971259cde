//! What of the journal is on its way to the other side, and how far that has taken it: a state machine without I/O.
//!
//! Messages go out in the order of the journal, and the cursor moves over contiguous acknowledgements only. When
//! something went wrong, all that was not acknowledged goes out again, in its order.
//!
//! A stream that has no other writer is *exclusive*: each message says after which one of the stream it comes, so
//! that there is nothing in it twice and nothing out of order, however long the link was away. The last message of
//! the stream then tells where to go on ([`Window::resume`]). To such a stream messages go in batches, each of which it
//! takes as a whole or not at all ([`Window::send_batch`]).

use std::collections::{VecDeque, vec_deque};
use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

/// However bad the link is, so much may be on its way.
const LEAST_BYTES: usize = 64 << 10;

/// Most messages on their way: a server of streams takes 10,000 of all writers before it refuses more.
const MOST_MESSAGES: usize = 4096;

/// The same for a stream that no other writes to.
const MOST_MESSAGES_ALONE: usize = 8192;

/// Of a batch: more spare a server next to nothing, and have more wait for one that it does not take.
pub const BATCH_MESSAGES: usize = 64;

/// It is replicated as a whole; what is larger than an eighth of this gains little by it.
const BATCH_BYTES: usize = 64 << 10;

/// After so many refusals without a batch that was taken, it doesn't get longer until the next is tried.
const MOST_DOUBTS: u32 = 8;

/// Messages of the journal, from the first that was not acknowledged on.
#[derive(Debug)]
pub struct Window<M> {
    exclusive: bool,
    /// In the order of their sequences.
    messages: VecDeque<Entry<M>>,
    /// The sequence behind all that was taken in.
    next: u64,
    /// Those before this one are on their way, or done.
    unsent: usize,
    /// Of those on their way: how many, and how large.
    in_flight: usize,
    bytes: usize,
    /// Of all.
    held_bytes: usize,
    /// Most bytes that may be on their way now.
    limit: usize,
    max_bytes: usize,
    /// The number in the stream of what comes before the next one that is sent. None: not known, or not exclusive.
    tail: Option<u64>,
    /// How often all began again.
    attempt: u64,
    /// The last one that the other side has taken.
    last: Option<u64>,
    /// The number of the last message of the stream that is known to be from here, and its sequence: that is not
    /// always `last`, as what was displaced comes behind others.
    end: Option<(u64, u64)>,
    /// So many of those that are sent next go one by one.
    alone: usize,
    /// How many batches were not taken as such, since one was.
    doubts: u32,
}

#[derive(Debug)]
struct Entry<M> {
    sequence: u64,
    bytes: usize,
    /// In this attempt.
    sent: Option<Instant>,
    /// The number in the stream that it was to have then.
    number: Option<u64>,
    /// In an earlier one.
    was_sent: bool,
    /// The stream has said that it has not taken it.
    missing: bool,
    done: bool,
    message: M,
}

/// A message that is to be sent.
#[derive(Debug, PartialEq, Eq)]
pub struct Outgoing<'a, M> {
    pub sequence: u64,
    /// To be handed back with a refusal.
    pub attempt: u64,
    /// The number in the stream of the message that it follows.
    pub follows: Option<u64>,
    /// It was sent before.
    pub again: bool,
    pub message: &'a M,
}

/// Messages that are to be sent, and that the other side takes all of or none of.
#[derive(Debug)]
pub struct Batch<'a, M> {
    /// To be handed back with what the other side says to it.
    pub sequences: RangeInclusive<u64>,
    pub attempt: u64,
    /// The number in the stream of the message that the first one follows.
    pub follows: Option<u64>,
    entries: vec_deque::Iter<'a, Entry<M>>,
}

impl<'a, M> Batch<'a, M> {
    /// How many there are: with one it is no batch to the other side.
    pub fn count(&self) -> usize {
        self.messages().count()
    }

    /// The sequence of each, whether it was sent before, and the message.
    pub fn messages(&self) -> impl Iterator<Item = (u64, bool, &'a M)> + use<'a, M> {
        let sent = self.entries.clone().filter(|entry| entry.sent.is_some());
        sent.map(|entry| (entry.sequence, entry.was_sent, &entry.message))
    }
}

/// Messages that the other side has taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Acknowledged {
    pub events: usize,
    pub bytes: usize,
    /// In the last attempt, if it was.
    pub sent: Option<Instant>,
}

/// The end of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tail {
    /// The number of its last message; 0 if it never had one.
    pub number: u64,
    /// The sequence of that in this journal, if it came from there.
    pub ours: Option<u64>,
}

/// What a link has to do to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resumed {
    /// Nothing else.
    Onward,
    /// The stream has lost what it had acknowledged, from this sequence on: it is to be read again, see
    /// [`Window::rewind`].
    Lost { from: u64 },
    /// It has never had a message, and was to have one.
    Empty,
}

impl<M> Window<M> {
    /// From the event `next` on. `last` is the last one that the other side has taken.
    pub fn new(exclusive: bool, next: u64, last: Option<u64>, max_bytes: usize) -> Window<M> {
        let max_bytes = max_bytes.max(LEAST_BYTES);
        Window {
            exclusive,
            messages: VecDeque::new(),
            next,
            unsent: 0,
            in_flight: 0,
            bytes: 0,
            held_bytes: 0,
            limit: (max_bytes / 8).max(LEAST_BYTES),
            max_bytes,
            tail: None,
            attempt: 0,
            last,
            end: None,
            alone: 0,
            doubts: 0,
        }
    }

    /// All events before this one are done.
    pub fn cursor(&self) -> u64 {
        self.messages
            .front()
            .map_or(self.next, |first| first.sequence)
    }

    /// The last event that the other side has taken.
    pub fn last(&self) -> Option<u64> {
        self.last
    }

    /// The sequence of the event that is to be taken in next.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Whether nothing is on its way or waits for it.
    pub fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// How many were taken in and are not on their way yet.
    pub fn waiting(&self) -> usize {
        self.messages.len() - self.unsent
    }

    /// How many are on their way.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// The oldest message that was not acknowledged.
    pub fn front(&self) -> Option<&M> {
        self.messages.front().map(|first| &first.message)
    }

    /// Whether more may be taken in.
    pub fn has_room(&self) -> bool {
        self.held_bytes < self.limit && self.messages.len() < 2 * self.most_messages()
    }

    fn most_messages(&self) -> usize {
        match self.exclusive {
            true => MOST_MESSAGES_ALONE,
            false => MOST_MESSAGES,
        }
    }

    /// Takes a message in. What the stream is known to have is left out.
    pub fn push(&mut self, sequence: u64, bytes: usize, message: M) {
        self.next = sequence + 1;
        if self.exclusive && self.last.is_some_and(|last| sequence <= last) {
            return;
        }
        self.held_bytes += bytes;
        self.messages.push_back(Entry {
            sequence,
            bytes,
            sent: None,
            number: None,
            was_sent: false,
            missing: false,
            done: false,
            message,
        });
    }

    /// The events before `next` are none of this link's.
    pub fn skip_to(&mut self, next: u64) {
        self.next = self.next.max(next);
    }

    /// The next message that is to be sent, if it may be.
    pub fn send(&mut self, now: Instant) -> Option<Outgoing<'_, M>> {
        let most = self.most_messages();
        while self.messages.get(self.unsent)?.done {
            self.unsent += 1;
        }
        let entry = self.messages.get_mut(self.unsent)?;
        let is_full = self.bytes + entry.bytes > self.limit || self.in_flight >= most;
        if is_full && self.in_flight > 0 {
            return None;
        }
        if self.exclusive && self.tail.is_none() {
            return None;
        }
        let follows = self.tail;
        self.tail = follows.map(|number| number + 1);
        self.unsent += 1;
        self.in_flight += 1;
        self.bytes += entry.bytes;
        entry.sent = Some(now);
        entry.number = self.tail;
        entry.missing = false;
        Some(Outgoing {
            sequence: entry.sequence,
            attempt: self.attempt,
            follows,
            again: entry.was_sent,
            message: &entry.message,
        })
    }

    /// The next messages that are to be sent together, if any may be: at most so many, and each that does not fit into
    /// a batch by itself.
    pub fn send_batch(
        &mut self,
        most: usize,
        fits: impl Fn(&M) -> bool,
        now: Instant,
    ) -> Option<Batch<'_, M>> {
        let Outgoing {
            sequence: first,
            attempt,
            follows,
            ..
        } = self.send(now)?;
        let begin = self.unsent - 1;
        let most = match self.alone {
            0 if fits(&self.messages[begin].message) => most,
            _ => 1,
        };
        self.alone = self.alone.saturating_sub(1);
        let before = self.bytes - self.messages[begin].bytes;
        let mut last = first;
        for _ in 1..most {
            let next = self.messages.range(self.unsent..).find(|next| !next.done);
            let goes_along = next.is_some_and(|next| {
                self.bytes - before + next.bytes <= BATCH_BYTES && fits(&next.message)
            });
            if !goes_along {
                break;
            }
            match self.send(now) {
                Some(next) => last = next.sequence,
                None => break,
            }
        }
        Some(Batch {
            sequences: first..=last,
            attempt,
            follows,
            entries: self.messages.range(begin..self.unsent),
        })
    }

    /// A batch was not taken, and one of its messages or that it is one may be why. After [`Window::go_back`] its
    /// messages go one by one, to see which it is, and some that come then: more of them each time that no batch was
    /// taken in between.
    pub fn doubt(&mut self, batch: &RangeInclusive<u64>) {
        let before = self
            .messages
            .partition_point(|entry| entry.sequence <= *batch.end());
        self.alone = before + (BATCH_MESSAGES << self.doubts);
        self.doubts = MOST_DOUBTS.min(self.doubts + 1);
    }

    /// The other side has taken a message. None: that is no news; or it was in an attempt that was given up, and the
    /// stream is exclusive: its end tells that.
    pub fn acknowledge(&mut self, sequence: u64) -> Option<Acknowledged> {
        self.acknowledge_batch(&(sequence..=sequence))
    }

    /// The same of all messages of a batch.
    pub fn acknowledge_batch(&mut self, batch: &RangeInclusive<u64>) -> Option<Acknowledged> {
        let mut all = Acknowledged {
            events: 0,
            bytes: 0,
            sent: None,
        };
        for entry in within(&mut self.messages, batch) {
            if entry.done || self.exclusive && entry.sent.is_none() {
                continue;
            }
            entry.done = true;
            if let Some(sent) = entry.sent.take() {
                self.in_flight -= 1;
                self.bytes -= entry.bytes;
                all.sent = Some(sent);
            }
            all.events += 1;
            all.bytes += entry.bytes;
        }
        if all.events == 0 {
            return None;
        }
        if all.events > 1 {
            self.doubts = 0;
        }
        self.limit = (self.limit + all.bytes).min(self.max_bytes);
        self.advance();
        Some(all)
    }

    /// The other side will never take a message: it is done with. None if it is none of those that wait. To go on
    /// where others are on their way after it, call [`Window::go_back`].
    pub fn remove(&mut self, sequence: u64) -> Option<M> {
        let index = self.find(sequence)?;
        if self.messages[index].done {
            return None;
        }
        let entry = self.messages.remove(index)?;
        if entry.sent.is_some() {
            self.in_flight -= 1;
            self.bytes -= entry.bytes;
        }
        self.held_bytes -= entry.bytes;
        if index < self.unsent {
            self.unsent -= 1;
        }
        self.advance();
        Some(entry.message)
    }

    /// The stream has not taken a batch, as it would not have come after the one that it was to follow. All others
    /// on their way are to be answered before [`Window::go_back`]: where somebody else has written to the stream, it
    /// may have those behind it. Returns the number in the stream that the first message was to have.
    pub fn miss(&mut self, batch: &RangeInclusive<u64>) -> Option<u64> {
        let mut first = None;
        for entry in within(&mut self.messages, batch) {
            if entry.done || entry.sent.take().is_none() {
                continue;
            }
            entry.missing = true;
            entry.was_sent = true;
            self.in_flight -= 1;
            self.bytes -= entry.bytes;
            first = first.or(entry.number);
        }
        first
    }

    /// Whether a refusal is about this attempt, and not about one that was given up.
    pub fn is_current(&self, attempt: u64) -> bool {
        self.attempt == attempt
    }

    /// Since when the one that waits the longest for its acknowledgement does.
    pub fn waiting_since(&self) -> Option<Instant> {
        self.messages
            .iter()
            .take(self.unsent)
            .find_map(|entry| entry.sent)
    }

    /// When that has waited for too long.
    pub fn deadline(&self, patience: Duration) -> Option<Instant> {
        self.waiting_since().map(|since| since + patience)
    }

    /// Something went wrong: what was not acknowledged is to be sent again, and less at a time.
    pub fn go_back(&mut self) {
        for entry in self.messages.iter_mut().take(self.unsent) {
            entry.was_sent |= entry.sent.take().is_some();
        }
        self.attempt += 1;
        self.unsent = 0;
        self.in_flight = 0;
        self.bytes = 0;
        self.tail = None;
        self.limit = (self.limit / 2).max(LEAST_BYTES);
    }

    /// Messages that an exclusive stream may have taken without that we know: the number in it that each was to have,
    /// if it is one of these, and its sequence. Before [`Window::resume`] it is to be looked at what is there.
    pub fn unsure(&self, numbers: RangeInclusive<u64>) -> Vec<(u64, u64)> {
        let open = self.messages.iter().filter(|entry| !entry.done);
        open.filter_map(|entry| Some((entry.number?, entry.sequence)))
            .filter(|(number, _)| numbers.contains(number))
            .collect()
    }

    /// The stream has a message.
    pub fn is_there(&mut self, sequence: u64) {
        if let Some(index) = self.find(sequence) {
            self.messages[index].done = true;
            self.advance();
        }
    }

    /// The stream has somebody else's message under the number that this one was to have.
    pub fn is_displaced(&mut self, sequence: u64) {
        if let Some(index) = self.find(sequence) {
            self.messages[index].missing = true;
        }
    }

    /// Goes on after [`Window::go_back`], or begins, at the end of an exclusive stream.
    pub fn resume(&mut self, tail: Tail) -> Resumed {
        let had = self.last;
        if let Some(ours) = tail.ours {
            let is_end = self.end == Some((tail.number, ours));
            if had.is_some_and(|had| ours < had) && !is_end {
                return Resumed::Lost { from: ours + 1 };
            }
            let before = self
                .messages
                .iter_mut()
                .take_while(|entry| entry.sequence <= ours);
            before
                .filter(|entry| !entry.missing)
                .for_each(|entry| entry.done = true);
            self.advance();
            if self
                .messages
                .front()
                .is_none_or(|first| first.sequence > ours)
            {
                self.last = had.max(Some(ours));
            }
        } else if tail.number == 0 && had.is_some() {
            return Resumed::Empty;
        }
        self.tail = Some(tail.number);
        Resumed::Onward
    }

    /// Begins again at the event `from`, whatever was acknowledged: what comes from there on has to be taken in
    /// again. `last` is the last one that the other side still has.
    pub fn rewind(&mut self, from: u64, last: Option<u64>) {
        self.go_back();
        self.messages.clear();
        self.held_bytes = 0;
        self.next = from;
        self.last = last;
        self.end = None;
    }

    fn find(&self, sequence: u64) -> Option<usize> {
        self.messages
            .binary_search_by_key(&sequence, |entry| entry.sequence)
            .ok()
    }

    fn advance(&mut self) {
        while let Some(done) = self.messages.pop_front_if(|entry| entry.done) {
            if done.sent.is_some() {
                self.in_flight -= 1;
                self.bytes -= done.bytes;
            }
            self.held_bytes -= done.bytes;
            self.unsent = self.unsent.saturating_sub(1);
            self.last = self.last.max(Some(done.sequence));
            let end = done.number.map(|number| (number, done.sequence));
            self.end = self.end.max(end);
        }
    }
}

/// Those with these sequences.
fn within<'a, M>(
    messages: &'a mut VecDeque<Entry<M>>,
    sequences: &RangeInclusive<u64>,
) -> impl Iterator<Item = &'a mut Entry<M>> + use<'a, M> {
    let begin = messages.partition_point(|entry| entry.sequence < *sequences.start());
    let end = *sequences.end();
    let entries = messages.range_mut(begin..);
    entries.take_while(move |entry| entry.sequence <= end)
}

/// Up to where events are safe with the other side: what it had acknowledged a while ago.
#[derive(Debug)]
pub struct SafePoint {
    hold: Duration,
    /// Where the cursor was, and when.
    cursors: VecDeque<(Instant, u64)>,
    safe: u64,
}

impl SafePoint {
    pub fn new(hold: Duration, safe: u64) -> SafePoint {
        SafePoint {
            hold,
            cursors: VecDeque::new(),
            safe,
        }
    }

    /// To be called now and then. All events before what is returned may go.
    pub fn note(&mut self, cursor: u64, now: Instant) -> u64 {
        // A link that began again makes nothing safe that it has not taken since.
        while self
            .cursors
            .pop_back_if(|(_, noted)| *noted > cursor)
            .is_some()
        {}
        if self.cursors.back().is_none_or(|(_, noted)| *noted < cursor) {
            self.cursors.push_back((now, cursor));
        }
        let is_over =
            |(at, _): &mut (Instant, u64)| now.saturating_duration_since(*at) >= self.hold;
        while let Some((_, safe)) = self.cursors.pop_front_if(is_over) {
            self.safe = self.safe.max(safe);
        }
        self.safe
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(exclusive: bool) -> Window<&'static str> {
        Window::new(exclusive, 10, None, 1 << 20)
    }

    fn filled(exclusive: bool, sequences: &[u64]) -> Window<&'static str> {
        let mut window = window(exclusive);
        for sequence in sequences {
            window.push(*sequence, 100, "event");
        }
        window
    }

    /// What is sent now: sequences, each with what it follows.
    fn sent(window: &mut Window<&'static str>) -> Vec<(u64, Option<u64>)> {
        let now = Instant::now();
        let mut sent = Vec::new();
        while let Some(outgoing) = window.send(now) {
            sent.push((outgoing.sequence, outgoing.follows));
        }
        sent
    }

    #[test]
    fn the_cursor_moves_over_contiguous_acknowledgements_only() {
        let mut window = filled(false, &[10, 12, 13]);
        window.skip_to(20);
        assert_eq!(sent(&mut window), [(10, None), (12, None), (13, None)]);
        assert!(window.acknowledge(12).is_some());
        assert!(window.acknowledge(12).is_none(), "it was done");
        assert_eq!((window.cursor(), window.last()), (10, None));
        window.acknowledge(10);
        assert_eq!((window.cursor(), window.last()), (13, Some(12)));
        window.acknowledge(13);
        assert_eq!((window.cursor(), window.last()), (20, Some(13)));
        assert!(window.acknowledge(99).is_none());
    }

    #[test]
    fn what_was_not_acknowledged_goes_out_again_in_its_order() {
        let mut window = filled(false, &[10, 11, 12]);
        sent(&mut window);
        window.acknowledge(11);
        assert!(window.is_current(0));
        window.go_back();
        assert!(!window.is_current(0));
        assert_eq!(window.waiting_since(), None);
        assert_eq!(sent(&mut window), [(10, None), (12, None)]);
        window.acknowledge(10);
        window.acknowledge(12);
        assert!(window.is_empty());
        assert_eq!(window.bytes, 0);
        assert_eq!(window.held_bytes, 0);
    }

    #[test]
    fn an_exclusive_stream_says_where_to_go_on() {
        let mut window = filled(true, &[10, 11, 12]);
        assert_eq!(sent(&mut window), [], "its end is not known");
        let tail = |number, ours| Tail { number, ours };
        assert_eq!(window.resume(tail(0, None)), Resumed::Onward);
        assert_eq!(
            sent(&mut window),
            [(10, Some(0)), (11, Some(1)), (12, Some(2))]
        );
        window.acknowledge(10);
        window.go_back();
        // The acknowledgement of 11 was lost, 12 never arrived.
        assert_eq!(window.resume(tail(2, Some(11))), Resumed::Onward);
        assert_eq!(window.cursor(), 12);
        assert_eq!(sent(&mut window), [(12, Some(2))]);
    }

    #[test]
    fn what_another_writer_has_displaced_is_sent_again() {
        let mut window = filled(true, &[10, 11, 12]);
        window.resume(Tail {
            number: 0,
            ours: None,
        });
        sent(&mut window);
        // Somebody's message became number 1, so that 11 and 12 follow what they were to follow.
        assert_eq!(window.miss(&(10..=10)), Some(1));
        window.acknowledge(11);
        assert_eq!(window.in_flight(), 1);
        window.go_back();
        window.resume(Tail {
            number: 3,
            ours: Some(12),
        });
        assert_eq!(window.cursor(), 10);
        assert_eq!(sent(&mut window), [(10, Some(3))]);
        window.acknowledge(10);
        assert_eq!(
            (window.cursor(), window.in_flight(), window.bytes),
            (13, 0, 0)
        );
    }

    #[test]
    fn what_was_displaced_before_the_connection_broke_is_sent_again() {
        let mut window = filled(true, &[10, 11, 12, 13]);
        let tail = |number, ours| Tail { number, ours };
        window.resume(tail(0, None));
        sent(&mut window);
        window.go_back();
        // Somebody's message became number 1; of 13 nothing is known, as it would be behind the end.
        assert_eq!(window.unsure(1..=3), [(1, 10), (2, 11), (3, 12)]);
        window.is_displaced(10);
        window.is_there(11);
        window.is_there(12);
        assert_eq!(window.resume(tail(3, Some(12))), Resumed::Onward);
        assert_eq!(sent(&mut window), [(10, Some(3)), (13, Some(4))]);
        window.acknowledge(10);
        assert_eq!((window.cursor(), window.last()), (13, Some(12)));
        window.go_back();
        // 13 did not arrive: that the stream ends with 10 is no loss.
        assert_eq!(window.unsure(1..=4), []);
        assert_eq!(window.resume(tail(4, Some(10))), Resumed::Onward);
        assert_eq!(window.last(), Some(12));
        assert_eq!(sent(&mut window), [(13, Some(4))]);
        window.go_back();
        assert_eq!(
            window.resume(tail(3, Some(10))),
            Resumed::Lost { from: 11 },
            "others are gone"
        );
    }

    #[test]
    fn what_is_there_is_not_sent_again_behind_somebody_elses_message() {
        let mut window = filled(true, &[10, 11, 12]);
        let tail = |number, ours| Tail { number, ours };
        window.resume(tail(0, None));
        sent(&mut window);
        window.go_back();
        assert_eq!(window.unsure(1..=3), [(1, 10), (2, 11), (3, 12)]);
        window.is_there(10);
        window.is_there(11);
        window.is_displaced(12);
        assert_eq!(window.resume(tail(3, None)), Resumed::Onward);
        assert_eq!(window.cursor(), 12);
        assert_eq!(sent(&mut window), [(12, Some(3))]);
    }

    #[test]
    fn of_an_exclusive_stream_no_late_acknowledgement_counts() {
        let mut window = filled(true, &[10, 11, 12]);
        let empty = Tail {
            number: 0,
            ours: None,
        };
        window.resume(empty);
        sent(&mut window);
        window.go_back();
        window.resume(empty);
        assert_eq!(window.acknowledge(11), None);
        assert_eq!(sent(&mut window).len(), 3);
    }

    #[test]
    fn what_a_stream_has_taken_before_a_crash_is_not_sent_again() {
        let mut window = window(true);
        window.resume(Tail {
            number: 7,
            ours: Some(11),
        });
        for sequence in 10..14 {
            window.push(sequence, 100, "event");
        }
        assert_eq!(sent(&mut window), [(12, Some(7)), (13, Some(8))]);
    }

    #[test]
    fn a_stream_that_lost_what_it_had_acknowledged_gets_it_again() {
        let mut window = filled(true, &[10, 11, 12]);
        window.resume(Tail {
            number: 0,
            ours: None,
        });
        sent(&mut window);
        for sequence in 10..13 {
            window.acknowledge(sequence);
        }
        window.go_back();
        let tail = Tail {
            number: 1,
            ours: Some(10),
        };
        assert_eq!(window.resume(tail), Resumed::Lost { from: 11 });
        window.rewind(11, Some(10));
        assert_eq!((window.cursor(), window.last()), (11, Some(10)));
        assert_eq!(window.resume(tail), Resumed::Onward);
        window.push(11, 100, "event");
        assert_eq!(sent(&mut window), [(11, Some(1))]);
        window.go_back();
        assert_eq!(
            window.resume(Tail {
                number: 0,
                ours: None
            }),
            Resumed::Empty
        );
        window.rewind(5, None);
        assert_eq!(
            window.resume(Tail {
                number: 0,
                ours: None
            }),
            Resumed::Onward
        );
    }

    #[test]
    fn a_message_that_nobody_takes_is_left_out() {
        let mut window = filled(true, &[10, 11, 12]);
        window.resume(Tail {
            number: 0,
            ours: None,
        });
        sent(&mut window);
        window.acknowledge(10);
        assert_eq!(window.remove(11), Some("event"));
        assert_eq!(window.remove(11), None);
        window.go_back();
        window.resume(Tail {
            number: 1,
            ours: Some(10),
        });
        assert_eq!(sent(&mut window), [(12, Some(1))]);
        window.acknowledge(12);
        assert_eq!(window.cursor(), 13);
        assert_eq!((window.bytes, window.held_bytes), (0, 0));
    }

    #[test]
    fn no_more_is_on_its_way_than_the_link_takes() {
        let mut window = Window::new(false, 0, None, 1 << 20);
        let bytes = 60 << 10;
        let mut taken = 0;
        let mut fill = |window: &mut Window<()>| {
            while window.has_room() {
                window.push(taken, bytes, ());
                taken += 1;
            }
            let mut sent = 0;
            while window.send(Instant::now()).is_some() {
                sent += 1;
            }
            sent
        };
        assert_eq!(fill(&mut window), 2, "an eighth at first");
        let mut most = 0;
        for sequence in 0..60 {
            window.acknowledge(sequence);
            fill(&mut window);
            most = most.max(window.bytes);
        }
        assert!(most > (1 << 20) - bytes && most <= 1 << 20, "{most}");
        for _ in 0..10 {
            window.go_back();
        }
        assert_eq!(fill(&mut window), 1);
        let mut small = Window::new(false, 0, None, 1);
        small.push(0, 10 << 20, ());
        assert!(
            small.send(Instant::now()).is_some(),
            "a large one goes alone"
        );
    }

    /// What is sent in batches now: sequences of each, with what the first follows.
    fn batches(window: &mut Window<&'static str>) -> Vec<(Vec<u64>, Option<u64>)> {
        let now = Instant::now();
        let mut batches = Vec::new();
        while let Some(batch) = window.send_batch(BATCH_MESSAGES, |_| true, now) {
            let sequences: Vec<u64> = batch.messages().map(|(sequence, ..)| sequence).collect();
            assert_eq!(
                (Some(batch.sequences.start()), Some(batch.sequences.end())),
                (sequences.first(), sequences.last())
            );
            batches.push((sequences, batch.follows));
        }
        batches
    }

    /// At the end of a stream with so many messages, none of them ours.
    fn tail(number: u64) -> Tail {
        Tail { number, ours: None }
    }

    #[test]
    fn a_batch_is_acknowledged_as_a_whole() {
        let sequences: Vec<u64> = (0..150).map(|number| 10 + 2 * number).collect();
        let mut window = filled(true, &sequences);
        assert_eq!(batches(&mut window), [], "its end is not known");
        window.resume(tail(7));
        assert_eq!(
            batches(&mut window),
            [
                (sequences[..64].to_vec(), Some(7)),
                (sequences[64..128].to_vec(), Some(71)),
                (sequences[128..].to_vec(), Some(135)),
            ]
        );
        assert!(window.acknowledge_batch(&(138..=264)).is_some());
        assert_eq!((window.cursor(), window.in_flight()), (10, 86));
        let acknowledged = window.acknowledge_batch(&(10..=136)).unwrap();
        assert_eq!((acknowledged.events, acknowledged.bytes), (64, 6400));
        assert_eq!((window.cursor(), window.last()), (266, Some(264)));
        assert_eq!(window.acknowledge_batch(&(10..=136)), None, "it was done");
        assert_eq!((window.in_flight(), window.bytes), (22, 2200));
    }

    #[test]
    fn a_batch_has_no_more_bytes_than_is_good_for_the_servers() {
        let mut window = window(true);
        window.resume(tail(0));
        for (sequence, bytes) in [(10, 40 << 10), (11, 24 << 10), (12, 1), (13, 100 << 10)] {
            window.push(sequence, bytes, "event");
        }
        window.limit = 1 << 20;
        let sent: Vec<_> = batches(&mut window);
        let sent: Vec<_> = sent.iter().map(|(sequences, _)| &sequences[..]).collect();
        assert_eq!(sent, [&[10, 11][..], &[12], &[13]]);
    }

    #[test]
    fn of_a_batch_that_was_not_taken_each_message_goes_alone_to_see_which_one_it_is() {
        let mut window = filled(true, &[10, 11, 12]);
        window.resume(tail(0));
        assert_eq!(batches(&mut window), [(vec![10, 11, 12], Some(0))]);
        window.doubt(&(10..=12));
        window.go_back();
        window.resume(tail(0));
        let alone = |sequence: u64| (vec![sequence], Some(sequence - 10));
        assert_eq!(batches(&mut window), [alone(10), alone(11), alone(12)]);
        window.acknowledge(10);
        window.remove(11);
        window.go_back();
        window.resume(Tail {
            number: 1,
            ours: Some(10),
        });
        assert_eq!(batches(&mut window), [(vec![12], Some(1))]);
    }

    #[test]
    fn batches_are_tried_again_the_later_the_more_were_not_taken() {
        let mut window = window(true);
        // Two wait at any time: how many go alone until there is a batch of them, which is taken or not.
        let mut alone_until = |taken: bool| {
            window.resume(tail(7));
            let mut alone = 0;
            loop {
                while window.messages.len() < 2 {
                    window.push(window.next(), 100, "event");
                }
                let sent = batches(&mut window);
                let both = window.cursor()..=window.next() - 1;
                if sent.len() == 1 && !taken {
                    window.miss(&both);
                    window.doubt(&both);
                    window.go_back();
                    return alone;
                }
                assert!(!sent.is_empty());
                if sent.len() == 1 {
                    window.acknowledge_batch(&both);
                    return alone;
                }
                alone += 2;
                for sequence in both {
                    window.acknowledge(sequence);
                }
            }
        };
        assert_eq!(alone_until(false), 0);
        let alone: Vec<_> = (0..12).map(|_| alone_until(false)).collect();
        assert_eq!(alone[..3], [66, 130, 258]);
        assert_eq!(alone[8..], [2 + (64 << 8); 4]);
        assert_eq!(alone_until(true), 2 + (64 << 8));
        assert_eq!(alone_until(false), 0);
        assert_eq!(alone_until(true), 66);
    }

    #[test]
    fn what_another_writer_has_displaced_of_a_batch_is_all_of_it() {
        let sequences: Vec<u64> = (10..138).collect();
        let mut window = filled(true, &sequences);
        window.resume(tail(0));
        assert_eq!(batches(&mut window).len(), 2);
        // Somebody wrote as many as the first batch has, so that the second follows what it was to follow.
        assert_eq!(window.miss(&(10..=73)), Some(1));
        window.acknowledge_batch(&(74..=137));
        assert_eq!((window.in_flight(), window.bytes), (0, 0));
        window.go_back();
        window.resume(Tail {
            number: 128,
            ours: Some(137),
        });
        let first = (sequences[..64].to_vec(), Some(128));
        assert_eq!(batches(&mut window), [first]);
    }

    #[test]
    fn what_a_stream_had_taken_before_it_said_so_is_not_sent_again() {
        let mut window = filled(true, &[10, 11, 12]);
        window.resume(tail(0));
        batches(&mut window);
        window.go_back();
        // It is about to take all three, and has taken one.
        let first = Tail {
            number: 1,
            ours: Some(10),
        };
        window.resume(first);
        assert_eq!(batches(&mut window), [(vec![11, 12], Some(1))]);
        assert_eq!(window.miss(&(11..=12)), Some(2));
        window.go_back();
        assert_eq!(window.unsure(1..=3), [(2, 11), (3, 12)]);
        window.is_there(11);
        window.is_there(12);
        window.resume(Tail {
            number: 3,
            ours: Some(12),
        });
        assert_eq!((window.cursor(), batches(&mut window)), (13, vec![]));
    }

    #[test]
    fn an_event_is_safe_when_it_was_acknowledged_long_ago() {
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let mut safe = SafePoint::new(Duration::from_secs(60), 3);
        assert_eq!(safe.note(10, at(0)), 3);
        assert_eq!(safe.note(20, at(30)), 3);
        assert_eq!(safe.note(20, at(60)), 10);
        // The stream has lost what it had acknowledged.
        assert_eq!(safe.note(15, at(70)), 10);
        assert_eq!(safe.note(15, at(100)), 10);
        assert_eq!(safe.note(15, at(130)), 15);
    }
}
