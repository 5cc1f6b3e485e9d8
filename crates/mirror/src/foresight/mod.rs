//! Fetching RAM ahead of offshoots, and recording what they touch.
//!
//! Each VM that it knows is a [`Member`]; the offshoots of one template on this node share a [`Stream`], since what
//! one fetched lies in the page cache for all. A stream's planner ([`guest::plan`]) hears of faults from the front and
//! of pages that were touched without a fault from looks at the VMs' page tables; a crew of threads fetches what it
//! says, paced by the link. Demand is answered by the front alone and never waits here.
//!
//! Nothing of this is kept: a mirror that takes over fetches on demand only.

pub(crate) mod disk;
mod stream;
mod touched;

pub(crate) use stream::Stream;
pub(crate) use touched::Member;

use crate::control::{Foresee, Recording, StreamStats};
use crate::core::Core;
use crate::front::pagemap::Pagemap;
use crate::resolve::neighbours;
use crate::stats::add;
use base::{PAGE, RamMap, Source};
use guest::plan::{Eager, Page, Planner, Policy, Template};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Condvar, Mutex, RwLock};
use std::time::{Duration, Instant};
use stream::Work;

/// Threads that fetch: enough of the pieces that a plan falls into for the longest link to be filled.
const THREADS: usize = 24;
/// Between two looks at page tables at first; later a fiftieth of the VM's age.
const LOOK: Duration = Duration::from_millis(20);
const LOOK_MAX: Duration = Duration::from_secs(2);
/// Bytes handed to the kernel at once at most.
const KEPT_BYTES: usize = crate::resolve::RUN_PAGES * PAGE as usize;
/// A file that the kernel does not know yet is tried again after this.
const NOT_YET: Duration = Duration::from_millis(5);

/// All streams and members.
#[derive(Default)]
pub(crate) struct Foresight {
    streams: Mutex<HashMap<u64, Arc<Stream>>>,
    /// Those of VMs whose hypervisors are yet to start.
    early: Mutex<HashMap<String, Arc<Stream>>>,
    members: RwLock<HashMap<String, Arc<Member>>>,
    /// Those who read disks.
    pub(crate) disks: disk::Disks,
    /// Rung when there may be something to fetch.
    bell: Arc<Bell>,
    /// Rung when there is somebody new to look at.
    looker: Bell,
}

/// What wakes threads that wait for something to do.
#[derive(Default)]
pub(crate) struct Bell {
    rung: Mutex<u64>,
    heard: Condvar,
}

impl Bell {
    /// Wakes those who wait.
    pub(crate) fn ring(&self) {
        *self.rung.lock().expect("no holder panics") += 1;
        self.heard.notify_all();
    }

    /// How often it was rung.
    fn count(&self) -> u64 {
        *self.rung.lock().expect("no holder panics")
    }

    /// Waits until it was rung more than `count` times, and not much longer than `longest`.
    fn wait(&self, count: u64, longest: Duration) {
        let rung = self.rung.lock().expect("no holder panics");
        drop(self.heard.wait_timeout_while(rung, longest, |rung| *rung == count).expect("no holder panics"));
    }
}

impl Foresight {
    /// Begins to fetch for a VM, to record it, or both; returns when the pages are here that it should not start
    /// without, or at once where its hypervisor is yet to start.
    pub(crate) fn begin(&self, core: &Core, spec: &Foresee) -> Result<(), String> {
        let map = RamMap::decode(&spec.map)?;
        let policy: Policy = spec.policy.parse()?;
        let eager = Eager::new(spec.eager)?;
        let pages = u32::try_from(map.size() / PAGE).map_err(|_| "more than 16 TiB of RAM".to_owned())?;
        let Some(address) = spec.address else {
            if let Some(stream) = self.stream(spec, map, (policy, eager))? {
                self.early.lock().expect("no holder panics").insert(spec.vm.clone(), stream);
                self.ring();
            }
            return Ok(());
        };
        let Some(pid) = core.vms.pid_of(&spec.vm) else {
            return Err(format!("VM {} is not registered; register it first", spec.vm));
        };
        let pagemap = Pagemap::open(pid).map_err(|e| format!("/proc/{pid}/pagemap: {e}"))?;
        let early = self.early.lock().expect("no holder panics").remove(&spec.vm);
        let stream = match early {
            Some(stream) => Some(stream),
            None => self.stream(spec, map, (policy, eager))?,
        };
        let first = stream.clone();
        let member = Arc::new(Member::new(spec, (address, pages), pagemap, (stream, self.bell.clone())));
        *core.vms.counters(&spec.vm).member.write().expect("no writer panics") = Some(member.clone());
        self.members.write().expect("no writer panics").insert(spec.vm.clone(), member);
        self.looker.ring();
        self.ring();
        if let Some(stream) = first {
            stream.await_first();
        }
        Ok(())
    }

    /// The stream of a template, made where there is none yet; none where nothing is to be fetched ahead.
    fn stream(
        &self,
        spec: &Foresee,
        map: RamMap,
        (policy, eager): (Policy, Eager),
    ) -> Result<Option<Arc<Stream>>, String> {
        let (Some(path), false) = (&spec.template, policy == Policy::None) else { return Ok(None) };
        let known = self.streams.lock().expect("no holder panics").get(&spec.ram).cloned();
        if known.is_some() {
            return Ok(known);
        }
        let bytes = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let template =
            Template::decode(&bytes, guest::plan::traits()).map_err(|e| format!("{}: {e}", path.display()))?;
        let pages = map.size() / PAGE;
        if template.stored.len() != pages {
            return Err(format!("{} is of {} pages, not {pages}", path.display(), template.stored.len()));
        }
        let made = Arc::new(Stream::new(Planner::new(Arc::new(template), policy, eager), map));
        Ok(Some(self.streams.lock().expect("no holder panics").entry(spec.ram).or_insert(made).clone()))
    }

    /// What a VM has touched so far; with `end`, nothing more is recorded.
    pub(crate) fn recording(&self, vm: &str, end: bool) -> Result<Recording, String> {
        let members = self.members.read().expect("no writer panics");
        let member = members.get(vm).ok_or_else(|| format!("VM {vm} is not recorded"))?;
        if let Err(e) = member.look() {
            log::debug!("the last look at {vm}: {e}");
        }
        Ok(member.recording(end))
    }

    /// Runs of the pages that were brought ahead for a VM and the other offshoots of its template.
    pub(crate) fn brought(&self, vm: &str) -> Vec<base::ByteRange> {
        let member = self.members.read().expect("no writer panics").get(vm).cloned();
        member.and_then(|member| Some(member.stream()?.brought())).unwrap_or_default()
    }

    /// Forgets a VM, and the stream that nobody follows any more.
    pub(crate) fn forget(&self, core: &Core, vm: &str) {
        self.early.lock().expect("no holder panics").remove(vm);
        if let Some(member) = self.members.write().expect("no writer panics").remove(vm) {
            *core.vms.known(vm).member.write().expect("no writer panics") = None;
            drop(member);
        }
        // Who fetches for it may hold it a moment longer, and sees it off.
        self.followed();
        self.ring();
    }

    /// The streams that somebody follows, or is about to; others are forgotten.
    fn followed(&self) -> Vec<Arc<Stream>> {
        let mut streams = self.streams.lock().expect("no holder panics");
        streams.retain(|_, stream| Arc::strong_count(stream) > 1);
        streams.values().cloned().collect()
    }

    /// Counters of all streams, by the RAM file that their VMs started from.
    pub(crate) fn stats(&self) -> Vec<StreamStats> {
        let streams = self.streams.lock().expect("no holder panics");
        let mut out: Vec<_> = streams.iter().map(|(&ram, stream)| stream.stats(ram)).collect();
        out.sort_by_key(|s| s.ram);
        out
    }

    /// Wakes those who fetch.
    pub(crate) fn ring(&self) {
        self.bell.ring();
    }

    /// Work for the stream that has been served least; waits for some.
    fn next(&self) -> (Arc<Stream>, Work) {
        loop {
            let heard = self.bell.count();
            let mut hungry: Vec<_> = self.followed().into_iter().map(|s| (s.flying(), s)).collect();
            hungry.sort_by_key(|(flying, _)| *flying);
            if let Some(found) = hungry.into_iter().find_map(|(_, s)| s.take().map(|work| (s, work))) {
                return found;
            }
            self.bell.wait(heard, LOOK_MAX);
        }
    }

    /// Looks at page tables for ever.
    pub(crate) fn watch(&self) {
        loop {
            let heard = self.looker.count();
            let mut next = Instant::now() + LOOK_MAX;
            let members: Vec<_> = self.members.read().expect("no writer panics").values().cloned().collect();
            let mut used = false;
            for member in members {
                let Some(due) = member.due() else { continue };
                if due <= Instant::now() {
                    match member.look() {
                        Ok(found) => used |= found,
                        // It has ended; whoever registered it will say so.
                        Err(e) => log::debug!("VM {} cannot be looked at: {e}", member.vm),
                    }
                }
                next = next.min(member.due().unwrap_or(next));
            }
            if used {
                self.ring();
            }
            let wait = next.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            self.looker.wait(heard, wait);
        }
    }
}

/// When a VM of this age is looked at next.
fn look_after(age: Duration) -> Duration {
    (age / 50).clamp(LOOK, LOOK_MAX)
}

/// Starts the threads.
pub(crate) fn start(
    core: &Arc<Core>,
    spawn: impl Fn(&str, Box<dyn FnOnce() + Send>) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let watching = core.clone();
    spawn("mirror-touched", Box::new(move || watching.foresight.watch()))?;
    (0..THREADS).try_for_each(|_| {
        let mine = core.clone();
        spawn("mirror-ahead", Box::new(move || fetch_for_ever(&mine)))
    })
}

fn fetch_for_ever(core: &Core) {
    // Behind what this process does for guests that wait, however it was started itself.
    let thread = Some(rustix::thread::gettid());
    let lower = rustix::process::getpriority_process(thread).map(|nice| (nice + 10).min(19));
    if let Err(e) = lower.and_then(|nice| rustix::process::setpriority_process(thread, nice)) {
        log::warn!("prefetch runs at full priority: {e}");
    }
    loop {
        // Nor does it wait for demand to cease: where the store is far, a guest waits for it nearly always, and neither
        // the link nor a processor is busy with that. The pace keeps the link's queue short.
        let (stream, work) = core.foresight.next();
        match work {
            Work::Sort(pages) => {
                // Beside the first pages, and once: it may have been laid down in order since this store was opened.
                if stream.batches() == 1 {
                    core.objects.versions().look_again();
                }
                let groups = sort(core, &stream, &pages);
                let failed = groups.as_ref().err().cloned();
                stream.sorted(&pages, groups);
                rest_after(failed);
            }
            Work::Fetch(pages) => {
                let (began, waits) = (Instant::now(), store::waits());
                let fetched = fetch(core, &stream, &pages);
                stream.arrived(&pages, (began.elapsed(), store::waits() != waits), &fetched);
                rest_after(fetched.err());
            }
        }
        core.foresight.ring();
    }
}

/// What failed is not tried again at once: by a fault, if at all.
fn rest_after(failed: Option<String>) {
    if let Some(why) = failed {
        log::debug!("fetching ahead: {why}");
        std::thread::sleep(NOT_YET);
    }
}

/// A page's place.
enum Place {
    Zero,
    /// In a version of the store.
    Stored {
        file: u64,
        version: String,
    },
    /// In a RAM file that the store does not have yet.
    Held {
        file: u64,
    },
}

fn place(core: &Core, stream: &Stream, page: Page) -> Result<Place, String> {
    let at = u64::from(page) * PAGE;
    let Source::File(id) = stream.map.lookup(at).0 else { return Ok(Place::Zero) };
    let file = id.0;
    let ram = core.objects.ram(file).ok_or_else(|| format!("RAM file {file:016x} is gone"))?;
    Ok(ram.stored(at).map_or(Place::Held { file }, |version| Place::Stored { file, version }))
}

/// Puts pages into groups that are best fetched at once, the most wanted first.
fn sort(core: &Core, stream: &Stream, pages: &[Page]) -> Result<Vec<Vec<Page>>, String> {
    let mut stored: Vec<(String, Vec<u64>)> = Vec::new();
    let mut others: Vec<u64> = Vec::new();
    for &page in pages {
        let at = u64::from(page) * PAGE;
        match place(core, stream, page)? {
            Place::Stored { version, .. } => match stored.iter_mut().find(|(known, _)| *known == version) {
                Some((_, list)) => list.push(at),
                None => stored.push((version, vec![at])),
            },
            Place::Zero | Place::Held { .. } => others.push(at),
        }
    }
    let mut groups = neighbours(&others);
    for (version, list) in stored {
        groups.extend(core.objects.versions().together(&version, &list).map_err(|e| e.to_string())?);
    }
    Ok(groups.into_iter().map(|group| group.iter().map(|at| (at / PAGE) as Page).collect()).collect())
}

/// Brings pages that lie together into the page cache of the files that the RAM map names for them. Says how many bytes
/// came.
fn fetch(core: &Core, stream: &Stream, pages: &[Page]) -> Result<u64, String> {
    let mut stored: BTreeMap<(u64, String), Vec<u64>> = BTreeMap::new();
    let mut came = 0;
    for &page in pages {
        let at = u64::from(page) * PAGE;
        match place(core, stream, page)? {
            Place::Zero => {}
            Place::Stored { file, version } => stored.entry((file, version)).or_default().push(at),
            Place::Held { file } => {
                let ram = core.objects.ram(file).ok_or_else(|| format!("RAM file {file:016x} is gone"))?;
                let (mut buf, mut tally) = ([0; PAGE as usize], crate::ram::RamTally::default());
                let (files, versions) = (&|id| core.objects.ram(id), core.objects.versions());
                ram.read(files, versions, at, &mut buf, &mut tally).map_err(|e| e.to_string())?;
                add(&core.vms.others.store_read_bytes, tally.store_bytes);
                came += keep(core, file, at, &buf)?;
            }
        }
    }
    for ((file, version), mut list) in stored {
        list.sort_unstable();
        // Neighbours are handed to the kernel together.
        let (mut start, mut buf, mut kept) = (0, Vec::new(), Ok::<u64, String>(0));
        let read = core.objects.versions().read_pages(&version, &list, &mut |at, bytes| {
            if kept.is_ok() && (start + buf.len() as u64 != at || buf.len() >= KEPT_BYTES) {
                let done = keep(core, file, start, &buf);
                kept = kept.clone().and_then(|before| Ok(before + done?));
                (start, buf) = (at, Vec::with_capacity(KEPT_BYTES));
            }
            buf.extend_from_slice(bytes);
        });
        add(&core.vms.others.store_read_bytes, read.map_err(|e| e.to_string())?);
        came += kept? + keep(core, file, start, &buf)?;
    }
    Ok(came)
}

/// Puts bytes into the page cache of a RAM file; says how many.
fn keep(core: &Core, file: u64, at: u64, bytes: &[u8]) -> Result<u64, String> {
    if bytes.is_empty() {
        return Ok(0);
    }
    match core.session.store(file, at, bytes) {
        Ok(true) => {}
        Ok(false) => return Err("the kernel does not know the file yet".to_owned()),
        Err(e) => return Err(e.to_string()),
    }
    add(&core.vms.others.ram_prefetched_bytes, bytes.len() as u64);
    Ok(bytes.len() as u64)
}
