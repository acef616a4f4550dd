//! One raw TLS stream with the agents' own identities: what a page connection is compared with.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Args;
use longhaul_common::config::TlsFiles;
use longhaul_common::tls::{Identity, PeerAddress, TlsIncoming, connect_pages};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{idle, report};

/// Bytes written at once, as the page connection does.
const BLOCK: usize = 1 << 20;

#[derive(Args, Debug)]
pub(crate) struct SinkOptions {
    /// Where to listen
    #[arg(long)]
    listen: SocketAddr,
}

#[derive(Args, Debug)]
pub(crate) struct SourceOptions {
    /// The sink
    #[arg(long)]
    addr: SocketAddr,
    /// The name in the sink's certificate
    #[arg(long)]
    name: String,
    /// How much to send
    #[arg(long)]
    mib: u64,
}

fn identity() -> anyhow::Result<Identity> {
    let dir = PathBuf::from("/etc/longhaul/tls");
    let files = TlsFiles { ca: dir.join("ca.pem"), cert: dir.join("cert.pem"), key: dir.join("key.pem") };
    Identity::load(&files).context("load this host's identity")
}

/// Takes one stream and says when it has all of it.
pub(crate) fn sink(options: &SinkOptions) -> anyhow::Result<bool> {
    tokio::runtime::Runtime::new()?.block_on(async {
        let listener = tokio::net::TcpListener::bind(options.listen).await?;
        println!("ready");
        let (_calls, mut connections) = TlsIncoming::new(listener, identity()?.server());
        let Some(mut connection) = connections.recv().await else { bail!("no connection came") };
        let mut expected = [0; 8];
        connection.read_exact(&mut expected).await?;
        let mut left = u64::from_le_bytes(expected);
        let mut buffer = vec![0; BLOCK];
        while left > 0 {
            let length = connection.read(&mut buffer).await?;
            if length == 0 {
                bail!("the stream ended {left} bytes early");
            }
            left -= length as u64;
        }
        connection.write_all(&[1]).await?;
        connection.shutdown().await?;
        Ok(true)
    })
}

/// Sends one stream and reports its speed.
pub(crate) fn source(options: &SourceOptions) -> anyhow::Result<bool> {
    tokio::runtime::Runtime::new()?.block_on(async {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        // All of it, and not one block again and again, which would come out of the processor's cache.
        let mut memory = vec![0; (options.mib as usize) << 20];
        for word in memory.chunks_exact_mut(8) {
            state = idle::xorshift(state);
            word.copy_from_slice(&state.to_ne_bytes());
        }
        let address = PeerAddress {
            host: options.name.clone(),
            address: options.addr.to_string(),
            certificate_name: options.name.clone(),
        };
        let mut connection = connect_pages(&identity()?, &address).await?;
        let start = Instant::now();
        connection.write_all(&(options.mib << 20).to_le_bytes()).await?;
        for block in memory.chunks(BLOCK) {
            connection.write_all(block).await?;
        }
        connection.flush().await?;
        connection.read_exact(&mut [0]).await.context("wait until all has arrived")?;
        let mib_per_s = options.mib as f64 / start.elapsed().as_secs_f64();
        report::publish(&json!({ "mib_per_s": mib_per_s }), None)?;
        Ok(true)
    })
}
