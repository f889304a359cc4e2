"""The relay: what stands in the outbox reaches the broker, whatever the broker answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from duly import events
from duly.broker import Capabilities, Outcome, Published, RepeatDropped, SubscribeOptions
from duly.brokers.memory import MemoryDatabase
from duly.errors import (
    BrokerUnavailable,
    CommitUnknown,
    IdentityConflict,
    MessageTooLarge,
    PublishFailed,
    PublishUnknown,
    Superseded,
    TransactionFailed,
)
from duly.guarantees import Guarantee
from duly.message import Message, Topic
from duly.relay import Relay, RelayOptions
from duly.store import Outgoing
from duly.testing.conformance.backend import A_LOT, Outboxed, drain, eventually

OPTIONS = RelayOptions(batch=3, lease_s=10.0, attempts=3, first_s=1.0, longest_s=8.0)


Answer = Callable[[Message[Any]], Outcome | None]


class Scripted:
    """A broker that answers as told; what it stores it stores in order."""

    capabilities = Capabilities("scripted")

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


class Noted(Scripted):
    """A broker that is `PublishesOnce`, and its entrance: whose it is, and the last note."""

    capabilities = Capabilities("scripted", relays_once=True)

    def __init__(self) -> None:
        super().__init__()
        self.note: bytes | None = None
        self.holder = 0
        # What ends the next publish, and whether all was stored all the same.
        self.ends: list[tuple[Exception, bool]] = []

    def entrance(self, outbox: str) -> NotedEntrance:
        """All of them are of the same outbox."""
        assert outbox == "here"
        return NotedEntrance(self)


class NotedEntrance:
    """See `duly.broker.Entrance`."""

    def __init__(self, broker: Noted) -> None:
        self._broker = broker
        self._mine = 0

    def resume(self) -> bytes | None:
        """It ends what others have begun."""
        self._broker.holder += 1
        self._mine = self._broker.holder
        return self._broker.note

    def publish(
        self, messages: Sequence[Message[Any]], note_of: Callable[[Sequence[int]], bytes]
    ) -> Sequence[Outcome]:
        """All that is not refused, with its note, or nothing."""
        broker = self._broker
        broker.calls += 1
        if self._mine != broker.holder:
            raise Superseded("somebody else has resumed")
        outcomes = [broker.answer(message) or Published(message.id) for message in messages]
        at = [place for place, each in enumerate(outcomes) if isinstance(each, Published)]
        error, stores = broker.ends.pop(0) if broker.ends else (None, True)
        if len(at) < len(messages) and len(messages) > 1:
            raise TransactionFailed("rolled back: one of them was refused")
        if at and stores:
            broker.stored += [messages[place].body.decode() for place in at]
            broker.note = note_of(at)
        if error is not None:
            self._mine = 0
            raise error
        return outcomes

    def close(self) -> None:
        """Nothing is under way between two calls."""
        self._mine = 0


def relay_of(outboxed: Outboxed, broker: Any, **more: Any) -> Relay:
    """A relay from this outbox to this broker, in the test\'s time."""
    return Relay(
        more.pop("outbox", outboxed.outbox),
        broker,
        OPTIONS,
        clock=outboxed.clock,
        roll=lambda: 0.0,
        **{"wait_s": 0.0, **more},
    )


class With:
    """An outbox with some calls of its own."""

    def __init__(self, inner: Any, **calls: Any) -> None:
        self._inner = inner
        self.__dict__.update(calls)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


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

    # --- with a broker that stores a batch and its note together

    @pytest.mark.parametrize("stores", [True, False], ids=["stored", "not stored"])
    @pytest.mark.parametrize(
        "error", [CommitUnknown("no answer"), BrokerUnavailable("away"), Superseded("fenced off")]
    )
    def test_by_an_entrance_nothing_is_stored_twice_whatever_is_unknown(
        self, outboxed: Outboxed, topic: Topic[Any], stores: bool, error: Exception
    ) -> None:
        broker = Noted()
        outboxed.put(topic, *(str(number) for number in range(10)))
        broker.ends = [(error, stores)] * 3
        relay = relay_of(outboxed, broker, outbox_name="here")
        steps(outboxed, relay)
        assert broker.stored == [str(number) for number in range(10)]
        assert left(outboxed) == 0
        assert (relay.counts.published, relay.counts.unknown) == (10, 0)

    @pytest.mark.parametrize("stores", [True, False], ids=["stored", "not stored"])
    def test_by_an_entrance_a_successor_repeats_nothing(
        self, outboxed: Outboxed, topic: Topic[Any], stores: bool
    ) -> None:
        """Its predecessor died between the broker's transaction and the outbox's."""
        broker = Noted()
        outboxed.put(topic, *(str(number) for number in range(10)))
        first = relay_of(outboxed, broker, outbox_name="here")
        first.step()  # it resumes
        broker.ends = [(RuntimeError("the end of the process"), stores)]
        with pytest.raises(RuntimeError):
            first.step()
        assert left(outboxed) == 10
        outboxed.clock.advance(OPTIONS.lease_s + 1)
        steps(outboxed, relay_of(outboxed, broker, outbox_name="here"))
        assert broker.stored == [str(number) for number in range(10)]
        assert left(outboxed) == 0

    def test_by_an_entrance_one_that_was_fenced_off_repeats_nothing(
        self, outboxed: Outboxed, topic: Topic[Any]
    ) -> None:
        """It was stopped for longer than its lease, with a batch in its hands."""
        broker = Noted()
        outboxed.put(topic, "a", "b")
        stops = [False, True]

        def unsent(*given: Any) -> Any:
            found = outboxed.outbox.unsent(*given)
            if stops and stops.pop(0):
                outboxed.clock.advance(OPTIONS.lease_s + 1)
                second = relay_of(outboxed, broker, outbox_name="here")
                steps(outboxed, second, 10)
                second.close()
            return found

        outbox = With(outboxed.outbox, unsent=unsent)
        first = relay_of(outboxed, broker, outbox_name="here", outbox=outbox)
        first.step()
        assert first.step() > 0, "it is told that another has resumed"
        assert left(outboxed) == 0
        outboxed.put(topic, "c")
        steps(outboxed, first)
        assert broker.stored == ["a", "b", "c"]

    def test_by_an_entrance_a_position_that_is_given_out_again_is_another_message(
        self, outboxed: Outboxed, topic: Topic[Any]
    ) -> None:
        """As those of a store are that was restored."""
        broker = Noted()
        outboxed.put(topic, "old")
        first = relay_of(outboxed, broker, outbox_name="here")
        steps(outboxed, first, 5)
        first.close()
        [new] = outboxed.put(topic, "new")
        dropped: list[int] = []
        restored = With(
            outboxed.outbox,
            left=lambda positions: [Outgoing(each, new) for each in positions],
            sent=dropped.extend,
        )
        relay_of(outboxed, broker, outbox_name="here", outbox=restored).step()
        assert dropped == []

    def test_by_an_entrance_one_that_is_refused_is_found_among_the_others(
        self, outboxed: Outboxed, topic: Topic[Any]
    ) -> None:
        broker = Noted()

        def answer(message: Message[Any]) -> Outcome | None:
            large = message.body == b"large"
            return MessageTooLarge("too large", message_id=message.id) if large else None

        broker.answer = answer
        outboxed.put(topic, "a", "large", "b", "c", "d")
        steps(outboxed, relay_of(outboxed, broker, outbox_name="here"))
        assert broker.stored == ["a", "b", "c", "d"]
        [given_up] = outboxed.outbox.given_up()
        assert given_up.message.body == b"large"

    def test_by_an_entrance_a_note_of_a_newer_relay_stops_this_one(
        self, outboxed: Outboxed, topic: Topic[Any]
    ) -> None:
        broker = Noted()
        for note in (b"\x92\x02\x80", b"nonsense"):
            broker.note = note
            outboxed.put(topic, "a")
            assert relay_of(outboxed, broker, outbox_name="here").step() > 0
            outboxed.clock.advance(OPTIONS.lease_s + 1)
        assert broker.stored == []

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
