//! Guest RAM as the kernel holds it: which pages of a hypervisor are in which page frames.

use crate::host::Host;
use crate::{Failure, Outcome};
use base::{PAGE, RamMap, Source};
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use vmm::qemu::Files;
use vmm::resident::Resident;

// Documentation/admin-guide/mm/pagemap.rst
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE: u64 = 1 << 61;
const FRAME: u64 = (1 << 55) - 1;

/// The RAM of one VM, as seen at one moment.
pub struct Ram {
    pid: u32,
    address: u64,
    /// One entry of `/proc/PID/pagemap` for each page.
    entries: Vec<u64>,
    /// Where each page came from at the start.
    map: RamMap,
}

impl Ram {
    /// Looks at a running VM.
    ///
    /// # Errors
    /// Where it does not run, or page frame numbers are hidden from this user.
    pub fn of(host: &Host, name: &str) -> Outcome<Self> {
        let detail: api::VmDetail = host.client.get(&format!("/v1/vms/{name}"))?;
        let pid = detail.vm.pid.ok_or_else(|| Failure::from(format!("{name} does not run")))?;
        let dir = Path::new(&detail.directory);
        let hello = Resident::connect(&Files { dir: dir.to_owned() }.resident())?.hello()?;
        let map = RamMap::decode(&std::fs::read_to_string(dir.join("ram.map"))?)?;
        let pages = (hello.size / PAGE) as usize;
        let mut bytes = vec![0; pages * 8];
        File::open(format!("/proc/{pid}/pagemap"))?.read_exact_at(&mut bytes, hello.ram / PAGE * 8)?;
        let entries: Vec<u64> =
            bytes.chunks_exact(8).map(|e| u64::from_le_bytes(e.try_into().expect("eight bytes"))).collect();
        if entries.iter().any(|e| e & PRESENT != 0) && entries.iter().all(|e| e & PRESENT == 0 || e & FRAME == 0) {
            return Err("page frame numbers are hidden: run as root".into());
        }
        Ok(Self { pid, address: hello.ram, entries, map })
    }

    /// Bytes of RAM files that it touched: pages that are present where its map names a file. A page that was read and
    /// later written is private now but came out of the file once; what lies in a zero extent never did.
    #[must_use]
    pub fn touched_file_bytes(&self) -> u64 {
        let files = self.map.extents().filter(|(_, source)| matches!(source, Source::File(_)));
        let pages = files.flat_map(|(range, _)| range.start / PAGE..range.end / PAGE);
        pages.filter(|&page| self.entries[page as usize] & (PRESENT | SWAPPED) != 0).count() as u64 * PAGE
    }

    fn clean_frame(&self, page: usize) -> Option<u64> {
        let entry = self.entries[page];
        (entry & PRESENT != 0 && entry & FILE != 0).then_some(entry & FRAME)
    }

    /// The bytes of a page, where it is still in the frame it was seen in.
    fn read(&self, page: usize) -> Outcome<Option<Vec<u8>>> {
        let at = self.address + page as u64 * PAGE;
        let mut bytes = vec![0; PAGE as usize];
        File::open(format!("/proc/{}/mem", self.pid))?.read_exact_at(&mut bytes, at)?;
        let mut entry = [0; 8];
        File::open(format!("/proc/{}/pagemap", self.pid))?.read_exact_at(&mut entry, at / PAGE * 8)?;
        let same = (u64::from_le_bytes(entry) ^ self.entries[page]) & (PRESENT | FILE | FRAME) == 0;
        Ok(same.then_some(bytes))
    }
}

/// How much of what several VMs hold in common is held once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sharing {
    /// Groups of two VMs or more that have touched a page clean at one offset of RAM and find the same bytes there.
    pub groups: u64,
    /// Those whose page is in one page frame for all of them.
    pub held_once: u64,
}

impl Sharing {
    /// The share: strict, because a group of eight of which one has a frame of its own counts as not shared, and
    /// because pages that a single VM touched, which are trivially held once, do not count.
    #[must_use]
    pub fn fraction(&self) -> f64 {
        self.held_once as f64 / self.groups.max(1) as f64
    }

    /// Compares the clean pages of `rams`.
    ///
    /// # Errors
    /// Where a VM ended meanwhile.
    pub fn of(rams: &[Ram]) -> Outcome<Self> {
        let mut sharing = Self::default();
        for page in 0..rams.iter().map(|r| r.entries.len()).min().unwrap_or(0) {
            let mut frames: HashMap<u64, Vec<&Ram>> = HashMap::new();
            for ram in rams {
                if let Some(frame) = ram.clean_frame(page) {
                    frames.entry(frame).or_default().push(ram);
                }
            }
            let held: Vec<Vec<&Ram>> = frames.into_values().collect();
            let mut contents: Vec<(Vec<u8>, usize, usize)> = Vec::new();
            match &held[..] {
                [] => {}
                [one] => contents.push((Vec::new(), one.len(), 1)),
                many => {
                    for holders in many {
                        let Some(bytes) = holders[0].read(page)? else { continue };
                        match contents.iter_mut().find(|(seen, ..)| *seen == bytes) {
                            Some((_, vms, frames)) => (*vms, *frames) = (*vms + holders.len(), *frames + 1),
                            None => contents.push((bytes, holders.len(), 1)),
                        }
                    }
                }
            }
            for (_, vms, frames) in contents {
                sharing.groups += u64::from(vms >= 2);
                sharing.held_once += u64::from(vms >= 2 && frames == 1);
            }
        }
        Ok(sharing)
    }
}
