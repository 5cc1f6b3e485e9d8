//! Finding and reading a kernel's note to its crash dumper.
//!
//! `VMCOREINFO` is an ELF note in pages of its own (Linux, `kernel/vmcore_info.c`): a header of 12 bytes, the name,
//! padded to 12, and lines `KEY=value`. The kernel that ran here before a reboot may have left one too, and a process
//! can forge as many as it likes, so what is found are candidates, which [`crate::kernel`] checks.

use crate::memory::Cpu;
use crate::paging::Space;
use crate::reader::{Reader, Stop};
use base::PAGE;

/// Where its text begins.
const TEXT: usize = 24;
/// The kernel gives it a page; later ones might give more.
const TEXT_MAX: usize = 4 * PAGE as usize;
/// How many are tried.
pub(crate) const CANDIDATES_MAX: usize = 16;
/// Pages looked at in one request.
const RUN: u64 = 512;

/// The lines of one note.
#[derive(Debug, Default)]
pub(crate) struct Note {
    text: String,
}

impl Note {
    /// Reads the note at a physical address; `None` where there is none.
    pub(crate) fn read(reader: &mut Reader, physical: u64) -> Result<Option<Self>, Stop> {
        let mut head = [0; TEXT];
        reader.read(physical, &mut head)?;
        let Some(length) = text_length(&head) else { return Ok(None) };
        let mut text = vec![0; length];
        reader.read(physical + TEXT as u64, &mut text)?;
        // Bytes, as far as they are text: what is not does not match any key.
        Ok(Some(Self { text: String::from_utf8_lossy(&text).into_owned() }))
    }

    /// What stands behind `key=`.
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        self.text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
    }

    fn required<T>(&self, key: &str, value: Option<T>) -> Result<T, Stop> {
        value.ok_or_else(|| Stop::Unfit(format!("its VMCOREINFO has no usable {key}")))
    }

    /// A virtual address.
    pub(crate) fn symbol(&self, name: &str) -> Result<u64, Stop> {
        let key = format!("SYMBOL({name})");
        self.required(&key, self.text(&key).and_then(|v| u64::from_str_radix(v, 16).ok()))
    }

    /// A decimal number, where there is one. Negative ones are wrapped, as kernels print signed values.
    pub(crate) fn number(&self, name: &str) -> Option<u64> {
        let text = self.text(&format!("NUMBER({name})"))?;
        match text.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok(),
            None => text.parse::<i64>().map(|v| v as u64).ok().or_else(|| text.parse().ok()),
        }
    }

    pub(crate) fn required_number(&self, name: &str) -> Result<u64, Stop> {
        self.required(&format!("NUMBER({name})"), self.number(name))
    }

    pub(crate) fn size(&self, name: &str) -> Result<u64, Stop> {
        let key = format!("SIZE({name})");
        self.required(&key, self.text(&key).and_then(|v| v.parse().ok()))
    }

    pub(crate) fn length(&self, name: &str) -> Result<u64, Stop> {
        let key = format!("LENGTH({name})");
        self.required(&key, self.text(&key).and_then(|v| v.parse().ok()))
    }

    pub(crate) fn offset(&self, name: &str) -> Result<usize, Stop> {
        let key = format!("OFFSET({name})");
        self.required(&key, self.optional_offset(name))
    }

    pub(crate) fn optional_offset(&self, name: &str) -> Option<usize> {
        self.text(&format!("OFFSET({name})"))?.parse().ok()
    }
}

/// The length of a note's text, where the bytes are the head of one.
fn text_length(head: &[u8]) -> Option<usize> {
    let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("four bytes"));
    let length = word(4) as usize;
    (word(0) == 11 && word(8) == 0 && &head[12..TEXT] == b"VMCOREINFO\0\0" && (1..=TEXT_MAX).contains(&length))
        .then_some(length)
}

/// Tries what the kernel's own variables point to: one of them points to the note. With a processor's page tables they
/// are found without a search through all of memory. Returns whether `found` said so.
pub(crate) fn pointed_to(
    reader: &mut Reader,
    cpu: Cpu,
    found: &mut dyn FnMut(&mut Reader, u64) -> Result<bool, Stop>,
) -> Result<bool, Stop> {
    /// Where the image is mapped: 1 GiB at most, wherever in it address randomization put it.
    const IMAGE: std::ops::Range<u64> = 0xffff_ffff_8000_0000..0xffff_ffff_c000_0000;
    /// The kernel's half of addresses.
    const HALF: u64 = 0xff00_0000_0000_0000;
    /// No kernel's image is larger than that.
    const BYTES_MAX: u64 = 128 << 20;
    // A processor that runs a process under a kernel that hides itself stands on the second of a pair of roots.
    let mut space = Space::new(cpu.cr3 & !0x1fff, cpu.levels());
    if space.translate(reader, IMAGE.start).is_err_and(|stop| matches!(stop, Stop::Absent(_))) {
        return Ok(false);
    }
    let mut buffer = vec![0; 2 << 20];
    let (mut address, mut bytes, mut tried) = (IMAGE.start, 0, 0);
    let mut last = 0;
    while address < IMAGE.end && bytes < BYTES_MAX {
        let (physical, run, write) = match space.entry(reader, address) {
            Ok(entry) => entry,
            Err(Stop::Unfit(_) | Stop::Absent(_)) => {
                address += PAGE;
                continue;
            }
            Err(stop) => return Err(stop),
        };
        let run = run.min(IMAGE.end - address).min(buffer.len() as u64);
        address += run;
        if !write {
            continue;
        }
        bytes += run;
        let buffer = &mut buffer[..run as usize];
        match reader.read(physical, buffer) {
            Ok(()) => {}
            Err(Stop::Absent(_)) => continue,
            Err(stop) => return Err(stop),
        }
        for word in buffer.as_chunks::<8>().0 {
            let pointer = u64::from_le_bytes(*word);
            if pointer & (PAGE - 1) != 0 || pointer & HALF != HALF || IMAGE.contains(&pointer) || pointer == last {
                continue;
            }
            last = pointer;
            let Some(at) = begins(reader, &mut space, pointer)? else { continue };
            tried += 1;
            if found(reader, at)? {
                return Ok(true);
            }
            if tried == CANDIDATES_MAX {
                return Ok(false);
            }
        }
    }
    Ok(false)
}

/// The physical address of a note that begins at a virtual one, where one does.
fn begins(reader: &mut Reader, space: &mut Space, pointer: u64) -> Result<Option<u64>, Stop> {
    let mut head = [0; TEXT];
    match space.translate(reader, pointer).and_then(|(at, _)| reader.read(at, &mut head).map(|()| at)) {
        Ok(at) => Ok(text_length(&head).map(|_| at)),
        Err(Stop::Unfit(_) | Stop::Absent(_)) => Ok(None),
        Err(stop) => Err(stop),
    }
}

/// Tries pages that begin like a note, from the bottom of memory up: the kernel makes its note as it boots, soon after
/// its image, where its allocator has few pages yet. `found` says whether to end.
pub(crate) fn candidates(
    reader: &mut Reader,
    found: &mut dyn FnMut(&mut Reader, u64) -> Result<bool, Stop>,
) -> Result<(), Stop> {
    let mut heads = vec![0; RUN as usize * TEXT];
    let mut tried = 0;
    for region in reader.regions().to_vec() {
        for start in (region.physical.start..region.physical.end).step_by((RUN * PAGE) as usize) {
            let end = region.physical.end.min(start + RUN * PAGE);
            let first = (start - region.physical.start + region.offset) / PAGE;
            let heads = &mut heads[..((end - start) / PAGE) as usize * TEXT];
            reader.heads(first, TEXT, heads)?;
            for (page, head) in heads.chunks_exact(TEXT).enumerate() {
                if text_length(head).is_none() {
                    continue;
                }
                tried += 1;
                if found(reader, start + page as u64 * PAGE)? || tried == CANDIDATES_MAX {
                    return Ok(());
                }
            }
        }
    }
    Ok(())
}
