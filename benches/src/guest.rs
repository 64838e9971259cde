//! Components for measurements, made from text.

use std::path::Path;

use anyhow::{Context, Result};

/// A guest that does what the first byte of a batch tells it to: see the file. `code` stands beside its
/// functions.
pub fn obedient(code: &str) -> Result<Vec<u8>> {
    const GUEST: &str = include_str!("../../src/apps/tests/guest.wat");
    let text = GUEST.replace("CONFIGURE", "");
    let text = text
        .trim_end()
        .strip_suffix(')')
        .context("a module ends with )")?;
    component(&format!("{text}\n{code})"))
}

/// Functions that make a component so many bytes larger, or somewhat more: of the size that those of a
/// program in Rust have on average. Nobody calls them, but they are compiled and loaded.
pub fn ballast(bytes: usize) -> String {
    const FUNCTION_BYTES: usize = 600;
    const LINE_BYTES: usize = 36;
    let count = bytes / FUNCTION_BYTES;
    let mut text = format!("(table {count} funcref) (elem (i32.const 0) func");
    for number in 0..count {
        text.push_str(&format!(" $ballast{number}"));
    }
    text.push(')');
    for number in 0..count {
        text.push_str(&format!(
            "(func $ballast{number} (param i32 i32) (result i32)"
        ));
        for line in 0..FUNCTION_BYTES / LINE_BYTES {
            text.push_str(&format!(
                "(i32.store (local.get 0) (i32.mul (local.get 1) (i32.const {number})))
                 (if (i32.lt_u (i32.load offset={line} (local.get 1)) (i32.const 7{number}))
                   (then (local.set 1 (i32.rotl (i32.load (local.get 0)) (local.get 1)))))\n"
            ));
        }
        text.push_str("(local.get 1))\n");
    }
    text
}

fn component(text: &str) -> Result<Vec<u8>> {
    let mut module = wat::parse_str(text)?;
    let mut resolve = wit_parser::Resolve::default();
    let wit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../wit");
    let (package, _) = resolve.push_dir(&wit)?;
    let world = resolve.select_world(&[package], Some("app"))?;
    let encoding = wit_component::StringEncoding::UTF8;
    wit_component::embed_component_metadata(&mut module, &resolve, world, encoding, false)?;
    wit_component::ComponentEncoder::default()
        .module(&module)?
        .validate(true)
        .encode()
}
