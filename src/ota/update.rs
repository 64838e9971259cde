//! What an update has to do next: a function of what is on disk and of what is booted.
//!
//! Nothing is remembered elsewhere, so whatever interrupts an update, a power cut included, it goes on with the
//! same step. Each step can be done again when it was half done.

use std::collections::BTreeMap;

use super::boot::CONDEMNED;
use super::state::Phase;

/// What is seen on the machine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Seen {
    /// Store path of the system that is booted.
    pub booted: String,
    /// Its generation, as far as the boot loader says so.
    pub booted_generation: Option<u64>,
    /// The kernel's boot id.
    pub boot: String,
    /// Store paths by generation.
    pub generations: BTreeMap<u64, String>,
    /// Boot entries by generation.
    pub entries: BTreeMap<u64, Tries>,
}

/// The counter of a boot entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tries {
    /// It has passed.
    Good,
    Counted {
        left: u32,
        done: u32,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// There is nothing to do.
    Rest,
    /// Have all store paths.
    Fetch,
    /// Link a generation to them.
    MakeGeneration,
    /// Have the boot loader try it.
    WriteEntry { generation: u64 },
    /// Boot it.
    Restart,
    /// It is booted: see whether it is healthy.
    Probation { generation: u64 },
    /// It has passed.
    Commit { generation: u64 },
    /// It has failed, or can't be tried.
    RollBack { generation: u64, reason: String },
}

/// The next step of the update that is under way.
pub fn next(phase: &Phase, seen: &Seen) -> Step {
    let (release, generation, armed_in, failure) = match phase {
        Phase::Idle => return Step::Rest,
        Phase::Fetching { .. } => return Step::Fetch,
        Phase::Ready {
            release,
            generation,
            armed_in,
            failure,
            ..
        } => (release, generation, armed_in, failure),
    };
    let is_there = |generation: &u64| seen.generations.get(generation) == Some(&release.toplevel);
    let Some(generation) = generation.filter(is_there) else {
        return Step::MakeGeneration;
    };
    let is_booted = seen.booted == release.toplevel
        && seen
            .booted_generation
            .is_none_or(|booted| booted == generation);
    let roll_back = |reason: String| Step::RollBack { generation, reason };
    match seen.entries.get(&generation) {
        None => Step::WriteEntry { generation },
        Some(Tries::Good) if is_booted => Step::Commit { generation },
        Some(Tries::Counted { .. }) if is_booted => Step::Probation { generation },
        Some(Tries::Good) => roll_back("another system was booted after it had passed".to_owned()),
        Some(Tries::Counted { left: 0, done }) => roll_back(match failure {
            Some(failure) => failure.clone(),
            None if *done >= CONDEMNED.done => "it was given up".to_owned(),
            None => format!("it was booted {done} times and never came up"),
        }),
        Some(Tries::Counted { done: 0, .. }) if armed_in.as_ref() != Some(&seen.boot) => {
            roll_back("the boot loader did not try it".to_owned())
        }
        Some(Tries::Counted { .. }) => Step::Restart,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::ota::health::Baseline;
    use crate::ota::release::Release;
    use crate::ota::state::State;

    const TRIES: u32 = 3;
    const OLD: &str = "/nix/store/00000000000000000000000000000000-nixos-system-1";
    const NEW: &str = "/nix/store/11111111111111111111111111111111-nixos-system-2";

    fn release() -> Release {
        Release {
            schema: 1,
            product: "headgate".into(),
            version: "2".into(),
            system: "aarch64-linux".into(),
            toplevel: NEW.into(),
            created: "2026-11-22T00:00:00Z".parse().unwrap(),
            expires: None,
            rollout: None,
            add_keys: Vec::new(),
            revoke_keys: Vec::new(),
        }
    }

    /// How the new system does.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Kind {
        Healthy,
        Unhealthy,
        Panics,
    }

    /// Somebody has pulled the plug.
    struct PowerCut;

    /// A machine whose disk keeps what was written, and whose power is cut before one of the writes.
    struct Machine {
        kind: Kind,
        state: State,
        present: BTreeSet<String>,
        seen: Seen,
        boots: u32,
        /// After how many writes each of the cuts comes.
        cuts: Vec<u32>,
    }

    impl Machine {
        fn new(kind: Kind, cuts: Vec<u32>) -> Machine {
            let mut machine = Machine {
                kind,
                state: State::default(),
                present: [OLD.to_owned()].into(),
                seen: Seen::default(),
                boots: 0,
                cuts,
            };
            machine.seen.generations.insert(1, OLD.into());
            machine.seen.entries.insert(1, Tries::Good);
            machine.state.begin(release());
            machine.boot();
            machine
        }

        /// As systemd-boot does it: the newest that has tries left, or has passed.
        fn boot(&mut self) {
            self.boots += 1;
            self.seen.boot = format!("boot {}", self.boots);
            let mut entries = self.seen.entries.iter_mut().rev();
            let (generation, tries) = entries
                .find(|(_, tries)| !matches!(tries, Tries::Counted { left: 0, .. }))
                .expect("there is always something to boot");
            if let Tries::Counted { left, done } = tries {
                *left -= 1;
                *done += 1;
            }
            self.seen.booted = self.seen.generations[generation].clone();
            self.seen.booted_generation = Some(*generation);
            assert!(
                self.present.contains(&self.seen.booted),
                "its store paths are there"
            );
        }

        fn write(&mut self) -> Result<(), PowerCut> {
            match self.cuts.last_mut() {
                Some(0) => {
                    self.cuts.pop();
                    Err(PowerCut)
                }
                Some(left) => {
                    *left -= 1;
                    Ok(())
                }
                None => Ok(()),
            }
        }

        /// One boot, up to its end.
        fn run(&mut self) -> Result<Step, PowerCut> {
            loop {
                let step = next(&self.state.phase, &self.seen);
                match step {
                    Step::Fetch => {
                        self.write()?;
                        self.present.insert(NEW.into());
                        self.write()?;
                        self.state.on_fetched(Baseline::default());
                    }
                    Step::MakeGeneration => {
                        self.write()?;
                        let next = self.seen.generations.keys().next_back().unwrap() + 1;
                        self.seen.generations.insert(next, NEW.into());
                        self.write()?;
                        self.state.on_generation(next);
                    }
                    Step::WriteEntry { generation } => {
                        self.write()?;
                        let boot = self.seen.boot.clone();
                        self.state.on_arming(&boot);
                        self.write()?;
                        let tries = Tries::Counted {
                            left: TRIES,
                            done: 0,
                        };
                        self.seen.entries.insert(generation, tries);
                    }
                    Step::Probation { generation } => match self.kind {
                        Kind::Healthy => {
                            self.write()?;
                            self.seen.entries.insert(generation, Tries::Good);
                        }
                        Kind::Unhealthy => {
                            self.write()?;
                            self.state.on_failure("no broker");
                            return Ok(step);
                        }
                        Kind::Panics => return Ok(step),
                    },
                    Step::Commit { .. } => {
                        self.write()?;
                        self.state.on_committed();
                    }
                    Step::RollBack {
                        generation,
                        ref reason,
                    } => {
                        self.write()?;
                        let bad = Tries::Counted {
                            left: 0,
                            done: CONDEMNED.done,
                        };
                        self.seen.entries.insert(generation, bad);
                        self.write()?;
                        self.state.on_rolled_back(reason.clone(), release().created);
                        self.write()?;
                        self.seen.entries.remove(&generation);
                        self.write()?;
                        self.seen.generations.remove(&generation);
                    }
                    Step::Restart | Step::Rest => return Ok(step),
                }
            }
        }

        fn run_to_the_end(&mut self) {
            for _ in 0..100 {
                match self.run() {
                    Ok(Step::Rest) => return,
                    Ok(_) | Err(PowerCut) => self.boot(),
                }
            }
            panic!("it never ends: {:?} {:?}", self.state, self.seen);
        }
    }

    #[test]
    fn a_healthy_system_stays() {
        let mut machine = Machine::new(Kind::Healthy, Vec::new());
        machine.run_to_the_end();
        assert_eq!(machine.seen.booted, NEW);
        assert_eq!(machine.state.committed, Some(release()));
        assert_eq!(machine.boots, 2);
    }

    #[test]
    fn a_system_that_fails_is_left_after_its_tries_and_the_reason_is_kept() {
        for (kind, reason) in [
            (Kind::Unhealthy, "no broker"),
            (Kind::Panics, "it was booted 3 times and never came up"),
        ] {
            let mut machine = Machine::new(kind, Vec::new());
            machine.run_to_the_end();
            assert_eq!(machine.seen.booted, OLD);
            assert_eq!(machine.boots, 1 + TRIES + 1);
            let rollback = machine.state.last_rollback.unwrap();
            assert_eq!(rollback.reason, reason);
            assert_eq!(machine.state.failed, [NEW]);
            assert_eq!(machine.seen.generations.len(), 1);
            assert_eq!(machine.seen.entries.len(), 1);
        }
    }

    #[test]
    fn an_older_generation_of_the_same_system_is_left_alone() {
        let mut machine = Machine::new(Kind::Unhealthy, Vec::new());
        machine.present.insert(NEW.into());
        machine.seen.generations = [(1, NEW.to_owned()), (2, OLD.to_owned())].into();
        machine.seen.entries = [(1, Tries::Good), (2, Tries::Good)].into();
        machine.boot();
        machine.run_to_the_end();
        assert_eq!(machine.seen.booted, OLD);
        assert_eq!(
            machine.seen.entries,
            [(1, Tries::Good), (2, Tries::Good)].into()
        );
    }

    #[test]
    fn a_boot_loader_that_passes_the_entry_over_ends_the_update() {
        let mut machine = Machine::new(Kind::Healthy, Vec::new());
        assert!(matches!(machine.run(), Ok(Step::Restart)));
        // Restarted, and the same system is there again.
        machine.seen.boot = "another".into();
        machine.run().ok();
        let rollback = machine.state.last_rollback.unwrap();
        assert_eq!(rollback.reason, "the boot loader did not try it");
    }

    proptest! {
        /// At every boot something whole is booted, which [`Machine::boot`] asserts.
        #[test]
        fn power_cuts_never_leave_a_machine_between_two_systems(
            kind in prop_oneof![Just(Kind::Healthy), Just(Kind::Unhealthy), Just(Kind::Panics)],
            cuts in proptest::collection::vec(0u32..12, 0..12),
        ) {
            let cut_often = cuts.len();
            let mut machine = Machine::new(kind, cuts);
            machine.run_to_the_end();
            prop_assert_eq!(&machine.state.phase, &Phase::Idle);
            if kind != Kind::Healthy {
                prop_assert_eq!(&machine.seen.booted, OLD);
                prop_assert!(machine.state.last_rollback.is_some());
                prop_assert!(machine.state.committed.is_none());
            } else if cut_often < TRIES as usize {
                // Cut as often as it has tries, even a good one has to go.
                prop_assert_eq!(&machine.seen.booted, NEW);
                prop_assert_eq!(&machine.state.committed, &Some(release()));
            } else {
                let stays = machine.state.committed.is_some();
                prop_assert_eq!(&machine.seen.booted, if stays { NEW } else { OLD });
            }
        }
    }
}
