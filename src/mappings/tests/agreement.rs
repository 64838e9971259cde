//! The fast path gives what the engine gives, to the byte.

use proptest::prelude::*;

use crate::mappings::{Mapping, Sent};

fn value() -> impl Strategy<Value = String> {
    let numbers = prop_oneof![
        any::<f64>()
            .prop_filter("JSON has only finite numbers", |number| number.is_finite())
            .prop_map(|number| format!("{number:?}")),
        any::<i32>().prop_map(|number| number.to_string()),
        (-50i32..50).prop_map(|number| (f64::from(number) / 4.0).to_string()),
        prop::sample::select(vec![
            "0",
            "-0",
            "0.5",
            "-0.5",
            "1e21",
            "1e-7",
            "4294967296",
            "2147483648",
            "-2147483649",
            "9007199254740993",
            "1.005",
            "2.675",
            "1e308",
            "5e-324",
            "0.1",
        ])
        .prop_map(str::to_owned),
    ];
    let texts = prop::sample::select(vec![
        "", " ", "a", "b", "12", " 12 ", "1e3", "-0", "0x1f", "0b2", "Infinity", "inf", "nan",
        "1_000", "1.", ".5", ".", "é", "😀", "\u{ff5e}", "true", "<&>", "+5", "- 5", "\\u2028",
        "\\ufeff7",
    ])
    .prop_map(|text| format!("\"{text}\""));
    prop_oneof![
        6 => numbers,
        3 => texts,
        1 => prop::sample::select(vec!["true", "false"]).prop_map(str::to_owned),
        1 => prop::sample::select(vec!["[]", "[1]", "[\"x\", null]", "{}", "{\"k\": 3, \"length\": \"l\"}"])
            .prop_map(str::to_owned),
    ]
}

fn expression() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        6 => prop::sample::select(vec!["a", "b", "c", "a.length"]).prop_map(str::to_owned),
        2 => prop::sample::select(vec![
            "0", "1", "2", "-1", "0.5", "32", "1.8", "100", "1e21", "NaN", "Infinity", "undefined", "null",
            "true", "false", "Math.PI", "''", "'x'", "'10'", "'😀'", "0x10", "1e-7",
        ])
        .prop_map(str::to_owned),
        1 => (-1000i32..1000).prop_map(|number| format!("{}", f64::from(number) / 8.0)),
    ];
    leaf.prop_recursive(5, 40, 3, |inner| {
        let binary = prop::sample::select(vec![
            "+", "-", "*", "/", "%", "<", "<=", ">", ">=", "==", "!=", "===", "!==", "&", "|", "^", "<<",
            ">>", ">>>", "&&", "||",
        ]);
        let functions = prop::sample::select(vec![
            "Math.abs", "Math.ceil", "Math.floor", "Math.trunc", "Math.round", "Math.sign", "Math.fround",
            "Math.sqrt", "Math.cbrt", "Math.exp", "Math.expm1", "Math.log", "Math.log1p", "Math.log2",
            "Math.log10", "Math.sin", "Math.cos", "Math.tan", "Math.asin", "Math.acos", "Math.atan",
            "Math.sinh", "Math.cosh", "Math.tanh", "Number", "String", "Boolean", "parseInt",
            "parseFloat", "isNaN", "isFinite", "Number.isNaN", "Number.isFinite", "Number.isInteger",
        ]);
        prop_oneof![
            8 => (inner.clone(), binary, inner.clone())
                .prop_map(|(left, operator, right)| format!("({left} {operator} {right})")),
            1 => (inner.clone(), inner.clone()).prop_map(|(base, power)| format!("(({base}) ** ({power}))")),
            1 => (inner.clone(), inner.clone()).prop_map(|(left, right)| format!("(({left}) ?? ({right}))")),
            2 => (prop::sample::select(vec!["-", "+", "!", "~", "typeof ", "void "]), inner.clone())
                .prop_map(|(operator, operand)| format!("({operator}({operand}))")),
            2 => (inner.clone(), inner.clone(), inner.clone())
                .prop_map(|(test, yes, no)| format!("({test} ? {yes} : {no})")),
            2 => (functions, inner.clone()).prop_map(|(function, argument)| format!("{function}({argument})")),
            1 => (prop::sample::select(vec!["Math.max", "Math.min", "Math.pow", "Math.atan2"]), inner.clone(), inner.clone())
                .prop_map(|(function, left, right)| format!("{function}({left}, {right})")),
            1 => (inner.clone(), inner.clone()).prop_map(|(left, right)| format!("`<${{{left}}}${{{right}}}>`")),
            1 => (inner.clone(), 0usize..5).prop_map(|(number, digits)| format!("({number}).toFixed({digits})")),
            1 => (inner.clone(), prop::sample::select(vec![".k", "[0]", ".toString()", "['k']"]))
                .prop_map(|(object, member)| format!("({object}){member}")),
            1 => (inner.clone(), inner).prop_map(|(first, second)| format!("({first}, {second})")),
        ]
    })
}

fn mapping(expression: &str) -> Mapping {
    let file = serde_json::json!({
        "model": { "name": "m", "version": "v1" },
        "output_topic": "umh.v1.x",
        "sources": { "a": "umh.v1.x._raw.a", "b": "umh.v1.x._raw.b", "c": "umh.v1.x._raw.c" },
        "mapping": { "out": expression },
    });
    let (mapping, _) = Mapping::load(&file.to_string(), "m.yaml")
        .unwrap_or_else(|error| panic!("{expression}: {error}"));
    mapping
}

fn outcome(mapping: &mut Mapping, values: &[String; 3]) -> (Vec<Sent>, String) {
    let mut sent = Vec::new();
    for (alias, value) in ["a", "b", "c"].iter().zip(values) {
        let payload = format!("{{\"value\": {value}, \"timestamp_ms\": 1}}");
        let topic = format!("umh/v1/x/_raw/{alias}");
        mapping
            .on_message(&topic, payload.as_bytes(), None, 1, &mut sent)
            .unwrap();
    }
    let state = mapping.explain("out", 1).unwrap().state;
    (sent, state)
}

/// The payload with each number in it written in Rust's way: where the engine makes text of a power of
/// two, that may have a digit more than JavaScript asks for (2 ** -24 is one).
fn normalised(sent: &Sent) -> String {
    let payload = str::from_utf8(&sent.payload).unwrap();
    let is_part = |c: char| c.is_ascii_digit() || matches!(c, '.' | 'e' | '-' | '+');
    let mut text = String::new();
    let mut rest = payload;
    while let Some(start) = rest.find(is_part) {
        let len = rest[start..]
            .find(|c| !is_part(c))
            .unwrap_or(rest.len() - start);
        let (token, after) = rest[start..].split_at(len);
        text += &rest[..start];
        match token.parse::<f64>() {
            Ok(number) => text += &format!("{number:?}"),
            Err(_) => text += token,
        }
        rest = after;
    }
    text + rest
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3_000, ..ProptestConfig::default() })]

    #[test]
    fn the_fast_path_agrees_with_the_engine(
        expression in expression(),
        values in prop::collection::vec([value(), value(), value()], 4),
    ) {
        let mut fast = mapping(&expression);
        let mut engine = mapping(&expression).without_fast_path();
        for values in &values {
            let ((fast, fast_state), (engine, engine_state)) =
                (outcome(&mut fast, values), outcome(&mut engine, values));
            let payloads = |sent: &[Sent]| sent.iter().map(normalised).collect::<Vec<_>>();
            prop_assert_eq!(payloads(&fast), payloads(&engine), "{} of {:?}", expression, values);
            prop_assert_eq!(fast_state, engine_state, "{} of {:?}", expression, values);
        }
    }
}

/// Else the test above would compare the engine with itself.
#[test]
fn what_most_people_write_takes_the_fast_path() {
    for expression in [
        "a + 4.00001",
        "(a - 32) * 5 / 9",
        "a > 100 ? 'high' : 'low'",
        "`T: ${a}°C`",
        "a && b || !c",
        "Math.max(a, b, Math.abs(c))",
        "a.toFixed(2)",
        "typeof a === 'number' && a ** 2 > 3",
        "Number(a) | 0",
    ] {
        let mut mapping = mapping(expression);
        assert!(
            mapping.outputs().all(|output| output.is_fast),
            "{expression}"
        );
        let values = ["1.5", "2", "3"].map(str::to_owned);
        outcome(&mut mapping, &values);
        let counters = mapping.counters();
        assert_eq!(counters.javascript_executions, 0, "{expression}");
        assert!(counters.fast_executions > 0, "{expression}");
    }
}
