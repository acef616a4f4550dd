//! Rebuilds a container's network namespace, silent: the host's ends are on no bridge until [`Port::join`].

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};

use nix::net::if_::if_nametoindex;
use serde::Deserialize;

use super::{Announcer, Neighbour, NetError, Netns, Port, run_ip};
use crate::description::{Link, Namespace};

/// A namespace made for a container that is about to arrive.
#[derive(Debug)]
pub struct BuiltNamespace {
    /// The namespace.
    pub netns: Netns,
    /// The host's ends of its interfaces, on no bridge yet.
    pub ports: Vec<Port>,
    /// Ready to tell the network where the container is now.
    pub announcer: Announcer,
    links: Vec<String>,
}

/// Makes a namespace with this content. `bridges` maps names of the source's bridges to this host's.
pub fn build(content: &Namespace, bridges: &BTreeMap<String, String>) -> Result<BuiltNamespace, NetError> {
    let netns = Netns::create()?;
    let mut ports = Vec::new();
    for link in &content.links {
        match add_link(&netns, link, bridges) {
            Ok(port) => ports.push(port),
            Err(error) => {
                // The pairs made so far go with the namespace, which ends with this value.
                return Err(error);
            }
        }
    }
    let batch = batch_of(content);
    run_ip(Some(netns.as_fd()), &["-batch", "-"], Some(&batch))?;
    let sysctls = content.sysctls.clone();
    netns.enter(move || set_sysctls(&sysctls))?;
    let announcer = Announcer::new(&netns, content)?;
    let links = content.links.iter().map(|link| link.name.clone()).collect();
    let built = BuiltNamespace { netns, ports, announcer, links };
    built.hurry()?;
    Ok(built)
}

impl BuiltNamespace {
    /// Makes link-layer addresses known, to be confirmed when they are used.
    pub fn learn(&self, neighbours: &[Neighbour]) -> Result<(), NetError> {
        let links: Vec<&str> = self.links.iter().map(String::as_str).collect();
        let batch: String = neighbours
            .iter()
            .filter(|neighbour| links.contains(&neighbour.link.as_str()))
            .map(|neighbour| {
                format!(
                    "neigh replace {} lladdr {} dev {} nud stale\n",
                    neighbour.address, neighbour.mac, neighbour.link
                )
            })
            .collect();
        if batch.is_empty() {
            return Ok(());
        }
        run_ip(Some(self.netns.as_fd()), &["-batch", "-"], Some(&batch)).map(drop)
    }

    /// While the namespace is silent no neighbour answers, and the kernel would ask again only after a second: long
    /// after the switch. Until [`settle`](Self::settle) it asks every few milliseconds.
    fn hurry(&self) -> Result<(), NetError> {
        self.set_retransmission(HURRIED_MS)
    }

    /// Puts the kernel's pace back.
    pub fn settle(&self) -> Result<(), NetError> {
        self.set_retransmission(KERNEL_MS)
    }

    fn set_retransmission(&self, millis: u32) -> Result<(), NetError> {
        self.netns.enter(|| {
            for (family, link) in
                ["ipv4", "ipv6"].iter().flat_map(|family| self.links.iter().map(move |link| (family, link)))
            {
                let path = format!("/proc/sys/net/{family}/neigh/{link}/retrans_time_ms");
                if let Err(error) = std::fs::write(&path, millis.to_string()) {
                    tracing::debug!(path, %error, "can't change the pace of neighbour discovery");
                }
            }
        })
    }
}

/// Milliseconds between two questions for a neighbour while a container is being switched.
const HURRIED_MS: u32 = 5;
/// The kernel's own (RFC 4861, RETRANS_TIMER).
const KERNEL_MS: u32 = 1000;

fn add_link(netns: &Netns, link: &Link, bridges: &BTreeMap<String, String>) -> Result<Port, NetError> {
    let bridge = bridges.get(&link.bridge).unwrap_or(&link.bridge).clone();
    let taken = if_nametoindex(link.host_name.as_str()).is_ok();
    let name = if taken { free_name(link) } else { link.host_name.clone() };
    let path = format!("/proc/{}/fd/{}", std::process::id(), netns.as_fd().as_raw_fd());
    let mac = link.mac.to_string();
    let mtu = link.mtu.to_string();
    // A bridge without an address of its own takes the lowest of its ports': a low one would change the host's own address
    // in the middle of its connections.
    let [_, b, c, d, e, f] = link.mac.0;
    let host_mac = crate::description::Mac([0xfe, b, c, d, e, f]).to_string();
    let words = [
        "link", "add", "name", &name, "address", &host_mac, "mtu", &mtu, "type", "veth", "peer", "name", &link.name,
        "address", &mac, "mtu", &mtu, "netns", &path,
    ];
    run_ip(None, &words, None)?;
    run_ip(None, &["link", "set", "dev", &name, "up"], None)?;
    let index = if_nametoindex(name.as_str())
        .map_err(|errno| NetError::Link { name: name.clone(), why: format!("it vanished: {errno}") })?;
    Ok(Port { name, index, bridge })
}

/// A name for the host's end where the source's is taken here: from the MAC address, which is unique on the network.
fn free_name(link: &Link) -> String {
    let [_, _, c, d, e, f] = link.mac.0;
    (0..u8::MAX)
        .map(|n| {
            if n == 0 {
                format!("lh{c:02x}{d:02x}{e:02x}{f:02x}")
            } else {
                format!("lh{c:02x}{d:02x}{e:02x}{f:02x}.{n}")
            }
        })
        .find(|name| if_nametoindex(name.as_str()).is_err())
        .unwrap_or_else(|| link.host_name.clone())
}

/// The commands for `ip -batch`. Every word is a checked name, a number or an address.
fn batch_of(content: &Namespace) -> String {
    let mut batch = String::new();
    // Writing to a String can't fail.
    if content.loopback_up {
        let _ = writeln!(batch, "link set dev lo up");
    }
    for link in content.links.iter().filter(|link| link.up) {
        let _ = writeln!(batch, "link set dev {} up", link.name);
    }
    for address in &content.addresses {
        // No duplicate address detection: the address is this container's, and its owner on the source is still there.
        let nodad = if address.address.addr().is_ipv6() { " nodad" } else { "" };
        let _ = writeln!(
            batch,
            "address add {} dev {} scope {}{nodad}",
            address.address,
            address.link,
            address.scope.word()
        );
    }
    let mut routes: Vec<_> = content.routes.iter().collect();
    // A gateway must be reachable when its route is added.
    routes.sort_by_key(|route| route.gateway.is_some());
    for route in routes {
        let family = if route.destination.addr().is_ipv6() { "-6" } else { "-4" };
        let _ = write!(batch, "route add {} table {}", route.destination, route.table);
        if let Some(gateway) = route.gateway {
            let via = if gateway.is_ipv6() && family == "-4" { "via inet6" } else { "via" };
            let _ = write!(batch, " {via} {gateway}");
        }
        if let Some(link) = &route.link {
            let _ = write!(batch, " dev {link}");
        }
        if let Some(source) = route.source {
            let _ = write!(batch, " src {source}");
        }
        if let Some(metric) = route.metric {
            let _ = write!(batch, " metric {metric}");
        }
        if let (Some(scope), "-4") = (route.scope, family) {
            let _ = write!(batch, " scope {}", scope.word());
        }
        if route.onlink {
            batch.push_str(" onlink");
        }
        batch.push('\n');
    }
    batch
}

/// Sets what can be set; a setting this kernel lacks is logged, not fatal: the container runs without it.
fn set_sysctls(sysctls: &BTreeMap<String, String>) {
    for (name, value) in sysctls {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        if let Err(error) = std::fs::write(&path, value) {
            tracing::info!(sysctl = name, value, %error, "this host's kernel does not take a network setting of the container");
        }
    }
}

/// Addresses on interfaces of a namespace, or of the agent's own.
pub fn addresses_in_use(netns: Option<&Netns>) -> Result<HashSet<IpAddr>, NetError> {
    #[derive(Deserialize)]
    struct Interface {
        #[serde(default)]
        addr_info: Vec<Info>,
    }
    #[derive(Deserialize)]
    struct Info {
        local: Option<IpAddr>,
    }
    let words = ["-j", "address", "show"];
    let text = match netns {
        Some(netns) => netns.ip(&words)?,
        None => run_ip(None, &words, None)?,
    };
    let interfaces: Vec<Interface> =
        serde_json::from_str(&text).map_err(|source| NetError::Answer { command: words.join(" "), source })?;
    Ok(interfaces.into_iter().flat_map(|interface| interface.addr_info).filter_map(|info| info.local).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::description::{Address, Route, Scope};

    #[test]
    fn connected_routes_come_before_gateways() {
        let route = |destination: &str, gateway: Option<&str>| Route {
            destination: destination.parse().expect("a prefix"),
            gateway: gateway.map(|ip| ip.parse().expect("an address")),
            link: Some("eth0".into()),
            source: None,
            metric: None,
            scope: None,
            table: 254,
            onlink: false,
        };
        let content = Namespace {
            addresses: vec![Address {
                link: "eth0".into(),
                address: "fd00::5/64".parse().expect("an address"),
                scope: Scope::Global,
            }],
            routes: vec![route("0.0.0.0/0", Some("10.9.0.1")), route("10.9.0.0/24", None)],
            ..Namespace::default()
        };
        let batch = batch_of(&content);
        let lines: Vec<&str> = batch.lines().collect();
        assert!(lines[0].ends_with("scope global nodad"), "{batch}");
        assert!(lines[1].contains("10.9.0.0/24"), "{batch}");
        assert!(lines[2].contains("via 10.9.0.1"), "{batch}");
    }
}
