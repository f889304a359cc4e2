"""The server's management interface, read by HTTP: what AMQP does not tell."""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import SplitResult, quote, unquote, urlencode, urlsplit

from duly.errors import ConfigurationError

_DEADLINE_S = 10.0
_MAX_BYTES = 16 * 1024 * 1024
_PAGE = 500
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Unseen(Exception):
    """It could not be looked at, for a reason that may pass. No user or password is in it."""


class Forbidden(Unseen):
    """The user may not look at this."""


@dataclass(frozen=True, slots=True)
class Management:
    """Where to ask, and as whom. ``places`` are tried in turn: scheme, host, port, path before
    ``/api``.
    """

    places: Sequence[tuple[str, str, int, str]]
    user: str
    password: str = field(repr=False)
    tls: Mapping[str, Any]

    def get(self, *path: str, **query: Any) -> Any:
        """What lies at a path below ``/api``. Raises `Unseen`, and `ConfigurationError` where the
        user or the password is wrong.
        """
        why: Unseen | None = None
        for place in self.places:
            try:
                return self._get(place, path, query)
            except Forbidden:
                raise
            except Unseen as error:
                why = error
        assert why is not None
        raise why

    def pages(self, *path: str, **query: Any) -> Sequence[Mapping[str, Any]]:
        """Everything that a long list has. Raises as `get`."""
        found: list[Mapping[str, Any]] = []
        number = count = 1
        while number <= count:
            page = self.get(*path, page=number, page_size=_PAGE, **query)
            found += page["items"]
            number, count = number + 1, int(page["page_count"])
        return found

    def _get(
        self, place: tuple[str, str, int, str], path: Sequence[str], query: Mapping[str, Any]
    ) -> Any:
        scheme, host, port, before = place
        where = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{before}"
        target = f"{before}/api/{'/'.join(quote(part, safe='') for part in path)}"
        if query:
            target += f"?{urlencode(query)}"
        login = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        connection = self._connection(scheme, host, port)
        try:
            connection.request("GET", target, headers={"Authorization": f"Basic {login}"})
            with connection.getresponse() as response:
                body = _read(response, where)
        except (OSError, http.client.HTTPException) as error:
            raise Unseen(f"{where}: {_reason(error)}") from None
        finally:
            connection.close()
        return self._answer(response.status, body, where, target.partition("?")[0])

    def _connection(self, scheme: str, host: str, port: int) -> http.client.HTTPConnection:
        if scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=_DEADLINE_S)
        return http.client.HTTPSConnection(
            host, port, timeout=_DEADLINE_S, context=_context(self.tls)
        )

    def _answer(self, status: int, body: bytes, where: str, target: str) -> Any:
        if status == 401 and target.endswith("/whoami"):
            raise ConfigurationError(
                f"the management interface at {where} refuses user {self.user!r}: check its "
                "password, and give it the tag policymaker (or management, which sees less)"
            )
        if status in (401, 403):
            raise Forbidden(f"{where}{target}: user {self.user!r} may not look at it")
        if status != 200:
            raise Unseen(f"{where}{target} answers with status {status}")
        try:
            return json.loads(body)
        except ValueError:
            raise Unseen(f"{where}{target} answers with something else than JSON") from None


def _read(response: http.client.HTTPResponse, where: str) -> bytes:
    """The body, within a deadline and a size: the other side may be anything."""
    until, body = time.monotonic() + _DEADLINE_S, bytearray()
    while piece := response.read1(65536):
        body += piece
        if len(body) > _MAX_BYTES:
            raise Unseen(f"{where} answers with over {_MAX_BYTES // 2**20} MiB")
        if time.monotonic() > until:
            raise Unseen(f"{where} does not come to an end")
    return bytes(body)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _context(tls: Mapping[str, Any]) -> ssl.SSLContext:
    """Verified, unless the URI says otherwise, by the files that it names."""
    context = ssl.create_default_context(cafile=tls.get("ca_certs"))
    if "certfile" in tls:
        context.load_cert_chain(tls["certfile"], tls.get("keyfile"))
    if tls.get("cert_reqs") == ssl.CERT_NONE:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


# --- how a URI names it


class Known(Protocol):
    """What the rest of the URI says."""

    @property
    def hosts(self) -> Sequence[tuple[str, int]]:
        """Where the server is."""
        ...

    @property
    def user(self) -> str:
        """Who asks."""
        ...

    @property
    def password(self) -> str:
        """Its secret."""
        ...

    @property
    def tls(self) -> Mapping[str, Any] | None:
        """None: without TLS."""
        ...


def management_at(said: str, known: Known, shown: str) -> Management:
    """``said`` is a port on the same hosts, or a URL; ``shown`` is how the URI may appear in an
    error. Raises `ConfigurationError`.
    """
    tls = {} if known.tls is None else known.tls
    if said.isascii() and said.isdigit() and 1 <= int(said) <= 65535:
        scheme = "http" if known.tls is None else "https"
        places = [(scheme, host, int(said), "") for host, _ in known.hosts]
        return Management(places, known.user, known.password, tls)
    try:
        parts = urlsplit(said)
        place = _place(parts)
    except ValueError:
        parts, place = None, None
    if parts is None or place is None or parts.query or parts.fragment:
        raise ConfigurationError(
            f"{shown!r}: management is a port, or http(s)://user:password@host:port"
        )
    if place[0] == "http" and known.tls is not None and place[1] not in _LOOPBACK:
        raise ConfigurationError(
            f"{shown!r}: management=http:// would send the password unencrypted: use https://"
        )
    user = known.user if parts.username is None else unquote(parts.username)
    password = known.password if parts.password is None else unquote(parts.password)
    return Management([place], user, password, tls)


def _place(parts: SplitResult) -> tuple[str, str, int, str] | None:
    ports = {"http": 15672, "https": 15671}
    if parts.scheme not in ports or not parts.hostname:
        return None
    path = parts.path.rstrip("/").removesuffix("/api")
    if parts.port == 0:
        return None
    return parts.scheme, parts.hostname, parts.port or ports[parts.scheme], path
