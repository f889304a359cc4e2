"""`app.publish` and its kin: what they return, what they raise, and where they may be called."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import duly
from duly import events
from duly.broker import Outcome, Published
from duly.message import Message
from duly.publishing import IN_TRANSACTION
from tests.api.fakes import FakeBroker, stored

rides = duly.Topic("rides", dict, guarantee="at-least-once")
orders = duly.Topic("orders", dict, guarantee="exactly-once")
views = duly.Topic("views", dict, guarantee="at-most-once")


@pytest.fixture
def broker() -> FakeBroker:
    return FakeBroker()


@pytest.fixture
def app(broker):
    with duly.App("shop", broker) as app:
        yield app


@pytest.fixture
def memory():
    with duly.App("shop", "memory://") as app:
        yield app


class TestOne:
    def test_what_is_published(self, app, broker):
        outcome = app.publish(
            rides, {"n": 1}, id="r-1", key="ann", headers={"traceparent": "00-1"}, delay_s=60
        )
        assert outcome == Published("r-1")
        (message,) = broker.messages
        assert (message.topic, message.source, message.id, message.key, message.body) == (
            "rides", "shop", "r-1", "ann", b'{"n":1}'
        )  # fmt: skip
        assert message.headers == {"traceparent": "00-1"}
        assert message.due_ms is not None
        assert abs(message.due_ms - message.time_ms - 60_000) < 1000

    def test_an_id_is_made_where_none_is_given(self, app, broker):
        outcome = app.publish(rides, {})
        assert outcome.message_id == broker.messages[0].id

    def test_topics_are_made_known_once(self, app, broker):
        declared: list[Any] = []
        declare = broker.declare

        def noting(topics: Any) -> None:
            declared.extend(topics)
            declare(topics)

        broker.declare = noting
        app.publish(rides, {})
        app.publish(rides, {})
        assert declared == [rides]
        assert list(app.topics) == [rides]

    def test_a_wrong_payload_never_reaches_the_broker(self, app, broker):
        with pytest.raises(duly.InvalidMessage):
            app.publish(rides, [1])
        with pytest.raises(duly.InvalidMessage):
            app.publish(rides, {}, delay_s=-1)
        assert broker.declared == {}

    def test_what_is_no_topic_is_said_so(self, app, broker):
        calls: list[Callable[[Any], Any]] = [
            lambda topic: app.publish(topic, rides),
            lambda topic: asyncio.run(app.apublish(topic, {})),
            lambda topic: app.publish_many(topic, [{}]),
            lambda topic: asyncio.run(app.apublish_many(topic, [{}])),
            app.declare,
        ]
        for call in calls:
            for topic in ("rides", {"ride": 1}):
                with pytest.raises(duly.ConfigurationError, match="is no topic"):
                    call(topic)
        assert broker.messages == []

    def test_one_payload_is_not_many(self, app, broker):
        names = duly.Topic("names", str, guarantee="at-least-once")
        for payloads in ("ann", b"ann", {"ride": 1}, 5):
            with pytest.raises(duly.ConfigurationError, match="list"):
                app.publish_many(names, payloads)
        assert broker.messages == []

    def test_due(self, app, broker):
        app.publish(rides, {}, due=datetime.now(UTC) + timedelta(hours=1))
        message = broker.messages[0]
        assert message.due_ms is not None
        assert abs(message.due_ms - message.time_ms - 3_600_000) < 1000

    def test_a_broker_that_cannot_delay(self):
        app = duly.App("shop", FakeBroker(delays=False))
        with pytest.raises(duly.ConfigurationError, match="cannot delay"):
            app.publish(rides, {}, delay_s=1)
        with pytest.raises(duly.ConfigurationError, match="cannot delay"):
            app.publish_many(rides, [{}], delay_s=1)
        with pytest.raises(duly.ConfigurationError, match="cannot delay"):
            asyncio.run(app.apublish(rides, {}, delay_s=1))
        with pytest.raises(duly.ConfigurationError, match="cannot delay"):
            app.publish(rides, {}, delay_s=1, within=object())

    def test_a_broker_that_cannot_delay_in_order(self):
        app = duly.App("shop", FakeBroker(delays_in_order=False))
        app.publish(rides, {}, delay_s=1)
        ordered = duly.Topic("ordered", dict, guarantee="at-least-once", partitions=4)
        with pytest.raises(duly.ConfigurationError, match="cannot delay in order by key"):
            app.publish(ordered, {}, delay_s=1)

    def test_repeats_and_conflicts(self, memory):
        assert memory.publish(orders, {"n": 1}, id="o-1") == Published("o-1")
        assert memory.publish(orders, {"n": 1}, id="o-1") == duly.RepeatDropped("o-1")
        with pytest.raises(duly.IdentityConflict) as error:
            memory.publish(orders, {"n": 2}, id="o-1")
        assert error.value.message_id == "o-1"

    def test_a_topic_that_is_another_of_the_same_name(self, app):
        app.publish(rides, {})
        with pytest.raises(duly.ConfigurationError, match="two topics named 'rides'"):
            app.publish(duly.Topic("rides", dict, guarantee="exactly-once"), {})


def refused(messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
    return [duly.PublishFailed("no", message_id=message.id) for message in messages]


def raising(error: Exception) -> Any:
    def answer(messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        raise error

    return answer


class TestFailures:
    def test_a_refusal_is_raised(self, app, broker):
        broker.answer = refused
        with pytest.raises(duly.PublishFailed) as error:
            app.publish(rides, {}, id="r-1")
        assert error.value.message_id == "r-1"

    def test_a_broker_that_could_do_nothing_certainly_stored_nothing(self, app, broker):
        broker.answer = raising(duly.BrokerUnavailable("locked"))
        with pytest.raises(duly.PublishFailed, match="locked") as error:
            app.publish(rides, {}, id="r-1")
        assert error.value.message_id == "r-1"
        assert isinstance(error.value.__cause__, duly.BrokerUnavailable)

    def test_anything_else_is_unknown_and_may_be_repeated_under_its_id(self, app, broker):
        broker.answer = raising(RuntimeError("connection reset"))
        with pytest.raises(duly.PublishUnknown, match="connection reset") as error:
            app.publish(orders, {"n": 1})
        broker.answer = stored
        again = app.publish(orders, {"n": 1}, id=error.value.message_id)
        assert again == Published(error.value.message_id)

    def test_also_from_asyncio(self, app, broker):
        async def main():
            broker.answer = raising(RuntimeError("connection reset"))
            with pytest.raises(duly.PublishUnknown):
                await app.apublish(rides, {})
            broker.answer = refused
            with pytest.raises(duly.PublishFailed):
                await app.apublish(rides, {})
            broker.answer = raising(duly.ConfigurationError("not here"))
            with pytest.raises(duly.ConfigurationError, match="not here"):
                await app.apublish(rides, {})

        asyncio.run(main())

    def test_no_broker(self):
        app = duly.App("shop")
        for topic in (rides, views):
            with pytest.raises(duly.ConfigurationError, match="has no broker"):
                app.publish(topic, {})
        with pytest.raises(duly.ConfigurationError, match="has no broker"):
            asyncio.run(app.apublish(rides, {}))


class TestMany:
    def test_in_order_and_in_portions(self, app, broker):
        outcomes = app.publish_many(rides, ({"n": n} for n in range(2500)), keys=["k"] * 2500)
        assert len(outcomes) == 2500
        assert [message.id for message in broker.messages] == [o.message_id for o in outcomes]
        assert [len(portion) for portion in broker.portions] == [1000, 1000, 500]
        assert {message.key for message in broker.messages} == {"k"}

    def test_portions_are_bounded_in_bytes(self, app, broker):
        big = duly.Topic("big", bytes, guarantee="at-least-once")
        app.publish_many(big, [b"x" * 1_000_000] * 10)
        assert max(len(portion) for portion in broker.portions) == 4
        assert len(broker.messages) == 10

    def test_all_are_checked_before_the_first_is_sent(self, app, broker):
        with pytest.raises(duly.InvalidMessage):
            app.publish_many(rides, [{}] * 2000 + [7])
        assert broker.messages == []

    def test_what_failed_is_told_beside_what_did_not(self, app, broker):
        def second_fails(messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
            if len(broker.portions) == 1:
                broker.portions.append([])
                raise OSError("gone")
            return stored(messages)

        broker.answer = second_fails
        with pytest.raises(duly.PublishIncomplete, match=r"1,000 of 2,500.*\(1,000 may") as error:
            app.publish_many(rides, [{}] * 2500)
        kinds = [type(outcome) for outcome in error.value.outcomes]
        assert kinds == [Published] * 1000 + [duly.PublishUnknown] * 1000 + [Published] * 500

    def test_nothing(self, app, broker):
        assert app.publish_many(rides, []) == []
        assert asyncio.run(app.apublish_many(rides, iter(()))) == []

    def test_from_asyncio(self, app, broker):
        outcomes = asyncio.run(app.apublish_many(rides, [{"n": n} for n in range(1200)]))
        assert [message.id for message in broker.messages] == [o.message_id for o in outcomes]

    def test_a_second_run_repeats_nothing(self, memory):
        ids = [f"line-{n}" for n in range(10)]
        first = memory.publish_many(orders, [{"n": n} for n in range(10)], ids=ids)
        second = memory.publish_many(orders, [{"n": n} for n in range(10)], ids=ids)
        assert {type(outcome) for outcome in first} == {Published}
        assert {type(outcome) for outcome in second} == {duly.RepeatDropped}


class TestWhereItMayBeCalled:
    def test_not_on_an_event_loops_thread(self, app, broker):
        async def main():
            with pytest.raises(duly.ConfigurationError, match=r"await app\.apublish"):
                app.publish(rides, {})
            with pytest.raises(duly.ConfigurationError, match="apublish_many"):
                app.publish_many(rides, [{}])
            with pytest.raises(duly.ConfigurationError, match="atransaction"):
                app.transaction()
            await asyncio.to_thread(app.publish, rides, {"n": 1})

        asyncio.run(main())
        assert broker.bodies == [b'{"n":1}']

    def test_at_most_once_never_waits_so_it_may(self, app, broker):
        async def main():
            assert isinstance(app.publish(views, {}), duly.Buffered)
            assert isinstance(await app.apublish(views, {}), duly.Buffered)
            assert len(app.publish_many(views, [{}, {}])) == 2

        asyncio.run(main())
        app.close()
        assert len(broker.messages) == 4

    def test_not_inside_a_transaction_on_the_same_database(self, app, broker):
        app.publish(rides, {"n": 1})

        async def inside():
            with pytest.raises(duly.ConfigurationError, match=r"tx\.publish"):
                await app.apublish(rides, {})
            with pytest.raises(duly.ConfigurationError, match=r"tx\.publish"):
                await app.apublish_many(rides, [{}])

        IN_TRANSACTION.set("fake:1")
        try:
            for call in (app.publish, app.publish_many):
                with pytest.raises(duly.ConfigurationError, match=r"tx\.publish"):
                    call(rides, {} if call == app.publish else [{}])
            asyncio.run(inside())
            IN_TRANSACTION.set("another database")
            app.publish(rides, {"n": 2})
        finally:
            IN_TRANSACTION.set(None)
        assert broker.bodies == [b'{"n":1}', b'{"n":2}']


class TestWithin:
    def test_what_does_not_join_says_what_does(self, memory, app):
        for each in (memory, app):
            with pytest.raises(duly.ConfigurationError, match=r"app\.transaction"):
                each.publish(rides, {}, within=object())
            with pytest.raises(duly.ConfigurationError, match=r"app\.transaction"):
                each.publish_many(rides, [{}], within=object())

    def test_at_most_once_cannot_be_part_of_a_transaction(self, memory):
        with pytest.raises(duly.ConfigurationError, match="at-most-once"):
            memory.publish(views, {}, within=object())


class TestWatchers:
    def test_see_what_was_published(self, memory):
        seen: list[events.Event] = []
        memory.watchers.append(seen.append)
        memory.publish(orders, {}, id="o-1")
        memory.publish(orders, {}, id="o-1")
        memory.publish_many(rides, [{}, {}])
        asyncio.run(memory.apublish(rides, {}))
        told = [(e.topic, e.count, e.repeats) for e in seen if isinstance(e, events.Published)]
        assert told == [("orders", 1, 0), ("orders", 0, 1), ("rides", 2, 0), ("rides", 1, 0)]
