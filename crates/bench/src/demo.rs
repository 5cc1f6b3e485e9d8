//! The main job, shown: a running guest is forked warm, and everything the promise says is checked from outside.

use crate::Outcome;
use crate::guest::Guest;
use crate::host::{Host, PORTS, free_ports};
use crate::probe::Probe;
use serde::Serialize;
use std::path::Path;
use std::time::{Duration, Instant};

/// Memory of the demo's guest.
const MEMORY: u64 = 512 << 20;
/// Keys loaded into its redis.
const LOAD: u64 = 300_000_000;
/// Offshoots of the first fork.
const FIRST: u32 = 8;
/// Offshoots of an offshoot.
const SECOND: u32 = 2;

/// What the demo writes to `target/demo.json`.
#[derive(Debug, Serialize)]
pub struct Demo {
    guest: String,
    accelerator: String,
    memory_bytes: u64,
    cold_boot_first_response_ms: f64,
    fork_pause_ms: f64,
    parent_longest_gap_ms: f64,
    offshoots: Vec<Row>,
    speedup: f64,
}

#[derive(Debug, Serialize)]
struct Row {
    name: String,
    generation: u32,
    first_response_ms: f64,
    running_ms: f64,
    fetched_bytes: u64,
    private_bytes: u64,
    shared_bytes: u64,
}

/// Runs it; with `keep`, everything is left running.
///
/// # Errors
/// What did not hold.
pub fn run(program: &Path, home: &Path, out: &Path, keep: bool) -> Outcome {
    let host = Host::open(program, home)?;
    // An earlier run may have been interrupted, or kept.
    host.command(&["rm", "--force", "--all"])?;
    let done = show(&host, out);
    if keep && done.is_ok() {
        println!(
            "\nEverything is left running. Reach it with:\n  export OFFSHOOT_HOME={}\n  {} ps",
            home.display(),
            program.display()
        );
        println!("and end it with:\n  {} shutdown --stop", program.display());
        return done;
    }
    let closed = host.close();
    done.and(closed)?;
    std::fs::remove_dir_all(home)?;
    say("cleaned up; KEEP=1 leaves everything running");
    Ok(())
}

fn show(host: &Host, out: &Path) -> Outcome {
    say("the default guest: Debian 12 with systemd, nginx and redis");
    host.image(&mut |step| say(&format!("  {step}")))?;
    say("cold boot");
    let booted = Instant::now();
    let web = host.boot("web", MEMORY)?;
    let answered = web.await_response(None, Duration::from_secs(240))?;
    let cold_boot_first_response_ms = (answered - booted).as_secs_f64() * 1e3;
    say(&format!("  first HTTP answer after {:.1} s", cold_boot_first_response_ms / 1e3));
    web_ready(&web)?;
    let nonce = format!("{:x}", rustix::time::clock_gettime(rustix::time::ClockId::Monotonic).tv_nsec);
    say(&format!("loading {} MB of keys and a nonce into its redis", LOAD / 1_000_000));
    let loading = Instant::now();
    web.load(LOAD, &nonce)?;
    say(&format!("  took {:.1} s", loading.elapsed().as_secs_f64()));

    let probe = Probe::start(web.http);
    std::thread::sleep(Duration::from_millis(500));
    say(&format!("forking {FIRST} offshoots while a client requests the parent every 2 ms"));
    let began = Instant::now();
    let (first, mut rows, pause) = fork(host, "web", FIRST, 1, &nonce)?;
    std::thread::sleep(Duration::from_millis(500));
    let gaps = probe.end();
    let parent_longest_gap_ms = gaps.longest_ms(began, Instant::now());
    say(&format!(
        "  the parent stood still for {pause:.1} ms; its client's longest gap was {parent_longest_gap_ms:.1} ms over {} answers",
        gaps.count()
    ));
    say("checking that what one writes, to redis and to disk, no other sees");
    let mut family = vec![web.clone()];
    family.extend(first.iter().cloned());
    isolated(host, &family, &nonce)?;

    say(&format!("forking {}, itself an offshoot, {SECOND} times", first[0].name));
    host.settle("web", Duration::from_secs(120))?;
    let (second, more, nested_pause) = fork(host, &first[0].name, SECOND, 2, &nonce)?;
    say(&format!("  it stood still for {nested_pause:.1} ms"));
    for child in &second {
        let seen = child.get("probe")?;
        if seen.as_deref() != Some(first[0].name.as_str()) {
            return Err(format!(
                "{} should have inherited the write of {}, but has {seen:?}",
                child.name, first[0].name
            )
            .into());
        }
    }
    family.extend(second);
    isolated(host, &family, &nonce)?;
    rows.extend(more);
    for row in &mut rows {
        let stats = host.stats(&row.name)?;
        (row.private_bytes, row.shared_bytes) = (stats.private_bytes, stats.shared_bytes);
        row.fetched_bytes = stats.mirror["ram_fetched_bytes"].as_u64().unwrap_or(0);
    }
    let slowest = rows.iter().filter(|r| r.generation == 1).map(|r| r.first_response_ms).fold(0.0, f64::max);
    let detail: api::VmDetail = host.client.get("/v1/vms/web")?;
    let demo = Demo {
        guest: "Debian 12: systemd, nginx, redis".into(),
        accelerator: detail.shape["accelerator"].as_str().unwrap_or("?").into(),
        memory_bytes: MEMORY,
        cold_boot_first_response_ms,
        fork_pause_ms: pause,
        parent_longest_gap_ms,
        offshoots: rows,
        speedup: cold_boot_first_response_ms / slowest,
    };
    std::fs::write(out, serde_json::to_vec_pretty(&demo)?)?;
    print(&demo, out);
    Ok(())
}

fn say(text: &str) {
    println!("{text}");
}

fn web_ready(web: &Guest) -> Outcome {
    let end = Instant::now() + Duration::from_secs(60);
    while web.get("nonce").is_err() {
        if Instant::now() > end {
            return Err("redis does not answer".into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn fork(host: &Host, parent: &str, count: u32, generation: u32, nonce: &str) -> Outcome<(Vec<Guest>, Vec<Row>, f64)> {
    let base = free_ports(count as u16 * PORTS.len() as u16)?;
    // The offshoots' ports are known before they are there: clients ask from the first moment on.
    let prefix = format!("{parent}-o");
    let waiting: Vec<Guest> = (0..count as u16)
        .map(|i| {
            let port = base + i * PORTS.len() as u16;
            Guest::of(
                &format!("{prefix}-{}", i + 1),
                &[format!("127.0.0.1:{port}:80"), format!("127.0.0.1:{}:6379", port + 1)],
            )
        })
        .collect::<Outcome<_>>()?;
    let began = Instant::now();
    std::thread::scope(|scope| {
        let clients: Vec<_> = waiting
            .iter()
            .map(|guest| scope.spawn(move || guest.await_response(Some(nonce), Duration::from_secs(60))))
            .collect();
        let (reply, guests) = host.fork(parent, count, &prefix, base)?;
        let mut rows = Vec::new();
        for ((client, guest), offshoot) in clients.into_iter().zip(&guests).zip(&reply.offshoots) {
            let answered = client.join().expect("a client does not panic")?;
            rows.push(Row {
                name: guest.name.clone(),
                generation,
                first_response_ms: (answered - began).as_secs_f64() * 1e3,
                running_ms: offshoot.running_ms,
                fetched_bytes: 0,
                private_bytes: 0,
                shared_bytes: 0,
            });
        }
        Ok((guests, rows, reply.pause_ms))
    })
}

/// Each of a family writes its name to redis and to its disk; each then reads its own and no other's.
///
/// # Errors
/// Names who saw what.
pub fn isolated(host: &Host, family: &[Guest], nonce: &str) -> Outcome {
    let limit = Duration::from_secs(60);
    for guest in family {
        guest.set("probe", &guest.name)?;
        guest.set(&format!("only:{}", guest.name), "here")?;
        let command = format!("echo {0} > /root/probe; echo {0} > /root/only-{0}; sync", guest.name);
        guest.shell(&host.client, &command, limit)?;
    }
    for guest in family {
        let wrong = |what: &str, seen: &str| -> Outcome { Err(format!("{}: {what} is `{seen}`", guest.name).into()) };
        let probe = guest.get("probe")?.unwrap_or_default();
        if probe != guest.name {
            return wrong("redis key probe", &probe);
        }
        if guest.get("nonce")?.as_deref() != Some(nonce) {
            return wrong("redis key nonce", "another");
        }
        // Past the page cache, to the disk itself.
        let seen =
            guest.shell(&host.client, "sync; echo 3 > /proc/sys/vm/drop_caches; cat /root/probe; ls /root", limit)?;
        if seen.lines().next() != Some(guest.name.as_str()) {
            return wrong("/root/probe", &seen);
        }
        for other in family.iter().filter(|o| o.name != guest.name) {
            let inherited = guest.name.starts_with(&format!("{}-", other.name));
            if !inherited && guest.get(&format!("only:{}", other.name))?.is_some() {
                return wrong("a key that only another wrote", &other.name);
            }
            if !inherited && seen.split_ascii_whitespace().any(|w| w == format!("only-{}", other.name)) {
                return wrong("a file that only another wrote", &other.name);
            }
        }
    }
    Ok(())
}

fn print(demo: &Demo, out: &Path) {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!("\n{} on {}, {:.0} MiB of memory", demo.guest, demo.accelerator, mib(demo.memory_bytes));
    println!("cold boot to first answer  {:>10.0} ms", demo.cold_boot_first_response_ms);
    println!(
        "fork: parent stood still   {:>10.1} ms (its client's longest gap: {:.1} ms)",
        demo.fork_pause_ms, demo.parent_longest_gap_ms
    );
    println!(
        "\n{:<16} {:>3} {:>12} {:>12} {:>12} {:>12} {:>12}",
        "offshoot", "gen", "running", "first answer", "fetched", "private", "shared"
    );
    for row in &demo.offshoots {
        println!(
            "{:<16} {:>3} {:>9.0} ms {:>9.0} ms {:>8.1} MiB {:>8.1} MiB {:>8.1} MiB",
            row.name,
            row.generation,
            row.running_ms,
            row.first_response_ms,
            mib(row.fetched_bytes),
            mib(row.private_bytes),
            mib(row.shared_bytes)
        );
    }
    println!("\nspeed-up over a cold boot, slowest offshoot: {:.0}x; written to {}", demo.speedup, out.display());
}
