//! Reads a container's network namespace.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::path::Path;

use ipnet::IpNet;
use serde::Deserialize;

use super::Neighbour;
use super::{NetError, Netns, Port, run_ip};
use crate::description::{Address, Link, Namespace, Route, Scope};

/// A namespace's content, and the host's ends of its interfaces.
#[derive(Debug, Clone)]
pub struct Described {
    /// What the destination rebuilds.
    pub namespace: Namespace,
    /// What is taken off the bridge here.
    pub ports: Vec<Port>,
}

#[derive(Deserialize)]
struct IpLink {
    ifindex: u32,
    ifname: String,
    #[serde(default)]
    flags: Vec<String>,
    mtu: u32,
    master: Option<String>,
    address: Option<String>,
    link_index: Option<u32>,
    linkinfo: Option<LinkInfo>,
}

#[derive(Deserialize)]
struct LinkInfo {
    info_kind: Option<String>,
}

#[derive(Deserialize)]
struct IpAddresses {
    ifname: String,
    #[serde(default)]
    addr_info: Vec<IpAddress>,
}

#[derive(Deserialize)]
struct IpAddress {
    local: Option<IpAddr>,
    prefixlen: u8,
    scope: String,
    protocol: Option<String>,
    #[serde(default)]
    dynamic: bool,
}

#[derive(Deserialize)]
struct IpRoute {
    dst: String,
    gateway: Option<IpAddr>,
    dev: Option<String>,
    prefsrc: Option<IpAddr>,
    metric: Option<u32>,
    scope: Option<String>,
    protocol: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
    table: Option<String>,
    #[serde(default)]
    flags: Vec<String>,
    #[serde(default)]
    nexthops: Vec<serde_json::Value>,
}

/// Reads the namespace of a container. An interface that is no veth on a bridge is an error that says so.
pub fn describe(netns: &Netns) -> Result<Described, NetError> {
    let links: Vec<IpLink> = ask(Some(netns), &["-j", "-d", "link", "show"])?;
    let host_links: Vec<IpLink> = ask(None, &["-j", "-d", "link", "show"])?;
    let addresses: Vec<IpAddresses> = ask(Some(netns), &["-j", "address", "show"])?;

    let mut described = Described { namespace: Namespace::default(), ports: Vec::new() };
    for link in &links {
        if link.ifname == "lo" {
            described.namespace.loopback_up = is_up(link);
            continue;
        }
        if is_fallback_device(link) {
            continue;
        }
        let (entry, port) = veth(link, &host_links)?;
        described.namespace.links.push(entry);
        described.ports.push(port);
    }
    described.namespace.addresses = addresses.into_iter().flat_map(addresses_of).collect();
    for family in ["-4", "-6"] {
        let routes: Vec<IpRoute> = ask(Some(netns), &[family, "-N", "-j", "route", "show", "table", "all"])?;
        for route in routes {
            if let Some(route) = route_of(route, family)? {
                described.namespace.routes.push(route);
            }
        }
    }
    described.namespace.sysctls = changed_sysctls(netns)?;
    Ok(described)
}

/// Link-layer addresses known in a namespace now.
pub fn neighbours(netns: &Netns) -> Result<Vec<Neighbour>, NetError> {
    #[derive(Deserialize)]
    struct Entry {
        dst: IpAddr,
        dev: String,
        lladdr: Option<String>,
        #[serde(default)]
        state: Vec<String>,
    }
    let entries: Vec<Entry> = ask(Some(netns), &["-j", "neigh", "show"])?;
    let known = entries.into_iter().filter_map(|entry| {
        let lost = entry.state.iter().any(|state| matches!(state.as_str(), "FAILED" | "INCOMPLETE" | "NOARP"));
        let mac = entry.lladdr?.parse().ok()?;
        (!lost).then_some(Neighbour { link: entry.dev, address: entry.dst, mac })
    });
    Ok(known.collect())
}

fn ask<T: for<'de> Deserialize<'de>>(netns: Option<&Netns>, words: &[&str]) -> Result<Vec<T>, NetError> {
    let text = run_ip(netns.map(AsFd::as_fd), words, None)?;
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    serde_json::from_str(&text).map_err(|source| NetError::Answer { command: words.join(" "), source })
}

fn is_up(link: &IpLink) -> bool {
    link.flags.iter().any(|flag| flag == "UP")
}

/// Tunnel devices that the kernel makes in every new namespace by itself.
fn is_fallback_device(link: &IpLink) -> bool {
    const NAMES: [&str; 9] =
        ["tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0"];
    NAMES.contains(&link.ifname.as_str()) && !is_up(link)
}

fn veth(link: &IpLink, host_links: &[IpLink]) -> Result<(Link, Port), NetError> {
    let refuse = |why: String| Err(NetError::Link { name: link.ifname.clone(), why });
    let kind = link.linkinfo.as_ref().and_then(|info| info.info_kind.clone()).unwrap_or_default();
    if kind != "veth" {
        return refuse(format!(
            "it is a {kind:?} device; only veth pairs with one end on a bridge of the host can be rebuilt"
        ));
    }
    let Some(host) = host_links.iter().find(|host| Some(host.ifindex) == link.link_index) else {
        return refuse("the other end of its veth pair is not in the host's own network namespace".to_owned());
    };
    let Some(bridge) = host.master.clone() else {
        return refuse(format!(
            "its other end, {}, is no port of a bridge: `ip link set {} master BRIDGE`",
            host.ifname, host.ifname
        ));
    };
    let Some(mac) = link.address.as_deref().and_then(|mac| mac.parse().ok()) else {
        return refuse("it has no MAC address".to_owned());
    };
    let entry = Link {
        name: link.ifname.clone(),
        mac,
        mtu: link.mtu,
        up: is_up(link),
        host_name: host.ifname.clone(),
        bridge: bridge.clone(),
    };
    Ok((entry, Port { name: host.ifname.clone(), index: host.ifindex, bridge }))
}

fn addresses_of(link: IpAddresses) -> Vec<Address> {
    let name = link.ifname;
    link.addr_info
        .into_iter()
        // The kernel gives lo and link-local addresses again; those of router advertisements come from the router.
        .filter(|address| !matches!(address.protocol.as_deref(), Some("kernel_lo" | "kernel_ll" | "kernel_ra")))
        .filter(|address| {
            !(address.dynamic && address.scope == "global" && address.local.is_some_and(|ip| ip.is_ipv6()))
        })
        .filter_map(|address| {
            let ip = address.local?;
            let loopback = name == "lo" && ip.is_loopback();
            let link_local = matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
            if loopback || link_local {
                return None;
            }
            Some(Address {
                link: name.clone(),
                address: IpNet::new(ip, address.prefixlen).ok()?,
                scope: scope_of(&address.scope).unwrap_or(Scope::Global),
            })
        })
        .collect()
}

fn scope_of(word: &str) -> Option<Scope> {
    match word {
        "global" | "0" => Some(Scope::Global),
        "site" | "200" => Some(Scope::Site),
        "link" | "253" => Some(Scope::Link),
        "host" | "254" => Some(Scope::Host),
        _ => None,
    }
}

/// What a namespace holds that is not rebuilt, by name.
pub fn not_rebuilt(netns: &Netns) -> Vec<String> {
    let mut found = Vec::new();
    let mut nft = std::process::Command::new("nft");
    nft.args(["-j", "list", "ruleset"]).stderr(std::process::Stdio::null());
    if let Ok(output) = crate::sys::InNetns::in_netns(&mut nft, netns.as_fd()).output() {
        // Tables and chains without a rule do nothing; listing iptables alone makes some.
        let set: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let rules =
            set["nftables"].as_array().into_iter().flatten().filter(|entry| entry.get("rule").is_some()).count();
        if rules > 0 {
            found.push(format!("{rules} firewall rules"));
        }
    }
    // A new namespace has three rules for IPv4 and two for IPv6.
    for (family, usual) in [("-4", 3), ("-6", 2)] {
        let rules: Vec<serde_json::Value> = ask(Some(netns), &[family, "-j", "rule", "show"]).unwrap_or_default();
        if rules.len() > usual {
            found.push(format!("{} policy routing rules (`ip {family} rule`)", rules.len() - usual));
        }
    }
    found
}

/// A route that has to be made again; nothing for those the kernel makes with addresses.
fn route_of(route: IpRoute, family: &str) -> Result<Option<Route>, NetError> {
    const PROTO_KERNEL: &str = "2";
    const PROTO_RA: &str = "9";
    const TABLE_LOCAL: u32 = 255;
    const TABLE_MAIN: u32 = 254;
    const TYPE_UNICAST: &str = "1";
    let table = route.table.as_deref().and_then(|table| table.parse().ok()).unwrap_or(TABLE_MAIN);
    let by_kernel = matches!(route.protocol.as_deref(), Some(PROTO_KERNEL | PROTO_RA | "kernel" | "ra"));
    if by_kernel || table == TABLE_LOCAL {
        return Ok(None);
    }
    let refuse = |why: &str| Err(NetError::Link { name: format!("route to {}", route.dst), why: why.to_owned() });
    if !matches!(route.kind.as_deref(), None | Some("unicast" | TYPE_UNICAST)) {
        return refuse("only unicast routes can be rebuilt");
    }
    if !route.nexthops.is_empty() {
        return refuse("multipath routes can't be rebuilt");
    }
    let all = if family == "-4" { "0.0.0.0/0" } else { "::/0" };
    let text = if route.dst == "default" { all } else { route.dst.as_str() };
    let parsed = text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
    let Some(destination) = parsed else { return refuse("its destination is not understood") };
    Ok(Some(Route {
        destination,
        gateway: route.gateway,
        link: route.dev,
        source: route.prefsrc,
        metric: route.metric,
        scope: route.scope.as_deref().and_then(scope_of),
        table,
        onlink: route.flags.iter().any(|flag| flag == "onlink"),
    }))
}

/// Sysctls below `net` that differ from those of a namespace made now.
fn changed_sysctls(netns: &Netns) -> Result<BTreeMap<String, String>, NetError> {
    let theirs = netns.enter(read_sysctls)?;
    let fresh = Netns::create()?.enter(read_sysctls)?;
    Ok(theirs.into_iter().filter(|(name, value)| usual(&fresh, name).is_some_and(|other| other != value)).collect())
}

/// The value a setting has in a new namespace: an interface's is that of `default` there.
fn usual<'a>(fresh: &'a BTreeMap<String, String>, name: &str) -> Option<&'a String> {
    fresh.get(name).or_else(|| {
        let (family, rest) = name.split_once(".conf.")?;
        let (_, setting) = rest.rsplit_once('.')?;
        fresh.get(&format!("{family}.conf.default.{setting}"))
    })
}

fn read_sysctls() -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for family in ["ipv4", "ipv6", "core"] {
        collect_sysctls(&Path::new("/proc/sys/net").join(family), &format!("net.{family}"), 0, &mut found);
    }
    found
}

fn collect_sysctls(dir: &Path, prefix: &str, depth: usize, found: &mut BTreeMap<String, String>) {
    /// Entries that are not settings: state, secrets, or one-shot commands.
    const SKIPPED: [&str; 5] = ["neigh", "flush", "stable_secret", "route", "mc_forwarding"];
    if depth > 2 {
        return;
    }
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if SKIPPED.contains(&name.as_str()) {
            continue;
        }
        let Ok(kind) = entry.file_type() else { continue };
        let key = format!("{prefix}.{name}");
        if kind.is_dir() {
            collect_sysctls(&entry.path(), &key, depth + 1, found);
        } else if let Ok(value) = std::fs::read_to_string(entry.path()) {
            let value = value.trim_end().to_owned();
            if !value.contains('\n') {
                found.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routes_of_addresses_are_left_to_the_kernel() {
        let text = r#"[{"dst":"default","gateway":"10.0.0.1","dev":"eth0","protocol":"3","flags":["onlink"]},
            {"dst":"10.0.0.0/24","dev":"eth0","protocol":"2","prefsrc":"10.0.0.5","flags":[]},
            {"type":"2","dst":"10.0.0.5","dev":"eth0","table":"255","protocol":"2","flags":[]}]"#;
        let routes: Vec<IpRoute> = serde_json::from_str(text).expect("ip's form");
        let kept: Vec<Route> = routes.into_iter().filter_map(|route| route_of(route, "-4").expect("plain")).collect();
        assert_eq!(kept.len(), 1);
        assert_eq!(kept[0].destination.to_string(), "0.0.0.0/0");
        assert!(kept[0].onlink);
    }

    #[test]
    fn a_blackhole_route_is_named() {
        let route: IpRoute =
            serde_json::from_str(r#"{"type":"6","dst":"10.9.0.0/16","protocol":"3"}"#).expect("ip's form");
        let error = route_of(route, "-4").expect_err("no unicast");
        assert!(error.to_string().contains("10.9.0.0/16"));
    }
}
