//! Connections that wait to be accepted, by sock_diag(7).
//!
//! `/proc/net/tcp` would tell the same, but walks the whole table of connections: 5 ms and more a look, in the downtime.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::{NetError, Netns};
use crate::sys::{netlink_socket, receive, send_frame};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST_DUMP: u16 = 0x301;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const TCP_LISTEN: u32 = 10;
/// `nlmsghdr`.
const HEADER: usize = 16;
/// Where `idiag_rqueue` is in `inet_diag_msg`: of a listener it is the number of connections not accepted yet.
const RQUEUE: usize = 56;

/// Looks at the listeners of one network namespace.
#[derive(Debug)]
pub struct ListenQueues {
    socket: OwnedFd,
}

impl ListenQueues {
    /// Opens the namespace for looking.
    pub fn open(netns: &Netns) -> Result<Self, NetError> {
        let socket = netns.enter(|| netlink_socket(libc::NETLINK_SOCK_DIAG))?.map_err(|source| {
            NetError::Namespace { operation: "ask for listeners in", namespace: "of the container".to_owned(), source }
        })?;
        Ok(Self { socket })
    }

    /// Whether a TCP listener has connections that were not accepted.
    pub fn any_waiting(&self) -> io::Result<bool> {
        let mut waiting = false;
        for family in [libc::AF_INET, libc::AF_INET6] {
            waiting |= self.ask(family as u8)?;
        }
        Ok(waiting)
    }

    fn ask(&self, family: u8) -> io::Result<bool> {
        const LENGTH: usize = HEADER + 56;
        let mut message = Vec::with_capacity(LENGTH);
        message.extend((LENGTH as u32).to_ne_bytes());
        message.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        message.extend(NLM_F_REQUEST_DUMP.to_ne_bytes());
        message.extend([0; 8]);
        // inet_diag_req_v2: family, protocol, extensions, padding, states, and an empty id
        message.extend([family, libc::IPPROTO_TCP as u8, 0, 0]);
        message.extend((1u32 << TCP_LISTEN).to_ne_bytes());
        message.resize(LENGTH, 0);
        send_frame(self.socket.as_fd(), &message)?;
        let mut waiting = false;
        let mut buffer = vec![0; 32 << 10];
        loop {
            let length = receive(self.socket.as_fd(), &mut buffer)?;
            match read_answer(&buffer[..length])? {
                (some, true) => return Ok(waiting | some),
                (some, false) => waiting |= some,
            }
        }
    }
}

/// Whether a listener in this part of the answer has something waiting, and whether it is the last part.
fn read_answer(mut bytes: &[u8]) -> io::Result<(bool, bool)> {
    let mut waiting = false;
    while bytes.len() >= HEADER {
        let length = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
        let kind = u16::from_ne_bytes([bytes[4], bytes[5]]);
        if length < HEADER || length > bytes.len() {
            return Err(io::Error::from(io::ErrorKind::InvalidData));
        }
        let body = &bytes[HEADER..length];
        match kind {
            NLMSG_DONE => return Ok((waiting, true)),
            NLMSG_ERROR => return Err(io::Error::other("the kernel refused to list sockets")),
            _ => {
                let queue = body.get(RQUEUE..RQUEUE + 4);
                waiting |= queue.is_some_and(|queue| queue.iter().any(|byte| *byte != 0));
            }
        }
        bytes = &bytes[length.next_multiple_of(4).min(bytes.len())..];
    }
    Ok((waiting, false))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn a_connection_that_nobody_accepted_is_seen() {
        let netns = Netns::create().expect("a namespace: run as root");
        let queues = ListenQueues::open(&netns).expect("opens");
        netns
            .enter(|| {
                let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status();
                assert!(up.expect("ip runs").success());
                let listener = TcpListener::bind("127.0.0.1:0").expect("listens");
                assert!(!queues.any_waiting().expect("asks"));
                let _client = TcpStream::connect(listener.local_addr().expect("bound")).expect("connects");
                assert!(queues.any_waiting().expect("asks"));
                let _accepted = listener.accept().expect("accepts");
                assert!(!queues.any_waiting().expect("asks"));
            })
            .expect("enters");
    }

    #[test]
    fn a_cut_answer_is_an_error() {
        assert!(read_answer(&[255; 16]).is_err());
        assert_eq!(read_answer(&[]).expect("nothing"), (false, false));
    }
}
