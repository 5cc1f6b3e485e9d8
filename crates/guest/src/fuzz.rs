//! Guests' memory at random: whatever is there, coloring ends, does not panic, reads no more than its budget, and
//! never fails, since only the host's reading can.
//!
//! An input is a script of edits to a guest that is well-formed, aimed at what coloring stands on: its note, its
//! tables, its sections, its descriptors. `cargo test` runs a thousand; with `FUZZ_SECONDS` it runs that long.

use crate::tests::{Linux, STABLE, STYLES, TOP_BYTE, everything};
use crate::{Color, Coloring, Cpu, Hint, color};
use base::PAGE;
use std::cell::RefCell;
use std::time::Duration;

const NUMBERS: [u64; 12] = [
    0,
    1,
    7,
    0xfff,
    0x1000,
    u64::MAX,
    1 << 63,
    0x8000_0000_0000,
    0xffff_8a80_0000_0000,
    0xffff_ffff_8200_0000,
    (4 << 30) | 7,
    0x0040_0083,
];

thread_local! {
    /// Whole guests, made once for each thread.
    static GUESTS: RefCell<Vec<Linux>> = RefCell::new([STABLE, TOP_BYTE, STYLES[5]].map(|s| everything(s).0).into());
}

/// Where an edit goes: the note's text, a word of the pages that hold tables and sections, a descriptor.
fn place(guest: &Linux, descriptors: u64, word: u64) -> u64 {
    match word % 4 {
        0 => guest.note + (word >> 8) % 1400,
        1 => guest.root + (word >> 8) % 512 * 8,
        2 => guest.root + (word >> 8) % (1 << 18) * 8,
        _ => descriptors + (word >> 8) % 0x800 * 8,
    }
}

#[test]
fn no_memory_makes_coloring_fail() {
    let target = bolero::check!().with_max_len(96).with_shrink_time(Duration::from_secs(5));
    let run = |script: &[u8]| {
        GUESTS.with_borrow_mut(|guests| {
            let Some((&first, edits)) = script.split_first() else { return };
            let guest = &mut guests[usize::from(first % 3)];
            let descriptors = guest.descriptor(0x1400);
            let mut undo = Vec::new();
            for edit in edits.chunks_exact(10) {
                let word = u64::from_le_bytes(edit[..8].try_into().expect("eight bytes"));
                let at = place(guest, descriptors, word).min((24 << 20) - 8) as usize;
                let value = match edit[8] % 3 {
                    0 => NUMBERS[usize::from(edit[9]) % NUMBERS.len()],
                    // A pointer into the tables, so that trees grow together.
                    1 => (guest.root + u64::from(edit[9]) * PAGE) | 7,
                    _ => word.rotate_left(u32::from(edit[9])),
                };
                let length = if word % 4 == 0 { 1 } else { 8 };
                undo.push((at, guest.ram.bytes[at..at + length].to_vec()));
                guest.ram.bytes[at..at + length].copy_from_slice(&value.to_le_bytes()[..length]);
            }
            let cpu = (first & 4 != 0).then(|| Cpu { cr3: guest.root, cr4: u64::from(first & 8) << 9 });
            let hint = (first & 16 != 0).then_some(Hint { note: guest.note });
            let coloring = color(&guest.ram, cpu, hint).expect("only the host can fail");
            assert_eq!(coloring.len() * PAGE, guest.ram.bytes.len() as u64);
            // A budget for Linux, and one for what the architecture tells, and the search.
            let most = 2 * ((64 << 20) + coloring.len() * PAGE / 3) + coloring.len() * 24;
            assert!(coloring.account.bytes_read <= most, "{} bytes read", coloring.account.bytes_read);
            for (at, bytes) in undo.into_iter().rev() {
                guest.ram.bytes[at..at + bytes.len()].copy_from_slice(&bytes);
            }
        });
    };
    match std::env::var("FUZZ_SECONDS").ok().and_then(|s| s.parse().ok()) {
        Some(seconds) => target.with_iterations(usize::MAX).with_test_time(Duration::from_secs(seconds)).for_each(run),
        None => target.with_iterations(1000).for_each(run),
    }
}

#[test]
fn memory_that_is_no_guest_has_no_colors() {
    let run = |bytes: &[u8]| {
        let mut ram = everything(STABLE).0.ram;
        let tile = if bytes.is_empty() { &[0][..] } else { bytes };
        for (byte, &with) in ram.bytes.iter_mut().zip(tile.iter().cycle()) {
            *byte = with;
        }
        let coloring = color(&ram, Some(Cpu { cr3: 0x40_0000, cr4: 0 }), None).expect("only the host can fail");
        assert_eq!(coloring.counts()[Color::Free as usize], 0);
    };
    bolero::check!().with_max_len(64).with_iterations(50).with_shrink_time(Duration::from_secs(5)).for_each(run);
}

#[test]
fn kept_colors_of_any_bytes_are_refused_or_whole() {
    let whole = everything(STABLE).0.color().encode();
    let run = |edits: &[u8]| {
        let mut bytes = whole.clone();
        for edit in edits.chunks_exact(3) {
            // The account is at the beginning, and small; anywhere behind it are colors and order.
            let at = usize::from(u16::from_le_bytes([edit[0], edit[1]]));
            let at = if edit[0] % 2 == 0 { at % 200 } else { at * 7 } % bytes.len();
            bytes[at] = edit[2];
        }
        if let Ok(found) = Coloring::decode(&bytes) {
            assert_eq!(found.space().order().len() as u64, found.len());
            assert_eq!(found.counts().iter().sum::<u64>(), found.len());
        }
    };
    let target = bolero::check!().with_max_len(48).with_shrink_time(Duration::from_secs(5));
    match std::env::var("FUZZ_SECONDS").ok().and_then(|s| s.parse().ok()) {
        Some(seconds) => target.with_iterations(usize::MAX).with_test_time(Duration::from_secs(seconds)).for_each(run),
        None => target.with_iterations(1000).for_each(run),
    }
}
