//! Every policy with every server: faults and bytes first, then how soon and how fast the offshoot answers.

#[cfg(test)]
mod tests;

use super::judge::{Case, Plotted, Seen, mib};
use super::line::{FAR, NEAR};
use super::servers::Server;
use super::world::{Profile, World};
use super::{COMMAND, save_raw};
use crate::Outcome;
use crate::plot::{Across, Bars, Lines, Point, Series, write};
use crate::report::Figure;
use guest::Color;
use std::path::Path;

/// Offshoots that teach: as many as a node lets.
const TEACHERS: u64 = 8;
/// Cases: name in plots, policy, all-local. Before anything was learnt, and with what the template was laid down as then.
const UNTRAINED: [(&str, &str, bool); 6] = [
    ("none untrained", "none", false),
    ("readahead untrained", "readahead:16", false),
    ("color untrained", "color", false),
    ("auto untrained", "auto", false),
    ("plain untrained", "auto:plain", false),
    ("all untrained", "all", false),
];
/// Behind it: what was learnt is there for those that use it, and the template is laid down by it for all.
const TRAINED: [(&str, &str, bool); 9] = [
    ("all-local", "none", true),
    ("none", "none", false),
    ("readahead", "readahead:16", false),
    ("color", "color", false),
    ("auto", "auto", false),
    ("replay", "replay", false),
    ("intersect", "intersect", false),
    ("twinkle", "twinkle:64,4", false),
    ("all", "all", false),
];
/// The same at the end of a short line, in a full measurement.
const UNTRAINED_NEAR: [(&str, &str, bool); 2] =
    [("none untrained, near", "none", false), ("auto untrained, near", "auto", false)];
const TRAINED_NEAR: [(&str, &str, bool); 4] = [
    ("all-local, near", "none", true),
    ("none, near", "none", false),
    ("auto, near", "auto", false),
    ("replay, near", "replay", false),
];
/// What `auto` is compared with: policies that anybody could choose.
const OTHERS: [&str; 6] = ["readahead", "color", "replay", "intersect", "twinkle", "all"];

/// One case of one server.
struct Judged {
    case: &'static str,
    server: Server,
    seen: Seen,
}

/// Runs them all, in so many rounds.
pub(super) fn run(world: &mut World, plots: &Path) -> Outcome<Vec<Figure>> {
    let mut judged: Vec<Judged> = Vec::new();
    // All before anybody teaches: snapshots of one guest share pages, and what one server taught moves them for all.
    for server in world.chosen() {
        judge(world, server, &UNTRAINED, None, &mut judged)?;
        if world.is_full() {
            world.set_line(NEAR)?;
            judge(world, server, &UNTRAINED_NEAR, None, &mut judged)?;
            world.set_line(FAR)?;
        }
    }
    let servers =
        if TRAINED.iter().any(|(case, ..)| super::is_chosen("CASES", case)) { world.chosen() } else { vec![] };
    for server in servers {
        let profile = world.trained(server, if world.quick { 2 } else { TEACHERS })?;
        judge(world, server, &TRAINED, Some(&profile), &mut judged)?;
        if world.is_full() {
            world.set_line(NEAR)?;
            judge(world, server, &TRAINED_NEAR, Some(&profile), &mut judged)?;
            world.set_line(FAR)?;
        }
    }
    if ["SERVERS", "CASES"].iter().any(|what| std::env::var_os(format!("BENCH_{what}")).is_some()) {
        println!("a part of the servers and cases makes no figures");
        return Ok(Vec::new());
    }
    plot(&judged, plots)?;
    Ok(figures(&judged))
}

/// Runs cases of one server, and keeps what was measured until then.
fn judge(
    world: &World,
    server: Server,
    cases: &[(&'static str, &str, bool)],
    profile: Option<&Profile>,
    judged: &mut Vec<Judged>,
) -> Outcome {
    for round in 0..world.rounds {
        for &(case, policy, local) in cases.iter().filter(|(case, ..)| super::is_chosen("CASES", case)) {
            let trained = profile.is_some();
            let of = Case { server: server.name(), policy: policy.into(), eager: None, trained, local };
            let seen = world.judge(&of, server, profile, 100 + round)?;
            judged.push(Judged { case, server, seen });
        }
    }
    save_raw(&world.raw, "prefetch-policies", &judged.iter().map(|j| (j.case, &j.seen)).collect::<Vec<_>>())
}

/// Those that were judged, in their order.
fn servers(judged: &[Judged]) -> Vec<Server> {
    Server::FULL.into_iter().filter(|server| judged.iter().any(|j| j.server == *server)).collect()
}

/// The repetitions of a case of a server, told in a number.
fn of(judged: &[Judged], case: &str, server: Server, value: &dyn Fn(&Seen) -> f64) -> Vec<f64> {
    judged.iter().filter(|j| j.case == case && j.server == server).map(|j| value(&j.seen)).collect()
}

/// By server: the median of one case over that of another.
fn ratios(judged: &[Judged], ours: &str, theirs: &str, value: &dyn Fn(&Seen) -> f64) -> Vec<f64> {
    let median = |case, server| crate::report::median(&of(judged, case, server, value));
    servers(judged).into_iter().map(|server| median(ours, server) / median(theirs, server).max(1e-9)).collect()
}

/// Judged by the worst of the servers; `runs` are the servers' in the order of [`Server::FULL`].
fn worst(name: &str, unit: &str, runs: Vec<f64>) -> Figure {
    let value = runs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    Figure { value, ..Figure::new(name, unit, runs, COMMAND) }
}

fn figures(judged: &[Judged]) -> Vec<Figure> {
    let blocked = |seen: &Seen| seen.blocked as f64;
    let bytes = |seen: &Seen| seen.fetched_bytes as f64;
    let first = |seen: &Seen| seen.driven.first_s;
    let least = |value: &dyn Fn(&Seen) -> f64| -> Vec<f64> {
        let median = |case, server| crate::report::median(&of(judged, case, server, value));
        let best = |server| OTHERS.iter().map(|case| median(case, server)).fold(f64::INFINITY, f64::min);
        servers(judged).into_iter().map(|server| median("auto", server) / best(server).max(1.0)).collect()
    };
    let trained = |value: &dyn Fn(&Seen) -> f64| -> Vec<f64> {
        servers(judged).into_iter().map(|server| crate::report::median(&of(judged, "auto", server, value))).collect()
    };
    let mut gain = ratios(judged, "auto untrained", "plain untrained", &blocked);
    gain.sort_by(f64::total_cmp);
    // A guest that waits for one waits for no byte: it is zero in the store.
    let free = judged.iter().flat_map(|j| &j.seen.by_color).filter(|c| c.0 == Color::Free as u8);
    let free: u64 = free.map(|c| c.2 * base::PAGE).sum();
    // Not even an all-local offshoot answers evenly: what it shows is no warming up.
    let (uneven, uneven_lost) = slow_seconds(judged, "all-local");
    let slow = |case: &str| {
        let less = |values: Vec<f64>, uneven: &[f64]| -> Vec<f64> {
            values.iter().zip(uneven).map(|(value, uneven)| (value - uneven).max(0.0)).collect()
        };
        let (slow, lost) = slow_seconds(judged, case);
        (less(slow, &uneven), less(lost, &uneven_lost))
    };
    let over = |ours: &[f64], theirs: &[f64]| -> Vec<f64> {
        ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs.max(1e-9)).collect()
    };
    let mut figures = vec![
        // `none` is a store in which nobody has any foresight: the layout is part of that. The same behind the layout, beside.
        worst("blocking_trained", "x", ratios(judged, "auto", "none untrained", &blocked)).asked("<=", 0.05),
        worst("blocking_trained_in_layout", "x", ratios(judged, "auto", "none", &blocked)),
        worst("blocking_untrained", "x", ratios(judged, "auto untrained", "none untrained", &blocked)).asked("<=", 0.4),
        worst("first_answer_ratio", "x", ratios(judged, "auto", "all-local", &first)).asked("<=", 1.15),
        worst("warmup_ratio", "x", over(&slow("auto").0, &slow("none").0)).asked("<=", 0.1),
        worst("warmup_lost_ratio", "x", over(&slow("auto").1, &slow("none").1)),
        worst("bytes_over_touched", "x", trained(&Seen::moved_over_touched)).asked("<=", 1.25),
        worst("mirrored_over_touched", "x", trained(&Seen::mirrored_over_touched)),
        worst("ram_over_touched", "x", trained(&Seen::brought_over_touched)),
        worst("faults_vs_best", "x", least(&blocked)).asked("<=", 1.05),
        worst("bytes_vs_best", "x", least(&bytes)).asked("<=", 1.05),
        // The second best of the servers.
        Figure { value: gain[1], ..Figure::new("color_gain", "x", gain.clone(), COMMAND) }.asked("<=", 0.9),
        worst("layout_bytes_ratio", "x", ratios(judged, "none", "none untrained", &bytes)),
        Figure::new("free_bytes_fetched", "bytes", vec![free as f64], COMMAND).asked("<=", 0.0),
    ];
    if judged.iter().any(|j| j.case == "auto, near") {
        let near = |ours, theirs, value| ratios(judged, ours, theirs, value);
        figures.extend([
            worst("blocking_trained_near", "x", near("auto, near", "none untrained, near", &blocked)),
            worst("blocking_untrained_near", "x", near("auto untrained, near", "none untrained, near", &blocked)),
            worst("first_answer_ratio_near", "x", near("auto, near", "all-local, near", &first)),
        ]);
    }
    figures
}

/// By server: seconds in which fewer than 95% of the warm answers came, and seconds' worth of answers that did not come.
/// Warm is the median second of the later half of the all-local offshoot.
fn slow_seconds(judged: &[Judged], case: &str) -> (Vec<f64>, Vec<f64>) {
    let of_server = |server: Server| {
        let rates = |case: &str| -> Vec<Vec<f64>> {
            judged.iter().filter(|j| j.case == case && j.server == server).map(|j| j.seen.rates()).collect()
        };
        let later: Vec<f64> = rates("all-local").into_iter().flat_map(|bins| bins[bins.len() / 2..].to_vec()).collect();
        let warm = crate::report::median(&later).max(1e-9);
        let mut slow = Vec::new();
        let mut lost = Vec::new();
        for bins in rates(case) {
            slow.push(bins.iter().filter(|&&rate| rate < 0.95 * warm).count() as f64);
            lost.push(bins.iter().map(|rate| (1.0 - rate / warm).max(0.0)).sum());
        }
        (crate::report::median(&slow), crate::report::median(&lost))
    };
    servers(judged).into_iter().map(of_server).unzip()
}

fn plot(judged: &[Judged], dir: &Path) -> Outcome {
    let groups: Vec<String> = servers(judged).iter().map(|server| server.name().to_owned()).collect();
    let kinds: [Plotted; 3] = [
        ("prefetch-faults", "Faults that waited for the origin", "faults", |seen| seen.blocked as f64),
        ("prefetch-bytes", "Bytes of packs that came over the line", "MiB", |seen| mib(seen.fetched_bytes)),
        ("prefetch-first", "Time to the first answer", "s", |seen| seen.driven.first_s),
    ];
    for (name, title, unit, value) in kinds {
        for (part, cases) in [("", &TRAINED[1..]), ("-untrained", &UNTRAINED[..])] {
            let series = cases.iter().map(|(case, ..)| Series {
                name: (*case).into(),
                points: servers(judged)
                    .into_iter()
                    .enumerate()
                    .map(|(x, server)| Point { x: x as f64, runs: of(judged, case, server, &value) })
                    .collect(),
            });
            let bars = Bars {
                title: title.into(),
                subtitle: "cold node, 1 Gbit/s with 20 ms added; trained on others' requests, or not".into(),
                y: unit.into(),
                groups: groups.clone(),
                series: series.collect(),
            };
            write(dir, &format!("{name}{part}"), &bars.svg())?;
        }
    }
    footprints(judged, dir)
}

/// What each policy had brought to the node over time, for one server each.
fn footprints(judged: &[Judged], dir: &Path) -> Outcome {
    for server in servers(judged) {
        let series = ["none", "color", "auto untrained", "auto", "replay", "all"].iter().filter_map(|case| {
            let found = judged.iter().find(|j| j.case == *case && j.server == server)?;
            let points = found.seen.samples.iter();
            let points = points.map(|s| Point { x: s.at_s, runs: vec![mib(s.brought_bytes)] }).collect();
            Some(Series { name: (*case).into(), points })
        });
        let lines = Lines {
            title: format!("RAM brought to the node for one offshoot: {}", server.name()),
            subtitle: "on demand and ahead, since its start".into(),
            x: "seconds".into(),
            y: "MiB".into(),
            across: Across::Linear,
            series: series.collect(),
        };
        write(dir, &format!("prefetch-footprint-{}", server.name()), &lines.svg())?;
    }
    Ok(())
}
