"""Where a RabbitMQ is: AMQP URIs as people write them, several hosts, TLS."""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from duly.errors import ConfigurationError
from duly.message.limits import check_name

OPTIONS = (
    "namespace",
    "heartbeat",
    "connection_timeout",
    "cacertfile",
    "certfile",
    "keyfile",
    "verify",
    "server_name_indication",
)
PORT, TLS_PORT = 5672, 5671


@dataclass(frozen=True, slots=True)
class Address:
    """What an AMQP URI says. ``hosts`` are tried in turn; ``heartbeat_s`` bounds how long a dead
    peer goes unnoticed: twice that.
    """

    hosts: Sequence[tuple[str, int]]
    user: str
    password: str = field(repr=False)
    vhost: str
    namespace: str
    heartbeat_s: int
    connect_s: float
    tls: Mapping[str, Any] | None

    def tls_for(self, host: str) -> Any:
        """What the driver takes as ``ssl``: False, or its options for this host."""
        if self.tls is None:
            return False
        return {"server_hostname": host, **self.tls}


def address_of(url: str, shown: str) -> Address:
    """The address that a URI names; ``shown`` is how it may appear in an error.

    Raises `ConfigurationError`.
    """
    try:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
    except ValueError:
        raise ConfigurationError(f"{shown!r} is not a proper URL") from None
    for name in options:
        if name not in OPTIONS:
            raise ConfigurationError(
                f"{shown!r}: no option {name!r}; there are {', '.join(OPTIONS)}"
            )
    secure = parts.scheme == "amqps"
    login, _, places = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    return Address(
        hosts=_hosts(places, TLS_PORT if secure else PORT, shown),
        user=unquote(user) or "guest",
        password=unquote(password) or "guest",
        vhost=_vhost(parts.path),
        namespace=_namespace(options, shown),
        heartbeat_s=int(_number(options, "heartbeat", 15, shown)),
        connect_s=_number(options, "connection_timeout", 10_000, shown) / 1000,
        tls=_tls(options, shown, secure=secure),
    )


def _hosts(places: str, default: int, shown: str) -> Sequence[tuple[str, int]]:
    found = []
    for place in (places or "localhost").split(","):
        host, bracket, rest = place.rpartition("]")
        name, _, port = rest.partition(":")
        name = f"{host}{bracket}".strip("[]") or name
        try:
            found.append((name or "localhost", int(port or default)))
        except ValueError:
            raise ConfigurationError(f"{shown!r}: a port is a number") from None
    return tuple(found)


def _vhost(path: str) -> str:
    """``amqp://host``, ``amqp://host/`` and ``amqp://host/%2F`` all name the default one."""
    return unquote(path.removeprefix("/")) or "/"


def _namespace(options: Mapping[str, str], shown: str) -> str:
    namespace = options.get("namespace", "duly")
    try:
        check_name("namespace", namespace)
    except ConfigurationError as error:
        raise ConfigurationError(f"{shown!r}: {error}") from None
    if len(namespace) > 64:
        raise ConfigurationError(f"{shown!r}: a namespace has at most 64 characters")
    return namespace


def _number(options: Mapping[str, str], name: str, default: float, shown: str) -> float:
    try:
        number = float(options.get(name, default))
    except ValueError:
        number = 0
    if not 1 <= number < 1e9:
        raise ConfigurationError(f"{shown!r}: {name} is a number from 1")
    return number


def _tls(options: Mapping[str, str], shown: str, *, secure: bool) -> Mapping[str, Any] | None:
    """Verified, unless the URI itself says otherwise."""
    if not secure:
        _refuse_tls(options, shown)
        return None
    verify = options.get("verify", "verify_peer")
    if verify not in ("verify_peer", "verify_none"):
        raise ConfigurationError(
            f"{shown!r}: verify={verify!r}; there are verify_peer, verify_none"
        )
    tls: dict[str, Any] = {"cert_reqs": ssl.CERT_REQUIRED}
    if verify == "verify_none":
        tls = {"cert_reqs": ssl.CERT_NONE, "server_hostname": None}
    elif "server_name_indication" in options:
        tls["server_hostname"] = options["server_name_indication"]
    names = {"cacertfile": "ca_certs", "certfile": "certfile", "keyfile": "keyfile"}
    return tls | {names[option]: path for option, path in options.items() if option in names}


def _refuse_tls(options: Mapping[str, str], shown: str) -> None:
    """Refuse what would be silently without effect."""
    for name in ("cacertfile", "certfile", "keyfile", "verify", "server_name_indication"):
        if name in options:
            raise ConfigurationError(f"{shown!r}: {name} is for amqps://, and this is amqp://")
