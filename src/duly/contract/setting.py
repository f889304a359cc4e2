"""Where the contract is to hold: the broker, the store, and how the consumers are run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from duly.broker import Capabilities
from duly.consumer import Consumer
from duly.guarantees import Admission, Guarantee
from duly.inspection.survey import Survey
from duly.message import Topic
from duly.store import StoreCapabilities


@dataclass(frozen=True, slots=True)
class Run:
    """How the consumers are run, as far as it changes what can be kept.

    - ``supervised``: somebody starts another process when a worker process ends.
    - ``processes``: how many worker processes there are.
    """

    supervised: bool = False
    processes: int = 1


@dataclass(frozen=True, slots=True)
class Setting:
    """What is there to keep the promises with."""

    broker: Capabilities
    store: StoreCapabilities | None
    run: Run
    survey: Survey = field(default_factory=Survey)

    @property
    def one_database(self) -> bool:
        """Whether one transaction covers the messages and the effects."""
        return (
            self.store is not None
            and self.broker.database is not None
            and self.broker.database == self.store.database
        )

    @property
    def reaches_further(self) -> bool:
        """Whether machines that do not have the store's file can work the same messages."""
        return self.broker.durable and not (self.broker.one_writer or self.one_database)

    def admission(self, consumer: Consumer) -> Admission | None:
        """How a consumer's messages enter its transactions; None: it has none."""
        if consumer.guarantee is not Guarantee.EXACTLY_ONCE or self.store is None:
            return None
        if self.one_database:
            return Admission.BY_CLAIM
        if self.broker.is_log and not self.repeats_arrive(consumer):
            return Admission.BY_CURSOR
        return Admission.BY_INBOX

    def parks(self, consumer: Consumer) -> bool:
        """Whether what this consumer has to try again waits in its store, and not in its place."""
        by_cursor = self.admission(consumer) is Admission.BY_CURSOR
        can = self.store is not None and self.store.parks
        return by_cursor and can and not consumer.options.order_by_key

    def holds_partition(self, consumer: Consumer) -> bool:
        """Whether a retry of this consumer holds up what is behind it in its partition."""
        return self.broker.holds_partition(consumer.guarantee, parks=self.parks(consumer))

    def repeats_arrive(self, consumer: Consumer) -> bool:
        """Whether this consumer itself must drop the repeated publishes of a topic.

        A repeated publish stands at another position of the log: a cursor lets it pass, only
        an inbox, which goes by identity, does not.
        """
        return any(self.nobody_drops_repeats(topic) for topic in consumer.topics)

    def nobody_drops_repeats(self, topic: Topic[Any]) -> bool:
        """Whether repeated publishes of an exactly-once topic reach its consumers."""
        return topic.promise is Guarantee.EXACTLY_ONCE and not self.broker.identity_retention


def in_one_crash(consumer: Consumer) -> int:
    """Messages of this consumer that one worker process works on at once, at most."""
    options = consumer.options
    # A concurrent lane claims only for its free places, any other a batch at a time.
    return options.lanes * (options.concurrency if options.concurrency > 1 else options.batch)


def consumers_of(topic: Topic[Any], consumers: Iterable[Consumer]) -> Iterator[Consumer]:
    """Those that read this topic."""
    return (each for each in consumers if any(t.name == topic.name for t in each.topics))


def duration(seconds: float) -> str:
    """Seconds for people: ``7 days``, ``90 s``, ``12 h``."""
    for unit, size in (("day", 86400.0), ("h", 3600.0), ("min", 60.0)):
        count = seconds / size
        # 90 s reads better than 1.5 min.
        if count >= 1 and count == int(count):
            plural = "s" if unit == "day" and count != 1 else ""
            return f"{int(count)} {unit}{plural}"
    return f"{seconds:g} s"


def size(count: int) -> str:
    """Bytes for people: ``1 MiB``."""
    for unit, unit_bytes in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if count >= unit_bytes and count % unit_bytes == 0:
            return f"{count // unit_bytes} {unit}"
    return f"{count:,} bytes"


def plural(count: int, noun: str) -> str:
    """``1 message``, ``2,000 messages``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
