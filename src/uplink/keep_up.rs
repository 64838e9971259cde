//! A task of a link that a defect has ended is begun anew, and the others go on meanwhile.

use std::io;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::connection::told_to_stop;
use crate::remote::Patience;

const DEFECT: &str =
    "a defect of the gateway has ended this, the log says where; it begins anew within two minutes";

/// Between such ends, and attempts to begin.
pub(super) const PAUSES: Patience = Patience {
    timeout: Duration::ZERO,
    first_pause: Duration::from_secs(1),
    longest_pause: Duration::from_secs(60),
    at_once: 1,
};

/// After so long it is as if it had never failed.
const STEADY: Duration = Duration::from_secs(300);

/// Runs what `make` makes until that ends by itself. Of what else happens `tell` is told.
pub(super) async fn keep_up<F: Future<Output = ()>>(
    mut make: impl FnMut() -> io::Result<F>,
    tell: impl Fn(&str),
    patience: Patience,
    mut stop: watch::Receiver<bool>,
) {
    let mut pauses = patience.pauses();
    loop {
        let began = Instant::now();
        match make() {
            Ok(task) => match AssertUnwindSafe(task).catch_unwind().await {
                Ok(()) => return,
                // The panic hook has said which.
                Err(_) => tell(DEFECT),
            },
            Err(error) => tell(&error.to_string()),
        }
        if began.elapsed() > STEADY {
            pauses = patience.pauses();
        }
        tokio::select! {
            () = sleep(pauses.next().unwrap_or_default()) => {}
            () = told_to_stop(&mut stop) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;

    /// How the task ends, one time after the other.
    type End = fn() -> io::Result<fn()>;

    const PANICS: End = || Ok(|| panic!("on purpose"));

    /// How often it was begun, and what was told.
    fn kept_up(ends: &[End], patience: Patience, stops: bool) -> (usize, Vec<String>) {
        let (made, told) = (Cell::new(0), RefCell::new(Vec::new()));
        let make = || {
            let end = ends[made.replace(made.get() + 1)]()?;
            Ok(async move { end() })
        };
        let tell = |why: &str| told.borrow_mut().push(why.to_owned());
        let (_stop, stopping) = watch::channel(stops);
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime")
            .block_on(keep_up(make, tell, patience, stopping));
        (made.get(), told.into_inner())
    }

    #[test]
    fn what_panics_is_told_of_and_begun_anew() {
        let soon = Patience {
            first_pause: Duration::from_millis(1),
            ..PAUSES
        };
        let ends: [End; 4] = [
            PANICS,
            || Err(io::Error::other("the disk")),
            PANICS,
            || Ok(|| ()),
        ];
        let (made, told) = kept_up(&ends, soon, false);
        assert_eq!(made, 4);
        assert_eq!(told, [DEFECT, "the disk", DEFECT]);
    }

    #[test]
    fn the_gateway_can_end_meanwhile() {
        let late = Patience {
            first_pause: Duration::from_secs(3600),
            longest_pause: Duration::from_secs(3600),
            ..PAUSES
        };
        assert_eq!(kept_up(&[PANICS], late, true).0, 1);
    }
}
