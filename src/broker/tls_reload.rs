//! Certificates that change while the gateway runs: new connections get the new ones, and nobody is
//! dropped.
//!
//! The files are looked at every few seconds rather than watched with inotify, which sees neither what
//! a symbolic link leads to nor a file system of the network.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use rustls::ServerConfig;
use rustls::pki_types::{CertificateDer, UnixTime};

use super::certificate::{Age, Validity};
use super::tls::{LoadedTls, TlsError, TlsFiles};

/// Between looks at the files.
const LOOK: Duration = Duration::from_secs(2);

/// The TLS of all listeners, as the files have it now.
pub struct TlsReloader {
    files: TlsFiles,
    current: ArcSwap<LoadedTls>,
    changes: Mutex<Changes>,
    /// Of the certificate in use: its last second, in Unix time.
    expiry: AtomicU64,
    /// How often files could not be used that had changed.
    failures: AtomicU64,
}

/// What has become of the files and of the certificate.
struct Changes {
    watch: Watch,
    validity: Validity,
    /// What has been said about the certificate's age.
    age: Age,
}

impl TlsReloader {
    /// Reads the files for the first time.
    pub fn load(files: TlsFiles, now: SystemTime) -> Result<Arc<TlsReloader>, TlsError> {
        let look = Look::at(&files);
        let loaded = files.load()?;
        let validity = loaded.validity;
        let reloader = TlsReloader {
            current: ArcSwap::from_pointee(loaded),
            changes: Mutex::new(Changes {
                watch: Watch::new(look),
                validity,
                age: Age::Valid,
            }),
            expiry: AtomicU64::new(validity.until().as_secs()),
            failures: AtomicU64::new(0),
            files,
        };
        reloader.changes.lock().warn(&reloader.files, now);
        Ok(Arc::new(reloader))
    }

    /// Reads the files again. On an error all stays as it was.
    pub fn reload(&self, now: SystemTime) -> Result<(), TlsError> {
        let mut changes = self.changes.lock();
        // Before they are read: a change that comes meanwhile is seen later.
        changes.watch = Watch::new(Look::at(&self.files));
        let loaded = self.files.load().inspect_err(|_| {
            self.failures.fetch_add(1, Ordering::Relaxed);
        })?;
        self.expiry
            .store(loaded.validity.until().as_secs(), Ordering::Relaxed);
        if changes.validity != loaded.validity {
            changes.validity = loaded.validity;
            changes.age = Age::Valid;
        }
        self.current.store(Arc::new(loaded));
        changes.warn(&self.files, now);
        Ok(())
    }

    /// For a new connection.
    pub(crate) fn config(&self) -> Arc<ServerConfig> {
        self.current.load().config.clone()
    }

    /// Whether clients may show who they are by certificates.
    pub(super) fn asks_for_certificates(&self) -> bool {
        self.current.load().clients.is_some()
    }

    /// Whether somebody vouches for a client with these certificates, its own first, now.
    pub(super) fn vouches_for(&self, certificates: &[CertificateDer<'static>]) -> bool {
        let loaded = self.current.load();
        match (&loaded.clients, certificates) {
            (Some(clients), [own, others @ ..]) => clients
                .verify_client_cert(own, others, UnixTime::now())
                .is_ok(),
            _ => false,
        }
    }

    pub(super) fn record_metrics(&self) {
        metrics::counter!("headgate_mqtt_tls_reload_failures_total")
            .absolute(self.failures.load(Ordering::Relaxed));
        metrics::gauge!("headgate_mqtt_tls_certificate_expiry_seconds")
            .set(self.expiry.load(Ordering::Relaxed) as f64);
    }

    /// Reloads whenever the files have changed, for ever, and says so.
    pub(super) async fn watch(self: Arc<Self>, on_change: impl Fn() + Clone + Send + 'static) {
        loop {
            tokio::time::sleep(LOOK).await;
            let reloader = self.clone();
            let on_change = on_change.clone();
            // Files may be on a disk that is slow, or on a network.
            let looked = tokio::task::spawn_blocking(move || {
                if reloader.look() {
                    on_change();
                }
            });
            if looked.await.is_err() {
                tracing::error!("looking at the files of mqtt.tls failed; trying again");
            }
        }
    }

    /// Returns whether other files are in use than before.
    fn look(&self) -> bool {
        let look = Look::at(&self.files);
        let changed = {
            let mut changes = self.changes.lock();
            changes.warn(&self.files, SystemTime::now());
            changes.watch.on_look(look)
        };
        if !changed {
            return false;
        }
        match self.reload(SystemTime::now()) {
            Ok(()) => {
                tracing::info!(
                    certificate = %self.files.certificate.display(),
                    "the files of mqtt.tls have changed: new connections get the new certificate"
                );
                true
            }
            Err(error) => {
                tracing::error!(
                    %error,
                    "the files of mqtt.tls have changed and can't be used: the old ones stay in use"
                );
                false
            }
        }
    }
}

impl Changes {
    /// Says once what there is to say about the age of the certificate.
    fn warn(&mut self, files: &TlsFiles, now: SystemTime) {
        let age = self.validity.age(now);
        if age == self.age {
            return;
        }
        self.age = age;
        if let Some(warning) = self.validity.warning(now) {
            tracing::warn!(certificate = %files.certificate.display(), "{warning}");
        }
    }
}

/// What tells one state of the files from another, without reading them.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Look(Vec<Option<Stamp>>);

/// Device, inode, size, and the times of the last changes of the contents and of anything else.
type Stamp = (u64, u64, u64, [i64; 4]);

impl Look {
    fn at(files: &TlsFiles) -> Look {
        let stamp = |path| {
            let file = fs::metadata(path).ok()?;
            let times = [
                file.mtime(),
                file.mtime_nsec(),
                file.ctime(),
                file.ctime_nsec(),
            ];
            Some((file.dev(), file.ino(), file.size(), times))
        };
        Look(files.paths().map(stamp).collect())
    }
}

/// Decides when to read the files again: when they have changed and then stayed so for one look. A
/// certificate and its key are not replaced at one moment, nor is a file written in one.
struct Watch {
    read: Look,
    last: Look,
}

impl Watch {
    fn new(read: Look) -> Watch {
        Watch {
            last: read.clone(),
            read,
        }
    }

    /// Returns whether the files are to be read.
    fn on_look(&mut self, look: Look) -> bool {
        let stands = look == self.last;
        self.last = look;
        stands && self.last != self.read
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn look(size: u64) -> Look {
        Look(vec![Some((1, 1, size, [0; 4])), None])
    }

    #[test]
    fn a_change_is_acted_upon_when_it_has_stood_for_a_look_and_only_once() {
        let mut watch = Watch::new(look(1));
        assert!(!watch.on_look(look(1)));
        assert!(!watch.on_look(look(2)));
        assert!(!watch.on_look(look(3)), "it goes on changing");
        assert!(watch.on_look(look(3)));
        watch = Watch::new(look(3));
        assert!(!watch.on_look(look(3)));
    }

    #[test]
    fn a_change_that_is_taken_back_is_none() {
        let mut watch = Watch::new(look(1));
        assert!(!watch.on_look(look(2)));
        assert!(!watch.on_look(look(1)));
        assert!(!watch.on_look(look(1)));
    }

    /// Files for `names`, in a folder that a symbolic link `live` leads to.
    fn write(folder: &Path, name: &str) -> String {
        let pair = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
        let pem = pair.cert.pem();
        fs::create_dir(folder.join(name)).unwrap();
        fs::write(folder.join(name).join("crt"), &pem).unwrap();
        fs::write(
            folder.join(name).join("key"),
            pair.signing_key.serialize_pem(),
        )
        .unwrap();
        pem
    }

    fn link(folder: &Path, name: &str) {
        let new = folder.join("new");
        std::os::unix::fs::symlink(name, &new).unwrap();
        fs::rename(new, folder.join("live")).unwrap();
    }

    fn files(folder: &Path) -> TlsFiles {
        TlsFiles {
            certificate: folder.join("live/crt"),
            key: folder.join("live/key"),
            clients: None,
        }
    }

    #[test]
    fn files_behind_a_link_that_is_swapped_have_changed() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "one");
        write(folder.path(), "two");
        link(folder.path(), "one");
        let files = files(folder.path());
        let one = Look::at(&files);
        assert_eq!(Look::at(&files), one);
        link(folder.path(), "two");
        assert_ne!(Look::at(&files), one);
    }

    #[test]
    fn files_that_cannot_be_used_change_nothing_and_are_counted_once() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "one");
        link(folder.path(), "one");
        let now = SystemTime::now();
        let reloader = TlsReloader::load(files(folder.path()), now).unwrap();
        let old = reloader.config();
        reloader.reload(now).unwrap();
        let first = reloader.config();
        assert!(!Arc::ptr_eq(&old, &first));

        fs::write(folder.path().join("one/crt"), "nonsense").unwrap();
        for _ in 0..5 {
            reloader.look();
        }
        assert!(Arc::ptr_eq(&reloader.config(), &first));
        assert_eq!(reloader.failures.load(Ordering::Relaxed), 1);
        let error = reloader.reload(now).unwrap_err().to_string();
        assert!(error.starts_with("mqtt.tls.certificate: "), "{error}");

        write(folder.path(), "two");
        link(folder.path(), "two");
        reloader.look();
        reloader.look();
        assert!(!Arc::ptr_eq(&reloader.config(), &first));
        assert_eq!(reloader.failures.load(Ordering::Relaxed), 2);
    }
}
