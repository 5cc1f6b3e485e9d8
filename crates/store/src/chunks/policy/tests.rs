use super::*;
use proptest::prelude::*;
use std::collections::{HashMap, VecDeque};

/// S3-FIFO as its paper writes it down, with plain queues. Content `n` has hash [`hash_of`]`(n)`.
struct Model {
    limit: usize,
    small: VecDeque<u64>,
    main: VecDeque<u64>,
    ghost: Ghost,
    used: HashMap<u64, (u8, u64)>,
    pinned: Vec<u64>,
    insertions: u64,
}

fn hash_of(content: u64) -> u64 {
    content.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ content.wrapping_mul(0xbf58_476d_1ce4_e5b9).rotate_left(32)
}

impl Model {
    fn target(&self) -> usize {
        (self.limit / 10).max(1)
    }

    fn period(&self) -> u64 {
        self.insertions.checked_div(self.target() as u64 / 8).unwrap_or(0)
    }

    fn insert(&mut self, content: u64) {
        self.insertions += 1;
        self.used.insert(content, (0, self.period()));
        let to = if self.ghost.take(hash_of(content)) { &mut self.main } else { &mut self.small };
        to.push_back(content);
    }

    fn touch(&mut self, content: u64) {
        let (period, apart) = (self.period(), self.target() / 8 > 0);
        if self.pinned.contains(&content) {
            return;
        }
        if let Some((frequency, last)) = self.used.get_mut(&content)
            // Periods are told apart by their low eight bits.
            && (!apart || (period as u8).wrapping_sub(*last as u8) >= 2)
        {
            (*frequency, *last) = ((*frequency + 1).min(3), period);
        }
    }

    fn evict(&mut self) -> Option<u64> {
        loop {
            if self.small.len() >= self.target() || self.main.is_empty() {
                let content = self.small.pop_front()?;
                let frequency = &mut self.used.get_mut(&content)?.0;
                if *frequency == 0 {
                    self.ghost.add(hash_of(content));
                    self.used.remove(&content);
                    return Some(content);
                }
                *frequency = 0;
                self.main.push_back(content);
            } else {
                let content = self.main.pop_front()?;
                let frequency = &mut self.used.get_mut(&content)?.0;
                if *frequency == 0 {
                    self.used.remove(&content);
                    return Some(content);
                }
                *frequency -= 1;
                self.main.push_back(content);
            }
        }
    }

    fn forget(&mut self, content: u64) {
        self.small.retain(|there| *there != content);
        self.main.retain(|there| *there != content);
    }
}

#[derive(Clone, Debug)]
enum Op {
    /// Use it where it is there, else bring it in.
    Ask(u64),
    Drop(u64),
    Pin(u64),
    Unpin,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let one = prop_oneof![
        20 => (0u64..60).prop_map(Op::Ask),
        5 => (0u64..2000).prop_map(Op::Ask),
        1 => (0u64..60).prop_map(Op::Drop),
        1 => (0u64..60).prop_map(Op::Pin),
        1 => Just(Op::Unpin),
    ];
    proptest::collection::vec(one, 1..1500)
}

/// Slot numbers by content, as the index would keep them.
#[derive(Default)]
struct Slots {
    of: HashMap<u64, u32>,
    free: Vec<u32>,
    next: u32,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn evicts_what_the_paper_evicts(limit in 1usize..200, ops in ops()) {
        let mut policy = Policy::new(limit);
        let mut model = Model {
            limit,
            small: VecDeque::new(),
            main: VecDeque::new(),
            ghost: Ghost::new(limit),
            used: HashMap::new(),
            pinned: Vec::new(),
            insertions: 0,
        };
        let mut slots = Slots::default();
        for op in ops {
            match op {
                Op::Ask(content) => match slots.of.get(&content) {
                    Some(&slot) => {
                        policy.touch(slot);
                        model.touch(content);
                    }
                    None => {
                        if slots.of.len() == limit {
                            let content_of = |slot: u32| *slots.of.iter().find(|(_, s)| **s == slot).unwrap().0;
                            let gone = policy.evict(|slot| hash_of(content_of(slot))).map(content_of);
                            prop_assert_eq!(gone, model.evict());
                            let Some(gone) = gone else { continue };
                            slots.free.push(slots.of.remove(&gone).unwrap());
                        }
                        let slot = slots.free.pop().unwrap_or_else(|| {
                            slots.next += 1;
                            slots.next - 1
                        });
                        slots.of.insert(content, slot);
                        policy.insert(slot, hash_of(content));
                        model.insert(content);
                    }
                },
                Op::Drop(content) if !model.pinned.contains(&content) => {
                    if let Some(slot) = slots.of.remove(&content) {
                        policy.remove(slot);
                        model.forget(content);
                        model.used.remove(&content);
                        slots.free.push(slot);
                    }
                }
                Op::Pin(content) if !model.pinned.contains(&content) => {
                    if let Some(&slot) = slots.of.get(&content) {
                        policy.remove(slot);
                        model.forget(content);
                        model.pinned.push(content);
                    }
                }
                Op::Unpin => {
                    if let Some(content) = model.pinned.pop() {
                        policy.insert_main(slots.of[&content]);
                        model.main.push_back(content);
                        let period = model.period();
                        model.used.insert(content, (0, period));
                    }
                }
                Op::Drop(_) | Op::Pin(_) => {}
            }
            prop_assert_eq!(policy.small.len, model.small.len());
            prop_assert_eq!(policy.main.len, model.main.len());
            prop_assert!(slots.of.len() <= limit);
        }
    }
}

/// Runs `asked` through a cache of `limit` slots; how many of those from `counted` on were there.
fn hits(limit: usize, asked: impl Iterator<Item = u64>, counted: impl Fn(u64) -> bool) -> (u64, u64) {
    let mut policy = Policy::new(limit);
    let mut content_of: Vec<u64> = Vec::new();
    let mut slot_of: HashMap<u64, u32> = HashMap::new();
    let (mut hits, mut all) = (0, 0);
    for content in asked {
        let found = slot_of.get(&content).copied();
        if counted(content) {
            all += 1;
            hits += u64::from(found.is_some());
        }
        if let Some(slot) = found {
            policy.touch(slot);
            continue;
        }
        let slot = if content_of.len() < limit {
            content_of.push(content);
            content_of.len() as u32 - 1
        } else {
            let slot = policy.evict(|slot| hash_of(content_of[slot as usize])).unwrap();
            slot_of.remove(&content_of[slot as usize]);
            content_of[slot as usize] = content;
            slot
        };
        slot_of.insert(content, slot);
        policy.insert(slot, hash_of(content));
    }
    (hits, all)
}

#[test]
fn a_scan_that_reads_every_chunk_many_times_drives_out_nothing_that_is_used() {
    // 600 chunks that are used again and again, then a scan of 20,000 chunks, each read 20 times in a row.
    let hot = || (0..600u64).cycle();
    let scan = (0..20_000u64).flat_map(|chunk| std::iter::repeat_n(1_000_000 + chunk, 20));
    let asked = hot().take(600 * 8).chain(scan).chain(hot().take(600));
    let (hits, all) = hits(1000, asked, |content| content < 1000);
    // The first round misses; of the rest nearly all are there, the round after the scan included.
    assert_eq!(all, 600 * 9);
    assert!(hits >= 600 * 8 - 60, "{hits} of {all}");
}

#[test]
fn the_ghost_remembers_about_as_many_as_there_are_slots() {
    let mut ghost = Ghost::new(1024);
    (0..1024).for_each(|content| ghost.add(hash_of(content)));
    let remembered = (0..1024).filter(|content| ghost.take(hash_of(*content))).count();
    assert!(remembered > 750, "{remembered}");
    assert!(!(0..1024).any(|content| ghost.take(hash_of(content))), "each is taken once");
    (0..10_000).for_each(|content| ghost.add(hash_of(content)));
    assert!(!(0..4000).any(|content| ghost.take(hash_of(content))), "the oldest are forgotten");
}
