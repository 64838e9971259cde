//! Waiting for a thing itself, with a deadline and a name.

use anyhow::{Result, bail};
use std::thread;
use std::time::{Duration, Instant};

/// Between two looks: short beside what is waited for, long beside what a look costs an emulated machine.
const BETWEEN_LOOKS: Duration = Duration::from_millis(200);

/// What `look` finds, as soon as it finds something; an error that names `what` after `patience`. An
/// error of `look` ends the wait.
pub fn until<T>(
    what: &str,
    patience: Duration,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let begin = Instant::now();
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if begin.elapsed() >= patience {
            bail!("waited {} s in vain for {what}", patience.as_secs());
        }
        thread::sleep(BETWEEN_LOOKS);
    }
}

#[cfg(test)]
mod waiting {
    use super::*;

    #[test]
    fn returns_what_was_found() {
        let mut looks = 0;
        let found = until("a third look", Duration::from_secs(60), || {
            looks += 1;
            Ok((looks == 3).then_some(looks))
        });
        assert_eq!(found.expect("it comes"), 3);
    }

    #[test]
    fn names_what_did_not_come() {
        let error = until::<()>("rain", Duration::ZERO, || Ok(None)).expect_err("it never comes");
        assert_eq!(error.to_string(), "waited 0 s in vain for rain");
    }
}
