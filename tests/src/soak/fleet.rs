//! The containers that are moved about, and how each tells whether it is as it should be.

use std::net::Ipv4Addr;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::client::Client;
use crate::container::{ContainerSpec, REDIS};
use crate::lab::Host;

/// A memory check: the more processes and threads, the more kinds of memory.
struct Shape {
    name: &'static str,
    mib: u32,
    rate: u32,
    procs: u32,
    threads: u32,
}

const SHAPES: [Shape; 4] = [
    Shape { name: "tiny", mib: 8, rate: 1000, procs: 1, threads: 1 },
    Shape { name: "hot", mib: 48, rate: 20_000, procs: 1, threads: 2 },
    Shape { name: "wide", mib: 64, rate: 10_000, procs: 4, threads: 2 },
    // Has locked slices, which with the churned memory stay below RLIMIT_MEMLOCK's default of 8 MiB.
    Shape { name: "deep", mib: 48, rate: 6000, procs: 2, threads: 6 },
];
/// The port of every memory check.
const PORT: u16 = 7003;
/// Addresses of the fleet begin here.
const FIRST_ADDRESS: u8 = 40;
/// What redis holds beside the counter: enough that filling it in takes a while.
const REDIS_KEYS: u32 = 50_000;
/// Answers to wait for after a move: that redis serves, and not only takes.
const ANSWERS: u64 = 100;

/// One container.
pub(super) struct Member {
    /// Its name.
    pub(super) name: String,
    /// The host it is on: 0 or 1.
    pub(super) at: usize,
    /// Its port, at its address.
    server: String,
    /// Counts on one connection to it; redis has one.
    counter: Option<Client>,
}

impl Member {
    fn start(spec: &ContainerSpec, port: u16, host: &Host, client: &Host) -> Result<Self> {
        spec.start(host)?;
        let server = format!("{}:{port}", spec.address.context("every member of the fleet has an address")?);
        client.sh(&format!("lab-tool wait-port {server} --seconds 20"))?;
        Ok(Self { name: spec.name.clone(), at: 0, server, counter: None })
    }

    /// Asks it whether all its memory is right. Pages that have not come yet are fetched by that.
    pub(super) fn verify(&mut self, client: &Host) -> Result<()> {
        match &mut self.counter {
            Some(counter) => counter.wait_progress("operations", ANSWERS),
            None => client.sh(&format!("lab-tool memcheck query --addr {}", self.server)).map(drop),
        }
        .with_context(|| format!("{} is not as it should be", self.name))
    }

    /// What its counter saw in all the time, if it has one.
    pub(super) fn finish(&mut self) -> Result<Option<Value>> {
        self.counter.take().map(Client::finish).transpose()
    }
}

/// Starts all on a host; `client` is where they are asked from. The seed decides what the workloads do.
pub(super) fn start(host: &Host, client: &Host, seed: u64) -> Result<Vec<Member>> {
    let mut fleet = vec![redis(host, client)?];
    for (last, shape) in (FIRST_ADDRESS + 1..).zip(&SHAPES) {
        fleet.push(memcheck(shape, last, seed, host, client)?);
    }
    Ok(fleet)
}

fn memcheck(shape: &Shape, last: u8, seed: u64, host: &Host, client: &Host) -> Result<Member> {
    let Shape { name, mib, rate, procs, threads } = shape;
    let command = format!(
        "lab-tool memcheck run --mib {mib} --rate {rate} --procs {procs} --threads {threads} \
         --listen 0.0.0.0:{PORT} --seed {}",
        seed % (1 << 20)
    );
    let words: Vec<&str> = command.split_whitespace().collect();
    Member::start(&ContainerSpec::new(name, Ipv4Addr::new(10, 77, 0, last), &words), PORT, host, client)
}

fn redis(host: &Host, client: &Host) -> Result<Member> {
    let address = Ipv4Addr::new(10, 77, 0, FIRST_ADDRESS);
    let mut member = Member::start(&ContainerSpec::new("web", address, &REDIS), 6379, host, client)?;
    client.sh(&format!("redis-cli -h {address} debug populate {REDIS_KEYS} key 500"))?;
    // A pause between commands: the hosts share a few cores, and this is not about throughput.
    let mut counter = Client::start(client, &["redis-incr", "--addr", &member.server, "--interval-us", "500"])?;
    counter.wait_progress("operations", ANSWERS)?;
    member.counter = Some(counter);
    Ok(member)
}
