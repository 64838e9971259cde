//! The Unix socket of the admin API: whoever may open it owns the gateway.
//!
//! - The socket is never open to others, not even for a moment: its mode is set on the descriptor
//!   before the bind. Linux takes the mode of the inode from there, less the umask
//!   (`unix_bind_bsd` in `net/unix/af_unix.c`), so no process-wide umask has to be changed and no
//!   chmod comes too late.
//! - A socket that a dead gateway left behind is replaced, a live one is not, and what isn't a
//!   socket is never deleted. Two gateways that start at once can't take each other's new socket
//!   for a dead one: both hold a lock on the folder while they look.

use std::fs::{DirBuilder, File, Permissions, TryLockError};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use axum::serve::Listener;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::UnixListener;

/// Read and write for the owner alone.
const MODE: u32 = 0o600;

/// Connections that wait to be accepted; the command line makes one at a time.
const BACKLOG: i32 = 64;

/// Longest path of a Unix socket on Linux: `sun_path` has 108 bytes, the last one is NUL.
const MAX_PATH_BYTES: usize = 107;

/// Another gateway holds the folder's lock for well under a millisecond.
const LOCK_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error(
        "admin.socket: a gateway answers on {} already; stop it, or give this one its own \
         admin.socket and store.path", .0.display()
    )]
    Live(PathBuf),
    #[error(
        "admin.socket: {} exists and is not a socket; it was left alone, choose another path",
        .0.display()
    )]
    NotASocket(PathBuf),
    #[error(
        "admin.socket: {} is {} bytes long, a socket's path can have {MAX_PATH_BYTES}; choose a \
         shorter one", .0.display(), .0.as_os_str().len()
    )]
    TooLong(PathBuf),
    #[error("admin.socket: cannot {action} {}: {source}", .path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

/// A bound admin socket. Dropping it removes the socket file, if that is still this one's.
#[derive(Debug)]
pub struct AdminListener {
    listener: UnixListener,
    file: SocketFile,
}

/// The socket's path and which inode it was at the bind.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    device_and_inode: (u64, u64),
}

impl AdminListener {
    /// Binds `path` with mode 0600; makes its folder, with mode 0700, where it is missing.
    /// To be called within a tokio runtime.
    pub fn bind(path: &Path) -> Result<AdminListener, SocketError> {
        if path.as_os_str().len() > MAX_PATH_BYTES {
            return Err(SocketError::TooLong(path.to_owned()));
        }
        let folder = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(failed("make the folder", folder))?;
        let _lock = lock(folder)?;
        remove_if_dead(path)?;
        let listener = bind_private(path).map_err(failed("bind", path))?;
        let metadata = path.symlink_metadata().map_err(failed("look at", path))?;
        Ok(AdminListener {
            listener,
            file: SocketFile {
                path: path.to_owned(),
                device_and_inode: (metadata.dev(), metadata.ino()),
            },
        })
    }

    /// The path that clients connect to.
    pub fn path(&self) -> &Path {
        &self.file.path
    }
}

impl Listener for AdminListener {
    type Io = tokio::net::UnixStream;
    type Addr = tokio::net::unix::SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        Listener::accept(&mut self.listener).await
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = self
            .path
            .symlink_metadata()
            .is_ok_and(|found| (found.dev(), found.ino()) == self.device_and_inode);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the admin socket");
        }
    }
}

/// Held, the only gateway that looks at or binds a socket in `folder`.
fn lock(folder: &Path) -> Result<File, SocketError> {
    let file = File::open(folder).map_err(failed("open the folder", folder))?;
    let deadline = Instant::now() + LOCK_TIMEOUT;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(TryLockError::WouldBlock) => {
                let held = io::Error::new(io::ErrorKind::WouldBlock, "another process holds it");
                return Err(failed("lock the folder", folder)(held));
            }
            Err(TryLockError::Error(source)) => {
                return Err(failed("lock the folder", folder)(source));
            }
        }
    }
}

/// Makes sure that nothing is in the way at `path`.
fn remove_if_dead(path: &Path) -> Result<(), SocketError> {
    let metadata = match path.symlink_metadata() {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at", path)(error)),
    };
    if !metadata.file_type().is_socket() {
        return Err(SocketError::NotASocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed("remove the dead socket", path))
        }
        // Someone listens, or (EAGAIN) has a full backlog.
        Ok(_) => Err(SocketError::Live(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(SocketError::Live(path.to_owned()))
        }
        Err(error) => Err(failed("probe", path)(error)),
    }
}

fn bind_private(path: &Path) -> io::Result<UnixListener> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    let descriptor = File::from(OwnedFd::from(socket));
    descriptor.set_permissions(Permissions::from_mode(MODE))?;
    let socket = Socket::from(OwnedFd::from(descriptor));
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    UnixListener::from_std(StdUnixListener::from(OwnedFd::from(socket)))
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SocketError {
    move |source| SocketError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_owner_may_open_the_socket() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/admin.sock");
        let _listener = AdminListener::bind(&path).unwrap();
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
    }

    #[tokio::test]
    async fn the_socket_goes_away_with_its_listener() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        drop(AdminListener::bind(&path).unwrap());
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_dead_gateways_socket_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        drop(StdUnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a killed gateway leaves its socket behind");
        let _listener = AdminListener::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[tokio::test]
    async fn a_live_gateways_socket_is_named_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        let _live = AdminListener::bind(&path).unwrap();
        let error = AdminListener::bind(&path).unwrap_err();
        assert!(matches!(error, SocketError::Live(_)), "{error}");
        assert!(error.to_string().contains(path.to_str().unwrap()));
        UnixStream::connect(&path).unwrap();
    }

    #[tokio::test]
    async fn what_is_not_a_socket_is_not_deleted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notes.txt");
        std::fs::write(&path, "keep me").unwrap();
        let error = AdminListener::bind(&path).unwrap_err();
        assert!(matches!(error, SocketError::NotASocket(_)), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "keep me");

        let link = folder.path().join("link.sock");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let error = AdminListener::bind(&link).unwrap_err();
        assert!(matches!(error, SocketError::NotASocket(_)), "{error}");
    }

    #[tokio::test]
    async fn a_successors_socket_survives_the_end_of_its_predecessor() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        let predecessor = AdminListener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _successor = AdminListener::bind(&path).unwrap();
        drop(predecessor);
        UnixStream::connect(&path).unwrap();
    }

    #[tokio::test]
    async fn of_two_gateways_that_start_at_once_one_wins() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        drop(StdUnixListener::bind(&path).unwrap());
        let start = std::sync::Arc::new(std::sync::Barrier::new(8));
        let runtime = tokio::runtime::Handle::current();
        let threads: Vec<_> = (0..8)
            .map(|_| {
                let (start, path, runtime) = (start.clone(), path.clone(), runtime.clone());
                std::thread::spawn(move || {
                    let _context = runtime.enter();
                    start.wait();
                    AdminListener::bind(&path)
                })
            })
            .collect();
        let bound: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
        assert_eq!(bound.iter().filter(|outcome| outcome.is_ok()).count(), 1);
        UnixStream::connect(&path).unwrap();
    }

    #[tokio::test]
    async fn a_path_too_long_for_a_socket_is_named() {
        let path = Path::new("/tmp").join("x".repeat(104));
        let error = AdminListener::bind(&path).unwrap_err().to_string();
        assert!(error.contains("is 109 bytes long"), "{error}");
    }
}
