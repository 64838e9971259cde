//! UMH topics and MQTT topics: `umh.v1.plant._raw.press` is `umh/v1/plant/_raw/press`.

/// The MQTT topic of a UMH topic. What has a `/` already is taken for an MQTT topic.
pub fn to_mqtt(topic: &str) -> String {
    if topic.contains('/') {
        topic.to_owned()
    } else {
        topic.replace('.', "/")
    }
}

/// The UMH topic of an MQTT topic.
pub fn to_umh(topic: &str) -> String {
    topic.replace('/', ".")
}

/// Checks a topic by the grammar of the Unified Namespace:
/// `umh.v1.LEVEL0[.LEVEL…]._CONTRACT[.PATH…].NAME`.
pub fn check(topic: &str) -> Result<(), &'static str> {
    if let Some(c) = topic
        .chars()
        .find(|c| !(c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')))
    {
        return Err(match c {
            ' ' => "it has a space in it",
            _ => "it has other characters than letters, digits, '-', '_' and '.'",
        });
    }
    let parts: Vec<&str> = topic.split('.').collect();
    if parts.iter().any(|part| part.is_empty()) {
        return Err("it starts or ends with a dot, or has two in a row");
    }
    if parts[..2.min(parts.len())] != ["umh", "v1"] {
        return Err("it does not start with umh.v1.");
    }
    if parts.len() < 5 {
        return Err("it has fewer than five parts: umh.v1.LEVEL0._CONTRACT.NAME");
    }
    if parts[2].starts_with('_') {
        return Err("its first level starts with an underscore");
    }
    let contract = parts[3..parts.len() - 1]
        .iter()
        .find(|part| part.starts_with('_'));
    match contract {
        None => {
            Err("it has no data contract: a part that starts with an underscore, before the last")
        }
        Some(&"_") => Err("its data contract has no name"),
        Some(_) => Ok(()),
    }
}

/// Checks the start of a topic, which has no contract yet.
pub fn check_location(topic: &str) -> Result<(), &'static str> {
    check(&format!("{topic}._contract.name"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topic_goes_to_mqtt_and_back() {
        let umh = "umh.v1.corp.plant._raw.press";
        assert_eq!(to_mqtt(umh), "umh/v1/corp/plant/_raw/press");
        assert_eq!(to_umh(&to_mqtt(umh)), umh);
        assert_eq!(to_mqtt("plant/line 1/t.x"), "plant/line 1/t.x");
    }

    #[test]
    fn the_grammar_tells_topics_from_others() {
        for topic in [
            "umh.v1.corp._raw.press",
            "umh.v1.corp.plant.line-1.cell_2._historian.motor.axis.x",
            "umh.v1.corp._raw._hidden",
            "umh.v1.corp.plant._a._b.c",
        ] {
            assert_eq!(check(topic), Ok(()), "{topic}");
        }
        for topic in [
            "",
            "umh",
            "umh.v1",
            "umh.v1.corp._raw",
            "umh.v2.corp._raw.press",
            "umh.v1._corp._raw.press",
            "umh.v1.corp.raw.press",
            "umh.v1.corp.plant._raw",
            "umh.v1.corp._.press",
            "umh.v1..corp._raw.press",
            ".umh.v1.corp._raw.press",
            "umh.v1.corp._raw.press.",
            "umh.v1.corp._raw.press 1",
            "umh.v1.corp._raw.prëss",
        ] {
            assert!(check(topic).is_err(), "{topic}");
        }
        assert_eq!(check_location("umh.v1.corp.plant"), Ok(()));
        assert!(check_location("factory.plant").is_err());
    }
}
