use super::*;

fn ranges(blocks: &[(u64, u64)]) -> Vec<ByteRange> {
    blocks.iter().map(|(start, end)| ByteRange::new(start * 4096, end * 4096)).collect()
}

fn planned(written: &[(u64, u64)], zeroed: &[(u64, u64)]) -> Vec<(u64, u64, bool)> {
    struct Nothing;
    impl BlockSource for Nothing {
        fn read(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
            Ok(())
        }
    }
    let base = Version { root: Name::zero(2), size: 100 * 4096, block_size: 4096 };
    let (written, zeroed) = (ranges(written), ranges(zeroed));
    let changes =
        Changes { written: &written, zeroed: &zeroed, source: &Nothing, threads: 1, progress: None, cancel: None };
    plan(&base, &changes).unwrap().into_iter().map(|s| (s.blocks.start, s.blocks.end, s.written)).collect()
}

#[test]
fn written_wins_over_zeroed() {
    assert_eq!(planned(&[(5, 15)], &[(10, 20)]), [(5, 15, true), (15, 20, false)]);
    assert_eq!(planned(&[(12, 15)], &[(10, 20)]), [(10, 12, false), (12, 15, true), (15, 20, false)]);
    assert_eq!(planned(&[(5, 30)], &[(10, 20), (25, 35)]), [(5, 30, true), (30, 35, false)]);
    assert_eq!(planned(&[(0, 2), (40, 41)], &[(10, 20)]), [(0, 2, true), (10, 20, false), (40, 41, true)]);
    assert_eq!(planned(&[(10, 20)], &[(10, 20)]), [(10, 20, true)]);
    assert_eq!(planned(&[], &[(1, 2)]), [(1, 2, false)]);
}

#[test]
fn zero_is_told_from_almost_zero() {
    let mut block = vec![0; 4096];
    assert!(is_zero(&block));
    for at in [0, 1, 255, 256, 4095] {
        block[at] = 1;
        assert!(!is_zero(&block), "{at}");
        block[at] = 0;
    }
}
