"""A picture behind a URL that a stranger gave: never an address of this machine or its network, never much, never long.

Each host is resolved once and the connection goes to the very address that was judged, so that a name which resolves
to another one a moment later (DNS rebinding) gains nothing. Redirects are followed here, each judged in the same way.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator

from mindiffedit.errors import InputError

MAX_SECONDS = 20.0
MAX_REDIRECTS = 4


def fetch(url: str, max_bytes: int) -> bytes:
    """What is behind an http(s) URL.

    Raises:
        InputError: it is no such URL, leads to an address that is not public, does not answer with the bytes within
            `MAX_SECONDS`, or sends more than `max_bytes`.
    """
    deadline = time.monotonic() + MAX_SECONDS
    for _ in range(MAX_REDIRECTS + 1):
        with _answer(url, deadline) as answer:
            target = answer.headers.get("location") if answer.status in (301, 302, 303, 307, 308) else None
            if target is None:
                return _body(answer, max_bytes, deadline)
            url = urllib.parse.urljoin(url, target)
    raise InputError("the URL leads on more than {most} times; give the picture's own.", "image", most=MAX_REDIRECTS)


@contextlib.contextmanager
def _answer(url: str, deadline: float) -> Iterator:
    from requests.certs import where
    from urllib3.connection import HTTPConnection, HTTPSConnection
    from urllib3.exceptions import HTTPError

    try:
        parts = urllib.parse.urlsplit(url)
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port
    except ValueError:  # a port that is no number, a host that is no name
        host = ""
    if not host or parts.scheme not in ("http", "https") or "@" in parts.netloc:
        raise InputError("{url!r} is no http(s) URL, or has a password in it; give another.", "image", url=url)
    path = parts.path + ("?" + parts.query if parts.query else "")
    address = public_address(host)
    connection: HTTPConnection
    if parts.scheme == "http":
        connection = HTTPConnection(address, port or 80, timeout=_left(deadline))
    else:
        # The certificate has to be the host's, whatever the address.
        connection = HTTPSConnection(
            address, port or 443, timeout=_left(deadline), server_hostname=host, assert_hostname=host, ca_certs=where()
        )
        connection.cert_reqs = "CERT_REQUIRED"
    name = f"[{host}]" if ":" in host else host
    # What comes by drips never runs into a socket's timeout; the whole is ended from outside.
    watch = threading.Timer(_left(deadline), _hang_up, [connection])
    watch.start()
    try:
        connection.connect()
        connection.request(
            "GET",
            urllib.parse.quote(path or "/", safe="%/:=&?~+!$,;'@()*[]"),
            headers={"Host": name if port is None else f"{name}:{port}", "Accept-Encoding": "identity"},
            preload_content=False,
        )
        yield connection.getresponse()
    except (OSError, HTTPError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("the URL does not answer, or breaks off; send the file itself.") from error
    finally:
        watch.cancel()
        connection.close()


def _hang_up(connection) -> None:
    with contextlib.suppress(OSError, AttributeError):  # it may be closed, or not open yet
        connection.sock.shutdown(socket.SHUT_RDWR)


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)


def _body(answer, max_bytes: int, deadline: float) -> bytes:
    if answer.status != 200:
        raise InputError("the URL cannot be fetched: the server answers {code}.", "image", code=answer.status)
    data = bytearray()
    while chunk := answer.read1(2**16):
        data += chunk
        if len(data) > max_bytes:
            raise InputError("the URL sends more than {most} bytes; give a smaller picture.", "image", most=max_bytes)
        if time.monotonic() > deadline:
            raise InputError(
                "the URL has not sent its picture in {most:.0f} s; send the file itself.", "image", most=MAX_SECONDS
            )
    return bytes(data)


def public_address(host: str) -> str:
    """An address of a host, none of whose addresses is private.

    Raises:
        InputError: one is of this machine, its network or a reserved range, or there is none.
    """
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise InputError(
            "the URL's host {host!r} is not found; look for a typing error.", "image", host=host
        ) from error
    for address in sorted(found):
        if not is_public(address):
            raise InputError(
                "the URL's host {host!r} is not on the public internet; send the file itself.", "image", host=host
            )
    return sorted(found, key=lambda address: (":" in address, address))[0]


def is_public(text: str) -> bool:
    """Whether an IP address is one of the public internet; none that leads to an IPv4 address by a tunnel is."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif address.sixtofour is not None or address.teredo is not None:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved
