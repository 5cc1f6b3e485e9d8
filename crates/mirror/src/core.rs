//! What all threads of a mirror share.

use crate::control::{Problem, RamPages, Stats};
use crate::foresight::Foresight;
use crate::front::aio::Aio;
use crate::front::direct;
use crate::front::name_of;
use crate::front::nbd::Exports;
use crate::front::session::Session;
use crate::front::waiting::WaitingRoom;
use crate::front::workers::Crew;
use crate::objects::{Object, Objects};
use crate::queue::{Demand, Outcome, PIECE, Prefetch};
use crate::ram::RamTally;
use crate::stats::{Vms, add};
use crate::tree::Tree;
use base::ByteRange;
use std::collections::{BTreeMap, HashSet};
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

/// Objects whose problems are kept.
const PROBLEMS_MAX: usize = 256;
/// The same problem is logged so often.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// The whole mirror.
pub(crate) struct Core {
    pub(crate) objects: Objects,
    pub(crate) tree: Tree,
    pub(crate) session: Session,
    pub(crate) session_name: String,
    pub(crate) vms: Vms,
    pub(crate) demand: Demand,
    pub(crate) prefetch: Prefetch,
    pub(crate) foresight: Foresight,
    pub(crate) waiting: WaitingRoom,
    pub(crate) problems: Problems,
    pub(crate) crew: Crew,
    pub(crate) exports: Exports,
    /// Reads of disks that the device works on.
    pub(crate) direct: Option<Aio<direct::Ticket>>,
    pub(crate) max_readahead: u32,
    /// RAM files removed by this mirror: reads of them are over.
    pub(crate) removed: Mutex<HashSet<u64>>,
    /// The end was asked for; it comes once that is answered.
    pub(crate) ending: AtomicBool,
    pub(crate) done: Sender<io::Result<()>>,
}

impl Core {
    /// Ends [`crate::run`]; the first word counts.
    pub(crate) fn stop(&self, with: io::Result<()>) {
        // Nobody listens any more where the end has come already.
        let _ = self.done.send(with);
    }

    /// The mount is gone, and all files of it are closed.
    pub(crate) fn unmounted(&self) {
        if !self.ending.load(Ordering::Acquire) {
            self.stop(Ok(()));
        }
    }

    /// Whether this mirror removed the RAM file.
    pub(crate) fn was_removed(&self, id: u64) -> bool {
        self.removed.lock().expect("no holder panics").contains(&id)
    }

    /// Lets the kernel forget what is gone. Reads that wait for it are given up first, or the kernel would wait for
    /// them here.
    pub(crate) fn withdraw(&self, gone: &[Object]) {
        {
            let mut removed = self.removed.lock().expect("no holder panics");
            removed.extend(gone.iter().filter(|o| matches!(o, Object::Ram(_))).map(Object::id));
        }
        self.waiting.nudge();
        for object in gone {
            self.prefetch.forget(object.id());
            let Some((parent, name)) = name_of(object) else { continue };
            let dropped = self.session.drop_pages(object.id()).and_then(|_| self.session.drop_name(parent, &name));
            if let Err(e) = dropped {
                log::warn!("the kernel keeps {name}, which is removed: {e}");
            }
        }
    }

    /// Fetches one piece ahead of demand.
    pub(crate) fn prefetch_piece(&self, id: u64, piece: ByteRange, vm: Option<&str>, buf: &mut [u8]) -> Outcome {
        let counters = vm.map_or_else(|| self.vms.others.clone(), |vm| self.vms.known(vm));
        match self.objects.get(id) {
            Some(Object::Ram(ram)) => {
                let Some(piece) = piece.intersect(&ByteRange::new(0, ram.map.size())) else { return Outcome::Done };
                let out = &mut buf[..piece.len() as usize];
                let mut tally = RamTally::default();
                let versions = self.objects.versions();
                if let Err(e) = ram.read(&|id| self.objects.ram(id), versions, piece.start, out, &mut tally) {
                    self.problems.note(id, &format!("prefetch: {e}"));
                    return Outcome::Stop;
                }
                match self.session.store(id, piece.start, out) {
                    Ok(true) => {
                        add(&counters.ram_prefetched_bytes, piece.len());
                        add(&counters.store_read_bytes, tally.store_bytes);
                        Outcome::Done
                    }
                    Ok(false) => Outcome::NotYet,
                    Err(e) => {
                        self.problems.note(id, &format!("prefetch: the kernel refuses pages: {e}"));
                        Outcome::Stop
                    }
                }
            }
            Some(Object::Overlay(disk)) => {
                let Some(piece) = piece.intersect(&ByteRange::new(0, disk.size)) else { return Outcome::Done };
                match disk.read(self.objects.versions(), piece.start, &mut buf[..piece.len() as usize]) {
                    Ok(tally) => {
                        let counters = self.vms.known(&disk.vm);
                        add(&counters.disk_fetched_bytes, tally.fetched_bytes);
                        add(&counters.store_read_bytes, tally.store_bytes);
                        Outcome::Done
                    }
                    Err(e) => {
                        self.problems.note(id, &format!("prefetch: {}", e.describe(id)));
                        Outcome::Stop
                    }
                }
            }
            Some(Object::View(_)) | None => Outcome::Stop,
        }
    }

    /// Bytes a prefetch buffer must hold.
    pub(crate) const PREFETCH_BUFFER: usize = PIECE as usize;

    /// Which pages of a VM's RAM were brought.
    pub(crate) fn ram_pages(&self, vm: &str) -> RamPages {
        let pairs = |runs: Vec<base::ByteRange>| runs.iter().map(|run| (run.start, run.end)).collect();
        RamPages { faulted: pairs(self.vms.faulted(vm)), brought: pairs(self.foresight.brought(vm)) }
    }

    /// All counters now.
    pub(crate) fn stats(&self, vm: Option<&str>) -> Stats {
        let mut waiting = self.waiting.list();
        waiting.retain(|w| vm.is_none() || w.vm.as_deref() == vm);
        Stats {
            vms: self.vms.snapshot(vm),
            others: self.vms.others.snapshot(),
            waiting,
            problems: self.problems.list(),
            prefetch_queued: self.prefetch.len(),
            streams: self.foresight.stats(),
            disk_streams: self.foresight.disks.running(),
            threads: self.crew.total.load(Ordering::Acquire) as u64,
        }
    }
}

/// What went wrong last, by object.
#[derive(Default)]
pub(crate) struct Problems(Mutex<BTreeMap<u64, (Problem, Instant)>>);

impl Problems {
    /// Keeps a problem, and logs it unless that was done a moment ago.
    pub(crate) fn note(&self, object: u64, what: &str) {
        let mut problems = self.0.lock().expect("no holder panics");
        let now = Instant::now();
        if let Some((problem, logged)) = problems.get_mut(&object) {
            problem.times += 1;
            if now.duration_since(*logged) >= LOG_EVERY {
                log::error!("{what} ({} times)", problem.times);
                *logged = now;
            }
            what.clone_into(&mut problem.what);
            return;
        }
        log::error!("{what}");
        if problems.len() >= PROBLEMS_MAX {
            problems.pop_first();
        }
        problems.insert(object, (Problem { object, what: what.to_owned(), times: 1 }, now));
    }

    fn list(&self) -> Vec<Problem> {
        self.0.lock().expect("no holder panics").values().map(|(p, _)| p.clone()).collect()
    }
}
