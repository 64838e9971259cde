//! Clients of every bad habit, all at once.

use std::io::{ErrorKind, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use headgate_bench::stream::{Endpoint, Stream};
use headgate_bench::wire::{self, Connection};

use crate::client::{self, Connect};
use crate::dice::Dice;

/// How long one of these waits for the gateway. They are refused, held up and cut off: that is no
/// failure.
const PATIENCE: Duration = Duration::from_secs(5);

const PAYLOAD: [u8; 100] = [b'x'; 100];

/// Client ids that all of them share, so that they take sessions from each other.
const IDS: u64 = 12;

type Habit = fn(&mut Troublemaker) -> Result<()>;

/// What there is to do.
const HABITS: &[(&str, Habit)] = &[
    ("comings and goings", Troublemaker::come_and_go),
    ("connections without a word", Troublemaker::say_nothing),
    ("broken CONNECTs", Troublemaker::connect_by_half),
    ("garbage", Troublemaker::send_garbage),
    ("takeovers", Troublemaker::take_over),
    ("floods", Troublemaker::flood),
    ("retained messages", Troublemaker::retain),
    ("share group members", Troublemaker::share),
    ("slow readers", Troublemaker::read_nothing),
    (
        "subscribers that change their minds",
        Troublemaker::change_mind,
    ),
];

/// How often each was done.
#[derive(Default)]
pub struct Tally([AtomicU64; HABITS.len()]);

impl Tally {
    pub fn lines(&self) -> Vec<String> {
        HABITS
            .iter()
            .zip(&self.0)
            .map(|((name, _), count)| format!("{name}: {}", count.load(Ordering::Relaxed)))
            .collect()
    }
}

/// Does one thing after the other until `is_ending`.
pub fn run(broker: &Endpoint, dice: Dice, tally: &Tally, is_ending: &AtomicBool) {
    let mut troublemaker = Troublemaker {
        broker: broker.clone(),
        dice,
    };
    while !is_ending.load(Ordering::Relaxed) {
        let habit = troublemaker.dice.below(HABITS.len() as u64) as usize;
        // Whatever became of it: that the gateway lives is seen elsewhere.
        let _ = HABITS[habit].1(&mut troublemaker);
        tally.0[habit].fetch_add(1, Ordering::Relaxed);
    }
}

struct Troublemaker {
    broker: Endpoint,
    dice: Dice,
}

impl Troublemaker {
    /// Connects under one of the shared ids, in one of the ways that there are.
    fn open(&mut self, keeps_session: bool) -> Result<(Stream, bool)> {
        let id = format!("chaos-{}", self.dice.below(IDS));
        let is_v5 = self.dice.is_heads();
        let qos = self.dice.qos();
        let (stream, _) = Connect {
            id: &id,
            is_v5,
            is_clean: !keeps_session || self.dice.is_heads(),
            will: self.dice.is_heads().then_some(("chaos/will", qos)),
            expiry_s: if keeps_session { 5 } else { 0 },
            will_delay_s: self.dice.below(3) as u32,
        }
        .open(&self.broker, PATIENCE)?;
        Ok((stream, is_v5))
    }

    /// Ends it in one of the ways that there are.
    fn leave(&mut self, mut stream: Stream) -> Result<()> {
        match self.dice.below(3) {
            0 => stream.write_all(&[wire::DISCONNECT, 0])?,
            1 => client::reset(stream.socket()),
            _ => {}
        }
        Ok(())
    }

    fn come_and_go(&mut self) -> Result<()> {
        for _ in 0..20 {
            let (stream, _) = self.open(false)?;
            self.leave(stream)?;
        }
        Ok(())
    }

    fn say_nothing(&mut self) -> Result<()> {
        let silent: Vec<TcpStream> = (0..20)
            .filter_map(|_| TcpStream::connect(self.broker.address).ok())
            .collect();
        thread::sleep(self.dice.pause(Duration::from_secs(1)));
        for socket in silent {
            if self.dice.is_heads() {
                client::reset(&socket);
            }
        }
        Ok(())
    }

    fn connect_by_half(&mut self) -> Result<()> {
        for _ in 0..20 {
            let whole = Connect::as_client("chaos-half").packet();
            let end = self.dice.below(whole.len() as u64) as usize;
            let mut socket = TcpStream::connect(self.broker.address)?;
            socket.write_all(&whole[..end])?;
            if self.dice.is_heads() {
                client::reset(&socket);
            }
        }
        Ok(())
    }

    fn send_garbage(&mut self) -> Result<()> {
        for _ in 0..20 {
            let garbage: Vec<u8> = (0..self.dice.below(200))
                .map(|_| self.dice.roll() as u8)
                .collect();
            if self.dice.is_heads() {
                let mut socket = TcpStream::connect(self.broker.address)?;
                socket.write_all(&garbage)?;
            } else {
                let (mut stream, _) = self.open(false)?;
                stream.write_all(&garbage)?;
            }
        }
        Ok(())
    }

    /// Several connections that follow each other under few ids while they are being sent to.
    fn take_over(&mut self) -> Result<()> {
        let mut open = Vec::new();
        for _ in 0..10 {
            let (mut stream, is_v5) = self.open(true)?;
            let qos = self.dice.qos();
            stream.write_all(&client::subscribe(is_v5, "chaos/#", qos))?;
            let topic = format!("chaos/over/{}", self.dice.below(4));
            let qos = self.dice.qos();
            stream.write_all(&client::publish(is_v5, &topic, qos, 9, &PAYLOAD, false))?;
            open.push(stream);
        }
        for stream in open {
            self.leave(stream)?;
        }
        Ok(())
    }

    /// As fast as the gateway takes it, with and without reading what it answers.
    fn flood(&mut self) -> Result<()> {
        const MESSAGES: u16 = 1000;
        let (mut stream, is_v5) = self.open(false)?;
        let qos = self.dice.qos();
        let topic = format!("chaos/flood/{}", self.dice.below(4));
        let mut packets = Vec::new();
        for id in 1..=MESSAGES {
            packets.extend(client::publish(is_v5, &topic, qos, id, &PAYLOAD, false));
        }
        stream.write_all(&packets)?;
        if self.dice.is_heads() {
            let mut connection = Connection::new(stream, Duration::from_millis(20))?;
            return client::serve(&mut connection, self.dice.pause(Duration::from_secs(1)));
        }
        self.leave(stream)
    }

    fn retain(&mut self) -> Result<()> {
        let (mut stream, is_v5) = self.open(false)?;
        for _ in 0..100 {
            let topic = format!("chaos/retained/{}", self.dice.below(200));
            let payload = if self.dice.is_heads() {
                &PAYLOAD[..]
            } else {
                b""
            };
            stream.write_all(&client::publish(is_v5, &topic, 0, 0, payload, true))?;
        }
        stream.write_all(&client::subscribe(is_v5, "chaos/retained/#", 1))?;
        self.leave(stream)
    }

    /// Members of share groups that take some messages and leave with others unacknowledged.
    fn share(&mut self) -> Result<()> {
        let mut members = Vec::new();
        for _ in 0..4 {
            let (mut stream, is_v5) = self.open(true)?;
            let filter = format!("$share/group{}/chaos/#", self.dice.below(3));
            stream.write_all(&client::subscribe(is_v5, &filter, 1))?;
            members.push(Connection::new(stream, Duration::from_millis(20))?);
        }
        for mut member in members {
            // One that was taken over meanwhile does not keep the others.
            let _ = client::serve(&mut member, self.dice.pause(Duration::from_millis(300)));
        }
        Ok(())
    }

    fn read_nothing(&mut self) -> Result<()> {
        let (mut stream, is_v5) = self.open(false)?;
        let filter = if self.dice.is_heads() { "chaos/#" } else { "#" };
        let qos = self.dice.qos();
        stream.write_all(&client::subscribe(is_v5, filter, qos))?;
        thread::sleep(self.dice.pause(Duration::from_secs(4)));
        self.leave(stream)
    }

    /// Subscribes and unsubscribes while messages come.
    fn change_mind(&mut self) -> Result<()> {
        let (mut stream, is_v5) = self.open(true)?;
        stream
            .socket()
            .set_read_timeout(Some(Duration::from_millis(1)))?;
        let end = Instant::now() + self.dice.pause(Duration::from_secs(1));
        while Instant::now() < end {
            let filter = ["chaos/#", "chaos/+/1", "$share/group1/chaos/flood/#"]
                [self.dice.below(3) as usize];
            if self.dice.is_heads() {
                let qos = self.dice.qos();
                stream.write_all(&client::subscribe(is_v5, filter, qos))?;
            } else {
                stream.write_all(&client::unsubscribe(is_v5, filter))?;
            }
            let mut some = [0; 4096];
            match std::io::Read::read(&mut stream, &mut some) {
                Ok(0) => break,
                Err(error)
                    if !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
                {
                    break;
                }
                _ => {}
            }
        }
        self.leave(stream)
    }
}
