//! Finding all objects again after the mirror, or the machine, has died.

use super::{Admin, Description, Object, Objects};
use crate::control::Below;
use crate::disk::{Layer, Lower, Overlay, Pool, View};
use crate::home::{Home, read_json, read_json_or_default, remove_if_there, replace_json};
use crate::ram::RamObject;
use crate::resolve::Versions;
use base::RamMap;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, RwLock};

impl Objects {
    /// Opens what the last mirror of this home left, and removes what it left half done.
    pub(crate) fn open(home: Home, versions: Arc<dyn Versions>) -> io::Result<Self> {
        let same_boot = home.enter_live()?;
        if !same_boot {
            home.reset_live()?;
        }
        let from = if same_boot { home.live() } else { home.objects() };
        let (mut found, mut doubtful) = read_descriptions(&from)?;
        take_back_torn_marks(&home, &mut found)?;
        let mut rebuilt =
            Rebuild { home: &home, same_boot, found: &found, done: HashMap::new(), opening: BTreeSet::new() };
        for &id in found.keys() {
            if let Err(e) = rebuilt.object(id) {
                log::error!("object {id:016x} cannot be opened and is left out; its files are kept: {e}");
                doubtful = true;
            }
        }
        let map = rebuilt.done;
        if !same_boot {
            for (id, description) in found.iter().filter(|(id, _)| map.contains_key(id)) {
                replace_json(&home.live_description(*id), description)?;
            }
            home.complete_live()?;
        }
        // In doubt nothing is removed: what cannot be read now may be all that is left of a disk.
        if !doubtful {
            collect_leftovers(&home, &map)?;
        }
        let deferred: BTreeSet<u64> = read_json_or_default(&home.live().join("deferred.json")).unwrap_or_default();
        let deferred = deferred.into_iter().filter(|id| map.contains_key(id)).collect();
        let pool = Arc::new(Pool::new(home.clone(), last_layer(&home, &found)?.saturating_add(1)));
        let objects = Self { home, versions, pool, map: RwLock::new(map), admin: Mutex::new(Admin { deferred }) };
        objects.remove_deferred().map_err(io::Error::other)?;
        Ok(objects)
    }
}

/// All descriptions in a directory; and whether one could not be read.
fn read_descriptions(dir: &Path) -> io::Result<(BTreeMap<u64, Description>, bool)> {
    let mut found = BTreeMap::new();
    let mut doubtful = false;
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let Some(id) = id_of(&path, "json") else { continue };
        match read_json::<Description>(&path) {
            Ok(description) if description.id() == id => drop(found.insert(id, description)),
            Ok(other) => {
                log::error!("{} describes object {:016x}; it is left out", path.display(), other.id());
                doubtful = true;
            }
            Err(e) => {
                log::error!("a description cannot be read and is left out: {e}");
                doubtful = true;
            }
        }
    }
    Ok((found, doubtful))
}

/// The id in a file name of 16 hex digits.
fn id_of(path: &Path, extension: &str) -> Option<u64> {
    let stem = path.file_stem()?.to_str()?;
    let right = path.extension()? == extension && stem.len() == 16;
    right.then(|| u64::from_str_radix(stem, 16).ok())?
}

/// A view whose layer is still the top of an overlay: its mark was cut short and never acknowledged.
fn take_back_torn_marks(home: &Home, found: &mut BTreeMap<u64, Description>) -> io::Result<()> {
    let tops: BTreeSet<u64> =
        found.values().filter(|d| matches!(d, Description::Overlay { .. })).filter_map(Description::layer).collect();
    let torn = |d: &Description| matches!(d, Description::View { layer, .. } if tops.contains(layer));
    let ids: Vec<u64> = found.iter().filter(|(_, d)| torn(d)).map(|(&id, _)| id).collect();
    for id in ids {
        found.remove(&id);
        remove_if_there(&home.durable_description(id))?;
        remove_if_there(&home.live_description(id))?;
    }
    Ok(())
}

struct Rebuild<'a> {
    home: &'a Home,
    same_boot: bool,
    found: &'a BTreeMap<u64, Description>,
    done: HashMap<u64, Object>,
    opening: BTreeSet<u64>,
}

impl Rebuild<'_> {
    fn object(&mut self, id: u64) -> io::Result<()> {
        if self.done.contains_key(&id) {
            return Ok(());
        }
        let description =
            self.found.get(&id).ok_or_else(|| io::Error::other(format!("view {id:016x} is not there")))?;
        if !self.opening.insert(id) {
            return Err(io::Error::other(format!("view {id:016x} stands on itself")));
        }
        let object = match description.clone() {
            Description::Ram { map, source, .. } => {
                let map = RamMap::decode(&map).map_err(io::Error::other)?;
                let ram = RamObject::new(id, map, source);
                if let Some(why) = ram.holder_error() {
                    log::error!("RAM file {id:016x} is lost unless it is committed: {why}");
                }
                Object::Ram(Arc::new(ram))
            }
            Description::Overlay { vm, size, block_size, layer, below, .. } => {
                let top = self.layer(layer, size, block_size)?;
                Object::Overlay(Arc::new(Overlay::new(id, vm, size, block_size, top, self.lower(&below)?)))
            }
            Description::View { size, block_size, layer, below, committed, .. } => {
                let layer = self.layer(layer, size, block_size)?;
                Object::View(Arc::new(View::new(id, size, block_size, layer, self.lower(&below)?, committed)))
            }
        };
        self.done.insert(id, object);
        Ok(())
    }

    fn layer(&self, id: u64, size: u64, block_size: u64) -> io::Result<Arc<Layer>> {
        let path = self.home.layer_data(id);
        if !path.exists() {
            return Err(io::Error::other(format!("its layer {} is gone", path.display())));
        }
        if let Some(why) = super::impossible(size, block_size) {
            return Err(io::Error::other(format!("its description is damaged: {why}")));
        }
        let blocks = size.div_ceil(block_size);
        let open = if self.same_boot { Layer::open_live } else { Layer::open_durable };
        open(self.home, id, blocks, block_size).map(Arc::new)
    }

    fn lower(&mut self, below: &Below) -> io::Result<Lower> {
        match below {
            Below::Zero => Ok(Lower::Zero),
            Below::Version(version) => Ok(Lower::Version(version.as_str().into())),
            Below::View(view) => {
                self.object(*view)?;
                match &self.done[view] {
                    Object::View(view) => Ok(Lower::View(view.clone())),
                    _ => Err(io::Error::other(format!("{view:016x}, below it, is no view"))),
                }
            }
        }
    }
}

/// The highest name of a layer, in use or left behind.
fn last_layer(home: &Home, found: &BTreeMap<u64, Description>) -> io::Result<u64> {
    let mut last = found.values().filter_map(Description::layer).max().unwrap_or(0);
    for entry in fs::read_dir(home.layers())? {
        let path = entry?.path();
        last = last.max(id_of(&path, "data").or(id_of(&path, "map")).unwrap_or(0));
    }
    Ok(last)
}

/// Removes temporary files, descriptions of what is gone, and layers that nothing owns.
fn collect_leftovers(home: &Home, map: &HashMap<u64, Object>) -> io::Result<()> {
    let owned: BTreeSet<u64> = map.values().filter_map(Object::layer).collect();
    let durable = |id: u64| matches!(map.get(&id), Some(Object::Overlay(_) | Object::View(_)));
    for dir in [home.live(), home.objects(), home.layers()] {
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            let described = id_of(&path, "json");
            let layer = id_of(&path, "map").or(id_of(&path, "data"));
            let stale = path.extension().is_some_and(|e| e == "tmp")
                || (dir == home.objects() && described.is_some_and(|id| !durable(id)))
                || (dir == home.live() && described.is_some_and(|id| !map.contains_key(&id)))
                || layer.is_some_and(|id| !owned.contains(&id));
            if stale {
                log::info!("removing {}, left by an earlier mirror", path.display());
                remove_if_there(&path)?;
            }
        }
    }
    Ok(())
}
