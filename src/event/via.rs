//! The way of an event over gateways that hand it on to each other.
//!
//! Each puts its name at the end of a list, with commas between them, that goes with the event as a user property. So
//! a gateway knows what it has handed on itself, however many gateways and brokers are in between.

use bytestring::ByteString;

/// The user property with the list.
pub const VIA: &str = "headgate-via";

/// In a CONNECT: the client is a link of a gateway, and adds to lists.
pub const LINK: &str = "headgate-link";

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

/// The list with this gateway at its end. One that is too long already stays.
pub fn and_then(via: &str, gateway: &str) -> String {
    match via {
        "" => gateway.to_owned(),
        via if via.len() > MOST_BYTES => via.to_owned(),
        via => format!("{via},{gateway}"),
    }
}

/// Where gateways share apps, the list also has through how many of them the event came: before this number there is
/// this.
const HOPS: &str = "=hops.";

/// The list of an event that came over no gateway, but through so many apps.
pub fn of_hops(hops: u8) -> String {
    format!("{HOPS}{hops}")
}

/// Through how many apps the event came, as far as the list says so.
pub fn hops(via: &str) -> u8 {
    let hops = via.split(',').filter_map(|part| part.strip_prefix(HOPS));
    hops.filter_map(|hops| hops.parse().ok()).max().unwrap_or(0)
}

/// The list of gateways only.
pub fn without_hops(via: ByteString) -> ByteString {
    if !via.contains(HOPS) {
        return via;
    }
    let gateways: Vec<&str> = via
        .split(',')
        .filter(|part| !part.starts_with(HOPS))
        .collect();
    gateways.join(",").into()
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
    fn through_how_many_apps_it_came_is_told_from_gateways() {
        assert_eq!(hops(&of_hops(7)), 7);
        let way = and_then(&and_then(&of_hops(3), "a"), "=hops.x");
        assert_eq!(hops(&way), 3);
        assert!(is_done(&way, "a"));
        assert_eq!(without_hops(way.into()), "a");
        assert_eq!(without_hops(of_hops(3).into()), "");
        assert_eq!(without_hops("a,b".into()), "a,b");
        assert_eq!((hops("a,b"), hops(""), hops("=hops.300")), (0, 0, 0));
    }

    #[test]
    fn nothing_goes_on_for_ever() {
        let way = (0..15).fold(String::new(), |way, hop| and_then(&way, &hop.to_string()));
        assert!(!is_done(&way, "a"));
        assert!(is_done(&and_then(&way, "15"), "a"));
        let long = "x".repeat(5000);
        assert!(is_done(&long, "a"));
        assert_eq!(and_then(&long, "a"), long);
    }
}
