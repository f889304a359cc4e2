"""Where a Kafka cluster is: its first brokers, a login, and what is passed on to the driver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from urllib.parse import parse_qsl, unquote, urlsplit

from duly.errors import ConfigurationError
from duly.message.limits import check_name

PORT = 9092
# What a record may need beside its body: 16 KiB of headers, id, source, key, an error.
_AROUND_BYTES = 48_000
_RECORD_BYTES = 1024 * 1024 + _AROUND_BYTES
# And a batch, as brokers count it, beside one record.
_BATCH_BYTES = 1000
# Shorter, and a short pause of a process costs its claims; longer, and its messages wait longer.
SESSION_TIMEOUT_MS = 15_000
OWN = ("namespace", "replication")
# Options of the driver that change nothing which is promised.
PASSED_ON = (
    *("security.protocol", "sasl.mechanism", "ssl.ca.location", "ssl.certificate.location"),
    *("ssl.key.location", "ssl.endpoint.identification.algorithm", "ssl.cipher.suites"),
    *("sasl.kerberos.service.name", "sasl.kerberos.principal", "sasl.kerberos.keytab"),
    *("client.id", "client.rack", "broker.address.family", "socket.keepalive.enable"),
    *("socket.connection.setup.timeout.ms", "metadata.max.age.ms", "reconnect.backoff.max.ms"),
    *("compression.type", "linger.ms", "batch.size", "message.max.bytes"),
    "transaction.timeout.ms",
    *("group.protocol", "session.timeout.ms", "heartbeat.interval.ms"),
    *("partition.assignment.strategy", "fetch.max.bytes", "max.partition.fetch.bytes"),
)
_PRODUCERS = frozenset({"compression.type", "linger.ms", "batch.size"})
# What a worker that dies while it commits leaves open keeps readers waiting for so long, unless
# another takes over. Longer than a node takes to restart: Kafka 4.3.1 as the only node forgets then
# to end what has timed out meanwhile.
_TRANSACTION_MS = "40000"
_CONSUMERS = frozenset(
    {
        *("group.protocol", "session.timeout.ms", "heartbeat.interval.ms"),
        *("partition.assignment.strategy", "fetch.max.bytes", "max.partition.fetch.bytes"),
    }
)
# As it is in the driver, unless it is given.
_BEAT_MS = 3000
_COMMITS = "duly commits a position when what stands before it is settled, and not by time"
_CONFIRMS = "what confirms a publish follows from its topic's guarantee"
_SECRET = "write the login before the first host (kafka://user:***@host); it is shown nowhere then"
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "enable.auto.commit": _COMMITS,
        "auto.commit.interval.ms": _COMMITS,
        "enable.auto.offset.store": _COMMITS,
        "auto.offset.reset": "a lost position is an error; start= says where to begin first",
        "isolation.level": "messages of transactions that were rolled back are never read",
        "acks": _CONFIRMS,
        "request.required.acks": _CONFIRMS,
        "enable.idempotence": "without it a retry of the driver may double or reorder messages",
        "max.in.flight.requests.per.connection": "more than five reorder what is retried",
        "retries": "the driver retries until the deadline; then the outcome is unknown",
        "message.send.max.retries": "the driver retries until the deadline",
        "delivery.timeout.ms": "duly's own deadline says when an outcome is unknown",
        "message.timeout.ms": "duly's own deadline says when an outcome is unknown",
        "partitioner": "keys go where Java's clients put them (murmur2_random)",
        "transactional.id": "two processes with one of these fence each other off",
        "group.id": "a consumer's name is its group",
        "group.instance.id": "two workers of one name fence each other off",
        "max.poll.interval.ms": "duly polls while handlers run; their time limit is max_run_s",
        "enable.ssl.certificate.verification": "anybody could answer as the cluster",
        "allow.auto.create.topics": "a topic is made when it is declared, with its partitions",
        "sasl.username": _SECRET,
        "sasl.password": _SECRET,
        "ssl.key.password": "give a key without one, readable by its user only",
    }
)
_PROTOCOLS = ("plaintext", "ssl", "sasl_plaintext", "sasl_ssl")


@dataclass(frozen=True, slots=True)
class Address:
    """What a URL says. ``replication``: of topics that are made; -1: as the cluster is set up."""

    bootstrap: str
    namespace: str
    replication: int
    options: Mapping[str, str]
    login: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def common(self) -> dict[str, str]:
        """What every client of the driver is given."""
        kept = {
            name: value
            for name, value in self.options.items()
            if name not in (*_PRODUCERS, *_CONSUMERS, "transaction.timeout.ms")
        }
        return {"bootstrap.servers": self.bootstrap, **kept, **self.login}

    @property
    def producing(self) -> dict[str, str]:
        """What producers are given."""
        return self.common | {k: v for k, v in self.options.items() if k in _PRODUCERS}

    @property
    def transaction_timeout_s(self) -> float:
        """How long one of Kafka's transactions may be open before the cluster aborts it."""
        return int(self.options["transaction.timeout.ms"]) / 1000

    @property
    def max_message_bytes(self) -> int:
        """The largest body that surely fits."""
        return int(self.options["message.max.bytes"]) - _AROUND_BYTES

    @property
    def takes(self) -> Mapping[str, str]:
        """The setting of topics that are made for that, whatever the brokers' own is."""
        return {"max.message.bytes": str(int(self.options["message.max.bytes"]) + _BATCH_BYTES)}

    @staticmethod
    def batch_of(body_bytes: int) -> int:
        """What a topic has to take for a body of this size, at the most."""
        return body_bytes + _AROUND_BYTES + _BATCH_BYTES

    @property
    def session_timeout_ms(self) -> int:
        """After so long a silence a member of a group is taken for dead."""
        return int(self.options.get("session.timeout.ms", SESSION_TIMEOUT_MS))

    @property
    def stands_still_s(self) -> float:
        """After so long without a turn a process asks whether its partitions are still its own:
        before the group gives them to others, and as seldom as may be on a busy machine.
        """
        beat_ms = int(self.options.get("heartbeat.interval.ms", _BEAT_MS))
        return min(1.0, (self.session_timeout_ms - beat_ms) / 2000)

    @property
    def consuming(self) -> dict[str, str]:
        """What members of consumer groups are given."""
        return self.common | {k: v for k, v in self.options.items() if k in _CONSUMERS}

    @property
    def is_plain(self) -> bool:
        """Whether nothing is passed on to the driver but what duly itself says."""
        return self.options.keys() <= {"message.max.bytes", "transaction.timeout.ms"}

    @property
    def is_encrypted(self) -> bool:
        """Whether connections are by TLS."""
        return self.options.get("security.protocol", "plaintext").lower().endswith("ssl")

    @property
    def is_new_protocol(self) -> bool:
        """Whether the brokers deal out partitions (KIP-848), and say when a member is gone."""
        return self.options.get("group.protocol", "classic").lower() == "consumer"

    @property
    def is_eager(self) -> bool:
        """Whether a rebalance takes everything away first."""
        if self.is_new_protocol:
            return False
        return "cooperative" not in self.options.get("partition.assignment.strategy", "cooperative")


def address_of(url: str, shown: str) -> Address:
    """The address that a URL names; ``shown`` is how it may appear in an error.

    Raises `ConfigurationError`.
    """
    try:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
    except ValueError:
        raise ConfigurationError(f"{shown!r} is not a proper URL") from None
    if parts.path.strip("/"):
        raise ConfigurationError(
            f"{shown!r}: a cluster has no parts that a path could name; for topics of its own "
            "write ?namespace=..."
        )
    for name in options:
        _check_option(name, shown)
    login, _, places = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    credentials = {}
    if login:
        credentials = {"sasl.username": unquote(user), "sasl.password": unquote(password)}
        options = {"security.protocol": "sasl_ssl", "sasl.mechanism": "SCRAM-SHA-512"} | options
    protocol = options.get("security.protocol", "plaintext").lower()
    if protocol not in _PROTOCOLS:
        raise ConfigurationError(f"{shown!r}: security.protocol is {', '.join(_PROTOCOLS)}")
    if login and not protocol.startswith("sasl"):
        raise ConfigurationError(f"{shown!r}: security.protocol={protocol} sends no login")
    return Address(
        bootstrap=_hosts(places, shown),
        namespace=_namespace(options, shown),
        replication=_replication(options, shown),
        options=_passed_on(options, shown),
        login=credentials,
    )


def _check_option(name: str, shown: str) -> None:
    if name in REFUSED:
        raise ConfigurationError(f"{shown!r}: {name} is not yours to set: {REFUSED[name]}")
    if name not in OWN and name not in PASSED_ON:
        raise ConfigurationError(
            f"{shown!r}: no option {name!r}; there are {', '.join((*OWN, *PASSED_ON))}"
        )


def _hosts(places: str, shown: str) -> str:
    found = []
    for place in (places or "localhost").split(","):
        host, colon, port = place.strip().rpartition(":")
        if not colon or host.endswith(":"):  # or a bare IPv6 address
            host, port = place.strip(), str(PORT)
        if any(letter.isspace() for letter in host):
            raise ConfigurationError(f"{shown!r}: {host!r} is no name of a host")
        if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
            raise ConfigurationError(
                f"{shown!r}: a port is a number from 1 to 65535; in a password, write / as %2F"
            )
        found.append(f"{host or 'localhost'}:{port}")
    return ",".join(found)


def _namespace(options: Mapping[str, str], shown: str) -> str:
    namespace = options.get("namespace")
    if namespace is None:
        return ""
    try:
        check_name("namespace", namespace)
    except ConfigurationError as error:
        raise ConfigurationError(f"{shown!r}: {error}") from None
    if namespace == "duly" or namespace.startswith("duly."):
        raise ConfigurationError(
            f"{shown!r}: the namespace 'duly' has the names of duly's own topics; take another"
        )
    if len(namespace) > 64:
        raise ConfigurationError(f"{shown!r}: a namespace has at most 64 characters")
    return namespace


def _passed_on(options: Mapping[str, str], shown: str) -> Mapping[str, str]:
    passed = {name: value for name, value in options.items() if name not in OWN}
    session = passed.get("session.timeout.ms", str(SESSION_TIMEOUT_MS))
    if not (session.isascii() and session.isdigit()):
        raise ConfigurationError(f"{shown!r}: session.timeout.ms is a number")
    beat = passed.get("heartbeat.interval.ms", "1")
    if not (beat.isascii() and beat.isdigit() and 0 < int(beat) < int(session)):
        raise ConfigurationError(
            f"{shown!r}: heartbeat.interval.ms is a number below session.timeout.ms ({session})"
        )
    if passed.get("group.protocol", "classic").lower() == "consumer":
        _check_dealt_by_brokers(passed, shown)
    size = passed.setdefault("message.max.bytes", str(_RECORD_BYTES))
    if not (size.isascii() and size.isdigit() and 64_000 <= int(size) <= 1_000_000_000):
        raise ConfigurationError(f"{shown!r}: message.max.bytes is a number from 64000")
    longest = passed.setdefault("transaction.timeout.ms", _TRANSACTION_MS)
    # Who starts waits for a minute to be told where to go on, which it is not before that.
    if not (longest.isascii() and longest.isdigit() and 1000 <= int(longest) <= 40_000):
        raise ConfigurationError(
            f"{shown!r}: transaction.timeout.ms is a number from 1000 to 40000"
        )
    return passed


def _check_dealt_by_brokers(passed: Mapping[str, str], shown: str) -> None:
    for name in ("session.timeout.ms", "heartbeat.interval.ms", "partition.assignment.strategy"):
        if name in passed:
            raise ConfigurationError(
                f"{shown!r}: with group.protocol=consumer the brokers say what {name} is "
                "(group.consumer.session.timeout.ms, group.consumer.heartbeat.interval.ms, "
                "group.consumer.assignors)"
            )


def _replication(options: Mapping[str, str], shown: str) -> int:
    given = options.get("replication", "-1")
    if given != "-1" and not (given.isascii() and given.isdigit() and 1 <= int(given) <= 99):
        raise ConfigurationError(f"{shown!r}: replication is a number from 1")
    return int(given)
