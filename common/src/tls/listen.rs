//! Accepts connections whose peer has proved its name.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use super::explain;

/// How long a handshake may take: a port scanner must not hold a slot.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);
/// Connections of hosts that are gone end after 10 s.
pub(super) const KEEP_ALIVE: socket2::TcpKeepalive = socket2::TcpKeepalive::new()
    .with_time(Duration::from_secs(5))
    .with_interval(Duration::from_secs(1))
    .with_retries(5);
/// Connections that are between handshake and service.
const QUEUE: usize = 16;

/// Who is at the other end, from the certificate it proved to own.
#[derive(Debug, Clone)]
pub struct PeerIdentity {
    /// The names in its certificate.
    pub names: Vec<String>,
    /// Where it connects from.
    pub address: SocketAddr,
}

/// A stream of connections for a tonic server.
#[derive(Debug)]
pub struct TlsIncoming {
    accepted: mpsc::Receiver<io::Result<TlsConnection>>,
    task: tokio::task::JoinHandle<()>,
}

/// Connections that speak the page protocol.
pub type PageConnections = mpsc::Receiver<TlsConnection>;

/// Where connections go, by the protocol they ask for.
#[derive(Clone)]
struct Accepted {
    calls: mpsc::Sender<io::Result<TlsConnection>>,
    pages: mpsc::Sender<TlsConnection>,
}

impl TlsIncoming {
    /// Accepts on `listener`; each handshake is a task of its own. Page connections come out of the second value.
    pub fn new(listener: TcpListener, config: Arc<ServerConfig>) -> (Self, PageConnections) {
        let (calls, accepted) = mpsc::channel(QUEUE);
        let (pages, page_connections) = mpsc::channel(QUEUE);
        let send = Accepted { calls, pages };
        let acceptor = TlsAcceptor::from(config);
        let task = tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((tcp, address)) => {
                        tokio::spawn(handshake(acceptor.clone(), tcp, address, send.clone()));
                    }
                    Err(error) => {
                        // Out of descriptors, most likely: others must be able to end first.
                        tracing::warn!(%error, "can't accept a connection");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
        });
        (Self { accepted, task }, page_connections)
    }
}

impl Drop for TlsIncoming {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl tokio_stream::Stream for TlsIncoming {
    type Item = io::Result<TlsConnection>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.accepted.poll_recv(context)
    }
}

async fn handshake(acceptor: TlsAcceptor, tcp: TcpStream, address: SocketAddr, accepted: Accepted) {
    // Without it every small message waits for the peer's delayed acknowledgement.
    if let Err(error) = tcp.set_nodelay(true) {
        tracing::warn!(%error, "can't turn off Nagle's algorithm");
    }
    // A host that is gone says nothing: what it sent must not be kept for ever.
    if let Err(error) = socket2::SockRef::from(&tcp).set_tcp_keepalive(&KEEP_ALIVE) {
        tracing::warn!(%error, "can't watch over a connection");
    }
    let attempt = acceptor.accept(tcp).into_fallible();
    match tokio::time::timeout(HANDSHAKE_DEADLINE, attempt).await {
        Ok(Ok(stream)) => {
            let names = peer_names(&stream);
            let is_pages = stream.get_ref().1.alpn_protocol() == Some(crate::pages::ALPN);
            let connection = TlsConnection { stream, identity: PeerIdentity { names, address } };
            if is_pages {
                let _ = accepted.pages.send(connection).await;
            } else {
                let _ = accepted.calls.send(Ok(connection)).await;
            }
        }
        // Somebody looked whether the port is open.
        Ok(Err((error, _))) if error.kind() == io::ErrorKind::UnexpectedEof => {
            tracing::debug!(peer = %address, "a connection ended before its handshake");
        }
        Ok(Err((error, mut tcp))) => {
            let reason = explain(&error).unwrap_or_else(|| error.to_string());
            tracing::warn!(peer = %address, reason, "refused a connection");
            // Closing with unread bytes would reset the connection before the peer has read our reason.
            let mut rest = [0; 4096];
            let drain = async { while tcp.read(&mut rest).await.is_ok_and(|length| length > 0) {} };
            let _ = tokio::time::timeout(Duration::from_millis(500), drain).await;
        }
        Err(_) => tracing::warn!(peer = %address, "refused a connection: no handshake within 5 s"),
    }
}

/// DNS names and addresses in the certificate the peer proved to own.
fn peer_names(stream: &TlsStream<TcpStream>) -> Vec<String> {
    use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};
    let Some(certificate) = stream.get_ref().1.peer_certificates().and_then(<[_]>::first) else { return Vec::new() };
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else { return Vec::new() };
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return Vec::new() };
    names
        .value
        .general_names
        .iter()
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => Some((*name).to_owned()),
            GeneralName::IPAddress(bytes) => match bytes.len() {
                4 => <[u8; 4]>::try_from(*bytes).ok().map(|octets| std::net::Ipv4Addr::from(octets).to_string()),
                16 => <[u8; 16]>::try_from(*bytes).ok().map(|octets| std::net::Ipv6Addr::from(octets).to_string()),
                _ => None,
            },
            _ => None,
        })
        .collect()
}

/// A connection whose peer is known.
#[derive(Debug)]
pub struct TlsConnection {
    stream: TlsStream<TcpStream>,
    identity: PeerIdentity,
}

impl TlsConnection {
    /// Who it is.
    pub fn identity(&self) -> &PeerIdentity {
        &self.identity
    }
}

impl Connected for TlsConnection {
    type ConnectInfo = PeerIdentity;

    fn connect_info(&self) -> PeerIdentity {
        self.identity.clone()
    }
}

impl AsyncRead for TlsConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for TlsConnection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
