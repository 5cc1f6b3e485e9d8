use super::*;

fn pages(start: u64, end: u64) -> ByteRange {
    ByteRange::new(start * PAGE, end * PAGE)
}

#[test]
fn a_page_written_after_its_discard_is_written_and_a_zero_page_is_zeroed() {
    let mut zeroed = Bitmap::new(64);
    zeroed.set_range(4, 12);
    let found =
        Written { written: vec![pages(0, 5), pages(7, 8), pages(20, 21)], zero: vec![pages(5, 6), pages(30, 31)] };
    let changes = tracked_changes(found, None, zeroed);
    assert_eq!(changes.written, [pages(0, 5), pages(7, 8), pages(20, 21)]);
    assert_eq!(changes.zeroed, [pages(5, 7), pages(8, 12), pages(30, 31)]);
}

#[test]
fn what_was_found_before_the_pause_counts_unless_zeroed_since() {
    let mut before = Bitmap::new(64);
    before.set_range(0, 3);
    before.set_range(40, 42);
    let found = Written { written: vec![pages(3, 4)], zero: vec![pages(40, 41)] };
    let changes = tracked_changes(found, Some(before), Bitmap::new(64));
    assert_eq!((changes.written, changes.zeroed), (vec![pages(0, 4), pages(41, 42)], vec![pages(40, 41)]));
}

#[test]
fn mappings_of_ram_are_counted_by_where_they_start() {
    let maps = "1000-2000 rw-p 0 00:00 0\n2000-5000 rw-p 0 00:00 0 \n5000-6000 r--p 0 fe:00 9 /lib/x\n";
    assert_eq!(count_mappings(maps, 0x2000, 0x6000), 2);
    assert_eq!(count_mappings(maps, 0x2000, 0x5000), 1);
}
