//! The HTTP request by which a connection becomes a WebSocket, and the answer to it.

use tungstenite::error::{Error, ProtocolError};
use tungstenite::handshake::machine::TryParse;
use tungstenite::handshake::server::{Request, create_response, write_response};
use tungstenite::http::HeaderValue;
use tungstenite::http::header::SEC_WEBSOCKET_PROTOCOL;

/// What MQTT is called among the protocols over WebSocket, and what its older clients call it.
const PROTOCOLS: [&str; 2] = ["mqtt", "mqttv3.1"];

/// Browsers send cookies and much about themselves, which is 2 KiB or so.
pub(super) const MAX_REQUEST_BYTES: usize = 8 * 1024;

/// What is said to what has come of a request so far.
pub(super) enum Answer {
    /// More of it must come.
    Incomplete,
    /// From now on there are frames; what was sent after the request's `length` bytes is already one.
    Accepted { length: usize, response: Vec<u8> },
    Refused {
        response: Vec<u8>,
        reason: &'static str,
    },
}

/// Why a request is refused.
struct Refusal {
    status: &'static str,
    /// Lines of the header that this status wants.
    fields: &'static str,
    reason: &'static str,
}

const BAD_REQUEST: &str = "400 Bad Request";

const fn refused(status: &'static str, reason: &'static str) -> Refusal {
    Refusal {
        status,
        fields: "Connection: close\r\n",
        reason,
    }
}

const NO_WEBSOCKET: Refusal = Refusal {
    status: "426 Upgrade Required",
    fields: "Connection: Upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
    reason: "only WebSocket (version 13) is spoken here, for MQTT clients",
};

const NO_GET: Refusal = Refusal {
    status: "405 Method Not Allowed",
    fields: "Connection: close\r\nAllow: GET\r\n",
    reason: "a WebSocket begins with GET",
};

const TOO_LARGE: Refusal = refused(
    "431 Request Header Fields Too Large",
    "the header is larger than 8 KiB or has more than 124 fields",
);

const NO_HTTP: Refusal = refused(
    BAD_REQUEST,
    "this is no HTTP/1.1 request; MQTT without WebSocket has another port",
);

const NO_KEY: Refusal = refused(
    BAD_REQUEST,
    "the header Sec-WebSocket-Key is missing or holds no key",
);

const NO_MQTT: Refusal = refused(
    BAD_REQUEST,
    "the WebSocket must be asked for with the sub-protocol mqtt",
);

const WRONG_PATH: Refusal = refused(
    "404 Not Found",
    "MQTT is at another path (mqtt.websocket.path)",
);

impl Refusal {
    fn response(&self) -> Vec<u8> {
        let Refusal {
            status,
            fields,
            reason,
        } = self;
        let length = reason.len() + 1;
        format!(
            "HTTP/1.1 {status}\r\n{fields}Content-Type: text/plain\r\n\
             Content-Length: {length}\r\n\r\n{reason}\n"
        )
        .into_bytes()
    }
}

/// Answers a request whose first bytes are `head`. `path` is where MQTT is.
pub(super) fn answer(head: &[u8], path: &str) -> Answer {
    match accept(head, path) {
        Ok(Some((length, response))) => Answer::Accepted { length, response },
        Ok(None) => Answer::Incomplete,
        Err(refusal) => Answer::Refused {
            response: refusal.response(),
            reason: refusal.reason,
        },
    }
}

fn accept(head: &[u8], path: &str) -> Result<Option<(usize, Vec<u8>)>, Refusal> {
    let (length, request) = match Request::try_parse(head) {
        Ok(Some((length, _))) if length > MAX_REQUEST_BYTES => return Err(TOO_LARGE),
        Ok(Some(parsed)) => parsed,
        Ok(None) if head.len() > MAX_REQUEST_BYTES => return Err(TOO_LARGE),
        Ok(None) => return Ok(None),
        Err(Error::Capacity(_)) => return Err(TOO_LARGE),
        Err(Error::Protocol(ProtocolError::WrongHttpMethod)) => return Err(NO_GET),
        Err(_) => return Err(NO_HTTP),
    };
    if request.uri().path() != path {
        return Err(WRONG_PATH);
    }
    let mut response = create_response(&request).map_err(|error| match error {
        Error::Protocol(
            ProtocolError::MissingConnectionUpgradeHeader
            | ProtocolError::MissingUpgradeWebSocketHeader
            | ProtocolError::MissingSecWebSocketVersionHeader,
        ) => NO_WEBSOCKET,
        _ => NO_KEY,
    })?;
    let offered: Vec<&str> = request
        .headers()
        .get_all(SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .collect();
    let Some(protocol) = PROTOCOLS
        .into_iter()
        .find(|protocol| offered.contains(protocol))
    else {
        return Err(NO_MQTT);
    };
    response
        .headers_mut()
        .insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
    let mut bytes = Vec::new();
    write_response(&mut bytes, &response).expect("the headers are ASCII and a Vec takes them");
    Ok(Some((length, bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST: &str = "GET /mqtt HTTP/1.1\r\nHost: plant\r\nConnection: keep-alive, Upgrade\r\n\
        Upgrade: WebSocket\r\nSec-WebSocket-Version: 13\r\n\
        Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
        Sec-WebSocket-Protocol: chat, mqtt\r\n\r\n";

    fn answered(request: &str) -> String {
        match answer(request.as_bytes(), "/mqtt") {
            Answer::Incomplete => "incomplete".into(),
            Answer::Accepted { response, .. } | Answer::Refused { response, .. } => {
                String::from_utf8(response).unwrap()
            }
        }
    }

    fn status(request: &str) -> String {
        let answer = answered(request);
        answer.split(' ').nth(1).unwrap_or(&answer).to_owned()
    }

    #[test]
    fn a_request_for_mqtt_is_accepted_and_what_follows_it_is_left() {
        let with_a_frame = format!("{REQUEST}frame");
        let Answer::Accepted { length, response } = answer(with_a_frame.as_bytes(), "/mqtt") else {
            panic!("refused");
        };
        assert_eq!(length, REQUEST.len());
        let response = String::from_utf8(response).unwrap().to_lowercase();
        assert!(response.starts_with("http/1.1 101 "), "{response}");
        assert!(response.ends_with("\r\n\r\n"), "{response}");
        // The key and the answer to it of RFC 6455, 1.3.
        for field in [
            "sec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=",
            "sec-websocket-protocol: mqtt\r\n",
            "connection: upgrade",
            "upgrade: websocket",
        ] {
            assert!(response.contains(field), "{field}: {response}");
        }
    }

    #[test]
    fn a_request_is_awaited_until_it_is_whole() {
        for length in 0..REQUEST.len() {
            assert_eq!(status(&REQUEST[..length]), "incomplete");
        }
    }

    #[test]
    fn the_old_name_of_mqtt_is_answered_with_itself() {
        let old = REQUEST.replace("chat, mqtt", "mqttv3.1");
        assert!(answered(&old).contains("sec-websocket-protocol: mqttv3.1\r\n"));
    }

    #[test]
    fn a_query_after_the_path_makes_no_difference() {
        assert_eq!(status(&REQUEST.replace("/mqtt ", "/mqtt?token=x ")), "101");
    }

    #[test]
    fn each_wrong_request_gets_its_status() {
        let many: String = (0..200).map(|n| format!("X-{n}: y\r\n")).collect();
        for (status_wanted, request) in [
            ("404", REQUEST.replace("/mqtt ", "/ ")),
            ("404", REQUEST.replace("/mqtt ", "/mqtt/ ")),
            ("405", REQUEST.replace("GET", "POST")),
            ("400", REQUEST.replace("HTTP/1.1", "HTTP/1.0")),
            ("400", REQUEST.replace("HTTP/1.1", "HTTP/2.0")),
            ("400", REQUEST.replace("/mqtt ", "\0 ")),
            ("400", "\x10\x0c\0\x04MQTT\x04\x02\0\x3c\0\0".into()),
            ("400", "\x16\x03\x01\x02\0".into()),
            ("426", REQUEST.replace("WebSocket\r", "h2c\r")),
            ("426", REQUEST.replace("Upgrade: ", "X: ")),
            ("426", REQUEST.replace(", Upgrade", "")),
            ("426", REQUEST.replace("Version: 13", "Version: 8")),
            ("400", REQUEST.replace("Key: dGh", "Key: dG")),
            ("400", REQUEST.replace("-Key: ", "-X: ")),
            ("400", REQUEST.replace("chat, mqtt", "chat")),
            ("400", REQUEST.replace("Sec-WebSocket-Protocol", "X")),
            ("431", REQUEST.replace("Host", &format!("{many}Host"))),
            (
                "431",
                REQUEST.replace("plant", &"x".repeat(MAX_REQUEST_BYTES)),
            ),
            ("431", format!("GET /{}", "x".repeat(MAX_REQUEST_BYTES))),
        ] {
            assert_eq!(status(&request), status_wanted, "{request}");
        }
        let upgrade = answered(&REQUEST.replace("Version: 13", "Version: 8"));
        assert!(
            upgrade.contains("Sec-WebSocket-Version: 13\r\n"),
            "{upgrade}"
        );
    }
}
