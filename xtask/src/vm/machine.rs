//! An emulated aarch64 machine: QEMU, a disk that can lose power, forwarded ports, and the agent in the
//! guest.

use super::agent::{Agent, Output};
use super::disk;
use super::disk_log::{DiskLog, SECTOR};
use super::wait;
use crate::child;
use anyhow::{Context, Result, anyhow, bail};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// For what takes a moment on a real machine.
pub const SOON: Duration = Duration::from_secs(120);

/// The kernel's command line. Where others compute, too, devices take their time to appear; what systemd
/// starts is shown if it fails or takes long.
pub const KERNEL: &str = "console=ttyAMA0 loglevel=4 panic=-1 systemd.show_status=auto \
     systemd.getty_auto=no systemd.default_device_timeout_sec=600";

/// Of the NVMe disk, which is there for its thermometer.
const THERMOMETER_BYTES: u64 = 1 << 20;

/// The gateway's log in the guest, with systemd or without.
const GATEWAY_LOG: &str = "if [ -e /run/headgate.log ]; then tail -n 40 /run/headgate.log; \
     else journalctl --no-pager -b -o cat -n 40 -u headgate.service; fi";

/// What a machine is started by.
pub enum Start {
    /// QEMU itself loads the kernel; the processor has no firmware.
    Kernel {
        kernel: PathBuf,
        initramfs: PathBuf,
        /// Added to [`KERNEL`].
        parameters: String,
    },
    /// UEFI, which finds a boot loader on the disk.
    Firmware {
        code: PathBuf,
        /// What it keeps between two boots, which QEMU writes to.
        variables: PathBuf,
    },
}

/// What a machine reaches by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    Alone,
    /// This machine, as [`HOST`].
    Host,
}

/// What the guest calls this machine.
pub const HOST: &str = "10.0.2.2";

/// What a machine is made of.
pub struct Parts {
    /// Names its logs.
    pub name: &'static str,
    /// QEMU's name of the processor.
    pub processor: &'static str,
    pub start: Start,
    pub network: Network,
    /// Of the file system with systemd, if there is one. It comes first.
    pub root: Option<PathBuf>,
    /// Of the store, as it is at the start. A machine writes to a copy.
    pub state: PathBuf,
    /// Where the copy and the logs go.
    pub logs: PathBuf,
}

/// A running machine. It ends when this is dropped, and with this program, however that ends.
pub struct Machine {
    qemu: Running,
    agent: Agent,
    /// QEMU's own socket for commands.
    monitor: PathBuf,
    /// Of the guest's serial console.
    console: PathBuf,
    messages: PathBuf,
    /// Of what the guest has the store's disk do; see [`DiskLog`].
    pub disk_log: PathBuf,
    /// What that disk has now.
    pub disk: PathBuf,
    pub mqtt: u16,
    pub metrics: u16,
    pub started: Instant,
    /// Holds the sockets; their paths must be short.
    _sockets: TempDir,
}

impl Machine {
    pub fn boot(parts: &Parts) -> Result<Self> {
        // A port that was free may be taken before QEMU has it.
        let mut attempts = 3;
        loop {
            attempts -= 1;
            match Self::try_boot(parts)? {
                Ok(machine) => return Ok(machine),
                Err(messages) if attempts > 0 && messages.contains("host forwarding") => {}
                Err(messages) => bail!("QEMU ended at once: {}", messages.trim()),
            }
        }
    }

    /// What QEMU says, if it ends at once.
    fn try_boot(parts: &Parts) -> Result<Result<Self, String>> {
        let sockets = tempfile::Builder::new()
            .prefix("headgate-vm-")
            .tempdir()
            .context("cannot create a folder for sockets")?;
        let agent_socket = sockets.path().join("agent");
        let monitor = sockets.path().join("monitor");
        let thermometer = sockets.path().join("thermometer");
        File::create(&thermometer)
            .and_then(|file| file.set_len(THERMOMETER_BYTES))
            .with_context(|| format!("cannot create {}", thermometer.display()))?;
        let console = parts.logs.join(format!("{}-console.log", parts.name));
        let messages = parts.logs.join(format!("{}-qemu.log", parts.name));

        let state = parts.logs.join(format!("{}-disk.img", parts.name));
        disk::copy(&parts.state, &state)?;
        let disk_log = state.with_extension("log");
        File::create(&disk_log).with_context(|| format!("cannot create {}", disk_log.display()))?;

        let (mqtt, metrics) = free_ports()?;
        let mut command = dying_with_us("qemu-system-aarch64");
        command
            .args(["-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-display", "none", "-M", "virt", "-smp", "2", "-m", "1G"])
            .args(["-cpu", parts.processor])
            .args(["-serial", &format!("file:{}", option(&console)?)])
            .args(["-netdev", &user_network(mqtt, metrics, parts.network)])
            .args(["-device", "virtio-net-pci,netdev=network,romfile="])
            .args(["-device", "virtio-serial-pci"])
            .args([
                "-chardev",
                &format!(
                    "socket,id=agent,path={},server=on,wait=off",
                    option(&agent_socket)?
                ),
            ])
            .args(["-device", "virtserialport,chardev=agent,name=agent"]);
        add_start(&mut command, &parts.start)?;
        if let Some(root) = &parts.root {
            add_disk(&mut command, "root", &option(root)?);
        }
        command
            .args([
                "-qmp",
                &format!("unix:{},server=on,wait=off", option(&monitor)?),
                "-drive",
                &format!(
                    "if=none,id=thermometer,format=raw,file={}",
                    option(&thermometer)?
                ),
            ])
            .args(["-device", "nvme,drive=thermometer,serial=thermometer"]);
        add_logged_disk(&mut command, &option(&state)?, &option(&disk_log)?);

        let log = fs::File::create(&messages)
            .with_context(|| format!("cannot create {}", messages.display()))?;
        let started = Instant::now();
        let mut qemu = Running::start(command.stdout(log.try_clone()?).stderr(log))?;
        let stream = wait::until("QEMU to begin", SOON, || {
            if qemu.0.try_wait()?.is_some() {
                return Ok(Some(None));
            }
            Ok(UnixStream::connect(&agent_socket).ok().map(Some))
        })?;
        let Some(stream) = stream else {
            return Ok(Err(fs::read_to_string(&messages)?));
        };
        Ok(Ok(Machine {
            qemu,
            agent: Agent::new(stream),
            monitor,
            console,
            messages,
            disk_log,
            disk: state,
            mqtt,
            metrics,
            started,
            _sockets: sockets,
        }))
    }

    /// Waits, as long as the machine runs, for what `look` finds.
    pub fn until<T>(
        &mut self,
        what: &str,
        patience: Duration,
        mut look: impl FnMut(&mut Self) -> Result<Option<T>>,
    ) -> Result<T> {
        wait::until(what, patience, || {
            if let Some(status) = self.qemu.0.try_wait()? {
                bail!("QEMU ended ({status}) while {what} was waited for");
            }
            look(self)
        })
    }

    /// What `command` wrote in the guest; an error if it failed there.
    pub fn run(&mut self, command: &str) -> Result<String> {
        self.agent.run(command, SOON)
    }

    /// The same for what takes as long as `patience` may last.
    pub fn run_for(&mut self, command: &str, patience: Duration) -> Result<String> {
        self.agent.run(command, patience)
    }

    /// Whether the guest has switched itself off, or has asked for a reset, by which QEMU ends, too.
    pub fn has_ended(&mut self) -> Result<bool> {
        Ok(self.qemu.0.try_wait()?.is_some())
    }

    pub fn output(&mut self, command: &str) -> Result<Output> {
        self.agent.output(command, SOON)
    }

    /// Presses the machine's power button: a GPIO line goes up, and a tenth of a second later down.
    pub fn press_power(&self) -> Result<()> {
        self.tell_qemu("system_powerdown")
    }

    /// Returns when QEMU has done it.
    fn tell_qemu(&self, command: &str) -> Result<()> {
        let mut stream = UnixStream::connect(&self.monitor)
            .with_context(|| format!("cannot connect to {}", self.monitor.display()))?;
        stream.set_read_timeout(Some(SOON))?;
        let mut answers = BufReader::new(stream.try_clone()?).lines();
        // It begins with a greeting, and tells of events between the answers.
        for command in ["qmp_capabilities", command] {
            writeln!(stream, "{{\"execute\": \"{command}\"}}")?;
            loop {
                let answer = answers.next().context("QEMU has closed its monitor")??;
                if answer.contains("\"error\"") {
                    bail!("QEMU refuses {command}: {answer}");
                }
                if answer.contains("\"return\"") {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Takes the power away. What the store's disk had done by then is returned: what is on it now is what
    /// [`DiskLog::cut`] leaves of that.
    pub fn cut_power(mut self) -> Result<DiskLog> {
        let log_bytes = log_bytes(&self.disk_log)?;
        // QEMU then ends what it is about to write to the log. It also flushes by itself, behind those bytes.
        self.tell_qemu("stop")?;
        self.qemu.kill()?;
        DiskLog::read(&self.disk_log, log_bytes)
    }

    /// Has the guest shut down by `command`, and waits until it has.
    pub fn shut_down(mut self, command: &str) -> Result<()> {
        self.halt(command)
    }

    /// The same, and the machine's disk is still to be looked at.
    pub fn halt(&mut self, command: &str) -> Result<()> {
        // The answer may be lost on the way down.
        let _ = self.agent.output(command, Duration::from_secs(1));
        self.end(SOON)
    }

    fn end(&mut self, patience: Duration) -> Result<()> {
        wait::until("the machine to end by itself", patience, || {
            Ok(self.qemu.0.try_wait()?)
        })
        .map(drop)
        .map_err(|error| self.explain(error))
    }

    /// `error`, with what the machine and the gateway have said last.
    pub fn explain(&mut self, error: anyhow::Error) -> anyhow::Error {
        let log = self.agent.output(GATEWAY_LOG, Duration::from_secs(20));
        let log = log.map_or_else(|error| format!("{error:#}"), |output| output.text);
        let tail = |path: &Path| {
            let text = fs::read(path).unwrap_or_default();
            last_lines(&String::from_utf8_lossy(&text), 40)
        };
        anyhow!(
            "{error:#}\n--- the gateway's log (end)\n{log}\n--- {} (end)\n{}\n--- {} (end)\n{}",
            self.console.display(),
            tail(&self.console),
            self.messages.display(),
            tail(&self.messages),
        )
    }
}

/// A child process that is killed when this is dropped.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Result<Self> {
        let child = command
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot start {}", child::shown(command)))?;
        Ok(Running(child))
    }

    fn kill(&mut self) -> Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails if it has ended.
        let _ = self.kill();
    }
}

/// `program`, which the kernel kills when this program ends in whatever way.
fn dying_with_us(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", program]);
    command
}

fn add_start(qemu: &mut Command, start: &Start) -> Result<()> {
    match start {
        Start::Kernel {
            kernel,
            initramfs,
            parameters,
        } => {
            qemu.arg("-kernel").arg(kernel);
            qemu.arg("-initrd").arg(initramfs);
            qemu.args(["-append", &format!("{KERNEL} {parameters}")]);
        }
        Start::Firmware { code, variables } => {
            for (file, readonly) in [(code, "on"), (variables, "off")] {
                let file = option(file)?;
                let flash = format!("if=pflash,format=raw,readonly={readonly},file={file}");
                qemu.args(["-drive", &flash]);
            }
        }
    }
    Ok(())
}

fn add_disk(qemu: &mut Command, id: &str, file: &str) {
    qemu.args([
        "-drive",
        &format!("if=none,id={id},format=raw,cache=writeback,file={file}"),
        "-device",
        &format!("virtio-blk-pci,drive={id}"),
    ]);
}

/// A disk of which every write and every flush is logged. Killing QEMU alone would be a mild power cut: all
/// that the guest ever wrote would be in this machine's own cache, and so survive, flushed or not.
fn add_logged_disk(qemu: &mut Command, image: &str, log: &str) {
    qemu.args([
        "-blockdev",
        // What QEMU itself does not flush to this machine's disk does not get lost here.
        &format!(
            "driver=blklogwrites,node-name=state,log-sector-size={SECTOR},\
             file.driver=file,file.filename={image},file.cache.no-flush=on,\
             log.driver=file,log.filename={log},log.cache.no-flush=on"
        ),
        "-device",
        // A log of zeroes written at once is garbled by QEMU before 9.
        // It is the one that firmware boots from.
        "virtio-blk-pci,drive=state,write-cache=on,discard=off,write-zeroes=off,bootindex=0",
    ]);
}

/// How much of a log there is, while QEMU writes it.
pub fn log_bytes(path: &Path) -> Result<u64> {
    let metadata = fs::metadata(path);
    Ok(metadata
        .with_context(|| format!("cannot read {}", path.display()))?
        .len())
}

/// `path` as QEMU wants it within an option.
fn option(path: &Path) -> Result<String> {
    let path = path
        .to_str()
        .with_context(|| format!("QEMU can't be given the path {}", path.display()))?;
    Ok(path.replace(',', ",,"))
}

fn user_network(mqtt: u16, metrics: u16, network: Network) -> String {
    let restrict = match network {
        Network::Alone => "on",
        Network::Host => "off",
    };
    format!(
        "user,id=network,restrict={restrict},hostfwd=tcp:127.0.0.1:{mqtt}-:1883,\
         hostfwd=tcp:127.0.0.1:{metrics}-:9464"
    )
}

/// Both are held until both are known, so that they differ.
fn free_ports() -> Result<(u16, u16)> {
    let listen = || {
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("there is no free port on 127.0.0.1")
    };
    let (one, other) = (listen()?, listen()?);
    Ok((one.local_addr()?.port(), other.local_addr()?.port()))
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod a_machine {
    use super::*;

    #[test]
    fn shows_the_end_of_its_logs() {
        assert_eq!(last_lines("a\nb\nc\n", 2), "b\nc");
        assert_eq!(last_lines("a", 2), "a");
    }

    #[test]
    fn takes_paths_with_commas() -> Result<()> {
        assert_eq!(option(Path::new("/a,b"))?, "/a,,b");
        Ok(())
    }

    #[test]
    fn has_two_ports() -> Result<()> {
        let (one, other) = free_ports()?;
        assert_ne!(one, other);
        Ok(())
    }
}
