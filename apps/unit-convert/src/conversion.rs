//! Units, and the straight line that leads from one to the other.

use headgate_sdk::{Config, ConfigError};

/// `value * factor + offset`, rounded, and the units before and after.
pub struct Conversion {
    factor: f64,
    offset: f64,
    /// None: any unit is taken, since factor and offset were given by hand.
    from: Option<&'static Unit>,
    /// A JSON string; none if the unit after the conversion is not known.
    unit_json: Option<String>,
    /// 10 to the power of the decimals to round to.
    rounding: f64,
}

/// A unit by the line that leads to its quantity's base unit: `base = value * factor + offset`.
#[derive(Debug)]
struct Unit {
    name: &'static str,
    /// Other ways to write it, in small letters.
    aliases: &'static [&'static str],
    quantity: &'static str,
    factor: f64,
    offset: f64,
}

/// Base units: kelvin and pascal. One pound-force is 4.4482216152605 N, one inch 0.0254 m, exactly.
const UNITS: &[Unit] = &[
    Unit {
        name: "celsius",
        aliases: &["c", "°c", "degc"],
        quantity: "temperature",
        factor: 1.0,
        offset: 273.15,
    },
    Unit {
        name: "fahrenheit",
        aliases: &["f", "°f", "degf"],
        quantity: "temperature",
        factor: 5.0 / 9.0,
        offset: 459.67 * 5.0 / 9.0,
    },
    Unit {
        name: "kelvin",
        aliases: &["k"],
        quantity: "temperature",
        factor: 1.0,
        offset: 0.0,
    },
    Unit {
        name: "bar",
        aliases: &[],
        quantity: "pressure",
        factor: 100_000.0,
        offset: 0.0,
    },
    Unit {
        name: "psi",
        aliases: &["lbf/in2", "lbf/in²"],
        quantity: "pressure",
        factor: 4.448_221_615_260_5 / (0.0254 * 0.0254),
        offset: 0.0,
    },
    Unit {
        name: "kPa",
        aliases: &[],
        quantity: "pressure",
        factor: 1_000.0,
        offset: 0.0,
    },
];

const DEFAULT_DECIMALS: u8 = 3;
const MAX_DECIMALS: u8 = 9;

impl Conversion {
    /// From `from` and `to`, or else from `factor`, `offset` (default 0) and `unit`; and `decimals`.
    pub fn from_config(config: &Config) -> Result<Self, ConfigError> {
        let decimals = config.get_or("decimals", DEFAULT_DECIMALS)?;
        if decimals > MAX_DECIMALS {
            return Err(config.invalid("decimals", format_args!("must be at most {MAX_DECIMALS}")));
        }
        let rounding = 10_f64.powi(i32::from(decimals));
        if config.get_opt::<String>("factor")?.is_some() {
            Self::by_hand(config, rounding)
        } else {
            Self::between_units(config, rounding)
        }
    }

    fn by_hand(config: &Config, rounding: f64) -> Result<Self, ConfigError> {
        exclude(
            config,
            &["from", "to"],
            "either from and to, or factor and offset",
        )?;
        let unit: Option<String> = config.get_opt("unit")?;
        Ok(Conversion {
            factor: finite(config, "factor", 1.0)?,
            offset: finite(config, "offset", 0.0)?,
            from: None,
            unit_json: unit.map(|unit| serde_json::Value::from(unit).to_string()),
            rounding,
        })
    }

    fn between_units(config: &Config, rounding: f64) -> Result<Self, ConfigError> {
        exclude(
            config,
            &["offset", "unit"],
            "is for conversions with a factor",
        )?;
        let from = unit(config, "from")?;
        let to = unit(config, "to")?;
        if from.quantity != to.quantity {
            let why = format!(
                "is a {}, but {} is a {}",
                to.quantity, from.name, from.quantity
            );
            return Err(config.invalid("to", why));
        }
        Ok(Conversion {
            factor: from.factor / to.factor,
            offset: (from.offset - to.offset) / to.factor,
            from: Some(from),
            unit_json: Some(format!("{:?}", to.name)),
            rounding,
        })
    }

    /// Whether a reading that says its unit is `unit` may be converted.
    pub fn accepts(&self, unit: &str) -> bool {
        self.from.is_none_or(|from| from.is_called(unit))
    }

    /// Infinite or NaN if the result is out of range.
    pub fn apply(&self, value: f64) -> f64 {
        let value = value * self.factor + self.offset;
        let scaled = value * self.rounding;
        if scaled.is_finite() {
            scaled.round_ties_even() / self.rounding
        } else {
            value
        }
    }

    /// The unit of the results, as a JSON string.
    pub fn unit_json(&self) -> Option<&str> {
        self.unit_json.as_deref()
    }
}

impl Unit {
    fn is_called(&self, name: &str) -> bool {
        name.eq_ignore_ascii_case(self.name)
            || self
                .aliases
                .iter()
                .any(|alias| name.eq_ignore_ascii_case(alias))
    }
}

fn unit(config: &Config, key: &str) -> Result<&'static Unit, ConfigError> {
    let name: String = config.get(key)?;
    UNITS
        .iter()
        .find(|unit| unit.is_called(&name))
        .ok_or_else(|| {
            let known: Vec<_> = UNITS.iter().map(|unit| unit.name).collect();
            config.invalid(
                key,
                format_args!(
                    "unknown unit; known are {}, else give factor and offset",
                    known.join(", ")
                ),
            )
        })
}

fn finite(config: &Config, key: &str, default: f64) -> Result<f64, ConfigError> {
    let value = config.get_or(key, default)?;
    if value.is_finite() {
        Ok(value)
    } else {
        Err(config.invalid(key, "must be a finite number"))
    }
}

fn exclude(config: &Config, keys: &[&str], why: &str) -> Result<(), ConfigError> {
    for key in keys {
        if config.get_opt::<String>(key)?.is_some() {
            return Err(config.invalid(key, why));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn convert(value: f64, from: &str, to: &str) -> f64 {
        Conversion::from_config(&Config::from([("from", from), ("to", to)]))
            .unwrap()
            .apply(value)
    }

    #[test]
    fn temperatures_are_converted_each_way() {
        assert_eq!(convert(212.0, "fahrenheit", "celsius"), 100.0);
        assert_eq!(convert(-40.0, "celsius", "fahrenheit"), -40.0);
        assert_eq!(convert(0.0, "kelvin", "celsius"), -273.15);
        assert_eq!(convert(25.0, "celsius", "kelvin"), 298.15);
        assert_eq!(convert(98.6, "fahrenheit", "kelvin"), 310.15);
        assert_eq!(convert(310.15, "kelvin", "fahrenheit"), 98.6);
    }

    #[test]
    fn pressures_are_converted_each_way() {
        assert_eq!(convert(1.0, "bar", "psi"), 14.504);
        assert_eq!(convert(100.0, "psi", "bar"), 6.895);
        assert_eq!(convert(1.0, "bar", "kPa"), 100.0);
        assert_eq!(convert(250.0, "kpa", "bar"), 2.5);
        assert_eq!(convert(30.0, "psi", "kPa"), 206.843);
        assert_eq!(convert(206.843, "kPa", "psi"), 30.0);
    }

    #[test]
    fn a_unit_has_several_names() {
        let conversion =
            Conversion::from_config(&Config::from([("from", "°F"), ("to", "K")])).unwrap();
        assert_eq!(conversion.unit_json(), Some("\"kelvin\""));
        assert!(conversion.accepts("Fahrenheit") && conversion.accepts("f"));
        assert!(!conversion.accepts("celsius") && !conversion.accepts(""));
    }

    #[test]
    fn a_unit_given_by_hand_is_quoted_as_json() {
        let conversion =
            Conversion::from_config(&Config::from([("factor", "2"), ("unit", "a\"b")])).unwrap();
        assert_eq!(conversion.unit_json(), Some(r#""a\"b""#));
    }

    #[test]
    fn values_too_large_to_round_are_left_as_they_are() {
        let conversion =
            Conversion::from_config(&Config::from([("factor", "1"), ("decimals", "9")])).unwrap();
        assert_eq!(conversion.apply(1e305), 1e305);
        assert!(conversion.apply(f64::MAX).is_finite());
    }
}
