//! Tells the network where a container's addresses are now: gratuitous ARP and unsolicited neighbour advertisements.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, OwnedFd};

use nix::net::if_::if_nametoindex;

use super::{NetError, Netns};
use crate::description::{Mac, Namespace};
use crate::sys::{packet_socket, send_frame};

/// Frames made and sockets opened before the switch, so that announcing is one send each.
#[derive(Debug)]
pub struct Announcer {
    frames: Vec<(usize, Vec<u8>)>,
    sockets: Vec<OwnedFd>,
}

impl Announcer {
    /// Opens a socket for every interface of the namespace and makes a frame for every address.
    pub fn new(netns: &Netns, content: &Namespace) -> Result<Self, NetError> {
        let mut announcer = Self { frames: Vec::new(), sockets: Vec::new() };
        for link in &content.links {
            let name = link.name.clone();
            let socket = netns
                .enter(move || if_nametoindex(name.as_str()).map_err(std::io::Error::from).and_then(packet_socket))?
                .map_err(|error| NetError::Link {
                    name: link.name.clone(),
                    why: format!("no packet socket: {error}"),
                })?;
            let index = announcer.sockets.len();
            announcer.sockets.push(socket);
            for address in content.addresses.iter().filter(|address| address.link == link.name) {
                let frame = match address.address.addr() {
                    IpAddr::V4(ip) => gratuitous_arp(link.mac, ip),
                    IpAddr::V6(ip) => neighbour_advertisement(link.mac, ip),
                };
                announcer.frames.push((index, frame));
            }
        }
        Ok(announcer)
    }

    /// Sends every frame once. A lost one delays clients until their own neighbour cache asks, so failures are
    /// logged and do not stop the rest.
    pub fn announce(&self) {
        for (socket, frame) in &self.frames {
            if let Err(error) = send_frame(self.sockets[*socket].as_fd(), frame) {
                tracing::warn!(%error, "can't announce an address of the container");
            }
        }
    }
}

/// An ARP request for one's own address (RFC 5227, section 3).
fn gratuitous_arp(mac: Mac, ip: Ipv4Addr) -> Vec<u8> {
    let mut frame = Vec::with_capacity(42);
    frame.extend([0xff; 6]);
    frame.extend(mac.0);
    frame.extend([0x08, 0x06]);
    // Ethernet, IPv4, address lengths 6 and 4, request.
    frame.extend([0, 1, 0x08, 0x00, 6, 4, 0, 1]);
    frame.extend(mac.0);
    frame.extend(ip.octets());
    frame.extend([0; 6]);
    frame.extend(ip.octets());
    frame
}

/// An unsolicited neighbour advertisement to all nodes, with the override flag (RFC 4861, section 7.2.6).
fn neighbour_advertisement(mac: Mac, ip: Ipv6Addr) -> Vec<u8> {
    const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    const ICMPV6: u8 = 58;
    let mut body = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
    body.extend(ip.octets());
    // Target link-layer address, in units of 8 bytes.
    body.extend([2, 1]);
    body.extend(mac.0);
    let length = u16::try_from(body.len()).unwrap_or(u16::MAX);
    let mut pseudo = Vec::new();
    pseudo.extend(ip.octets());
    pseudo.extend(ALL_NODES.octets());
    pseudo.extend(u32::from(length).to_be_bytes());
    pseudo.extend([0, 0, 0, ICMPV6]);
    pseudo.extend(&body);
    let checksum = internet_checksum(&pseudo);
    body[2..4].copy_from_slice(&checksum.to_be_bytes());

    let mut frame = vec![0x33, 0x33, 0, 0, 0, 1];
    frame.extend(mac.0);
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    frame.extend(length.to_be_bytes());
    // The hop limit of 255 proves to receivers that it came from the link.
    frame.extend([ICMPV6, 255]);
    frame.extend(ip.octets());
    frame.extend(ALL_NODES.octets());
    frame.extend(body);
    frame
}

/// RFC 1071.
fn internet_checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_advertisement_checks_out() {
        let frame = neighbour_advertisement(Mac([2, 0, 0, 0, 0, 1]), "fd00::1".parse().expect("an address"));
        assert_eq!(frame.len(), 14 + 40 + 32);
        let mut pseudo = frame[22..54].to_vec();
        pseudo.extend([0, 0, 0, 32, 0, 0, 0, 58]);
        pseudo.extend(&frame[54..]);
        // The sum over data with a right checksum is all ones.
        assert_eq!(internet_checksum(&pseudo), 0);
    }

    #[test]
    fn an_announcement_asks_for_its_own_address() {
        let frame = gratuitous_arp(Mac([2, 0, 0, 0, 0, 1]), Ipv4Addr::new(10, 0, 0, 5));
        assert_eq!(frame.len(), 42);
        assert_eq!(frame[28..32], frame[38..42]);
    }
}
