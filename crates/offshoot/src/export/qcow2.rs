//! Where everything lies in a qcow2 file (QEMU, docs/interop/qcow2.txt, version 3) whose allocated clusters are known
//! before the first is written.
//!
//! ```text
//! header | L1 table | refcount table | refcount blocks | L2 tables | data clusters in the guest's order
//! ```
//!
//! Nothing is ever moved or written twice, so data can be written by several threads in any order. Zeros are clusters
//! that are not there.

use base::ByteRange;

/// Bytes in a cluster: QEMU's own default.
pub(super) const CLUSTER: u64 = 64 << 10;
/// Entries of a table in one cluster, 8 bytes each.
const ENTRIES: u64 = CLUSTER / 8;
/// Refcounts of a block in one cluster, 2 bytes each.
const REFCOUNTS: u64 = CLUSTER / 2;
/// The flag of entries whose cluster has one reference.
const COPIED: u64 = 1 << 63;

/// A file's layout. All numbers are of clusters, but for `size`.
#[derive(Debug)]
pub(super) struct Layout {
    /// Bytes of the disk.
    size: u64,
    /// Runs of allocated clusters of the disk, with how many are allocated before each.
    runs: Vec<(ByteRange, u64)>,
    l1: u64,
    refcount_table: u64,
    refcount_blocks: u64,
    /// The L1 entries that have an L2 table, in order.
    l2: Vec<u64>,
    allocated: u64,
}

impl Layout {
    /// The layout for a disk of `size` bytes with data in these ranges, ascending.
    pub(super) fn new(size: u64, data: &[ByteRange]) -> Self {
        // QEMU counts disks in sectors.
        let size = size.next_multiple_of(512);
        let mut runs: Vec<(ByteRange, u64)> = Vec::new();
        for range in data {
            let clusters = ByteRange::new(range.start / CLUSTER, range.end.div_ceil(CLUSTER));
            match runs.last_mut() {
                Some((last, _)) if last.end >= clusters.start => last.end = last.end.max(clusters.end),
                _ => runs.push((clusters, 0)),
            }
        }
        let (mut allocated, mut l2): (u64, Vec<u64>) = (0, Vec::new());
        for (run, before) in &mut runs {
            *before = allocated;
            allocated += run.len();
            let first = (run.start / ENTRIES).max(l2.last().map_or(0, |last| last + 1));
            l2.extend(first..=(run.end - 1) / ENTRIES);
        }
        let l1 = size.div_ceil(CLUSTER * ENTRIES).max(1).div_ceil(ENTRIES);
        let (mut refcount_table, mut refcount_blocks) = (1, 1);
        loop {
            let all = 1 + l1 + refcount_table + refcount_blocks + l2.len() as u64 + allocated;
            let blocks = all.div_ceil(REFCOUNTS);
            let table = blocks.div_ceil(ENTRIES);
            if (blocks, table) == (refcount_blocks, refcount_table) {
                return Self { size, runs, l1, refcount_table, refcount_blocks, l2, allocated };
            }
            // They only grow, and by less than one for each cluster that they add.
            (refcount_blocks, refcount_table) = (blocks.max(refcount_blocks), table.max(refcount_table));
        }
    }

    fn first_l2(&self) -> u64 {
        1 + self.l1 + self.refcount_table + self.refcount_blocks
    }

    fn first_data(&self) -> u64 {
        self.first_l2() + self.l2.len() as u64
    }

    fn clusters(&self) -> u64 {
        self.first_data() + self.allocated
    }

    /// Bytes of the file.
    pub(super) fn file_size(&self) -> u64 {
        self.clusters() * CLUSTER
    }

    /// The runs of the disk's bytes to be written, whole clusters, each with its place in the file.
    pub(super) fn data(&self) -> impl Iterator<Item = (ByteRange, u64)> + '_ {
        self.runs.iter().map(|(run, before)| {
            (ByteRange::new(run.start * CLUSTER, run.end * CLUSTER), (self.first_data() + before) * CLUSTER)
        })
    }

    /// Everything but data: pieces of the file and their places.
    pub(super) fn metadata(&self) -> impl Iterator<Item = (u64, Vec<u8>)> + '_ {
        let tables = std::iter::once((0, self.header()))
            .chain(std::iter::once((CLUSTER, self.l1_table())))
            .chain(std::iter::once(((1 + self.l1) * CLUSTER, self.refcount_table())));
        let first_block = 1 + self.l1 + self.refcount_table;
        let blocks = (0..self.refcount_blocks).map(move |block| {
            let counted = (self.clusters() - block * REFCOUNTS).min(REFCOUNTS);
            ((first_block + block) * CLUSTER, 1u16.to_be_bytes().repeat(counted as usize))
        });
        let l2 = (0..).zip(&self.l2).map(|(index, &entry)| ((self.first_l2() + index) * CLUSTER, self.l2_table(entry)));
        tables.chain(blocks).chain(l2)
    }

    fn header(&self) -> Vec<u8> {
        let entries = self.size.div_ceil(CLUSTER * ENTRIES).max(1);
        let mut out = b"QFI\xfb".to_vec();
        let u32s = |out: &mut Vec<u8>, values: &[u64]| {
            values.iter().for_each(|v| out.extend(u32::try_from(*v).expect("small").to_be_bytes()));
        };
        let u64s = |out: &mut Vec<u8>, values: &[u64]| values.iter().for_each(|v| out.extend(v.to_be_bytes()));
        u32s(&mut out, &[3]);
        u64s(&mut out, &[0]); // no backing file
        u32s(&mut out, &[0, CLUSTER.trailing_zeros().into()]);
        u64s(&mut out, &[self.size]);
        u32s(&mut out, &[0, entries]); // not encrypted
        u64s(&mut out, &[CLUSTER, (1 + self.l1) * CLUSTER]);
        u32s(&mut out, &[self.refcount_table, 0]); // no snapshots
        u64s(&mut out, &[0, 0, 0, 0]); // nor features that a reader must know
        u32s(&mut out, &[4, 104]); // refcounts of 2^4 bits; bytes of this header
        u64s(&mut out, &[0]); // no extensions
        out
    }

    fn l1_table(&self) -> Vec<u8> {
        let mut out = vec![0; (self.l1 * CLUSTER) as usize];
        for (index, &entry) in (0..).zip(&self.l2) {
            let value = ((self.first_l2() + index) * CLUSTER) | COPIED;
            out[8 * entry as usize..][..8].copy_from_slice(&value.to_be_bytes());
        }
        out
    }

    fn refcount_table(&self) -> Vec<u8> {
        let first = 1 + self.l1 + self.refcount_table;
        (first..first + self.refcount_blocks).flat_map(|block| (block * CLUSTER).to_be_bytes()).collect()
    }

    fn l2_table(&self, entry: u64) -> Vec<u8> {
        let mut out = vec![0; CLUSTER as usize];
        let covered = ByteRange::at(entry * ENTRIES, ENTRIES);
        let first = self.runs.partition_point(|(run, _)| run.end <= covered.start);
        for (run, before) in self.runs[first..].iter().take_while(|(run, _)| run.start < covered.end) {
            for cluster in run.start.max(covered.start)..run.end.min(covered.end) {
                let value = ((self.first_data() + before + cluster - run.start) * CLUSTER) | COPIED;
                out[8 * (cluster - covered.start) as usize..][..8].copy_from_slice(&value.to_be_bytes());
            }
        }
        out
    }
}
