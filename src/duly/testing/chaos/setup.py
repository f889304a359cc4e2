"""Where the messages of a run are, where effects are apart from them, and what can befall both."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from duly.testing.chaos.kafka import KafkaNode
from duly.testing.chaos.node import ALARMS, Node
from duly.testing.chaos.server import Server
from duly.testing.chaos.workload import LEASE_S

StoreKind = Literal["sqlite", "postgres"]
BrokerKind = Literal["sqlite", "postgres", "rabbitmq", "kafka"]
STORES: tuple[StoreKind, ...] = get_args(StoreKind)
BROKERS: tuple[BrokerKind, ...] = get_args(BrokerKind)

STRIKES: Mapping[str, float] = {
    "kill worker": 5.0,
    "kill publisher": 3.0,
    "pause": 2.5,
    "drain": 1.5,
    "clock": 1.0,
    "lock": 1.0,
    "full disk": 1.5,
    "kill server": 0.7,
    "immediate shutdown": 0.7,
    "end session": 3.0,
    "cut before COMMIT": 1.5,
    "cut after COMMIT": 1.5,
    "kill node": 0.7,
    "stop node": 0.4,
    "memory alarm": 0.5,
    "disk alarm": 0.5,
    "cut before publish": 1.5,
    "cut after publish": 1.5,
    "cut before ack": 2.0,
    "cut after ack": 1.5,
    "cut before transaction": 1.5,
    "cut after transaction": 1.5,
    "silence": 1.0,
    "freeze node": 0.4,
}
"""What befalls a crowd, and how often in proportion."""

_ON_FILES = ("full disk",)
_ON_A_SERVER = ("end session", "cut before COMMIT", "cut after COMMIT")
_ON_A_PRIVATE_SERVER = ("kill server", "immediate shutdown")
ON_A_NODE = tuple(kind for kind in STRIKES if kind in Node.strikes | KafkaNode.strikes)
LASTING = ("kill node", "stop node", "freeze node", *ALARMS)
"""What goes on for a while."""

# What the log of a server tells, that nobody strikes but a stranger's lock.
_TOLD = ("lock timeout", "statement timeout")

FAULTS = (
    "kill worker",
    "kill publisher",
    "kill by message",
    "pause",
    "drain",
    "clock",
    "lock",
    *_ON_FILES,
    *_ON_A_SERVER,
    *_ON_A_PRIVATE_SERVER,
    *_TOLD,
    *ON_A_NODE,
)
"""All that is counted as a fault that hit."""

SERVER_LOG = "server.log"
"""In the folder of a round: what the server wrote meanwhile."""

NODE_LOG = "node.log"
"""And what the node did."""

# Who waits for longer gives up, in milliseconds. Who only looks goes by the second of the two: in
# transactions of duly's own the statement's deadline is another, and the lock's comes first.
_PATIENCE = {"lock_timeout": "300", "statement_timeout": "150"}
_PACE_S = (0.05, 0.45)
# Of a stranger's locks so many are where effects are apart; more where the only server is there.
_APART, _APART_ON_THE_SERVER = 0.3, 0.7


@dataclass(frozen=True, slots=True)
class Setup:
    """``broker``: where the messages are and, by claim, some effects, unless it is a node of
    RabbitMQ or Kafka. ``store``: where others are, by inbox or cursor, with the outbox. ``server``
    is there where either is on PostgreSQL, ``node`` where there is RabbitMQ or Kafka.
    """

    broker: BrokerKind = "sqlite"
    store: StoreKind = "sqlite"
    server: Server | None = None
    node: Node | KafkaNode | None = None

    def __str__(self) -> str:
        there = "" if self.node else "there and "
        return f"messages in {self.broker}, effects {there}in {self.store}"

    def sites(self, files: Path, name: str, number: int = 0) -> tuple[str, str]:
        """The URLs of both for the process of this number, in the round of this name."""
        return (
            self._site(self.broker, files / "chaos.db", name, number),
            self._site(self.store, files / "apart.db", f"{name}_apart", number),
        )

    def sites_at_rest(self, files: Path, name: str) -> tuple[str, str]:
        """The same for who prepares and reads, past every link and with all patience."""
        return (
            self._site(self.broker, files / "chaos.db", name, None),
            self._site(self.store, files / "apart.db", f"{name}_apart", None),
        )

    def _site(self, kind: BrokerKind, path: Path, schema: str, number: int | None) -> str:
        if kind == "sqlite":
            return f"sqlite:///{path}"
        if self.node is not None and kind not in STORES:
            return self.node.url(schema, at_rest=number is None)
        from duly.testing.chaos.schema import url_of

        assert self.server is not None, "a run on PostgreSQL has a server"
        if number is None:
            return url_of(self.server.direct, schema)
        return url_of(self.server.url, schema, number, **_PATIENCE)

    @property
    def locked_apart(self) -> float:
        """How many of a stranger's locks are where effects are apart, of one."""
        if self.node is not None:
            return 1.0
        only_there = self.store == "postgres" != self.broker
        return _APART_ON_THE_SERVER if only_there else _APART

    @property
    def pause_s(self) -> float:
        """How long who is stopped stands still, for others to be given what it holds."""
        return self.node.silent_s if self.node is not None else 2 * LEASE_S

    @property
    def pace_s(self) -> tuple[float, float]:
        """The least and the most that is left between one strike and the next."""
        return self.node.pace_s if self.node is not None else _PACE_S

    @property
    def takes_aim(self) -> bool:
        """Whether workers are struck in the middle of a handler, and not at any time."""
        return self.node is not None and self.node.takes_aim

    @property
    def more_rest_s(self) -> float:
        """How much longer than elsewhere it may take until nothing is left to do."""
        return self.node.more_rest_s if self.node is not None else 0.0

    def profile(self, without: Collection[str] = ()) -> list[str]:
        """The faults that have to hit for a run to mean something."""
        return [kind for kind in FAULTS if kind not in without and self._can(kind)]

    def strikes(self, without: Collection[str] = ()) -> dict[str, float]:
        """What is brought about, by its odds."""
        kept = {kind: odds for kind, odds in STRIKES.items() if kind not in without}
        return {kind: odds for kind, odds in kept.items() if self._can(kind)}

    def _can(self, kind: str) -> bool:
        if kind in _ON_FILES:
            return "sqlite" in (self.broker, self.store)
        if kind in ON_A_NODE:
            return self.node is not None and kind in self.node.strikes
        if kind in _ON_A_SERVER:
            return self.server is not None
        if kind in _ON_A_PRIVATE_SERVER or kind in _TOLD:
            return self.server is not None and self.server.is_private
        return True


def schema_of_round(number: int) -> str:
    """A name that no other run on this server has."""
    return f"chaos_{os.getpid()}_{number}"
