use super::*;

fn key(pack: u64, number: u16) -> Key {
    Key { pack: PackId { sequence: pack, random: pack.wrapping_mul(0x9e37_79b9_7f4a_7c15) }, number }
}

fn fill(index: &mut Index, key: Key) -> u32 {
    let slot = index.reserve().unwrap();
    index.publish(slot, key, 1 << 20);
    slot
}

#[test]
fn keeps_to_its_limit_and_finds_what_it_holds() {
    let mut index = Index::new(100);
    for pack in 0..50 {
        for number in 0..10 {
            let slot = fill(&mut index, key(pack, number));
            assert_eq!(index.find(&key(pack, number)), Some(slot));
            assert!(index.room().0 <= 100);
        }
    }
    assert_eq!(index.evicted, 400);
    let held = (0..50).flat_map(|p| (0..10).map(move |n| key(p, n))).filter(|k| index.find(k).is_some()).count();
    assert_eq!((held, index.room()), (100, (100, 100)));
    assert_eq!(index.packs.len() - index.free_packs.len(), index.by_id.len());
    let kept = (0..50).map(|pack| key(pack, 0).pack).filter(|id| index.pack_size(*id).is_some()).count();
    assert_eq!(kept, index.by_id.len());
}

#[test]
fn what_is_pinned_stays_and_no_more_is_pinned_than_there_is_room() {
    let mut index = Index::new(10);
    let pinned: Vec<Key> = (0..4).map(|number| key(1, number)).collect();
    fill(&mut index, pinned[0]);
    index.pin(&pinned).unwrap();
    for number in 0..100 {
        fill(&mut index, key(2, number));
    }
    assert!(index.find(&pinned[0]).is_some(), "pinned while it was here");
    fill(&mut index, pinned[1]);
    for number in 0..100 {
        fill(&mut index, key(3, number));
    }
    assert!(index.find(&pinned[1]).is_some(), "pinned before it came");
    let more: Vec<Key> = (0..8).map(|number| key(4, number)).collect();
    assert_eq!(index.pin(&more), Err(2));
    assert_eq!(index.pinned(), 4, "all or none");
    index.pin(&more[..6]).unwrap();
    assert_eq!(index.set_limit(9), Err(10));
    more[..6].iter().filter(|k| index.find(k).is_none()).copied().collect::<Vec<_>>().into_iter().for_each(|k| {
        fill(&mut index, k);
    });
    fill(&mut index, pinned[2]);
    fill(&mut index, pinned[3]);
    assert_eq!(index.reserve(), None, "all is pinned");
    // Pinned twice, unpinned once: still pinned.
    index.pin(&pinned[..1]).unwrap();
    index.unpin(&pinned);
    assert!((0..20).filter_map(|_| index.reserve()).count() == 3, "three of the four may go");
    assert!(index.find(&pinned[0]).is_some());
}

#[test]
fn shrinks_and_comes_back_after_a_restart() {
    let mut index = Index::new(20);
    (0..20).for_each(|number| _ = fill(&mut index, key(1, number)));
    index.set_limit(5).unwrap();
    let mut gone = 0;
    while let Some(slot) = index.evict_surplus() {
        index.give_back(slot);
        gone += 1;
    }
    assert_eq!((gone, index.room()), (15, (5, 5)));

    let mut index = Index::new(3);
    assert!(index.restore(2, key(1, 0), 7));
    assert!(!index.restore(3, key(1, 0), 7), "twice");
    assert!(index.restore(4, key(1, 1), 7));
    assert!(index.restore(7, key(1, 2), 7));
    assert!(!index.restore(8, key(1, 3), 7), "beyond the limit");
    assert_eq!((index.find(&key(1, 2)), index.pack_size(key(1, 0).pack)), (Some(7), Some(7)));
    let reused = fill(&mut index, key(9, 0));
    assert!([2, 4, 7].contains(&reused), "one had to go: {reused}");
    let slot = index.take(&key(9, 0)).unwrap();
    index.give_back(slot);
    assert_eq!((index.find(&key(9, 0)), index.pack_size(key(9, 0).pack)), (None, None));
}

#[test]
fn a_million_chunks_take_forty_megabytes_at_most() {
    let mut index = Index::new(1 << 20);
    for number in 0..1u64 << 20 {
        fill(&mut index, key(number / 256, (number % 256) as u16));
    }
    let each = index.memory() as f64 / f64::from(1 << 20);
    assert!((20.0..=40.0).contains(&each), "{each} bytes a chunk");
    println!("{each:.1} bytes a chunk");
}
