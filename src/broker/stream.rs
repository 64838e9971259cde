//! What a client's MQTT comes and goes on: a [`Link`], with or without a [`WebSocket`] on it. One
//! interface for all: wait until it is ready, then try.

use std::io;

use bytes::BytesMut;
use rustls::pki_types::CertificateDer;

use super::certificate::CertificateNames;
use super::link::Link;
use super::websocket::WebSocket;

pub(super) struct Stream {
    link: Link,
    websocket: Option<Box<WebSocket>>,
}

impl Stream {
    pub(super) fn new(link: Link, websocket: Option<WebSocket>) -> Stream {
        Stream {
            link,
            websocket: websocket.map(Box::new),
        }
    }

    /// Whether the handshake of TLS has not ended.
    pub(super) fn is_handshaking(&self) -> bool {
        self.link.is_handshaking()
    }

    /// The verified certificates of the client, if it has shown some, its own first.
    pub(super) fn certificates(&self) -> Option<&[CertificateDer<'static>]> {
        self.link.certificates()
    }

    /// Whom the verified certificate of the client names, if it has shown one.
    pub(super) fn certificate_names(&self) -> Option<CertificateNames> {
        let own = self.certificates()?.first()?;
        Some(CertificateNames::of(own))
    }

    /// Waits until there may be something to read, if `reads`, or room for what is still to be
    /// sent, if `writes` or a handshake wants to. Returns whether there may be something to read.
    pub(super) async fn ready(&self, reads: bool, writes: bool) -> io::Result<bool> {
        match &self.websocket {
            Some(websocket) if reads && websocket.is_closed() => Ok(true),
            Some(websocket) => {
                self.link
                    .ready(reads, writes || websocket.is_sending())
                    .await
            }
            None => self.link.ready(reads, writes).await,
        }
    }

    /// Whether something that was accepted by [`Stream::try_write`], or is part of a handshake, has
    /// not reached the socket yet.
    pub(super) fn is_sending(&self) -> bool {
        let websocket = self.websocket.as_deref();
        self.link.is_sending() || websocket.is_some_and(WebSocket::is_sending)
    }

    /// Reads what is there into the spare room of `buffer`. 0 bytes: the client has closed. What
    /// breaks the rules of TLS or WebSocket is [`io::ErrorKind::InvalidData`].
    pub(super) fn try_read(&mut self, buffer: &mut BytesMut) -> io::Result<usize> {
        let Some(websocket) = &mut self.websocket else {
            return self.link.try_read(buffer);
        };
        if websocket.is_closed() {
            return Ok(0);
        }
        let start = buffer.len();
        if self.link.try_read(buffer)? == 0 {
            return Ok(0);
        }
        let received = websocket.receive(buffer, start);
        let count = buffer.len() - start;
        // The answer to a request, a ping or a close. What goes wrong here does so again later.
        let _ = self.flush();
        if let Err(error) = received {
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
        match count {
            // Frames without MQTT, which are not the end.
            0 => Err(io::ErrorKind::WouldBlock.into()),
            count => Ok(count),
        }
    }

    /// Returns how many bytes were taken. Those that were not must be offered again first.
    pub(super) fn try_write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(websocket) = &mut self.websocket else {
            return self.link.try_write(&[], bytes);
        };
        let Some(count) = websocket.frame(bytes.len()) else {
            return Ok(bytes.len());
        };
        let written = self.link.try_write(websocket.unsent(), &bytes[..count])?;
        match websocket.sent(written) {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            count => Ok(count),
        }
    }

    /// Sends on what was accepted, as far as the socket takes it.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.link.flush()?;
        let Some(websocket) = &mut self.websocket else {
            return Ok(());
        };
        while websocket.is_sending() {
            match self.link.try_write(&[], websocket.unsent()) {
                Ok(0) => break,
                Ok(count) => {
                    websocket.sent(count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Tells the client that nothing more comes.
    pub(super) async fn shut_down(&mut self) -> io::Result<()> {
        if let Some(websocket) = &mut self.websocket {
            websocket.close();
            self.flush()?;
            while self.is_sending() {
                self.ready(false, true).await?;
                self.flush()?;
            }
        }
        self.link.shut_down().await
    }
}
