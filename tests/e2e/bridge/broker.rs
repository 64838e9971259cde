//! The other end of a link: mosquitto, a client that looks at what a broker has, and a broker that does what it must
//! not.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;

use bytes::BytesMut;
use parking_lot::Mutex;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{ConnAck, ConnectReturnCode, Packet, Publish};
use rumqttc::v5::{Client, Event, MqttOptions};
use tempfile::TempDir;

use crate::gateway::{PATIENCE, eventually};

/// An address that nobody listens on.
pub fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

/// mosquitto, as a broker.
pub struct Mosquitto {
    folder: TempDir,
    address: SocketAddr,
    process: Child,
}

impl Mosquitto {
    /// `more` goes into its configuration; `{folder}` is where the files are that `prepare` makes.
    pub fn start(more: &str, prepare: impl FnOnce(&Path)) -> Mosquitto {
        let folder = tempfile::tempdir().unwrap();
        prepare(folder.path());
        let address = free_address();
        let path = folder.path().display().to_string();
        let config = format!(
            "listener {} 127.0.0.1\n{}\n",
            address.port(),
            more.replace("{folder}", &path)
        );
        fs::write(folder.path().join("mosquitto.conf"), config).unwrap();
        let process = Mosquitto::run(&folder);
        let mut mosquitto = Mosquitto {
            folder,
            address,
            process,
        };
        mosquitto.until_up();
        mosquitto
    }

    pub fn open() -> Mosquitto {
        Mosquitto::start("allow_anonymous true", |_| {})
    }

    fn run(folder: &TempDir) -> Child {
        let program = match Path::new("/usr/sbin/mosquitto") {
            path if path.exists() => path,
            _ => Path::new("mosquitto"),
        };
        let log = fs::File::create(folder.path().join("log")).unwrap();
        Command::new(program)
            .arg("-c")
            .arg(folder.path().join("mosquitto.conf"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| {
                panic!("these tests need mosquitto (on Debian, as root: apt-get install mosquitto): {error}")
            })
    }

    fn until_up(&mut self) {
        eventually("mosquitto listens", || {
            if let Some(status) = self.process.try_wait().unwrap() {
                let log = fs::read_to_string(self.folder.path().join("log")).unwrap();
                panic!("mosquitto has ended with {status}: {log}");
            }
            TcpStream::connect(self.address).ok()
        });
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn url(&self) -> String {
        format!("mqtt://{}", self.address)
    }

    /// As `kill -9` does it.
    pub fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    pub fn start_again(&mut self) {
        self.process = Mosquitto::run(&self.folder);
        self.until_up();
    }
}

impl Drop for Mosquitto {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[derive(Clone, Debug)]
pub struct Message {
    pub topic: String,
    pub payload: String,
    pub retain: bool,
    pub properties: Vec<(String, String)>,
}

impl Message {
    fn of(publish: &Publish) -> Message {
        let properties = publish.properties.as_ref();
        Message {
            topic: String::from_utf8(publish.topic.to_vec()).unwrap(),
            payload: String::from_utf8(publish.payload.to_vec()).unwrap(),
            retain: publish.retain,
            properties: properties.map_or_else(Vec::new, |all| all.user_properties.clone()),
        }
    }

    pub fn property(&self, name: &str) -> Option<&str> {
        let mut all = self.properties.iter();
        all.find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }
}

/// A client that gets all on `filter`.
pub struct Observer {
    client: Client,
    seen: Arc<Mutex<Vec<Message>>>,
}

impl Observer {
    pub fn new(address: SocketAddr, filter: &str) -> Observer {
        let id = format!("observer{}", fastrand::u64(..));
        let mut options = MqttOptions::new(id, address.ip().to_string(), address.port());
        options.set_clean_start(true);
        let (client, mut connection) = Client::new(options, 100);
        client.subscribe(filter, QoS::AtLeastOnce).unwrap();
        while !matches!(
            connection.recv_timeout(PATIENCE),
            Ok(Ok(Event::Incoming(Packet::SubAck(_))))
        ) {}
        let seen = Arc::<Mutex<Vec<Message>>>::default();
        let all = seen.clone();
        thread::spawn(move || {
            while let Ok(Ok(event)) = connection.recv() {
                if let Event::Incoming(Packet::Publish(publish)) = event {
                    all.lock().push(Message::of(&publish));
                }
            }
        });
        Observer { client, seen }
    }

    pub fn publish(&self, topic: &str, payload: &str) {
        self.client
            .publish(topic, QoS::AtLeastOnce, false, payload.to_owned())
            .unwrap();
    }

    pub fn seen(&self) -> Vec<Message> {
        self.seen.lock().clone()
    }

    /// What has come when so many have.
    pub fn messages(&self, count: usize) -> Vec<Message> {
        eventually("messages at the broker", || {
            let seen = self.seen();
            (seen.len() >= count).then_some(seen)
        })
    }

    pub fn payloads(&self, count: usize) -> Vec<String> {
        let messages = self.messages(count).into_iter();
        messages.map(|message| message.payload).collect()
    }
}

/// What a test has a broker do with a message.
pub enum Answer {
    /// PUBACK with this reason.
    PubAck(u8),
    Silence,
    /// DISCONNECT with this reason, and the end of the connection.
    Disconnect(u8),
}

/// A broker that does what a test tells it to. It takes one connection after the other.
pub struct OddBroker {
    address: SocketAddr,
    /// The payloads that it has acknowledged with 0, in their order.
    taken: Arc<Mutex<Vec<String>>>,
}

impl OddBroker {
    pub fn start(answer: impl FnMut(&Message) -> Answer + Send + 'static) -> OddBroker {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let broker = OddBroker {
            address: listener.local_addr().unwrap(),
            taken: Arc::default(),
        };
        let taken = broker.taken.clone();
        let mut answer = answer;
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                // Whoever is gone is gone.
                let _ = serve(stream, &mut answer, &taken);
            }
        });
        broker
    }

    /// One that answers each CONNECT with these bytes.
    pub fn that_greets_with(bytes: &'static [u8]) -> OddBroker {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                let mut input = [0; 4096];
                let _ = stream.read(&mut input);
                let _ = stream.write_all(bytes);
            }
        });
        OddBroker {
            address,
            taken: Arc::default(),
        }
    }

    pub fn url(&self) -> String {
        format!("mqtt://{}", self.address)
    }

    pub fn taken(&self, count: usize) -> Vec<String> {
        eventually("messages at the odd broker", || {
            let taken = self.taken.lock().clone();
            (taken.len() >= count).then_some(taken)
        })
    }
}

fn serve(
    mut stream: TcpStream,
    answer: &mut impl FnMut(&Message) -> Answer,
    taken: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut input = BytesMut::new();
    loop {
        let mut output = BytesMut::new();
        while let Ok(packet) = Packet::read(&mut input, None) {
            match packet {
                Packet::Connect(..) => {
                    let answer = ConnAck {
                        session_present: false,
                        code: ConnectReturnCode::Success,
                        properties: None,
                    };
                    Packet::ConnAck(answer).write(&mut output, None).unwrap();
                }
                Packet::PingReq(_) => output.extend_from_slice(&[0xd0, 0]),
                Packet::Publish(publish) => {
                    let message = Message::of(&publish);
                    match answer(&message) {
                        Answer::PubAck(code) => {
                            let [high, low] = publish.pkid.to_be_bytes();
                            output.extend_from_slice(&[0x40, 4, high, low, code, 0]);
                            if code == 0 {
                                taken.lock().push(message.payload);
                            }
                        }
                        Answer::Silence => {}
                        Answer::Disconnect(code) => {
                            output.extend_from_slice(&[0xe0, 2, code, 0]);
                            return stream.write_all(&output);
                        }
                    }
                }
                Packet::Disconnect(_) => return Ok(()),
                other => panic!("{other:?}"),
            }
        }
        stream.write_all(&output)?;
        let mut bytes = [0; 65_536];
        let count = stream.read(&mut bytes)?;
        if count == 0 {
            return Ok(());
        }
        input.extend_from_slice(&bytes[..count]);
    }
}
