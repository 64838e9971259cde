//! The lines of GPIO chips that a live instance holds. When the instance goes, they go.

mod kernel;
mod watcher;

use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use parking_lot::Mutex;

use super::manifest::{Direction, Edges, GpioLine};
use super::services::AppServices;
use crate::event::{Event, Lane, Topic};

pub(super) use kernel::KernelChips;
use watcher::Watch;
pub(super) use watcher::Watcher;

/// The topics of lines' events begin with this. Nobody else can publish below it to an app, for no
/// app can subscribe to it.
pub(super) const GPIO_TOPICS: &str = "$gpio/";

/// Edges of one line that are taken at a time. See [`watcher::REST`].
const MOST_EDGES: usize = 64;

/// Where lines come from: the kernel, or a test.
pub(crate) trait Chips: Debug + Send + Sync {
    /// Takes a line, for `consumer` alone. The error says what is wrong with the line.
    fn request(&self, line: &GpioLine, consumer: &str) -> Result<Box<dyn Line>, String>;
}

/// A line that was taken. Dropping it gives it back. Values are logical: true is active.
pub(crate) trait Line: Send {
    fn value(&self) -> io::Result<bool>;

    fn set(&self, value: bool) -> io::Result<()>;

    /// The first edge that waits; none if none does. Never blocks.
    fn next_edge(&self) -> io::Result<Option<Edge>>;

    /// Can be read when an edge waits.
    fn fd(&self) -> BorrowedFd<'_>;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Edge {
    /// Whether the line is active now.
    pub(crate) rising: bool,
    /// When, in nanoseconds since the Unix epoch.
    pub(crate) unix_ns: u64,
    /// One more for each edge of the line, also for those that nobody took in time.
    pub(crate) sequence: u32,
}

/// A line that an instance holds.
pub(super) struct HeldLine {
    inside: Arc<Inside>,
    is_output: bool,
    /// Before the line is given back, nobody waits for it any more.
    watch: Option<Watch>,
}

/// What the instance and the thread that waits for edges share.
struct Inside {
    topic: Topic,
    /// None when the instance has let go of it, at once, even if the thread is at it.
    line: Mutex<Option<Taken>>,
    services: Arc<AppServices>,
}

struct Taken {
    line: Box<dyn Line>,
    /// Of the last edge.
    sequence: u32,
}

/// What there is of a line's edges.
#[derive(Debug, PartialEq, Eq)]
enum More {
    No,
    Perhaps,
}

impl HeldLine {
    /// Takes the line that the manifest describes. The error says what is wrong with it.
    pub(super) fn take(
        line: &GpioLine,
        app: &str,
        services: &Arc<AppServices>,
    ) -> Result<HeldLine, String> {
        let taken = services.devices.chips.request(line, app)?;
        let topic = Topic::new(format!("{GPIO_TOPICS}{}", line.name));
        let inside = Arc::new(Inside {
            topic: topic.expect("a line's name is a topic level"),
            line: Mutex::new(Some(Taken {
                line: taken,
                sequence: 0,
            })),
            services: services.clone(),
        });
        let (is_output, has_edges) = match line.direction {
            Direction::Output { .. } => (true, false),
            Direction::Input { edges, .. } => (false, edges != Edges::None),
        };
        let mut held = HeldLine {
            inside,
            is_output,
            watch: None,
        };
        if has_edges {
            let watch = services.devices.watcher.watch(&held.inside);
            held.watch = Some(watch.map_err(|error| format!("cannot wait for it: {error}"))?);
        }
        Ok(held)
    }

    pub(super) fn is_output(&self) -> bool {
        self.is_output
    }

    pub(super) fn value(&self) -> io::Result<bool> {
        self.inside.with(|line| line.value())
    }

    pub(super) fn set(&self, value: bool) -> io::Result<()> {
        self.inside.with(|line| line.set(value))
    }
}

impl Drop for HeldLine {
    fn drop(&mut self) {
        self.watch = None;
        *self.inside.line.lock() = None;
    }
}

impl Inside {
    fn with<R>(&self, act: impl FnOnce(&dyn Line) -> io::Result<R>) -> io::Result<R> {
        match &*self.line.lock() {
            Some(taken) => act(&*taken.line),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }

    /// Takes edges that wait, a bounded number of them, and hands them to the app.
    fn take_edges(&self) -> More {
        let mut batch = Vec::new();
        let mut missed = 0;
        let result = {
            let mut line = self.line.lock();
            match &mut *line {
                Some(taken) => taken.edges(|edge, gap| {
                    missed += u64::from(gap);
                    batch.push(self.event(edge));
                }),
                None => Ok(More::No),
            }
        };
        let Some(app) = self.services.app.upgrade() else {
            return More::No;
        };
        app.gpio_edges(batch, missed);
        result.unwrap_or_else(|error| {
            let topic = self.topic.as_str();
            let name = topic.strip_prefix(GPIO_TOPICS).unwrap_or(topic);
            app.lost_line(format!(
                "the line {name:?} is gone: {error}; a fresh instance takes it when it is back"
            ));
            More::No
        })
    }

    fn event(&self, edge: Edge) -> Event {
        Event {
            topic: self.topic.clone(),
            payload: Bytes::from_static(if edge.rising { b"1" } else { b"0" }),
            timestamp_ns: edge.unix_ns,
            received: Instant::now(),
            hops: 0,
            lane: Lane::default(),
            retries: None,
            receipt: None,
        }
    }
}

impl Taken {
    /// Hands out edges, each with how many are missing before it.
    fn edges(&mut self, mut take: impl FnMut(Edge, u32)) -> io::Result<More> {
        for _ in 0..MOST_EDGES {
            let Some(edge) = self.line.next_edge()? else {
                return Ok(More::No);
            };
            let gap = edge.sequence.wrapping_sub(self.sequence).wrapping_sub(1);
            self.sequence = edge.sequence;
            take(edge, gap);
        }
        Ok(More::Perhaps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A line with these edges waiting.
    struct Waiting(Mutex<Vec<u32>>);

    impl Line for Waiting {
        fn value(&self) -> io::Result<bool> {
            Ok(false)
        }

        fn set(&self, _: bool) -> io::Result<()> {
            Ok(())
        }

        fn next_edge(&self) -> io::Result<Option<Edge>> {
            let sequence = self.0.lock().pop();
            Ok(sequence.map(|sequence| Edge {
                rising: true,
                unix_ns: 0,
                sequence,
            }))
        }

        fn fd(&self) -> BorrowedFd<'_> {
            unimplemented!("nobody waits")
        }
    }

    fn taken(sequences: impl DoubleEndedIterator<Item = u32>, before: u32) -> Taken {
        Taken {
            line: Box::new(Waiting(Mutex::new(sequences.rev().collect()))),
            sequence: before,
        }
    }

    fn gaps(taken: &mut Taken) -> (More, Vec<u32>) {
        let mut gaps = Vec::new();
        let more = taken.edges(|_, gap| gaps.push(gap)).unwrap();
        (more, gaps)
    }

    #[test]
    fn edges_that_the_kernel_has_dropped_are_counted() {
        let mut line = taken([1, 2, 5, 6].into_iter(), 0);
        assert_eq!(gaps(&mut line), (More::No, vec![0, 0, 2, 0]));
        let mut line = taken([u32::MAX, 0, 2].into_iter(), u32::MAX - 1);
        assert_eq!(gaps(&mut line), (More::No, vec![0, 0, 1]));
    }

    #[test]
    fn a_line_that_chatters_is_left_after_a_while() {
        let mut line = taken(1..=100, 0);
        let (more, edges) = gaps(&mut line);
        assert_eq!((more, edges.len()), (More::Perhaps, MOST_EDGES));
        let (more, edges) = gaps(&mut line);
        assert_eq!((more, edges), (More::No, vec![0; 100 - MOST_EDGES]));
    }
}
