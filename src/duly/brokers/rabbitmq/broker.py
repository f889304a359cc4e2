"""`RabbitMQBroker`: declaring and publishing; `Lane` claims and settles."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from duly.broker import Capabilities, Outcome, SubscribeOptions
from duly.brokers.rabbitmq.address import Address, address_of
from duly.brokers.rabbitmq.burial import Burial
from duly.brokers.rabbitmq.delays import Delays, way
from duly.brokers.rabbitmq.fixed import check_channels, check_options, check_order
from duly.brokers.rabbitmq.intake import Intake, Item
from duly.brokers.rabbitmq.lane import Lane, Move
from duly.brokers.rabbitmq.link import CHANNEL_ENDED, Connection, Link, content
from duly.brokers.rabbitmq.once import OnceLane
from duly.brokers.rabbitmq.operated import Operated
from duly.brokers.rabbitmq.ordered import OrderedIntake
from duly.brokers.rabbitmq.ordered_lane import OrderedLane
from duly.brokers.rabbitmq.outgoing import MAX_MESSAGE_BYTES, Outgoing
from duly.brokers.rabbitmq.presence import Presence
from duly.brokers.rabbitmq.publisher import Publisher, Sending, State
from duly.brokers.rabbitmq.standing import Standing
from duly.brokers.rabbitmq.survey import version_of
from duly.brokers.rabbitmq.topology import (
    Names,
    declare_subscription,
    declare_topic,
    record,
    recorded_topic,
)
from duly.brokers.rabbitmq.transport import ChannelLost
from duly.brokers.rabbitmq.wire import moved, named
from duly.errors import (
    BrokerError,
    BrokerUnavailable,
    ConfigurationError,
)
from duly.guarantees import Guarantee
from duly.message import Message, Topic, now_ms

log = logging.getLogger("duly.rabbitmq")

_WATCH_S = 1.0
_ASK_S = 10.0
_ARRIVAL_S = 2.0


class RabbitMQBroker(Operated):
    """A broker on RabbitMQ. Safe to use from any thread; not across fork().

    ``url`` is an AMQP URI. ``deadline_s`` bounds how long a publish waits for the server's word.
    ``clock`` gives the seconds that leases go by, ``wall_ms`` the time that due times go by;
    ``delays`` says where messages wait. Raises on opening `ConfigurationError`,
    `BrokerUnavailable` and `BrokerUnusable`.
    """

    def __init__(
        self,
        url: str,
        *,
        shown: str = "amqp://...",
        deadline_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        wall_ms: Callable[[], int] = now_ms,
        delays: Callable[[Names], Delays] = Delays,
    ) -> None:
        self._address: Address = address_of(url, shown)
        self._capabilities = Capabilities(
            name="RabbitMQ",
            confirms_settlement=False,
            hands_out_once=True,
            identity_retention=False,
            holds_keys=False,
            delays_in_order=False,
            replays=False,
            max_message_bytes=MAX_MESSAGE_BYTES,
        )
        self.clock = clock
        self._names = Names(self._address.namespace)
        self._delays = delays(self._names)
        self._standing = Standing(self._names)
        self._topics, self._known = self._standing.topics, self._standing.known
        self._intakes: dict[tuple[str, tuple[str, ...]], Intake | OrderedIntake] = {}
        self._lanes: dict[int, Lane | OrderedLane] = {}
        self._once: set[OnceLane] = set()
        self._presences: dict[tuple[str, tuple[str, ...]], Presence] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._publisher = Publisher(self._address, deadline_s, self._standing.declare_all)
        self.link = Link(self._address, "consumers", self._up, self._down)
        self._outgoing = Outgoing(
            self._names, self._standing, self._publisher, self._delays, self.link, wall_ms
        )
        self._burial = Burial(self.link, self._names, self._topics, self._send)
        # As `known`, of those that may be there.
        self._looked_at: dict[tuple[str, str], int] = {}
        try:
            self.link.start()
            version_of(self.link.server, self.link.where)
            self._publisher.link.start()
        except BaseException:
            self.close()
            raise
        for look in (self._guarding, self._watching):
            threading.Thread(target=look, name="duly-rabbitmq-watch", daemon=True).start()
        self._burial.start(self._closed, self.worked)

    @property
    def capabilities(self) -> Capabilities:
        """What this broker provides."""
        return self._capabilities

    # --- declaring

    def declare(self, topics: Iterable[Topic[Any]]) -> None:
        """As `Broker.declare`; ``partitions`` and ``guarantee`` of a topic are fixed."""
        # What is known asks no server: a transaction that publishes by an outbox declares, too,
        # and has to go on while there is none.
        topics = [topic for topic in topics if self._topics.get(topic.name) is not topic]
        for topic in topics:
            self._check_fixed(topic)
        for topic in topics:
            self._call(
                partial(
                    declare_topic,
                    names=self._names,
                    topic=topic.name,
                    partitions=topic.partitions,
                )
            )
        self._topics.update((topic.name, topic) for topic in topics)

    def _check_fixed(self, topic: Topic[Any]) -> None:
        fixed = {
            "topic": f"guarantee {topic.guarantee}",
            "partitions": f"partitions={topic.partitions}",
        }
        for kind, text in fixed.items():
            found = self._recorded(kind, topic.name, text)
            if found != text:
                raise ConfigurationError(
                    f"topic {topic.name!r} is there with {found}, and declared with {text}. Give "
                    "it another name, or declare it as it is there."
                )

    def _recorded(self, kind: str, of: str, text: str) -> str:
        """What is recorded: this, unless there was something before."""
        name = self._names.record(kind, of)
        found: str = self._call(lambda connection: record(connection, name, text))
        return found

    def prepare(
        self, topics: Iterable[Topic[Any]], subscription: str, options: SubscribeOptions
    ) -> None:
        """As `Prepares.prepare`."""
        topics = list(topics)
        self._check_order(topics, subscription, options.order_by_key)
        for topic in topics:
            partitions = topic.partitions if options.order_by_key else 0
            once = options.guarantee is Guarantee.AT_MOST_ONCE
            self._call(
                partial(
                    declare_subscription,
                    names=self._names,
                    topic=topic.name,
                    subscription=subscription,
                    partitions=partitions,
                    once=once,
                )
            )
            self._standing.note(topic, subscription, options)

    def know(
        self, topics: Iterable[Topic[Any]], subscription: str, options: SubscribeOptions
    ) -> None:
        """As `Knows.know`."""
        for topic in topics:
            look = partial(recorded_topic, names=self._names, topic=topic.name)
            there: Topic[Any] | None = self._call(look)
            if there is not None:
                self._check_fixed(topic)
            self._looked_at[topic.name, subscription] = (
                topic.partitions if options.order_by_key else 0
            )

    def _check_order(
        self, topics: Sequence[Topic[Any]], subscription: str, order_by_key: bool
    ) -> None:
        for topic in topics:
            self._check_declared(topic)
        check_order(self._recorded, topics, subscription, order_by_key=order_by_key)

    def _check_declared(self, topic: Topic[Any]) -> None:
        if topic.name not in self._topics:
            raise ConfigurationError(f"topic {topic.name!r} is not known here: declare it first")

    def _call(self, run: Callable[[Connection], Any]) -> Any:
        return self.link.call(run)

    # --- publishing

    def publish(self, messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        """As `Broker.publish`. Of at-most-once topics nothing is confirmed; of others a message
        that no queue takes is `PublishFailed`, unless the topic `may_go_unheard`.
        """
        if messages and self._closed.is_set():
            raise BrokerUnavailable("RabbitMQ was closed; nothing was sent")
        return self._outgoing.publish(messages)

    # --- subscribing

    def subscribe(
        self, topics: Sequence[Topic[Any]], subscription: str, options: SubscribeOptions
    ) -> Lane | OrderedLane | OnceLane:
        """As `Broker.subscribe`; refuses a start in the past, and a key that is held by a dead
        letter.
        """
        check_options(subscription, options)
        self._check_order(topics, subscription, options.order_by_key)
        self._check_guarantee(subscription, options)
        if options.order_by_key:
            self._check_channels(topics, subscription)
        self._burial.prepare()
        for topic in topics:
            self._standing.note(topic, subscription, options)
        if options.guarantee is Guarantee.AT_MOST_ONCE:
            return self._subscribe_once(topics, subscription)
        with self._lock:
            intake = self._intake_of(topics, subscription, options.order_by_key)
            lane: Lane | OrderedLane
            if isinstance(intake, OrderedIntake):
                lane = OrderedLane(self, intake, options, next(self._numbers))
            else:
                lane = Lane(self, intake, options, next(self._numbers))
            self._lanes[lane.number] = lane
            return lane

    def _subscribe_once(self, topics: Sequence[Topic[Any]], subscription: str) -> OnceLane:
        there = [self._topics[topic.name] for topic in topics]
        key = (subscription, tuple(sorted(topic.name for topic in topics)))
        new = Presence(self._names, there, subscription)
        presence = self._presences.setdefault(key, new)
        lane = OnceLane(self, self._names, there, subscription, presence, self._once.discard)
        self._call(lane.open)
        self._once.add(lane)
        return lane

    def _intake_of(
        self, topics: Sequence[Topic[Any]], subscription: str, ordered: bool
    ) -> Intake | OrderedIntake:
        names = tuple(sorted(topic.name for topic in topics))
        intake = self._intakes.get((subscription, names))
        if intake is None:
            there = [self._topics[name] for name in names]
            if ordered:
                keeps_s = self._address.keeps_s
                intake = OrderedIntake(self._names, there, subscription, self.clock, keeps_s)
            else:
                intake = Intake(self._names, there, subscription)
            self._call(intake.open)
            self._intakes[subscription, names] = intake
        return intake

    def _check_channels(self, topics: Sequence[Topic[Any]], subscription: str) -> None:
        names = tuple(sorted(topic.name for topic in topics))
        others = [each for key, each in self._intakes.items() if key != (subscription, names)]
        taken = sum(1 + len(each.queues) for each in others) + 2 * len(self._once)
        most: int = self._call(lambda connection: connection.channel_max)
        check_channels(topics, subscription, taken, most)

    def _check_guarantee(self, subscription: str, options: SubscribeOptions) -> None:
        wanted = str(options.guarantee)
        found = self._recorded("subscription", subscription, wanted)
        if found != wanted:
            raise ConfigurationError(
                f"subscription {subscription!r} is recorded as {found!r}, and this consumer "
                f"declares {wanted!r}. What was promised so far would no longer hold: give the "
                "consumer a new name, or declare the recorded guarantee."
            )

    # --- for lanes

    def lanes_of(self, intake: Intake) -> int:
        """How many lanes share this intake."""
        return max(1, sum(lane.intake is intake for lane in list(self._lanes.values())))

    def move(self, moves: Sequence[Move]) -> None:
        """As `Surroundings.move`. What cannot be published again becomes a dead letter: it would
        come back for ever.
        """
        left = self._burial.bury_those(moves)
        sendings = [self._sending_of(move) for move in left]
        self._publisher.send(sendings)
        self._check_sent([each for each in sendings if each.state is not State.UNWRITABLE])
        self._burial.bury_unwritable(
            [m for m, each in zip(left, sendings, strict=True) if each.state is State.UNWRITABLE]
        )

    def keep(self, notes: Sequence[tuple[str, bytes]]) -> None:
        """As `Writing.keep`."""
        self._send([Sending(content(body, {}), "", queue) for queue, body in notes])

    def _send(self, sendings: Sequence[Sending]) -> None:
        """Returns when the server has them. Raises `BrokerError`: some may be there."""
        self._publisher.send(sendings)
        self._check_sent(sendings)

    def _check_sent(self, sendings: Sequence[Sending]) -> None:
        failed = [sending for sending in sendings if sending.state is not State.CONFIRMED]
        if failed:
            if failed[0].state is State.UNROUTABLE:
                self._delays.forget()
            raise BrokerError(
                f"{len(failed)} of {len(sendings)} messages could not be moved; of the first, to "
                f"{failed[0].key!r}: {failed[0].state.value} ({self._publisher.why_not})"
            )

    def _sending_of(self, move: Move) -> Sending:
        topic, subscription = move.item.topic.name, move.intake.subscription
        target = self._names.queue(topic, subscription)
        if move.alone:
            target = self._names.alone(topic, subscription)
        exchange, more = "", dict[str, Any]()
        if move.delay_s > 0:
            levels = self._delays.levels_for(move.delay_s)
            self._delays.make(levels, self.link)
            exchange, more = self._delays.entry, dict(way(levels, target))
        item = move.item
        more |= named(item.properties, item.message)
        properties = moved(item.properties, move.history, more)
        return Sending(content(item.body, properties), exchange, target)

    def leave(self, lane: Lane, generation: int, alone: Sequence[Item]) -> None:
        """As `Surroundings.leave`; the last lane gives back what was delivered to this process."""
        intake = lane.intake
        last = self.retire(lane)
        if not self.link.is_up:
            return  # the server has taken all of it back
        try:
            if last:
                self._let_come(intake)
                self.link.call(intake.stop)
            self._give_back(intake, generation, alone, everything=last)
            if last:
                self.link.call(intake.close)
        except BrokerError as error:
            log.warning("subscription %r: not given back in order: %s", intake.subscription, error)
            if last:
                # Then the server does it, now, and each of those comes alone.
                self.link.post(intake.close)
                return
            with intake.changed:
                if generation == intake.generation:
                    intake.suspects.extend(alone)
                    intake.changed.notify_all()

    def _let_come(self, intake: Intake) -> None:
        """What is on its way, which the server would count as somebody's death. Nothing more is
        called for meanwhile: nobody acknowledges.
        """
        until = time.monotonic() + _ARRIVAL_S
        while self.link.call(intake.is_to_be_given) and time.monotonic() < until:
            with intake.changed:
                intake.changed.wait(0.01)

    def retire(self, lane: Lane | OrderedLane) -> bool:
        """This lane is closed; whether it was the last of its intake."""
        intake = lane.intake
        with self._lock:
            self._lanes.pop(lane.number, None)
            last = not any(other.intake is intake for other in self._lanes.values())
            if last:
                self._intakes = {k: each for k, each in self._intakes.items() if each is not intake}
            return last

    def _give_back(
        self, intake: Intake, generation: int, alone: Sequence[Item], *, everything: bool
    ) -> None:
        """As new messages: the server would count what it takes back as deaths."""
        with intake.changed:
            if generation != intake.generation:
                return
            ready = [intake.ready.pop() for _ in range(len(intake.ready) * everything)]
        moves = [Move(intake, item, item.history, alone=True) for item in alone]
        moves += [Move(intake, item, item.uncounted, alone=item.taken_back > 0) for item in ready]
        if moves:
            self.move(moves)
            tags = [move.item.tag for move in moves]
            self.link.call(lambda _: intake.acknowledge(generation, tags))

    # --- the connection

    def _up(self, connection: Connection) -> None:
        self._delays.forget()
        self._standing.declare_topics(connection)
        for each in (*list(self._intakes.values()), *list(self._once)):
            try:
                each.open(connection)
            except (BrokerError, ConfigurationError, ChannelLost, CHANNEL_ENDED) as error:
                # The others go on. Whoever claims tries again, and is told.
                log.warning("subscription %r cannot be consumed: %s", each.subscription, error)

    def _down(self) -> None:
        for intake in list(self._intakes.values()):
            intake.lost()
        for lane in list(self._once):
            lane.lost()

    def _guarding(self) -> None:
        """Look now and then for connections that hang; wait for none of them."""
        while not self._closed.wait(_WATCH_S):
            self.link.look()
            self._publisher.link.look()

    def _watching(self) -> None:
        """Look now and then for what nobody would notice: leases that are over while every lane is
        busy, consumers that the server does not see. That may wait for the server.
        """
        asked = time.monotonic()
        while not self._closed.wait(_WATCH_S):
            if self.clock is time.monotonic:
                self._reap()
            for ordered in self._ordered():
                self._attempt(partial(ordered.hand_over, self))
            if time.monotonic() > asked + _ASK_S:
                asked = time.monotonic()
                self.look()

    @staticmethod
    def _attempt(look: Callable[[], object]) -> None:
        """One look, by itself: a queue that does not answer keeps nobody from the others."""
        try:
            look()
        except BrokerError as error:
            log.debug("looking again later: %s", error)
        except Exception:
            # Nobody else looks: who does goes on.
            log.exception("RabbitMQ: something is wrong with what was looked at")

    def _reap(self) -> None:
        seen: set[int] = set()
        for lane in list(self._lanes.values()):
            if lane.intake.number not in seen:
                seen.add(lane.intake.number)
                self._attempt(lane.reap)
                if isinstance(lane, Lane):
                    self._attempt(partial(lane.put_back, self._address.keeps_s))

    def look(self) -> None:
        """Ask the server whether it sees each consumer; where it does not, subscribe again. And
        share out partitions, and see to it that delays are kept.
        """
        for intake in list(self._intakes.values()):
            self._attempt(partial(self._look_at, intake))
        for ordered in self._ordered():
            self._attempt(partial(ordered.balance, self))
        self._delays.ask_again()

    def _look_at(self, intake: Intake | OrderedIntake) -> None:
        if self.link.is_up and not self._call(intake.is_consumed):
            log.warning(
                "subscription %r: the server sees no consumer of it; subscribing again",
                intake.subscription,
            )
            self._call(intake.mend)

    def _ordered(self) -> Sequence[OrderedIntake]:
        return [each for each in list(self._intakes.values()) if isinstance(each, OrderedIntake)]

    def abandon(self) -> None:
        """End the connections without a word, as the death of the process does."""
        self._closed.set()
        for link in (self.link, self._publisher.link):
            link.abandon()

    def close(self) -> None:
        """Close every lane and the connections; nothing can be published or claimed after."""
        with contextlib.ExitStack() as closing:
            closing.callback(self._publisher.close)
            closing.callback(self.link.close)
            closing.callback(self._closed.set)
            if not self._closed.is_set():
                for lane in (*self._lanes.values(), *self._once):
                    closing.callback(lane.close)
