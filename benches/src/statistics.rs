//! Medians and spreads of rounds.

use std::fmt;

/// What several rounds of one measurement gave.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rounds(Vec<f64>);

impl Rounds {
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The middle value (the mean of the two middle ones when their number is even); 0 of none.
    pub fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        match sorted.len() {
            0 => 0.0,
            odd if odd % 2 == 1 => sorted[odd / 2],
            even => (sorted[even / 2 - 1] + sorted[even / 2]) / 2.0,
        }
    }

    pub fn min(&self) -> f64 {
        self.0.iter().copied().reduce(f64::min).unwrap_or(0.0)
    }

    pub fn max(&self) -> f64 {
        self.0.iter().copied().reduce(f64::max).unwrap_or(0.0)
    }

    pub fn sum(&self) -> f64 {
        self.0.iter().sum()
    }
}

impl FromIterator<f64> for Rounds {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        Rounds(values.into_iter().collect())
    }
}

/// `median [min–max]`, or the value alone after a single round.
impl fmt::Display for Rounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let median = figure(self.median());
        if self.0.len() < 2 {
            return f.write_str(&median);
        }
        write!(
            f,
            "{median} [{}–{}]",
            figure(self.min()),
            figure(self.max())
        )
    }
}

/// A number to three significant digits or whole, with commas between thousands.
pub fn figure(value: f64) -> String {
    let decimals = match value.abs() {
        0.0 => 0,
        small if small < 0.1 => 3,
        small if small < 10.0 => 2,
        medium if medium < 100.0 => 1,
        _ => 0,
    };
    let text = format!("{value:.decimals$}");
    let (whole, fraction) = match text.split_once('.') {
        Some((whole, fraction)) => (whole, Some(fraction)),
        None => (text.as_str(), None),
    };
    let (sign, digits) = match whole.strip_prefix('-') {
        Some(digits) => ("-", digits),
        None => ("", whole),
    };
    let mut out = String::from(sign);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            out.push(',');
        }
        out.push(digit);
    }
    if let Some(fraction) = fraction {
        out.push('.');
        out.push_str(fraction);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_not_moved_by_one_wild_round() {
        let rounds: Rounds = [3.0, 1.0, 1000.0, 2.0, 4.0].into_iter().collect();
        assert_eq!(rounds.median(), 3.0);
        assert_eq!(rounds.to_string(), "3.00 [1.00–1,000]");
        let even: Rounds = [1.0, 2.0, 4.0, 100.0].into_iter().collect();
        assert_eq!(even.median(), 3.0);
    }

    #[test]
    fn figures_have_commas_between_thousands_and_no_false_precision() {
        assert_eq!(figure(0.0), "0");
        assert_eq!(figure(0.0271), "0.027");
        assert_eq!(figure(0.93), "0.93");
        assert_eq!(figure(28.44), "28.4");
        assert_eq!(figure(999.6), "1,000");
        assert_eq!(figure(1234567.8), "1,234,568");
        assert_eq!(figure(-1234.0), "-1,234");
    }
}
