"""What a broker has to offer schedules: ticks and their memory in one transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from duly.broker import Broker, Outcome
from duly.errors import ContractRefused
from duly.message import Message
from duly.schedules.schedule import Schedule


@runtime_checkable
class Ticking(Protocol):
    """What a `Broker` may also do: remember up to which tick a schedule has published.

    Times are milliseconds since 1970 UTC. ``schedule`` is a name, unique within the broker.
    """

    def reached(self, schedule: str, now_ms: int) -> int:
        """The last tick published; ``now_ms``, from here on, where the schedule is new."""
        ...

    def ticked(self) -> Mapping[str, int]:
        """How far each schedule is, by its name. Only reads: for people to look at."""
        ...

    def tick(
        self, schedule: str, reached_ms: int, to_ms: int, messages: Sequence[Message[Any]]
    ) -> Sequence[Outcome] | None:
        """Store messages of declared topics and move the schedule on, both or neither.

        None, and nothing is stored, where it is not at ``reached_ms`` any more: another process
        has published these. Durable on return. Raises `BrokerError`, and `PublishFailed` where
        a message is refused, other than as a repeat or a conflict of identity: nothing was
        changed then. Raises `CommitUnknown`.
        """
        ...


def ticking(broker: Broker, schedules: Sequence[Schedule]) -> Ticking:
    """The broker, as schedules use it. Raises `ContractRefused` where it keeps none."""
    if isinstance(broker, Ticking):
        return broker
    names = ", ".join(schedule.name for schedule in schedules)
    raise ContractRefused(
        f"{broker.capabilities.name} keeps no schedules, and the app declares {names}: it cannot "
        "store a tick together with the memory of it, so that several workers, or one that died "
        "in between, would publish a tick twice. Use a SQL broker (sqlite:///...), or let one "
        "timer of the system publish with an id made of the time, to an exactly-once topic."
    )
