//! Compiling components outside the gateway's process.
//!
//! The compiler needs hundreds of megabytes for a moment and works on input that nobody has
//! vouched for. In a process of its own, with bounds, neither its memory nor its bugs are the
//! gateway's.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::aot::TEMPORARY;
use super::engine::EngineConfig;
use super::error::ComponentProblem;
#[cfg(feature = "compiler")]
use super::{engine, precompiled, target::Target};

/// Where components are compiled.
#[derive(Clone, Debug)]
pub enum Compiler {
    /// By `PROGRAM app compile-here --output OUTPUT INPUT`, so that neither the compiler's memory nor
    /// its bugs are the gateway's.
    ChildProcess(PathBuf),
    /// In this process: for tests, and for whoever tries an app out.
    #[cfg(feature = "compiler")]
    InProcess,
    /// Nowhere: this gateway runs only what was compiled elsewhere.
    Absent,
}

/// How long a compilation may take, at the lowest priority on a machine that is busy. A component of
/// 18 MB takes 20 s on a small board that is not. What runs away is ended by [`MAX_CPU_SECONDS`].
pub(super) const TIME_LIMIT: Duration = Duration::from_secs(280);

/// Bounds on a compiler process: address space, which the allocator reserves generously, and CPU
/// time over all its threads.
#[cfg(feature = "compiler")]
const MAX_ADDRESS_SPACE: u64 = 4 << 30;
#[cfg(feature = "compiler")]
const MAX_CPU_SECONDS: u64 = 240;

/// Longest error message that is read from a compiler.
const MAX_MESSAGE: u64 = 16 * 1024;

/// Stands before what is wrong with the component, in what a compiler prints.
const INVALID: &str = "not a valid component: ";

/// Why there is no compiled component.
#[derive(Debug)]
pub(super) enum CompileError {
    Component(ComponentProblem),
    /// There is no compiler.
    Absent,
    /// Not the component's fault, as far as one can tell.
    Compiler(String),
}

impl Compiler {
    /// This very program, if it can compile.
    pub(super) fn of_this_program() -> std::io::Result<Compiler> {
        match cfg!(feature = "compiler") {
            true => Ok(Compiler::ChildProcess(std::env::current_exe()?)),
            false => Ok(Compiler::Absent),
        }
    }

    /// Compiles `component`; temporary files go to `folder`.
    pub(super) fn compile(
        &self,
        component: &[u8],
        config: EngineConfig,
        folder: &Path,
    ) -> Result<Vec<u8>, CompileError> {
        match self {
            #[cfg(feature = "compiler")]
            Compiler::InProcess => {
                engine::precompile(component, None, config).map_err(CompileError::Component)
            }
            Compiler::Absent => Err(CompileError::Absent),
            Compiler::ChildProcess(program) => {
                compile_in_child(program, component, config, folder, TIME_LIMIT)
            }
        }
    }
}

/// Compiles the component in the file `input` for this machine into the file `output`: what
/// `headgate app compile-here` does. Lowers this process's priority and bounds its memory first. An
/// error's text is for the gateway that started this: print it to stderr as it is and exit with 1.
#[cfg(feature = "compiler")]
pub fn compile_here(input: &Path, output: &Path, simd: bool) -> Result<(), String> {
    take_little();
    let component =
        fs::read(input).map_err(|error| format!("cannot read {}: {error}", input.display()))?;
    let compiled = engine::precompile(
        &component,
        None,
        EngineConfig {
            simd,
            ..EngineConfig::default()
        },
    );
    let compiled = compiled.map_err(|problem| problem.to_string())?;
    fs::write(output, compiled)
        .map_err(|error| format!("cannot write {}: {error}", output.display()))
}

/// Compiles a component for another machine, into the contents of a `.cwasm` file for a folder that
/// `apps.preinstalled` names. Compiles it for this machine first, to see whether it fits the world of an
/// app: whoever builds an image wants to know then, and not the gateway.
#[cfg(feature = "compiler")]
pub fn compile_ahead(component: &[u8], target: &Target) -> Result<Vec<u8>, ComponentProblem> {
    engine::check_header(component)?;
    engine::check_world(component)?;
    let code = engine::precompile(component, Some(target), EngineConfig::default())?;
    Ok(precompiled::encode(component, target, &code))
}

/// Makes this process the one that waits and the one that goes when the machine runs short.
#[cfg(feature = "compiler")]
fn take_little() {
    let limits = [
        (libc::RLIMIT_AS, MAX_ADDRESS_SPACE),
        (libc::RLIMIT_CPU, MAX_CPU_SECONDS),
        (libc::RLIMIT_CORE, 0),
    ];
    // SAFETY: `limit` is valid for reads. If a call fails, the bound that was there stays.
    #[allow(unsafe_code)]
    unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, 19);
        for (resource, most) in limits {
            let limit = libc::rlimit {
                rlim_cur: most,
                rlim_max: most,
            };
            libc::setrlimit(resource, &limit);
        }
    }
    // Where it can't be written, the kernel chooses by size, which is the compiler all the same.
    let _ = fs::write("/proc/self/oom_score_adj", "1000");
}

fn compile_in_child(
    program: &Path,
    component: &[u8],
    config: EngineConfig,
    folder: &Path,
    time_limit: Duration,
) -> Result<Vec<u8>, CompileError> {
    let trouble = |doing: &str, error: std::io::Error| {
        CompileError::Compiler(format!("cannot {doing}: {error}"))
    };
    let temporary = |suffix| {
        tempfile::Builder::new()
            .prefix(TEMPORARY)
            .suffix(suffix)
            .tempfile_in(folder)
            // It may be read-only; then nothing is kept, but the app runs.
            .or_else(|_| {
                tempfile::Builder::new()
                    .prefix(TEMPORARY)
                    .suffix(suffix)
                    .tempfile()
            })
            .map_err(|error| trouble(&format!("write to {}", folder.display()), error))
    };
    let input = temporary(".wasm")?;
    let output = temporary(".cwasm")?;
    fs::write(input.path(), component).map_err(|error| trouble("write the component", error))?;

    let child = Command::new(program)
        .args(["app", "compile-here", "--output"])
        .args([output.path(), input.path()])
        .args((!config.simd).then_some("--no-simd"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| trouble(&format!("run {}", program.display()), error))?;
    let (status, message) = wait(child, time_limit)?;
    if !status.success() {
        return Err(match message.split_once(INVALID) {
            Some((_, reason)) => CompileError::Component(ComponentProblem::Invalid {
                reason: reason.trim().to_owned(),
            }),
            None => CompileError::Compiler(format!("{status}: {}", message.trim())),
        });
    }
    fs::read(output.path()).map_err(|error| trouble("read the compiled component", error))
}

/// Waits until `child` ends, and ends it when the time is up. Returns what it has said.
fn wait(mut child: Child, time_limit: Duration) -> Result<(ExitStatus, String), CompileError> {
    let stderr = child.stderr.take().expect("it is piped");
    let (send, ended) = mpsc::channel();
    // The end of its error output is the end of the process, or close to it.
    thread::spawn(move || {
        let mut message = Vec::new();
        let _ = stderr.take(MAX_MESSAGE).read_to_end(&mut message);
        let _ = send.send(String::from_utf8_lossy(&message).into_owned());
    });
    let message = ended.recv_timeout(time_limit);
    if message.is_err() {
        // It can only have ended in the meantime.
        let _ = child.kill();
    }
    let status = child
        .wait()
        .map_err(|error| CompileError::Compiler(format!("cannot wait for it: {error}")))?;
    match message {
        Ok(message) => Ok((status, message)),
        Err(_) => Err(CompileError::Compiler(format!(
            "it took longer than {} s",
            time_limit.as_secs_f32()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// While one test writes its script, no other may fork: the child would hold the script open
    /// for writing for a moment, and a file that is being written can't be run.
    static ONE_AT_A_TIME: parking_lot::Mutex<()> = parking_lot::Mutex::new(());

    /// Runs a shell script in the compiler's place.
    fn compile_with(script: &str, time_limit: Duration) -> Result<Vec<u8>, CompileError> {
        let _guard = ONE_AT_A_TIME.lock();
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("compiler");
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let aot = folder.path().join("aot");
        fs::create_dir(&aot).unwrap();
        let result = compile_in_child(&program, b"wasm", EngineConfig::default(), &aot, time_limit);
        assert_eq!(
            fs::read_dir(&aot).unwrap().count(),
            0,
            "nothing is left behind"
        );
        result
    }

    fn compiler_error(script: &str, time_limit: Duration) -> String {
        match compile_with(script, time_limit) {
            Err(CompileError::Compiler(message)) => message,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_child_gets_the_component_and_its_output_is_read() {
        let script = r#"test "$1 $2 $3" = "app compile-here --output" && cp "$5" "$4""#;
        assert_eq!(compile_with(script, TIME_LIMIT).unwrap(), b"wasm");
    }

    #[test]
    fn what_the_child_says_of_the_component_is_passed_on() {
        let result = compile_with("echo 'not a valid component: odd' >&2; exit 1", TIME_LIMIT);
        match result {
            Err(CompileError::Component(ComponentProblem::Invalid { reason })) => {
                assert_eq!(reason, "odd");
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_child_that_dies_is_an_error() {
        let message = compiler_error("kill -9 $$", TIME_LIMIT);
        assert!(message.contains("signal: 9"), "{message}");
        let message = compiler_error("echo full >&2; exit 3", TIME_LIMIT);
        assert!(message.contains("exit status: 3: full"), "{message}");
    }

    #[test]
    fn a_child_that_hangs_is_ended() {
        let message = compiler_error("exec sleep 600", Duration::from_millis(50));
        assert!(message.contains("longer than 0.05 s"), "{message}");
    }

    #[test]
    fn a_missing_compiler_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("nowhere");
        match compile_in_child(
            &program,
            b"",
            EngineConfig::default(),
            folder.path(),
            TIME_LIMIT,
        ) {
            Err(CompileError::Compiler(message)) => {
                assert!(message.contains(program.to_str().unwrap()), "{message}");
            }
            other => panic!("{other:?}"),
        }
    }
}
