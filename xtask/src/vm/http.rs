//! Just enough HTTP to read the gateway's endpoints, and its metrics.

use anyhow::{Context, Result};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(10);

/// The status and the body of what is at `path`.
pub fn get(port: u16, path: &str) -> Result<(u16, String)> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // Of version 1.0, so that the end of the stream is the end of the answer.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    parse(&answer).with_context(|| format!("what came from {path} is no answer: {answer:?}"))
}

fn parse(answer: &str) -> Option<(u16, String)> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    Some((status, body.to_owned()))
}

/// The value of the metric `name` that has all of `labels`.
pub fn metric(page: &str, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    page.lines().find_map(|line| {
        let rest = line.strip_prefix(name)?;
        let (own, value) = match rest.strip_prefix('{') {
            Some(rest) => rest.rsplit_once("} ")?,
            None => ("", rest.strip_prefix(' ')?),
        };
        let own: Vec<&str> = own.split(',').collect();
        labels
            .iter()
            .all(|(label, value)| own.contains(&format!("{label}=\"{value}\"").as_str()))
            .then(|| value.trim().parse().ok())?
    })
}

#[cfg(test)]
mod metrics {
    use super::*;

    #[test]
    fn are_found_by_name_and_labels() {
        let page = "# TYPE up gauge\nup 1\nup_total{app=\"a\"} 2\n\
                    state{app=\"a\",state=\"running\"} 0\nstate{app=\"b\",state=\"running\"} 1\n";
        assert_eq!(metric(page, "up", &[]), Some(1.0));
        assert_eq!(metric(page, "up_total", &[("app", "a")]), Some(2.0));
        let running = [("state", "running"), ("app", "b")];
        assert_eq!(metric(page, "state", &running), Some(1.0));
        assert_eq!(metric(page, "state", &[("app", "c")]), None);
        assert_eq!(metric(page, "down", &[]), None);
    }

    #[test]
    fn come_after_the_head_of_an_answer() {
        let answer = "HTTP/1.0 503 Service Unavailable\r\na: b\r\n\r\nnot ready\n";
        assert_eq!(parse(answer), Some((503, "not ready\n".to_owned())));
        assert_eq!(parse("nothing"), None);
    }
}
