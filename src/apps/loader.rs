//! From a component's bytes to code that can run: header, cache, compiler, world.

use std::path::Path;

use parking_lot::Mutex;

use super::AppError;
use super::aot::{AotCache, Cached};
use super::compile::{CompileError, Compiler};
use super::engine::{self, EngineConfig, LoadError, LoadedComponent, WasmEngine};
use super::error::ComponentProblem;
use super::metrics;
use super::precompiled::Precompiled;
use crate::store::ComponentId;

pub(super) struct Loader {
    engine: WasmEngine,
    cache: AotCache,
    /// Whether what was compiled is kept.
    caches: bool,
    config: EngineConfig,
    compiler: Compiler,
    /// One compilation at a time: each takes all CPUs and much memory.
    compiling: Mutex<()>,
}

impl Loader {
    pub(super) fn new(
        engine: WasmEngine,
        config: EngineConfig,
        cache: AotCache,
        caches: bool,
        compiler: Compiler,
    ) -> Loader {
        Loader {
            engine,
            cache,
            caches,
            config,
            compiler,
            compiling: Mutex::new(()),
        }
    }

    /// Loads a component from the cache; none if it isn't there, or not in a state to be trusted.
    pub(super) fn cached(
        &self,
        app: &str,
        id: ComponentId,
    ) -> Option<Result<LoadedComponent, AppError>> {
        if !self.caches {
            return None;
        }
        let compiled = match self.cache.get(id) {
            Cached::Hit(compiled) => compiled,
            Cached::Missing => return None,
            Cached::Rejected { path, why } => {
                tracing::warn!(app, path = %path.display(), "not using a compiled component: {why}; compiling anew");
                return None;
            }
        };
        // SAFETY: the seal says that `compile` below has written these bytes, and nobody can change
        // this copy of them.
        #[allow(unsafe_code)]
        match unsafe { self.engine.load_file(&compiled.path()) } {
            Ok(component) => {
                metrics::count_load(app, true);
                Some(Ok(component))
            }
            Err(LoadError::Component(problem)) => Some(Err(component_error(app, problem))),
            Err(LoadError::Unusable(why)) => {
                tracing::warn!(
                    app,
                    "a compiled component doesn't fit: {why}; compiling anew"
                );
                None
            }
        }
    }

    /// Loads a component, from the cache if it is there; else `bytes` are compiled, which may take
    /// seconds.
    pub(super) fn load(
        &self,
        app: &str,
        id: ComponentId,
        bytes: &[u8],
    ) -> Result<LoadedComponent, AppError> {
        match self.cached(app, id) {
            Some(result) => result,
            None => self.compile(app, id, bytes),
        }
    }

    /// Compiles a component that is not in the cache, puts it there, and loads it.
    pub(super) fn compile(
        &self,
        app: &str,
        id: ComponentId,
        bytes: &[u8],
    ) -> Result<LoadedComponent, AppError> {
        engine::check_header(bytes).map_err(|problem| component_error(app, problem))?;
        metrics::count_load(app, false);
        let compiled = {
            let _one_at_a_time = self.compiling.lock();
            let folder = self.cache.folder();
            self.compiler.compile(bytes, self.config, folder)
        };
        let compiled = compiled.map_err(|error| match error {
            CompileError::Component(problem) => component_error(app, problem),
            CompileError::Absent => AppError::NoCompiler {
                name: app.to_owned(),
            },
            CompileError::Compiler(reason) => AppError::Compiler {
                name: app.to_owned(),
                reason,
            },
        })?;
        // SAFETY: these are the bytes that the compiler, this very program, has just made.
        #[allow(unsafe_code)]
        let component = match unsafe { self.engine.load(&compiled) } {
            Ok(component) => component,
            Err(LoadError::Component(problem)) => return Err(component_error(app, problem)),
            Err(LoadError::Unusable(reason)) => {
                return Err(AppError::Compiler {
                    name: app.to_owned(),
                    reason: format!("it made code that doesn't fit: {reason}"),
                });
            }
        };
        if self.caches
            && let Err(error) = self.cache.put(id, &compiled)
        {
            let folder = self.cache.folder().display();
            tracing::warn!(app, %folder, %error, "can't keep the compiled component: it will be compiled anew at the next start");
        }
        Ok(component)
    }

    /// Loads a component that was compiled elsewhere and lies in the file `path`.
    pub(super) fn precompiled(
        &self,
        app: &str,
        path: &Path,
        file: &Precompiled,
    ) -> Result<LoadedComponent, AppError> {
        // SAFETY: these are bytes that `precompile` has made: the checksum says that they are whole,
        // and `preinstalled` has seen to it that only root and the gateway's user, who could replace
        // this program too, can have written them.
        #[allow(unsafe_code)]
        match unsafe { self.engine.load(&file.code) } {
            Ok(component) => Ok(component),
            Err(LoadError::Component(problem)) => Err(component_error(app, problem)),
            Err(LoadError::Unusable(reason)) => Err(AppError::Misfit {
                path: path.to_owned(),
                made_for: format!("{} ({})", file.header.target, file.header.cpu),
                made_by: file.header.compiled_by.clone(),
                reason,
            }),
        }
    }

    /// Forgets compiled components.
    pub(super) fn forget(&self, ids: &[ComponentId]) {
        ids.iter().for_each(|id| self.cache.remove(*id));
    }

    /// Forgets all compiled components but these.
    pub(super) fn keep_only(&self, used: &[ComponentId]) {
        self.cache.keep_only(if self.caches { used } else { &[] });
    }
}

fn component_error(app: &str, problem: ComponentProblem) -> AppError {
    AppError::Component {
        name: app.to_owned(),
        problem,
    }
}
