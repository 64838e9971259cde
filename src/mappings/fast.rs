//! The expressions that most people write (arithmetic, comparison, strings, conditions), compiled to a
//! tree that is evaluated without the JavaScript engine.
//!
//! It gives exactly what the engine gives, or gives up: then the engine evaluates the expression from
//! the start, which is right because nothing here has effects. A property test holds the two against
//! each other.

use std::borrow::Cow;
use std::cmp::Ordering;

use oxc_ast::ast::{
    Argument, BinaryOperator, CallExpression, Expression, LogicalOperator, UnaryOperator,
};

use super::engine::{Failure, MAX_RESULT_BYTES};
use super::payload;
use super::value::{NumberText, Value, compare_strings, string_to_number, to_fixed, to_int32};

/// Deeper trees are left to the engine: this one is walked by recursion.
const MAX_DEPTH: usize = 100;

/// An expression without effects.
#[derive(Debug)]
pub(super) enum Node {
    Undefined,
    Null,
    Bool(bool),
    Number(f64),
    String(Box<str>),
    /// By its number in the mapping.
    Source(usize),
    Unary(UnaryOperator, Box<Node>),
    Binary(BinaryOperator, Box<[Node; 2]>),
    Logical(LogicalOperator, Box<[Node; 2]>),
    Conditional(Box<[Node; 3]>),
    /// Texts and expressions in turn, starting and ending with a text.
    Template(Box<[Box<str>]>, Box<[Node]>),
    /// All are evaluated, the last one counts.
    Sequence(Box<[Node]>),
    /// A function of numbers.
    Math1(fn(f64) -> f64, Box<Node>),
    Math2(fn(f64, f64) -> f64, Box<[Node; 2]>),
    Fold(fn(f64, f64) -> f64, f64, Box<[Node]>),
    Test(Test, Box<Node>),
    Convert(Convert, Box<Node>),
    Member(Box<Node>, Box<str>),
    Index(Box<Node>, usize),
    ToFixed(Box<Node>, usize),
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Test {
    IsNan,
    IsFinite,
    NumberIsNan,
    NumberIsFinite,
    NumberIsInteger,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Convert {
    Number,
    String,
    Boolean,
    ParseInt,
    ParseFloat,
    /// The method, not the function.
    ToString,
}

/// What an expression gives on its way.
#[derive(Debug)]
pub(super) enum Val<'a> {
    Undefined,
    Null,
    Bool(bool),
    Number(f64),
    String(Cow<'a, str>),
    /// An array or object.
    Tree(&'a Value),
}

/// Only the engine knows.
#[derive(Debug)]
pub(super) struct GiveUp;

type Outcome<'a> = Result<Val<'a>, GiveUp>;

/// Where the values of sources are.
pub(super) trait Sources {
    /// None if it has none yet: then the expression should not run at all.
    fn source(&self, number: usize) -> Option<&Value>;
}

// ---- compiling

/// The tree of an expression, if it has nothing in it that only the engine can do. `source` gives the
/// number of the source of a name.
pub(super) fn compile(
    expression: &Expression<'_>,
    source: &impl Fn(&str) -> Option<usize>,
) -> Option<Node> {
    Compiler { source }.node(expression, 0)
}

struct Compiler<'s, F> {
    source: &'s F,
}

impl<F: Fn(&str) -> Option<usize>> Compiler<'_, F> {
    fn node(&self, expression: &Expression<'_>, depth: usize) -> Option<Node> {
        if depth > MAX_DEPTH {
            return None;
        }
        let node = |expression| self.node(expression, depth + 1);
        Some(match expression {
            Expression::NullLiteral(_) => Node::Null,
            Expression::BooleanLiteral(literal) => Node::Bool(literal.value),
            Expression::NumericLiteral(literal) => Node::Number(literal.value),
            Expression::StringLiteral(literal) if !literal.lone_surrogates => {
                Node::String(literal.value.as_str().into())
            }
            Expression::Identifier(identifier) => match identifier.name.as_str() {
                "undefined" => Node::Undefined,
                "NaN" => Node::Number(f64::NAN),
                "Infinity" => Node::Number(f64::INFINITY),
                name => Node::Source((self.source)(name)?),
            },
            Expression::ParenthesizedExpression(inner) => node(&inner.expression)?,
            Expression::UnaryExpression(unary) => match unary.operator {
                UnaryOperator::Delete => return None,
                operator => Node::Unary(operator, Box::new(node(&unary.argument)?)),
            },
            Expression::BinaryExpression(binary) => match binary.operator {
                BinaryOperator::In | BinaryOperator::Instanceof => return None,
                operator => Node::Binary(
                    operator,
                    Box::new([node(&binary.left)?, node(&binary.right)?]),
                ),
            },
            Expression::LogicalExpression(logical) => Node::Logical(
                logical.operator,
                Box::new([node(&logical.left)?, node(&logical.right)?]),
            ),
            Expression::ConditionalExpression(conditional) => Node::Conditional(Box::new([
                node(&conditional.test)?,
                node(&conditional.consequent)?,
                node(&conditional.alternate)?,
            ])),
            Expression::TemplateLiteral(template) => {
                let texts = template
                    .quasis
                    .iter()
                    .map(|quasi| {
                        let cooked = quasi.value.cooked.as_ref()?;
                        (!quasi.lone_surrogates).then(|| Box::from(cooked.as_str()))
                    })
                    .collect::<Option<_>>()?;
                let nodes = template
                    .expressions
                    .iter()
                    .map(node)
                    .collect::<Option<_>>()?;
                Node::Template(texts, nodes)
            }
            Expression::SequenceExpression(sequence) => Node::Sequence(
                sequence
                    .expressions
                    .iter()
                    .map(node)
                    .collect::<Option<_>>()?,
            ),
            Expression::StaticMemberExpression(member) if !member.optional => {
                let name = member.property.name.as_str();
                if let Expression::Identifier(object) = &member.object
                    && (self.source)(object.name.as_str()).is_none()
                {
                    return constant(object.name.as_str(), name).map(Node::Number);
                }
                Node::Member(Box::new(node(&member.object)?), name.into())
            }
            Expression::ComputedMemberExpression(member) if !member.optional => {
                let object = Box::new(node(&member.object)?);
                match &member.expression {
                    Expression::StringLiteral(key) if !key.lone_surrogates => {
                        Node::Member(object, key.value.as_str().into())
                    }
                    Expression::NumericLiteral(index)
                        if index.value >= 0.0 && index.value.fract() == 0.0 =>
                    {
                        Node::Index(object, index.value as usize)
                    }
                    _ => return None,
                }
            }
            Expression::CallExpression(call) if !call.optional => self.call(call, depth)?,
            _ => return None,
        })
    }

    fn call(&self, call: &CallExpression<'_>, depth: usize) -> Option<Node> {
        let arguments = call
            .arguments
            .iter()
            .map(|argument| match argument {
                Argument::SpreadElement(_) => None,
                argument => self.node(argument.as_expression()?, depth + 1),
            })
            .collect::<Option<Vec<_>>>()?;
        match &call.callee {
            Expression::Identifier(function) => {
                if (self.source)(function.name.as_str()).is_some() {
                    return None;
                }
                let [argument] = <[Node; 1]>::try_from(arguments).ok()?;
                let argument = Box::new(argument);
                Some(match function.name.as_str() {
                    "Number" => Node::Convert(Convert::Number, argument),
                    "String" => Node::Convert(Convert::String, argument),
                    "Boolean" => Node::Convert(Convert::Boolean, argument),
                    "parseInt" => Node::Convert(Convert::ParseInt, argument),
                    "parseFloat" => Node::Convert(Convert::ParseFloat, argument),
                    "isNaN" => Node::Test(Test::IsNan, argument),
                    "isFinite" => Node::Test(Test::IsFinite, argument),
                    _ => return None,
                })
            }
            Expression::StaticMemberExpression(member) if !member.optional => {
                let name = member.property.name.as_str();
                if let Expression::Identifier(object) = &member.object
                    && (self.source)(object.name.as_str()).is_none()
                {
                    return match object.name.as_str() {
                        "Math" => math(name, arguments),
                        "Number" => {
                            let test = match name {
                                "isNaN" => Test::NumberIsNan,
                                "isFinite" => Test::NumberIsFinite,
                                "isInteger" => Test::NumberIsInteger,
                                _ => return None,
                            };
                            let [argument] = <[Node; 1]>::try_from(arguments).ok()?;
                            Some(Node::Test(test, Box::new(argument)))
                        }
                        _ => None,
                    };
                }
                let object = Box::new(self.node(&member.object, depth + 1)?);
                match (name, arguments.as_slice()) {
                    ("toFixed", []) => Some(Node::ToFixed(object, 0)),
                    ("toFixed", [Node::Number(digits)])
                        if (0.0..=100.0).contains(digits) && digits.fract() == 0.0 =>
                    {
                        Some(Node::ToFixed(object, *digits as usize))
                    }
                    ("toString", []) => Some(Node::Convert(Convert::ToString, object)),
                    _ => None,
                }
            }
            _ => None,
        }
    }
}

fn constant(object: &str, name: &str) -> Option<f64> {
    use std::f64::consts;
    Some(match (object, name) {
        ("Math", "PI") => consts::PI,
        ("Math", "E") => consts::E,
        ("Math", "LN2") => consts::LN_2,
        ("Math", "LN10") => consts::LN_10,
        ("Math", "LOG2E") => consts::LOG2_E,
        ("Math", "LOG10E") => consts::LOG10_E,
        ("Math", "SQRT2") => consts::SQRT_2,
        ("Math", "SQRT1_2") => consts::FRAC_1_SQRT_2,
        ("Number", "EPSILON") => f64::EPSILON,
        ("Number", "MAX_VALUE") => f64::MAX,
        ("Number", "MIN_VALUE") => 5e-324,
        ("Number", "MAX_SAFE_INTEGER") => 9_007_199_254_740_991.0,
        ("Number", "MIN_SAFE_INTEGER") => -9_007_199_254_740_991.0,
        ("Number", "POSITIVE_INFINITY") => f64::INFINITY,
        ("Number", "NEGATIVE_INFINITY") => f64::NEG_INFINITY,
        ("Number", "NaN") => f64::NAN,
        _ => return None,
    })
}

/// The functions whose results the standard fixes to the last bit, and those that are the C library's
/// here as in the engine.
fn math(name: &str, arguments: Vec<Node>) -> Option<Node> {
    let function: fn(f64) -> f64 = match name {
        "max" => return Some(Node::Fold(max, f64::NEG_INFINITY, arguments.into())),
        "min" => return Some(Node::Fold(min, f64::INFINITY, arguments.into())),
        "pow" | "atan2" => {
            let arguments = <[Node; 2]>::try_from(arguments).ok()?;
            let function = if name == "pow" { power } else { f64::atan2 };
            return Some(Node::Math2(function, Box::new(arguments)));
        }
        "abs" => f64::abs,
        "ceil" => f64::ceil,
        "floor" => f64::floor,
        "trunc" => f64::trunc,
        "round" => round,
        "sign" => |x| {
            if x == 0.0 || x.is_nan() {
                x
            } else {
                x.signum()
            }
        },
        "fround" => |x| f64::from(x as f32),
        "sqrt" => f64::sqrt,
        "cbrt" => f64::cbrt,
        "exp" => f64::exp,
        "expm1" => f64::exp_m1,
        "log" => f64::ln,
        "log1p" => f64::ln_1p,
        "log2" => f64::log2,
        "log10" => f64::log10,
        "sin" => f64::sin,
        "cos" => f64::cos,
        "tan" => f64::tan,
        "asin" => f64::asin,
        "acos" => f64::acos,
        "atan" => f64::atan,
        "sinh" => f64::sinh,
        "cosh" => f64::cosh,
        "tanh" => f64::tanh,
        _ => return None,
    };
    let [argument] = <[Node; 1]>::try_from(arguments).ok()?;
    Some(Node::Math1(function, Box::new(argument)))
}

fn max(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() {
        f64::NAN
    } else if a == b {
        // 0 is more than -0.
        if a.is_sign_negative() { b } else { a }
    } else {
        a.max(b)
    }
}

fn min(a: f64, b: f64) -> f64 {
    if a.is_nan() || b.is_nan() {
        f64::NAN
    } else if a == b {
        if a.is_sign_negative() { a } else { b }
    } else {
        a.min(b)
    }
}

/// Halves go up.
fn round(number: f64) -> f64 {
    let floor = number.floor();
    let rounded = if number - floor >= 0.5 {
        floor + 1.0
    } else {
        floor
    };
    rounded.copysign(number)
}

/// Unlike C's, 1 to the power of NaN or infinity is NaN.
fn power(base: f64, exponent: f64) -> f64 {
    if !exponent.is_finite() && (base.abs() == 1.0 || exponent.is_nan()) {
        f64::NAN
    } else {
        base.powf(exponent)
    }
}

// ---- evaluating

impl Node {
    pub fn evaluate<'a>(&'a self, sources: &'a impl Sources) -> Outcome<'a> {
        let number = |node: &'a Node| node.evaluate(sources)?.number();
        Ok(match self {
            Node::Undefined => Val::Undefined,
            Node::Null => Val::Null,
            Node::Bool(is) => Val::Bool(*is),
            Node::Number(number) => Val::Number(*number),
            Node::String(text) => Val::String(Cow::Borrowed(text)),
            Node::Source(source) => sources.source(*source).ok_or(GiveUp)?.into(),
            Node::Unary(operator, operand) => {
                let operand = operand.evaluate(sources)?;
                match operator {
                    UnaryOperator::UnaryPlus => Val::Number(operand.number()?),
                    UnaryOperator::UnaryNegation => Val::Number(-operand.number()?),
                    UnaryOperator::LogicalNot => Val::Bool(!operand.is_true()),
                    UnaryOperator::BitwiseNot => Val::Number((!to_int32(operand.number()?)).into()),
                    UnaryOperator::Typeof => Val::String(Cow::Borrowed(operand.type_of())),
                    UnaryOperator::Void => Val::Undefined,
                    UnaryOperator::Delete => return Err(GiveUp),
                }
            }
            Node::Binary(operator, operands) => {
                let left = operands[0].evaluate(sources)?;
                let right = operands[1].evaluate(sources)?;
                binary(*operator, left, right)?
            }
            Node::Logical(operator, operands) => {
                let left = operands[0].evaluate(sources)?;
                let is_enough = match operator {
                    LogicalOperator::And => !left.is_true(),
                    LogicalOperator::Or => left.is_true(),
                    LogicalOperator::Coalesce => !matches!(left, Val::Undefined | Val::Null),
                };
                if is_enough {
                    left
                } else {
                    operands[1].evaluate(sources)?
                }
            }
            Node::Conditional(parts) => {
                let test = parts[0].evaluate(sources)?.is_true();
                parts[if test { 1 } else { 2 }].evaluate(sources)?
            }
            Node::Template(texts, nodes) => {
                let mut result = String::with_capacity(64);
                let mut texts = texts.iter();
                result.extend(texts.next().map(AsRef::as_ref));
                for (node, text) in nodes.iter().zip(texts) {
                    node.evaluate(sources)?.append_to(&mut result)?;
                    result.push_str(text);
                    bounded(&result)?;
                }
                Val::String(Cow::Owned(result))
            }
            Node::Sequence(nodes) => {
                let mut last = Val::Undefined;
                for node in nodes {
                    last = node.evaluate(sources)?;
                }
                last
            }
            Node::Math1(function, operand) => Val::Number(function(number(operand)?)),
            Node::Math2(function, operands) => {
                let first = number(&operands[0])?;
                Val::Number(function(first, number(&operands[1])?))
            }
            Node::Fold(function, start, operands) => {
                let mut result = *start;
                for operand in operands {
                    result = function(result, number(operand)?);
                }
                Val::Number(result)
            }
            Node::Test(test, operand) => {
                let operand = operand.evaluate(sources)?;
                let strict = match &operand {
                    Val::Number(number) => Some(*number),
                    _ => None,
                };
                Val::Bool(match test {
                    Test::IsNan => operand.number()?.is_nan(),
                    Test::IsFinite => operand.number()?.is_finite(),
                    Test::NumberIsNan => strict.is_some_and(f64::is_nan),
                    Test::NumberIsFinite => strict.is_some_and(f64::is_finite),
                    Test::NumberIsInteger => {
                        strict.is_some_and(|number| number.is_finite() && number.fract() == 0.0)
                    }
                })
            }
            Node::Convert(convert, operand) => convert.apply(operand.evaluate(sources)?)?,
            Node::Member(object, name) => match object.evaluate(sources)? {
                Val::String(text) if **name == *"length" => {
                    let units = if text.is_ascii() {
                        text.len()
                    } else {
                        text.encode_utf16().count()
                    };
                    Val::Number(units as f64)
                }
                Val::Tree(Value::Array(items)) if **name == *"length" => {
                    Val::Number(items.0.len() as f64)
                }
                Val::Tree(Value::Object(members)) => {
                    let member = members.0.iter().find(|(key, _)| key == name);
                    (&member.ok_or(GiveUp)?.1).into()
                }
                _ => return Err(GiveUp),
            },
            Node::Index(object, index) => match object.evaluate(sources)? {
                Val::Tree(Value::Array(items)) => items.0.get(*index).ok_or(GiveUp)?.into(),
                _ => return Err(GiveUp),
            },
            Node::ToFixed(number, digits) => match number.evaluate(sources)? {
                Val::Number(number) => {
                    Val::String(Cow::Owned(to_fixed(number, *digits).ok_or(GiveUp)?))
                }
                _ => return Err(GiveUp),
            },
        })
    }
}

impl Convert {
    fn apply(self, value: Val<'_>) -> Outcome<'_> {
        Ok(match self {
            Convert::Number => Val::Number(value.number()?),
            Convert::Boolean => Val::Bool(value.is_true()),
            Convert::String => Val::String(value.text()?),
            Convert::ToString => match value {
                Val::Undefined | Val::Null | Val::Tree(_) => return Err(GiveUp),
                value => Val::String(value.text()?),
            },
            // Of a number as its text has it: with an exponent only the digits before that count.
            Convert::ParseInt => match value {
                Val::Number(0.0) => Val::Number(0.0),
                Val::Number(number) if (1e-6..1e21).contains(&number.abs()) => {
                    Val::Number(number.trunc())
                }
                _ => return Err(GiveUp),
            },
            Convert::ParseFloat => match value {
                Val::Number(0.0) => Val::Number(0.0),
                Val::Number(number) => Val::Number(number),
                _ => return Err(GiveUp),
            },
        })
    }
}

fn binary<'a>(operator: BinaryOperator, left: Val<'a>, right: Val<'a>) -> Outcome<'a> {
    use BinaryOperator as Op;
    let numbers =
        |function: fn(f64, f64) -> f64| Ok(Val::Number(function(left.number()?, right.number()?)));
    let bits = |function: fn(i32, i32) -> i32| {
        let (left, right) = (to_int32(left.number()?), to_int32(right.number()?));
        Ok(Val::Number(function(left, right).into()))
    };
    let order = |is: fn(Ordering) -> bool| {
        Ok(Val::Bool(match (&left, &right) {
            (Val::String(left), Val::String(right)) => is(compare_strings(left, right)),
            _ => left.number()?.partial_cmp(&right.number()?).is_some_and(is),
        }))
    };
    match operator {
        Op::Addition => match (left, right) {
            (Val::Number(left), Val::Number(right)) => Ok(Val::Number(left + right)),
            (Val::Tree(_), _) | (_, Val::Tree(_)) => Err(GiveUp),
            (Val::String(left), right) => {
                let mut text = left.into_owned();
                right.append_to(&mut text)?;
                bounded(&text)?;
                Ok(Val::String(Cow::Owned(text)))
            }
            (left, Val::String(right)) => {
                let mut text = left.text()?.into_owned();
                text.push_str(&right);
                bounded(&text)?;
                Ok(Val::String(Cow::Owned(text)))
            }
            (left, right) => Ok(Val::Number(left.number()? + right.number()?)),
        },
        Op::Subtraction => numbers(|left, right| left - right),
        Op::Multiplication => numbers(|left, right| left * right),
        Op::Division => numbers(|left, right| left / right),
        Op::Remainder => numbers(|left, right| left % right),
        Op::Exponential => numbers(power),
        Op::LessThan => order(Ordering::is_lt),
        Op::LessEqualThan => order(Ordering::is_le),
        Op::GreaterThan => order(Ordering::is_gt),
        Op::GreaterEqualThan => order(Ordering::is_ge),
        Op::StrictEquality => Ok(Val::Bool(is_same(&left, &right)?)),
        Op::StrictInequality => Ok(Val::Bool(!is_same(&left, &right)?)),
        Op::Equality => Ok(Val::Bool(is_equal(&left, &right)?)),
        Op::Inequality => Ok(Val::Bool(!is_equal(&left, &right)?)),
        Op::BitwiseAnd => bits(|left, right| left & right),
        Op::BitwiseOR => bits(|left, right| left | right),
        Op::BitwiseXOR => bits(|left, right| left ^ right),
        Op::ShiftLeft => bits(|left, right| left << (right & 31)),
        Op::ShiftRight => bits(|left, right| left >> (right & 31)),
        Op::ShiftRightZeroFill => {
            let left = to_int32(left.number()?).cast_unsigned();
            let right = to_int32(right.number()?) & 31;
            Ok(Val::Number((left >> right).into()))
        }
        Op::In | Op::Instanceof => Err(GiveUp),
    }
}

/// Longer texts are the engine's, whose memory is bounded.
fn bounded(text: &str) -> Result<(), GiveUp> {
    if text.len() > MAX_RESULT_BYTES {
        return Err(GiveUp);
    }
    Ok(())
}

fn is_same(left: &Val<'_>, right: &Val<'_>) -> Result<bool, GiveUp> {
    Ok(match (left, right) {
        (Val::Undefined, Val::Undefined) | (Val::Null, Val::Null) => true,
        (Val::Bool(left), Val::Bool(right)) => left == right,
        (Val::Number(left), Val::Number(right)) => left == right,
        (Val::String(left), Val::String(right)) => left == right,
        (Val::Tree(_), Val::Tree(_)) => return Err(GiveUp),
        _ => false,
    })
}

fn is_equal(left: &Val<'_>, right: &Val<'_>) -> Result<bool, GiveUp> {
    let is_nothing = |value: &Val<'_>| matches!(value, Val::Undefined | Val::Null);
    if is_nothing(left) || is_nothing(right) {
        return Ok(is_nothing(left) && is_nothing(right));
    }
    match (left, right) {
        (Val::Tree(_), _) | (_, Val::Tree(_)) => Err(GiveUp),
        (Val::String(left), Val::String(right)) => Ok(left == right),
        _ => Ok(left.number()? == right.number()?),
    }
}

impl<'a> From<&'a Value> for Val<'a> {
    fn from(value: &'a Value) -> Val<'a> {
        match value {
            Value::Null => Val::Null,
            Value::Bool(is) => Val::Bool(*is),
            Value::Number(number) => Val::Number(*number),
            Value::String(text) => Val::String(Cow::Borrowed(text)),
            tree @ (Value::Array(_) | Value::Object(_)) => Val::Tree(tree),
        }
    }
}

impl<'a> Val<'a> {
    fn number(&self) -> Result<f64, GiveUp> {
        match self {
            Val::Undefined => Ok(f64::NAN),
            Val::Null => Ok(0.0),
            Val::Bool(is) => Ok(u8::from(*is).into()),
            Val::Number(number) => Ok(*number),
            Val::String(text) => string_to_number(text).ok_or(GiveUp),
            Val::Tree(_) => Err(GiveUp),
        }
    }

    fn is_true(&self) -> bool {
        match self {
            Val::Undefined | Val::Null => false,
            Val::Bool(is) => *is,
            Val::Number(number) => *number != 0.0 && !number.is_nan(),
            Val::String(text) => !text.is_empty(),
            Val::Tree(_) => true,
        }
    }

    fn type_of(&self) -> &'static str {
        match self {
            Val::Undefined => "undefined",
            Val::Null | Val::Tree(_) => "object",
            Val::Bool(_) => "boolean",
            Val::Number(_) => "number",
            Val::String(_) => "string",
        }
    }

    fn text(self) -> Result<Cow<'a, str>, GiveUp> {
        match self {
            Val::String(text) => Ok(text),
            other => {
                let mut text = String::with_capacity(32);
                other.append_to(&mut text)?;
                Ok(Cow::Owned(text))
            }
        }
    }

    fn append_to(&self, text: &mut String) -> Result<(), GiveUp> {
        match self {
            Val::Undefined => text.push_str("undefined"),
            Val::Null => text.push_str("null"),
            Val::Bool(is) => text.push_str(if *is { "true" } else { "false" }),
            Val::Number(number) => text.push_str(NumberText::new(*number).as_str()),
            Val::String(part) => text.push_str(part),
            Val::Tree(_) => return Err(GiveUp),
        }
        Ok(())
    }

    /// Appends the result as Go's JSON.
    pub fn write(&self, out: &mut Vec<u8>) -> Result<(), Failure> {
        match self {
            Val::Undefined => return Err(Failure::Undefined),
            Val::Null => return Err(Failure::Null),
            Val::Bool(is) => out.extend_from_slice(if *is { b"true" } else { b"false" }),
            Val::Number(number) if !number.is_finite() => return Err(Failure::NotFinite(*number)),
            Val::Number(number) => payload::write_number(*number, out),
            Val::String(text) => payload::write_string(text, out),
            Val::Tree(value) => payload::write_value(value, out),
        }
        Ok(())
    }
}
