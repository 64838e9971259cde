//! What can go wrong with an app, told to the person who installs or operates it.

use std::path::PathBuf;

use super::manifest::{ManifestError, TooMuch};
use super::status::AppState;
use crate::store::StoreError;

/// Names the app (or the file) and what to do.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    #[error("no app is called {name:?}; `headgate app list` shows the installed ones")]
    NotFound { name: String },

    #[error("manifest: {0}")]
    Manifest(#[from] ManifestError),

    #[error(
        "app {name}: manifest: line {line}: `capabilities`: this gateway doesn't let it have \
         \"{capability}\"; name it in `apps.{capability}` of the gateway's configuration, or take \
         this out of the manifest"
    )]
    NotAllowed {
        name: String,
        line: usize,
        capability: &'static str,
    },

    #[error("app {name}: {problem}")]
    TooMuch { name: String, problem: TooMuch },

    #[error("app {name}: {problem}")]
    Component {
        name: String,
        problem: ComponentProblem,
    },

    #[error(
        "app {name}: this gateway has no compiler, so it runs only apps that were compiled for it \
         and are part of its system (`apps.preinstalled`); make one with `headgate app compile`"
    )]
    NoCompiler { name: String },

    #[error(
        "{}: compiled for {made_for} by Headgate {made_by}, and it doesn't fit this gateway: \
         {reason}; compile it for this machine with this version's `headgate app compile`", .path.display()
    )]
    Misfit {
        path: PathBuf,
        made_for: String,
        made_by: String,
        reason: String,
    },

    #[error(
        "app {name} is part of the system (`apps.preinstalled`): replace or remove it there; \
         `headgate app stop {name}` keeps it from running"
    )]
    Preinstalled { name: String },

    #[error(
        "app {name} is part of the system, and only its compiled code is there, which is for this gateway \
         alone; name its package with --package PATH"
    )]
    OnlyPrecompiled { name: String },

    #[error("app {name} is {state}: {remedy}")]
    WrongState {
        name: String,
        state: AppState,
        remedy: &'static str,
    },

    #[error("app {name}: {reason}")]
    RolledBack { name: String, reason: String },

    #[error("apps.preinstalled: {}: {reason}", .path.display())]
    PreinstalledFolder { path: PathBuf, reason: String },

    #[error("app {name}: {reason}")]
    PreinstalledFile { name: String, reason: String },

    #[error("app {name}: the compiler failed: {reason}")]
    Compiler { name: String, reason: String },

    #[error(
        "app {name}: what is stored of it can't be read by this version of Headgate; install it again"
    )]
    Unreadable { name: String },

    #[error("the gateway is shutting down; try again when it is back")]
    ShuttingDown,

    #[error(transparent)]
    Store(#[from] StoreError),

    #[error("cannot set up the WASM engine: {0}")]
    Engine(String),

    #[error("{}: {source}", .path.display())]
    File {
        path: PathBuf,
        source: std::io::Error,
    },
}

/// Why a file is no component that can run as an app.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ComponentProblem {
    #[error(
        "this is not WebAssembly: it doesn't start with the bytes \\0asm; name the component that \
         the build has made, in binary form"
    )]
    NotWasm,
    #[error(
        "this is a core WebAssembly module, not a component; turn it into one with `wasm-tools \
         component new`, or build it with `headgate app build`"
    )]
    CoreModule,
    #[error("this is a WebAssembly binary of an unknown version ({version:#010x})")]
    UnknownVersion { version: u32 },
    #[error("the component is {bytes} bytes; an app has at most {max}")]
    TooBig { bytes: usize, max: usize },
    #[error("not a valid component: {reason}")]
    Invalid { reason: String },
    #[error(
        "the export `{export}` is missing; the world `headgate:app/app@0.1.0` asks for `{signature}`"
    )]
    MissingExport {
        export: &'static str,
        signature: &'static str,
    },
    #[error(
        "the export `{export}` has the wrong signature: {reason}; the world `headgate:app/app@0.1.0` asks for `{signature}`"
    )]
    WrongSignature {
        export: &'static str,
        signature: &'static str,
        reason: String,
    },
    #[error("it imports `{import}`, which Headgate doesn't offer; an app can import: {offered}")]
    UnknownImport { import: String, offered: String },
    #[error("its import `{import}` doesn't fit what Headgate offers: {reason}")]
    WrongImport { import: String, reason: String },
}

/// For those who turn an [`AppError`] into a status code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AppErrorKind {
    /// There is no such app.
    NotFound,
    /// What was handed in is wrong.
    Invalid,
    /// It can't be done to this app, or by this gateway.
    Conflict,
    /// Try again later.
    Unavailable,
    /// The gateway's own trouble: disk, store, engine.
    Internal,
}

impl AppError {
    pub fn kind(&self) -> AppErrorKind {
        match self {
            AppError::NotFound { .. } => AppErrorKind::NotFound,
            AppError::Manifest(_) | AppError::Component { .. } => AppErrorKind::Invalid,
            AppError::NoCompiler { .. }
            | AppError::NotAllowed { .. }
            | AppError::Preinstalled { .. }
            | AppError::OnlyPrecompiled { .. }
            | AppError::TooMuch { .. }
            | AppError::WrongState { .. }
            | AppError::RolledBack { .. } => AppErrorKind::Conflict,
            AppError::ShuttingDown => AppErrorKind::Unavailable,
            AppError::Compiler { .. }
            | AppError::Unreadable { .. }
            | AppError::Misfit { .. }
            | AppError::PreinstalledFolder { .. }
            | AppError::PreinstalledFile { .. }
            | AppError::Store(_)
            | AppError::Engine(_)
            | AppError::File { .. } => AppErrorKind::Internal,
        }
    }
}
