//! "Did you mean": the known name that a misspelt one is closest to.

/// The candidate nearest to `name`, unless all are too far off to be what was meant.
pub(crate) fn nearest<'a>(
    name: &str,
    candidates: impl Iterator<Item = &'a str>,
) -> Option<&'a str> {
    // A third of the letters may be wrong; beyond that a suggestion is noise.
    let limit = (name.chars().count() / 3).max(1);
    if name.len() > LONGEST {
        return None;
    }
    candidates
        .map(|candidate| (strsim::damerau_levenshtein(name, candidate), candidate))
        .filter(|(distance, _)| *distance <= limit)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// The comparison takes time in proportion to the length of the name; no key is nearly as long.
const LONGEST: usize = 200;

/// The known dotted name that `name` stands for: the nearest one, or else one in another table that
/// ends in the same word.
pub(super) fn nearest_dotted<'a>(
    name: &str,
    candidates: impl Iterator<Item = &'a str> + Clone,
) -> Option<&'a str> {
    let last = |dotted: &str| dotted.rsplit('.').next().map(str::to_owned);
    let wanted = last(name);
    nearest(name, candidates.clone()).or_else(|| {
        candidates
            .clone()
            .find(|candidate| last(candidate) == wanted)
    })
}
