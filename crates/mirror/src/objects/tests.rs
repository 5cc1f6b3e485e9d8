use super::*;
use crate::resolve::double::Memory;
use std::path::PathBuf;

/// A small generator; the sequence depends on the seed alone.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8 | 1).collect()
    }
}

/// One home, opened again and again.
struct World {
    dir: tempfile::TempDir,
    boot: u32,
    versions: Arc<Memory>,
    objects: Option<Objects>,
}

impl World {
    /// In memory: a power loss is played by opening only what is durable, so the medium need not be slow.
    fn new() -> Self {
        let mut world =
            Self { dir: tempfile::tempdir_in("/dev/shm").unwrap(), boot: 0, versions: Arc::default(), objects: None };
        world.reopen();
        world
    }

    /// The mirror is killed and started anew.
    fn reopen(&mut self) {
        self.objects = None;
        let home = Home::prepare_for_boot(self.dir.path(), &format!("boot{}", self.boot)).unwrap();
        self.objects = Some(Objects::open(home, self.versions.clone()).unwrap());
    }

    /// The machine loses power: only what is durable counts.
    fn lose_power(&mut self) {
        self.boot += 1;
        self.reopen();
    }

    fn o(&self) -> &Objects {
        self.objects.as_ref().unwrap()
    }

    fn read(&self, id: u64, offset: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0xee; len];
        self.o().overlay(id).unwrap().read(&*self.versions, offset, &mut out).unwrap();
        out
    }

    fn write(&self, id: u64, offset: u64, data: &[u8]) {
        self.o().overlay(id).unwrap().write(&*self.versions, offset, data).unwrap();
    }

    fn zero(&self, id: u64, offset: u64, len: u64) {
        self.o().overlay(id).unwrap().zero(&*self.versions, offset, len, false).unwrap();
    }

    /// What is told to be zero is; nothing is left out; and no more is told at a time than was asked for.
    fn check_extents(&self, id: u64, offset: u64, content: &[u8]) {
        let (mut at, end) = (offset, offset + content.len() as u64);
        while at < end {
            let disk = self.o().overlay(id).unwrap();
            let extents = disk.extents(&*self.versions, base::ByteRange::new(at, end), 3).unwrap();
            assert!((1..=3).contains(&extents.len()), "{extents:?}");
            for extent in extents {
                assert!(extent.end > at && extent.end <= end, "{extent:?} from {at} to {end}");
                let bytes = &content[(at - offset) as usize..(extent.end - offset) as usize];
                assert!(!extent.kind.zero || bytes.iter().all(|&b| b == 0), "{extent:?} from {at} is not zero");
                at = extent.end;
            }
        }
    }

    /// What the daemon does behind a mark: reads the view's changes, makes a version of them, says so.
    fn commit(&self, view: u64) {
        let changes = self.o().view_changes(view).unwrap();
        let mut bytes = match &changes.below {
            Below::Zero => vec![0; changes.size as usize],
            Below::Version(v) => self.versions.versions.lock().unwrap()[v].clone(),
            Below::View(v) => panic!("view {v:x} must be committed before what stands on it"),
        };
        bytes.resize(changes.size.next_multiple_of(changes.block_size) as usize, 0);
        let data = std::fs::read(&changes.data_path).unwrap();
        for (start, end) in changes.dirty {
            bytes[start as usize..end as usize].copy_from_slice(&data[start as usize..end as usize]);
        }
        for (start, end) in changes.zeroed {
            bytes[start as usize..end as usize].fill(0);
        }
        bytes.truncate(changes.size as usize);
        let name = format!("v{view:x}");
        self.versions.put(&name, bytes);
        self.o().set_view_committed(view, &name).unwrap();
    }

    /// The last view as the changes of all views make it, one above the other: what a commit of each would store.
    fn rebuild(&self, base: &str) -> Vec<u8> {
        let mut bytes = self.versions.versions.lock().unwrap()[base].clone();
        let size = bytes.len();
        bytes.resize(size.next_multiple_of(4096), 0);
        for view in self.o().list().views {
            let changes = self.o().view_changes(view.id).unwrap();
            let data = std::fs::read(&changes.data_path).unwrap();
            for (start, end) in changes.dirty {
                bytes[start as usize..end as usize].copy_from_slice(&data[start as usize..end as usize]);
            }
            for (start, end) in changes.zeroed {
                bytes[start as usize..end as usize].fill(0);
            }
        }
        bytes.truncate(size);
        bytes
    }

    fn files(&self) -> Vec<PathBuf> {
        let home = Home::prepare_for_boot(self.dir.path(), &format!("boot{}", self.boot)).unwrap();
        let dirs = [home.layers(), home.objects(), home.live()];
        let files = dirs.iter().flat_map(|d| std::fs::read_dir(d).unwrap()).map(|e| e.unwrap().path());
        files.filter(|p| !p.ends_with("complete") && !p.ends_with("deferred.json")).collect()
    }
}

fn overlay(id: u64, size: u64, block_size: u64, below: Below) -> OverlaySpec {
    OverlaySpec { id, vm: "web".to_owned(), size, block_size, below }
}

/// One disk of the random test and what it must hold.
struct Disk {
    id: u64,
    now: Vec<u8>,
}

const SIZE: u64 = 60 * 4096 + 1000;

/// Random writes, discards, marks, forks, commits, removals and kills; after each step some disk is compared with
/// a plain array, and at the end every file of theirs must be gone.
fn random_life(seed: u64, block_size: u64) {
    let mut rng = Rng(seed);
    let mut world = World::new();
    let base = rng.bytes(SIZE as usize - 5000);
    world.versions.put("base", base.clone());
    let mut image = base;
    image.resize(SIZE as usize, 0);
    let mut next_id = 100;
    let mut disks = vec![Disk { id: 99, now: image }];
    world.o().add_overlay(&overlay(99, SIZE, block_size, Below::Version("base".to_owned()))).unwrap();
    let mut uncommitted: Vec<u64> = Vec::new();
    let mut views: Vec<u64> = Vec::new();
    for step in 0..400 {
        let which = rng.below(disks.len() as u64) as usize;
        let offset = rng.below(SIZE);
        let len = (1 + rng.below(20_000)).min(SIZE - offset);
        let count = disks.len();
        let disk = &mut disks[which];
        let span = offset as usize..(offset + len) as usize;
        match rng.below(100) {
            0..30 => {
                let data = rng.bytes(len as usize);
                world.write(disk.id, offset, &data);
                disk.now[span].copy_from_slice(&data);
            }
            30..45 => {
                world.zero(disk.id, offset, len);
                disk.now[span].fill(0);
            }
            45..55 => assert!(world.read(disk.id, offset, len as usize) == disk.now[span], "seed {seed} step {step}"),
            55..65 => world.check_extents(disk.id, offset, &disk.now[span]),
            65..75 => {
                let mut out = vec![0xee; len as usize];
                let here = world.o().overlay(disk.id).unwrap().read_now(offset, &mut out);
                assert!(!here || out == disk.now[span], "seed {seed} step {step}");
            }
            75..85 if count < 12 => {
                let (parent, view, child) = (disk.id, next_id, next_id + 1);
                next_id += 2;
                world.o().mark(parent, view).unwrap();
                world.o().add_overlay(&overlay(child, SIZE, block_size, Below::View(view))).unwrap();
                let now = disk.now.clone();
                disks.push(Disk { id: child, now });
                uncommitted.push(view);
                views.push(view);
            }
            85..90 if !uncommitted.is_empty() => world.commit(uncommitted.remove(0)),
            90..92 if count > 1 => {
                let gone = disks.swap_remove(which).id;
                let report = world.o().remove(&[gone]).unwrap().0;
                assert_eq!(report.deferred, []);
            }
            92..94 => world.o().flush(disk.id).unwrap(),
            94..97 => world.reopen(),
            _ => {}
        }
    }
    for disk in &disks {
        assert!(world.read(disk.id, 0, SIZE as usize) == disk.now, "seed {seed}, block size {block_size}, at the end");
    }
    let mut ids: Vec<u64> = views;
    ids.extend(disks.iter().map(|d| d.id));
    world.o().remove(&ids).unwrap();
    assert_eq!(world.files(), Vec::<PathBuf>::new(), "seed {seed}: files left behind");
}

#[test]
fn extents_tell_data_zeros_and_changes_apart() {
    let world = World::new();
    let mut below = vec![0; 16 * 4096];
    below[4 * 4096..8 * 4096].fill(1);
    world.versions.put("v", below);
    world.o().add_overlay(&overlay(20, 16 * 4096, 4096, Below::Version("v".to_owned()))).unwrap();
    world.write(20, 5 * 4096, &[2; 4096]);
    world.zero(20, 7 * 4096, 4096);
    world.read(20, 0, 4096);
    let reads = world.versions.reads.load(std::sync::atomic::Ordering::Relaxed);
    world.o().overlay(20).unwrap().discard(9 * 4096 + 1, 2 * 4096).unwrap();
    let told = |most| {
        let disk = world.o().overlay(20).unwrap();
        let extents = disk.extents(&*world.versions, base::ByteRange::new(0, 16 * 4096), most).unwrap();
        extents.iter().map(|e| (e.end / 4096, e.kind.zero, e.kind.changed)).collect::<Vec<_>>()
    };
    let whole = [
        (4, true, false),
        (5, false, false),
        (6, false, true),
        (7, false, false),
        (8, true, true),
        (10, true, false),
        (11, true, true),
        (16, true, false),
    ];
    assert_eq!(told(100), whole);
    assert_eq!(told(3), whole[..3]);
    let asked = world.versions.reads.load(std::sync::atomic::Ordering::Relaxed) - reads;
    assert!(asked <= 10, "the double reads what it is asked to tell, and nobody else reads: {asked}");
}

#[test]
fn disks_hold_what_a_plain_array_holds() {
    for seed in 1..=20 {
        random_life(seed * 0x9e37_79b9, 4096);
        random_life(seed * 0x517c_c1b7, 512);
        random_life(seed * 0x2545_f491, 16384);
    }
}

/// After a power loss each block reads as it was at the last flush, or as it became since: never as anything else.
#[test]
fn a_power_loss_goes_back_no_further_than_the_flush() {
    const BLOCK: usize = 4096;
    for seed in 1..=30 {
        let mut rng = Rng(seed * 0x1234_5678_9abc);
        let mut world = World::new();
        world.versions.put("base", rng.bytes(SIZE as usize));
        let mut now = world.versions.versions.lock().unwrap()["base"].clone();
        world.o().add_overlay(&overlay(20, SIZE, BLOCK as u64, Below::Version("base".to_owned()))).unwrap();
        world.o().flush(20).unwrap();
        let mut next_view = 1000;
        for _ in 0..6 {
            let mut allowed: Vec<Vec<Vec<u8>>> = now.chunks(BLOCK).map(|b| vec![b.to_vec()]).collect();
            for _ in 0..40 {
                let offset = rng.below(SIZE);
                let len = (1 + rng.below(9000)).min(SIZE - offset);
                let span = offset as usize..(offset + len) as usize;
                match rng.below(10) {
                    0..5 => {
                        let data = rng.bytes(len as usize);
                        world.write(20, offset, &data);
                        now[span.clone()].copy_from_slice(&data);
                    }
                    5..7 => {
                        world.zero(20, offset, len);
                        now[span.clone()].fill(0);
                    }
                    7 => drop(world.read(20, offset, len as usize)),
                    8 => {
                        world.o().mark(20, next_view).unwrap();
                        if rng.below(2) == 0 && next_view == 1000 {
                            world.commit(next_view);
                        }
                        next_view += 1;
                    }
                    _ => {
                        world.o().flush(20).unwrap();
                        allowed = now.chunks(BLOCK).map(|b| vec![b.to_vec()]).collect();
                    }
                }
                for (block, bytes) in now.chunks(BLOCK).enumerate() {
                    if allowed[block].last().unwrap() != bytes {
                        allowed[block].push(bytes.to_vec());
                    }
                }
            }
            world.lose_power();
            now = world.read(20, 0, SIZE as usize);
            world.o().mark(20, next_view).unwrap();
            next_view += 1;
            assert!(world.rebuild("base") == now, "seed {seed}: a changed block is not called dirty");
            for (block, bytes) in now.chunks(BLOCK).enumerate() {
                assert!(allowed[block].iter().any(|a| a == bytes), "seed {seed}: block {block} is neither old nor new");
            }
        }
    }
}

#[test]
fn a_mark_cut_short_is_taken_back() {
    let mut world = World::new();
    world.o().add_overlay(&overlay(20, 8192, 4096, Below::Zero)).unwrap();
    world.write(20, 0, &[7; 4096]);
    let live = world.o().home.clone();
    let layer = world.o().overlay(20).unwrap().stack().top.id();
    let view = Description::View { id: 30, size: 8192, block_size: 4096, layer, below: Below::Zero, committed: false };
    replace_json(&live.live_description(30), &view).unwrap();
    std::fs::write(live.layer_data(77), b"").unwrap();
    world.reopen();
    assert_eq!(world.o().list().views, [], "the daemon never heard of the view");
    assert!(!live.layer_data(77).exists(), "its layer is a leftover");
    world.o().mark(20, 30).unwrap();
    world.o().mark(20, 30).unwrap();
    world.write(20, 0, &[8; 4096]);
    assert_eq!(world.o().view_changes(30).unwrap().dirty, [(0, 4096)]);
    world.o().add_overlay(&overlay(21, 8192, 4096, Below::View(30))).unwrap();
    world.reopen();
    assert_eq!(world.read(21, 0, 8192), [vec![7; 4096], vec![0; 4096]].concat());
    assert_eq!(world.read(20, 0, 4096), vec![8; 4096]);
}

#[test]
fn a_fetched_block_is_fetched_once_and_zeros_take_no_space() {
    let world = World::new();
    let mut bytes = vec![0; 64 * 4096];
    bytes[5 * 4096 + 7] = 9;
    world.versions.put("v", bytes.clone());
    world.o().add_overlay(&overlay(20, 64 * 4096, 4096, Below::Version("v".to_owned()))).unwrap();
    for _ in 0..2 {
        assert!(world.read(20, 0, bytes.len()) == bytes);
    }
    assert_eq!(world.versions.reads.load(Ordering::Relaxed), 1);
    let blocks = std::os::unix::fs::MetadataExt::blocks(
        &std::fs::metadata(world.o().overlay(20).unwrap().stack().top.data_path()).unwrap(),
    );
    assert!(blocks <= 16, "{blocks} sectors for one block that is not zero");
    world.write(20, 5 * 4096, &[1; 4096]);
    world.zero(20, 5 * 4096, 4096);
    assert_eq!(world.o().overlay(20).unwrap().stack().top.changes().1, [base::ByteRange::at(5 * 4096, 4096)]);
    assert_eq!(world.read(20, 5 * 4096, 4096), vec![0; 4096]);
}

#[test]
fn what_others_stand_on_goes_with_the_last_of_them() {
    let world = World::new();
    world.o().add_overlay(&overlay(20, 8192, 4096, Below::Zero)).unwrap();
    world.o().mark(20, 30).unwrap();
    world.o().add_overlay(&overlay(21, 8192, 4096, Below::View(30))).unwrap();
    let report = world.o().remove(&[30, 77]).unwrap().0;
    assert_eq!((report.removed, report.deferred, report.missing), (vec![], vec![(30, vec![20, 21])], vec![77]));
    let refused = world.o().add_overlay(&overlay(22, 8192, 4096, Below::View(30))).unwrap_err().to_string();
    assert!(refused.contains("being removed"), "{refused}");
    assert_eq!(world.o().remove(&[20]).unwrap().0.removed, [20]);
    assert_eq!(world.o().list().deferred, [30]);
    assert_eq!(world.o().remove(&[21]).unwrap().0.removed, [21, 30]);
    assert_eq!(world.files(), Vec::<PathBuf>::new());
}

#[test]
fn a_chain_of_marks_costs_no_more_than_one_once_committed() {
    let world = World::new();
    let size = 64 * 4096;
    world.versions.put("v", vec![1; size as usize]);
    world.o().add_overlay(&overlay(20, size, 4096, Below::Version("v".to_owned()))).unwrap();
    for view in 100..150 {
        world.write(20, (view - 100) * 4096, &[view as u8; 4096]);
        world.o().mark(20, view).unwrap();
        world.commit(view);
    }
    assert_eq!(world.o().view_changes(149).unwrap().below, Below::Version("v95".to_owned()));
    let views: Vec<u64> = (100..149).collect();
    assert_eq!(world.o().remove(&views).unwrap().0.removed, views, "nothing stands on views before the last");
    assert_eq!(world.read(20, 49 * 4096, 4096), [149; 4096]);
    assert_eq!(world.read(20, 3 * 4096, 4096), [103; 4096]);
    assert_eq!(world.read(20, 63 * 4096, 4096), [1; 4096]);
}

#[test]
fn bad_requests_are_refused_by_name_and_change_nothing() {
    let world = World::new();
    world.o().add_overlay(&overlay(20, 8192, 4096, Below::Zero)).unwrap();
    world.o().mark(20, 30).unwrap();
    let before = world.files();
    let refused = |done: Result<(), ObjectError>, part: &str| {
        let e = done.unwrap_err().to_string();
        assert!(e.contains(part), "`{e}` does not say `{part}`");
    };
    refused(world.o().add_overlay(&overlay(20, 4096, 4096, Below::Zero)), "in use");
    refused(world.o().add_overlay(&overlay(3, 8192, 4096, Below::Zero)), "the mount's own");
    refused(world.o().add_overlay(&overlay(21, 8192, 3000, Below::Zero)), "power of two");
    refused(world.o().add_overlay(&overlay(21, 0, 4096, Below::Zero)), "0 bytes");
    refused(world.o().add_overlay(&overlay(21, 8192, 4096, Below::View(99))), "no view");
    refused(world.o().add_overlay(&overlay(21, 8192, 8192, Below::View(30))), "do not fit");
    refused(world.o().mark(21, 31), "no overlay");
    refused(world.o().mark(20, 20), "in use");
    refused(world.o().set_view_committed(20, "v"), "no view");
    refused(world.o().set_ram_committed(20, "v"), "no RAM file");
    let ram = |map: &str, source| world.o().add_ram(&RamSpec { id: 40, map: map.to_owned(), source });
    refused(ram("nonsense", RamSource::Blank), "header");
    let foreign = "offshoot-ram-map 1 4096\nfile 0 4096 0000000000000077\n";
    refused(ram(foreign, RamSource::Blank), "0000000000000077");
    let nobody = crate::ram::Holder { pid: 1, start: 0, address: 0 };
    refused(ram("offshoot-ram-map 1 4096\nzero 0 4096\n", RamSource::Pending(nobody)), "holder");
    assert_eq!(world.files(), before);
}
