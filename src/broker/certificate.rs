//! What a certificate says: whose it is, and until when.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use x509_cert::Certificate;
use x509_cert::der::{DateTime, Decode};
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

/// Whom a verified certificate of a client names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CertificateNames {
    /// The first CN of the subject. None also if it is empty or has control characters, which could
    /// pass for another name.
    pub common_name: Option<String>,
    /// DNS names, email addresses and URIs of the subject, in their order.
    pub alternative_names: Vec<String>,
}

impl CertificateNames {
    /// From a certificate in DER form. One that can't be read names nobody.
    pub(super) fn of(certificate: &[u8]) -> CertificateNames {
        let Ok(certificate) = Certificate::from_der(certificate) else {
            return CertificateNames::default();
        };
        let certificate = certificate.tbs_certificate();
        let plain = |name: &str| !name.is_empty() && !name.contains(char::is_control);
        // One that can't be read is none: whom it names would be unclear.
        let common_name = certificate.subject().common_name().ok().flatten();
        let alternative_names = match certificate.get_extension::<SubjectAltName>() {
            Ok(Some((_, SubjectAltName(names)))) => names,
            Ok(None) | Err(_) => Vec::new(),
        };
        CertificateNames {
            common_name: common_name
                .map(|name| name.value().into_owned())
                .filter(|name| plain(name)),
            alternative_names: alternative_names
                .iter()
                .filter_map(|name| match name {
                    GeneralName::DnsName(name)
                    | GeneralName::Rfc822Name(name)
                    | GeneralName::UniformResourceIdentifier(name) => Some(name.as_str()),
                    _ => None,
                })
                .filter(|name| plain(name))
                .map(str::to_owned)
                .collect(),
        }
    }
}

/// Renewing takes people, mostly, and people have holidays.
const SOON: Duration = Duration::from_secs(14 * 24 * 3600);

/// From when until when a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Validity {
    from: DateTime,
    until: DateTime,
}

/// Where in its validity a certificate is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Age {
    NotYetValid,
    Valid,
    ExpiresSoon,
    Expired,
}

impl Validity {
    /// Of a certificate in DER form.
    pub(super) fn of(certificate: &[u8]) -> Option<Validity> {
        let certificate = Certificate::from_der(certificate).ok()?;
        let validity = certificate.tbs_certificate().validity();
        Some(Validity {
            from: validity.not_before.to_date_time(),
            until: validity.not_after.to_date_time(),
        })
    }

    /// The last second, since 1970.
    pub(super) fn until(&self) -> Duration {
        self.until.unix_duration()
    }

    pub(super) fn age(&self, now: SystemTime) -> Age {
        let now = since_1970(now);
        let left = self.until().checked_sub(now);
        if now < self.from.unix_duration() {
            Age::NotYetValid
        } else {
            match left {
                None => Age::Expired,
                Some(left) if left < SOON => Age::ExpiresSoon,
                Some(_) => Age::Valid,
            }
        }
    }

    /// What to tell the operator, if anything.
    pub(super) fn warning(&self, now: SystemTime) -> Option<String> {
        let Validity { from, until } = self;
        match self.age(now) {
            Age::Valid => None,
            Age::NotYetValid => {
                let clock = match DateTime::from_unix_duration(since_1970(now)) {
                    Ok(clock) => clock.to_string(),
                    Err(_) => "another age".to_owned(),
                };
                Some(format!(
                    "the TLS certificate is valid from {from} on, and this machine's clock says \
                     {clock}: set the clock, or wait until it is set (certificates of clients can't \
                     be checked before), or take another certificate"
                ))
            }
            Age::ExpiresSoon => Some(format!(
                "the TLS certificate expires at {until}: renew it; a new file is taken without a \
                 restart"
            )),
            Age::Expired => Some(format!(
                "the TLS certificate has expired at {until}, and clients will refuse it: renew it; \
                 a new file is taken without a restart"
            )),
        }
    }
}

/// A clock that is set to an earlier time is as wrong as one at the beginning.
fn since_1970(time: SystemTime) -> Duration {
    time.duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, DnValue, KeyPair, SanType, date_time_ymd};

    use super::*;

    fn certificate(set: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.distinguished_name = Default::default();
        set(&mut params);
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().der().to_vec()
    }

    fn named(name: impl Into<DnValue>) -> Option<String> {
        let name = name.into();
        let certificate = certificate(|params| {
            params
                .distinguished_name
                .push(DnType::OrganizationName, "o");
            params.distinguished_name.push(DnType::CommonName, name);
        });
        CertificateNames::of(&certificate).common_name
    }

    #[test]
    fn the_names_of_a_certificate_are_its_common_name_and_its_alternatives() {
        let certificate = certificate(|params| {
            params
                .distinguished_name
                .push(DnType::CommonName, "press-7");
            params.subject_alt_names = vec![
                SanType::DnsName("press-7.plant".try_into().unwrap()),
                SanType::IpAddress([10, 0, 0, 7].into()),
                SanType::Rfc822Name("press@plant".try_into().unwrap()),
                SanType::URI("spiffe://plant/press/7".try_into().unwrap()),
            ];
        });
        assert_eq!(
            CertificateNames::of(&certificate),
            CertificateNames {
                common_name: Some("press-7".into()),
                alternative_names: vec![
                    "press-7.plant".into(),
                    "press@plant".into(),
                    "spiffe://plant/press/7".into(),
                ],
            }
        );
    }

    #[test]
    fn a_name_that_could_pass_for_another_is_none() {
        assert_eq!(named("pumpe-ä").as_deref(), Some("pumpe-ä"));
        assert_eq!(named("admin\0.example"), None);
        assert_eq!(named("admin\n"), None);
        assert_eq!(named(""), None);
    }

    #[test]
    fn a_certificate_that_cannot_be_read_names_nobody_and_harms_nobody() {
        let good = certificate(|params| {
            params.distinguished_name.push(DnType::CommonName, "x");
            params.subject_alt_names = vec![SanType::DnsName("y".try_into().unwrap())];
        });
        for length in 0..good.len() {
            let found = CertificateNames::of(&good[..length]);
            assert_eq!(found, CertificateNames::default());
            assert_eq!(Validity::of(&good[..length]), None);
        }
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0xff;
            // Whatever comes of it.
            CertificateNames::of(&bad);
            Validity::of(&bad);
        }
    }

    #[test]
    fn a_warning_comes_when_it_is_needed_and_says_what_to_do() {
        let certificate = certificate(|params| {
            params.not_before = date_time_ymd(2026, 1, 1);
            params.not_after = date_time_ymd(2026, 12, 31);
        });
        let validity = Validity::of(&certificate).unwrap();
        let start = UNIX_EPOCH + validity.from.unix_duration();
        let end = UNIX_EPOCH + validity.until();
        let day = Duration::from_secs(24 * 3600);
        for (now, age, words) in [
            (UNIX_EPOCH, Age::NotYetValid, "1970"),
            (start - day, Age::NotYetValid, "set the clock"),
            (start, Age::Valid, ""),
            (end - 14 * day, Age::Valid, ""),
            (end - 13 * day, Age::ExpiresSoon, "renew it"),
            (end, Age::ExpiresSoon, "expires at"),
            (end + day, Age::Expired, "has expired"),
        ] {
            assert_eq!(validity.age(now), age);
            let warning = validity.warning(now);
            assert_eq!(warning.is_none(), age == Age::Valid);
            assert!(warning.unwrap_or_default().contains(words), "{words}");
        }
    }
}
