"""What is published and who consumes it: every guarantee, plain and in order, as far as the broker
can have it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args

import msgspec

from duly.broker import Capabilities
from duly.guarantees import Admission, Guarantee, GuaranteeName, RetryPolicy
from duly.message import Topic
from duly.testing.checker import Terms
from duly.testing.history import About

LEASE_S = 1.5
ATTEMPTS = 4
LONGEST_BACKOFF_S = 0.4
POLICY = RetryPolicy(attempts=ATTEMPTS, first_s=0.05, longest_s=LONGEST_BACKOFF_S)
# Of a topic of a log, so that several work on it at once.
_PARTITIONS = 4
# The whole log is read in the end.
KEPT_S = 30 * 86400.0

Manner = Literal[
    "ok", "fail once", "fail always", "retry", "reject", "slow", "kill", "stall", "damaged"
]
"""What handlers do with a message. Of some consumers, "kill" kills the worker that handles it, and
"stall" stops it, the first time. "damaged": its body cannot be decoded."""

MANNERS: tuple[Manner, ...] = get_args(Manner)
_ODDS = (72.25, 5, 2, 5, 2, 10, 0.25, 1.25, 2.25)

Way = Literal["one", "many", "gathered", "transaction", "within", "late", "view"]
"""How a publisher publishes: alone, many at once, from the tasks of a loop, in a transaction of
the app or of its own connection, to be delivered later, or fire and forget."""

WAYS: tuple[Way, ...] = get_args(Way)
_WAY_ODDS = (30, 14, 8, 12, 10, 8, 18)


class Item(msgspec.Struct, frozen=True):
    """A payload: its number, and how it is to be handled."""

    n: int
    manner: Manner


inputs: Topic[Item] = Topic("inputs", Item, guarantee="exactly-once", retention_s=KEPT_S)
lines: Topic[Item] = Topic(
    "lines",
    Item,
    guarantee="exactly-once",
    partitions=3,
    key=lambda item: f"k{item.n % 5}",
    retention_s=KEPT_S,
)
views: Topic[Item] = Topic("views", Item, guarantee="at-most-once", retention_s=KEPT_S)


@dataclass(frozen=True, slots=True)
class Spec:
    """One consumer. ``apart``: its effects are in another place than the messages. ``copies``: they
    are what it publishes, by transactions of its broker's own. ``key_lanes``: into so many each
    partition is cut, and as many of its lanes work them.
    """

    name: str
    guarantee: GuaranteeName
    topic: Topic[Item]
    ordered: bool = False
    batch: int = 20
    batch_handler: bool = False
    concurrency: int = 0
    apart: bool = False
    copies: bool = False
    key_lanes: int = 1

    @property
    def exactly(self) -> bool:
        """Whether it has effects in a transaction."""
        return self.guarantee == "exactly-once"

    @property
    def tables(self) -> tuple[str, ...]:
        """Two tables, so that half an effect shows; of one that copies each is a kind of output."""
        if not self.exactly:
            return ()
        name = self.name.replace("-", "_")
        return (f"one_{name}", f"two_{name}")

    @property
    def outputs(self) -> Topic[Any]:
        """Where its handler publishes to. Only where a relay may publish twice are repeats
        dropped: elsewhere that would hide an output which was published twice.
        """
        if self.copies:
            return Topic(
                f"outputs-{self.name}",
                About,
                guarantee="at-least-once",
                partitions=_PARTITIONS,
                retention_s=KEPT_S,
            )
        guarantee: GuaranteeName = "exactly-once" if self.apart else "at-least-once"
        return Topic(f"outputs-{self.name}", int, guarantee=guarantee, retention_s=KEPT_S)

    @property
    def kinds_of_output(self) -> tuple[str, ...]:
        """How the ids of what a run publishes begin."""
        return (OUTPUT, "more-") if self.copies else (OUTPUT,)

    def options(self) -> dict[str, Any]:
        """The options that it is declared with."""
        options: dict[str, Any] = {"batch": self.batch, "lease_s": LEASE_S, "retry": POLICY}
        if self.ordered:
            options["order_by_key"] = True
        if self.concurrency > 1:
            options["concurrency"] = self.concurrency
        if self.key_lanes > 1:
            options |= {"lanes": self.key_lanes, "key_lanes": self.key_lanes}
        return options


def plain(topic: Topic[Item]) -> Topic[Item]:
    """One of its own for those that need nobody to drop repeats, where nobody does."""
    return replace(topic, name=f"plain-{topic.name}", guarantee="at-least-once")


SPECS: Sequence[Spec] = (
    Spec("exactly", "exactly-once", inputs),
    Spec("exactly-ordered", "exactly-once", lines, ordered=True),
    Spec("exactly-batch", "exactly-once", inputs, batch=50, batch_handler=True),
    Spec("exactly-async", "exactly-once", lines, concurrency=1),
    Spec("exactly-apart", "exactly-once", inputs, apart=True),
    Spec("least", "at-least-once", inputs),
    Spec("least-ordered", "at-least-once", lines, ordered=True),
    Spec("least-async", "at-least-once", inputs, concurrency=20),
    Spec("most", "at-most-once", inputs),
    Spec("most-lossy", "at-most-once", views),
)
"""All of them; a broker may have no use for some, and others as `Workload` has them."""

OF_A_LOG: Sequence[Spec] = (
    Spec("cursor", "exactly-once", plain(inputs), apart=True),
    Spec("cursor-ordered", "exactly-once", plain(lines), ordered=True, apart=True),
    Spec("cursor-lanes", "exactly-once", plain(lines), apart=True, key_lanes=2),
    Spec("copied", "exactly-once", plain(inputs), copies=True),
    Spec("copied-ordered", "exactly-once", plain(lines), ordered=True, copies=True),
)
"""More, where messages are in a log that is no database: admitted by its positions, and into the
log itself. A publish that is repeated is another message to them.
"""

KILLED_BY_MESSAGES = frozenset({"exactly", "least"})
# Outside of transactions, where nobody waits for who stands still.
STOPPED_BY_MESSAGES = frozenset({"least", "least-async"})
# What befalls a broker and the links to it, as histories name it: it takes nothing back meanwhile,
# or forgets what waits in memory.
LOSES_WAITING = frozenset(
    {"node down", "alarm", "silence", "cut before publish", "cut after publish", "cut before ack"}
)
OUTPUT = "out-"
_CHOICE = (inputs, inputs, lines)
_FILE = "broker.json"
_DEADLY: Manner = "kill"
_DEADLY_FROM = 20


@dataclass(frozen=True, slots=True)
class Step:
    """What a publisher does next: these items, to this topic, in this way."""

    way: Way
    topic: Topic[Item]
    items: tuple[Item, ...]


class Workload(msgspec.Struct, frozen=True):
    """What is published and consumed on a broker that can do this. ``refused``: consumers that its
    contract refuses.
    """

    can: Capabilities = Capabilities("SQLite", database="here")
    refused: tuple[str, ...] = ()

    @classmethod
    def kept_in(cls, folder: Path) -> Workload:
        """The one of the round in this folder."""
        kept = folder / _FILE
        return msgspec.json.decode(kept.read_bytes(), type=cls) if kept.exists() else cls()

    def keep_in(self, folder: Path) -> None:
        """Let every process of the round know it, and who judges it."""
        (folder / _FILE).write_bytes(msgspec.json.encode(self))

    @property
    def specs(self) -> Sequence[Spec]:
        """The consumers."""
        on_a_log = self.can.is_log and self.can.database is None
        every = (*SPECS, *OF_A_LOG) if on_a_log else SPECS
        return [self.fitted(spec) for spec in every if spec.name not in self.refused]

    def fitted(self, spec: Spec) -> Spec:
        """A consumer as this broker can have it: effects beside a broker that is no database, and
        of a topic of its own where nobody drops the repeats of an exactly-once one.
        """
        topic = spec.topic
        if topic.partitions and not self.can.orders_by_key:
            topic = replace(topic, partitions=0)
        if self.can.is_log and not topic.partitions:
            topic = replace(topic, partitions=_PARTITIONS)
        surely = topic.guarantee == "exactly-once"
        if surely and not spec.exactly and not self.can.identity_retention:
            topic = plain(topic)
        elsewhere = spec.exactly and not spec.copies and self.can.database is None
        apart = spec.apart or elsewhere
        return replace(spec, topic=topic, apart=apart)

    @property
    def topics(self) -> Mapping[str, Topic[Item]]:
        """Those that somebody consumes, by name."""
        return {spec.topic.name: spec.topic for spec in self.specs}

    @property
    def outputs(self) -> Sequence[Topic[int]]:
        """Those that handlers publish to."""
        return [spec.outputs for spec in self.specs if spec.exactly]

    @property
    def published_apart(self) -> bool:
        """Whether a transaction of the application's own is beside the messages."""
        return self.can.database is None

    def terms(self, spec: Spec) -> Terms:
        """What is promised to a consumer, and what lies in the broker's nature."""
        can = self.can
        by_cursor = can.is_log and spec.topic.guarantee != "exactly-once"
        elsewhere = Admission.BY_CURSOR if by_cursor else Admission.BY_INBOX
        admission = elsewhere if spec.apart else Admission.BY_CLAIM
        # A log takes what waits for a retry elsewhere for another message, unless it is in order or
        # in a transaction: a crash between the two doubles it.
        in_place = not can.is_log or spec.ordered or spec.exactly
        parks = spec.exactly and by_cursor and spec.apart and not (spec.ordered or spec.copies)
        return Terms(
            Guarantee(spec.guarantee),
            subscription=spec.name,
            topics=frozenset({spec.topic.name}),
            admission=admission if spec.exactly else None,
            order_by_key=spec.ordered,
            attempts=ATTEMPTS,
            inbox_retention_s=7 * 86400.0,
            drops_repeats=spec.topic.guarantee == "exactly-once" and can.identity_retention,
            repeats_count=spec.exactly and by_cursor,
            relays_once=can.relays_once and spec.exactly,
            # Only a database confirms what may be lost.
            confirms_publishing=spec.topic.guarantee != "at-most-once" or can.database is not None,
            # What has a due time waits elsewhere, and is overtaken by what was sent after it. What
            # has no key goes to any partition of a log.
            keeps_send_order=(
                spec.topic.key is not None
                if can.is_log
                else can.delays_in_order or bool(spec.topic.partitions)
            ),
            # To the log a message is done that its store has parked: it comes again out of there.
            confirms_settlement=can.confirms_settlement and in_place and not parks,
            # A retry whose settlement was lost is there twice, once with the count from before it.
            keeps_attempts=can.confirms_settlement and in_place,
            hands_out_once=can.hands_out_once,
            loses_waiting=LOSES_WAITING if can.hands_out_once else frozenset(),
            holds_partition=can.retries_in_place,
            tables=spec.tables,
            has_output=spec.exactly,
            batch_handler=spec.batch_handler,
        )

    def steps(self, seed: int, publisher: int) -> Iterator[Step]:
        """What one publisher publishes, without end; always the same, under the same identities."""
        random = Random(f"{seed}/{publisher}")
        topics = self.topics
        likely = [*_CHOICE, *map(plain, _CHOICE)]
        choice = [topics[topic.name] for topic in likely if topic.name in topics]
        odds = [odds if self._can(way) else 0 for way, odds in zip(WAYS, _WAY_ODDS, strict=True)]
        # What kills its worker is rare, and a short run is to have it too: one of each, soon.
        deadly = {t.name for t in self._deadly} if publisher == 0 else set[str]()
        n = 0
        while True:
            way: Way = random.choices(WAYS, odds)[0]
            count = {"many": 5, "gathered": 4, "transaction": 2}.get(way, 1)
            manners = random.choices(MANNERS, _ODDS, k=count)
            items = tuple(Item(n + i, self._as_it_is(manner)) for i, manner in enumerate(manners))
            n += count
            topic = topics[views.name] if way == "view" else random.choice(choice)
            if way == "late" and topic.partitions and not self.can.delays_in_order:
                way = "one"
            if n > _DEADLY_FROM and topic.name in deadly:
                deadly.remove(topic.name)
                items = (Item(items[0].n, _DEADLY), *items[1:])
            yield Step(way, topic, items)

    def _as_it_is(self, manner: Manner) -> Manner:
        """On a log what kills its worker is missed for a session each time: the first will do."""
        return "ok" if manner == "kill" and self.can.is_log else manner

    @property
    def _deadly(self) -> Iterator[Topic[Item]]:
        """The topics of consumers that messages kill."""
        return (spec.topic for spec in self.specs if spec.name in KILLED_BY_MESSAGES)

    def _can(self, way: Way) -> bool:
        return self.can.delays if way == "late" else way != "view" or views.name in self.topics
