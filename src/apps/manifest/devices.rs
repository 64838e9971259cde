//! What a manifest says about devices: `capabilities`, `[[gpio]]` and `[[sensor]]`.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

use serde::Deserialize;
use toml::{Spanned, Value};

use super::{Check, ManifestError, line_of};

/// Most lines, and most sensors, of one app.
const MOST: usize = 64;

/// Longest name that the manifest gives to a line or a sensor. It is a level of a topic.
const MAX_NAME: usize = 64;

/// Longest name of the kernel's that is looked for. Its own end at 32 bytes, those of a device tree
/// somewhat later.
const MAX_KERNEL_NAME: usize = 128;

/// No chip has as many lines.
const OFFSETS: RangeInclusive<i64> = 0..=65_535;
const DEBOUNCE_US: RangeInclusive<u64> = 1..=10_000_000;
const INTERVAL_MS: RangeInclusive<u64> = 10..=86_400_000;
const DEFAULT_INTERVAL: Duration = Duration::from_secs(1);

/// What an app may only do where the gateway's configuration lets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Capability {
    Gpio,
    Sensors,
}

impl Capability {
    const ALL: [Capability; 2] = [Capability::Gpio, Capability::Sensors];

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Capability::Gpio => "gpio",
            Capability::Sensors => "sensors",
        }
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A capability that the manifest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) capability: Capability,
    /// Where, counted from 1.
    pub(crate) line: usize,
}

/// All that a manifest says about devices.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Devices {
    pub(crate) capabilities: Vec<Asked>,
    pub(crate) gpio: Vec<GpioLine>,
    pub(crate) sensors: Vec<Sensor>,
}

impl Devices {
    /// Whether events come from them.
    pub(super) fn make_events(&self) -> bool {
        let has_edges = |line: &GpioLine| match line.direction {
            Direction::Input { edges, .. } => edges != Edges::None,
            Direction::Output { .. } => false,
        };
        !self.sensors.is_empty() || self.gpio.iter().any(has_edges)
    }
}

/// A line of a GPIO chip, under a name of the app's.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct GpioLine {
    /// 1 to 64 of `A-Z a-z 0-9 _ . -`.
    pub(crate) name: Box<str>,
    /// The chip's name or label.
    pub(crate) chip: Box<str>,
    pub(crate) line: LineOnChip,
    pub(crate) direction: Direction,
    /// None leaves it as it is.
    pub(crate) bias: Option<Bias>,
    pub(crate) active_low: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LineOnChip {
    Offset(u32),
    Name(Box<str>),
}

impl fmt::Display for LineOnChip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LineOnChip::Offset(offset) => write!(f, "line {offset}"),
            LineOnChip::Name(name) => write!(f, "line {name:?}"),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Input {
        /// Which become events.
        edges: Edges,
        debounce: Option<Duration>,
    },
    Output {
        /// What it is set to when an instance takes it.
        initial: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Edges {
    Rising,
    Falling,
    Both,
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bias {
    PullUp,
    PullDown,
    Off,
}

/// A channel of a sensor, under a name of the app's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sensor {
    /// 1 to 64 of `A-Z a-z 0-9 _ . -`.
    pub(crate) name: Box<str>,
    /// The folder of an IIO or hwmon device, or what its `name` says.
    pub(crate) device: Box<str>,
    /// Of IIO, the beginning of a file's name; of hwmon, the whole of it.
    pub(crate) channel: Box<str>,
    pub(crate) interval: Duration,
}

/// As TOML has it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawGpio {
    name: Spanned<String>,
    chip: Spanned<String>,
    line: Spanned<Value>,
    direction: Spanned<String>,
    bias: Option<Spanned<String>>,
    #[serde(default)]
    active_low: bool,
    edges: Option<Spanned<String>>,
    debounce_us: Option<Spanned<i64>>,
    initial: Option<Spanned<bool>>,
}

/// As TOML has it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawSensor {
    name: Spanned<String>,
    device: Spanned<String>,
    channel: Spanned<String>,
    interval_ms: Option<Spanned<i64>>,
}

impl Check<'_> {
    pub(super) fn devices(
        &self,
        capabilities: &[Spanned<String>],
        gpio: &[RawGpio],
        sensors: &[RawSensor],
    ) -> Result<Devices, ManifestError> {
        let capabilities = self.capabilities(capabilities)?;
        if let Some(first) = gpio.first() {
            self.must_be_asked_for(&capabilities, Capability::Gpio, "gpio", &first.name)?;
        }
        if let Some(first) = sensors.first() {
            self.must_be_asked_for(&capabilities, Capability::Sensors, "sensor", &first.name)?;
        }
        Ok(Devices {
            capabilities,
            gpio: self.gpio(gpio)?,
            sensors: self.sensors(sensors)?,
        })
    }

    fn capabilities(&self, names: &[Spanned<String>]) -> Result<Vec<Asked>, ManifestError> {
        let mut all: Vec<Asked> = Vec::new();
        for name in names {
            let text = name.get_ref();
            let known = Capability::ALL.into_iter().find(|c| c.as_str() == text);
            let Some(capability) = known else {
                return Err(self.error(
                    name,
                    format!("`capabilities`: {text:?} is none; there are \"gpio\" and \"sensors\""),
                ));
            };
            if all.iter().any(|asked| asked.capability == capability) {
                return Err(self.error(name, format!("`capabilities`: {text:?} is there twice")));
            }
            let line = line_of(self.text, &name.span());
            all.push(Asked { capability, line });
        }
        Ok(all)
    }

    fn must_be_asked_for(
        &self,
        asked: &[Asked],
        capability: Capability,
        table: &str,
        first: &Spanned<String>,
    ) -> Result<(), ManifestError> {
        if asked.iter().any(|asked| asked.capability == capability) {
            return Ok(());
        }
        Err(self.error(
            first,
            format!(
                "`{table}`: an app that uses it has to ask for it; put \"{capability}\" into \
                 `capabilities`, above all tables"
            ),
        ))
    }

    fn gpio(&self, raw: &[RawGpio]) -> Result<Vec<GpioLine>, ManifestError> {
        self.at_most("gpio", raw.get(MOST).map(|raw| &raw.name), raw.len())?;
        self.unique("gpio", raw.iter().map(|raw| &raw.name))?;
        let mut lines: Vec<GpioLine> = Vec::new();
        for raw in raw {
            let line = self.gpio_line(raw)?;
            let is_same = |other: &&GpioLine| other.chip == line.chip && other.line == line.line;
            if let Some(other) = lines.iter().find(is_same) {
                return Err(self.error(
                    &raw.line,
                    format!(
                        "`gpio.line`: {} of {} is {:?} already; a line has one name",
                        line.line, line.chip, other.name
                    ),
                ));
            }
            lines.push(line);
        }
        Ok(lines)
    }

    fn gpio_line(&self, raw: &RawGpio) -> Result<GpioLine, ManifestError> {
        let line = match raw.line.get_ref() {
            Value::Integer(offset) if OFFSETS.contains(offset) => {
                LineOnChip::Offset(*offset as u32)
            }
            Value::String(name) if is_kernel_name(name) => LineOnChip::Name(name.as_str().into()),
            other => {
                return Err(self.error(
                    &raw.line,
                    format!(
                        "`gpio.line`: {other} is no line; give its offset on the chip, {} to {}, \
                         or its name in quotes",
                        OFFSETS.start(),
                        OFFSETS.end()
                    ),
                ));
            }
        };
        let bias = self.choice(
            "gpio.bias",
            raw.bias.as_ref(),
            &[
                ("pull-up", Bias::PullUp),
                ("pull-down", Bias::PullDown),
                ("none", Bias::Off),
            ],
        )?;
        let is_output = self.choice(
            "gpio.direction",
            Some(&raw.direction),
            &[("input", false), ("output", true)],
        )? == Some(true);
        let edges = self.choice(
            "gpio.edges",
            raw.edges.as_ref(),
            &[
                ("rising", Edges::Rising),
                ("falling", Edges::Falling),
                ("both", Edges::Both),
                ("none", Edges::None),
            ],
        )?;
        let debounce = self.number("gpio.debounce_us", &raw.debounce_us, DEBOUNCE_US)?;
        let direction = if is_output {
            if let Some(edges) = &raw.edges {
                return Err(self.only_for(edges, "gpio.edges", "inputs"));
            }
            if let Some(debounce) = &raw.debounce_us {
                return Err(self.only_for(debounce, "gpio.debounce_us", "inputs"));
            }
            Direction::Output {
                initial: raw.initial.as_ref().is_some_and(|on| *on.get_ref()),
            }
        } else {
            if let Some(initial) = &raw.initial {
                return Err(self.only_for(initial, "gpio.initial", "outputs"));
            }
            Direction::Input {
                edges: edges.unwrap_or(Edges::Both),
                debounce: debounce.map(Duration::from_micros),
            }
        };
        Ok(GpioLine {
            name: self.device_name("gpio.name", &raw.name)?,
            chip: self.kernel_name("gpio.chip", &raw.chip)?,
            line,
            direction,
            bias,
            active_low: raw.active_low,
        })
    }

    fn sensors(&self, raw: &[RawSensor]) -> Result<Vec<Sensor>, ManifestError> {
        self.at_most("sensor", raw.get(MOST).map(|raw| &raw.name), raw.len())?;
        self.unique("sensor", raw.iter().map(|raw| &raw.name))?;
        raw.iter().map(|raw| self.sensor(raw)).collect()
    }

    fn sensor(&self, raw: &RawSensor) -> Result<Sensor, ManifestError> {
        let channel = raw.channel.get_ref();
        let allowed = |c: u8| c.is_ascii_alphanumeric() || b"_-".contains(&c);
        if !is_kernel_name(channel) || !channel.bytes().all(allowed) {
            return Err(self.error(
                &raw.channel,
                format!(
                    "`sensor.channel`: {channel:?} is no channel; give one such as \"in_temp\" \
                     (IIO) or \"temp1_input\" (hwmon)"
                ),
            ));
        }
        let interval = self.number("sensor.interval_ms", &raw.interval_ms, INTERVAL_MS)?;
        Ok(Sensor {
            name: self.device_name("sensor.name", &raw.name)?,
            device: self.kernel_name("sensor.device", &raw.device)?,
            channel: channel.as_str().into(),
            interval: interval.map_or(DEFAULT_INTERVAL, Duration::from_millis),
        })
    }

    fn at_most(
        &self,
        table: &str,
        first_beyond: Option<&Spanned<String>>,
        count: usize,
    ) -> Result<(), ManifestError> {
        match first_beyond {
            Some(name) => Err(self.error(
                name,
                format!("`{table}`: {count} of them, and at most {MOST} are allowed"),
            )),
            None => Ok(()),
        }
    }

    fn unique<'a>(
        &self,
        table: &str,
        names: impl Iterator<Item = &'a Spanned<String>>,
    ) -> Result<(), ManifestError> {
        let mut seen = BTreeSet::new();
        for name in names {
            let text = name.get_ref();
            if !seen.insert(text) {
                return Err(self.error(
                    name,
                    format!("`{table}.name`: {text:?} is there twice; give each its own name"),
                ));
            }
        }
        Ok(())
    }

    fn device_name(&self, key: &str, name: &Spanned<String>) -> Result<Box<str>, ManifestError> {
        let text = name.get_ref();
        let allowed = |c: u8| c.is_ascii_alphanumeric() || b"_.-".contains(&c);
        if (1..=MAX_NAME).contains(&text.len()) && text.bytes().all(allowed) {
            return Ok(text.as_str().into());
        }
        Err(self.error(
            name,
            format!(
                "`{key}`: {text:?} is no name; take 1 to {MAX_NAME} of the characters A-Z a-z \
                 0-9 _ . -"
            ),
        ))
    }

    fn kernel_name(&self, key: &str, name: &Spanned<String>) -> Result<Box<str>, ManifestError> {
        let text = name.get_ref();
        if is_kernel_name(text) {
            return Ok(text.as_str().into());
        }
        Err(self.error(
            name,
            format!(
                "`{key}`: {text:?} is no name of the kernel's; give 1 to {MAX_KERNEL_NAME} bytes, \
                 without a folder"
            ),
        ))
    }

    fn choice<T: Copy>(
        &self,
        key: &str,
        word: Option<&Spanned<String>>,
        choices: &[(&str, T)],
    ) -> Result<Option<T>, ManifestError> {
        let Some(word) = word else {
            return Ok(None);
        };
        let text = word.get_ref();
        match choices.iter().find(|(name, _)| name == text) {
            Some((_, choice)) => Ok(Some(*choice)),
            None => {
                let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
                let names = names.join(", ");
                Err(self.error(word, format!("`{key}`: {text:?} is none of {names}")))
            }
        }
    }

    fn only_for<T>(&self, at: &Spanned<T>, key: &str, which: &str) -> ManifestError {
        self.error(at, format!("`{key}` is for {which} only; leave it out"))
    }
}

fn is_kernel_name(text: &str) -> bool {
    (1..=MAX_KERNEL_NAME).contains(&text.len())
        && !text.contains('/')
        && !text.contains(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::super::Manifest;
    use super::*;
    use crate::apps::Defaults;

    const HEAD: &str = "name = \"a\"\nversion = \"0.1.0\"\nsubscribe = []\n";
    const DOOR: &str =
        "[[gpio]]\nname = \"door\"\nchip = \"gpiochip0\"\nline = 17\ndirection = \"input\"\n";
    const TEMP: &str = "[[sensor]]\nname = \"temp\"\ndevice = \"bme280\"\nchannel = \"in_temp\"\n";

    /// With both capabilities, on line 4; the first table begins on line 5.
    fn with(tables: &str) -> String {
        format!("{HEAD}capabilities = [\"gpio\", \"sensors\"]\n{tables}")
    }

    fn devices(text: &str) -> Devices {
        Manifest::parse(text, &Defaults::new(100)).unwrap().devices
    }

    #[test]
    fn a_line_and_a_sensor_need_little() {
        let found = devices(&with(&format!("{DOOR}{TEMP}")));
        assert_eq!(
            found.gpio,
            [GpioLine {
                name: "door".into(),
                chip: "gpiochip0".into(),
                line: LineOnChip::Offset(17),
                direction: Direction::Input {
                    edges: Edges::Both,
                    debounce: None
                },
                bias: None,
                active_low: false,
            }]
        );
        assert_eq!(
            found.sensors,
            [Sensor {
                name: "temp".into(),
                device: "bme280".into(),
                channel: "in_temp".into(),
                interval: Duration::from_secs(1),
            }]
        );
        assert_eq!(found.capabilities[1].line, 4);
    }

    #[test]
    fn all_that_can_be_said_of_a_line_is_read() {
        let input = format!(
            "{}bias = \"pull-up\"\nactive_low = true\nedges = \"rising\"\ndebounce_us = 5000\n",
            DOOR.replace("17", "\"DOOR_SW\"")
        );
        let output = "[[gpio]]\nname = \"lamp\"\nchip = \"pinctrl-rp1\"\nline = 0\n\
             direction = \"output\"\ninitial = true\nbias = \"none\"\n";
        let interval = format!("{TEMP}interval_ms = 10\n");
        let found = devices(&with(&format!("{input}{output}{interval}")));
        let [door, lamp] = &found.gpio[..] else {
            panic!("{found:?}")
        };
        assert_eq!(door.line, LineOnChip::Name("DOOR_SW".into()));
        assert_eq!((door.bias, door.active_low), (Some(Bias::PullUp), true));
        assert_eq!(
            door.direction,
            Direction::Input {
                edges: Edges::Rising,
                debounce: Some(Duration::from_millis(5))
            }
        );
        assert_eq!(lamp.direction, Direction::Output { initial: true });
        assert_eq!(lamp.bias, Some(Bias::Off));
        assert_eq!(found.sensors[0].interval, Duration::from_millis(10));
    }

    #[test]
    fn only_an_app_that_hears_of_a_device_may_subscribe_to_nothing() {
        let unheard = with("").replace("subscribe", "\nsubscribe");
        let quiet = with(&format!("{DOOR}edges = \"none\"\n"));
        for text in [unheard, quiet] {
            let error = Manifest::parse(&text, &Defaults::new(100))
                .unwrap_err()
                .to_string();
            assert!(error.contains("`subscribe` is empty"), "{error}");
        }
        assert!(Manifest::parse(&with(DOOR), &Defaults::new(100)).is_ok());
        assert!(Manifest::parse(&with(TEMP), &Defaults::new(100)).is_ok());
    }

    #[test]
    fn a_wrong_device_is_told_line_key_and_remedy() {
        let long = "n".repeat(129);
        let many: String = (0..65)
            .map(|n| {
                DOOR.replace("door", &format!("d{n}"))
                    .replace("17", &n.to_string())
            })
            .collect();
        let output = DOOR.replace("input", "output");
        let cases = [
            (
                format!("{HEAD}{DOOR}"),
                "line 5: `gpio`: an app that uses it has to ask for it; put \"gpio\" into",
            ),
            (
                format!("{HEAD}capabilities = [\"gpio\"]\n{TEMP}"),
                "line 6: `sensor`: an app that uses it has to ask for it; put \"sensors\" into",
            ),
            (
                format!("{HEAD}capabilities = [\"gpio\", \"i2c\"]\n{DOOR}"),
                "line 4: `capabilities`: \"i2c\" is none; there are \"gpio\" and \"sensors\"",
            ),
            (
                format!("{HEAD}capabilities = [\"gpio\", \"gpio\"]\n{DOOR}"),
                "line 4: `capabilities`: \"gpio\" is there twice",
            ),
            (
                with(&DOOR.replace("door", "front/door")),
                "line 6: `gpio.name`: \"front/door\" is no name; take 1 to 64",
            ),
            (
                with(&DOOR.replace("gpiochip0", "/dev/gpiochip0")),
                "line 7: `gpio.chip`: \"/dev/gpiochip0\" is no name of the kernel's",
            ),
            (
                with(&DOOR.replace("gpiochip0", &long)),
                "line 7: `gpio.chip`",
            ),
            (
                with(&DOOR.replace("17", "-1")),
                "line 8: `gpio.line`: -1 is no line; give its offset on the chip, 0 to 65535",
            ),
            (with(&DOOR.replace("17", "1.5")), "line 8: `gpio.line`: 1.5"),
            (with(&DOOR.replace("17", "\"\"")), "line 8: `gpio.line`"),
            (
                with(&DOOR.replace("\"input\"", "\"in\"")),
                "line 9: `gpio.direction`: \"in\" is none of input, output",
            ),
            (
                with(&format!("{DOOR}bias = \"up\"\n")),
                "line 10: `gpio.bias`: \"up\" is none of pull-up, pull-down, none",
            ),
            (
                with(&format!("{DOOR}edges = \"all\"\n")),
                "line 10: `gpio.edges`: \"all\" is none of rising, falling, both, none",
            ),
            (
                with(&format!("{DOOR}debounce_us = 0\n")),
                "line 10: `gpio.debounce_us`: 0 is out of range; give 1 to 10000000",
            ),
            (
                with(&format!("{DOOR}initial = true\n")),
                "line 10: `gpio.initial` is for outputs only; leave it out",
            ),
            (
                with(&format!("{output}edges = \"both\"\n")),
                "line 10: `gpio.edges` is for inputs only",
            ),
            (
                with(&format!("{output}debounce_us = 1\n")),
                "line 10: `gpio.debounce_us` is for inputs only",
            ),
            (
                with(&format!("{DOOR}{DOOR}")),
                "line 11: `gpio.name`: \"door\" is there twice",
            ),
            (
                with(&format!("{DOOR}{}", DOOR.replace("door", "gate"))),
                "line 13: `gpio.line`: line 17 of gpiochip0 is \"door\" already",
            ),
            (
                with(&format!("{DOOR}pull = \"up\"\n")),
                "line 10: unknown field `pull`",
            ),
            (
                with(&many),
                "`gpio`: 65 of them, and at most 64 are allowed",
            ),
            (
                with(&TEMP.replace("in_temp", "../in_temp")),
                "line 8: `sensor.channel`: \"../in_temp\" is no channel",
            ),
            (
                with(&TEMP.replace("bme280", "../bme280")),
                "line 7: `sensor.device`",
            ),
            (
                with(&format!("{TEMP}interval_ms = 9\n")),
                "line 9: `sensor.interval_ms`: 9 is out of range; give 10 to 86400000",
            ),
            (
                with(&format!("{TEMP}{TEMP}")),
                "line 10: `sensor.name`: \"temp\" is there twice",
            ),
            (
                with(DOOR).replace("[]", "[\"$gpio/door\"]"),
                "line 3: `subscribe`: \"$gpio/door\": an app gets the events of its lines without",
            ),
            (
                with(DOOR).replace("[]", "[\"$sensor/#\"]"),
                "line 3: `subscribe`: \"$sensor/#\": an app gets the events of its sensors",
            ),
        ];
        for (text, expected) in cases {
            let error = Manifest::parse(&text, &Defaults::new(100))
                .unwrap_err()
                .to_string();
            assert!(
                error.contains(expected),
                "expected {expected:?}, got {error:?}"
            );
        }
    }
}
