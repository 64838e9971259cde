//! What workers want to have done that takes longer than a turn may: records written, components
//! loaded. Each in a thread of its own, for it is seldom.

use std::sync::Arc;
use std::thread::{self, JoinHandle};

use parking_lot::Mutex;

use super::app::App;
use super::compile_and_start;
use super::kv::AppState;
use super::loader::Loader;
use crate::store::{ComponentId, Store};

pub(super) struct Upkeep {
    store: Store,
    loader: Arc<Loader>,
    /// Those that write records.
    writers: Mutex<Vec<JoinHandle<()>>>,
}

impl Upkeep {
    pub(super) fn new(store: Store, loader: Arc<Loader>) -> Upkeep {
        Upkeep {
            store,
            loader,
            writers: Mutex::default(),
        }
    }

    /// Notes that a version has passed its trial. If that can't be written, the trial begins anew
    /// with the next start of the gateway.
    pub(super) fn trust(&self, name: &Arc<str>, component: ComponentId) {
        let (name, store) = (name.clone(), self.store.clone());
        self.write(move || {
            if let Err(error) = store.trust_app(&name, component) {
                tracing::error!(app = &*name, %error, "cannot note that the app's new version is good");
            }
        });
    }

    /// Notes that the version before is back, with what the app had kept by then if that was
    /// `restored`. If it can't be written, the new one is tried again with the next start of the
    /// gateway.
    pub(super) fn roll_back(
        &self,
        name: &Arc<str>,
        component: ComponentId,
        restored: Option<Arc<AppState>>,
    ) {
        let (name, store, loader) = (name.clone(), self.store.clone(), self.loader.clone());
        self.write(move || {
            if let Some(state) = &restored {
                state.close();
            }
            match store.roll_back_app(&name, component, restored.is_some()) {
                Ok(unused) => loader.forget(&unused.unwrap_or_default()),
                Err(error) => {
                    tracing::error!(app = &*name, %error, "cannot note that the app's version before is back");
                }
            }
            if let Some(state) = restored {
                state.reopen();
            }
        });
    }

    /// Waits until all is written.
    pub(super) fn settle(&self) {
        let writers = std::mem::take(&mut *self.writers.lock());
        for writer in writers {
            if writer.join().is_err() {
                tracing::error!("a thread that writes apps' records has panicked");
            }
        }
    }

    /// Loads what the app is to be started with, and starts it, unless somebody changes its state
    /// meanwhile.
    pub(super) fn load(&self, app: Arc<App>, generation: u64) {
        let (store, loader) = (self.store.clone(), self.loader.clone());
        let spawned = thread::Builder::new()
            .name("apps-loader".into())
            .spawn(move || compile_and_start(&store, &loader, &app, generation));
        if let Err(error) = spawned {
            tracing::error!(%error, "cannot start a thread that loads an app");
        }
    }

    fn write(&self, write: impl FnOnce() + Send + 'static) {
        let spawned = thread::Builder::new()
            .name("apps-record".into())
            .spawn(write);
        match spawned {
            Ok(writer) => self.writers.lock().push(writer),
            Err(error) => tracing::error!(%error, "cannot start a thread that writes a record"),
        }
    }
}
