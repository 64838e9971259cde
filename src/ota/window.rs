//! When a gateway may be restarted: days and times of day, in the gateway's time zone.

use std::fmt;
use std::str::FromStr;

use jiff::civil::{DateTime, Time, Weekday};

/// Some times of the week; always, if none is named.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Windows(Vec<Window>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Window {
    /// On which it begins; every day if none is named.
    days: Vec<Weekday>,
    from: Time,
    /// Up to here, without it. Of the next day if it is not after `from`.
    to: Time,
}

const DAYS: [(&str, Weekday); 7] = [
    ("Mon", Weekday::Monday),
    ("Tue", Weekday::Tuesday),
    ("Wed", Weekday::Wednesday),
    ("Thu", Weekday::Thursday),
    ("Fri", Weekday::Friday),
    ("Sat", Weekday::Saturday),
    ("Sun", Weekday::Sunday),
];

/// Not written as windows are.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no maintenance window; write it as in \"02:00-05:00\" or \"Sat,Sun 22:00-04:00\", with ; between several"
)]
pub struct BadWindow(String);

impl Windows {
    /// Whether `now`, on the gateway's own clock, is in one of them.
    pub fn contains(&self, now: DateTime) -> bool {
        self.0.is_empty() || self.0.iter().any(|window| window.contains(now))
    }

    pub fn is_always(&self) -> bool {
        self.0.is_empty()
    }
}

impl Window {
    fn contains(&self, now: DateTime) -> bool {
        let begins = |day: Weekday| self.days.is_empty() || self.days.contains(&day);
        let (today, time) = (now.weekday(), now.time());
        if self.from < self.to {
            return begins(today) && self.from <= time && time < self.to;
        }
        (begins(today) && self.from <= time) || (begins(today.previous()) && time < self.to)
    }
}

impl FromStr for Windows {
    type Err = BadWindow;

    fn from_str(text: &str) -> Result<Windows, BadWindow> {
        if text.trim().is_empty() {
            return Ok(Windows::default());
        }
        let read = |text: &str| window(text.trim()).ok_or_else(|| BadWindow(text.to_owned()));
        text.split(';')
            .map(read)
            .collect::<Result<_, _>>()
            .map(Windows)
    }
}

fn window(text: &str) -> Option<Window> {
    let (days, times) = text.rsplit_once(char::is_whitespace).unwrap_or(("", text));
    let (from, to) = times.split_once('-')?;
    let mut named = Vec::new();
    for days in days
        .split(',')
        .map(str::trim)
        .filter(|_| !days.trim().is_empty())
    {
        match days.split_once("..") {
            Some((first, last)) => {
                let (mut day, last) = (weekday(first)?, weekday(last)?);
                named.push(day);
                while day != last {
                    day = day.next();
                    named.push(day);
                }
            }
            None => named.push(weekday(days)?),
        }
    }
    Some(Window {
        days: named,
        from: time(from)?,
        to: time(to)?,
    })
}

fn weekday(text: &str) -> Option<Weekday> {
    DAYS.iter()
        .find(|(name, _)| name.eq_ignore_ascii_case(text))
        .map(|(_, day)| *day)
}

/// Hours and minutes; 24:00 is midnight, too.
fn time(text: &str) -> Option<Time> {
    let (hour, minute) = text.split_once(':')?;
    let number = |text: &str| {
        let is_written_so = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
        is_written_so.then(|| text.parse::<i8>().ok())?
    };
    match (number(hour)?, number(minute)?) {
        (24, 0) => Some(Time::midnight()),
        (hour, minute) => Time::new(hour, minute, 0, 0).ok(),
    }
}

impl fmt::Display for Windows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, window) in self.0.iter().enumerate() {
            if number > 0 {
                f.write_str("; ")?;
            }
            for (number, day) in window.days.iter().enumerate() {
                let name = DAYS.iter().find(|(_, known)| known == day);
                let comma = if number > 0 { "," } else { "" };
                write!(f, "{comma}{}", name.map_or("", |(name, _)| name))?;
            }
            if !window.days.is_empty() {
                f.write_str(" ")?;
            }
            let (from, to) = (window.from, window.to);
            write!(f, "{}-{}", from.strftime("%H:%M"), to.strftime("%H:%M"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_has_its_days_and_times() {
        // 2026-11-22 is a Sunday.
        for (windows, now, inside) in [
            ("", "2026-11-22T12:00", true),
            ("02:00-05:00", "2026-11-22T01:59:59", false),
            ("02:00-05:00", "2026-11-22T02:00", true),
            ("02:00-05:00", "2026-11-22T04:59:59", true),
            ("02:00-05:00", "2026-11-22T05:00", false),
            ("Sat 22:00-04:00", "2026-11-22T03:00", true),
            ("Sat 22:00-04:00", "2026-11-22T22:00", false),
            ("Sat,Sun 22:00-04:00", "2026-11-22T22:00", true),
            ("Mon..Fri 00:00-24:00", "2026-11-22T12:00", false),
            ("Mon..Fri 00:00-24:00", "2026-11-23T12:00", true),
            ("Fri..Mon 00:00-24:00", "2026-11-22T12:00", true),
            ("mon 01:00-02:00; sun 11:00-13:00", "2026-11-22T12:00", true),
            ("03:00-03:00", "2026-11-22T12:00", true),
        ] {
            let read: Windows = windows.parse().unwrap();
            assert_eq!(
                read.contains(now.parse().unwrap()),
                inside,
                "{windows} {now}"
            );
            assert_eq!(read.to_string().parse(), Ok(read), "{windows}");
        }
    }

    #[test]
    fn anything_else_is_refused_with_how_one_is_written() {
        for text in [
            "02:00",
            "2:00-5:00",
            "02:00-25:00",
            "02:60-03:00",
            "Someday 02:00-03:00",
            "Mon.. 02:00-03:00",
            "02:00-03:00;",
            "Mon",
            "Mon,,Tue 02:00-03:00",
            "+1:00-02:00",
        ] {
            let error = text.parse::<Windows>().unwrap_err().to_string();
            assert!(error.contains("Sat,Sun 22:00-04:00"), "{text}: {error}");
        }
    }
}
