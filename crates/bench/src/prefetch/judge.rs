//! One offshoot on a cold node, driven and counted.

use super::servers::{Driven, Server, Session, Set, Work};
use super::world::{Node, Profile, World, published};
use crate::Outcome;
use crate::frames::Ram;
use serde::Serialize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Between two looks at what an offshoot holds.
const SAMPLE: Duration = Duration::from_millis(500);
/// How long the working set of an offshoot in training may take to settle.
const TRAINING: Duration = Duration::from_secs(75);
/// Recordings behind which a node lays a template down anew, as its `layout` has them.
const LAID_DOWN_BEHIND: [u64; 3] = [1, 3, 8];

/// What is to be run.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Case {
    pub(super) server: &'static str,
    /// As `--prefetch` takes it.
    pub(super) policy: String,
    pub(super) eager: Option<f32>,
    /// Whether earlier offshoots have taught.
    pub(super) trained: bool,
    /// Whether all of the snapshot is in the node's cache before: an all-local offshoot.
    pub(super) local: bool,
}

/// What an offshoot held at one moment.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Sample {
    pub(super) at_s: f64,
    /// Of guest RAM: present in its process.
    pub(super) resident_bytes: u64,
    /// Of guest RAM: brought to the node, on demand or ahead.
    pub(super) brought_bytes: u64,
    pub(super) blocked: u64,
}

/// What came of it.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Seen {
    pub(super) case: Case,
    /// Until `run` had returned.
    pub(super) run_s: f64,
    pub(super) driven: Driven,
    /// Reads of guest RAM that the kernel asked the mirror for.
    pub(super) faults: u64,
    /// Those of them that waited for the origin: until all cases had given as many answers, and until the end.
    pub(super) blocked: u64,
    pub(super) blocked_in_all: u64,
    /// Bytes of guest RAM that came on demand, and ahead.
    pub(super) demanded_bytes: u64,
    pub(super) ahead_bytes: u64,
    /// Of the pages asked for ahead, and those of them touched.
    pub(super) ahead_pages: u64,
    pub(super) used_pages: u64,
    /// By color: pages that a guest waited for, asked for ahead, touched of these.
    pub(super) by_color: Vec<(u8, u64, u64, u64)>,
    /// Bytes of guest RAM that it touched of what the snapshot holds, and that its disk read.
    pub(super) touched_bytes: u64,
    pub(super) disk_bytes: u64,
    /// Bytes of packs that the node's mirror fetched (RAM and disks), and its daemon (all else); and all bytes that
    /// left the origin meanwhile.
    pub(super) fetched_bytes: u64,
    pub(super) daemon_bytes: u64,
    pub(super) link_bytes: u64,
    pub(super) samples: Vec<Sample>,
}

/// What a plot shows of each: its file's name, its title, its unit, its value.
pub(super) type Plotted = (&'static str, &'static str, &'static str, fn(&Seen) -> f64);

impl Seen {
    /// Bytes that came over the line for each that was touched: compressed, chunks as a whole.
    pub(super) fn moved_over_touched(&self) -> f64 {
        (self.fetched_bytes + self.daemon_bytes) as f64 / (self.touched_bytes + self.disk_bytes).max(1) as f64
    }

    /// The same of RAM and disks alone.
    pub(super) fn mirrored_over_touched(&self) -> f64 {
        self.fetched_bytes as f64 / (self.touched_bytes + self.disk_bytes).max(1) as f64
    }

    /// Bytes of RAM brought for each that was touched, as the guest sees them.
    pub(super) fn brought_over_touched(&self) -> f64 {
        (self.demanded_bytes + self.ahead_bytes) as f64 / self.touched_bytes.max(1) as f64
    }

    /// Answers in each whole second since it was started.
    pub(super) fn rates(&self) -> Vec<f64> {
        let mut bins = vec![0.0; self.driven.answers_s.last().copied().unwrap_or(0.0) as usize];
        for at in &self.driven.answers_s {
            if let Some(bin) = bins.get_mut(*at as usize) {
                *bin += 1.0;
            }
        }
        bins
    }
}

impl World {
    /// How long an offshoot is driven.
    pub(super) fn work(&self, server: Server) -> Work {
        let (busy, part) = if self.quick { (3, 4) } else { (8, 1) };
        Work { busy: Duration::from_secs(busy), answers: server.answers() / part }
    }

    /// Judges a case with requests of the other set. `profile` is what was learnt before, and what it is made again.
    pub(super) fn judge(&self, case: &Case, server: Server, profile: Option<&Profile>, seed: u64) -> Outcome<Seen> {
        let tag = server.name();
        self.set_profile(tag, profile.filter(|_| case.trained))?;
        let seen = self.at_node(|node| {
            if case.local {
                node.warm(tag)?;
            }
            node.judge(case, server, seed)
        });
        let seen = seen.map_err(|error| format!("{tag}, {}: {error}", case.policy))?;
        println!(
            "{:<10} {:<14}{:<2} first {:5.2} s (run {:4.2}), work {:5.2} s, {:5} answers, {:5} faults, {:4} blocked of {:4}; \
             RAM {:4.1} MiB on demand, {:4.1} ahead ({:3.0} % used), {:4.1} touched; line {:4.1} + {:4.1} MiB{}",
            tag,
            case.policy,
            if case.trained { "+" } else { "" },
            seen.driven.first_s,
            seen.run_s,
            seen.driven.work_s,
            seen.driven.answers_s.len(),
            seen.faults,
            seen.blocked,
            seen.blocked_in_all,
            mib(seen.demanded_bytes),
            mib(seen.ahead_bytes),
            seen.used_pages as f64 * 1e2 / seen.ahead_pages.max(1) as f64,
            mib(seen.touched_bytes),
            mib(seen.fetched_bytes),
            mib(seen.daemon_bytes),
            seen.driven.query_s.map_or(String::new(), |s| format!("; query {s:.2} s"))
        );
        Ok(seen)
    }

    /// Lets so many offshoots teach, each with its own requests of set A, from nothing; what was learnt.
    pub(super) fn train(&self, server: Server, offshoots: u64) -> Outcome<Option<Profile>> {
        let tag = server.name();
        self.set_profile(tag, None)?;
        self.at_node(|node| {
            // What they touch is the same as from a store far away, and known sooner.
            node.warm(tag)?;
            for seed in 1..=offshoots {
                let (began, name) = (Instant::now(), format!("t{seed}"));
                let vm = node.start(&name, tag, ("none", None), true)?;
                let mut session = Session::new(server, published(&vm, server.port())?, Set::A, seed);
                session.drive(began, self.work(server), || Ok(()))?;
                while node.taught()? < seed as usize {
                    if began.elapsed() > TRAINING {
                        return Err(format!("{tag}: nothing was learnt within {TRAINING:?}").into());
                    }
                    session.go_on()?;
                }
                println!("{tag}: offshoot {seed} has taught after {:.1} s", began.elapsed().as_secs_f64());
                node.host.remove(&name)?;
            }
            let began = Instant::now();
            let layouts = LAID_DOWN_BEHIND.iter().filter(|&&recordings| recordings <= offshoots).count();
            while node.laid_down()? < layouts {
                if began.elapsed() > TRAINING {
                    return Err(format!("{tag}: what was learnt is not laid down within {TRAINING:?}").into());
                }
                std::thread::sleep(SAMPLE);
            }
            println!("{tag}: laid down after {:.1} s more", began.elapsed().as_secs_f64());
            Ok(())
        })?;
        self.profile(tag)
    }
}

impl Node<'_> {
    fn judge(&self, case: &Case, server: Server, seed: u64) -> Outcome<Seen> {
        let work = self.world.work(server);
        let link = self.world.network.left_origin()?;
        let fetched = self.fetched_bytes()?;
        let began = Instant::now();
        let vm = self.start("it", server.name(), (&case.policy, case.eager), false)?;
        let run_s = began.elapsed().as_secs_f64();
        let mut session = Session::new(server, published(&vm, server.port())?, Set::B, seed);
        let done = AtomicBool::new(false);
        let mut worked = None;
        let (driven, samples) = std::thread::scope(|scope| {
            let sampler = scope.spawn(|| {
                let mut samples = Vec::new();
                while !done.load(Ordering::Acquire) {
                    if let Ok((sample, _)) = self.sample("it", began) {
                        samples.push(sample);
                    }
                    std::thread::sleep(SAMPLE);
                }
                samples
            });
            let driven = session.drive(began, work, || {
                worked = Some(self.sample("it", began)?.0);
                Ok(())
            });
            done.store(true, Ordering::Release);
            (driven, sampler.join().expect("no panic while looking"))
        });
        let mut seen = self.counted(case, "it", (link, fetched), (run_s, driven?, samples), began)?;
        seen.blocked_in_all = std::mem::replace(&mut seen.blocked, worked.map_or(0, |sample| sample.blocked));
        Ok(seen)
    }

    fn counted(
        &self,
        case: &Case,
        name: &str,
        (link, (fetched, daemon)): (u64, (u64, u64)),
        (run_s, driven, mut samples): (f64, Driven, Vec<Sample>),
        began: Instant,
    ) -> Outcome<Seen> {
        let (last, stats) = self.sample(name, began)?;
        samples.push(last);
        let touched_bytes = Ram::of(&self.host, name)?.touched_file_bytes();
        let mirror = |field: &str| stats.mirror[field].as_u64().unwrap_or(0);
        let fetched_now = self.fetched_bytes()?;
        let stream = stats.prefetch.clone().unwrap_or_default();
        let mut by_color = Vec::new();
        for (color, counts) in stream["by_color"].as_object().into_iter().flatten() {
            let of = |i: usize| counts[i].as_u64().unwrap_or(0);
            by_color.push((color.parse()?, of(0), of(1), of(2)));
        }
        Ok(Seen {
            case: case.clone(),
            run_s,
            driven,
            faults: mirror("ram_faults"),
            blocked_in_all: 0,
            blocked: mirror("ram_waited_faults"),
            demanded_bytes: mirror("ram_fetched_bytes"),
            ahead_bytes: stream["fetched_bytes"].as_u64().unwrap_or(0),
            ahead_pages: by_color.iter().map(|c| c.2).sum(),
            used_pages: by_color.iter().map(|c| c.3).sum(),
            by_color,
            touched_bytes,
            disk_bytes: mirror("disk_read_bytes"),
            fetched_bytes: fetched_now.0 - fetched,
            daemon_bytes: fetched_now.1 - daemon,
            link_bytes: self.world.network.left_origin()? - link,
            samples,
        })
    }

    fn sample(&self, name: &str, began: Instant) -> Outcome<(Sample, api::VmStats)> {
        let stats = self.host.stats(name)?;
        let mirror = |field: &str| stats.mirror[field].as_u64().unwrap_or(0);
        let ahead = stats.prefetch.as_ref().and_then(|stream| stream["fetched_bytes"].as_u64()).unwrap_or(0);
        let sample = Sample {
            at_s: began.elapsed().as_secs_f64(),
            resident_bytes: stats.private_bytes + stats.shared_bytes,
            brought_bytes: mirror("ram_fetched_bytes") + ahead,
            blocked: mirror("ram_waited_faults"),
        };
        Ok((sample, stats))
    }
}

pub(super) fn mib(bytes: u64) -> f64 {
    bytes as f64 / 1048576.0
}
