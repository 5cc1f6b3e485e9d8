//! The resident library: preloaded into an unmodified QEMU (7.2 or later), it makes guest RAM that QEMU
//! believes shared a private, forkable mapping, and lets the daemon freeze it.
//!
//! QEMU leaves RAM out of a migration stream (`x-ignore-shared`) only where it believes the RAM shared, so every
//! VM is given `memory-backend-file,share=on`, and this library turns that one mapping private. Without the
//! variable [`base::resident::ENV_SOCKET`] it does nothing at all. The wire protocol is in [`base::resident`].
//!
//! - `hooks`: the interposed functions and the constructor. They run in any thread of the hypervisor, in its
//!   forks, and before the constructor has run: outside the RAM they are plain system calls, without a lock.
//! - `ram`: the RAM: placeholder, RAM map, advice, discards. One mutex guards it.
//! - `track`: which pages were written since the last freeze.
//! - `holder`: fork-hold; children that keep a frozen image alive.
//! - `control`: the thread that answers the daemon.
//! - `sys`: the kernel's calls and structures, those that the libc crate lacks included.
//!
//! # What it relies on
//!
//! From `Documentation/admin-guide/mm/userfaultfd.rst`, `Documentation/admin-guide/mm/pagemap.rst`
//! (section "`PAGEMAP_SCAN` IOCTL"), `fs/proc/task_mmu.c`, `mm/memory.c`, `mm/vma.c` and the manual pages named;
//! each has a test in `tests/` that fails where a kernel behaves otherwise.
//!
//! | behaviour | from |
//! |---|---|
//! | `UFFD_USER_MODE_ONLY` needs no privilege; under `WP_ASYNC` nobody has to answer a fault, kernel-mode writes included: the kernel clears the mark itself | userfaultfd.rst, "Write Protect Notifications" |
//! | `WP_ASYNC` may be registered on any private mapping, file-backed ones included; `MISSING` and synchronous write protection may not | `vma_can_userfault`, include/linux/userfaultfd_k.h |
//! | a page is `PAGE_IS_WRITTEN` when it carries no write-protect mark, an unpopulated one included; it is `PAGE_IS_PRESENT` or `PAGE_IS_SWAPPED` once populated, and starts without a mark | pagemap.rst; `pagemap_page_category` |
//! | `PM_SCAN_WP_MATCHING` marks exactly the pages it reports, atomically with reporting | pagemap.rst |
//! | a private page of a file mapping is `PAGE_IS_FILE` until its first write copies it | pagemap.rst |
//! | `PM_SCAN_CHECK_WPASYNC` fails the scan (EPERM) over a mapping that is not registered, so a forgotten registration is an error and never a missed write | pagemap.rst |
//! | a fork without `UFFD_FEATURE_EVENT_FORK` leaves the child unregistered and the parent's marks in place | `dup_userfaultfd`, fs/userfaultfd.c |
//! | a mapping replaced by `MAP_FIXED` or moved by `mremap` loses its registration, and its old pages at once | mmap(2), mremap(2), `mremap_userfaultfd_prep` |
//! | `MADV_DONTNEED` on private anonymous memory reads as zeros from then on | madvise(2) |
//! | neighbouring anonymous mappings with equal flags and registration merge when at least one was never faulted; registering merges too | `vma_merge_new_range`, `vma_modify_flags_uffd` |
//! | `MADV_DONTFORK` leaves a mapping out of a fork; `MADV_DOFORK` undoes it | madvise(2) |
//! | a child with exit signal 0 is seen only by `__WALL` and `__WCLONE` waits | wait(2) |
//!
//! Kernel same-page merging drops the marks of the pages it merges: they are reported although nothing wrote
//! them. They cannot be left out, because a page may have been written first and merged afterwards; the store's
//! deduplication absorbs them. Pages merged into the zero page are reported as zeroed, for the same reason.
//!
//! A registered mapping gets no fault-around (`uffd_disable_fault_around`): tracking costs a VM that was frozen
//! one minor fault for each clean page it touches anew. Offshoots that were never frozen are not registered.

mod control;
mod error;
mod holder;
mod hooks;
mod ram;
mod sys;
mod track;
