//! Memory that a guest has freed is neither stored with its snapshot nor fetched from it, and no guest notices that fills
//! and checks all of it. The kernel of the default guest cannot poison its free pages; that those of kernels which do are
//! kept is tested with colors (crate `guest`, and `make bench-prefetch` on a real one).

use crate::common;

use api::{From, RunRequest, Vm};
use bench::Outcome;
use bench::guest::Guest;
use bench::host::{PORTS, free_ports};
use common::{MINUTES, PageCache, TestHost, console_ready, host, ready};

const MEMORY: u64 = 256 << 20;
/// Written in the guest, and freed again.
const FREED: u64 = 96 << 20;

fn shell(host: &TestHost, guest: &Guest, command: &str) -> Outcome<String> {
    guest.shell(&host.client, command, MINUTES)
}

/// Boots a guest with an argument of the kernel's, has it free memory that it had filled, and keeps it as `NAME@1`.
fn kept(host: &TestHost, name: &str, append: &str) -> Outcome<api::Snapshot> {
    let base = free_ports(PORTS.len() as u16)?;
    let request = RunRequest {
        name: Some(name.into()),
        from: From::Image("debian".into()),
        memory_bytes: Some(MEMORY),
        cpus: Some(1),
        publish: PORTS.iter().zip(base..).map(|(guest, host)| format!("127.0.0.1:{host}:{guest}")).collect(),
        accelerator: None,
        append: (!append.is_empty()).then(|| append.to_owned()),
        prefetch: None,
        eager: None,
        learn: None,
    };
    let vm: Vm = host.client.post("/v1/vms", &request)?;
    let guest = Guest::of(&vm.name, &vm.publish)?;
    ready(&guest)?;
    console_ready(host, &guest)?;
    let said = shell(
        host,
        &guest,
        &format!(
            "mount -t tmpfs -o size=100% none /mnt && head -c {FREED} /dev/urandom > /mnt/secret && rm /mnt/secret && \
             echo freed; cat /proc/cmdline"
        ),
    )?;
    if !said.starts_with("freed") || !said.contains(append) {
        return Err(format!("{name}: {said}").into());
    }
    host.command(&["snapshot", name, "--tag", "1"])?;
    host.command(&["rm", "--force", name])?;
    let snapshots: Vec<api::Snapshot> = host.client.get("/v1/snapshots")?;
    let found = snapshots.into_iter().find(|s| s.name == format!("{name}@1"));
    Ok(found.ok_or("the snapshot is listed")?)
}

/// Fills the free memory of an offshoot, and then all that it has left besides, and checks what it holds; says how many
/// bytes were free, and how many were fetched while they were filled.
fn fill(host: &TestHost, snapshot: &str, name: &str) -> Outcome<(u64, u64)> {
    let cache = PageCache::emptied("1")?;
    let guest = host.restore(name, snapshot)?;
    ready(&guest)?;
    let fetched =
        || -> Outcome<u64> { Ok(host.stats(name)?.mirror["ram_fetched_bytes"].as_u64().ok_or("it is counted")?) };
    let before = fetched()?;
    let fill = |which: &str, spare_mib: u32, file: &str| {
        let command = format!(
            "n=$(awk '/{which}/ {{ print int($2 / 1024) - {spare_mib} }}' /proc/meminfo); b=$((n * 1048576)); \
             fallocate -l $b /mnt/{file} && cmp -n $b /mnt/{file} /dev/zero && echo zero; \
             head -c $b /dev/urandom > /mnt/{file}; one=$(md5sum < /mnt/{file}); sleep 1; two=$(md5sum < /mnt/{file}); \
             [ \"$one\" = \"$two\" ] && echo same; rm /mnt/{file}; echo $b; \
             dmesg | grep -iE 'corrupt|bug:|oops|bad page|call trace|segfault'"
        );
        let said = shell(host, &guest, &command)?;
        match said.split_ascii_whitespace().collect::<Vec<_>>()[..] {
            ["zero", "same", bytes] => Ok::<u64, bench::Failure>(bytes.parse()?),
            _ => Err(format!("{name}, out of {snapshot}, with its memory in use: {said}").into()),
        }
    };
    let filled = fill("MemFree", 2, "free")?;
    let fetched = fetched()? - before;
    drop(cache);
    // What was in use at the freeze is driven out now, and used again by others.
    fill("MemAvailable", 24, "all")?;
    host.command(&["rm", "--force", name])?;
    Ok((filled, fetched))
}

#[test]
fn memory_that_was_freed_is_neither_stored_nor_fetched_and_no_guest_notices() -> Outcome {
    let host = host("free");
    host.image(&mut |step| eprintln!("  {step}"))?;
    for (name, append) in [("plain", ""), ("cleared", "init_on_free=1")] {
        let snapshot = kept(&host, name, append)?;
        assert!(snapshot.free_bytes >= FREED, "{name}: of {FREED} bytes freed {} are left out", snapshot.free_bytes);
        assert!(snapshot.stored_bytes < MEMORY - FREED, "{name}: {} bytes are stored", snapshot.stored_bytes);
        let (filled, fetched) = fill(&host, &snapshot.name, &format!("{name}-o"))?;
        assert!(filled >= FREED, "{name}: only {filled} bytes were free");
        assert!(fetched < filled / 4, "{name}: {fetched} bytes were fetched while {filled} free ones were filled");
    }
    // A snapshot of what started from one knows what is free without a search.
    let again = host.restore("again", "plain@1")?;
    ready(&again)?;
    shell(&host, &again, &format!("head -c {FREED} /dev/urandom > /mnt/secret; rm /mnt/secret"))?;
    host.command(&["snapshot", "again", "--tag", "1"])?;
    host.command(&["rm", "--force", "again"])?;
    let snapshots: Vec<api::Snapshot> = host.client.get("/v1/snapshots")?;
    let free = snapshots.iter().find(|s| s.name == "again@1").map(|s| s.free_bytes);
    assert!(free >= Some(FREED / 2), "{free:?} bytes of the second generation are left out");
    fill(&host, "again@1", "again-o")?;
    Ok(())
}
