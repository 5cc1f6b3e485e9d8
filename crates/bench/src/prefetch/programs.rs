//! Six programs bound by processor and memory, started on a cold offshoot, beside the same on an all-local one.

use super::servers::{Server, get};
use super::world::{PROGRAMS, World, published};
use super::{COMMAND, save_raw};
use crate::Outcome;
use crate::report::{Figure, median};
use serde::Serialize;
use std::path::Path;
use std::time::{Duration, Instant};

/// The programs, as the guest's script names them; the first one chases pointers.
pub(super) const NAMES: [&str; 6] = ["chase", "sort", "pack", "digest", "count", "primes"];
/// Runs of a program all-local, and under `auto`.
const RUNS: usize = 3;
const LIMIT: Duration = Duration::from_secs(180);
/// How each technique alone does: name, policy, trained.
const TECHNIQUES: [(&str, &str, bool); 5] = [
    ("none", "none", false),
    ("replay", "replay", true),
    ("color", "color", false),
    ("auto untrained", "auto", false),
    ("auto", "auto", true),
];

/// One run of a program.
#[derive(Debug, Serialize)]
struct Ran {
    program: &'static str,
    technique: &'static str,
    /// From the request to the end of the program, once the offshoot ran: the median.
    program_s: f64,
    runs_s: Vec<f64>,
    /// The same on an all-local offshoot.
    local_s: Vec<f64>,
    /// Waits for the origin since the offshoot's start, at most.
    blocked: u64,
    /// Part of the program's time that it would not have taken all-local: the invalid execution ratio.
    invalid: f64,
}

pub(super) fn run(world: &mut World, _: &Path) -> Outcome<Vec<Figure>> {
    let names = if world.quick { &NAMES[..2] } else { &NAMES[..] };
    let mut ran: Vec<Ran> = Vec::new();
    for &program in names {
        // One that was fetched whole: how much runs of the same differ says what a difference means.
        let local = (0..RUNS).map(|_| Ok(once(world, program, "none", true)?.0)).collect::<Outcome<Vec<f64>>>()?;
        let base = median(&local);
        world.set_profile(PROGRAMS, None)?;
        teach(world, program)?;
        let profile = world.profile(PROGRAMS)?;
        for (technique, policy, trained) in TECHNIQUES {
            world.set_profile(PROGRAMS, profile.as_ref().filter(|_| trained))?;
            // What is judged is told from chance by as many runs as what it is judged by.
            let runs = if technique == "auto" { RUNS } else { 1 };
            let runs = (0..runs).map(|_| once(world, program, policy, false)).collect::<Outcome<Vec<_>>>()?;
            let runs_s: Vec<f64> = runs.iter().map(|run| run.0).collect();
            let (program_s, blocked) = (median(&runs_s), runs.iter().map(|run| run.1).max().unwrap_or(0));
            let invalid = (program_s - base).max(0.0) / program_s;
            println!("{program:<8} {technique:<15} {runs_s:.2?} s over {local:.2?} s; {blocked} blocked at most");
            ran.push(Ran { program, technique, program_s, runs_s, local_s: local.clone(), blocked, invalid });
        }
        save_raw(&world.raw, "prefetch-programs", &ran)?;
    }
    let slowdown = |technique: &str| -> Vec<f64> {
        ran.iter().filter(|r| r.technique == technique).map(|r| r.invalid / (1.0 - r.invalid)).collect()
    };
    let worst = |name: &str, runs: Vec<f64>| {
        let value = runs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        Figure { value, ..Figure::new(name, "x", runs, COMMAND) }
    };
    let invalid = |technique: &str| ran.iter().filter(|r| r.technique == technique).map(|r| r.invalid).collect();
    let mut figures = vec![worst("cold_slowdown", slowdown("auto")).asked("<=", 0.03)];
    for (technique, ..) in TECHNIQUES {
        figures.push(worst(&format!("cold_slowdown_{}", technique.replace(' ', "_")), slowdown(technique)));
    }
    figures.push(worst("invalid_execution_ratio", invalid("auto")));
    figures.push(worst("invalid_execution_ratio_none", invalid("none")));
    Ok(figures)
}

/// Seconds that a program takes on a fresh node, and how often its guest waited for the origin.
fn once(world: &World, program: &str, policy: &str, local: bool) -> Outcome<(f64, u64)> {
    world.at_node(|node| {
        if local {
            node.warm(PROGRAMS)?;
        }
        let vm = node.start("it", PROGRAMS, (policy, None), false)?;
        let began = Instant::now();
        get(published(&vm, Server::Web.port())?, &format!("/run/{program}/7"), LIMIT)?;
        let took = began.elapsed().as_secs_f64();
        Ok((took, node.host.stats("it")?.mirror["ram_waited_faults"].as_u64().unwrap_or(0)))
    })
}

fn teach(world: &World, program: &str) -> Outcome {
    world.at_node(|node| {
        for seed in 1..=2 {
            let (began, name) = (Instant::now(), format!("t{seed}"));
            let vm = node.start(&name, PROGRAMS, ("none", None), true)?;
            let address = published(&vm, Server::Web.port())?;
            while node.taught()? < seed {
                if began.elapsed() > LIMIT {
                    return Err(format!("{program}: nothing was learnt within {LIMIT:?}").into());
                }
                get(address, &format!("/run/{program}/{}", seed + 1), LIMIT)?;
            }
            node.host.remove(&name)?;
        }
        Ok(())
    })
}
