//! RAM that is fetched ahead by plan, and what is recorded. Needs root and /dev/fuse.

mod common;

use base::{Bitmap, ByteRange, RamFileId, RamMap, Source};
use common::{Mapping, Mirror, PAGE, bytes};
use guest::plan::{Profile, Space, Template, Touch, traits};
use mirror::control::{Foresee, StreamStats};
use mirror::{Client, RamSource, RamSpec};
use std::time::{Duration, Instant};

const PAGES: usize = 4096;
const LEN: usize = PAGES * PAGE;
const RAM: u64 = 0x100;
/// The number of a color whose windows the tests rely on: user data.
const DATA: u8 = 9;

#[test]
#[ignore = "is the mirror of the other tests"]
fn mirror_process() {
    common::mirror_process();
}

struct Scene {
    mirror: Mirror,
    client: Client,
    content: Vec<u8>,
    map: RamMap,
}

fn scene() -> Scene {
    let mirror = Mirror::start();
    let mut client = mirror.client();
    let content = bytes(3, LEN);
    mirror.put_version("v", &content);
    let mut map = RamMap::zero(LEN as u64);
    map.set(ByteRange::new(0, LEN as u64), Source::File(RamFileId(RAM)));
    client.add_ram(RamSpec { id: RAM, map: map.encode(), source: RamSource::Committed("v".to_owned()) }).unwrap();
    client.register_vm("web", std::process::id()).unwrap();
    Scene { mirror, client, content, map }
}

impl Scene {
    /// Waits until what nobody follows is forgotten: who is just fetching for it holds it a moment longer.
    fn await_no_stream(&mut self) {
        let end = Instant::now() + Duration::from_secs(10);
        while !self.client.stats(None).unwrap().streams.is_empty() {
            assert!(Instant::now() < end, "nobody follows it any more");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn template(&self, profile: Profile) -> std::path::PathBuf {
        let mut stored = Bitmap::new(PAGES as u64);
        stored.set_range(0, PAGES as u64);
        let space = Space::new(vec![DATA; PAGES], |_| (0, 0));
        let path = self.mirror.home.join("template");
        std::fs::write(&path, Template { space, traits: traits(), stored, profile }.encode()).unwrap();
        path
    }

    fn foresee(&mut self, mapping: &Mapping, policy: &str, profile: Profile) {
        let spec = self.spec(Some(mapping), policy, profile);
        self.client.foresee(spec).unwrap();
    }

    fn spec(&self, mapping: Option<&Mapping>, policy: &str, profile: Profile) -> Foresee {
        Foresee {
            vm: "web".to_owned(),
            ram: RAM,
            map: self.map.encode(),
            address: mapping.map(|mapping| mapping.bytes().as_ptr() as u64),
            template: Some(self.template(profile)),
            policy: policy.to_owned(),
            eager: 0.5,
            record: true,
        }
    }

    fn faults(&mut self) -> u64 {
        self.client.stats(Some("web")).unwrap().vms["web"].ram_faults
    }

    /// Waits until nothing more is fetched ahead.
    fn rest(&mut self) -> StreamStats {
        let began = Instant::now();
        loop {
            let stream = self.client.stats(None).unwrap().streams.pop().unwrap();
            if stream.idle && stream.flying_bytes == 0 {
                return stream;
            }
            assert!(began.elapsed() < Duration::from_secs(60), "prefetch never ends: {stream:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn profile(pages: impl IntoIterator<Item = u32>) -> Profile {
    let mut profile = Profile::default();
    profile.add(&pages.into_iter().map(|page| Touch { page, ms: page }).collect::<Vec<_>>(), u32::MAX);
    profile
}

#[test]
fn what_was_recorded_is_there_before_it_is_touched() {
    let mut scene = scene();
    let mapping = Mapping::of(&scene.mirror.ram(RAM), LEN);
    let planned: Vec<u32> = (64..192).chain((1000..1400).step_by(2)).collect();
    scene.foresee(&mapping, "replay", profile(planned.iter().copied()));
    let stream = scene.rest();
    assert_eq!(stream.fetched_bytes, (planned.len() * PAGE) as u64);
    let before = scene.faults();
    for &page in &planned {
        let page = page as usize;
        assert!(mapping.page(page) == &scene.content[page * PAGE..(page + 1) * PAGE], "page {page}");
    }
    assert_eq!(scene.faults(), before, "a planned page was waited for");
    assert!(mapping.page(3000) == &scene.content[3000 * PAGE..3001 * PAGE]);
    assert_eq!(scene.faults(), before + 1, "one that was not planned");
    let recording = scene.client.recording("web", true).unwrap();
    let touched: std::collections::BTreeSet<u32> = recording.touches.iter().map(|(page, _)| *page).collect();
    assert_eq!(touched.len(), recording.touches.len(), "first touches alone");
    assert!(planned.iter().chain(&[3000]).all(|page| touched.contains(page)), "touched without a fault, and seen");
    assert!(recording.touches.iter().all(|(_, ms)| *ms <= recording.seen_ms));
    assert!(scene.client.recording("web", false).unwrap().touches.is_empty(), "it was ended");
    let stream = scene.rest();
    let (faults, ahead, used) = stream.by_color[&DATA];
    assert_eq!((faults, ahead, used), (1, planned.len() as u64, planned.len() as u64));
}

#[test]
fn what_is_told_before_the_hypervisor_is_there_is_fetched_meanwhile() {
    let mut scene = scene();
    let planned = 64..192;
    let mut early = scene.spec(None, "auto", profile(planned.clone()));
    early.vm = "next".to_owned();
    // The kernel takes no pages of a file that nobody has looked up.
    let _known = std::fs::File::open(scene.mirror.ram(RAM)).unwrap();
    scene.client.foresee(early.clone()).unwrap();
    let bytes = planned.len() as u64 * PAGE as u64;
    assert_eq!(scene.rest().fetched_bytes, bytes);
    scene.client.register_vm("next", std::process::id()).unwrap();
    let mapping = Mapping::of(&scene.mirror.ram(RAM), LEN);
    // The template has been read: the stream is the one that there is.
    let late = Foresee { address: Some(mapping.bytes().as_ptr() as u64), template: Some("/gone".into()), ..early };
    scene.client.foresee(late.clone()).unwrap();
    for page in planned {
        let page = page as usize;
        assert!(mapping.page(page) == &scene.content[page * PAGE..(page + 1) * PAGE], "page {page}");
    }
    assert_eq!(scene.client.stats(Some("next")).unwrap().vms["next"].ram_faults, 0);
    assert_eq!(scene.rest().fetched_bytes, bytes);
    scene.client.unregister_vm("next").unwrap();
    scene.await_no_stream();
    assert!(scene.client.foresee(late).is_err(), "a VM that is gone");
}

#[test]
fn a_fault_brings_its_neighbours_in_color_space_and_only_those() {
    let mut scene = scene();
    let mapping = Mapping::of(&scene.mirror.ram(RAM), LEN);
    scene.foresee(&mapping, "color:4,16", Profile::default());
    assert_eq!(scene.rest().fetched_bytes, 0);
    let before = scene.faults();
    assert!(mapping.page(100) == &scene.content[100 * PAGE..101 * PAGE]);
    assert_eq!(scene.rest().fetched_bytes, 16 * PAGE as u64);
    for page in 101..117 {
        assert!(mapping.page(page) == &scene.content[page * PAGE..(page + 1) * PAGE]);
    }
    assert_eq!(scene.faults(), before + 1);
    assert!(mapping.page(117) == &scene.content[117 * PAGE..118 * PAGE]);
    assert_eq!(scene.faults(), before + 2, "the window ends where it should");
}

#[test]
fn a_walk_through_all_pages_waits_for_few_of_them_under_auto() {
    let mut scene = scene();
    scene.mirror.put_version("slow", b"1000");
    let mapping = Mapping::of(&scene.mirror.ram(RAM), LEN);
    scene.foresee(&mapping, "auto", Profile::default());
    for page in 0..PAGES {
        assert!(mapping.page(page) == &scene.content[page * PAGE..(page + 1) * PAGE], "page {page}");
    }
    let faults = scene.faults();
    assert!(faults < PAGES as u64 / 4, "{faults} faults on {PAGES} pages in order");
    let stream = scene.rest();
    assert!(stream.fetched_bytes <= LEN as u64);
}

#[test]
fn a_store_that_is_down_stops_prefetch_and_nothing_else() {
    let mut scene = scene();
    let mapping = Mapping::of(&scene.mirror.ram(RAM), LEN);
    scene.mirror.put_version("down", b"");
    scene.foresee(&mapping, "replay", profile(0..500));
    let began = Instant::now();
    while scene.client.stats(None).unwrap().streams[0].failed == 0 {
        assert!(began.elapsed() < Duration::from_secs(20), "prefetch did not notice");
        std::thread::sleep(Duration::from_millis(5));
    }
    std::fs::remove_file(scene.mirror.store.join("down")).unwrap();
    scene.rest();
    for page in 0..600 {
        assert!(mapping.page(page) == &scene.content[page * PAGE..(page + 1) * PAGE], "page {page}");
    }
}

#[test]
fn what_makes_no_sense_is_refused_by_name() {
    let mut scene = scene();
    let mapping = Mapping::of(&scene.mirror.ram(RAM), LEN);
    let good = Foresee {
        vm: "web".to_owned(),
        ram: RAM,
        map: scene.map.encode(),
        address: Some(mapping.bytes().as_ptr() as u64),
        template: Some(scene.template(Profile::default())),
        policy: "auto".to_owned(),
        eager: 0.5,
        record: false,
    };
    let junk = scene.mirror.home.join("junk");
    std::fs::write(&junk, b"OFFPLAN1 and then nothing of the kind").unwrap();
    let small = RamMap::zero(PAGE as u64).encode();
    let cases: [(&str, Foresee); 7] = [
        ("not registered", Foresee { vm: "nobody".to_owned(), ..good.clone() }),
        ("not a prefetch policy", Foresee { policy: "magic".to_owned(), ..good.clone() }),
        ("not a number from 0 to 1", Foresee { eager: 2.0, ..good.clone() }),
        ("damaged at byte", Foresee { template: Some(junk), ..good.clone() }),
        ("No such file", Foresee { template: Some("/no/such/file".into()), ..good.clone() }),
        ("empty RAM map", Foresee { map: String::new(), ..good.clone() }),
        ("of 4096 pages, not 1", Foresee { map: small, ..good.clone() }),
    ];
    for (what, spec) in cases {
        let error = scene.client.foresee(spec).unwrap_err().to_string();
        assert!(error.contains(what), "{error} does not say: {what}");
    }
    assert!(scene.client.recording("nobody", false).unwrap_err().to_string().contains("nobody"));
    scene.client.foresee(good).unwrap();
    scene.client.unregister_vm("web").unwrap();
    scene.await_no_stream();
}

#[test]
fn first_reads_of_what_a_disk_stands_on_are_recorded_and_a_plan_is_brought() {
    use mirror::control::{ForeseeDisk, OfDisk};
    use mirror::{Below, ExportSource, ExportSpec, OverlaySpec, nbd::NbdClient};
    use std::os::unix::fs::FileExt as _;

    const DISK: u64 = 0x200;
    let mirror = Mirror::start();
    let mut client = mirror.client();
    let content = bytes(5, LEN);
    mirror.put_version("v", &content);
    let below = Below::Version("v".to_owned());
    let spec = OverlaySpec { id: DISK, vm: "web".to_owned(), size: LEN as u64, block_size: 4096, below };
    client.add_overlay(spec).unwrap();
    let socket = mirror.home.join("run/v.sock");
    let source = ExportSource::Version { version: "v".to_owned(), size: LEN as u64, block_size: 4096 };
    let (name, description) = ("v".to_owned(), String::new());
    let export = ExportSpec { name, description, socket: socket.clone(), source, read_only: true, ephemeral: false };
    client.add_export(export).unwrap();
    let foresee =
        |disk: OfDisk, blocks: Vec<u32>, record| ForeseeDisk { disk, version: "v".to_owned(), blocks, record };
    let (overlay, export) = (OfDisk::Overlay(DISK), OfDisk::Export("v".to_owned()));
    assert!(client.disk_recording(&overlay, false).is_err(), "nobody wanted it recorded");
    assert!(client.foresee_disk(foresee(OfDisk::Overlay(DISK + 1), Vec::new(), true)).is_err());
    for disk in [&overlay, &export] {
        client.foresee_disk(foresee(disk.clone(), Vec::new(), true)).unwrap();
    }

    // Whole blocks that are written are nobody's reads; of one written in part the rest is.
    let file = std::fs::File::options().read(true).write(true).open(mirror::disk_path(&mirror.home, DISK)).unwrap();
    file.write_all_at(&[1; PAGE], 40 * PAGE as u64).unwrap();
    file.write_all_at(&[1; 100], 50 * PAGE as u64 + 9).unwrap();
    file.sync_all().unwrap();
    std::fs::write("/proc/sys/vm/drop_caches", "1").unwrap();
    let mut buf = vec![0; 2 * PAGE];
    for page in [30, 39, 30, 60] {
        file.read_exact_at(&mut buf, (page * PAGE) as u64).unwrap();
    }
    let recorded = client.disk_recording(&overlay, true).unwrap();
    let read: Vec<u32> = recorded.touches.iter().map(|(block, _)| *block).collect();
    assert!([50, 30, 31, 39, 60, 61].iter().all(|block| read.contains(block)) && !read.contains(&40), "{read:?}");
    let mut sorted = read.clone();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(sorted.len(), read.len(), "first reads alone");
    assert!(client.disk_recording(&overlay, true).is_err(), "it was ended");

    let mut nbd = NbdClient::connect(&socket).unwrap();
    for page in [9, 3, 9] {
        nbd.read_at((page * PAGE) as u64, &mut buf[..PAGE]).unwrap();
        assert!(buf[..PAGE] == content[page * PAGE..(page + 1) * PAGE]);
    }
    let recorded = client.disk_recording(&export, true).unwrap();
    assert_eq!(recorded.touches.iter().map(|(block, _)| *block).collect::<Vec<_>>(), [9, 3]);

    let before = client.stats(None).unwrap().others.store_read_bytes;
    client.foresee_disk(foresee(export, (100..1100).collect(), false)).unwrap();
    let began = Instant::now();
    while client.stats(None).unwrap().disk_streams > 0 {
        assert!(began.elapsed() < Duration::from_secs(60), "it never ends");
        std::thread::sleep(Duration::from_millis(5));
    }
    let brought = client.stats(None).unwrap().others.store_read_bytes - before;
    assert!(brought >= (1000 * PAGE) as u64, "{brought} bytes were read for a thousand blocks");
}
