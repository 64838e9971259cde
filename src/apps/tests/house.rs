//! A gateway's apps without the gateway: a store, routes, and a sink that remembers.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tempfile::TempDir;

use crate::apps::{AppInfo, AppState, Apps, AppsConfig, Compiler, Defaults};
use crate::dead_letters::DeadLetters;
use crate::event::{Event, Topic};
use crate::pipeline::{NotJournaled, Offer, Routes, Sink};
use crate::store::{Store, StoreConfig, StoreError};

/// Longer than anything here takes on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(30);

pub(super) struct House {
    pub(super) folder: Arc<TempDir>,
    pub(super) routes: Arc<Routes>,
    pub(super) sink: Arc<Remembering>,
    /// How often an outlet has told of progress.
    pub(super) progress: Arc<AtomicUsize>,
    pub(super) dead_letters: Arc<DeadLetters>,
    pub(super) apps: Apps,
}

/// A sink that keeps what it gets.
#[derive(Default)]
pub(super) struct Remembering {
    events: Mutex<Vec<(String, Event)>>,
    /// Locked by a test that wants workers to hang in `publish`.
    pub(super) gate: Mutex<()>,
}

impl Sink for Remembering {
    fn publish(&self, source: &str, events: Vec<Event>) -> Result<(), NotJournaled> {
        let _through = self.gate.lock();
        let mut all = self.events.lock();
        all.extend(events.into_iter().map(|event| (source.to_owned(), event)));
        Ok(())
    }
}

impl Remembering {
    pub(super) fn len(&self) -> usize {
        self.events.lock().len()
    }

    /// Who has published what, in order: `app topic payload`.
    pub(super) fn lines(&self) -> Vec<String> {
        let events = self.events.lock();
        let line = |(source, event): &(String, Event)| {
            let payload = String::from_utf8_lossy(&event.payload);
            format!("{source} {} {payload}", event.topic)
        };
        events.iter().map(line).collect()
    }

    pub(super) fn events(&self) -> Vec<Event> {
        let events = self.events.lock();
        events.iter().map(|(_, event)| event.clone()).collect()
    }
}

pub(super) fn config(folder: &Path) -> AppsConfig {
    AppsConfig {
        workers: 2,
        defaults: Defaults::new(100),
        epoch: Duration::from_millis(1),
        max_batch_events: 64,
        compiler: Compiler::InProcess,
        ..AppsConfig::new(&folder.join("store")).unwrap()
    }
}

/// Waits for the threads of an earlier gateway to let go of the store: one that compiles is not waited
/// for when a gateway ends.
pub(super) fn store(folder: &Path) -> Store {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let opened = Store::open(&StoreConfig {
            path: folder.join("store"),
            map_bytes: 64 << 20,
        });
        match opened {
            Err(StoreError::InUse { .. }) if Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(1));
            }
            opened => return opened.unwrap(),
        }
    }
}

impl House {
    pub(super) fn new() -> House {
        House::with(|_| {})
    }

    pub(super) fn with(change: impl FnOnce(&mut AppsConfig)) -> House {
        House::at(Arc::new(tempfile::tempdir().unwrap()), change)
    }

    pub(super) fn at(folder: Arc<TempDir>, change: impl FnOnce(&mut AppsConfig)) -> House {
        let mut config = config(folder.path());
        change(&mut config);
        let routes = Arc::<Routes>::default();
        let sink = Arc::<Remembering>::default();
        let progress = Arc::<AtomicUsize>::default();
        let dead_letters = Arc::new(DeadLetters::new(Instant::now()));
        let apps = Apps::open(
            config,
            store(folder.path()),
            routes.clone(),
            sink.clone(),
            Arc::new({
                let progress = progress.clone();
                move || {
                    progress.fetch_add(1, Ordering::SeqCst);
                }
            }),
            dead_letters.clone(),
        );
        House {
            dead_letters,
            apps: apps.unwrap(),
            folder,
            routes,
            sink,
            progress,
        }
    }

    /// Ends this gateway, and starts another one on the same store.
    pub(super) fn reopen(self, change: impl FnOnce(&mut AppsConfig)) -> House {
        let folder = self.folder.clone();
        drop(self);
        House::at(folder, change)
    }

    /// Installs the guest under a name; it takes `NAME/in` and may publish below `out/`.
    pub(super) fn install(&self, name: &str) -> AppInfo {
        self.apps.install(&manifest(name), &guest("")).unwrap()
    }

    /// Offers one event a payload, in one batch, to whoever `topic` is routed to.
    pub(super) fn offer(&self, topic: &str, payloads: &[&str]) -> Vec<Offer> {
        let table = self.routes.load();
        let mut outlets = Vec::new();
        table.outlets_for(topic, &mut outlets);
        let offers = outlets
            .iter()
            .map(|index| table.outlets[*index as usize].offer(batch(topic, payloads)));
        offers.collect()
    }

    /// Offers a batch that somebody must take.
    pub(super) fn send(&self, topic: &str, payloads: &[&str]) {
        match self.offer(topic, payloads).as_slice() {
            [Offer::Taken] => {}
            other => panic!("{topic}: {other:?}"),
        }
    }

    pub(super) fn info(&self, name: &str) -> AppInfo {
        let info = self.apps.inspect(name).unwrap();
        assert_adds_up(&info);
        info
    }

    /// Waits until `condition` holds for the app.
    pub(super) fn eventually(
        &self,
        name: &str,
        what: &str,
        condition: impl Fn(&AppInfo) -> bool,
    ) -> AppInfo {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let info = self.info(name);
            if condition(&info) {
                return info;
            }
            assert!(Instant::now() < deadline, "{what} never came: {info:#?}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    pub(super) fn until_state(&self, name: &str, state: AppState) -> AppInfo {
        self.eventually(name, state.as_str(), |info| info.state == state)
    }

    /// Installs a keeper with these limits.
    pub(super) fn install_keeper(&self, name: &str, limits: &str) {
        let info = self
            .apps
            .install(&keeper_manifest(name, limits), &keeper(""))
            .unwrap();
        assert_eq!(info.state, AppState::Running, "{info:#?}");
    }

    /// What a keeper answers to these words, in one call; nothing if the call fails.
    pub(super) fn ask_for_bytes(&self, name: &str, words: &[&str]) -> Vec<Vec<u8>> {
        let before = self.sink.len();
        self.until_state(name, AppState::Running);
        self.send(&format!("{name}/in"), words);
        self.until_done(name);
        let answers = self.sink.events();
        let answers = answers[before..].iter();
        answers.map(|event| event.payload.to_vec()).collect()
    }

    pub(super) fn ask(&self, name: &str, words: &[&str]) -> Vec<String> {
        let answers = self.ask_for_bytes(name, words).into_iter();
        answers
            .map(|answer| String::from_utf8(answer).unwrap())
            .collect()
    }

    /// Waits until nothing is queued.
    pub(super) fn until_done(&self, name: &str) -> AppInfo {
        self.eventually(name, "an empty queue", |info| info.counters.queued == 0)
    }

    /// Has the app fail until it is left alone.
    pub(super) fn open_breaker(&self, name: &str) {
        for failures in 1..=10 {
            self.send(&format!("{name}/in"), &["U"]);
            self.eventually(name, "the failure", |info| info.counters.failed == failures);
        }
        self.until_state(name, AppState::BackingOff);
    }

    /// Sends the app an event and waits until it comes back.
    pub(super) fn assert_works(&self, name: &str) {
        let before = self.info(name).counters.handled;
        self.send(&format!("{name}/in"), &["hello"]);
        let info = self.eventually(name, "the event", |info| info.counters.handled > before);
        assert_eq!(info.state, AppState::Running);
    }
}

/// What every observer may rely on.
pub(super) fn assert_adds_up(info: &AppInfo) {
    let c = &info.counters;
    assert_eq!(
        c.offered,
        c.handled + c.failed + c.dropped.total() + c.queued,
        "{c:#?}"
    );
}

pub(super) fn batch(topic: &str, payloads: &[&str]) -> Vec<Event> {
    let event = |payload: &&str| {
        Event::new(
            Topic::new(topic.to_owned()).unwrap(),
            payload.to_string().into(),
            Instant::now(),
        )
    };
    payloads.iter().map(event).collect()
}

/// A manifest for [`guest`]: it returns events on the topic that they came on.
pub(crate) fn manifest(name: &str) -> String {
    format!(
        "name = {name:?}\nversion = \"1.0.0\"\nsubscribe = [\"{name}/in\"]\n\
         publish = [\"{name}/#\", \"+/in\"]\n[limits]\nmemory_pages = 64\nbatch_deadline_ms = 20\n"
    )
}

/// The guest in `guest.wat`, with some code to run at the beginning of `configure`.
pub(crate) fn guest(configure: &str) -> Vec<u8> {
    component(&include_str!("guest.wat").replace("CONFIGURE", configure))
}

/// The guest in `keeper.wat`, which does in `configure` what `actions` says.
pub(super) fn keeper(actions: &str) -> Vec<u8> {
    component(&include_str!("keeper.wat").replace("CONFIGURE", actions))
}

/// A manifest for [`keeper`], with these lines in `[limits]`.
pub(super) fn keeper_manifest(name: &str, limits: &str) -> String {
    format!(
        "name = {name:?}\nversion = \"1.0.0\"\nsubscribe = [\"{name}/in\"]\n\
         publish = [\"out\"]\n[limits]\n{limits}\n"
    )
}

/// Makes a component for the world in `wit/` from a core module.
pub(super) fn component(module: &str) -> Vec<u8> {
    component_for(module, "app")
}

pub(super) fn component_for(module: &str, world: &str) -> Vec<u8> {
    let mut module = wat::parse_str(module).unwrap();
    let mut resolve = wit_parser::Resolve::default();
    let wit = Path::new(env!("CARGO_MANIFEST_DIR")).join("wit");
    let (package, _) = resolve.push_dir(&wit).unwrap();
    let is_own = world.starts_with("app");
    if !is_own {
        resolve
            .push_str(
                "other.wit",
                &format!("package test:{world};\n{}", OTHER_WORLDS),
            )
            .unwrap();
    }
    let world = match world {
        own if is_own => resolve.select_world(&[package], Some(own)),
        other => {
            let package = resolve
                .packages
                .iter()
                .find(|(_, package)| package.name.name == other)
                .map(|(id, _)| id);
            resolve.select_world(&[package.unwrap()], Some(other))
        }
    };
    wit_component::embed_component_metadata(
        &mut module,
        &resolve,
        world.unwrap(),
        wit_component::StringEncoding::UTF8,
        false,
    )
    .unwrap();
    wit_component::ComponentEncoder::default()
        .module(&module)
        .unwrap()
        .validate(true)
        .encode()
        .unwrap()
}

/// Worlds that are not an app's.
const OTHER_WORLDS: &str = "
    world no-handle {
        export configure: func() -> result<_, string>;
    }
    interface telephone { call: func(number: string); }
    world caller {
        import telephone;
        export configure: func() -> result<_, string>;
    }
    world other-handle {
        export configure: func() -> result<_, string>;
        export handle: func(batch: list<string>) -> u32;
    }
    world other-columns {
        export configure: func() -> result<_, string>;
        export handle-columns: func(batch: list<string>) -> u32;
    }
";
