"""`running`: real lanes on a broker of the test's own, and an app that is as before afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import duly
from duly import Topic
from duly.brokers.sqlite import SQLiteBroker
from duly.errors import ConfigurationError, ContractRefused
from duly.guarantees import Admission
from duly.testing import Faults, Running, running
from tests.harness import shop
from tests.harness.shop import charged

Make = Callable[..., Running]


def test_what_one_message_leads_to_is_run_to_its_end(shopping: Running):
    t = shopping
    t.publish(shop.orders, {"cents": 42})
    assert charged(t) == [], "nothing runs in between"
    t.drain()
    assert charged(t) == t.payloads(shop.receipts) == shop.mailed == shop.seen == [42]
    assert t.counts("billing").handled == 1
    assert t.waiting("billing").is_drained


def test_the_broker_that_the_app_names_is_not_touched(shopping: Running):
    shop.app.publish(shop.orders, {"cents": 7})
    shopping.drain()
    assert charged(shopping) == [7]
    assert not Path(shop.NEVER).exists()
    assert not list(Path().glob("*-duly"))


def test_afterwards_the_app_is_as_it_was(tmp_path: Path):
    app = duly.App("theirs", f"sqlite:///{tmp_path / 'theirs.db'}")
    topic: Topic[int] = Topic("t", int, guarantee="at-least-once")
    handled: list[int] = []

    @app.consumer(topic, name="c", guarantee="at-least-once")
    def handle(n: int, *, made: object = duly.use(dict)) -> None:
        handled.append(n)

    before = app.backends()
    app.overrides[dict] = list
    with pytest.raises(KeyError), running(app, overrides={dict: set}) as t:  # noqa: PT012
        app.publish(topic, 1)
        t.drain()
        raise KeyError
    assert app.backends() == before
    assert app.overrides == {dict: list}
    app.publish(topic, 2)
    with running(app) as t:
        t.drain()
    assert handled == [1], "what is in the app's own broker is not handled by a test"
    app.close()


def test_what_the_app_had_open_stays_open(tmp_path: Path):
    with closing(SQLiteBroker(tmp_path / "own.db")) as broker:
        app = duly.App("theirs", broker)
        topic: Topic[int] = Topic("t", int, guarantee="at-least-once")
        app.publish(topic, 1)
        with running(app, folder=tmp_path) as t:
            assert t.broker.capabilities.name == "SQLite"
            assert t.broker is not broker
            assert t.payloads(topic) == []
        app.publish(topic, 2)


@pytest.mark.parametrize(
    ("broker", "store", "admission"),
    [
        ("sqlite:///a.db", None, Admission.BY_CLAIM),
        ("sqlite:///a.db", "sqlite:///a.db?foreign_keys=on", Admission.BY_CLAIM),
        ("sqlite:///a.db", "sqlite:///b.db", Admission.BY_INBOX),
        ("memory://", None, Admission.BY_CLAIM),
        ("memory://?kind=queue", None, Admission.BY_INBOX),
        (None, None, Admission.BY_CLAIM),
    ],
)
def test_the_arrangement_is_the_apps_own(tmp_path: Path, broker: str, store: str, admission: Any):
    topic: Topic[int] = Topic("t", int, guarantee="exactly-once")
    outputs: Topic[int] = Topic("outputs", int, guarantee="at-least-once")
    app = duly.App("theirs", broker, store)

    @app.consumer(topic, name="c", guarantee="exactly-once")
    def handle(n: int, tx: duly.Transaction[Any]) -> None:
        tx.publish(outputs, n)

    with running(app, folder=tmp_path) as t:
        t.publish_many(topic, [1, 2])
        t.drain()
        assert t.contract is not None
        assert t.contract.admission("c") == admission
        assert t.payloads(outputs) == [1, 2], "also through an outbox"
    assert not Path("a.db").exists()


def test_some_consumers_only():
    with running(shop.app, consumers=["dashboard"]) as t:
        t.publish(shop.receipts, 1)
        t.publish(shop.views, 2)
        t.drain()
        assert (shop.mailed, shop.seen) == ([], [2])
        with pytest.raises(ConfigurationError, match="mail"):
            t.waiting("mail")


def test_dependencies_are_overridden_and_torn_down(tmp_path: Path):
    told: list[str] = []

    def dearer() -> Iterator[dict[str, int]]:
        told.append("made")
        yield {"a": 100}
        told.append("torn down")

    with running(shop.app, overrides={shop.prices: dearer}, folder=tmp_path) as t:
        with t.connection() as db:
            db.execute(shop.TABLE)
        t.publish(shop.orders, {"cents": 1})
        t.drain()
        assert charged(t) == [100]
    assert told == ["made", "torn down"]


def test_the_lifespan_is_around_it():
    told: list[str] = []

    @asynccontextmanager
    async def lifespan(app: duly.App) -> AsyncIterator[None]:
        told.append("begin")
        yield
        told.append("end")

    app = duly.App("theirs", "memory://", lifespan=lifespan)
    topic: Topic[int] = Topic("t", int, guarantee="at-least-once")
    app.consumer(topic, name="c", guarantee="at-least-once")(lambda n: told.append(str(n)))
    with running(app) as t:
        t.publish(topic, 1)
        t.drain()
    assert told == ["begin", "1", "end"]


def test_two_apps_on_one_broker():
    events: Topic[int] = Topic("events", int, guarantee="at-least-once")
    one, other = duly.App("one", "memory://"), duly.App("other", "memory://")
    handled: list[int] = []
    other.consumer(events, name="c", guarantee="at-least-once")(handled.append)
    with running(one) as t, running(other, broker=t.broker, clock=t.clock) as u:
        one.publish(events, 1)
        one.publish(events, 2, delay_s=60)
        u.drain()
        assert handled == [1]
        t.advance(60)
        u.drain()
        assert handled == [1, 2]


def test_an_app_without_consumers():
    app = duly.App("theirs", "memory://")
    with running(app) as t:
        app.publish(shop.receipts, 3)
        app.publish(shop.views, 4)
        t.drain()
        assert (t.payloads(shop.receipts), t.payloads(shop.views)) == ([3], [4])


def test_what_the_contract_refuses_is_refused():
    with pytest.raises(ContractRefused), running(shop.app, broker="memory://?kind=queue"):
        pass
    with running(shop.app):
        pass


def test_bodies_are_encoded_and_decoded_as_ever(shopping: Running):
    wrong: Any = {"cents": "many"}
    with pytest.raises(duly.InvalidMessage):
        shopping.publish(shop.orders, wrong)


def test_a_rate_limit_is_waited_out_on_the_clock():
    app = duly.App("theirs", "memory://")
    topic: Topic[int] = Topic("t", int, guarantee="at-least-once")
    handled: list[int] = []
    app.consumer(topic, name="c", guarantee="at-least-once", rate_per_s=1)(handled.append)
    with running(app) as t:
        began = t.clock.now
        t.publish_many(topic, range(10))
        t.drain()
        assert handled == list(range(10))
        assert t.clock.now - began >= timedelta(seconds=8)


@pytest.mark.parametrize("hold", [False, True])
def test_order_by_key_behind_a_failure(hold: bool):
    app = duly.App("theirs", "memory://")
    topic: Topic[int] = Topic(
        "t", int, guarantee="exactly-once", partitions=2, key=lambda n: f"k{n % 2}"
    )

    @app.consumer(
        topic, name="c", guarantee="exactly-once", order_by_key=True, hold_key_on_dead=hold
    )
    def handle(n: int, tx: duly.Transaction[Any]) -> None:
        if n == 2:
            raise ValueError("the even ones wait")
        tx.connection.insert("handled", n, n)

    def handled(t: Running) -> list[int]:
        with t.connection() as tables:
            return list(tables.rows("handled"))

    with running(app) as t:
        t.publish_many(topic, range(1, 7))
        t.drain(failures="expected")
        assert handled(t) == [1, 3, 5]
        t.drain(advance=True, failures="expected")
        assert handled(t) == ([1, 3, 5] if hold else [1, 3, 5, 4, 6])
        assert [letter.message.payload for letter in t.dead("c")] == [2]
        assert t.waiting("c").parked == (2 if hold else 0)


@pytest.mark.parametrize("guarantee", ["at-least-once", "exactly-once"])
def test_batch_handlers(guarantee: Any):
    app = duly.App("theirs", "memory://")
    topic: Topic[int] = Topic("t", int, guarantee="exactly-once")
    batches: list[list[int]] = []

    def plain(batch: list[int]) -> None:
        batches.append(batch)
        if 3 in batch:
            raise ValueError("not with the three")

    def within(batch: list[int], tx: duly.Transaction[Any]) -> None:
        plain(batch)

    declare: Any = app.batch_consumer(topic, name="c", guarantee=guarantee, batch=10)
    declare(within if guarantee == "exactly-once" else plain)
    with running(app) as t:
        t.publish_many(topic, range(5))
        with pytest.raises(ValueError, match="three"):
            t.drain()
        t.drain(advance=True, failures="expected")
        assert batches[0] == [0, 1, 2, 3, 4]
        assert batches[1:6] == [[0], [1], [2], [3], [4]], "alone, so that the culprit is found"
        assert [letter.message.payload for letter in t.dead("c")] == [3]


def test_it_is_entered_once():
    with pytest.raises(ConfigurationError, match="entered before"), running(shop.app) as t, t:
        pass
    assert shop.app._backends.named == (f"sqlite:///{shop.NEVER}", None)


# --- async def tests


async def _async_shop(folder: Path) -> None:
    async with running(shop.app, folder=folder) as t:
        with t.connection() as db:
            db.execute(shop.TABLE)
        await shop.app.apublish(shop.orders, {"cents": 1})
        with pytest.raises(ConfigurationError, match=r"await t\.adrain"):
            t.drain()
        await t.adrain()
        assert charged(t) == shop.mailed == shop.seen == [1]
        t.publish(shop.orders, {"cents": -1})
        with pytest.raises(ValueError, match="nobody is charged"):
            await t.adrain()


def test_async_tests(tmp_path: Path):
    asyncio.run(_async_shop(tmp_path))


def test_async_handlers_run_on_the_tests_own_loop():
    app = duly.App("theirs", "memory://")
    topic: Topic[int] = Topic("t", int, guarantee="at-least-once")
    loops: list[Any] = []

    @app.consumer(topic, name="c", guarantee="at-least-once")
    async def handle(n: int) -> None:
        loops.append(asyncio.get_running_loop())

    async def test() -> None:
        async with running(app) as t:
            t.publish(topic, 1)
            await t.adrain()
            assert loops == [asyncio.get_running_loop()]

    asyncio.run(test())


@pytest.mark.parametrize("faults", [None, "dies"])
def test_on_a_log_a_retry_by_cursor_waits_in_the_store(tmp_path: Path, faults: str | None):
    """Also in a store that goes by the machine's clock where nothing else tells it."""
    app = duly.App("shop", broker="memory://?kind=log", store=f"sqlite:///{tmp_path}/effects.db")
    orders = duly.Topic("orders", str, guarantee="at-least-once")
    failed: list[str] = []

    @app.consumer(orders, name="billing", guarantee="exactly-once")
    def charge(order: str, tx: duly.Transaction[Any]) -> None:
        tx.connection.execute("create table if not exists charges (at integer primary key, id)")
        tx.connection.execute("insert into charges (id) values (?)", (order,))
        if order == "bad" and len(failed) < 2:
            failed.append(order)
            raise duly.Retry(in_s=60.0)

    more: Any = {} if faults is None else {"faults": Faults(at={("commit", 2): "die before"})}
    with running(app, **more) as t:
        app.publish_many(orders, ["a", "bad", "c"])
        t.drain(failures="expected")
        assert t.waiting("billing").parked == 1
        t.drain(advance=True, failures="expected")
        with t.connection() as connection:
            rows = connection.execute("select id from charges order by at").fetchall()
        assert [id for (id,) in rows] == ["a", "c", "bad"]
        assert t.waiting("billing").is_drained
