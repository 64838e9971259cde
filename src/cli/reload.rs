//! `headgate reload`: the files that decide on access and lanes, read anew.

use clap::Args;
use serde_json::json;

use super::output::Output;
use super::{Global, small_runtime};

/// Make the running gateway read its users, keys, certificates and all rules anew
///
/// If a file is wrong, everything stays as it was. The same as SIGHUP, but says how it went.
#[derive(Args)]
pub(super) struct ReloadArgs {}

pub(super) fn run(_: ReloadArgs, global: &Global, output: &Output) -> anyhow::Result<()> {
    let client = global.client()?;
    small_runtime()?.block_on(client.reload())?;
    if output.json {
        output.value(&json!({ "reloaded": true }))
    } else {
        output.text("reloaded")
    }
}
