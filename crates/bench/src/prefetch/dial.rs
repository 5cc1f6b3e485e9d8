//! From lazy to eager: how soon an offshoot answers, and how much it moves, by the dial.

use super::judge::{Case, Plotted, Seen, mib};
use super::servers::Server;
use super::world::World;
use super::{COMMAND, save_raw};
use crate::Outcome;
use crate::plot::{Across, Lines, Point, Series, write};
use crate::report::Figure;
use std::path::Path;

const SERVER: Server = Server::Web;

pub(super) fn run(world: &mut World, plots: &Path) -> Outcome<Vec<Figure>> {
    let profile = Some(world.trained(SERVER, 2)?);
    let mut seen = Vec::new();
    for eager in if world.quick { vec![0.0, 1.0] } else { vec![0.0, 0.25, 0.5, 0.75, 1.0] } {
        for trained in [false, true] {
            let case = Case { server: SERVER.name(), policy: "auto".into(), eager: Some(eager), trained, local: false };
            println!("eager {eager}:");
            seen.push(world.judge(&case, SERVER, profile.as_ref(), 100)?);
        }
    }
    save_raw(&world.raw, "prefetch-dial", &seen)?;
    let line = |name: &str, trained: bool, value: &dyn Fn(&Seen) -> f64| Series {
        name: name.into(),
        points: seen
            .iter()
            .filter(|s| s.case.trained == trained)
            .map(|s| Point { x: f64::from(s.case.eager.unwrap_or_default()), runs: vec![value(s)] })
            .collect(),
    };
    let kinds: [Plotted; 3] = [
        ("prefetch-dial-first", "Time to the first answer", "s", |s| s.driven.first_s),
        ("prefetch-dial-blocked", "Faults that waited for the origin", "faults", |s| s.blocked as f64),
        ("prefetch-dial-bytes", "Bytes of packs that came over the line", "MiB", |s| mib(s.fetched_bytes)),
    ];
    for (name, title, unit, value) in kinds {
        let lines = Lines {
            title: format!("{title}, from lazy to eager"),
            subtitle: format!("`auto`, {}", SERVER.name()),
            x: "--eager".into(),
            y: unit.into(),
            across: Across::Linear,
            series: vec![line("untrained", false, &value), line("trained", true, &value)],
        };
        write(plots, name, &lines.svg())?;
    }
    let full = seen.iter().filter(|s| s.case.eager == Some(1.0)).map(|s| s.driven.first_s).collect();
    Ok(vec![Figure::new("full_copy_first_answer_s", "s", full, COMMAND)])
}
