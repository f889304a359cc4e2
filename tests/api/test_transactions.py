"""`app.transaction`: rows and messages together or not at all, in both colours."""

from __future__ import annotations

import asyncio
import functools
import sqlite3
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

import duly
from duly.broker import SubscribeOptions
from duly.guarantees import Guarantee
from duly.message import Message
from duly.publishing import IN_TRANSACTION
from tests.api.fakes import FakeBroker

receipts = duly.Topic("receipts", dict, guarantee="at-least-once")
orders = duly.Topic("orders", dict, guarantee="exactly-once")
views = duly.Topic("views", dict, guarantee="at-most-once")


@pytest.fixture(params=["memory", "sqlite"])
def app(request, db_url):
    with duly.App("shop", "memory://" if request.param == "memory" else db_url) as app:
        yield app


def seen(app: duly.App, topic: duly.Topic[Any] = receipts) -> Sequence[Message[Any]]:
    """Every message of the topic, as a new subscription sees them."""
    broker, _ = app.backends()
    broker.declare([topic])
    lane = broker.subscribe([topic], "reader", SubscribeOptions(Guarantee.AT_LEAST_ONCE))
    try:
        return [delivery.message for delivery in lane.claim(1000, 1 << 24, 0.0)]
    finally:
        lane.close()


def test_messages_are_seen_when_it_commits(app):
    with app.transaction() as tx:
        first = tx.publish(receipts, {"n": 1}, key="ann", headers={"tenant": "blue"})
        assert app.publish(receipts, {"n": 2}, within=tx).message_id
        app.publish_many(receipts, [{"n": 3}, {"n": 4}], within=tx)
    messages = seen(app)
    assert [message.body for message in messages] == [b'{"n":%d}' % n for n in (1, 2, 3, 4)]
    assert (messages[0].id, messages[0].key, messages[0].source) == (first, "ann", "shop")
    assert messages[0].headers == {"tenant": "blue"}


def test_nothing_is_seen_when_the_block_raises(app):

    def failing() -> None:
        with app.transaction() as tx:
            tx.publish(receipts, {"n": 1})
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        failing()
    assert seen(app) == []
    with app.transaction() as tx:
        tx.publish(receipts, {"n": 2})
    assert [message.body for message in seen(app)] == [b'{"n":2}']


def test_in_both_colours(app):
    async def failing() -> None:
        async with app.atransaction() as tx:
            tx.publish(receipts, {"n": 2})
            raise ValueError("no")

    async def main():
        async with app.atransaction() as tx:
            tx.publish(receipts, {"n": 1})
        with pytest.raises(ValueError, match="no"):
            await failing()

    asyncio.run(main())
    assert [message.body for message in seen(app)] == [b'{"n":1}']


def test_who_waits_for_its_end_leaves_it_a_thread(app):
    async def begins(begun: asyncio.Event, n: int) -> None:
        await begun.wait()
        async with app.atransaction() as tx:
            tx.publish(receipts, {"n": n})

    async def publishes(begun: asyncio.Event, n: int) -> None:
        await begun.wait()
        await app.apublish_many(receipts, [{"n": n}])

    async def main() -> None:
        begun = asyncio.Event()
        waiting = [asyncio.create_task(begins(begun, n)) for n in range(1, 9)]
        waiting += [asyncio.create_task(publishes(begun, n)) for n in range(9, 17)]
        async with asyncio.timeout(20):
            async with app.atransaction() as tx:
                tx.publish(receipts, {"n": 0})
                begun.set()
                await asyncio.sleep(0.2)  # threads are busy with them
            await asyncio.gather(*waiting)

    asyncio.run(main())
    assert len(seen(app)) == 17


def test_cancelled_in_the_block_it_rolls_back(app):
    async def main():
        inside = asyncio.Event()

        async def work():
            async with app.atransaction() as tx:
                tx.publish(receipts, {"n": 1})
                inside.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with app.atransaction() as tx:
            tx.publish(receipts, {"n": 2})

    asyncio.run(main())
    assert [message.body for message in seen(app)] == [b'{"n":2}']


class Paused:
    """The store of an app, one of whose calls waits on its thread until the test goes on."""

    def __init__(self, store: Any, call: str) -> None:
        self._wrapped, self._call = store, call
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def begin(self, scope: Any) -> Any:
        self._pause("begin")
        session = self._wrapped.begin(scope)
        return session if self._call == "begin" else PausedSession(session, self._pause)

    def _pause(self, call: str) -> None:
        if call == self._call and not self.reached.is_set():
            self.reached.set()
            assert self.go_on.wait(10)


class PausedSession:
    def __init__(self, session: Any, pause: Callable[[str], None]) -> None:
        self._wrapped, self._pause = session, pause

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)

    def commit(self) -> None:
        self._pause("commit")
        self._wrapped.commit()


def paused(app: duly.App, call: str) -> tuple[duly.App, Paused]:
    broker, store = app.backends()
    slow = Paused(store, call)
    return duly.App("shop", broker, slow), slow


def test_cancelled_while_it_waits_for_its_turn_it_takes_none(app):
    later, store = paused(app, "begin")

    async def main():
        async def work():
            async with later.atransaction():
                pytest.fail("nobody waits for it")

        task = asyncio.create_task(work())
        await asyncio.to_thread(store.reached.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        store.go_on.set()
        await later.aclose()  # its threads have come to their end

    asyncio.run(main())
    with app.transaction() as tx:  # nobody holds the turn
        tx.publish(receipts, {"n": 2})
    assert [message.body for message in seen(app)] == [b'{"n":2}']


def test_cancelled_while_it_commits_it_waits_for_the_answer(app):
    later, store = paused(app, "commit")
    called: list[str] = []

    async def main():
        async def work():
            async with later.atransaction() as tx:
                tx.publish(receipts, {"n": 1})
                tx.after_commit(lambda: called.append("after"))

        task = asyncio.create_task(work())
        await asyncio.to_thread(store.reached.wait, 10)
        task.cancel()
        done, _ = await asyncio.wait((task,), timeout=0.05)
        assert not done, "the transaction is still being committed"
        store.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert [message.body for message in seen(app)] == [b'{"n":1}']
    assert called == ["after"], "it stands, so what follows it is due"


def test_a_conflict_of_identities_rolls_everything_back(app):
    app.publish(orders, {"n": 1}, id="o-1")

    def conflicting() -> None:
        with app.transaction() as tx:
            tx.publish(receipts, {"n": 1})
            tx.publish(orders, {"n": 2}, id="o-1")

    with pytest.raises(duly.IdentityConflict):
        conflicting()
    assert seen(app) == []


def test_a_repeat_inside_is_dropped(app):
    app.publish(orders, {"n": 1}, id="o-1")
    with app.transaction() as tx:
        tx.publish(orders, {"n": 1}, id="o-1")
    assert len(seen(app, orders)) == 1


def test_after_commit(app, caplog):
    called: list[str] = []

    def failing() -> None:
        raise OSError("mail server away")

    with app.transaction() as tx:
        tx.after_commit(lambda: called.append("first"))
        tx.after_commit(failing)
        tx.after_commit(lambda: called.append("last"))
        assert called == []
    assert called == ["first", "last"]
    assert "mail server away" in caplog.text

    def rolled_back() -> None:
        with app.transaction() as tx:
            tx.after_commit(lambda: called.append("never"))
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        rolled_back()
    assert called == ["first", "last"]


def test_after_commit_takes_only_what_it_can_call(app):
    async def mail() -> None: ...

    with app.transaction() as tx:
        for call in (mail, functools.partial(mail), "mail"):
            with pytest.raises(duly.ConfigurationError, match=r"tx\.after_commit"):
                tx.after_commit(call)


def test_after_its_end_nothing_is_taken_that_would_be_forgotten(app):
    with app.transaction() as tx:
        pass
    for call in (lambda: tx.publish(receipts, {}), lambda: tx.after_commit(print)):
        with pytest.raises(duly.TransactionFailed, match="ended"):
            call()
    with pytest.raises(duly.TransactionFailed, match="ended"):
        app.publish(receipts, {}, within=tx)


def test_at_most_once_and_wrong_delays_are_refused(app):
    with app.transaction() as tx:
        with pytest.raises(duly.ConfigurationError, match="at-most-once"):
            tx.publish(views, {})
        with pytest.raises(duly.InvalidMessage, match="delay_s"):
            tx.publish(receipts, {}, delay_s=float("nan"))
        with pytest.raises(duly.InvalidMessage):
            tx.publish(receipts, [1])
        with pytest.raises(duly.ConfigurationError, match="is no topic"):
            tx.publish("receipts", {})


def test_not_one_inside_another(app):
    with app.transaction():
        with pytest.raises(duly.ConfigurationError, match="the tx at hand"), app.transaction():
            pass
        with pytest.raises(duly.ConfigurationError, match=r"tx\.publish"):
            app.publish(receipts, {})
    app.publish(receipts, {})
    assert IN_TRANSACTION.get() is None


def test_other_tasks_are_not_inside(app):
    async def main():
        published = asyncio.Event()

        async def other():
            await app.apublish(receipts, {"n": 1})
            published.set()

        task = asyncio.create_task(other())
        await published.wait()
        async with app.atransaction():
            with pytest.raises(duly.ConfigurationError, match=r"tx\.publish"):
                await app.apublish(receipts, {})
        await task

    asyncio.run(main())


def test_without_a_store():
    app = duly.App("shop", FakeBroker())
    with pytest.raises(duly.ConfigurationError, match="has no store"), app.transaction():
        pass


class TestSQLite:
    @pytest.fixture
    def app(self, db_url):
        with duly.App("shop", db_url) as app:
            app.publish(orders, {"n": 0})
            yield app

    def test_rows_and_messages_together(self, app, db_path):
        with app.transaction() as tx:
            tx.connection.execute("create table charges (n)")
        with app.transaction() as tx:
            tx.connection.execute("insert into charges values (1)")
            tx.publish(receipts, {"n": 1})
        with pytest.raises(ValueError, match="no"):
            self.failing(app)
        with sqlite3.connect(db_path) as own:
            assert own.execute("select n from charges").fetchall() == [(1,)]
        own.close()
        assert [message.body for message in seen(app)] == [b'{"n":1}']

    def failing(self, app: duly.App) -> None:
        with app.transaction() as tx:
            tx.connection.execute("insert into charges values (2)")
            tx.publish(receipts, {"n": 2})
            raise ValueError("no")

    def test_within_the_callers_own_connection(self, app, db_path):
        own = sqlite3.connect(db_path)
        own.execute("create table bookings (n)")
        own.commit()
        for n, end in ((1, own.commit), (2, own.rollback)):
            own.execute("insert into bookings values (?)", (n,))
            app.publish(receipts, {"n": n}, within=own)
            app.publish_many(receipts, [{"n": 10 * n}], within=own)
            end()
        assert own.execute("select n from bookings").fetchall() == [(1,)]
        own.close()
        assert [message.body for message in seen(app)] == [b'{"n":1}', b'{"n":10}']

    def test_within_a_connection_to_another_file(self, app, tmp_path):
        other = sqlite3.connect(tmp_path / "other.db")
        with pytest.raises(duly.ConfigurationError, match="very database"):
            app.publish(receipts, {}, within=other)
        other.close()
