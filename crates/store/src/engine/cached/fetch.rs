//! Reading through the cache: what is here, what somebody is fetching, and what is fetched now.

use super::{RUN_BYTES, Shared, count, is_away, size_by_index};
use crate::chunks::Key;
use crate::chunks::disk::Aligned;
use crate::engine::Object;
use crate::pack::PackId;
use crate::waits;
use base::ByteRange;
use std::io;
use std::ops::{Range, RangeInclusive};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

/// Times a read looks again because what it found was evicted or gone bad meanwhile; then it goes past the cache.
const LOOKS_MAX: usize = 4;
/// A disk that was full is tried again after so many chunks, with so many more.
const FULL_TRY_AFTER: u64 = 256;
const FULL_TRY_MORE: usize = 16;
/// Readers of a pack that are told apart.
const STREAMS: usize = 4;

/// A pack open for reading.
pub(super) struct OpenPack {
    shared: Arc<Shared>,
    name: String,
    id: PackId,
    /// Where it ends, once known; a pack has never 0 bytes.
    end: AtomicU64,
    below: Mutex<Option<Arc<dyn Object>>>,
    streams: Mutex<Streams>,
}

/// Readers that go through a pack in order. What they miss is fetched together with what they will want next, twice as
/// much each time, so that one who reads everything needs few requests, and one who reads here and there gets no more
/// than he asks for.
#[derive(Default)]
struct Streams {
    /// The chunk that each will want next, and the chunks fetched ahead of it last time.
    last: [Option<(u16, u16)>; STREAMS],
    oldest: usize,
}

impl Streams {
    /// A reader wants these chunks; says how many behind them to fetch along with a missing one, at most `most`.
    fn ahead(&mut self, wanted: &RangeInclusive<u16>, most: u16) -> u16 {
        let next = wanted.end().saturating_add(1);
        // The chunk that it left off in, or the one behind that.
        let goes_on = |(expected, _): &&mut (u16, u16)| [0, 1].contains(&expected.wrapping_sub(*wanted.start()));
        if let Some((expected, ahead)) = self.last.iter_mut().flatten().find(goes_on) {
            // Within one chunk nothing is learnt.
            if next > *expected {
                *ahead = (*ahead * 2 + 1).min(most);
            }
            *expected = next;
            return *ahead;
        }
        self.last[self.oldest] = Some((next, 0));
        self.oldest = (self.oldest + 1) % STREAMS;
        0
    }
}

/// Bytes of a run of chunks that were fetched.
struct Fetched {
    first: u16,
    buf: Aligned,
    len: usize,
}

/// Why there are none.
#[derive(Clone)]
enum Failure {
    /// The engine below said so.
    Refused(io::ErrorKind, String),
    /// Whoever was to fetch did not come to it.
    Abandoned,
}

/// A fetch under way, for all who wait for it.
#[derive(Default)]
pub(super) struct Flight {
    landed: Mutex<Option<Result<Arc<Fetched>, Failure>>>,
    changed: Condvar,
}

impl Flight {
    fn land(&self, result: Result<Arc<Fetched>, Failure>) {
        let mut landed = self.landed.lock().expect("no panic while a flight is locked");
        if landed.is_none() {
            *landed = Some(result);
            self.changed.notify_all();
        }
    }

    fn wait(&self) -> Result<Arc<Fetched>, Failure> {
        let mut landed = self.landed.lock().expect("no panic while a flight is locked");
        loop {
            match &*landed {
                Some(result) => return result.clone(),
                None => landed = self.changed.wait(landed).expect("no panic while a flight is locked"),
            }
        }
    }
}

/// The duty to fetch a run of chunks. Dropped undone, those who wait look again.
pub(super) struct Duty<'a> {
    shared: &'a Shared,
    pack: PackId,
    numbers: Range<u16>,
    flight: Arc<Flight>,
}

impl Drop for Duty<'_> {
    fn drop(&mut self) {
        self.flight.land(Err(Failure::Abandoned));
        let mut state = self.shared.state();
        for number in self.numbers.clone() {
            state.flights.remove(&Key { pack: self.pack, number });
        }
    }
}

/// What a read finds.
#[derive(Default)]
struct Findings<'a> {
    here: Vec<(u16, u32)>,
    coming: Vec<(u16, Arc<Flight>)>,
    duties: Vec<Duty<'a>>,
}

impl OpenPack {
    pub(super) fn new(shared: Arc<Shared>, name: &str, id: PackId) -> Self {
        Self {
            shared,
            name: name.to_owned(),
            id,
            end: AtomicU64::new(0),
            below: Mutex::default(),
            streams: Mutex::default(),
        }
    }

    fn below(&self) -> io::Result<Arc<dyn Object>> {
        let mut below = self.below.lock().expect("no panic while an object is locked");
        if let Some(object) = &*below {
            return Ok(Arc::clone(object));
        }
        let object = self.shared.observe(self.shared.origin.open(&self.name))?;
        *below = Some(Arc::clone(&object));
        Ok(object)
    }

    /// Where the pack ends, for reads. Of one whose index was read nobody is asked: a first read waits for one trip less.
    pub(super) fn end(&self) -> io::Result<u64> {
        match self.end.load(Ordering::Relaxed) {
            0 => {
                let known = self.shared.state().index.pack_size(self.id);
                let known = known.or_else(|| size_by_index(&self.shared, self.id));
                let end = known.map_or_else(|| self.size(), Ok)?;
                self.end.store(end, Ordering::Relaxed);
                Ok(end)
            }
            end => Ok(end),
        }
    }

    /// Fetches a run past the cache's files, and counts it.
    fn fetch(&self, range: Range<u64>, buf: &mut [u8]) -> io::Result<()> {
        let fetched = self.below().and_then(|below| self.shared.observe(below.read_at(range.start, buf)));
        fetched.map_err(|error| {
            if !is_away(&error) {
                return error;
            }
            let what = format!(
                "{} does not answer, and the cache does not hold bytes {} to {} of {}: {error}",
                self.shared.origin.describe(),
                range.start,
                range.end,
                self.name
            );
            io::Error::new(error.kind(), what)
        })?;
        count(&self.shared.counters.fetches, 1);
        count(&self.shared.counters.fetched_bytes, range.end - range.start);
        Ok(())
    }

    /// Does a duty: fetches, tells those who wait, then keeps.
    fn fulfil(&self, duty: Duty<'_>, size: u64) -> io::Result<Arc<Fetched>> {
        let chunk = self.shared.chunk as u64;
        let start = u64::from(duty.numbers.start) * chunk;
        let end = (u64::from(duty.numbers.end) * chunk).min(size);
        let len = (end - start) as usize;
        let mut buf = Aligned::new(len);
        if let Err(error) = self.fetch(start..end, &mut buf.bytes_mut()[..len]) {
            duty.flight.land(Err(Failure::Refused(error.kind(), error.to_string())));
            return Err(error);
        }
        let fetched = Arc::new(Fetched { first: duty.numbers.start, buf, len });
        duty.flight.land(Ok(Arc::clone(&fetched)));
        self.shared.keep(Key { pack: self.id, number: duty.numbers.start }, size, fetched.buf.bytes(), len);
        Ok(fetched)
    }

    /// Fetches what is missing of a range, run by run, waiting for a turn before each.
    pub(super) fn bring(&self, range: &ByteRange, mut may_go_on: impl FnMut() -> bool) -> io::Result<()> {
        let size = self.end()?;
        let range = ByteRange::new(range.start.min(size), range.end.min(size));
        let Some(numbers) = self.shared.numbers(&range) else { return Ok(()) };
        let numbers: Vec<u16> = numbers.collect();
        for run in numbers.chunks(RUN_BYTES / self.shared.chunk) {
            if !may_go_on() {
                return Ok(());
            }
            for duty in self.shared.find(self.id, run, false, 0).duties {
                let fetched = self.fulfil(duty, size)?;
                count(&self.shared.counters.prefetched_bytes, fetched.len as u64);
            }
        }
        Ok(())
    }
}

/// The part of `out` (the bytes of the pack from `offset`) that chunk `number` has, and where it starts in the chunk.
fn part(out: &mut [u8], offset: u64, number: u16, chunk: usize) -> (usize, &mut [u8]) {
    let base = u64::from(number) * chunk as u64;
    let start = base.max(offset);
    let end = (base + chunk as u64).min(offset + out.len() as u64);
    ((start - base) as usize, &mut out[(start - offset) as usize..(end - offset) as usize])
}

impl Fetched {
    fn copy(&self, number: u16, chunk: usize, offset: u64, out: &mut [u8]) {
        let (at, part) = part(out, offset, number, chunk);
        let at = usize::from(number - self.first) * chunk + at;
        part.copy_from_slice(&self.buf.bytes()[at..at + part.len()]);
    }
}

impl Object for OpenPack {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        let size = self.end()?;
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= size);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        let range = ByteRange::new(offset, end);
        let shared = &*self.shared;
        let fits = (size - 1) / (shared.chunk as u64) < u64::from(u16::MAX);
        let Some(numbers) = shared.numbers(&range).filter(|_| fits) else {
            waits::note();
            return self.fetch(offset..end, buf);
        };
        let mut todo: Vec<u16> = numbers.collect();
        let (first, last) = (todo[0], todo[todo.len() - 1]);
        let in_pack = (size.div_ceil(shared.chunk as u64) - 1 - u64::from(last)) as u16;
        let most = in_pack.min((RUN_BYTES / shared.chunk) as u16);
        // Who asks for much at once knows what he wants; frames are smaller than a chunk.
        let ahead = match buf.len() > shared.chunk {
            true => 0,
            false => self.streams.lock().expect("no panic while streams are locked").ahead(&(first..=last), most),
        };
        for look in 0..LOOKS_MAX {
            let found = shared.find(self.id, &todo, true, ahead.min(most));
            if look == 0 {
                let missed: usize =
                    found.duties.iter().map(|duty| duty.numbers.clone().filter(|n| *n <= last).count()).sum();
                count(&shared.counters.misses, missed as u64);
                count(&shared.counters.hits, (todo.len() - missed) as u64);
            }
            todo.clear();
            // What others wait for comes first.
            for duty in found.duties {
                let _demand = shared.queue.demand();
                waits::note();
                let numbers = duty.numbers.clone();
                let fetched = self.fulfil(duty, size)?;
                numbers.filter(|n| *n <= last).for_each(|number| fetched.copy(number, shared.chunk, offset, buf));
            }
            for (number, slot) in found.here {
                let (at, part) = part(buf, offset, number, shared.chunk);
                if !shared.disk.read(slot, Key { pack: self.id, number }, at, part) {
                    shared.mistrust(Key { pack: self.id, number }, slot);
                    todo.push(number);
                }
            }
            for (number, flight) in found.coming {
                waits::note();
                match flight.wait() {
                    Ok(fetched) => fetched.copy(number, shared.chunk, offset, buf),
                    Err(Failure::Refused(kind, what)) => return Err(io::Error::new(kind, what)),
                    Err(Failure::Abandoned) => todo.push(number),
                }
            }
            if todo.is_empty() {
                return Ok(());
            }
            todo.sort_unstable();
        }
        let _demand = shared.queue.demand();
        waits::note();
        self.fetch(offset..end, buf)
    }

    /// As it is below, so that one that was cut short shows.
    fn size(&self) -> io::Result<u64> {
        match self.below().and_then(|object| self.shared.observe(object.size())) {
            Err(error) if is_away(&error) => {
                let known = self.shared.state().index.pack_size(self.id);
                known.or_else(|| size_by_index(&self.shared, self.id)).ok_or(error)
            }
            found => found,
        }
    }

    fn distrust(&self, range: ByteRange) -> bool {
        let dropped = self.shared.drop_chunks(self.id, &range);
        count(&self.shared.counters.healed, dropped);
        // What it is over may have kept copies as well.
        if let Ok(below) = self.below() {
            below.distrust(range);
        }
        // Also where nothing was here: what was fetched and not kept may have been spoilt on its way.
        true
    }
}

impl Shared {
    /// Sorts chunks into what is here, what is coming, and what the caller has the duty to fetch; where the last one is
    /// missing, with up to `ahead` missing ones behind it.
    fn find(&self, pack: PackId, numbers: &[u16], used: bool, ahead: u16) -> Findings<'_> {
        let mut out = Findings::default();
        let mut missing: Vec<Range<u16>> = Vec::new();
        let mut state = self.state();
        for &number in numbers {
            let key = Key { pack, number };
            let found = if used { state.index.find_used(&key) } else { state.index.find(&key) };
            if let Some(slot) = found {
                out.here.push((number, slot));
            } else if let Some(flight) = state.flights.get(&key) {
                out.coming.push((number, Arc::clone(flight)));
            } else {
                let full = |run: &Range<u16>| run.len() * self.chunk >= RUN_BYTES;
                match missing.last_mut() {
                    Some(run) if run.end == number && !full(run) => run.end += 1,
                    _ => missing.push(number..number.saturating_add(1)),
                }
            }
        }
        if let (Some(run), Some(last)) = (missing.last_mut(), numbers.last())
            && run.end == last.saturating_add(1)
        {
            let until = run.end.saturating_add(ahead).min(run.start.saturating_add((RUN_BYTES / self.chunk) as u16));
            let absent = |number: u16| {
                let key = Key { pack, number };
                state.index.find(&key).is_none() && !state.flights.contains_key(&key)
            };
            run.end = (run.end..until).find(|number| !absent(*number)).unwrap_or(until.max(run.end));
        }
        for numbers in missing {
            let flight = Arc::<Flight>::default();
            for number in numbers.clone() {
                state.flights.insert(Key { pack, number }, Arc::clone(&flight));
            }
            out.duties.push(Duty { shared: self, pack, numbers, flight });
        }
        out
    }

    /// Keeps a run of chunks from `key` on that was fetched, where the disk takes it: those that get slots side by side
    /// with one write.
    fn keep(&self, key: Key, pack_size: u64, bytes: &[u8], len: usize) {
        let chunks = len.div_ceil(self.chunk) as u32;
        let mut done = 0;
        while done < chunks {
            let Some((slot, slots)) = self.reserve(chunks - done) else {
                count(&self.counters.uncached, (chunks - done).into());
                return;
            };
            let from = done as usize * self.chunk;
            let part = (len - from).min(slots as usize * self.chunk);
            let key = Key { number: key.number + done as u16, ..key };
            self.keep_in(slot..slot + slots, key, pack_size, &bytes[from..], part);
            done += slots;
        }
    }

    /// Slots side by side for up to so many chunks: the first, and how many. Where the cache is full they are single ones:
    /// what goes lies anywhere.
    fn reserve(&self, most: u32) -> Option<(u32, u32)> {
        let mut state = self.state();
        if state.index.room().1 < state.wanted && state.since_full >= FULL_TRY_AFTER {
            state.since_full = 0;
            let more = (state.index.room().1 + FULL_TRY_MORE).min(state.wanted);
            // More room is never refused.
            let _ = state.index.set_limit(more);
        }
        let first = state.index.reserve();
        let mut slots = 1;
        while first.is_some_and(|first| slots < most && state.index.reserve_next(first + slots)) {
            slots += 1;
        }
        state.since_full += u64::from(if first.is_some() { slots } else { most });
        Some((first?, slots))
    }

    fn keep_in(&self, slots: Range<u32>, key: Key, pack_size: u64, bytes: &[u8], len: usize) {
        let written = self.disk.write(slots.start, key, pack_size, bytes, len);
        if written.is_ok() {
            let mut state = self.state();
            for (slot, number) in slots.zip(key.number..) {
                state.index.publish(slot, Key { number, ..key }, pack_size);
            }
        } else {
            count(&self.counters.uncached, slots.len() as u64);
            // Its own error would only repeat the one that is to be told.
            slots.clone().for_each(|slot| _ = self.disk.clear(slot));
            let mut state = self.state();
            slots.for_each(|slot| state.index.give_back(slot));
            // Slots that have their space on the disk are used again from now on, and no new ones.
            let (used, limit) = state.index.room();
            let least = state.index.pinned().min(limit);
            let _ = state.index.set_limit(used.clamp(least, limit));
        }
        self.observe_disk(written);
        self.observe_surplus();
    }

    /// A bound that was lowered while chunks were being written is kept to now.
    fn observe_surplus(&self) {
        let (used, limit) = self.state().index.room();
        if used > limit {
            self.observe_disk(self.trim());
        }
    }

    /// Drops a chunk that does not match its record, unless its slot was filled anew meanwhile.
    fn mistrust(&self, key: Key, slot: u32) {
        let taken = {
            let mut state = self.state();
            if state.index.find(&key) == Some(slot) { state.index.take(&key) } else { None }
        };
        if let Some(slot) = taken {
            count(&self.counters.healed, 1);
            self.release(slot);
        }
    }
}
