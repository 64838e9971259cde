//! `headgate run`: the gateway itself, in the foreground.

use std::ffi::OsString;
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::Global;
use crate::config::{Config, Override};
use crate::gateway;
use crate::gateway::ReloadError;

/// Run the gateway in the foreground, until SIGTERM or Ctrl-C
///
/// Every key of the configuration can be set by an environment variable too; `headgate config
/// schema --markdown` lists them.
#[derive(Args)]
pub(super) struct RunArgs {
    /// Folder of the database
    #[arg(long, value_name = "FOLDER")]
    store: Option<OsString>,
    /// Where MQTT clients connect without TLS, or "off"
    #[arg(long, value_name = "HOST:PORT")]
    mqtt_listen: Option<OsString>,
    /// Where metrics are served, or "off"
    #[arg(long, value_name = "HOST:PORT")]
    metrics_listen: Option<OsString>,
    /// Unix socket of the admin API; the same as --socket
    #[arg(long, value_name = "PATH", conflicts_with = "socket")]
    admin_socket: Option<OsString>,
    /// error, warn, info, debug, trace, or directives such as info,headgate::apps=debug
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<OsString>,
    /// text or json
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<OsString>,
}

impl RunArgs {
    fn overrides(self) -> Vec<Override> {
        [
            ("store.path", "--store", self.store),
            ("mqtt.listen", "--mqtt-listen", self.mqtt_listen),
            ("metrics.listen", "--metrics-listen", self.metrics_listen),
            ("admin.socket", "--admin-socket", self.admin_socket),
            ("log.level", "--log-level", self.log_level),
            ("log.format", "--log-format", self.log_format),
        ]
        .into_iter()
        .filter_map(|(key, flag, value)| value.map(|value| Override { key, value, flag }))
        .collect()
    }
}

pub(super) fn run(args: RunArgs, global: &Global) -> anyhow::Result<()> {
    let resolved = Config::load(global.source(args.overrides()))?;
    let config = &resolved.config;
    crate::logging::init(&config.log.level, config.log.format)?;
    match &resolved.file {
        Some(file) => tracing::info!(file = %file.display(), "configuration read"),
        None => tracing::info!("no configuration file: defaults, environment and flags apply"),
    }
    let runtime = runtime()?;
    runtime.block_on(async {
        // Before the start, so that a signal that comes meanwhile isn't lost.
        let stop = stop_signal()?;
        let hangup = signal(SignalKind::hangup()).context("listening for SIGHUP")?;
        let gateway = gateway::build(config).await?;
        let reloads = tokio::spawn(reload_at(hangup, gateway.reloader()));
        gateway.run(stop).await;
        reloads.abort();
        anyhow::Ok(())
    })
}

/// Reloads at each SIGHUP; how it went is in the log.
async fn reload_at(
    mut hangup: Signal,
    reload: impl Fn() -> Result<(), ReloadError> + Send + Sync + 'static,
) {
    let reload = Arc::new(reload);
    while hangup.recv().await.is_some() {
        let reload = reload.clone();
        // Reading files blocks. It doesn't panic.
        let _ = tokio::task::spawn_blocking(move || reload()).await;
    }
}

/// The runtime of a gateway.
pub(super) fn runtime() -> anyhow::Result<Runtime> {
    Builder::new_multi_thread()
        .worker_threads(gateway::edge_threads())
        .enable_all()
        .build()
        .context("starting the runtime")
}

/// Resolves at the first SIGTERM or Ctrl-C.
pub(super) fn stop_signal() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
