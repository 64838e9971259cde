//! MQTT over WebSocket, with another implementation's client and with peers that break its rules.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use tungstenite::protocol::frame::Frame;
use tungstenite::protocol::frame::coding::{Data, OpCode};
use tungstenite::{ClientRequestBuilder, Message, WebSocket};

use crate::gateway::{Gateway, Home, PATIENCE};
use crate::mosquitto;
use crate::wire::{
    CONNACK, PUBACK, Packet, SUBACK, connect_packet, first_packet, publish_packet, subscribe_packet,
};

fn home() -> Home {
    Home::new().set("mqtt.websocket.listen", "127.0.0.1:0")
}

fn address(gateway: &Gateway) -> SocketAddr {
    let status = gateway.status();
    let address = status["mqtt_websocket_listen"].as_str();
    address.unwrap().parse().unwrap()
}

fn socket(gateway: &Gateway) -> TcpStream {
    let stream = TcpStream::connect(address(gateway)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// A WebSocket client on a socket of any kind.
pub struct Client<S> {
    websocket: WebSocket<S>,
    input: Vec<u8>,
    pongs: VecDeque<Vec<u8>>,
}

impl<S: Read + Write> Client<S> {
    pub fn open(socket: S) -> Client<S> {
        let uri = "ws://localhost/mqtt".parse().unwrap();
        let request = ClientRequestBuilder::new(uri).with_sub_protocol("mqtt");
        let (websocket, response) = tungstenite::client(request, socket)
            .unwrap_or_else(|error| panic!("no WebSocket: {error}"));
        assert_eq!(response.headers()["sec-websocket-protocol"], "mqtt");
        Client {
            websocket,
            input: Vec::new(),
            pongs: VecDeque::new(),
        }
    }

    /// Opens, and connects as a 3.1.1 client with a clean session.
    pub fn connect(socket: S, id: &str) -> Client<S> {
        let mut client = Client::open(socket);
        client.send(&connect_packet(4, id, 0));
        let packet = client.next();
        assert_eq!((packet.kind(), packet.body[1]), (CONNACK, 0), "{packet:?}");
        client
    }

    /// In one frame.
    pub fn send(&mut self, bytes: &[u8]) {
        self.websocket
            .send(Message::binary(bytes.to_vec()))
            .unwrap();
    }

    /// The next packet. Must come.
    pub fn next(&mut self) -> Packet {
        loop {
            if let Some((packet, length)) = first_packet(&self.input) {
                self.input.drain(..length);
                return packet;
            }
            match self.websocket.read().unwrap() {
                Message::Binary(bytes) => self.input.extend(bytes),
                Message::Pong(payload) => self.pongs.push_back(payload.to_vec()),
                other => panic!("{other:?}"),
            }
        }
    }

    /// The code with which the gateway closes, which it must.
    fn until_closed(mut self) -> u16 {
        loop {
            match self.websocket.read() {
                Ok(Message::Close(Some(frame))) => return frame.code.into(),
                Ok(Message::Binary(_)) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    pub fn subscribe(&mut self, filter: &str, qos: u8) {
        self.send(&subscribe_packet(1, &[(filter, qos)]));
        let packet = self.next();
        assert_eq!(
            (packet.kind(), &packet.body[..]),
            (SUBACK, &[0, 1, qos][..])
        );
    }

    /// Publishes at QoS 1 and waits for the acknowledgement.
    pub fn publish(&mut self, topic: &str, payload: &[u8]) {
        self.send(&publish_packet(topic, payload, 1, 7));
        assert_eq!(self.next().kind(), PUBACK);
    }
}

/// The neighbours of whatever a test does are not disturbed by it.
fn still_serves(gateway: &Gateway) {
    let mut client = Client::connect(socket(gateway), "neighbour");
    client.subscribe("neighbour", 1);
    client.publish("neighbour", b"here");
    assert_eq!(client.next().payload(), b"here");
}

#[test]
fn messages_of_every_size_go_both_ways_between_websocket_and_tcp() {
    let gateway = home().start();
    let mut browser = Client::connect(socket(&gateway), "browser");
    browser.subscribe("a/#", 1);
    let large = vec![b'x'; 1_000_000];
    for size in [0, 1, 100, 125, 126, 65_535, 65_536, 1_000_000] {
        browser.send(&publish_packet("a/b", &large[..size], 0, 0));
        let packet = browser.next();
        assert_eq!((packet.topic(), packet.payload().len()), ("a/b", size));
    }
    mosquitto::publish(&gateway, &["-t", "a/c", "-m", "from TCP", "-q", "2"]);
    let packet = browser.next();
    assert_eq!(
        (packet.topic(), packet.payload()),
        ("a/c", &b"from TCP"[..])
    );
    let subscriber = mosquitto::subscribe(&gateway, &["-t", "b", "-q", "1"]);
    browser.publish("b", b"from a browser");
    assert_eq!(subscriber.line(), "from a browser");
}

#[test]
fn packets_may_span_frames_and_share_them() {
    let gateway = home().start();
    let mut client = Client::connect(socket(&gateway), "c");
    // Every byte a frame, and every frame a message.
    for byte in subscribe_packet(1, &[("a", 0)]) {
        client.send(&[byte]);
    }
    assert_eq!(client.next().kind(), SUBACK);
    // One message in frames of a byte, with a ping in between.
    let packet = publish_packet("a", b"cut", 0, 0);
    for (at, byte) in packet.iter().enumerate() {
        let kind = if at == 0 {
            Data::Binary
        } else {
            Data::Continue
        };
        let last = at + 1 == packet.len();
        let frame = Frame::message(vec![*byte], OpCode::Data(kind), last);
        client.websocket.send(Message::Frame(frame)).unwrap();
        client.websocket.send(Message::Ping("?".into())).unwrap();
    }
    assert_eq!(client.next().payload(), b"cut");
    // Many packets in one.
    let many = publish_packet("a", b"one of many", 0, 0).repeat(10_000);
    client.send(&many);
    for _ in 0..10_000 {
        assert_eq!(client.next().payload(), b"one of many");
    }
    assert_eq!(client.pongs.pop_front().as_deref(), Some(&b"?"[..]));
}

#[test]
fn a_close_of_the_client_is_answered_and_its_disconnect_counts() {
    let gateway = home().start();
    let mut client = Client::connect(socket(&gateway), "c");
    client.send(&[0xe0, 0]);
    client.websocket.close(None).unwrap();
    assert_eq!(client.until_closed(), 1000);
    gateway.until_logged("disconnected by the client");
}

#[test]
fn a_close_without_disconnect_publishes_the_will() {
    let gateway = home().start();
    let subscriber = mosquitto::subscribe(&gateway, &["-t", "will"]);
    let mut client = Client::open(socket(&gateway));
    let will = [crate::wire::string("will"), crate::wire::string("gone")].concat();
    client.send(&crate::wire::connect_packet_with(4, "c", 0, 6, &will));
    assert_eq!(client.next().kind(), CONNACK);
    client.websocket.close(None).unwrap();
    assert_eq!(subscriber.line(), "gone");
}

#[test]
fn when_the_gateway_ends_a_connection_it_closes_the_websocket() {
    let gateway = home().start();
    let client = Client::connect(socket(&gateway), "c");
    let stopped = std::thread::spawn(move || gateway.terminate());
    assert_eq!(client.until_closed(), 1000);
    assert!(stopped.join().unwrap().status.success());
}

#[test]
fn who_breaks_the_rules_of_websocket_is_told_and_closed() {
    let gateway = home().start();
    let text = |client: &mut Client<TcpStream>| {
        client.websocket.send(Message::text("text")).unwrap();
    };
    let unmasked = |client: &mut Client<TcpStream>| {
        client.websocket.get_mut().write_all(&[0x82, 1, 0]).unwrap();
    };
    let reserved = |client: &mut Client<TcpStream>| {
        let frame = [0x83, 0x81, 0, 0, 0, 0, 0];
        client.websocket.get_mut().write_all(&frame).unwrap();
    };
    type Misbehave = fn(&mut Client<TcpStream>);
    let cases: [(&str, Misbehave, u16, &str); 3] = [
        ("text", text, 1003, "a text frame; MQTT comes in binary"),
        ("unmasked", unmasked, 1002, "a frame without a mask"),
        (
            "reserved",
            reserved,
            1002,
            "a frame of a kind that there is not",
        ),
    ];
    for (what, send, code, why) in cases {
        for connected in [false, true] {
            let mut client = match connected {
                true => Client::connect(socket(&gateway), what),
                false => Client::open(socket(&gateway)),
            };
            send(&mut client);
            assert_eq!(client.until_closed(), code, "{what}");
            gateway.until_logged(why);
        }
    }
    still_serves(&gateway);
}

#[test]
fn what_is_no_mqtt_in_a_frame_ends_the_connection() {
    let gateway = home().start();
    let mut client = Client::connect(socket(&gateway), "c");
    client.send(&[0xff; 10]);
    assert_eq!(client.until_closed(), 1000);
    still_serves(&gateway);
}

const REQUEST: &str = "GET /mqtt HTTP/1.1\r\nHost: plant\r\nConnection: Upgrade\r\n\
    Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
    Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n";

/// What the gateway says to `request` before it closes.
fn answer(gateway: &Gateway, request: &[u8]) -> String {
    let mut stream = socket(gateway);
    stream.write_all(request).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn a_request_that_is_not_for_mqtt_over_websocket_gets_a_short_answer() {
    let gateway = home().start();
    let huge = REQUEST.replace("plant", &"x".repeat(10_000));
    let mqtt = connect_packet(4, "c", 0);
    for (request, status) in [
        (REQUEST.replace("/mqtt", "/").as_bytes(), "404 Not Found"),
        (REQUEST.replace("GET", "POST").as_bytes(), "405 Method"),
        (REQUEST.replace(": mqtt", ": chat").as_bytes(), "400 Bad"),
        (b"GET /mqtt HTTP/1.1\r\nHost: x\r\n\r\n", "426 Upgrade"),
        (huge.as_bytes(), "431 Request Header"),
        (&mqtt, "400 Bad Request"),
        (b"\x16\x03\x01\x02\0\x01\0", "400 Bad Request"),
    ] {
        let answer = answer(&gateway, request);
        let expected = format!("HTTP/1.1 {status}");
        assert!(answer.starts_with(&expected), "{answer}");
        assert!(answer.contains("\r\nConnection: "), "{answer}");
    }
    gateway.until_logged("listener=\"ws\"");
    still_serves(&gateway);
}

#[test]
fn another_path_can_be_set() {
    let gateway = home().set("mqtt.websocket.path", "/plant/7").start();
    let answer = answer(&gateway, REQUEST.as_bytes());
    assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
    let mut stream = socket(&gateway);
    let request = REQUEST.replace("/mqtt", "/plant/7");
    stream.write_all(request.as_bytes()).unwrap();
    let mut status = [0; 12];
    stream.read_exact(&mut status).unwrap();
    assert_eq!(&status, b"HTTP/1.1 101");
}

#[test]
fn a_request_byte_by_byte_is_answered_and_one_that_never_ends_is_closed_in_time() {
    let gateway = home().set("mqtt.connect_timeout_ms", 5000).start();
    let mut slow = socket(&gateway);
    let mut silent = socket(&gateway);
    slow.write_all(&REQUEST.as_bytes()[..REQUEST.len() - 1])
        .unwrap();
    let mut upgraded = Client::open(socket(&gateway));
    still_serves(&gateway);
    let mut answer = Vec::new();
    for stream in [&mut slow, &mut silent] {
        stream.read_to_end(&mut answer).unwrap();
        assert!(answer.is_empty());
    }
    // Not even a frame's header.
    let stream = upgraded.websocket.get_mut();
    stream.read_to_end(&mut answer).unwrap();
    assert!(answer.is_empty());

    let mut stream = socket(&gateway);
    for byte in REQUEST.as_bytes() {
        stream.write_all(&[*byte]).unwrap();
    }
    let mut status = [0; 12];
    stream.read_exact(&mut status).unwrap();
    assert_eq!(&status, b"HTTP/1.1 101");
}

#[test]
fn the_clients_and_connections_of_each_listener_are_counted() {
    let gateway = home().start();
    let _tcp = crate::wire::Wire::connect(&gateway, "tcp");
    let _browser = Client::connect(socket(&gateway), "browser");
    answer(&gateway, b"nonsense\r\n\r\n");
    let (_, metrics) = gateway.http("/metrics");
    for sample in [
        "headgate_mqtt_clients{listener=\"tcp\"} 1",
        "headgate_mqtt_clients{listener=\"ws\"} 1",
        "headgate_mqtt_connections_total{listener=\"tcp\",result=\"accepted\"} 1",
        "headgate_mqtt_connections_total{listener=\"ws\",result=\"accepted\"} 2",
        "headgate_mqtt_connections_total{listener=\"ws\",result=\"refused\"} 1",
    ] {
        assert!(metrics.contains(sample), "{sample} is not in:\n{metrics}");
    }
    let status = gateway.status();
    assert_eq!(status["broker"]["accepted"], 3);
    assert_eq!(status["broker"]["refused"], 1);
}
