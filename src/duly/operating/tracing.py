"""The life of a message of an app, from its broker and its store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from duly.broker import Broker
from duly.errors import ConfigurationError
from duly.inspection.tracing import Following, Logged, Remembering, Trace, Tracing
from duly.store import Store

# So many messages that followed from one are shown.
MOST_FOLLOWED = 100


@dataclass(frozen=True, slots=True)
class Life:
    """One message: what its broker keeps of it; when it took effect, by consumer, as far as
    its store remembers (milliseconds since 1970 UTC); and what was published because of it,
    as far as that names it (`Message.causation`).
    """

    trace: Trace
    effects_ms: Mapping[str, int]
    followed: Sequence[Logged]


@dataclass(frozen=True, slots=True)
class Tracer:
    """A broker that can tell of single messages, and the store beside it."""

    broker: Tracing
    store: Store | None

    @classmethod
    def of(cls, backends: tuple[Broker, Store | None]) -> Self:
        """Raises `ConfigurationError` where the broker cannot tell."""
        broker, store = backends
        if not isinstance(broker, Tracing):
            raise ConfigurationError(
                f"{broker.capabilities.name} cannot tell duly the life of a message; use its "
                "own tools"
            )
        return cls(broker, store)

    def lives(self, id: str, source: str, topic: str | None = None) -> Sequence[Life]:
        """Every message with this identity, one for each topic; none where nothing is kept."""
        return [self._life(trace) for trace in self.broker.trace(id, source, topic)]

    def _life(self, trace: Trace) -> Life:
        effects: dict[str, int] = {}
        if isinstance(self.store, Remembering):
            for standing in trace.standings:
                name = standing.subscription
                at_ms = self.store.effect_ms(name, trace.topic, trace.source, trace.id)
                if at_ms is not None:
                    effects[name] = at_ms
        cause = f"{trace.source}/{trace.topic}/{trace.id}"
        return Life(trace, effects, self.broker.caused_by(cause, MOST_FOLLOWED))


def follower(broker: Broker) -> Following:
    """The broker as one whose topics can be followed. Raises `ConfigurationError`."""
    if not isinstance(broker, Following):
        raise ConfigurationError(
            f"{broker.capabilities.name} cannot show duly what is published without a "
            "subscription; use its own tools"
        )
    return broker
