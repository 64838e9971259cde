//! Apps to install: the samples, the samples under another manifest, and guests that misbehave.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

/// The folder of a sample app, built.
pub fn built(name: &str) -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or(here.join("target"), PathBuf::from);
    let folder = target.join("apps").join(name);
    let component = folder.join(format!("{name}.wasm"));
    assert!(
        component.exists(),
        "{} is missing: `cargo xtask apps` builds it (`./dev test` does that first)",
        component.display()
    );
    folder
}

/// A folder with a manifest and a component.
pub struct Package {
    folder: TempDir,
}

impl Package {
    pub fn new(manifest: &str, component: impl AsRef<[u8]>) -> Package {
        let package = Package::without_component(manifest);
        std::fs::write(package.path().join("app.wasm"), component).unwrap();
        package
    }

    /// The manifest should name `app.wasm` as its component.
    pub fn without_component(manifest: &str) -> Package {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("manifest.toml"), manifest).unwrap();
        Package { folder }
    }

    /// `unit-convert` under another name: takes `from/#`, multiplies by `factor`, puts `prefix`
    /// before the topic.
    pub fn multiplier(name: &str, from: &str, prefix: &str, factor: u32) -> Package {
        let component = std::fs::read(built("unit-convert").join("unit-convert.wasm")).unwrap();
        let manifest = format!(
            "name = {name:?}\nversion = \"1.0.0\"\ncomponent = \"app.wasm\"\n\
             subscribe = [\"{from}/#\"]\npublish = [\"{prefix}#\"]\n\
             [config]\nfactor = {factor}\nunit = \"x\"\noutput_prefix = \"{prefix}\"\n"
        );
        Package::new(&manifest, component)
    }

    /// A guest that does what the first byte of a batch says; see `src/apps/tests/guest.wat`.
    /// It takes `NAME/in` and may publish nothing of what it gets.
    pub fn obedient(name: &str) -> Package {
        let manifest = manifest(name).replace(&format!("{name}/#"), "elsewhere");
        Package::new(&manifest, guest(""))
    }

    /// The same, but it gets again what it publishes.
    pub fn self_feeding(name: &str) -> Package {
        Package::new(&manifest(name), guest(""))
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn as_str(&self) -> &str {
        self.path().to_str().unwrap()
    }
}

/// A manifest for [`guest`]: it takes `NAME/in` and may publish below `NAME/`.
pub fn manifest(name: &str) -> String {
    format!(
        "name = {name:?}\nversion = \"1.0.0\"\ncomponent = \"app.wasm\"\n\
         subscribe = [\"{name}/in\"]\npublish = [\"{name}/#\"]\n\
         [limits]\nmemory_pages = 64\nbatch_deadline_ms = 20\n"
    )
}

/// The guest, with some code to run at the beginning of `configure`.
pub fn guest(configure: &str) -> Vec<u8> {
    component(&GUEST.replace("CONFIGURE", configure), "app")
}

/// The guest with a change to its text.
pub fn guest_with(from: &str, to: &str) -> Vec<u8> {
    assert!(GUEST.contains(from));
    component(&GUEST.replace("CONFIGURE", "").replace(from, to), "app")
}

/// A guest that keeps what it is told to; see `src/apps/tests/keeper.wat`. It publishes on `out`.
pub fn keeper() -> Vec<u8> {
    let keeper = include_str!("../../src/apps/tests/keeper.wat");
    component(&keeper.replace("CONFIGURE", ""), "app")
}

const GUEST: &str = include_str!("../../src/apps/tests/guest.wat");

/// What every module needs to become a component, and half of an app.
const CONFIGURE_ONLY: &str = r#"
    (memory (export "memory") 1)
    (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) unreachable)
    (func (export "configure") (result i32) unreachable)
"#;

pub fn core_module() -> Vec<u8> {
    wat::parse_str(format!("(module {CONFIGURE_ONLY})")).unwrap()
}

/// A component without `handle`.
pub fn without_handle() -> Vec<u8> {
    component(&format!("(module {CONFIGURE_ONLY})"), "no-handle")
}

/// A component that wants to use the telephone.
pub fn caller() -> Vec<u8> {
    let import = r#"(import "test:worlds/telephone" "call" (func (param i32 i32)))"#;
    component(&format!("(module {import} {CONFIGURE_ONLY})"), "caller")
}

/// Worlds that are not an app's.
const OTHER_WORLDS: &str = "
    package test:worlds;
    world no-handle {
        export configure: func() -> result<_, string>;
    }
    interface telephone { call: func(number: string); }
    world caller {
        import telephone;
        export configure: func() -> result<_, string>;
    }
";

/// Makes a component from a core module, for `world` of `wit/` or of [`OTHER_WORLDS`].
fn component(module: &str, world: &str) -> Vec<u8> {
    let mut module = wat::parse_str(module).unwrap();
    let mut resolve = wit_parser::Resolve::default();
    let wit = Path::new(env!("CARGO_MANIFEST_DIR")).join("wit");
    let (own, _) = resolve.push_dir(&wit).unwrap();
    let others = resolve.push_str("other.wit", OTHER_WORLDS).unwrap();
    let package = if world == "app" { own } else { others };
    let world = resolve.select_world(&[package], Some(world)).unwrap();
    let encoding = wit_component::StringEncoding::UTF8;
    wit_component::embed_component_metadata(&mut module, &resolve, world, encoding, false).unwrap();
    wit_component::ComponentEncoder::default()
        .module(&module)
        .unwrap()
        .validate(true)
        .encode()
        .unwrap()
}
