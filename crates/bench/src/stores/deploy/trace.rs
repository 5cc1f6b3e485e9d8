//! What a guest asks of its disk while it boots: recorded once from a real one, kept beside the guest's image.
//!
//! QEMU boots the image from `nbdkit`, whose `log` filter writes down each request as it comes and as it is answered.
//! A trace keeps that order: a request is made when everything is answered that was answered before it then. So as
//! much is under way at a time as was, however fast or slow the disk.

#[cfg(test)]
mod tests;

use crate::Outcome;
use crate::guest::http_ok;
use crate::host::free_ports;
use base::ByteRange;
use rustix::fs::SeekFrom;
use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What is asked of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    Read(ByteRange),
    Write(ByteRange),
    Zero(ByteRange),
    Trim(ByteRange),
    Flush,
}

/// One step of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Asks, and does not wait. Requests are numbered from nothing, in order.
    Ask(Ask),
    /// Waits until the request of this number is answered.
    Await(u64),
}

/// What a client of a disk does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Trace {
    pub(super) steps: Vec<Step>,
}

impl Trace {
    /// Reads what nbdkit's `log` filter wrote.
    pub(super) fn parse(log: &str) -> Outcome<Self> {
        let mut numbers: HashMap<(&str, &str), u64> = HashMap::new();
        let (mut steps, mut next) = (Vec::new(), 0);
        for line in log.lines() {
            let field = |name: &str| line.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
            let number = |name: &str| -> Outcome<u64> {
                let text = field(name).and_then(|text| text.strip_prefix("0x"));
                let text = text.ok_or_else(|| format!("no `{name}` in the trace's line `{line}`"))?;
                Ok(u64::from_str_radix(text, 16)?)
            };
            let (Some(connection), Some(id), Some(action)) = (field("connection"), field("id"), line.split(' ').nth(3))
            else {
                continue;
            };
            if let Some(answered) = action.strip_prefix("...") {
                if let Some(number) = numbers.remove(&(connection, id)) {
                    if field("return") != Some("0") {
                        return Err(format!("a {answered} failed while the trace was recorded: `{line}`").into());
                    }
                    steps.push(Step::Await(number));
                }
                continue;
            }
            let range = || Ok::<_, crate::Failure>(ByteRange::at(number("offset")?, number("count")?));
            let ask = match action {
                "Read" => Ask::Read(range()?),
                "Write" => Ask::Write(range()?),
                "Zero" => Ask::Zero(range()?),
                "Trim" => Ask::Trim(range()?),
                "Flush" => Ask::Flush,
                // What is where: a hypervisor's question, not its guest's.
                _ => continue,
            };
            numbers.insert((connection, id), next);
            steps.push(Step::Ask(ask));
            next += 1;
        }
        if next == 0 {
            return Err("the recorded trace holds no request".into());
        }
        Ok(Self { steps })
    }

    /// Reads `ranges` from first to last, as a copying program does: `piece` bytes at a time, some at once.
    pub(super) fn whole(ranges: &[ByteRange], piece: u64) -> Self {
        const AT_ONCE: u64 = 4;
        let (mut steps, mut next) = (Vec::new(), 0);
        for range in ranges {
            let mut at = range.start;
            while at < range.end {
                let end = (at + piece).min(range.end);
                steps.push(Step::Ask(Ask::Read(ByteRange::new(at, end))));
                (at, next) = (end, next + 1);
                if next >= AT_ONCE {
                    steps.push(Step::Await(next - AT_ONCE));
                }
            }
        }
        Self { steps }
    }

    /// How many requests there are.
    pub(super) fn requests(&self) -> usize {
        self.asks().count()
    }

    fn asks(&self) -> impl Iterator<Item = Ask> + '_ {
        self.steps.iter().filter_map(|step| if let Step::Ask(ask) = step { Some(*ask) } else { None })
    }

    /// Bytes read, each counted once, however often.
    pub(super) fn bytes_read(&self) -> u64 {
        union(self.asks().filter_map(|ask| if let Ask::Read(range) = ask { Some(range) } else { None }))
    }

    /// Bytes written, each counted once.
    pub(super) fn bytes_written(&self) -> u64 {
        union(self.asks().filter_map(|ask| if let Ask::Write(range) = ask { Some(range) } else { None }))
    }
}

fn union(ranges: impl Iterator<Item = ByteRange>) -> u64 {
    let mut ranges: Vec<ByteRange> = ranges.collect();
    ranges.sort_by_key(|range| range.start);
    let (mut bytes, mut end) = (0, 0);
    for range in ranges {
        bytes += range.end.saturating_sub(range.start.max(end));
        end = end.max(range.end);
    }
    bytes
}

/// Where a file has data, ascending.
pub(super) fn data_ranges(file: &File) -> Outcome<Vec<ByteRange>> {
    let (mut found, mut at) = (Vec::new(), 0);
    loop {
        match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => {
                let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
                found.push(ByteRange::new(start, end));
                at = end;
            }
            Err(rustix::io::Errno::NXIO) => return Ok(found),
            Err(error) => return Err(error.into()),
        }
    }
}

/// What a guest boots from.
pub(super) struct Guest<'a> {
    pub(super) disk: &'a Path,
    pub(super) kernel: &'a Path,
    pub(super) initrd: &'a Path,
    pub(super) cmdline: &'a str,
}

/// Ends with the recording.
struct Helper(Child);

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Boots a guest until its web server answers, and writes down what it asks of its disk. Files go to `dir`.
pub(super) fn record(guest: &Guest<'_>, dir: &Path) -> Outcome<String> {
    const LIMIT: Duration = Duration::from_secs(300);
    let (socket, log) = (dir.join("trace.sock"), dir.join("trace.log"));
    let _ = std::fs::remove_file(&socket);
    // What it writes goes into a file that nobody keeps; the log is next to the guest.
    let nbdkit = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "nbdkit", "--foreground", "--filter=log", "--filter=cow", "file", "-U"])
        .arg(&socket)
        .arg(guest.disk)
        .arg(format!("logfile={}", log.display()))
        .stdin(Stdio::null())
        .spawn()
        .map_err(|e| format!("nbdkit (`make setup`): {e}"))?;
    let _nbdkit = Helper(nbdkit);
    await_socket(&socket)?;
    let port = free_ports(1)?;
    let errors = File::create(dir.join("qemu.log"))?;
    let qemu = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-machine", "q35,hpet=off", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "512M", "-smp", "1"])
        .arg("-kernel")
        .arg(guest.kernel)
        .arg("-initrd")
        .arg(guest.initrd)
        .args(["-append", guest.cmdline, "-device", "virtio-rng-pci", "-serial", "null"])
        .arg("-blockdev")
        .arg(format!("driver=nbd,node-name=disk,server.type=unix,server.path={},discard=unmap", socket.display()))
        .args(["-device", "virtio-blk-pci,drive=disk,write-cache=on", "-device", "virtio-net-pci,netdev=net,romfile="])
        .args(["-netdev", &format!("user,id=net,hostfwd=tcp:127.0.0.1:{port}-:80")])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(errors)
        .spawn()
        .map_err(|e| format!("qemu-system-x86_64 (`make setup`): {e}"))?;
    let mut qemu = Helper(qemu);
    let end = Instant::now() + LIMIT;
    let address = ([127, 0, 0, 1], port).into();
    while !http_ok(address, Duration::from_secs(1)).unwrap_or(false) {
        if let Some(status) = qemu.0.try_wait()? {
            return Err(
                format!("the guest to be traced ended ({status}); see {}", dir.join("qemu.log").display()).into()
            );
        }
        if Instant::now() > end {
            return Err(format!("the guest to be traced did not answer within {LIMIT:?}").into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(std::fs::read_to_string(&log)?)
}

/// Waits until somebody serves at a socket.
pub(super) fn await_socket(socket: &Path) -> Outcome {
    let end = Instant::now() + Duration::from_secs(30);
    while let Err(error) = std::os::unix::net::UnixStream::connect(socket) {
        if Instant::now() > end {
            return Err(format!("nobody serves at {}: {error}", socket.display()).into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
