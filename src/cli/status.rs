//! `headgate status`: how the running gateway is.

use clap::Args;
use serde_json::Value;

use super::output::{Output, printable};
use super::{Global, small_runtime};

/// Show how the running gateway is
#[derive(Args)]
pub(super) struct StatusArgs {}

pub(super) fn run(_: StatusArgs, global: &Global, output: &Output) -> anyhow::Result<()> {
    let client = global.client()?;
    let status = small_runtime()?.block_on(client.status())?;
    if output.json {
        return output.value(&status);
    }
    let mut rows = Vec::new();
    flatten("", &status, &mut rows);
    let width = rows.iter().map(|(key, _)| key.len()).max().unwrap_or(0);
    for (key, value) in rows {
        output.text(format!("{key:<width$}  {}", printable(&value)))?;
    }
    Ok(())
}

/// One row a leaf, with the names on the way to it as a dotted key.
fn flatten(prefix: &str, value: &Value, rows: &mut Vec<(String, String)>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let key = if prefix.is_empty() {
                    name.clone()
                } else {
                    format!("{prefix}.{name}")
                };
                flatten(&key, value, rows);
            }
        }
        Value::String(text) => rows.push((prefix.to_owned(), text.clone())),
        Value::Array(items) if items.iter().all(Value::is_string) => {
            let words: Vec<_> = items.iter().filter_map(Value::as_str).collect();
            rows.push((prefix.to_owned(), words.join(", ")));
        }
        other => rows.push((prefix.to_owned(), other.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_shown_as_one_line_a_value() {
        let status = serde_json::json!({
            "version": "0.1.0",
            "mqtt": { "clients": 3, "listen": ["a", "b"] },
            "ready": true
        });
        let mut rows = Vec::new();
        flatten("", &status, &mut rows);
        rows.sort();
        let rows: Vec<_> = rows.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        assert_eq!(
            rows,
            [
                ("mqtt.clients", "3"),
                ("mqtt.listen", "a, b"),
                ("ready", "true"),
                ("version", "0.1.0")
            ]
        );
    }
}
