//! How decoders are fuzzed, in every crate that has some: whatever the bytes, decoding ends, does not panic, and
//! allocates no more than its input's length explains.
//!
//! An input of the fuzzer is a script of edits to a valid encoding, since bytes at random would fail at the first
//! magic number. `cargo test` runs some thousands of scripts for each decoder; `make fuzz` runs them for
//! `FUZZ_SECONDS` (60) each. The engine (bolero) reports a failure with the smallest script that shows it and the
//! number that repeats it (`BOLERO_RANDOM_SEED`); under `cargo bolero` the same targets are led by coverage.
//!
//! Each crate takes this file in by its path, as `edits`, with `#[macro_use]`.

#![allow(dead_code, reason = "each crate uses its part")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator, noting the largest request of each thread.
struct Noting;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

fn note(size: usize) {
    // A thread that ends allocates without its variables.
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(size)));
}

// SAFETY: every call is passed on unchanged; noting a number allocates nothing.
unsafe impl GlobalAlloc for Noting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller keeps to the contract of the same method.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Noting = Noting;

/// Runs `decode`, which may not allocate more than `bound` at once.
#[track_caller]
pub(crate) fn within<T>(bound: usize, decode: impl FnOnce() -> T) -> T {
    LARGEST.set(0);
    let out = decode();
    let largest = LARGEST.get();
    assert!(largest <= bound, "{largest} bytes at once where {bound} are enough");
    out
}

/// What messages and small vectors take whatever the input.
pub(crate) const SMALL: usize = 16 << 10;

const NUMBERS: [u64; 12] = [
    0,
    1,
    0x7f,
    0xff,
    0x100,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    u64::MAX,
    u64::MAX >> 1,
    0x4141_4141_4141_4141,
];

/// Follows a script of edits: for each an operation, a place (two bytes) and an argument.
pub(crate) fn edited(valid: &[u8], script: &[u8]) -> Vec<u8> {
    let mut out = valid.to_vec();
    for edit in script.chunks_exact(4) {
        let at = usize::from(u16::from_le_bytes([edit[1], edit[2]])) % (out.len() + 1);
        let argument = edit[3];
        let number = NUMBERS[usize::from(argument) % NUMBERS.len()];
        // Numbers of the wire are of either order.
        let number = if argument < 128 { number.to_le_bytes() } else { number.to_be_bytes() };
        let overwrite = |out: &mut Vec<u8>, new: &[u8]| {
            out.iter_mut().skip(at).zip(new).for_each(|(old, new)| *old = *new);
        };
        match edit[0] % 9 {
            0 => overwrite(&mut out, &[argument]),
            1 if at < out.len() => out[at] ^= 1 << (argument % 8),
            2 if argument < 128 => overwrite(&mut out, &number[..4]),
            2 => overwrite(&mut out, &number[4..]),
            3 => overwrite(&mut out, &number),
            4 => out.truncate(at),
            5 => out.extend(std::iter::repeat_n(argument, usize::from(edit[1]))),
            6 => _ = out.drain(at..(at + usize::from(argument)).min(out.len())),
            7 => _ = out.splice(at..at, std::iter::repeat_n(argument, usize::from(edit[1] % 64))),
            _ => {
                let part = out[at..(at + usize::from(argument)).min(out.len())].to_vec();
                out.extend(part);
            }
        }
    }
    out
}

/// Runs a target: a valid encoding by the first byte of the input, edited by the rest, bytes by [`edited`] unless
/// another editor is named. The second argument of what is tried is a coin: a decoder behind a seal has it made anew by
/// one side, since nothing else would be tried behind it.
macro_rules! fuzz {
    ($valid:expr, |$bytes:ident, $coin:pat_param| $try:block) => {
        fuzz!($valid, $crate::edits::edited, |$bytes, $coin| $try)
    };
    ($valid:expr, $editor:expr, |$bytes:ident, $coin:pat_param| $try:block) => {{
        let valid: Vec<Vec<u8>> = $valid;
        let target = bolero::check!().with_max_len(64).with_shrink_time(std::time::Duration::from_secs(5));
        let attempt: fn(&[u8], bool) = |$bytes, $coin| $try;
        valid.iter().for_each(|valid| attempt(valid, false));
        let run = move |input: &[u8]| {
            let Some((first, script)) = input.split_first() else { return };
            let which = usize::from(*first) / 2 % valid.len();
            attempt(&$editor(&valid[which], script), first % 2 == 1);
        };
        match std::env::var("FUZZ_SECONDS").ok().and_then(|seconds| seconds.parse().ok()) {
            Some(seconds) => {
                let time = std::time::Duration::from_secs(seconds);
                target.with_iterations(usize::MAX).with_test_time(time).for_each(run);
            }
            None => target.with_iterations(4000).for_each(run),
        }
    }};
}
