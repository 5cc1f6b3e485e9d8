//! Colors of real guests, judged page by page by their own kernels.

mod machine;
pub mod matrix;
mod oracle;

pub use machine::{Machine, Options, Parts};
pub use oracle::{Matrix, Oracle, Truth};

use crate::Outcome;
use guest::{Coloring, Cpu, Hint, Memory, Region};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// How often a coloring is timed.
const REPEATED: usize = 7;
const SCRIPT: &str = include_str!("oracle.pl");

/// A machine's RAM in a file.
pub struct RamFile {
    file: File,
    regions: Vec<Region>,
}

impl RamFile {
    /// Opens it.
    ///
    /// # Errors
    /// Where it cannot be.
    pub fn open(path: &Path, below_hole: u64) -> Outcome<Self> {
        let file = File::open(path)?;
        let regions = Region::of_pc(file.metadata()?.len(), below_hole);
        Ok(Self { file, regions })
    }
}

impl Memory for RamFile {
    fn regions(&self) -> &[Region] {
        &self.regions
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        self.file.read_exact_at(into, offset)
    }
}

/// One guest, colored and judged.
pub struct Judged {
    /// Its colors.
    pub coloring: Coloring,
    /// How long that took, the median of some repetitions: without a hint, then with one.
    pub took: [Duration; 2],
    /// How they agree with its kernel.
    pub matrix: Matrix,
    /// How much of its memory was in use, percent.
    pub used_percent: f64,
    /// The same without the kernel's note: what the architecture alone tells.
    pub fallback: Coloring,
    /// Bytes of its RAM.
    pub memory_bytes: u64,
}

/// RAM in which the kernel's note cannot be found.
struct Noteless<'a>(&'a RamFile);

impl Memory for Noteless<'_> {
    fn regions(&self) -> &[Region] {
        self.0.regions()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        self.0.read(offset, into)?;
        if into.len() == 24 && into.ends_with(b"VMCOREINFO\0\0") {
            into.fill(0);
        }
        Ok(())
    }

    fn read_heads(&self, _: u64, _: usize, into: &mut [u8]) -> std::io::Result<()> {
        into.fill(0);
        Ok(())
    }
}

/// Boots a guest, fills its memory to `percent`, freezes and colors it, and lets its kernel judge. `frozen` is called
/// while it stands still.
///
/// # Errors
/// Where the guest does not do as told, or cannot be colored.
pub fn judge(
    dir: &Path,
    parts: &Parts,
    options: &Options,
    percent: u32,
    frozen: &mut dyn FnMut(&RamFile, Cpu, &Coloring) -> Outcome,
) -> Outcome<Judged> {
    // A busy host makes the check of the timer fail. A shell instead of an init: the servers that matter are started by the script, and nothing else takes time.
    let arguments = format!("{} no_timer_check init=/bin/sh", options.arguments);
    let mut machine = Machine::boot(dir, parts, &Options { arguments, ..options.clone() }, SCRIPT)?;
    machine.wait(&["job control turned off"])?;
    machine.type_line(&format!("head -c {} /dev/vdb >/run/oracle.pl; perl /run/oracle.pl {percent}", SCRIPT.len()))?;
    if machine.wait(&["ORACLE-READY", "ORACLE-FAILED"])? == 1 {
        let reason = machine.wait(&["\n"]).err();
        return Err(format!("the guest failed to fill its memory: {reason:?}").into());
    }
    machine.set_running(false)?;
    let ram = RamFile::open(&machine.ram, machine.below_hole)?;
    let (cr3, cr4) = machine.registers()?;
    let cpu = Cpu { cr3, cr4 };
    let timed = |hint: Option<Hint>| -> Outcome<(Coloring, Duration)> {
        let mut times = Vec::new();
        loop {
            let start = Instant::now();
            let coloring = guest::color(&ram, Some(cpu), hint)?;
            times.push(start.elapsed());
            if times.len() == REPEATED {
                times.sort();
                return Ok((coloring, times[REPEATED / 2]));
            }
        }
    };
    let (coloring, first) = timed(None)?;
    let (again, second) = timed(coloring.account.hint)?;
    if !again.iter().eq(coloring.iter()) {
        return Err("the same memory got different colors with a hint".into());
    }
    let fallback = guest::color(&Noteless(&ram), Some(cpu), None)?;
    frozen(&ram, cpu, &coloring)?;
    machine.set_running(true)?;
    machine.type_line("")?;
    if machine.wait(&["ORACLE-DONE", "ORACLE-FAILED"])? == 1 {
        return Err("the guest failed to write down what its pages are".into());
    }
    let oracle = Oracle::read(&machine.exchange)?;
    Ok(Judged {
        matrix: Matrix::of(&coloring, ram.regions(), &oracle),
        used_percent: oracle.used_percent(),
        coloring,
        took: [first, second],
        fallback,
        memory_bytes: options.memory_bytes,
    })
}
