//! Generated types of Longhaul's two gRPC interfaces, and the one way each side is configured.

use tonic::transport::Channel;

/// Between two agents.
#[allow(missing_docs, clippy::all, clippy::pedantic, reason = "generated code")]
pub mod peer {
    tonic::include_proto!("longhaul.peer.v1");
}

/// Between the `migrate` command and the source agent.
#[allow(missing_docs, clippy::all, clippy::pedantic, reason = "generated code")]
pub mod agent {
    tonic::include_proto!("longhaul.agent.v1");
}

/// The largest message either side takes, in bytes: an entry with all the attributes Linux allows has 17 MiB.
pub const MAX_MESSAGE_BYTES: usize = 20 << 20;

/// A client of another host's destination agent.
pub fn peer_client(channel: Channel) -> peer::peer_client::PeerClient<Channel> {
    peer::peer_client::PeerClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES)
}

/// The server of a destination agent.
pub fn peer_server<T: peer::peer_server::Peer>(service: T) -> peer::peer_server::PeerServer<T> {
    peer::peer_server::PeerServer::new(service).max_decoding_message_size(MAX_MESSAGE_BYTES)
}

/// A client of this host's source agent.
pub fn agent_client(channel: Channel) -> agent::agent_client::AgentClient<Channel> {
    agent::agent_client::AgentClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES)
}

/// The server of a source agent.
pub fn agent_server<T: agent::agent_server::Agent>(service: T) -> agent::agent_server::AgentServer<T> {
    agent::agent_server::AgentServer::new(service).max_decoding_message_size(MAX_MESSAGE_BYTES)
}
