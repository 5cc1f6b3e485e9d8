//! How a frozen RAM is put together: pure arithmetic on RAM maps.

use base::{ByteRange, RamFileId, RamMap, Source};

/// The most ancestors' files a VM maps: beyond, the smallest contributors are taken through the newest file.
pub const FILES_MAX: usize = 24;

/// The map of a RAM frozen now: `before`, with what was discarded since as zero and what was written since in the
/// new file `id`. A page that is both was written last.
#[must_use]
pub fn frozen(before: &RamMap, written: &[ByteRange], zeroed: &[ByteRange], id: RamFileId) -> RamMap {
    let mut map = before.clone();
    for range in zeroed {
        map.set(*range, Source::Zero);
    }
    for range in written {
        map.set(*range, Source::File(id));
    }
    map
}

/// The map a VM starts with from `exact`, the map of file `id`: equal in content, with at most `extents_max`
/// extents and [`FILES_MAX`] files. The file `id` can answer for every page, because the mirror looks into the
/// exact map, so any extent may be taken through it: that page is then held once more, which is why the
/// smallest go first.
#[must_use]
pub fn start(exact: &RamMap, id: RamFileId, extents_max: usize) -> RamMap {
    let mut map = exact.clone();
    let mut files: Vec<(u64, RamFileId)> =
        map.files().into_iter().filter(|&(file, _)| file != id).map(|(file, bytes)| (bytes, file)).collect();
    files.sort_unstable();
    for &(_, file) in files.iter().take(files.len().saturating_sub(FILES_MAX)) {
        let folded: Vec<ByteRange> = map.extents().filter(|&(_, s)| s == Source::File(file)).map(|(r, _)| r).collect();
        for range in folded {
            map.set(range, Source::File(id));
        }
    }
    let mut gap = 2 * base::PAGE;
    while map.len() > extents_max {
        let small: Vec<ByteRange> =
            map.extents().filter(|&(r, s)| s != Source::File(id) && r.len() < gap).map(|(r, _)| r).collect();
        for range in small {
            map.set(range, Source::File(id));
        }
        gap *= 2;
    }
    map
}

/// The same content out of the one file `id`, which can answer for every page.
#[must_use]
pub fn whole(map: &RamMap, id: RamFileId) -> RamMap {
    let mut out = map.clone();
    let others: Vec<ByteRange> = map.extents().filter(|&(_, s)| s != Source::Zero).map(|(r, _)| r).collect();
    for range in others {
        out.set(range, Source::File(id));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::PAGE;

    fn page(n: u64) -> ByteRange {
        ByteRange::at(n * PAGE, PAGE)
    }

    #[test]
    fn written_wins_over_zeroed_and_the_rest_stays_with_its_ancestor() {
        let one = frozen(&RamMap::zero(8 * PAGE), &[ByteRange::new(0, 6 * PAGE)], &[], RamFileId(1));
        let two = frozen(&one, &[page(2)], &[ByteRange::new(2 * PAGE, 4 * PAGE)], RamFileId(2));
        let sources: Vec<Source> = (0..8).map(|p| two.lookup(p * PAGE).0).collect();
        let (zero, f1, f2) = (Source::Zero, Source::File(RamFileId(1)), Source::File(RamFileId(2)));
        assert_eq!(sources, [f1, f1, f2, zero, f1, f1, zero, zero]);
    }

    #[test]
    fn many_generations_and_many_small_extents_stay_bounded() {
        let pages = 4096;
        let mut map = RamMap::zero(pages * PAGE);
        for generation in 1..100 {
            let written: Vec<ByteRange> = (0..pages).filter(|p| p % (generation + 1) == 0).map(page).collect();
            map = frozen(&map, &written, &[], RamFileId(generation));
            let start = start(&map, RamFileId(generation), 500);
            assert!(
                start.len() <= 500 && start.files().len() <= FILES_MAX + 1,
                "generation {generation}: {}",
                start.len()
            );
            for p in written {
                assert_eq!(start.lookup(p.start).0, Source::File(RamFileId(generation)));
            }
        }
    }
}
