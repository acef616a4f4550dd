//! What every agent does with the system that runs it.

use tokio::signal::unix::{SignalKind, signal};

/// Tells the service manager that the agent answers. Without one it does nothing.
pub fn say_ready() {
    notify(sd_notify::NotifyState::Ready);
}

/// Waits until the agent is told to end (SIGTERM, SIGINT), and tells the service manager so.
pub async fn told_to_end() {
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    notify(sd_notify::NotifyState::Stopping);
}

fn notify(state: sd_notify::NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::debug!(%error, "can't tell the service manager");
    }
}
