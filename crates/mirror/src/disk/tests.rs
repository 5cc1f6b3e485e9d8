use super::layer::{Blank, Layer, is_zero};
use super::states::{CHUNK, State, StateMap};
use crate::home::Home;

#[test]
fn runs_of_states_cross_chunks_and_skip_untouched_ones() {
    let map = StateMap::new(5 * CHUNK + 10);
    assert_eq!(map.run(0, 5 * CHUNK + 10), (State::Absent, 5 * CHUNK + 10));
    map.set(CHUNK - 1..CHUNK + 2, State::Dirty);
    map.set(3 * CHUNK..3 * CHUNK + 1, State::Clean);
    assert_eq!(map.run(0, 5 * CHUNK), (State::Absent, CHUNK - 1));
    assert_eq!(map.run(CHUNK, 5 * CHUNK), (State::Dirty, CHUNK + 2));
    assert_eq!(map.run(CHUNK + 2, 5 * CHUNK), (State::Absent, 3 * CHUNK));
    let runs: Vec<_> = map.runs().collect();
    assert_eq!(runs, [(State::Dirty, CHUNK - 1..CHUNK + 2), (State::Clean, 3 * CHUNK..3 * CHUNK + 1)]);
}

#[test]
fn touched_chunks_are_taken_once_and_given_back() {
    let map = StateMap::new(2 * CHUNK);
    map.set(0..1, State::Dirty);
    let (taken, more) = map.take_touched(0, 9);
    assert_eq!((taken.len(), taken[0].0, &taken[0].1[..2]), (1, 0, [State::Dirty as u8, 0].as_slice()));
    assert_eq!((map.take_touched(0, 9), more), ((vec![], None), None));
    map.set(CHUNK..CHUNK + 1, State::CleanZero);
    map.touch_again(&taken);
    assert_eq!(map.take_touched(0, 1), (taken, Some(1)));
    let (rest, more) = map.take_touched(1, 1);
    assert_eq!((rest.len(), rest[0].0, rest[0].1[0], more), (1, 1, State::CleanZero as u8, None));
}

#[test]
fn zero_is_told_from_nearly_zero() {
    for len in [0, 1, 15, 16, 17, 4096] {
        let mut bytes = vec![0; len];
        assert!(is_zero(&bytes), "{len}");
        for at in 0..len {
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "{len} with a one at {at}");
            bytes[at] = 0;
        }
    }
}

fn home(dir: &tempfile::TempDir) -> Home {
    let home = Home::prepare_for_boot(dir.path(), "boot").unwrap();
    home.reset_live().unwrap();
    home
}

#[test]
fn what_is_kept_never_replaces_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let layer = {
        let home = home(&dir);
        Layer::create(&home, Blank::open(&home, 20).unwrap(), 8, 4096).unwrap()
    };
    layer.hold(2..3).write_blocks(2, &[2; 4096]).unwrap();
    layer.hold(3..4).zero_blocks(3..4, false).unwrap();
    layer.hold(0..8).keep(0, &[9; 8 * 4096]).unwrap();
    let states: Vec<State> = (0..5).map(|b| layer.run(b, b + 1).0).collect();
    assert_eq!(states, [State::Clean, State::Clean, State::Dirty, State::DirtyZero, State::Clean]);
    let mut block = [0; 4096];
    layer.read_data(2 * 4096, &mut block).unwrap();
    assert_eq!(block, [2; 4096]);
}

#[test]
fn an_older_flush_does_not_undo_a_newer_one() {
    let dir = tempfile::tempdir().unwrap();
    let home = home(&dir);
    let layer = Layer::create(&home, Blank::open(&home, 20).unwrap(), 2 * CHUNK, 512).unwrap();
    std::thread::scope(|s| {
        for thread in 0..4 {
            let layer = &layer;
            s.spawn(move || {
                for block in (thread..400).step_by(4) {
                    layer.hold(block..block + 1).write_blocks(block, &[block as u8; 512]).unwrap();
                    layer.sync().unwrap();
                    let durable = std::fs::read(layer.data_path().with_extension("map")).unwrap();
                    assert_eq!(durable[block as usize], State::Dirty as u8, "block {block} is flushed");
                }
            });
        }
    });
    drop(layer);
    let again = Layer::open_durable(&home, 20, 2 * CHUNK, 512).unwrap();
    assert_eq!(again.run(0, 2 * CHUNK), (State::Dirty, 400));
}

mod fuzz {
    use super::*;
    use crate::edits::{SMALL, within};

    #[test]
    fn states() {
        const BLOCKS: u64 = 48;
        let dir = tempfile::tempdir().unwrap();
        let (live, durable) = {
            let home = home(&dir);
            let layer = Layer::create(&home, Blank::open(&home, 20).unwrap(), BLOCKS, 512).unwrap();
            layer.hold(2..3).write_blocks(2, &[2; 512]).unwrap();
            layer.hold(3..9).zero_blocks(3..9, false).unwrap();
            layer.hold(20..30).keep(20, &[9; 10 * 512]).unwrap();
            layer.sync().unwrap();
            (home.layer_live_states(20), home.layer_durable_states(20))
        };
        fuzz!([live, durable].map(|path| std::fs::read(path).unwrap()).to_vec(), |bytes, _| {
            let dir = tempfile::tempdir_in("/dev/shm").unwrap();
            let home = home(&dir);
            drop(Layer::create(&home, Blank::open(&home, 20).unwrap(), BLOCKS, 512).unwrap());
            let code =
                |block: u64| bytes.get(block as usize).map_or(Some(State::Absent), |code| State::from_code(*code));
            // Bytes behind the last block say nothing only where they are zero.
            let right = (0..BLOCKS.max(bytes.len() as u64)).all(|b| match code(b) {
                Some(state) => b < BLOCKS || state == State::Absent,
                None => false,
            });
            std::fs::write(home.layer_live_states(20), bytes).unwrap();
            let layer = within(bytes.len() + SMALL, || Layer::open_live(&home, 20, BLOCKS, 512));
            assert_eq!(layer.is_ok(), right);
            if let Ok(layer) = layer {
                (0..BLOCKS).for_each(|block| assert_eq!(Some(layer.run(block, block + 1).0), code(block)));
            }
            std::fs::write(home.layer_durable_states(20), bytes).unwrap();
            if let Ok(layer) = within(bytes.len() + SMALL, || Layer::open_durable(&home, 20, BLOCKS, 512)) {
                // What was only cached is not known to have reached the disk.
                let kept = |block: u64| code(block).filter(|state| state.is_dirty()).unwrap_or(State::Absent);
                (0..BLOCKS).for_each(|block| assert_eq!(layer.run(block, block + 1).0, kept(block)));
            }
        });
    }
}
