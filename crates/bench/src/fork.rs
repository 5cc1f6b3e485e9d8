//! `make bench-fork`: what a fork costs, beside a cold boot, a full-copy restore and the bare limit, in one run.
//!
//! ```text
//! idle      one boot without load: private pages of idle offshoots; what a cold mirror must fetch for one
//! rounds    boot, load, fork, fork again, fork the fork: cold boots, pauses, gaps; the last VM stays
//! sides     bare limit, offshoot, full copy, 16 limits, 16 offshoots; again, in turn, of that one VM's snapshot
//! sharing   eight offshoots of one fork, and of four; whose clean pages are held once ([`crate::frames`])
//! ```
//! Every repetition of every figure is in `runs`. A ratio's runs are the repetitions of the side that it names first
//! over the median of the other, so that its median is the ratio of the medians. What a repetition leaves behind is
//! removed, and what it froze is in the store, before the next one's clock starts.

use crate::Outcome;
use crate::frames::{Ram as Frames, Sharing};
use crate::guest::Guest;
use crate::host::{Host, PORTS, free_ports};
use crate::limit::{Limit, Machine, Ram};
use crate::probe::Probe;
use crate::report::{Figure, median};
use api::ForkReply;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vmm::process::ProcessId;

const COMMAND: &str = "make bench-fork";
const MEMORY: u64 = 512 << 20;
const NONCE: &str = "bench-fork";
/// Started at once, against the limit's own as many.
const MANY: u16 = 16;
/// Offshoots whose pages are compared.
const FAMILY: u16 = 8;
/// How long an offshoot is left idle after its first answer.
const IDLE: Duration = Duration::from_secs(10);
/// Longest wait for a first answer or a commit.
const LIMIT: Duration = Duration::from_secs(300);

/// How much is done.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Repetitions.
    pub runs: usize,
    /// Bytes of redis data.
    pub load: u64,
}

impl Settings {
    /// `BENCH_RUNS` sets the repetitions (5); `BENCH_QUICK=1` is for those who work on this: 64 MB of data, two runs.
    #[must_use]
    pub fn from_environment() -> Self {
        let quick = std::env::var_os("BENCH_QUICK").is_some_and(|q| !q.is_empty() && q != "0");
        let (runs, load) = if quick { (2, 64_000_000) } else { (5, 300_000_000) };
        let runs = std::env::var("BENCH_RUNS").ok().and_then(|r| r.parse().ok()).unwrap_or(runs);
        Self { runs, load }
    }
}

/// What was measured: milliseconds unless the name says otherwise, one entry for each repetition.
#[derive(Debug, Default)]
struct Runs {
    cold_boot: Vec<f64>,
    pause_first: Vec<f64>,
    pause_second: Vec<f64>,
    pause_nested: Vec<f64>,
    gap_over_pause: Vec<f64>,
    quiet_gap: Vec<f64>,
    limit_running: Vec<f64>,
    limit_response: Vec<f64>,
    fork_running: Vec<f64>,
    fork_response: Vec<f64>,
    limit16: Vec<f64>,
    fork16: Vec<f64>,
    copy_response: Vec<f64>,
    idle_private_bytes: Vec<f64>,
    idle_fetched_bytes: Vec<f64>,
    idle_touched_bytes: Vec<f64>,
    idle_read_bytes: Vec<f64>,
    shared_one: Vec<f64>,
    shared_four: Vec<f64>,
}

struct Bench<'a> {
    host: &'a Host,
    settings: Settings,
    runs: Runs,
    /// Offshoots so far, so that every fork has names of its own.
    forks: u32,
}

/// A fork as its client saw it.
struct Forked {
    reply: ForkReply,
    guests: Vec<Guest>,
    asked: Instant,
    running_ms: f64,
    /// Of each offshoot, where that was waited for.
    response_ms: Vec<f64>,
}

/// Measures everything and writes `out`.
///
/// # Errors
/// What kept it from being measured.
pub fn run(program: &Path, home: &Path, out: &Path) -> Outcome {
    let settings = Settings::from_environment();
    clear(program, home)?;
    let host = Host::open(program, home)?;
    let mut bench = Bench { host: &host, settings, runs: Runs::default(), forks: 0 };
    let done = bench.measure(&home.with_extension("limit"));
    let figures = bench.figures();
    let closed = host.close();
    done.and(closed)?;
    clear(program, home)?;
    crate::report::write(out, &figures)
}

/// Removes what an interrupted run left.
fn clear(program: &Path, home: &Path) -> Outcome {
    if home.exists() {
        Host::open(program, home)?.close()?;
        std::fs::remove_dir_all(home)?;
    }
    let _ = std::fs::remove_dir_all(home.with_extension("limit"));
    Ok(())
}

/// Progress is for whoever waits: data goes to stdout.
fn say(text: &str) {
    eprintln!("{text}");
}

fn ms(from: Instant, to: Instant) -> f64 {
    (to - from).as_secs_f64() * 1e3
}

impl Bench<'_> {
    fn measure(&mut self, plain: &Path) -> Outcome {
        let mut last = String::new();
        self.host.image(&mut |step| {
            let name = step.split(':').next().unwrap_or(step);
            if name != last {
                say(&format!("image: {name}"));
                name.clone_into(&mut last);
            }
        })?;
        self.idle()?;
        for round in 0..self.settings.runs {
            self.round(round, round + 1 == self.settings.runs)?;
        }
        self.sides(plain)?;
        self.sharing()?;
        self.host.remove("web")
    }

    fn boot(&mut self) -> Outcome<Guest> {
        let asked = Instant::now();
        let web = self.host.boot("web", MEMORY)?;
        let took = ms(asked, web.await_response(None, LIMIT)?);
        say(&format!("cold boot: first answer after {took:.0} ms"));
        self.runs.cold_boot.push(took);
        let end = Instant::now() + LIMIT;
        while web.set("nonce", NONCE).is_err() {
            if Instant::now() > end {
                return Err("redis does not answer".into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(web)
    }

    /// Forks `parent` and, with `answers`, has a client each wait for a first answer from the request on.
    fn fork(&mut self, parent: &str, count: u16, answers: bool) -> Outcome<Forked> {
        self.forks += 1;
        let prefix = format!("f{}", self.forks);
        let each = PORTS.len() as u16;
        let base = free_ports(count * each)?;
        let waiting: Vec<Guest> = (0..if answers { count } else { 0 })
            .map(|i| {
                let port = base + i * each;
                Guest::of("waiting", &[format!("127.0.0.1:{port}:80"), format!("127.0.0.1:{}:6379", port + 1)])
            })
            .collect::<Outcome<_>>()?;
        std::thread::scope(|scope| {
            let asked = Instant::now();
            let clients: Vec<_> =
                waiting.iter().map(|guest| scope.spawn(move || guest.await_response(Some(NONCE), LIMIT))).collect();
            let (reply, guests) = self.host.fork(parent, u32::from(count), &prefix, base)?;
            let running_ms = ms(asked, Instant::now());
            let response_ms = clients
                .into_iter()
                .map(|client| Ok(ms(asked, client.join().expect("a client does not panic")?)))
                .collect::<Outcome<_>>()?;
            Ok(Forked { reply, guests, asked, running_ms, response_ms })
        })
    }

    /// Removes offshoots and waits until what was frozen of `parent` is in the store.
    fn clean(&self, parent: &str, forked: &[Forked]) -> Outcome {
        for guest in forked.iter().flat_map(|f| &f.guests) {
            self.host.remove(&guest.name)?;
        }
        self.host.settle(parent, LIMIT)
    }

    /// A VM without load: offshoots that do nothing, warm and cold.
    fn idle(&mut self) -> Outcome {
        let web = self.boot()?;
        // The guest's own start-up goes on behind its first answer.
        std::thread::sleep(IDLE);
        let forked = self.fork(&web.name, self.settings.runs as u16, true)?;
        std::thread::sleep(IDLE);
        for guest in &forked.guests {
            let private = self.host.stats(&guest.name)?.private_bytes;
            say(&format!("idle offshoot of a fork: {:.1} MB private", private as f64 / 1e6));
            self.runs.idle_private_bytes.push(private as f64);
        }
        self.clean(&web.name, &[forked])?;
        self.host.command(&["snapshot", &web.name, "--tag", "idle"])?;
        self.host.remove(&web.name)?;
        for _ in 0..self.settings.runs {
            self.cold_start("web@idle")?;
        }
        self.host.command(&["snapshot", "rm", "web@idle"])?;
        Ok(())
    }

    /// Starts an offshoot while neither the mirror nor the page cache holds a byte of it.
    fn cold_start(&mut self, snapshot: &str) -> Outcome {
        replace_mirror(self.host)?;
        drop_page_cache(&self.host.home.join("store"))?;
        let guest = self.host.restore("cold", snapshot)?;
        guest.await_response(Some(NONCE), LIMIT)?;
        std::thread::sleep(IDLE);
        let stats = self.host.stats(&guest.name)?;
        let touched = Frames::of(self.host, &guest.name)?.touched_file_bytes();
        let counted = |name: &str| stats.mirror[name].as_u64().unwrap_or(0) as f64;
        let (fetched, read) = (counted("ram_fetched_bytes"), counted("store_read_bytes"));
        say(&format!(
            "cold start: {:.1} MB fetched, {:.1} MB touched, {:.1} MB read from the store (compressed, disk included), {:.1} MB private",
            fetched / 1e6,
            touched as f64 / 1e6,
            read / 1e6,
            stats.private_bytes as f64 / 1e6
        ));
        self.runs.idle_fetched_bytes.push(fetched);
        self.runs.idle_touched_bytes.push(touched as f64);
        self.runs.idle_read_bytes.push(read);
        self.host.remove(&guest.name)
    }

    /// One VM's life: its first fork, its second, and a fork of its fork, a client asking it all the while.
    fn round(&mut self, round: usize, last: bool) -> Outcome {
        let web = self.boot()?;
        let loading = Instant::now();
        web.load(self.settings.load, NONCE)?;
        say(&format!(
            "round {}: {} MB loaded in {:.1} s",
            round + 1,
            self.settings.load / 1_000_000,
            loading.elapsed().as_secs_f64()
        ));
        let first = self.fork_watched(&web, "first")?;
        self.runs.pause_first.push(first.reply.pause_ms);
        self.host.settle(&web.name, LIMIT)?;
        let second = self.fork_watched(&web, "second")?;
        self.runs.pause_second.push(second.reply.pause_ms);
        self.host.settle(&web.name, LIMIT)?;
        let offshoot = &first.guests[0];
        offshoot.await_response(Some(NONCE), LIMIT)?;
        let nested = self.fork(&offshoot.name, 1, false)?;
        self.pause("nested", &nested);
        self.runs.pause_nested.push(nested.reply.pause_ms);
        self.clean(&offshoot.name, &[nested])?;
        self.clean(&web.name, &[first, second])?;
        if last { Ok(()) } else { self.host.remove(&web.name) }
    }

    /// Forks while a client requests a page of the parent every two milliseconds.
    fn fork_watched(&mut self, parent: &Guest, which: &str) -> Outcome<Forked> {
        let probe = Probe::start(parent.http);
        let started = Instant::now();
        std::thread::sleep(Duration::from_secs(1));
        let forked = self.fork(&parent.name, 1, false)?;
        std::thread::sleep(Duration::from_millis(500));
        let gaps = probe.end();
        let quiet = gaps.longest_ms(started + Duration::from_millis(100), forked.asked - Duration::from_millis(20));
        let gap = gaps.longest_ms(forked.asked, Instant::now());
        self.pause(which, &forked);
        say(&format!("  its client's longest gap: {gap:.1} ms; in the second before: {quiet:.1} ms"));
        self.runs.gap_over_pause.push(gap - forked.reply.pause_ms);
        self.runs.quiet_gap.push(quiet);
        Ok(forked)
    }

    fn pause(&self, which: &str, forked: &Forked) {
        let parts: Vec<String> =
            forked.reply.pause_parts_ms.iter().map(|(name, ms)| format!("{name} {ms:.1}")).collect();
        let changed = forked.reply.changed_bytes as f64 / 1e6;
        say(&format!(
            "{which} fork: paused {:.1} ms ({}), {changed:.1} MB changed, running after {:.1} ms",
            forked.reply.pause_ms,
            parts.join(", "),
            forked.running_ms
        ));
    }

    /// Offshoots, the bare limit and the full copy, in turn.
    fn sides(&mut self, plain: &Path) -> Outcome {
        self.host.command(&["snapshot", "web", "--tag", "base"])?;
        let like = self.fork("web", 1, false)?;
        say("copying the snapshot into plain files");
        let limit = Limit::prepare(self.host, "web@base", &like.guests[0].name, plain)?;
        self.clean("web", &[like])?;
        for run in 0..self.settings.runs {
            limit.warm()?;
            let (running, response) = one(&limit, Ram::File)?;
            self.runs.limit_running.push(running);
            self.runs.limit_response.push(response);
            let forked = self.fork("web", 1, true)?;
            self.pause("measured", &forked);
            self.runs.fork_running.push(forked.running_ms);
            self.runs.fork_response.push(forked.response_ms[0]);
            let (to_running, to_response) = (forked.running_ms, forked.response_ms[0]);
            self.clean("web", &[forked])?;
            let (_, copied) = one(&limit, Ram::Stream)?;
            self.runs.copy_response.push(copied);
            let limit16 = many(&limit)?;
            self.runs.limit16.push(limit16);
            let forked = self.fork("web", MANY, false)?;
            let fork16 = forked.running_ms;
            self.runs.fork16.push(fork16);
            self.clean("web", &[forked])?;
            say(&format!(
                "run {}: limit {running:.0} ms to running, {response:.0} to an answer; offshoot {to_running:.0}, {to_response:.0}; \
                 full copy {copied:.0} to an answer; {MANY} at once: limit {limit16:.0}, offshoots {fork16:.0}",
                run + 1
            ));
        }
        Ok(())
    }

    /// Eight offshoots of one fork; eight of four forks, between which the parent goes on.
    fn sharing(&mut self) -> Outcome {
        let web = Guest::of("web", &self.host.client.get::<api::Vm>("/v1/vms/web")?.publish)?;
        for forks in [1, 4].repeat(self.settings.runs) {
            let mut forked = Vec::new();
            for _ in 0..forks {
                forked.push(self.fork("web", FAMILY / forks, true)?);
                // What is written between forks is what they cannot share.
                for page in 0..20 {
                    web.set(&format!("between:{}:{page}", self.forks), NONCE)?;
                    let _ = web.answers();
                }
            }
            let guests: Vec<&Guest> = forked.iter().flat_map(|f| &f.guests).collect();
            guests.iter().try_for_each(|guest| use_a_little(guest))?;
            let rams = guests.iter().map(|g| Frames::of(self.host, &g.name)).collect::<Outcome<Vec<_>>>()?;
            let found = Sharing::of(&rams)?;
            say(&format!(
                "{FAMILY} offshoots of {forks}: {} of {} clean pages in common are held once",
                found.held_once, found.groups
            ));
            let runs = if forks == 1 { &mut self.runs.shared_one } else { &mut self.runs.shared_four };
            runs.push(found.fraction());
            self.clean("web", &forked)?;
        }
        Ok(())
    }

    fn figures(&self) -> Vec<Figure> {
        let r = &self.runs;
        let figure = |name: &str, unit: &str, runs: Vec<f64>| Figure::new(name, unit, runs, COMMAND);
        let over = |runs: &[f64], other: f64| runs.iter().map(|v| v / other).collect::<Vec<_>>();
        let plain = |name: &str, runs: &[f64]| figure(name, "ms", runs.to_vec());
        let guest = MEMORY as f64;
        let (answer, limit, limit16) = (median(&r.fork_response), median(&r.limit_running), median(&r.limit16));
        let first_answer = "offshoot, request to first answer, ms";
        let bare = "bare limit, to running, ms";
        let fetched_over_touched = r.idle_fetched_bytes.iter().zip(&r.idle_touched_bytes).map(|(f, t)| f / t).collect();
        vec![
            figure("cold_boot_over_offshoot", "x", over(&r.cold_boot, answer))
                .asked(">=", 60.0)
                .against(first_answer, answer),
            figure("fork_over_limit", "x", over(&r.fork_running, limit)).asked("<=", 1.5).against(bare, limit),
            figure("fork16_over_limit", "x", over(&r.fork16, limit16))
                .asked("<=", 1.5)
                .against("bare limit, 16 at once, ms", limit16),
            figure("full_copy_over_offshoot", "x", over(&r.copy_response, answer))
                .asked(">=", 2.0)
                .against(first_answer, answer),
            plain("pause_first_ms", &r.pause_first).asked("<=", 30.0),
            plain("pause_second_ms", &r.pause_second).asked("<=", 30.0),
            plain("pause_nested_ms", &r.pause_nested).asked("<=", 30.0),
            plain("gap_over_pause_ms", &r.gap_over_pause)
                .asked("<=", 20.0)
                .against("longest gap without a fork, ms", median(&r.quiet_gap)),
            figure("idle_private_fraction", "", over(&r.idle_private_bytes, guest)).asked("<=", 0.03),
            figure("idle_fetched_fraction", "", over(&r.idle_fetched_bytes, guest))
                .asked("<=", 0.10)
                .against("compressed bytes read from the store, disk included", median(&r.idle_read_bytes)),
            figure("idle_fetched_over_touched", "", fetched_over_touched)
                .asked("<=", 1.5)
                .against("bytes of RAM files touched", median(&r.idle_touched_bytes)),
            figure("shared_one_fork", "", r.shared_one.clone()).asked(">=", 0.95),
            figure("shared_four_forks", "", r.shared_four.clone()).asked(">=", 0.80),
            plain("cold_boot_first_response_ms", &r.cold_boot),
            plain("full_copy_first_response_ms", &r.copy_response),
            plain("limit_first_response_ms", &r.limit_response),
            plain("fork_first_response_ms", &r.fork_response),
            plain("limit_running_ms", &r.limit_running),
            plain("fork_running_ms", &r.fork_running),
            plain("limit16_running_ms", &r.limit16),
            plain("fork16_running_ms", &r.fork16),
        ]
    }
}

/// Starts one machine, a client asking from the start; milliseconds to running and to its first answer.
fn one(limit: &Limit, ram: Ram) -> Outcome<(f64, f64)> {
    limit.ready(0)?;
    let port = free_ports(PORTS.len() as u16)?;
    let guest = Limit::guest(port)?;
    std::thread::scope(|scope| {
        let client = scope.spawn(|| guest.await_response(Some(NONCE), LIMIT));
        let machine = limit.start(ram, 0, port)?;
        let answered = client.join().expect("a client does not panic")?;
        Ok((ms(machine.asked, machine.running), ms(machine.asked, answered)))
    })
}

/// Starts many at once; milliseconds until the last one runs.
fn many(limit: &Limit) -> Outcome<f64> {
    (0..MANY).try_for_each(|slot| limit.ready(slot))?;
    let each = PORTS.len() as u16;
    let base = free_ports(MANY * each)?;
    let asked = Instant::now();
    let machines = std::thread::scope(|scope| {
        let starts: Vec<_> =
            (0..MANY).map(|slot| scope.spawn(move || limit.start(Ram::File, slot, base + slot * each))).collect();
        starts.into_iter().map(|s| s.join().expect("a start does not panic")).collect::<Outcome<Vec<Machine>>>()
    })?;
    let last = machines.iter().map(|m| m.running).max().unwrap_or(asked);
    Ok(ms(asked, last))
}

/// What a client may do: some pages, some keys; the same in every guest.
fn use_a_little(guest: &Guest) -> Outcome {
    guest.await_response(Some(NONCE), LIMIT)?;
    for key in 0..20 {
        let _ = guest.answers();
        guest.get(&format!("load:{}", key * 100))?;
    }
    Ok(())
}

/// Kills the mirror, and waits for the one that takes its place.
fn replace_mirror(host: &Host) -> Outcome {
    let old = mirror(&host.home)?;
    old.end(Duration::ZERO);
    let end = Instant::now() + LIMIT;
    while !mirror(&host.home).is_ok_and(|new| new != old) || host.client.get::<api::NodeStats>("/v1/stats").is_err() {
        if Instant::now() > end {
            return Err("the mirror was not replaced".into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// The mirror of a home, by its command line.
fn mirror(home: &Path) -> Outcome<ProcessId> {
    let home = home.canonicalize()?;
    for entry in std::fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = line.split(|&b| b == 0).skip(1);
        let ours = words.next() == Some(b"mirror") && words.any(|w| w == home.as_os_str().as_encoded_bytes());
        if let Some(process) = ProcessId::of(pid).filter(|_| ours) {
            return Ok(process);
        }
    }
    Err(format!("{} has no mirror", home.display()).into())
}

/// Drops everything clean from the page cache, and the store's files by name as well.
fn drop_page_cache(store: &Path) -> Outcome {
    rustix::fs::sync();
    let mut dirs: Vec<PathBuf> = vec![store.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                dirs.push(entry.path());
            } else if let Ok(file) = std::fs::File::open(entry.path()) {
                rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
            }
        }
    }
    Ok(std::fs::write("/proc/sys/vm/drop_caches", "3\n")?)
}
