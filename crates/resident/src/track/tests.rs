use super::*;

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::new(start, end)
}

#[test]
fn ranges_join_over_small_gaps() {
    let mut list = Vec::new();
    for next in [range(0, 4), range(4, 6), range(8, 9), range(20, 21)] {
        push(&mut list, next, 2);
    }
    assert_eq!(list, [range(0, 9), range(20, 21)]);
}
