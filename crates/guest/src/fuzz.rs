//! What a guest or a file says, at random.
//!
//! Guests' memory: whatever is there, coloring ends, does not panic, reads no more than its budget, and
//! never fails, since only the host's reading can.
//!
//! An input is a script of edits to a guest that is well-formed, aimed at what coloring stands on: its note, its
//! tables, its sections, its descriptors. `cargo test` runs a thousand; with `FUZZ_SECONDS` it runs that long.

use crate::edits::{SMALL, within};
use crate::plan::{self, Eager, Planner, Policy, Profile, Space, Template, Touch, traits};
use crate::tests::{Linux, STABLE, STYLES, TOP_BYTE, everything};
use crate::{Color, Coloring, Cpu, Hint, color};
use base::{Bitmap, PAGE};
use std::cell::RefCell;
use std::sync::Arc;
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

/// Any edit, and not only of colors and order: texts, lengths, counts.
#[test]
fn kept_colors() {
    fuzz!(vec![everything(STABLE).0.color().encode()], |bytes, _| {
        // Order and places are four bytes a page where a page takes one at least.
        if let Ok(found) = within(8 * bytes.len() + SMALL, || Coloring::decode(bytes)) {
            assert_eq!(found.space().order().len() as u64, found.len());
            let again = Coloring::decode(&found.encode()).expect("what was read can be written");
            assert_eq!(format!("{:?}", again.account), format!("{:?}", found.account));
            assert!(again.iter().eq(found.iter()));
        }
    });
}

fn recordings(pages: u32) -> Profile {
    let mut profile = Profile::default();
    for round in 0..3 {
        let touches: Vec<Touch> = (0..pages / 2).map(|n| Touch { page: (n * 7 + round) % pages, ms: n * 3 }).collect();
        profile.add(&touches, 2000);
    }
    profile
}

#[test]
fn profiles() {
    fuzz!(vec![recordings(40).encode(), Profile::default().encode()], |bytes, _| {
        // An entry takes sixteen bytes where four encode it.
        let Ok(profile) = within(4 * bytes.len() + SMALL, || Profile::decode(bytes)) else { return };
        assert_eq!(Profile::decode(&profile.encode()).as_ref(), Ok(&profile));
        assert!(!profile.describe().is_empty());
        // It is taught further as any other, pages at the end of all numbers included.
        let mut taught = profile.clone();
        taught.add(&[Touch { page: 3, ms: 5 }, Touch { page: u32::MAX, ms: u32::MAX }], 100);
        assert_eq!(taught.recordings(), (profile.recordings() + 1).min(32));
        assert_eq!(Profile::decode(&taught.encode()), Ok(taught));
    });
}

/// A template of which some pages are stored and some were touched.
fn template() -> Vec<u8> {
    let pages = 48;
    let mut stored = Bitmap::new(pages.into());
    stored.set_range(0, 20);
    stored.set_range(24, 47);
    let space = Space::new((0..pages).map(|page| (page / 9) as u8).collect(), |page| (u64::from(page % 3), 0));
    Template { space, traits: traits(), stored, profile: recordings(pages) }.encode()
}

/// Whatever a template says, each policy plans with it, asks for stored pages alone, and for each of them once.
#[test]
fn templates() {
    fuzz!(vec![template()], |bytes, _| {
        // The order, in which a page takes a byte at least, is sorted and placed.
        let decoded = within(16 * bytes.len() + SMALL, || Template::decode(bytes, traits()));
        let Ok(template) = decoded.map(Arc::new) else { return };
        let again = Template::decode(&template.encode(), traits()).expect("what was read can be written");
        assert_eq!((&again.stored, &again.profile), (&template.stored, &template.profile));
        for policy in ["all", "twinkle:8,1", "replay", "intersect", "color:2,4", "auto", "auto:plain", "readahead:3"] {
            let mut planner = Planner::new(template.clone(), policy.parse().expect("it is one"), Eager::default());
            let mut asked = Vec::new();
            for page in [0, 7, 23, 47, u32::MAX] {
                planner.fault(page, page % 2 == 1);
                planner.next(9, &mut asked);
                if let Some(&first) = asked.first() {
                    planner.used(first);
                }
                planner.judge();
            }
            planner.next(usize::MAX / 2, &mut asked);
            assert!(planner.is_idle(), "{policy}");
            let stored = template.stored.len();
            assert!(asked.iter().all(|&page| u64::from(page) < stored && template.stored.get(page.into())), "{policy}");
            let count = asked.len();
            asked.sort_unstable();
            asked.dedup();
            assert_eq!(asked.len(), count, "{policy} asks for a page twice");
        }
        assert!(Planner::layout(&template).len() <= template.profile.len());
    });
}

#[test]
fn policies() {
    let texts = ["none", "readahead:8", "twinkle:64,4", "color:4,16", "auto:plain", "0.5"];
    fuzz!(texts.map(|text| text.as_bytes().to_vec()).to_vec(), |bytes, _| {
        let text = String::from_utf8_lossy(bytes);
        let bound = 16 * text.len() + SMALL;
        if let Ok(policy) = within(bound, || text.parse::<Policy>()) {
            assert_eq!(policy.to_string().parse(), Ok(policy));
        }
        if let Ok(eager) = within(bound, || text.parse::<Eager>()) {
            assert!((0.0..=1.0).contains(&eager.dial()) && (0.0..=1.0).contains(&eager.threshold()));
        }
    });
}

/// Numbers of the plan's files: what is read is what was written, in no more bytes than a number may take.
#[test]
fn numbers() {
    let written = |numbers: &[u32]| {
        let mut out = Vec::new();
        numbers.iter().for_each(|&number| plan::leb::put(&mut out, number));
        out
    };
    fuzz!(vec![written(&[0, 1, 127, 128, 300, u32::MAX]), written(&[u32::MAX; 4])], |bytes, _| {
        let mut at = 0;
        while at < bytes.len() {
            let began = at;
            match plan::leb::take(bytes, &mut at) {
                Ok(number) => {
                    let mut again = Vec::new();
                    plan::leb::put(&mut again, number);
                    // Zeros at the end are superfluous and allowed.
                    assert!(again.len() <= at - began && at - began <= 5);
                }
                Err(_) => break,
            }
        }
    });
}
