"""Read HTTP headers in ASGI's form: pairs of name and value as bytes, with names in lower case."""

from collections.abc import Iterable

RawHeaders = Iterable[tuple[bytes, bytes]]
#: Headers that a proxy does not forward: headers that concern only one connection (RFC 9110, section 7.6.1), and headers
#: that the HTTP server or client sets itself.
HOP_BY_HOP = frozenset({
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te", b"trailer",
    b"transfer-encoding", b"upgrade", b"content-length", b"date", b"server", b"expect",
})  # fmt: skip
#: Values of the header Connection that do not name other headers.
_NO_NAMES = frozenset({b"keep-alive", b"close"})


def values(headers: RawHeaders, name: bytes) -> list[bytes]:
    """Return the values of all headers named `name`."""
    return [value for key, value in headers if key == name]


def value(headers: RawHeaders, name: bytes) -> bytes:
    """Return the value of the first header named `name`; b"" if there is no such header."""
    for key, found in headers:
        if key == name:
            return found
    return b""


def forwarded(headers: RawHeaders, dropped: frozenset[bytes] = HOP_BY_HOP) -> list[tuple[bytes, bytes]]:
    """Return the headers that a proxy forwards: all except those named in `dropped` or in a Connection header."""
    kept = [header for header in headers if header[0] not in dropped]
    for connection in values(headers, b"connection") if b"connection" in dict(headers) else ():
        if connection.lower() not in _NO_NAMES:
            named = {name.strip().lower() for name in connection.split(b",")}
            kept = [header for header in kept if header[0] not in named]
    return kept
