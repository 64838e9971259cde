//! How many files and sockets this process may have open.

use std::io;

/// What the gateway needs beside its clients' sockets: listeners, database, logs, admin and metrics
/// connections.
const OTHERS: u64 = 256;

/// Lets the process have as many open as the system allows: shells and service managers often start
/// programs with a fraction of that. Says so in the log if it is not enough for `connections`.
pub fn raise_limit(connections: usize) {
    let needed = connections as u64 + OTHERS;
    match raise() {
        Ok(limit) if limit < needed => tracing::warn!(
            limit,
            needed,
            "the system lets this process open {limit} files, but {connections} connections \
             (mqtt.max_connections, ingest.max_connections) can need {needed}: raise `ulimit -Hn` or \
             LimitNOFILE, or lower them"
        ),
        Ok(_) => {}
        // A service manager that forbids it has set the limit itself.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
        Err(error) => tracing::warn!(%error, "can't raise the limit of open files"),
    }
}

/// Raises the soft limit to the hard one. Returns what it is now.
#[allow(unsafe_code)]
fn raise() -> io::Result<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is a valid place for what the call writes.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if limit.rlim_cur < limit.rlim_max {
        limit.rlim_cur = limit.rlim_max;
        // SAFETY: `limit` is valid for the call to read.
        if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(limit.rlim_cur)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_as_high_as_the_system_allows() {
        let limit = raise().unwrap();
        assert!(limit >= 256);
        assert_eq!(raise().unwrap(), limit);
    }
}
