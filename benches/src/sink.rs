//! The least that can stand in for a broker: answers CONNECT and SUBSCRIBE and hands every PUBLISH
//! on to every subscriber as it is. Shows how much the load generator itself can do.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::Result;

use crate::stream::Stream;
use crate::wire::{self, Connection};

type Subscribers = Arc<Mutex<Vec<TcpStream>>>;

/// Serves `listener` for as long as the process lives.
pub fn serve(listener: TcpListener) -> Result<()> {
    let subscribers = Subscribers::default();
    loop {
        let (stream, _) = listener.accept()?;
        let subscribers = subscribers.clone();
        thread::spawn(move || {
            // A client that goes away is no concern of the others.
            let _ = attend(stream, &subscribers);
        });
    }
}

fn attend(mut stream: TcpStream, subscribers: &Subscribers) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut connection =
        Connection::new(Stream::Plain(stream.try_clone()?), Duration::from_secs(600))?;
    let mut onward = Vec::new();
    let mut answers = Vec::new();
    loop {
        connection.receive(
            || (),
            |(), frame| {
                match frame.kind() {
                    wire::CONNECT => answers.extend(wire::packet(wire::CONNACK, &[0, 0])),
                    wire::SUBSCRIBE => {
                        let qos = frame.body.last().copied().unwrap_or(0);
                        answers.extend(wire::packet(
                            wire::SUBACK,
                            &[frame.body[0], frame.body[1], qos],
                        ));
                        subscribers
                            .lock()
                            .unwrap_or_else(|poisoned| poisoned.into_inner())
                            .push(stream.try_clone()?);
                    }
                    wire::PUBLISH => {
                        let (identifier, _) = frame.publish()?;
                        let answer = [0, wire::PUBACK, wire::PUBREC][usize::from(frame.qos())];
                        if answer != 0 {
                            answers.extend(wire::packet(answer, &identifier.to_be_bytes()));
                        }
                        onward.extend_from_slice(frame.whole);
                    }
                    wire::PUBREC => {
                        answers.extend(wire::packet(wire::PUBREL | 0b10, &frame.acknowledged()?));
                    }
                    wire::PUBREL => {
                        answers.extend(wire::packet(wire::PUBCOMP, &frame.acknowledged()?));
                    }
                    _ => {}
                }
                Ok(())
            },
        )?;
        stream.write_all(&answers)?;
        answers.clear();
        if !onward.is_empty() {
            subscribers
                .lock()
                .unwrap_or_else(|poisoned| poisoned.into_inner())
                .retain_mut(|subscriber| subscriber.write_all(&onward).is_ok());
            onward.clear();
        }
    }
}
