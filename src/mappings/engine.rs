//! The JavaScript engine (QuickJS-ng) and the sandbox around it.
//!
//! An expression gets the values of its sources and gives a JSON text, and leaves nothing behind. What
//! runs it has no parser: expressions are compiled in a context of their own and handed over as byte
//! code, so there is nothing that could make code of a string, whichever way one gets hold of
//! `Function`. Everything that is built in is frozen. Memory, stack and time are bounded; an engine
//! that was stopped at a bound is thrown away.
//!
//! There is one engine a thread, made when it is first needed. It must never be entered while it runs:
//! nothing here calls back.
#![allow(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::ffi::{CStr, CString, c_int};
use std::ptr::{self, NonNull};
use std::slice;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rquickjs::context::intrinsic;
use rquickjs::{Context, Runtime, qjs};
use rustc_hash::FxHashMap;

use super::payload;
use super::value::Value;

/// What all expressions of a thread may hold at a time, their code with it. An empty engine takes
/// less than one MiB.
pub const MEMORY_BYTES: usize = 32 << 20;

/// Enough for a thousand calls within each other, as many as upstream allows; well below the 2 MiB of
/// a thread.
const STACK_BYTES: usize = 768 << 10;

/// Longest result, as JSON.
pub const MAX_RESULT_BYTES: usize = 1 << 20;

/// Deepest result and deepest value of a source that an expression can have, both converted by
/// recursion.
const MAX_DEPTH: usize = 500;

/// Why an expression has no result that can be sent.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Failure {
    #[error("the result is undefined")]
    Undefined,
    #[error("the result is null")]
    Null,
    #[error("the result is or has in it {0}, which JSON can't hold")]
    NotFinite(f64),
    #[error("the result is or has in it a {0}, which JSON can't hold")]
    NoJson(&'static str),
    #[error("the result is nested more than {MAX_DEPTH} deep, or has itself in it")]
    TooDeep,
    #[error("the result takes more than {MAX_RESULT_BYTES} bytes of JSON")]
    TooLarge,
    #[error("{0}")]
    Thrown(Arc<str>),
    #[error("it took longer than {0:?}")]
    TimeLimit(Duration),
    #[error("the expressions of its mapping took too long together")]
    Overrun,
    #[error("it needs more than {} MiB of memory", MEMORY_BYTES >> 20)]
    Memory,
    #[error("a source's value is nested more than {MAX_DEPTH} deep")]
    SourceTooDeep,
    #[error("the JavaScript engine can't start: {0}")]
    NoEngine(Arc<str>),
}

/// Why the engine's own parser refuses a text.
#[derive(Debug, PartialEq)]
pub enum Rejection {
    /// Its parser ran out of stack.
    TooDeep,
    Syntax(String),
}

/// A compiled expression; any thread may run it.
#[derive(Debug, Clone)]
pub struct Script(Arc<Compiled>);

#[derive(Debug)]
struct Compiled {
    /// Tells scripts apart in an engine's table of those that it has loaded.
    id: u64,
    bytecode: Vec<u8>,
    /// It might change global variables: what ran it is thrown away.
    taints: bool,
}

/// Compiles `source` as a sloppy script. `stack_bytes` of the calling thread's stack are the parser's.
pub fn compile(source: &str, taints: bool, stack_bytes: usize) -> Result<Script, Rejection> {
    let broken = |error: rquickjs::Error| Rejection::Syntax(error.to_string());
    let runtime = Runtime::new().map_err(broken)?;
    runtime.set_memory_limit(MEMORY_BYTES);
    runtime.set_max_stack_size(stack_bytes);
    let context = Context::custom::<(
        intrinsic::Eval,
        intrinsic::RegExpCompiler,
        intrinsic::RegExp,
    )>(&runtime)
    .map_err(broken)?;
    context.with(|ctx| {
        // SAFETY: the context is alive and entered.
        let bytecode = unsafe { Raw(ctx.as_raw().as_ptr()).compile(source) }?;
        Ok(Script(Arc::new(Compiled {
            id: next_id(),
            bytecode,
            taints,
        })))
    })
}

fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Runs `script` with `variables` as globals and appends its result to `out` as Go's JSON; `out` is as
/// it was if there is none.
pub fn evaluate<'v>(
    script: &Script,
    variables: impl Iterator<Item = (&'v str, &'v Value)>,
    time_limit: Duration,
    out: &mut Vec<u8>,
) -> Result<(), Failure> {
    thread_local! {
        static ENGINE: RefCell<Option<Engine>> = const { RefCell::new(None) };
    }
    ENGINE.with_borrow_mut(|slot| {
        let engine = match slot {
            Some(engine) => engine,
            None => slot.insert(
                Engine::new().map_err(|error| Failure::NoEngine(error.to_string().into()))?,
            ),
        };
        let start = out.len();
        let result = engine.evaluate(&script.0, variables, time_limit, out);
        if result.is_err() {
            out.truncate(start);
        }
        if matches!(result, Err(Failure::TimeLimit(_) | Failure::Memory)) {
            *slot = None;
        } else if script.0.taints {
            engine.renew();
        }
        result
    })
}

/// Forgets what this thread's engine has loaded of scripts that nobody has any more. They take memory
/// until then.
struct Engine {
    // Freed before the context that it lives in.
    loaded: Loaded,
    context: Option<Context>,
    runtime: Runtime,
}

thread_local! {
    /// When the evaluation that runs on this thread has to end, and whether it was stopped for that.
    static DEADLINE: Cell<Option<Instant>> = const { Cell::new(None) };
    static TIME_LIMIT: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    /// The thread's CPU time when the deadline came for the first time.
    static CPU_AT_DEADLINE: Cell<Option<Duration>> = const { Cell::new(None) };
    static IS_OVER: Cell<bool> = const { Cell::new(false) };
}

fn start_clock(time_limit: Duration) {
    IS_OVER.set(false);
    TIME_LIMIT.set(time_limit);
    CPU_AT_DEADLINE.set(None);
    DEADLINE.set(Some(Instant::now() + time_limit));
}

/// On a busy machine the thread may have waited all the time. So at the deadline it gets the same time
/// again, as CPU time: to ask for that from the start would cost more than most expressions.
fn is_over() -> bool {
    if DEADLINE
        .get()
        .is_none_or(|deadline| Instant::now() < deadline)
    {
        return false;
    }
    let now = cpu_time();
    let since = CPU_AT_DEADLINE.get().unwrap_or_else(|| {
        CPU_AT_DEADLINE.set(Some(now));
        now
    });
    let is_over = now.saturating_sub(since) >= TIME_LIMIT.get();
    if is_over {
        IS_OVER.set(true);
    }
    is_over
}

/// Of this thread.
fn cpu_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: it writes to `time`, and this clock is there on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// The name under which scripts call [`tick`]; no expression may have it in it.
pub(super) const TICK: &str = "$headgate_tick";

/// Looks at the time. The engine does that itself, but only after each 10,000 calls and turns of loops,
/// and each of these may do something that takes long.
unsafe extern "C" fn tick(
    context: *mut qjs::JSContext,
    _this: qjs::JSValue,
    _count: c_int,
    _arguments: *mut qjs::JSValue,
) -> qjs::JSValue {
    if !is_over() {
        return qjs::JS_UNDEFINED;
    }
    // SAFETY: the engine calls this with a context that is alive.
    unsafe {
        qjs::JS_ThrowInternalError(context, c"interrupted".as_ptr());
        let exception = qjs::JS_GetException(context);
        // Else the expression could catch it and go on.
        qjs::JS_SetUncatchableError(context, exception);
        qjs::JS_Throw(context, exception)
    }
}

/// Byte code by the id of its script, and atoms by name.
#[derive(Default)]
struct Loaded {
    scripts: FxHashMap<u64, (std::sync::Weak<Compiled>, qjs::JSValue)>,
    atoms: FxHashMap<Box<str>, qjs::JSAtom>,
    classes: FxHashMap<qjs::JSClassID, Class>,
}

/// Names and scripts that one engine remembers at most; beyond that it starts anew.
const MAX_LOADED: usize = 16_384;

/// The objects whose JSON is not simply that of their properties.
#[derive(Clone, Copy, PartialEq)]
enum Class {
    Plain,
    Array,
    Date,
    Map,
    Set,
    Boxed,
    Bytes,
    Numbers,
    Floats,
    Opaque,
}

impl Engine {
    fn new() -> Result<Engine, rquickjs::Error> {
        let runtime = Runtime::new()?;
        runtime.set_memory_limit(MEMORY_BYTES);
        runtime.set_max_stack_size(STACK_BYTES);
        runtime.set_interrupt_handler(Some(Box::new(is_over)));
        Ok(Engine {
            loaded: Loaded::default(),
            context: None,
            runtime,
        })
    }

    /// Forgets all that was loaded, and the globals.
    fn renew(&mut self) {
        if let Some(context) = self.context.take() {
            let loaded = std::mem::take(&mut self.loaded);
            context.with(|ctx| {
                let raw = Raw(ctx.as_raw().as_ptr());
                for (_, script) in loaded.scripts.into_values() {
                    // SAFETY: the table owned it, in this context.
                    unsafe { qjs::JS_FreeValue(raw.0, script) };
                }
                for atom in loaded.atoms.into_values() {
                    // SAFETY: as above.
                    unsafe { qjs::JS_FreeAtom(raw.0, atom) };
                }
            });
        }
    }

    fn evaluate<'v>(
        &mut self,
        script: &Arc<Compiled>,
        variables: impl Iterator<Item = (&'v str, &'v Value)>,
        time_limit: Duration,
        out: &mut Vec<u8>,
    ) -> Result<(), Failure> {
        if self.loaded.scripts.len() + self.loaded.atoms.len() > MAX_LOADED {
            self.renew();
        }
        if self.context.is_none() {
            // Not what makes code of strings, nor what is neither in upstream's engine.
            type Intrinsics = (
                intrinsic::Date,
                intrinsic::RegExpCompiler,
                intrinsic::RegExp,
                intrinsic::Json,
                intrinsic::MapSet,
                intrinsic::TypedArrays,
                intrinsic::Promise,
            );
            let unusable = |error: rquickjs::Error| Failure::NoEngine(error.to_string().into());
            let context = Context::custom::<Intrinsics>(&self.runtime).map_err(unusable)?;
            start_clock(SETUP_TIME);
            let hardened = hardening()
                .map_err(|rejection| Failure::NoEngine(format!("{rejection:?}").into()))?;
            context
                .with(|ctx| {
                    // SAFETY: the context is alive and entered.
                    unsafe {
                        let raw = Raw(ctx.as_raw().as_ptr());
                        let name = CString::new(TICK).expect("it has no NUL");
                        let function = qjs::JS_NewCFunction2(
                            raw.0,
                            Some(tick),
                            name.as_ptr(),
                            0,
                            qjs::JSCFunctionEnum_JS_CFUNC_generic,
                            0,
                        );
                        let global = qjs::JS_GetGlobalObject(raw.0);
                        qjs::JS_SetPropertyStr(raw.0, global, name.as_ptr(), function);
                        qjs::JS_FreeValue(raw.0, global);
                        let code = raw.load(&hardened.0.bytecode);
                        let result = raw.run(code, SETUP_TIME);
                        qjs::JS_FreeValue(raw.0, code);
                        result.map(|value| qjs::JS_FreeValue(raw.0, value))
                    }
                })
                .map_err(|failure| Failure::NoEngine(failure.to_string().into()))?;
            self.context = Some(context);
        }
        let context = self.context.as_ref().expect("made above");
        start_clock(time_limit);
        context.with(|ctx| {
            let raw = Raw(ctx.as_raw().as_ptr());
            // SAFETY: the context is alive and entered, and all values are of it.
            unsafe {
                let global = qjs::JS_GetGlobalObject(raw.0);
                let mut set = smallvec::SmallVec::<[qjs::JSAtom; 8]>::new();
                let mut result = Ok(());
                for (name, value) in variables {
                    let atom = self.loaded.atom(raw, name);
                    match raw.import(value, 0) {
                        Ok(value) => {
                            set.push(atom);
                            qjs::JS_DefinePropertyValue(
                                raw.0,
                                global,
                                atom,
                                value,
                                qjs::JS_PROP_C_W_E as c_int,
                            );
                        }
                        Err(failure) => {
                            result = Err(failure);
                            break;
                        }
                    }
                }
                if result.is_ok() {
                    let code = self.loaded.script(raw, script);
                    result = raw.run(code, time_limit).and_then(|value| {
                        let mut export = Export {
                            raw,
                            loaded: &mut self.loaded,
                            time_limit,
                            start: out.len(),
                            out,
                        };
                        let result = export.top(value);
                        qjs::JS_FreeValue(raw.0, value);
                        result
                    });
                }
                for atom in set {
                    qjs::JS_DeleteProperty(raw.0, global, atom, 0);
                }
                qjs::JS_FreeValue(raw.0, global);
                result.and(raw.drain(time_limit))
            }
        })
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.renew();
    }
}

const SETUP_TIME: Duration = Duration::from_secs(10);

/// Takes away and freezes, as byte code.
fn hardening() -> Result<Script, Rejection> {
    thread_local! {
        static SCRIPT: RefCell<Option<Script>> = const { RefCell::new(None) };
    }
    SCRIPT.with_borrow_mut(|slot| match slot {
        Some(script) => Ok(script.clone()),
        None => compile(include_str!("hardening.js"), false, STACK_BYTES)
            .map(|script| slot.insert(script).clone()),
    })
}

impl Loaded {
    unsafe fn atom(&mut self, raw: Raw, name: &str) -> qjs::JSAtom {
        match self.atoms.get(name) {
            Some(atom) => *atom,
            None => {
                // SAFETY: as the caller promises.
                let atom =
                    unsafe { qjs::JS_NewAtomLen(raw.0, name.as_ptr().cast(), name.len() as _) };
                self.atoms.insert(name.into(), atom);
                atom
            }
        }
    }

    /// The script's byte code as the table has it: not the caller's.
    unsafe fn script(&mut self, raw: Raw, script: &Arc<Compiled>) -> qjs::JSValue {
        if let Some((_, code)) = self.scripts.get(&script.id) {
            return *code;
        }
        self.scripts.retain(|_, (script, code)| {
            let is_used = script.strong_count() > 0;
            if !is_used {
                // SAFETY: the table owned it, and it is not in the table any more.
                unsafe { qjs::JS_FreeValue(raw.0, *code) };
            }
            is_used
        });
        // SAFETY: as the caller promises; the byte code was made by this engine.
        let code = unsafe { raw.load(&script.bytecode) };
        self.scripts
            .insert(script.id, (Arc::downgrade(script), code));
        code
    }

    unsafe fn class(&mut self, raw: Raw, object: qjs::JSValue) -> Class {
        // SAFETY: as the caller promises.
        let id = unsafe { qjs::JS_GetClassID(object) };
        *self.classes.entry(id).or_insert_with(|| {
            // SAFETY: as the caller promises.
            let name = unsafe {
                let atom = qjs::JS_GetClassName(qjs::JS_GetRuntime(raw.0), id);
                let name = raw.atom_text(atom);
                qjs::JS_FreeAtom(raw.0, atom);
                name
            };
            match name.as_str() {
                "Array" | "Arguments" | "Mapped Arguments" => Class::Array,
                "Date" => Class::Date,
                "Map" => Class::Map,
                "Set" => Class::Set,
                "Number" | "Boolean" | "Symbol" | "BigInt" => Class::Boxed,
                "Uint8Array" | "Uint8ClampedArray" => Class::Bytes,
                "Int8Array" | "Int16Array" | "Uint16Array" | "Int32Array" | "Uint32Array"
                | "BigInt64Array" | "BigUint64Array" | "Float64Array" => Class::Numbers,
                "Float32Array" => Class::Floats,
                "Promise" | "ArrayBuffer" => Class::Opaque,
                _ => Class::Plain,
            }
        })
    }
}

/// A context that is entered, and what is done with it without rquickjs' safe layer: that knows no
/// scripts as byte code, and costs more than the expressions.
#[derive(Clone, Copy)]
struct Raw(*mut qjs::JSContext);

impl Raw {
    unsafe fn compile(self, source: &str) -> Result<Vec<u8>, Rejection> {
        let mut terminated = Vec::with_capacity(source.len() + 1);
        terminated.extend_from_slice(source.as_bytes());
        terminated.push(0);
        let flags = qjs::JS_EVAL_TYPE_GLOBAL | qjs::JS_EVAL_FLAG_COMPILE_ONLY;
        // SAFETY: the source ends with a NUL, as the engine wants it; the buffer of JS_WriteObject is
        // read in its length and freed once.
        unsafe {
            let code = qjs::JS_Eval(
                self.0,
                terminated.as_ptr().cast(),
                source.len() as _,
                c"expression".as_ptr(),
                flags as c_int,
            );
            if qjs::JS_IsException(code) {
                let text = self.exception();
                return Err(if text.contains("stack overflow") {
                    Rejection::TooDeep
                } else {
                    Rejection::Syntax(text)
                });
            }
            let mut len = 0;
            let flags = qjs::JS_WRITE_OBJ_BYTECODE | qjs::JS_WRITE_OBJ_STRIP_SOURCE;
            let buffer = qjs::JS_WriteObject(self.0, &raw mut len, code, flags as c_int);
            qjs::JS_FreeValue(self.0, code);
            if buffer.is_null() {
                return Err(Rejection::Syntax(self.exception()));
            }
            let bytecode = slice::from_raw_parts(buffer, len as usize).to_vec();
            qjs::js_free(self.0, buffer.cast());
            Ok(bytecode)
        }
    }

    /// An exception if there is no memory for it.
    unsafe fn load(self, bytecode: &[u8]) -> qjs::JSValue {
        // SAFETY: as the caller promises; the bytes are copied.
        unsafe {
            qjs::JS_ReadObject(
                self.0,
                bytecode.as_ptr(),
                bytecode.len() as _,
                qjs::JS_READ_OBJ_BYTECODE as c_int,
            )
        }
    }

    /// Runs byte code, which stays the caller's, and gives its completion value.
    unsafe fn run(self, code: qjs::JSValue, time_limit: Duration) -> Result<qjs::JSValue, Failure> {
        // SAFETY: as the caller promises.
        unsafe {
            if qjs::JS_IsException(code) {
                return Err(self.failure(time_limit));
            }
            let value = qjs::JS_EvalFunction(self.0, qjs::JS_DupValue(self.0, code));
            if qjs::JS_IsException(value) {
                return Err(self.failure(time_limit));
            }
            Ok(value)
        }
    }

    /// Runs what promises have left to do, so that it does not pile up. What it throws has nobody to
    /// tell, except that the engine has to stop.
    unsafe fn drain(self, time_limit: Duration) -> Result<(), Failure> {
        // SAFETY: as the caller promises.
        unsafe {
            let runtime = qjs::JS_GetRuntime(self.0);
            let mut context = ptr::null_mut();
            while qjs::JS_IsJobPending(runtime) {
                if qjs::JS_ExecutePendingJob(runtime, &raw mut context) < 0 {
                    match self.failure(time_limit) {
                        Failure::Thrown(_) => {}
                        failure => return Err(failure),
                    }
                }
                if is_over() {
                    return Err(Failure::TimeLimit(time_limit));
                }
            }
        }
        Ok(())
    }

    /// What the pending exception stands for.
    unsafe fn failure(self, time_limit: Duration) -> Failure {
        // SAFETY: as the caller promises.
        let text = unsafe { self.exception() };
        if IS_OVER.get() {
            Failure::TimeLimit(time_limit)
        } else if text.contains("out of memory") {
            Failure::Memory
        } else {
            Failure::Thrown(text.into())
        }
    }

    /// Takes the pending exception, as a text of one line. No code of the expression runs for that:
    /// what an error has instead of a name and message may be anything.
    unsafe fn exception(self) -> String {
        /// Longer messages have an expression's data in them.
        const MAX_TEXT: usize = 300;
        // SAFETY: as the caller promises.
        unsafe {
            let exception = qjs::JS_GetException(self.0);
            let mut text = match qjs::JS_VALUE_GET_NORM_TAG(exception) {
                qjs::JS_TAG_OBJECT if qjs::JS_IsError(exception) => {
                    let name = self.text_property(exception, c"name");
                    let message = self.text_property(exception, c"message");
                    match (name.is_empty(), message.is_empty()) {
                        (false, false) => format!("{name}: {message}"),
                        _ => name + &message,
                    }
                }
                qjs::JS_TAG_OBJECT => "it throws an object".to_owned(),
                qjs::JS_TAG_SYMBOL => "it throws a symbol".to_owned(),
                _ => format!("it throws {}", self.text(exception)),
            };
            qjs::JS_FreeValue(self.0, exception);
            if text.len() > MAX_TEXT {
                text.truncate(text.floor_char_boundary(MAX_TEXT));
                text.push('…');
            }
            text.replace(['\n', '\r'], " ")
        }
    }

    /// A property that is a string; else nothing.
    unsafe fn text_property(self, object: qjs::JSValue, name: &CStr) -> String {
        // SAFETY: as the caller promises.
        unsafe {
            let value = qjs::JS_GetPropertyStr(self.0, object, name.as_ptr());
            let text = if qjs::JS_IsString(value) {
                self.text(value)
            } else {
                if qjs::JS_IsException(value) {
                    qjs::JS_FreeValue(self.0, qjs::JS_GetException(self.0));
                }
                String::new()
            };
            qjs::JS_FreeValue(self.0, value);
            text
        }
    }

    /// The text of a primitive value. Halves of surrogate pairs become replacement characters, as in Go.
    unsafe fn text(self, value: qjs::JSValue) -> String {
        let mut text = String::new();
        // SAFETY: as the caller promises.
        unsafe { self.with_text(value, |part| text.push_str(part)) };
        text
    }

    /// Whether there was memory for it.
    unsafe fn with_text(self, value: qjs::JSValue, take: impl FnOnce(&str)) -> bool {
        let mut len = 0;
        // SAFETY: as the caller promises; the bytes are read in their length and freed once.
        unsafe {
            let bytes = qjs::JS_ToCStringLen2(self.0, &raw mut len, value, false);
            if bytes.is_null() {
                return false;
            }
            let raw = slice::from_raw_parts(bytes.cast::<u8>(), len as usize);
            match str::from_utf8(raw) {
                Ok(text) => take(text),
                Err(_) => take(&without_surrogates(raw)),
            }
            qjs::JS_FreeCString(self.0, bytes);
            true
        }
    }

    unsafe fn atom_text(self, atom: qjs::JSAtom) -> String {
        // SAFETY: as the caller promises.
        unsafe {
            let value = qjs::JS_AtomToString(self.0, atom);
            let text = self.text(value);
            qjs::JS_FreeValue(self.0, value);
            text
        }
    }

    /// A fresh JavaScript value each time, so that expressions share nothing.
    unsafe fn import(self, value: &Value, depth: usize) -> Result<qjs::JSValue, Failure> {
        if depth > MAX_DEPTH {
            return Err(Failure::SourceTooDeep);
        }
        // SAFETY: as the caller promises; each new value is owned by one other or freed.
        unsafe {
            let value = match value {
                Value::Null => qjs::JS_NULL,
                Value::Bool(is) => qjs::JS_MKVAL(qjs::JS_TAG_BOOL, i32::from(*is)),
                Value::Number(number) => {
                    let whole = *number as i32;
                    if f64::from(whole).to_bits() == number.to_bits() {
                        qjs::JS_MKVAL(qjs::JS_TAG_INT, whole)
                    } else {
                        qjs::JS_NewFloat64(*number)
                    }
                }
                Value::String(text) => {
                    qjs::JS_NewStringLen(self.0, text.as_ptr().cast(), text.len() as _)
                }
                Value::Array(items) => {
                    let array = qjs::JS_NewArray(self.0);
                    for (at, item) in items.0.iter().enumerate() {
                        match self.import(item, depth + 1) {
                            Ok(item) => {
                                qjs::JS_DefinePropertyValueUint32(
                                    self.0,
                                    array,
                                    at as u32,
                                    item,
                                    qjs::JS_PROP_C_W_E as c_int,
                                );
                            }
                            Err(failure) => {
                                qjs::JS_FreeValue(self.0, array);
                                return Err(failure);
                            }
                        }
                    }
                    array
                }
                Value::Object(members) => {
                    let object = qjs::JS_NewObject(self.0);
                    for (key, value) in &members.0 {
                        match self.import(value, depth + 1) {
                            Ok(value) => {
                                let atom =
                                    qjs::JS_NewAtomLen(self.0, key.as_ptr().cast(), key.len() as _);
                                qjs::JS_DefinePropertyValue(
                                    self.0,
                                    object,
                                    atom,
                                    value,
                                    qjs::JS_PROP_C_W_E as c_int,
                                );
                                qjs::JS_FreeAtom(self.0, atom);
                            }
                            Err(failure) => {
                                qjs::JS_FreeValue(self.0, object);
                                return Err(failure);
                            }
                        }
                    }
                    object
                }
            };
            if qjs::JS_IsException(value) {
                qjs::JS_FreeValue(self.0, qjs::JS_GetException(self.0));
                return Err(Failure::Memory);
            }
            Ok(value)
        }
    }
}

/// QuickJS writes half a surrogate pair as three bytes, which are no UTF-8.
fn without_surrogates(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    let mut rest = bytes;
    loop {
        match str::from_utf8(rest) {
            Ok(valid) => {
                text.push_str(valid);
                return text;
            }
            Err(error) => {
                let (valid, invalid) = rest.split_at(error.valid_up_to());
                text.push_str(str::from_utf8(valid).expect("valid up to there"));
                text.push(char::REPLACEMENT_CHARACTER);
                rest = invalid.get(3..).unwrap_or_default();
            }
        }
    }
}

/// Makes JSON of a result, as goja's `Export` and Go's `json.Marshal` do together.
struct Export<'a> {
    raw: Raw,
    loaded: &'a mut Loaded,
    time_limit: Duration,
    /// Where the result starts in `out`.
    start: usize,
    out: &'a mut Vec<u8>,
}

impl Export<'_> {
    /// # Safety
    /// The context is entered and `value` is alive; so for all below.
    unsafe fn top(&mut self, value: qjs::JSValue) -> Result<(), Failure> {
        // SAFETY: as the caller promises.
        unsafe {
            if qjs::JS_IsUndefined(value) {
                return Err(Failure::Undefined);
            }
            if qjs::JS_IsNull(value) {
                return Err(Failure::Null);
            }
            self.value(value, 0)?;
        }
        self.is_small_enough()
    }

    fn is_small_enough(&self) -> Result<(), Failure> {
        if self.out.len() - self.start > MAX_RESULT_BYTES {
            return Err(Failure::TooLarge);
        }
        Ok(())
    }

    unsafe fn value(&mut self, value: qjs::JSValue, depth: usize) -> Result<(), Failure> {
        // Each step of a long result looks, since none of them runs code that the handler could stop.
        self.is_small_enough()?;
        if depth > MAX_DEPTH {
            return Err(Failure::TooDeep);
        }
        // SAFETY: as the caller promises.
        unsafe {
            match qjs::JS_VALUE_GET_NORM_TAG(value) {
                qjs::JS_TAG_INT => {
                    let number = qjs::JS_VALUE_GET_INT(value);
                    payload::write_number(number.into(), self.out);
                }
                qjs::JS_TAG_FLOAT64 => self.number(qjs::JS_VALUE_GET_FLOAT64(value))?,
                qjs::JS_TAG_BOOL => {
                    let is = qjs::JS_VALUE_GET_BOOL(value);
                    self.out
                        .extend_from_slice(if is { b"true" } else { b"false" });
                }
                qjs::JS_TAG_STRING | qjs::JS_TAG_STRING_ROPE => {
                    let out = &mut *self.out;
                    if !self
                        .raw
                        .with_text(value, |text| payload::write_string(text, out))
                    {
                        return Err(self.raw.failure(self.time_limit));
                    }
                }
                // Go writes a big.Int as a number of any length.
                qjs::JS_TAG_BIG_INT | qjs::JS_TAG_SHORT_BIG_INT => {
                    let out = &mut *self.out;
                    let fits = self
                        .raw
                        .with_text(value, |text| out.extend_from_slice(text.as_bytes()));
                    if !fits {
                        return Err(self.raw.failure(self.time_limit));
                    }
                }
                // goja exports a symbol as its description.
                qjs::JS_TAG_SYMBOL => {
                    let description = self.property(value, c"description")?;
                    let text = self.raw.text(description);
                    let is_some = qjs::JS_IsString(description);
                    qjs::JS_FreeValue(self.raw.0, description);
                    payload::write_string(if is_some { &text } else { "" }, self.out);
                }
                qjs::JS_TAG_OBJECT => self.object(value, depth)?,
                _ => self.out.extend_from_slice(b"null"),
            }
        }
        Ok(())
    }

    fn number(&mut self, number: f64) -> Result<(), Failure> {
        if !number.is_finite() {
            return Err(Failure::NotFinite(number));
        }
        payload::write_number(number, self.out);
        Ok(())
    }

    unsafe fn object(&mut self, object: qjs::JSValue, depth: usize) -> Result<(), Failure> {
        // SAFETY: as the caller promises.
        unsafe {
            if qjs::JS_IsFunction(self.raw.0, object) {
                return Err(Failure::NoJson("function"));
            }
            match self.loaded.class(self.raw, object) {
                Class::Array | Class::Numbers => self.items(object, depth),
                Class::Floats => self.floats(object),
                Class::Bytes => self.bytes(object),
                Class::Date => self.date(object),
                Class::Set => self.through(object, c"values", depth),
                Class::Map => self.through(object, c"entries", depth),
                Class::Boxed => {
                    let inner = self.call(object, c"valueOf")?;
                    let result = self.value(inner, depth + 1);
                    qjs::JS_FreeValue(self.raw.0, inner);
                    result
                }
                Class::Opaque => {
                    self.out.extend_from_slice(b"{}");
                    Ok(())
                }
                Class::Plain => self.members(object, depth),
            }
        }
    }

    unsafe fn items(&mut self, array: qjs::JSValue, depth: usize) -> Result<(), Failure> {
        self.out.push(b'[');
        // SAFETY: as the caller promises.
        unsafe {
            let mut len = 0;
            if qjs::JS_GetLength(self.raw.0, array, &raw mut len) < 0 {
                return Err(self.raw.failure(self.time_limit));
            }
            for at in 0..u32::try_from(len).unwrap_or(u32::MAX) {
                if at > 0 {
                    self.out.push(b',');
                }
                let item = qjs::JS_GetPropertyUint32(self.raw.0, array, at);
                if qjs::JS_IsException(item) {
                    return Err(self.raw.failure(self.time_limit));
                }
                let result = self.value(item, depth + 1);
                qjs::JS_FreeValue(self.raw.0, item);
                result?;
            }
        }
        self.out.push(b']');
        Ok(())
    }

    /// Go writes its float32 with the fewest digits that tell it from other float32.
    unsafe fn floats(&mut self, array: qjs::JSValue) -> Result<(), Failure> {
        // SAFETY: as the caller promises.
        let numbers = unsafe { self.numbers(array) }?;
        self.out.push(b'[');
        for (at, number) in numbers.into_iter().enumerate() {
            if at > 0 {
                self.out.push(b',');
            }
            if !number.is_finite() {
                return Err(Failure::NotFinite(number));
            }
            if number == 0.0 && number.is_sign_negative() {
                self.out.push(b'-');
            }
            let mut buffer = ryu_js::Buffer::new();
            self.out
                .extend_from_slice(buffer.format_finite(number as f32).as_bytes());
        }
        self.out.push(b']');
        Ok(())
    }

    /// A slice of bytes is Base64 in Go's JSON.
    unsafe fn bytes(&mut self, array: qjs::JSValue) -> Result<(), Failure> {
        use base64::Engine as _;
        // SAFETY: as the caller promises.
        let numbers = unsafe { self.numbers(array) }?;
        let bytes: Vec<u8> = numbers.into_iter().map(|number| number as u8).collect();
        let text = base64::engine::general_purpose::STANDARD.encode(bytes);
        self.out.push(b'"');
        self.out.extend_from_slice(text.as_bytes());
        self.out.push(b'"');
        Ok(())
    }

    /// The items of a typed array of numbers.
    unsafe fn numbers(&mut self, array: qjs::JSValue) -> Result<Vec<f64>, Failure> {
        // SAFETY: as the caller promises; the items own nothing.
        unsafe {
            let mut len = 0;
            if qjs::JS_GetLength(self.raw.0, array, &raw mut len) < 0 {
                return Err(self.raw.failure(self.time_limit));
            }
            if len > MAX_RESULT_BYTES as i64 {
                return Err(Failure::TooLarge);
            }
            Ok((0..len as u32)
                .map(|at| {
                    let item = qjs::JS_GetPropertyUint32(self.raw.0, array, at);
                    match qjs::JS_VALUE_GET_NORM_TAG(item) {
                        qjs::JS_TAG_INT => qjs::JS_VALUE_GET_INT(item).into(),
                        _ => qjs::JS_VALUE_GET_FLOAT64(item),
                    }
                })
                .collect())
        }
    }

    /// As Go's time.Time in UTC: RFC 3339 without zeros at the end. An invalid date is nil there.
    unsafe fn date(&mut self, date: qjs::JSValue) -> Result<(), Failure> {
        // SAFETY: as the caller promises.
        let text = unsafe {
            let time = self.call(date, c"getTime")?;
            let is_valid = match qjs::JS_VALUE_GET_NORM_TAG(time) {
                qjs::JS_TAG_FLOAT64 => qjs::JS_VALUE_GET_FLOAT64(time).is_finite(),
                _ => true,
            };
            qjs::JS_FreeValue(self.raw.0, time);
            if !is_valid {
                self.out.extend_from_slice(b"null");
                return Ok(());
            }
            let text = self.call(date, c"toISOString")?;
            let owned = self.raw.text(text);
            qjs::JS_FreeValue(self.raw.0, text);
            owned
        };
        // Beyond the years 0 to 9999 there is a sign before the year.
        if !text.starts_with(|first: char| first.is_ascii_digit()) {
            return Err(Failure::NoJson("date beyond the year 9999"));
        }
        let (seconds, fraction) = text
            .strip_suffix('Z')
            .and_then(|text| text.split_once('.'))
            .ok_or(Failure::NoJson("date of an unknown form"))?;
        let fraction = fraction.trim_end_matches('0');
        let point = if fraction.is_empty() { "" } else { "." };
        self.out
            .extend_from_slice(format!("\"{seconds}{point}{fraction}Z\"").as_bytes());
        Ok(())
    }

    /// A Map as a list of pairs, a Set as a list.
    unsafe fn through(
        &mut self,
        object: qjs::JSValue,
        method: &CStr,
        depth: usize,
    ) -> Result<(), Failure> {
        // SAFETY: as the caller promises.
        unsafe {
            let iterator = self.call(object, method)?;
            let list = self.call(iterator, c"toArray");
            qjs::JS_FreeValue(self.raw.0, iterator);
            let list = list?;
            let result = self.items(list, depth);
            qjs::JS_FreeValue(self.raw.0, list);
            result
        }
    }

    /// Own enumerable properties, sorted by their names' bytes.
    unsafe fn members(&mut self, object: qjs::JSValue, depth: usize) -> Result<(), Failure> {
        let mut table = ptr::null_mut();
        let mut len = 0;
        // SAFETY: as the caller promises; the table is read in its length and freed once.
        let mut names: Vec<(String, qjs::JSAtom)> = unsafe {
            let flags = qjs::JS_GPN_STRING_MASK | qjs::JS_GPN_ENUM_ONLY;
            if qjs::JS_GetOwnPropertyNames(
                self.raw.0,
                &raw mut table,
                &raw mut len,
                object,
                flags as c_int,
            ) < 0
            {
                return Err(self.raw.failure(self.time_limit));
            }
            NonNull::new(table).map_or_else(Vec::new, |table| {
                slice::from_raw_parts(table.as_ptr(), len as usize)
                    .iter()
                    .map(|property| (self.raw.atom_text(property.atom), property.atom))
                    .collect()
            })
        };
        names.sort_by(|(a, _), (b, _)| a.cmp(b));
        self.out.push(b'{');
        let mut result = Ok(());
        for (at, (name, atom)) in names.iter().enumerate() {
            if at > 0 {
                self.out.push(b',');
            }
            payload::write_string(name, self.out);
            self.out.push(b':');
            // SAFETY: as the caller promises.
            result = unsafe {
                let value = qjs::JS_GetProperty(self.raw.0, object, *atom);
                if qjs::JS_IsException(value) {
                    Err(self.raw.failure(self.time_limit))
                } else {
                    let result = self.value(value, depth + 1);
                    qjs::JS_FreeValue(self.raw.0, value);
                    result
                }
            };
            if result.is_err() {
                break;
            }
        }
        // SAFETY: it came from JS_GetOwnPropertyNames in this length.
        unsafe { qjs::JS_FreePropertyEnum(self.raw.0, table, len) };
        result?;
        self.out.push(b'}');
        Ok(())
    }

    unsafe fn property(&mut self, of: qjs::JSValue, name: &CStr) -> Result<qjs::JSValue, Failure> {
        // SAFETY: as the caller promises.
        unsafe {
            let value = qjs::JS_GetPropertyStr(self.raw.0, of, name.as_ptr());
            if qjs::JS_IsException(value) {
                return Err(self.raw.failure(self.time_limit));
            }
            Ok(value)
        }
    }

    unsafe fn call(&mut self, this: qjs::JSValue, method: &CStr) -> Result<qjs::JSValue, Failure> {
        // SAFETY: as the caller promises.
        unsafe {
            let function = self.property(this, method)?;
            let result = qjs::JS_Call(self.raw.0, function, this, 0, ptr::null_mut());
            qjs::JS_FreeValue(self.raw.0, function);
            if qjs::JS_IsException(result) {
                return Err(self.raw.failure(self.time_limit));
            }
            Ok(result)
        }
    }
}
