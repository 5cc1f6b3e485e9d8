//! The guest booted from its image on cold nodes: by the first who does, and by one behind it, whose disk is fetched ahead.

use super::judge::mib;
use super::world::{Node, World};
use super::{COMMAND, save_raw};
use crate::Outcome;
use crate::report::Figure;
use serde::Serialize;
use std::path::Path;
use std::time::{Duration, Instant};

/// Longest until what a boot read is laid down.
const LAID_DOWN: Duration = Duration::from_secs(120);
/// One after the other: name, policy, whether it teaches.
const BOOTS: [(&str, &str, bool); 3] = [("none", "none", false), ("first", "auto", true), ("taught", "auto", false)];

/// One boot.
#[derive(Debug, Serialize)]
struct Booted {
    case: &'static str,
    /// From `run` until all servers answer.
    serves_s: f64,
    /// Bytes that the guest read of its disk, and of packs that the node fetched for it.
    read_bytes: u64,
    fetched_bytes: u64,
}

pub(super) fn run(world: &mut World, _: &Path) -> Outcome<Vec<Figure>> {
    let mut booted = Vec::new();
    for (case, policy, learn) in BOOTS {
        let done = world.at_node(|node| {
            let done = boot(node, case, policy, learn)?;
            let began = Instant::now();
            while learn && node.disks_laid_down()? == 0 {
                if began.elapsed() > LAID_DOWN {
                    return Err(format!("what a boot read is not laid down within {LAID_DOWN:?}").into());
                }
                std::thread::sleep(Duration::from_millis(500));
            }
            Ok(done)
        })?;
        println!(
            "{case:<7} serves after {:5.2} s; {:.1} MiB of the disk read, {:.1} MiB fetched",
            done.serves_s,
            mib(done.read_bytes),
            mib(done.fetched_bytes)
        );
        booted.push(done);
    }
    save_raw(&world.raw, "prefetch-boot", &booted)?;
    let seconds = |case: &str| booted.iter().filter(|b| b.case == case).map(|b| b.serves_s).collect::<Vec<_>>();
    let figure = |case: &str| Figure::new(&format!("boot_{case}_s"), "s", seconds(case), COMMAND);
    Ok(BOOTS.iter().map(|(case, ..)| figure(case)).collect())
}

/// Boots it, and ends it when it serves: what it read is learnt then.
fn boot(node: &Node<'_>, case: &'static str, policy: &str, learn: bool) -> Outcome<Booted> {
    let fetched = node.fetched_bytes()?;
    let began = Instant::now();
    let vm = node.boot("it", policy, learn)?;
    node.await_all(&vm)?;
    let serves_s = began.elapsed().as_secs_f64();
    let read_bytes = node.host.stats("it")?.mirror["disk_read_bytes"].as_u64().unwrap_or(0);
    let now = node.fetched_bytes()?;
    node.host.remove("it")?;
    Ok(Booted { case, serves_s, read_bytes, fetched_bytes: now.0 + now.1 - fetched.0 - fetched.1 })
}
