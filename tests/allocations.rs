//! An event that comes over TCP ingest costs no allocation on its way to an outlet; only reads and chunks do.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use headgate::broker::Broker;
use headgate::broker::access::Access;
use headgate::config::{Config, Source};
use headgate::dead_letters::DeadLetters;
use headgate::event::{Batch, TopicFilter};
use headgate::gateway;
use headgate::ingest::frame::{Hello, Priority, write_frame};
use headgate::ingest::{Ingest, Listener};
use headgate::pipeline::{Offer, Outlet, Pipeline, PipelineConfig, Route, Routes};
use headgate::store::{Store, StoreConfig};
use tokio::net::TcpListener;

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: all is left to the system's allocator.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

/// Counts what it is offered, and drops it.
#[derive(Default)]
struct NoOp(AtomicU64);

impl Outlet for NoOp {
    fn name(&self) -> &str {
        "no-op"
    }

    fn is_idle(&self) -> bool {
        false
    }

    fn offer(&self, batch: Batch) -> Offer {
        self.0.fetch_add(batch.len() as u64, Ordering::SeqCst);
        Offer::Taken
    }
}

#[test]
fn an_event_costs_no_allocation() {
    let folder = tempfile::tempdir().unwrap();
    let source = Source {
        file: None,
        system_file: None,
        env: vec![("HOME".into(), folder.path().into())],
        overrides: Vec::new(),
        superuser: false,
    };
    let config = Config::load(source).unwrap().config;
    let outlet = Arc::<NoOp>::default();
    let routes = Arc::<Routes>::default();
    routes.replace(
        "no-op",
        vec![Route {
            filter: TopicFilter::new("plant/#").unwrap(),
            outlet: outlet.clone(),
        }],
    );
    let letters = Arc::new(DeadLetters::new(Instant::now()));
    let pipeline = Pipeline::start(PipelineConfig::default(), routes, letters.clone()).unwrap();
    let pipeline = Arc::new(pipeline);
    let store = Store::open(&StoreConfig {
        path: folder.path().join("store"),
        map_bytes: config.store.max_bytes,
    });
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let (_broker, ingest) = runtime.block_on(async {
        let broker = Broker::start(
            gateway::broker_config(&config),
            Access::load(gateway::access_config(&config)).unwrap(),
            &[],
            None,
            pipeline.clone(),
            None,
            store.unwrap(),
            letters,
        )
        .unwrap();
        let listener = Listener {
            socket: TcpListener::bind("127.0.0.1:0").await.unwrap(),
            tls: None,
        };
        let config = gateway::ingest_config(&config.ingest);
        let ingest = Ingest::start(config, vec![listener], broker.door()).unwrap();
        (broker, ingest)
    });
    let mut socket = TcpStream::connect(ingest.status().listen.unwrap()).unwrap();
    let mut hello = Vec::new();
    let (name, token) = ("counted".to_owned(), String::new());
    Hello { name, token }.write(&mut hello).unwrap();
    socket.write_all(&hello).unwrap();
    socket.read_exact(&mut [0; 5]).unwrap();

    const COUNT: u64 = 100_000;
    let mut frames = Vec::new();
    for id in 1..=2 * COUNT {
        let topic = format!("plant/line{}/temperature_f", id % 16);
        let (topic, payload) = (topic.as_bytes(), [b'x'; 100]);
        write_frame(Priority::Medium, Some(id), topic, &payload, &mut frames);
    }
    let (first, second) = frames.split_at(frames.len() / 2);
    let mut send = |frames: &[u8], reached: u64| {
        let before = ALLOCATIONS.load(Ordering::SeqCst);
        socket.write_all(frames).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while outlet.0.load(Ordering::SeqCst) < reached {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
        ALLOCATIONS.load(Ordering::SeqCst) - before
    };
    // Topics are met, and buffers grow.
    send(first, COUNT);
    let allocations = send(second, 2 * COUNT);
    ingest.close();
    // A read has some 480 frames, and a batch has 64: their buffers and lists are what counts.
    let per_event = allocations as f64 / COUNT as f64;
    println!("{per_event} allocations an event");
    assert!(per_event < 0.08, "{per_event} allocations an event");
}
