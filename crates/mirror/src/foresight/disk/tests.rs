use super::*;
use crate::resolve::VersionError;
use crate::resolve::double::Memory;
use std::sync::atomic::AtomicU64;

const BLOCKS: u32 = 4096;

/// Versions that say where blocks lie: so many side by side together.
struct Laid {
    inner: Memory,
    run: usize,
    looked: AtomicU64,
    read: Mutex<Vec<Vec<u64>>>,
}

impl Laid {
    fn new(run: usize) -> Self {
        let inner = Memory::default();
        inner.put("v", vec![7; BLOCKS as usize * PAGE as usize]);
        Self { inner, run, looked: AtomicU64::new(0), read: Mutex::default() }
    }
}

impl Versions for Laid {
    fn read_at(&self, version: &str, offset: u64, buf: &mut [u8]) -> Result<u64, VersionError> {
        self.inner.read_at(version, offset, buf)
    }

    fn together(&self, _: &str, pages: &[u64]) -> Result<Vec<Vec<u64>>, VersionError> {
        // Laid down since, for whoever looks.
        let run = if self.looked.load(Ordering::Acquire) > 0 { 256 } else { self.run };
        Ok(pages.chunks(run).map(<[u64]>::to_vec).collect())
    }

    fn look_again(&self) {
        self.looked.fetch_add(1, Ordering::AcqRel);
    }

    fn read_pages(&self, version: &str, pages: &[u64], sink: &mut dyn FnMut(u64, &[u8])) -> Result<u64, VersionError> {
        self.read.lock().unwrap().push(pages.to_vec());
        crate::resolve::read_each(self, version, pages, sink)
    }

    fn data_ranges(&self, _: &str, _: ByteRange, _: usize) -> Result<(Vec<ByteRange>, u64), VersionError> {
        unreachable!("nobody asks what is data")
    }
}

/// The groups read, by as many threads as a mirror has.
fn fetched(versions: &Laid, version: &str, plan: &[u32]) -> Vec<Vec<u64>> {
    let stream = Blocks::new(version, plan);
    let bytes = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| stream.work(versions, &|n| _ = bytes.fetch_add(n, Ordering::AcqRel)));
        }
    });
    assert!(stream.is_over());
    versions.read.lock().unwrap().clone()
}

fn plan() -> Vec<u32> {
    (0..3000).map(|n| n * 1009 % BLOCKS).collect()
}

#[test]
fn a_plan_is_fetched_whole_in_groups_each_block_once() {
    let versions = Laid::new(256);
    let groups = fetched(&versions, "v", &plan());
    assert_eq!(versions.looked.load(Ordering::Acquire), 0, "they lie together");
    assert!(groups.len() <= 3000 / 256 + 3, "{} groups", groups.len());
    let mut got: Vec<u64> = groups.into_iter().flatten().map(|at| at / PAGE).collect();
    let mut wanted: Vec<u64> = plan().into_iter().map(u64::from).collect();
    got.sort_unstable();
    wanted.sort_unstable();
    assert_eq!(got, wanted);
}

#[test]
fn blocks_that_lie_apart_are_looked_for_once_more() {
    let versions = Laid::new(2);
    let groups = fetched(&versions, "v", &plan());
    assert_eq!(versions.looked.load(Ordering::Acquire), 1);
    assert!(groups.len() <= 3000 / 256 + 3, "{} groups", groups.len());
}

#[test]
fn a_long_plan_goes_no_further_than_a_bit_beyond_what_was_read() {
    let versions = Laid::new(256);
    // Each block of the disk, and as many again that stand for what lies behind its end.
    let long: Vec<u32> = (0..BLOCKS * 2).collect();
    let reads = Reads::default();
    let stream = Arc::new(Blocks::new("v", &long));
    reads.follow(&stream);
    assert!(reads.is_on() && reads.recording(false).is_err(), "it is not recorded for that");
    let work = || match stream.next().unwrap() {
        Work::LookUp(part) => {
            stream.look_up(&versions, part.clone()).unwrap();
            part.len()
        }
        Work::Fetch(group) => {
            stream.fetch(&versions, &group, &|_| {}).unwrap();
            0
        }
    };
    let until = |wanted: usize| {
        let mut looked_up = stream.state().looked_up;
        while looked_up < wanted || !stream.state().ready.is_empty() {
            looked_up += work();
        }
        assert_eq!((looked_up, stream.state().due().len()), (wanted, 0));
    };
    until(AHEAD);
    // Not in small pieces; nor for what is read again, or was not expected.
    reads.note(0..BATCH as u64 - 1);
    reads.note(0..BATCH as u64 - 1);
    reads.note(1 << 20..1 << 21);
    assert!(stream.state().due().is_empty());
    reads.note(5000..5001);
    until(AHEAD + BATCH);
    // What is left in the end is less than a batch, and comes.
    reads.note(0..2 * BLOCKS as u64 - AHEAD as u64 + 1);
    until(2 * BLOCKS as usize);
    assert_eq!(stream.next(), None);
    reads.note(8000..8001);
    assert!(!reads.is_on(), "nobody wants to know any more");
}

#[test]
fn a_stream_of_which_nobody_reads_ends() {
    let long: Vec<u32> = (0..BLOCKS * 2).collect();
    let stream = Blocks::new("v", &long);
    {
        let mut state = stream.state();
        state.looked_up = AHEAD;
        state.last_read = Instant::now().checked_sub(UNUSED).unwrap();
    }
    assert_eq!(stream.next(), None);
    assert!(stream.is_over());
}

#[test]
fn a_plan_of_what_is_not_there_ends() {
    let groups = fetched(&Laid::new(256), "other", &plan()).len();
    assert!((1..=THREADS).contains(&groups), "{groups} groups: each thread may have begun one");
}

#[test]
fn first_reads_are_noted_in_order_until_they_are_taken() {
    let reads = Reads::default();
    reads.note(0..4);
    assert!(reads.recording(false).is_err(), "nobody wanted to know");
    reads.begin(100);
    assert!(reads.is_on());
    reads.note(7..9);
    reads.note(3..8);
    reads.begin(100);
    // Beyond the end, as a read past the last whole block.
    reads.note(98..120);
    assert!(reads.recording(false).unwrap().touches.is_empty());
    let taken = reads.recording(true).unwrap();
    assert_eq!(taken.touches.iter().map(|(block, _)| *block).collect::<Vec<_>>(), [7, 8, 3, 4, 5, 6, 98, 99]);
    assert!(!reads.is_on() && reads.recording(true).is_err());
}

#[test]
fn who_reads_everything_teaches_nothing() {
    let reads = Reads::default();
    reads.begin(1 << 20);
    reads.note(0..RECORDED_MAX as u64 - 1);
    assert!(reads.recording(false).unwrap().settled_ms.is_none());
    reads.note(0..1 << 20);
    let taken = reads.recording(true).unwrap();
    assert!(taken.settled_ms.is_some(), "there is nothing to wait for");
    assert!(taken.touches.is_empty());
}
