//! How many blocks a frame should hold: size on disk against the cost of reading one block.
//!
//! `cargo run --release -p store --example frame_sizes [file …]`: each file is taken as content of 4 KiB blocks
//! (a memory dump, a disk image); without one, files under /usr/lib.

use std::time::Instant;

const BLOCK: usize = 4096;

fn content() -> Vec<u8> {
    let named: Vec<String> = std::env::args().skip(1).collect();
    let mut out = Vec::new();
    let read = |path: &str, out: &mut Vec<u8>| {
        let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{path}: {error}"));
        out.extend(bytes.chunks_exact(BLOCK).filter(|block| block.iter().any(|byte| *byte != 0)).flatten());
    };
    if named.is_empty() {
        let entries = std::fs::read_dir("/usr/lib/x86_64-linux-gnu").expect("a Debian system");
        let mut paths: Vec<_> = entries.flatten().map(|e| e.path()).filter(|p| p.is_file()).collect();
        paths.sort();
        for path in paths {
            if out.len() < 128 << 20 {
                read(path.to_str().expect("a plain name"), &mut out);
            }
        }
    }
    named.iter().for_each(|path| read(path, &mut out));
    out
}

fn main() {
    let content = content();
    println!("{} MiB of blocks that are not zero; zstd level 1; raw where an eighth is not saved", content.len() >> 20);
    println!(
        "blocks/frame  stored/raw  compress MB/s  read of one block: p50 us (decompress all, hash one)  stored bytes read"
    );
    for blocks in [1, 2, 4, 8, 16, 32, 64] {
        let mut compressor = zstd::bulk::Compressor::new(1).expect("a compressor");
        let start = Instant::now();
        let frames: Vec<(Vec<u8>, bool)> = content
            .chunks(blocks * BLOCK)
            .map(|raw| {
                let small = compressor.compress(raw).expect("it compresses");
                if small.len() <= raw.len() - raw.len() / 8 { (small, true) } else { (raw.to_vec(), false) }
            })
            .collect();
        let rate = content.len() as f64 / start.elapsed().as_secs_f64() / 1e6;
        let stored: usize = frames.iter().map(|frame| frame.0.len()).sum();
        let mut decompressor = zstd::bulk::Decompressor::new().expect("a decompressor");
        let mut times: Vec<f64> = (0..5000)
            .map(|i| {
                let (stored, small) = &frames[i * 7919 % frames.len()];
                let start = Instant::now();
                let raw = if *small {
                    decompressor.decompress(stored, blocks * BLOCK).expect("it decompresses")
                } else {
                    stored.clone()
                };
                std::hint::black_box(blake3::keyed_hash(&[1; 32], &raw[..BLOCK]));
                start.elapsed().as_secs_f64() * 1e6
            })
            .collect();
        times.sort_by(f64::total_cmp);
        let (ratio, mean) = (stored as f64 / content.len() as f64, stored / frames.len());
        println!("{blocks:>12}  {ratio:>10.3}  {rate:>13.0}  {:>10.1}  {mean:>10}", times[times.len() / 2]);
    }
}
