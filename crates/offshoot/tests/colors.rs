//! Colors of a real guest whose memory is full, judged page by page by its own kernel; then of the same memory with
//! what coloring stands on overwritten at random.

use bench::Outcome;
use bench::colors::{Judged, Options, Parts, RamFile, judge};
use guest::{Basis, Color, Coloring, Cpu, FreePages, Memory, Region};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Colors of fewer pages say little in percent.
const PAGES_LEAST: u64 = 128;

#[test]
fn colors_agree_with_the_kernel_and_no_page_in_use_is_called_free() -> Outcome {
    let Judged { coloring, matrix, used_percent, fallback, .. } = judged()?;
    let table = matrix.markdown();
    eprintln!("{used_percent:.1}% in use, {} not judged\n{table}", matrix.unjudged);
    assert!(used_percent >= 80.0, "only {used_percent:.1}% of the memory was in use");
    assert_eq!(coloring.account.basis, Basis::Descriptors, "{:?}", coloring.account);
    assert_eq!(coloring.account.notes, Vec::<String>::new());
    assert_eq!(coloring.account.free, FreePages::Droppable);
    assert_eq!(matrix.used_called_free(), 0, "pages in use were called free:\n{table}");
    let free = matrix.share(Color::Free, PAGES_LEAST).expect("some memory is free");
    assert!(free >= 0.995, "{free} of the free pages agree:\n{table}");
    for color in [Color::KernelText, Color::Slab, Color::PageTable, Color::PageCache, Color::UserText, Color::UserData]
    {
        let share = matrix.share(color, PAGES_LEAST).unwrap_or_else(|| panic!("too few pages are {color}:\n{table}"));
        assert!(share >= 0.98, "{share} of the pages that are {color} agree:\n{table}");
    }
    // What the architecture alone tells: less, and none of it wrong.
    assert_eq!(fallback.account.basis, Basis::PageTables);
    assert_eq!(fallback.counts()[Color::Free as usize], 0);
    let tables = |coloring: &Coloring| coloring.counts()[Color::PageTable as usize];
    let agreed =
        fallback.iter().zip(coloring.iter()).filter(|pair| *pair == (Color::PageTable, Color::PageTable)).count();
    assert!(tables(&fallback) > 50 && tables(&fallback) == agreed as u64, "{agreed} of {}", tables(&fallback));
    Ok(())
}

fn judged() -> Outcome<Judged> {
    let target = PathBuf::from(env!("CARGO_BIN_EXE_offshoot"));
    let target = target.ancestors().nth(2).expect("cargo builds in <target>/<profile>");
    let cache = std::env::var_os("OFFSHOOT_CACHE").map_or_else(|| target.join("guest"), PathBuf::from);
    let built =
        node::image::build_default(&cache, &node::image::BuildOptions::default(), &mut |step| eprintln!("  {step}"))?;
    let parts = Parts {
        kernel: built.kernel.clone(),
        initrd: built.initrd.clone().ok_or("the default guest has an initial RAM disk")?,
        disk: built.disk.clone(),
        cmdline: built.cmdline.clone(),
    };
    let dir = tempfile::tempdir()?;
    judge(dir.path(), &parts, &Options::default(), 85, &mut overwritten)
}

/// A guest's RAM with some pages changed.
struct Edited<'a> {
    ram: &'a RamFile,
    pages: BTreeMap<u64, Vec<u8>>,
}

impl Memory for Edited<'_> {
    fn regions(&self) -> &[Region] {
        self.ram.regions()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        self.ram.read(offset, into)?;
        let end = offset + into.len() as u64;
        for (page, bytes) in self.pages.range(offset / base::PAGE..end.div_ceil(base::PAGE)) {
            let start = page * base::PAGE;
            for (at, &byte) in (start..).zip(bytes).filter(|(at, _)| (offset..end).contains(at)) {
                into[(at - offset) as usize] = byte;
            }
        }
        Ok(())
    }
}

/// Overwrites words of page tables, descriptors and the kernel's own pages: coloring ends within its bounds and fails
/// never. A run is repeated by its seed, which a failure shows.
fn overwritten(ram: &RamFile, cpu: Cpu, coloring: &Coloring) -> Outcome {
    let full = std::env::var_os("OFFSHOOT_TEST_FULL").is_some();
    let targets: Vec<u64> = (0..coloring.len())
        .filter(|&page| matches!(coloring.get(page), Color::PageTable | Color::KernelData))
        .collect();
    let hint = coloring.account.hint;
    let note = hint.map_or(0, |hint| hint.note / base::PAGE);
    for seed in 1..=if full { 1000u64 } else { 30 } {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut random = |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        let mut edited = Edited { ram, pages: BTreeMap::new() };
        for _ in 0..1 << random(12) {
            let page = if random(200) == 0 { note } else { targets[random(targets.len() as u64) as usize] };
            let entry = edited.pages.entry(page);
            let bytes = entry.or_insert_with(|| {
                let mut bytes = vec![0; base::PAGE as usize];
                ram.read(page * base::PAGE, &mut bytes).expect("RAM reads");
                bytes
            });
            let at = random(512) as usize * 8;
            let value = match random(4) {
                0 => (targets[random(targets.len() as u64) as usize] * base::PAGE) | 0x67,
                1 => (random(1 << 40) << 12) | 0xe7,
                2 => u64::MAX,
                _ => random(u64::MAX),
            };
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        let found = guest::color(&edited, Some(cpu), hint).map_err(|e| format!("seed {seed}: {e}"))?;
        let most = 2 * ((64 << 20) + found.len() * base::PAGE / 3) + found.len() * 24;
        assert!(found.account.bytes_read <= most, "seed {seed}: {} bytes read", found.account.bytes_read);
    }
    Ok(())
}
