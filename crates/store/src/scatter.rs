//! Reading blocks that lie anywhere in a version, in as few requests as where they lie allows.
//!
//! A plan names pages that lie apart in memory. Read one by one, each costs a request for its frame, and one for each
//! node on its path. Here they are looked up together: the nodes of all paths level by level, then the frames of all
//! blocks, and frames that lie together in a pack come with one request. Where a version is laid out in the order of
//! the plan ([`Store::arrange`]), that is nearly all of them.

use crate::catalog::{Location, Pack};
use crate::commit::in_parallel;
use crate::engine::cached::Place;
use crate::error::Error;
use crate::frame::{Frame, FrameInfo, Kind};
use crate::name::{Name, Version};
use crate::read::{Item, ReadStat, frame_hash, node_hash, weigh_node};
use crate::store::{Mode, Store};
use crate::tree::Node;
use base::ByteRange;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Frames with less than this between them come with one request: half of what a cache fetches at least.
const GAP: u64 = 32 << 10;
/// Bytes of one request at most.
const SPAN_BYTES: u64 = crate::engine::cached::RUN_BYTES as u64;
/// In a pack laid down in order, nodes behind those that are wanted come along up to so many bytes in all: those that the
/// next pages of the plan need.
const NODES_ALONG: u64 = 512 << 10;
/// Requests at a time, where each takes the time of a network.
const REQUESTS: usize = 8;

/// Blocks that lie together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// Their numbers, those first that were asked for first.
    pub blocks: Vec<u64>,
    /// Bytes of the range of a pack that holds them; 0 for zero blocks, which lie nowhere.
    pub bytes: u64,
    /// That range.
    pub place: Place,
}

/// Frames by pack and number.
pub(crate) type Frames = HashMap<(u32, u32), Arc<Frame>>;

/// A frame by pack and number, and the bytes that were read for it.
type Read = ((u32, u32), Arc<Frame>, u32);

/// Frames of one pack, to be read at once.
struct Stretch {
    pack: Arc<Pack>,
    frames: Vec<(u32, FrameInfo)>,
}

impl Stretch {
    fn start(&self) -> u64 {
        u64::from(self.frames[0].1.offset)
    }

    fn end(&self) -> u64 {
        let (_, last) = self.frames[self.frames.len() - 1];
        u64::from(last.offset) + u64::from(last.stored)
    }

    /// Whether a frame behind the last one is read along with it.
    fn takes(&self, pack: &Pack, info: &FrameInfo) -> bool {
        let (from, to) = (u64::from(info.offset), u64::from(info.offset) + u64::from(info.stored));
        self.pack.handle == pack.handle && from - self.end() <= GAP && to - self.start() <= SPAN_BYTES
    }
}

impl Store {
    /// Sorts blocks by where they lie: those of a span come with one request, or with a few where they lie in more than
    /// one pack's neighbourhood. The spans stand in the order in which their first blocks do in `blocks`. Reads the
    /// nodes that say where, and no data.
    ///
    /// # Errors
    /// A block lies outside the blob; a node is missing, corrupt or unreadable.
    pub fn spans(&self, version: &Version, blocks: &[u64]) -> Result<Vec<Span>, Error> {
        check_blocks(version, blocks)?;
        self.refreshed(|| {
            let names = self.scattered_names(version, blocks, &mut |_, _| {})?;
            let places = self.places_of("block", &names)?;
            let frames = places.iter().flatten().map(|at| (at.pack, at.frame));
            let mut spans: Vec<(usize, Span)> = Vec::new();
            let mut span_of: HashMap<(u32, u32), usize> = HashMap::new();
            for stretch in self.stretches(frames.collect()) {
                span_of.extend(stretch.frames.iter().map(|(number, _)| ((stretch.pack.handle, *number), spans.len())));
                let range = ByteRange::new(stretch.start(), stretch.end());
                let place = Place { object: stretch.pack.id.pack_object(), ranges: vec![range] };
                spans.push((usize::MAX, Span { blocks: Vec::new(), bytes: range.len(), place }));
            }
            // Zero blocks, and what moved this instant.
            let nowhere = spans.len();
            spans.push((usize::MAX, Span::default()));
            for (order, (block, at)) in blocks.iter().zip(&places).enumerate() {
                let number = at.and_then(|at| span_of.get(&(at.pack, at.frame)).copied()).unwrap_or(nowhere);
                let (first, span) = &mut spans[number];
                *first = order.min(*first);
                span.blocks.push(*block);
            }
            spans.retain(|(_, span)| !span.blocks.is_empty());
            spans.sort_by_key(|(first, _)| *first);
            Ok(spans.into_iter().map(|(_, span)| span).collect())
        })
    }

    /// Looks for packs that others have made: what was laid down anew is read there from then on. The one writer of a
    /// store knows them.
    ///
    /// # Errors
    /// The medium fails.
    pub fn look_for_packs(&self) -> Result<(), Error> {
        match self.mode {
            Mode::ReadWrite => Ok(()),
            Mode::Shared | Mode::ReadOnly => self.refresh(false).map(drop),
        }
    }

    /// Reads whole blocks and tells `sink` of each, in the order of `blocks`; what lies together comes with one request.
    /// All of them are held in memory: a span, or some hundreds.
    ///
    /// # Errors
    /// As [`Store::read_at`]; `sink` was told nothing then.
    pub fn read_blocks(
        &self,
        version: &Version,
        blocks: &[u64],
        sink: &mut dyn FnMut(u64, &[u8]),
    ) -> Result<ReadStat, Error> {
        check_blocks(version, blocks)?;
        let (items, stat) = self.refreshed(|| {
            let names = self.scattered_names(version, blocks, &mut |_, _| {})?;
            let (items, stat) = self.items_of("block", &names)?;
            let is_odd = |item: &Item| item.bytes().len() != version.block_size as usize;
            let odd = names.iter().zip(&items).find(|(_, item)| item.as_ref().is_some_and(is_odd));
            match odd.and_then(|(name, _)| *name) {
                Some(name) => Err(Error::Unknown { kind: "block", name }),
                None => Ok((items, stat)),
            }
        })?;
        let zeros = vec![0; version.block_size as usize];
        for (block, item) in blocks.iter().zip(&items) {
            sink(*block, item.as_ref().map_or(&zeros[..], Item::bytes));
        }
        Ok(stat)
    }

    /// All bytes of a small version, with few requests: its nodes level by level, then its blocks.
    ///
    /// # Errors
    /// As [`Store::read_at`].
    pub fn read_whole(&self, version: &Version) -> Result<Vec<u8>, Error> {
        let mut out = Vec::with_capacity(version.size as usize);
        let blocks: Vec<u64> = (0..version.blocks()).collect();
        for batch in blocks.chunks((SPAN_BYTES / u64::from(version.block_size)).max(1) as usize) {
            self.read_blocks(version, batch, &mut |_, bytes| out.extend_from_slice(bytes))?;
        }
        out.truncate(version.size as usize);
        Ok(out)
    }

    /// The names of blocks anywhere in a version; `None` for zero ones. `met` is told of every node on the way, level by
    /// level from the root, and perhaps more than once.
    pub(crate) fn scattered_names(
        &self,
        version: &Version,
        blocks: &[u64],
        met: &mut dyn FnMut(Name, u8),
    ) -> Result<Vec<Option<Name>>, Error> {
        let root = (!version.root.is_zero()).then_some(version.root);
        let mut at: Vec<Option<Name>> = vec![root; blocks.len()];
        for height in (1..=version.height()).rev() {
            let nodes = self.load_many(at.iter().flatten(), height)?;
            for (name, block) in at.iter_mut().zip(blocks) {
                let Some(node) = *name else { continue };
                met(node, height);
                let slot = block.checked_shr(4 * (u32::from(height) - 1)).unwrap_or(0) & 15;
                *name = nodes[&node].child(slot as usize);
            }
        }
        Ok(at)
    }

    /// Nodes of one height by name.
    fn load_many<'n>(
        &self,
        names: impl Iterator<Item = &'n Name>,
        height: u8,
    ) -> Result<HashMap<Name, Arc<Node>>, Error> {
        let mut out: HashMap<Name, Arc<Node>> = HashMap::new();
        let mut missing: BTreeSet<Name> = BTreeSet::new();
        for name in names {
            if out.contains_key(name) || missing.contains(name) {
                continue;
            }
            match self.nodes.peek(name, node_hash(name)) {
                Some(node) => drop(out.insert(*name, node)),
                None => drop(missing.insert(*name)),
            }
        }
        self.counters.nodes_loaded.fetch_add((out.len() + missing.len()) as u64, Ordering::Relaxed);
        let missing: Vec<Option<Name>> = missing.into_iter().map(Some).collect();
        let (items, _) = self.items_of("node", &missing)?;
        for (name, item) in missing.into_iter().flatten().zip(items.into_iter().flatten()) {
            let decoded = Node::decode(item.bytes()).map(Arc::new);
            let node = decoded.ok_or(Error::Unknown { kind: "node", name })?;
            let (node, _) = self.nodes.get(name, node_hash(&name), weigh_node, || Ok::<_, Error>(node))?;
            out.insert(name, node);
        }
        match out.iter().find(|(_, node)| node.height() != height) {
            Some((name, _)) => Err(Error::Unknown { kind: "node", name: *name }),
            None => Ok(out),
        }
    }

    /// Items by name, checked; `None` for `None`.
    pub(crate) fn items_of(
        &self,
        kind: &'static str,
        names: &[Option<Name>],
    ) -> Result<(Vec<Option<Item>>, ReadStat), Error> {
        let places = self.places_of(kind, names)?;
        let wanted = places.iter().flatten().map(|at| (at.pack, at.frame)).collect();
        let (frames, stored) = self.frames_of(wanted, kind == "node")?;
        let mut stat = ReadStat { stored_bytes: stored, ..ReadStat::default() };
        let mut items = Vec::with_capacity(names.len());
        for (name, at) in names.iter().zip(&places) {
            let (Some(name), Some(at)) = (name, at) else {
                stat.zero_blocks += 1;
                items.push(None);
                continue;
            };
            // What is not among the frames was moved meanwhile, or has to be read once more: by itself, with all that
            // a single read does about it.
            let mut last = frames.get(&(at.pack, at.frame)).map(|frame| (*at, Arc::clone(frame)));
            let item = self.item(kind, name, &mut last)?;
            stat.stored_bytes += item.stored;
            items.push(Some(item));
        }
        match stored {
            0 => stat.cached_blocks = (names.len() as u64) - stat.zero_blocks,
            _ => stat.fetched_blocks = (names.len() as u64) - stat.zero_blocks,
        }
        Ok((items, stat))
    }

    fn places_of(&self, kind: &'static str, names: &[Option<Name>]) -> Result<Vec<Option<Location>>, Error> {
        let place = |name: &Option<Name>| {
            name.map(|name| self.catalog.find(&name).ok_or(Error::Unknown { kind, name })).transpose()
        };
        names.iter().map(place).collect()
    }

    /// These frames, and the bytes that were read for them. Those that were moved or given up meanwhile, or do not
    /// decompress, are left out.
    fn frames_of(&self, wanted: BTreeSet<(u32, u32)>, with_more_nodes: bool) -> Result<(Frames, u64), Error> {
        let mut out = Frames::new();
        let mut missing = BTreeSet::new();
        for key in wanted {
            match self.frames.peek(&key, hash_of(key)) {
                Some(found) => drop(out.insert(key, found)),
                None => drop(missing.insert(key)),
            }
        }
        let mut stretches = self.stretches(missing);
        if with_more_nodes {
            self.take_nodes_along(&mut stretches);
        }
        let threads = if self.engine.is_remote() { REQUESTS } else { 1 };
        let read = in_parallel(threads, stretches, |stretch| self.read_stretch(&stretch))?;
        let mut stored = 0;
        for (key, frame, bytes) in read.into_iter().flatten() {
            stored += u64::from(bytes);
            let (frame, _) = self.frames.get(key, hash_of(key), |frame| frame.weight(), || Ok::<_, Error>(frame))?;
            out.insert(key, frame);
        }
        Ok((out, stored))
    }

    /// Adds the frames of nodes behind each stretch, in packs that are laid down in order.
    fn take_nodes_along(&self, stretches: &mut [Stretch]) {
        for at in 0..stretches.len() {
            let before = stretches.get(at + 1).map(|next| (next.pack.handle, next.frames[0].0));
            let Stretch { pack, frames } = &mut stretches[at];
            let start = u64::from(frames[0].1.offset);
            for number in frames[frames.len() - 1].0 + 1.. {
                let key = (pack.handle, number);
                let Some(info) = pack.frame(number).filter(|info| info.kind == Kind::Nodes && info.items > 0) else {
                    break;
                };
                let is_too_far = u64::from(info.offset) + u64::from(info.stored) - start > NODES_ALONG;
                let is_here = before == Some(key) || self.frames.peek(&key, hash_of(key)).is_some();
                if pack.laid_for() == 0 || is_too_far || is_here {
                    break;
                }
                frames.push((number, info));
            }
        }
    }

    /// Frames in the order in which they lie, those together that are read together.
    fn stretches(&self, frames: BTreeSet<(u32, u32)>) -> Vec<Stretch> {
        let mut out: Vec<Stretch> = Vec::new();
        let mut pack: Option<Arc<Pack>> = None;
        for (handle, number) in frames {
            if pack.as_ref().is_none_or(|pack| pack.handle != handle) {
                pack = self.catalog.pack(handle);
            }
            let Some(pack) = &pack else { continue };
            let Some(info) = pack.frame(number).filter(|info| info.items > 0) else { continue };
            match out.last_mut() {
                Some(stretch) if stretch.takes(pack, &info) => stretch.frames.push((number, info)),
                _ => out.push(Stretch { pack: Arc::clone(pack), frames: vec![(number, info)] }),
            }
        }
        out
    }

    fn read_stretch(&self, stretch: &Stretch) -> Result<Vec<Read>, Error> {
        let start = stretch.start();
        let mut bytes = vec![0; (stretch.end() - start) as usize];
        match self.with_object(&stretch.pack, |object| object.read_at(start, &mut bytes)) {
            Ok(()) => {}
            // A collection removed the pack this instant, and moved before what lives of it.
            Err(_) if self.catalog.pack(stretch.pack.handle).is_none() => return Ok(Vec::new()),
            Err(error) => return Err(Error::io("read", stretch.pack.id.pack_object(), error)),
        }
        self.counters.frames_read.fetch_add(stretch.frames.len() as u64, Ordering::Relaxed);
        let decode = |(number, info): &(u32, FrameInfo)| {
            let from = (u64::from(info.offset) - start) as usize;
            let frame = Frame::decode(info, bytes[from..from + info.stored as usize].to_vec()).ok()?;
            Some(((stretch.pack.handle, *number), Arc::new(frame), info.stored))
        };
        Ok(stretch.frames.iter().filter_map(decode).collect())
    }
}

fn hash_of((pack, frame): (u32, u32)) -> u64 {
    frame_hash(Location { pack, frame, slot: 0 })
}

fn check_blocks(version: &Version, blocks: &[u64]) -> Result<(), Error> {
    match blocks.iter().find(|block| **block >= version.blocks()) {
        None => Ok(()),
        Some(block) => {
            let size = u64::from(version.block_size);
            Err(Error::OutOfRange { offset: block.saturating_mul(size), len: size, size: version.size })
        }
    }
}
