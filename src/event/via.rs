//! The way of an event over gateways that hand it on to each other.
//!
//! Each puts its name at the end of a list, with commas between them, that goes with the event as a user property. So
//! a gateway knows what it has handed on itself, however many gateways and brokers are in between.

/// The user property with the list.
pub const VIA: &str = "headgate-via";

/// Over so many gateways goes no event that is wanted: their names are not unique, or some of them don't add theirs.
const MOST_GATEWAYS: usize = 16;

/// So long is no list of them.
const MOST_BYTES: usize = 4096;

/// Whether an event that came over these gateways is not to go to or from this one.
pub fn is_done(via: &str, gateway: &str) -> bool {
    let passed = || via.split(',');
    !via.is_empty()
        && (via.len() > MOST_BYTES
            || passed().count() >= MOST_GATEWAYS
            || passed().any(|name| name == gateway))
}

/// The list with this gateway at its end.
pub fn and_then(via: &str, gateway: &str) -> String {
    match via {
        "" => gateway.to_owned(),
        via => format!("{via},{gateway}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_been_at_a_gateway_is_done_there() {
        let way = and_then(&and_then("", "a"), "b");
        assert_eq!(way, "a,b");
        assert!(is_done(&way, "a") && is_done(&way, "b"));
        assert!(!is_done(&way, "c") && !is_done(&way, "a,b"));
        assert!(!is_done("", "") && !is_done("", "a"));
    }

    #[test]
    fn nothing_goes_on_for_ever() {
        let way = (0..15).fold(String::new(), |way, hop| and_then(&way, &hop.to_string()));
        assert!(!is_done(&way, "a"));
        assert!(is_done(&and_then(&way, "15"), "a"));
        assert!(is_done(&"x".repeat(5000), "a"));
    }
}
