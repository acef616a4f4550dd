//! An OCI runtime, by its command line.

use std::path::PathBuf;
use std::process::Stdio;

use serde::Deserialize;
use thiserror::Error;
use tokio::process::Command;

/// A failed call of the runtime.
#[derive(Debug, Error)]
pub enum RuntimeError {
    /// It could not be started.
    #[error("can't run {program}: is the runtime installed?")]
    Start {
        /// The runtime.
        program: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// There is no such container.
    #[error("no container {id:?} here: `{program} list` shows those there are")]
    Unknown {
        /// The id asked for.
        id: String,
        /// The runtime.
        program: String,
    },
    /// It failed.
    #[error("`{command}` failed: {message}")]
    Failed {
        /// What was run.
        command: String,
        /// What it said.
        message: String,
    },
    /// Its answer can't be read.
    #[error("can't read the answer of `{command}`")]
    Answer {
        /// What was run.
        command: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

/// What `runc state` tells.
#[derive(Debug, Clone, Deserialize)]
pub struct State {
    /// The container's id.
    pub id: String,
    /// Its first task, in the numbering of the caller's PID namespace; 0 if it is stopped.
    pub pid: i32,
    /// `created`, `running`, `paused` or `stopped`.
    pub status: String,
    /// Its bundle.
    pub bundle: String,
    /// The root filesystem's path.
    #[serde(default)]
    pub rootfs: String,
}

/// runc, or a runtime that takes the same commands.
#[derive(Debug, Clone)]
pub struct Runtime {
    program: PathBuf,
    root: Option<PathBuf>,
}

impl Runtime {
    /// The runtime `program`, with its state in `root` or where it puts it by itself.
    pub fn new(program: PathBuf, root: Option<PathBuf>) -> Self {
        Self { program, root }
    }

    /// Its program.
    pub fn program(&self) -> &std::path::Path {
        &self.program
    }

    /// Where it keeps a container's state, unless it was built to keep it elsewhere.
    pub fn state_dir(&self, id: &str) -> PathBuf {
        self.root.clone().unwrap_or_else(|| PathBuf::from("/run/runc")).join(id)
    }

    /// The cgroup it made for a container, which holds all of it: a first task may have moved itself below.
    pub fn cgroup(&self, id: &str) -> Option<PathBuf> {
        let text = std::fs::read(self.state_dir(id).join("state.json")).ok()?;
        let state: serde_json::Value = serde_json::from_slice(&text).ok()?;
        // On v2 there is one path, under an empty name.
        let path = ["freezer", ""].iter().find_map(|name| state["cgroup_paths"][name].as_str())?;
        Some(path.into())
    }

    /// A call of it, with nothing on its standard input.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        if let Some(root) = &self.root {
            command.arg("--root").arg(root);
        }
        command.stdin(Stdio::null());
        command
    }

    /// The state of a container.
    pub async fn state(&self, id: &str) -> Result<State, RuntimeError> {
        let text = self.run(&["state", id]).await.map_err(|error| match error {
            RuntimeError::Failed { message, .. } if message.contains("does not exist") => {
                RuntimeError::Unknown { id: id.to_owned(), program: self.program.display().to_string() }
            }
            other => other,
        })?;
        serde_json::from_str(&text)
            .map_err(|source| RuntimeError::Answer { command: self.line(&["state", id]), source })
    }

    /// The cgroups that it made for a container, one in each hierarchy; none if it does not know it.
    pub fn cgroups(&self, id: &str) -> Vec<PathBuf> {
        let state = std::fs::read(self.state_dir(id).join("state.json")).unwrap_or_default();
        let state: serde_json::Value = serde_json::from_slice(&state).unwrap_or_default();
        let paths = state["cgroup_paths"].as_object().into_iter().flat_map(|paths| paths.values());
        paths.filter_map(|path| path.as_str().map(PathBuf::from)).collect()
    }

    /// All containers it knows.
    pub async fn list(&self) -> Result<Vec<State>, RuntimeError> {
        let words = ["list", "--format", "json"];
        let text = self.run(&words).await?;
        let list: Option<Vec<State>> = serde_json::from_str(&text)
            .map_err(|source| RuntimeError::Answer { command: self.line(&words), source })?;
        Ok(list.unwrap_or_default())
    }

    /// Removes a container, killing what runs of it.
    pub async fn delete(&self, id: &str) -> Result<(), RuntimeError> {
        self.run(&["delete", "--force", id]).await.map(drop)
    }

    /// Its version line.
    pub async fn version(&self) -> Result<String, RuntimeError> {
        let text = self.run(&["--version"]).await?;
        Ok(text.lines().next().unwrap_or_default().replace("version ", ""))
    }

    async fn run(&self, words: &[&str]) -> Result<String, RuntimeError> {
        let output = self
            .command()
            .args(words)
            .output()
            .await
            .map_err(|source| RuntimeError::Start { program: self.program.clone(), source })?;
        if !output.status.success() {
            let message = last_message(&String::from_utf8_lossy(&output.stderr));
            return Err(RuntimeError::Failed { command: self.line(words), message });
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn line(&self, words: &[&str]) -> String {
        format!("{} {}", self.program.display(), words.join(" "))
    }
}

/// The message of a runtime's last log line, without its time and level.
pub fn last_message(stderr: &str) -> String {
    let line = stderr.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
    let message = line.split_once("msg=").map_or(line, |(_, message)| message);
    message.trim().trim_matches('"').replace("\\\"", "\"")
}

#[cfg(test)]
mod tests {
    use super::last_message;

    #[test]
    fn the_last_line_is_what_a_person_is_told() {
        let stderr = "time=\"x\" level=warning msg=\"a\"\ntime=\"x\" level=error msg=\"container does not exist\"\n";
        assert_eq!(last_message(stderr), "container does not exist");
        assert_eq!(last_message(""), "it said nothing");
    }
}
