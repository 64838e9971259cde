//! What an app is to the host, and what it can ask of the host.

use crate::bindings::headgate::app::publisher;
#[cfg(target_family = "wasm")]
use crate::columns;
use crate::{Config, Event};

/// What a Headgate app is. Put [`#[headgate_sdk::app]`](crate::app) on the `impl`.
pub trait App: Sized + 'static {
    /// Called once on each new instance, before any batch.
    ///
    /// # Errors
    /// The text stops the app and stands in `headgate app inspect`; name the key that is wrong.
    fn configure(config: &Config) -> Result<Self, String>;

    /// Takes a batch in the order of arrival and returns what is to be published, in that order.
    ///
    /// # Errors
    /// An error fails the whole batch, the good events in it too: skip and log a bad event
    /// instead.
    fn handle(&mut self, batch: Vec<Event>) -> Result<Vec<Event>, String>;
}

/// Why [`publish`] took none of the events.
pub use publisher::PublishError;

/// Publishes from inside a call, besides what [`App::handle`] returns. The gateway takes all of
/// `events` or none.
///
/// # Errors
/// If a topic is no topic name, if the manifest's `publish` filters do not cover one, or if the
/// batch's quota (`limits.publish_per_batch`) is used up.
#[cfg(target_family = "wasm")]
pub fn publish(events: &[Event]) -> Result<(), PublishError> {
    publisher::publish(events)
}

/// On the developer's machine: what [`Harness::handle`](crate::testing::Harness::handle) returns; without
/// a harness, writes the topics to standard error.
///
/// # Errors
/// If a topic is no topic name.
#[cfg(not(target_family = "wasm"))]
pub fn publish(events: &[Event]) -> Result<(), PublishError> {
    let is_topic = |topic: &str| !topic.is_empty() && !topic.contains(['+', '#', '\0']);
    if let Some(event) = events.iter().find(|event| !is_topic(&event.topic)) {
        let why = format!("{:?} is no topic name", event.topic);
        return Err(PublishError::InvalidTopic(why));
    }
    crate::native::with(|host| match &mut host.published {
        Some(published) => published.extend_from_slice(events),
        None => {
            for event in events {
                eprintln!("publish {} ({} bytes)", event.topic, event.payload.len());
            }
        }
    });
    Ok(())
}

/// Makes `$app`, an [`App`], the app of this component: what [`#[headgate_sdk::app]`](crate::app) does.
/// Call it once.
///
/// On other targets than WebAssembly it only checks that `$app` is an [`App`], so that
/// `cargo test` runs on the developer's machine.
#[macro_export]
macro_rules! export {
    ($app:ty) => {
        #[cfg(target_family = "wasm")]
        #[allow(unsafe_code)] // The component's exports are C functions.
        const _: () = {
            use $crate::{Slot, bindings, load_config};

            struct Component;

            thread_local! {
                static SLOT: Slot<$app> = const { Slot::new() };
            }

            impl bindings::Guest for Component {
                fn configure() -> Result<(), String> {
                    let config = load_config()?;
                    SLOT.with(|slot| slot.configure(&config))
                }

                fn handle_columns(batch: $crate::Columns) -> Result<$crate::Columns, String> {
                    SLOT.with(|slot| slot.handle(batch))
                }
            }

    bindings::export_component!(Component with_types_in $crate::bindings);
        };

        #[cfg(not(target_family = "wasm"))]
        const _: fn() = || {
            fn is_app<T: $crate::App>() {}
            is_app::<$app>();
        };
    };
}

/// Holds the app between the calls of one instance, which is single-threaded.
#[doc(hidden)]
#[cfg(target_family = "wasm")]
pub struct Slot<A>(std::cell::RefCell<Option<A>>);

#[cfg(target_family = "wasm")]
impl<A: App> Slot<A> {
    #[allow(clippy::new_without_default, missing_docs)]
    pub const fn new() -> Self {
        Slot(std::cell::RefCell::new(None))
    }

    #[allow(missing_docs, clippy::missing_errors_doc)]
    pub fn configure(&self, config: &Config) -> Result<(), String> {
        *self.0.borrow_mut() = Some(A::configure(config)?);
        Ok(())
    }

    #[allow(missing_docs, clippy::missing_errors_doc)]
    pub fn handle(&self, batch: columns::Columns) -> Result<columns::Columns, String> {
        match self.0.borrow_mut().as_mut() {
            Some(app) => app.handle(columns::split(&batch)).map(columns::join),
            None => Err("handle was called before configure".to_string()),
        }
    }
}

#[doc(hidden)]
#[cfg(target_family = "wasm")]
pub fn load_config() -> Result<Config, String> {
    use crate::bindings::wasi::config::store;
    match store::get_all() {
        Ok(entries) => Ok(entries.into_iter().collect()),
        Err(store::Error::Upstream(why) | store::Error::Io(why)) => {
            Err(format!("cannot read the configuration: {why}"))
        }
    }
}
