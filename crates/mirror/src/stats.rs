//! Counters for each VM, and whose thread a request came from.

use crate::foresight::Member;
use base::{Bitmap, ByteRange, PAGE};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

/// Buckets of a latency histogram: bucket `i` counts what took less than 2^i microseconds and no less than the
/// half of it; the last one holds all that took longer.
pub const BUCKETS: usize = 28;

/// How long an answer to "whose thread is this" is believed: threads come and go, and their numbers come again.
const THREAD_TTL: Duration = Duration::from_secs(5);
const THREADS_MAX: usize = 65_536;

/// A histogram with power-of-two buckets, of microseconds.
#[derive(Default)]
pub(crate) struct Histogram([AtomicU64; BUCKETS]);

impl Histogram {
    /// Counts one latency.
    pub(crate) fn add(&self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = (u64::BITS - us.leading_zeros()) as usize;
        self.0[bucket.min(BUCKETS - 1)].fetch_add(1, Ordering::Relaxed);
    }

    fn snapshot(&self) -> Vec<u64> {
        self.0.iter().map(|b| b.load(Ordering::Relaxed)).collect()
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// What one VM has cost so far.
        #[derive(Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: AtomicU64,)*
            pub(crate) ram_latency: Histogram,
            pub(crate) disk_read_latency: Histogram,
            /// What is fetched ahead for it, and recorded.
            pub(crate) member: RwLock<Option<Arc<Member>>>,
            /// Pages of its RAM that it waited for.
            pub(crate) faulted: Faulted,
        }

        /// One VM's counters at one moment.
        #[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
        pub struct VmStats {
            $($(#[$doc])* pub $name: u64,)*
            /// RAM faults by latency; see [`BUCKETS`].
            pub ram_latency_us: Vec<u64>,
            /// Disk reads by latency; see [`BUCKETS`].
            pub disk_read_latency_us: Vec<u64>,
        }

        impl Counters {
            /// All counters now.
            pub(crate) fn snapshot(&self) -> VmStats {
                VmStats {
                    $($name: self.$name.load(Ordering::Relaxed),)*
                    ram_latency_us: self.ram_latency.snapshot(),
                    disk_read_latency_us: self.disk_read_latency.snapshot(),
                }
            }
        }
    };
}

counters! {
    /// Reads of RAM files that the kernel asked for.
    ram_faults,
    /// Of those, reads that waited for the store's medium: the server, or without one the local disk.
    ram_waited_faults,
    /// Bytes of RAM answered to them.
    ram_fetched_bytes,
    /// Of those, bytes read from holders.
    ram_from_holder_bytes,
    /// Of those, bytes read from versions of the store.
    ram_from_store_bytes,
    /// Bytes of RAM pushed into the page cache by prefetch, for the VM that asked.
    ram_prefetched_bytes,
    /// Reads of disks.
    disk_reads,
    /// Bytes read from disks.
    disk_read_bytes,
    /// Reads served without the store.
    disk_hits,
    /// Bytes that disks read from versions of the store.
    disk_fetched_bytes,
    /// Bytes written to disks.
    disk_written_bytes,
    /// Flushes of disks.
    disk_flushes,
    /// Compressed bytes the store read for this VM.
    store_read_bytes,
}

/// The pages of a VM's RAM that it waited for: a page lies at the same offset in all the files that its RAM is made of.
#[derive(Default)]
pub(crate) struct Faulted(Mutex<Option<Bitmap>>);

impl Faulted {
    /// Bytes of a RAM of `size` bytes were read for it.
    pub(crate) fn note(&self, size: u64, offset: u64, len: u64) {
        let mut slot = self.0.lock().expect("no holder panics");
        let pages = slot.get_or_insert_with(|| Bitmap::new(size / PAGE));
        pages.set_range((offset / PAGE).min(pages.len()), (offset + len).div_ceil(PAGE).min(pages.len()));
    }

    /// Runs of page numbers.
    pub(crate) fn runs(&self) -> Vec<ByteRange> {
        self.0.lock().expect("no holder panics").as_ref().map(|pages| pages.ranges(1)).unwrap_or_default()
    }
}

/// Adds to a counter.
pub(crate) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

/// The VM of a thread, and when that was looked up.
type Seen = (Option<Arc<Counters>>, Instant);

/// The VMs known, and their threads.
#[derive(Default)]
pub(crate) struct Vms {
    by_name: RwLock<HashMap<String, Arc<Counters>>>,
    by_pid: RwLock<HashMap<u32, Arc<Counters>>>,
    /// Thread -> VM, as last looked up.
    threads: Mutex<HashMap<u32, Seen>>,
    /// Reads by threads of no VM that is registered.
    pub(crate) others: Arc<Counters>,
}

impl Vms {
    /// The counters of `vm`, made if need be.
    pub(crate) fn counters(&self, vm: &str) -> Arc<Counters> {
        if let Some(found) = self.by_name.read().expect("no writer panics").get(vm) {
            return found.clone();
        }
        self.by_name.write().expect("no writer panics").entry(vm.to_owned()).or_default().clone()
    }

    /// The counters of `vm`, or those for others: a late request must not bring a VM back that was forgotten.
    pub(crate) fn known(&self, vm: &str) -> Arc<Counters> {
        self.by_name.read().expect("no writer panics").get(vm).unwrap_or(&self.others).clone()
    }

    /// Runs of the pages that `vm` waited for.
    pub(crate) fn faulted(&self, vm: &str) -> Vec<ByteRange> {
        let vms = self.by_name.read().expect("no writer panics");
        vms.get(vm).map(|counters| counters.faulted.runs()).unwrap_or_default()
    }

    /// From now on faults of threads of process `pid` count for `vm`.
    pub(crate) fn register(&self, vm: &str, pid: u32) {
        let counters = self.counters(vm);
        let mut pids = self.by_pid.write().expect("no writer panics");
        pids.retain(|_, c| !Arc::ptr_eq(c, &counters));
        pids.insert(pid, counters);
        drop(pids);
        self.threads.lock().expect("no holder panics").clear();
    }

    /// Forgets `vm` and its counters; says whether it was known.
    pub(crate) fn unregister(&self, vm: &str) -> bool {
        let Some(counters) = self.by_name.write().expect("no writer panics").remove(vm) else { return false };
        self.by_pid.write().expect("no writer panics").retain(|_, c| !Arc::ptr_eq(c, &counters));
        self.threads.lock().expect("no holder panics").clear();
        true
    }

    /// The counters of the VM whose thread `tid` is, or those for others.
    pub(crate) fn of_thread(&self, tid: u32) -> Arc<Counters> {
        let now = Instant::now();
        if let Some((vm, at)) = self.threads.lock().expect("no holder panics").get(&tid)
            && now.duration_since(*at) < THREAD_TTL
        {
            return vm.as_ref().unwrap_or(&self.others).clone();
        }
        let vm = process_of(tid).and_then(|pid| self.by_pid.read().expect("no writer panics").get(&pid).cloned());
        let mut threads = self.threads.lock().expect("no holder panics");
        if threads.len() >= THREADS_MAX {
            threads.clear();
        }
        threads.insert(tid, (vm.clone(), now));
        vm.unwrap_or_else(|| self.others.clone())
    }

    /// The process of `vm`, where it is registered.
    pub(crate) fn pid_of(&self, vm: &str) -> Option<u32> {
        let counters = self.by_name.read().expect("no writer panics").get(vm)?.clone();
        let pids = self.by_pid.read().expect("no writer panics");
        pids.iter().find(|(_, c)| Arc::ptr_eq(c, &counters)).map(|(pid, _)| *pid)
    }

    /// The name of the VM whose thread `tid` is.
    pub(crate) fn name_of_thread(&self, tid: u32) -> Option<String> {
        let counters = self.of_thread(tid);
        let names = self.by_name.read().expect("no writer panics");
        names.iter().find(|(_, c)| Arc::ptr_eq(c, &counters)).map(|(name, _)| name.clone())
    }

    /// All VMs' counters, or only those of one.
    pub(crate) fn snapshot(&self, only: Option<&str>) -> HashMap<String, VmStats> {
        let vms = self.by_name.read().expect("no writer panics");
        let wanted = vms.iter().filter(|(name, _)| only.is_none_or(|o| o == *name));
        wanted.map(|(name, counters)| (name.clone(), counters.snapshot())).collect()
    }

    /// The registered VMs and their processes.
    pub(crate) fn registered(&self) -> HashMap<String, u32> {
        let names = self.by_name.read().expect("no writer panics");
        let pids = self.by_pid.read().expect("no writer panics");
        let pid_of = |c: &Arc<Counters>| pids.iter().find(|(_, p)| Arc::ptr_eq(p, c)).map(|(pid, _)| *pid);
        names.iter().filter_map(|(name, c)| Some((name.clone(), pid_of(c)?))).collect()
    }
}

/// A line of `/proc/<tid>/status`.
fn status_field(status: &str, name: &str) -> Option<String> {
    status.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':')).map(|v| v.trim().to_owned())
}

/// The process that thread `tid` belongs to.
fn process_of(tid: u32) -> Option<u32> {
    status_field(&std::fs::read_to_string(format!("/proc/{tid}/status")).ok()?, "Tgid")?.parse().ok()
}

/// Whether thread `tid` is gone or about to die of SIGKILL: nobody will see what it is answered.
pub(crate) fn is_dying(tid: u32) -> bool {
    let Ok(status) = std::fs::read_to_string(format!("/proc/{tid}/status")) else { return true };
    let killed = |name| {
        let mask = status_field(&status, name).and_then(|m| u64::from_str_radix(&m, 16).ok());
        mask.is_some_and(|m| m & (1 << (libc::SIGKILL - 1)) != 0)
    };
    killed("SigPnd") || killed("ShdPnd")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_fall_into_power_of_two_buckets() {
        let histogram = Histogram::default();
        for us in [0, 1, 2, 3, 4, 1000, u64::MAX / 2] {
            histogram.add(Duration::from_micros(us));
        }
        let counted = histogram.snapshot();
        assert_eq!((counted[0], counted[1], counted[2], counted[3]), (1, 1, 2, 1));
        assert_eq!((counted[10], counted[BUCKETS - 1]), (1, 1));
    }

    #[test]
    fn pages_waited_for_are_kept_as_runs_and_only_of_vms_that_are_known() {
        let vms = Vms::default();
        let counters = vms.counters("web");
        for (offset, len) in [(5 * PAGE, PAGE), (6 * PAGE, 2 * PAGE), (5 * PAGE, PAGE), (99 * PAGE, 8 * PAGE)] {
            counters.faulted.note(100 * PAGE, offset, len);
        }
        assert_eq!(vms.faulted("web"), [ByteRange::new(5, 8), ByteRange::new(99, 100)]);
        assert_eq!(vms.faulted("nobody"), []);
    }

    #[test]
    fn a_thread_counts_for_the_vm_of_its_process() {
        let vms = Vms::default();
        let tid = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
        assert!(Arc::ptr_eq(&vms.of_thread(tid), &vms.others), "no VM is registered");
        vms.register("web", std::process::id());
        assert!(Arc::ptr_eq(&vms.of_thread(tid), &vms.counters("web")), "a registration is seen at once");
        assert_eq!(vms.registered(), HashMap::from([("web".to_owned(), std::process::id())]));
        assert!(vms.unregister("web") && !vms.unregister("web"));
        assert!(Arc::ptr_eq(&vms.known("web"), &vms.others) && vms.snapshot(None).is_empty());
        assert!(Arc::ptr_eq(&vms.of_thread(tid), &vms.others));
        assert!(!is_dying(tid));
        assert!(is_dying(u32::MAX));
    }
}
