//! The order of versions, as Nix has it: `builtins.compareVersions`.

use std::cmp::Ordering;

/// Which of two versions is the newer one. Parts are what is between dots and dashes, and runs of digits or of
/// other characters; `pre` comes before everything, also before nothing, and numbers come after words.
pub fn compare(one: &str, other: &str) -> Ordering {
    let (mut one, mut other) = (one, other);
    while !(one.is_empty() && other.is_empty()) {
        let order = compare_parts(next_part(&mut one), next_part(&mut other));
        if order != Ordering::Equal {
            return order;
        }
    }
    Ordering::Equal
}

/// Takes a part off the front of `rest`; nothing once there is none.
fn next_part<'v>(rest: &mut &'v str) -> &'v str {
    *rest = rest.trim_start_matches(['.', '-']);
    let Some(first) = rest.chars().next() else {
        return "";
    };
    let ends = |letter: char| {
        matches!(letter, '.' | '-') || letter.is_ascii_digit() != first.is_ascii_digit()
    };
    let (part, after) = rest.split_at(rest.find(ends).unwrap_or(rest.len()));
    *rest = after;
    part
}

fn compare_parts(one: &str, other: &str) -> Ordering {
    let is_number = |part: &str| part.starts_with(|first: char| first.is_ascii_digit());
    // Of any length: longer without its zeros is larger.
    let number = |part: &str| {
        let digits = part.trim_start_matches('0').to_owned();
        (digits.len(), digits)
    };
    match (is_number(one), is_number(other)) {
        (true, true) => number(one).cmp(&number(other)),
        _ if one == other => Ordering::Equal,
        (false, false) if one == "pre" || other == "pre" => (other == "pre").cmp(&(one == "pre")),
        (false, true) if one.is_empty() => Ordering::Less,
        (true, false) if other.is_empty() => Ordering::Greater,
        (one_is_number, other_is_number) if one_is_number != other_is_number => {
            one_is_number.cmp(&other_is_number)
        }
        _ => one.cmp(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each of them as `nix-instantiate --eval -E 'builtins.compareVersions A B'` has it.
    #[test]
    fn versions_are_ordered_as_nix_orders_them() {
        for (one, other, order) in [
            ("1.0", "2.3", -1),
            ("2.1", "2.3", -1),
            ("2.3", "2.3", 0),
            ("2.5", "2.3", 1),
            ("3.1", "2.3", 1),
            ("2.3.1", "2.3", 1),
            ("2.3.1", "2.3a", 1),
            ("2.3pre1", "2.3", -1),
            ("2.3pre3", "2.3pre12", -1),
            ("2.3a", "2.3c", -1),
            ("2.3pre1", "2.3c", -1),
            ("2.3pre1", "2.3q", -1),
            ("1.10.0", "1.9.9", 1),
            ("1.0.0", "1.0", 1),
            ("1.0.0-rc1", "1.0.0", 1),
            ("26.05.20260101", "26.05.20251231", 1),
            ("007", "7", 0),
            ("99999999999999999999999", "99999999999999999999998", 1),
            ("1-2", "1.2", 0),
            ("", "", 0),
            ("", "1", -1),
            ("1ü", "1u", 1),
        ] {
            let found = compare(one, other) as i32;
            assert_eq!(found, order, "{one} and {other}");
            assert_eq!(compare(other, one) as i32, -order, "{other} and {one}");
        }
    }
}
