//! What an app measures itself: counters, gauges and histograms for `/metrics`, under its name.
//!
//! They don't go through the recorder, which never forgets a series: these go with their app.

use std::collections::BTreeMap;
use std::fmt::Write;

/// Most metrics of one app.
pub(super) const MAX_MEASURES: usize = 64;

const MAX_NAME: usize = 64;

/// Upper bounds of a histogram's buckets: three a decade, from thousandths to tens of thousands, for
/// nobody knows what apps measure.
const BOUNDS: [f64; 22] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0,
    100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10_000.0,
];

/// All of one app, or what one call adds to them.
#[derive(Debug, Default)]
pub(super) struct Measures {
    by_name: BTreeMap<Box<str>, Measure>,
}

#[derive(Debug)]
enum Measure {
    Counter(u64),
    Gauge(f64),
    Histogram(Box<Histogram>),
}

#[derive(Debug, Default)]
struct Histogram {
    /// Of each bucket alone; the last one has no bound.
    counts: [u64; BOUNDS.len() + 1],
    sum: f64,
}

/// One thing that an app records.
#[derive(Clone, Copy, Debug)]
pub(super) enum Sample {
    Count(u64),
    Level(f64),
    Observation(f64),
}

/// Why a sample can't be taken.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum BadSample {
    Name,
    NotFinite,
    OtherKind,
    TooMany,
}

impl Measures {
    /// Adds a sample to what a call has staged, if it will fit to `self` when the call has ended.
    pub(super) fn stage(
        &self,
        staged: &mut Measures,
        name: &str,
        sample: Sample,
    ) -> Result<(), BadSample> {
        if !is_name(name) {
            return Err(BadSample::Name);
        }
        if let Sample::Level(value) | Sample::Observation(value) = sample
            && !value.is_finite()
        {
            return Err(BadSample::NotFinite);
        }
        let present = staged.by_name.get(name).or_else(|| self.by_name.get(name));
        match present {
            Some(measure) if !measure.takes(sample) => return Err(BadSample::OtherKind),
            Some(_) => {}
            None => {
                let known = &self.by_name;
                let new = staged
                    .by_name
                    .keys()
                    .filter(|name| !known.contains_key(*name));
                if known.len() + new.count() >= MAX_MEASURES {
                    return Err(BadSample::TooMany);
                }
            }
        }
        match staged.by_name.get_mut(name) {
            Some(measure) => measure.add(Measure::of(sample)),
            None => {
                staged.by_name.insert(name.into(), Measure::of(sample));
            }
        }
        Ok(())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// The call has ended well.
    pub(super) fn commit(&mut self, staged: Measures) {
        for (name, measure) in staged.by_name {
            match self.by_name.get_mut(&name) {
                Some(present) => present.add(measure),
                None => {
                    self.by_name.insert(name, measure);
                }
            }
        }
    }

    pub(super) fn render(&self, app: &str, text: &mut MeasuresText) {
        for (name, measure) in &self.by_name {
            text.add(app, name, measure);
        }
    }
}

impl Measure {
    fn of(sample: Sample) -> Measure {
        match sample {
            Sample::Count(count) => Measure::Counter(count),
            Sample::Level(value) => Measure::Gauge(value),
            Sample::Observation(value) => {
                let mut histogram = Histogram::default();
                histogram.counts[BOUNDS.partition_point(|bound| *bound < value)] = 1;
                histogram.sum = value;
                Measure::Histogram(histogram.into())
            }
        }
    }

    fn takes(&self, sample: Sample) -> bool {
        matches!(
            (self, sample),
            (Measure::Counter(_), Sample::Count(_))
                | (Measure::Gauge(_), Sample::Level(_))
                | (Measure::Histogram(_), Sample::Observation(_))
        )
    }

    /// Adds what is of the same kind. If another call has made it one of another kind meanwhile, the
    /// first stays.
    fn add(&mut self, other: Measure) {
        match (self, other) {
            (Measure::Counter(count), Measure::Counter(more)) => {
                *count = count.saturating_add(more)
            }
            (Measure::Gauge(value), Measure::Gauge(new)) => *value = new,
            (Measure::Histogram(histogram), Measure::Histogram(more)) => {
                for (count, more) in histogram.counts.iter_mut().zip(more.counts) {
                    *count = count.saturating_add(more);
                }
                histogram.sum += more.sum;
            }
            _ => {}
        }
    }
}

fn is_name(name: &str) -> bool {
    let first = |c: u8| c.is_ascii_lowercase() || c == b'_';
    name.len() <= MAX_NAME
        && name.bytes().next().is_some_and(first)
        && name.bytes().all(|c| first(c) || c.is_ascii_digit())
}

/// The measures of all apps, as Prometheus reads them.
#[derive(Default)]
pub(super) struct MeasuresText {
    counters: String,
    gauges: String,
    histograms: String,
}

impl MeasuresText {
    fn add(&mut self, app: &str, name: &str, measure: &Measure) {
        let labels = format!("app=\"{app}\",name=\"{name}\"");
        let written = match measure {
            Measure::Counter(count) => {
                writeln!(
                    self.counters,
                    "headgate_app_counter_total{{{labels}}} {count}"
                )
            }
            Measure::Gauge(value) => {
                writeln!(self.gauges, "headgate_app_gauge{{{labels}}} {value}")
            }
            Measure::Histogram(histogram) => histogram.render(&labels, &mut self.histograms),
        };
        written.expect("writing to a String does not fail");
    }

    /// Appends all to what `/metrics` answers.
    pub(super) fn append_to(self, text: &mut String) {
        for (name, kind, help, lines) in [
            (
                "headgate_app_counter_total",
                "counter",
                "What apps count themselves",
                self.counters,
            ),
            (
                "headgate_app_gauge",
                "gauge",
                "What apps measure themselves, the last values",
                self.gauges,
            ),
            (
                "headgate_app_histogram",
                "histogram",
                "What apps measure themselves, by size",
                self.histograms,
            ),
        ] {
            if !lines.is_empty() {
                writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{lines}")
                    .expect("writing to a String does not fail");
            }
        }
    }
}

impl Histogram {
    fn render(&self, labels: &str, text: &mut String) -> std::fmt::Result {
        const NAME: &str = "headgate_app_histogram";
        let mut total: u64 = 0;
        for (index, count) in self.counts.iter().enumerate() {
            total = total.saturating_add(*count);
            match BOUNDS.get(index) {
                Some(bound) => writeln!(text, "{NAME}_bucket{{{labels},le=\"{bound}\"}} {total}")?,
                None => writeln!(text, "{NAME}_bucket{{{labels},le=\"+Inf\"}} {total}")?,
            }
        }
        writeln!(text, "{NAME}_sum{{{labels}}} {}", self.sum)?;
        writeln!(text, "{NAME}_count{{{labels}}} {total}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(measures: &Measures) -> String {
        let mut all = MeasuresText::default();
        measures.render("a", &mut all);
        let mut text = String::new();
        all.append_to(&mut text);
        text
    }

    fn call(measures: &mut Measures, samples: &[(&str, Sample)]) {
        let mut staged = Measures::default();
        for (name, sample) in samples {
            measures.stage(&mut staged, name, *sample).unwrap();
        }
        measures.commit(staged);
    }

    #[test]
    fn calls_add_up() {
        let mut measures = Measures::default();
        let samples = [
            ("seen", Sample::Count(2)),
            ("seen", Sample::Count(3)),
            ("level", Sample::Level(1.0)),
            ("level", Sample::Level(-2.5)),
            ("took", Sample::Observation(0.002)),
            ("took", Sample::Observation(20_000.0)),
        ];
        call(&mut measures, &samples);
        call(&mut measures, &samples);
        call(&mut measures, &[("seen", Sample::Count(u64::MAX))]);
        let text = text(&measures);
        for line in [
            "# TYPE headgate_app_counter_total counter",
            &format!(
                "headgate_app_counter_total{{app=\"a\",name=\"seen\"}} {}",
                u64::MAX
            ),
            "headgate_app_gauge{app=\"a\",name=\"level\"} -2.5",
            "headgate_app_histogram_bucket{app=\"a\",name=\"took\",le=\"0.001\"} 0",
            "headgate_app_histogram_bucket{app=\"a\",name=\"took\",le=\"0.0025\"} 2",
            "headgate_app_histogram_bucket{app=\"a\",name=\"took\",le=\"10000\"} 2",
            "headgate_app_histogram_bucket{app=\"a\",name=\"took\",le=\"+Inf\"} 4",
            "headgate_app_histogram_sum{app=\"a\",name=\"took\"} 40000.004",
            "headgate_app_histogram_count{app=\"a\",name=\"took\"} 4",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
    }

    #[test]
    fn a_bad_sample_is_refused_and_leaves_no_trace() {
        let mut measures = Measures::default();
        call(&mut measures, &[("known", Sample::Count(1))]);
        let mut staged = Measures::default();
        let long = "a".repeat(65);
        for (name, sample, error) in [
            ("", Sample::Count(1), BadSample::Name),
            ("Upper", Sample::Count(1), BadSample::Name),
            ("1st", Sample::Count(1), BadSample::Name),
            ("a\"}\n", Sample::Count(1), BadSample::Name),
            (&long, Sample::Count(1), BadSample::Name),
            ("g", Sample::Level(f64::NAN), BadSample::NotFinite),
            (
                "g",
                Sample::Observation(f64::INFINITY),
                BadSample::NotFinite,
            ),
            ("known", Sample::Level(1.0), BadSample::OtherKind),
        ] {
            assert_eq!(measures.stage(&mut staged, name, sample), Err(error));
        }
        assert!(staged.by_name.is_empty());
        for number in 1..MAX_MEASURES {
            let name = format!("m{number}");
            measures
                .stage(&mut staged, &name, Sample::Count(1))
                .unwrap();
        }
        assert_eq!(
            measures.stage(&mut staged, "more", Sample::Count(1)),
            Err(BadSample::TooMany)
        );
        measures
            .stage(&mut staged, "known", Sample::Count(1))
            .unwrap();
    }
}
