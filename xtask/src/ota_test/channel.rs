//! The channel that the gateways get their systems from: a cache of Nix's with a signed release beside it.

use super::server::Server;
use super::store::Store;
use crate::child;
use crate::vm::machine::HOST;
use anyhow::{Context, Result};
use serde_json::json;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

pub struct Channel {
    folder: PathBuf,
    pub server: Server,
    /// The service for this machine.
    headgate: PathBuf,
}

impl Channel {
    pub fn new(folder: PathBuf, headgate: PathBuf) -> Result<Self> {
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        let server = Server::start(folder.clone())?;
        Ok(Channel {
            folder,
            server,
            headgate,
        })
    }

    /// What gateways know it by.
    pub fn url(&self) -> String {
        format!("http://{HOST}:{}", self.server.port)
    }

    /// Offers `system` of the store from now on.
    pub fn release(&self, store: &Store, version: &str, system: &str) -> Result<()> {
        store.copy_to_cache(system, &self.folder)?;
        let release = json!({
            "schema": 1,
            "product": "headgate",
            "version": version,
            "system": "aarch64-linux",
            "toplevel": system,
        });
        let path = self.folder.join("release.json");
        fs::write(&path, release.to_string())
            .with_context(|| format!("cannot write {}", path.display()))?;
        child::run(
            Command::new(&self.headgate)
                .args(["release", "sign", "--key-file"])
                .arg(store.secret_key())
                .arg(&self.folder),
        )
    }
}
