//! `headgate app compile`: a component, compiled ahead of time for a gateway that has no compiler.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;

use super::output::Output;
use super::package::PackageArgs;
use crate::apps::{
    Defaults, MANIFEST_FILE, Manifest, PRECOMPILED_EXTENSION, Target, compile_ahead,
};

/// Compile an app for another machine, for a folder that apps.preinstalled names there
///
/// Needs no running gateway. Writes FOLDER/manifest.toml and FOLDER/NAME.cwasm. The other machine's
/// Headgate must be of this version.
#[derive(Args)]
pub(super) struct CompileArgs {
    #[command(flatten)]
    package: PackageArgs,
    /// Folder to write to; it must be empty or not exist
    #[arg(long, value_name = "FOLDER")]
    output: PathBuf,
    /// Rust target triple, such as aarch64-unknown-linux-gnu [default: this machine's]
    #[arg(long, value_name = "TRIPLE")]
    target: Option<String>,
    /// CPU as GCC calls it, such as cortex-a72 (Raspberry Pi 4), cortex-a76 (Raspberry Pi 5)
    /// [default: generic, which every machine of the target can run]
    #[arg(long, value_name = "CPU")]
    cpu: Option<String>,
    /// Fail if the app has another name
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
}

pub(super) fn run(args: CompileArgs, output: &Output) -> anyhow::Result<()> {
    let target = Target::new(args.target.as_deref(), args.cpu.as_deref())?;
    let package = args.package.find()?;
    if let Some(wanted) = &args.name
        && *wanted != package.name
    {
        bail!(
            "{}: the manifest says that the app is called {:?}, not {wanted:?}; give both one name",
            args.package.path.display(),
            package.name
        );
    }
    refuse_full(&args.output)?;
    let compiled = compile_ahead(&package.component, &target)
        .with_context(|| format!("app {}", package.name))?;
    let manifest =
        Manifest::parse(&package.manifest, &Defaults::new(1)).expect("the package was checked");
    let code = Path::new(&manifest.component).with_extension(PRECOMPILED_EXTENSION);
    fs::create_dir_all(&args.output)
        .with_context(|| format!("cannot make {}", args.output.display()))?;
    write(
        &args.output.join(MANIFEST_FILE),
        package.manifest.as_bytes(),
    )?;
    let path = args.output.join(code);
    write(&path, &compiled)?;
    if output.json {
        return output.value(&serde_json::json!({
            "app": package.name,
            "target": target.triple(),
            "cpu": target.cpu(),
            "path": path,
            "bytes": compiled.len(),
        }));
    }
    output.text(format!(
        "{}: {} bytes for {target} in {}",
        package.name,
        compiled.len(),
        path.display()
    ))
}

/// What lies in the folder already could be another app's.
fn refuse_full(folder: &Path) -> anyhow::Result<()> {
    match fs::read_dir(folder).map(|mut entries| entries.next().is_some()) {
        Ok(false) => Ok(()),
        Ok(true) => bail!("{} is not empty; name a new folder", folder.display()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", folder.display())),
    }
}

fn write(path: &Path, contents: &[u8]) -> anyhow::Result<()> {
    fs::write(path, contents).with_context(|| format!("cannot write {}", path.display()))
}
