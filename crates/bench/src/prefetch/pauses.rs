//! What colors cost a guest that is forked. Nothing of them is in the pause: they are found from the frozen memory, once
//! the guest runs on. Left is what reading them at the same time takes from the pause's processors and caches: forks of
//! one guest are compared while somebody reads its colors all the time, and while nobody does, in turn.

use super::servers::{Server, Session, Set, Work};
use super::world::{Node, World, published};
use super::{COMMAND, save_raw};
use crate::Outcome;
use crate::host::free_ports;
use crate::report::{Figure, median};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const SERVER: Server = Server::Redis;
/// Pauses differ from each other by ten times what is asked for.
const FORKS: usize = 60;
/// Longest until what a fork froze is stored.
const SETTLED: Duration = Duration::from_secs(60);

pub(super) fn run(world: &mut World, _: &Path) -> Outcome<Vec<Figure>> {
    let forks = if world.quick { 4 } else { FORKS };
    let (with, without, read) = world.at_node(|node| {
        node.warm(SERVER.name())?;
        let vm = node.start("it", SERVER.name(), ("none", None), false)?;
        let work = Work { busy: Duration::from_secs(2), answers: SERVER.answers() };
        let mut session = Session::new(SERVER, published(&vm, SERVER.port())?, Set::B, 100);
        session.drive(Instant::now(), work, || Ok(()))?;
        let (mut with, mut without, read) = (Vec::new(), Vec::new(), AtomicU64::new(0));
        for number in 0..2 * forks {
            // As much is changed before each.
            (0..20).try_for_each(|_| session.go_on())?;
            if number % 2 == 0 {
                without.push(pause(node)?);
            } else {
                with.push(while_colors_are_read(node, &read, || pause(node))?);
            }
            node.host.settle("it", SETTLED)?;
        }
        Ok((with, without, read.into_inner()))
    })?;
    println!(
        "pauses of forks: {:.1} ms in the median, {:.1} while colors are read ({read} readings)",
        median(&without),
        median(&with)
    );
    save_raw(&world.raw, "prefetch-pauses", &(&with, &without))?;
    let added: Vec<f64> = with.iter().zip(&without).map(|(with, without)| with - without).collect();
    Ok(vec![
        Figure::new("color_pause_ms", "ms", added, COMMAND).asked("<=", 0.5),
        Figure::new("fork_pause_ms", "ms", without, COMMAND),
        Figure::new("fork_pause_reading_colors_ms", "ms", with, COMMAND),
    ])
}

/// Forks the guest once and removes the offshoot; how long the guest stood still, in milliseconds.
fn pause(node: &Node<'_>) -> Outcome<f64> {
    let (reply, offshoots) = node.host.fork("it", 1, "f", free_ports(node.world.servers.len() as u16)?)?;
    offshoots.iter().try_for_each(|offshoot| node.host.remove(&offshoot.name))?;
    Ok(reply.pause_ms)
}

fn while_colors_are_read<T>(node: &Node<'_>, read: &AtomicU64, act: impl FnOnce() -> Outcome<T>) -> Outcome<T> {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| -> Result<(), String> {
            while !over.load(Ordering::Acquire) {
                let colors: api::Colors =
                    node.host.client.get("/v1/vms/it/colors").map_err(|error| error.to_string())?;
                if colors.account.basis != "descriptors" {
                    return Err(format!("the guest's colors are not known: {:?}", colors.account));
                }
                read.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        // It reads for sure when the fork is asked for.
        std::thread::sleep(Duration::from_millis(300));
        let done = act();
        over.store(true, Ordering::Release);
        reader.join().expect("no panic while reading")?;
        done
    })
}
