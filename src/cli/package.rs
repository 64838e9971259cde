//! Finding an app's manifest and component from what `headgate app install` is given.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

use crate::admin::{MAX_COMPONENT_BYTES, MAX_MANIFEST_BYTES};
use crate::apps::{Defaults, MANIFEST_FILE, Manifest, ManifestError, PRECOMPILED_EXTENSION};
use crate::regular_file::{ReadError, RegularFile};

/// What is sent to the gateway.
#[derive(Debug)]
pub struct Package {
    pub name: String,
    pub manifest: String,
    pub component: Vec<u8>,
}

#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    #[error("{}: no such file or folder", .0.display())]
    NoSuchPath(PathBuf),
    #[error(
        "{}: there is no {MANIFEST_FILE} in this folder; name an app's folder, or give the \
         manifest with --manifest FILE", .0.display()
    )]
    NoManifestInFolder(PathBuf),
    #[error(
        "{}: there is no {MANIFEST_FILE} beside this file; give the manifest with --manifest \
         FILE", .0.display()
    )]
    NoManifestBeside(PathBuf),
    #[error("{}: {problem}", .path.display())]
    Manifest {
        path: PathBuf,
        problem: ManifestError,
    },
    #[error("{}: not UTF-8, so not a manifest", .0.display())]
    ManifestNotUtf8(PathBuf),
    #[error(
        "app {name}: {component} is neither in {} nor among the built apps; build it with \
         `headgate app build`, or copy the component there", .folder.display()
    )]
    NoComponent {
        name: String,
        component: String,
        folder: PathBuf,
    },
    #[error(
        "{}: compiled ahead of time, so it can't be installed: put its folder into the one that \
         `apps.preinstalled` names, and restart the gateway", .0.display()
    )]
    Precompiled(PathBuf),
    #[error("{}: not a file", .0.display())]
    NotAFile(PathBuf),
    #[error("{}: larger than {max} bytes, the most that the gateway takes", .path.display())]
    TooBig { path: PathBuf, max: usize },
    #[error("{}: {source}", .path.display())]
    Io { path: PathBuf, source: io::Error },
}

/// Which package a command is about.
#[derive(clap::Args)]
pub struct PackageArgs {
    /// Folder with manifest.toml and component, source folder of an app that `headgate app build` has
    /// built, or component
    pub path: PathBuf,
    /// Manifest to use instead of the one in the folder
    #[arg(long, value_name = "FILE")]
    manifest: Option<PathBuf>,
}

impl PackageArgs {
    pub fn find(&self) -> Result<Package, PackageError> {
        Package::find(&self.path, self.manifest.as_deref())
    }
}

impl Package {
    /// Reads the package that `path` names: a folder with a manifest and a component, a source
    /// folder whose component is built, or a component with a manifest beside
    /// it. `manifest` takes the place of the manifest found so.
    pub fn find(path: &Path, manifest: Option<&Path>) -> Result<Package, PackageError> {
        let target = std::env::var_os("CARGO_TARGET_DIR");
        Package::find_with(path, manifest, target.as_deref())
    }

    /// [`Package::find`], where `target` is what is built into.
    fn find_with(
        path: &Path,
        manifest: Option<&Path>,
        target: Option<&OsStr>,
    ) -> Result<Package, PackageError> {
        let metadata = path.metadata().map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => PackageError::NoSuchPath(path.to_owned()),
            _ => failed(path)(source),
        })?;
        let folder = if metadata.is_dir() {
            path
        } else {
            path.parent().unwrap_or(Path::new(""))
        };
        let manifest_path = match manifest {
            Some(manifest) => manifest.to_owned(),
            None => folder.join(MANIFEST_FILE),
        };
        if manifest.is_none() && !manifest_path.exists() {
            return Err(if metadata.is_dir() {
                PackageError::NoManifestInFolder(path.to_owned())
            } else {
                PackageError::NoManifestBeside(path.to_owned())
            });
        }
        let (text, checked) = read_manifest(&manifest_path)?;
        let component = if metadata.is_dir() {
            find_component(path, &checked, target)?
        } else {
            path.to_owned()
        };
        Ok(Package {
            component: read(&component, MAX_COMPONENT_BYTES)?,
            name: checked.name,
            manifest: text,
        })
    }
}

/// A manifest's text, and what it says.
pub fn read_manifest(path: &Path) -> Result<(String, Manifest), PackageError> {
    let text = String::from_utf8(read(path, MAX_MANIFEST_BYTES)?)
        .map_err(|_| PackageError::ManifestNotUtf8(path.to_owned()))?;
    // The queue's length is for the gateway to say; any will do for the check.
    match Manifest::parse(&text, &Defaults::new(1)) {
        Ok(checked) => Ok((text, checked)),
        Err(problem) => Err(PackageError::Manifest {
            path: path.to_owned(),
            problem,
        }),
    }
}

/// The component of the app in `folder`: beside the manifest, else where `headgate app build` and
/// `cargo xtask apps` put it, in the target folder of a workspace that `folder` lies in; the newest, if
/// both have.
fn find_component(
    folder: &Path,
    manifest: &Manifest,
    target: Option<&OsStr>,
) -> Result<PathBuf, PackageError> {
    let beside = folder.join(&manifest.component);
    if beside.exists() {
        return Ok(beside);
    }
    let compiled = beside.with_extension(PRECOMPILED_EXTENSION);
    if compiled.exists() {
        return Err(PackageError::Precompiled(compiled));
    }
    let absolute = folder.canonicalize().map_err(failed(folder))?;
    let in_target = |target: PathBuf| {
        let apps = target.join("apps").join(&manifest.name);
        apps.join(&manifest.component)
    };
    let named = target.map(|target| in_target(target.into()));
    let of_ancestors = absolute
        .ancestors()
        .map(|above| in_target(above.join("target")))
        .filter_map(|built| Some((built.metadata().ok()?.modified().ok()?, built)));
    named
        .filter(|built| built.exists())
        .or_else(|| of_ancestors.max().map(|(_, built)| built))
        .ok_or_else(|| PackageError::NoComponent {
            name: manifest.name.clone(),
            component: manifest.component.clone(),
            folder: folder.to_owned(),
        })
}

fn read(path: &Path, max: usize) -> Result<Vec<u8>, PackageError> {
    let contents = RegularFile::open(path, 0).and_then(|file| file.read(max as u64));
    contents.map_err(|error| match error {
        ReadError::NotRegular => PackageError::NotAFile(path.to_owned()),
        ReadError::TooLarge { .. } => PackageError::TooBig {
            path: path.to_owned(),
            max,
        },
        ReadError::Io(source) => failed(path)(source),
    })
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> PackageError {
    move |source| PackageError::Io {
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::time::SystemTime;

    use super::*;

    const MANIFEST: &str = r#"
        name = "thermo"
        version = "1.0.0"
        subscribe = ["plant/#"]
    "#;

    /// A workspace with the source folder of an app in it.
    fn workspace() -> (tempfile::TempDir, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let app = root.path().join("apps/thermo");
        fs::create_dir_all(&app).unwrap();
        fs::write(app.join("manifest.toml"), MANIFEST).unwrap();
        (root, app)
    }

    fn write(path: PathBuf, contents: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, contents).unwrap();
    }

    fn refused(path: &Path, manifest: Option<&Path>) -> String {
        Package::find_with(path, manifest, None)
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn a_folder_holds_manifest_and_component() {
        let (_root, app) = workspace();
        write(app.join("thermo.wasm"), "beside");
        let package = Package::find_with(&app, None, None).unwrap();
        assert_eq!(package.name, "thermo");
        assert_eq!(package.manifest, MANIFEST);
        assert_eq!(package.component, b"beside");
    }

    #[test]
    fn the_manifest_names_the_component() {
        let (_root, app) = workspace();
        let manifest = format!("{MANIFEST}\ncomponent = \"other.wasm\"");
        write(app.join("manifest.toml"), &manifest);
        write(app.join("other.wasm"), "other");
        let package = Package::find_with(&app, None, None).unwrap();
        assert_eq!(package.component, b"other");
    }

    #[test]
    fn a_source_folders_component_is_found_where_the_build_puts_it() {
        let (root, app) = workspace();
        write(
            root.path().join("target/apps/thermo/thermo.wasm"),
            "workspace",
        );
        let package = Package::find_with(&app, None, None).unwrap();
        assert_eq!(package.component, b"workspace");

        let elsewhere = root.path().join("elsewhere");
        write(elsewhere.join("apps/thermo/thermo.wasm"), "elsewhere");
        let package = Package::find_with(&app, None, Some(elsewhere.as_os_str())).unwrap();
        assert_eq!(
            package.component, b"elsewhere",
            "CARGO_TARGET_DIR goes first"
        );
    }

    #[test]
    fn a_component_that_was_not_built_yet_names_the_command_that_builds_it() {
        let (_root, app) = workspace();
        let error = refused(&app, None);
        assert!(error.starts_with("app thermo: thermo.wasm"), "{error}");
        assert!(error.contains("`headgate app build`"), "{error}");
    }

    #[test]
    fn of_components_in_several_target_folders_the_newest_is_taken() {
        let (root, app) = workspace();
        let older = root.path().join("target/apps/thermo/thermo.wasm");
        write(older.clone(), "older");
        let file = File::options().write(true).open(&older).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        write(
            root.path().join("apps/target/apps/thermo/thermo.wasm"),
            "newer",
        );
        assert_eq!(
            Package::find_with(&app, None, None).unwrap().component,
            b"newer"
        );
    }

    #[test]
    fn what_was_compiled_ahead_of_time_is_told_where_it_belongs() {
        let (_root, app) = workspace();
        write(app.join("thermo.cwasm"), "code");
        let error = refused(&app, None);
        assert!(
            error.contains("thermo.cwasm: compiled ahead of time"),
            "{error}"
        );
        assert!(error.contains("`apps.preinstalled`"), "{error}");
    }

    #[test]
    fn a_component_takes_the_manifest_beside_it_or_the_one_that_is_named() {
        let (root, app) = workspace();
        let beside = app.join("any-name.wasm");
        write(beside.clone(), "x");
        assert_eq!(
            Package::find_with(&beside, None, None).unwrap().name,
            "thermo"
        );

        let alone = root.path().join("alone.wasm");
        write(alone.clone(), "y");
        let error = refused(&alone, None);
        assert!(error.contains("--manifest FILE"), "{error}");
        let manifest = app.join("manifest.toml");
        let package = Package::find_with(&alone, Some(&manifest), None).unwrap();
        assert_eq!(package.component, b"y");
    }

    #[test]
    fn what_is_not_there_is_named() {
        let (root, app) = workspace();
        let missing = root.path().join("no-such-app");
        assert_eq!(
            refused(&missing, None),
            format!("{}: no such file or folder", missing.display())
        );
        assert!(refused(root.path(), None).contains("no manifest.toml in this folder"));
        let manifest = root.path().join("other.toml");
        let error = refused(&app, Some(&manifest));
        assert!(error.contains("other.toml"), "{error}");
    }

    #[test]
    fn a_bad_manifest_is_named_with_its_line() {
        let (_root, app) = workspace();
        write(
            app.join("manifest.toml"),
            "name = \"a/b\"\nversion = \"1\"\n",
        );
        let error = refused(&app, None);
        assert!(error.contains("manifest.toml: line 1"), "{error}");

        fs::write(app.join("manifest.toml"), b"name = \"\xff\"").unwrap();
        assert!(refused(&app, None).contains("not UTF-8"));
    }

    #[test]
    fn a_component_that_is_too_big_is_not_even_sent() {
        let (_root, app) = workspace();
        let component = File::create(app.join("thermo.wasm")).unwrap();
        component.set_len(MAX_COMPONENT_BYTES as u64 + 1).unwrap();
        let error = refused(&app, None);
        assert!(error.contains("larger than 67108864 bytes"), "{error}");
    }

    #[test]
    fn a_folder_in_the_place_of_the_component_is_refused() {
        let (_root, app) = workspace();
        fs::create_dir(app.join("thermo.wasm")).unwrap();
        assert!(refused(&app, None).ends_with("thermo.wasm: not a file"));
    }
}
