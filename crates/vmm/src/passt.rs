//! The network helper: one `passt` for each VM, connected to the hypervisor by a socket pair.
//!
//! The backend stays outside the hypervisor because a built-in one would put its own state into the device
//! state, which then loads under no other backend. The pair is made here and inherited by both, so there is no
//! socket file; passt ends by itself when the hypervisor does.

use crate::error::Error;
use crate::process::{self, ProcessId};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::str::FromStr;
use std::time::{Duration, Instant};

/// A TCP port of the host that leads to a port of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Publish {
    /// Address of the host on which to listen.
    pub address: IpAddr,
    /// Port of the host.
    pub host: u16,
    /// Port of the guest.
    pub guest: u16,
}

impl FromStr for Publish {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("`{text}` is no published port; write HOST:GUEST or ADDRESS:HOST:GUEST, as in 8080:80");
        let (rest, guest) = text.rsplit_once(':').ok_or_else(bad)?;
        let (address, host) = rest.rsplit_once(':').unwrap_or(("127.0.0.1", rest));
        let address = address.trim_start_matches('[').trim_end_matches(']').parse().map_err(|_| bad())?;
        let port = |p: &str| p.parse::<u16>().ok().filter(|&p| p != 0).ok_or_else(bad);
        Ok(Self { address, host: port(host)?, guest: port(guest)? })
    }
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            IpAddr::V4(a) => write!(f, "{a}:{}:{}", self.host, self.guest),
            IpAddr::V6(a) => write!(f, "[{a}]:{}:{}", self.host, self.guest),
        }
    }
}

impl TryFrom<String> for Publish {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Publish> for String {
    fn from(p: Publish) -> Self {
        p.to_string()
    }
}

/// The guest's address: the same in every copy, so that a fork finds the world as it left it.
const GUEST_ADDRESS: [u8; 4] = [10, 0, 2, 15];

/// The two ends of a guest's network, the hypervisor's first: the guest with hardware address `mac` has already
/// introduced itself.
///
/// # Errors
/// Out of descriptors.
pub fn pair(mac: &str) -> std::io::Result<(OwnedFd, OwnedFd)> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    introduce(&ours, mac)?;
    Ok((ours, theirs))
}

/// Starts a helper at its end of a [`pair`], which listens on `publish`; does not wait until it listens
/// ([`await_listening`] does).
///
/// # Errors
/// [`Error::Spawn`] where passt is missing.
pub fn start(end: &OwnedFd, publish: &[Publish], log: &Path) -> Result<ProcessId, Error> {
    let mut command = Command::new("passt");
    command.args(["--foreground", "--quiet", "--stderr", "--no-map-gw", "--fd", &end.as_raw_fd().to_string()]);
    let [a, b, c, d] = GUEST_ADDRESS;
    command.args(["--address", &format!("{a}.{b}.{c}.{d}"), "--netmask", "24", "--gateway", "10.0.2.2", "--ipv4-only"]);
    for p in publish {
        command.args(["--tcp-ports", &format!("{}/{}:{}", p.address, p.host, p.guest)]);
    }
    process::without_secrets(&mut command);
    process::spawn(&command, &[end.as_fd()], None, log)
}

/// Says on the guest's behalf who it is, by a gratuitous ARP (RFC 826, RFC 5227) that the helper finds in its queue.
/// Else the helper knows no hardware address until the guest first speaks, and sends the first connection of an
/// impatient client to all: guests drop that, and the client waits ten seconds for nothing.
fn introduce(socket: &OwnedFd, mac: &str) -> std::io::Result<()> {
    let bytes: Option<Vec<u8>> = mac.split(':').map(|b| u8::from_str_radix(b, 16).ok()).collect();
    let mac = bytes
        .filter(|b| b.len() == 6)
        .ok_or_else(|| std::io::Error::other(format!("`{mac}` is no hardware address")))?;
    let mut frame = Vec::with_capacity(46);
    frame.extend(42u32.to_be_bytes()); // QEMU's stream framing: the length first
    frame.extend([0xff; 6]);
    frame.extend(&mac);
    frame.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 2]); // ARP, Ethernet and IPv4, a reply
    frame.extend(&mac);
    frame.extend(GUEST_ADDRESS);
    frame.extend(&mac);
    frame.extend(GUEST_ADDRESS);
    rustix::io::write(socket, &frame)?;
    Ok(())
}

/// Waits until the helper listens on every published port.
///
/// # Errors
/// [`Error::Died`] with its last words where it ended (a port in use, most often).
pub fn await_listening(process: &ProcessId, publish: &[Publish], log: &Path) -> Result<(), Error> {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        if !process.alive() {
            return Err(Error::Died {
                what: "the network helper passt",
                pid: process.pid,
                last_words: process::last_words(log),
            });
        }
        if publish.iter().all(|p| listens(p.address, p.host).unwrap_or(false)) {
            return Ok(());
        }
        if Instant::now() > end {
            return Err(Error::Timeout { what: "passt to listen".into(), limit: Duration::from_secs(10) });
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whether somebody listens there: an address that allows reuse can be bound again unless somebody listens on it
/// (socket(7), `SO_REUSEADDR`). Our own socket never listens, so it stands in nobody's way.
///
/// # Errors
/// Where the address cannot be bound for another reason: it is not of this host, or not for us.
pub fn listens(address: IpAddr, port: u16) -> std::io::Result<bool> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with, sockopt};
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    match bind(&socket, &std::net::SocketAddr::new(address, port)) {
        Ok(()) => Ok(false),
        Err(rustix::io::Errno::ADDRINUSE) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_taken_only_while_somebody_listens() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let local = IpAddr::from([127, 0, 0, 1]);
        assert!(listens(local, port).unwrap());
        drop(listener);
        assert!(!listens(local, port).unwrap());
        assert!(listens(IpAddr::from([192, 0, 2, 1]), port).is_err(), "not an address of ours");
    }

    #[test]
    fn ports_parse_and_print() {
        for (text, full) in
            [("8080:80", "127.0.0.1:8080:80"), ("0.0.0.0:1:2", "0.0.0.0:1:2"), ("[::1]:5:6", "[::1]:5:6")]
        {
            assert_eq!(text.parse::<Publish>().unwrap().to_string(), full);
        }
        for text in ["80", "a:80", "8080:0", "1.2.3:8080:80", "70000:80", ""] {
            assert!(text.parse::<Publish>().is_err(), "{text}");
        }
    }
}
