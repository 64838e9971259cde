//! Mappings, from the bytes of a message to those of its outputs, on one thread.

use std::fs;
use std::hint::black_box;
use std::time::Instant;

use anyhow::{Result, ensure};
use hdrhistogram::Histogram;
use headgate::mappings::{Mapping, Sent, Set};
use tempfile::NamedTempFile;

use crate::allocations;
use crate::contest::LOST;
use crate::load::{Load, Pace};
use crate::reading::Form;
use crate::report::{Floor, Line, Section};
use crate::server::Site;
use crate::statistics::Rounds;
use crate::suite::{PAYLOAD_BYTES, PUBLISHERS, Suite};

/// The model of upstream's own benchmark: a message leads to four outputs, two of them static.
const PUMP: &str = "
stream_processor:
  mode: timeseries
  model: { name: pump, version: v1 }
  output_topic: umh.v1.corpA.plant-A.aawd
  sources:
    press: umh.v1.corpA.plant-A.aawd._raw.press
    tF: umh.v1.corpA.plant-A.aawd._raw.tempF
    r: umh.v1.corpA.plant-A.aawd._raw.run
  mapping:
    pressure: press+4.00001
    temperature: tF*69/31
    motor:
      rpm: press/4
    serialNumber: '\"SN-P42-008\"'
    deviceType: '\"pump\"'
";

const SINGLE: &str = "
model: { name: pump, version: v1 }
output_topic: umh.v1.corpA.plant-A.aawd
sources: { press: umh.v1.corpA.plant-A.aawd._raw.press }
mapping: { pressure: press+4.00001 }
";

const PRESS: &str = "umh/v1/corpA/plant-A/aawd/_raw/press";

/// Messages with different values, so that nothing is known before.
const PAYLOADS: usize = 1024;

const SOURCES_OF_ONE: usize = 10;

/// Messages a second that are to go through.
const FLOOR: u64 = 150_000;

/// Messages a second at which latency is measured.
const STEADY: u64 = 2_000;

#[derive(Default)]
struct Measured {
    rate: Rounds,
    p95: Rounds,
    allocations: Rounds,
    bytes: Rounds,
}

impl Suite {
    pub(crate) fn mappings(&self) -> Result<Vec<Section>> {
        Ok(vec![
            self.one_mapping()?,
            self.many_mappings()?,
            self.mapped_over_mqtt()?,
        ])
    }

    /// External publishers → mapping → external subscriber.
    fn mapped_over_mqtt(&self) -> Result<Section> {
        let site = Site::new(&self.gateway)?;
        let gateway = site.start()?;
        let mut file =
            String::from("model: { name: m, version: v1 }\noutput_topic: umh.v1.bench\nsources:\n");
        for source in 0..PUBLISHERS {
            file += &format!("  s{source}: umh.v1.bench._raw.s{source}\n");
        }
        file += "mapping:\n";
        for source in 0..PUBLISHERS {
            file += &format!("  o{source}: s{source} + 0\n");
        }
        let path = NamedTempFile::new()?;
        fs::write(path.path(), file)?;
        let idle = gateway.resident_bytes()?;
        gateway.install_mapping(path.path(), "bench")?;
        let form = Form::TimeSeries;
        let results = "umh/v1/bench/_m_v1/#";
        gateway.await_results_of(form, "umh/v1/bench/_raw/s0", results, 1)?;
        let flat_out = Load {
            form,
            topics: (0..PUBLISHERS)
                .map(|source| format!("umh/v1/bench/_raw/s{source}"))
                .collect(),
            filter: results.to_owned(),
            ..self.load(&gateway)
        };
        let steady = Load {
            pace: Pace::PerSecond(STEADY),
            ..flat_out.clone()
        };
        let [mut rate, mut lost, mut p50, mut p99, mut memory, mut full] = <[Rounds; 6]>::default();
        let paced = Load {
            pace: Pace::PerSecond(FLOOR),
            ..flat_out.clone()
        };
        let over_idle =
            || -> Result<f64> { Ok(gateway.resident_bytes()?.saturating_sub(idle) as f64 / 1e6) };
        for _ in 0..self.rounds {
            let outcome = steady.run()?;
            p50.push(outcome.latency.value_at_quantile(0.5) as f64 / 1e3);
            p99.push(outcome.latency.value_at_quantile(0.99) as f64 / 1e3);
            lost.push(outcome.lost as f64);
            lost.push(paced.run()?.lost as f64);
            memory.push(over_idle()?);
        }
        // Last, because what fills the queues then stays with the process for a while.
        for _ in 0..self.rounds {
            let outcome = flat_out.run()?;
            rate.push(outcome.per_second());
            lost.push(outcome.lost as f64);
            full.push(over_idle()?);
        }
        gateway.stop()?;
        Ok(Section {
            title: "Mappings over MQTT".to_owned(),
            conditions: format!(
                "{PUBLISHERS} external publishers → one mapping with {PUBLISHERS} sources and as many outputs → one \
                 external subscriber, {PAYLOAD_BYTES} B in, QoS 0: {STEADY} messages/s, then {FLOOR}, then flat out, for \
                 {:?} each. Memory is what the gateway has beyond what it had before the mapping was installed.",
                self.time
            ),
            lines: vec![
                Line::new("flat out", "messages/s", rate).with_floor(Floor::AtLeast(150e3)),
                Line::new(LOST, "messages", lost).with_floor(Floor::AtMost(0.0)),
                Line::new("steady, p50", "µs", p50).with_floor(Floor::AtMost(500.0)),
                Line::new("steady, p99", "µs", p99),
                Line::new("memory after that and 150,000 messages/s", "MB", memory)
                    .with_floor(Floor::AtMost(20.0)),
                Line::new("memory after flat out", "MB", full),
            ],
        })
    }

    fn one_mapping(&self) -> Result<Section> {
        let [mut pump, mut single, mut pump_engine, mut single_engine] = <[Measured; 4]>::default();
        for _ in 0..self.rounds {
            self.measure(PUMP, 4, true, &mut pump)?;
            self.measure(SINGLE, 1, true, &mut single)?;
            self.measure(PUMP, 4, false, &mut pump_engine)?;
            self.measure(SINGLE, 1, false, &mut single_engine)?;
        }
        let floor = Floor::AtLeast;
        Ok(Section {
            title: "Mappings, in process".to_owned(),
            conditions: format!(
                "One thread, {PAYLOADS} payloads in turn, for {:?}: JSON in, JSON out. The pump model is the one of \
                 upstream's benchmark, where a message takes 10.5 to 11.5 µs (81 to 95 thousand a second), 83 \
                 allocations and 4,617 B on a machine of this kind; its single mapping makes 204 thousand a second. For \
                 p95 each message is timed with two reads of the clock, which count.",
                self.time
            ),
            lines: vec![
                Line::new("pump model, 4 outputs", "messages/s", pump.rate)
                    .with_floor(floor(500e3)),
                Line::new("pump model, p95", "µs", pump.p95).with_floor(Floor::AtMost(10.0)),
                Line::new("pump model, allocations of a message", "", pump.allocations)
                    .with_floor(Floor::AtMost(10.0)),
                Line::new("pump model, allocated by a message", "B", pump.bytes)
                    .with_floor(Floor::AtMost(1024.0)),
                Line::new("single mapping", "messages/s", single.rate).with_floor(floor(1.5e6)),
                Line::new("single mapping, p95", "µs", single.p95),
                Line::new("pump model, engine only", "messages/s", pump_engine.rate)
                    .with_floor(floor(150e3)),
                Line::new("pump model, engine only, p95", "µs", pump_engine.p95),
                Line::new(
                    "single mapping, engine only",
                    "messages/s",
                    single_engine.rate,
                )
                .with_floor(floor(150e3)),
            ],
        })
    }

    fn measure(
        &self,
        file: &str,
        outputs: usize,
        has_fast_path: bool,
        measured: &mut Measured,
    ) -> Result<()> {
        let (mut mapping, _) = Mapping::load(file, "bench.yaml")?;
        if !has_fast_path {
            mapping = mapping.without_fast_path();
        }
        let payloads = payloads();
        let mut sent: Vec<Sent> = Vec::new();
        let mut take = |number: usize| {
            sent.clear();
            let payload = &payloads[number % PAYLOADS];
            mapping
                .on_message(PRESS, payload, None, 1, &mut sent)
                .map(|()| black_box(&sent).len())
        };
        for number in 0..PAYLOADS {
            ensure!(take(number)? == outputs, "a message has other outputs");
        }
        let (count, bytes) = allocations::so_far();
        let (began, mut messages) = (Instant::now(), 0);
        while began.elapsed() < self.time {
            for _ in 0..PAYLOADS {
                take(messages)?;
                messages += 1;
            }
        }
        let seconds = began.elapsed().as_secs_f64();
        let (count_after, bytes_after) = allocations::so_far();
        measured.rate.push(messages as f64 / seconds);
        let each = |before: u64, after: u64| (after - before) as f64 / messages as f64;
        measured.allocations.push(each(count, count_after));
        measured.bytes.push(each(bytes, bytes_after));
        let mut times = Histogram::<u64>::new_with_max(1_000_000_000, 3)?;
        for number in 0..200_000 {
            let began = Instant::now();
            take(number)?;
            times.saturating_record(began.elapsed().as_nanos() as u64);
        }
        measured
            .p95
            .push(times.value_at_quantile(0.95) as f64 / 1e3);
        Ok(())
    }

    /// Messages of all sources in turn, of which each is one mapping's.
    fn many_mappings(&self) -> Result<Section> {
        let counts = [10, 100, 1_000];
        let mut lines = Vec::new();
        let mut found: Vec<(Rounds, Rounds)> = vec![Default::default(); counts.len()];
        for _ in 0..self.rounds {
            for (count, (all, one)) in counts.into_iter().zip(&mut found) {
                let (each, same) = self.routed_per_second(count)?;
                all.push(each);
                one.push(same);
            }
        }
        for (count, (all, one)) in counts.into_iter().zip(found) {
            let sources = count * SOURCES_OF_ONE;
            lines.push(Line::new(
                format!("{count} mappings, {sources} sources, one topic"),
                "messages/s",
                one,
            ));
            lines.push(Line::new(
                format!("{count} mappings, {sources} sources, all topics in turn"),
                "messages/s",
                all,
            ));
        }
        Ok(Section {
            title: "Many mappings, in process".to_owned(),
            conditions: format!(
                "One thread; mappings of {SOURCES_OF_ONE} sources and one output for each, for {:?}. A message leads to \
                 one output. On one topic the cost is that of finding the mapping and of evaluating; with all topics \
                 in turn that of memory comes to it, once the values are more than the processor's caches hold.",
                self.time
            ),
            lines,
        })
    }

    /// With messages of all topics in turn, and of one.
    fn routed_per_second(&self, count: usize) -> Result<(f64, f64)> {
        let mut set = Set::default();
        let mut topics = Vec::new();
        for number in 0..count {
            let mut file = format!(
                "model: {{ name: m, version: v1 }}\noutput_topic: umh.v1.site{number}\nsources:\n"
            );
            for source in 0..SOURCES_OF_ONE {
                file += &format!("  s{source}: umh.v1.site{number}._raw.s{source}\n");
                topics.push(format!("umh/v1/site{number}/_raw/s{source}"));
            }
            file += "mapping:\n";
            for source in 0..SOURCES_OF_ONE {
                file += &format!("  o{source}: s{source} * 2 + 1\n");
            }
            let (mapping, _) = Mapping::load(&file, "bench.yaml")?;
            set.install(&format!("mapping-{number}"), mapping);
        }
        let payloads = payloads();
        let mut sent = Vec::new();
        let mut rate = |topics: &[String]| -> Result<f64> {
            let (mut messages, mut lost, began) = (0, 0, Instant::now());
            while began.elapsed() < self.time {
                for _ in 0..PAYLOADS {
                    sent.clear();
                    let payload = &payloads[messages % PAYLOADS];
                    let topic = &topics[messages % topics.len()];
                    set.on_message(topic, payload, None, 1, &mut sent)?;
                    lost += usize::from(black_box(&sent).len() != 1);
                    messages += 1;
                }
            }
            let seconds = began.elapsed().as_secs_f64();
            ensure!(lost == 0, "{lost} messages had no output");
            Ok(messages as f64 / seconds)
        };
        Ok((rate(&topics)?, rate(&topics[topics.len() / 2..][..1])?))
    }
}

fn payloads() -> Vec<Vec<u8>> {
    (0..PAYLOADS)
        .map(|number| {
            let value = 25.5 + number as f64 * 0.37;
            let timestamp = 1_647_890_123_456 + number;
            format!("{{\"value\":{value},\"timestamp_ms\":{timestamp}}}").into_bytes()
        })
        .collect()
}
