//! The tree against a plain vector, and its costs in nodes.

use super::*;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};

/// Nodes in a map, with counted loads.
#[derive(Default)]
struct Shelf {
    nodes: RefCell<HashMap<Name, Arc<Node>>>,
    loads: Cell<usize>,
    puts: Cell<usize>,
}

fn hash(bytes: &[u8]) -> Name {
    Name(*blake3::hash(bytes).as_bytes())
}

fn block(value: u64) -> Name {
    hash(&value.to_le_bytes())
}

impl Nodes for Shelf {
    type Error = String;
    fn load(&self, name: &Name, height: u8) -> Result<Arc<Node>, String> {
        self.loads.set(self.loads.get() + 1);
        let node = self.nodes.borrow().get(name).cloned().ok_or_else(|| format!("no node {name}"))?;
        assert_eq!(node.height(), height);
        Ok(node)
    }
}

impl Sink<String> for &Shelf {
    fn put(&mut self, node: &Node, _fresh: u16) -> Result<Name, String> {
        self.puts.set(self.puts.get() + 1);
        let bytes = node.encode();
        assert_eq!(Node::decode(&bytes).as_ref(), Some(node));
        let name = hash(&bytes);
        self.nodes.borrow_mut().insert(name, Arc::new(node.clone()));
        Ok(name)
    }
}

#[derive(Clone, Debug)]
enum Op {
    Set(u64, u64),
    Zero(Range<u64>),
}

fn apply(shelf: &Shelf, base: Tree, ops: &[Op]) -> Tree {
    let mut update = Update::new(shelf, base).unwrap();
    let mut sink = shelf;
    for op in ops {
        match op {
            Op::Set(at, value) => {
                update.set(*at, block(*value), &mut sink).unwrap();
            }
            Op::Zero(range) => update.zero(range.clone(), &mut sink).unwrap(),
        }
    }
    Tree { name: update.finish(&mut sink).unwrap().root, height: base.height }
}

fn contents(shelf: &Shelf, tree: Tree, range: Range<u64>) -> BTreeMap<u64, Name> {
    let mut out = BTreeMap::new();
    let mut at = range.start;
    walk(shelf, tree, range.clone(), &mut |run| {
        assert_eq!(run.start, at, "runs follow one another");
        at += run.blocks;
        if let Some(name) = run.name {
            out.insert(run.start, name);
        }
        true
    })
    .unwrap();
    assert_eq!(at, range.end);
    out
}

use proptest::prelude::*;

/// Ascending, disjoint changes over `blocks` blocks.
fn ops(blocks: u64) -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        4 => (0..blocks, 1u64..6).prop_map(|(at, value)| Op::Set(at, value)),
        1 => (0..blocks, 1..blocks).prop_map(move |(at, len)| Op::Zero(at..(at + len).min(blocks))),
    ];
    proptest::collection::vec(op, 0..40).prop_map(|mut ops| {
        ops.sort_by_key(|op| match op {
            Op::Set(at, _) => *at,
            Op::Zero(range) => range.start,
        });
        let mut next = 0;
        ops.retain(|op| {
            let (start, end) = match op {
                Op::Set(at, _) => (*at, at + 1),
                Op::Zero(range) => (range.start, range.end),
            };
            let keep = start >= next;
            if keep {
                next = end;
            }
            keep
        });
        ops
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn behaves_as_a_vector_through_versions(
        (blocks, rounds, window) in (1u64..5000).prop_flat_map(|blocks| {
            (Just(blocks), proptest::collection::vec(ops(blocks), 1..6), (0..blocks, 0..blocks))
        })
    ) {
        let shelf = Shelf::default();
        let mut tree = Tree { name: None, height: height_of(blocks) };
        let mut model: BTreeMap<u64, Name> = BTreeMap::new();
        let mut history = vec![(tree, model.clone())];
        for ops in rounds {
            tree = apply(&shelf, tree, &ops);
            for op in ops {
                match op {
                    Op::Set(at, value) => { model.insert(at, block(value)); }
                    Op::Zero(range) => model.retain(|at, _| !range.contains(at)),
                }
            }
            history.push((tree, model.clone()));
        }
        let window = window.0.min(window.1)..window.0.max(window.1);
        for (tree, model) in &history {
            prop_assert_eq!(&contents(&shelf, *tree, 0..blocks), model);
            let part: BTreeMap<_, _> = model.range(window.clone()).map(|(k, v)| (*k, *v)).collect();
            prop_assert_eq!(contents(&shelf, *tree, window.clone()), part);
            // Equal contents have equal roots, however they came about.
            let ops: Vec<Op> = Vec::new();
            prop_assert_eq!(apply(&shelf, *tree, &ops), *tree);
            let (last, last_model) = history.last().unwrap();
            prop_assert_eq!(tree.name == last.name, model == last_model);
            let mut found = Vec::new();
            diff(&shelf, *tree, *last, &mut |at| found.push(at)).unwrap();
            let expected: Vec<u64> = (0..blocks).filter(|at| model.get(at) != last_model.get(at)).collect();
            prop_assert_eq!(found, expected);
        }
    }
}

fn full(shelf: &Shelf, blocks: u64) -> Tree {
    let ops: Vec<Op> = (0..blocks).map(|at| Op::Set(at, at)).collect();
    apply(shelf, Tree { name: None, height: height_of(blocks) }, &ops)
}

#[test]
fn a_write_makes_one_node_a_level_and_a_diff_visits_only_those() {
    let shelf = Shelf::default();
    let base = full(&shelf, 65536);
    assert_eq!((base.height, shelf.puts.get()), (4, 4096 + 256 + 16 + 1));
    shelf.puts.set(0);
    shelf.loads.set(0);
    let changed = apply(&shelf, base, &[Op::Set(40_000, 7)]);
    assert_eq!((shelf.puts.get(), shelf.loads.get()), (4, 4));
    shelf.loads.set(0);
    let mut found = Vec::new();
    diff(&shelf, base, changed, &mut |at| found.push(at)).unwrap();
    assert_eq!((found, shelf.loads.get()), (vec![40_000], 8));
    shelf.loads.set(0);
    diff(&shelf, base, base, &mut |_| panic!("equal trees do not differ")).unwrap();
    assert_eq!(shelf.loads.get(), 0, "a clone is compared by its name alone");
}

#[test]
fn zeroing_everything_touches_the_root_alone() {
    let shelf = Shelf::default();
    let base = full(&shelf, 65536);
    shelf.puts.set(0);
    shelf.loads.set(0);
    assert_eq!(apply(&shelf, base, &[Op::Zero(0..65536)]).name, None);
    assert_eq!((shelf.puts.get(), shelf.loads.get()), (0, 1));
    let empty = Tree { name: None, height: 4 };
    assert_eq!(apply(&shelf, empty, &[Op::Zero(3..40_000)]), empty);
    assert_eq!((shelf.puts.get(), shelf.loads.get()), (0, 1), "zero over zero opens nothing");
}

#[test]
fn trees_of_different_height_compare_with_zero_beyond_the_end() {
    let shelf = Shelf::default();
    let small = full(&shelf, 16);
    let mut ops: Vec<Op> = (0..16).map(|at| Op::Set(at, at)).collect();
    ops.extend([Op::Set(17, 1), Op::Set(4000, 1)]);
    let large = apply(&shelf, Tree { name: None, height: 3 }, &ops);
    let mut found = Vec::new();
    diff(&shelf, small, large, &mut |at| found.push(at)).unwrap();
    diff(&shelf, large, small, &mut |at| found.push(at)).unwrap();
    assert_eq!(found, [17, 4000, 17, 4000]);
}

#[test]
fn a_grafted_subtree_is_found_again_whatever_lies_beside_it() {
    let shelf = Shelf::default();
    let mut sink = &shelf;
    // Versions of height 3 in slots of height 4, as a history keeps them.
    let versions: Vec<Tree> =
        (0..300).map(|n| apply(&shelf, Tree { name: None, height: 3 }, &[Op::Set(n, n)])).collect();
    let mut slots = Tree { name: None, height: 7 };
    for (number, version) in versions.iter().enumerate() {
        shelf.puts.set(0);
        let mut update = Update::new(&shelf, slots).unwrap();
        assert!(update.graft(3, number as u64 * 16, version.name.unwrap(), &mut sink).unwrap());
        slots.name = update.finish(&mut sink).unwrap().root;
        assert_eq!(shelf.puts.get(), 4, "one path, however many there are");
    }
    for (number, version) in versions.iter().enumerate() {
        shelf.loads.set(0);
        assert_eq!(subtree(&shelf, slots, 3, number as u64 * 16).unwrap(), *version);
        assert_eq!(shelf.loads.get(), 4);
        assert_eq!(subtree(&shelf, slots, 3, number as u64 * 16 + 1).unwrap(), Tree { name: None, height: 3 });
    }
    assert_eq!(subtree(&shelf, slots, 7, 0).unwrap(), slots);
    // What is there already is not put again, and a slot made zero is gone from the tree.
    let mut update = Update::new(&shelf, slots).unwrap();
    assert!(!update.graft(3, 32, versions[2].name.unwrap(), &mut sink).unwrap());
    update.zero(span(4) * 5..span(4) * 6, &mut sink).unwrap();
    slots.name = update.finish(&mut sink).unwrap().root;
    assert_eq!(subtree(&shelf, slots, 3, 5 * 16).unwrap().name, None);
    assert_eq!(subtree(&shelf, slots, 3, 6 * 16).unwrap(), versions[6]);
}

#[test]
fn an_abandoned_update_names_what_it_held() {
    let shelf = Shelf::default();
    let mut sink = &shelf;
    let mut update = Update::new(&shelf, Tree { name: None, height: 2 }).unwrap();
    for at in [1, 2, 17] {
        update.set(at, block(at), &mut sink).unwrap();
    }
    let held = update.abandon();
    assert_eq!(held.len(), 2, "the closed node, and the block in the open one: {held:?}");
    assert_eq!((held[0].1, held[1]), (1, (block(17), 0)));
}

#[test]
fn hostile_encodings_are_refused() {
    let mut children = [None; FANOUT];
    children[3] = Some(block(1));
    let good = Node::new(2, &children).encode();
    assert!(Node::decode(&good).is_some());
    assert!(Node::decode(&good[..good.len() - 1]).is_none());
    assert!(Node::decode(&[good.as_slice(), &[0]].concat()).is_none());
    for (at, value) in [(0, 0), (0, 17), (1, 0)] {
        let mut bad = good.clone();
        bad[at] = value;
        assert!(Node::decode(&bad).is_none(), "byte {at} = {value}");
    }
    let mut zero_child = good;
    zero_child[3..].fill(0);
    assert!(Node::decode(&zero_child).is_none());
}
