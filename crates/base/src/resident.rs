//! The protocol between the daemon and the resident library inside a hypervisor.
//!
//! The library is preloaded into the hypervisor and listens on a unix stream socket that the daemon created,
//! bound and passed on by number. A request is one line of ASCII; a reply is one line, `ok key=value …` or
//! `error <what happened>`, followed by `ranges * 16` bytes where the reply says `ranges=N`. Many connections
//! may come one after another (daemons die and are replaced); the library serves one at a time.
//!
//! | request | reply | does |
//! |---|---|---|
//! | `hello` | `ok version=1 pid= ram=<hex> size= mapped=<0 or 1> holders=<pid,pid…>` | says where RAM lies (0 before the hypervisor has mapped it), and whether a RAM map was installed |
//! | `map <path>` | `ok extents=` | installs the RAM map in file `<path>` over the placeholder (once, before the guest runs); all or nothing |
//! | `watch` | `ok` | optional, before the guest runs: from now on a page of RAM is mapped when it is touched, and not because its neighbour was, so that `/proc/PID/pagemap` tells what the guest touches |
//! | `prepare` | `ok` | optional, while the guest runs: takes work out of the next freeze's pause (marks pages before the first freeze, collects what was written before later ones) |
//! | `freeze` | `ok holder=<pid> start=<clock ticks> ram=<hex> tracked=<0 or 1> written=<n> zeroed=<m> ranges=<n+m> fork_us= scan_us=` then ranges | fork-hold of the stopped VM, and what was written and discarded since the last freeze |
//! | `freeze all` | as `freeze`, with `tracked=0` | the same, when what earlier freezes reported was lost (a daemon died before it published a snapshot) |
//! | `release <pid>` | `ok` | ends and reaps a holder |
//! | `fuse` | `ok`, with the mirror's FUSE descriptor as ancillary data of the line's first byte | hands the descriptor to a new mirror |
//! | `stat` | `ok extents= discards= discarded_bytes= refused_advice=` | counters |
//!
//! A range on the wire is two little-endian `u64`: first byte and end, offsets in RAM, whole pages; first the
//! written ones, then the zeroed ones, each group ascending and without neighbours that touch.
//!
//! - `tracked=1`: the two groups are disjoint, and together name every page whose contents may differ from the
//!   last freeze. A page that is merely read, or merged by KSM, may be named although it did not change.
//! - `tracked=0` (first freeze of this process, `freeze all`, or a kernel without the means): `written` is 0, and
//!   the zeroed ranges are all of RAM that is anonymous now, populated or not. The caller takes the private pages
//!   out of the holder's `/proc/PID/pagemap`; what lies in a zeroed range and is no private page is zero, and
//!   what lies outside and is no private page is what the RAM map said at the start. That holds on top of the
//!   RAM map of the start as of any snapshot taken of this process since.
//!
//! A holder is recognised by pid, start time and name. Its other traits: its own session, no descriptors,
//! readable by `process_vm_readv`; SIGKILL ends it and nothing else does, its parent's death included.

/// Version of this protocol.
pub const VERSION: u32 = 1;

/// Environment: number of the listening socket's descriptor.
pub const ENV_SOCKET: &str = "OFFSHOOT_RESIDENT_FD";
/// Environment: path that the hypervisor is given as `mem-path`; its shared mapping becomes the RAM map.
pub const ENV_RAM_PATH: &str = "OFFSHOOT_RAM_PATH";
/// Environment: directory of the mirror's RAM files, each named by its id in 16 hex digits.
pub const ENV_RAM_DIR: &str = "OFFSHOOT_RAM_DIR";
/// Environment (optional): path of the RAM map to install at once; without it the library waits for `map`.
pub const ENV_RAM_MAP: &str = "OFFSHOOT_RAM_MAP";
/// Environment (optional): number of the descriptor of the mirror's FUSE session to keep.
pub const ENV_FUSE: &str = "OFFSHOOT_FUSE_FD";
/// Environment (optional): number of the reading end of a pipe, the *gate*. The hypervisor's first open of a file
/// beside or below the directory of RAM files waits for one byte from it: so it can be started before what it
/// starts from exists. The end of the pipe without a byte ends the hypervisor.
pub const ENV_GATE: &str = "OFFSHOOT_GATE_FD";
/// Name (`/proc/PID/comm`) of a holder process.
pub const HOLDER_COMM: &str = "offshoot-hold";

/// The most mappings the library lets a VM's RAM have: the kernel allows a process 65,530
/// (`vm.max_map_count`) and a hypervisor needs some of its own.
pub const MAPPINGS_MAX: usize = 16_000;

/// The fields of an `ok` line by name.
///
/// # Errors
/// The text behind `error`, or the whole line where it is neither.
pub fn fields(line: &str) -> Result<std::collections::HashMap<&str, &str>, String> {
    let line = line.trim_end();
    match line.split_once(' ').unwrap_or((line, "")) {
        ("ok", rest) => Ok(rest.split_ascii_whitespace().filter_map(|w| w.split_once('=')).collect()),
        ("error", why) => Err(why.to_owned()),
        _ => Err(format!("the resident library answered `{line}`")),
    }
}
