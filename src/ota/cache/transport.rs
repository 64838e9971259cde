//! Opens files at an offset: from this machine, or over HTTP.

use std::fs::OpenOptions;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::Duration;
use std::{env, fs};

use rustix::fs::OFlags;
use ureq::http::header;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig};
use ureq::{Agent, Proxy};

use super::fault::{CacheError, Fault};
use super::location::Location;
use super::{NARINFO_JOBS_MOST, Settings};

const REDIRECTS: u32 = 10;

/// Where the first byte of a stream is in its file, and how long the whole file is.
pub(super) struct Opened {
    pub(super) reader: Box<dyn Read + Send>,
    pub(super) offset: u64,
    pub(super) length: Option<u64>,
}

pub(super) struct Transport {
    http: Agent,
    /// Never leaves https, whatever a redirect says.
    https: Agent,
    stall: Duration,
}

impl Transport {
    pub(super) fn new(settings: &Settings) -> Result<Self, CacheError> {
        let mut tls = TlsConfig::builder()
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()));
        if let Some(file) = &settings.ca_file {
            let wrong = |why: String| CacheError::CaFile {
                file: file.clone(),
                why,
            };
            let pem = fs::read(file).map_err(|error| wrong(error.to_string()))?;
            let mut roots = Vec::<Certificate<'static>>::new();
            for item in ureq::tls::parse_pem(&pem) {
                if let PemItem::Certificate(certificate) =
                    item.map_err(|error| wrong(error.to_string()))?
                {
                    roots.push(certificate);
                }
            }
            if roots.is_empty() {
                return Err(wrong(
                    "there is no certificate in it (PEM is expected)".to_owned(),
                ));
            }
            tls = tls.root_certs(RootCerts::Specific(Arc::new(roots)));
        }
        let tls = tls.build();
        let agent = |scheme: &str| -> Result<Agent, CacheError> {
            Ok(Agent::config_builder()
                .https_only(scheme == "https")
                .tls_config(tls.clone())
                .proxy(proxy(settings.proxy.as_deref(), scheme)?)
                .http_status_as_error(false)
                .max_redirects(REDIRECTS)
                .accept_encoding("identity")
                .user_agent(concat!("headgate/", env!("CARGO_PKG_VERSION")))
                .timeout_resolve(Some(settings.stall))
                .timeout_connect(Some(settings.stall))
                .timeout_send_request(Some(settings.stall))
                .timeout_recv_response(Some(settings.stall))
                .timeout_per_read(Some(settings.stall))
                .max_idle_connections(2 * NARINFO_JOBS_MOST)
                .max_idle_connections_per_host(NARINFO_JOBS_MOST)
                .build()
                .new_agent())
        };
        Ok(Self {
            http: agent("http")?,
            https: agent("https")?,
            stall: settings.stall,
        })
    }

    pub(super) fn stall(&self) -> Duration {
        self.stall
    }

    /// Opens a file from a byte on, or from its start where the server knows no ranges.
    pub(super) fn open(&self, location: &Location, offset: u64) -> Result<Opened, Fault> {
        match location {
            Location::File(path) => {
                // What is no file must not hold the opening, as a pipe would.
                let mut file = OpenOptions::new()
                    .read(true)
                    .custom_flags(OFlags::NONBLOCK.bits() as i32)
                    .open(path)
                    .map_err(|error| match error.kind() {
                        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Fault::NoFile,
                        _ => Fault::File(error),
                    })?;
                let metadata = file.metadata().map_err(Fault::File)?;
                if !metadata.is_file() {
                    return Err(Fault::NotAFile);
                }
                file.seek(SeekFrom::Start(offset)).map_err(Fault::File)?;
                Ok(Opened {
                    reader: Box::new(file),
                    offset,
                    length: Some(metadata.len()),
                })
            }
            Location::Http(url) => self.get(url, offset),
        }
    }

    fn get(&self, url: &str, offset: u64) -> Result<Opened, Fault> {
        let agent = if url.starts_with("https://") {
            &self.https
        } else {
            &self.http
        };
        let mut request = agent.get(url);
        if offset > 0 {
            request = request.header(header::RANGE, format!("bytes={offset}-"));
        }
        let response = request.call().map_err(|error| match error {
            ureq::Error::TooManyRedirects => Fault::Redirects(REDIRECTS),
            ureq::Error::RequireHttpsOnly(to) => Fault::Downgrade(to),
            ureq::Error::Timeout(_) => Fault::Stalled(self.stall),
            ureq::Error::BadUri(why) => Fault::BadRedirect(why),
            ureq::Error::Http(error) => Fault::BadRedirect(error.to_string()),
            error => Fault::Connection(error.to_string()),
        })?;
        let text = |name| {
            let value = response.headers().get(name)?;
            Some(String::from_utf8_lossy(value.as_bytes()).into_owned())
        };
        if let Some(encoding) = text(header::CONTENT_ENCODING)
            && !encoding.is_empty()
            && encoding != "identity"
        {
            return Err(Fault::ContentEncoding(encoding));
        }
        let (offset, length) = match response.status().as_u16() {
            200 => (0, response.body().content_length()),
            206 => {
                let range = text(header::CONTENT_RANGE).unwrap_or_default();
                let (first, length) = content_range(&range)
                    .filter(|(first, _)| *first == offset)
                    .ok_or(Fault::Range {
                        asked: offset,
                        got: range,
                    })?;
                (first, length)
            }
            // Amazon's S3 says 403 of what is not there.
            status @ (403 | 404 | 410) => return Err(Fault::Missing(status)),
            status => return Err(Fault::Status(status)),
        };
        Ok(Opened {
            reader: Box::new(response.into_body().into_reader()),
            offset,
            length,
        })
    }
}

/// The first byte and the length of the whole, of `bytes 5-99/100` or `bytes 5-99/*`.
fn content_range(value: &str) -> Option<(u64, Option<u64>)> {
    let (range, length) = value.strip_prefix("bytes ")?.split_once('/')?;
    let first = range.split_once('-')?.0.parse().ok()?;
    match length {
        "*" => Some((first, None)),
        length => Some((first, Some(length.parse().ok()?))),
    }
}

/// The proxy that is set, or else the environment's for this scheme.
fn proxy(set: Option<&str>, scheme: &str) -> Result<Option<Proxy>, CacheError> {
    let variable = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
    let (url, exceptions) = match set {
        Some(url) => (Some(url.to_owned()), None),
        // Not HTTP_PROXY: a web server sets that from what a request says.
        None if scheme == "http" => (variable("http_proxy"), variable("no_proxy")),
        None => (
            variable("https_proxy").or_else(|| variable("HTTPS_PROXY")),
            variable("no_proxy").or_else(|| variable("NO_PROXY")),
        ),
    };
    let Some(url) = url else { return Ok(None) };
    let wrong = |error: ureq::Error| CacheError::Proxy {
        proxy: url.clone(),
        why: error.to_string(),
    };
    let parsed = Proxy::new(&url).map_err(wrong)?;
    let Some(exceptions) = exceptions else {
        return Ok(Some(parsed));
    };
    let mut proxy = Proxy::builder(parsed.protocol())
        .host(parsed.host())
        .port(parsed.port());
    if let Some(name) = parsed.username() {
        proxy = proxy.username(name);
    }
    if let Some(password) = parsed.password() {
        proxy = proxy.password(password);
    }
    for exception in exceptions
        .split(',')
        .map(str::trim)
        .filter(|entry| !entry.is_empty())
    {
        proxy = proxy.no_proxy(exception);
    }
    proxy.build().map(Some).map_err(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_servers_write_them() {
        assert_eq!(content_range("bytes 5-99/100"), Some((5, Some(100))));
        assert_eq!(content_range("bytes 5-99/*"), Some((5, None)));
        for bad in [
            "",
            "bytes */100",
            "bytes 5/100",
            "5-99/100",
            "bytes x-9/10",
            "bytes 5-9/x",
        ] {
            assert_eq!(content_range(bad), None, "{bad}");
        }
    }
}
