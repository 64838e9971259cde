//! Waits for edges of all apps' lines. One thread, which sleeps without a timeout when there is
//! nothing to wait for.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Registry, Token, Waker};
use parking_lot::Mutex;

use super::{Inside, More};

/// How long a line that had as many edges as are taken at a time is left alone: so one line makes at
/// most 12,800 events a second, and the kernel keeps (and, once 1,024 wait, drops) what else comes.
pub(super) const REST: Duration = Duration::from_millis(5);

/// Lines that are looked at in one round.
const MOST_READY: usize = 256;

const WAKE: Token = Token(0);

pub(in crate::apps) struct Watcher {
    shared: Arc<Shared>,
    waker: Waker,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    registry: Registry,
    lines: Mutex<Lines>,
    stop: AtomicBool,
}

#[derive(Default)]
struct Lines {
    by_token: BTreeMap<Token, Weak<Inside>>,
    last: usize,
}

/// A line that is waited for, until this is dropped.
pub(super) struct Watch {
    shared: Arc<Shared>,
    token: Token,
    line: Weak<Inside>,
}

impl Watcher {
    pub(in crate::apps) fn start() -> io::Result<Watcher> {
        let poll = Poll::new()?;
        let waker = Waker::new(poll.registry(), WAKE)?;
        let shared = Arc::new(Shared {
            registry: poll.registry().try_clone()?,
            lines: Mutex::default(),
            stop: AtomicBool::new(false),
        });
        let thread = thread::Builder::new().name("apps-gpio".into()).spawn({
            let shared = shared.clone();
            move || shared.run(poll)
        })?;
        Ok(Watcher {
            shared,
            waker,
            thread: Mutex::new(Some(thread)),
        })
    }

    pub(super) fn watch(&self, line: &Arc<Inside>) -> io::Result<Watch> {
        let token = {
            let mut lines = self.shared.lines.lock();
            lines.last += 1;
            let token = Token(lines.last);
            lines.by_token.insert(token, Arc::downgrade(line));
            token
        };
        // From here on it is forgotten again if the next step fails.
        let watch = Watch {
            shared: self.shared.clone(),
            token,
            line: Arc::downgrade(line),
        };
        line.with(|line| {
            let fd = line.fd().as_raw_fd();
            let registry = &self.shared.registry;
            registry.register(&mut SourceFd(&fd), token, Interest::READABLE)
        })?;
        Ok(watch)
    }

    pub(in crate::apps) fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Err(error) = self.waker.wake() {
            tracing::error!("cannot wake the thread that waits for GPIO lines: {error}");
            return;
        }
        if let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that waits for GPIO lines has panicked");
        }
    }

    /// Lines that are waited for.
    #[cfg(test)]
    pub(in crate::apps) fn len(&self) -> usize {
        self.shared.lines.lock().by_token.len()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.lines.lock().by_token.remove(&self.token);
        if let Some(line) = self.line.upgrade() {
            let deregistered = line.with(|line| {
                let fd = line.fd().as_raw_fd();
                self.shared.registry.deregister(&mut SourceFd(&fd))
            });
            // The kernel forgets the line anyway when it is given back.
            if let Err(error) = deregistered {
                tracing::debug!("cannot stop waiting for a GPIO line: {error}");
            }
        }
    }
}

impl Shared {
    fn run(&self, mut poll: Poll) {
        let mut events = Events::with_capacity(MOST_READY);
        // Lines that may have more edges, by when to look again. The kernel tells of a line once.
        let mut resting: BTreeMap<Token, Instant> = BTreeMap::new();
        loop {
            let timeout = resting
                .values()
                .min()
                .map(|at| at.saturating_duration_since(Instant::now()));
            if let Err(error) = poll.poll(&mut events, timeout)
                && error.kind() != io::ErrorKind::Interrupted
            {
                tracing::error!(
                    "cannot wait for GPIO lines, and no edge is seen any more: {error}"
                );
                return;
            }
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            let now = Instant::now();
            let told = events.iter().map(|event| event.token());
            let mut ready: Vec<Token> = told
                .filter(|token| *token != WAKE && !resting.contains_key(token))
                .collect();
            resting.retain(|token, at| {
                let rests = *at > now;
                if !rests {
                    ready.push(*token);
                }
                rests
            });
            for token in ready {
                let line = self.lines.lock().by_token.get(&token).cloned();
                if let Some(line) = line.and_then(|line| line.upgrade())
                    && line.take_edges() == More::Perhaps
                {
                    resting.insert(token, now + REST);
                }
            }
        }
    }
}
