//! A Linux guest on one of the VMMs, with a command agent on its serial port.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use nix::sys::signal::Signal;

use super::backend::{BackEnd, Blk, Kind};
use super::daemon::{fresh_name, signal_child};
use crate::command::{as_ordinary_user, describe, wait_for};
use crate::ensure;
use crate::error::{Doing, LabError, Result, last_lines};
use crate::site::{Place, QemuVersion, Site};

/// From start to the agent's first word, on plain hardware.
const BOOT_LIMIT: Duration = Duration::from_secs(20);
/// A command without a limit of its own, on plain hardware.
const COMMAND_LIMIT: Duration = Duration::from_secs(15);
/// From the power-off command to the end of the VMM, on plain hardware.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(10);
/// What spares an emulated machine work at boot, and concerns no device; and no watchdog takes a moment in which that machine
/// stands still for a fault of the guest's, and says so among the agent's lines.
const QUICK_BOOT: &str = " mitigations=off nokaslr io_delay=none rcupdate.rcu_expedited=1 cryptomgr.notests audit=0 nowatchdog";
/// Characters per line to the agent: a serial driver without flow control loses more than it can buffer.
const LINE_LENGTH: usize = 512;

/// What runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vmm {
    /// ringside-vmm.
    Ringside,
    /// Stock QEMU of Debian trixie.
    Qemu10,
    /// Stock QEMU of trixie-backports.
    Qemu11,
}

/// A guest to be booted.
#[derive(Debug)]
pub struct GuestBuilder<'a> {
    vmm: Vmm,
    cpus: u32,
    memory: String,
    diskless: bool,
    ordinary_user: bool,
    bzimage: bool,
    back_ends: Vec<&'a BackEnd>,
    packed: bool,
    moves_in_flight: bool,
    reconnects: bool,
    passed_through: Vec<String>,
    kernel_arguments: Vec<String>,
    arguments: Vec<String>,
    boot_limit: Duration,
}

impl<'a> GuestBuilder<'a> {
    /// How many CPUs it has (1 unless given).
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Its memory, as `512M` or `6G` (512M unless given).
    #[must_use]
    pub fn memory(mut self, size: &str) -> Self {
        self.memory = size.into();
        self
    }

    /// Boots without the Debian disk: busybox only, quickly. Disks of the test are then from `/dev/vda` on, else from `/dev/vdb`.
    #[must_use]
    pub fn diskless(mut self) -> Self {
        self.diskless = true;
        self
    }

    /// Runs the VMM as a user without privileges, who must have access to `/dev/kvm` and to the sockets.
    #[must_use]
    pub fn as_ordinary_user(mut self) -> Self {
        self.ordinary_user = true;
        self
    }

    /// Boots the bzImage, which unpacks itself, in place of the ELF file in it.
    #[must_use]
    pub fn bzimage(mut self) -> Self {
        self.bzimage = true;
        self
    }

    /// A device served by a back-end. Order is kept.
    #[must_use]
    pub fn device(mut self, back_end: &'a BackEnd) -> Self {
        self.back_ends.push(back_end);
        self
    }

    /// Offers packed virtqueues for all devices of back-ends, whatever the VMM does by itself.
    #[must_use]
    pub fn packed(mut self) -> Self {
        self.packed = true;
        self
    }

    /// Lets QEMU, from version 11 on, leave requests of disks in flight when the guest moves, and take their notes along.
    #[must_use]
    pub fn moves_in_flight(mut self) -> Self {
        self.moves_in_flight = true;
        self
    }

    /// Lets QEMU look for back-ends that went away. `ringside-vmm` does so by itself.
    #[must_use]
    pub fn reconnects(mut self) -> Self {
        self.reconnects = true;
        self
    }

    /// A PCI function of the host, bound to vfio-pci, as `0000:01:10.0`. Order is kept.
    #[must_use]
    pub fn vfio(mut self, address: &str) -> Self {
        self.passed_through.push(address.into());
        self
    }

    /// One more argument for the guest's kernel, or for a module: `e1000e.IntMode=0`.
    #[must_use]
    pub fn kernel_argument(mut self, argument: &str) -> Self {
        self.kernel_arguments.push(argument.into());
        self
    }

    /// One more argument for the VMM.
    #[must_use]
    pub fn arg(mut self, argument: &str) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// How long it may take to come up, on plain hardware.
    #[must_use]
    pub fn boot_limit(mut self, limit: Duration) -> Self {
        self.boot_limit = limit;
        self
    }

    /// Boots it and waits for its agent.
    ///
    /// # Errors
    /// Fails, with the console's tail, if it does not come up in time.
    pub fn boot(self, site: &Site) -> Result<Guest> {
        let limit = self.boot_limit;
        let mut guest = self.start(site)?;
        guest.wait_for_agent(site.limit(limit))?;
        Ok(guest)
    }

    /// Starts the VMM for a guest that comes from another one, with the same devices, at this address: `unix:` and the name of a
    /// socket, or `tcp:`, an address and a port.
    ///
    /// # Errors
    /// Fails, with what it says, if it ends before it listens.
    pub fn await_migration(self, site: &Site, address: &str) -> Result<Guest> {
        let limit = site.limit(self.boot_limit);
        let option = match self.vmm {
            Vmm::Ringside => "--incoming",
            Vmm::Qemu10 | Vmm::Qemu11 => "-incoming",
        };
        let mut guest = self.arg(option).arg(address).start(site)?;
        let start = Instant::now();
        while !listens(address)? {
            let ended = wait_for(&mut guest.child, Duration::from_millis(20))?;
            if ended.is_some() || start.elapsed() > limit {
                return Err(guest.failed("the VMM does not listen for the guest".into()));
            }
        }
        Ok(guest)
    }

    /// Starts ringside-vmm for a guest that goes on from the snapshot in this file, with the same devices.
    ///
    /// # Errors
    /// Fails if the VMM cannot be started; that it ends is seen by the first command.
    pub fn restore(self, site: &Site, snapshot: &Path) -> Result<Guest> {
        let path = snapshot.display().to_string();
        self.arg("--restore").arg(&path).start(site)
    }

    fn start(self, site: &Site) -> Result<Guest> {
        let mut root = None;
        if self.vmm == Vmm::Ringside && !self.diskless {
            root = Some(Blk::on(&site.guest_disk).arg("--read-only").start(site)?);
        }
        let mut command = match self.vmm {
            Vmm::Ringside => self.ringside(site, root.as_ref()),
            Vmm::Qemu10 => self.qemu(site, QemuVersion::V10),
            Vmm::Qemu11 => self.qemu(site, QemuVersion::V11),
        };
        command.args(&self.arguments);
        if self.ordinary_user {
            command = as_ordinary_user(&command);
        }
        if let Some(cpu) = site.guest_cpu() {
            command = pinned(&command, cpu);
        }
        Guest::start(site, command, root)
    }

    fn kernel(&self, site: &Site) -> PathBuf {
        if self.bzimage {
            site.kernel()
        } else {
            site.elf_kernel()
        }
    }

    fn kernel_cmdline(&self, site: &Site) -> String {
        let mut cmdline = "console=ttyS0 panic=-1 loglevel=5".to_owned();
        if site.place == Place::Lab {
            cmdline.push_str(QUICK_BOOT);
        }
        if !self.diskless {
            cmdline.push_str(" lab.root=/dev/vda");
        }
        if !self.passed_through.is_empty() {
            cmdline.push_str(" lab.drivers");
        }
        for argument in &self.kernel_arguments {
            cmdline.push(' ');
            cmdline.push_str(argument);
        }
        cmdline
    }

    fn ringside(&self, site: &Site, root: Option<&BackEnd>) -> Command {
        let mut command = site.program("ringside-vmm");
        command
            .arg("--kernel")
            .arg(self.kernel(site))
            .arg("--initramfs")
            .arg(&site.initramfs);
        command.arg("--cmdline").arg(self.kernel_cmdline(site));
        command.arg(format!("--cpus={}", self.cpus));
        command.arg(format!("--memory=size={}", self.memory));
        command.arg("--serial=stdio");
        let packed = if self.packed { ",packed=on" } else { "" };
        for back_end in root.into_iter().chain(self.back_ends.iter().copied()) {
            // A card's queues count both directions: two for each queue pair.
            let (option, queues) = match back_end.kind {
                Kind::Blk => ("--blk", back_end.queues),
                Kind::Net => ("--net", back_end.queues.saturating_mul(2)),
            };
            command.arg(option).arg(format!(
                "socket={},num-queues={queues}{packed}",
                back_end.socket
            ));
        }
        for address in &self.passed_through {
            command.arg("--vfio").arg(address);
        }
        command
    }

    fn qemu(&self, site: &Site, version: QemuVersion) -> Command {
        let mut qemu = site.qemu(version);
        qemu.args([
            "-nodefaults",
            "-display",
            "none",
            "-serial",
            "stdio",
            "-no-reboot",
        ]);
        qemu.args(["-accel", "kvm", "-cpu", "host"]);
        qemu.args(["-machine", "q35,memory-backend=ram"]);
        qemu.arg("-object").arg(format!(
            "memory-backend-memfd,id=ram,share=on,size={}",
            self.memory
        ));
        qemu.arg("-m")
            .arg(&self.memory)
            .arg("-smp")
            .arg(self.cpus.to_string());
        qemu.arg("-kernel")
            .arg(self.kernel(site))
            .arg("-initrd")
            .arg(&site.initramfs);
        qemu.arg("-append").arg(self.kernel_cmdline(site));
        if !self.diskless {
            qemu.arg("-drive").arg(format!(
                "if=none,id=root,format=raw,readonly=on,file={}",
                site.guest_disk.display()
            ));
            qemu.args(["-device", "virtio-blk-pci,drive=root"]);
        }
        let packed = if self.packed { ",packed=on" } else { "" };
        let in_flight = if self.moves_in_flight {
            ",inflight-migration=on"
        } else {
            ""
        };
        for (number, back_end) in self.back_ends.iter().enumerate() {
            let queues = back_end.queues;
            let reconnect = if self.reconnects {
                ",reconnect-ms=100"
            } else {
                ""
            };
            qemu.arg("-chardev").arg(format!(
                "socket,id=char{number},path={}{reconnect}",
                back_end.socket
            ));
            match back_end.kind {
                Kind::Blk => {
                    qemu.arg("-device").arg(format!(
                        "vhost-user-blk-pci,chardev=char{number},num-queues={queues}{packed}{in_flight}"
                    ));
                }
                Kind::Net => {
                    qemu.arg("-netdev").arg(format!(
                        "vhost-user,id=net{number},chardev=char{number},queues={queues}"
                    ));
                    // One vector per queue, one for the control queue, one for configuration changes.
                    let (multiqueue, vectors) = if queues > 1 {
                        ("on", 2 * queues + 2)
                    } else {
                        ("off", 4)
                    };
                    qemu.arg("-device").arg(format!(
                        "virtio-net-pci,netdev=net{number},mq={multiqueue},vectors={vectors}{packed}"
                    ));
                }
            }
        }
        for address in &self.passed_through {
            qemu.arg("-device").arg(format!("vfio-pci,host={address}"));
        }
        qemu
    }
}

/// What a command in the guest wrote, and its exit status.
#[derive(Debug, Clone)]
pub struct GuestOutput {
    /// Exit status of the command.
    pub status: i32,
    /// Standard output and standard error, as they came.
    pub text: String,
}

/// All that the guest has written to its serial port, and whether there can be more.
#[derive(Debug, Default)]
struct Console {
    text: Vec<u8>,
    ended: bool,
}

type SharedConsole = Arc<(Mutex<Console>, Condvar)>;

/// A running guest. It is ended when this goes.
#[derive(Debug)]
pub struct Guest {
    child: Child,
    input: Option<ChildStdin>,
    console: SharedConsole,
    /// How much of the console has been dealt with.
    seen: usize,
    commands: u32,
    site: Site,
    /// The VMM's command line.
    line: String,
    /// File that takes what the VMM writes to standard error.
    log: PathBuf,
    /// Serves the Debian disk.
    _root: Option<BackEnd>,
}

impl Guest {
    /// Describes a guest on this VMM.
    #[must_use]
    pub fn on<'a>(vmm: Vmm) -> GuestBuilder<'a> {
        GuestBuilder {
            vmm,
            cpus: 1,
            memory: "512M".into(),
            diskless: false,
            ordinary_user: false,
            bzimage: false,
            back_ends: Vec::new(),
            packed: false,
            moves_in_flight: false,
            reconnects: false,
            passed_through: Vec::new(),
            kernel_arguments: Vec::new(),
            arguments: Vec::new(),
            boot_limit: BOOT_LIMIT,
        }
    }

    fn start(site: &Site, mut command: Command, root: Option<BackEnd>) -> Result<Self> {
        let line = describe(&command);
        let log = site.scratch.join(fresh_name(site, "vmm", "log"));
        let errors = File::create(&log).doing(|| format!("create {}", log.display()))?;
        let console_log = site.scratch.join(fresh_name(site, "console", "log"));
        let copy =
            File::create(&console_log).doing(|| format!("create {}", console_log.display()))?;
        let mut child = command
            .current_dir(&site.scratch)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .doing(|| format!("run `{line}`"))?;
        let console = SharedConsole::default();
        if let Some(output) = child.stdout.take() {
            let console = Arc::clone(&console);
            thread::spawn(move || read_console(output, copy, &console));
        }
        let input = child.stdin.take();
        Ok(Self {
            child,
            input,
            console,
            seen: 0,
            commands: 0,
            site: site.clone(),
            line,
            log,
            _root: root,
        })
    }

    /// Process id of the VMM.
    #[must_use]
    pub fn vmm_pid(&self) -> u32 {
        self.child.id()
    }

    /// All that came from its serial port.
    #[must_use]
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&self.lock().text).into_owned()
    }

    fn lock(&self) -> MutexGuard<'_, Console> {
        self.console
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for_agent(&mut self, limit: Duration) -> Result<()> {
        self.wait_for_line("the guest's boot", limit, |line| {
            line.ends_with("@@ringside ready").then_some(())
        })?;
        if self.console().contains("@@ringside no-root") {
            return Err(self.failed("the guest cannot mount its root disk".into()));
        }
        Ok(())
    }

    /// Takes whole lines from the console until one gives a value.
    fn wait_for_line<T>(
        &mut self,
        what: &str,
        limit: Duration,
        mut take: impl FnMut(&str) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + limit;
        let shared = Arc::clone(&self.console);
        let mut console = shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            while let Some(rest) = console.text.get(self.seen..)
                && let Some(length) = rest.iter().position(|byte| *byte == b'\n')
            {
                let line = String::from_utf8_lossy(rest.get(..length).unwrap_or_default());
                let taken = take(line.trim_end_matches('\r'));
                self.seen += length + 1;
                if let Some(value) = taken {
                    return Ok(value);
                }
            }
            if console.ended {
                drop(console);
                return Err(self.failed(format!("the VMM ended before {what}")));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(console);
                let output = self.tails();
                return Err(LabError::TimedOut {
                    what: what.into(),
                    limit,
                    output,
                });
            }
            (console, _) = shared
                .1
                .wait_timeout(console, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn failed(&mut self, what: String) -> LabError {
        let status = wait_for(&mut self.child, Duration::from_secs(1))
            .ok()
            .flatten();
        let what = match status {
            Some(status) => format!("{what} ({status})"),
            None => what,
        };
        LabError::Ended {
            what,
            output: self.tails(),
        }
    }

    fn tails(&self) -> String {
        let console = self.console();
        let mut lines = vec![self.line.as_str()];
        lines.extend(last_lines(&console, 20));
        let log = self.vmm_log();
        lines.extend(last_lines(&log, 10));
        lines.join("\n")
    }

    /// Runs a shell command in the guest, within the usual time limit.
    ///
    /// # Errors
    /// Fails if the guest does not answer in time; not if the command fails.
    pub fn run(&mut self, command: &str) -> Result<GuestOutput> {
        self.run_within(command, COMMAND_LIMIT)
    }

    /// Runs a shell command in the guest that has to succeed; gives what it wrote.
    ///
    /// # Errors
    /// As [`Guest::run`], and if its exit status is not 0.
    pub fn run_ok(&mut self, command: &str) -> Result<String> {
        self.run_ok_within(command, COMMAND_LIMIT)
    }

    /// As [`Guest::run_ok`], with a time limit as for plain hardware.
    ///
    /// # Errors
    /// As [`Guest::run_ok`].
    pub fn run_ok_within(&mut self, command: &str, limit: Duration) -> Result<String> {
        let output = self.run_within(command, limit)?;
        if output.status != 0 {
            return Err(LabError::Ended {
                what: format!("`{command}` in the guest ended with {}", output.status),
                output: output.text,
            });
        }
        Ok(output.text)
    }

    /// As [`Guest::run`], with a time limit as for plain hardware.
    ///
    /// # Errors
    /// As [`Guest::run`].
    pub fn run_within(&mut self, command: &str, limit: Duration) -> Result<GuestOutput> {
        let id = self.send(command)?;
        let begin = format!("@@ringside begin {id}");
        let end = format!("@@ringside end {id} ");
        let mut started = false;
        let mut lines = Vec::new();
        let status = self.wait_for_line(
            &format!("the end of `{command}` in the guest"),
            self.site.limit(limit),
            |line| {
                if started {
                    if let Some(status) = line.strip_prefix(&end) {
                        return Some(status.to_owned());
                    }
                    lines.push(line.to_owned());
                } else {
                    started = line.ends_with(&begin);
                }
                None
            },
        )?;
        let damaged = |text: &str| LabError::Protocol {
            from: "guest agent",
            text: text.to_owned(),
        };
        let mut bytes = Vec::new();
        for line in &lines {
            bytes.extend(BASE64.decode(line).map_err(|_| damaged(line))?);
        }
        Ok(GuestOutput {
            status: status.parse().map_err(|_| damaged(&status))?,
            text: String::from_utf8_lossy(&bytes).into_owned(),
        })
    }

    /// Starts a command that does not end: the guest takes no other. What it writes to `/dev/ttyS0` is on the console.
    ///
    /// # Errors
    /// Fails if the VMM has ended.
    pub fn run_for_good(&mut self, command: &str) -> Result<()> {
        self.send(command).map(drop)
    }

    /// Gives the guest's first network card (`eth0`) an address (with its prefix length) and brings it up; gives its name.
    ///
    /// # Errors
    /// Fails if there is no card.
    pub fn network_up(&mut self, address: &str) -> Result<&'static str> {
        let name = "eth0";
        self.run_ok(&format!(
            "ip address add {address} dev {name} && ip link set {name} up"
        ))?;
        Ok(name)
    }

    /// Sends a command to the agent; gives its number.
    fn send(&mut self, command: &str) -> Result<u32> {
        self.commands += 1;
        let id = self.commands;
        let encoded = BASE64.encode(command);
        let mut rest = encoded.as_str();
        let mut lines = String::new();
        while rest.len() > LINE_LENGTH {
            // Base64 is ASCII: every index is a character boundary.
            let (part, remaining) = rest.split_at(LINE_LENGTH);
            lines.push_str(&format!("part {part}\n"));
            rest = remaining;
        }
        lines.push_str(&format!("run {id} {rest}\n"));
        let sent = match &mut self.input {
            Some(input) => input
                .write_all(lines.as_bytes())
                .and_then(|()| input.flush()),
            None => Err(std::io::ErrorKind::BrokenPipe.into()),
        };
        match sent {
            Ok(()) => Ok(id),
            Err(_) => Err(self.failed("the VMM has ended".into())),
        }
    }

    /// Powers the guest off from inside and gives the exit status of the VMM.
    ///
    /// # Errors
    /// Fails if the VMM does not end in time.
    pub fn shut_down(self) -> Result<ExitStatus> {
        self.end_by("sync; poweroff -f")
    }

    /// Runs a command in the guest that ends it, and gives the exit status of the VMM.
    ///
    /// # Errors
    /// Fails if the VMM does not end in time.
    pub fn end_by(mut self, command: &str) -> Result<ExitStatus> {
        self.send(command)?;
        self.wait()
    }

    /// Sends the VMM a signal that is to end it, and gives its exit status.
    ///
    /// # Errors
    /// Fails if it does not end in time.
    pub fn end_by_signal(mut self, signal: Signal) -> Result<ExitStatus> {
        signal_child(&self.child, signal)?;
        self.wait()
    }

    /// What the VMM has logged.
    #[must_use]
    pub fn vmm_log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits for the end of the VMM, which somebody else has asked for, and gives its exit status.
    ///
    /// # Errors
    /// Fails if it does not end in time.
    pub fn ended(mut self) -> Result<ExitStatus> {
        self.wait()
    }

    /// Waits for the end of the VMM, which must have this status, and gives its log.
    ///
    /// # Errors
    /// Fails if it does not end in time, or in another way.
    pub fn log_of_end(mut self, status: i32) -> Result<String> {
        let ended = self.wait()?;
        ensure!(
            ended.code() == Some(status),
            "the VMM ended with {ended}:\n{}",
            self.tails()
        );
        Ok(self.vmm_log())
    }

    fn wait(&mut self) -> Result<ExitStatus> {
        let limit = self.site.limit(SHUTDOWN_LIMIT);
        match wait_for(&mut self.child, limit)? {
            Some(status) => Ok(status),
            None => Err(LabError::TimedOut {
                what: "the end of the VMM".into(),
                limit,
                output: self.tails(),
            }),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether somebody listens at `unix:PATH` or `tcp:127.0.0.1:PORT`: nobody connects, as only one may.
///
/// # Errors
/// Fails if the address is none.
pub fn listens(address: &str) -> Result<bool> {
    let read = |table: &str| fs::read_to_string(table).doing(|| format!("read {table}"));
    if let Some(socket) = address.strip_prefix("unix:") {
        // The file is there a moment before. Of the flags in the fourth column, this one says that somebody listens.
        return Ok(read("/proc/self/net/unix")?.lines().any(|row| {
            row.ends_with(socket) && row.split_whitespace().nth(3) == Some("00010000")
        }));
    }
    let unknown = || LabError::Setup(format!("`{address}` is no address to wait at"));
    let (_, port) = address.rsplit_once(':').ok_or_else(unknown)?;
    let port: u16 = port.parse().map_err(|_| unknown())?;
    // Local address, remote address, state, of which 0A is LISTEN.
    let row = format!(":{port:04X} 00000000:0000 0A ");
    Ok(read("/proc/self/net/tcp")?.contains(&row))
}

/// The same command on one CPU only.
fn pinned(command: &Command, cpu: u32) -> Command {
    let mut pinned = Command::new("taskset");
    pinned
        .args(["--cpu-list", &cpu.to_string()])
        .arg(command.get_program())
        .args(command.get_args());
    pinned
}

/// What a person wants of a console: not the output of commands in base64.
#[must_use]
pub fn readable(console: &str) -> String {
    let mut in_output = false;
    let mut text = String::new();
    for line in console.split_inclusive('\n') {
        in_output &= !line.starts_with("@@ringside end");
        if !in_output {
            text.push_str(line);
        }
        in_output |= line.contains("@@ringside begin");
    }
    text
}

fn read_console(mut output: impl Read, mut copy: File, console: &SharedConsole) {
    let mut buffer = [0; 4096];
    loop {
        let count = match output.read(&mut buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => 0,
        };
        let bytes = buffer.get(..count).unwrap_or_default();
        // The copy is for people; the test goes on without it.
        let _ = copy.write_all(bytes);
        let mut now = console.0.lock().unwrap_or_else(PoisonError::into_inner);
        now.text.extend_from_slice(bytes);
        now.ended = count == 0;
        console.1.notify_all();
        if count == 0 {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_of_commands_is_left_out_of_what_people_read() {
        let console = "boot\n@@ringside begin 1\naGkK\naGkK\n@@ringside end 1 0\npanic";
        assert_eq!(
            readable(console),
            "boot\n@@ringside begin 1\n@@ringside end 1 0\npanic"
        );
    }
}
