//! Runs scripts in a machine of `cargo lab vm`, one after the other, as they come over a serial port of QEMU's: a JSON line
//! `{"id", "script"}` each way, `{"id", "out", "code"}` back.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

#[derive(Args, Debug)]
pub(crate) struct Options {
    /// The port
    port: PathBuf,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<bool> {
    let mut port = OpenOptions::new().read(true).write(true).open(&options.port)?;
    let mut pending = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        // Nothing, while nobody is connected at the other end.
        let read = port.read(&mut buffer).unwrap_or(0);
        if read == 0 {
            pending.clear();
            std::thread::sleep(Duration::from_millis(20));
            continue;
        }
        pending.extend_from_slice(&buffer[..read]);
        while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            let Ok(request) = serde_json::from_slice::<Value>(&line) else { continue };
            let script = request["script"].as_str().unwrap_or("exit 1");
            // Through a file: what goes on in the background would hold a pipe open.
            let said = tempfile(script);
            let (out, code) = said.unwrap_or_else(|error| (error.to_string(), 255));
            let answer = json!({"id": request["id"], "out": out, "code": code});
            // Who asked may be gone.
            let _ = port.write_all(format!("{answer}\n").as_bytes());
        }
    }
}

fn tempfile(script: &str) -> std::io::Result<(String, i32)> {
    let path = PathBuf::from(format!("/tmp/vm-agent.{}", std::process::id()));
    let file = std::fs::File::create(&path)?;
    let mut command = Command::new("sh");
    command.args(["-ec", script]).stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).current_dir("/");
    let status = command.status()?;
    let out = String::from_utf8_lossy(&std::fs::read(&path)?).into_owned();
    Ok((out, status.code().unwrap_or(255)))
}
