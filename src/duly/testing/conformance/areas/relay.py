"""The relay: what stands in the outbox reaches the broker, whatever the broker answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from duly import events
from duly.broker import Outcome, Published, RepeatDropped, SubscribeOptions
from duly.brokers.memory import MemoryDatabase
from duly.errors import (
    BrokerUnavailable,
    CommitUnknown,
    IdentityConflict,
    PublishFailed,
    PublishUnknown,
)
from duly.guarantees import Guarantee
from duly.message import Message, Topic
from duly.relay import Relay, RelayOptions
from duly.testing.conformance.backend import A_LOT, Outboxed, drain, eventually

OPTIONS = RelayOptions(batch=3, lease_s=10.0, attempts=3, first_s=1.0, longest_s=8.0)


Answer = Callable[[Message[Any]], Outcome | None]


class Scripted:
    """A broker that answers as told; what it stores it stores in order."""

    def __init__(self) -> None:
        self.stored: list[str] = []
        self.calls = 0
        self.answer: Answer = lambda _: None
        self.raises: Exception | None = None
        self.stores_unknown = False

    def publish(self, messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        self.calls += 1
        if self.raises is not None:
            raise self.raises
        return [self._one(message) for message in messages]

    def _one(self, message: Message[Any]) -> Outcome:
        outcome = self.answer(message)
        unknown_but_stored = isinstance(outcome, PublishUnknown) and self.stores_unknown
        if outcome is None or unknown_but_stored:
            self.stored.append(message.body.decode())
        return outcome or Published(message.id)


def relay_of(outboxed: Outboxed, broker: Any, **more: Any) -> Relay:
    """A relay from this outbox to this broker, in the test\'s time."""
    return Relay(
        outboxed.outbox,
        broker,
        OPTIONS,
        clock=outboxed.clock,
        roll=lambda: 0.0,
        **{"wait_s": 0.0, **more},
    )


def steps(outboxed: Outboxed, relay: Relay, count: int = 50) -> None:
    """Step, and let the pauses pass."""
    for _ in range(count):
        outboxed.clock.advance(relay.step())


def left(outboxed: Outboxed) -> int:
    """How many messages wait to be sent."""
    return outboxed.outbox.backlog().unsent


class Relaying:
    """What stands in the outbox reaches the broker, whatever the broker answers."""

    @pytest.fixture
    def topic(self, outboxed: Outboxed) -> Topic[Any]:
        topic: Topic[Any] = Topic("t", str, guarantee="exactly-once")
        outboxed.store.declare([topic])
        return topic

    @pytest.fixture
    def broker(self) -> Scripted:
        return Scripted()

    def test_everything_arrives_in_order(
        self, outboxed: Outboxed, topic: Topic[Any], broker: Scripted
    ) -> None:
        for number in range(10):
            outboxed.put(topic, str(number))
        relay = relay_of(outboxed, broker)
        steps(outboxed, relay)
        assert broker.stored == [str(number) for number in range(10)]
        assert left(outboxed) == 0
        assert relay.counts.published == 10

    def test_an_empty_outbox_asks_the_broker_nothing(
        self, outboxed: Outboxed, broker: Scripted
    ) -> None:
        relay = relay_of(outboxed, broker)
        assert relay.step() > 0, "else it would be a busy loop"
        assert broker.calls == 0
        assert relay_of(outboxed, broker, wait_s=0.01).step() > 0, "another relay holds it"

    def test_a_repeat_counts_as_sent(self, outboxed: Outboxed, topic: Topic[Any]) -> None:
        """The relay died after the broker had confirmed and before the outbox forgot."""
        broker = MemoryDatabase()
        broker.declare([topic])
        messages = outboxed.put(topic, "a", "b")
        broker.publish(messages[:1])
        relay = relay_of(outboxed, broker)
        steps(outboxed, relay)
        assert left(outboxed) == 0
        assert (relay.counts.published, relay.counts.repeats) == (1, 1)
        reader = broker.subscribe([topic], "reader", SubscribeOptions(Guarantee.AT_LEAST_ONCE))
        assert drain(reader) == ["a", "b"]

    def test_what_is_unknown_is_sent_again_under_its_identity(
        self, outboxed: Outboxed, topic: Topic[Any], broker: Scripted
    ) -> None:
        [message] = outboxed.put(topic, "a")
        broker.stores_unknown = True
        answers: list[Outcome | None] = [
            PublishUnknown("no answer", message_id=message.id),
            RepeatDropped(message.id),
        ]
        seen: list[str] = []

        def answer(each: Message[Any]) -> Outcome | None:
            seen.append(each.id)
            return answers.pop(0)

        broker.answer = answer
        relay = relay_of(outboxed, broker)
        pause_s = relay.step()
        assert pause_s == 1.0
        assert left(outboxed) == 1, "not dropped before it is confirmed"
        outboxed.clock.advance(pause_s)
        relay.step()
        assert left(outboxed) == 0
        assert seen == [message.id] * 2
        assert broker.stored == ["a"]
        assert (relay.counts.unknown, relay.counts.repeats) == (1, 1)

    @pytest.mark.parametrize("error", [BrokerUnavailable("away"), CommitUnknown("no answer")])
    def test_a_broker_that_is_away_is_asked_ever_more_seldom(
        self, outboxed: Outboxed, topic: Topic[Any], broker: Scripted, error: Exception
    ) -> None:
        outboxed.put(topic, "a")
        broker.raises = error
        relay = relay_of(outboxed, broker)
        pauses = []
        for _ in range(6):
            pauses.append(relay.step())
            outboxed.clock.advance(pauses[-1])
        assert pauses == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
        broker.raises = None
        steps(outboxed, relay)
        assert broker.stored == ["a"]
        broker.raises = error
        outboxed.put(topic, "b")
        assert relay.step() == 1.0, "a success makes it patient anew"

    def test_a_broker_that_takes_nothing_charges_nothing(
        self, outboxed: Outboxed, topic: Topic[Any], broker: Scripted
    ) -> None:
        outboxed.put(topic, "a", "b", "c", "d", "e")
        broker.answer = lambda message: PublishFailed("disk full", message_id=message.id)
        relay = relay_of(outboxed, broker)
        steps(outboxed, relay, 30)
        broker.answer = lambda _: None
        steps(outboxed, relay, 30)
        assert sorted(broker.stored) == ["a", "b", "c", "d", "e"]
        assert relay.counts.given_up == 0
        assert outboxed.outbox.backlog().given_up == 0

    def test_one_that_is_refused_while_others_are_taken_is_given_up_on(
        self, outboxed: Outboxed, topic: Topic[Any], broker: Scripted
    ) -> None:
        def answer(message: Message[Any]) -> Outcome | None:
            refused = message.body == b"poison"
            return PublishFailed("not this one", message_id=message.id) if refused else None

        broker.answer = answer
        told: list[Any] = []
        relay = relay_of(outboxed, broker, watchers=[told.append])
        outboxed.put(topic, "poison")
        for number in range(40):
            outboxed.put(topic, str(number))
            outboxed.clock.advance(max(0.5, relay.step()))
        steps(outboxed, relay)
        assert broker.stored == [str(number) for number in range(40)]
        [given_up] = outboxed.outbox.given_up()
        assert given_up.attempts == 3
        assert "not this one" in given_up.error
        refusals = [event.retry_in_s for event in told if isinstance(event, events.RelayRefused)]
        assert refusals == [1.0, 2.0, None]

    def test_what_cannot_be_helped_is_given_up_on_at_once(
        self, outboxed: Outboxed, topic: Topic[Any], broker: Scripted
    ) -> None:
        broker.answer = lambda message: IdentityConflict("taken", message_id=message.id)
        outboxed.put(topic, "a")
        relay = relay_of(outboxed, broker)
        assert relay.step() == 0.0
        [given_up] = outboxed.outbox.given_up()
        assert (given_up.attempts, "IdentityConflict" in given_up.error) == (1, True)
        assert broker.calls == 1
        steps(outboxed, relay)
        assert broker.calls == 1

    def test_a_front_that_is_always_refused_does_not_stop_those_behind(
        self, outboxed: Outboxed, topic: Topic[Any], broker: Scripted
    ) -> None:
        """More of them than a batch holds, and all of it refused: yet the broker is not away."""
        outboxed.put(topic, *(f"bad {number}" for number in range(7)))
        outboxed.put(topic, "good")

        def answer(message: Message[Any]) -> Outcome | None:
            bad = message.body.startswith(b"bad")
            return PublishFailed("undeclared", message_id=message.id) if bad else None

        broker.answer = answer
        steps(outboxed, relay_of(outboxed, broker), 20)
        assert broker.stored == ["good"]

    def test_a_key_does_not_overtake_its_refused_one(
        self, outboxed: Outboxed, topic: Topic[Any], broker: Scripted
    ) -> None:
        refusals = [True, True, False]

        def answer(message: Message[Any]) -> Outcome | None:
            if message.body == b"1" and refusals.pop(0):
                return PublishFailed("not yet", message_id=message.id)
            return None

        broker.answer = answer
        relay = relay_of(outboxed, broker)
        outboxed.put(topic, "1", key="k")
        outboxed.put(topic, "x")
        relay.step()
        outboxed.put(topic, "2", key="k")
        outboxed.put(topic, "y")
        for _ in range(20):
            outboxed.put(topic, "z")
            outboxed.clock.advance(max(0.3, relay.step()))
        assert broker.stored.index("1") < broker.stored.index("2")

    def test_a_second_relay_takes_over(
        self, outboxed: Outboxed, topic: Topic[Any], broker: Scripted
    ) -> None:
        one, two = relay_of(outboxed, broker), relay_of(outboxed, broker)
        outboxed.put(topic, "a")
        one.step()
        outboxed.put(topic, "b")
        assert two.step() > 0
        assert broker.stored == ["a"]
        outboxed.clock.advance(OPTIONS.lease_s + 1)
        two.step()
        assert broker.stored == ["a", "b"]
        outboxed.put(topic, "c")
        one.step()
        assert broker.stored == ["a", "b"], "the first has lost it"
        two.close()
        outboxed.clock.advance(OPTIONS.lease_s / 3 + 1)
        one.step()
        assert broker.stored == ["a", "b", "c"]

    def test_it_runs_on_a_thread_until_told_to_stop(
        self, outboxed: Outboxed, topic: Topic[Any], broker: Scripted
    ) -> None:
        stop = threading.Event()
        relay = Relay(outboxed.outbox, broker, OPTIONS, wait_s=0.05)  # type: ignore[arg-type]
        thread = threading.Thread(target=relay.run, args=(stop,))
        thread.start()
        for number in range(20):
            outboxed.put(topic, str(number))
        eventually(lambda: len(broker.stored) == 20, "everything relayed")
        stop.set()
        thread.join(10)
        assert not thread.is_alive()
        assert broker.stored == [str(number) for number in range(20)]
        assert outboxed.outbox.hold("another", 1.0), "it let go"
        assert left(outboxed) == 0
        assert list(outboxed.outbox.unsent(1, A_LOT, 0.0)) == []

    def test_a_failure_that_nobody_foresaw_ends_no_thread(
        self, outboxed: Outboxed, topic: Topic[Any], broker: Scripted
    ) -> None:
        surprises = [RuntimeError("a defect")]

        def answer(_: Message[Any]) -> Outcome | None:
            if surprises:
                raise surprises.pop()
            return None

        broker.answer = answer
        outboxed.put(topic, "a")
        stop = threading.Event()
        options = replace(OPTIONS, first_s=0.01, longest_s=0.01)
        relay = Relay(outboxed.outbox, broker, options, wait_s=0.05)  # type: ignore[arg-type]
        thread = threading.Thread(target=relay.run, args=(stop,))
        thread.start()
        eventually(lambda: broker.stored == ["a"], "relayed after all")
        stop.set()
        thread.join(10)
        assert not thread.is_alive()
