//! The two directions of a connection. Whatever waits for one of them may be dropped at any time: nothing is lost.

use std::io;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use rumqttc::v5::mqttbytes::v5::Packet;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};

use super::dial::Io;
use super::packets::{Incoming, take_packet};
use super::{End, PingReq};

/// Room that a read has at least: some thousand acknowledgements.
const READ_BYTES: usize = 16 << 10;

pub(super) struct Reader {
    half: ReadHalf<Box<dyn Io>>,
    input: BytesMut,
    max_packet_bytes: usize,
    heard: Instant,
    /// When the broker was asked whether it is still there, if it was and has said nothing since.
    asked: Option<Instant>,
}

impl Reader {
    pub(super) fn new(
        half: ReadHalf<Box<dyn Io>>,
        input: BytesMut,
        max_packet_bytes: usize,
    ) -> Reader {
        Reader {
            half,
            input,
            max_packet_bytes,
            heard: Instant::now(),
            asked: None,
        }
    }

    /// Waits until more has come.
    pub(super) async fn read(&mut self) -> Result<(), End> {
        self.input.reserve(READ_BYTES);
        match self.half.read_buf(&mut self.input).await? {
            0 => Err(End::Closed),
            _ => {
                self.heard = Instant::now();
                self.asked = None;
                Ok(())
            }
        }
    }

    /// The next packet, if it has come as a whole.
    pub(super) fn next(&mut self) -> Result<Option<Incoming>, String> {
        take_packet(&mut self.input, self.max_packet_bytes)
    }

    /// Asks the broker whether it is there, when that is due. For how long it was silent, if it does not say so.
    pub(super) fn is_dead(
        &mut self,
        writer: &mut Writer,
        keep_alive: Duration,
        patience: Duration,
    ) -> Result<Option<Duration>, End> {
        match self.asked {
            Some(asked) if asked.elapsed() >= patience => return Ok(Some(self.heard.elapsed())),
            // In time for the broker, too, which counts what it hears.
            None if writer.wrote.elapsed() >= keep_alive / 2
                || self.heard.elapsed() >= keep_alive =>
            {
                self.asked = Some(Instant::now());
                writer.push(Packet::PingReq(PingReq))?;
            }
            _ => {}
        }
        Ok(None)
    }
}

pub(super) struct Writer {
    half: WriteHalf<Box<dyn Io>>,
    output: BytesMut,
    /// All of `output` may be written, and yet not sent.
    has_more: bool,
    wrote: Instant,
}

impl Writer {
    pub(super) fn new(half: WriteHalf<Box<dyn Io>>) -> Writer {
        Writer {
            half,
            output: BytesMut::new(),
            has_more: false,
            wrote: Instant::now(),
        }
    }

    pub(super) fn push(&mut self, packet: Packet) -> Result<(), End> {
        self.has_more = true;
        self.wrote = Instant::now();
        let written = packet.write(&mut self.output, None);
        written
            .map(drop)
            .map_err(|error| End::Failed(format!("can't write a packet: {error}")))
    }

    /// Bytes that wait.
    pub(super) fn len(&self) -> usize {
        self.output.len()
    }

    pub(super) fn has_more(&self) -> bool {
        self.has_more
    }

    pub(super) async fn flush(&mut self) -> io::Result<()> {
        while !self.output.is_empty() {
            self.half.write_buf(&mut self.output).await?;
        }
        self.half.flush().await?;
        self.has_more = false;
        Ok(())
    }
}
