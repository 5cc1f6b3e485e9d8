//! Requests of the control socket and the files that describe objects, with any of their values exchanged: each is
//! answered or refused, nothing is allocated for what cannot be, and a mirror starts on whatever is left.

use super::*;
use crate::control::{Request, TreeRequest};
use crate::edits::{SMALL, within};
use crate::resolve::double::Memory;
use serde_json::{Value, json};

const RAM: u64 = 0x10;
const DISK: u64 = 0x20;
const VIEW: u64 = 0x30;

fn map() -> String {
    let mut map = RamMap::zero(16 * 4096);
    map.set(base::ByteRange::new(0, 4 * 4096), base::Source::File(base::RamFileId(RAM)));
    map.encode()
}

fn home(dir: &tempfile::TempDir) -> Home {
    Home::prepare_for_boot(dir.path(), "boot").unwrap()
}

fn open(dir: &tempfile::TempDir) -> Objects {
    Objects::open(home(dir), Arc::new(Memory::default())).unwrap()
}

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

/// A RAM file, a disk and a view of it.
fn furnished(dir: &tempfile::TempDir) -> Objects {
    let objects = open(dir);
    objects.add_ram(&RamSpec { id: RAM, map: map(), source: RamSource::Blank }).unwrap();
    let (vm, below) = ("vm".to_owned(), Below::Zero);
    objects.add_overlay(&OverlaySpec { id: DISK, vm, size: 1 << 20, block_size: 4096, below }).unwrap();
    objects.mark(DISK, VIEW).unwrap();
    objects
}

/// Exchanges leaves of a JSON document, as a script says: for each its number and what takes its place.
fn exchanged(valid: &[u8], script: &[u8]) -> Vec<u8> {
    let mut document: Value = serde_json::from_slice(valid).expect("it is valid");
    for edit in script.chunks_exact(2) {
        let mut leaves = Vec::new();
        collect(&mut document, &mut leaves);
        let count = leaves.len();
        let leaf = &mut *leaves[usize::from(edit[0]) % count];
        let number = [0, 1, 15, 16, 32, 48, 4095, 4096, 1 << 20, 1 << 40, 1 << 47, i64::MAX as u64, u64::MAX];
        *leaf = match usize::from(edit[1]) {
            one if one < 2 * number.len() => json!(number[one % number.len()]),
            26 => json!(-1),
            27 => json!("zero"),
            28 => json!({"view": VIEW}),
            29 => json!({"view": 1}),
            30 => json!({"version": "no version"}),
            31 => json!("offshoot-ram-map 1 4096\nfile 0 4096 10\n"),
            32 => json!(""),
            33 => json!([[0, u64::MAX], [5, 2]]),
            34 => Value::Null,
            35 => json!({"committed": "x"}),
            36 => json!({"pending": {"pid": 1, "start": 1, "address": u64::MAX}}),
            37 => json!([VIEW, VIEW, DISK, RAM, 7]),
            _ => continue,
        };
    }
    serde_json::to_vec(&document).expect("it was one before")
}

fn collect<'a>(value: &'a mut Value, out: &mut Vec<&'a mut Value>) {
    let is_leaf = match value {
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => true,
    };
    if is_leaf {
        out.push(value);
        return;
    }
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| collect(item, out)),
        Value::Object(fields) => fields.values_mut().for_each(|field| collect(field, out)),
        _ => {}
    }
}

/// What the mirror keeps of a disk of so many blocks, at most.
const TABLE: usize = (BLOCKS_MAX / 64) as usize;

fn serve(objects: &Objects, request: Request) {
    match request {
        Request::AddRam(spec) => drop(objects.add_ram(&spec)),
        Request::SetRamCommitted { id, version } => drop(objects.set_ram_committed(id, &version)),
        Request::AddOverlay(spec) => drop(objects.add_overlay(&spec)),
        Request::Mark { overlay, view } => drop(objects.mark(overlay, view)),
        Request::View { id } => drop(objects.view_changes(id)),
        Request::SetViewCommitted { id, version } => drop(objects.set_view_committed(id, &version)),
        Request::Flush { id } => drop(objects.flush(id)),
        Request::Remove { ids } => drop(objects.remove(&ids)),
        _ => {}
    }
}

#[test]
fn requests_of_the_control_socket() {
    let overlay = OverlaySpec { id: 0x40, vm: "o".into(), size: 1 << 20, block_size: 4096, below: Below::View(VIEW) };
    let requests = [
        Request::AddRam(RamSpec { id: 0x41, map: map(), source: RamSource::Committed("v".into()) }),
        Request::AddOverlay(overlay),
        Request::Mark { overlay: DISK, view: 0x42 },
        Request::View { id: VIEW },
        Request::SetViewCommitted { id: VIEW, version: "v".into() },
        Request::SetRamCommitted { id: RAM, version: "v".into() },
        Request::Flush { id: DISK },
        Request::Remove { ids: vec![VIEW, DISK] },
        Request::Prefetch { object: RAM, ranges: vec![(0, 4096)], vm: None },
        Request::Warm { name: "n".into(), versions: vec!["v".into()], begin: true, pin: false },
        Request::Tree(TreeRequest::Next { known: vec!["a".into()], wait_ms: 1 }),
    ];
    let lines = requests.iter().map(|request| serde_json::to_vec(request).unwrap()).collect();
    fuzz!(lines, exchanged, |line, _| {
        let Ok(request) = within(64 * line.len() + SMALL, || serde_json::from_slice::<Request>(line)) else { return };
        let again = serde_json::from_slice::<Request>(&serde_json::to_vec(&request).unwrap()).unwrap();
        assert_eq!(again, request);
        let dir = scratch();
        let objects = furnished(&dir);
        within(TABLE + (1 << 20), || serve(&objects, request.clone()));
        // Said again, as after a lost answer, it is no other request.
        serve(&objects, request);
        let ids = objects.list();
        drop(objects);
        // Whatever was taken on is there again after a death.
        assert_eq!(open(&dir).list(), ids);
    });
}

#[test]
fn descriptions_of_objects() {
    let dir = scratch();
    drop(furnished(&dir));
    let at = |dir: &tempfile::TempDir, id| home(dir).live_description(id);
    let valid = [RAM, DISK, VIEW].map(|id| std::fs::read(at(&dir, id)).unwrap());
    fuzz!(valid.to_vec(), exchanged, |bytes, raw| {
        let dir = scratch();
        drop(furnished(&dir));
        // One in two is cut short, as no writer leaves it.
        let bytes = if raw { &bytes[..bytes.len() / 2] } else { bytes };
        let described: Option<Description> = serde_json::from_slice(bytes).ok();
        for id in [RAM, DISK, VIEW] {
            std::fs::write(home(&dir).live_description(id), bytes).unwrap();
            let objects = within(TABLE + (1 << 20), || open(&dir));
            // One object is described so; the others are left out or as they were.
            assert!(objects.list().ram.len() + objects.list().overlays.len() + objects.list().views.len() <= 3);
            if described.as_ref().is_none_or(|d| d.id() != id) {
                assert!(objects.get(id).is_none(), "{id:x} is described as something else");
            }
        }
    });
}
