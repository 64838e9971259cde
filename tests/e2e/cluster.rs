//! Several gateways as one site, on real servers: who leads, who acts for which topics, and that there is
//! never more than one, whatever happens to them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use headgate::cluster::node::Node;
use headgate::cluster::shards::shard_of;
use headgate::cluster::{Cluster, Config};
use serde_json::json;
use tokio::runtime::{Builder, Runtime};

use crate::nats::{Link, Program, Servers};

const LEASE: Duration = Duration::from_secs(2);
const SHARDS: u16 = 8;
/// Longer than anything here takes on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(60);
const BUCKET: &str = "KV_HEADGATE_hall-3";

/// A gateway's part in the cluster, with a thread of its own, as a process has it.
struct Gateway {
    runtime: Option<Runtime>,
    cluster: Option<Cluster>,
    node: Arc<Node>,
}

fn config(name: &str) -> Config {
    Config {
        site: "hall-3".into(),
        gateway: name.into(),
        host: format!("host of {name}"),
        shards: SHARDS,
        lease: LEASE,
        replicas: 1,
    }
}

impl Gateway {
    fn start(name: &str, servers: &Servers) -> Gateway {
        Gateway::with(config(name), servers.urls())
    }

    fn with(config: Config, urls: Vec<String>) -> Gateway {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let cluster = runtime.block_on(async {
            let options = async_nats::ConnectOptions::new().retry_on_initial_connect();
            let options = options.reconnect_delay_callback(|_| Duration::from_millis(50));
            Cluster::start(config, options.connect(urls).await.unwrap()).unwrap()
        });
        let node = cluster.node().clone();
        Gateway {
            runtime: Some(runtime),
            cluster: Some(cluster),
            node,
        }
    }

    fn cluster(&self) -> &Cluster {
        self.cluster.as_ref().expect("it runs")
    }

    fn owned(&self) -> Vec<u16> {
        self.cluster().status().owned
    }

    fn members(&self) -> Vec<String> {
        let members = self.cluster().status().members;
        members
            .into_iter()
            .filter(|member| member.alive)
            .map(|member| member.gateway)
            .collect()
    }

    fn problem(&self) -> String {
        self.cluster().status().problem.unwrap_or_default()
    }

    /// Ends as a process does that is killed: nothing more is sent.
    fn kill(mut self) {
        self.runtime.take().expect("it runs").shutdown_background();
    }

    fn shutdown(mut self) {
        let (runtime, cluster) = (self.runtime.take(), self.cluster.take());
        runtime
            .expect("it runs")
            .block_on(cluster.expect("it runs").shutdown());
    }

    /// Stands still, as a process does that was stopped, until what is returned is dropped.
    fn pause(&self) -> std::sync::mpsc::Sender<()> {
        let (resume, paused) = std::sync::mpsc::channel::<()>();
        let (stands, still) = std::sync::mpsc::channel();
        self.runtime.as_ref().expect("it runs").spawn(async move {
            stands.send(()).unwrap();
            let _ = paused.recv();
        });
        still.recv().unwrap();
        resume
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            let _entered = runtime.enter();
            drop(self.cluster.take());
            drop(_entered);
            runtime.shutdown_background();
        }
    }
}

/// Looks all the time who leads: never two at once, and tokens grow.
struct Watchdog {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<u64>>>,
}

impl Watchdog {
    fn over(gateways: &[&Gateway]) -> Watchdog {
        let nodes: Vec<Arc<Node>> = gateways
            .iter()
            .map(|gateway| gateway.node.clone())
            .collect();
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = stop.clone();
        let mut tokens = Vec::new();
        look(&nodes, &mut tokens);
        let thread = thread::spawn(move || {
            loop {
                let is_last = stopping.load(Ordering::Relaxed);
                look(&nodes, &mut tokens);
                if is_last {
                    return tokens;
                }
                thread::sleep(Duration::from_millis(1));
            }
        });
        Watchdog {
            stop,
            thread: Some(thread),
        }
    }

    /// The tokens with which somebody has led.
    fn tokens(mut self) -> Vec<u64> {
        self.stop.store(true, Ordering::Relaxed);
        let tokens = self.thread.take().expect("it runs").join().unwrap();
        assert!(tokens.is_sorted_by(|one, next| one < next), "{tokens:?}");
        tokens
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Notes who leads now.
fn look(nodes: &[Arc<Node>], tokens: &mut Vec<u64>) {
    for node in nodes {
        let Some(token) = node.leads() else { continue };
        for other in nodes.iter().filter(|other| !Arc::ptr_eq(node, other)) {
            // It may have been the other's turn when the first one was asked.
            let both = other.leads().filter(|_| node.leads() == Some(token));
            assert_eq!(both, None, "two lead, one with token {token}");
        }
        if tokens.last() != Some(&token) {
            tokens.push(token);
        }
    }
}

/// How long it takes.
fn until(what: &str, mut is_so: impl FnMut() -> bool) -> Duration {
    let begun = Instant::now();
    while !is_so() {
        assert!(
            begun.elapsed() < PATIENCE,
            "{what}: not within {PATIENCE:?}"
        );
        thread::sleep(Duration::from_millis(2));
    }
    begun.elapsed()
}

fn leads(gateway: &Gateway) -> bool {
    gateway.node.leads().is_some()
}

/// Waits until all shards are divided among these, and they agree on who leads.
fn settled(gateways: &[&Gateway]) {
    until("one leads, and each shard is somebody's", || {
        let shards: Vec<u16> = gateways
            .iter()
            .flat_map(|gateway| gateway.owned())
            .collect();
        let distinct: BTreeSet<u16> = shards.iter().copied().collect();
        let alike = gateways
            .iter()
            .all(|gateway| gateway.members().len() == gateways.len());
        alike
            && gateways.iter().filter(|gateway| leads(gateway)).count() == 1
            && shards.len() == usize::from(SHARDS)
            && distinct.len() == shards.len()
    });
}

#[test]
fn when_the_leader_is_killed_another_leads_within_two_leases_and_has_its_shards() {
    let servers = Servers::single();
    let (a, b) = (Gateway::start("a", &servers), Gateway::start("b", &servers));
    settled(&[&a, &b]);
    assert!(
        !a.owned().is_empty() && !b.owned().is_empty(),
        "both do something"
    );
    let watchdog = Watchdog::over(&[&a, &b]);
    let (first, second) = if leads(&a) { (a, b) } else { (b, a) };
    first.kill();
    let took = until("another leads", || leads(&second));
    assert!(took <= 2 * LEASE, "{took:?}");
    settled(&[&second]);
    let tokens = watchdog.tokens();
    assert_eq!(tokens.len(), 2, "{tokens:?}");
}

#[test]
fn when_the_leader_leaves_in_order_another_leads_at_once() {
    let servers = Servers::single();
    let (a, b) = (Gateway::start("a", &servers), Gateway::start("b", &servers));
    settled(&[&a, &b]);
    let (first, second) = if leads(&a) { (a, b) } else { (b, a) };
    let watchdog = Watchdog::over(&[&first, &second]);
    first.shutdown();
    let took = until("another leads", || leads(&second));
    assert!(took < LEASE / 2, "{took:?}");
    settled(&[&second]);
    let tokens = watchdog.tokens();
    assert_eq!(tokens.len(), 2, "{tokens:?}");
}

#[test]
fn who_joins_gets_a_share_of_the_shards_and_nobody_has_the_same() {
    let servers = Servers::single();
    let a = Gateway::start("a", &servers);
    settled(&[&a]);
    let b = Gateway::start("b", &servers);
    settled(&[&a, &b]);
    let c = Gateway::start("c", &servers);
    settled(&[&a, &b, &c]);
    let before = (a.owned(), b.owned());
    assert!(!c.owned().is_empty());
    c.shutdown();
    settled(&[&a, &b]);
    for (before, now) in [(before.0, a.owned()), (before.1, b.owned())] {
        assert!(
            before.iter().all(|shard| now.contains(shard)),
            "{before:?} {now:?}"
        );
    }
}

#[test]
fn a_leader_that_stood_still_wakes_up_and_does_not_lead() {
    let servers = Servers::single();
    let (a, b) = (Gateway::start("a", &servers), Gateway::start("b", &servers));
    settled(&[&a, &b]);
    let (first, second) = if leads(&a) { (a, b) } else { (b, a) };
    let watchdog = Watchdog::over(&[&first, &second]);
    let paused = first.pause();
    until("another leads", || leads(&second));
    assert!(!leads(&first), "although its own task has not run");
    drop(paused);
    settled(&[&first, &second]);
    assert!(leads(&second));
    let tokens = watchdog.tokens();
    assert_eq!(tokens.len(), 2, "{tokens:?}");
}

#[test]
fn a_bucket_that_is_deleted_is_made_anew_and_tokens_still_grow() {
    let servers = Servers::single();
    let client = servers.client();
    let (a, b) = (Gateway::start("a", &servers), Gateway::start("b", &servers));
    settled(&[&a, &b]);
    let watchdog = Watchdog::over(&[&a, &b]);
    let before = a.node.leads().or(b.node.leads()).expect("one leads");
    client.delete(BUCKET);
    until("a new bucket", || client.stream(BUCKET).is_some());
    settled(&[&a, &b]);
    let (first, second) = if leads(&a) { (a, b) } else { (b, a) };
    first.shutdown();
    until("another leads", || leads(&second));
    assert!(second.node.leads() > Some(before));
    let tokens = watchdog.tokens();
    assert!(tokens.len() >= 2, "{tokens:?}");
}

#[test]
fn two_gateways_with_one_name_are_both_told_and_the_later_one_stands_back() {
    let servers = Servers::single();
    let first = Gateway::start("a", &servers);
    settled(&[&first]);
    let second = Gateway::start("a", &servers);
    let third = Gateway::start("b", &servers);
    for gateway in [&first, &second, &third] {
        until("it is told", || {
            gateway
                .problem()
                .contains("two gateways of this site have the name a")
        });
    }
    assert!(!third.cluster().status().stands_back);
    until("only the later one stands back", || {
        second.cluster().status().stands_back && !first.cluster().status().stands_back
    });
    assert!(leads(&first) && !leads(&second) && second.owned().is_empty());
    first.kill();
    let took = until("another one leads", || leads(&second) || leads(&third));
    assert!(took <= 2 * LEASE, "{took:?}");
    settled(&[&second, &third]);
    for gateway in [&second, &third] {
        until("all is well", || {
            !gateway.problem().contains("two gateways")
        });
    }
}

#[test]
fn a_gateway_that_comes_back_after_a_crash_is_no_second_one() {
    let servers = Servers::single();
    let (first, other) = (Gateway::start("a", &servers), Gateway::start("b", &servers));
    settled(&[&first, &other]);
    first.kill();
    let again = Gateway::start("a", &servers);
    until("it has its share", || {
        for gateway in [&again, &other] {
            assert!(!gateway.problem().contains("two gateways"));
        }
        !again.owned().is_empty()
    });
    assert_eq!(again.cluster().status().members.len(), 2);
}

#[test]
fn a_gateway_that_divides_topics_otherwise_stands_back_and_says_so() {
    let servers = Servers::single();
    let first = Gateway::start("a", &servers);
    settled(&[&first]);
    let other = Config {
        shards: 3,
        ..config("b")
    };
    let second = Gateway::with(other, servers.urls());
    until("it is told", || {
        second.problem().contains("into 8 shards, this one into 3")
    });
    assert!(second.cluster().status().stands_back);
    assert_eq!(first.owned().len(), usize::from(SHARDS));
}

#[test]
fn a_gateway_that_is_cut_off_is_alone_and_takes_part_again_when_the_link_returns() {
    let servers = Servers::single();
    let mut link = Link::new(servers.spare_address(0), servers.addresses());
    let a = Gateway::with(config("a"), vec![link.url()]);
    until("it leads", || leads(&a));
    let b = Gateway::start("b", &servers);
    settled(&[&a, &b]);
    let watchdog = Watchdog::over(&[&a, &b]);
    for cut in [Link::cut, Link::stall] {
        cut(&mut link);
        until("it is alone", || {
            a.node.is_alone() && !leads(&a) && a.owned().is_empty()
        });
        until("the other does it all", || {
            leads(&b) && b.owned().len() == usize::from(SHARDS)
        });
        until("it says why", || !a.problem().is_empty());
        link.heal();
        settled(&[&a, &b]);
        assert_eq!(a.problem(), "");
    }
    watchdog.tokens();
}

#[test]
fn on_three_servers_any_of_them_may_die() {
    let mut servers = Servers::cluster();
    let client = servers.client();
    let replicated = |name| Config {
        replicas: 3,
        ..config(name)
    };
    let a = Gateway::with(replicated("a"), servers.urls());
    let b = Gateway::with(replicated("b"), servers.urls());
    settled(&[&a, &b]);
    let watchdog = Watchdog::over(&[&a, &b]);
    for _ in 0..2 {
        let victim = servers.leader_of(&client, BUCKET);
        servers.kill(victim);
        until("another server leads", || {
            servers.leader_of(&client, BUCKET) != victim
        });
        settled(&[&a, &b]);
        servers.restart(victim);
        servers.until_ready();
        settled(&[&a, &b]);
    }
    watchdog.tokens();
}

#[test]
fn what_is_wrong_with_the_bucket_is_told() {
    let servers = Servers::single();
    let many = Config {
        replicas: 3,
        ..config("a")
    };
    let a = Gateway::with(many, servers.urls());
    until("it is told", || a.problem().contains("cluster.replicas"));
    assert!(
        a.problem()
            .contains("HEADGATE_hall-3 with 3 replicas can't be made"),
        "{}",
        a.problem()
    );

    servers.client().create(&json!({
        "name": "KV_HEADGATE_hall-4", "subjects": ["$KV.HEADGATE_hall-4.>"], "max_msgs_per_subject": 1,
        "max_age": 5_000_000_000_u64, "storage": "memory"
    }));
    let b = Gateway::with(
        Config {
            site: "hall-4".into(),
            ..config("b")
        },
        servers.urls(),
    );
    until("it is told", || {
        b.problem().contains("forgets entries after 5s")
    });
}

#[test]
fn the_oldest_server_that_is_supported_will_do() {
    let servers = Servers::start(Program::Old, 1, "");
    let (a, b) = (Gateway::start("a", &servers), Gateway::start("b", &servers));
    settled(&[&a, &b]);
}

#[test]
fn a_server_that_partitions_topics_makes_the_same_shards() {
    let mapping =
        r#"mappings { "in.*.*": "out.{{partition(8,1,2)}}.{{wildcard(1)}}.{{wildcard(2)}}" }"#;
    let servers = Servers::start(Program::New, 1, mapping);
    let client = servers.client();
    client.create(&json!({ "name": "OUT", "subjects": ["out.>"], "storage": "memory" }));
    let topics = (0..50).map(|number| [format!("line{number}"), "temperature".to_owned()]);
    let topics: Vec<[String; 2]> = topics.collect();
    for topic in &topics {
        client.publish(&format!("in.{}", topic.join(".")), b"");
    }
    for (stored, topic) in client.contents("OUT").iter().zip(&topics) {
        let shard = shard_of(topic, SHARDS);
        assert_eq!(stored.subject, format!("out.{shard}.{}", topic.join(".")));
    }
    assert_eq!(client.messages("OUT"), 50);
}
