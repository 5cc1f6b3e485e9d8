//! Clones, commits and reads of blobs, in this process.

use super::origin::Origin;
use super::{Bench, COMMAND, Dice, drop_caches, footprint};
use crate::Outcome;
use crate::report::{Figure, median};
use base::ByteRange;
use std::io;
use std::path::Path;
use std::sync::Barrier;
use std::time::{Duration, Instant};
use store::blob::{At, Blob};
use store::{BlockSource, Mode, Store};

const BLOCK: u64 = 4096;
const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// Blocks of noise, as a program that writes at random leaves them: they do not compress.
struct Noise(u64);

impl BlockSource for Noise {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        for (number, block) in buf.chunks_mut(BLOCK as usize).enumerate() {
            let mut dice = Dice(self.0 << 40 ^ (offset / BLOCK + number as u64));
            for word in block.chunks_mut(8) {
                let bytes = dice.below(u64::MAX).to_le_bytes();
                word.copy_from_slice(&bytes[..word.len()]);
            }
        }
        Ok(())
    }
}

/// `count` different blocks anywhere in `size` bytes, ascending.
fn scattered(dice: &mut Dice, size: u64, count: usize) -> Vec<ByteRange> {
    let mut blocks = std::collections::BTreeSet::new();
    while blocks.len() < count {
        blocks.insert(dice.below(size / BLOCK));
    }
    blocks.into_iter().map(|block| ByteRange::at(block * BLOCK, BLOCK)).collect()
}

/// What the blocks of `ranges` take compressed, eight by eight, as they lie in frames.
fn compressed(ranges: &[ByteRange], source: &Noise) -> Outcome<u64> {
    let mut bytes = 0;
    for frame in ranges.chunks(8) {
        let mut raw = vec![0; frame.len() * BLOCK as usize];
        for (range, block) in frame.iter().zip(raw.chunks_mut(BLOCK as usize)) {
            source.read(range.start, block)?;
        }
        bytes += zstd::bulk::compress(&raw, 1)?.len() as u64;
    }
    Ok(bytes)
}

/// On the embedded engine: a blob of 100 GiB that took 10 GiB of random 4 KiB writes, its clones and commits.
pub(super) fn local(bench: &Bench<'_>) -> Outcome<Vec<Figure>> {
    let dir = bench.fresh("blobs")?;
    let store = Store::open(&dir, Mode::ReadWrite)?;
    let (size, written, rounds) = bench.either((10 * GIB, 256 * MIB, 3), (100 * GIB, 10 * GIB, 5));
    let blob = store.create_blob("disk", size, BLOCK as u32)?;
    let mut dice = Dice(1);
    let began = Instant::now();
    // A writer's buffer holds some tens of MiB.
    let each = 64 * MIB;
    for step in 0..written / each {
        blob.write_from(&scattered(&mut dice, size, (each / BLOCK) as usize), &Noise(step + 1), 2)?;
    }
    println!("{} MiB of random 4 KiB writes took {:.1} s", written / MIB, began.elapsed().as_secs_f64());

    let (mut commits, mut growths) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let (before, mut changed) = (footprint(&dir)?, 0);
        let count = 20;
        for commit in 0..count {
            let ranges = scattered(&mut dice, size, 64);
            let source = Noise(1000 + 100 * round + commit);
            let began = Instant::now();
            blob.write_from(&ranges, &source, 1)?;
            commits.push(began.elapsed().as_secs_f64() * 1e3);
            changed += compressed(&ranges, &source)?;
        }
        let growth = (footprint(&dir)? - before).saturating_sub(count * 64 * 1024);
        growths.push(growth as f64 / changed as f64);
    }
    let (mut single, mut together, mut metadata) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..rounds {
        let names: Vec<String> = (0..1000).map(|i| format!("clone-{round}-{i}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let before = footprint(&dir)?;
        let began = Instant::now();
        for made in blob.clone_each(At::Latest, &names)? {
            made?;
        }
        together.push(began.elapsed().as_secs_f64());
        metadata.push((footprint(&dir)? - before) as f64);
        let began = Instant::now();
        for i in 0..1000 {
            blob.clone(At::Latest, &format!("one-{round}-{i}"))?;
        }
        single.push(began.elapsed().as_secs_f64());
    }
    let mut all = Vec::new();
    for round in 0..rounds {
        let names: Vec<String> = (0..150).map(|i| format!("clone-{round}-{i}")).collect();
        all.push(commit_at_once(&store, &names, size, round)?);
    }
    Ok(vec![
        Figure::new("clone_1000_s", "s", together, COMMAND)
            .asked("<=", 2.0)
            .against("the same, one call each", median(&single)),
        Figure::new("clone_1000_metadata_bytes", "B", metadata, COMMAND).asked("<=", 5e6),
        Figure::new("commit_64_p50_ms", "ms", commits, COMMAND).asked("<=", 20.0),
        Figure::new("commit_64_growth", "x", growths, COMMAND).asked("<=", 1.2),
        Figure::new("commit_150_s", "s", all, COMMAND).asked("<=", 1.0),
    ])
}

/// Seconds until all of `names` have committed 1 MB each, having started at once.
pub(super) fn commit_at_once(store: &Store, names: &[String], size: u64, round: u64) -> Outcome<f64> {
    let blobs: Vec<Blob<'_>> = names.iter().map(|name| store.blob(name)).collect::<Result<_, _>>()?;
    let ready = Barrier::new(blobs.len() + 1);
    let (began, done) = std::thread::scope(|scope| {
        let threads: Vec<_> = blobs
            .iter()
            .enumerate()
            .map(|(i, blob)| {
                let ready = &ready;
                scope.spawn(move || {
                    let mut dice = Dice(round << 20 | i as u64);
                    let range = ByteRange::at(dice.below((size - 2 * MIB) / BLOCK) * BLOCK, 1_000_000);
                    ready.wait();
                    blob.write_from(&[range], &Noise(50_000 + round * 200 + i as u64), 1).map(drop)
                })
            })
            .collect();
        ready.wait();
        let began = Instant::now();
        let done: Vec<_> = threads.into_iter().map(|t| t.join().expect("writers do not panic")).collect();
        (began.elapsed(), done)
    });
    done.into_iter().collect::<Result<Vec<()>, _>>()?;
    Ok(began.as_secs_f64())
}

/// A random 4 KiB read after 2,000 commits over the same after one.
pub(super) fn history(bench: &Bench<'_>) -> Outcome<Vec<Figure>> {
    let dir = bench.fresh("history")?;
    let commits = bench.either(100, 2000);
    let (young, old) = (dir.join("young"), dir.join("old"));
    let opened = |dir: &Path| Store::open(dir, Mode::ReadWrite);
    grow(&opened(&young)?, 1)?;
    grow(&opened(&old)?, commits)?;
    let mut ratios = Vec::new();
    let mut after_one = Vec::new();
    for round in 0..bench.either(2, 5) {
        let read = |dir: &Path| -> Outcome<f64> {
            drop_caches()?;
            read_random(&Store::open(dir, Mode::ReadOnly)?, round)
        };
        let (one, many) = (read(&young)?, read(&old)?);
        println!("random read: {:.0} us after 1 commit, {:.0} us after {commits}", one * 1e6, many * 1e6);
        ratios.push(many / one);
        after_one.push(one * 1e6);
    }
    Ok(vec![
        Figure::new("history_read_ratio", "x", ratios, COMMAND)
            .asked("<=", 1.1)
            .against("after one commit, us", median(&after_one)),
    ])
}

const HISTORY_SIZE: u64 = 16 * GIB;
const HISTORY_DATA: u64 = 256 * MIB;
/// A daemon tidies up behind so many writes.
const TIDY: u64 = 64;

/// Makes a blob with data in `commits` commits; the first brings most of it.
fn grow(store: &Store, commits: u64) -> Outcome {
    let blob = store.create_blob("disk", HISTORY_SIZE, BLOCK as u32)?;
    let mut dice = Dice(7);
    blob.write_from(&scattered(&mut dice, HISTORY_SIZE, (HISTORY_DATA / BLOCK) as usize), &Noise(1), 2)?;
    for commit in 1..commits {
        blob.write_from(&scattered(&mut dice, HISTORY_SIZE, 16), &Noise(commit + 1), 1)?;
        if commit % TIDY == 0 {
            store.collect()?;
        }
    }
    Ok(())
}

/// Seconds of one random read of a block that has data, the median of some hundred; nothing is cached at first.
fn read_random(store: &Store, round: u64) -> Outcome<f64> {
    let blob = store.blob("disk")?;
    let mut dice = Dice(7);
    let blocks = scattered(&mut dice, HISTORY_SIZE, (HISTORY_DATA / BLOCK) as usize);
    let mut dice = Dice(round + 100);
    let mut buffer = vec![0; BLOCK as usize];
    let mut took = Vec::new();
    for _ in 0..400 {
        let at = blocks[dice.below(blocks.len() as u64) as usize].start;
        let began = Instant::now();
        blob.read(At::Latest, at, &mut buffer)?;
        took.push(began.elapsed().as_secs_f64());
        if buffer.iter().all(|&b| b == 0) {
            return Err(format!("the block at {at} has lost its data").into());
        }
    }
    Ok(median(&took))
}

/// On S3, with 5 ms added to each request.
pub(super) fn s3(bench: &Bench<'_>) -> Outcome<Vec<Figure>> {
    let origin = Origin::start(&bench.fresh("origin")?)?;
    let near = origin.open("commits", Duration::ZERO)?;
    let blob = near.create_blob("disk", 10 * GIB, BLOCK as u32)?;
    let (mut all, rounds) = (Vec::new(), bench.either(1, 5));
    for round in 0..rounds {
        let names: Vec<String> = (0..150).map(|i| format!("clone-{round}-{i}")).collect();
        for made in blob.clone_each(At::Latest, &names.iter().map(String::as_str).collect::<Vec<_>>())? {
            made?;
        }
        all.push(commit_at_once(&near, &names, 10 * GIB, round)?);
    }
    let commits = bench.either(20, 2000);
    grow(&*origin.open("young", Duration::ZERO)?, 1)?;
    grow(&*origin.open("old", Duration::ZERO)?, commits)?;
    let (mut ratios, mut after_one) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let far = Duration::from_millis(5);
        let one = read_random(&*origin.open("young", far)?, round)?;
        let many = read_random(&*origin.open("old", far)?, round)?;
        println!("random read over S3: {:.1} ms after 1 commit, {:.1} ms after {commits}", one * 1e3, many * 1e3);
        ratios.push(many / one);
        after_one.push(one * 1e3);
    }
    Ok(vec![
        Figure::new("commit_150_s3_s", "s", all, COMMAND),
        Figure::new("history_read_ratio_s3", "x", ratios, COMMAND)
            .asked("<=", 1.1)
            .against("after one commit, 5 ms added, ms", median(&after_one)),
    ])
}
