"""An app's publishing: which way a message goes, decided by its topic's guarantee."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from duly import events
from duly.backends import Backends
from duly.broker import Broker, Outcome, Published, RepeatDropped
from duly.errors import ConfigurationError, InvalidMessage, PublishError
from duly.events import Watcher
from duly.guarantees import Guarantee
from duly.message import Message, Topic
from duly.publishing.buffer import Buffer, Buffered, Dropped, Drops
from duly.publishing.direct import (
    IN_TRANSACTION,
    accepted,
    all_accepted,
    attempt,
    in_portions,
    refuse_in_transaction,
    refuse_on_loop,
)
from duly.publishing.threads import Threads
from duly.store import PublishesOnLoop, Store, Transaction

if TYPE_CHECKING:
    # Slow to import, and not needed by those who never publish from an event loop.
    import asyncio

    from duly.publishing.group import GroupPublish

Accepted = Published | RepeatDropped | Buffered | Dropped
"""How a publish went well: durable, known before, or (at-most-once) on its way or given up."""

_AT_MOST_ONCE = Guarantee.AT_MOST_ONCE


class Publisher:
    """Sends an app's messages. Safe to use from any thread."""

    def __init__(self, backends: Backends, watchers: Sequence[Watcher]) -> None:
        self._backends = backends
        self._watchers = watchers
        self._drops = Drops({})
        self.forked()

    def forked(self) -> None:
        """Start anew in a forked child: what is buffered is the parent's to send."""
        self._lock = threading.Lock()
        self._drops = self._drops.forked()
        self._buffer: Buffer | None = None
        self.threads = Threads()
        self._groups: dict[asyncio.AbstractEventLoop, GroupPublish] = {}

    @property
    def drops(self) -> Mapping[str, int]:
        """How many at-most-once messages were dropped, by topic."""
        return self._drops.by_topic()

    def close(self, timeout_s: float) -> None:
        """Send what is buffered, for up to ``timeout_s`` seconds, and end the threads."""
        self.flush(timeout_s)
        with self._lock:
            self._groups.clear()
        self.threads.close()

    def flush(self, timeout_s: float) -> bool:
        """Send what is buffered, for up to ``timeout_s`` seconds; what was not sent then is
        dropped. False: nothing was ever buffered since the last time.
        """
        with self._lock:
            buffer, self._buffer = self._buffer, None
        if buffer is None:
            return False
        buffer.close(timeout_s)
        return True

    # --- one message

    def send(self, topic: Topic[Any], message: Message[Any]) -> Accepted:
        """Publish, durably on return; an at-most-once message is buffered."""
        if topic.promise is _AT_MOST_ONCE:
            return self._buffered(topic, message)
        refuse_on_loop("app.publish", "await app.apublish(...)")
        broker = self._broker_for(topic, message.due_ms, "app.publish")
        return accepted(self._stored(broker, (message,))[0])

    async def asend(self, topic: Topic[Any], message: Message[Any]) -> Accepted:
        """The same on an event loop; what its tasks publish together shares a commit."""
        if topic.promise is _AT_MOST_ONCE:
            return self._buffered(topic, message)
        if self._backends.is_ready_for(topic):
            self._broker_for(topic, message.due_ms, "app.apublish")
        else:
            call = self._broker_for, topic, message.due_ms, "app.apublish"
            await self.threads.run("publish", *call)
        import asyncio

        loop = asyncio.get_running_loop()
        group = self._groups.get(loop) or self._new_group(loop)
        return accepted(await group.send(message))

    # --- many

    def send_many(self, topic: Topic[Any], messages: Sequence[Message[Any]]) -> Sequence[Accepted]:
        """Publish in order, in portions. Raises `PublishIncomplete` with every outcome."""
        if topic.promise is _AT_MOST_ONCE:
            return [self._buffered(topic, message) for message in messages]
        if not messages:
            return []
        broker = self._broker_for(topic, messages[0].due_ms, "app.publish_many")
        outcomes: list[Outcome] = []
        for portion in in_portions(messages):
            outcomes += self._stored(broker, portion)
        return all_accepted(outcomes)

    # --- in the caller's own transaction

    def send_within(
        self, within: Any, topic: Topic[Any], messages: Sequence[Message[Any]]
    ) -> Sequence[Accepted]:
        """Publish as part of the caller's transaction: true when that commits."""
        store = self._joined(within, topic, messages)
        if store is None:
            return [Published(message.id) for message in messages]
        return _all_or_raised(store.publish_within(within, messages, (topic,)))

    async def asend_within(
        self, within: Any, topic: Topic[Any], messages: Sequence[Message[Any]]
    ) -> Sequence[Accepted]:
        """`send_within`, awaited where the store's driver is."""
        store = self._joined(within, topic, messages)
        if store is None:
            return [Published(message.id) for message in messages]
        if isinstance(store, PublishesOnLoop):
            return _all_or_raised(await store.apublish_within(within, messages, (topic,)))
        return _all_or_raised(store.publish_within(within, messages, (topic,)))

    def _joined(
        self, within: Any, topic: Topic[Any], messages: Sequence[Message[Any]]
    ) -> Store | None:
        """The store whose transaction this is; None: nothing is left to do."""
        if topic.promise is _AT_MOST_ONCE:
            raise ConfigurationError(
                f"within= and topic {topic.name!r}: it is declared at-most-once, which a "
                "transaction cannot loosen. Leave within= out, or declare it at-least-once."
            )
        if isinstance(within, Transaction):
            within.add(topic, messages)
            return None
        if not messages:
            return None
        self._backends.know(topic)
        # Not declared as elsewhere: that would wait for the caller's own transaction.
        broker, store = self._backends.get()
        _check_delay(broker, topic, messages[0].due_ms)
        if store is None or not store.joins(within):
            raise ConfigurationError(_does_not_join(within, store))
        return store

    # --- parts

    def _broker_for(self, topic: Topic[Any], due_ms: int | None, call: str) -> Broker:
        if IN_TRANSACTION.get() is not None:
            # Before the topic is declared, which would wait for that transaction.
            refuse_in_transaction(self._backends.get()[0], call)
        broker = self._backends.broker_for(topic)
        _check_delay(broker, topic, due_ms)
        return broker

    def _stored(self, broker: Broker, messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        if not self._watchers:
            return attempt(broker, messages)
        start = time.perf_counter()
        outcomes = attempt(broker, messages)
        self._watch(messages, outcomes, time.perf_counter() - start)
        return outcomes

    def _watch(
        self, messages: Sequence[Message[Any]], outcomes: Sequence[Outcome], seconds: float
    ) -> None:
        for event in published_events(messages, outcomes, seconds):
            events.tell(self._watchers, event)

    def _buffered(self, topic: Topic[Any], message: Message[Any]) -> Buffered | Dropped:
        self._backends.know(topic)
        buffer = self._buffer
        if buffer is None:
            self._backends.check()
            with self._lock:
                if self._buffer is None:
                    self._buffer = Buffer(
                        self._store_loosely, self._dropped, self._record_drops, self._drops
                    )
                buffer = self._buffer
        return buffer.put(message)

    def _new_group(self, loop: asyncio.AbstractEventLoop) -> GroupPublish:
        from duly.publishing.group import GroupPublish

        threads = self.threads.of("publish")
        with self._lock:
            for other in [other for other in self._groups if other.is_closed()]:
                del self._groups[other]
            group = GroupPublish(lambda messages: self._stored(self._open(), messages), threads)
            return self._groups.setdefault(loop, group)

    def _open(self) -> Broker:
        return self._backends.get()[0]

    # --- for the buffer, on its thread

    def _store_loosely(self, messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        broker = self._backends.get_named({m.topic for m in messages})
        start = time.perf_counter()
        outcomes = broker.publish(messages)
        if self._watchers:
            for event in published_events(messages, outcomes, time.perf_counter() - start):
                if isinstance(event, events.Published):  # the buffer tells of the others
                    events.tell(self._watchers, event)
        return outcomes

    def _dropped(self, topic: str, count: int, why: str) -> None:
        if self._watchers:
            events.tell(self._watchers, events.PublishDropped(topic, count, why))

    def _record_drops(self, drops: Mapping[str, int]) -> None:
        record = getattr(self._open(), "record_drops", None)
        if record is not None:
            for topic, count in drops.items():
                record(topic, count)


def _all_or_raised(outcomes: Sequence[Outcome]) -> Sequence[Accepted]:
    if len(outcomes) == 1 and isinstance(outcomes[0], PublishError):
        raise outcomes[0]
    return all_accepted(outcomes)


def published_events(
    messages: Sequence[Message[Any]], outcomes: Sequence[Outcome], seconds: float
) -> Iterator[events.Event]:
    """What to tell watchers: for each topic what is stored, and what is not plainly so."""
    topics = {message.topic for message in messages}
    if len(topics) == 1 and set(map(type, outcomes)) == {Published}:
        yield events.Published(topics.pop(), len(messages), 0, seconds, messages)
        return
    by_topic: dict[str, list[tuple[Message[Any], Outcome]]] = {}
    for message, outcome in zip(messages, outcomes, strict=True):
        by_topic.setdefault(message.topic, []).append((message, outcome))
    for topic, pairs in by_topic.items():
        stored = [message for message, outcome in pairs if not isinstance(outcome, PublishError)]
        repeats = sum(isinstance(outcome, RepeatDropped) for _, outcome in pairs)
        if stored:
            yield events.Published(topic, len(stored) - repeats, repeats, seconds, stored)
        errors = [outcome for _, outcome in pairs if isinstance(outcome, PublishError)]
        if errors:
            left = [message for message, outcome in pairs if isinstance(outcome, PublishError)]
            yield events.PublishErred(topic, left, errors[0], seconds)


def _check_delay(broker: Broker, topic: Topic[Any], due_ms: int | None) -> None:
    if due_ms is not None and (why := _why_no_delay(broker, topic)):
        raise ConfigurationError(f"topic {topic.name!r}: {why}")


def refuse_delays(
    broker: Broker, topics: Mapping[str, Topic[Any]], messages: Sequence[Message[Any]]
) -> None:
    """Raise the `InvalidMessage` of one that its broker could not deliver later.

    In a transaction with an outbox: refused by the broker after the commit, it would be missing.
    """
    for message in messages:
        if message.due_ms is not None and (why := _why_no_delay(broker, topics[message.topic])):
            raise InvalidMessage(
                f"topic {message.topic!r}, message {message.id!r}: it has a due time. {why}",
                message_id=message.id,
            )


def _why_no_delay(broker: Broker, topic: Topic[Any]) -> str | None:
    can = broker.capabilities
    if not can.delays:
        return (
            f"{can.name} delivers at once and cannot delay. Leave delay_s= and due= out, or use a "
            "broker that can (sqlite:///...)."
        )
    if topic.partitions and not can.delays_in_order:
        return (
            f"{can.name} cannot delay in order by key. Leave delay_s= and due= out, publish to a "
            "topic without partitions, or use a broker that can (sqlite:///...)."
        )
    return None


def _does_not_join(within: Any, store: Any) -> str:
    there = "the app has no store" if store is None else f"the store is {store.capabilities.name}"
    return (
        f"within={type(within).__name__} cannot carry the message ({there}): give the "
        "transaction of `with app.transaction() as tx`, or the driver's own connection, with an "
        "open transaction, to the very database that the app's store is."
    )
