//! The way from a gateway to servers: TCP connections that are handed on, until somebody cuts it.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// How long a server has to accept: on the loopback network one that runs does at once.
const CONNECTING: Duration = Duration::from_secs(5);

/// Listens on an address of its own and hands on to the first of some servers that accepts.
pub struct Link {
    address: SocketAddr,
    way: Arc<Way>,
    listening: Option<JoinHandle<()>>,
}

struct Way {
    servers: Vec<SocketAddr>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    condition: Condition,
    /// Both ends of each connection.
    sockets: Vec<TcpStream>,
    accepted: u64,
}

#[derive(Clone, Copy, PartialEq)]
enum Condition {
    Open,
    /// Whoever connects is let in; nothing goes on from there.
    Stalled,
    /// What servers say goes no further; they get what is said to them.
    Deaf,
    /// The other way round.
    Mute,
    /// Nobody gets in.
    Cut,
}

impl Link {
    /// With port 0, takes a free one.
    pub fn new(address: SocketAddr, servers: Vec<SocketAddr>) -> Link {
        let state = State {
            condition: Condition::Cut,
            sockets: Vec::new(),
            accepted: 0,
        };
        let way = Arc::new(Way {
            servers,
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        let mut link = Link {
            address,
            way,
            listening: None,
        };
        link.heal();
        link
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn url(&self) -> String {
        format!("nats://{}", self.address)
    }

    /// Connections that have come so far.
    pub fn accepted(&self) -> u64 {
        self.way.state.lock().accepted
    }

    /// Ends all connections, and lets nobody in.
    pub fn cut(&mut self) {
        let mut state = self.way.state.lock();
        state.condition = Condition::Cut;
        for socket in state.sockets.drain(..) {
            // It may have ended by itself.
            let _ = socket.shutdown(Shutdown::Both);
        }
        self.way.changed.notify_all();
        drop(state);
        if let Some(listening) = self.listening.take() {
            // Wakes it up.
            let _ = TcpStream::connect(self.address);
            listening.join().expect("it does not panic");
        }
    }

    /// Lets connections stand, and come, and hands on nothing: what a firewall or a hung router does.
    pub fn stall(&mut self) {
        self.be(Condition::Stalled);
    }

    /// Holds back what servers say, and nothing else.
    pub fn deafen(&mut self) {
        self.be(Condition::Deaf);
    }

    /// Holds back what is said to servers, and nothing else.
    pub fn mute(&mut self) {
        self.be(Condition::Mute);
    }

    /// All as before. What was stalled goes on.
    pub fn heal(&mut self) {
        self.be(Condition::Open);
    }

    fn be(&mut self, condition: Condition) {
        self.way.state.lock().condition = condition;
        self.way.changed.notify_all();
        if self.listening.is_none() {
            let listener = TcpListener::bind(self.address).unwrap();
            self.address = listener.local_addr().unwrap();
            let way = self.way.clone();
            self.listening = Some(thread::spawn(move || way.listen(&listener)));
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.cut();
    }
}

impl Way {
    fn listen(self: Arc<Self>, listener: &TcpListener) {
        while let Ok((socket, _)) = listener.accept() {
            let mut state = self.state.lock();
            if state.condition == Condition::Cut {
                return;
            }
            state.accepted += 1;
            state.sockets.push(socket.try_clone().unwrap());
            let way = self.clone();
            thread::spawn(move || way.serve(socket));
        }
    }

    /// Waits while nothing goes this way; whether anything may then.
    fn is_open(&self, to_servers: bool) -> bool {
        let mut state = self.state.lock();
        self.changed
            .wait_while(&mut state, |state| match state.condition {
                Condition::Stalled => true,
                Condition::Deaf => !to_servers,
                Condition::Mute => to_servers,
                Condition::Open | Condition::Cut => false,
            });
        state.condition != Condition::Cut
    }

    fn serve(self: Arc<Self>, near: TcpStream) {
        let far = self.servers.iter().find_map(|server| {
            if !self.is_open(true) {
                return None;
            }
            TcpStream::connect_timeout(server, CONNECTING).ok()
        });
        if let Some(far) = far {
            let mut state = self.state.lock();
            if state.condition == Condition::Cut {
                return;
            }
            state.sockets.push(far.try_clone().unwrap());
            drop(state);
            let (way, from, to) = (
                self.clone(),
                far.try_clone().unwrap(),
                near.try_clone().unwrap(),
            );
            let back = thread::spawn(move || way.hand_on(from, to, false));
            self.hand_on(near.try_clone().unwrap(), far, true);
            back.join().expect("it does not panic");
        }
        // The list of sockets has one more handle of it.
        let _ = near.shutdown(Shutdown::Both);
    }

    fn hand_on(&self, mut from: TcpStream, mut to: TcpStream, to_servers: bool) {
        let _ = to.set_nodelay(true);
        let mut bytes = vec![0; 64 * 1024];
        loop {
            match from.read(&mut bytes) {
                Ok(count) if count > 0 => {
                    if !self.is_open(to_servers) || to.write_all(&bytes[..count]).is_err() {
                        break;
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                _ => break,
            }
        }
        // One end is gone, so both are.
        for socket in [from, to] {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}
