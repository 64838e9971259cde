//! The machines that components can be compiled for.

use std::fmt;

/// A machine to compile for: what the code may rely on. Compiled code is refused by a machine that
/// lacks what it relies on, so the generic CPU runs everywhere and a named one only on that and
/// better ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    triple: &'static Triple,
    cpu: &'static Cpu,
}

#[derive(Debug, PartialEq, Eq)]
struct Triple {
    name: &'static str,
    cpus: &'static [Cpu],
}

#[derive(Debug, PartialEq, Eq)]
struct Cpu {
    name: &'static str,
    /// Cranelift's names for what this CPU has beyond the architecture's baseline.
    features: &'static [&'static str],
}

const TRIPLES: &[Triple] = &[
    Triple {
        name: "aarch64-unknown-linux-gnu",
        cpus: &[
            GENERIC,
            // Raspberry Pi 3 and Zero 2: Armv8.0.
            cpu("cortex-a53", &[]),
            // Raspberry Pi 4: Armv8.0, so without atomics (LSE).
            cpu("cortex-a72", &[]),
            // Raspberry Pi 5: Armv8.2 with half floats and dot products.
            cpu("cortex-a76", &["has_lse", "has_fp16", "has_dotprod"]),
            cpu("neoverse-n1", &["has_lse", "has_fp16", "has_dotprod"]),
        ],
    },
    Triple {
        name: "x86_64-unknown-linux-gnu",
        cpus: &[
            GENERIC,
            // The levels of the x86-64 psABI.
            cpu("x86-64-v2", X86_64_V2),
            cpu("x86-64-v3", X86_64_V3),
        ],
    },
];

const GENERIC: Cpu = cpu("generic", &[]);

const X86_64_V2: &[&str] = &[
    "has_cmpxchg16b",
    "has_sse3",
    "has_ssse3",
    "has_sse41",
    "has_sse42",
    "has_popcnt",
];

const X86_64_V3: &[&str] = &[
    "has_cmpxchg16b",
    "has_sse3",
    "has_ssse3",
    "has_sse41",
    "has_sse42",
    "has_popcnt",
    "has_avx",
    "has_avx2",
    "has_bmi1",
    "has_bmi2",
    "has_fma",
    "has_lzcnt",
];

const fn cpu(name: &'static str, features: &'static [&'static str]) -> Cpu {
    Cpu { name, features }
}

/// Why there is no such target.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    #[error("{found:?} is no target that can be compiled for; there are {}", names(TRIPLES, |t| t.name))]
    UnknownTriple { found: String },
    #[error("{found:?} is no CPU of {triple}; there are {known}")]
    UnknownCpu {
        found: String,
        triple: &'static str,
        known: String,
    },
}

impl Target {
    /// `triple` as Rust writes it; this machine's, if none is given. `cpu` as GCC writes it;
    /// `generic`, if none is given.
    pub fn new(triple: Option<&str>, cpu: Option<&str>) -> Result<Target, TargetError> {
        let wanted = triple.unwrap_or(THIS_MACHINE);
        let triple = TRIPLES
            .iter()
            .find(|triple| triple.name == wanted)
            .ok_or_else(|| TargetError::UnknownTriple {
                found: wanted.to_owned(),
            })?;
        let wanted = cpu.unwrap_or(GENERIC.name);
        let cpu = triple.cpus.iter().find(|cpu| cpu.name == wanted);
        let cpu = cpu.ok_or_else(|| TargetError::UnknownCpu {
            found: wanted.to_owned(),
            triple: triple.name,
            known: names(triple.cpus, |cpu| cpu.name),
        })?;
        Ok(Target { triple, cpu })
    }

    pub fn triple(&self) -> &'static str {
        self.triple.name
    }

    pub fn cpu(&self) -> &'static str {
        self.cpu.name
    }

    /// Cranelift's flags for the CPU.
    #[cfg(any(feature = "compiler", test))]
    pub(super) fn features(&self) -> &'static [&'static str] {
        self.cpu.features
    }
}

#[cfg(target_arch = "aarch64")]
const THIS_MACHINE: &str = "aarch64-unknown-linux-gnu";
#[cfg(target_arch = "x86_64")]
const THIS_MACHINE: &str = "x86_64-unknown-linux-gnu";

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.triple.name, self.cpu.name)
    }
}

fn names<T>(all: &[T], name: impl Fn(&T) -> &'static str) -> String {
    all.iter().map(name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_the_default() {
        let target = Target::new(None, None).unwrap();
        assert_eq!((target.triple(), target.cpu()), (THIS_MACHINE, "generic"));
    }

    #[test]
    fn a_raspberry_pi_4_gets_no_code_that_its_cpu_lacks() {
        let pi4 = Target::new(Some("aarch64-unknown-linux-gnu"), Some("cortex-a72")).unwrap();
        assert!(pi4.features().is_empty());
        let pi5 = Target::new(Some("aarch64-unknown-linux-gnu"), Some("cortex-a76")).unwrap();
        assert!(pi5.features().contains(&"has_lse"));
    }

    #[test]
    fn the_nixos_module_offers_the_same_cpus() {
        let nix = include_str!("../../modules/cpus.nix");
        for triple in TRIPLES {
            let (architecture, _) = triple.name.split_once('-').unwrap();
            let list = nix
                .split_once(&format!("{architecture}-linux = ["))
                .unwrap()
                .1;
            let list = list.split_once(']').unwrap().0;
            let offered: Vec<_> = list.split('"').skip(1).step_by(2).collect();
            let known: Vec<_> = triple.cpus.iter().map(|cpu| cpu.name).collect();
            assert_eq!(offered, known, "modules/cpus.nix, {architecture}");
        }
    }

    #[test]
    fn what_is_unknown_is_named_with_what_is_known() {
        let error = Target::new(Some("riscv64gc-unknown-linux-gnu"), None).unwrap_err();
        assert_eq!(
            error.to_string(),
            "\"riscv64gc-unknown-linux-gnu\" is no target that can be compiled for; there are \
             aarch64-unknown-linux-gnu, x86_64-unknown-linux-gnu"
        );
        let error = Target::new(Some("x86_64-unknown-linux-gnu"), Some("cortex-a72")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "\"cortex-a72\" is no CPU of x86_64-unknown-linux-gnu; there are generic, x86-64-v2, \
             x86-64-v3"
        );
    }
}
