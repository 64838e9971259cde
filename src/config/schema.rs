//! The keys as documentation: a JSON schema for editors, Markdown for people.

use std::fmt::Write;

use serde_json::{Map, Value as Json, json};

use super::key::{Key, Kind, Preset, Section};
use super::tree::SECTIONS;

/// The opening of `docs/configuration.md`.
const INTRODUCTION: &str = include_str!("introduction.md");

/// A JSON schema (draft 2020-12) of the configuration file.
pub fn json_schema() -> Json {
    let mut schema = table_schema(
        SECTIONS.iter().copied(),
        &[],
        "Headgate's configuration file",
    );
    schema["$schema"] = json!("https://json-schema.org/draft/2020-12/schema");
    schema["title"] = json!("headgate.toml");
    schema
}

fn table_schema<'s>(
    sections: impl Iterator<Item = &'s Section>,
    keys: &[Key],
    about: &str,
) -> Json {
    let mut properties = Map::new();
    for key in keys {
        properties.insert(key.split().1.to_owned(), key_schema(key));
    }
    for section in sections {
        let name = section.table.rsplit('.').next().unwrap_or(section.table);
        let inner = section.inner.iter().copied();
        let schema = table_schema(inner, section.keys, &section.about());
        properties.insert(name.to_owned(), schema);
    }
    json!({
        "type": "object",
        "description": about,
        "properties": properties,
        "additionalProperties": false,
    })
}

fn key_schema(key: &Key) -> Json {
    let mut schema = match &key.kind {
        Kind::Integer { min, max } => json!({"type": "integer", "minimum": min, "maximum": max}),
        Kind::Bytes { min, max, .. } => json!({
            "anyOf": [
                {"type": "integer", "minimum": min, "maximum": max},
                {"type": "string", "pattern": "^[0-9]+ ?(B|KiB|MiB|GiB)?$"},
            ]
        }),
        Kind::Path { .. } => json!({"type": "string", "minLength": 1}),
        Kind::OptionalPath | Kind::OptionalTopic => json!({"type": "string"}),
        Kind::Address => json!({"type": "string", "pattern": "^(off)?$|:[0-9]+$"}),
        Kind::Switch => json!({"type": "boolean"}),
        Kind::UrlPath => json!({"type": "string", "pattern": "^/"}),
        Kind::Choice(words) => json!({"type": "string", "enum": words}),
        Kind::LogFilter => json!({"type": "string", "minLength": 1}),
        Kind::TopicFilters | Kind::Checked(_) => json!({"type": "string"}),
        Kind::AppNames => json!({"type": "string", "pattern": "^[a-z0-9_., -]*$|^[*]$"}),
    };
    schema["description"] = json!(key.description());
    match key.preset {
        Preset::Text(text) => {
            schema["default"] = match key.kind {
                Kind::Integer { .. } => text.parse::<u64>().map_or(json!(text), |n| json!(n)),
                Kind::Switch => text.parse::<bool>().map_or(json!(text), |on| json!(on)),
                _ => json!(text),
            };
        }
        Preset::Derived { from, example, .. } => {
            schema["examples"] = json!([example]);
            schema["description"] = json!(format!("{} Default: {from}.", key.description()));
        }
    }
    schema
}

/// `docs/configuration.md`.
pub fn markdown() -> String {
    let mut text = String::from(INTRODUCTION);
    text.push_str("\n## Keys\n");
    for section in SECTIONS {
        write_section(&mut text, section);
    }
    text.push_str("\n## A file that sets every key to its default\n\n`store.path` and `admin.socket` follow where the gateway runs; these are examples.\n\n```toml\n");
    text.push_str(&example_file());
    text.push_str("```\n");
    text
}

fn write_section(text: &mut String, section: &Section) {
    // Writing to a String can't fail.
    let _ = write!(text, "\n### [{}]\n\n{}\n\n", section.table, section.about());
    text.push_str("| key | default | allowed | meaning |\n|---|---|---|---|\n");
    for key in section.keys {
        let default = match key.preset {
            Preset::Text(text) => format!("`{text}`"),
            Preset::Derived { from, .. } => from.to_owned(),
        };
        let _ = writeln!(
            text,
            "| `{}` | {default} | {} | {} |",
            key.split().1,
            key.kind.allowed(),
            key.description()
        );
    }
    for inner in section.inner {
        write_section(text, inner);
    }
}

fn example_file() -> String {
    let mut text = String::new();
    for section in SECTIONS {
        write_example(&mut text, section);
    }
    text
}

fn write_example(text: &mut String, section: &Section) {
    if !text.is_empty() {
        text.push('\n');
    }
    let _ = writeln!(text, "[{}]", section.table);
    for key in section.keys {
        let _ = writeln!(text, "{} = {}", key.split().1, key.toml_example());
    }
    for inner in section.inner {
        write_example(text, inner);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_documentation_is_what_the_keys_say() {
        let committed = include_str!("../../docs/configuration.md");
        assert!(
            committed == markdown(),
            "run: headgate config schema --markdown > docs/configuration.md"
        );
    }

    #[test]
    fn the_nixos_module_has_this_schema() {
        let committed = include_str!("../../modules/settings.schema.json");
        let committed: Json = serde_json::from_str(committed).unwrap();
        assert!(
            committed == json_schema(),
            "run: headgate config schema > modules/settings.schema.json"
        );
    }

    #[test]
    fn the_schema_knows_every_key_with_its_description_and_forbids_others() {
        let schema = json_schema();
        for key in super::super::keys() {
            let path = format!("/properties/{}", key.name.replace('.', "/properties/"));
            let found = schema.pointer(&path).unwrap_or_else(|| panic!("{path}"));
            let description = found["description"].as_str().unwrap();
            assert!(description.starts_with(&key.description()), "{path}");
        }
        assert_eq!(
            schema.pointer("/properties/pipeline/properties/batch/additionalProperties"),
            Some(&json!(false))
        );
        assert_eq!(
            schema.pointer("/properties/mqtt/properties/max_inflight/maximum"),
            Some(&json!(65_535))
        );
    }
}
