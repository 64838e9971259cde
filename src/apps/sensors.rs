//! Reads the sensors of apps at the rates that their manifests say, and hands each reading to its app.
//!
//! A file of a sensor can block whoever reads it, for as long as its driver likes, so a few threads
//! share the work, and never two of them the same device: a device that is stuck costs one thread.

mod schedule;
mod sysfs;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};

use super::log::Complaint;
use super::manifest::Sensor;
use super::services::AppServices;
use crate::event::{Event, Lane, Topic, unix_time_ns};
use schedule::{Next, Schedule, SensorId};
use sysfs::{Source, Sysfs};

/// The topics of sensors' events begin with this. Nobody else can publish below it to an app, for no
/// app can subscribe to it.
pub(super) const SENSOR_TOPICS: &str = "$sensor/";

/// Threads that read: with three devices stuck, the others are still read.
const READERS: usize = 4;

pub(super) struct Sensors {
    shared: Arc<Shared>,
}

struct Shared {
    sysfs: Sysfs,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    schedule: Schedule,
    sensors: BTreeMap<SensorId, Arc<Reader>>,
    /// The threads, which come with the first sensor.
    threads: usize,
    stop: bool,
}

/// Reads one sensor for one instance.
struct Reader {
    sensor: Sensor,
    topic: Topic,
    /// Where the sensor was found; none if it has to be looked for.
    source: Mutex<Option<Source>>,
    services: Arc<AppServices>,
}

/// A sensor that is read, until this is dropped.
pub(super) struct Reading {
    shared: Arc<Shared>,
    id: SensorId,
}

impl Sensors {
    /// `sysfs` is where the kernel shows its devices: /sys, or a test's folder.
    pub(super) fn new(sysfs: PathBuf) -> Sensors {
        Sensors {
            shared: Arc::new(Shared {
                sysfs: Sysfs::new(sysfs),
                state: Mutex::default(),
                changed: Condvar::new(),
            }),
        }
    }

    /// Reads `sensor` from now on.
    pub(super) fn read(&self, sensor: &Sensor, services: &Arc<AppServices>) -> io::Result<Reading> {
        let topic = Topic::new(format!("{SENSOR_TOPICS}{}", sensor.name));
        let reader = Arc::new(Reader {
            sensor: sensor.clone(),
            topic: topic.expect("a sensor's name is a topic level"),
            source: Mutex::default(),
            services: services.clone(),
        });
        let mut state = self.shared.state.lock();
        while state.threads < READERS {
            let shared = self.shared.clone();
            thread::Builder::new()
                .name("apps-sensors".into())
                .spawn(move || shared.run())?;
            state.threads += 1;
        }
        let now = Instant::now();
        let id = state.schedule.add(&sensor.device, sensor.interval, now);
        state.sensors.insert(id, reader);
        drop(state);
        self.shared.changed.notify_one();
        Ok(Reading {
            shared: self.shared.clone(),
            id,
        })
    }

    /// Has the threads end. Nobody waits for them: one may be stuck in a device.
    pub(super) fn stop(&self) {
        self.shared.state.lock().stop = true;
        self.shared.changed.notify_all();
    }

    /// Sensors that are read.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.shared.state.lock().sensors.len()
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        state.schedule.remove(self.id);
        let reader = state.sensors.remove(&self.id);
        drop(state);
        // Unlocked: it may be the last to let go of the app's services.
        drop(reader);
    }
}

impl Shared {
    fn run(&self) {
        let mut state = self.state.lock();
        while !state.stop {
            let id = match state.schedule.next(Instant::now()) {
                Next::Read(id) => id,
                Next::At(at) => {
                    self.changed.wait_until(&mut state, at);
                    continue;
                }
                Next::Never => {
                    self.changed.wait(&mut state);
                    continue;
                }
            };
            let Some(reader) = state.sensors.get(&id).cloned() else {
                state.schedule.remove(id);
                continue;
            };
            // Another one may have to wait for the next sensor meanwhile.
            self.changed.notify_one();
            drop(state);
            let value = reader.read(&self.sysfs);
            state = self.state.lock();
            if state.schedule.done(id, Instant::now()) {
                drop(state);
                reader.report(value);
                state = self.state.lock();
            }
        }
    }
}

impl Reader {
    fn read(&self, sysfs: &Sysfs) -> Result<f64, String> {
        let mut source = self.source.lock();
        let found = match source.take() {
            Some(source) => source,
            None => sysfs.find(&self.sensor.device, &self.sensor.channel)?,
        };
        // One that can't be read may be somewhere else when it comes back.
        let value = found.read()?;
        *source = Some(found);
        Ok(value)
    }

    fn report(&self, value: Result<f64, String>) {
        let Some(app) = self.services.app.upgrade() else {
            return;
        };
        match value {
            Ok(value) => app.sensor_read(Event {
                topic: self.topic.clone(),
                payload: decimal(value).into(),
                timestamp_ns: unix_time_ns(),
                received: Instant::now(),
                hops: 0,
                lane: Lane::default(),
                retries: None,
                receipt: None,
            }),
            Err(reason) => {
                app.sensor_failed();
                app.log().complain(Complaint::Sensor, || {
                    format!(
                        "the sensor {:?} can't be read: {reason}; it is tried again",
                        self.sensor.name
                    )
                });
            }
        }
    }
}

/// As many digits as a sensor may have, without those that arithmetic has left behind.
fn decimal(value: f64) -> String {
    let rounded = format!("{value:.11e}").parse().unwrap_or(value);
    // Not "-0".
    format!("{}", if rounded == 0.0 { 0.0 } else { rounded })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reading_is_a_decimal_number_without_the_dust_of_arithmetic() {
        for (value, text) in [
            (21.5, "21.5"),
            ((215.0 + 3.0) * 0.1, "21.8"),
            (0.1 + 0.2, "0.3"),
            (-0.0, "0"),
            (-40.0, "-40"),
            (101_325.0, "101325"),
            (1.22e-9, "0.00000000122"),
            (1e15, "1000000000000000"),
        ] {
            assert_eq!(decimal(value), text);
        }
    }
}
