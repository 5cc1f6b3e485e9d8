//! Kaleidoscope's color windows, swept: pages that a fault brings, executable and other, of a template nobody knows.

use super::judge::{Case, Plotted, Seen, mib};
use super::servers::Server;
use super::world::World;
use super::{COMMAND, save_raw};
use crate::Outcome;
use crate::plot::{Bars, Point, Series, write};
use crate::report::Figure;
use std::path::Path;

const SERVERS: [Server; 2] = [Server::Redis, Server::Web];
/// Data windows once, twice, four and eight times the executable one; then both twice and four times as large.
const WINDOWS: [&str; 6] = ["color:4,4", "color:4,8", "color:4,16", "color:4,32", "color:8,32", "color:16,64"];

pub(super) fn run(world: &mut World, plots: &Path) -> Outcome<Vec<Figure>> {
    let mut seen: Vec<(&str, Seen)> = Vec::new();
    for &windows in if world.quick { &WINDOWS[..2] } else { &WINDOWS[..] } {
        for server in SERVERS {
            let case = Case { server: server.name(), policy: windows.into(), ..Case::default() };
            seen.push((windows, world.judge(&case, server, None, 100)?));
        }
    }
    save_raw(&world.raw, "prefetch-windows", &seen)?;
    let kinds: [Plotted; 2] = [
        ("prefetch-windows-faults", "Faults that waited for the origin", "faults", |seen| seen.blocked as f64),
        ("prefetch-windows-bytes", "Bytes of packs that came over the line", "MiB", |seen| mib(seen.fetched_bytes)),
    ];
    for (name, title, unit, value) in kinds {
        let series = WINDOWS.into_iter().map(|windows| Series {
            name: windows.into(),
            points: SERVERS
                .iter()
                .enumerate()
                .map(|(x, server)| {
                    let of = seen.iter().filter(|(w, s)| *w == windows && s.case.server == server.name());
                    Point { x: x as f64, runs: of.map(|(_, s)| value(s)).collect() }
                })
                .collect(),
        });
        let bars = Bars {
            title: format!("{title}, by color windows"),
            subtitle: "pages for a fault: executable, other; nothing was recorded".into(),
            y: unit.into(),
            groups: SERVERS.iter().map(|server| server.name().to_owned()).collect(),
            series: series.collect(),
        };
        write(plots, name, &bars.svg())?;
    }
    let blocked =
        |windows: &'static str| seen.iter().filter(move |(w, _)| *w == windows).map(|(_, s)| s.blocked as f64);
    let over: Vec<f64> = blocked(WINDOWS[2]).zip(blocked(WINDOWS[0])).map(|(ours, even)| ours / even).collect();
    Ok(if over.is_empty() { Vec::new() } else { vec![Figure::new("color_windows_4_over_1", "x", over, COMMAND)] })
}
