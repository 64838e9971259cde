//! `boot.json`, in which a NixOS system says how it is booted (RFC 125, "org.nixos.bootspec.v1").

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};
use serde::Deserialize;

use super::{BootError, Doing};

/// NixOS's own have a few KiB; those with many specialisations somewhat more.
const MAX_BYTES: u64 = 4 << 20;
/// systemd-boot reads no entry that is larger than 1 MiB, and the kernel takes 2 or 4 KiB.
const MAX_COMMAND_LINE_BYTES: usize = 64 << 10;

#[derive(Deserialize)]
struct Document {
    #[serde(rename = "org.nixos.bootspec.v1")]
    v1: Option<V1>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct V1 {
    label: String,
    kernel: Option<String>,
    #[serde(default)]
    kernel_params: Vec<String>,
    initrd: Option<String>,
    initrd_secrets: Option<String>,
    init: String,
    toplevel: String,
}

/// How a system is booted.
#[derive(Debug, PartialEq, Eq)]
pub struct Bootspec {
    /// For people, such as `NixOS Yarara 26.05 (Linux 6.18.2)`.
    pub label: String,
    /// In the store, as `kernel` and `init` are.
    pub initrd: Option<String>,
    pub kernel: String,
    pub init: String,
    pub kernel_params: Vec<String>,
}

impl Bootspec {
    /// Reads that of `toplevel`, `/nix/store/…`, in the store below `root`.
    pub fn read(root: &Path, toplevel: &str) -> Result<Bootspec, BootError> {
        let file = PathBuf::from(format!("{toplevel}/boot.json"));
        let problem = |problem: String| BootError::Bootspec {
            file: file.clone(),
            problem,
        };
        if !is_store_path(toplevel) {
            return Err(problem(
                "it is no system: a system is a store path, /nix/store/HASH-NAME".into(),
            ));
        }
        let mut text = Vec::new();
        open(root, &file)?
            .take(MAX_BYTES + 1)
            .read_to_end(&mut text)
            .doing("reading", &file)?;
        if text.len() as u64 > MAX_BYTES {
            return Err(problem(format!("it is larger than {MAX_BYTES} bytes")));
        }
        parse(&text, toplevel).map_err(problem)
    }
}

/// Opens a file of the store below `root`. Links lead to the store below `root`, too, however they are
/// written.
pub(super) fn open(root: &Path, file: &Path) -> Result<File, BootError> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    // The usual way: a confined service may not call openat2, whose flags no filter can look at.
    if root == Path::new("/") {
        let opened = openat(CWD, file, flags, Mode::empty()).doing("opening", file)?;
        return Ok(File::from(opened));
    }
    let folder =
        openat(CWD, root, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).doing("opening", root)?;
    let opened = openat2(folder, file, flags, Mode::empty(), ResolveFlags::IN_ROOT)
        .doing("opening", file)?;
    Ok(File::from(opened))
}

/// Says what is wrong, if something is.
fn parse(text: &[u8], toplevel: &str) -> Result<Bootspec, String> {
    let document: Document = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    let v1 = document.v1.ok_or(
        r#"it has no "org.nixos.bootspec.v1": the system is too old, or its bootspec too new"#,
    )?;
    if v1.toplevel != toplevel {
        return Err(format!("it is the boot.json of {}", v1.toplevel));
    }
    if v1.init != format!("{toplevel}/init") {
        return Err(format!("init is {:?}, not in this system", v1.init));
    }
    if v1.initrd_secrets.is_some() {
        return Err(
            "initrdSecrets is set: no secret can be added to an initrd here. Take boot.initrd.secrets out".into(),
        );
    }
    let kernel = v1.kernel.ok_or("it names no kernel")?;
    for (key, path) in [("kernel", Some(&kernel)), ("initrd", v1.initrd.as_ref())] {
        if let Some(path) = path.filter(|path| !is_in_store(path)) {
            return Err(format!("{key} is {path:?}, which is no file of the store"));
        }
    }
    // Each would begin a line of its own in the entry.
    if let Some(param) = v1
        .kernel_params
        .iter()
        .find(|param| param.contains(char::is_control))
    {
        return Err(format!(
            "the kernel parameter {param:?} has a control character"
        ));
    }
    if v1.kernel_params.iter().map(String::len).sum::<usize>() > MAX_COMMAND_LINE_BYTES {
        return Err(format!(
            "kernelParams have more than {MAX_COMMAND_LINE_BYTES} bytes"
        ));
    }
    Ok(Bootspec {
        label: v1.label,
        initrd: v1.initrd,
        kernel,
        init: v1.init,
        kernel_params: v1.kernel_params,
    })
}

/// Whether it is `/nix/store/HASH-NAME`. Such a name needs no quoting anywhere.
pub(super) fn is_store_path(path: &str) -> bool {
    path.strip_prefix("/nix/store/").is_some_and(is_store_name)
}

fn is_store_name(name: &str) -> bool {
    // A hash of 32 letters, a dash, and what Nix takes in names, 211 of them at most.
    name.len() <= 244
        && name.split_once('-').is_some_and(|(hash, name)| {
            hash.len() == 32 && hash.bytes().all(|b| b.is_ascii_alphanumeric()) && !name.is_empty()
        })
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"+-._?=".contains(&b))
}

/// The store path's base name, of a file in the store.
pub(super) fn store_name(file: &str) -> Option<&str> {
    let (name, _) = file.strip_prefix("/nix/store/")?.split_once('/')?;
    is_store_name(name).then_some(name)
}

fn is_in_store(file: &str) -> bool {
    store_name(file).is_some()
        && !file.contains(|c: char| c.is_control())
        && !file.split('/').any(|part| part == "..")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const SYSTEM: &str = "/nix/store/00000000000000000000000000000000-nixos-system";

    fn document() -> serde_json::Value {
        json!({
            "org.nixos.bootspec.v1": {
                "system": "aarch64-linux",
                "label": "NixOS",
                "kernel": "/nix/store/11111111111111111111111111111111-linux-6.18/Image",
                "kernelParams": ["quiet", "console=tty0"],
                "initrd": "/nix/store/22222222222222222222222222222222-initrd-linux-6.18/initrd",
                "init": format!("{SYSTEM}/init"),
                "toplevel": SYSTEM,
            },
            "org.nixos.specialisation.v1": {},
            "org.example.extension.v1": { "what": "we do not know" },
        })
    }

    fn parsed(document: &serde_json::Value) -> Result<Bootspec, String> {
        parse(document.to_string().as_bytes(), SYSTEM)
    }

    #[test]
    fn what_nixos_writes_is_read_with_extensions_left_alone() {
        let spec = parsed(&document()).unwrap();
        assert_eq!(spec.label, "NixOS");
        assert_eq!(spec.kernel_params, ["quiet", "console=tty0"]);
        assert_eq!(
            store_name(&spec.kernel),
            Some("11111111111111111111111111111111-linux-6.18")
        );
    }

    #[test]
    fn a_system_without_initrd_is_one() {
        let mut document = document();
        document["org.nixos.bootspec.v1"]
            .as_object_mut()
            .unwrap()
            .remove("initrd");
        assert_eq!(parsed(&document).unwrap().initrd, None);
    }

    #[test]
    fn what_is_wrong_is_said_of_each_key() {
        for (key, value, message) in [
            (
                "toplevel",
                json!("/nix/store/33333333333333333333333333333333-other"),
                "boot.json of /nix/store/3333",
            ),
            ("init", json!("/bin/sh"), "init is \"/bin/sh\""),
            ("kernel", json!(null), "names no kernel"),
            ("kernel", json!("/etc/passwd"), "kernel is \"/etc/passwd\""),
            (
                "kernel",
                json!("/nix/store/11111111111111111111111111111111-linux"),
                "no file of the store",
            ),
            (
                "kernel",
                json!("/nix/store/../../etc/passwd"),
                "no file of the store",
            ),
            (
                "kernel",
                json!("/nix/store/11111111111111111111111111111111-linux/../x"),
                "no file of the store",
            ),
            (
                "initrd",
                json!("/nix/store/11111111111111111111111111111111-a b/x"),
                "initrd is",
            ),
            (
                "initrd",
                json!("/nix/store/11111111111111111111111111111111-a/x\ny"),
                "initrd is",
            ),
            (
                "initrdSecrets",
                json!("/nix/store/x"),
                "boot.initrd.secrets",
            ),
            (
                "kernelParams",
                json!(["a\ninitrd /evil"]),
                "control character",
            ),
            (
                "kernelParams",
                json!(["a".repeat(MAX_COMMAND_LINE_BYTES + 1)]),
                "more than 65536 bytes",
            ),
            ("kernelParams", json!("quiet"), "invalid type"),
        ] {
            let mut document = document();
            document["org.nixos.bootspec.v1"][key] = value.clone();
            let error = parsed(&document).unwrap_err();
            assert!(error.contains(message), "{key} = {value}: {error}");
        }
        for text in ["", "{", "[]", "null", "\u{0}"] {
            assert!(parse(text.as_bytes(), SYSTEM).is_err(), "{text:?}");
        }
        let error = parse(br#"{"org.nixos.bootspec.v9":{}}"#, SYSTEM).unwrap_err();
        assert!(error.contains("org.nixos.bootspec.v1"), "{error}");
    }

    #[test]
    fn a_link_of_the_store_leads_to_the_store_below_the_root() {
        let root = tempfile::tempdir().unwrap();
        let store = root.path().join("nix/store");
        std::fs::create_dir_all(store.join("a")).unwrap();
        std::fs::write(store.join("a/file"), "below").unwrap();
        std::os::unix::fs::symlink("/nix/store/a", store.join("b")).unwrap();
        std::os::unix::fs::symlink("../../../../../../etc/passwd", store.join("out")).unwrap();
        let mut text = String::new();
        let opened = open(root.path(), Path::new("/nix/store/b/file"));
        opened.unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "below");
        let error = open(root.path(), Path::new("/nix/store/out")).unwrap_err();
        assert!(error.to_string().contains("/nix/store/out"), "{error}");
    }
}
