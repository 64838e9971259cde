//! Points in time as they are typed.

use toml::value::{Datetime, Offset};
use x509_cert::der::DateTime;

const NS_PER_S: u64 = 1_000_000_000;

/// A time as RFC 3339 has it, or how long before `now_ns` it was, such as `24h`. In nanoseconds since 1970.
pub(super) fn parse(text: &str, now_ns: u64) -> Result<u64, String> {
    let ago = duration_ns(text).map(|ago| now_ns.saturating_sub(ago));
    ago.or_else(|| rfc_3339(text)).ok_or_else(|| {
        "neither a time such as 2026-11-21T12:00:00Z nor a duration such as 90s, 30m, 24h or 7d"
            .to_owned()
    })
}

fn duration_ns(text: &str) -> Option<u64> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => return None,
    };
    let number: u64 = number.parse().ok()?;
    Some(number.saturating_mul(seconds).saturating_mul(NS_PER_S))
}

fn rfc_3339(text: &str) -> Option<u64> {
    let parsed: Datetime = text.parse().ok()?;
    let (date, time) = (parsed.date?, parsed.time?);
    let east_of_utc_min = match parsed.offset? {
        Offset::Z => 0,
        Offset::Custom { minutes } => i64::from(minutes),
    };
    let local = DateTime::new(
        date.year,
        date.month,
        date.day,
        time.hour,
        time.minute,
        time.second.unwrap_or(0),
    );
    let local_s = local.ok()?.unix_duration().as_secs();
    let utc_s = local_s.checked_add_signed(-60 * east_of_utc_min)?;
    let ns = u64::from(time.nanosecond.unwrap_or(0));
    Some(utc_s.saturating_mul(NS_PER_S).saturating_add(ns))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_763_725_320 * NS_PER_S;

    #[test]
    fn a_duration_counts_back_from_now() {
        for (text, seconds) in [("90s", 90), ("30m", 1800), ("24h", 86_400), ("7d", 604_800)] {
            assert_eq!(parse(text, NOW), Ok(NOW - seconds * NS_PER_S), "{text}");
        }
        assert_eq!(parse("99999999999999999d", NOW), Ok(0));
    }

    #[test]
    fn a_time_can_be_in_any_zone() {
        for text in [
            "2025-11-21T11:42:00Z",
            "2025-11-21T12:42:00+01:00",
            "2025-11-21 06:12:00-05:30",
        ] {
            assert_eq!(parse(text, 0), Ok(NOW), "{text}");
        }
        assert_eq!(parse("2025-11-21T11:42:00.25Z", 0), Ok(NOW + NS_PER_S / 4));
        // Beyond what counts.
        assert_eq!(parse("2999-01-01T00:00:00Z", 0), Ok(u64::MAX));
    }

    #[test]
    fn anything_else_is_refused_with_what_it_could_be() {
        for text in [
            "",
            "h",
            "5",
            "5 h",
            "-5h",
            "5ü",
            "2025-11-21",
            "2025-11-21T11:42:00",
            "11:42:00Z",
            "2025-02-30T11:42:00Z",
            "0001-01-01T00:00:00Z",
        ] {
            let error = parse(text, NOW).unwrap_err();
            assert!(error.contains("24h"), "{text}: {error}");
        }
    }
}
