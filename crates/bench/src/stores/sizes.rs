//! Which blocks, frames and packs a store should have: `offshoot-bench store sizes`.
//!
//! Real content, the disk of the default guest and its RAM after a boot, is cut into blocks, deduplicated, framed and
//! compressed as the store does it, for each size that could be chosen. For each: what it takes with its metadata, what
//! a random read of 4 KiB costs from a cold disk and from S3 with 5 ms added, and how fast all of it is read in order.
//! Packs of several sizes are uploaded to S3, and a store of them opened and read.
//!
//! The tables go to `target/bench/store-sizes.md`; `docs/store-sizes.md` has those of one run and what was chosen.

use super::images::Home;
use super::origin::Origin;
use super::{Bench, COMMAND, Dice, drop_caches};
use crate::Outcome;
use crate::report::{Figure, median};
use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};
use store::engine::{Engine as _, S3};
use store::{Mode, Store, Version};

const KIB: usize = 1 << 10;
const MIB: u64 = 1 << 20;
/// The least that a guest reads.
const PAGE: usize = 4 << 10;
/// Bytes of an index and of nodes for each block: a name in either, and a fifteenth more for the nodes above.
const NAMES: f64 = 24.0 + 24.0 * 16.0 / 15.0;
/// Bytes of an index for each frame.
const FRAME_RECORD: u64 = 24;
/// Content of one kind at most.
const CONTENT_MAX: u64 = 384 * MIB;
/// Of each way of framing, what is put on S3.
const REMOTE_MAX: u64 = 24 * MIB;
const BLOCKS: [usize; 3] = [4 * KIB, 16 * KIB, 64 * KIB];
const FRAMES: [usize; 7] = [4 * KIB, 16 * KIB, 32 * KIB, 64 * KIB, 128 * KIB, 256 * KIB, 1024 * KIB];
const PACKS: [u64; 4] = [4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB];

/// Content of one kind: blocks of 64 KiB, as they lie, that are not zero.
struct Content {
    name: &'static str,
    bytes: Vec<u8>,
    /// Of these, in pages that are not zero.
    data: u64,
}

/// Content framed in one way, in a file.
struct Framed {
    file: File,
    block: usize,
    /// Offset, bytes stored, bytes when decompressed.
    frames: Vec<(u64, usize, usize)>,
    /// Bytes with metadata.
    stored: f64,
    /// Blocks that are not zero, and those of them that were met before.
    blocks: u64,
    duplicates: u64,
    /// MB of content a second that one thread frames.
    speed: f64,
}

pub(super) fn run(bench: &Bench<'_>) -> Outcome<Vec<Figure>> {
    let dir = bench.fresh("sizes")?;
    let contents = contents(bench, &dir)?;
    let origin = Origin::start(&bench.fresh("origin")?)?;
    let mut tables = String::new();
    let mut figures = Vec::new();
    for content in &contents {
        let mib = content.data / MIB;
        writeln!(tables, "### {}: {mib} MiB of pages that are not zero\n", content.name)?;
        writeln!(
            tables,
            "| block | frame | stored / data | blocks met before | framed, MB/s | random 4 KiB, p50: cold disk, us | S3 + 5 ms, ms | in order, cold disk, MB/s |"
        )?;
        writeln!(tables, "|---|---|---|---|---|---|---|---|")?;
        for block in BLOCKS {
            for frame in FRAMES.into_iter().filter(|frame| *frame >= block) {
                let framed = Framed::make(content, block, frame, &dir.join("frames"))?;
                let ratio = framed.stored / content.data as f64;
                let disk = framed.random_on_disk(bench.either(50, 400))?;
                let far = framed.random_on_s3(&origin, bench.either(5, 60))?;
                let (again, order) = (framed.duplicates as f64 / framed.blocks as f64, framed.in_order()?);
                let row = format!(
                    "| {} KiB | {} KiB | {ratio:.3} | {:.1}% | {:.0} | {disk:.0} | {far:.2} | {order:.0} |",
                    block / KIB,
                    frame / KIB,
                    again * 100.0,
                    framed.speed
                );
                println!("{} {row}", content.name);
                writeln!(tables, "{row}")?;
                let name = format!("sizes_{}_{}k_{}k_stored", content.name, block / KIB, frame / KIB);
                figures.push(Figure::new(&name, "x", vec![ratio], COMMAND));
            }
        }
        writeln!(tables)?;
    }
    packs(bench, &origin, &contents, &mut tables)?;
    let to = crate::build_directory().join("bench/store-sizes.md");
    std::fs::create_dir_all(to.parent().expect("in a directory"))?;
    std::fs::write(&to, tables)?;
    println!("tables written to {}", to.display());
    Ok(figures)
}

/// The disk of the default guest, and its RAM once it answers.
fn contents(bench: &Bench<'_>, dir: &Path) -> Outcome<Vec<Content>> {
    let home = Home::open(bench.program, &dir.join("home"))?;
    home.0.image(&mut |step| println!("  {step}"))?;
    let guest = home.0.boot("sizes", 512 * MIB)?;
    guest.await_response(None, Duration::from_secs(240))?;
    home.0.command(&["snapshot", "sizes", "--tag", "now"])?;
    home.0.settle("sizes", Duration::from_secs(120))?;
    home.0.remove("sizes")?;
    let store = Store::open(&dir.join("home/store"), Mode::ReadOnly)?;
    let largest = |head: &str, of: &dyn Fn(&str) -> bool| -> Outcome<Version> {
        let (manifest, _) = store.head(head)?.ok_or_else(|| format!("there is no head `{head}`"))?;
        let versions = manifest.versions.into_iter().filter(|(name, _)| of(name)).map(|(_, version)| version);
        Ok(versions.max_by_key(|version| version.size).ok_or_else(|| format!("nothing in `{head}`"))?)
    };
    let disk = largest("image/debian", &|_| true)?;
    let ram = largest("snap/sizes@now", &|name| name.starts_with("ram"))?;
    Ok(vec![Content::read(&store, "disk", &disk)?, Content::read(&store, "ram", &ram)?])
}

impl Content {
    fn read(store: &Store, name: &'static str, version: &Version) -> Outcome<Self> {
        let unit = BLOCKS[2] as u64;
        let (mut bytes, mut data) = (Vec::new(), 0);
        let mut chunk = vec![0; BLOCKS[2]];
        for at in (0..version.size / unit * unit).step_by(BLOCKS[2]) {
            store.read_at(version, at, &mut chunk)?;
            let pages = chunk.chunks(PAGE).filter(|page| page.iter().any(|byte| *byte != 0)).count() as u64;
            if pages > 0 && data < CONTENT_MAX {
                data += pages * PAGE as u64;
                bytes.extend_from_slice(&chunk);
            }
        }
        Ok(Self { name, bytes, data })
    }
}

impl Framed {
    fn make(content: &Content, block: usize, frame: usize, at: &Path) -> Outcome<Self> {
        let mut out = BufWriter::new(File::create(at)?);
        let mut compressor = zstd::bulk::Compressor::new(1)?;
        let (mut frames, mut offset) = (Vec::new(), 0);
        let (mut blocks, mut duplicates) = (0, 0);
        let mut met = HashSet::new();
        let mut open: Vec<u8> = Vec::with_capacity(frame);
        let began = Instant::now();
        let mut close = |open: &mut Vec<u8>| -> Outcome {
            let small = compressor.compress(open)?;
            // As the store does: raw where less than an eighth is saved.
            let stored = if small.len() <= open.len() - open.len() / 8 { &small } else { &*open };
            out.write_all(stored)?;
            frames.push((offset, stored.len(), open.len()));
            offset += stored.len() as u64;
            open.clear();
            Ok(())
        };
        for bytes in content.bytes.chunks(block).filter(|bytes| bytes.iter().any(|byte| *byte != 0)) {
            blocks += 1;
            if met.insert(blake3::keyed_hash(&[1; 32], bytes)) {
                open.extend_from_slice(bytes);
                if open.len() == frame {
                    close(&mut open)?;
                }
            } else {
                duplicates += 1;
            }
        }
        if !open.is_empty() {
            close(&mut open)?;
        }
        drop(out.into_inner().map_err(|error| error.into_error())?);
        let speed = content.data as f64 / began.elapsed().as_secs_f64() / 1e6;
        let metadata = met.len() as f64 * NAMES + (frames.len() as u64 * FRAME_RECORD) as f64;
        let stored = offset as f64 + metadata;
        Ok(Self { file: File::open(at)?, block, frames, stored, blocks, duplicates, speed })
    }

    /// What becomes of a frame that was read: decompressed, and one of its blocks checked.
    fn open(&self, stored: &[u8], raw: usize) -> Outcome {
        let whole;
        let bytes = if stored.len() == raw {
            stored
        } else {
            whole = zstd::bulk::decompress(stored, raw)?;
            &whole
        };
        std::hint::black_box(blake3::keyed_hash(&[1; 32], &bytes[..self.block.min(raw)]));
        Ok(())
    }

    /// Microseconds.
    fn random_on_disk(&self, reads: u64) -> Outcome<f64> {
        drop_caches()?;
        let mut dice = Dice(5);
        let mut took = Vec::new();
        for _ in 0..reads {
            let (offset, stored, raw) = self.frames[dice.below(self.frames.len() as u64) as usize];
            let began = Instant::now();
            let mut bytes = vec![0; stored];
            self.file.read_exact_at(&mut bytes, offset)?;
            self.open(&bytes, raw)?;
            took.push(began.elapsed().as_secs_f64() * 1e6);
        }
        Ok(median(&took))
    }

    /// Milliseconds.
    fn random_on_s3(&self, origin: &Origin, reads: u64) -> Outcome<f64> {
        let near = origin.engine("sizes", Duration::ZERO)?;
        let frames: Vec<_> =
            self.frames.iter().take_while(|(at, stored, _)| at + *stored as u64 <= REMOTE_MAX).collect();
        let (last, stored, _) = frames.last().ok_or("no frame is small enough")?;
        let mut content = vec![0; *last as usize + stored];
        self.file.read_exact_at(&mut content, 0)?;
        upload(&near, "packs/00000001-0000000000000001.pack", &content)?;
        let far = origin.engine("sizes", Duration::from_millis(5))?.open("packs/00000001-0000000000000001.pack")?;
        let mut dice = Dice(6);
        let mut took = Vec::new();
        for _ in 0..reads {
            let (offset, stored, raw) = *frames[dice.below(frames.len() as u64) as usize];
            let began = Instant::now();
            let mut bytes = vec![0; stored];
            far.read_at(offset, &mut bytes)?;
            self.open(&bytes, raw)?;
            took.push(began.elapsed().as_secs_f64() * 1e3);
        }
        Ok(median(&took))
    }

    /// MB of content a second, by one thread.
    fn in_order(&self) -> Outcome<f64> {
        drop_caches()?;
        let began = Instant::now();
        let mut content = 0;
        for (offset, stored, raw) in &self.frames {
            let mut bytes = vec![0; *stored];
            self.file.read_exact_at(&mut bytes, *offset)?;
            self.open(&bytes, *raw)?;
            content += raw;
        }
        Ok(content as f64 / began.elapsed().as_secs_f64() / 1e6)
    }
}

fn upload(engine: &S3, name: &str, content: &[u8]) -> Outcome {
    let mut upload = engine.upload(name)?;
    for part in content.chunks(1 << 20) {
        upload.append(part)?;
    }
    Ok(upload.finish()?)
}

/// Packs of several sizes on S3 with 5 ms added: written by four threads, listed with their indexes read as at an
/// opening, and read in order in ranges of 1 MiB, eight at a time.
fn packs(bench: &Bench<'_>, origin: &Origin, contents: &[Content], tables: &mut String) -> Outcome {
    let total = bench.either(32 * MIB, 256 * MIB);
    let content: Vec<u8> = contents.iter().flat_map(|c| &c.bytes).copied().cycle().take(total as usize).collect();
    writeln!(tables, "### Packs on S3 + 5 ms: {} MiB, stored as they are\n", total / MIB)?;
    writeln!(tables, "| pack | objects | written by 4, MB/s | opened, ms | read by 8, MB/s |")?;
    writeln!(tables, "|---|---|---|---|---|")?;
    for pack in PACKS.into_iter().filter(|pack| *pack <= total) {
        let engine = origin.engine(&format!("packs-{pack}"), Duration::from_millis(5))?;
        let parts: Vec<(usize, &[u8])> = content.chunks(pack as usize).enumerate().collect();
        let name = |number: usize| format!("packs/{number:08x}-0000000000000001");
        let began = Instant::now();
        at_once(4, &parts, &|(number, bytes)| {
            upload(&engine, &format!("{}.pack", name(*number)), bytes)?;
            let index = vec![7; bytes.len() / (4 * KIB) * 28];
            Ok(engine.put(&format!("{}.idx", name(*number)), &index)?)
        })?;
        let written = total as f64 / began.elapsed().as_secs_f64() / 1e6;
        let began = Instant::now();
        let objects = engine.list("packs")?.len();
        at_once(16, &parts, &|(number, _)| {
            engine.get(&format!("{}.idx", name(*number)))?.ok_or("an index went")?;
            Ok(())
        })?;
        let opened = began.elapsed().as_secs_f64() * 1e3;
        let ranges: Vec<(usize, u64)> =
            parts.iter().flat_map(|(n, b)| (0..b.len() as u64 / MIB).map(|mib| (*n, mib * MIB))).collect();
        let began = Instant::now();
        at_once(8, &ranges, &|(number, at)| {
            let mut bytes = vec![0; MIB as usize];
            Ok(engine.open(&format!("{}.pack", name(*number)))?.read_at(*at, &mut bytes)?)
        })?;
        let read = total as f64 / began.elapsed().as_secs_f64() / 1e6;
        let row = format!("| {} MiB | {objects} | {written:.0} | {opened:.0} | {read:.0} |", pack / MIB);
        println!("packs {row}");
        writeln!(tables, "{row}")?;
    }
    Ok(())
}

/// Does `work` for each of `tasks`, by so many threads.
fn at_once<T: Sync>(threads: usize, tasks: &[T], work: &(dyn Fn(&T) -> Outcome + Sync)) -> Outcome {
    let next = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let worker = || loop {
            let at = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let Some(task) = tasks.get(at) else { return Ok(()) };
            work(task)?;
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("workers do not panic"))
    })
}
