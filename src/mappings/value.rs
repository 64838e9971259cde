//! A source's value as JavaScript sees it, and JavaScript's conversions between the primitive ones.

use std::fmt::Write as _;
use std::mem;
use std::sync::Arc;

/// What can come in as a `value`: JSON, with numbers as JavaScript has them. Cheap to clone.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Null,
    Bool(bool),
    Number(f64),
    /// Strings that came as JSON have no lone surrogates, so UTF-8 loses nothing.
    String(Arc<str>),
    Array(Arc<Items>),
    Object(Arc<Members>),
}

/// What an array holds.
#[derive(Debug, Default, PartialEq)]
pub struct Items(pub Vec<Value>);

/// What an object holds, in the order of the document; of a key that comes twice the last value, at
/// its first place.
#[derive(Debug, Default, PartialEq)]
pub struct Members(pub Vec<(Box<str>, Value)>);

// Values may be nested 10,000 deep: dropped by recursion, they would need more stack than threads have.

impl Drop for Items {
    fn drop(&mut self) {
        drop_flat(mem::take(&mut self.0));
    }
}

impl Drop for Members {
    fn drop(&mut self) {
        drop_flat(mem::take(&mut self.0).into_iter().map(|(_, value)| value));
    }
}

fn drop_flat(values: impl IntoIterator<Item = Value>) {
    let nested = |value: &Value| matches!(value, Value::Array(_) | Value::Object(_));
    // Not collected from an iterator that may be the vector itself: most hold nothing nested.
    let mut waiting: Vec<Value> = Vec::new();
    waiting.extend(values.into_iter().filter(nested));
    while let Some(value) = waiting.pop() {
        match value {
            Value::Array(items) => {
                if let Some(mut items) = Arc::into_inner(items) {
                    waiting.extend(mem::take(&mut items.0).into_iter().filter(nested));
                }
            }
            Value::Object(members) => {
                if let Some(mut members) = Arc::into_inner(members) {
                    let values = mem::take(&mut members.0).into_iter();
                    waiting.extend(values.map(|(_, value)| value).filter(nested));
                }
            }
            _ => {}
        }
    }
}

impl Value {
    pub fn type_name(&self) -> &'static str {
        match self {
            Value::Null => "null",
            Value::Bool(_) => "boolean",
            Value::Number(_) => "number",
            Value::String(_) => "string",
            Value::Array(_) => "array",
            Value::Object(_) => "object",
        }
    }
}

/// `String(number)`, on the stack.
pub(super) struct NumberText {
    buffer: ryu_js::Buffer,
    number: f64,
}

impl NumberText {
    pub fn new(number: f64) -> NumberText {
        NumberText {
            buffer: ryu_js::Buffer::new(),
            number,
        }
    }

    pub fn as_str(&mut self) -> &str {
        self.buffer.format(self.number)
    }
}

/// What JavaScript takes for white space at the ends of a string.
pub(super) fn is_js_whitespace(c: char) -> bool {
    matches!(
        c,
        '\t' | '\n' | '\u{b}' | '\u{c}' | '\r' | ' ' | '\u{a0}' | '\u{1680}' | '\u{2000}'
            ..='\u{200a}'
                | '\u{2028}'
                | '\u{2029}'
                | '\u{202f}'
                | '\u{205f}'
                | '\u{3000}'
                | '\u{feff}'
    )
}

/// `Number(text)`; `None` where only an engine gives JavaScript's last digit.
pub(super) fn string_to_number(text: &str) -> Option<f64> {
    let text = text.trim_matches(is_js_whitespace);
    if text.is_empty() {
        return Some(0.0);
    }
    let bytes = text.as_bytes();
    if bytes.len() > 2 && bytes[0] == b'0' {
        let radix = match bytes[1] {
            b'x' | b'X' => 16,
            b'o' | b'O' => 8,
            b'b' | b'B' => 2,
            _ => 10,
        };
        if radix != 10 {
            let digits = &text[2..];
            if !digits
                .bytes()
                .all(|digit| char::from(digit).is_digit(radix))
            {
                return Some(f64::NAN);
            }
            // 52 bits at most: exact.
            return (digits.len() <= 13)
                .then(|| u64::from_str_radix(digits, radix).ok())
                .flatten()
                .map(|number| number as f64);
        }
    }
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    if unsigned == "Infinity" {
        return Some(if bytes[0] == b'-' {
            f64::NEG_INFINITY
        } else {
            f64::INFINITY
        });
    }
    // Rust also reads `inf`, `nan` and the like, which are no numbers to JavaScript.
    let decimal = unsigned
        .bytes()
        .all(|byte| matches!(byte, b'0'..=b'9' | b'.' | b'e' | b'E' | b'+' | b'-'));
    Some(if decimal {
        text.parse().unwrap_or(f64::NAN)
    } else {
        f64::NAN
    })
}

/// `ToInt32` of ECMA-262.
pub(super) fn to_int32(number: f64) -> i32 {
    let as_integer = number as i32;
    if f64::from(as_integer) == number {
        return as_integer;
    }
    if !number.is_finite() {
        return 0;
    }
    const MODULUS: f64 = 4_294_967_296.0;
    // `%` is exact, and so the sum below is.
    let rest = number.trunc() % MODULUS;
    let positive = if rest < 0.0 { rest + MODULUS } else { rest };
    (positive as u32).cast_signed()
}

/// `a < b` for strings compares UTF-16 code units; the order of UTF-8 differs beyond the BMP.
pub(super) fn compare_strings(a: &str, b: &str) -> std::cmp::Ordering {
    if a.is_ascii() && b.is_ascii() {
        a.cmp(b)
    } else {
        a.encode_utf16().cmp(b.encode_utf16())
    }
}

/// `number.toFixed(digits)`; `None` if the exact value may lie in the middle between two results,
/// where Rust rounds to even and JavaScript up.
pub(super) fn to_fixed(number: f64, digits: usize) -> Option<String> {
    if number.is_nan() || number.abs() >= 1e21 || digits > 100 {
        return None;
    }
    let mut text = String::with_capacity(24 + digits);
    write!(text, "{number:.*}", digits + 1).expect("a String takes all");
    if text.ends_with('5') {
        return None;
    }
    text.clear();
    // -0 is not below zero: it has no sign here.
    let number = if number == 0.0 { 0.0 } else { number };
    write!(text, "{number:.digits$}").expect("a String takes all");
    Some(text)
}
