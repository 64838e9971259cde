//! Wakes the one task that waits for it.
//!
//! What a [`tokio::sync::Notify`] does for one permit and one task, without an entry in a list each
//! time the task begins to wait: a connection does so once or twice a message.

use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

use atomic_waker::AtomicWaker;

#[derive(Debug, Default)]
pub struct Bell {
    rung: AtomicBool,
    waker: AtomicWaker,
}

impl Bell {
    /// Wakes who waits, or who waits next.
    pub fn ring(&self) {
        self.rung.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Waits until it has been rung since it was heard last. One task at a time; may be dropped at
    /// any time.
    pub async fn heard(&self) {
        poll_fn(|cx| {
            if self.take() {
                return Poll::Ready(());
            }
            self.waker.register(cx.waker());
            // It may have been rung in between.
            match self.take() {
                true => Poll::Ready(()),
                false => Poll::Pending,
            }
        })
        .await;
    }

    fn take(&self) -> bool {
        // Cheaper than to write each time.
        self.rung.load(Ordering::Relaxed) && self.rung.swap(false, Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;
    use std::task::{Context, Waker};
    use std::thread;

    use super::*;

    #[test]
    fn it_is_heard_once_however_often_it_was_rung() {
        let bell = Bell::default();
        let mut cx = Context::from_waker(Waker::noop());
        let mut heard = || pin!(bell.heard()).poll(&mut cx).is_ready();
        assert!(!heard());
        bell.ring();
        bell.ring();
        assert!(heard());
        assert!(!heard());
    }

    #[test]
    fn no_ring_is_missed() {
        const RINGS: usize = 100_000;
        let bell = Arc::new(Bell::default());
        let made = Arc::new(AtomicUsize::new(0));
        let ringer = thread::spawn({
            let (bell, made) = (bell.clone(), made.clone());
            move || {
                for _ in 0..RINGS {
                    made.fetch_add(1, Ordering::Relaxed);
                    bell.ring();
                }
            }
        });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        // Hangs if the last one is not heard.
        runtime.block_on(async {
            while made.load(Ordering::Relaxed) < RINGS {
                bell.heard().await;
            }
        });
        ringer.join().unwrap();
    }
}
