//! How large a chunk of the disk cache should be: requests and bytes for what a boot reads, and the cost of a hit.
//!
//! `cargo run --release -p store --example cache_chunks [directory for the cache]`: files under /usr/lib become one
//! blob of 4 KiB blocks. Of every fifth file a part is read, as a boot does: small files whole, of large ones 16 KiB
//! in every 100 KiB. Seconds are reckoned from the counters for one reader that waits for each request: 5 ms for the
//! answer to begin, 1 Gbit/s from then on. Hits are measured: the same reads again from an empty memory.

use base::ByteRange;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use store::engine::cached::{CacheOptions, Cached};
use store::engine::{Engine, Memory};
use store::{BlockSource, Changes, Expect, Manifest, Mode, Store};

const BLOCK: usize = 4096;
const CONTENT_MAX: usize = 192 << 20;
const LATENCY_S: f64 = 0.005;
const BYTES_PER_S: f64 = 125e6;

struct Content(Vec<u8>);

impl BlockSource for Content {
    fn read(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        buf.copy_from_slice(&self.0[offset as usize..][..buf.len()]);
        Ok(())
    }
}

/// The files end to end, each filled up to whole blocks, and where each lies.
fn content() -> (Content, Vec<ByteRange>) {
    let entries = std::fs::read_dir("/usr/lib/x86_64-linux-gnu").expect("a Debian system");
    let mut paths: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(|p| p.is_file()).collect();
    paths.sort();
    let (mut out, mut files) = (Vec::new(), Vec::new());
    for path in paths {
        let bytes = std::fs::read(&path).unwrap_or_default();
        if out.len() + bytes.len() > CONTENT_MAX {
            continue;
        }
        let start = out.len();
        out.extend(bytes);
        out.resize(out.len().next_multiple_of(BLOCK), 0);
        files.push(ByteRange::new(start as u64, out.len() as u64));
    }
    (Content(out), files)
}

fn reads(files: &[ByteRange]) -> Vec<ByteRange> {
    let mut out = Vec::new();
    for file in files.iter().step_by(5) {
        let (step, len) = if file.len() < 256 << 10 { (64 << 10, 64 << 10) } else { (100 << 10, 16 << 10) };
        let mut at = file.start;
        while at < file.end {
            out.push(ByteRange::new(at, (at + len).min(file.end)));
            at += step;
        }
    }
    out
}

fn main() {
    let (content, files) = content();
    let reads = reads(&files);
    let memory = Memory::default();
    let store = Store::open_engine(Arc::new(memory.clone()), Mode::ReadWrite).expect("a new store");
    let base = store.empty(content.0.len() as u64, BLOCK as u32);
    let all = [ByteRange::new(0, base.size)];
    let tx = store.begin();
    let changes = Changes { written: &all, zeroed: &[], source: &content, threads: 1, progress: None, cancel: None };
    let (version, stat) = tx.commit(&base, &changes).expect("a commit");
    let versions = BTreeMap::from([("disk".to_owned(), version)]);
    tx.publish("image", Expect::Absent, &Manifest { versions, meta: String::new() }).expect("a publication");
    println!(
        "{} MiB in {} files, {} MiB stored; {} reads of {} MiB in all",
        content.0.len() >> 20,
        files.len(),
        stat.stored_bytes >> 20,
        reads.len(),
        reads.iter().map(ByteRange::len).sum::<u64>() >> 20
    );
    println!(
        "chunk KiB  requests  MiB fetched  reckoned s  hit p50 us  p99 us  (per read, frames decompressed and checked)"
    );
    let place = std::env::args().nth(1).map_or_else(std::env::temp_dir, PathBuf::from);
    for chunk in [64u32, 128, 256, 512, 1024] {
        let dir = tempfile::tempdir_in(&place).expect("a directory for the cache");
        let options = CacheOptions { chunk_bytes: Some(chunk << 10), prefetchers: 0, ..CacheOptions::new(1 << 30) };
        let cached = Arc::new(Cached::open(Arc::new(memory.clone()), dir.path(), &options).expect("a cache"));
        let run = || -> Vec<f64> {
            // A store of its own each time: its memory holds nothing.
            let engine = Arc::clone(&cached) as Arc<dyn Engine>;
            let store = Store::open_engine(engine, Mode::ReadOnly).expect("the store");
            let one = |range: &ByteRange| {
                let mut buf = vec![0; range.len() as usize];
                let start = Instant::now();
                store.read_at(&version, range.start, &mut buf).expect("a read");
                start.elapsed().as_secs_f64() * 1e6
            };
            reads.iter().map(one).collect()
        };
        run();
        let stats = cached.stats();
        let mut times = run();
        times.sort_unstable_by(f64::total_cmp);
        let seconds = stats.fetches as f64 * LATENCY_S + stats.fetched_bytes as f64 / BYTES_PER_S;
        println!(
            "{chunk:9}  {:8}  {:11.1}  {seconds:10.2}  {:10.0}  {:6.0}  {}",
            stats.fetches,
            stats.fetched_bytes as f64 / f64::from(1 << 20),
            times[times.len() / 2],
            times[times.len() * 99 / 100],
            if stats.direct { "O_DIRECT" } else { "buffered" }
        );
    }
}
