//! Sensors as the kernel shows them in sysfs, and their values in plain units.
//!
//! Of IIO devices as in the kernel's Documentation/ABI/testing/sysfs-bus-iio: `CHANNEL_input` is the
//! value, or else (`CHANNEL_raw` + `CHANNEL_offset`) × `CHANNEL_scale`, where offset and scale may be
//! shared by all channels of a type. Of hwmon devices as in Documentation/hwmon/sysfs-interface.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Longest text of a number. The kernel's have some 20 bytes.
const MAX_BYTES: u64 = 64;

/// Devices and channels that an error lists.
const MOST_LISTED: usize = 16;

pub(super) struct Sysfs {
    root: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Iio,
    Hwmon,
}

/// Where a value comes from.
#[derive(Debug)]
pub(super) struct Source {
    value: PathBuf,
    offset: Option<PathBuf>,
    scale: Option<PathBuf>,
    /// From the kernel's unit to ours.
    factor: f64,
}

impl Sysfs {
    pub(super) fn new(root: PathBuf) -> Sysfs {
        Sysfs { root }
    }

    /// Finds a channel of the device with this name. The error says what there is instead.
    pub(super) fn find(&self, device: &str, channel: &str) -> Result<Source, String> {
        let (mut found, mut others) = (Vec::new(), Vec::new());
        for (class, folder) in [
            (Class::Iio, self.root.join("bus/iio/devices")),
            (Class::Hwmon, self.root.join("class/hwmon")),
        ] {
            // Without drivers of this class there is no such folder.
            let Ok(entries) = fs::read_dir(&folder) else {
                continue;
            };
            for entry in entries.flatten() {
                let own = entry.file_name().to_string_lossy().into_owned();
                let path = entry.path();
                let name = read_text(&path.join("name")).unwrap_or_default();
                if own == device {
                    return source(class, &path, channel);
                }
                match name == device {
                    true => found.push((own, class, path)),
                    false => others.push(format!("{own} ({name})")),
                }
            }
        }
        match &found[..] {
            [(_, class, path)] => source(*class, path, channel),
            [] => Err(format!("there is no device {device:?}; {}", list(others))),
            several => {
                let names = several.iter().map(|(own, ..)| own.clone()).collect();
                Err(format!(
                    "several devices are called {device:?}; {}: name one",
                    list(names)
                ))
            }
        }
    }
}

fn list(mut names: Vec<String>) -> String {
    names.sort();
    names.truncate(MOST_LISTED);
    match &names[..] {
        [] => "there is none at all".to_owned(),
        names => format!("there are {}", names.join(", ")),
    }
}

fn source(class: Class, device: &Path, channel: &str) -> Result<Source, String> {
    match class {
        Class::Iio => iio(device, channel),
        Class::Hwmon => hwmon(device, channel),
    }
    .ok_or_else(|| {
        format!(
            "{} has no channel {channel:?}; {}",
            device.display(),
            list(channels(class, device))
        )
    })
}

/// The channels of a device, for an error.
fn channels(class: Class, device: &Path) -> Vec<String> {
    let entries = fs::read_dir(device).into_iter().flatten().flatten();
    let files = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut channels: Vec<_> = files
        .filter_map(|file| match class {
            Class::Hwmon => is_hwmon_value(&file).then_some(file),
            Class::Iio => ["_input", "_raw"]
                .iter()
                .find_map(|end| file.strip_suffix(end).map(str::to_owned)),
        })
        .collect();
    channels.sort();
    channels.dedup();
    channels
}

fn iio(device: &Path, channel: &str) -> Option<Source> {
    let (direction, rest) = channel.split_once('_')?;
    let kind: String = rest.chars().take_while(char::is_ascii_alphabetic).collect();
    let factor = match kind.as_str() {
        // The kernel's unit is a thousandth.
        "voltage" | "current" | "power" | "temp" | "humidityrelative" | "positionrelative" => 1e-3,
        // Kilopascal.
        "pressure" => 1e3,
        _ => 1.0,
    };
    let present = |name: String| Some(device.join(name)).filter(|path| path.exists());
    if let Some(value) = present(format!("{channel}_input")) {
        return Some(Source {
            value,
            offset: None,
            scale: None,
            factor,
        });
    }
    let value = present(format!("{channel}_raw"))?;
    // From the channel's own to what is shared by its type, its direction, all.
    let unnumbered: String = channel.chars().filter(|c| !c.is_ascii_digit()).collect();
    let shared = |what: &str| {
        [
            format!("{channel}_{what}"),
            format!("{unnumbered}_{what}"),
            format!("{direction}_{kind}_{what}"),
            format!("{direction}_{what}"),
            what.to_owned(),
        ]
        .into_iter()
        .find_map(present)
    };
    Some(Source {
        value,
        offset: shared("offset"),
        scale: shared("scale"),
        factor,
    })
}

fn hwmon(device: &Path, channel: &str) -> Option<Source> {
    let value = device.join(channel);
    if !is_hwmon_value(channel) || !value.exists() {
        return None;
    }
    let rest = channel.trim_start_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match &channel[..channel.len() - rest.len()] {
        // The kernel's unit is a thousandth.
        "in" | "temp" | "curr" | "humidity" => 1e-3,
        // A millionth.
        "power" | "energy" => 1e-6,
        _ => 1.0,
    };
    Some(Source {
        value,
        offset: None,
        scale: None,
        factor,
    })
}

/// The others are limits, names and switches.
fn is_hwmon_value(file: &str) -> bool {
    file.ends_with("_input") || file.ends_with("_average")
}

impl Source {
    /// May block for as long as the device's driver does.
    pub(super) fn read(&self) -> Result<f64, String> {
        let optional = |path: &Option<PathBuf>, default| match path {
            Some(path) => read_number(path),
            None => Ok(default),
        };
        let raw = read_number(&self.value)?;
        let offset = optional(&self.offset, 0.0)?;
        let scale = optional(&self.scale, 1.0)?;
        let value = (raw + offset) * scale * self.factor;
        match value.is_finite() {
            true => Ok(value),
            false => Err(format!("{}: {raw} is beyond measure", self.value.display())),
        }
    }
}

fn read_number(path: &Path) -> Result<f64, String> {
    let text = read_text(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let number = text.parse().ok().filter(|number: &f64| number.is_finite());
    number.ok_or_else(|| {
        let text: String = text.chars().take(MAX_BYTES as usize).collect();
        format!("{}: {text:?} is no number", path.display())
    })
}

fn read_text(path: &Path) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    /// A folder with these files.
    fn sysfs(files: &[(&str, &str)]) -> (TempDir, Sysfs) {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let sysfs = Sysfs::new(root.path().to_owned());
        (root, sysfs)
    }

    fn value(sysfs: &Sysfs, device: &str, channel: &str) -> Result<String, String> {
        let value = sysfs.find(device, channel)?.read()?;
        Ok(super::super::decimal(value))
    }

    const BME280: &str = "bus/iio/devices/iio:device0";
    const ADC: &str = "bus/iio/devices/iio:device1";
    const CPU: &str = "class/hwmon/hwmon0";

    fn machine() -> (TempDir, Sysfs) {
        let iio = |file: &str| format!("{BME280}/{file}");
        let adc = |file: &str| format!("{ADC}/{file}");
        let cpu = |file: &str| format!("{CPU}/{file}");
        let files = [
            (iio("name"), "bme280\n"),
            (iio("in_temp_input"), "21480\n"),
            (iio("in_pressure_input"), "101.325\n"),
            (iio("in_humidityrelative_input"), "45678\n"),
            (adc("name"), "ads1115\n"),
            (adc("in_voltage0_raw"), "1000\n"),
            (adc("in_voltage0_scale"), "0.125\n"),
            (adc("in_voltage1_raw"), "-1000\n"),
            (adc("in_voltage_scale"), "2\n"),
            (adc("in_voltage_offset"), "-24\n"),
            (adc("in_voltage0-voltage1_raw"), "10\n"),
            (adc("in_voltage-voltage_scale"), "0.5\n"),
            (adc("in_accel_x_raw"), "100\n"),
            (adc("in_accel_scale"), "0.01\n"),
            (adc("in_temp_raw"), "3\n"),
            (adc("scale"), "10\n"),
            (adc("in_count0_raw"), "full\n"),
            (cpu("name"), "cpu_thermal\n"),
            (cpu("temp1_input"), "48312\n"),
            (cpu("temp1_crit"), "110000\n"),
            (cpu("in0_input"), "5070\n"),
            (cpu("curr1_input"), "1500\n"),
            (cpu("power1_average"), "7500000\n"),
            (cpu("fan1_input"), "1200\n"),
            (cpu("humidity1_input"), "nan\n"),
        ];
        let files: Vec<_> = files.iter().map(|(path, text)| (&**path, *text)).collect();
        sysfs(&files)
    }

    #[test]
    fn values_are_in_plain_units() {
        let (_root, sysfs) = machine();
        for (device, channel, expected) in [
            ("bme280", "in_temp", "21.48"),
            ("iio:device0", "in_pressure", "101325"),
            ("bme280", "in_humidityrelative", "45.678"),
            // (1000 - 24) × 0.125 mV: the scale is its own, the offset its type's.
            ("ads1115", "in_voltage0", "0.122"),
            ("ads1115", "in_voltage1", "-2.048"),
            ("ads1115", "in_voltage0-voltage1", "-0.007"),
            ("ads1115", "in_accel_x", "1"),
            ("ads1115", "in_temp", "0.03"),
            ("cpu_thermal", "temp1_input", "48.312"),
            ("hwmon0", "in0_input", "5.07"),
            ("hwmon0", "curr1_input", "1.5"),
            ("hwmon0", "power1_average", "7.5"),
            ("hwmon0", "fan1_input", "1200"),
        ] {
            assert_eq!(
                value(&sysfs, device, channel).as_deref(),
                Ok(expected),
                "{channel}"
            );
        }
    }

    #[test]
    fn what_is_not_there_is_told_with_what_is() {
        let (root, sysfs) = machine();
        for (device, channel, expected) in [
            (
                "bme680",
                "in_temp",
                "there is no device \"bme680\"; there are hwmon0 (cpu_thermal), iio:device0 (bme280), \
                 iio:device1 (ads1115)",
            ),
            (
                "bme280",
                "in_temp_raw",
                "has no channel \"in_temp_raw\"; there are in_humidityrelative, in_pressure, in_temp",
            ),
            (
                "cpu_thermal",
                "temp1_crit",
                "has no channel \"temp1_crit\"; there are curr1_input, fan1_input, humidity1_input,",
            ),
            (
                "ads1115",
                "in_count0",
                "in_count0_raw: \"full\" is no number",
            ),
            ("hwmon0", "humidity1_input", "\"nan\" is no number"),
        ] {
            let error = value(&sysfs, device, channel).unwrap_err();
            assert!(
                error.contains(expected),
                "expected {expected:?}, got {error:?}"
            );
        }
        fs::write(root.path().join(CPU).join("name"), "bme280").unwrap();
        let error = value(&sysfs, "bme280", "in_temp").unwrap_err();
        assert_eq!(
            error,
            "several devices are called \"bme280\"; there are hwmon0, iio:device0: name one"
        );
        let (_root, nothing) = super::tests::sysfs(&[]);
        let error = value(&nothing, "a", "in_temp").unwrap_err();
        assert_eq!(error, "there is no device \"a\"; there is none at all");
    }

    #[test]
    fn a_file_of_any_length_is_read_no_further_than_a_number_goes() {
        let long = "1".repeat(100_000);
        let (_root, sysfs) = sysfs(&[("class/hwmon/hwmon0/temp1_input", &long)]);
        let text = value(&sysfs, "hwmon0", "temp1_input").unwrap();
        assert!(text.len() <= 64, "{text}");
    }
}
