//! Sockets with unread data.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, Shutdown, SockFlag, SockType, getsockopt, recv, send, setsockopt, shutdown, socketpair,
    sockopt,
};

use super::events::readable;
use super::pattern;
use super::suite::{same, same_content};
use crate::tool::sys::event;

/// Less than every socket buffer.
const UNREAD: usize = 4096;
/// Messages of different lengths, so that lost boundaries show.
const MESSAGES: [usize; 3] = [8, 1000, 64];
/// A local peer answers in microseconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// A pair of stream sockets with unread data in both directions, and one direction shut down afterwards.
pub(super) fn stream_pair() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let (mut one, mut other) = UnixStream::pair()?;
    let buffer = getsockopt(&one, sockopt::RcvBuf)?;
    let mut generation = 0;
    one.write_all(&pattern::bytes(10, generation, UNREAD))?;
    other.write_all(&pattern::bytes(11, generation, UNREAD))?;
    Ok(move || {
        same("the receive buffer", &getsockopt(&one, sockopt::RcvBuf)?, &buffer)?;
        for (seed, reader) in [(10, &mut other), (11, &mut one)] {
            same("the length of the unread data", &event::unread(reader.as_fd())?, &UNREAD)?;
            let mut content = vec![0; UNREAD];
            reader.read_exact(&mut content)?;
            same_content("the unread data", &content, &pattern::bytes(seed, generation, UNREAD))?;
        }
        generation += 1;
        one.write_all(&pattern::bytes(10, generation, UNREAD))?;
        other.write_all(&pattern::bytes(11, generation, UNREAD))?;
        Ok(())
    })
}

/// A stream whose writer is shut down while data is unread. The pair is made anew each time.
pub(super) fn half_closed() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let make = |generation| -> anyhow::Result<(UnixStream, UnixStream)> {
        let (mut writer, reader) = UnixStream::pair()?;
        writer.write_all(&pattern::bytes(12, generation, UNREAD))?;
        shutdown(writer.as_raw_fd(), Shutdown::Write)?;
        reader.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        Ok((writer, reader))
    };
    let mut generation = 0;
    let (mut writer, mut reader) = make(generation)?;
    Ok(move || {
        let mut content = Vec::new();
        reader.read_to_end(&mut content).context("read to the end")?;
        same_content("the unread data", &content, &pattern::bytes(12, generation, UNREAD))?;
        same(
            "the shut down end",
            &writer.write(b"x").map_err(|error| error.kind()),
            &Err(std::io::ErrorKind::BrokenPipe),
        )?;
        reader.write_all(b"back").context("write the other way")?;
        let mut back = [0; 4];
        writer.read_exact(&mut back).context("read the other way")?;
        generation += 1;
        (writer, reader) = make(generation)?;
        Ok(())
    })
}

/// A pair of datagram or seqpacket sockets with three unread messages.
pub(super) fn message_pair(kind: SockType, seed: u64) -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let (one, other) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    let mut generation = 0;
    send_messages(&one, seed, generation)?;
    Ok(move || {
        let mut content = [0; 2000];
        for (index, length) in MESSAGES.into_iter().enumerate() {
            let received = recv(other.as_raw_fd(), &mut content, MsgFlags::empty())
                .with_context(|| format!("receive message {index}"))?;
            let wanted = pattern::bytes(seed + 1000 * index as u64, generation, length);
            same_content("an unread message", &content[..received], &wanted)?;
        }
        same(
            "what follows",
            &recv(other.as_raw_fd(), &mut content, MsgFlags::empty()),
            &Err(nix::errno::Errno::EAGAIN),
        )?;
        generation += 1;
        send_messages(&one, seed, generation)
    })
}

fn send_messages(socket: &OwnedFd, seed: u64, generation: u64) -> anyhow::Result<()> {
    for (index, length) in MESSAGES.into_iter().enumerate() {
        let message = pattern::bytes(seed + 1000 * index as u64, generation, length);
        send(socket.as_raw_fd(), &message, MsgFlags::MSG_NOSIGNAL)?;
    }
    Ok(())
}

/// The name of the listening socket that the session leader serves.
const NAMED: &str = "named.sock";

/// The server's half of the named socket: a thread accepts and answers at once. Connections must not wait in the backlog
/// between two verifications: CRIU 4.2.1 cannot restore one whose client it dumps before the listener
/// ("FATAL: Peer 135489 unresolved for 135672"), nor dump one that was closed there.
pub(super) fn named_server(dir: &Path) -> anyhow::Result<impl FnMut() -> anyhow::Result<()> + use<>> {
    let listener = UnixListener::bind(dir.join(NAMED))?;
    listener.set_nonblocking(true)?;
    let server = std::thread::Builder::new().name("sc-named".into()).spawn(move || serve_named(&listener))?;
    Ok(move || same("has the server ended, which", &server.is_finished(), &false))
}

fn serve_named(listener: &UnixListener) -> anyhow::Result<()> {
    let mut peers: Vec<UnixStream> = Vec::new();
    loop {
        let fds = std::iter::once(listener.as_fd()).chain(peers.iter().map(AsFd::as_fd));
        let mut fds: Vec<PollFd<'_>> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error).context("wait for peers"),
        }
        while let Ok((peer, _)) = listener.accept() {
            peer.set_nonblocking(true)?;
            peers.push(peer);
        }
        // Whether a connection lasts is for the client to say.
        peers.retain_mut(|peer| answer(peer).is_ok());
    }
}

/// Answers all requests that wait: one byte for one byte.
fn answer(peer: &mut UnixStream) -> std::io::Result<()> {
    let mut request = [0; 8];
    loop {
        match peer.read(&mut request) {
            Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => peer.write_all(&request.map(|byte| !byte)[..count])?,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

/// The client's half: one connection that lasts, and now and then a new one: each is in the backlog for a moment, in which CRIU can't
/// save it.
pub(super) fn named_client(dir: &Path) -> anyhow::Result<impl FnMut() -> anyhow::Result<()> + use<>> {
    let path = dir.join(NAMED);
    let mut lasting = UnixStream::connect(&path)?;
    lasting.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    let mut round = 0_u8;
    Ok(move || {
        round = round.wrapping_add(1);
        question(&mut lasting, round).context("the lasting connection")?;
        if !round.is_multiple_of(32) {
            return Ok(());
        }
        let mut fresh = UnixStream::connect(&path).context("connect anew")?;
        fresh.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        question(&mut fresh, round).context("the new connection")
    })
}

fn question(stream: &mut UnixStream, byte: u8) -> anyhow::Result<()> {
    stream.write_all(&[byte]).context("ask the server")?;
    let mut answer = [0];
    stream.read_exact(&mut answer).context("read the server's answer")?;
    same("the server's answer", &answer[0], &!byte)
}

/// A TCP connection over loopback with unread data in both directions, and its listener.
pub(super) fn tcp() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let mut client = TcpStream::connect(address)?;
    let (mut server, _) = listener.accept()?;
    client.set_nodelay(true)?;
    setsockopt(&client, sockopt::KeepAlive, &true)?;
    let mut generation = 0;
    for (seed, stream) in [(30, &mut client), (31, &mut server)] {
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        stream.write_all(&pattern::bytes(seed, generation, UNREAD))?;
    }
    Ok(move || {
        same("no-delay and keep-alive", &(client.nodelay()?, getsockopt(&client, sockopt::KeepAlive)?), &(true, true))?;
        same("the peer's address", &client.peer_addr()?, &address)?;
        for (seed, stream) in [(30, &mut server), (31, &mut client)] {
            let mut content = vec![0; UNREAD];
            stream.read_exact(&mut content).context("read the unread data")?;
            same_content("the unread data", &content, &pattern::bytes(seed, generation, UNREAD))?;
        }
        generation += 1;
        client.write_all(&pattern::bytes(30, generation, UNREAD))?;
        server.write_all(&pattern::bytes(31, generation, UNREAD))?;
        let anew = TcpStream::connect(address).context("connect anew")?;
        same("the new connection", &listener.accept()?.1, &anew.local_addr()?)
    })
}

/// A pair of UDP sockets on loopback, one of them connected, without data: unread datagrams may be lost by right.
pub(super) fn udp() -> anyhow::Result<impl FnMut() -> anyhow::Result<()>> {
    let (server, client) = (UdpSocket::bind("127.0.0.1:0")?, UdpSocket::bind("127.0.0.1:0")?);
    let addresses = [server.local_addr()?, client.local_addr()?];
    client.connect(addresses[0])?;
    Ok(move || {
        same("the addresses", &[client.peer_addr()?, client.local_addr()?], &addresses)?;
        client.send(b"datagram").context("send")?;
        let mut datagram = [0; 16];
        // Waiting in poll, not in recv: a freeze interrupts a receive with a timeout (signal(7)).
        same("does a datagram come, which", &readable(server.as_fd(), ANSWER_TIMEOUT)?, &true)?;
        let received = server.recv_from(&mut datagram).context("receive")?;
        same("the datagram", &received, &(8, addresses[1]))
    })
}
