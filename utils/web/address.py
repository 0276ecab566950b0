"""The address of the page: host, port and token, and which requests they allow."""
from __future__ import annotations

import dataclasses
import hmac
import ipaddress
import re
import secrets
import socket
import urllib.parse
from collections.abc import Mapping

from utils.errors import UserError

MIN_TOKEN = 12  # Characters; a shorter token can be guessed over a network.
TOKEN = re.compile(r"[\w.~-]+", re.ASCII)  # Neither an address nor a cookie has to escape these.


@dataclasses.dataclass(frozen=True)
class Address:
    """Where the page is served.

    Attributes:
        host: name or IP address to listen on.
        port: to listen on; 0 for any free one.
        token: that every request must have; None: requests need none.
    """
    host: str
    port: int
    token: str | None = None

    @classmethod
    def parse(cls, text: str, token: str | None = None) -> Address:
        """Read [HOST:]PORT; a token is made where the host is not this machine alone.

        Raises:
            UserError: for another form, and for a token that is too short or has other characters.
        """
        host, _, port = text.rpartition(":")
        host = host.strip("[]") or "127.0.0.1"
        if not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise UserError(f"--serve {text}: expected [HOST:]PORT, such as 8000")
        if token is not None and (len(token) < MIN_TOKEN or not TOKEN.fullmatch(token)):
            raise UserError(f"--token: expected at least {MIN_TOKEN} letters, digits and . _ ~ -, "
                            f"or no --token, which makes one")
        if token is None and not is_loopback(host):
            token = secrets.token_urlsafe(16)
        return cls(host, int(port), token)

    @property
    def cookie(self) -> str:
        """Name of the cookie with the token; cookies do not tell ports apart."""
        return f"pipnet_{self.port}"

    def url(self) -> str:
        """Return the address to open in a browser, with the token."""
        host = socket.gethostname() if self.host in ("0.0.0.0", "::") else \
            "localhost" if is_loopback(self.host) else self.host
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.port}/" + (f"?token={self.token}" if self.token else "")

    def why_refused(self, headers: Mapping[str, str], query: Mapping[str, str],
                    cookies: Mapping[str, str]) -> str | None:
        """Return why a request is refused, or None.

        Without a token, Host must name this machine: a foreign site whose name leads to 127.0.0.1
        (DNS rebinding) has its own name there.
        """
        if self.token is None:
            name = urllib.parse.urlsplit("//" + headers.get("Host", "")).hostname or ""
            return None if is_loopback(name) else \
                f"Host is {name or 'missing'}, expected localhost"
        given = query.get("token") or cookies.get(self.cookie, "")
        if hmac.compare_digest(given.encode(), self.token.encode()):
            return None
        return "the token is missing or wrong; open the address that demo.py printed"


def is_loopback(host: str) -> bool:
    """Return whether a host name or IP address is that of this machine for itself alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def same_origin(headers: Mapping[str, str]) -> bool:
    """Return whether Origin equals Host, as it does for a WebSocket of the page itself."""
    origin = urllib.parse.urlsplit(headers.get("Origin", ""))
    return bool(origin.netloc) and origin.netloc.lower() == headers.get("Host", "").lower()
