//! A line to the origin that is as fast as the link and longer: what the kernel's own delay would be, where it has one.
//!
//! A process of its own at the origin, so that what it sends leaves through the origin's link. It delays each byte by
//! half of the time in each direction, however many are under way; connecting is not delayed.

use crate::stores::deploy::net::{Network, Place};
use crate::stores::origin::pass;
use crate::{Failure, Outcome};
use std::net::{TcpListener, TcpStream};
use std::process::Child;
use std::time::{Duration, Instant};

/// Added to each round trip: a store in another region, and in a full measurement one in the same building.
pub(super) const FAR: Duration = Duration::from_millis(20);
pub(super) const NEAR: Duration = Duration::from_millis(1);

/// The line; gone when dropped.
pub(super) struct Line(Child);

impl Drop for Line {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Line {
    /// From `port` of the origin to its port `to`, each round trip so much longer.
    pub(super) fn start(network: &Network, port: u16, to: u16, longer: Duration) -> Outcome<Self> {
        let address = Place::Origin.address();
        let (from, to) = (format!("{address}:{port}"), format!("{address}:{to}"));
        let mut command = network.command(Place::Origin, std::env::current_exe()?);
        let mut line = Self(command.args(["line", &from, &to, &longer.as_micros().to_string()]).spawn()?);
        let end = Instant::now() + Duration::from_secs(10);
        let there = || Ok(TcpStream::connect(&from).is_ok());
        while !network.within(Place::Origin, there)? {
            if line.0.try_wait()?.is_some() || Instant::now() > end {
                return Err("the longer line to the origin does not listen".into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(line)
    }
}

/// What the process does, for ever.
///
/// # Errors
/// Where it cannot listen.
pub fn serve(words: &[String]) -> Outcome {
    let usage = || Failure::from("usage: offshoot-bench line FROM TO MICROSECONDS");
    let [from, to, longer] = words else { return Err(usage()) };
    let each_way = Duration::from_micros(longer.parse().map_err(|_| usage())?) / 2;
    let listener = TcpListener::bind(from)?;
    for client in listener.incoming().flatten() {
        let Ok(server) = TcpStream::connect(to) else { continue };
        let (Ok(answers), Ok(asker)) = (server.try_clone(), client.try_clone()) else { continue };
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        std::thread::spawn(move || pass(client, server, each_way));
        std::thread::spawn(move || pass(answers, asker, each_way));
    }
    Ok(())
}
