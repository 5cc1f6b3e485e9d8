use super::super::{ImportOptions, import};
use super::*;
use std::fs;
use std::sync::Barrier;
use store::Mode;

const SIZE: u64 = 1 << 20;

/// A store beside parts of an image: a sparse disk, and a kernel of odd length.
struct Bench {
    dir: tempfile::TempDir,
    store: Store,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("store"), Mode::ReadWrite).unwrap();
        Self { dir, store }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn parts(&self, fill: u8) -> Parts {
        let disk = File::create(self.at("disk")).unwrap();
        disk.set_len(SIZE - 512).unwrap();
        disk.write_all_at(&[fill; 5000], 300_000).unwrap();
        disk.write_all_at(b"the end", SIZE - 512 - 7).unwrap();
        let mut kernel = vec![fill; 70_001];
        kernel[0x202..0x206].copy_from_slice(b"HdrS");
        kernel[0x20e..0x210].copy_from_slice(&0x400u16.to_le_bytes());
        kernel[0x600..0x608].copy_from_slice(b"6.1.0-7 ");
        fs::write(self.at("kernel"), kernel).unwrap();
        fs::write(self.at("initrd"), [fill, 2, 3]).unwrap();
        let options = ImportOptions {
            kernel: Some(self.at("kernel")),
            initrd: Some(self.at("initrd")),
            cmdline: Some(format!("console=ttyS0 fill={fill}")),
            ..Default::default()
        };
        import(&self.at("disk"), &options, &self.at("work"), &mut |_| ()).unwrap()
    }
}

#[test]
fn an_image_comes_back_as_it_was_added() {
    let bench = Bench::new();
    let mut notes = Vec::new();
    let added = add(&bench.store, "web", &bench.parts(7), &mut |line| notes.push(line.to_owned())).unwrap();
    assert!(notes.iter().any(|line| line.starts_with("storing the disk")), "{notes:?}");
    let loaded = load(&bench.store, "web").unwrap();
    assert_eq!((loaded.disk(), loaded.cmdline()), (added.disk(), "console=ttyS0 fill=7"));
    let mut disk = vec![1; SIZE as usize];
    assert_eq!(loaded.disk().size, SIZE, "a disk of odd length is rounded up to whole blocks");
    bench.store.read_at(&loaded.disk(), 0, &mut disk).unwrap();
    let file = fs::read(bench.at("disk")).unwrap();
    assert!(disk[..file.len()] == file[..] && disk[file.len()..].iter().all(|&b| b == 0));
    let shown = inspect(&bench.store, "web").unwrap();
    assert_eq!((shown.disk_bytes, shown.kernel.as_deref()), (SIZE, Some("6.1.0-7")));
    assert!(shown.stored_bytes > 0 && shown.created.ends_with('Z'), "{shown:?}");
}

#[test]
fn kernels_are_extracted_once_and_whole() {
    let bench = Bench::new();
    let image = add(&bench.store, "web", &bench.parts(7), &mut |_| ()).unwrap();
    let dir = bench.at("kernels");
    let (kernel, initrd) = kernel_files(&bench.store, &image, &dir).unwrap();
    assert_eq!(fs::read(&kernel).unwrap(), fs::read(bench.at("kernel")).unwrap());
    assert_eq!(fs::read(initrd.as_ref().unwrap()).unwrap(), [7, 2, 3]);
    fs::write(&kernel, b"cut off by a crash of the disk").unwrap();
    assert_eq!(kernel_files(&bench.store, &image, &dir).unwrap(), (kernel.clone(), initrd));
    assert_eq!(fs::read(&kernel).unwrap(), fs::read(bench.at("kernel")).unwrap());
    let other = add(&bench.store, "copy", &bench.parts(7), &mut |_| ()).unwrap();
    assert_eq!(kernel_files(&bench.store, &other, &dir).unwrap().0, kernel, "equal content, one file");
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 2);
}

#[test]
fn names_are_taken_once_and_given_back() {
    let bench = Bench::new();
    for name in ["b", "a"] {
        add(&bench.store, name, &bench.parts(1), &mut |_| ()).unwrap();
    }
    assert_eq!(list(&bench.store).unwrap().iter().map(|i| i.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    let second = add(&bench.store, "a", &bench.parts(2), &mut |_| ()).unwrap_err();
    assert!(matches!(&second, Error::Conflict(why) if why.contains("`a`")), "{second}");
    remove(&bench.store, "a").unwrap();
    for gone in [remove(&bench.store, "a"), load(&bench.store, "a").map(drop)] {
        assert!(matches!(&gone, Err(Error::NotFound(why)) if why.contains("`a`")), "{gone:?}");
    }
    let bad = add(&bench.store, "../a", &bench.parts(1), &mut |_| ()).unwrap_err();
    assert!(matches!(bad, Error::Invalid(_)), "{bad}");
    add(&bench.store, "a", &bench.parts(3), &mut |_| ()).unwrap();
}

#[test]
fn of_racing_imports_exactly_one_gets_the_name() {
    let bench = Bench::new();
    let parts: Vec<Parts> = vec![bench.parts(5)];
    for round in 0..8 {
        let name = format!("race-{round}");
        let start = Barrier::new(4);
        let results: Vec<Result<Stored>> = std::thread::scope(|scope| {
            let race = || {
                start.wait();
                add(&bench.store, &name, &parts[0], &mut |_| ())
            };
            let racers: Vec<_> = (0..4).map(|_| scope.spawn(race)).collect();
            racers.into_iter().map(|racer| racer.join().unwrap()).collect()
        });
        assert_eq!(results.iter().filter(|r| r.is_ok()).count(), 1, "{results:?}");
        for lost in results.iter().filter_map(|r| r.as_ref().err()) {
            assert!(matches!(lost, Error::Conflict(why) if why.contains(&name)), "{lost}");
        }
    }
    let report = bench.store.verify(&mut |_, _| ()).unwrap();
    assert!(report.faults.is_empty(), "{report:?}");
}

#[test]
fn data_is_found_in_whole_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let file = File::options().create(true).truncate(true).read(true).write(true).open(dir.path().join("f")).unwrap();
    assert_eq!(data_ranges(&file, SIZE).unwrap(), []);
    file.set_len(SIZE).unwrap();
    assert_eq!(data_ranges(&file, SIZE).unwrap(), []);
    file.write_all_at(b"x", 5000).unwrap();
    file.write_all_at(b"y", SIZE - 1).unwrap();
    assert_eq!(data_ranges(&file, SIZE).unwrap(), [ByteRange::at(4096, 4096), ByteRange::at(SIZE - 4096, 4096)]);
    assert_eq!(data_ranges(&file, 4096).unwrap(), []);
}
