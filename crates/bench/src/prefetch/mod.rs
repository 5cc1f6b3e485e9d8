//! `make bench-prefetch`: what colors and foresight are worth, on real guests from a store far away.
//!
//! - `colors`: every kernel's colors against what that kernel says ([`crate::colors`]).
//! - `windows`: how many pages of a color a fault should bring.
//! - `policies`: redis, PostgreSQL and a web application under every policy: faults, bytes, times.
//! - `crowd`: many offshoots of one template on a node.
//! - `dial`: from lazy to eager.
//! - `programs`: programs bound by processor and memory on a cold offshoot.
//! - `pauses`: what reading a guest's colors adds to the pause of its forks.
//! - `boot`: the guest booted from its image on cold nodes, before and behind one that taught.

mod boot;
mod crowd;
mod dial;
mod judge;
pub mod line;
mod pauses;
mod policies;
mod programs;
mod servers;
mod windows;
mod world;

use crate::Outcome;
use crate::report::{Figure, Parts};
use serde::Serialize;
use servers::Server;
use std::path::Path;
use world::World;

const COMMAND: &str = "make bench-prefetch";

/// A part that needs the world.
type Part = fn(&mut World, &Path) -> Outcome<Vec<Figure>>;
const PARTS: [(&str, Part); 7] = [
    ("windows", windows::run),
    ("policies", policies::run),
    ("crowd", crowd::run),
    ("dial", dial::run),
    ("programs", programs::run),
    ("pauses", pauses::run),
    // Last: it changes how the image lies in the store.
    ("boot", boot::run),
];
const COLORS: &str = "colors";

/// Measures everything, or the parts that `only` names, and writes `bench/prefetch.json` in `target`, where guests for
/// colors are kept. In full: with two more servers, and over a short line beside the long one; `bench/prefetch-full.json`.
///
/// # Errors
/// What could not be measured, and why.
pub fn run(program: &Path, dir: &Path, target: &Path, only: &[String], full: bool) -> Outcome {
    let wanted = |part: &str| only.is_empty() || only.iter().any(|name| name == part);
    let (name, servers) = if full { ("prefetch-full", &Server::FULL[..]) } else { ("prefetch", &Server::USUAL[..]) };
    let (bench, command) = (target.join("bench"), format!("make bench-{name}"));
    let (to, plots) = (bench.join(name).with_extension("json"), bench.join(if full { "plots-full" } else { "plots" }));
    let known = PARTS.map(|(part, _)| part);
    let mut measured = Parts::new(&to, &[&known[..], &[COLORS]].concat(), only)?;
    let named = |found: Vec<Figure>| found.into_iter().map(|f| Figure { command: command.clone(), ..f }).collect();
    if wanted(COLORS) {
        println!("-- {COLORS}");
        let found = crate::colors::matrix::run(&target.join("colors"), &bench.join("colors.md"), &[]);
        measured.add(COLORS, found.map(named))?;
    }
    if PARTS.iter().any(|(part, _)| wanted(part)) {
        let mut world = World::new(program, dir, &if full { bench.join("full") } else { bench }, servers)?;
        for (name, part) in PARTS.iter().filter(|(name, _)| wanted(name)) {
            println!("-- {name}");
            measured.add(name, part(&mut world, &plots).map(named))?;
        }
    }
    measured.end()
}

/// Whether the variable `BENCH_<what>`, names with commas between them, asks for `name`; unset, it asks for all.
fn is_chosen(what: &str, name: &str) -> bool {
    let chosen = std::env::var(format!("BENCH_{what}")).unwrap_or_default();
    chosen.is_empty() || chosen.split(',').any(|one| one == name)
}

/// Keeps raw measurements beside the figures.
fn save_raw(dir: &Path, name: &str, found: &impl Serialize) -> Outcome {
    std::fs::create_dir_all(dir)?;
    std::fs::write(dir.join(format!("{name}.json")), serde_json::to_vec_pretty(found)?)?;
    Ok(())
}
