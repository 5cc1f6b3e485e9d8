//! How fast a commit goes on one thread, for content as it is found in the RAM of a running guest.
//!
//! `cargo run --release -p store --example commit_speed [directory] [MiB] [threads]`
//!
//! The content is a fixed mixture by blocks of 4 KiB: a third zero, the rest from the files of this machine's
//! /usr (program text and data, page cache) with one block in eight of noise (keys, compressed data).

use base::ByteRange;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::time::Instant;
use store::{BlockSource, Changes, Expect, Manifest, Mode, Store};

struct Content(Vec<u8>);

impl BlockSource for Content {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.copy_from_slice(&self.0[offset as usize..][..buf.len()]);
        Ok(())
    }
}

fn gather(dir: &Path, out: &mut Vec<u8>, limit: usize) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        if out.len() >= limit {
            return;
        }
        let Ok(meta) = path.symlink_metadata() else { continue };
        if meta.is_dir() {
            gather(&path, out, limit);
        } else if meta.is_file() && meta.len() > 16384 {
            let mut bytes = Vec::new();
            if std::fs::File::open(&path).and_then(|file| file.take(2 << 20).read_to_end(&mut bytes)).is_ok() {
                bytes.truncate(bytes.len() & !4095);
                out.extend_from_slice(&bytes);
            }
        }
    }
}

fn mixture(bytes: usize) -> Vec<u8> {
    let mut files = Vec::new();
    gather(Path::new("/usr/lib"), &mut files, bytes);
    let mut files = files.chunks_exact(4096).cycle();
    let mut seed = 1u64;
    let mut out = Vec::with_capacity(bytes);
    while out.len() < bytes {
        match (out.len() / 4096 / 8 % 3, out.len() / 4096 % 8) {
            (0, _) => out.resize(out.len() + 4096, 0),
            (_, 7) => out.extend((0..512).flat_map(|_| {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (seed ^ seed >> 29).to_le_bytes()
            })),
            _ => out.extend_from_slice(files.next().expect("/usr/lib has files")),
        }
    }
    out
}

/// Seconds of processor time that this process used: what counts where other work shares the machine.
fn cpu() -> f64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    now.tv_sec as f64 + now.tv_nsec as f64 / 1e9
}

fn rate(bytes: u64, since: Instant) -> f64 {
    bytes as f64 / since.elapsed().as_secs_f64() / 1e6
}

fn main() {
    let mut args = std::env::args().skip(1);
    let dir = args.next().map_or_else(|| std::env::temp_dir().join("commit-speed"), PathBuf::from);
    let mib: usize = args.next().map_or(512, |text| text.parse().expect("a number of MiB"));
    let threads: usize = args.next().map_or(1, |text| text.parse().expect("a number of threads"));
    let content = Content(mixture(mib << 20));
    let size = content.0.len() as u64;
    let _ = std::fs::remove_dir_all(&dir);
    let store = Store::open(&dir, Mode::ReadWrite).expect("the store opens");

    let written = [ByteRange::new(0, size)];
    let changes = Changes { written: &written, zeroed: &[], source: &content, threads, progress: None, cancel: None };
    let commit = |base: &store::Version, what: &str| {
        let tx = store.begin();
        let (start, cpu_start) = (Instant::now(), cpu());
        let (version, stat) = tx.commit(base, &changes).expect("it commits");
        let cpu_rate = size as f64 / (cpu() - cpu_start) / 1e6;
        println!("{what}: {:.0} MB/s, {cpu_rate:.0} MB a processor second, {stat:?}", rate(size, start));
        let start = Instant::now();
        let manifest = Manifest { versions: [("ram".to_owned(), version)].into(), meta: String::new() };
        tx.publish("snap/speed", Expect::Any, &manifest).expect("it publishes");
        println!("  published in {:.1} ms", start.elapsed().as_secs_f64() * 1e3);
        version
    };
    let empty = store.empty(size, 4096);
    let version = commit(&empty, "commit of new content");
    commit(&empty, "commit of content that is stored already");
    commit(&version, "commit of unchanged content");

    let start = Instant::now();
    let mut buf = vec![0; 1 << 20];
    for offset in (0..size).step_by(buf.len()) {
        store.read_at(&version, offset, &mut buf).expect("it reads");
        assert!(buf == content.0[offset as usize..][..buf.len()], "the bytes differ at {offset:#x}");
    }
    println!("sequential read, page cache warm: {:.0} MB/s", rate(size, start));
    println!("{:?}", store.stats());
    drop(store);
    let start = Instant::now();
    let store = Store::open(&dir, Mode::ReadWrite).expect("the store opens again");
    println!("open with a recount: {:.1} ms", start.elapsed().as_secs_f64() * 1e3);
    let mut samples = random_reads(&store, &version);
    println!(
        "random 4 KiB read, frame not cached: p50 {:.1} us, p99 {:.1} us",
        samples[samples.len() / 2],
        samples[samples.len() * 99 / 100]
    );
    let start = Instant::now();
    let report = store.verify(&mut |_, _| {}).expect("it verifies");
    println!("verify: {:.0} MB/s, {} faults", rate(size, start), report.faults_total);
    store.delete_head("snap/speed").expect("the head goes");
    let start = Instant::now();
    println!("{:?} in {:.1} ms", store.collect().expect("it collects"), start.elapsed().as_secs_f64() * 1e3);
    samples.clear();
    let _ = std::fs::remove_dir_all(&dir);
}

/// Microseconds of reads of single blocks far apart, sorted; zero blocks and cached frames are left out.
fn random_reads(store: &Store, version: &store::Version) -> Vec<f64> {
    let mut seed = 7u64;
    let mut block = [0; 4096];
    let mut out = Vec::new();
    for _ in 0..20_000 {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let offset = (seed >> 33) % (version.size / 4096) * 4096;
        let start = Instant::now();
        let stat = store.read_at(version, offset, &mut block).expect("it reads");
        if stat.fetched_blocks > 0 {
            out.push(start.elapsed().as_secs_f64() * 1e6);
        }
    }
    out.sort_by(f64::total_cmp);
    out
}
