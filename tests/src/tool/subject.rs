//! A process whose memory is changed by command, for the tracker's property test: it does what it is told and nothing else.
//!
//! Commands are lines, answered by `ok` once done:
//!
//! ```text
//! map SLOT PAGES anonymous|file|shared|memfd    unmap SLOT      resize SLOT PAGES
//! write SLOT PAGE VALUE                         drop SLOT PAGE  lock SLOT           fork
//! ```
//!
//! Of shared memory: `child` forks one that writes the page and ends; `slip` writes it and gives up its place in the page tables; `remove`
//! makes it a hole and reads it, which fills it with zeroes. Of a memfd: `put` writes the page with
//! write(2), `flash` through another mapping that is gone afterwards.
//!
//! `map` and `resize` answer with the address. Whoever is forked off connects anew and says its process id first.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;

use super::sys::mem::{self, PAGE, PAGE_WORDS, Region, Sharing};
use super::sys::process::{fork, wait};

#[derive(Args, Debug)]
pub(crate) struct Options {
    /// The socket that commands come from
    #[arg(long)]
    connect: PathBuf,
    /// A file to map, whose content is not zero
    #[arg(long)]
    file: PathBuf,
}

/// A slot.
struct Mapped {
    region: Region,
    /// Of a memfd.
    file: Option<File>,
}

pub(crate) fn run(options: &Options) -> Result<bool> {
    let mut regions = BTreeMap::new();
    obey(options, &mut regions)?;
    Ok(true)
}

/// Until the socket is closed.
fn obey(options: &Options, regions: &mut BTreeMap<usize, Mapped>) -> Result<()> {
    let mut stream = UnixStream::connect(&options.connect).context("connect to who commands")?;
    let mut lines = BufReader::new(stream.try_clone()?);
    writeln!(stream, "{}", std::process::id())?;
    loop {
        let mut line = String::new();
        if lines.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let answer = do_one(options, regions, line.trim()).with_context(|| line.clone())?;
        writeln!(stream, "{answer}")?;
    }
}

fn do_one(options: &Options, regions: &mut BTreeMap<usize, Mapped>, line: &str) -> Result<String> {
    let mut words = line.split(' ');
    let command = words.next().unwrap_or_default();
    if command == "fork" {
        // The child has its own end of everything, and is reaped by the kernel when this process ends.
        fork(|| i32::from(obey(options, regions).is_err()))?;
        return Ok("ok".to_owned());
    }
    let rest: Vec<&str> = words.collect();
    let number =
        |index: usize| rest.get(index).and_then(|word| word.parse::<usize>().ok()).context("a number is missing");
    let slot = number(0)?;
    if command == "map" {
        let length = number(1)? * PAGE;
        let mut memfd = None;
        let region = match rest.get(2) {
            Some(&"anonymous") => Region::anonymous(length, Sharing::Private)?,
            Some(&"shared") => Region::anonymous(length, Sharing::Shared)?,
            Some(&"file") => Region::file(File::open(&options.file)?.as_fd(), length, Sharing::Private)?,
            Some(&"memfd") => {
                let file = memfd.insert(File::from(mem::memfd(c"subject")?));
                file.set_len(length as u64)?;
                Region::file(file.as_fd(), length, Sharing::Shared)?
            }
            other => bail!("{other:?} is no kind of memory"),
        };
        let address = region.address();
        regions.insert(slot, Mapped { region, file: memfd });
        return Ok(format!("ok {address}"));
    }
    if command == "unmap" {
        regions.remove(&slot);
        return Ok("ok".to_owned());
    }
    let Mapped { region, file } = regions.get_mut(&slot).context("nothing is mapped there")?;
    let write = |region: &mut Region| {
        let (page, value) = (number(1)?, number(2)? as u64);
        let words = region.words_mut().get_mut(page * PAGE_WORDS..(page + 1) * PAGE_WORDS).context("no such page")?;
        words.fill(value);
        anyhow::Ok(())
    };
    match command {
        "write" => write(region)?,
        "child" => drop(wait(fork(|| i32::from(write(region).is_err()))?)?),
        "slip" => {
            write(region)?;
            region.discard_page(number(1)?)?;
        }
        "remove" => {
            region.remove_page(number(1)?)?;
            std::hint::black_box(region.words().get(number(1)? * PAGE_WORDS).copied());
        }
        "put" => {
            let bytes = (number(2)? as u64).to_ne_bytes().repeat(PAGE_WORDS);
            file.as_ref().context("no memfd")?.write_all_at(&bytes, (number(1)? * PAGE) as u64)?;
        }
        "flash" => {
            let file = file.as_ref().context("no memfd")?;
            write(&mut Region::file(file.as_fd(), region.len(), Sharing::Shared)?)?;
        }
        "drop" => region.discard_page(number(1)?)?,
        "lock" => region.lock()?,
        "resize" => {
            region.resize(NonZeroUsize::new(number(1)? * PAGE).context("no length")?)?;
            return Ok(format!("ok {}", region.address()));
        }
        other => bail!("{other:?} is no command"),
    }
    Ok("ok".to_owned())
}
