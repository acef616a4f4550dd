//! Who a host is, and who it talks to: mutual TLS 1.3 under a private authority.

mod explain;
mod listen;
pub mod pki;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use thiserror::Error;
use tokio::io::AsyncBufReadExt;
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint};

pub use explain::explain;
pub use listen::{PageConnections, PeerIdentity, TlsConnection, TlsIncoming};

use crate::config::TlsFiles;

/// How long a connection and its handshake may take.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// How often a peer is asked whether it is there.
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(1);
/// How long it may take to answer: longer than a busy machine keeps a thread waiting. A peer that hangs is then gone.
const KEEP_ALIVE_DEADLINE: Duration = Duration::from_secs(5);
/// HTTP/2 flow control windows, in bytes: the receiver of a migration must never be the one that waits
/// (64 KiB, the default, cost a factor of twenty on loopback).
pub const WINDOW_BYTES: u32 = 64 << 20;
/// HTTP/2 frame size, in bytes.
pub const FRAME_BYTES: u32 = 256 << 10;

/// An identity or a connection that can't be used.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file is missing or unreadable.
    #[error("can't read the {what} {path}: `migrate pki issue` on the host with the authority makes it")]
    File {
        /// `certificate`, `key`, `authority`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// The files don't make an identity.
    #[error("the files of this host's identity can't be used")]
    Identity(#[source] rustls::Error),
    /// The authority can't be used.
    #[error("the authority {path} can't be used to check certificates")]
    Authority {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The name is no DNS name or address.
    #[error("{0:?} is no host name or address")]
    Name(String),
    /// Nothing answers.
    #[error(
        "host {host} can't be reached at {address}: is longhaul-dest running there, and no firewall between? ({reason})"
    )]
    Unreachable {
        /// Its name.
        host: String,
        /// Where it was tried.
        address: String,
        /// What the system said.
        reason: String,
    },
    /// One of the two refused the other.
    #[error("host {host} at {address}: {reason}")]
    Refused {
        /// Its name.
        host: String,
        /// Where it was tried.
        address: String,
        /// Which refused, and why.
        reason: String,
    },
}

/// A host's certificate, key and authority, ready for use.
#[derive(Debug, Clone)]
pub struct Identity {
    client: Arc<ClientConfig>,
    /// The same, for page connections.
    pages: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Identity {
    /// Reads the files.
    pub fn load(files: &TlsFiles) -> Result<Self, TlsError> {
        let chain = read_certificates("certificate", &files.cert)?;
        let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|source| TlsError::File {
            what: "key",
            path: files.key.clone(),
            source,
        })?;
        let mut roots = RootCertStore::empty();
        for certificate in read_certificates("authority", &files.ca)? {
            roots
                .add(certificate)
                .map_err(|source| TlsError::Authority { path: files.ca.clone(), source: Box::new(source) })?;
        }
        let roots = Arc::new(roots);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|source| TlsError::Authority { path: files.ca.clone(), source: Box::new(source) })?;
        let versions = [&rustls::version::TLS13];
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&versions)
            .map_err(TlsError::Identity)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(TlsError::Identity)?;
        server.alpn_protocols = vec![b"h2".to_vec(), crate::pages::ALPN.to_vec()];
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&versions)
            .map_err(TlsError::Identity)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(TlsError::Identity)?;
        client.alpn_protocols = vec![b"h2".to_vec()];
        let mut pages = client.clone();
        pages.alpn_protocols = vec![crate::pages::ALPN.to_vec()];
        Ok(Self { client: Arc::new(client), pages: Arc::new(pages), server: Arc::new(server) })
    }

    /// For a listener.
    pub fn server(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }
}

fn read_certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let file_error = |source| TlsError::File { what, path: path.to_owned(), source };
    let certificates: Vec<_> =
        CertificateDer::pem_file_iter(path).map_err(file_error)?.collect::<Result<_, _>>().map_err(file_error)?;
    if certificates.is_empty() {
        return Err(file_error(rustls::pki_types::pem::Error::NoItemsFound));
    }
    Ok(certificates)
}

/// Another host's destination agent.
#[derive(Debug, Clone)]
pub struct PeerAddress {
    /// What the user calls it.
    pub host: String,
    /// `name:port`.
    pub address: String,
    /// The name its certificate must hold.
    pub certificate_name: String,
}

/// Connects once, with the handshake done: what can be wrong with either side's certificate shows here or in
/// the first call, whose error [`explain`] reads.
pub async fn connect(identity: &Identity, peer: &PeerAddress) -> Result<Channel, TlsError> {
    let name = ServerName::try_from(peer.certificate_name.clone())
        .map_err(|_| TlsError::Name(peer.certificate_name.clone()))?;
    let unreachable =
        |reason: String| TlsError::Unreachable { host: peer.host.clone(), address: peer.address.clone(), reason };
    // Tried by ourselves first, so that a refusal is told from a handshake that failed.
    let tcp = tokio::time::timeout(CONNECT_DEADLINE, TcpStream::connect(&peer.address))
        .await
        .map_err(|_| unreachable(format!("no answer within {} s", CONNECT_DEADLINE.as_secs())))?
        .map_err(|error| unreachable(error.to_string()))?;
    let config = identity.client.clone();
    let address = peer.address.clone();
    let first = std::sync::Mutex::new(Some(tcp));
    let connector = tower::service_fn(move |_: http::Uri| {
        let taken = first.lock().ok().and_then(|mut first| first.take());
        let (config, name, address) = (config.clone(), name.clone(), address.clone());
        async move {
            let tcp = match taken {
                Some(tcp) => tcp,
                None => TcpStream::connect(&address).await?,
            };
            tcp.set_nodelay(true)?;
            let mut tls = tokio_rustls::TlsConnector::from(config).connect(name, tcp).await?;
            // In TLS 1.3 a server refuses a client's certificate after the client's side of the handshake is done.
            // One that accepts it speaks at once (HTTP/2 settings); waiting for its first byte makes the refusal ours.
            tls.fill_buf().await?;
            Ok::<_, std::io::Error>(TokioIo::new(tls))
        }
    });
    Endpoint::from_static("http://longhaul.invalid")
        .connect_timeout(CONNECT_DEADLINE)
        .http2_keep_alive_interval(KEEP_ALIVE_EVERY)
        .keep_alive_timeout(KEEP_ALIVE_DEADLINE)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .connect_with_connector(connector)
        .await
        .map_err(|error| TlsError::Refused {
            host: peer.host.clone(),
            address: peer.address.clone(),
            reason: explain(&error).unwrap_or_else(|| crate::chain(&error)),
        })
}

/// What the kernel takes of a page connection's content before it can send it, in bytes (`TCP_NOTSENT_LOWAT`, tcp(7)). By itself it takes four
/// megabytes of each connection and more (`net.ipv4.tcp_wmem`), which a link of 1 Gbit/s carries for 30 ms: what comes next waits
/// behind it, and what is in it is old. Enough for 10 Gbit/s while a thread waits 0.4 ms for a processor.
const MOST_UNSENT: u32 = 512 << 10;

/// Opens a page connection. Who is refused learns it from the first answer.
pub async fn connect_pages(
    identity: &Identity,
    peer: &PeerAddress,
) -> Result<tokio_rustls::client::TlsStream<TcpStream>, TlsError> {
    let name = ServerName::try_from(peer.certificate_name.clone())
        .map_err(|_| TlsError::Name(peer.certificate_name.clone()))?;
    let attempt = async {
        let tcp = TcpStream::connect(&peer.address).await?;
        tcp.set_nodelay(true)?;
        // It may have nothing to say for long, and must notice a host that is gone all the same.
        let socket = socket2::SockRef::from(&tcp);
        socket.set_tcp_keepalive(&listen::KEEP_ALIVE)?;
        socket.set_tcp_notsent_lowat(MOST_UNSENT)?;
        tokio_rustls::TlsConnector::from(identity.pages.clone()).connect(name, tcp).await
    };
    let unreachable =
        |reason: String| TlsError::Unreachable { host: peer.host.clone(), address: peer.address.clone(), reason };
    tokio::time::timeout(CONNECT_DEADLINE, attempt)
        .await
        .map_err(|_| unreachable(format!("no answer within {} s", CONNECT_DEADLINE.as_secs())))?
        .map_err(|error| unreachable(explain(&error).unwrap_or_else(|| error.to_string())))
}
