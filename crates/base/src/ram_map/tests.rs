use super::*;

/// A small deterministic generator (splitmix64), so that a failure names its seed.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[test]
fn random_sets_agree_with_an_array_of_pages() {
    for seed in 0..200 {
        let mut state = seed;
        let pages = 1 + next(&mut state) % 64;
        let mut map = RamMap::zero(pages * PAGE);
        let mut model = vec![Source::Zero; pages as usize];
        for _ in 0..30 {
            let start = next(&mut state) % pages;
            let end = start + next(&mut state) % (pages - start + 1);
            let source = match next(&mut state) % 4 {
                0 => Source::Zero,
                id => Source::File(RamFileId(id)),
            };
            map.set(ByteRange::new(start * PAGE, end * PAGE), source);
            model[start as usize..end as usize].fill(source);
            for (page, &want) in model.iter().enumerate() {
                assert_eq!(map.lookup(page as u64 * PAGE).0, want, "seed {seed} page {page}");
            }
            let extents: Vec<_> = map.extents().collect();
            assert!(extents.windows(2).all(|w| w[0].1 != w[1].1), "seed {seed}: neighbours must differ");
            assert_eq!(RamMap::decode(&map.encode()).as_ref(), Ok(&map), "seed {seed}");
        }
    }
}

#[test]
fn bad_text_is_refused_by_line() {
    for (text, part) in [
        ("", "empty"),
        ("offshoot-ram-map 2 4096\n", "header"),
        ("offshoot-ram-map 1 8192\nzero 0 4096\n", "ends at 4096"),
        ("offshoot-ram-map 1 8192\nzero 0 4096\nzero 8192 12288\n", "line 3"),
        ("offshoot-ram-map 1 8192\nzero 0 100\n", "line 2"),
        ("offshoot-ram-map 1 4096\nfile 0 4096 zz\n", "bad id"),
        ("offshoot-ram-map 1 4096\nlink 0 4096\n", "unknown"),
    ] {
        let error = RamMap::decode(text).unwrap_err();
        assert!(error.contains(part), "{text:?}: {error}");
    }
}
