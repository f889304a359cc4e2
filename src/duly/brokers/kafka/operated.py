"""The operating half of the broker: dead letters, lag, health."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from duly.brokers.kafka.address import Address
from duly.brokers.kafka.admin import Admin, config_of
from duly.brokers.kafka.ending import Aside
from duly.brokers.kafka.intake import Intake
from duly.brokers.kafka.letters import LetterTopic, letter_of
from duly.brokers.kafka.names import Names
from duly.brokers.kafka.producer import Sender, Sending
from duly.brokers.kafka.survey import survey_of, wanted
from duly.brokers.kafka.wire import (
    CHARGED,
    DELAY_MS,
    DUE_MS,
    OF,
    REPEATED,
    REPLAYS,
    TOKEN,
    Headers,
    headers_of,
)
from duly.errors import BrokerError, CommitUnknown, ConfigurationError
from duly.identity import ids
from duly.inspection import DeadLetter
from duly.inspection.counting import Queued
from duly.inspection.graves import Graveyard
from duly.inspection.health import Finding
from duly.inspection.survey import Survey
from duly.message import Message, Topic


class Operated(ABC):
    """What people ask of `KafkaBroker`, and what is kept for one subscription alone."""

    clock: Callable[[], float]
    _wall_ms: Callable[[], int]
    _names: Names
    _address: Address
    _admin: Admin
    _sender: Sender
    _letters: LetterTopic
    _graveyard: Graveyard
    _known: dict[tuple[str, str], None]

    # --- `duly.inspection.graves.Buries`

    @property
    def graveyard(self) -> Graveyard:
        """Where what is given up on goes: a topic of the cluster, or what `bury_in` named."""
        return self._graveyard

    def bury_in(self, graveyard: Graveyard) -> None:
        """As `Buries.bury_in`."""
        self._graveyard = graveyard

    def carry(self) -> int:
        """As `Buries.carry`: Kafka gives up on nothing."""
        return 0

    def redeliver(self, letters: Sequence[DeadLetter]) -> None:
        """As `Buries.redeliver`; behind what waits already, also in order by key."""
        if self._graveyard is self._letters:
            self._letters.check_whole(letters)
        for subscription in sorted({letter.subscription for letter in letters}):
            self._make_again(subscription)
        self._sender.surely(
            [
                self._once_more(
                    letter.subscription, letter.message, [(REPLAYS, _number(letter.replays + 1))]
                )
                for letter in letters
            ],
            "not all may be delivered again",
        )

    @abstractmethod
    def _make_again(self, subscription: str) -> None:
        """Make the topic of what this subscription alone is given again, unless it is there."""

    # --- for lanes

    def put_aside(self, intake: Intake, asides: Sequence[Aside]) -> None:
        """As `Surroundings.put_aside`."""
        if dead := self._dead(intake.subscription, asides):
            try:
                self._graveyard.bury(dead)
            except (CommitUnknown, ConfigurationError) as error:
                raise BrokerError(f"dead letters may not be kept: {error}") from error
        self._sender.surely(
            [self._later(intake, each) for each in asides if each.error is None],
            "not all may be tried again later",
        )

    def letters(self, subscription: str, asides: Sequence[Aside]) -> Sequence[Sending]:
        """As `Surroundings.letters`. Raises `BrokerError`."""
        dead = self._dead(subscription, asides)
        return self._letters.records(dead) if dead else ()

    def _dead(self, subscription: str, asides: Sequence[Aside]) -> Sequence[DeadLetter]:
        return [
            letter_of(each.item, subscription, each.error, each.charged, self._wall_ms())
            for each in asides
            if each.error is not None
        ]

    def _later(self, intake: Intake, aside: Aside) -> Sending:
        message = aside.item.message
        assert message is not None, "what cannot be read is not started"
        token = ids.one()
        # This process goes by the clock of its leases, which nobody sets.
        intake.fetched.remember(token, self.clock() + aside.delay_s)
        delay_ms = int(aside.delay_s * 1000)
        history = [
            (CHARGED, _number(aside.charged)),
            (REPEATED, _number(aside.repeated)),
            (REPLAYS, _number(aside.item.replays)),
            (DUE_MS, _number(self._wall_ms() + delay_ms)),
            (DELAY_MS, _number(delay_ms)),
            (TOKEN, token.encode()),
        ]
        return self._once_more(intake.subscription, message, history)

    def _once_more(self, subscription: str, message: Message[Any], history: Headers) -> Sending:
        return Sending(
            self._names.again(subscription),
            message.body,
            None if message.key is None else message.key.encode(),
            [*headers_of(message), (OF, message.topic.encode()), *history],
            stamp_ms=self._wall_ms(),
            partition=0,
        )

    # --- `Queueing` and `Examining` of `duly.inspection`

    def queued(self) -> Sequence[Queued]:
        """As `Queueing.queued`: by how much each group lags behind what is published."""
        found = []
        by_subscription: dict[str, list[str]] = {}
        for subscription, topic in sorted(self._known):
            by_subscription.setdefault(subscription, []).append(topic)
        for subscription, topics in by_subscription.items():
            group = self._names.group(subscription)
            lags = self._lags(group, {self._names.topic(topic): topic for topic in topics})
            workers = self._admin.members(group)
            found += [Queued(subscription, topic, lags[topic], workers) for topic in topics]
        return found

    def _lags(self, group: str, topics: dict[str, str]) -> Counter[str]:
        there = self._admin.find(topics)
        places = [(name, n) for name, found in there.items() for n in range(found.partitions)]
        at = {(each.topic, each.partition): each.offset for each in self._admin.positions(group)}
        starts = self._admin.starts([place for place in places if place not in at], "earliest")
        lags: Counter[str] = Counter(dict.fromkeys(topics.values(), 0))
        for place, end in self._admin.ends(places).items():
            lags[topics[place[0]]] += max(0, end - at.get(place, starts.get(place, end)))
        return lags

    def delayed(self) -> int:
        """As `Queueing.delayed`: what is to be given again, due or not."""
        total = 0
        for subscription in sorted({subscription for subscription, _ in self._known}):
            again = self._names.again(subscription)
            total += self._lags(self._names.group(subscription), {again: again})[again]
        return total

    def examine(self) -> Sequence[Finding]:
        """As `Examining.examine`."""
        try:
            return [
                Finding("ok", "Kafka", f"cluster {self._admin.cluster}"),
                *_unworked(self.queued()),
            ]
        except BrokerError as error:
            return [Finding("wrong", "Kafka", f"did not answer: {error}", "Look at its log.")]

    # --- `duly.inspection.survey.Surveys`

    def survey(
        self, topics: Sequence[Topic[Any]], subscriptions: Mapping[str, Sequence[str]]
    ) -> Survey:
        """As `Surveys.survey`: copies, settings of topics and brokers, what the login may do."""
        where = wanted(self._names, [topic.name for topic in topics], subscriptions)
        try:
            seen = self._admin.look(*where)
        except BrokerError as error:
            return Survey(unseen=(f"Kafka: nothing was looked at: {error}",))
        made_with = {
            topic.name: (topic, {**self._address.takes, **config_of(topic)}) for topic in topics
        }
        return survey_of(self._address, self._names, seen, made_with, subscriptions)


def _number(number: int) -> bytes:
    return str(int(number)).encode()


def _unworked(states: Sequence[Queued]) -> Iterator[Finding]:
    for state in states:
        if state.backlog and not state.workers:
            yield Finding(
                "warning",
                f"consumer {state.subscription}",
                f"{state.backlog:,} messages of {state.topic} wait, and nobody works on them",
                "Start a worker.",
            )
