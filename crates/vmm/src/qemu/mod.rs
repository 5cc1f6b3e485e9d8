//! QEMU 7.2 and later, unmodified, over QMP.
//!
//! ```text
//!            spawn(Boot) ──> running ──freeze──> running
//!  spawn(Incoming) ──load──> running
//! ```
//! Sockets that a later daemon needs (QMP, console, resident library) are bound by the daemon and inherited, so
//! that connecting never polls and a replaced daemon finds them by path.

mod command;

pub use command::{Backends, Start, arguments};

use crate::error::Error;
use crate::process::{self, ProcessId};
use crate::qmp::{Event, LIMIT, Qmp};
use crate::resident::{Frozen, Resident};
use crate::shape::MachineShape;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use serde_json::json;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The hypervisor's program.
pub const PROGRAM: &str = "qemu-system-x86_64";

/// Where one VM's sockets and logs are.
#[derive(Clone, Debug)]
pub struct Files {
    /// The VM's directory.
    pub dir: PathBuf,
}

impl Files {
    /// QMP's socket.
    #[must_use]
    pub fn qmp(&self) -> PathBuf {
        self.dir.join("qmp.sock")
    }
    /// The resident library's socket.
    #[must_use]
    pub fn resident(&self) -> PathBuf {
        self.dir.join("resident.sock")
    }
    /// The serial console's socket.
    #[must_use]
    pub fn console(&self) -> PathBuf {
        self.dir.join("console.sock")
    }
    /// What the guest wrote to its console.
    #[must_use]
    pub fn console_log(&self) -> PathBuf {
        self.dir.join("console.log")
    }
    /// What the hypervisor said.
    #[must_use]
    pub fn hypervisor_log(&self) -> PathBuf {
        self.dir.join("hypervisor.log")
    }
    /// What the network helper said.
    #[must_use]
    pub fn passt_log(&self) -> PathBuf {
        self.dir.join("passt.log")
    }
}

/// What a hypervisor is started with, beside its shape.
pub struct Launch<'a> {
    /// Name of the VM.
    pub name: &'a str,
    /// Its sockets and logs.
    pub files: &'a Files,
    /// The resident library.
    pub library: &'a Path,
    /// The mirror's directory of RAM files.
    pub ram_dir: &'a Path,
    /// The file given as `mem-path`: a blank RAM file of the right size.
    pub ram_path: &'a Path,
    /// The RAM map to install at once; without it [`Qemu::map`] installs it later.
    pub ram_map: Option<&'a Path>,
    /// One file for each disk.
    pub disks: &'a [&'a Path],
    /// The socket to the network helper.
    pub net: BorrowedFd<'a>,
    /// The mirror's FUSE descriptor, which the library keeps.
    pub fuse: BorrowedFd<'a>,
    /// Generation id, a UUID.
    pub generation_id: &'a str,
    /// How it comes to life.
    pub start: Start<'a>,
    /// The gate it waits at before it opens RAM and disks, which need not be there until then.
    pub gate: Option<BorrowedFd<'a>>,
}

/// A running QEMU and the connections to it.
pub struct Qemu {
    /// Its process.
    pub process: ProcessId,
    files: Files,
    qmp: Qmp,
    resident: Resident,
}

/// What a freeze brought.
pub struct Freeze {
    /// The device state.
    pub device_state: Vec<u8>,
    /// The frozen RAM.
    pub ram: Frozen,
    /// From `stop` to the end of `cont`, draining included.
    pub pause: Duration,
    /// How long the parts took: `stop`, device state, fork-hold, marks, `cont`.
    pub parts: [Duration; 5],
}

/// Starts the process and returns before it is ready, so that many can be started one after another.
///
/// # Errors
/// [`Error::Spawn`] where QEMU is missing; [`Error::Io`] where a socket cannot be bound.
pub fn spawn(shape: &MachineShape, launch: &Launch<'_>) -> Result<ProcessId, Error> {
    let listen = |path: &Path| -> Result<UnixListener, Error> {
        let _ = std::fs::remove_file(path);
        UnixListener::bind(path).map_err(Error::io("bind", path))
    };
    let files = launch.files;
    let (qmp, resident, console) = (listen(&files.qmp())?, listen(&files.resident())?, listen(&files.console())?);
    let args = arguments(
        shape,
        &Backends {
            name: launch.name,
            ram_path: launch.ram_path,
            disks: launch.disks,
            net_fd: launch.net.as_raw_fd(),
            qmp_fd: qmp.as_raw_fd(),
            console_fd: console.as_raw_fd(),
            console_log: &files.console_log(),
            generation_id: launch.generation_id,
            start: match launch.start {
                Start::Boot { kernel, initrd, cmdline } => Start::Boot { kernel, initrd, cmdline },
                Start::Incoming => Start::Incoming,
            },
        },
    );
    let mut command = Command::new(PROGRAM);
    command.args(args);
    crate::process::without_secrets(&mut command);
    command.env("LD_PRELOAD", launch.library);
    command.env(base::resident::ENV_SOCKET, resident.as_raw_fd().to_string());
    command.env(base::resident::ENV_RAM_PATH, launch.ram_path);
    command.env(base::resident::ENV_RAM_DIR, launch.ram_dir);
    command.env(base::resident::ENV_FUSE, launch.fuse.as_raw_fd().to_string());
    if let Some(map) = launch.ram_map {
        command.env(base::resident::ENV_RAM_MAP, map);
    }
    let mut pass = vec![qmp.as_fd(), resident.as_fd(), console.as_fd(), launch.net, launch.fuse];
    if let Some(gate) = launch.gate {
        command.env(base::resident::ENV_GATE, gate.as_raw_fd().to_string());
        pass.push(gate);
    }
    process::spawn(&command, &pass, None, &files.hypervisor_log())
}

impl Qemu {
    /// Connects to a process that [`spawn`] started, now or in the life of an earlier daemon.
    ///
    /// # Errors
    /// [`Error::Died`] with its last words where it ended meanwhile; else what the connection met.
    pub fn connect(process: ProcessId, files: &Files, wake: impl Fn() + Send + 'static) -> Result<Self, Error> {
        let connected = Qmp::connect(&files.qmp(), wake).and_then(|mut qmp| {
            qmp.execute(
                "migrate-set-capabilities",
                json!({"capabilities": [
                    {"capability": "x-ignore-shared", "state": true},
                    {"capability": "events", "state": true},
                ]}),
            )?;
            Ok((qmp, Resident::connect(&files.resident())?))
        });
        match connected {
            Ok((qmp, resident)) => Ok(Self { process, files: files.clone(), qmp, resident }),
            Err(error) => {
                // A hypervisor that ends at start hangs up first: its own words say more than our broken pipe.
                if process.pidfd().is_none_or(|fd| process::wait_readable(&fd, Duration::from_millis(300))) {
                    return Err(self::died(process, files));
                }
                Err(error)
            }
        }
    }

    /// The state of the machine as QEMU names it: `running`, `paused`, `io-error`, `inmigrate`, …
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn status(&mut self) -> Result<String, Error> {
        let status = self.qmp.execute("query-status", json!({}))?;
        Ok(status["status"].as_str().unwrap_or("unknown").to_owned())
    }

    /// The connection to the resident library.
    pub fn resident(&mut self) -> &mut Resident {
        &mut self.resident
    }

    /// Installs the RAM map of an incoming machine.
    ///
    /// # Errors
    /// [`Error::Resident`] with what went wrong.
    pub fn map(&mut self, path: &Path) -> Result<(), Error> {
        self.resident.map(path)
    }

    /// Loads device state into a machine that was started `Incoming`, and lets it run.
    ///
    /// # Errors
    /// [`Error::Refused`] or [`Error::Died`] where the state does not fit the machine.
    pub fn load(&mut self, state: BorrowedFd<'_>) -> Result<(), Error> {
        self.qmp.execute_with("getfd", json!({"fdname": "state"}), Some(state))?;
        self.qmp.execute("migrate-incoming", json!({"uri": "fd:state"}))?;
        let event = self.qmp.wait_event("device state to load", LIMIT, |e| {
            e.name == "MIGRATION" && (e.data["status"] == "completed" || e.data["status"] == "failed")
        });
        match event {
            // It was stopped when its state was taken, and is so now.
            Ok(event) if event.data["status"] == "completed" => self.set_paused(false),
            Ok(_) => Err(Error::Refused {
                command: "migrate-incoming".into(),
                reason: process::last_words(&self.files.hypervisor_log()),
            }),
            Err(error) => Err(if self.process.alive() { error } else { died(self.process, &self.files) }),
        }
    }

    /// Stops the machine, takes its device state and RAM of that instant, calls `mark` (for the disks), and
    /// lets it go on. Whatever fails, the machine runs afterwards if it can.
    ///
    /// # Errors
    /// As [`Qmp::execute`] and [`Resident::freeze`]; what `mark` returned.
    pub fn freeze<E: From<Error>>(&mut self, full: bool, mark: impl FnOnce() -> Result<(), E>) -> Result<Freeze, E> {
        let (reader, writer) =
            pipe_with(PipeFlags::CLOEXEC).map_err(|e| Error::io("make a pipe for", &self.files.dir)(e.into()))?;
        let _ = fcntl_setpipe_size(&writer, 1 << 20);
        self.qmp.execute_with("getfd", json!({"fdname": "state"}), Some(writer.as_fd()))?;
        drop(writer);
        while self.qmp.take_event().is_some() {}
        self.resident.prepare()?;
        let state = std::thread::spawn(move || read_all(reader));
        let began = Instant::now();
        let mut parts = [Duration::ZERO; 5];
        let mut at = began;
        let mut lap = |slot: &mut Duration| {
            *slot = at.elapsed();
            at = Instant::now();
        };
        let taken = (|| -> Result<Frozen, E> {
            self.qmp.execute("stop", json!({}))?;
            lap(&mut parts[0]);
            self.migrate_out()?;
            lap(&mut parts[1]);
            let frozen = self.resident.freeze(full)?;
            lap(&mut parts[2]);
            if let Err(error) = mark() {
                let _ = self.resident.release(frozen.holder);
                return Err(error);
            }
            lap(&mut parts[3]);
            Ok(frozen)
        })();
        let went_on = self.go_on();
        lap(&mut parts[4]);
        let pause = began.elapsed();
        let ram = match (taken, went_on) {
            (Ok(ram), Ok(())) => ram,
            (Ok(ram), Err(error)) => {
                let _ = self.resident.release(ram.holder);
                return Err(error.into());
            }
            (Err(error), _) => {
                // The pipe's writer must be gone, or the reading thread never ends.
                let _ = self.qmp.execute("migrate_cancel", json!({}));
                let _ = self.qmp.execute("closefd", json!({"fdname": "state"}));
                return Err(error);
            }
        };
        let device_state = state
            .join()
            .expect("the reading thread does not panic")
            .map_err(|e| Error::io("read the device state of", &self.files.dir)(e))?;
        Ok(Freeze { device_state, ram, pause, parts })
    }

    /// Lets the machine go on after its device state was saved. QEMU says that it is saved a moment before it takes
    /// the machine for one that may go on (`migration_iteration_finish`, migration/migration.c).
    fn go_on(&mut self) -> Result<(), Error> {
        let (end, mut refusals) = (Instant::now() + LIMIT, 0);
        loop {
            match self.set_paused(false) {
                Err(Error::Refused { .. }) if Instant::now() < end && refusals < 3 => {
                    // It may have got there between the two questions: then it is asked once more.
                    if self.status()? != "finish-migrate" {
                        refusals += 1;
                    }
                    std::thread::sleep(Duration::from_micros(200));
                }
                done => return done,
            }
        }
    }

    fn migrate_out(&mut self) -> Result<(), Error> {
        self.qmp.execute("migrate", json!({"uri": "fd:state"}))?;
        let done = self.qmp.wait_event("device state to be saved", LIMIT, |e| {
            e.name == "MIGRATION" && (e.data["status"] == "completed" || e.data["status"] == "failed")
        })?;
        if done.data["status"] == "completed" {
            return Ok(());
        }
        let why = self.qmp.execute("query-migrate", json!({}))?;
        let reason = why["error-desc"].as_str().unwrap_or("QEMU gives no reason").to_owned();
        Err(Error::Refused { command: "migrate".into(), reason })
    }

    /// Pauses the machine (`stop`) or lets it go on (`cont`).
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn set_paused(&mut self, paused: bool) -> Result<(), Error> {
        self.qmp.execute(if paused { "stop" } else { "cont" }, json!({})).map(|_| ())
    }

    /// Asks the guest to power down (the ACPI button).
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn power_button(&mut self) -> Result<(), Error> {
        self.qmp.execute("system_powerdown", json!({})).map(|_| ())
    }

    /// Sets the balloon's target: bytes the guest shall keep.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn balloon(&mut self, bytes: u64) -> Result<(), Error> {
        self.qmp.execute("balloon", json!({"value": bytes})).map(|_| ())
    }

    /// Bytes the guest keeps, as the balloon device knows.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn balloon_actual(&mut self) -> Result<u64, Error> {
        let info = self.qmp.execute("query-balloon", json!({}))?;
        Ok(info["actual"].as_u64().unwrap_or(0))
    }

    /// The next event nobody waited for.
    pub fn take_event(&mut self) -> Option<Event> {
        self.qmp.take_event()
    }
}

fn died(process: ProcessId, files: &Files) -> Error {
    Error::Died { what: "the hypervisor", pid: process.pid, last_words: process::last_words(&files.hypervisor_log()) }
}

fn read_all(fd: OwnedFd) -> std::io::Result<Vec<u8>> {
    let mut out = Vec::with_capacity(1 << 20);
    std::fs::File::from(fd).read_to_end(&mut out)?;
    Ok(out)
}
