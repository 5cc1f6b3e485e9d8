//! The network helper: one `passt` for each VM, connected to the hypervisor by a socket pair.
//!
//! The backend stays outside the hypervisor because a built-in one would put its own state into the device
//! state, which then loads under no other backend. The pair is made here and inherited by both, so there is no
//! socket file; passt ends by itself when the hypervisor does.

use crate::error::Error;
use crate::process::{self, ProcessId};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
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

/// The address from which clients on this host seem to come to a guest of this generation: another than to those it
/// descends from. A copy remembers for a minute which ports of the old address its parent had just served (TIME_WAIT,
/// RFC 9293 section 3.6.1), and would meet a new client with the same port as an old one: about every second of them
/// would be reset. passt takes its gateway's address for this, and answers whoever looks for a gateway at any.
#[must_use]
pub fn peer(generation: u32) -> Ipv4Addr {
    // All of 10.0.2.0/24 but what the guest may know from its boot: 16 addresses at the beginning, and broadcast.
    let last = generation.checked_sub(1).map_or(2, |copies| 16 + (copies % 239) as u8);
    Ipv4Addr::new(10, 0, 2, last)
}

/// The helper's hardware address, the same for all, so that it never changes under a guest.
const PEER_MAC: [u8; 6] = [0x9a, 0x55, 0x9a, 0x55, 0x9a, 0x55];

/// The two ends of a guest's network, the hypervisor's first. Guest, with hardware address `mac`, and `peer` have
/// introduced themselves to each other.
///
/// # Errors
/// Out of descriptors.
pub fn pair(mac: &str, peer: Ipv4Addr) -> std::io::Result<(OwnedFd, OwnedFd)> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    let mac = hardware_address(mac).ok_or_else(|| std::io::Error::other(format!("`{mac}` is no hardware address")))?;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // Else the helper knows no hardware address until the guest first speaks, and sends the first connection of an
    // impatient client to all: guests drop that, and the client waits ten seconds for nothing.
    let guest = (mac, Ipv4Addr::from(GUEST_ADDRESS));
    rustix::io::write(&ours, &arp(BROADCAST, ARP_REPLY, guest, guest))?;
    // Else the guest has to look for the peer, its answers to a client that knocks twice meanwhile leave together, and
    // the passt of Debian 12 takes two answers at once for a reason to send one packet for ever.
    rustix::io::write(&theirs, &arp(mac, ARP_REQUEST, (PEER_MAC, peer), ([0; 6], guest.1)))?;
    Ok((ours, theirs))
}

/// Starts a helper at its end of a [`pair`], which listens on `publish` and lets this host's clients come from `peer`;
/// does not wait until it listens ([`await_listening`] does).
///
/// # Errors
/// [`Error::Spawn`] where passt is missing.
pub fn start(end: &OwnedFd, peer: Ipv4Addr, publish: &[Publish], log: &Path) -> Result<ProcessId, Error> {
    let mut command = Command::new("passt");
    command.args(["--foreground", "--quiet", "--stderr", "--no-map-gw", "--fd", &end.as_raw_fd().to_string()]);
    let (guest, peer) = (Ipv4Addr::from(GUEST_ADDRESS).to_string(), peer.to_string());
    command.args(["--address", &guest, "--netmask", "24", "--gateway", &peer, "--ipv4-only"]);
    command.args(["--mac-addr", &PEER_MAC.map(|byte| format!("{byte:02x}")).join(":")]);
    for p in publish {
        command.args(["--tcp-ports", &format!("{}/{}:{}", p.address, p.host, p.guest)]);
    }
    process::without_secrets(&mut command);
    process::spawn(&command, &[end.as_fd()], None, log)
}

const BROADCAST: [u8; 6] = [0xff; 6];
const ARP_REQUEST: u8 = 1;
const ARP_REPLY: u8 = 2;

/// ARP (RFC 826) from `sender` about `target`, hardware and protocol address of each, to the hardware address `to`, in
/// QEMU's stream framing: the frame's length before it. A reply about oneself is an announcement (RFC 5227), and a
/// request tells who is asked of the sender, too.
fn arp(to: [u8; 6], what: u8, sender: ([u8; 6], Ipv4Addr), target: ([u8; 6], Ipv4Addr)) -> Vec<u8> {
    let mut frame = Vec::with_capacity(46);
    frame.extend(42u32.to_be_bytes());
    frame.extend(to);
    frame.extend(sender.0);
    frame.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, what]); // ARP, of Ethernet and IPv4
    for (hardware, protocol) in [sender, target] {
        frame.extend(hardware);
        frame.extend(protocol.octets());
    }
    frame
}

/// `xx:xx:xx:xx:xx:xx` as bytes.
fn hardware_address(text: &str) -> Option<[u8; 6]> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes?.try_into().ok()
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
    fn no_generation_meets_clients_from_an_address_of_one_shortly_before_it() {
        assert_eq!(peer(0), Ipv4Addr::new(10, 0, 2, 2), "as booted guests are told");
        for generation in 1..=u32::from(u16::MAX) {
            let [.., last] = peer(generation).octets();
            assert!((16..255).contains(&last), "generation {generation} has {last}");
            assert!((1..=200).all(|before| generation < before || peer(generation - before) != peer(generation)));
        }
        assert!(peer(u32::MAX).octets()[3] >= 16);
    }

    #[test]
    fn guest_and_helper_know_each_other_before_either_asks() {
        let (ours, theirs) = pair("52:54:00:0f:f5:01", peer(3)).unwrap();
        let mut frame = [0; 64];
        assert_eq!(rustix::io::read(&theirs, &mut frame).unwrap(), 46);
        assert_eq!(frame[..4], [0, 0, 0, 42]);
        assert_eq!(frame[4..10], [0xff; 6], "to all");
        assert_eq!(frame[10..16], [0x52, 0x54, 0, 0x0f, 0xf5, 1]);
        assert_eq!(frame[24..32], [0, 2, 0x52, 0x54, 0, 0x0f, 0xf5, 1]);
        assert_eq!((&frame[32..36], &frame[42..46]), (&GUEST_ADDRESS[..], &GUEST_ADDRESS[..]));
        assert_eq!(rustix::io::read(&ours, &mut frame).unwrap(), 46);
        assert_eq!(frame[4..10], [0x52, 0x54, 0, 0x0f, 0xf5, 1], "to the guest alone");
        assert_eq!(frame[24..26], [0, 1], "a request");
        assert_eq!((&frame[26..32], &frame[32..36]), (&PEER_MAC[..], &[10, 0, 2, 18][..]));
        assert_eq!(frame[42..46], GUEST_ADDRESS);
        for mac in ["", "52:54:00:0f:f5", "52:54:00:0f:f5:01:02", "52:54:00:0f:f5:xx", "5254:00:0f:f5:01:0"] {
            assert!(pair(mac, peer(0)).is_err(), "{mac}");
        }
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
