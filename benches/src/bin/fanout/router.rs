//! Fan-out through rumqttd's router: a `Link` a client.

use std::time::{Duration, Instant};

use bytes::Bytes;
use headgate::event::{Topic, TopicFilter};
use rumqttd::local::{LinkBuilder, LinkRx, LinkTx};
use rumqttd::protocol::{Disconnect, DisconnectReasonCode, Packet, Publish};
use rumqttd::{Notification, Router, RouterConfig};

use crate::scenarios::{Hub, Publisher, Subscriber};

/// Takes a client in by its name.
type Connect = dyn Fn(&str) -> (LinkTx, LinkRx);

pub struct RouterHub {
    segment_size: usize,
    segment_count: usize,
    /// The type of the router's channel is private to rumqttd, hence a closure.
    connect: Box<Connect>,
}

impl RouterHub {
    pub fn new(segment_size: usize, segment_count: usize) -> Self {
        let router = Router::new(
            0,
            RouterConfig {
                max_connections: 12_000,
                max_outgoing_packet_count: 200,
                max_segment_size: segment_size,
                max_segment_count: segment_count,
                ..RouterConfig::default()
            },
        )
        .spawn();
        RouterHub {
            segment_size,
            segment_count,
            connect: Box::new(move |name| {
                let (sender, receiver, _) = LinkBuilder::new(name, router.clone())
                    .build()
                    .expect("the router takes in clients below its cap");
                (sender, receiver)
            }),
        }
    }
}

impl Hub for RouterHub {
    type Publisher = LinkPublisher;
    type Subscriber = LinkSubscriber;

    fn publisher(&self, name: &str) -> LinkPublisher {
        let (sender, receiver) = (self.connect)(name);
        LinkPublisher {
            sender,
            _receiver: receiver,
        }
    }

    fn subscriber(&self, name: &str, filter: &TopicFilter) -> LinkSubscriber {
        let (sender, receiver) = (self.connect)(name);
        let mut subscriber = LinkSubscriber {
            sender,
            receiver,
            subscribed: 0,
            unsubscribed: 0,
        };
        subscriber.subscribe(filter);
        subscriber
    }

    /// The router drops what does not fit into a filter's segments, so the publisher has to look
    /// after that itself. A message counts with its topic; half of the segments is a safe distance.
    fn lossless_window(&self) -> Option<u64> {
        Some((self.segment_size * self.segment_count / 2 / 140).clamp(1, 20_000) as u64)
    }
}

pub struct LinkPublisher {
    sender: LinkTx,
    _receiver: LinkRx,
}

impl Publisher for LinkPublisher {
    /// Puts the batch into the link's buffer and wakes the router once.
    fn publish(&mut self, batch: &mut Vec<(Topic, Bytes)>) {
        let Some((topic, payload)) = batch.pop() else {
            return;
        };
        self.sender
            .buffer()
            .extend(batch.drain(..).map(|(topic, payload)| {
                Packet::Publish(Publish::new(topic.as_bytes().clone(), payload, false), None)
            }));
        self.sender
            .publish(topic.as_bytes().clone(), payload)
            .expect("the router runs");
    }

    fn close(mut self) {
        let farewell = Packet::Disconnect(
            Disconnect {
                reason_code: DisconnectReasonCode::NormalDisconnection,
            },
            None,
        );
        self.sender.buffer().push_back(farewell);
        // Only sends wake the router; what follows a disconnect is not looked at.
        let _ = self.sender.publish("farewell", Bytes::new());
    }
}

pub struct LinkSubscriber {
    sender: LinkTx,
    receiver: LinkRx,
    subscribed: usize,
    unsubscribed: usize,
}

impl LinkSubscriber {
    /// Takes one notification in; tells whether there was one before `deadline`.
    fn step(&mut self, deadline: Instant, each: &mut dyn FnMut(&[u8])) -> bool {
        use rumqttd::Notification::{DeviceAck, Forward, Unschedule};
        match self.receiver.recv_deadline(deadline) {
            Ok(Some(Forward(forward))) => each(&forward.publish.payload),
            Ok(Some(Unschedule)) => self.receiver.ready().expect("the router runs"),
            Ok(Some(DeviceAck(ack))) => match Packet::from(ack) {
                Packet::SubAck(..) => self.subscribed += 1,
                Packet::UnsubAck(..) => self.unsubscribed += 1,
                _ => {}
            },
            Ok(Some(Notification::Disconnect(..))) => panic!("the router threw the link out"),
            Ok(_) => {}
            Err(_) => return false,
        }
        true
    }
}

impl Subscriber for LinkSubscriber {
    fn receive(&mut self, patience: Duration, each: &mut dyn FnMut(&[u8])) -> bool {
        self.step(Instant::now() + patience, each)
    }

    fn subscribe(&mut self, filter: &TopicFilter) {
        let target = self.subscribed + 1;
        self.sender
            .subscribe(filter.as_str())
            .expect("the router runs");
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.subscribed < target {
            assert!(self.step(deadline, &mut |_| {}), "no answer to a subscribe");
        }
    }

    fn unsubscribe(&mut self, filter: &TopicFilter) {
        let target = self.unsubscribed + 1;
        self.sender
            .unsubscribe(filter.as_str())
            .expect("the router runs");
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.unsubscribed < target {
            assert!(
                self.step(deadline, &mut |_| {}),
                "no answer to an unsubscribe"
            );
        }
    }
}
