"""The operating half of the broker: dead letters, and what can be seen by AMQP alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from duly.brokers.rabbitmq.address import Address
from duly.brokers.rabbitmq.burial import Burial
from duly.brokers.rabbitmq.delays import Delays
from duly.brokers.rabbitmq.health import examine, queued
from duly.brokers.rabbitmq.intake import Intake
from duly.brokers.rabbitmq.link import Link
from duly.brokers.rabbitmq.ordered import OrderedIntake
from duly.brokers.rabbitmq.publisher import Publisher
from duly.brokers.rabbitmq.survey import survey_of, version_of
from duly.brokers.rabbitmq.topology import Names, count
from duly.inspection import DeadLetter
from duly.inspection.counting import Queued
from duly.inspection.graves import Graveyard
from duly.inspection.health import Finding
from duly.inspection.survey import Survey
from duly.message import Topic


class Operated:
    """What people ask of `RabbitMQBroker`."""

    link: Link
    _address: Address
    _names: Names
    _publisher: Publisher
    _delays: Delays
    _burial: Burial
    _known: dict[tuple[str, str], int]
    _looked_at: dict[tuple[str, str], int]
    _intakes: dict[tuple[str, tuple[str, ...]], Intake | OrderedIntake]

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
        return self._burial.carry(sorted(self._looked_at | self._known))

    def redeliver(self, letters: Sequence[DeadLetter]) -> None:
        """As `Buries.redeliver`; behind what waits already, also in order by key."""
        self._burial.redeliver(letters, self._known)

    def worked(self) -> set[tuple[str, str]]:
        """What this process works on: (topic, subscription)."""
        subscriptions = {intake.subscription for intake in list(self._intakes.values())}
        return {known for known in list(self._known) if known[1] in subscriptions}

    # --- `Queueing` and `Examining` of `duly.inspection`

    def queued(self) -> Sequence[Queued]:
        """As `Queueing.queued`."""
        known = self._looked_at | self._known
        return self.link.call(lambda connection: queued(connection, self._names, known))

    def delayed(self) -> int:
        """As `Queueing.delayed`."""
        names: Iterable[str] = self._delays.queues()
        waiting = self.link.call(lambda connection: count(connection, names))
        return sum(messages for messages, _ in waiting.values())

    def examine(self) -> Sequence[Finding]:
        """As `Examining.examine`."""
        return examine(self.link, self._publisher, self._names, self.queued)

    # --- `duly.inspection.survey.Surveys`

    def survey(
        self, topics: Sequence[Topic[Any]], subscriptions: Mapping[str, Sequence[str]]
    ) -> Survey:
        """As `Surveys.survey`: version, policies, and how long a message may be held."""
        version = version_of(self.link.server, self.link.where)
        wanted = [topic.name for topic in topics]
        return survey_of(self._address, self._names, version, subscriptions, wanted)
