"""What is published and who consumes it: every guarantee, plain and in order, on two files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

import msgspec

from duly.guarantees import Admission, Guarantee, GuaranteeName, RetryPolicy
from duly.message import Topic
from duly.testing.checker import Terms

LEASE_S = 1.5
ATTEMPTS = 4
LONGEST_BACKOFF_S = 0.4
POLICY = RetryPolicy(attempts=ATTEMPTS, first_s=0.05, longest_s=LONGEST_BACKOFF_S)
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
    """One consumer. ``apart``: its effects are in another file than the messages."""

    name: str
    guarantee: GuaranteeName
    topic: Topic[Item]
    ordered: bool = False
    batch: int = 20
    batch_handler: bool = False
    concurrency: int = 0
    apart: bool = False

    @property
    def exactly(self) -> bool:
        """Whether it has effects in a transaction."""
        return self.guarantee == "exactly-once"

    @property
    def tables(self) -> tuple[str, ...]:
        """Two tables, so that half an effect shows."""
        if not self.exactly:
            return ()
        name = self.name.replace("-", "_")
        return (f"one_{name}", f"two_{name}")

    @property
    def outputs(self) -> Topic[int]:
        """Where its handler publishes to. Only where a relay may publish twice are repeats
        dropped: elsewhere that would hide an output which was published twice.
        """
        guarantee: GuaranteeName = "exactly-once" if self.apart else "at-least-once"
        return Topic(f"outputs-{self.name}", int, guarantee=guarantee, retention_s=KEPT_S)

    def terms(self) -> Terms:
        """What is promised."""
        admission = Admission.BY_INBOX if self.apart else Admission.BY_CLAIM
        return Terms(
            Guarantee(self.guarantee),
            subscription=self.name,
            topics=frozenset({self.topic.name}),
            admission=admission if self.exactly else None,
            order_by_key=self.ordered,
            attempts=ATTEMPTS,
            inbox_retention_s=7 * 86400.0,
            drops_repeats=self.topic.guarantee == "exactly-once",
            tables=self.tables,
            has_output=self.exactly,
            batch_handler=self.batch_handler,
        )


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
KILLED_BY_MESSAGES = frozenset({"exactly", "least"})
# Outside of transactions, where nobody waits for who stands still.
STOPPED_BY_MESSAGES = frozenset({"least", "least-async"})


@dataclass(frozen=True, slots=True)
class Step:
    """What a publisher does next: these items, to this topic, in this way."""

    way: Way
    topic: Topic[Item]
    items: tuple[Item, ...]


def steps(seed: int, publisher: int) -> Iterator[Step]:
    """What one publisher publishes, without end; always the same, under the same identities."""
    random = Random(f"{seed}/{publisher}")
    n = 0
    while True:
        way: Way = random.choices(WAYS, _WAY_ODDS)[0]
        count = {"many": 5, "gathered": 4, "transaction": 2}.get(way, 1)
        items = tuple(Item(n + each, random.choices(MANNERS, _ODDS)[0]) for each in range(count))
        n += count
        topic = views if way == "view" else random.choice((inputs, inputs, lines))
        yield Step(way, topic, items)
