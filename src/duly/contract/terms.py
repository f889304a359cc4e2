"""The contract as values."""

from __future__ import annotations

from dataclasses import dataclass

from duly.errors import ConfigurationError
from duly.guarantees import Admission, Guarantee


@dataclass(frozen=True, slots=True)
class TopicTerms:
    """What publishing to a topic promises.

    ``drops_repeats`` says what drops a repeated publish and for how long, on exactly-once
    topics; None on the others: there a repeat is another message.
    """

    name: str
    guarantee: Guarantee
    provided_by: str
    drops_repeats: str | None
    max_body_bytes: int
    retention_s: float
    identity_retention_s: float | None
    limits: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ConsumerTerms:
    """What consuming promises, and what one crash of a worker process may cost.

    ``crash_loses`` messages at most (at-most-once), ``crash_repeats`` at most (at-least-once);
    ``admission`` is how a message enters its transaction (exactly-once).
    """

    name: str
    topics: tuple[str, ...]
    guarantee: Guarantee
    provided_by: str
    admission: Admission | None
    inbox_retention_s: float | None
    crash_loses: int
    crash_repeats: int
    limits: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ScheduleTerms:
    """What a schedule publishes, when, and what becomes of the ticks it misses."""

    name: str
    topic: str
    when: str
    provided_by: str
    limits: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Flow:
    """What holds from publishing to a topic until a consumer has handled it.

    ``guarantee`` is None where none of the three holds from end to end: a message may be lost,
    and it may be handled twice.
    """

    topic: str
    consumer: str
    guarantee: Guarantee | None
    why: str


@dataclass(frozen=True, slots=True)
class Contract:
    """What was promised, by what it is kept, and within which limits."""

    broker: str
    store: str | None
    notes: tuple[str, ...]
    topics: tuple[TopicTerms, ...]
    consumers: tuple[ConsumerTerms, ...]
    flows: tuple[Flow, ...]
    schedules: tuple[ScheduleTerms, ...] = ()

    def consumer(self, name: str) -> ConsumerTerms:
        """The terms of the consumer of this name. Raises `ConfigurationError`."""
        for terms in self.consumers:
            if terms.name == name:
                return terms
        raise ConfigurationError(f"the contract has no consumer {name!r}")

    def admission(self, consumer: str) -> Admission:
        """How an exactly-once consumer's messages enter its transactions.

        Raises `ConfigurationError` for another consumer: it has no transactions.
        """
        terms = self.consumer(consumer)
        if terms.admission is None:
            raise ConfigurationError(
                f"consumer {consumer!r} is {terms.guarantee}: it has no transaction to admit to"
            )
        return terms.admission
