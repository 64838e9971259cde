//! The WASM engine: how it is set up, what fits its world, and live instances of apps.

#[cfg(feature = "compiler")]
use std::hash::{Hash, Hasher};
use std::path::Path;
use std::sync::Arc;

use wasmtime::component::types::ComponentItem;
use wasmtime::component::{Component, InstancePre, Linker, TypedFunc};
use wasmtime::{
    Config, Engine, InstanceAllocationStrategy, PoolConcurrencyLimitError, PoolingAllocationConfig,
    Store, Trap, WasmBacktrace,
};

use super::columns::{ColumnBuffers, ColumnsIn, ColumnsOut};
use super::error::ComponentProblem;
use super::host::{
    self, EventIn, EventOut, HostState, Interruption, Output, OwnedEvent, Tally, Watch,
};
use super::kv::AppState;
use super::log::AppLog;
use super::manifest::{DEFAULT_INSTANCES, DEFAULT_TABLE_ELEMENTS, Manifest};
use super::services::AppServices;
#[cfg(feature = "compiler")]
use super::target::Target;
use crate::event::Event;

/// Address space that a linear memory gets: as much as `limits.memory_pages` can ask for, so that a
/// memory never moves. Wasmtime's 4 GiB would fill the 39-bit address space of a small board.
const MEMORY_RESERVATION: u64 = 64 << 20;
const MEMORY_GUARD: u64 = 64 << 10;

/// Native stack of a call. Threads that run apps have the 2 MiB that Rust gives them.
const MAX_WASM_STACK: usize = 512 << 10;

/// Largest component that is taken, in bytes. A Python interpreter has 18 MB.
const MAX_COMPONENT_BYTES: usize = 64 << 20;

const CONFIGURE: &str = "configure";
const CONFIGURE_SIGNATURE: &str = "configure: func() -> result<_, string>";
const HANDLE: &str = "handle";
const HANDLE_SIGNATURE: &str = "handle: func(batch: list<event>) -> result<list<event>, string>";
const HANDLE_COLUMNS: &str = "handle-columns";
const HANDLE_COLUMNS_SIGNATURE: &str =
    "handle-columns: func(batch: event-columns) -> result<event-columns, string>";

type ConfigureFunc = TypedFunc<(), (Result<(), String>,)>;
type EventsFunc<'a> = TypedFunc<EventsParams<'a>, EventsResult>;
type EventsParams<'a> = (&'a [EventIn<'a>],);
type EventsResult = (Result<Vec<OwnedEvent>, String>,);
type ColumnsFunc<'a> = TypedFunc<ColumnsParams<'a>, ColumnsResult>;
type ColumnsParams<'a> = (ColumnsIn<'a>,);
type ColumnsResult = (Result<ColumnsOut, String>,);

/// What of the engine can be chosen.
#[derive(Clone, Copy, Debug)]
pub struct EngineConfig {
    /// Whether components may have SIMD instructions.
    pub simd: bool,
    /// Instances for which address space is reserved at once; 0 to map each when it is made.
    pub pool_instances: u32,
}

impl Default for EngineConfig {
    fn default() -> EngineConfig {
        EngineConfig {
            simd: true,
            pool_instances: 0,
        }
    }
}

/// The one place where the engine's settings stand: the compiler and the runtime must agree. What they need
/// not agree on is [`pool`].
fn config(chosen: EngineConfig) -> Config {
    let mut config = Config::new();
    if !chosen.simd {
        config.wasm_simd(false).wasm_relaxed_simd(false);
    }
    config
        .epoch_interruption(true)
        .memory_reservation(MEMORY_RESERVATION)
        .memory_may_move(false)
        .memory_guard_size(MEMORY_GUARD)
        .guard_before_linear_memory(false)
        .max_wasm_stack(MAX_WASM_STACK)
        .generate_address_map(false)
        // For debuggers; wasmtime's own backtraces follow frame pointers.
        .native_unwind_info(false);
    config
}

/// Room for so many instances, reserved at once. Components as the toolchains make them have one memory and
/// one or two tables.
fn pool(instances: u32) -> InstanceAllocationStrategy {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(instances)
        .total_core_instances(instances * DEFAULT_INSTANCES)
        .total_memories(instances * 2)
        .max_memory_size(MEMORY_RESERVATION as usize)
        .total_tables(instances * 4)
        .table_elements(DEFAULT_TABLE_ELEMENTS as usize);
    InstanceAllocationStrategy::Pooling(pool)
}

/// Compiles a component, for this machine with all that its CPU can do if there is no `target`.
/// Costs seconds of CPU time and hundreds of megabytes for a big one: see [`super::compile`].
#[cfg(feature = "compiler")]
pub(super) fn precompile(
    component: &[u8],
    target: Option<&Target>,
    config: EngineConfig,
) -> Result<Vec<u8>, ComponentProblem> {
    compiler(target, config)
        .and_then(|engine| engine.precompile_component(component))
        .map_err(|error| ComponentProblem::Invalid {
            reason: format!("{error:#}"),
        })
}

/// Says what keeps a component from being an app, by compiling it for this machine.
#[cfg(feature = "compiler")]
pub(super) fn check_world(component: &[u8]) -> Result<(), ComponentProblem> {
    let invalid = |reason| ComponentProblem::Invalid { reason };
    let compiled = precompile(component, None, EngineConfig::default())?;
    let engine =
        WasmEngine::new(EngineConfig::default()).map_err(|error| invalid(format!("{error:#}")))?;
    // SAFETY: compiled above.
    #[allow(unsafe_code)]
    match unsafe { engine.load(&compiled) } {
        Ok(_) => Ok(()),
        Err(LoadError::Component(problem)) => Err(problem),
        Err(LoadError::Unusable(reason)) => Err(invalid(reason)),
    }
}

#[cfg(feature = "compiler")]
fn compiler(target: Option<&Target>, chosen: EngineConfig) -> wasmtime::Result<Engine> {
    let mut config = config(chosen);
    if let Some(target) = target {
        config.target(target.triple())?;
        for feature in target.features() {
            // SAFETY: code that needs what a CPU lacks is dangerous to run, not to make; and before
            // it runs, wasmtime checks each of these flags against the CPU that it is on.
            #[allow(unsafe_code)]
            unsafe {
                config.cranelift_flag_enable(feature);
            }
        }
    }
    Engine::new(&config)
}

/// Says what can be said of a file before it is compiled.
pub(super) fn check_header(component: &[u8]) -> Result<(), ComponentProblem> {
    // Four bytes of magic; two of version and two of layer: 0 for a core module, 1 for a component.
    let Some(version) = component
        .strip_prefix(b"\0asm")
        .and_then(|rest| rest.first_chunk::<4>())
    else {
        return Err(ComponentProblem::NotWasm);
    };
    match version {
        [0x0d, 0, 1, 0] if component.len() > MAX_COMPONENT_BYTES => Err(ComponentProblem::TooBig {
            bytes: component.len(),
            max: MAX_COMPONENT_BYTES,
        }),
        [0x0d, 0, 1, 0] => Ok(()),
        [1, 0, 0, 0] => Err(ComponentProblem::CoreModule),
        _ => Err(ComponentProblem::UnknownVersion {
            version: u32::from_le_bytes(*version),
        }),
    }
}

/// The engine with the host's functions. Cheap to clone.
#[derive(Clone)]
pub(super) struct WasmEngine {
    engine: Engine,
    linker: Arc<Linker<HostState>>,
}

impl WasmEngine {
    pub(super) fn new(chosen: EngineConfig) -> wasmtime::Result<WasmEngine> {
        let mut config = config(chosen);
        if chosen.pool_instances > 0 {
            config.allocation_strategy(pool(chosen.pool_instances));
        }
        let engine = Engine::new(&config)?;
        let mut linker = Linker::new(&engine);
        host::add_to_linker(&mut linker)?;
        Ok(WasmEngine {
            engine,
            linker: Arc::new(linker),
        })
    }

    pub(super) fn engine(&self) -> &Engine {
        &self.engine
    }

    /// A short hash of all that decides whether compiled code fits this engine.
    #[cfg(feature = "compiler")]
    pub(super) fn compatibility(&self) -> String {
        struct Blake3(blake3::Hasher);
        impl Hasher for Blake3 {
            fn write(&mut self, bytes: &[u8]) {
                self.0.update(bytes);
            }
            fn finish(&self) -> u64 {
                let hash = self.0.finalize();
                u64::from_le_bytes(*hash.as_bytes().first_chunk().expect("32 bytes"))
            }
        }
        let mut hasher = Blake3(blake3::Hasher::new());
        self.engine
            .precompile_compatibility_hash()
            .hash(&mut hasher);
        format!("{:016x}", hasher.finish())
    }

    /// Wasmtime has that hash only with a compiler. Without one nothing is put into the cache, and
    /// what is in it from before counts for nothing.
    #[cfg(not(feature = "compiler"))]
    pub(super) fn compatibility(&self) -> String {
        "no-compiler".to_owned()
    }

    /// Loads what [`precompile`] has made, and checks that it fits the world of an app.
    ///
    /// # Safety
    /// `compiled` is native code: it must come from [`precompile`], unchanged.
    #[allow(unsafe_code)]
    pub(super) unsafe fn load(&self, compiled: &[u8]) -> Result<LoadedComponent, LoadError> {
        // SAFETY: the caller's promise is the one that is asked for.
        self.fit(unsafe { Component::deserialize(&self.engine, compiled) })
    }

    /// [`WasmEngine::load`] from a file, which is mapped: it must not change as long as it is in use.
    #[allow(unsafe_code)]
    pub(super) unsafe fn load_file(&self, path: &Path) -> Result<LoadedComponent, LoadError> {
        // SAFETY: the caller's promise is the one that is asked for.
        self.fit(unsafe { Component::deserialize_file(&self.engine, path) })
    }

    fn fit(&self, component: wasmtime::Result<Component>) -> Result<LoadedComponent, LoadError> {
        let component = component.map_err(|error| LoadError::Unusable(format!("{error:#}")))?;
        self.check_imports(&component)?;
        let pre = self.linker.instantiate_pre(&component).map_err(|error| {
            // The linker's message begins with the import that it is about.
            let reason = format!("{error:#}");
            let import = reason.split('`').nth(1).unwrap_or("?").to_owned();
            ComponentProblem::WrongImport { import, reason }
        })?;
        check_exports(&pre)?;
        Ok(LoadedComponent { pre })
    }

    fn check_imports(&self, component: &Component) -> Result<(), ComponentProblem> {
        let unknown = |import: String| ComponentProblem::UnknownImport {
            import,
            offered: host::INTERFACES.join(", "),
        };
        let world = component.component_type();
        for (name, item) in world.imports(&self.engine) {
            let ComponentItem::ComponentInstance(instance) = item.ty else {
                return Err(unknown(name.to_owned()));
            };
            // The version is left to the linker, which knows which ones are compatible.
            let interface = |name: &str| name.split('@').next().map(str::to_owned);
            let Some(known) = host::INTERFACES
                .iter()
                .find(|known| interface(known) == interface(name))
            else {
                return Err(unknown(name.to_owned()));
            };
            for (function, item) in instance.exports(&self.engine) {
                if matches!(item.ty, ComponentItem::ComponentFunc(_))
                    && !host::FUNCTIONS.contains(&(known, function))
                {
                    return Err(unknown(format!("{name}#{function}")));
                }
            }
        }
        Ok(())
    }
}

fn check_exports(pre: &InstancePre<HostState>) -> Result<(), ComponentProblem> {
    let world = pre.component().component_type();
    let function = |export, signature| {
        let item = world.get_export(pre.engine(), export).map(|item| item.ty);
        match item {
            Some(ComponentItem::ComponentFunc(function)) => Ok(function),
            _ => Err(ComponentProblem::MissingExport { export, signature }),
        }
    };
    let types = pre.instance_type();
    let wrong = |export, signature| {
        move |error: wasmtime::Error| ComponentProblem::WrongSignature {
            export,
            signature,
            reason: format!("{error:#}"),
        }
    };
    function(CONFIGURE, CONFIGURE_SIGNATURE)?
        .typecheck::<(), (Result<(), String>,)>(&types)
        .map_err(wrong(CONFIGURE, CONFIGURE_SIGNATURE))?;
    match function(HANDLE_COLUMNS, HANDLE_COLUMNS_SIGNATURE) {
        Ok(columns) => columns
            .typecheck::<ColumnsParams, ColumnsResult>(&types)
            .map_err(wrong(HANDLE_COLUMNS, HANDLE_COLUMNS_SIGNATURE)),
        Err(_) => function(HANDLE, HANDLE_SIGNATURE)?
            .typecheck::<EventsParams, EventsResult>(&types)
            .map_err(wrong(HANDLE, HANDLE_SIGNATURE)),
    }
}

/// Why compiled code can't be used.
#[derive(Debug)]
pub(super) enum LoadError {
    /// It isn't for this engine or this CPU: compile anew.
    Unusable(String),
    /// The component itself is wrong.
    Component(ComponentProblem),
}

impl From<ComponentProblem> for LoadError {
    fn from(problem: ComponentProblem) -> LoadError {
        LoadError::Component(problem)
    }
}

/// A component that fits the world, ready to make instances of.
#[derive(Clone)]
pub(super) struct LoadedComponent {
    pre: InstancePre<HostState>,
}

/// A live instance of an app.
pub(super) struct Instance {
    store: Store<HostState>,
    handler: Handler,
}

/// How it takes batches.
enum Handler {
    Events(EventsFunc<'static>),
    Columns(ColumnsFunc<'static>, ColumnBuffers),
}

/// How a call has failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum CallError {
    /// The instance is dead.
    Trapped {
        message: String,
        /// The functions that it was in, innermost first, a line each.
        backtrace: String,
    },
    /// The app returned an error; the instance lives on.
    Returned(String),
}

impl CallError {
    pub(super) fn message(&self) -> &str {
        let (CallError::Trapped { message, .. } | CallError::Returned(message)) = self;
        message
    }

    /// Where it was; empty if that is not known.
    pub(super) fn backtrace(&self) -> &str {
        match self {
            CallError::Trapped { backtrace, .. } => backtrace,
            CallError::Returned(_) => "",
        }
    }
}

impl Instance {
    /// Makes an instance and runs its `configure`. Returns what that has published, too.
    pub(super) fn start(
        component: &LoadedComponent,
        manifest: Arc<Manifest>,
        log: Arc<AppLog>,
        watch: Arc<Watch>,
        services: Arc<AppServices>,
    ) -> StartResult {
        let kept = services.state();
        let state = HostState::new(manifest, log, watch, services);
        let mut store = Store::new(component.pre.engine(), state);
        store.limiter(|state| &mut state.limiter);
        store.epoch_deadline_callback(|mut store| store.data_mut().watch.look());
        store.set_hostcall_fuel(host::MAX_COPY_BYTES);
        store.data_mut().begin_call(kept);
        store.set_epoch_deadline(1);
        let opened = store.data_mut().open_devices();
        let result = opened.and_then(|()| Self::configure(&mut store, component));
        let outputs = match &result {
            Ok(_) => {
                store.data_mut().stage_state_version();
                store.data_mut().commit(&[]);
                store.data_mut().take_outputs(std::iter::empty())
            }
            Err(_) => Vec::new(),
        };
        StartResult {
            outputs,
            tally: store.data_mut().take_tally(),
            refused_growth: store.data().limiter.refused(),
            instance: result.map(|handler| Instance { store, handler }),
        }
    }

    fn configure(
        store: &mut Store<HostState>,
        component: &LoadedComponent,
    ) -> Result<Handler, String> {
        let instance = component.pre.instantiate(&mut *store).map_err(|error| {
            let limits = &store.data().manifest.limits;
            // Of this limit wasmtime itself tells, and only as a text.
            let why = match error.to_string().contains("instance count too high") {
                true => format!(
                    "it has more core instances than `limits.instances` ({})",
                    limits.instances
                ),
                false => explain(&error),
            };
            format!("it can't be instantiated: {why}")
        })?;
        let function = |error: wasmtime::Error| format!("an export has changed: {error:#}");
        let configure: ConfigureFunc = instance
            .get_typed_func(&mut *store, CONFIGURE)
            .map_err(function)?;
        let columns = instance.get_func(&mut *store, HANDLE_COLUMNS);
        let handler = match columns {
            Some(columns) => columns
                .typed(&*store)
                .map(|columns| Handler::Columns(columns, ColumnBuffers::default())),
            None => instance
                .get_typed_func(&mut *store, HANDLE)
                .map(Handler::Events),
        };
        let handler = handler.map_err(function)?;
        match configure.call(&mut *store, ()) {
            Ok((Ok(()),)) => Ok(handler),
            Ok((Err(message),)) => Err(format!("`configure` returned an error: {message}")),
            Err(error) => Err(format!("`configure` {}", explain(&error))),
        }
    }

    /// Runs a batch, with what the app keeps for it. On an error, nothing that the call has handed out remains.
    pub(super) fn handle(
        &mut self,
        batch: &[Event],
        kept: Arc<AppState>,
    ) -> Result<Vec<Output>, CallError> {
        let store = &mut self.store;
        store.data_mut().begin_call(kept);
        store.data_mut().arrive(batch);
        store.set_epoch_deadline(1);
        let returned = |message| format!("`handle` returned an error: {message}");
        let result = match &mut self.handler {
            Handler::Events(handle) => {
                let events: Vec<_> = batch.iter().map(EventIn::from).collect();
                // A `TypedFunc` is covariant in its parameters: this one takes shorter borrows, too.
                let handle: &EventsFunc<'_> = handle;
                let result = handle.call(&mut *store, (&events,));
                result.map(|(result,)| {
                    let events = result.map_err(returned)?.into_iter();
                    Ok(store.data_mut().take_outputs(events.map(EventOut::from)))
                })
            }
            Handler::Columns(handle, buffers) => {
                let handle: &ColumnsFunc<'_> = handle;
                let result = handle.call(&mut *store, (buffers.fill(batch),));
                result.map(|(result,)| {
                    let columns = result.map_err(returned)?;
                    columns
                        .check()
                        .map_err(|why| format!("`{HANDLE_COLUMNS}` returned no batch: {why}"))?;
                    Ok(store.data_mut().take_outputs(columns.events()))
                })
            }
        };
        match result {
            Ok(Ok(outputs)) => {
                store.data_mut().commit(batch);
                Ok(outputs)
            }
            Ok(Err(message)) => {
                store.data_mut().abandon();
                Err(CallError::Returned(message))
            }
            Err(error) => Err(CallError::Trapped {
                message: format!("`handle` {}", explain(&error)),
                backtrace: backtrace(&error),
            }),
        }
    }

    /// What the last call was refused.
    pub(super) fn take_tally(&mut self) -> Tally {
        self.store.data_mut().take_tally()
    }

    /// Linear memory, in bytes.
    pub(super) fn memory_bytes(&self) -> usize {
        self.store.data().limiter.bytes()
    }

    /// Growths that were refused to this instance.
    pub(super) fn refused_growth(&self) -> u64 {
        self.store.data().limiter.refused()
    }
}

/// What became of a start.
pub(super) struct StartResult {
    pub(super) instance: Result<Instance, String>,
    pub(super) outputs: Vec<Output>,
    pub(super) tally: Tally,
    pub(super) refused_growth: u64,
}

/// A trap in one line: what it was, and the innermost function by name.
fn explain(error: &wasmtime::Error) -> String {
    if let Some(interruption) = error.downcast_ref::<Interruption>() {
        return interruption.to_string();
    }
    if error.is::<PoolConcurrencyLimitError>() {
        return "all instances of `apps.pool_instances` are in use; raise it, or set it to 0"
            .to_owned();
    }
    let mut text = match error.downcast_ref::<Trap>() {
        Some(Trap::StackOverflow) => {
            format!("overflowed its stack of {} KiB", MAX_WASM_STACK / 1024)
        }
        Some(trap) => {
            let text = trap.to_string();
            format!(
                "trapped: {}",
                text.strip_prefix("wasm trap: ").unwrap_or(&text)
            )
        }
        None => format!("failed: {:#}", error.root_cause()),
    };
    if let Some(function) = functions(error).next() {
        text.push_str(", in ");
        text.push_str(&function);
    }
    text
}

/// Most lines of a backtrace.
const MAX_FRAMES: usize = 16;

fn backtrace(error: &wasmtime::Error) -> String {
    let lines = functions(error).take(MAX_FRAMES);
    let lines: Vec<_> = lines.map(|function| format!("  in {function}")).collect();
    lines.join("\n")
}

/// The functions that a call was in when it trapped, innermost first, as the source names them.
fn functions(error: &wasmtime::Error) -> impl Iterator<Item = String> {
    let trace = error.downcast_ref::<WasmBacktrace>();
    let frames = trace.map_or(&[][..], WasmBacktrace::frames);
    let names = frames.iter().filter_map(|frame| frame.func_name());
    names.map(|name| format!("{:#}", rustc_demangle::demangle(name)))
}
