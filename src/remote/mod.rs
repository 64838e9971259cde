//! Calls to other machines: everything that the uplink and the cluster ask a server goes through a
//! [`Remote`]. A call has a time-out, at most so many run at once, and what failed is tried again with
//! growing, jittered pauses while the budget for that lasts.
//!
//! A call is cancelled by dropping its future: what it held is given back. That the server has not done
//! what was asked follows neither from that nor from a time-out.

mod limit;

use std::fmt;
use std::future::Future;
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder, Retryable};
use tower::retry::budget::{Budget, TpsBudget};

use limit::Limit;

/// Retries that are allowed each second whatever happens, so that what calls seldom may retry too.
const RETRIES_PER_SECOND: u32 = 2;
/// Beyond those, one retry for five calls that went well in the last ten seconds.
const RETRIES_PER_CALL: f32 = 0.2;
const BUDGET_WINDOW: Duration = Duration::from_secs(10);

/// How patient a [`Remote`] is.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// For one try: to get its turn, and then for the answer.
    pub timeout: Duration,
    /// The pause after the first failure. Pauses double, and each is lengthened by up to as much again.
    pub first_pause: Duration,
    /// The longest pause, before it is lengthened.
    pub longest_pause: Duration,
    /// Calls under way at once. Time-outs lower it for a while, down to one.
    pub at_once: usize,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience {
            // A JetStream cluster takes up to four seconds to choose a new leader.
            timeout: Duration::from_secs(5),
            first_pause: Duration::from_millis(100),
            longest_pause: Duration::from_secs(10),
            at_once: 16,
        }
    }
}

impl Patience {
    /// The pauses between tries, without end.
    pub fn pauses(&self) -> ExponentialBackoff {
        self.builder().build()
    }

    /// The same pauses whenever the seed is.
    pub fn pauses_from_seed(&self, seed: u64) -> ExponentialBackoff {
        self.builder().with_jitter_seed(seed).build()
    }

    fn builder(&self) -> ExponentialBuilder {
        ExponentialBuilder::new()
            .with_min_delay(self.first_pause)
            .with_max_delay(self.longest_pause)
            .with_factor(2.0)
            .without_max_times()
            .with_jitter()
    }
}

/// Why a call has no result.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure<E> {
    /// It was not sent.
    #[error("too many calls are under way: not sent within {0:?}")]
    Busy(Duration),
    /// It may have been done all the same.
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    #[error(transparent)]
    Failed(E),
}

/// The way to one server or cluster. Shared by all who call it.
pub struct Remote {
    patience: Patience,
    limit: Limit,
    budget: TpsBudget,
}

impl Remote {
    pub fn new(patience: Patience) -> Remote {
        Remote {
            patience,
            limit: Limit::new(patience.at_once),
            budget: TpsBudget::new(BUDGET_WINDOW, RETRIES_PER_SECOND, RETRIES_PER_CALL),
        }
    }

    pub fn patience(&self) -> &Patience {
        &self.patience
    }

    /// How many calls may be under way at once, as of now.
    pub fn at_once(&self) -> usize {
        self.limit.now()
    }

    /// Calls once.
    pub async fn call<T, E>(
        &self,
        call: impl Future<Output = Result<T, E>>,
    ) -> Result<T, Failure<E>> {
        let timeout = self.patience.timeout;
        let turn = tokio::time::timeout(timeout, self.limit.turn())
            .await
            .map_err(|_| Failure::Busy(timeout))?;
        match tokio::time::timeout(timeout, call).await {
            Ok(answer) => {
                turn.answered();
                let value = answer.map_err(Failure::Failed)?;
                self.budget.deposit();
                Ok(value)
            }
            Err(_) => {
                turn.timed_out();
                Err(Failure::TimedOut(timeout))
            }
        }
    }

    /// Calls until it goes well, fails in a way that is not `passing`, or the budget is used up. Only for
    /// what may be done twice: after a time-out it may have been done already.
    pub async fn call_again<T, E, F>(
        &self,
        mut call: impl FnMut() -> F,
        passing: impl Fn(&E) -> bool,
    ) -> Result<T, Failure<E>>
    where
        F: Future<Output = Result<T, E>>,
    {
        let try_once = || self.call(call());
        try_once
            .retry(self.patience.builder())
            .sleep(tokio::time::sleep)
            .when(|failure| {
                let passes = match failure {
                    Failure::Busy(_) | Failure::TimedOut(_) => true,
                    Failure::Failed(error) => passing(error),
                };
                passes && self.budget.withdraw()
            })
            .await
    }
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Remote")
            .field("patience", &self.patience)
            .field("at_once", &self.at_once())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::pending;

    use super::*;

    const PATIENCE: Patience = Patience {
        timeout: Duration::from_secs(1),
        first_pause: Duration::from_millis(100),
        longest_pause: Duration::from_millis(400),
        at_once: 2,
    };

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime")
    }

    #[test]
    fn pauses_double_up_to_the_longest_and_are_lengthened_by_at_most_as_much() {
        let pauses: Vec<Duration> = PATIENCE.pauses().take(5).collect();
        for (pause, least) in pauses.iter().zip([100, 200, 400, 400, 400]) {
            let least = Duration::from_millis(least);
            assert!((least..=2 * least).contains(pause), "{pauses:?}");
        }
    }

    #[test]
    fn the_same_seed_makes_the_same_pauses() {
        let of = |seed| PATIENCE.pauses_from_seed(seed).take(5).collect::<Vec<_>>();
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
    }

    #[test]
    fn what_fails_in_passing_is_called_again_and_what_does_not_is_not() {
        let remote = Remote::new(Patience {
            first_pause: Duration::from_millis(1),
            ..PATIENCE
        });
        let calls = Cell::new(0);
        let answer = runtime().block_on(remote.call_again(
            || {
                calls.set(calls.get() + 1);
                let answer = if calls.get() < 3 {
                    Err("later")
                } else {
                    Err("never")
                };
                async move { answer as Result<(), _> }
            },
            |error| *error == "later",
        ));
        assert_eq!(answer, Err(Failure::Failed("never")));
        assert_eq!(calls.get(), 3);
    }

    #[test]
    fn retries_end_when_the_budget_is_used_up() {
        let remote = Remote::new(Patience {
            first_pause: Duration::from_micros(1),
            longest_pause: Duration::from_micros(1),
            ..PATIENCE
        });
        let calls = Cell::new(0);
        let call = || {
            calls.set(calls.get() + 1);
            async { Err::<(), _>("down") }
        };
        let answer = runtime().block_on(remote.call_again(call, |_| true));
        assert_eq!(answer, Err(Failure::Failed("down")));
        let reserve = RETRIES_PER_SECOND as usize * BUDGET_WINDOW.as_secs() as usize;
        assert_eq!(calls.get(), 1 + reserve);
    }

    #[test]
    fn a_call_without_an_answer_times_out_and_one_without_a_turn_is_not_sent() {
        let remote = Remote::new(Patience {
            timeout: Duration::from_millis(20),
            ..PATIENCE
        });
        runtime().block_on(async {
            let never = || pending::<Result<(), ()>>();
            assert_eq!(
                remote.call(never()).await,
                Err(Failure::TimedOut(remote.patience.timeout))
            );
            let _all_turns = (0..remote.at_once())
                .map(|_| remote.limit.turn_now().expect("a turn"))
                .collect::<Vec<_>>();
            assert_eq!(
                remote.call(never()).await,
                Err(Failure::Busy(remote.patience.timeout))
            );
        });
    }

    #[test]
    fn a_call_that_is_dropped_gives_its_turn_back() {
        let remote = Remote::new(Patience {
            at_once: 1,
            ..PATIENCE
        });
        runtime().block_on(async {
            let never = remote.call(pending::<Result<(), ()>>());
            assert!(
                tokio::time::timeout(Duration::from_millis(5), never)
                    .await
                    .is_err()
            );
            assert_eq!(remote.call(async { Ok::<_, ()>(1) }).await, Ok(1));
        });
    }
}
