"""`KafkaBroker`: declaring and publishing; `Lane` claims and settles."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

from duly.broker import Capabilities, Outcome, Published, SubscribeOptions
from duly.brokers.kafka.address import address_of
from duly.brokers.kafka.admin import COMPACTED, KEPT, Admin, Found, Wanted, config_of
from duly.brokers.kafka.client import check_consuming
from duly.brokers.kafka.gate import Gate
from duly.brokers.kafka.intake import Intake
from duly.brokers.kafka.item import Way
from duly.brokers.kafka.lane import Lane
from duly.brokers.kafka.ledger import Ledger
from duly.brokers.kafka.letters import LetterTopic
from duly.brokers.kafka.names import Names
from duly.brokers.kafka.operated import Operated
from duly.brokers.kafka.producer import TOO_LARGE, Sender, Sending
from duly.brokers.kafka.producers import Producers
from duly.brokers.kafka.reader import Reader
from duly.brokers.kafka.recorded import check_promises, check_subscription, key_lanes_of
from duly.brokers.kafka.records import Records
from duly.brokers.kafka.remains import Remains
from duly.brokers.kafka.share import Order
from duly.brokers.kafka.span import takes_spans
from duly.brokers.kafka.store import KafkaStore
from duly.brokers.kafka.wire import headers_of
from duly.errors import (
    BrokerError,
    BrokerUnavailable,
    CommitUnknown,
    ConfigurationError,
    InvalidMessage,
    MessageTooLarge,
    PublishFailed,
    PublishUnknown,
)
from duly.guarantees import Guarantee
from duly.inspection.graves import Graveyard
from duly.message import Message, Topic, now_ms

log = logging.getLogger("duly.kafka")

WATCH_S = 5.0
# Who closes waits for so long for what is just being looked at.
_LOOKS_S = 5.0


class KafkaBroker(Operated):
    """A broker on a Kafka cluster. Safe to use from any thread; not across fork().

    ``url`` is ``kafka://host:port,...``. ``deadline_s`` bounds how long a publish waits for the
    cluster's word. ``clock`` gives the seconds that leases go by, ``wall_ms`` the time that is
    written to records. Raises on opening `ConfigurationError`, `BrokerUnavailable` and
    `BrokerUnusable`.
    """

    def __init__(
        self,
        url: str,
        *,
        shown: str = "kafka://...",
        deadline_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        wall_ms: Callable[[], int] = now_ms,
    ) -> None:
        self._address = address_of(url, shown)
        self._capabilities = Capabilities(
            name="Kafka",
            is_log=True,
            durable=True,
            identity_retention=False,
            holds_keys=False,
            delays=False,
            key_lanes=True,
            relays_once=True,
            max_message_bytes=self._address.max_message_bytes,
        )
        self.clock = clock
        self._wall_ms = wall_ms
        self._names = Names(self._address.namespace)
        self._topics: dict[str, Topic[Any]] = {}
        self._promises: dict[str, str] = {}
        self._known: dict[tuple[str, str], None] = {}
        self._made: set[str] = set()
        self._intakes: dict[str, Intake] = {}
        self._lanes: dict[int, Lane] = {}
        self._gates: list[Gate] = []
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        self._closed = False
        self._stop = threading.Event()
        self._watch: threading.Thread | None = None
        self._sender = Sender(self._address, deadline_s)
        if not self._address.is_plain:
            self._sender.check_options(shown)
            check_consuming(self._address, shown)
        self._admin = Admin(self._address)
        self._lossy = Sender(self._address, 1.0, lossy=True)
        self._record_reader = Reader(self._address, self._names.records)
        self._letter_reader = Reader(self._address, self._names.letters)
        self._records: Records | None = None
        self._letters = LetterTopic(
            self._names.letters,
            self._letter_reader,
            self._sender,
            lambda: self._make(self._names.letters, COMPACTED),
            self._address.max_message_bytes,
        )
        self._graveyard: Graveyard = self._letters
        self._producers: Producers | None = None
        self._remains: Remains | None = None

    @property
    def capabilities(self) -> Capabilities:
        """What this broker provides."""
        return self._capabilities

    def own_store(self) -> KafkaStore:
        """Kafka's own transactions, in place of a store. From here on exactly-once subscriptions
        commit their positions by them; to be asked for before the first.
        """
        with self._lock:
            if self._producers is None:
                prefix, standing = self._names.group("duly"), self._admin.standing
                self._producers = own = Producers(self._address, prefix, standing)
                ledger = Ledger(self._address, self._admin, f"{prefix}-")
                self._remains = Remains(
                    self._admin, ledger, own.called, own.is_own, lambda: not self._stop.is_set()
                )
                place = f"kafka://{self._address.bootstrap}/{self._address.namespace}"
                # A transaction of Kafka's moves the one position that a partition has.
                self._capabilities = replace(self._capabilities, database=place, key_lanes=False)
        return KafkaStore(self, self._producers, self._address.transaction_timeout_s)

    def intake(self, subscription: str) -> Intake | None:
        """The subscription as this process works it."""
        return self._intakes.get(subscription)

    # --- declaring

    def declare(self, topics: Iterable[Topic[Any]]) -> None:
        """As `Broker.declare`; ``guarantee`` of a topic is fixed, and ``partitions``, where they
        are said.
        """
        # What is known asks nobody: a transaction that publishes by an outbox declares, too, and
        # has to go on while there is no cluster.
        topics = [topic for topic in topics if self._topics.get(topic.name) is not topic]
        if not topics:
            return
        self._check_open()
        names = {self._names.topic(topic.name): topic for topic in topics}
        found = self._find(names)
        wanted = {f"topic/{topic.name}": str(topic.guarantee) for topic in topics}
        check_promises(topics, self._recorded().fix(wanted))
        self._admin.make(
            Wanted(name, max(1, topic.partitions), config_of(topic))
            for name, topic in names.items()
            if name not in found
        )
        self._find(names)  # or another made one of them meanwhile, with other partitions
        self._topics.update((topic.name, topic) for topic in topics)
        self._promises.update((topic.name, str(topic.guarantee)) for topic in topics)

    def _find(self, names: Mapping[str, Topic[Any]]) -> Mapping[str, Found]:
        """Those that are there. Raises `ConfigurationError` for one that is otherwise there."""
        found = self._admin.find(names)
        for name, topic in names.items():
            if name in found and topic.partitions not in (0, found[name].partitions):
                raise ConfigurationError(
                    f"topic {topic.name!r} is there with {found[name].partitions} partitions, and "
                    f"declared with partitions={topic.partitions}. Declare it as it is there, or "
                    "without, or give it another name: more partitions would move its keys."
                )
        return found

    def know(
        self, topics: Iterable[Topic[Any]], subscription: str, options: SubscribeOptions
    ) -> None:
        """As `Knows.know`."""
        del options  # a group is the same whatever its order
        names = {self._names.topic(topic.name): topic for topic in topics}
        self._find(names)
        if self._admin.find([self._names.records]):
            keys = [f"topic/{topic.name}" for topic in names.values()]
            check_promises(names.values(), self._recorded().found(keys))
        self._known.update(((subscription, topic.name), None) for topic in names.values())

    def _recorded(self) -> Records:
        with self._lock:
            if self._records is None:
                self._make(self._names.records, COMPACTED)
                self._records = Records(self._names.records, self._record_reader, self._sender)
            return self._records

    def _make(self, name: str, config: Any) -> None:
        with self._lock:
            if name not in self._made:
                if name not in self._admin.find([name]):
                    self._admin.make([Wanted(name, 1, config)])
                self._made.add(name)

    def _make_again(self, subscription: str) -> None:
        self._make(self._names.again(subscription), KEPT)

    # --- publishing

    def publish(self, messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        """As `Broker.publish`. Of at-most-once topics nothing is confirmed."""
        if not messages:
            return []
        self._check_open()
        ready = [*self.ready(messages)]
        sent = [(m, s) for m, s in zip(messages, ready, strict=True) if isinstance(s, Sending)]
        lossy = [sending for message, sending in sent if self._is_lossy(message)]
        surely = [s for m, s in sent if not self._is_lossy(m)] if lossy else [s for _, s in sent]
        if surely:
            self._sender.send(surely)
        if lossy:
            self._lossy.send(lossy)
        return [
            _outcome(message, each) if isinstance(each, Sending) else each
            for message, each in zip(messages, ready, strict=True)
        ]

    def ready(self, messages: Sequence[Message[Any]]) -> Iterator[PublishFailed | Sending]:
        """The record of each that is published now, or why it is certainly not stored. Raises
        `BrokerError`.
        """
        # Most are of one topic, and nothing is wrong with them.
        topic, name, is_declared = "", "", False
        most = self._capabilities.max_message_bytes
        # Not the message's own time: retention goes by this, and what waited in an outbox for a
        # week would be deleted at once.
        stamp_ms = self._wall_ms()
        for message in messages:
            if message.topic != topic:
                topic, name = message.topic, self._names.topic(message.topic)
                is_declared = self._promise(message) is not None
            if is_declared and len(message.body) <= most and message.due_ms is None:
                key = None if message.key is None else message.key.encode()
                yield Sending(name, message.body, key, headers_of(message), stamp_ms)
            else:
                yield self._refusal(message, is_declared)

    def _is_lossy(self, message: Message[Any]) -> bool:
        return self._promises.get(message.topic) == Guarantee.AT_MOST_ONCE

    def _promise(self, message: Message[Any]) -> str | None:
        """The guarantee of a topic that was declared, be it by another process: what that one put
        into an outbox is brought here by whoever relays.
        """
        known = self._promises.get(message.topic)
        if known is None:
            key = f"topic/{message.topic}"
            known = self._recorded().found([key]).get(key)
            if known is not None and self._admin.find([self._names.topic(message.topic)]):
                self._promises[message.topic] = known
            else:
                known = None
        return known

    def look_for(self, topics: AbstractSet[str]) -> None:
        """Look, behind an error, whether these are still there, by their names on the cluster. What
        is not counts as declared by nobody: the driver would look for it at each try, for longer
        than the others of its transaction should wait. Never raises.
        """
        try:
            found = self._admin.find(topics)
        except BrokerError as error:
            log.debug("Kafka: whether %s are there is not known: %s", topics, error)
            return
        gone = {*topics} - found.keys()
        for name in list(self._promises):
            if self._names.topic(name) in gone:
                log.warning("Kafka: topic %r is not there any more", name)
                self._promises.pop(name, None)
                self._topics.pop(name, None)

    def _refusal(self, message: Message[Any], is_declared: bool) -> PublishFailed:
        if not is_declared:
            return PublishFailed(
                f"{_named(message)}: nobody has declared its topic, or it was deleted since",
                message_id=message.id,
            )
        if message.due_ms is not None:
            return InvalidMessage(
                f"{_named(message)}: it has a due time, and Kafka has no delays. Publish it when "
                "it is due.",
                message_id=message.id,
            )
        return MessageTooLarge(
            f"{_named(message)}: the body has {message.size:,} bytes, Kafka carries at most "
            f"{self._capabilities.max_message_bytes:,}. Nothing was sent.",
            message_id=message.id,
        )

    def entrance(self, outbox: str) -> Gate:
        """As `PublishesOnce.entrance`."""
        gate = Gate(
            self._address, self._admin, self._names, outbox, self.ready, _outcome, self.look_for
        )
        self._gates.append(gate)
        return gate

    # --- subscribing

    def subscribe(
        self, topics: Sequence[Topic[Any]], subscription: str, options: SubscribeOptions
    ) -> Lane:
        """As `Broker.subscribe`; refuses a key that is held by a dead letter."""
        self._check_open()
        self._check_options(topics, subscription, options)
        transactional = self._producers is not None
        options = replace(options, key_lanes=key_lanes_of(options, transactional=transactional))
        check_subscription(self._recorded(), subscription, options, transactional=transactional)
        self._make_again(subscription)
        names = {self._names.topic(topic.name): self._topics[topic.name] for topic in topics}
        with self._lock:
            intake = self._intake_of(topics, subscription, options)
            self._known.update(((subscription, topic.name), None) for topic in topics)
        try:
            intake.read(names, options.start)
        except BrokerError:
            # Who asks again, when somebody has mended it, begins anew.
            self._drop(intake)
            raise
        self.watch()
        with self._lock:
            lane = Lane(self, intake, options, frozenset(names), next(self._numbers))
            self._lanes[lane.number] = lane
            return lane

    def _intake_of(
        self, topics: Sequence[Topic[Any]], subscription: str, options: SubscribeOptions
    ) -> Intake:
        way = Way(_order(options), options.key_lanes, takes_spans(options, topics))
        intake = self._intakes.get(subscription)
        if intake is not None and intake.order is not way.order:
            raise ConfigurationError(
                f"subscription {subscription!r} is worked in this process in order "
                f"{intake.order.value!r}, and this lane declares {way.order.value!r}"
            )
        if intake is None:
            intake = self._intakes[subscription] = Intake(
                self._address, self._admin, self._recorded, subscription,
                self._names.group(subscription), options.guarantee, way,
                self._names.again(subscription), self.clock, self._wall_ms,
                self._producers if options.guarantee is Guarantee.EXACTLY_ONCE else None,
            )  # fmt: skip
        return intake

    def _check_options(
        self, topics: Sequence[Topic[Any]], subscription: str, options: SubscribeOptions
    ) -> None:
        for topic in topics:
            if topic.name not in self._topics:
                raise ConfigurationError(
                    f"topic {topic.name!r} is not known here: declare it first"
                )
            if options.order_by_key and self._topics[topic.name].partitions == 0:
                raise ConfigurationError(
                    f"subscription {subscription!r} asks for order by key, and topic "
                    f"{topic.name!r} has no order: declare it with partitions=1 or more"
                )
        if options.hold_key_on_dead:
            raise ConfigurationError(
                f"subscription {subscription!r} asks for hold_key_on_dead=True, and Kafka keeps "
                "dead letters apart from what waits behind them: leave it out, or use a broker "
                "that holds keys"
            )

    def watch(self) -> None:
        """As `Home.watch`: on a thread, which is begun with what there is to look after first."""
        if self._watch is None:
            with self._lock:
                if self._watch is None:
                    self._watch = threading.Thread(
                        target=self._watching, name="duly-kafka-watch", daemon=True
                    )
                    self._watch.start()

    def _watching(self) -> None:
        """Look now and then for what no client is told of."""
        while not self._stop.wait(WATCH_S):
            for intake in list(self._intakes.values()):
                self._watch_over(intake.look, intake.catch_up, intake.tidy)
            if self._producers is not None and not self._stop.is_set():
                self._watch_over(self._producers.end_standing)
                self._watch_over(self._look_for_remains)

    def _watch_over(self, *looks: Callable[[], None]) -> None:
        try:
            for look in looks:
                look()
        except (BrokerError, CommitUnknown) as error:
            log.debug("looking again later: %s", error)
        except Exception:
            # Nobody else looks: this thread goes on.
            log.exception("Kafka: something is wrong with what was looked at")

    def _look_for_remains(self) -> None:
        if self._remains is not None:
            with self._lock:
                topics = [t for t in self._topics.values() if t.guarantee != "at-most-once"]
            names = [self._names.topic(topic.name) for topic in topics]
            # Transactions write dead letters, too; who may not see them looks at the rest.
            with contextlib.suppress(BrokerError):
                names += self._admin.find([self._names.letters])
            self._remains.look(names)

    def leave(self, lane: Lane) -> None:
        """As `Surroundings.leave`; with the last lane the process leaves the group."""
        with self._lock:
            self._lanes.pop(lane.number, None)
        self._drop(lane.intake)

    def _drop(self, intake: Intake) -> None:
        """Leave the group, unless a lane goes on."""
        with self._lock:
            if any(lane.intake is intake for lane in self._lanes.values()):
                return
            if self._intakes.get(intake.subscription) is intake:
                del self._intakes[intake.subscription]
        intake.close()

    # --- the end

    def _check_open(self) -> None:
        if self._closed:
            raise BrokerUnavailable("Kafka was closed; nothing was changed")

    def abandon(self) -> None:
        """Leave without a word about what is held, as the death of the process does."""
        with self._lock:
            intakes, self._intakes = list(self._intakes.values()), {}
        for intake in intakes:
            intake.abandon()
        self.close()

    def close(self) -> None:
        """Close every lane and connection; nothing can be published or claimed after."""
        if self._closed:
            return
        for lane in list(self._lanes.values()):
            lane.close()
        self._closed = True
        self._stop.set()
        for intake in list(self._intakes.values()):
            intake.close()
        if self._producers is not None:
            self._producers.close()
        for gate in self._gates:
            gate.close()
        if self._watch is not None:
            self._watch.join(_LOOKS_S)
        self._sender.close()
        self._lossy.close()
        self._record_reader.close()
        self._letter_reader.close()


def _order(options: SubscribeOptions) -> Order:
    if options.guarantee is Guarantee.EXACTLY_ONCE:
        return Order.BY_LANE if options.key_lanes > 1 else Order.AS_LOGGED
    return Order.BY_KEY if options.order_by_key else Order.NONE


def _named(message: Message[Any]) -> str:
    return f"topic {message.topic!r}, message {message.id!r}"


def _outcome(message: Message[Any], sending: Sending) -> Outcome:
    if sending.is_stored:
        return Published(message.id)
    why = "no answer" if sending.error is None else sending.error.str()
    if not sending.is_refused:
        return PublishUnknown(
            f"{_named(message)}: sent, and not confirmed: {why}. Publish it again under its id.",
            message_id=message.id,
        )
    assert sending.error is not None, "the cluster said why"
    kind = MessageTooLarge if sending.error.code() in TOO_LARGE else PublishFailed
    return kind(f"{_named(message)}: not stored: {why}", message_id=message.id)
