//! Many connections on one thread.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Barrier;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};

use crate::load::{self, Course, LOOK, Load, Publisher, Sent, Subscriber, Tally};
use crate::reading;

/// Sockets that one look takes note of.
const EVENTS: usize = 1024;

/// Where one of many publishers is.
#[derive(Default)]
struct Turn {
    /// What of its frames it has begun to send.
    begun: Range<usize>,
    is_due: bool,
    is_done: bool,
}

/// Lets all of `publishers` send flat out, in turns: whoever's socket takes something.
pub(crate) fn send(
    load: &Load,
    mut publishers: Vec<Publisher>,
    course: &Course,
    gate: &Barrier,
) -> Result<Sent> {
    ensure!(load.qos == 0, "so many publishers send at QoS 0 only");
    let mut poll = Poll::new()?;
    for (index, publisher) in publishers.iter_mut().enumerate() {
        let socket = publisher.socket();
        socket.set_nonblocking(true)?;
        let descriptor = socket.as_raw_fd();
        poll.registry()
            .register(&mut SourceFd(&descriptor), Token(index), Interest::WRITABLE)?;
    }
    let mut events = Events::with_capacity(EVENTS);
    let mut turns: Vec<Turn> = publishers.iter().map(|_| Turn::default()).collect();
    // Those whose sockets take something.
    let mut due = VecDeque::new();
    let mut unfinished = publishers.len();
    gate.wait();
    let deadline = load.deadline();
    while unfinished > 0 && !course.failed.load(Ordering::Relaxed) {
        let patience = if due.is_empty() { LOOK } else { Duration::ZERO };
        poll_again(&mut poll, &mut events, patience)?;
        for event in &events {
            let index = event.token().0;
            if !turns[index].is_due && !turns[index].is_done {
                turns[index].is_due = true;
                due.push_back(index);
            }
        }
        // A turn for each, then a look for others.
        for _ in 0..due.len() {
            let Some(index) = due.pop_front() else { break };
            let (publisher, turn) = (&mut publishers[index], &mut turns[index]);
            if turn.begun.is_empty() {
                let left = load.quota(publisher.index) - publisher.sent;
                let now = Instant::now();
                if left == 0 || deadline.is_some_and(|deadline| now >= deadline) {
                    turn.is_done = true;
                    unfinished -= 1;
                    continue;
                }
                let time = reading::time_digits(reading::nanoseconds_at(now));
                turn.begun = publisher.prepare(left, &time);
            }
            match publisher.write(turn.begun.clone()) {
                Ok(count) => turn.begun.start += count,
                // It is told of again.
                Err(error) if error.kind() == ErrorKind::WouldBlock => turn.is_due = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("the broker does not take messages in"),
            }
            if turn.is_due {
                due.push_back(index);
            }
        }
    }
    let sent = publishers.iter().map(|publisher| publisher.sent).sum();
    course.sent.fetch_add(sent, Ordering::Relaxed);
    course.sending.store(0, Ordering::Release);
    Ok(Sent::by(publishers, load::histogram()))
}

/// Lets all of `subscribers` receive until each has got everything, or need not wait any longer.
pub(crate) fn receive(
    mut subscribers: Vec<Subscriber>,
    course: &Course,
    gathering: Option<Duration>,
) -> Result<Vec<Tally>> {
    let mut poll = Poll::new()?;
    for (index, subscriber) in subscribers.iter_mut().enumerate() {
        let socket = subscriber.socket();
        socket.set_nonblocking(true)?;
        let descriptor = socket.as_raw_fd();
        poll.registry()
            .register(&mut SourceFd(&descriptor), Token(index), Interest::READABLE)?;
    }
    let mut events = Events::with_capacity(EVENTS);
    loop {
        poll_again(&mut poll, &mut events, LOOK)?;
        for event in &events {
            let subscriber = &mut subscribers[event.token().0];
            while subscriber.receive()? && !subscriber.is_drained() {}
        }
        if course.failed.load(Ordering::Relaxed)
            || subscribers.iter_mut().all(|one| one.is_done(false))
        {
            return Ok(subscribers
                .into_iter()
                .map(Subscriber::into_tally)
                .collect());
        }
        // As a connection with a thread of its own does after a read that brought few.
        if let Some(time) = gathering {
            thread::sleep(time);
        }
    }
}

fn poll_again(poll: &mut Poll, events: &mut Events, patience: Duration) -> Result<()> {
    match poll.poll(events, Some(patience)) {
        Err(error) if error.kind() != ErrorKind::Interrupted => {
            Err(error).context("can't wait for sockets")
        }
        _ => Ok(()),
    }
}
