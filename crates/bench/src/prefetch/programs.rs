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
const RUNS: usize = 5;
const LIMIT: Duration = Duration::from_secs(180);
/// What is judged.
const AUTO: &str = "auto";
/// How each technique alone does: name, policy, trained.
const TECHNIQUES: [(&str, &str, bool); 4] =
    [("none", "none", false), ("replay", "replay", true), ("color", "color", false), ("auto untrained", "auto", false)];

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
    for &program in names.iter().filter(|name| super::is_chosen("PROGRAMS", name)) {
        world.set_profile(PROGRAMS, None)?;
        teach(world, program)?;
        let profile = world.profile(PROGRAMS)?;
        let run = |policy: &str, trained: bool, local: bool| {
            world.set_profile(PROGRAMS, profile.as_ref().filter(|_| trained))?;
            once(world, program, policy, local)
        };
        // All-local is one that was fetched whole. What is judged, and what it is judged by, take turns: what slows this
        // machine down for a minute is no difference between them; and how much runs of the same differ is told.
        let (mut local_s, mut auto) = (Vec::new(), Vec::new());
        for _ in 0..RUNS {
            local_s.push(run("none", false, true)?.0);
            auto.push(run("auto", true, false)?);
        }
        let base = median(&local_s);
        let mut keep = |technique: &'static str, runs: &[(f64, u64)]| {
            let runs_s: Vec<f64> = runs.iter().map(|run| run.0).collect();
            let (program_s, blocked) = (median(&runs_s), runs.iter().map(|run| run.1).max().unwrap_or(0));
            let invalid = (program_s - base).max(0.0) / program_s;
            println!("{program:<8} {technique:<15} {runs_s:.2?} s over {local_s:.2?} s; {blocked} blocked at most");
            ran.push(Ran { program, technique, program_s, runs_s, local_s: local_s.clone(), blocked, invalid });
        };
        keep(AUTO, &auto);
        for (technique, policy, trained) in TECHNIQUES {
            keep(technique, &[run(policy, trained, false)?]);
        }
        save_raw(&world.raw, "prefetch-programs", &ran)?;
    }
    if std::env::var_os("BENCH_PROGRAMS").is_some() {
        println!("a part of the programs makes no figures");
        return Ok(Vec::new());
    }
    let slowdown = |technique: &str| -> Vec<f64> {
        ran.iter().filter(|r| r.technique == technique).map(|r| r.invalid / (1.0 - r.invalid)).collect()
    };
    let worst = |name: &str, runs: Vec<f64>| {
        let value = runs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        Figure { value, ..Figure::new(name, "x", runs, COMMAND) }
    };
    let invalid = |technique: &str| ran.iter().filter(|r| r.technique == technique).map(|r| r.invalid).collect();
    let mut figures = vec![worst("cold_slowdown", slowdown(AUTO)).asked("<=", 0.03)];
    for (technique, ..) in TECHNIQUES {
        figures.push(worst(&format!("cold_slowdown_{}", technique.replace(' ', "_")), slowdown(technique)));
    }
    figures.push(worst("invalid_execution_ratio", invalid(AUTO)));
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
