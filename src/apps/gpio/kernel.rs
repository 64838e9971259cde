//! The machine's own GPIO chips, through the kernel's character devices (version 2 of that
//! interface, Linux 5.10; times as the wall clock has them, Linux 5.11).

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use gpiocdev::chip::{self, Chip};
use gpiocdev::line::{self, EdgeDetection, EdgeKind, EventClock, Info, Offset, Value};
use gpiocdev::{Request, request};

use super::{Edge, Line};
use crate::apps::manifest::{Bias, Direction, Edges, GpioLine, LineOnChip};

/// Edges that the kernel keeps for a line until they are taken; as many as it allows for one line.
const KERNEL_EDGES: u32 = 16 * 64;

#[derive(Debug)]
pub(in crate::apps) struct KernelChips;

struct KernelLine {
    request: Request,
    offset: Offset,
}

impl super::Chips for KernelChips {
    fn request(&self, line: &GpioLine, consumer: &str) -> Result<Box<dyn Line>, String> {
        let chip = find_chip(&line.chip)?;
        let info = find_line(&chip, line)?;
        let (path, offset) = (chip.path(), info.offset);
        if info.used {
            return Err(in_use(&info));
        }
        let request = configure(path, line, offset, consumer).request();
        match request {
            Ok(request) => Ok(Box::new(KernelLine { request, offset })),
            // Somebody was faster; the kernel doesn't say who.
            Err(error) => Err(match chip.line_info(offset) {
                Ok(info) if info.used => in_use(&info),
                _ => format!("the kernel refuses it: {}", explain(&error)),
            }),
        }
    }
}

fn configure(path: &Path, line: &GpioLine, offset: Offset, consumer: &str) -> request::Builder {
    let mut builder = Request::builder();
    builder
        .on_chip(path)
        .with_consumer(consumer)
        .with_line(offset);
    match line.direction {
        Direction::Input { edges, debounce } => {
            builder.as_input();
            let detection = match edges {
                Edges::Rising => Some(EdgeDetection::RisingEdge),
                Edges::Falling => Some(EdgeDetection::FallingEdge),
                Edges::Both => Some(EdgeDetection::BothEdges),
                Edges::None => None,
            };
            if let Some(detection) = detection {
                builder
                    .with_edge_detection(detection)
                    .with_event_clock(EventClock::Realtime)
                    .with_kernel_event_buffer_size(KERNEL_EDGES);
            }
            if let Some(debounce) = debounce {
                builder.with_debounce_period(debounce);
            }
        }
        Direction::Output { initial } => {
            builder.as_output(value(initial));
        }
    }
    if let Some(bias) = line.bias {
        builder.with_bias(match bias {
            Bias::PullUp => line::Bias::PullUp,
            Bias::PullDown => line::Bias::PullDown,
            Bias::Off => line::Bias::Disabled,
        });
    }
    if line.active_low {
        builder.as_active_low();
    }
    builder
}

fn value(active: bool) -> Value {
    match active {
        true => Value::Active,
        false => Value::Inactive,
    }
}

fn find_chip(name: &str) -> Result<Chip, String> {
    let paths = chip::chips().map_err(|error| format!("/dev: {}", explain(&error)))?;
    let (mut found, mut others, mut closed) = (Vec::new(), Vec::new(), Vec::new());
    for path in paths {
        let own = path.file_name().unwrap_or_default().to_string_lossy();
        let opened = Chip::from_path(&path).and_then(|chip| Ok((chip.info()?.label, chip)));
        match opened {
            Ok((_, chip)) if own == name => return Ok(chip),
            Ok((label, chip)) if label == name => found.push(chip),
            Ok((label, _)) => others.push(format!("{own} ({label})")),
            Err(error) => closed.push(format!("{}: {}", path.display(), explain(&error))),
        }
    }
    if found.len() > 1 {
        let names: Vec<_> = found.iter().map(Chip::name).collect();
        let names = names.join(" and ");
        return Err(format!("{names} both have the label {name:?}; name one"));
    }
    found.pop().ok_or_else(|| {
        if others.is_empty() && closed.is_empty() {
            return format!(
                "there is no chip {name:?}, nor any other: /dev/gpiochip* is not there, or not \
                 shown to the gateway's service"
            );
        }
        let others = match &others[..] {
            [] => "there is none that can be opened".to_owned(),
            others => format!("there are {}", others.join(", ")),
        };
        let closed: String = closed.iter().map(|error| format!("; {error}")).collect();
        format!("there is no chip {name:?}; {others}{closed}")
    })
}

fn find_line(chip: &Chip, line: &GpioLine) -> Result<Info, String> {
    let failed = |error| format!("{}: {}", chip.path().display(), explain(&error));
    let count = chip.info().map_err(failed)?.num_lines;
    match &line.line {
        LineOnChip::Offset(offset) if *offset < count => chip.line_info(*offset).map_err(failed),
        LineOnChip::Offset(_) => Err(format!("{} has {count} lines, from 0", chip.name())),
        LineOnChip::Name(name) => {
            let lines = chip.line_info_iter().map_err(failed)?;
            let mut named = Vec::new();
            for info in lines {
                let info = info.map_err(failed)?;
                if info.name == **name {
                    named.push(info);
                }
            }
            match (named.pop(), named.is_empty()) {
                (Some(info), true) => Ok(info),
                (None, _) => Err(format!(
                    "{} has no line of this name; `gpioinfo` shows what there is",
                    chip.name()
                )),
                (Some(_), false) => Err(format!(
                    "{} has several lines of this name; give the offset of one",
                    chip.name()
                )),
            }
        }
    }
}

fn in_use(info: &Info) -> String {
    match info.consumer.as_str() {
        "" => "the kernel uses it".to_owned(),
        consumer => format!("{consumer:?} has it already"),
    }
}

/// The system's own words, if it is the system that has refused.
fn explain(error: &gpiocdev::Error) -> String {
    match error {
        gpiocdev::Error::Uapi(_, error) => error.to_string(),
        error => error.to_string(),
    }
}

fn io_error(error: gpiocdev::Error) -> io::Error {
    io::Error::other(explain(&error))
}

impl Line for KernelLine {
    fn value(&self) -> io::Result<bool> {
        let value = self.request.value(self.offset).map_err(io_error)?;
        Ok(value == Value::Active)
    }

    fn set(&self, active: bool) -> io::Result<()> {
        let set = self.request.set_value(self.offset, value(active));
        set.map_err(io_error)
    }

    fn next_edge(&self) -> io::Result<Option<Edge>> {
        if !self.request.has_edge_event().map_err(io_error)? {
            return Ok(None);
        }
        let edge = self.request.read_edge_event().map_err(io_error)?;
        Ok(Some(Edge {
            rising: edge.kind == EdgeKind::Rising,
            unix_ns: edge.timestamp_ns,
            sequence: edge.line_seqno,
        }))
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.request.as_fd()
    }
}
