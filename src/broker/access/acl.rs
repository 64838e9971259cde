//! The rules: who may publish and subscribe to what.
//!
//! A file has any number of `[[rule]]` tables; `docs/access.md` describes them. What a rule denies is
//! denied, whatever allows it; what no rule allows is denied.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::Deserialize;
use toml::Spanned;

use super::file::Flaw;
use super::filters::{covers, intersection};
use crate::event::TopicFilter;

/// In `users`: whoever has no user name.
const ANONYMOUS: &str = "@anonymous";

/// In `users`: whoever has one.
const AUTHENTICATED: &str = "@authenticated";

/// All rules, as read from a file.
#[derive(Debug)]
pub(super) struct Acl {
    rules: Vec<Rule>,
    /// Members of groups, in addition to what the password file and tokens say.
    groups: BTreeMap<String, Vec<String>>,
}

#[derive(Debug)]
struct Rule {
    /// None: everybody. The same for the next two; a rule applies if all three do.
    users: Option<Vec<User>>,
    clients: Option<Vec<String>>,
    groups: Option<Vec<String>>,
    allow: Vec<Action>,
    deny: Vec<Action>,
    topics: Vec<Pattern>,
}

#[derive(Debug)]
enum User {
    Anonymous,
    Authenticated,
    Named(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Action {
    Publish,
    Subscribe,
}

/// Whom the rules are applied to.
pub(super) struct Subject<'a> {
    /// None: anonymous.
    pub user: Option<&'a str>,
    pub client_id: &'a str,
    /// From the password file or the token.
    pub groups: &'a [String],
}

/// What the rules come to for one client.
#[derive(Debug, Default)]
pub(super) struct ClientRules {
    publish: Decision,
    subscribe: Decision,
}

#[derive(Debug, Default)]
struct Decision {
    allow: Vec<TopicFilter>,
    deny: Vec<TopicFilter>,
}

impl Decision {
    fn allows(&self, topic: &str) -> bool {
        let matches = |filter: &TopicFilter| filter.matches(topic);
        !self.deny.iter().any(matches) && self.allow.iter().any(matches)
    }
}

impl ClientRules {
    pub(super) fn may_publish(&self, topic: &str) -> bool {
        self.publish.allows(topic)
    }

    pub(super) fn may_receive(&self, topic: &str) -> bool {
        self.subscribe.allows(topic)
    }

    pub(super) fn may_subscribe(&self, filter: &TopicFilter) -> bool {
        if !filter.as_str().contains(['+', '#']) {
            return self.may_receive(filter.as_str());
        }
        let Decision { allow, deny } = &self.subscribe;
        let mut common = allow.iter().filter_map(|rule| intersection(filter, rule));
        common.any(|common| !deny.iter().any(|denied| covers(denied, &common)))
    }
}

impl Acl {
    pub(super) fn parse(contents: &[u8]) -> Result<Acl, Flaw> {
        let at = |span: Range<usize>, reason: String| Flaw {
            line: Some(super::file::line_of(contents, span.start)),
            reason,
        };
        let file: AclFile = crate::regular_file::parse_toml(contents)?;
        let mut rules = Vec::with_capacity(file.rule.len());
        for entry in file.rule {
            let span = entry.span();
            let rule = Rule::new(entry.into_inner(), span);
            rules.push(rule.map_err(|(span, reason)| at(span, reason))?);
        }
        if rules.is_empty() {
            return Err(Flaw {
                line: None,
                reason:
                    "it has no [[rule]], so nobody could do anything; to allow everything, unset \
                         mqtt.auth.acl_file"
                        .into(),
            });
        }
        Ok(Acl {
            rules,
            groups: file.groups,
        })
    }

    pub(super) fn for_client(&self, subject: &Subject<'_>) -> ClientRules {
        let mut client = ClientRules::default();
        for rule in self.rules.iter().filter(|rule| self.applies(rule, subject)) {
            for pattern in &rule.topics {
                let filled = pattern.fill(subject);
                for action in &rule.allow {
                    if let Filled::Filter(filter) = &filled {
                        client.of(*action).allow.push(filter.clone());
                    }
                }
                for action in &rule.deny {
                    match &filled {
                        Filled::Filter(filter) => client.of(*action).deny.push(filter.clone()),
                        // Whoever chooses an odd client id must not get around a rule by it.
                        Filled::Unusable => {
                            client.of(*action).deny.push(pattern.wide.clone());
                        }
                        Filled::Nobody => {}
                    }
                }
            }
        }
        client
    }

    fn applies(&self, rule: &Rule, subject: &Subject<'_>) -> bool {
        let Rule {
            users,
            clients,
            groups,
            ..
        } = rule;
        let is_user = |wanted: &User| match wanted {
            User::Anonymous => subject.user.is_none(),
            User::Authenticated => subject.user.is_some(),
            User::Named(name) => subject.user == Some(name),
        };
        let is_member = |group: &String| {
            let here = self.groups.get(group);
            let here = here.zip(subject.user);
            subject.groups.contains(group)
                || here.is_some_and(|(members, user)| members.iter().any(|name| name == user))
        };
        users.as_ref().is_none_or(|users| users.iter().any(is_user))
            && clients
                .as_ref()
                .is_none_or(|clients| clients.iter().any(|id| id == subject.client_id))
            && groups
                .as_ref()
                .is_none_or(|groups| groups.iter().any(is_member))
    }
}

impl ClientRules {
    fn of(&mut self, action: Action) -> &mut Decision {
        match action {
            Action::Publish => &mut self.publish,
            Action::Subscribe => &mut self.subscribe,
        }
    }
}

/// The file as it stands there.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AclFile {
    #[serde(default)]
    groups: BTreeMap<String, Vec<String>>,
    #[serde(default)]
    rule: Vec<Spanned<RuleEntry>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleEntry {
    users: Option<Vec<Spanned<String>>>,
    clients: Option<Vec<Spanned<String>>>,
    groups: Option<Vec<Spanned<String>>>,
    #[serde(default)]
    allow: Vec<Action>,
    #[serde(default)]
    deny: Vec<Action>,
    topics: Vec<Spanned<String>>,
}

/// A flaw and where it is.
type At = (Range<usize>, String);

impl Rule {
    fn new(entry: RuleEntry, span: Range<usize>) -> Result<Rule, At> {
        if entry.allow.is_empty() && entry.deny.is_empty() {
            let reason = "the rule neither allows nor denies anything; add allow = [\"publish\", \
                          \"subscribe\"], or deny = …";
            return Err((span, reason.into()));
        }
        if entry.allow.iter().any(|action| entry.deny.contains(action)) {
            let reason = "the rule allows and denies the same; what is denied stays denied, so leave \
                          one out";
            return Err((span, reason.into()));
        }
        if entry.topics.is_empty() {
            let reason = "topics is empty, so the rule is about nothing; [\"#\"] stands for all \
                          topics but $SYS";
            return Err((span, reason.into()));
        }
        let names = |key: &str, list: Option<Vec<Spanned<String>>>| match list {
            Some(list) if list.is_empty() => Err((
                span.clone(),
                format!(
                    "{key} is empty, so the rule is about nobody; leave {key} out for everybody"
                ),
            )),
            list => Ok(list),
        };
        let plain =
            |list: Vec<Spanned<String>>| list.into_iter().map(Spanned::into_inner).collect();
        let users = names("users", entry.users)?;
        let users = users.map(|users| users.into_iter().map(User::new).collect());
        Ok(Rule {
            users: users.transpose()?,
            clients: names("clients", entry.clients)?.map(plain),
            groups: names("groups", entry.groups)?.map(plain),
            allow: entry.allow,
            deny: entry.deny,
            topics: entry
                .topics
                .into_iter()
                .map(|topic| {
                    let span = topic.span();
                    Pattern::new(topic.as_ref()).map_err(|reason| (span, reason))
                })
                .collect::<Result<_, _>>()?,
        })
    }
}

impl User {
    fn new(name: Spanned<String>) -> Result<User, At> {
        match name.as_ref().as_str() {
            ANONYMOUS => Ok(User::Anonymous),
            AUTHENTICATED => Ok(User::Authenticated),
            other if other.starts_with('@') => Err((
                name.span(),
                format!("{other:?} is no user; {ANONYMOUS:?} and {AUTHENTICATED:?} are known"),
            )),
            _ => Ok(User::Named(name.into_inner())),
        }
    }
}

/// A topic filter with places for the user and the client id.
#[derive(Debug)]
struct Pattern {
    pieces: Vec<Piece>,
    /// Matches at least what the pattern could stand for, whoever it is filled in for.
    wide: TopicFilter,
}

#[derive(Debug)]
enum Piece {
    Text(String),
    User,
    Client,
}

enum Filled {
    Filter(TopicFilter),
    /// A name would widen the filter, or make it another one.
    Unusable,
    /// The pattern is about users, and this client has no user.
    Nobody,
}

impl Pattern {
    fn new(text: &str) -> Result<Pattern, String> {
        if text.starts_with("$share/") {
            return Err(format!(
                "rules are about topics, also for shared subscriptions: leave $share/GROUP/ out of \
                 {text:?}"
            ));
        }
        let mut pieces = vec![];
        let mut run = String::new();
        let mut letters = text.chars();
        while let Some(letter) = letters.next() {
            if letter != '%' {
                run.push(letter);
                continue;
            }
            let piece = match letters.next() {
                Some('%') => {
                    run.push('%');
                    continue;
                }
                Some('u') => Piece::User,
                Some('c') => Piece::Client,
                _ => {
                    return Err(format!(
                        "% in {text:?} must be %u (the user), %c (the client id) or %% (a percent \
                         sign)"
                    ));
                }
            };
            pieces.push(Piece::Text(std::mem::take(&mut run)));
            pieces.push(piece);
        }
        pieces.push(Piece::Text(run));
        // Any name stands for all when it comes to whether the rest is a filter.
        let sample = Subject {
            user: Some("x"),
            client_id: "x",
            groups: &[],
        };
        let sample = fill_in(&pieces, &sample).unwrap_or_default();
        TopicFilter::new(sample).map_err(|error| format!("{text:?}: {error}"))?;
        let wide = wide(&pieces);
        let wide = TopicFilter::new(wide).map_err(|error| format!("{text:?}: {error}"))?;
        Ok(Pattern { pieces, wide })
    }

    fn fill(&self, subject: &Subject<'_>) -> Filled {
        let about_users = self.pieces.iter().any(|piece| matches!(piece, Piece::User));
        if about_users && subject.user.is_none() {
            return Filled::Nobody;
        }
        // A name that begins with `$` must not lead to system topics.
        let from_system = |text: &str| {
            let own = matches!(&self.pieces[0], Piece::Text(first) if first.starts_with('$'));
            text.starts_with('$') && !own
        };
        match fill_in(&self.pieces, subject) {
            Some(text) if !from_system(&text) => {
                TopicFilter::new(text).map_or(Filled::Unusable, Filled::Filter)
            }
            _ => Filled::Unusable,
        }
    }
}

/// None where a name does not fit into a level.
fn fill_in(pieces: &[Piece], subject: &Subject<'_>) -> Option<String> {
    let mut text = String::new();
    for piece in pieces {
        let name = match piece {
            Piece::Text(run) => {
                text.push_str(run);
                continue;
            }
            Piece::User => subject.user?,
            Piece::Client => subject.client_id,
        };
        if name.is_empty() || name.contains(['/', '+', '#', '\0']) {
            return None;
        }
        text.push_str(name);
    }
    Some(text)
}

/// The whole levels before the first name, and all that is below them.
fn wide(pieces: &[Piece]) -> String {
    let Some(Piece::Text(before)) = pieces.first() else {
        return "#".into();
    };
    if pieces.len() == 1 {
        return before.clone();
    }
    match before.rsplit_once('/') {
        Some((levels, _)) => format!("{levels}/#"),
        None => "#".into(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn acl(text: &str) -> Acl {
        Acl::parse(text.as_bytes()).unwrap()
    }

    fn flaw(text: &str) -> (Option<usize>, String) {
        let flaw = Acl::parse(text.as_bytes()).unwrap_err();
        (flaw.line, flaw.reason)
    }

    fn rules(acl: &Acl, user: Option<&str>, client_id: &str) -> ClientRules {
        acl.for_client(&Subject {
            user,
            client_id,
            groups: &[],
        })
    }

    fn filter(text: &str) -> TopicFilter {
        TopicFilter::new(text.to_owned()).unwrap()
    }

    const PLANT: &str = r##"
        [groups]
        operators = ["olga"]

        [[rule]]
        users = ["@authenticated"]
        allow = ["publish"]
        topics = ["plant/%u/#"]

        [[rule]]
        groups = ["operators"]
        allow = ["publish", "subscribe"]
        topics = ["plant/#", "$SYS/#"]

        [[rule]]
        deny = ["subscribe"]
        topics = ["plant/+/secret"]

        [[rule]]
        users = ["@anonymous"]
        clients = ["panel"]
        allow = ["subscribe"]
        topics = ["plant/public"]
    "##;

    #[test]
    fn what_no_rule_allows_is_denied() {
        let acl = acl(PLANT);
        let press = rules(&acl, Some("press"), "c");
        assert!(press.may_publish("plant/press/temperature"));
        assert!(!press.may_publish("plant/olga/temperature"));
        assert!(!press.may_receive("plant/press/temperature"));
        assert!(!press.may_subscribe(&filter("#")));
    }

    #[test]
    fn what_is_denied_is_denied_whatever_allows_it() {
        let acl = acl(PLANT);
        let olga = rules(&acl, Some("olga"), "c");
        assert!(olga.may_receive("plant/press/temperature"));
        assert!(!olga.may_receive("plant/press/secret"));
        assert!(olga.may_publish("plant/press/secret"));
        assert!(!olga.may_subscribe(&filter("plant/press/secret")));
        assert!(!olga.may_subscribe(&filter("plant/+/secret")));
        assert!(olga.may_subscribe(&filter("plant/+/+")));
        assert!(olga.may_subscribe(&filter("#")));
        assert!(!olga.may_subscribe(&filter("office/#")));
    }

    #[test]
    fn system_topics_have_to_be_allowed_by_name() {
        let acl = acl("[[rule]]\nallow = [\"subscribe\"]\ntopics = [\"#\", \"+/x\"]");
        let all = rules(&acl, None, "c");
        assert!(all.may_receive("a/b"));
        assert!(!all.may_receive("$SYS/broker/uptime"));
        assert!(!all.may_receive("$SYS/x"));
        assert!(!all.may_subscribe(&filter("$SYS/#")));
        let acl = self::acl(PLANT);
        assert!(rules(&acl, Some("olga"), "c").may_receive("$SYS/broker/uptime"));
    }

    #[test]
    fn a_rule_applies_if_user_client_and_group_all_do() {
        let acl = acl(PLANT);
        assert!(rules(&acl, None, "panel").may_receive("plant/public"));
        assert!(!rules(&acl, None, "other").may_receive("plant/public"));
        assert!(!rules(&acl, Some("@anonymous"), "panel").may_receive("plant/public"));
        assert!(!rules(&acl, Some("x"), "panel").may_receive("plant/public"));
    }

    #[test]
    fn groups_come_from_the_login_too() {
        let acl = acl(PLANT);
        let member = acl.for_client(&Subject {
            user: Some("otto"),
            client_id: "c",
            groups: &["night".into(), "operators".into()],
        });
        assert!(member.may_receive("plant/x"));
    }

    #[test]
    fn a_name_can_not_widen_a_filter() {
        let acl = acl(
            "[[rule]]\nallow = [\"publish\", \"subscribe\"]\ntopics = [\"u/%u\", \"c/%c/#\", \"%c/x\"]",
        );
        for name in ["+", "#", "a/b", "a/#", "", "$SYS", "x+"] {
            let odd = rules(&acl, Some(name), name);
            for topic in ["u/a", "u/a/b", "a/b/x", "a/x", "$SYS/x", "u/"] {
                assert!(!odd.may_publish(topic), "{name:?} on {topic}");
                assert!(!odd.may_receive(topic), "{name:?} on {topic}");
            }
        }
        let plain = rules(&acl, Some("ü 1"), "$c");
        assert!(plain.may_publish("u/ü 1"));
        assert!(plain.may_publish("c/$c/y"), "not the first level");
        assert!(!plain.may_publish("$c/x"));
    }

    #[test]
    fn a_name_can_not_get_around_what_is_denied() {
        let acl = acl("[[rule]]\nallow = [\"publish\"]\ntopics = [\"#\"]\n\
             [[rule]]\ndeny = [\"publish\"]\ntopics = [\"own/%c/config\", \"a/x-%u\"]");
        assert!(!rules(&acl, None, "c1").may_publish("own/c1/config"));
        assert!(rules(&acl, None, "c1").may_publish("own/c2/config"));
        let odd = rules(&acl, None, "c1/x");
        assert!(!odd.may_publish("own/c1/x/config"));
        assert!(odd.may_publish("other"));
        assert!(
            rules(&acl, None, "c").may_publish("a/x-"),
            "not about those without a name"
        );
        assert!(!rules(&acl, Some("y"), "c").may_publish("a/x-y"));
    }

    #[test]
    fn a_percent_sign_is_written_twice() {
        let acl = acl("[[rule]]\nallow = [\"publish\"]\ntopics = [\"100%%/%c%%\"]");
        assert!(rules(&acl, None, "c").may_publish("100%/c%"));
    }

    #[test]
    fn a_wrong_rule_is_named_by_its_line() {
        let rule = "[[rule]]\nallow = [\"publish\"]\n";
        for (text, line, part) in [
            (
                format!("{rule}topics = [\"a\",\n \"b/#/c\"]"),
                4,
                "\"b/#/c\"",
            ),
            (format!("{rule}topics = [\"a/%U\"]"), 3, "%u (the user)"),
            (format!("{rule}topics = [\"a/%\"]"), 3, "%% (a percent"),
            (
                format!("{rule}topics = [\"$share/g/a\"]"),
                3,
                "$share/GROUP/",
            ),
            (format!("{rule}topics = []"), 1, "[\"#\"]"),
            (
                format!("{rule}topics = [\"a\"]\nusers = []"),
                1,
                "users is empty",
            ),
            (
                format!("{rule}topics = [\"a\"]\nusers = [\"@all\"]"),
                4,
                "@anonymous",
            ),
            (
                format!("{rule}topics = [\"a\"]\ndeny = [\"publish\"]"),
                1,
                "the same",
            ),
            (format!("{rule}topic = [\"a\"]"), 3, "unknown field `topic`"),
            (
                "[[rule]]\ntopics = [\"a\"]".into(),
                1,
                "neither allows nor denies",
            ),
            (
                "\n[[rule]]\nallow = [\"read\"]".into(),
                3,
                "expected `publish` or `subscribe`",
            ),
            ("[[rules]]".into(), 1, "unknown field `rules`"),
            ("a = \"".into(), 1, ""),
        ] {
            let (at, reason) = flaw(&text);
            assert_eq!(at, Some(line), "{text}: {reason}");
            assert!(reason.contains(part), "{text}: {reason}");
        }
        assert!(
            flaw("").1.contains("no [[rule]]"),
            "a file that was cut off opens nothing"
        );
        assert!(flaw("[groups]\na = [\"x\"]").1.contains("no [[rule]]"));
        let flaw = Acl::parse(b"# ok\n\xff").unwrap_err();
        assert_eq!((flaw.line, flaw.reason.as_str()), (Some(2), "not UTF-8"));
    }

    proptest! {
        #[test]
        fn no_contents_panic(contents in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Acl::parse(&contents);
        }

        #[test]
        fn no_topics_panic(topic in "[a-c/+#%uc$\\\\]{0,12}", name in "[a/+#$]{0,3}") {
            let text = format!("[[rule]]\nallow = [\"publish\"]\ndeny = [\"subscribe\"]\ntopics = ['{topic}']");
            if let Ok(acl) = Acl::parse(text.as_bytes()) {
                let client = rules(&acl, Some(&name), &name);
                client.may_publish("a/b");
                client.may_subscribe(&filter("a/#"));
            }
        }

        #[test]
        fn a_subscription_is_only_refused_if_nothing_could_come_of_it(
            allowed in proptest::collection::vec("[ab+]/[ab+](/#)?", 1..3),
            denied in proptest::collection::vec("[ab+]/[ab+](/#)?", 0..3),
            wanted in "[ab+]/[ab+](/#)?",
        ) {
            let list = |filters: &[String]| format!("{filters:?}");
            let mut text = format!("[[rule]]\nallow = [\"subscribe\"]\ntopics = {}\n", list(&allowed));
            if !denied.is_empty() {
                text += &format!("[[rule]]\ndeny = [\"subscribe\"]\ntopics = {}\n", list(&denied));
            }
            let client = rules(&acl(&text), None, "c");
            let wanted = filter(&wanted);
            let levels = ["a", "b", "c"];
            let pairs = levels.iter().flat_map(|x| levels.iter().map(move |y| format!("{x}/{y}")));
            let topics = pairs.flat_map(|pair| [format!("{pair}/z"), pair]);
            let some = topics.into_iter().any(|topic| wanted.matches(&topic) && client.may_receive(&topic));
            if some {
                prop_assert!(client.may_subscribe(&wanted));
            }
        }
    }
}
