//! The password file: a line `user:hash` or `user:hash:group,group` for each user.
//!
//! Hashes are Argon2id in PHC form (<https://github.com/P-H-C/phc-string-format>). Their parameters
//! stand in them, so that those of new ones can change.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use argon2::password_hash::{PasswordHash, PasswordHasher, PasswordVerifier, SaltString};
use argon2::{ARGON2ID_IDENT, Algorithm, Argon2, Params, Version};
use ring::rand::{SecureRandom, SystemRandom};

use super::file::{self, Flaw};

/// Longest name of a user or a group, in bytes.
pub const MAX_NAME_BYTES: usize = 256;

/// Of the settings that OWASP holds to be equally strong, one that takes little memory: what a board
/// has to spare is needed for other things. 7 MiB, five passes, one lane.
const MEMORY_KIB: u32 = 7 * 1024;
const PASSES: u32 = 5;
const LANES: u32 = 1;

/// More than this a hash that was made elsewhere may not ask for, since each login costs it.
const MAX_MEMORY_KIB: u32 = 64 * 1024;
const MAX_PASSES: u32 = 16;
const MAX_LANES: u32 = 8;

/// What the password of an unknown user is compared with, so that it takes as long as with a known
/// one. Made with the parameters above of salt and hash that are all zeros.
const NOBODY: &str = "$argon2id$v=19$m=7168,t=5,p=1$AAAAAAAAAAAAAAAAAAAAAA\
                      $AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

/// The users of a password file.
#[derive(Debug, Default)]
pub struct Passwords {
    users: HashMap<String, User>,
}

/// A line of the file.
#[derive(Debug, PartialEq, Eq)]
pub struct User {
    /// In PHC form.
    pub(super) hash: Arc<str>,
    pub groups: Vec<String>,
}

/// Why a text can't name a user or a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("it is empty")]
    Empty,
    #[error("it has more than {MAX_NAME_BYTES} bytes")]
    TooLong,
    #[error("it contains a control character")]
    Control,
    #[error("it contains a colon, which ends a name in the password file")]
    Colon,
    #[error("it begins with #, as comments do, or with @, as the names of access rules do")]
    Reserved,
    #[error("it begins or ends with a space")]
    Space,
    #[error("it contains a comma, which stands between groups")]
    Comma,
}

/// Why a password can't be hashed.
#[derive(Debug, thiserror::Error)]
pub enum HashError {
    #[error("the system gives no random numbers")]
    Random,
    #[error("hashing failed: {0}")]
    Argon2(argon2::password_hash::Error),
}

/// Whether `name` can be a user's.
pub fn check_user_name(name: &str) -> Result<(), NameError> {
    if name.is_empty() {
        Err(NameError::Empty)
    } else if name.len() > MAX_NAME_BYTES {
        Err(NameError::TooLong)
    } else if name.contains(char::is_control) {
        Err(NameError::Control)
    } else if name.contains(':') {
        Err(NameError::Colon)
    } else if name.starts_with(['#', '@']) {
        Err(NameError::Reserved)
    } else if name.trim() != name {
        Err(NameError::Space)
    } else {
        Ok(())
    }
}

/// Whether `name` can be a group's.
pub fn check_group_name(name: &str) -> Result<(), NameError> {
    check_user_name(name)?;
    match name.contains(',') {
        true => Err(NameError::Comma),
        false => Ok(()),
    }
}

/// Hashes `password` with a salt of its own. Takes as long as a login does.
pub fn hash(password: &[u8]) -> Result<String, HashError> {
    let mut salt = [0; 16];
    SystemRandom::new()
        .fill(&mut salt)
        .map_err(|_| HashError::Random)?;
    let salt = SaltString::encode_b64(&salt).map_err(HashError::Argon2)?;
    let params = Params::new(MEMORY_KIB, PASSES, LANES, None).expect("they are within the limits");
    let hash = Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
        .hash_password(password, &salt)
        .map_err(HashError::Argon2)?;
    Ok(hash.to_string())
}

/// Whether `password` is the one of `hash`; always false where that is none, after as long a time.
pub(super) fn verify(hash: Option<&str>, password: &[u8]) -> bool {
    let parsed = PasswordHash::new(hash.unwrap_or(NOBODY));
    let right = parsed.is_ok_and(|parsed| {
        // It takes the parameters from the hash.
        Argon2::default().verify_password(password, &parsed).is_ok()
    });
    right && hash.is_some()
}

impl Passwords {
    pub(super) fn get(&self, user: &str) -> Option<&User> {
        self.users.get(user)
    }

    /// In no order.
    pub fn users(&self) -> impl Iterator<Item = (&str, &User)> {
        self.users.iter().map(|(name, user)| (name.as_str(), user))
    }

    pub(super) fn parse(contents: &[u8]) -> Result<Passwords, Flaw> {
        let text = std::str::from_utf8(contents).map_err(|error| Flaw {
            line: Some(file::line_of(contents, error.valid_up_to())),
            reason: "not UTF-8".into(),
        })?;
        let mut users = HashMap::new();
        for (index, line) in text.lines().enumerate() {
            let flaw = |reason| Flaw {
                line: Some(index + 1),
                reason,
            };
            let Some((name, user)) = parse_line(line).map_err(flaw)? else {
                continue;
            };
            match users.entry(name.to_owned()) {
                Entry::Vacant(place) => {
                    place.insert(user);
                }
                Entry::Occupied(_) => {
                    return Err(flaw(format!(
                        "user {name:?} stands further up already; remove one of the lines"
                    )));
                }
            }
        }
        Ok(Passwords { users })
    }
}

/// None for a comment or an empty line.
fn parse_line(line: &str) -> Result<Option<(&str, User)>, String> {
    let line = line.trim();
    if line.is_empty() || line.starts_with('#') {
        return Ok(None);
    }
    let Some((name, rest)) = line.split_once(':') else {
        return Err("a line is USER:HASH or USER:HASH:GROUP,GROUP; there is no colon".into());
    };
    check_user_name(name).map_err(|error| format!("the user's name {name:?}: {error}"))?;
    let (hash, groups) = rest.split_once(':').unwrap_or((rest, ""));
    check_hash(hash).map_err(|reason| {
        format!(
            "the password of user {name:?}: {reason}; set it with `headgate user add`, which makes \
             hashes that begin with $argon2id$"
        )
    })?;
    let groups = groups.split(',').filter(|group| !group.is_empty());
    let groups = groups.map(|group| match check_group_name(group) {
        Ok(()) => Ok(group.to_owned()),
        Err(error) => Err(format!("the group {group:?} of user {name:?}: {error}")),
    });
    let user = User {
        hash: hash.into(),
        groups: groups.collect::<Result<_, _>>()?,
    };
    Ok(Some((name, user)))
}

fn check_hash(hash: &str) -> Result<(), String> {
    if !hash.starts_with('$') {
        return Err("it is not hashed".into());
    }
    if hash.starts_with("$6$") || hash.starts_with("$7$") {
        return Err("a hash of mosquitto_passwd can't be used here".into());
    }
    let parsed = PasswordHash::new(hash).map_err(|error| format!("not a hash ({error})"))?;
    if parsed.algorithm != ARGON2ID_IDENT {
        return Err(format!("it is hashed with {}", parsed.algorithm));
    }
    if parsed.salt.is_none() || parsed.hash.is_none() {
        return Err("the hash is cut short".into());
    }
    let params = Params::try_from(&parsed).map_err(|error| format!("not a hash ({error})"))?;
    let too_costly = params.m_cost() > MAX_MEMORY_KIB
        || params.t_cost() > MAX_PASSES
        || params.p_cost() > MAX_LANES;
    match too_costly {
        true => Err(format!(
            "a login would take too much: at most m={MAX_MEMORY_KIB}, t={MAX_PASSES} and \
             p={MAX_LANES} are allowed"
        )),
        false => Ok(()),
    }
}

/// `file` with the line of `user`, in the place of the one that is there, else at the end. Everything
/// else stays as it is.
pub fn with_user(file: &str, user: &str, hash: &str, groups: &[String]) -> String {
    let mut line = format!("{user}:{hash}");
    if !groups.is_empty() {
        line = format!("{line}:{}", groups.join(","));
    }
    let mut lines: Vec<&str> = file.lines().collect();
    match lines.iter().position(|line| is_line_of(line, user)) {
        Some(index) => lines[index] = &line,
        None => lines.push(&line),
    }
    lines.join("\n") + "\n"
}

/// `file` without the line of `user`; none if there is no such line.
pub fn without_user(file: &str, user: &str) -> Option<String> {
    let kept: Vec<&str> = file
        .lines()
        .filter(|line| !is_line_of(line, user))
        .collect();
    if kept.len() == file.lines().count() {
        return None;
    }
    let mut text = kept.join("\n");
    if !text.is_empty() {
        text.push('\n');
    }
    Some(text)
}

fn is_line_of(line: &str, user: &str) -> bool {
    let line = line.trim();
    !line.starts_with('#') && line.split_once(':').is_some_and(|(name, _)| name == user)
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;

    /// A hash that costs nothing, of "secret".
    pub(crate) fn cheap_hash(password: &str) -> String {
        let params = Params::new(8, 1, 1, None).unwrap();
        let salt = SaltString::encode_b64(b"0123456789abcdef").unwrap();
        Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
            .hash_password(password.as_bytes(), &salt)
            .unwrap()
            .to_string()
    }

    fn flaw(text: &str) -> (Option<usize>, String) {
        let flaw = Passwords::parse(text.as_bytes()).unwrap_err();
        (flaw.line, flaw.reason)
    }

    #[test]
    fn a_hash_fits_its_password_and_no_other() {
        let made = hash("größer".as_bytes()).unwrap();
        assert!(made.starts_with("$argon2id$v=19$m=7168,t=5,p=1$"), "{made}");
        assert!(verify(Some(&made), "größer".as_bytes()));
        assert!(!verify(Some(&made), b"groesser"));
        assert!(!verify(Some(&made), b""));
        assert_ne!(
            made,
            hash("größer".as_bytes()).unwrap(),
            "each has its own salt"
        );
        assert!(!verify(None, b""));
    }

    #[test]
    fn an_unknown_user_takes_as_long_as_a_wrong_password() {
        PasswordHash::new(NOBODY).unwrap();
        let made = hash(b"x").unwrap();
        assert_eq!(
            Params::try_from(&PasswordHash::new(NOBODY).unwrap())
                .unwrap()
                .m_cost(),
            Params::try_from(&PasswordHash::new(&made).unwrap())
                .unwrap()
                .m_cost(),
        );
        let took = |hash: Option<&str>| {
            let times = (0..5).map(|_| {
                let start = Instant::now();
                verify(hash, b"wrong");
                start.elapsed()
            });
            times.min().unwrap()
        };
        let (known, unknown) = (took(Some(&made)), took(None));
        assert!(
            unknown * 2 > known && known * 2 > unknown,
            "{known:?} {unknown:?}"
        );
    }

    #[test]
    fn users_groups_and_comments_are_read() {
        let hash = cheap_hash("secret");
        let text = format!("# staff\n\nanna:{hash}\r\n  otto:{hash}:night,operators\n# end");
        let passwords = Passwords::parse(text.as_bytes()).unwrap();
        assert_eq!(passwords.users().count(), 2);
        assert_eq!(
            passwords.get("otto").unwrap().groups,
            ["night", "operators"]
        );
        assert!(verify(
            Some(&passwords.get("anna").unwrap().hash),
            b"secret"
        ));
        assert!(passwords.get("# staff").is_none());
    }

    #[test]
    fn a_wrong_line_is_named() {
        let hash = cheap_hash("secret");
        for (text, line, part) in [
            (format!("# a\nanna {hash}"), 2, "no colon"),
            ("anna:secret".to_owned(), 1, "not hashed"),
            ("anna:$7$101$abc$def".to_owned(), 1, "mosquitto_passwd"),
            (
                "anna:$argon2i$v=19$m=8,t=1,p=1$MDEyMzQ1Njc$MDEyMzQ1Njc4OTAx".to_owned(),
                1,
                "argon2i",
            ),
            ("anna:$argon2id$v=19$m=8,t=1,p=1".to_owned(), 1, "cut short"),
            (
                "anna:$argon2id$v=19$m=4000000,t=1,p=1$MDEyMzQ1Njc$MDEyMzQ1Njc4OTAx".to_owned(),
                1,
                "too much",
            ),
            (
                format!("anna:{hash}\notto:{hash}\nanna:{hash}"),
                3,
                "further up",
            ),
            (format!(":{hash}"), 1, "empty"),
            (format!("@anna:{hash}"), 1, "begins with"),
            (format!("anna:{hash}:a,@b"), 1, "the group \"@b\""),
        ] {
            let (at, reason) = flaw(&text);
            assert_eq!(at, Some(line), "{text}: {reason}");
            assert!(reason.contains(part), "{text}: {reason}");
        }
        let flaw = Passwords::parse(b"# ok\n# \xff").unwrap_err();
        assert_eq!(flaw.line, Some(2));
    }

    #[test]
    fn editing_keeps_everything_else() {
        let file = "# staff\nanna:$old:night\n\n# anna:x\notto:$o";
        assert_eq!(
            with_user(file, "anna", "$new", &[]),
            "# staff\nanna:$new\n\n# anna:x\notto:$o\n"
        );
        assert_eq!(
            with_user(file, "uwe", "$u", &["a".into(), "b".into()]),
            "# staff\nanna:$old:night\n\n# anna:x\notto:$o\nuwe:$u:a,b\n"
        );
        assert_eq!(
            without_user(file, "anna").unwrap(),
            "# staff\n\n# anna:x\notto:$o\n"
        );
        assert_eq!(without_user(file, "uwe"), None);
        assert_eq!(without_user("a:$b", "a").unwrap(), "");
    }

    #[test]
    fn odd_names_are_refused() {
        for (name, error) in [
            ("", NameError::Empty),
            ("a:b", NameError::Colon),
            ("a\nb", NameError::Control),
            ("#a", NameError::Reserved),
            ("@anonymous", NameError::Reserved),
            (" a", NameError::Space),
        ] {
            assert_eq!(check_user_name(name), Err(error), "{name:?}");
        }
        assert_eq!(check_user_name(&"x".repeat(257)), Err(NameError::TooLong));
        assert_eq!(check_user_name("Überwachung 1/a,b"), Ok(()));
        assert_eq!(check_group_name("a,b"), Err(NameError::Comma));
    }

    proptest! {
        #[test]
        fn no_contents_panic(contents in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Passwords::parse(&contents);
        }

        #[test]
        fn no_line_panics(line in "[ab:$,=#]{0,6}(\\$argon2id)?(\\$v=[0-9]{1,2})?(\\$m=[0-9]{1,5},t=[0-9],p=[0-9])?(\\$[A-Za-z0-9+/]{0,30}){0,2}") {
            if let Ok(passwords) = Passwords::parse(line.as_bytes()) {
                prop_assert!(passwords.users().count() <= 1);
            }
        }

        #[test]
        fn what_was_added_is_read_back(names in proptest::collection::vec("[a-zäöü /+#%@.]{1,6}", 1..6)) {
            let hash = cheap_hash("x");
            let mut file = String::from("# top\n");
            let names: std::collections::BTreeSet<_> =
                names.into_iter().filter(|name| check_user_name(name).is_ok()).collect();
            for name in &names {
                file = with_user(&file, name, &hash, &["g".into()]);
            }
            let passwords = Passwords::parse(file.as_bytes()).unwrap();
            prop_assert_eq!(passwords.users().count(), names.len());
            for name in &names {
                prop_assert!(passwords.get(name).is_some());
                file = without_user(&file, name).unwrap();
            }
            prop_assert_eq!(file, "# top\n");
        }
    }
}
