"""Where a RabbitMQ is: AMQP URIs as people write them, several hosts, TLS."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from duly.brokers.rabbitmq.management import Management, management_at
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
    "auth_mechanism",
    "server_name_indication",
    "management",
    "consumer_timeout",
)
PORT, TLS_PORT = 5672, 5671
# How long a server that nobody has configured lets a message be unacknowledged.
CONSUMER_TIMEOUT_S = 1800.0
# Of that time what is delivered and not begun is kept; handlers have the rest.
_KEPT = 0.45


@dataclass(frozen=True, slots=True)
class Address:
    """What an AMQP URI says. ``hosts`` are tried in turn; ``heartbeat_s`` bounds how long a dead
    peer goes unnoticed: twice that. ``consumer_timeout_s`` is what the server is said to be
    configured with; None: nobody says.
    """

    hosts: Sequence[tuple[str, int]]
    user: str
    password: str = field(repr=False)
    vhost: str
    namespace: str
    heartbeat_s: int
    connect_s: float
    tls: Mapping[str, Any] | None
    mechanism: str = "PLAIN"
    management: Management | None = None
    consumer_timeout_s: float | None = None

    @property
    def keeps_s(self) -> float:
        """How long what was delivered may wait for its turn in this process: the server counts it
        as unacknowledged from then on, and does not say for how long it may be.
        """
        return _KEPT * (self.consumer_timeout_s or CONSUMER_TIMEOUT_S)

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
    if "@" in login and "," in login:
        raise ConfigurationError(
            f"{shown!r}: write the login once, before the first host (amqp://user:...@one,two), "
            "and an @ or a comma in the password as %40 and %2C"
        )
    user, _, password = login.partition(":")
    address = Address(
        hosts=_hosts(places, TLS_PORT if secure else PORT, shown),
        user=unquote(user) or "guest",
        password=unquote(password) or "guest",
        vhost=_vhost(parts.path),
        namespace=_namespace(options, shown),
        heartbeat_s=int(_number(options, "heartbeat", 15, shown)),
        connect_s=_number(options, "connection_timeout", 10_000, shown) / 1000,
        tls=_tls(options, shown, secure=secure),
        mechanism=_mechanism(options, shown),
    )
    if "consumer_timeout" in options:
        said_s = _number(options, "consumer_timeout", 0, shown) / 1000
        address = replace(address, consumer_timeout_s=said_s)
    if "management" in options:
        found = management_at(options["management"], address, shown)
        address = replace(address, management=found)
    return address


def _hosts(places: str, default: int, shown: str) -> Sequence[tuple[str, int]]:
    found = []
    for given in (places or "localhost").split(","):
        place = given.strip()
        host, bracket, rest = place.rpartition("]")
        name, _, port = rest.partition(":")
        name = f"{host}{bracket}".strip("[]") or name
        number = int(port) if port.isascii() and port.isdigit() else 0 if port else default
        if not 1 <= number <= 65535:
            raise ConfigurationError(
                f"{shown!r}: a port is a number from 1 to 65535; in a password, write / as %2F"
            )
        found.append((name or "localhost", number))
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


def _mechanism(options: Mapping[str, str], shown: str) -> str:
    """How the user is told: by a password, or by the client's certificate."""
    mechanism = options.get("auth_mechanism", "plain").upper()
    if mechanism not in ("PLAIN", "EXTERNAL"):
        raise ConfigurationError(f"{shown!r}: there are auth_mechanism=plain, external")
    return mechanism


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
    for option in names:
        if option in options and not os.access(options[option], os.R_OK):
            raise ConfigurationError(f"{shown!r}: {option}={options[option]} cannot be read")
    return tls | {names[option]: path for option, path in options.items() if option in names}


def _refuse_tls(options: Mapping[str, str], shown: str) -> None:
    """Refuse what would be silently without effect."""
    for name in ("cacertfile", "certfile", "keyfile", "verify", "server_name_indication"):
        if name in options:
            raise ConfigurationError(f"{shown!r}: {name} is for amqps://, and this is amqp://")
