//! A peer with a valid certificate that sends what it should not: refused, and nothing is left.

use std::future::Future;

use anyhow::{Context, Result, bail, ensure};
use longhaul_common::config::TlsFiles;
use longhaul_common::description::{Description, Network, Rootfs, VERSION};
use longhaul_common::tls::{Identity, PeerAddress, connect};
use longhaul_proto::peer;
use longhaul_proto::peer::destination_message::Message as Reply;
use longhaul_proto::peer::peer_client::PeerClient;
use longhaul_proto::peer::source_message::Message as Request;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

use super::Stage;
use crate::harness::Scenario;
use crate::lab::{Host, Lab};

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario { name: "a peer that names paths outside gets nothing written", run: traversal },
        Scenario { name: "a peer that sends steps out of turn is refused", run: out_of_turn },
        Scenario { name: "a peer that cuts streams off or lies about lengths is refused", run: lies },
    ]
}

/// Runs `attack` with the identity and the network of `from`.
fn as_host<F: Future<Output = Result<()>>>(
    from: &Host,
    attack: impl FnOnce(PeerClient<Channel>) -> F + Send,
) -> Result<()> {
    let tls = |file: &str| from.path(&format!("/etc/longhaul/tls/{file}"));
    let files = TlsFiles { ca: tls("ca.pem"), cert: tls("cert.pem"), key: tls("key.pem") };
    let netns = std::fs::File::open(format!("/proc/{}/ns/net", from.init))?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET).context("join the host's network")?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let identity = Identity::load(&files)?;
                let address = PeerAddress {
                    host: "host2".into(),
                    address: "10.77.0.2:7474".into(),
                    certificate_name: "host2".into(),
                };
                attack(longhaul_proto::peer_client(connect(&identity, &address).await?)).await
            })
        });
        thread.join().unwrap_or_else(|_| bail!("the attacker panicked"))
    })
}

fn description(id: &str) -> Description {
    Description {
        version: VERSION,
        id: id.into(),
        engine: "runc".into(),
        bundle: format!("/srv/containers/{id}"),
        config: "{}".into(),
        rootfs: Rootfs::Plain { path: format!("/srv/containers/{id}/rootfs") },
        volumes: Vec::new(),
        tmpfs: Vec::new(),
        network: Network::Host,
        stdio: Vec::new(),
        memory_bytes: 1,
        disk_bytes: 1,
        single_cgroup: true,
        mapped_files: Vec::new(),
        single_netns: false,
    }
}

/// A control stream by hand.
struct Control {
    send: mpsc::Sender<peer::SourceMessage>,
    replies: Streaming<peer::DestinationMessage>,
}

impl Control {
    async fn open(client: &mut PeerClient<Channel>) -> Result<Self> {
        let (send, receive) = mpsc::channel(8);
        let replies = client.session(ReceiverStream::new(receive)).await?.into_inner();
        Ok(Self { send, replies })
    }

    async fn say(&mut self, message: Request) -> Result<Reply> {
        self.send.send(peer::SourceMessage { message: Some(message) }).await?;
        loop {
            let reply = self.replies.message().await?.and_then(|reply| reply.message).context("no reply")?;
            if !matches!(reply, Reply::Heartbeat(_)) {
                return Ok(reply);
            }
        }
    }

    async fn offer(&mut self, id: &str, description: Vec<u8>) -> Result<Reply> {
        let offer = peer::Offer { migration_id: id.into(), epoch: 1, description: description.into(), dry_run: false };
        self.say(Request::Offer(offer)).await
    }

    async fn prepared(client: &mut PeerClient<Channel>, id: &str) -> Result<Self> {
        let mut tries = 0;
        let mut control = loop {
            let mut control = Self::open(client).await?;
            let Reply::Verdict(verdict) = control.offer(id, description("hostile").to_json()).await? else {
                bail!("no verdict")
            };
            if verdict.obstacles.is_empty() {
                break control;
            }
            // The one before has been undone, and may not be forgotten yet.
            tries += 1;
            let is_arriving = verdict.obstacles.iter().any(|obstacle| obstacle.why.contains("arriving"));
            ensure!(is_arriving && tries < 200, "{:?}", verdict.obstacles);
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        };
        ensure!(matches!(control.say(Request::Prepare(peer::Prepare {})).await?, Reply::Prepared(_)), "not prepared");
        Ok(control)
    }
}

fn must_fail(reply: &Reply, word: &str) -> Result<()> {
    match reply {
        Reply::Failed(failed) if failed.error.contains(word) => Ok(()),
        other => bail!("expected a failure that names {word:?}, got {other:?}"),
    }
}

fn tree(id: &str, entries: Vec<peer::tree_message::Message>) -> Vec<peer::TreeMessage> {
    use peer::tree_message::Message;
    let start = Message::Start(peer::TreeStart { migration_id: id.into(), tree: 0, pass: 1 });
    [start].into_iter().chain(entries).map(|message| peer::TreeMessage { message: Some(message) }).collect()
}

fn file(path: &[u8], size: u64) -> peer::tree_message::Message {
    let mut entry = peer::TreeEntry { path: path.to_vec().into(), size, mode: 0o644, ..peer::TreeEntry::default() };
    entry.set_kind(peer::EntryKind::File);
    peer::tree_message::Message::Entry(entry)
}

/// After an attack: no container, no directory of it, no file where it pointed.
fn nothing_left(host: &Host) -> Result<()> {
    let script = "for i in $(seq 500); do [ -z \"$(ls /srv/containers 2>/dev/null)$(ls /run/longhaul/dest)\" ] && break; sleep 0.02; done; \
                  ls /srv/containers /run/longhaul/dest 2>/dev/null | grep -v -e : -e '^$' || true; ls /tmp/evil /etc/evil /srv/evil 2>/dev/null || true; runc list -q";
    let left = host.sh(script)?;
    ensure!(left.trim().is_empty(), "left behind: {left}");
    Ok(())
}

fn traversal(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    as_host(stage.c, |mut client| async move {
        for bad in ["/srv/../etc", "relative", "/"] {
            let mut description = description("hostile");
            description.bundle = bad.into();
            let mut control = Control::open(&mut client).await?;
            must_fail(&control.offer("evil-1", description.to_json()).await?, "bundle")?;
        }
        let mut named = description("hostile");
        named.id = "../../etc".into();
        let mut control = Control::open(&mut client).await?;
        must_fail(&control.offer("evil-2", named.to_json()).await?, "id")?;
        let mut control = Control::open(&mut client).await?;
        must_fail(&control.offer("../evil", description("hostile").to_json()).await?, "migration id")?;

        let _control = Control::prepared(&mut client, "evil-3").await?;
        for bad in [&b"../evil"[..], b"/etc/evil", b"a/../../evil", b"", b"a\0b"] {
            let stream = tokio_stream::iter(tree("evil-3", vec![file(bad, 1)]));
            let Err(refused) = client.push_tree(stream).await else { bail!("{bad:?} was taken") };
            ensure!(refused.code() == tonic::Code::InvalidArgument, "{refused}");
        }
        // Through a symlink that was sent before.
        let mut link = peer::TreeEntry {
            path: b"link".to_vec().into(),
            target: b"/tmp".to_vec().into(),
            ..peer::TreeEntry::default()
        };
        link.set_kind(peer::EntryKind::Symlink);
        let stream =
            tokio_stream::iter(tree("evil-3", vec![peer::tree_message::Message::Entry(link), file(b"link/evil", 0)]));
        ensure!(client.push_tree(stream).await.is_err(), "a path through a symlink was taken");
        // Images with names that are paths.
        use peer::image_message::Message;
        let chunk = peer::ImageChunk { name: "../../evil.img".into(), offset: 0, bytes: vec![1].into() };
        let start = Message::Start(peer::ImageStart { migration_id: "evil-3".into() });
        let messages = [start, Message::Chunk(chunk)].map(|message| peer::ImageMessage { message: Some(message) });
        ensure!(client.push_images(tokio_stream::iter(messages)).await.is_err(), "an image outside was taken");
        Ok(())
    })?;
    nothing_left(stage.b)
}

fn out_of_turn(lab: &Lab) -> Result<()> {
    let stage = Stage::of(lab)?;
    as_host(stage.c, |mut client| async move {
        let mut control = Control::open(&mut client).await?;
        must_fail(&control.say(Request::Commit(peer::Commit { epoch: 1 })).await?, "offer")?;
        for (n, message) in [
            Request::Commit(peer::Commit { epoch: 1 }),
            Request::Restore(peer::Restore::default()),
            Request::Prepare(peer::Prepare {}),
        ]
        .into_iter()
        .enumerate()
        {
            let mut control = Control::prepared(&mut client, &format!("turn-{n}")).await?;
            must_fail(&control.say(message).await?, "was due")?;
            drop(control);
            wait_gone(&mut client, &format!("turn-{n}")).await?;
        }
        // Another migration's trees, or one that never was.
        let stream = tokio_stream::iter(tree("nobody", vec![]));
        ensure!(client.push_tree(stream).await.is_err(), "a tree for no migration was taken");
        // An id that was used once is refused for ever.
        let mut control = Control::open(&mut client).await?;
        must_fail(&control.offer("turn-0", description("hostile").to_json()).await?, "before")
    })?;
    nothing_left(stage.b)
}

/// The answer to this question is given only once the migration has been undone.
async fn wait_gone(client: &mut PeerClient<Channel>, id: &str) -> Result<()> {
    let request = peer::OutcomeRequest { migration_id: id.into(), epoch: 1, supersede: false };
    let outcome = client.outcome(request).await?.into_inner().outcome();
    ensure!(outcome == peer::Outcome::Aborted, "{outcome:?}");
    Ok(())
}

fn lies(lab: &Lab) -> Result<()> {
    use peer::tree_message::Message;
    let stage = Stage::of(lab)?;
    as_host(stage.c, |mut client| async move {
        let data = |offset, length| Message::Data(peer::TreeData { offset, bytes: vec![0u8; length].into() });
        let attacks: Vec<(&str, Vec<Message>)> = vec![
            ("no end", vec![file(b"a", 4), data(0, 4)]),
            ("data beyond the size", vec![file(b"a", 4), data(0, 5)]),
            ("data far beyond the size", vec![file(b"a", 4), data(1 << 60, 4)]),
            ("data without a file", vec![data(0, 4)]),
            ("too much data at once", vec![file(b"a", 8 << 20), data(0, 4 << 20)]),
            ("a wrong checksum", vec![file(b"a", 4), data(0, 4), Message::FileEnd(peer::TreeFileEnd { checksum: 1 })]),
            ("an absurd size", vec![file(b"a", u64::MAX)]),
            ("a path too long", vec![file(&vec![b'x'; 5000], 0)]),
            ("a second start", vec![Message::Start(peer::TreeStart::default())]),
            (
                "no kind",
                vec![Message::Entry(peer::TreeEntry { path: b"a".to_vec().into(), ..peer::TreeEntry::default() })],
            ),
        ];
        for (n, (what, messages)) in attacks.into_iter().enumerate() {
            let id = format!("lies-{n}");
            let control = Control::prepared(&mut client, &id).await?;
            let pushed = client.push_tree(tokio_stream::iter(tree(&id, messages))).await;
            ensure!(pushed.is_err(), "{what} was taken");
            drop(control);
            wait_gone(&mut client, &id).await?;
        }
        // Images that are announced and do not come.
        let mut control = Control::prepared(&mut client, "lies-images").await?;
        let reply = control
            .say(Request::Arm(peer::Arm {
                descriptors: b"not json".to_vec().into(),
                neighbours: Vec::new(),
                pages: false,
                eager: false,
            }))
            .await?;
        ensure!(matches!(reply, Reply::Failed(_)), "armed with nonsense: {reply:?}");
        drop(control);
        wait_gone(&mut client, "lies-images").await?;
        // A description larger than any.
        let mut control = Control::open(&mut client).await?;
        must_fail(&control.offer("lies-large", vec![b' '; 5 << 20]).await?, "bytes")
    })?;
    nothing_left(stage.b)
}
