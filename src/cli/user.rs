//! `headgate user …`: keeps the password file, on the machine where it lies.

use std::fs::{File, Permissions};
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};
use serde_json::json;

use super::output::Output;
use super::prompt;
use super::{Global, small_runtime};
use crate::admin::ClientError;
use crate::broker::access::passwords::{self, Passwords};
use crate::config::Config;

/// The longest that a CONNECT can carry.
const MAX_PASSWORD_BYTES: usize = 65_535;

#[derive(Subcommand)]
pub(super) enum UserCommand {
    /// Add a user, or change the password of one
    ///
    /// Asks for the password twice. It is kept as an Argon2id hash.
    Add {
        name: String,
        /// Groups that access rules can name, or '' for none; without this, those of a user that is
        /// there stay
        #[arg(long, value_name = "GROUP,…", value_delimiter = ',')]
        groups: Option<Vec<String>>,
        /// Read the password from standard input
        #[arg(long)]
        password_stdin: bool,
        #[command(flatten)]
        place: Place,
    },
    /// Remove a user; who is connected under this name is disconnected
    Remove {
        name: String,
        #[command(flatten)]
        place: Place,
    },
    /// List the users and their groups
    List {
        #[command(flatten)]
        place: Place,
    },
}

#[derive(Args)]
pub(super) struct Place {
    /// Password file [default: mqtt.auth.password_file of the configuration]
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
}

pub(super) fn run(command: UserCommand, global: &Global, output: &Output) -> anyhow::Result<()> {
    match command {
        UserCommand::Add {
            name,
            groups,
            password_stdin,
            place,
        } => {
            let path = place.path(global)?;
            passwords::check_user_name(&name).with_context(|| format!("the user name {name:?}"))?;
            // Said as `--groups ''`: in none.
            let groups = groups.map(|groups| match groups.as_slice() {
                [only] if only.is_empty() => Vec::new(),
                _ => groups,
            });
            for group in groups.iter().flatten() {
                passwords::check_group_name(group)
                    .with_context(|| format!("the group name {group:?}"))?;
            }
            let password = match password_stdin {
                true => read_password()?,
                false => ask_for_password(&name)?,
            };
            let hash = passwords::hash(password.as_bytes())?;
            let mut is_new = true;
            edit(&path, |file, users| {
                let known = users.users().find(|(user, _)| *user == name);
                is_new = known.is_none();
                let before = known.map(|(_, user)| user.groups.clone());
                let groups = groups.clone().or(before).unwrap_or_default();
                Ok(passwords::with_user(file, &name, &hash, &groups))
            })?;
            let done = match is_new {
                true => format!("user {name} added"),
                false => format!("password of user {name} changed"),
            };
            tell(&path, &done, global, output)
        }
        UserCommand::Remove { name, place } => {
            let path = place.path(global)?;
            edit(&path, |file, _| {
                passwords::without_user(file, &name)
                    .with_context(|| format!("no user {name:?} in {}", path.display()))
            })?;
            tell(&path, &format!("user {name} removed"), global, output)
        }
        UserCommand::List { place } => list(&place.path(global)?, output),
    }
}

impl Place {
    fn path(&self, global: &Global) -> anyhow::Result<PathBuf> {
        if let Some(file) = &self.file {
            return Ok(file.clone());
        }
        let resolved = Config::load(global.source(Vec::new()))?;
        resolved.config.mqtt.auth.password_file.context(
            "no password file: set mqtt.auth.password_file in the configuration, such as \
             \"/var/lib/headgate/passwords\", or name the file with --file",
        )
    }
}

fn list(path: &Path, output: &Output) -> anyhow::Result<()> {
    let passwords = Passwords::load(path)?;
    let mut users: Vec<_> = passwords.users().collect();
    users.sort_by_key(|(name, _)| *name);
    if output.json {
        let users = users
            .iter()
            .map(|(name, user)| json!({ "name": name, "groups": user.groups }));
        return output.value(&users.collect::<Vec<_>>());
    }
    let row =
        |(name, user): &(&str, &passwords::User)| [(*name).to_owned(), user.groups.join(", ")];
    output.table(
        ["USER", "GROUPS"],
        &users.iter().map(row).collect::<Vec<_>>(),
    )
}

fn read_password() -> anyhow::Result<String> {
    let mut password = String::new();
    let most = MAX_PASSWORD_BYTES as u64 + 2;
    io::stdin()
        .take(most)
        .read_to_string(&mut password)
        .context("reading the password from standard input")?;
    let password = password.strip_suffix('\n').unwrap_or(&password);
    let password = password.strip_suffix('\r').unwrap_or(password);
    checked(password.to_owned())
}

fn ask_for_password(user: &str) -> anyhow::Result<String> {
    ensure!(
        io::stdin().is_terminal(),
        "there is no terminal to ask for the password; give it with --password-stdin"
    );
    let password = checked(prompt::hidden(format!("Password of user {user}: "))?)?;
    let again = prompt::hidden("Again: ".into())?;
    prompt::done()?;
    ensure!(
        password == again,
        "the two passwords differ; nothing was changed"
    );
    Ok(password)
}

fn checked(password: String) -> anyhow::Result<String> {
    ensure!(!password.is_empty(), "the password is empty");
    ensure!(
        password.len() <= MAX_PASSWORD_BYTES,
        "the password has more than {MAX_PASSWORD_BYTES} bytes"
    );
    Ok(password)
}

/// Replaces the file by what `change` makes of it, at once or not at all. One process at a time.
fn edit(
    path: &Path,
    change: impl FnOnce(&str, &Passwords) -> anyhow::Result<String>,
) -> anyhow::Result<()> {
    // A link stays, and what it leads to is replaced.
    let path = &path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let folder_file =
        File::open(folder).with_context(|| format!("opening the folder {}", folder.display()))?;
    folder_file
        .lock()
        .with_context(|| format!("locking the folder {}", folder.display()))?;
    let before = match path.metadata() {
        Ok(metadata) => Some(metadata),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => bail!("{}: {error}", path.display()),
    };
    let (text, users) = match before {
        Some(_) => {
            let users = Passwords::load(path)?;
            let text = std::fs::read_to_string(path);
            let text = text.with_context(|| path.display().to_string())?;
            (text.trim_start_matches('\u{feff}').to_owned(), users)
        }
        None => Default::default(),
    };
    let changed = change(&text, &users)?;
    let write = || -> io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        // Root makes the file for whoever owns the folder: the gateway has to read it.
        let owner = before
            .as_ref()
            .map_or_else(|| folder_file.metadata(), |old| Ok(old.clone()))?;
        let mode = before
            .as_ref()
            .map_or(0o600, |old| old.permissions().mode() & 0o777);
        let new = file.as_file().metadata()?;
        if (new.uid(), new.gid()) != (owner.uid(), owner.gid())
            && (new.uid() == 0 || before.is_some())
        {
            fchown(file.as_file(), Some(owner.uid()), Some(owner.gid()))?;
        }
        file.as_file()
            .set_permissions(Permissions::from_mode(mode))?;
        file.write_all(changed.as_bytes())?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        folder_file.sync_all()
    };
    write().with_context(|| {
        format!(
            "can't replace {}; run this as its owner, or as root",
            path.display()
        )
    })
}

/// Says what was done, after having told the gateway, if there is one that uses this file.
fn tell(path: &Path, done: &str, global: &Global, output: &Output) -> anyhow::Result<()> {
    let configured = Config::load(global.source(Vec::new()))?
        .config
        .mqtt
        .auth
        .password_file;
    let is_configured = configured.is_some_and(|file| {
        let same = file.canonicalize().ok().zip(path.canonicalize().ok());
        same.is_some_and(|(one, other)| one == other)
    });
    let reload = match is_configured {
        true => Some(small_runtime()?.block_on(global.client()?.reload())),
        false => None,
    };
    let (reloaded, effect) = match reload {
        Some(Ok(())) => (true, "the gateway knows it".to_owned()),
        Some(Err(ClientError::NotRunning { .. })) => (
            false,
            "no gateway is running here: it takes effect when one starts".to_owned(),
        ),
        Some(Err(error)) => {
            bail!(
                "{done} in {}, but the gateway has not read it: {error}",
                path.display()
            )
        }
        None => (
            false,
            "it takes effect with `headgate reload`, in a gateway whose mqtt.auth.password_file \
             names this file"
                .to_owned(),
        ),
    };
    if output.json {
        return output.value(&json!({ "done": done, "file": path, "reloaded": reloaded }));
    }
    output.text(format!("{done} in {}; {effect}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        path.metadata().unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn a_file_is_replaced_with_the_mode_that_it_had() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("passwords");
        edit(&path, |text, _| Ok(format!("{text}# a\n"))).unwrap();
        assert_eq!(mode(&path), 0o600);
        std::fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        edit(&link, |text, _| Ok(format!("{text}# b\n"))).unwrap();
        assert_eq!(mode(&path), 0o640);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "# a\n# b\n");
        assert!(link.symlink_metadata().unwrap().is_symlink());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn the_user_after_a_byte_order_mark_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("passwords");
        let hash = passwords::hash(b"x").unwrap();
        std::fs::write(&path, format!("\u{feff}anna:{hash}\n")).unwrap();
        edit(&path, |file, users| {
            assert_eq!(users.users().count(), 1);
            Ok(passwords::without_user(file, "anna").unwrap())
        })
        .unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "");
    }

    #[test]
    fn a_file_that_is_wrong_is_not_touched() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("passwords");
        std::fs::write(&path, "anna:secret\n").unwrap();
        let error = edit(&path, |_, _| unreachable!()).unwrap_err().to_string();
        assert!(error.contains(":1: "), "{error}");
        let nowhere = folder.path().join("no/passwords");
        let error = edit(&nowhere, |_, _| unreachable!())
            .unwrap_err()
            .to_string();
        assert!(error.contains("no"), "{error}");
    }

    #[test]
    fn of_changes_at_once_none_is_lost() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("passwords");
        let threads: Vec<_> = (0..8)
            .map(|number| {
                let path = path.clone();
                std::thread::spawn(move || edit(&path, |text, _| Ok(format!("{text}# {number}\n"))))
            })
            .collect();
        for thread in threads {
            thread.join().unwrap().unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 8);
    }
}
