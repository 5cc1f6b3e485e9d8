//! The plots of the seed's evaluation (Nicolae et al., "Going Back and Forth: Efficient Multideployment and
//! Multisnapshotting on Clouds", HPDC 2011), measured anew and drawn to `target/bench/plots`: boot and full read
//! against simultaneous instances, traffic, Bonnie++ on a mirrored disk, checkpoints against instances.

use super::deploy::{Round, System, World, save};
use super::origin::Origin;
use super::{Bench, blobs, bonnie, footprint};
use crate::Outcome;
use crate::plot::{self, Across, Bars, Lines, Point, Series};
use crate::report::{Figure, median};
use std::path::{Path, PathBuf};
use std::time::Duration;
use store::blob::At;
use store::{Mode, Store};

const GIB: u64 = 1 << 30;
/// Bytes that each instance changes before a checkpoint, as in the seed.
const CHANGED: f64 = 1e6;

fn directory(bench: &Bench<'_>) -> PathBuf {
    bench.dir.with_file_name("bench").join("plots")
}

/// Deploys on ever more instances, by each system.
pub(super) fn deployments(bench: &Bench<'_>) -> Outcome<Vec<Figure>> {
    let counts: &[usize] = bench.either(&[1, 2], &[1, 2, 4, 8, 16]);
    // The more common of two ways to copy; `deploy` measures both.
    let systems = [System::Offshoot, System::CopyQcow2, System::QemuNbd];
    let world = World::new(bench, counts.iter().copied().max().unwrap_or(1))?;
    world.teach()?;
    let mut rounds = Vec::new();
    for round in 0..bench.either(1, 3) {
        println!("round {}", round + 1);
        for &instances in counts {
            for system in systems {
                rounds.push(world.round(system, instances, false)?);
            }
        }
        // Each round is worth having, should a later one fail.
        save(bench, "deployments", &rounds)?;
        draw_deployments(&directory(bench), &rounds, counts, &systems)?;
    }
    Ok(Vec::new())
}

/// Of each system and count of instances, the values of all rounds.
fn across(rounds: &[Round], counts: &[usize], systems: &[System], value: impl Fn(&Round) -> f64) -> Vec<Series> {
    let point = |system: System, count: usize| {
        let found = rounds.iter().filter(|r| r.system == system.name() && r.instances == count);
        Point { x: count as f64, runs: found.map(&value).collect() }
    };
    let series = |&system: &System| Series {
        name: system.name().into(),
        points: counts.iter().map(|&count| point(system, count)).filter(|p| !p.runs.is_empty()).collect(),
    };
    systems.iter().map(series).collect()
}

/// How much sooner each system is done than the one at `base`, round by round.
fn speedups(times: &[Series], base: usize) -> Vec<Series> {
    let over = |series: &Series| {
        let pairs = series.points.iter().zip(&times[base].points);
        let ratio = |(own, base): (&Point, &Point)| Point {
            x: own.x,
            runs: own.runs.iter().zip(&base.runs).map(|(own, base)| base / own).collect(),
        };
        Series { name: series.name.clone(), points: pairs.map(ratio).collect() }
    };
    times.iter().map(over).collect()
}

fn draw_deployments(dir: &Path, rounds: &[Round], counts: &[usize], systems: &[System]) -> Outcome {
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
    let all = |value: &dyn Fn(&Round) -> f64| across(rounds, counts, systems, value);
    let lines = |name: &str, title: &str, y: &str, series: Vec<Series>| {
        let subtitle = "one image, one S3 server, links of 1 Gbit/s; nothing cached; median, least and most";
        let (x, across) = ("instances at once".into(), Across::Doubling);
        let (title, subtitle, y) = (title.into(), subtitle.into(), y.into());
        plot::write(dir, name, &Lines { title, subtitle, x, y, across, series }.svg())
    };
    let (boot, full) = (all(&Round::boot), all(&Round::full));
    lines("boot-mean", "Boot: mean time of an instance", "seconds", all(&|r| mean(&r.boot_s)))?;
    lines("boot-total", "Boot: time until all instances have", "seconds", boot.clone())?;
    lines("boot-speedup", "Boot of all instances: speed over full copy", "times as fast", speedups(&boot, 1))?;
    lines("full-read-mean", "Boot and full read: mean time of an instance", "seconds", all(&|r| mean(&r.full_s)))?;
    lines("full-read-total", "Boot and full read: time until all instances have", "seconds", full.clone())?;
    lines("full-read-speedup", "Boot and full read: speed over full copy", "times as fast", speedups(&full, 1))?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    lines("boot-traffic", "Boot: what leaves the origin", "MiB", all(&|r| mib(r.boot_origin_bytes)))?;
    lines("full-read-traffic", "Boot and full read: what leaves the origin", "MiB", all(&|r| mib(r.full_origin_bytes)))
}

/// Checkpoints of ever more instances at once.
pub(super) fn checkpoints(bench: &Bench<'_>) -> Outcome<Vec<Figure>> {
    let counts: &[usize] = bench.either(&[1, 10], &[1, 25, 50, 75, 100, 125, 150]);
    let local = bench.fresh("checkpoints")?;
    let origin_dir = bench.fresh("origin")?;
    let origin = Origin::start(&origin_dir)?;
    let (mut time, mut space) = (Vec::new(), Vec::new());
    let here = Store::open(&local, Mode::ReadWrite)?;
    let there = origin.open("checkpoints", Duration::ZERO)?;
    for (name, store, dir) in [("local store", &here, &local), ("S3", &*there, &origin_dir)] {
        let (seconds, bytes) = checkpoints_on(bench, store, dir, counts)?;
        time.push(Series { name: name.into(), points: seconds });
        space.push(Series { name: name.into(), points: bytes });
    }
    let subtitle = "each changes 1 MB of its disk and commits it at once with the others; median, least and most";
    let lines = |name: &str, title: &str, y: &str, series: &[Series]| {
        let (x, across) = ("instances at once".into(), Across::Linear);
        let (title, subtitle, y, series) = (title.into(), subtitle.into(), y.into(), series.to_vec());
        plot::write(&directory(bench), name, &Lines { title, subtitle, x, y, across, series }.svg())
    };
    lines("checkpoint-time", "Checkpoint: time until all instances are stored", "seconds", &time)?;
    lines("checkpoint-space", "Checkpoint: space taken in the store", "MB", &space)?;
    for series in &time {
        if let Some(last) = series.points.last() {
            println!("{}: {} instances in {:.3} s", series.name, last.x, median(&last.runs));
        }
    }
    Ok(Vec::new())
}

/// Seconds, and MB that the store grew, by number of instances.
fn checkpoints_on(bench: &Bench<'_>, store: &Store, dir: &Path, counts: &[usize]) -> Outcome<(Vec<Point>, Vec<Point>)> {
    let most = counts.iter().copied().max().unwrap_or(1);
    let blob = store.create_blob("disk", 10 * GIB, 4096)?;
    let names: Vec<String> = (0..most).map(|i| format!("instance-{i}")).collect();
    for made in blob.clone_each(At::Latest, &names.iter().map(String::as_str).collect::<Vec<_>>())? {
        made?;
    }
    let (mut time, mut space) = (Vec::new(), Vec::new());
    for (step, &count) in counts.iter().enumerate() {
        let (mut seconds, mut grown) = (Vec::new(), Vec::new());
        for round in 0..bench.either(1, 5) {
            let before = footprint(dir)?;
            // Other content each time, or nothing would be stored.
            let content = (step * 100 + round) as u64;
            seconds.push(blobs::commit_at_once(store, &names[..count], 10 * GIB, content)?);
            // A server may keep what it was given in memory for a moment.
            rustix::fs::sync();
            grown.push(footprint(dir)?.saturating_sub(before) as f64 / CHANGED);
        }
        time.push(Point { x: count as f64, runs: seconds });
        space.push(Point { x: count as f64, runs: grown });
    }
    Ok((time, space))
}

/// Bonnie++ in a file system on a mirrored disk, beside one on a plain file.
pub(super) fn bonnie(bench: &Bench<'_>) -> Outcome<Vec<Figure>> {
    let results = bonnie::run(bench)?;
    save(bench, "bonnie", &results)?;
    let bars = |name: &str, title: &str, y: &str, tests: &[(&str, &str)], scale: f64| {
        let series = |label: &str, found: &[bonnie::Result]| Series {
            name: label.into(),
            points: (0u32..)
                .zip(tests)
                .map(|(x, (key, _))| Point {
                    x: f64::from(x),
                    runs: found.iter().filter_map(|result| Some(result.get(*key)? / scale)).collect(),
                })
                .filter(|point| !point.runs.is_empty())
                .collect(),
        };
        let series = vec![series("mirrored disk", &results.mirrored), series("plain file", &results.plain)];
        let subtitle = "ext4 on a loop device over the disk; Bonnie++ 2.00, O_DIRECT; median, least and most".into();
        let groups = tests.iter().map(|(_, label)| (*label).into()).collect();
        let (title, y) = (title.into(), y.into());
        plot::write(&directory(bench), name, &Bars { title, subtitle, y, groups, series }.svg())
    };
    let throughput = [("put_block", "write"), ("rewrite", "rewrite"), ("get_block", "read")];
    bars("bonnie-throughput", "Bonnie++: throughput of one instance", "MB/s", &throughput, 1000.0 / 1.024)?;
    let operations = [
        ("seeks", "seeks"),
        ("seq_create", "create"),
        ("seq_del", "delete"),
        ("ran_create", "create, random"),
        ("ran_del", "delete, random"),
    ];
    bars("bonnie-operations", "Bonnie++: operations of one instance", "thousands a second", &operations, 1000.0)?;
    Ok(Vec::new())
}
