//! Families of real guests: what one has, its copies have; what one writes afterwards, no other sees.
//!
//! One guest is booted, given data in its redis, its tmpfs and on its disk, and kept as `web@ready`. Each stage then
//! starts from that snapshot, so that a stage that fails says something about itself alone.

use crate::common;

use bench::Outcome;
use bench::guest::Guest;
use bench::host::{PORTS, free_ports};
use common::{MINUTES, PageCache, TestHost, eventually};
use std::fs::File;
use std::hash::{Hash, Hasher};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

const MEMORY: u64 = 512 << 20;
const NONCE: &str = "family";
/// Bytes loaded into redis.
const LOAD: u64 = 16 << 20;

type Stage = fn(&TestHost) -> Outcome;

#[test]
fn copies_have_what_their_ancestors_had_and_nothing_else() {
    let host = common::host("family");
    let stages: [(&str, Stage); 9] = [
        ("isolation of parent, children and grandchildren", isolation),
        ("restore without the VM, its page cache or its daemon", restore),
        ("clients from ports that an ancestor served", known_ports),
        ("ten generations", ten_generations),
        ("successive forks of one VM", successive_forks),
        ("forks under load", forks_under_load),
        ("fork while the balloon is inflated", balloon_inflated),
        ("fork after the balloon was deflated", balloon_deflated),
        ("freezes miss no write", freezes_miss_no_write),
    ];
    prepare(&host).unwrap_or_else(|error| panic!("the first guest: {error}"));
    let mut failed = Vec::new();
    for (name, stage) in stages {
        let began = Instant::now();
        let done = stage(&host).and_then(|()| host.command(&["rm", "--force", "--all"]).map(|_| ()));
        eprintln!("{name}: {:.0} s", began.elapsed().as_secs_f64());
        if let Err(error) = done {
            eprintln!("{name}: {error}");
            failed.push(format!("{name}: {error}"));
            let _ = host.command(&["rm", "--force", "--all"]);
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// Boots the first guest, gives it data and keeps it as `web@ready`; the VM itself stays for the first stage.
fn prepare(host: &TestHost) -> Outcome {
    let web = host.booted("web", MEMORY)?;
    common::console_ready(host, &web)?;
    web.load(LOAD, NONCE)?;
    shell(
        host,
        &web,
        "dd if=/dev/urandom of=/dev/shm/data bs=1M count=32; dd if=/dev/urandom of=/root/data bs=1M count=8; sync",
    )?;
    host.command(&["snapshot", "web", "--tag", "ready"])?;
    Ok(())
}

fn isolation(host: &TestHost) -> Outcome {
    let detail = host.detail("web")?;
    let web = Guest::of("web", &detail.vm.publish)?;
    let before = contents(host, &web)?;
    let mut family = vec![web.clone()];
    family.extend(fork(host, &web, 3, "web-o")?);
    family.extend(fork(host, &family[1].clone(), 2, "web-o-1-o")?);
    bench::demo::isolated(host, &family, NONCE)?;
    for guest in &family {
        same(host, guest, &before)?;
    }
    Ok(())
}

fn restore(host: &TestHost) -> Outcome {
    let start = |name: &str| -> Outcome<Guest> {
        let guest = host.restore(name, "web@ready")?;
        guest.await_response(Some(NONCE), MINUTES)?;
        Ok(guest)
    };
    let first = start("first")?;
    let want = contents(host, &first)?;
    if want.contains(EMPTY_SUM) || want.lines().count() != 3 {
        return Err(format!("the data is not there: {want}").into());
    }
    first.set("only", "first")?;
    host.remove("first")?;

    // Nothing of the snapshot may have to come out of the host's memory.
    drop(PageCache::emptied("3")?);
    let second = start("second")?;
    same(host, &second, &want)?;
    if second.get("only")?.is_some() {
        return Err("a write of an earlier VM came back with the snapshot".into());
    }

    host.restart_daemon()?;
    // What ran goes on, and can be forked by a daemon that did not start it.
    second.set("only", "second")?;
    let child = fork(host, &second, 1, "second-o")?.remove(0);
    same(host, &child, &want)?;
    if child.get("only")?.as_deref() != Some("second") {
        return Err("the fork of an adopted VM lacks its last write".into());
    }
    host.remove("second")?;
    host.remove(&child.name)?;
    let third = start("third")?;
    same(host, &third, &want)
}

/// Asks the web server at the address given from one local port after the other; prints how often in vain.
const FROM_PORTS: &str = r#"
import socket, sys
lost = 0
for port in range(61100, 61160):
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    client.bind(("127.0.0.1", port))
    client.settimeout(20)
    try:
        client.connect(("127.0.0.1", int(sys.argv[1])))
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        answer = b""
        while part := client.recv(65536):
            answer += part
        assert b" 200 " in answer, answer[:100]
    except OSError as error:
        print(port, error, file=sys.stderr)
        lost += 1
    client.close()
print(lost)
"#;

/// A copy's kernel remembers its parent's last connections, and must not take new ones for these.
fn known_ports(host: &TestHost) -> Outcome {
    let ask = |guest: &Guest| -> Outcome {
        let lost = run(Command::new("python3").args(["-c", FROM_PORTS, &guest.http.port().to_string()]), 0)?;
        if lost.trim() == "0" { Ok(()) } else { Err(format!("{} reset {} clients", guest.name, lost.trim()).into()) }
    };
    let parent = host.restore("served", "web@ready")?;
    parent.await_response(Some(NONCE), MINUTES)?;
    ask(&parent)?;
    let child = fork(host, &parent, 1, "served-o")?.remove(0);
    ask(&child)?;
    let grandchild = fork(host, &child, 1, "served-o-o")?.remove(0);
    ask(&grandchild)
}

/// Fork of fork of fork: the tenth has what each ancestor wrote, needs none of them, and costs no more than the first.
fn ten_generations(host: &TestHost) -> Outcome {
    const GENERATIONS: usize = 10;
    let mut guest = host.restore("g0", "web@ready")?;
    guest.await_response(Some(NONCE), MINUTES)?;
    let want = contents(host, &guest)?;
    let mut ancestors = Vec::new();
    for generation in 0..GENERATIONS {
        guest.set(&format!("wrote:{generation}"), &guest.name)?;
        shell(
            host,
            &guest,
            &format!("echo {0} > /root/wrote-{generation}; echo {0} > /dev/shm/wrote-{generation}; sync", guest.name),
        )?;
        let base = free_ports(PORTS.len() as u16)?;
        let (reply, mut children) = host.fork(&guest.name, 1, &format!("g{}", generation + 1), base)?;
        if reply.changed_bytes > MEMORY / 4 {
            return Err(format!("generation {generation} froze {} bytes anew", reply.changed_bytes).into());
        }
        let child = children.remove(0);
        // Every other parent goes at once, while what was frozen of it is still on its way into the store.
        if generation % 2 == 0 {
            host.remove(&guest.name)?;
        } else {
            ancestors.push(guest.name.clone());
        }
        child.await_response(Some(NONCE), MINUTES)?;
        guest = child;
    }
    for name in &ancestors {
        host.remove(name)?;
    }
    let detail = host.detail(&guest.name)?;
    let stats = host.stats(&guest.name)?;
    eprintln!(
        "  generation {}: {} extents, {} files, {} MiB private, {} MiB shared",
        detail.vm.generation,
        detail.ram_extents,
        detail.ram_files.len(),
        stats.private_bytes >> 20,
        stats.shared_bytes >> 20
    );
    if detail.ram_extents > base::resident::MAPPINGS_MAX
        || detail.ram_files.len() > 32
        || stats.private_bytes > MEMORY / 4
    {
        return Err(format!("the cost grows with the generations: {detail:?} {stats:?}").into());
    }
    drop(PageCache::emptied("3")?);
    same(host, &guest, &want)?;
    let files = shell(host, &guest, "cat /root/wrote-? /dev/shm/wrote-?")?;
    for generation in 0..GENERATIONS {
        let name = if generation == 0 { "g0".to_owned() } else { format!("g{generation}-1") };
        if guest.get(&format!("wrote:{generation}"))?.as_deref() != Some(name.as_str()) {
            return Err(format!("redis lacks the write of generation {generation}").into());
        }
        if files.lines().filter(|l| *l == name).count() != 2 {
            return Err(format!("disk or tmpfs lacks the write of generation {generation}: {files}").into());
        }
    }
    Ok(())
}

/// Forks of the same VM with writes in between: each offshoot is of its own instant.
fn successive_forks(host: &TestHost) -> Outcome {
    let parent = host.restore("s", "web@ready")?;
    parent.await_response(Some(NONCE), MINUTES)?;
    let mut children = Vec::new();
    let rounds = if std::env::var_os("OFFSHOOT_TEST_FULL").is_some() { 8 } else { 4 };
    for round in 0..rounds {
        parent.set("round", &format!("round {round}"))?;
        // Some of the memory is written anew each time, some for the first time, some is given back.
        let write = format!(
            "dd if=/dev/urandom of=/dev/shm/again bs=1M count=4 conv=notrunc; dd if=/dev/urandom of=/dev/shm/new-{round} bs=1M count=2; \
             rm -f /dev/shm/new-{}; dd if=/dev/urandom of=/root/again bs=1M count=2 conv=notrunc; sync",
            round - 2
        );
        shell(host, &parent, &write)?;
        let want = (state(host, &parent)?, format!("round {round}"));
        let child = fork(host, &parent, 1, &format!("s{round}"))?.remove(0);
        children.push((child, want));
    }
    let last = children.last().map(|(_, want)| want.clone()).ok_or("no child")?;
    for (guest, want) in children.iter().map(|(child, want)| (child, want)).chain([(&parent, &last)]) {
        let seen = (state(host, guest)?, guest.get("round")?.unwrap_or_default());
        if seen != *want {
            return Err(format!("{} should show {want:?} and shows {seen:?}", guest.name).into());
        }
    }
    let mut states: Vec<&str> = children.iter().map(|(_, (state, _))| state.as_str()).collect();
    states.sort_unstable();
    states.dedup();
    if states.len() != children.len() {
        return Err("the rounds wrote nothing: two of them look the same".into());
    }
    Ok(())
}

/// What `successive_forks` changes, as sums, past the page cache where it is on disk.
fn state(host: &TestHost, guest: &Guest) -> Outcome<String> {
    sums(host, guest, "for f in /dev/shm/again /dev/shm/new-* /root/again; do echo sum: $f $(md5sum < $f); done")
}

/// The guest writes as hard as it can, to its disk and to redis, while it is forked.
fn forks_under_load(host: &TestHost) -> Outcome {
    let parent = host.restore("busy", "web@ready")?;
    parent.await_response(Some(NONCE), MINUTES)?;
    let script = "i=0; while :; do i=$((i+1)); dd if=/dev/urandom of=/root/busy-$((i%8)) bs=64k count=32 conv=fsync; \
                  cp /root/busy-$((i%8)) /root/copy-$i; rm -f /root/copy-$((i-4)); redis-cli set busy $i; echo $i > /root/mark; sync; done";
    shell(host, &parent, "echo before > /root/before; sync")?;
    shell(host, &parent, &format!("echo '{script}' > /root/busy.sh; (bash /root/busy.sh > /dev/null 2>&1 &)"))?;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| -> Outcome {
        // And as hard as the network allows, from outside.
        let writer = scope.spawn(|| {
            let mut count = 0u64;
            while !done.load(Ordering::Relaxed) {
                if parent.set("outside", &count.to_string()).is_ok() {
                    count += 1;
                }
            }
            count
        });
        let rounds = if std::env::var_os("OFFSHOOT_TEST_FULL").is_some() { 6 } else { 2 };
        let forked = (0..rounds).try_for_each(|round| {
            let children = fork(host, &parent, 2, &format!("busy{round}"))?;
            children.iter().try_for_each(|child| at_peace(host, child))?;
            crash_consistent(host, &children[0])?;
            children.iter().try_for_each(|child| host.remove(&child.name))
        });
        done.store(true, Ordering::Relaxed);
        let written = writer.join().expect("the writer does not panic");
        forked?;
        let seen: u64 = parent.get("outside")?.unwrap_or_default().parse()?;
        // The last write may have been refused on its way back.
        if seen + 1 < written || written == 0 {
            return Err(format!("the parent lost writes: {written} were acknowledged, it has {seen}").into());
        }
        Ok(())
    })?;
    let mark = |guest: &Guest| -> Outcome<u64> { Ok(shell(host, guest, "cat /root/mark")?.parse()?) };
    let before = mark(&parent)?;
    eventually("the parent goes on writing", || Ok(mark(&parent)? > before))?;
    at_peace(host, &parent)
}

/// Freezes a guest that writes as hard as it can, again and again, and compares what its offshoots are given, page by
/// page, with what the holder of each freeze has: first while the holder answers, then out of the store.
fn freezes_miss_no_write(host: &TestHost) -> Outcome {
    let rounds = if std::env::var_os("OFFSHOOT_TEST_FULL").is_some() { 100 } else { 5 };
    // Watched for what it touches, as where a store is far away.
    let parent = host.restore_ahead("exact", "web@ready", Some("none"), None)?;
    parent.await_response(Some(NONCE), MINUTES)?;
    shell(
        host,
        &parent,
        "(while :; do head -c 8M /dev/urandom > /dev/shm/a; cp /dev/shm/a /root/b; ps aux | md5sum; sync; rm /root/b; \
         done > /dev/null 2>&1 &)",
    )?;
    let mut compared = 0;
    for round in 0..rounds {
        let reply = host.client.post_long::<api::ForkReply>(
            "/v1/vms/exact/fork",
            &api::ForkRequest { count: 1, name_prefix: Some(format!("exact{round}-")), publish_base: None },
            |_| {},
        )?;
        // A daemon that stands still ends no holder.
        let daemon = Standing::still(host.daemon_pid()?);
        let mut kept = Vec::new();
        for entry in std::fs::read_dir(host.home.join("pending"))? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == "json") {
                kept.push(serde_json::from_slice::<node::record::FreezeRecord>(&std::fs::read(path)?)?);
            }
        }
        kept.sort_by_key(|record| record.id);
        // It may have been stored already: then there is nothing to compare with.
        let sums = match kept.last() {
            Some(record) => Some((record.clone(), compare_with_holder(host, record)?)),
            None => None,
        };
        drop(daemon);
        host.settle("exact", MINUTES)?;
        if let Some((record, sums)) = sums {
            compared += 1;
            compare_with_store(host, &record, &sums)?;
        }
        reply.offshoots.iter().try_for_each(|child| host.remove(&child.name))?;
    }
    if compared * 2 < rounds {
        return Err(format!("only {compared} of {rounds} freezes could be compared").into());
    }
    healthy(host, &parent)
}

/// A process that stands still until this is dropped.
struct Standing(rustix::process::Pid);

impl Standing {
    fn still(pid: u32) -> Self {
        let pid = rustix::process::Pid::from_raw(pid.cast_signed()).expect("a pid");
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).expect("it is ours");
        Self(pid)
    }
}

impl Drop for Standing {
    fn drop(&mut self) {
        let _ = rustix::process::kill_process(self.0, rustix::process::Signal::CONT);
    }
}

/// Bytes compared at a time.
const PIECE: usize = 1 << 20;
const PAGE: usize = base::PAGE as usize;

/// Compares the RAM file of a freeze with its holder's memory: no page may be as it was before. Returns a sum of each.
fn compare_with_holder(host: &TestHost, record: &node::record::FreezeRecord) -> Outcome<Vec<u64>> {
    let (ram, size) = (File::open(ram_file(host, record))?, record.shape.memory_bytes());
    let holder = File::open(format!("/proc/{}/mem", record.holder.pid))?;
    let (mut given, mut true_bytes) = (vec![0; PIECE], vec![0; PIECE]);
    let (mut sums, mut wrong) = (Vec::new(), Vec::new());
    for at in (0..size).step_by(PIECE) {
        ram.read_exact_at(&mut given, at)?;
        holder.read_exact_at(&mut true_bytes, record.address + at)?;
        for (i, (given, held)) in given.chunks(PAGE).zip(true_bytes.chunks(PAGE)).enumerate() {
            // Free pages are left out of what is stored: they become zero for offshoots, and not for the parent.
            if given != held && given.iter().any(|&byte| byte != 0) {
                wrong.push(at / base::PAGE + i as u64);
            }
            sums.push(sum(held));
        }
    }
    report(host, record, "the holder", &wrong)?;
    Ok(sums)
}

/// Compares the RAM file of a freeze that is in the store with what it was; pages that are zero now were free.
fn compare_with_store(host: &TestHost, record: &node::record::FreezeRecord, sums: &[u64]) -> Outcome {
    let ram = File::open(ram_file(host, record))?;
    // What the kernel has cached was read from the holder.
    rustix::fs::fadvise(&ram, 0, None, rustix::fs::Advice::DontNeed)?;
    let (mut given, zero) = (vec![0; PIECE], sum(&[0; PAGE]));
    let mut wrong = Vec::new();
    for (piece, sums) in sums.chunks(PIECE / PAGE).enumerate() {
        ram.read_exact_at(&mut given, (piece * PIECE) as u64)?;
        for (i, (given, &want)) in given.chunks(PAGE).zip(sums).enumerate() {
            if ![want, zero].contains(&sum(given)) {
                wrong.push((piece * PIECE / PAGE + i) as u64);
            }
        }
    }
    report(host, record, "the store", &wrong)
}

fn ram_file(host: &TestHost, record: &node::record::FreezeRecord) -> PathBuf {
    host.home.join(format!("mnt/ram/{:016x}", record.id))
}

fn sum(page: &[u8]) -> u64 {
    let mut hasher = std::hash::DefaultHasher::new();
    page.hash(&mut hasher);
    hasher.finish()
}

fn report(host: &TestHost, record: &node::record::FreezeRecord, whose: &str, wrong: &[u64]) -> Outcome {
    if wrong.is_empty() {
        return Ok(());
    }
    let map = base::RamMap::decode(&record.map)?;
    let pages: Vec<String> =
        wrong.iter().take(20).map(|page| format!("{page} ({:?})", map.lookup(page * base::PAGE).0)).collect();
    let (id, kept) = (record.id, host.home.display());
    Err(format!("{} pages of {id:016x} in {kept} are not as {whose} has them: {}", wrong.len(), pages.join(", "))
        .into())
}

/// No complaint of the guest's kernel, and its disk takes writes.
fn at_peace(host: &TestHost, guest: &Guest) -> Outcome {
    shell(host, guest, "pkill -f busy.sh; true")?;
    healthy(host, guest)?;
    let seen = shell(
        host,
        guest,
        "touch /root/after && sync && echo 3 > /proc/sys/vm/drop_caches && ls /root/after && cat /root/before",
    )?;
    if seen.split_ascii_whitespace().collect::<Vec<_>>() != ["/root/after", "before"] {
        return Err(format!("the disk of {} takes no writes: {seen}", guest.name).into());
    }
    Ok(())
}

/// The guest is ended as by a power cut; its file system must be whole once its journal is replayed.
fn crash_consistent(host: &TestHost, guest: &Guest) -> Outcome {
    shell(host, guest, "(bash /root/busy.sh > /dev/null 2>&1 &) ; sleep 1")?;
    host.command(&["stop", "--time", "0", &guest.name])?;
    let directory = host.detail(&guest.name)?.directory;
    let record: serde_json::Value = serde_json::from_slice(&std::fs::read(Path::new(&directory).join("vm.json"))?)?;
    let overlay = record["overlays"][0].as_u64().ok_or("the record names no disk")?;
    let scratch = tempfile::tempdir()?;
    let copy = scratch.path().join("disk");
    run(
        Command::new("cp").arg("--sparse=always").arg(host.home.join(format!("mnt/disk/{overlay:016x}"))).arg(&copy),
        0,
    )?;
    // Replaying may say that it changed the file system; the check after it must find nothing to do.
    run(Command::new("e2fsck").args(["-E", "journal_only", "-y"]).arg(&copy), 1)?;
    run(Command::new("e2fsck").args(["-f", "-n"]).arg(&copy), 0)?;
    let before = run(Command::new("debugfs").args(["-R", "cat /root/before"]).arg(&copy), 0)?;
    if before.trim() == "before" {
        Ok(())
    } else {
        Err(format!("the disk of {} lacks an old file: {before}", guest.name).into())
    }
}

fn run(command: &mut Command, worst: i32) -> Outcome<String> {
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    match output.status.code() {
        Some(code) if code <= worst => Ok(said),
        _ => Err(format!("{command:?}: {}: {said} {}", output.status, String::from_utf8_lossy(&output.stderr)).into()),
    }
}

/// Forks while half of the memory is in the balloon; the child takes it back.
fn balloon_inflated(host: &TestHost) -> Outcome {
    const FILL: &str = "echo sum: $(ls -s /dev/shm/fill) $(md5sum < /dev/shm/fill)";
    let parent = host.restore("balloon", "web@ready")?;
    parent.await_response(Some(NONCE), MINUTES)?;
    let want = contents(host, &parent)?;
    inflate(host, &parent)?;
    same(host, &parent, &want)?;
    let child = fork(host, &parent, 1, "inflated")?.remove(0);
    same(host, &child, &want)?;
    deflate(host, &child)?;
    // Pages that came back are used: this does not fit into what the balloon had left.
    shell(host, &child, "dd if=/dev/urandom of=/dev/shm/fill bs=1M count=160")?;
    let filled = sums(host, &child, FILL)?;
    same(host, &child, &want)?;
    same(host, &parent, &want)?;
    let grandchild = fork(host, &child, 1, "refilled")?.remove(0);
    if sums(host, &child, FILL)? != filled || sums(host, &grandchild, FILL)? != filled {
        return Err("memory that came back does not hold what was written".into());
    }
    [&parent, &child, &grandchild].into_iter().try_for_each(|guest| healthy(host, guest))
}

/// Inflates and deflates, writes into what came back, and forks: the child equals its parent.
fn balloon_deflated(host: &TestHost) -> Outcome {
    let parent = host.restore("balloon", "web@ready")?;
    parent.await_response(Some(NONCE), MINUTES)?;
    let want = contents(host, &parent)?;
    // A freeze before, so that the balloon's discards come between two freezes, as tracked changes.
    let earlier = fork(host, &parent, 1, "earlier")?.remove(0);
    for round in 0..2 {
        inflate(host, &parent)?;
        deflate(host, &parent)?;
        shell(
            host,
            &parent,
            &format!("dd if=/dev/urandom of=/dev/shm/after bs=1M count=48; echo {round} > /root/round; sync"),
        )?;
        let after = sums(host, &parent, "echo sum: $(md5sum < /dev/shm/after) $(cat /root/round)")?;
        let child = fork(host, &parent, 1, &format!("deflated{round}"))?.remove(0);
        let seen = sums(host, &child, "echo sum: $(md5sum < /dev/shm/after) $(cat /root/round)")?;
        if seen != after {
            return Err(format!("{} should show {after} and shows {seen}", child.name).into());
        }
        same(host, &child, &want)?;
        same(host, &parent, &want)?;
        healthy(host, &child)?;
        shell(host, &parent, "rm /dev/shm/after")?;
    }
    same(host, &earlier, &want)?;
    [&parent, &earlier].into_iter().try_for_each(|guest| healthy(host, guest))
}

fn inflate(host: &TestHost, guest: &Guest) -> Outcome {
    let discarded =
        || -> Outcome<u64> { Ok(host.stats(&guest.name)?.resident.get("discarded_bytes").copied().unwrap_or(0)) };
    let before = (discarded()?, memory_total(host, guest)?);
    host.command(&["balloon", &guest.name, "256M"])?;
    // The guest was told to give half of its memory back.
    eventually("the balloon inflates", || Ok(memory_total(host, guest)? + (MEMORY * 9 / 20) < before.1))?;
    eventually("inflating discards memory", || Ok(discarded()? > before.0 + MEMORY / 4))
}

fn deflate(host: &TestHost, guest: &Guest) -> Outcome {
    let before = memory_total(host, guest)?;
    host.command(&["balloon", &guest.name, "512M"])?;
    eventually("the balloon deflates", || Ok(memory_total(host, guest)? > before + (MEMORY * 9 / 20)))
}

fn memory_total(host: &TestHost, guest: &Guest) -> Outcome<u64> {
    let said = shell(host, guest, "grep MemTotal /proc/meminfo")?;
    let kib =
        said.lines().find_map(|l| l.strip_prefix("MemTotal:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    Ok(kib.ok_or_else(|| format!("{}: {said}", guest.name))? << 10)
}

fn healthy(host: &TestHost, guest: &Guest) -> Outcome {
    let said = shell(
        host,
        guest,
        // A busy host makes the guest's first timer interrupts late, and its kernel says so at boot.
        "dmesg | grep -v MP-BIOS | grep -iE 'ext4.*(error|warning)|i/o error|oops|bug:|call trace|bad page|corrupt|hung task'; echo looked",
    )?;
    if said == "looked" { Ok(()) } else { Err(format!("the kernel of {} complains: {said}", guest.name).into()) }
}

/// Sum of nothing.
const EMPTY_SUM: &str = "d41d8cd98f00b204e9800998ecf8427e";

/// What the first guest was given, as sums computed in the guest: tmpfs, disk past the page cache, redis.
fn contents(host: &TestHost, guest: &Guest) -> Outcome<String> {
    let values = LOAD / (16 << 10);
    let digest =
        format!("local d='' for i=0,{} do d=redis.sha1hex(d..redis.call('GET','load:'..i)) end return d", values - 1);
    sums(
        host,
        guest,
        &format!(
            "echo sum: $(md5sum < /dev/shm/data); echo sum: $(md5sum < /root/data); echo sum: $(redis-cli --raw eval \"{digest}\" 0)"
        ),
    )
}

fn same(host: &TestHost, guest: &Guest, want: &str) -> Outcome {
    let seen = contents(host, guest)?;
    if seen == want {
        Ok(())
    } else {
        Err(format!("{} has other contents: {seen} instead of {want}", guest.name).into())
    }
}

/// Lines that begin with `sum:`, past the guest's page cache; what its kernel says in between is left out.
fn sums(host: &TestHost, guest: &Guest, command: &str) -> Outcome<String> {
    let said = shell(host, guest, &format!("sync; echo 3 > /proc/sys/vm/drop_caches; {command}"))?;
    let lines: Vec<&str> = said.lines().filter(|l| l.starts_with("sum: ")).collect();
    if lines.is_empty() { Err(format!("{} computed no sums: {said}", guest.name).into()) } else { Ok(lines.join("\n")) }
}

fn shell(host: &TestHost, guest: &Guest, command: &str) -> Outcome<String> {
    guest.shell(&host.client, command, MINUTES)
}

/// Forks and waits until each offshoot answers.
fn fork(host: &TestHost, parent: &Guest, count: u32, prefix: &str) -> Outcome<Vec<Guest>> {
    let base = free_ports(count as u16 * PORTS.len() as u16)?;
    let (_, guests) = host.fork(&parent.name, count, prefix, base)?;
    for guest in &guests {
        guest.await_response(Some(NONCE), MINUTES)?;
    }
    Ok(guests)
}
