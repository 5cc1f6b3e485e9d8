//! Two hundred forks and removals leave nothing behind: no process, mount, file, port, descriptor or memory.
//!
//! A footprint is taken of everything that belongs to the home, from outside. First after as many forks as it takes
//! until the parent's RAM lies in as many files as it may: caches are full, threads are there. Then after many more.
//! A leak of one thing for each fork, or for each round, shows as a difference well beyond what is allowed for.

use crate::common;

use bench::Outcome;
use bench::guest::Guest;
use bench::host::{PORTS, free_ports};
use common::{MINUTES, TestHost, eventually, mounts, processes};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

const MEMORY: u64 = 256 << 20;
/// Rounds of one offshoot each before the first footprint.
const NARROW: u32 = 40;
/// Rounds of [`WIDTH`] offshoots each between the first and the last; with `OFFSHOOT_TEST_FULL`, five times as many.
const WIDE: u32 = 20;
/// Offshoots of a wide round.
const WIDTH: u32 = 8;

/// What a home takes of its host.
#[derive(Debug)]
struct Footprint {
    /// Processes, by name.
    processes: BTreeMap<String, usize>,
    /// Ports of the host that they listen on.
    listening: Vec<String>,
    mounts: Vec<PathBuf>,
    /// Files in each directory; ids in names count as one name.
    files: BTreeMap<String, usize>,
    /// Open descriptors and resident memory of the daemon and the mirror.
    descriptors: [usize; 2],
    resident_bytes: [u64; 2],
    threads: [usize; 2],
    /// Objects of the mirror: RAM files, overlays, views, deferred removals, VMs.
    objects: [usize; 5],
    heads: u64,
    packs: u64,
    stored_bytes: u64,
}

#[test]
fn two_hundred_forks_and_removals_leave_nothing_behind() {
    let host = common::host("leaks");
    let home = host.home.clone();
    let (first, last) = churn(&host).unwrap_or_else(|error| panic!("{error}"));
    eprintln!("after {NARROW} forks: {first:#?}\nafter many times {WIDTH} more: {last:#?}");
    compare(&first, &last);

    host.close().unwrap_or_else(|error| panic!("{error}"));
    let left = processes(&home);
    assert!(left.is_empty(), "processes are left after `shutdown --stop`: {left:#?}");
    assert_eq!(mounts(&home), Vec::<PathBuf>::new(), "mounts are left after `shutdown --stop`");
    let names = fs::read_dir(home.join("run")).expect("the home stays").flatten().map(|e| e.file_name());
    let sockets: Vec<_> = names.filter(|n| n.to_string_lossy().ends_with(".sock")).collect();
    assert!(sockets.is_empty(), "sockets are left after `shutdown --stop`: {sockets:?}");
}

fn churn(host: &TestHost) -> Outcome<(Footprint, Footprint)> {
    let web = host.booted("web", MEMORY)?;
    web.set("nonce", "leaks")?;
    let base = free_ports(WIDTH as u16 * PORTS.len() as u16)?;
    for round in 0..NARROW {
        fork_and_remove(host, 1, base, round)?;
    }
    // One that is wide, or what many at once leave open for the next ones would count as a leak.
    fork_and_remove(host, WIDTH, base, NARROW)?;
    let first = settled(host)?;
    let rounds = if std::env::var_os("OFFSHOOT_TEST_FULL").is_some() { 5 * WIDE } else { WIDE };
    for round in 0..rounds {
        fork_and_remove(host, WIDTH, base, round)?;
    }
    web.await_response(Some("leaks"), MINUTES)?;
    Ok((first, settled(host)?))
}

/// Each round takes the same names and the same ports: what the one before left of them is in the way.
fn fork_and_remove(host: &TestHost, count: u32, base: u16, round: u32) -> Outcome {
    let (_, offshoots) = host.fork("web", count, "kid", base)?;
    offshoots[round as usize % offshoots.len()].await_response(Some("leaks"), MINUTES)?;
    remove(host, &offshoots, round)?;
    for port in base..base + count as u16 * PORTS.len() as u16 {
        TcpListener::bind(("127.0.0.1", port))
            .map_err(|e| format!("round {round}: port {port} is not free again: {e}"))?;
    }
    Ok(())
}

/// Removes by one command, or by requests side by side.
fn remove(host: &TestHost, offshoots: &[Guest], round: u32) -> Outcome {
    if round.is_multiple_of(2) {
        let names = offshoots.iter().map(|o| o.name.as_str());
        host.command(&["rm", "--force"].into_iter().chain(names).collect::<Vec<_>>())?;
        return Ok(());
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> = offshoots.iter().map(|o| scope.spawn(|| host.remove(&o.name))).collect();
        threads.into_iter().try_for_each(|t| t.join().expect("a client does not panic"))
    })
}

/// The footprint once everything frozen is in the store, and what only the removed VMs needed is out of it.
fn settled(host: &TestHost) -> Outcome<Footprint> {
    host.settle("web", MINUTES)?;
    let mut last = footprint(host)?;
    // Removals that waited for a commit go on behind our back: it is over when two looks agree.
    eventually("the home comes to rest", || {
        std::thread::sleep(std::time::Duration::from_millis(500));
        let now = footprint(host)?;
        let same = (now.objects, now.heads, now.stored_bytes, &now.files)
            == (last.objects, last.heads, last.stored_bytes, &last.files);
        last = now;
        Ok(same)
    })?;
    Ok(last)
}

fn footprint(host: &TestHost) -> Outcome<Footprint> {
    let home = &host.home;
    let mut by_name = BTreeMap::new();
    let all = processes(home);
    for process in &all {
        *by_name.entry(process.name.clone()).or_default() += 1;
    }
    let ours = [host.daemon_pid()?, host.mirror_pid()?];
    let listing = mirror::client::Client::new(home.join("run/mirror.sock")).list()?;
    let stats: api::NodeStats = host.client.get("/v1/stats")?;
    let mut files = BTreeMap::new();
    walk(home, home, &mut files)?;
    Ok(Footprint {
        processes: by_name,
        listening: listening(&all.iter().map(|p| p.pid).collect::<Vec<_>>())?,
        mounts: mounts(home),
        files,
        descriptors: ours.map(|pid| count(&format!("/proc/{pid}/fd"))),
        resident_bytes: ours.map(resident_bytes),
        threads: ours.map(|pid| count(&format!("/proc/{pid}/task"))),
        objects: [
            listing.ram.len(),
            listing.overlays.len(),
            listing.views.len(),
            listing.deferred.len(),
            listing.vms.len(),
        ],
        heads: stats.store["heads"].as_u64().ok_or("the store counts no heads")?,
        packs: stats.store["packs"].as_u64().ok_or("the store counts no packs")?,
        stored_bytes: stats.store_stored_bytes,
    })
}

fn compare(first: &Footprint, last: &Footprint) {
    assert_eq!(first.processes, last.processes, "processes");
    assert_eq!(first.listening, last.listening, "ports");
    assert_eq!(first.mounts, last.mounts, "mounts");
    for (i, who) in ["daemon", "mirror"].into_iter().enumerate() {
        // One for each pack of the store; connections come and go.
        let beyond_packs = |f: &Footprint| f.descriptors[i].saturating_sub(f.packs as usize);
        let (before, after) = (beyond_packs(first), beyond_packs(last));
        assert!(
            after < before + WIDE as usize / 2,
            "the {who} had {before} descriptors open beside packs, now {after}"
        );
        let (before, after) = (first.threads[i], last.threads[i]);
        assert!(after < before + WIDE as usize, "the {who} had {before} threads, and now {after}");
        let (before, after) = (first.resident_bytes[i], last.resident_bytes[i]);
        assert!(after < before + (32 << 20), "the {who} took {before} bytes of memory, and now {after}");
    }
    // The parent's RAM may lie in the files of several freezes, in a bounded number; all else is its own.
    let [ram, overlays, views, deferred, vms] = last.objects;
    assert!(ram <= 32, "{ram} RAM files for one VM");
    assert_eq!((overlays, vms), (1, 1), "overlays and VMs of the mirror");
    assert!(views <= 1 && deferred == 0, "{views} views and {deferred} deferred removals for one VM");
    assert!(last.heads <= 40, "{} heads for one VM", last.heads);
    // Small ones become one whenever there are more than 32.
    assert!(last.packs <= 48, "{} packs in the store", last.packs);
    let grown = last.stored_bytes.saturating_sub(first.stored_bytes);
    assert!(grown < MEMORY / 8, "the store grew by {grown} bytes");
    let directories = |footprint: &Footprint| footprint.files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(directories(first), directories(last), "directories with files");
    for (directory, &count) in last.files.iter().filter(|(directory, _)| *directory != "store/packs") {
        let before = first.files[directory];
        assert!(count < before + WIDE as usize / 2, "{directory} had {before} files, and now {count}");
    }
}

/// Counts the files of each directory; a directory named by an id counts as any other of its place.
fn walk(home: &Path, dir: &Path, files: &mut BTreeMap<String, usize>) -> Outcome {
    let relative = dir.strip_prefix(home)?;
    let is_id = |part: &str| part.len() >= 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
    let parts = relative.components().map(|c| c.as_os_str().to_string_lossy().into_owned());
    let place = parts.map(|p| if is_id(&p) { "*".to_owned() } else { p }).collect::<Vec<_>>().join("/");
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.path() == home.join("mnt") {
            continue;
        }
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => walk(home, &entry.path(), files)?,
            Ok(_) => *files.entry(place.clone()).or_default() += 1,
            Err(_) => {}
        }
    }
    Ok(())
}

fn count(dir: &str) -> usize {
    fs::read_dir(dir).map_or(0, Iterator::count)
}

fn resident_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap_or_default();
    line.split_ascii_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) << 10
}

/// Local addresses, as the kernel writes them, on which any of `pids` listens.
fn listening(pids: &[u32]) -> Outcome<Vec<String>> {
    const LISTEN: &str = "0A";
    let links = pids.iter().flat_map(|pid| fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten());
    let sockets: BTreeSet<String> = links
        .filter_map(|l| {
            Some(fs::read_link(l.path()).ok()?.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())
        })
        .collect();
    let table = fs::read_to_string("/proc/net/tcp")?;
    let rows = table.lines().skip(1).map(|l| l.split_ascii_whitespace().collect::<Vec<_>>());
    let ours = rows.filter(|row| row.len() > 9 && row[3] == LISTEN && sockets.contains(row[9]));
    let mut out: Vec<String> = ours.map(|row| row[1].to_owned()).collect();
    out.sort_unstable();
    Ok(out)
}
