//! Bonnie++ in an ext4 on a mirrored disk, and in one on a plain file. Both files carry their file system through a
//! loop device that passes O_DIRECT on, so neither the machine's page cache nor the way there differs.

use super::disks::{self, Running};
use super::{Bench, drop_caches, unmount_below};
use crate::Outcome;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const DISK: u64 = 102;
/// Fields of a line of results from the tenth on, each followed by its processor time.
const RATES: [&str; 6] = ["putc", "put_block", "rewrite", "getc", "get_block", "seeks"];
const OPERATIONS: [&str; 6] = ["seq_create", "seq_stat", "seq_del", "ran_create", "ran_stat", "ran_del"];

/// What one run found: KiB/s, and operations a second. What was too fast to measure is not in it.
pub(super) type Result = BTreeMap<&'static str, f64>;

/// All runs.
#[derive(Serialize)]
pub(super) struct Results {
    pub(super) mirrored: Vec<Result>,
    pub(super) plain: Vec<Result>,
}

/// A file system on a file; gone when dropped.
struct Mounted {
    point: PathBuf,
    device: String,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.point).status();
        let _ = Command::new("losetup").args(["--detach", &self.device]).status();
    }
}

fn tool(command: &mut Command) -> Outcome<String> {
    let out = command.stdin(Stdio::null()).output();
    let out = out.map_err(|e| format!("{:?} (`make setup`): {e}", command.get_program()))?;
    if !out.status.success() {
        return Err(format!("{command:?}: {}", String::from_utf8_lossy(&out.stderr).trim()).into());
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Lets go of the loop devices that a run which was killed left over files of `dir`.
fn detach_below(dir: &Path) -> Outcome {
    unmount_below(dir);
    let dir = std::path::absolute(dir)?;
    let listed = tool(Command::new("losetup").args(["--list", "--noheadings", "--raw", "--output", "NAME,BACK-FILE"]))?;
    for (device, file) in listed.lines().filter_map(|line| line.split_once(' ')) {
        if Path::new(file).starts_with(&dir) {
            tool(Command::new("losetup").args(["--detach", device]))?;
        }
    }
    Ok(())
}

fn mount(file: &Path, point: PathBuf) -> Outcome<Mounted> {
    std::fs::create_dir_all(&point)?;
    let device = tool(Command::new("losetup").args(["--find", "--show", "--direct-io=on"]).arg(file))?;
    let mounted = Mounted { point, device: device.trim().to_owned() };
    tool(Command::new("mkfs.ext4").args(["-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", &mounted.device]))?;
    tool(Command::new("mount").args(["-t", "ext4", &mounted.device]).arg(&mounted.point))?;
    Ok(mounted)
}

fn bonnie(bench: &Bench<'_>, at: &Mounted) -> Outcome<Result> {
    drop_caches()?;
    let (size, files) = bench.either(("256", "1"), ("2048", "16"));
    // -D: O_DIRECT; -f: no tests of single characters; -q: nothing but the line of results on the standard output.
    let said = tool(
        Command::new("bonnie++")
            .args(["-q", "-f", "-D", "-u", "root", "-m", "bench", "-r", "128", "-s", size, "-n", files, "-d"])
            .arg(&at.point),
    )?;
    parse(&said)
}

/// Reads the line of results.
fn parse(said: &str) -> Outcome<Result> {
    let line = said.lines().rev().find(|line| line.starts_with("1.") || line.starts_with("2."));
    let line = line.ok_or_else(|| format!("bonnie++ printed no results but `{}`", said.trim()))?;
    let fields: Vec<&str> = line.split(',').collect();
    // Two versions, name, concurrency, seed, sizes, seekers; rates; files, most, least, directories, size; operations.
    let first = 9;
    let rates = RATES.iter().enumerate().map(|(i, name)| (*name, first + 2 * i));
    let operations = OPERATIONS.iter().enumerate().map(|(i, name)| (*name, first + 12 + 5 + 2 * i));
    let found: Result =
        rates.chain(operations).filter_map(|(name, at)| Some((name, fields.get(at)?.parse().ok()?))).collect();
    if found.contains_key("put_block") {
        Ok(found)
    } else {
        Err(format!("bonnie++'s results are odd: `{line}`").into())
    }
}

/// Runs both, by turns.
pub(super) fn run(bench: &Bench<'_>) -> Outcome<Results> {
    detach_below(&bench.dir.join("bonnie"))?;
    let dir = bench.fresh("bonnie")?;
    let size: u64 = bench.either(1 << 30, 8 << 30);
    let (running, mut client): (Running, _) = disks::mirror(bench, &dir.join("home"))?;
    disks::overlay(&mut client, DISK, size)?;
    let plain = dir.join("plain");
    File::create(&plain)?.set_len(size)?;
    let mirrored = mount(&dir.join(format!("home/mnt/disk/{DISK:016x}")), dir.join("mirrored"))?;
    let beside = mount(&plain, dir.join("beside"))?;
    let mut results = Results { mirrored: Vec::new(), plain: Vec::new() };
    for round in 0..bench.either(1, 3) {
        println!("round {}", round + 1);
        // Whoever comes second has the warmer machine: take turns.
        if round % 2 == 0 {
            results.mirrored.push(bonnie(bench, &mirrored)?);
            results.plain.push(bonnie(bench, &beside)?);
        } else {
            results.plain.push(bonnie(bench, &beside)?);
            results.mirrored.push(bonnie(bench, &mirrored)?);
        }
    }
    // The file system leaves its disk before the mirror does.
    drop((mirrored, beside));
    drop(running);
    Ok(results)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "1.98,2.00a,bench,1,1795290831,2048M,,8192,5,,,107830,13,203410,25,,,+++++,+++,15387,62,16,,,,,\
        9000,50,+++++,+++,12000,60,9100,51,+++++,+++,11000,59,,17915us,20059us,,16053us,103ms\n";

    #[test]
    fn a_line_of_results_is_understood_and_what_was_too_fast_is_left_out() {
        let expected: [(&str, f64); 7] = [
            ("put_block", 107_830.0),
            ("rewrite", 203_410.0),
            ("seeks", 15_387.0),
            ("seq_create", 9000.0),
            ("seq_del", 12_000.0),
            ("ran_create", 9100.0),
            ("ran_del", 11_000.0),
        ];
        assert_eq!(parse(LINE).unwrap(), expected.into_iter().collect());
    }

    #[test]
    fn other_words_are_no_results() {
        assert!(parse("Can't open file ./Bonnie.1234").is_err());
        assert!(parse("1.98,2.00a,bench").is_err());
    }
}
