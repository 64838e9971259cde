//! Whatever comes in, there is one clear error or none, in a bounded time; nothing stays behind.

use std::time::{Duration, Instant};

use crate::mappings::analysis::BLOCKED;
use crate::mappings::{Counters, Failure, MAX_EXPRESSION_BYTES, Mapping, Refusal, Sent};

const HEAD: &str = "model: { name: m, version: v1 }
output_topic: umh.v1.x
sources:
  a: umh.v1.x._raw.a
  b: umh.v1.x._raw.b
";

fn error(file: &str) -> String {
    match Mapping::load(file, "m.yaml") {
        Ok(_) => panic!("taken: {file}"),
        Err(error) => error.to_string(),
    }
}

/// A mapping of one output.
fn file(expression: &str) -> String {
    let expression = serde_json::to_string(expression).unwrap();
    format!("{HEAD}headgate: {{ time_limit: 30ms }}\nmapping:\n  out: {expression}\n")
}

fn load(expression: &str) -> Mapping {
    match Mapping::load(&file(expression), "m.yaml") {
        Ok((mapping, _)) => mapping,
        Err(error) => panic!("{expression}: {error}"),
    }
}

/// What comes of an expression when `a` gets a value: a payload's value, or why there is none.
fn outcome(expression: &str, value: &str) -> Result<String, String> {
    let mut mapping = load(expression);
    let mut sent = Vec::new();
    send(&mut mapping, value, &mut sent).unwrap();
    match &sent[..] {
        [] => Err(mapping.explain("out", 0).unwrap().state),
        [sent] => {
            let payload = str::from_utf8(&sent.payload).unwrap();
            let value = payload.strip_prefix("{\"value\":").unwrap();
            Ok(value
                .strip_suffix(",\"timestamp_ms\":1}")
                .unwrap()
                .to_owned())
        }
        _ => panic!("{expression} has several outputs"),
    }
}

fn send(mapping: &mut Mapping, value: &str, sent: &mut Vec<Sent>) -> Result<(), Refusal> {
    let payload = format!("{{\"value\":{value},\"timestamp_ms\":1}}");
    mapping.on_message("umh/v1/x/_raw/a", payload.as_bytes(), None, 0, sent)
}

fn failure(expression: &str) -> String {
    match outcome(expression, "1") {
        Ok(value) => panic!("{expression} gives {value}"),
        Err(failure) => failure,
    }
}

#[test]
fn each_mistake_in_a_file_has_an_error_with_its_place() {
    let cases = [
        ("", "m.yaml:1:1: not valid YAML: the file is empty"),
        ("a: [", "not valid YAML"),
        (
            "input: {}\n",
            "m.yaml:1:1: there is no stream_processor in this file",
        ),
        ("mode: ''\n", "m.yaml:1:7: mode is required"),
        (
            "mode: relational\n",
            "m.yaml:1:7: unsupported mode: relational (only 'timeseries' is supported)",
        ),
        ("mode: timeseries\n", "output_topic is required"),
        ("output_topic: umh.v1.x\n", "model name is required"),
        (
            "output_topic: umh.v1.x\nmodel: { name: m }\n",
            "m.yaml:2:8: model version is required",
        ),
        (
            "output_topic: umh.v1.x\nmodel: { name: m, version: 1 }\n",
            "m.yaml:2:28: version must be a string; it is a number: put it in quotes",
        ),
        (
            "output_topic: umh.v1.x\nmodel: { name: m, version: v1 }\nsources: {}\n",
            "m.yaml:3:10: at least one source mapping is required",
        ),
        (
            "output_topic: umh.v1.x\nmodel: { name: m, version: v1 }\nsources: [a]\n",
            "m.yaml:3:10: sources must be a mapping; it is a list",
        ),
        (
            "output_topic: umh.v1.x\nmodel: { name: m, version: v1 }\nsources: { a: 7 }\n",
            "sources.a must be a topic, as a string; it is a number",
        ),
        (
            "modle: {}\nmode: timeseries\n",
            "m.yaml:1:1: unknown key modle; is it mode",
        ),
        (
            "mode: timeseries\nmodel: { nme: x }\n",
            "m.yaml:2:10: unknown key model.nme; is it model.name?",
        ),
        (
            "mode: timeseries\nmode: timeseries\n",
            "m.yaml:2:1: not valid YAML: the key mode is there already, in line 1",
        ),
        (
            "a: { stream_processor: {} }\nb: { stream_processor: {} }\n",
            "m.yaml:2:24: a second stream_processor; the first is in line 1",
        ),
        (
            "mode: timeseries\n---\nmode: timeseries\n",
            "a second document",
        ),
    ];
    for (file, expected) in cases {
        let error = error(file);
        assert!(error.contains(expected), "{error}\n  for {file}");
    }
    let cases = [
        (
            "mapping: 5\n",
            "m.yaml:6:10: mapping field must be an object",
        ),
        (
            "mapping:\n  p: [a]\n",
            "m.yaml:7:6: mapping.p is a list, not an expression",
        ),
        (
            "mapping:\n  p:\n",
            "mapping.p is empty: it needs an expression",
        ),
        ("mapping:\n  p: 2026-11-22\n", "mapping.p is a date to YAML"),
        (
            "mapping:\n  p: ''\n",
            "m.yaml:7:7: failed to analyze mappings: mapping 'p': empty expression",
        ),
        (
            "mapping:\n  p: a +* b\n",
            "m.yaml:7:9: failed to analyze mappings: mapping 'p': Unexpected token",
        ),
        (
            "mapping:\n  p: |\n    a +\n    * b\n",
            "m.yaml:9:5: failed to analyze mappings",
        ),
        (
            "mapping:\n  p: |-\n\n\n    a +\n    * b\n",
            "m.yaml:11:5: failed to analyze mappings",
        ),
        (
            "mapping:\n  p: 'a; b'\n",
            "m.yaml:7:10: failed to analyze mappings: mapping 'p': multiple statements",
        ),
        (
            "mapping:\n  p: '{a: 1, b: 2}'\n",
            "failed to pre-compile expressions",
        ),
        ("mapping:\n  p: import('fs')\n", "import is not available"),
        (
            "mapping:\n  a+b: a\n",
            "a topic name can't contain the wildcards + and #",
        ),
        (
            "headgate: { max_age: 5 }\n",
            "headgate.max_age must be a time as in 500ms, 5s, 10m, 1h or 2d",
        ),
        (
            "headgate: { max_age: 0s }\n",
            "headgate.max_age must be more than 0",
        ),
        (
            "headgate: { late: ignore }\n",
            "headgate.late is \"ignore\"; it can be accept, drop or reorder",
        ),
        (
            "headgate: { time_limit: 1h }\n",
            "headgate.time_limit can be 5s at most",
        ),
        (
            "headgate: { sources: { c: { max_age: 5s } } }\n",
            "headgate.sources.c: there is no such source",
        ),
        (
            "headgate: { sources: { a: { time_limit: 5s } } }\n",
            "unknown key headgate.sources.a.time_limit",
        ),
    ];
    for (tail, expected) in cases {
        let error = error(&format!("{HEAD}{tail}"));
        assert!(error.contains(expected), "{error}\n  for {tail}");
    }
}

#[test]
fn yaml_that_grows_by_its_aliases_is_refused_at_once() {
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..10 {
        let alias = format!("*a{}", level - 1);
        bomb += &format!(
            "a{level}: &a{level} [{}]\n",
            [alias.as_str(); 10].join(", ")
        );
    }
    let large = "x".repeat(100_000);
    let scalars = format!("a: &a {large}\nb: [{}]\n", ["*a"; 1_000].join(", "));
    let itself = "a: &a [*a]\n";
    let deep = "[".repeat(10_000);
    let deeper = format!("a: {}", "{ a: ".repeat(10_000));
    let long = "a: 1\n".repeat(1_000_000);
    for file in [&bomb, &scalars, itself, &deep, &deeper, &long] {
        let began = Instant::now();
        let error = error(file);
        assert!(error.starts_with("m.yaml:") && error.len() < 200, "{error}");
        assert!(began.elapsed() < Duration::from_secs(2), "{error}");
    }
}

#[test]
fn large_and_deep_expressions_get_one_error_or_work() {
    let deep = |open: &str, middle: &str, close: &str, count: usize| {
        open.repeat(count) + middle + &close.repeat(count)
    };
    let too_large = file(&"a + ".repeat(30_000));
    assert!(
        error(&too_large).contains("bytes; 65536 are the most"),
        "{}",
        error(&too_large)
    );
    for (open, close) in [
        ("(", ")"),
        ("[", "]"),
        ("-(", ")"),
        ("[0].map(x=>", ")"),
        ("`${", "}`"),
        ("({a:", "})"),
        ("a?", ":0"),
        ("f(", ")"),
        ("(x=>", ")"),
        ("!", ""),
        ("- ", ""),
        ("new ", ""),
        ("2**", ""),
        ("a?0:", ""),
        ("x=>", ""),
        ("a=", ""),
        ("async x=>", ""),
        ("[...", "]"),
        ("class{[", "]}"),
        ("typeof ", ""),
        ("((a)=>{return ", "})"),
        ("a||", ""),
        ("a??", ""),
        ("/(?:", ")/"),
    ] {
        let count = (MAX_EXPRESSION_BYTES / (open.len() + close.len())).min(10_000);
        for count in [count, count / 10] {
            let text = deep(open, "a", close, count);
            match Mapping::load(&file(&text), "m.yaml") {
                Ok(_) => {}
                Err(error) => {
                    let error = error.to_string();
                    assert!(error.len() < 400, "{error}");
                    assert!(!error.contains('\n'), "{error}");
                }
            }
        }
        // What somebody might write.
        let text = deep(open, "a", close, 20);
        if !matches!(open, "new " | "a=" | "class{[" | "/(?:" | "2**") {
            assert!(Mapping::load(&file(&text), "m.yaml").is_ok(), "{text}");
        }
    }
    for (part, count) in [
        ("a+", 30_000),
        ("a.b.", 15_000),
        ("a,", 30_000),
        ("a[0]", 1),
        ("a()", 1),
        ("a&&", 20_000),
    ] {
        let mut text = part.repeat(count) + "a";
        if count == 1 {
            text = format!("a{}", &part[1..].repeat(20_000));
        }
        let mapping = Mapping::load(&file(&text), "m.yaml");
        assert!(
            mapping.is_ok(),
            "{part}: {:?}",
            mapping.err().map(|error| error.to_string())
        );
    }
    let sum = "a+".repeat(30_000) + "a";
    assert_eq!(outcome(&sum, "1"), Ok("30001".to_owned()));
}

#[test]
fn no_way_leads_from_an_expression_to_code_made_of_a_string() {
    for expression in [
        "eval('1')",
        "(0, eval)('1')",
        "Function('return 1')()",
        "new Function('return 1')()",
        "a.constructor.constructor('return 1')()",
        "(() => 1).constructor('return 1')()",
        "(function () {}).constructor('return 1')()",
        "(async () => 1).constructor('return 1')()",
        "(function* () {}).constructor('return 1')().next().value",
        "(async function* () {}).constructor('return 1')()",
        "Object.getPrototypeOf(function () {}).constructor('return 1')()",
        "[].map.constructor('return 1')()",
        "Math.max.bind.call.constructor('return 1')()",
        "(class extends Object.getPrototypeOf(function () {}).constructor {}).call()",
        "new (class extends (() => 1).constructor { constructor() { super('return 1') } })()()",
        "Reflect.construct(1)",
        "setTimeout('1')",
        "require('fs')",
        "process.exit()",
        "globalThis.eval('1')",
        "this.eval('1')",
        "(function () { return this })().Function('return 1')()",
        "Error.prepareStackTrace = 1, new Error().stack.constructor.constructor('return 1')()",
        "'x'.replace(/x/, eval)",
        "[1].map(Function)[0]()",
        "JSON.parse('1', a.constructor.constructor)",
    ] {
        let failure = failure(expression);
        assert!(
            failure.contains("Error") || failure.contains("function"),
            "{expression}: {failure}"
        );
    }
}

#[test]
fn names_that_upstream_blocks_throw_what_they_throw_there() {
    for name in BLOCKED.iter().filter(|name| **name != "import") {
        let expected = format!(
            "TypeError: '{name}' is disabled for security reasons in this sandboxed environment"
        );
        assert_eq!(failure(&format!("{name}()")), expected);
    }
}

#[test]
fn nothing_that_is_built_in_can_be_changed() {
    for (expression, value) in [
        ("(Math.max = () => 7, Math.max(1, 2))", "2"),
        ("(Object.prototype.x = 7, typeof ({}).x)", "\"undefined\""),
        ("(Array.prototype.map = 7, [1].map(x => x + 1)[0])", "2"),
        ("(JSON = 7, JSON.stringify([1]))", "\"[1]\""),
        ("(({}).__proto__.y = 7, typeof [].y)", "\"undefined\""),
        ("(Symbol.iterator.x = 7, [...'ab'].length)", "2"),
        ("(undefined = 7, typeof undefined)", "\"undefined\""),
        ("(delete Math.max, typeof Math.max)", "\"function\""),
        (
            "(Error.stackTraceLimit = 7, Error.stackTraceLimit === 7)",
            "false",
        ),
    ] {
        let found = outcome(expression, "1");
        assert_eq!(found, Ok(value.to_owned()), "{expression}");
    }
    for expression in [
        "(p => { 'use strict'; p.x = 1 })(Object.getPrototypeOf([].values().map(x => x)))",
        "(i => { 'use strict'; Object.getPrototypeOf(i).x = 1 })(Object.getPrototypeOf(Object.getPrototypeOf(\
         [].values())).constructor.from({ next: () => 1 }))",
        "Object.defineProperty(Object.prototype, 'x', { value: 1 })",
        "Object.setPrototypeOf(Array.prototype, { x: 1 })",
        "(function () { 'use strict'; Math.x = 1 })()",
        "(function () { 'use strict'; delete Math.max })()",
        "Object.assign(Math, { x: 1 })",
        "(x => { x.__proto__ = { z: 7 } })(Math)",
    ] {
        assert!(failure(expression).contains("TypeError"), "{expression}");
    }
}

#[test]
fn nothing_is_left_for_the_next_evaluation() {
    let file = format!(
        "{HEAD}mapping:\n  writes: (this.left = kept = a, a)\n  deletes: (delete this.Math, delete a)\n  \
         reads: typeof kept + typeof left + typeof Math + Object.keys(this).join() + a\n"
    );
    let (mut mapping, _) = Mapping::load(&file, "m.yaml").unwrap();
    for _ in 0..3 {
        let mut sent = Vec::new();
        send(&mut mapping, "5", &mut sent).unwrap();
        let values: Vec<&str> = sent
            .iter()
            .map(|sent| str::from_utf8(&sent.payload).unwrap())
            .collect();
        assert_eq!(
            values,
            [
                "{\"value\":5,\"timestamp_ms\":1}",
                "{\"value\":true,\"timestamp_ms\":1}",
                "{\"value\":\"undefinedundefinedobjecta5\",\"timestamp_ms\":1}",
            ]
        );
    }
    // Another mapping of this thread does not see the sources of the first.
    assert_eq!(
        outcome("Object.keys(this).join() + typeof b", "1"),
        Err("waits for b".to_owned())
    );
    assert_eq!(
        outcome("Object.keys(this).join()", "1"),
        Ok("\"\"".to_owned())
    );
    // What an expression does to a source's value is done to a copy.
    let mut mapping = load("a.push(a.length)");
    for _ in 0..2 {
        let mut sent = Vec::new();
        send(&mut mapping, "[1, 2]", &mut sent).unwrap();
        assert_eq!(&sent[0].payload[..], b"{\"value\":3,\"timestamp_ms\":1}");
        let stored = mapping.variables().next().unwrap();
        assert_eq!(stored.value, "[1,2]");
    }
}

#[test]
fn expressions_without_end_or_measure_are_stopped() {
    for (expression, expected) in [
        (
            "(function () { for (;;); })() + a",
            "it took longer than 30ms",
        ),
        (
            "(() => { while (true) try { a.x.y } catch {} })()",
            "it took longer than 30ms",
        ),
        (
            "/^(a+)+$/.test('a'.repeat(64) + '!') || a",
            "it took longer than 30ms",
        ),
        (
            "/(.*)*x/.test('a'.repeat(40)) || a",
            "it took longer than 30ms",
        ),
        (
            "(async () => { await a; for (;;); })()",
            "it took longer than 30ms",
        ),
        ("[..'x'].length", ""),
        ("(f => f(f))(f => f(f) + a)", "RangeError"),
        (
            "'x'.repeat(2 ** 28).length + a",
            "RangeError: too much for one call",
        ),
        (
            "[].concat(new Array(1e9)).length + a",
            "RangeError: too much for one call",
        ),
        (
            "[].indexOf.call({ length: 2 ** 53 }, a)",
            "RangeError: too much for one call",
        ),
        (
            "[].indexOf.call({ get length() { return a } }, a)",
            "TypeError",
        ),
        (
            "'a'.repeat(1e6).indexOf('a'.repeat(5e5) + 'b') + a",
            "RangeError: too much for one call",
        ),
        (
            "'a'.repeat(1e6).includes({ toString: () => 'a'.repeat(5e5) + 'b' }) || a",
            "RangeError",
        ),
        (
            "(x => { for (let n = 0; n < 60; n++) x = [x, x]; return x.flat(Infinity) })([])",
            "it took longer than 30ms",
        ),
        (
            "(() => { for (;;) 'a'.repeat(1e6).toUpperCase(); })()",
            "it took longer than 30ms",
        ),
        (
            "(() => { const b = new Uint8Array(3e6); while (1) b.fill(a) })()",
            "it took longer than 30ms",
        ),
        (
            "(() => { let s = 'a'.repeat(3e6), t = s + 'b', n = 0; do n += s === t; while (1) })()",
            "it took longer than 30ms",
        ),
        (
            "(function () { var s = [a]; for (;;) s = s.concat(s); })()",
            "",
        ),
        (
            "(function () { try { for (var s = 'x';;) s += s } catch {} return a })()",
            "",
        ),
        (
            "new Array(1e9).concat([a])",
            "RangeError: too much for one call",
        ),
        ("new Array(1e9)", "the result takes more than 1048576 bytes"),
        (
            "'x'.repeat(2e6) + a",
            "the result takes more than 1048576 bytes",
        ),
        ("({ get x() { for (;;); }, a })", "it took longer than 30ms"),
        (
            "(o => { o.o = o; return o })({ a })",
            "nested more than 500 deep",
        ),
        ("new Uint8Array(2e7).length + a", ""),
        ("10n ** 100000000n", ""),
        (
            "(() => { for (let n = 3n ** 200000n;;) n * n })()",
            "it took longer than 30ms",
        ),
        ("a.toString().padEnd(1e9).length", ""),
        (
            "[a].flat(Infinity).fill(0, 0, 1e9).sort(() => { for (;;); }).length",
            "",
        ),
        ("JSON.stringify('[' .repeat(1e6)).length + a", ""),
        ("JSON.parse('['.repeat(1e6))", ""),
        ("new RegExp('('.repeat(1e5)).test(a)", ""),
    ] {
        let began = Instant::now();
        let Ok((mut mapping, _)) = Mapping::load(&file(expression), "m.yaml") else {
            continue;
        };
        let mut sent = Vec::new();
        send(&mut mapping, "1", &mut sent).unwrap();
        let state = mapping.explain("out", 0).unwrap().state;
        assert!(state.contains(expected), "{expression}: {state}");
        assert!(
            began.elapsed() < Duration::from_secs(5),
            "{expression}: {:?}",
            began.elapsed()
        );
    }
    // And the engine works on.
    assert_eq!(outcome("[a].map(x => x + 1)", "1"), Ok("[2]".to_owned()));
}

#[test]
fn an_output_that_is_stopped_rests_and_others_go_on() {
    let file = format!(
        "{HEAD}headgate: {{ time_limit: 20ms }}\nmapping:\n  bad: (function () {{ for (;;); }})() + a\n  good: a + 1\n"
    );
    let (mut mapping, _) = Mapping::load(&file, "m.yaml").unwrap();
    let mut sent = Vec::new();
    for now_ms in 0..1_000 {
        let payload = b"{\"value\":1,\"timestamp_ms\":1}";
        mapping
            .on_message("umh/v1/x/_raw/a", payload, None, now_ms, &mut sent)
            .unwrap();
    }
    assert_eq!(sent.len(), 1_000);
    // One second of messages: it rests for 0.4 s, then for 0.8 s.
    let counters = mapping.counters();
    assert_eq!(counters.stopped_executions, 2);
    assert_eq!(counters.messages_errored, 1_000);
    let state = mapping.explain("bad", 1_000).unwrap().state;
    assert!(
        state.starts_with("it took longer than 20ms; it rests for another"),
        "{state}"
    );
}

#[test]
fn outputs_that_all_never_end_cost_one_message_its_budget_and_the_next_ones_nothing() {
    let mut file = format!("{HEAD}mapping:\n");
    for number in 0..100 {
        file += &format!("  o{number}: '[a].map(x => {{ for (;;) x }})'\n");
    }
    file += "  fine: a + 1\n";
    let (mut mapping, _) = Mapping::load(&file, "m.yaml").unwrap();
    for value in 1..4 {
        let mut sent = Vec::new();
        send(&mut mapping, &value.to_string(), &mut sent).unwrap();
        assert_eq!(sent.len(), 1);
    }
    // Each runs for 50 to 100 ms; all of them together for a second, once.
    let stopped = mapping.counters().stopped_executions;
    assert!((5..=21).contains(&stopped), "{stopped}");
    let state = mapping.explain("o99", 1).unwrap().state;
    assert!(state.contains("took too long together"), "{state}");
}

#[test]
fn constants_that_never_end_are_warned_of_and_cost_a_load_its_budget() {
    let mut file = format!("{HEAD}mapping:\n");
    for number in 0..100 {
        file += &format!("  o{number}: '(() => {{ for (;;) ; }})()'\n");
    }
    let (_, warnings) = Mapping::load(&file, "m.yaml").unwrap();
    let stopped = warnings
        .iter()
        .filter(|one| one.message.contains("it was stopped"));
    let stopped = stopped.count();
    assert!((5..=21).contains(&stopped), "{stopped}");
}

#[test]
fn results_that_are_no_json_are_named() {
    for (expression, expected) in [
        ("() => a", Failure::NoJson("function")),
        ("[a, [() => a]]", Failure::NoJson("function")),
        ("class A { x = a }", Failure::Undefined),
        ("undefined", Failure::Undefined),
        ("void a", Failure::Undefined),
        ("a ? null : 1", Failure::Null),
        ("a / 0", Failure::NotFinite(f64::INFINITY)),
        ("[a / 0]", Failure::NotFinite(f64::INFINITY)),
        (
            "new Date(8.64e15)",
            Failure::NoJson("date beyond the year 9999"),
        ),
    ] {
        assert_eq!(failure(expression), expected.to_string(), "{expression}");
    }
    assert_eq!(
        failure("a.x.y"),
        "TypeError: cannot read property 'y' of undefined"
    );
    assert_eq!(failure("(() => { throw { a } })()"), "it throws an object");
    assert_eq!(failure("(() => { throw 'x\\ny' })() + a"), "it throws x y");
    assert_eq!(
        failure("(() => { throw Symbol('x') })() + a"),
        "it throws a symbol"
    );
    assert_eq!(
        failure(
            "(() => { const e = new Error('m'); Object.defineProperty(e, 'message', { get() { throw e } }); throw e })()"
        ),
        "Error"
    );
    assert_eq!(failure("new Proxy({}, {})"), "TypeError: not a constructor");
    // As goja and Go write them.
    for (expression, value) in [
        ("10n ** 20n", "100000000000000000000"),
        ("Symbol('s')", "\"s\""),
        ("Promise.reject(a)", "{}"),
        ("/a/", "{}"),
        ("new Map([[a, { b: undefined }]])", "[[1,{\"b\":null}]]"),
        ("[Object(a), Object(true), Object(1n)]", "[1,true,1]"),
        (
            "({ 'é<': 1, b: [,], a: new Set([a]) })",
            "{\"a\":[1],\"b\":[null],\"é\\u003c\":1}",
        ),
        (
            "({ __proto__: { x: 1 }, get y() { return a } })",
            "{\"y\":1}",
        ),
    ] {
        assert_eq!(
            outcome(expression, "1"),
            Ok(value.to_owned()),
            "{expression}"
        );
    }
}

#[test]
fn payloads_that_are_none_are_refused_and_change_nothing() {
    let mut mapping = load("a");
    let mut sent = Vec::new();
    send(&mut mapping, "7", &mut sent).unwrap();
    let deep = format!("{{\"value\":{},\"timestamp_ms\":1}}", "[".repeat(100_000));
    let deep_key = format!("{{\"x\":{},\"timestamp_ms\":1}}", "{\"a\":".repeat(100_000));
    let refused: &[(&str, &str)] = &[
        ("", "not JSON: it is empty at byte 0"),
        ("[1]", "the payload must be a JSON object"),
        ("null", "the payload must be a JSON object"),
        ("7", "the payload must be a JSON object"),
        (
            "\u{feff}{\"value\":1,\"timestamp_ms\":1}",
            "not JSON: this is no JSON value at byte 0",
        ),
        (
            "{\"value\":1,\"timestamp_ms\":1}}",
            "not JSON: something follows the object at byte 28",
        ),
        (
            "{\"value\":1,\"timestamp_ms\":1",
            "not JSON: a comma or } is missing",
        ),
        (
            "{\"value\":1 \"timestamp_ms\":1}",
            "not JSON: a comma or } is missing",
        ),
        (
            "{\"value\":tru,\"timestamp_ms\":1}",
            "not JSON: this is no JSON value",
        ),
        (
            "{\"value\":\"\u{1}\",\"timestamp_ms\":1}",
            "not JSON: a control character in a string",
        ),
        (
            "{\"value\":\"\\ud8\",\"timestamp_ms\":1}",
            "not JSON: \\u takes four hexadecimal digits",
        ),
        ("{\"value\":1}", "missing or invalid timestamp_ms"),
        (
            "{\"value\":1,\"timestamp_ms\":0}",
            "missing or invalid timestamp_ms",
        ),
        (
            "{\"value\":1,\"timestamp_ms\":null}",
            "missing or invalid timestamp_ms",
        ),
        (
            "{\"value\":1,\"timestamp_ms\":true}",
            "timestamp_ms must be a whole number",
        ),
        (
            "{\"value\":1,\"timestamp_ms\":1.5}",
            "timestamp_ms must be a whole number",
        ),
        (
            "{\"value\":1,\"timestamp_ms\":\"1\"}",
            "timestamp_ms must be a whole number",
        ),
        (
            "{\"value\":1,\"timestamp_ms\":99999999999999999999}",
            "timestamp_ms must be a whole number",
        ),
        ("{\"timestamp_ms\":1}", "missing value field"),
        ("{\"value\":null,\"timestamp_ms\":1}", "missing value field"),
        (
            "{\"value\":1e999,\"timestamp_ms\":1}",
            "a number in value is too large for a double",
        ),
        (&deep, "not JSON: nested more than 10000 deep"),
        (&deep_key, "not JSON: nested more than 10000 deep"),
    ];
    for (payload, expected) in refused {
        let error = mapping
            .on_message("umh/v1/x/_raw/a", payload.as_bytes(), None, 0, &mut sent)
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{error} for {payload:.60}");
    }
    assert_eq!(sent.len(), 1);
    assert_eq!(mapping.variables().next().unwrap().value, "7");
    let count = refused.len() as u64;
    let Counters {
        messages_processed,
        messages_errored,
        invalid_data_type,
        ..
    } = mapping.counters();
    assert_eq!(
        (messages_processed, messages_errored, invalid_data_type),
        (1, count, count)
    );
    // Bytes that are no UTF-8 are replaced, one by one, as Go does it.
    mapping
        .on_message(
            "umh/v1/x/_raw/a",
            b"{\"value\":\"a\xff\xed\xa0\x80\",\"timestamp_ms\":1}",
            None,
            0,
            &mut sent,
        )
        .unwrap();
    assert_eq!(
        str::from_utf8(&sent[1].payload).unwrap(),
        "{\"value\":\"a\u{fffd}\u{fffd}\u{fffd}\u{fffd}\",\"timestamp_ms\":1}"
    );
}

#[test]
fn values_with_tricks_in_them_are_only_values() {
    for (expression, value, expected) in [
        ("a.__proto__", "{\"__proto__\":7}", Ok("7")),
        (
            "a.x",
            "{\"__proto__\":{\"x\":7}}",
            Err("the result is undefined"),
        ),
        (
            "a",
            "{\"constructor\":{\"prototype\":1}}",
            Ok("{\"constructor\":{\"prototype\":1}}"),
        ),
        (
            "a + 1",
            "{\"valueOf\":1,\"toString\":2}",
            Err("TypeError: toPrimitive"),
        ),
        (
            "JSON.stringify(a)",
            "{\"toJSON\":1}",
            Ok("\"{\\\"toJSON\\\":1}\""),
        ),
        ("a.length", "{\"length\":1e308}", Ok("1e+308")),
        ("a + 0", "\"\\u0000\"", Ok("\"\\u00000\"")),
    ] {
        let expected = expected.map(str::to_owned).map_err(str::to_owned);
        assert_eq!(
            outcome(expression, value),
            expected,
            "{expression} of {value}"
        );
    }
    let deep = "[".repeat(9_000) + &"]".repeat(9_000);
    assert_eq!(outcome("a", &deep).map(|value| value.len()), Ok(18_000));
    assert_eq!(
        outcome("JSON.stringify(a)", &deep),
        Err("a source's value is nested more than 500 deep".to_owned())
    );
    // Dropped on a thread with the stack of a thread.
    let deep = "{\"a\":[".repeat(4_990) + "1" + &"]}".repeat(4_990);
    assert_eq!(outcome("a ? 1 : 0", &deep), Ok("1".to_owned()));
}
