//! A container's sockets: those whose other end stays behind, and those of protocols CRIU can't save.

use std::collections::HashSet;
use std::process::{Command, Stdio};
use std::time::Duration;

use longhaul_common::net::Netns;
use longhaul_common::obstacle::Obstacle;
use longhaul_common::sys::InNetns;
use std::os::fd::AsFd;

use super::{InspectError, name_of, read_proc};

/// How often it is looked for sockets whose other end is outside, and how long after each other.
const LOOKS: usize = 4;
const BETWEEN_LOOKS: Duration = Duration::from_millis(5);

/// Looks at the sockets of all tasks.
pub(super) fn examine(
    init: i32,
    tasks: &[i32],
    host_network: bool,
    obstacles: &mut Vec<Obstacle>,
) -> Result<(), InspectError> {
    if !host_network && mptcp_sockets(&read_proc(&format!("/proc/{init}/net/protocols"))?) > 0 {
        obstacles.push(Obstacle::new(
            name_of(init),
            "the container has MPTCP sockets, which CRIU can't save (programs built with Go 1.24 or newer listen with MPTCP)",
            "restart it with GODEBUG=multipathtcp=0, or with net.mptcp.enabled=0 in its network namespace",
        ));
    }
    let netns = Netns::of_task(init)?;
    // Sockets come and go between the two questions: what is outside is so each time.
    let mut own = HashSet::new();
    let mut external: Option<Vec<(String, u64)>> = None;
    for look in 0..LOOKS {
        own = socket_inodes(tasks);
        let now = external_peers(&ss(&netns, &["-x", "-a", "-n", "-H"]), &own);
        let still = external.get_or_insert_with(|| now.clone());
        still.retain(|found| now.contains(found));
        if still.is_empty() {
            break;
        }
        if look + 1 < LOOKS {
            std::thread::sleep(BETWEEN_LOOKS);
        }
    }
    for (path, peer) in external.unwrap_or_default() {
        obstacles.push(Obstacle::new(
            format!("unix socket {path}"),
            format!("it is connected to a process outside the container (socket {peer})"),
            "close the connection, or reach the service over TCP",
        ));
    }
    if host_network {
        let rows = ss(&netns, &["-t", "-n", "-H", "-e"]);
        let connected = rows.lines().filter(|line| own.iter().any(|inode| line.contains(&format!("ino:{inode} "))));
        if connected.count() > 0 {
            obstacles.push(Obstacle::new(
                "network",
                "the container uses this host's own network and has TCP connections: they are bound to this host's address",
                "give the container a network namespace of its own, on a bridge",
            ));
        }
    }
    Ok(())
}

/// Inodes of all sockets the tasks have open.
fn socket_inodes(tasks: &[i32]) -> HashSet<u64> {
    let links = tasks
        .iter()
        .filter_map(|pid| std::fs::read_dir(format!("/proc/{pid}/fd")).ok())
        .flat_map(|entries| entries.flatten())
        .filter_map(|entry| std::fs::read_link(entry.path()).ok());
    links.filter_map(|link| link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()).collect()
}

/// Output of `ss` in a namespace; nothing where it is missing: CRIU refuses what this would have named.
fn ss(netns: &Netns, words: &[&str]) -> String {
    let mut command = Command::new("ss");
    command.args(words).stdin(Stdio::null()).stderr(Stdio::null()).in_netns(netns.as_fd());
    match command.output() {
        Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
        Err(error) => {
            tracing::warn!(%error, "can't run ss (iproute2): external sockets are not looked for");
            String::new()
        }
    }
}

/// Unix sockets of the container whose peer is not: their path (or `*`) and the peer's inode.
fn external_peers(rows: &str, own: &HashSet<u64>) -> Vec<(String, u64)> {
    rows.lines()
        .filter_map(|row| {
            let words: Vec<&str> = row.split_whitespace().collect();
            let [_, _, _, _, path, inode, _, peer, ..] = words.as_slice() else { return None };
            let (inode, peer) = (inode.parse::<u64>().ok()?, peer.parse::<u64>().ok()?);
            let external = own.contains(&inode) && peer != 0 && !own.contains(&peer);
            external.then(|| ((*path).to_owned(), peer))
        })
        .collect()
}

/// MPTCP sockets in the namespace, from `/proc/net/protocols`.
fn mptcp_sockets(protocols: &str) -> u64 {
    let rows = protocols.lines().filter(|line| line.starts_with("MPTCP"));
    rows.filter_map(|line| line.split_whitespace().nth(2)?.parse::<i64>().ok())
        .map(|count| count.max(0).unsigned_abs())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_outside_is_found_and_one_inside_is_not() {
        let rows = "u_str ESTAB 0 0 /run/a.sock 10 * 11\nu_str ESTAB 0 0 * 11 * 10\nu_str ESTAB 0 0 * 12 * 99\n\
                    u_str LISTEN 0 128 /run/a.sock 13 * 0\n";
        assert_eq!(external_peers(rows, &HashSet::from([10, 11, 12, 13])), [("*".to_owned(), 99)]);
    }

    #[test]
    fn mptcp_sockets_are_counted() {
        let text = "protocol  size sockets  memory\nMPTCPv6   1824      1      -1   no\nMPTCP  1600  2  -1 no\nTCP 2000 9 1 no\n";
        assert_eq!(mptcp_sockets(text), 3);
    }
}
