//! As much of HTTP/1.1 as a collector of metrics needs: one request for one page, then the connection ends.

/// What the first line of a connection asks for, if it is one of HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    /// The metrics.
    Metrics,
    /// Another page.
    Elsewhere,
    /// Something other than to get a page.
    Otherwise,
}

/// Reads a request line (RFC 9112, 3). `None`: it is none of HTTP/1.x.
pub(crate) fn request_line(line: &[u8]) -> Option<Wish> {
    let line = std::str::from_utf8(line).ok()?.trim_end();
    let mut words = line.split(' ');
    let (method, target, version) = (words.next()?, words.next()?, words.next()?);
    let method_like = method.bytes().all(|b| b.is_ascii_uppercase());
    if words.next().is_some() || !method_like || !version.starts_with("HTTP/1.") {
        return None;
    }
    let path = target.split('?').next().unwrap_or_default();
    Some(match (method, path) {
        ("GET", "/metrics") => Wish::Metrics,
        ("GET", _) => Wish::Elsewhere,
        _ => Wish::Otherwise,
    })
}

/// A whole response. `status` is a code and its phrase. Each says what may be asked for, as 405 has to (RFC 9110, 15.5.6).
pub(crate) fn response(status: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\nAllow: GET\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_lines_are_told_from_requests() {
        for (line, wish) in [
            ("GET /metrics HTTP/1.1\r\n", Some(Wish::Metrics)),
            ("GET /metrics?x=y HTTP/1.0\n", Some(Wish::Metrics)),
            ("GET / HTTP/1.1\r\n", Some(Wish::Elsewhere)),
            ("POST /metrics HTTP/1.1\r\n", Some(Wish::Otherwise)),
            ("GET /metrics HTTP/2\r\n", None),
            ("GET /metrics\r\n", None),
            ("{\"command\": \"status\"}\n", None),
            ("{} HTTP/1.1 HTTP/1.1\n", None),
        ] {
            assert_eq!(request_line(line.as_bytes()), wish, "{line}");
        }
    }
}
