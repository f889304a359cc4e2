"""The operating half of the broker: dead letters, and what can be seen by AMQP alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from duly.brokers.rabbitmq.burial import Burial
from duly.brokers.rabbitmq.delays import Delays
from duly.brokers.rabbitmq.health import Known, examine, queued
from duly.brokers.rabbitmq.link import Link
from duly.brokers.rabbitmq.publisher import Publisher
from duly.brokers.rabbitmq.topology import Names, count
from duly.inspection import DeadLetter
from duly.inspection.counting import Queued
from duly.inspection.graves import Graveyard
from duly.inspection.health import Finding


class Operated:
    """What people ask of `RabbitMQBroker`."""

    link: Link
    _names: Names
    _publisher: Publisher
    _delays: Delays
    _burial: Burial
    _known: Known

    # --- `duly.inspection.graves.Buries`

    @property
    def graveyard(self) -> Graveyard:
        """Where what is given up on goes: a stream on the server, or what `bury_in` named."""
        return self._burial.graveyard

    def bury_in(self, graveyard: Graveyard) -> None:
        """As `Buries.bury_in`."""
        self._burial.graveyard = graveyard

    def carry(self) -> int:
        """As `Buries.carry`."""
        return self._burial.carry(sorted(self._known))

    def redeliver(self, letters: Sequence[DeadLetter]) -> None:
        """As `Buries.redeliver`; behind what waits already, also in order by key."""
        self._burial.redeliver(letters, self._known)

    # --- `Queueing` and `Examining` of `duly.inspection`

    def queued(self) -> Sequence[Queued]:
        """As `Queueing.queued`."""
        known = dict(self._known)
        return self.link.call(lambda connection: queued(connection, self._names, known))

    def delayed(self) -> int:
        """As `Queueing.delayed`."""
        names: Iterable[str] = self._delays.queues()
        waiting = self.link.call(lambda connection: count(connection, names))
        return sum(messages for messages, _ in waiting.values())

    def examine(self) -> Sequence[Finding]:
        """As `Examining.examine`."""
        return examine(self.link, self._publisher, self._names, self.queued)
