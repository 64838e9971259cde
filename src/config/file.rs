//! The configuration file: reads it and matches what stands in it with the known keys.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::key::{Key, Kind};
use super::origin::{Origin, Position};
use super::problem::{Fault, Problem, excerpt, printable, quoted};
use super::suggest;
use super::tree::{self, SECTIONS};
use super::value::{Value, describe};

/// Some hundred times what all keys take up. Keeps a wrong path, such as that of a disk image, from
/// being read into memory.
const MAX_FILE_BYTES: u64 = 256 * 1024;

/// A key that the file sets.
pub(super) struct FileSetting {
    pub key: &'static Key,
    pub value: Value,
    pub origin: Origin,
}

/// What a file sets, as far as it can be used, and all that is wrong with it.
#[derive(Default)]
pub(super) struct FileContents {
    pub settings: Vec<FileSetting>,
    pub problems: Vec<Problem>,
}

/// Reads the file at `path`.
pub(super) fn read(path: &Path) -> FileContents {
    let file: Arc<Path> = Arc::from(path);
    let whole_file = |fault, remedy: &str| FileContents {
        settings: Vec::new(),
        problems: vec![Problem {
            origin: Origin::File {
                file: file.clone(),
                position: None,
            },
            key: None,
            fault,
            remedy: remedy.to_owned(),
        }],
    };
    let bytes = match read_bytes(path) {
        Ok(bytes) => bytes,
        Err(error) => {
            let remedy = match error.kind() {
                io::ErrorKind::NotFound => {
                    "name a file that exists with --config or HEADGATE_CONFIG, or none for the defaults"
                }
                io::ErrorKind::IsADirectory => {
                    return whole_file(Fault::IsFolder, "name the file in it");
                }
                io::ErrorKind::PermissionDenied => {
                    "give the user that runs headgate the right to read it"
                }
                _ => "name another file with --config or HEADGATE_CONFIG",
            };
            return whole_file(Fault::Unreadable(error), remedy);
        }
    };
    if bytes.len() as u64 > MAX_FILE_BYTES {
        let limit = MAX_FILE_BYTES;
        return whole_file(
            Fault::FileTooLarge { limit },
            "name a TOML file with settings; this looks like something else",
        );
    }
    match String::from_utf8(bytes) {
        Ok(text) => Document {
            text: &text,
            file: file.clone(),
            folder: path.parent().unwrap_or(Path::new("")),
            contents: FileContents::default(),
        }
        .read(),
        Err(error) => {
            let valid = error.utf8_error().valid_up_to();
            let text = String::from_utf8_lossy(&error.as_bytes()[..valid]).into_owned();
            let mut contents = whole_file(
                Fault::FileNotUtf8,
                "save the file in UTF-8; the first wrong byte is at this place",
            );
            for problem in &mut contents.problems {
                problem.origin = Origin::File {
                    file: file.clone(),
                    position: Some(Position::in_text(&text, text.len())),
                };
            }
            contents
        }
    }
}

/// Reads one byte more than is allowed at most, so that the caller can tell.
fn read_bytes(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(MAX_FILE_BYTES + 1)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A file that is being matched with the keys.
struct Document<'t> {
    text: &'t str,
    file: Arc<Path>,
    /// Where the file lies: relative paths in it count from here.
    folder: &'t Path,
    contents: FileContents,
}

impl Document<'_> {
    fn read(mut self) -> FileContents {
        let (root, errors) = DeTable::parse_recoverable(self.text);
        // What is found beside a syntax error is a guess of the parser's: complaining of it as well
        // would bury the mistake. A key that stands there twice leaves no doubt about the others.
        let is_sound = errors.iter().all(|error| error.message() == DUPLICATE_KEY);
        for error in errors {
            self.syntax_problem(&error);
        }
        if is_sound {
            self.walk(root.get_ref(), "");
        }
        self.contents
            .problems
            .sort_by_key(|problem| match problem.origin {
                Origin::File { position, .. } => position,
                _ => None,
            });
        self.contents
    }

    fn syntax_problem(&mut self, error: &toml::de::Error) {
        let offset = error.span().map_or(0, |span| span.start);
        let origin = self.origin(offset);
        // One slip often makes the parser stumble several times in the same line.
        if self
            .contents
            .problems
            .iter()
            .any(|known| same_line(&known.origin, &origin))
        {
            return;
        }
        let message = error.message();
        let remedy = if message == DUPLICATE_KEY {
            "a key can be set once: remove one of the two".to_owned()
        } else {
            self.line_remedy(offset)
        };
        // The parser's way to say that no continuation would do.
        let message = message
            .strip_suffix(", expected nothing")
            .unwrap_or(message);
        self.contents.problems.push(Problem {
            origin,
            key: None,
            fault: Fault::Syntax(printable(message.chars())),
            remedy,
        });
    }

    /// What to do about a line that is no TOML. Text without quotes is by far the most usual slip.
    fn line_remedy(&self, offset: usize) -> String {
        let line = self.line_at(offset).trim();
        let Some((word, value)) = line.split_once('=') else {
            return format!("mend this line: {}", excerpt(line));
        };
        let (word, value) = (word.trim(), value.trim());
        let takes_text = |key: &Key| {
            !matches!(key.kind, Kind::Integer { .. }) && (key.split().1 == word || key.name == word)
        };
        if !value.starts_with(['"', '\'', '[', '{']) && tree::keys().any(takes_text) {
            format!("put the value in quotes: {word} = {}", quoted(value))
        } else {
            format!("mend this line: {}", excerpt(line))
        }
    }

    /// Takes the settings from `table`, whose dotted name is `prefix`.
    fn walk(&mut self, table: &DeTable<'_>, prefix: &str) {
        for (segment, value) in table {
            let name = dotted(prefix, segment.get_ref());
            if let Some(key) = tree::keys().find(|key| key.name == name) {
                self.setting(key, value);
            } else if is_table(&name) {
                match value.get_ref() {
                    DeValue::Table(inner) => self.walk(inner, &name),
                    other => self.problem(
                        value.span().start,
                        &name,
                        Fault::WrongType {
                            expected: "a table".to_owned(),
                            found: describe(other),
                        },
                        format!("write [{name}] on a line of its own, and its keys below"),
                    ),
                }
            } else {
                self.unknown(segment, value.get_ref(), &name);
            }
        }
    }

    fn setting(&mut self, key: &'static Key, value: &Spanned<DeValue<'_>>) {
        let offset = value.span().start;
        match key.kind.read_toml(value.get_ref(), self.folder) {
            Ok(value) => {
                let origin = self.origin(offset);
                self.contents
                    .settings
                    .push(FileSetting { key, value, origin });
            }
            Err(fault) => {
                let (table, word) = key.split();
                let remedy = format!("write {word} = {} in [{table}]", key.toml_example());
                self.problem(offset, key.name, fault, remedy);
            }
        }
    }

    fn unknown(&mut self, segment: &Spanned<impl AsRef<str>>, value: &DeValue<'_>, name: &str) {
        let is_table = match value {
            DeValue::Table(_) => true,
            DeValue::Array(items) => items.iter().any(|item| item.get_ref().is_table()),
            _ => false,
        };
        let (fault, known) = if is_table {
            let tables = tables().collect::<Vec<_>>();
            let known = suggest::nearest_dotted(name, tables.into_iter())
                .map(|table| format!("did you mean [{table}]?"));
            (Fault::UnknownTable, known)
        } else {
            let known = suggest::nearest_dotted(name, tree::keys().map(|key| key.name))
                .map(|key| format!("did you mean {key}?"));
            (Fault::UnknownKey, known)
        };
        let remedy = known.unwrap_or_else(|| {
            "remove it; headgate config schema --markdown lists all keys".to_owned()
        });
        self.problem(segment.span().start, name, fault, remedy);
    }

    fn problem(&mut self, offset: usize, key: &str, fault: Fault, remedy: String) {
        let origin = self.origin(offset);
        self.contents.problems.push(Problem {
            origin,
            key: Some(key.to_owned()),
            fault,
            remedy,
        });
    }

    fn origin(&self, offset: usize) -> Origin {
        Origin::File {
            file: self.file.clone(),
            position: Some(Position::in_text(self.text, offset)),
        }
    }

    fn line_at(&self, offset: usize) -> &str {
        let line = Position::in_text(self.text, offset).line;
        self.text.lines().nth(line - 1).unwrap_or("")
    }
}

/// How the TOML parser calls a key that stands in a table twice.
const DUPLICATE_KEY: &str = "duplicate key";

fn same_line(one: &Origin, other: &Origin) -> bool {
    let line = |origin: &Origin| match origin {
        Origin::File {
            position: Some(position),
            ..
        } => Some(position.line),
        _ => None,
    };
    line(one) == line(other)
}

fn tables() -> impl Iterator<Item = &'static str> {
    SECTIONS.iter().flat_map(|section| {
        std::iter::once(section.table).chain(section.inner.iter().map(|inner| inner.table))
    })
}

fn is_table(name: &str) -> bool {
    tables().any(|table| table == name)
}

/// The dotted name of `segment` in table `prefix`; quoted as in TOML where that is needed.
fn dotted(prefix: &str, segment: &str) -> String {
    let is_bare = !segment.is_empty()
        && segment
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-');
    let segment = if is_bare {
        segment.to_owned()
    } else {
        quoted(segment)
    };
    if prefix.is_empty() {
        segment
    } else {
        format!("{prefix}.{segment}")
    }
}
