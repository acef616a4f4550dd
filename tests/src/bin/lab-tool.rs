//! `lab-tool`: what the lab runs inside containers (workloads), on the third host (clients) and on its hosts
//! (checkers). One static-friendly binary, so that a scenario has only one file to bring along.
//!
//! Every client prints one JSON object on stdout when it ends and exits 0 only if nothing it watches was lost.

#[path = "../tool/mod.rs"]
mod tool;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "lab-tool", about = "Workloads, clients and checkers of the Longhaul lab")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// INCR (or PING) one redis key over one connection and check every reply
    RedisIncr(tool::redis::Options),
    /// Write to random keys of a redis at a fixed rate
    RedisWrite(tool::redis_write::Options),
    /// Take one raw TLS stream
    TlsSink(tool::tls_pipe::SinkOptions),
    /// Send one raw TLS stream and report its speed
    TlsSource(tool::tls_pipe::SourceOptions),
    /// Time PING round trips over one redis connection
    NetProbe(tool::redis::ProbeOptions),
    /// Accept one connection and verify the stream of `stream-source`
    StreamSink(tool::stream::SinkOptions),
    /// Connect to `stream-sink` and exchange verified streams with it
    StreamSource(tool::stream::SourceOptions),
    /// Answer each datagram with this server's sequence number for that client
    UdpEcho(tool::udp::EchoOptions),
    /// Ping a `udp-echo` and watch its sequence numbers
    UdpPing(tool::udp::PingOptions),
    /// Serve a 60 Hz game-like world over UDP
    GameServer(tool::game::ServerOptions),
    /// Join a `game-server`, send inputs and watch the snapshots
    GameClient(tool::game::ClientOptions),
    /// Echo what TCP connections send
    TcpEcho(tool::hold::EchoOptions),
    /// Hold idle TCP connections and check each one at the end
    TcpHold(tool::hold::HoldOptions),
    /// Keep a directory locked: who makes a file in it can't be stopped meanwhile
    HoldDirectory(tool::hold_directory::Options),
    /// Run scripts in a machine of `cargo lab vm`
    VmAgent(tool::vm_agent::Options),
    /// Wait until a TCP port accepts connections
    WaitPort(tool::wait_port::Options),
    /// Kernel objects of all kinds, held by processes that verify them all the time
    #[command(subcommand)]
    Selfcheck(tool::selfcheck::Command),
    /// Memory that verifies itself while it is written
    #[command(subcommand)]
    Memcheck(tool::memcheck::Command),
    /// Counts of a container, kept durably elsewhere: it ran once, and only once
    #[command(subcommand)]
    Ledger(tool::ledger::Command),
    /// Memory that changes by command
    MemorySubject(tool::subject::Options),
    /// Write memory over and over
    Rewrite(tool::rewrite::Options),
    /// Fill memory, fork workers that share it, and verify it when asked (`memcheck query`)
    Prefork(tool::prefork::Options),
    /// Fill memory and sleep
    IdleMemory(tool::idle::Options),
    /// Fill memory of every kind and sleep
    VariedMemory(tool::varied::Options),
    /// Hash each area of a process's address space
    AddressHash(tool::address_hash::Options),
}

fn main() -> anyhow::Result<ExitCode> {
    let healthy = match Cli::parse().command {
        Command::RedisIncr(options) => tool::redis::run(&options)?,
        Command::RedisWrite(options) => tool::redis_write::run(&options)?,
        Command::TlsSink(options) => tool::tls_pipe::sink(&options)?,
        Command::TlsSource(options) => tool::tls_pipe::source(&options)?,
        Command::NetProbe(options) => tool::redis::run(&options.into())?,
        Command::StreamSink(options) => tool::stream::sink(&options)?,
        Command::StreamSource(options) => tool::stream::source(&options)?,
        Command::UdpEcho(options) => tool::udp::echo(&options)?,
        Command::UdpPing(options) => tool::udp::ping(&options)?,
        Command::GameServer(options) => tool::game::serve(&options)?,
        Command::GameClient(options) => tool::game::play(&options)?,
        Command::Ledger(command) => tool::ledger::run(&command)?,
        Command::TcpEcho(options) => tool::hold::echo(&options)?,
        Command::TcpHold(options) => tool::hold::hold(&options)?,
        Command::HoldDirectory(options) => tool::hold_directory::run(&options)?,
        Command::VmAgent(options) => tool::vm_agent::run(&options)?,
        Command::WaitPort(options) => tool::wait_port::run(&options)?,
        Command::Selfcheck(command) => tool::selfcheck::run(command)?,
        Command::Memcheck(command) => tool::memcheck::run(command)?,
        Command::MemorySubject(options) => tool::subject::run(&options)?,
        Command::Rewrite(options) => tool::rewrite::run(&options)?,
        Command::Prefork(options) => tool::prefork::run(&options)?,
        Command::IdleMemory(options) => tool::idle::run(&options)?,
        Command::VariedMemory(options) => tool::varied::run(&options)?,
        Command::AddressHash(options) => tool::address_hash::run(&options)?,
    };
    Ok(if healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
