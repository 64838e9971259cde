//! `headgate:app/state`.

use wasmtime::StoreContextMut;
use wasmtime::component::Linker;

use super::HostState;

pub(super) const STATE: &str = "headgate:app/state@0.1.0";

pub(super) fn add_to_linker(linker: &mut Linker<HostState>) -> wasmtime::Result<()> {
    linker
        .instance(STATE)?
        .func_wrap("version", |store: StoreContextMut<HostState>, (): ()| {
            Ok((store.data().state_version(),))
        })
}

impl HostState {
    /// What an app is told of what it finds. An app that finds nothing has nothing to bring up to
    /// date.
    fn state_version(&self) -> u32 {
        let kept = self.state.version();
        kept.unwrap_or(self.manifest.state_version)
    }

    /// `configure` has ended well: what is kept is in this version's format now.
    pub(in crate::apps) fn stage_state_version(&mut self) {
        let version = self.manifest.state_version;
        if self.state.unreadable().is_some() {
            return;
        }
        // Most apps never change it, and need nothing staged for that.
        if self.state.version().unwrap_or(1) != version {
            let staged = self.call.staged(&self.manifest.limits);
            self.state.stage_version(&mut staged.state, version);
        }
    }
}
