use super::*;

fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::new(start, end)
}

#[test]
fn subtracting_cuts_holes() {
    let from = [range(0, 10), range(20, 30), range(40, 50), range(60, 61)];
    let cases: [(&[ByteRange], &[ByteRange]); 5] = [
        (&[], &from),
        (&[range(0, 100)], &[]),
        (&[range(5, 45)], &[range(0, 5), range(45, 50), range(60, 61)]),
        (&[range(0, 2), range(8, 10), range(30, 40)], &[range(2, 8), range(20, 30), range(40, 50), range(60, 61)]),
        (
            &[range(12, 15), range(22, 23), range(25, 26), range(60, 61)],
            &[range(0, 10), range(20, 22), range(23, 25), range(26, 30), range(40, 50)],
        ),
    ];
    for (what, left) in cases {
        assert_eq!(subtract(&from, what), left, "without {what:?}");
    }
}

#[test]
fn ranges_join_over_small_gaps() {
    let mut list = Vec::new();
    for next in [range(0, 4), range(4, 6), range(8, 9), range(20, 21)] {
        push(&mut list, next, 2);
    }
    assert_eq!(list, [range(0, 9), range(20, 21)]);
}
