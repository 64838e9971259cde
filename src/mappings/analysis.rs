//! What an expression is: whether upstream would take it, which sources it reads, whether its result can
//! change by itself, and what is likely to be a mistake in it.

use std::thread;

use oxc_allocator::Allocator;
use oxc_ast::ast::{
    ArrowFunctionExpression, BigIntLiteral, ComputedMemberExpression, DoWhileStatement, Expression,
    ForInStatement, ForOfStatement, ForStatement, FunctionBody, IdentifierReference,
    ImportExpression, NewExpression, Program, Statement, StaticMemberExpression, ThisExpression,
    UnaryExpression, UnaryOperator, WhileStatement,
};
use oxc_ast_visit::{Visit, walk};
use oxc_diagnostics::OxcDiagnostic;
use oxc_parser::{ParseOptions, Parser, ParserReturn};
use oxc_semantic::SemanticBuilder;
use oxc_span::{GetSpan, SourceType};

use super::engine::{self, Rejection, Script};
use super::fast;

/// Longest expression.
pub const MAX_EXPRESSION_BYTES: usize = 64 << 10;

/// The parsers and the walks over their trees go by recursion. A tree is as deep as its text is long at
/// most (`1+1+1…`), 32,768 levels of less than 1 KiB; of brackets the engine's parser, whose stack is
/// bounded, takes only as many as the others can.
const STACK_BYTES: usize = 128 << 20;

/// Of these, what the engine's parser may use. It comes first: what is too deep for it nobody else sees.
const GATE_STACK_BYTES: usize = 2 << 20;

/// Longest text that the second parser gets if the first has refused it (for its better message): all
/// of it may be brackets.
const MAX_UNGATED_BYTES: usize = 4 << 10;

/// Longest expression with big integers. One operation on two of a million bits takes a third of a
/// second, which nothing can stop, so there must not be many in a row.
const MAX_BIG_INTEGER_BYTES: usize = 256;

/// An expression that can run.
#[derive(Debug)]
pub(super) struct Analysed {
    /// Numbers of the sources that it reads, in their order.
    pub sources: Vec<usize>,
    /// Its result may differ although its sources have not changed: time, randomness.
    pub is_volatile: bool,
    pub script: Script,
    pub fast: Option<fast::Node>,
    pub findings: Vec<Finding>,
}

/// Something in an expression that is likely to be a mistake.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Finding {
    /// In bytes from the start of the expression.
    pub offset: usize,
    pub message: String,
}

/// Why an expression can't be used. The words are upstream's where it has any.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Refusal {
    pub offset: Option<usize>,
    pub message: String,
    /// It passes the analysis and fails in the compiler: upstream calls it so.
    pub is_compilation: bool,
}

/// Analyses `expressions`, each by itself.
pub(super) fn analyse(
    expressions: &[&str],
    aliases: &[&str],
) -> Result<Vec<Result<Analysed, Refusal>>, std::io::Error> {
    thread::scope(|scope| {
        let worker = thread::Builder::new()
            .name("mapping-analysis".to_owned())
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, || {
                expressions
                    .iter()
                    .map(|expression| analyse_one(expression, aliases))
                    .collect()
            })?;
        Ok(worker
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

fn refusal(message: impl Into<String>, offset: Option<usize>) -> Refusal {
    Refusal {
        offset,
        message: message.into(),
        is_compilation: false,
    }
}

fn analyse_one(text: &str, aliases: &[&str]) -> Result<Analysed, Refusal> {
    if text.is_empty() {
        return Err(refusal("empty expression", None));
    }
    if text.len() > MAX_EXPRESSION_BYTES {
        return Err(refusal(
            format!(
                "it has {} bytes; {MAX_EXPRESSION_BYTES} are the most",
                text.len()
            ),
            None,
        ));
    }
    if text.contains(engine::TICK) {
        return Err(refusal(
            format!("the name {} is not available", engine::TICK),
            None,
        ));
    }
    // Upstream analyses `(text)`, else `text`, and runs `text`.
    let in_brackets = format!("({text}\n)");
    let as_it_is = engine::compile(text, false, GATE_STACK_BYTES);
    let gate = match &as_it_is {
        Err(Rejection::TooDeep) => Err(Rejection::TooDeep),
        Err(Rejection::Syntax(_)) => {
            engine::compile(&in_brackets, false, GATE_STACK_BYTES).map(|_| ())
        }
        Ok(_) => Ok(()),
    };
    match &gate {
        Err(Rejection::TooDeep) => return Err(refusal("it is nested too deep", None)),
        Err(Rejection::Syntax(message)) if text.len() > MAX_UNGATED_BYTES => {
            return Err(refusal(message.as_str(), None));
        }
        _ => {}
    }
    let allocator = Allocator::default();
    // A line comment swallows the bracket in upstream's form of it: then only the bare text counts.
    let bracketed = parse(&allocator, allocator.alloc_str(&format!("({text})")));
    let bare = parse(&allocator, allocator.alloc_str(text));
    let (chosen, shift) = if bracketed.diagnostics.is_empty() {
        (&bracketed, 1)
    } else {
        (&bare, 0)
    };
    if let Some(error) = chosen.diagnostics.iter().next() {
        let offset = offset_of(error).map(|offset| offset.saturating_sub(shift));
        return Err(refusal(error.message.to_string(), offset));
    }
    if let Err(Rejection::Syntax(message)) = gate {
        return Err(refusal(message, None));
    }
    let program = &chosen.program;
    let statement = match (&program.body[..], program.directives.len()) {
        ([], 1) => None,
        ([statement], 0) => Some(statement),
        (body, _) => {
            let second = body
                .get(1)
                .map(|second| second.span().start as usize - shift);
            return Err(refusal("multiple statements not allowed", second));
        }
    };
    match statement {
        None => {}
        Some(Statement::ExpressionStatement(statement)) => {
            if let Expression::FunctionExpression(function) = &statement.expression {
                return Err(refusal(
                    "function expressions are not allowed in mappings",
                    Some(function.span.start as usize - shift),
                ));
            }
        }
        Some(statement) => {
            return Err(refusal(
                "only expressions are allowed, not statements",
                Some(statement.span().start as usize - shift),
            ));
        }
    }
    let compilation = |message: String, offset| Refusal {
        offset,
        message,
        is_compilation: true,
    };
    if let Some(error) = bare.diagnostics.iter().next() {
        let offset = offset_of(error);
        return Err(compilation(
            format!(
                "{}; what starts with {{ is a block to JavaScript: put an object in parentheses",
                error.message
            ),
            offset,
        ));
    }
    if let Err(Rejection::Syntax(message)) = as_it_is {
        return Err(compilation(message, None));
    }
    examine(text, &bare.program, aliases)
}

fn offset_of(error: &OxcDiagnostic) -> Option<usize> {
    Some(error.labels.first()?.offset() as usize)
}

fn parse<'a>(allocator: &'a Allocator, text: &'a str) -> ParserReturn<'a> {
    let options = ParseOptions {
        preserve_parens: false,
        ..ParseOptions::default()
    };
    Parser::new(allocator, text, SourceType::script())
        .with_options(options)
        .parse()
}

fn examine(text: &str, program: &Program<'_>, aliases: &[&str]) -> Result<Analysed, Refusal> {
    let semantic = SemanticBuilder::new()
        .with_build_nodes(true)
        .build(program)
        .semantic;
    let scoping = semantic.scoping();
    let mut walk = Walk::default();
    walk.visit_program(program);
    if let Some(offset) = walk.import {
        return Err(refusal("import is not available", Some(offset)));
    }
    if let Some(offset) = walk.uses_big_integers
        && text.len() > MAX_BIG_INTEGER_BYTES
    {
        return Err(refusal(
            format!(
                "an expression with big integers has {MAX_BIG_INTEGER_BYTES} bytes at most: each \
                 operation on them may take long"
            ),
            Some(offset),
        ));
    }
    let mut sources = Vec::new();
    let mut findings = Vec::new();
    let mut writes = false;
    for (name, references) in scoping.root_unresolved_references() {
        let name: &str = name;
        let references: Vec<_> = references
            .iter()
            .map(|id| {
                let reference = scoping.get_reference(*id);
                let offset = semantic
                    .nodes()
                    .get_node(reference.node_id())
                    .kind()
                    .span()
                    .start;
                (reference.flags(), offset as usize)
            })
            .collect();
        if let Some((_, offset)) = references.iter().find(|(flags, _)| flags.is_write()) {
            writes = true;
            findings.push(Finding {
                offset: *offset,
                message: format!(
                    "{name} is assigned to, which lasts no longer than this evaluation"
                ),
            });
        }
        let Some((_, offset)) = references.iter().find(|(flags, _)| flags.is_read()) else {
            continue;
        };
        if BUILT_IN.contains(&name) {
            continue;
        }
        match aliases.iter().position(|alias| *alias == name) {
            Some(source) => sources.push(source),
            None if BLOCKED.contains(&name) => findings.push(Finding {
                offset: *offset,
                message: format!("{name} is blocked: calling it throws"),
            }),
            None if AVAILABLE.contains(&name) => {}
            None if walk.typeof_only.contains(&name.to_owned()) => {}
            None => findings.push(Finding {
                offset: *offset,
                message: unknown(name, aliases),
            }),
        }
    }
    for (name, offset) in &walk.blocked_builtins {
        findings.push(Finding {
            offset: *offset,
            message: format!("{name} is blocked: calling it throws"),
        });
    }
    sources.sort_unstable();
    let expression = match &program.body[..] {
        [Statement::ExpressionStatement(statement)] => Some(&statement.expression),
        _ => None,
    };
    match (expression, &program.body[..]) {
        (None, [statement]) => findings.push(Finding {
            offset: statement.span().start as usize,
            message: if matches!(statement, Statement::BlockStatement(_)) {
                "this is a block, not an object: put an object in parentheses".to_owned()
            } else {
                "this is a statement and has no result".to_owned()
            },
        }),
        (Some(expression), _) => {
            if let Some(what) = never_json(expression) {
                findings.push(Finding {
                    offset: expression.span().start as usize,
                    message: format!("the result is {what}, which is never sent"),
                });
            }
        }
        _ => {}
    }
    findings.sort_by_key(|finding| finding.offset);
    let taints = writes || walk.taints || expression.is_none() && program.directives.is_empty();
    let script = engine::compile(&with_ticks(text, walk.ticks), taints, GATE_STACK_BYTES)
        .map_err(|rejection| refusal(format!("{rejection:?}"), None))?;
    let source = |name: &str| {
        (!BUILT_IN.contains(&name))
            .then(|| aliases.iter().position(|alias| *alias == name))
            .flatten()
    };
    let fast = expression
        .filter(|_| !taints)
        .and_then(|expression| fast::compile(expression, &source));
    Ok(Analysed {
        sources,
        is_volatile: walk.is_volatile,
        script,
        fast,
        findings,
    })
}

fn unknown(name: &str, aliases: &[&str]) -> String {
    let near = aliases
        .iter()
        .find(|alias| strsim::damerau_levenshtein(alias, name) <= (name.len() / 3).max(1));
    match near {
        Some(near) => format!(
            "{name} is neither a source nor known to JavaScript, so this throws; is it {near}?"
        ),
        None => format!("{name} is neither a source nor known to JavaScript, so this throws"),
    }
}

/// What the result certainly is, if that is nothing that is sent.
fn never_json(expression: &Expression<'_>) -> Option<&'static str> {
    match expression {
        Expression::ArrowFunctionExpression(_) | Expression::FunctionExpression(_) => {
            Some("a function")
        }
        Expression::ClassExpression(_) => Some("a class"),
        Expression::NullLiteral(_) => Some("null"),
        Expression::Identifier(identifier) if identifier.name == "undefined" => Some("undefined"),
        Expression::Identifier(identifier) if identifier.name == "NaN" => Some("NaN"),
        Expression::Identifier(identifier) if identifier.name == "Infinity" => Some("Infinity"),
        Expression::UnaryExpression(unary) if unary.operator == UnaryOperator::Void => {
            Some("undefined")
        }
        _ => None,
    }
}

/// Looks for what the names alone do not say.
#[derive(Default)]
struct Walk {
    is_volatile: bool,
    taints: bool,
    import: Option<usize>,
    typeof_only: Vec<String>,
    blocked_builtins: Vec<(String, usize)>,
    /// What to insert where, so that the time is looked at on each call and each turn of a loop.
    ticks: Vec<(usize, &'static str)>,
    uses_big_integers: Option<usize>,
}

/// Puts the calls in that look at the time.
fn with_ticks(text: &str, mut ticks: Vec<(usize, &'static str)>) -> String {
    // Stable: what opens and what closes at the same place was found in this order.
    ticks.sort_by_key(|(offset, _)| *offset);
    let mut result = String::with_capacity(text.len() + ticks.len() * 20);
    let mut start = 0;
    for (offset, insertion) in ticks {
        result.push_str(&text[start..offset]);
        result.push_str(insertion);
        start = offset;
    }
    result + &text[start..]
}

impl Walk {
    fn tick_in_loop(&mut self, body: &Statement<'_>) {
        let span = body.span();
        self.ticks.push((span.start as usize, "{$headgate_tick();"));
        self.ticks.push((span.end as usize, "}"));
    }
}

impl<'a> Visit<'a> for Walk {
    fn visit_function_body(&mut self, body: &FunctionBody<'a>) {
        let start = body
            .directives
            .last()
            .map_or(body.span.start + 1, |directive| directive.span.end);
        self.ticks.push((start as usize, ";$headgate_tick();"));
        walk::walk_function_body(self, body);
    }

    fn visit_arrow_function_expression(&mut self, arrow: &ArrowFunctionExpression<'a>) {
        let inner = match arrow.get_expression() {
            Some(inner) => inner.span(),
            None => return walk::walk_arrow_function_expression(self, arrow),
        };
        self.visit_formal_parameters(&arrow.params);
        self.ticks
            .push((inner.start as usize, "($headgate_tick(),"));
        if let Some(inner) = arrow.get_expression() {
            self.visit_expression(inner);
        }
        self.ticks.push((inner.end as usize, ")"));
    }

    fn visit_for_statement(&mut self, statement: &ForStatement<'a>) {
        walk::walk_for_statement(self, statement);
        self.tick_in_loop(&statement.body);
    }

    fn visit_for_in_statement(&mut self, statement: &ForInStatement<'a>) {
        walk::walk_for_in_statement(self, statement);
        self.tick_in_loop(&statement.body);
    }

    fn visit_for_of_statement(&mut self, statement: &ForOfStatement<'a>) {
        walk::walk_for_of_statement(self, statement);
        self.tick_in_loop(&statement.body);
    }

    fn visit_while_statement(&mut self, statement: &WhileStatement<'a>) {
        walk::walk_while_statement(self, statement);
        self.tick_in_loop(&statement.body);
    }

    fn visit_do_while_statement(&mut self, statement: &DoWhileStatement<'a>) {
        walk::walk_do_while_statement(self, statement);
        self.tick_in_loop(&statement.body);
    }

    fn visit_big_int_literal(&mut self, literal: &BigIntLiteral<'a>) {
        self.uses_big_integers
            .get_or_insert(literal.span.start as usize);
    }

    fn visit_this_expression(&mut self, _: &ThisExpression) {
        // It may be the global object.
        self.taints = true;
    }

    fn visit_import_expression(&mut self, import: &ImportExpression<'a>) {
        self.import.get_or_insert(import.span.start as usize);
    }

    fn visit_unary_expression(&mut self, unary: &UnaryExpression<'a>) {
        if let Expression::Identifier(operand) = &unary.argument {
            match unary.operator {
                UnaryOperator::Delete => self.taints = true,
                UnaryOperator::Typeof => self.typeof_only.push(operand.name.to_string()),
                _ => {}
            }
        }
        walk::walk_unary_expression(self, unary);
    }

    /// `Date` and `Math` as such are volatile; the harmless ways to use them do not come to this.
    fn visit_identifier_reference(&mut self, identifier: &IdentifierReference<'a>) {
        let name = identifier.name.as_str();
        if name == "BigInt" {
            self.uses_big_integers
                .get_or_insert(identifier.span.start as usize);
        }
        self.is_volatile |= matches!(name, "Date" | "Math");
        if BUILT_IN.contains(&name) && BLOCKED.contains(&name) {
            self.blocked_builtins
                .push((name.to_owned(), identifier.span.start as usize));
        }
    }

    fn visit_new_expression(&mut self, new: &NewExpression<'a>) {
        if is(&new.callee, "Date") && !new.arguments.is_empty() {
            self.visit_arguments(&new.arguments);
        } else {
            walk::walk_new_expression(self, new);
        }
    }

    fn visit_static_member_expression(&mut self, member: &StaticMemberExpression<'a>) {
        let name = member.property.name.as_str();
        self.is_volatile |= name == "constructor";
        let is_harmless = is(&member.object, "Math") && name != "random"
            || is(&member.object, "Date") && matches!(name, "UTC" | "parse");
        if !is_harmless {
            walk::walk_static_member_expression(self, member);
        }
    }

    fn visit_computed_member_expression(&mut self, member: &ComputedMemberExpression<'a>) {
        // It may spell `constructor`, and what that makes may be a date.
        self.is_volatile |= !matches!(&member.expression, Expression::NumericLiteral(_));
        walk::walk_computed_member_expression(self, member);
    }
}

fn is(expression: &Expression<'_>, name: &str) -> bool {
    matches!(expression, Expression::Identifier(identifier) if identifier.name == name)
}

/// Names that are never sources, as upstream has them.
pub(super) const BUILT_IN: &[&str] = &[
    "undefined",
    "null",
    "true",
    "false",
    "Infinity",
    "NaN",
    "eval",
    "parseInt",
    "parseFloat",
    "isNaN",
    "isFinite",
    "decodeURI",
    "decodeURIComponent",
    "encodeURI",
    "encodeURIComponent",
    "escape",
    "unescape",
    "Object",
    "Function",
    "Array",
    "String",
    "Boolean",
    "Number",
    "Date",
    "RegExp",
    "Error",
    "EvalError",
    "RangeError",
    "ReferenceError",
    "SyntaxError",
    "TypeError",
    "URIError",
    "Math",
    "JSON",
    "Map",
    "Set",
    "WeakMap",
    "WeakSet",
    "Promise",
    "Symbol",
    "Proxy",
    "Reflect",
    "console",
];

/// Names that throw when they are called.
pub(super) const BLOCKED: &[&str] = &[
    "eval",
    "Function",
    "require",
    "module",
    "exports",
    "__dirname",
    "__filename",
    "global",
    "globalThis",
    "process",
    "setTimeout",
    "setInterval",
    "setImmediate",
    "clearTimeout",
    "clearInterval",
    "clearImmediate",
    "console",
    "__proto__",
    "__defineGetter__",
    "__defineSetter__",
    "__lookupGetter__",
    "__lookupSetter__",
    "constructor",
    "import",
    "importScripts",
    "Reflect",
    "Proxy",
    "defineProperty",
    "getOwnPropertyDescriptor",
    "getPrototypeOf",
    "setPrototypeOf",
    "escape",
    "unescape",
];

/// What the engine has besides: sources hide these.
const AVAILABLE: &[&str] = &[
    "AggregateError",
    "ArrayBuffer",
    "BigInt",
    "BigInt64Array",
    "BigUint64Array",
    "DataView",
    "Float32Array",
    "Float64Array",
    "Int16Array",
    "Int32Array",
    "Int8Array",
    "Uint16Array",
    "Uint32Array",
    "Uint8Array",
    "Uint8ClampedArray",
    "arguments",
    "hasOwnProperty",
    "isPrototypeOf",
    "propertyIsEnumerable",
    "toLocaleString",
    "toString",
    "valueOf",
];

/// Whether a source of this name can be read in an expression.
pub(super) fn is_identifier(name: &str) -> bool {
    let allocator = Allocator::default();
    if name.len() > MAX_UNGATED_BYTES {
        return false;
    }
    let parsed = parse(&allocator, allocator.alloc_str(name));
    parsed.diagnostics.is_empty()
        && matches!(
            &parsed.program.body[..],
            [Statement::ExpressionStatement(statement)] if is(&statement.expression, name)
        )
}
