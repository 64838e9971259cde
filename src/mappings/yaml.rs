//! A YAML document with the place of everything in it, and with bounds on what aliases make of it.

use std::collections::hash_map::Entry;
use std::fmt;

use rustc_hash::FxHashMap;
use saphyr_parser::{Event, Parser, ScalarStyle, Span, Tag};

/// Largest file.
pub const MAX_BYTES: usize = 1 << 20;

/// Nodes of a document once its aliases are followed.
const MAX_NODES: usize = 100_000;

/// Bytes of its scalars, likewise.
const MAX_TEXT_BYTES: usize = 4 * MAX_BYTES;

const MAX_DEPTH: usize = 64;

/// A line and a column, both from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, serde::Serialize)]
pub struct Place {
    pub line: usize,
    pub column: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

#[derive(Clone, Debug)]
pub(super) struct Node {
    pub place: Place,
    pub kind: Kind,
}

#[derive(Clone, Debug)]
pub(super) enum Kind {
    Scalar(Scalar),
    Sequence(Vec<Node>),
    Mapping(Vec<(Key, Node)>),
}

#[derive(Clone, Debug)]
pub(super) struct Key {
    pub place: Place,
    pub text: String,
}

#[derive(Clone, Debug)]
pub(super) struct Scalar {
    pub text: String,
    pub style: ScalarStyle,
    /// A string because its tag says so.
    is_tagged_string: bool,
}

/// What a scalar stands for: as yaml.v3, which upstream reads its files with, resolves it.
#[derive(Debug, PartialEq)]
pub(super) enum Resolved<'a> {
    Null,
    Bool(bool),
    Number(f64),
    Date,
    String(&'a str),
}

#[derive(Debug, PartialEq)]
pub(super) struct YamlError {
    pub place: Place,
    pub message: String,
}

/// Reads the one document of `text`.
pub(super) fn parse(text: &str) -> Result<Node, YamlError> {
    if text.len() > MAX_BYTES {
        return Err(YamlError {
            place: Place { line: 1, column: 1 },
            message: format!("the file is larger than {} KiB", MAX_BYTES >> 10),
        });
    }
    let mut loader = Loader::default();
    for event in Parser::new_from_str(text) {
        match event {
            Ok((event, span)) => loader.event(event, span)?,
            Err(error) => {
                return Err(YamlError {
                    place: place_of(error.marker().line(), error.marker().col()),
                    message: error.info().to_owned(),
                });
            }
        }
    }
    loader.root.ok_or_else(|| YamlError {
        place: Place { line: 1, column: 1 },
        message: "the file is empty".to_owned(),
    })
}

fn place_of(line: usize, column: usize) -> Place {
    Place {
        line,
        column: column + 1,
    }
}

#[derive(Default)]
struct Loader {
    root: Option<Node>,
    open: Vec<Open>,
    /// By their number, with how much each is.
    anchors: Vec<Option<(Node, Size)>>,
    total: Size,
}

/// A sequence or mapping that has not ended.
struct Open {
    node: Node,
    /// Of a mapping, whose value is next.
    key: Option<Key>,
    /// The keys of a mapping, with their lines.
    keys: FxHashMap<String, usize>,
    anchor: usize,
    /// What had been read before it.
    before: Size,
}

#[derive(Clone, Copy, Default)]
struct Size {
    nodes: usize,
    bytes: usize,
}

impl Loader {
    fn event(&mut self, event: Event<'_>, span: Span) -> Result<(), YamlError> {
        let place = place_of(span.start.line(), span.start.col());
        let error = |message: &str| {
            Err(YamlError {
                place,
                message: message.to_owned(),
            })
        };
        match event {
            Event::DocumentStart(_) if self.root.is_some() => {
                error("a second document starts here: one file has one")
            }
            Event::Scalar(text, style, anchor, tag) => {
                let before = self.total;
                self.count(1, text.len(), place)?;
                let node = Node {
                    place,
                    kind: Kind::Scalar(Scalar {
                        text: text.into_owned(),
                        style,
                        is_tagged_string: tag.is_some_and(|tag| is_string(&tag)),
                    }),
                };
                self.finish(node, anchor, before)
            }
            Event::SequenceStart(anchor, _) => {
                self.start(Kind::Sequence(Vec::new()), anchor, place)
            }
            Event::MappingStart(anchor, _) => self.start(Kind::Mapping(Vec::new()), anchor, place),
            Event::SequenceEnd | Event::MappingEnd => {
                let open = self.open.pop().expect("the parser pairs them");
                self.finish(open.node, open.anchor, open.before)
            }
            Event::Alias(anchor) => {
                let Some(Some((node, size))) = self.anchors.get(anchor) else {
                    return error("this alias is part of what it stands for");
                };
                let (mut node, size) = (node.clone(), *size);
                let before = self.total;
                self.count(size.nodes, size.bytes, place)?;
                node.place = place;
                self.finish(node, 0, before)
            }
            _ => Ok(()),
        }
    }

    fn count(&mut self, nodes: usize, bytes: usize, place: Place) -> Result<(), YamlError> {
        self.total.nodes += nodes;
        self.total.bytes += bytes;
        if self.total.nodes > MAX_NODES || self.total.bytes > MAX_TEXT_BYTES {
            return Err(YamlError {
                place,
                message: "with its aliases the file is too large".to_owned(),
            });
        }
        Ok(())
    }

    fn start(&mut self, kind: Kind, anchor: usize, place: Place) -> Result<(), YamlError> {
        if self.open.len() >= MAX_DEPTH {
            return Err(YamlError {
                place,
                message: format!("nested more than {MAX_DEPTH} deep"),
            });
        }
        let before = self.total;
        self.count(1, 0, place)?;
        self.open.push(Open {
            node: Node { place, kind },
            key: None,
            keys: FxHashMap::default(),
            anchor,
            before,
        });
        Ok(())
    }

    /// Puts a node where it belongs.
    fn finish(&mut self, node: Node, anchor: usize, before: Size) -> Result<(), YamlError> {
        if anchor > 0 {
            if self.anchors.len() <= anchor {
                self.anchors.resize_with(anchor + 1, || None);
            }
            let size = Size {
                nodes: self.total.nodes - before.nodes,
                bytes: self.total.bytes - before.bytes,
            };
            self.count(size.nodes, size.bytes, node.place)?;
            self.anchors[anchor] = Some((node.clone(), size));
        }
        let Some(open) = self.open.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        match &mut open.node.kind {
            Kind::Sequence(items) => items.push(node),
            Kind::Mapping(members) => match open.key.take() {
                None => {
                    let Kind::Scalar(scalar) = node.kind else {
                        return Err(YamlError {
                            place: node.place,
                            message: "a key must be a plain word or a string".to_owned(),
                        });
                    };
                    open.key = Some(Key {
                        place: node.place,
                        text: scalar.text,
                    });
                }
                Some(key) if key.text == "<<" => merge(members, &mut open.keys, node)?,
                Some(key) => {
                    if let Some(line) = open.keys.insert(key.text.clone(), key.place.line) {
                        return Err(YamlError {
                            place: key.place,
                            message: format!(
                                "the key {} is there already, in line {line}",
                                key.text
                            ),
                        });
                    }
                    members.push((key, node));
                }
            },
            Kind::Scalar(_) => unreachable!("scalars are not opened"),
        }
        Ok(())
    }
}

/// `<<: *other`: what `other` has and the mapping has not before it.
fn merge(
    members: &mut Vec<(Key, Node)>,
    keys: &mut FxHashMap<String, usize>,
    node: Node,
) -> Result<(), YamlError> {
    let others = match node.kind {
        Kind::Mapping(other) => vec![other],
        Kind::Sequence(items) => items
            .into_iter()
            .filter_map(|item| match item.kind {
                Kind::Mapping(other) => Some(other),
                _ => None,
            })
            .collect(),
        Kind::Scalar(_) => {
            return Err(YamlError {
                place: node.place,
                message: "<< takes a mapping".to_owned(),
            });
        }
    };
    for (key, value) in others.into_iter().flatten() {
        if let Entry::Vacant(vacant) = keys.entry(key.text.clone()) {
            vacant.insert(key.place.line);
            members.push((key, value));
        }
    }
    Ok(())
}

fn is_string(tag: &Tag) -> bool {
    tag.suffix == "str"
}

impl Scalar {
    pub fn resolve(&self) -> Resolved<'_> {
        let text = self.text.as_str();
        if self.style != ScalarStyle::Plain || self.is_tagged_string {
            return Resolved::String(text);
        }
        match text {
            "" | "~" | "null" | "Null" | "NULL" => return Resolved::Null,
            "true" | "True" | "TRUE" => return Resolved::Bool(true),
            "false" | "False" | "FALSE" => return Resolved::Bool(false),
            ".nan" | ".NaN" | ".NAN" => return Resolved::Number(f64::NAN),
            _ => {}
        }
        let (is_negative, unsigned) = match text.as_bytes()[0] {
            b'-' => (true, &text[1..]),
            b'+' => (false, &text[1..]),
            _ => (false, text),
        };
        let signed = |number: f64| Resolved::Number(if is_negative { -number } else { number });
        if matches!(unsigned, ".inf" | ".Inf" | ".INF") {
            return signed(f64::INFINITY);
        }
        if !unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
            return Resolved::String(text);
        }
        let digits = unsigned.replace('_', "");
        let radix = match digits.as_bytes() {
            [b'0', b'x' | b'X', ..] => Some((16, 2)),
            [b'0', b'o' | b'O', ..] => Some((8, 2)),
            [b'0', b'b' | b'B', ..] => Some((2, 2)),
            [b'0', _, ..] if digits.bytes().all(|byte| byte.is_ascii_digit()) => Some((8, 1)),
            _ => None,
        };
        if let Some((radix, skipped)) = radix
            && let Ok(number) = u64::from_str_radix(&digits[skipped..], radix)
        {
            return signed(number as f64);
        }
        let is_number = digits
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'.' | b'e' | b'E' | b'+' | b'-'));
        if is_number && let Ok(number) = digits.parse() {
            return signed(number);
        }
        if is_date(text) {
            return Resolved::Date;
        }
        Resolved::String(text)
    }
}

/// `2026-11-22`, with or without a time.
fn is_date(text: &str) -> bool {
    let mut parts = text.splitn(3, '-');
    let digits = |part: Option<&str>, lengths: std::ops::RangeInclusive<usize>| {
        part.is_some_and(|part| {
            lengths.contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_digit())
        })
    };
    digits(parts.next(), 4..=4)
        && digits(parts.next(), 1..=2)
        && parts.next().is_some_and(|rest| {
            let day = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            (1..=2).contains(&day) && rest[day..].chars().next().is_none_or(|c| "Tt ".contains(c))
        })
}

impl Node {
    /// The node under `key`, if this is a mapping that has one.
    pub fn get(&self, key: &str) -> Option<&Node> {
        let Kind::Mapping(members) = &self.kind else {
            return None;
        };
        members
            .iter()
            .find(|(known, _)| known.text == key)
            .map(|(_, node)| node)
    }

    pub fn describe(&self) -> &'static str {
        match &self.kind {
            Kind::Mapping(_) => "a mapping",
            Kind::Sequence(_) => "a list",
            Kind::Scalar(scalar) => match scalar.resolve() {
                Resolved::Null => "nothing",
                Resolved::Bool(_) => "a boolean",
                Resolved::Number(_) => "a number",
                Resolved::Date => "a date",
                Resolved::String(_) => "a string",
            },
        }
    }
}

/// Where in the file the byte `offset` of a scalar's text is; its start where escapes and folded lines
/// make that unclear.
pub(super) fn place_within(file: &str, start: Place, scalar: &Scalar, offset: usize) -> Place {
    let before = &scalar.text[..offset.min(scalar.text.len())];
    match scalar.style {
        ScalarStyle::Literal => {
            let down = before.matches('\n').count();
            let last = &before[before.rfind('\n').map_or(0, |at| at + 1)..];
            // The parser's place may be that of the `|` or that of the first line under it that isn't blank.
            let is_header = |line: &str| line.chars().nth(start.column - 1) == Some('|');
            let header = file.lines().nth(start.line - 1).is_some_and(is_header);
            let blank = scalar.text.len() - scalar.text.trim_start_matches('\n').len();
            let first = if header {
                start.line + 1
            } else {
                start.line.saturating_sub(blank).max(1)
            };
            let full_line = file.lines().nth(first + blank - 1).unwrap_or_default();
            let indent = full_line.len() - full_line.trim_start_matches(' ').len();
            Place {
                line: first + down,
                column: indent + last.chars().count() + 1,
            }
        }
        ScalarStyle::Folded => start,
        style => {
            let quote = usize::from(style != ScalarStyle::Plain);
            let line = file.lines().nth(start.line - 1).unwrap_or_default();
            let is_verbatim = line
                .char_indices()
                .nth(start.column - 1 + quote)
                .is_some_and(|(at, _)| line[at..].starts_with(&scalar.text));
            if is_verbatim {
                Place {
                    line: start.line,
                    column: start.column + quote + before.chars().count(),
                }
            } else {
                start
            }
        }
    }
}
