//! What several frozen layers changed together, as one change of the version below them.

use crate::error::{Error, Result};
use base::ByteRange;
use mirror::control::ViewChanges;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use store::BlockSource;

/// The changes of layers, the upper ones over the lower ones.
#[derive(Debug)]
pub(super) struct Merged {
    pub(super) written: Vec<ByteRange>,
    pub(super) zeroed: Vec<ByteRange>,
    /// Ends of runs by their starts, and the layer that has the run's bytes; disjoint.
    runs: BTreeMap<u64, (u64, usize)>,
    data: Vec<File>,
}

/// The mark of a run of zeros among the layers' numbers.
const ZEROS: usize = usize::MAX;

impl Merged {
    /// Of layers from the lowest to the uppermost, of a file of `size` bytes.
    ///
    /// # Errors
    /// The data of one cannot be opened.
    pub(super) fn of(layers: &[ViewChanges], size: u64) -> Result<Self> {
        let mut runs = BTreeMap::new();
        let mut data = Vec::with_capacity(layers.len());
        for (number, layer) in layers.iter().enumerate() {
            data.push(File::open(&layer.data_path).map_err(Error::io("open", &layer.data_path))?);
            let runs_of = |list: &[(u64, u64)], what| list.iter().map(move |&(s, e)| (s, e, what)).collect::<Vec<_>>();
            // The last block may pass the end of a file that is not whole blocks.
            for (start, end, what) in [runs_of(&layer.dirty, number), runs_of(&layer.zeroed, ZEROS)].concat() {
                lay_over(&mut runs, start, end.min(size), what);
            }
        }
        let joined = |zeros: bool| {
            let mut out: Vec<ByteRange> = Vec::new();
            for (&start, &(end, _)) in runs.iter().filter(|(_, (_, what))| (*what == ZEROS) == zeros) {
                match out.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ => out.push(ByteRange::new(start, end)),
                }
            }
            out
        };
        Ok(Self { written: joined(false), zeroed: joined(true), runs, data })
    }

    /// Whether nothing was changed.
    pub(super) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }
}

/// Puts a run over those that are there.
fn lay_over(runs: &mut BTreeMap<u64, (u64, usize)>, start: u64, end: u64, what: usize) {
    if start >= end {
        return;
    }
    if let Some((&before, &(reaches, of))) = runs.range(..start).next_back()
        && reaches > start
    {
        runs.insert(before, (start, of));
        if reaches > end {
            runs.insert(end, (reaches, of));
        }
    }
    let covered: Vec<u64> = runs.range(start..end).map(|(&at, _)| at).collect();
    for at in covered {
        let (reaches, of) = runs.remove(&at).expect("just found");
        if reaches > end {
            runs.insert(end, (reaches, of));
        }
    }
    runs.insert(start, (end, what));
}

impl BlockSource for Merged {
    fn read(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        let end = offset + buf.len() as u64;
        let mut at = offset;
        while at < end {
            let run = self.runs.range(..=at).next_back().filter(|(_, (reaches, _))| *reaches > at);
            let Some((_, &(reaches, what))) = run else {
                return Err(std::io::Error::other(format!("{at:#x} was not changed")));
            };
            let part = &mut buf[(at - offset) as usize..(reaches.min(end) - offset) as usize];
            match self.data.get(what) {
                Some(data) => data.read_exact_at(part, at)?,
                None => part.fill(0),
            }
            at = reaches.min(end);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mirror::Below;

    #[test]
    fn layers_merge_as_they_show() {
        let mut state = 7_u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        let dir = tempfile::tempdir().unwrap();
        let size = 64_u64;
        for round in 0..300 {
            let mut model: Vec<Option<u8>> = vec![None; size as usize];
            let mut layers = Vec::new();
            for number in 0..1 + random(4) {
                let mut own: Vec<Option<bool>> = vec![None; size as usize + 8];
                for _ in 0..random(5) {
                    let (start, len, zero) = (random(size), 1 + random(16), random(3) == 0);
                    let end = (start + len).min(size + 8);
                    own[start as usize..end as usize].fill(Some(zero));
                }
                let fill = (10 * round % 200 + number + 1) as u8;
                let path = dir.path().join(format!("{round}-{number}"));
                std::fs::write(&path, vec![fill; size as usize + 8]).unwrap();
                let runs = |zero: bool| {
                    let at = |(n, s): (usize, &Option<bool>)| (*s == Some(zero)).then_some((n as u64, n as u64 + 1));
                    own.iter().enumerate().filter_map(at).collect::<Vec<_>>()
                };
                let (dirty, zeroed) = (runs(false), runs(true));
                for (shown, own) in model.iter_mut().zip(&own) {
                    *shown = own.map_or(*shown, |zero| Some(if zero { 0 } else { fill }));
                }
                let (below, committed, block_size) = (Below::Zero, false, 1);
                layers.push(ViewChanges { data_path: path, dirty, zeroed, below, committed, size, block_size });
            }
            let merged = Merged::of(&layers, size).unwrap();
            let mut shown: Vec<Option<u8>> = vec![None; size as usize];
            for range in &merged.written {
                let mut bytes = vec![0xee; range.len() as usize];
                merged.read(range.start, &mut bytes).unwrap();
                bytes.iter().zip(range.start..).for_each(|(b, at)| shown[at as usize] = Some(*b));
            }
            for range in &merged.zeroed {
                (range.start..range.end).for_each(|at| assert!(shown[at as usize].replace(0).is_none()));
            }
            assert_eq!(shown, model, "round {round}");
            assert_eq!(merged.is_empty(), model.iter().all(Option::is_none));
        }
    }
}
