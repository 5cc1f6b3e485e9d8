//! A machine whose RAM is a file of the host's, driven over its console: no product in between, so that what the
//! kernel says of its pages and what is read from outside is the same memory.

use crate::Outcome;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vmm::accelerator::Host;
use vmm::qmp::Qmp;

/// What a guest boots from.
#[derive(Clone, Debug)]
pub struct Parts {
    /// Its kernel.
    pub kernel: PathBuf,
    /// Its initial RAM disk.
    pub initrd: PathBuf,
    /// Its disk, raw; it is not written to.
    pub disk: PathBuf,
    /// Its kernel's arguments.
    pub cmdline: String,
}

/// How a machine is made.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of RAM.
    pub memory_bytes: u64,
    /// QEMU's name for the processor.
    pub cpu: &'static str,
    /// What is added to the kernel's arguments.
    pub arguments: String,
    /// How long booting, or a command, may take.
    pub limit: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            memory_bytes: 512 << 20,
            cpu: "Westmere-v1,+rdrand",
            arguments: String::new(),
            limit: Duration::from_secs(1800),
        }
    }
}

/// A running machine. It ends with this value.
pub struct Machine {
    child: Child,
    input: ChildStdin,
    said: Arc<Mutex<String>>,
    /// Where in what was said the last wait ended.
    read_to: usize,
    qmp: Qmp,
    limit: Duration,
    /// The file that is its RAM.
    pub ram: PathBuf,
    /// Its second disk.
    pub exchange: PathBuf,
    /// Bytes of RAM below the hole for devices.
    pub below_hole: u64,
}

impl Machine {
    /// Starts one in a directory of its own, its second disk holding `script` at its beginning.
    ///
    /// # Errors
    /// Where files cannot be made or QEMU does not start.
    pub fn boot(dir: &Path, parts: &Parts, options: &Options, script: &str) -> Outcome<Self> {
        std::fs::create_dir_all(dir)?;
        let (ram, exchange, socket) = (dir.join("ram"), dir.join("exchange"), dir.join("qmp"));
        let mut file = File::create(&exchange)?;
        file.write_all(script.as_bytes())?;
        file.set_len((256 << 20) + options.memory_bytes / 64)?;
        let _ = std::fs::remove_file(&socket);
        File::create(&ram)?.set_len(options.memory_bytes)?;
        let (accelerator, _) = Host::probe().choose();
        let drive = |path: &Path, more: &str| format!("file={},if=virtio,format=raw,{more}", path.display());
        let memory =
            format!("memory-backend-file,id=ram,size={},mem-path={},share=on", options.memory_bytes, ram.display());
        let log = File::create(dir.join("qemu.log"))?;
        let mut child = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-display", "none", "-no-user-config", "-serial", "stdio"])
            .args(["-machine", &format!("q35,accel={accelerator},memory-backend=ram"), "-cpu", options.cpu])
            .args(["-object", &memory, "-m", &format!("{}B", options.memory_bytes)])
            .args(["-drive", &drive(&parts.disk, "snapshot=on"), "-drive", &drive(&exchange, "cache=unsafe")])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
            .arg("-kernel")
            .arg(&parts.kernel)
            .arg("-initrd")
            .arg(&parts.initrd)
            .args(["-append", format!("{} {}", parts.cmdline, options.arguments).trim_end()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .map_err(|e| format!("qemu-system-x86_64 does not start: {e}"))?;
        let input = child.stdin.take().expect("piped");
        let said = Arc::new(Mutex::new(String::new()));
        let mut output = child.stdout.take().expect("piped");
        let heard = said.clone();
        let mut log = File::create(dir.join("console.log"))?;
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = output.read(&mut buffer) {
                let _ = log.write_all(&buffer[..n]);
                heard.lock().expect("nobody panics with it").push_str(&String::from_utf8_lossy(&buffer[..n]));
            }
        });
        let end = Instant::now() + Duration::from_secs(20);
        let qmp = loop {
            match Qmp::connect(&socket, || {}) {
                Ok(qmp) => break qmp,
                Err(error) if Instant::now() > end || child.try_wait()?.is_some() => {
                    let _ = child.kill();
                    let _ = child.wait();
                    let words = std::fs::read_to_string(dir.join("qemu.log")).unwrap_or_default();
                    return Err(format!("QEMU does not answer: {error} {words}").into());
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        // QEMU 7.2: q35 keeps 2 GiB below the hole where it has 2.75 GiB or more.
        let below_hole = if options.memory_bytes >= 0xb000_0000 { 2 << 30 } else { options.memory_bytes };
        Ok(Self { child, input, said, read_to: 0, qmp, limit: options.limit, ram, exchange, below_hole })
    }

    /// Waits until the console says one of these, and returns which.
    ///
    /// # Errors
    /// With what was said instead, where it takes too long or the machine ends.
    pub fn wait(&mut self, marks: &[&str]) -> Outcome<usize> {
        let end = Instant::now() + self.limit;
        loop {
            let gone = self.child.try_wait()?.is_some();
            {
                let said = self.said.lock().expect("nobody panics with it");
                let news = &said[self.read_to..];
                let first = marks.iter().enumerate().filter_map(|(i, m)| Some((news.find(m)?, i))).min();
                if let Some((at, mark)) = first {
                    self.read_to += at + marks[mark].len();
                    return Ok(mark);
                }
                if gone || Instant::now() > end {
                    let tail = said.chars().rev().take(2000).collect::<Vec<_>>().into_iter().rev().collect::<String>();
                    return Err(format!("waited in vain for {marks:?}; the console showed: {tail}").into());
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Types a line.
    ///
    /// # Errors
    /// Where the machine is gone.
    pub fn type_line(&mut self, line: &str) -> Outcome {
        self.input.write_all(format!("{line}\n").as_bytes())?;
        Ok(self.input.flush()?)
    }

    /// Stops its processors, or lets them go on.
    ///
    /// # Errors
    /// What QEMU says.
    pub fn set_running(&mut self, running: bool) -> Outcome {
        self.qmp.execute(if running { "cont" } else { "stop" }, json!({}))?;
        Ok(())
    }

    /// Control registers 3 and 4 of its first processor.
    ///
    /// # Errors
    /// Where QEMU does not show them.
    pub fn registers(&mut self) -> Outcome<(u64, u64)> {
        let shown = self.qmp.execute("human-monitor-command", json!({"command-line": "info registers"}))?;
        let text = shown.as_str().unwrap_or_default();
        let register = |name: &str| -> Outcome<u64> {
            let (_, rest) = text.split_once(name).ok_or_else(|| format!("no {name} in `{text}`"))?;
            Ok(u64::from_str_radix(rest.split_ascii_whitespace().next().unwrap_or_default(), 16)?)
        };
        Ok((register("CR3=")?, register("CR4=")?))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(pid) = Pid::from_raw(self.child.id().cast_signed()) {
            let _ = kill_process(pid, Signal::KILL);
        }
        let _ = self.child.wait();
        for file in [&self.ram, &self.exchange] {
            let _ = std::fs::remove_file(file);
        }
    }
}
