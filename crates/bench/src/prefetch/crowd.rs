//! Many offshoots of one template on one node: what the later ones fetch, and how soon all answer.

use super::servers::{Server, Session, Set, Work};
use super::world::{Node, World, published};
use super::{COMMAND, save_raw};
use crate::plot::{Across, Lines, Point, Series, write};
use crate::report::Figure;
use crate::{Failure, Outcome};
use std::path::Path;
use std::time::{Duration, Instant};

const SERVER: Server = Server::Redis;
/// What bounds the others: the node has all of the snapshot.
const ALL_LOCAL: &str = "all-local";

pub(super) fn run(world: &mut World, plots: &Path) -> Outcome<Vec<Figure>> {
    let profile = Some(world.trained(SERVER, 2)?);
    world.set_profile(SERVER.name(), profile.as_ref())?;
    let figures = vec![
        later(world, "later_offshoots_bytes", |_| 100)?.asked("<=", 0.02),
        later(world, "later_offshoots_bytes_other", |n| 100 + n)?,
    ];
    let mut series = Vec::new();
    for name in ["none", "auto", ALL_LOCAL] {
        let mut points = Vec::new();
        for count in if world.quick { vec![1, 2] } else { vec![1, 2, 4, 8] } {
            world.set_profile(SERVER.name(), profile.as_ref())?;
            let first_s = together(world, name, count)?;
            println!("{count} at once, {name}: first answers after {first_s:.2?} s");
            points.push(Point { x: count as f64, runs: first_s });
        }
        series.push(Series { name: name.into(), points });
    }
    let lines = Lines {
        title: "First answers of offshoots that start at once".into(),
        subtitle: format!("{} on one node, cold but for all-local; the line joins medians", SERVER.name()),
        x: "offshoots".into(),
        y: "s".into(),
        across: Across::Doubling,
        series,
    };
    write(plots, "prefetch-together", &lines.svg())?;
    Ok(figures)
}

/// Bytes that the 2nd to the 8th offshoot fetch, over the first's; `seed` tells each one's requests.
fn later(world: &World, name: &str, seed: impl Fn(u64) -> u64 + Send + Sync) -> Outcome<Figure> {
    let fetched = world.at_node(|node| {
        let mut fetched = Vec::new();
        for n in 0..if world.quick { 3 } else { 8 } {
            let fetched_now = || node.fetched_bytes().map(|(mirror, daemon)| mirror + daemon);
            let before = fetched_now()?;
            // As much work for each: in the same time a later one does more.
            let work = Work { busy: Duration::ZERO, answers: SERVER.answers() };
            let name = format!("l{n}");
            drive(node, &name, "auto", seed(n), work)?;
            // Its own bytes are counted: one that lived on would go on fetching what its age makes due.
            node.host.remove(&name)?;
            fetched.push((fetched_now()? - before) as f64);
        }
        Ok(fetched)
    })?;
    println!("{name}: {:.0?} KiB", fetched.iter().map(|b| b / 1024.0).collect::<Vec<_>>());
    save_raw(&world.raw, &format!("prefetch-{name}"), &fetched)?;
    let (first, rest) = fetched.split_first().ok_or("no offshoot ran")?;
    let runs: Vec<f64> = rest.iter().map(|bytes| bytes / first.max(1.0)).collect();
    let value = runs.iter().copied().fold(0.0, f64::max);
    Ok(Figure { value, ..Figure::new(name, "x", runs, COMMAND) })
}

/// Starts an offshoot and drives it; seconds until its first answer.
fn drive(node: &Node<'_>, name: &str, policy: &str, seed: u64, work: Work) -> Outcome<f64> {
    let began = Instant::now();
    let vm = node.start(name, SERVER.name(), (policy, None), false)?;
    let mut session = Session::new(SERVER, published(&vm, SERVER.port())?, Set::B, seed);
    Ok(session.drive(began, work, || Ok(()))?.first_s)
}

/// Starts so many at once, under a policy on a cold node or [`ALL_LOCAL`]; seconds until the first answer of each.
fn together(world: &World, name: &str, count: u64) -> Outcome<Vec<f64>> {
    let policy = if name == ALL_LOCAL { "none" } else { name };
    world.at_node(|node| {
        if name == ALL_LOCAL {
            node.warm(SERVER.name())?;
        }
        std::thread::scope(|scope| {
            let work = Work { busy: Duration::ZERO, answers: 1 };
            let start = |n: u64| scope.spawn(move || drive(node, &format!("c{n}"), policy, 100 + n, work));
            let threads: Vec<_> = (0..count).map(start).collect();
            let joined = threads.into_iter().map(|thread| thread.join().expect("no panic while driving"));
            joined.collect::<Outcome<Vec<f64>>>().map_err(|e| Failure::from(format!("{count} at once: {e}")))
        })
    })
}
