//! Bringing disks in: how fast, and what a second one of the same kind costs.

use super::{Bench, COMMAND, Dice, footprint};
use crate::Outcome;
use crate::host::Host;
use crate::report::{Figure, median};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// A home whose daemon ends with it.
pub(super) struct Home(pub(super) Host);

impl Home {
    /// Starts the daemon of a home.
    pub(super) fn open(program: &Path, dir: &Path) -> Outcome<Self> {
        std::fs::create_dir_all(dir)?;
        Host::open(program, dir).map(Self)
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if let Err(error) = self.0.command(&["shutdown", "--stop"]) {
            eprintln!("{error}");
        }
    }
}

/// Runs a program to its end.
fn tool(command: &mut Command) -> Outcome<String> {
    let out = command.output().map_err(|e| format!("{:?}: {e}", command.get_program()))?;
    if !out.status.success() {
        return Err(format!("{command:?}: {}", String::from_utf8_lossy(&out.stderr).trim()).into());
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

pub(super) fn run(bench: &Bench<'_>) -> Outcome<Vec<Figure>> {
    let dir = bench.fresh("images")?;
    let host = Home::open(bench.program, &dir.join("home"))?;
    let store = dir.join("home/store");
    let import = |path: &Path, name: &str| -> Outcome<f64> {
        let began = Instant::now();
        let (path, kernel) = (path.to_string_lossy(), dir.join("vmlinuz"));
        let kernel = kernel.to_string_lossy();
        host.0.command(&["image", "import", &path, "--name", name, "--kernel", &kernel, "--cmdline", "quiet"])?;
        Ok(began.elapsed().as_secs_f64())
    };
    let mut figures = Vec::new();

    // A real disk: the default guest, imported again, and imported with one package upgraded.
    host.0.command(&["image", "build"])?;
    let disk = dir.join("debian.raw");
    host.0.command(&["export", "debian", &disk.to_string_lossy()])?;
    // Any file that begins as a kernel does serves: what is measured is the disk.
    extract(&disk, "/vmlinuz", &dir.join("vmlinuz"))?;
    import(&disk, "first")?;
    let before = footprint(&store)?;
    import(&disk, "second")?;
    let used = allocated(&disk)?;
    let again = (footprint(&store)?.saturating_sub(before)) as f64 / used as f64;
    figures.push(Figure::new("reimport_growth", "x", vec![again], COMMAND).asked("<=", 0.001));

    let upgraded = dir.join("upgraded.raw");
    tool(Command::new("cp").args(["--sparse=always"]).arg(&disk).arg(&upgraded))?;
    upgrade(&upgraded, "redis-tools", &dir)?;
    let changed = changed_blocks(&disk, &upgraded)?;
    let before = footprint(&store)?;
    import(&upgraded, "upgraded")?;
    let growth = footprint(&store)?.saturating_sub(before) as f64 / (changed * 4096) as f64;
    println!("one package upgraded: {changed} blocks of 4 KiB differ");
    figures.push(
        Figure::new("upgrade_growth", "x", vec![growth], COMMAND)
            .asked("<=", 1.5)
            .against("blocks of 4 KiB that differ, bytes", (changed * 4096) as f64),
    );

    // A large disk, half of it empty.
    let large = dir.join("large.raw");
    let size: u64 = bench.either(512 << 20, 8 << 30);
    half_empty(&disk, &large, size)?;
    let threads = std::thread::available_parallelism()?.get().to_string();
    let (mut ratios, mut peer) = (Vec::new(), Vec::new());
    for round in 0..bench.either(1, 3) {
        // Each import into a store of its own: what is measured is not deduplication.
        let home = dir.join(format!("home-{round}"));
        let one = Home::open(bench.program, &home)?;
        let kernel = dir.join("vmlinuz");
        let (path, kernel) = (large.to_string_lossy(), kernel.to_string_lossy());
        let began = Instant::now();
        one.0.command(&["image", "import", &path, "--name", "large", "--kernel", &kernel, "--cmdline", "quiet"])?;
        let ours = began.elapsed().as_secs_f64();
        drop(one);
        let _ = std::fs::remove_dir_all(&home);
        let packed = dir.join("large.qcow2");
        let _ = std::fs::remove_file(&packed);
        let began = Instant::now();
        // -W lets it write out of order, its fastest way; the result is made durable, as ours is.
        tool(
            Command::new("qemu-img")
                .args([
                    "convert",
                    "-c",
                    "-W",
                    "-m",
                    &threads,
                    "-f",
                    "raw",
                    "-O",
                    "qcow2",
                    "-o",
                    "compression_type=zstd",
                ])
                .arg(&large)
                .arg(&packed),
        )?;
        File::open(&packed)?.sync_all()?;
        let theirs = began.elapsed().as_secs_f64();
        println!("import: ours {ours:.1} s, qemu-img {theirs:.1} s");
        ratios.push(theirs / ours);
        peer.push(theirs);
    }
    figures.push(
        Figure::new("import_over_qemu_img", "x", ratios, COMMAND)
            .asked(">=", 1.0)
            .against("qemu-img convert -c, zstd, s", median(&peer)),
    );
    Ok(figures)
}

/// Bytes that a sparse file takes.
fn allocated(path: &Path) -> Outcome<u64> {
    footprint(path)
}

/// Copies a file out of an ext4 disk.
pub(super) fn extract(disk: &Path, inside: &str, to: &Path) -> Outcome {
    // It may be a link: the name of what it leads to is in what `stat` prints.
    let script = format!("dump {inside} {}", to.display());
    let found = tool(Command::new("debugfs").args(["-R", &format!("stat {inside}")]).arg(disk))?;
    if let Some(link) = found.lines().find_map(|line| line.trim().strip_prefix("Fast link dest: ")) {
        return extract(disk, &format!("/{}", link.trim().trim_matches('"').trim_start_matches('/')), to);
    }
    tool(Command::new("debugfs").args(["-R", &script]).arg(disk))?;
    if to.metadata().map_or(0, |m| m.len()) == 0 {
        return Err(format!("{inside} is not in {}", disk.display()).into());
    }
    Ok(())
}

/// Replaces every regular file of a Debian package in an ext4 disk by a newer one, as `dpkg` does: the new file is
/// written beside, and the old one goes. New contents are the old with a few bytes changed, as of another build.
fn upgrade(disk: &Path, package: &str, dir: &Path) -> Outcome {
    let list = dir.join("package.list");
    extract(disk, &format!("/var/lib/dpkg/info/{package}.list"), &list)?;
    let mut script = String::new();
    let mut files = 0;
    for (number, path) in std::fs::read_to_string(&list)?.lines().enumerate() {
        let found = tool(Command::new("debugfs").args(["-R", &format!("stat {path}")]).arg(disk))?;
        if !found.contains("Type: regular") {
            continue;
        }
        let new = dir.join(format!("file-{number}"));
        tool(Command::new("debugfs").args(["-R", &format!("dump {path} {}", new.display())]).arg(disk))?;
        let mut bytes = std::fs::read(&new)?;
        if bytes.is_empty() {
            continue;
        }
        let mut dice = Dice(number as u64);
        for _ in 0..bytes.len().div_ceil(4096) {
            let at = dice.below(bytes.len() as u64) as usize;
            bytes[at] = bytes[at].wrapping_add(1);
        }
        std::fs::write(&new, bytes)?;
        script.push_str(&format!("write {} {path}.dpkg-new\nrm {path}\n", new.display()));
        script.push_str(&format!("ln {path}.dpkg-new {path}\nunlink {path}.dpkg-new\n"));
        files += 1;
    }
    if files == 0 {
        return Err(format!("package {package} has no files in {}", disk.display()).into());
    }
    let file = dir.join("script");
    std::fs::write(&file, script)?;
    tool(Command::new("debugfs").arg("-w").arg("-f").arg(&file).arg(disk)).map(drop)
}

/// How many blocks of 4 KiB differ between two disks of one size.
fn changed_blocks(a: &Path, b: &Path) -> Outcome<u64> {
    let (a, b) = (File::open(a)?, File::open(b)?);
    let size = a.metadata()?.len();
    let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let (mut at, mut changed) = (0, 0);
    while at < size {
        let n = (size - at).min(1 << 20) as usize;
        a.read_exact_at(&mut left[..n], at)?;
        b.read_exact_at(&mut right[..n], at)?;
        changed += left[..n].chunks(4096).zip(right[..n].chunks(4096)).filter(|(l, r)| l != r).count() as u64;
        at += n as u64;
    }
    Ok(changed)
}

/// A disk of which the first half holds what disks hold, over and over but never twice the same, and the second
/// half nothing.
fn half_empty(sample: &Path, to: &Path, size: u64) -> Outcome {
    let (sample, out) = (File::open(sample)?, File::create(to)?);
    out.set_len(size)?;
    let sample_size = sample.metadata()?.len();
    // Past what tells a file system: it would be found to be of another size.
    const SKIP: u64 = 8 << 20;
    let (mut from, mut at, mut pass) = (SKIP, 0, 0_u64);
    let mut block = vec![0; 4096];
    while at < size / 2 {
        sample.read_exact_at(&mut block, from)?;
        from += 4096;
        if from + 4096 > sample_size {
            (from, pass) = (SKIP, pass + 1);
        }
        if block.iter().all(|&b| b == 0) {
            continue;
        }
        // Another pass is another disk: no block of it was seen before.
        block[..8].iter_mut().zip(pass.to_le_bytes()).for_each(|(b, p)| *b ^= p);
        out.write_all_at(&block, at)?;
        at += 4096;
    }
    out.sync_all()?;
    Ok(())
}
