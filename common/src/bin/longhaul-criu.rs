//! Stands in CRIU's place on a runtime's `PATH`: see `longhaul_common::criu::hold`.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};
use std::time::{Duration, Instant};

use longhaul_common::criu::hold::{CRIU_ENV, End, Event, Hello, MAX_FRAME_BYTES, Prepare, SOCKET_ENV, ToAgent, ToHold};
use longhaul_common::criu::rpc::{Options, Request, RequestType, Response};
use longhaul_common::sys::InNetns;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};
use prost::Message;

/// CRIU and runc both read RPC messages into buffers of 40 KiB or less; requests can be larger.
const MAX_RPC_BYTES: usize = 1 << 20;
/// How often a lost agent is looked for again.
const RECONNECT_EVERY: Duration = Duration::from_millis(50);
/// How long an agent may be away before CRIU was given its request: until then nothing has changed.
const GIVE_UP_BEFORE_GO: Duration = Duration::from_secs(10);

/// The priority of the hold and of CRIU: the container stands still meanwhile, and waits for nothing else as long. What is sent beside CRIU's dump
/// is done before it in any case. CRIU gives tasks that it restores the priority that they had (`restore_sched_info` in
/// criu/pie/restorer.c, 4.2).
const FIRST: i32 = -20;

/// How CRIU tells that a file is the one that was open. By itself it maps the first MiB of each, at both ends, to look for the build id that a
/// linker leaves in programs (`get_build_id` in criu/files-reg.c, 4.2): where that is not in memory it waits for the disk, behind
/// whatever the container had written, for as long as that takes; so it does for the time of access (300 ms seen, under pgbench). The
/// files are the same already: the agents compare each image's layers by their content, and carry the rest. Of RPC's options none is this
/// one; a configuration file of the runtime's (`/etc/criu/runc.conf`) has the last word. After the two words that a wrapper in
/// CRIU's place may look at.
const FILES_BY_SIZE: [&str; 2] = ["--file-validation", "filesize"];

fn main() -> ExitCode {
    let words: Vec<std::ffi::OsString> = std::env::args_os().collect();
    if words.first().and_then(|name| Path::new(name).file_name()).is_some_and(|name| name == "gzip") {
        return pass_through();
    }
    let criu = std::env::var_os(CRIU_ENV).map_or_else(|| PathBuf::from("/usr/sbin/criu"), PathBuf::from);
    let socket = std::env::var_os(SOCKET_ENV).map(PathBuf::from);
    let swrk = words.get(1).is_some_and(|word| word == "swrk");
    let fd = words.get(2).and_then(|word| word.to_str()?.parse::<RawFd>().ok());
    let (Some(socket), true, Some(fd)) = (socket, swrk, fd) else {
        let error = Command::new(&criu).args(&words[1..]).exec();
        eprintln!("longhaul-criu: can't run {}: {error}", criu.display());
        return ExitCode::from(127);
    };
    if let Err(error) = rustix::process::setpriority_process(None, FIRST) {
        eprintln!("longhaul-criu: CRIU waits for processors like everybody: {error}");
    }
    // SAFETY: the runtime passed this descriptor for us alone, by its number on the command line.
    let runtime = Rpc(unsafe { OwnedFd::from_raw_fd(fd) });
    match serve(&runtime, &criu, &socket) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("longhaul-criu: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What tar takes for gzip: packs and unpacks by leaving bytes as they are (see `path_with_hold`).
fn pass_through() -> ExitCode {
    match io::copy(&mut io::stdin().lock(), &mut io::stdout().lock()) {
        Ok(_) => ExitCode::SUCCESS,
        // tar stops reading at the end of the archive, before its padding.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("longhaul-criu: can't pass an archive through: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Takes the runtime's one request and sees it through.
fn serve(runtime: &Rpc, criu: &Path, socket: &Path) -> io::Result<ExitCode> {
    let (request, _) = runtime.receive()?;
    let decoded = Request::decode(request.as_slice()).map_err(io::Error::other)?;
    // Anything else (a VERSION or FEATURE_CHECK) is CRIU's own matter.
    if !matches!(decoded.kind(), RequestType::Dump | RequestType::Restore) {
        let (mut child, rpc) = start_criu(criu, &Prepare::default())?;
        rpc.send(&request, None)?;
        let (answer, fd) = rpc.receive()?;
        runtime.send(&answer, fd.as_ref())?;
        drop(rpc);
        return finish(&mut child);
    }

    let mut agent = Agent::connect(socket, decoded.kind)?;
    let Some((prepare, mut child, rpc)) = wait_for_go(&mut agent, criu)? else {
        let refusal = Response { kind: decoded.kind, success: false, ..Response::default() };
        runtime.send(&refusal.encode_to_vec(), None)?;
        return Ok(ExitCode::FAILURE);
    };
    let dirs = Directories::take_over(&decoded)?;
    rpc.send(&with_addition(request, &decoded, prepare.addition.clone(), &dirs), None)?;
    let outcome = relay(runtime, &rpc, &mut agent, &prepare.held);
    drop(rpc);
    outcome?;
    finish(&mut child)
}

/// Starts CRIU when told to prepare, and returns at the word to go; nothing on cancel.
fn wait_for_go(agent: &mut Agent, criu: &Path) -> io::Result<Option<(Prepare, Child, Rpc)>> {
    let mut prepared: Option<(Prepare, Child, Rpc)> = None;
    loop {
        let message = agent.read_before_go()?;
        if message.cancel {
            if let Some((_, mut child, _)) = prepared {
                child.kill()?;
                child.wait()?;
            }
            return Ok(None);
        }
        if let Some(prepare) = message.prepare {
            let (child, rpc) = start_criu(criu, &prepare)?;
            prepared = Some((prepare, child, rpc));
        }
        if message.go {
            return prepared.map(Some).ok_or_else(|| io::Error::other("told to go before being prepared"));
        }
    }
}

/// Passes messages both ways until CRIU's answer; at a held notification the agent has the last word.
fn relay(runtime: &Rpc, criu: &Rpc, agent: &mut Agent, held: &[String]) -> io::Result<()> {
    loop {
        let (bytes, fd) = criu.receive()?;
        let response = Response::decode(bytes.as_slice()).map_err(io::Error::other)?;
        if response.kind() != RequestType::Notify {
            let error = response.errmsg.clone().unwrap_or_default();
            // The agent learns the end even if the runtime is gone.
            let told = runtime.send(&bytes, fd.as_ref());
            agent.tell(&ToAgent { end: Some(End { success: response.success, error }), ..ToAgent::default() });
            return told;
        }
        runtime.send(&bytes, fd.as_ref())?;
        let (mut answer, _) = runtime.receive()?;
        let notify = response.notify.unwrap_or_default();
        let script = notify.script.unwrap_or_default();
        if held.contains(&script) {
            let accepted = Request::decode(answer.as_slice()).is_ok_and(|answer| answer.notify_success == Some(true));
            if accepted && !agent.verdict(&script, notify.pid.unwrap_or_default())? {
                let refusal = Request { kind: RequestType::Notify as i32, options: None, notify_success: Some(false) };
                answer = refusal.encode_to_vec();
            }
        }
        criu.send(&answer, None)?;
    }
}

fn finish(child: &mut Child) -> io::Result<ExitCode> {
    let status = child.wait()?;
    Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)))
}

/// The runtime's request with the agent's options appended.
fn with_addition(mut request: Vec<u8>, decoded: &Request, addition: Option<Options>, dirs: &Directories) -> Vec<u8> {
    let mut options = addition.unwrap_or_default();
    options.images_dir_fd = dirs.images.as_ref().map(AsRawFd::as_raw_fd);
    options.work_dir_fd = dirs.work.as_ref().map(AsRawFd::as_raw_fd);
    let addition = Request { kind: decoded.kind, options: Some(options), notify_success: None };
    request.extend(addition.encode_to_vec());
    request
}

/// The directories a request names by number. CRIU opens them in the descriptor table of its socket's peer
/// (`setup_opts_from_req` in criu/cr-service.c), which is this process and not the runtime.
struct Directories {
    images: Option<OwnedFd>,
    work: Option<OwnedFd>,
}

impl Directories {
    fn take_over(request: &Request) -> io::Result<Self> {
        let options = request.options.clone().unwrap_or_default();
        let runtime = nix::unistd::getppid();
        let open = |fd: Option<i32>| {
            fd.map(|fd| std::fs::File::open(format!("/proc/{runtime}/fd/{fd}")).map(OwnedFd::from)).transpose()
        };
        Ok(Self { images: open(options.images_dir_fd)?, work: open(options.work_dir_fd)? })
    }
}

/// Starts `criu swrk` on a socket pair of its own. Descriptors the runtime passed are inherited as they are.
fn start_criu(criu: &Path, prepare: &Prepare) -> io::Result<(Child, Rpc)> {
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).map_err(io::Error::from)?;
    let mut opened = Vec::new();
    for file in &prepare.files {
        let mut options = std::fs::OpenOptions::new();
        let access = file.flags & libc::O_ACCMODE;
        options
            .read(access != libc::O_WRONLY)
            .write(access != libc::O_RDONLY)
            .custom_flags(file.flags & !libc::O_ACCMODE);
        let handle = options
            .open(&file.path)
            .map_err(|error| io::Error::new(error.kind(), format!("open {}: {error}", file.path)))?;
        if file.offset > 0 {
            io::Seek::seek(&mut &handle, io::SeekFrom::Start(file.offset.unsigned_abs()))?;
        }
        opened.push((OwnedFd::from(handle), file.fd));
    }
    let mut command = Command::new(criu);
    command.args(["swrk", "3"]).args(FILES_BY_SIZE);
    for entry in &prepare.environment {
        if let Some((name, value)) = entry.split_once('=') {
            command.env(name, value);
        }
    }
    let netns = (!prepare.netns.is_empty()).then(|| std::fs::File::open(&prepare.netns)).transpose()?;
    if let Some(netns) = &netns {
        command.in_netns(netns.as_fd());
    }
    let theirs_raw = theirs.as_raw_fd();
    let moves: Vec<(RawFd, RawFd)> = opened.iter().map(|(from, to)| (from.as_raw_fd(), *to)).collect();
    // SAFETY: only dup2(2) between fork and exec, on descriptors that are open.
    unsafe {
        command.pre_exec(move || {
            for &(from, to) in moves.iter().chain([&(theirs_raw, 3)]) {
                if libc::dup2(from, to) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    let child = command.spawn()?;
    Ok((child, Rpc(ours)))
}

/// One end of a CRIU RPC connection: whole messages, sometimes with a descriptor.
struct Rpc(OwnedFd);

impl Rpc {
    fn receive(&self) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
        let mut buffer = vec![0; MAX_RPC_BYTES];
        let mut control = nix::cmsg_space!(RawFd);
        let (length, fd) = {
            let mut slices = [IoSliceMut::new(&mut buffer)];
            let message =
                recvmsg::<()>(self.0.as_raw_fd(), &mut slices, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)?;
            let fd = message.cmsgs()?.find_map(|control| match control {
                ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
                _ => None,
            });
            (message.bytes, fd)
        };
        if length == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the peer of CRIU's RPC is gone"));
        }
        buffer.truncate(length);
        // SAFETY: the kernel has just made this descriptor for us.
        Ok((buffer, fd.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })))
    }

    fn send(&self, bytes: &[u8], fd: Option<&OwnedFd>) -> io::Result<()> {
        let raw = fd.map(AsRawFd::as_raw_fd);
        let fds = raw.as_slice();
        let control = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[][..] } else { &control[..] };
        sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }
}

/// The connection to the agent, made again whenever it breaks.
struct Agent {
    socket: PathBuf,
    operation: i32,
    stream: UnixStream,
}

impl Agent {
    fn connect(socket: &Path, operation: i32) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        let mut agent = Self { socket: socket.to_owned(), operation, stream };
        agent.hello(None)?;
        Ok(agent)
    }

    fn hello(&mut self, waiting_at: Option<String>) -> io::Result<()> {
        let hello = Hello { operation: self.operation, waiting_at };
        self.write(&ToAgent { hello: Some(hello), ..ToAgent::default() })
    }

    fn write(&mut self, message: &ToAgent) -> io::Result<()> {
        let body = message.encode_to_vec();
        let length = u32::try_from(body.len()).map_err(io::Error::other)?.to_le_bytes();
        self.stream.write_all(&[length.as_slice(), &body].concat())
    }

    fn read(&mut self) -> io::Result<ToHold> {
        let mut length = [0; 4];
        self.stream.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_FRAME_BYTES {
            return Err(io::Error::other(format!("the agent announced a message of {length} bytes")));
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body)?;
        ToHold::decode(body.as_slice()).map_err(io::Error::other)
    }

    /// Before CRIU has its request an agent that stays away means: cancelled.
    fn read_before_go(&mut self) -> io::Result<ToHold> {
        let deadline = Instant::now() + GIVE_UP_BEFORE_GO;
        loop {
            match self.read() {
                Ok(message) => return Ok(message),
                Err(_) if Instant::now() < deadline => self.reconnect(None),
                Err(_) => return Ok(ToHold { cancel: true, ..ToHold::default() }),
            }
        }
    }

    /// Asks for the verdict on a notification, for as long as it takes an agent to give one.
    fn verdict(&mut self, script: &str, pid: i32) -> io::Result<bool> {
        let event = Event { script: script.to_owned(), pid };
        let message = ToAgent { event: Some(event), ..ToAgent::default() };
        let mut sent = self.write(&message).is_ok();
        loop {
            if sent && let Ok(ToHold { verdict: Some(verdict), .. }) = self.read() {
                return Ok(verdict);
            }
            self.reconnect(Some(script.to_owned()));
            sent = self.write(&message).is_ok();
        }
    }

    fn reconnect(&mut self, waiting_at: Option<String>) {
        std::thread::sleep(RECONNECT_EVERY);
        if let Ok(stream) = UnixStream::connect(&self.socket) {
            self.stream = stream;
            let _ = self.hello(waiting_at);
        }
    }

    /// Best effort: an agent that is gone finds the end by itself.
    fn tell(&mut self, message: &ToAgent) {
        let _ = self.write(message);
    }
}
