//! What the demo shows while it runs: a live screen on a terminal, else a line a second.

use std::fmt::Write as _;
use std::io::{self, IsTerminal};
use std::net::SocketAddr;
use std::time::Duration;

use serde_json::json;

use super::ledger::{Percentiles, Totals};
use super::observer::{Alarm, Alarms};
use crate::apps::AppInfo;
use crate::cli::output::{Output, print, printable};

/// Alternate screen, no cursor; and back.
const ENTER_SCREEN: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE_SCREEN: &str = "\x1b[?25h\x1b[?1049l";
const HOME: &str = "\x1b[H";
const CLEAR_LINE: &str = "\x1b[K";
const CLEAR_BELOW: &str = "\x1b[J";
const BOLD: &str = "\x1b[1m";
const RED: &str = "\x1b[31m";
const GREEN: &str = "\x1b[32m";
const DIM: &str = "\x1b[2m";
const RESET: &str = "\x1b[0m";

/// Where things are, to look at them by hand.
pub struct Places {
    pub mqtt: SocketAddr,
    pub metrics: Option<SocketAddr>,
    pub socket: std::path::PathBuf,
    /// What is worth saying before the rest, such as that the usual port was taken.
    pub notes: Vec<String>,
}

/// One look at the running demo.
pub struct Frame<'a> {
    pub elapsed: Duration,
    pub duration: Option<Duration>,
    pub sensors: usize,
    pub totals: Totals,
    /// Of the last moment.
    pub events_in_per_s: f64,
    pub results_out_per_s: f64,
    pub latency: Percentiles,
    pub apps: &'a [AppInfo],
    pub alarms: &'a Alarms,
}

pub enum View {
    Live(Screen),
    Lines,
    Json,
}

/// The terminal while it shows the live view. Dropping it gives it back as it was.
pub struct Screen {
    places: Places,
}

impl View {
    /// The view that suits where the output goes.
    pub fn new(plain: bool, json: bool, places: Places) -> anyhow::Result<View> {
        if json {
            return Ok(View::Json);
        }
        if View::is_live(plain, json) {
            print(ENTER_SCREEN)?;
            return Ok(View::Live(Screen { places }));
        }
        print(&(by_hand(&places).join("\n") + "\n"))?;
        Ok(View::Lines)
    }

    /// Whether the terminal will be the live view's.
    pub fn is_live(plain: bool, json: bool) -> bool {
        !plain
            && !json
            && io::stdout().is_terminal()
            && std::env::var_os("TERM").is_some_and(|term| term != "dumb")
    }

    /// How often there is something new to see.
    pub fn interval(&self) -> Duration {
        match self {
            View::Live(_) => Duration::from_millis(500),
            View::Lines | View::Json => Duration::from_secs(1),
        }
    }

    pub fn show(&self, frame: &Frame) -> anyhow::Result<()> {
        match self {
            View::Live(screen) => {
                let size = terminal_size::terminal_size();
                let (columns, rows) = size.map_or((80, 24), |(width, height)| {
                    (width.0.into(), height.0.into())
                });
                print(&fit(&live(frame, &screen.places), columns, rows))
            }
            View::Lines => print(&lines(frame)),
            View::Json => print(&json_line(frame)),
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // If the terminal is gone there is nothing to give back.
        let _ = print(LEAVE_SCREEN);
    }
}

/// A line of the screen: pieces of text, each in one style.
type Line = Vec<(&'static str, String)>;

fn live(frame: &Frame, places: &Places) -> Vec<Line> {
    let plain = |text: String| vec![("", text)];
    let blank = Vec::new;
    let clock = match frame.duration {
        Some(duration) => format!("{} of {}", clock(frame.elapsed), clock(duration)),
        None => clock(frame.elapsed),
    };
    let mut screen = vec![
        vec![
            (BOLD, "Headgate demo".to_owned()),
            (
                "",
                format!(
                    "   {} sensors over MQTT on {}   {clock}",
                    frame.sensors, places.mqtt
                ),
            ),
        ],
        blank(),
        vec![
            ("", "events in   ".to_owned()),
            (
                BOLD,
                format!("{:>10} /s", count(frame.events_in_per_s as u64)),
            ),
            (DIM, format!("{:>16} in all", count(frame.totals.sent))),
        ],
        vec![
            ("", "results out ".to_owned()),
            (
                BOLD,
                format!("{:>10} /s", count(frame.results_out_per_s as u64)),
            ),
            (DIM, format!("{:>16} in all", count(frame.totals.results()))),
        ],
        vec![
            ("", "publish to result ".to_owned()),
            (BOLD, format!("p50 {}", latency(frame.latency.p50_us))),
            ("", "   ".to_owned()),
            (BOLD, format!("p99 {}", latency(frame.latency.p99_us))),
        ],
        blank(),
        vec![(
            DIM,
            format!(
                "{:<18}{:<12}{:>14}{:>14}{:>10}{:>10}",
                "APP", "STATE", "HANDLED", "PUBLISHED", "FAILED", "DROPPED"
            ),
        )],
    ];
    for app in frame.apps {
        let counters = &app.counters;
        screen.push(plain(format!(
            "{:<18}{:<12}{:>14}{:>14}{:>10}{:>10}",
            app.name,
            app.state.as_str(),
            count(counters.handled),
            count(counters.published),
            count(counters.failed),
            count(counters.dropped.total())
        )));
    }
    screen.push(blank());
    screen.push(vec![(
        DIM,
        format!(
            "ALARMS   {} raised, {} cleared",
            count(frame.totals.alarms_raised),
            count(frame.totals.alarms_cleared)
        ),
    )]);
    for alarm in frame.alarms.last() {
        let colour = if alarm.state == "raised" { RED } else { GREEN };
        screen.push(vec![
            (colour, format!("{:<9}", printable_line(&alarm.state))),
            (
                "",
                format!("{:<32}{:>6.1}", printable_line(&alarm.topic), alarm.value),
            ),
        ]);
    }
    screen.push(blank());
    screen.extend(by_hand(places).into_iter().map(|line| vec![(DIM, line)]));
    screen
}

fn by_hand(places: &Places) -> Vec<String> {
    let port = places.mqtt.port();
    let mut lines = places.notes.clone();
    lines.extend([
        "Look for yourself, in another terminal:".to_owned(),
        format!("  mosquitto_sub -p {port} -t 'alarms/#' -v"),
        format!("  mosquitto_pub -p {port} -t plant/press/temperature -m '{{\"value\": 93.5}}'"),
        format!("  headgate --socket {} app list", places.socket.display()),
    ]);
    if let Some(metrics) = places.metrics {
        lines.push(format!("  curl http://{metrics}/metrics"));
    }
    lines.push("Ctrl-C ends the demo.".to_owned());
    lines
}

/// Paints as much of `lines` as fits, over what was there.
fn fit(lines: &[Line], columns: usize, rows: usize) -> String {
    let mut painted = String::from(HOME);
    for (row, line) in lines.iter().take(rows).enumerate() {
        if row > 0 {
            painted.push_str("\r\n");
        }
        let mut room = columns;
        for (style, text) in line {
            let shown: String = text.chars().take(room).collect();
            room -= shown.chars().count();
            painted.push_str(style);
            painted.push_str(&shown);
            painted.push_str(RESET);
        }
        painted.push_str(CLEAR_LINE);
    }
    painted.push_str(CLEAR_BELOW);
    painted
}

fn lines(frame: &Frame) -> String {
    let mut text = String::new();
    for Alarm {
        state,
        topic,
        value,
    } in frame.alarms.take()
    {
        let (state, topic) = (printable_line(&state), printable_line(&topic));
        writeln!(text, "alarm {state}: {topic} {value:.1}")
            .expect("writing to a String does not fail");
    }
    let apps = frame.apps.iter().map(|app| {
        let counters = &app.counters;
        format!(
            "{} {} handled {} published {} failed",
            app.name,
            count(counters.handled),
            count(counters.published),
            count(counters.failed)
        )
    });
    writeln!(
        text,
        "{}  in {}/s  out {}/s  p50 {}  p99 {}  | {}",
        clock(frame.elapsed),
        count(frame.events_in_per_s as u64),
        count(frame.results_out_per_s as u64),
        latency(frame.latency.p50_us),
        latency(frame.latency.p99_us),
        apps.collect::<Vec<_>>().join(" | ")
    )
    .expect("writing to a String does not fail");
    text
}

fn json_line(frame: &Frame) -> String {
    let apps: serde_json::Map<_, _> = frame
        .apps
        .iter()
        .map(|app| (app.name.clone(), json!(app.counters)))
        .collect();
    let line = json!({
        "elapsed_s": frame.elapsed.as_secs_f64(),
        "events_in_per_s": frame.events_in_per_s,
        "results_out_per_s": frame.results_out_per_s,
        "latency": frame.latency,
        "totals": frame.totals,
        "apps": apps,
        "alarms": frame.alarms.take(),
    });
    format!("{line}\n")
}

/// What the demo came to.
#[derive(serde::Serialize)]
pub struct Summary {
    pub elapsed_s: f64,
    pub totals: Totals,
    /// Results that had to come and didn't, and readings that the alarm app never saw.
    pub lost: u64,
    pub latency: Percentiles,
    pub apps: Vec<AppInfo>,
}

impl Summary {
    pub fn print(&self, output: &Output) -> anyhow::Result<()> {
        if output.json {
            return output.value_line(&json!({ "summary": self }));
        }
        let Totals {
            sent,
            alarms_raised,
            alarms_cleared,
            ..
        } = self.totals;
        output.text(format!(
            "events in    {} in {:.1} s",
            count(sent),
            self.elapsed_s
        ))?;
        output.text(format!("results out  {}", count(self.totals.results())))?;
        output.text(format!("lost         {}", count(self.lost)))?;
        output.text(format!(
            "latency      p50 {}  p99 {}  max {}",
            latency(self.latency.p50_us),
            latency(self.latency.p99_us),
            latency(self.latency.max_us)
        ))?;
        output.text(format!(
            "alarms       {} raised, {} cleared",
            count(alarms_raised),
            count(alarms_cleared)
        ))?;
        for app in &self.apps {
            let counters = &app.counters;
            output.text(format!(
                "{:<16} {} handled in {} batches, {} published, {} failed, {} dropped",
                app.name,
                count(counters.handled),
                count(counters.batches),
                count(counters.published),
                count(counters.failed),
                count(counters.dropped.total())
            ))?;
        }
        Ok(())
    }
}

/// Text from the broker, on one line.
fn printable_line(text: &str) -> String {
    printable(text).replace(['\n', '\t'], " ")
}

/// `1234567` as `1,234,567`.
fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

fn latency(us: u64) -> String {
    match us {
        0 => "-".to_owned(),
        1..1000 => format!("{us} µs"),
        1000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.1} s", us as f64 / 1e6),
    }
}

fn clock(elapsed: Duration) -> String {
    let seconds = elapsed.as_secs();
    format!("{:02}:{:02}", seconds / 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_and_latencies_have_units() {
        assert_eq!(count(0), "0");
        assert_eq!(count(999), "999");
        assert_eq!(count(1_234_567), "1,234,567");
        assert_eq!(latency(0), "-");
        assert_eq!(latency(999), "999 µs");
        assert_eq!(latency(1500), "1.5 ms");
        assert_eq!(latency(2_500_000), "2.5 s");
        assert_eq!(clock(Duration::from_secs(3661)), "61:01");
    }

    #[test]
    fn a_small_terminal_shows_what_fits() {
        let screen = vec![
            vec![(BOLD, "12345".to_owned()), ("", "67890".to_owned())],
            vec![("", "second".to_owned())],
            vec![("", "third".to_owned())],
        ];
        let painted = fit(&screen, 7, 2);
        assert!(painted.contains("12345") && painted.contains("67"));
        assert!(!painted.contains("678") && !painted.contains("third"));
    }

    #[test]
    fn a_topic_cannot_drive_the_terminal() {
        assert_eq!(printable_line("a\x1b[2J\nb"), "a\u{fffd}[2J b");
    }
}
