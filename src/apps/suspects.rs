//! What becomes of a batch that failed: it is tried again, and if it goes on failing it is halved, and
//! the halves are halved, until only the event is left that is to blame. All others are handled, in
//! their order. Without I/O; who runs the app makes the calls.

use std::collections::VecDeque;

/// The parts of a failed batch that have not been handled. They come before all that waits.
#[derive(Debug)]
pub(super) struct Suspects<T> {
    parts: VecDeque<Part<T>>,
    events: usize,
}

/// Events that are to be handled in one call, with nothing added.
#[derive(Debug)]
struct Part<T> {
    events: Vec<T>,
    /// How often they were tried together.
    tries: u32,
}

impl<T> Default for Suspects<T> {
    fn default() -> Self {
        Suspects {
            parts: VecDeque::new(),
            events: 0,
        }
    }
}

impl<T> Suspects<T> {
    /// Events in all parts.
    pub(super) fn len(&self) -> usize {
        self.events
    }

    pub(super) fn is_empty(&self) -> bool {
        self.events == 0
    }

    /// What is to be tried next, and how often it has been.
    pub(super) fn pop(&mut self) -> Option<(Vec<T>, u32)> {
        let part = self.parts.pop_front()?;
        self.events -= part.events.len();
        Some((part.events, part.tries))
    }

    /// These events were tried `tries` times and have failed each time. With more than `retries`
    /// after the first they are halved. Returns the event that is to blame, once it is alone.
    pub(super) fn failed(&mut self, mut events: Vec<T>, tries: u32, retries: u32) -> Option<T> {
        if tries > retries {
            if events.len() <= 1 {
                return events.pop();
            }
            let second = events.split_off(events.len() / 2);
            // Each half is tried once before it is halved: what was tried as a whole was tried enough.
            self.push_front(second, retries);
            self.push_front(events, retries);
        } else {
            self.push_front(events, tries);
        }
        None
    }

    /// Puts events before all others.
    pub(super) fn push_front(&mut self, events: Vec<T>, tries: u32) {
        if events.is_empty() {
            return;
        }
        self.events += events.len();
        self.parts.push_front(Part { events, tries });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Has an app work on `events` that fails with each batch in which a poisonous one is. Returns what
    /// it handled, what is to blame, and the number of calls.
    fn work(
        events: Vec<u32>,
        retries: u32,
        poison: impl Fn(u32) -> bool,
    ) -> (Vec<u32>, Vec<u32>, u32) {
        let mut suspects = Suspects::default();
        let (mut handled, mut blamed, mut calls) = (Vec::new(), Vec::new(), 0);
        suspects.push_front(events, 0);
        while let Some((events, tries)) = suspects.pop() {
            calls += 1;
            if events.iter().any(|event| poison(*event)) {
                blamed.extend(suspects.failed(events, tries + 1, retries));
            } else {
                handled.extend(events);
            }
        }
        assert!(suspects.is_empty());
        (handled, blamed, calls)
    }

    #[test]
    fn one_poisonous_event_costs_no_other() {
        let (handled, blamed, calls) = work((0..64).collect(), 1, |event| event == 40);
        assert_eq!(blamed, [40]);
        assert_eq!(handled.len(), 63);
        // The batch, once more, and two calls for each of six halvings.
        assert_eq!(calls, 2 + 12);
    }

    #[test]
    fn a_failure_that_passes_blames_nobody() {
        let mut suspects = Suspects::default();
        assert_eq!(suspects.failed(vec![1, 2, 3], 1, 2), None);
        assert_eq!(suspects.len(), 3);
        assert_eq!(suspects.pop(), Some((vec![1, 2, 3], 1)));
        assert_eq!(suspects.pop(), None);
    }

    #[test]
    fn a_single_event_is_tried_as_often_as_a_batch() {
        let (_, blamed, calls) = work(vec![7], 2, |_| true);
        assert_eq!((blamed, calls), (vec![7], 3));
    }

    proptest! {
        #[test]
        fn each_event_is_handled_once_in_order_or_blamed(
            poison in proptest::collection::vec(any::<bool>(), 0..100),
            retries in 0_u32..3,
        ) {
            let events: Vec<u32> = (0..poison.len() as u32).collect();
            let (handled, blamed, _) = work(events, retries, |event| poison[event as usize]);
            let expected = |is: bool| -> Vec<u32> {
                let all = poison.iter().enumerate();
                all.filter(|(_, poison)| **poison == is).map(|(at, _)| at as u32).collect()
            };
            prop_assert_eq!(handled, expected(false));
            prop_assert_eq!(blamed, expected(true));
        }
    }
}
