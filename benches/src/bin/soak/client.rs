//! What a client of the soak says.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use headgate_bench::stream::{Endpoint, Stream};
use headgate_bench::wire::{self, Connection};

/// A CONNECT.
#[derive(Clone, Copy)]
pub struct Connect<'a> {
    pub id: &'a str,
    /// MQTT 5.0 instead of 3.1.1.
    pub is_v5: bool,
    pub is_clean: bool,
    /// Topic and QoS.
    pub will: Option<(&'a str, u8)>,
    /// Of MQTT 5, as is the next.
    pub expiry_s: u32,
    pub will_delay_s: u32,
}

impl<'a> Connect<'a> {
    pub fn as_client(id: &'a str) -> Connect<'a> {
        Connect {
            id,
            is_v5: false,
            is_clean: true,
            will: None,
            expiry_s: 0,
            will_delay_s: 0,
        }
    }

    pub fn packet(&self) -> Vec<u8> {
        let mut flags = u8::from(self.is_clean) << 1;
        if let Some((_, qos)) = self.will {
            flags |= 0b100 | qos << 3;
        }
        let mut body = text("MQTT");
        body.extend([if self.is_v5 { 5 } else { 4 }, flags, 0, 60]);
        if self.is_v5 {
            body.extend([5, 0x11]);
            body.extend(self.expiry_s.to_be_bytes());
        }
        body.extend(text(self.id));
        if let Some((topic, _)) = self.will {
            if self.is_v5 {
                body.extend([5, 0x18]);
                body.extend(self.will_delay_s.to_be_bytes());
            }
            body.extend(text(topic));
            body.extend(text("gone"));
        }
        wire::packet(wire::CONNECT, &body)
    }

    /// Connects; whether the gateway has kept a session.
    pub fn open(&self, broker: &Endpoint, patience: Duration) -> Result<(Stream, bool)> {
        let mut stream = Stream::open(broker, patience)?;
        stream.write_all(&self.packet())?;
        let mut start = [0; 4];
        stream
            .read_exact(&mut start)
            .context("no answer to CONNECT")?;
        ensure!(
            start[0] == wire::CONNACK && start[3] == 0,
            "{} was refused: {start:02x?}",
            self.id
        );
        // What MQTT 5 says beyond that is of no interest.
        let mut rest = vec![0; usize::from(start[1]) - 2];
        stream.read_exact(&mut rest)?;
        Ok((stream, start[2] & 1 == 1))
    }
}

/// A SUBSCRIBE that asks for one filter.
pub fn subscribe(is_v5: bool, filter: &str, qos: u8) -> Vec<u8> {
    let mut body = vec![0, 1];
    body.extend(is_v5.then_some(0));
    body.extend(text(filter));
    body.push(qos);
    wire::packet(wire::SUBSCRIBE | 0b10, &body)
}

/// An UNSUBSCRIBE of one filter.
pub fn unsubscribe(is_v5: bool, filter: &str) -> Vec<u8> {
    let mut body = vec![0, 2];
    body.extend(is_v5.then_some(0));
    body.extend(text(filter));
    wire::packet(wire::UNSUBSCRIBE | 0b10, &body)
}

/// A PUBLISH.
pub fn publish(
    is_v5: bool,
    topic: &str,
    qos: u8,
    id: u16,
    payload: &[u8],
    retain: bool,
) -> Vec<u8> {
    let mut body = text(topic);
    if qos > 0 {
        body.extend(id.to_be_bytes());
    }
    body.extend(is_v5.then_some(0));
    body.extend(payload);
    wire::packet(wire::PUBLISH | qos << 1 | u8::from(retain), &body)
}

pub fn acknowledgement(kind: u8, id: [u8; 2]) -> [u8; 4] {
    let flags = if kind == wire::PUBREL { 0b10 } else { 0 };
    [kind | flags, 2, id[0], id[1]]
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u16).to_be_bytes(), text.as_bytes()].concat()
}

/// Answers what a well-behaved client answers, for as long as `patience` allows.
pub fn serve(connection: &mut Connection, patience: Duration) -> Result<()> {
    let end = Instant::now() + patience;
    while Instant::now() < end {
        let mut answers = Vec::new();
        connection.receive(
            || (),
            |(), frame| {
                match frame.kind() {
                    wire::PUBLISH if frame.qos() > 0 => {
                        let kind = [wire::PUBACK, wire::PUBREC][usize::from(frame.qos() - 1)];
                        let (id, _) = frame.publish()?;
                        answers.extend(acknowledgement(kind, id.to_be_bytes()));
                    }
                    wire::PUBREC => {
                        answers.extend(acknowledgement(wire::PUBREL, frame.acknowledged()?));
                    }
                    wire::PUBREL => {
                        answers.extend(acknowledgement(wire::PUBCOMP, frame.acknowledged()?));
                    }
                    _ => {}
                }
                Ok(())
            },
        )?;
        connection.stream().write_all(&answers)?;
    }
    Ok(())
}

/// Ends a connection as a crash does: with a reset.
#[allow(unsafe_code)]
pub fn reset(socket: &TcpStream) {
    use std::os::fd::AsRawFd;
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    // SAFETY: setsockopt reads one linger of the size that it is told; the descriptor is open.
    unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            size_of::<libc::linger>() as libc::socklen_t,
        );
    }
}
