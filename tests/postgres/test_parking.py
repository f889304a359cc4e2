"""What is parked in PostgreSQL: in both colours, by several, and where COMMIT is not answered."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from duly import App, RetryPolicy, Topic
from duly.brokers.memory import MemoryLog
from duly.errors import CommitUnknown
from duly.guarantees import Admission, Done
from duly.message import now_ms
from duly.store import Scope, Transaction
from duly.stores.postgres import PostgresStore
from duly.worker import Worker
from tests.postgres.proxy import Cut, Proxy
from tests.postgres.shop import Colour
from tests.servers.postgres import PostgresServer, Schema
from tests.waiting import eventually

ORDERS: Topic[str] = Topic("orders", str, guarantee="at-least-once")
POLICY = RetryPolicy(attempts=50, first_s=0.05, factor=1.0, longest_s=0.05)
NAMES = [f"o-{number}" for number in range(20)]
SCOPE = Scope("billing", Admission.BY_CURSOR, parks=True)
A_LOT = 1 << 20
DAY_MS = 86_400_000


class Shop:
    """A log in memory, effects in PostgreSQL. What begins with "bad" fails until all is fixed."""

    def __init__(self, url: str, schema: str, look_at: Schema, colour: Colour) -> None:
        self.store = PostgresStore(url, schema=schema)
        self.log = MemoryLog()
        self.app = App("shop", broker=self.log, store=self.store)
        self.fixed = threading.Event()
        self.look_at = look_at
        with look_at.connect() as connection:
            connection.execute("create table if not exists charges (name text)")
        self.consumer(colour)

    def consumer(self, colour: Colour) -> None:
        options: Any = {"guarantee": "exactly-once", "retry": POLICY, "batch": 7, "lanes": 2}
        insert = "insert into charges (name) values (%s)"
        if colour == "def":

            @self.app.consumer(ORDERS, name="billing", **options)
            def charge(name: str, tx: Transaction[Any]) -> None:
                tx.connection.execute(insert, (name,))
                self.fail(name)
        else:

            @self.app.consumer(ORDERS, name="billing", **options)
            async def acharge(name: str, tx: Transaction[Any]) -> None:
                await tx.connection.execute(insert, (name,))
                self.fail(name)

    def fail(self, name: str) -> None:
        if name.startswith("bad") and not self.fixed.is_set():
            raise ValueError(name)

    def charged(self) -> list[str]:
        with self.look_at.connect() as connection:
            return [name for (name,) in connection.execute("select name from charges")]

    def parked(self) -> int:
        return sum(each.parked + each.in_flight for each in self.store.parked.waiting())

    def close(self) -> None:
        self.app.close()
        self.store.close()


@pytest.fixture(params=["def", "async def"])
def colour(request: pytest.FixtureRequest) -> Colour:
    each: Colour = request.param
    return each


@pytest.fixture
def shop(pg_schema: Schema, colour: Colour) -> Iterator[Shop]:
    with closing(Shop(pg_schema.url, pg_schema.duly, pg_schema, colour)) as shop:
        yield shop


def test_what_is_behind_goes_on_and_each_takes_effect_once(shop: Shop):
    bad = [f"bad-{number}" for number in range(30)]
    shop.app.publish_many(ORDERS, [*bad[:15], *NAMES[:10], *bad[15:], *NAMES[10:]])
    with Worker(shop.app):
        eventually(lambda: sorted(shop.charged()) == sorted(NAMES), "all others are charged")
        eventually(lambda: shop.parked() == 30, "the others wait")
        shop.fixed.set()
        eventually(lambda: len(shop.charged()) == 50 and not shop.parked(), "all are charged")
    assert Counter(shop.charged()) == dict.fromkeys([*bad, *NAMES], 1)
    assert shop.log.dead_letters() == []


def park(shop: Shop, *names: str) -> Any:
    """These wait, and are due; taken by nobody."""
    shop.app.publish_many(ORDERS, [*names])
    with Worker(shop.app):
        eventually(lambda: shop.parked() == len(names), "they are parked")
    eventually(lambda: all(not each.in_flight for each in shop.store.parked.waiting()), "free")
    return shop.store.parked


def taken(parked: Any, count: int) -> Any:
    found: list[Any] = []

    def take() -> bool:
        found.extend(parked.take("billing", ["orders"], count - len(found), A_LOT, 30.0))
        return len(found) == count

    eventually(take, f"{count} are taken")
    return found


def test_leases_go_by_the_servers_clock(shop: Shop):
    """Of a worker whose clock is a day ahead, nobody loses what it holds."""
    parked = park(shop, "bad-1")
    [held] = taken(parked, 1)
    url, schema = shop.look_at.url, shop.look_at.duly
    with closing(PostgresStore(url, schema=schema, wall_ms=lambda: now_ms() + DAY_MS)) as ahead:
        assert ahead.parked.take("billing", ["orders"], 9, A_LOT, 30.0) == []
    assert parked.next_s("billing", ["orders"]) > 20
    assert parked.take("billing", ["orders"], 9, A_LOT, 30.0) == []
    assert parked.extend([held.receipt], -1.0) == []
    assert parked.next_s("billing", ["orders"]) <= 0
    assert len(parked.take("billing", ["orders"], 9, A_LOT, 30.0)) == 1


def test_what_a_transaction_has_fenced_nobody_takes(shop: Shop):
    parked = park(shop, "bad-1", "bad-2")
    held = taken(parked, 2)
    session = shop.store.begin(SCOPE)
    session.admit(held[:1])
    parked.extend([each.receipt for each in held], 0.0)
    other = parked.take("billing", ["orders"], 9, A_LOT, 30.0)
    assert [each.receipt.number for each in other] == [held[1].receipt.number]
    session.settle([Done(held[0].receipt)], held[:1])
    session.commit()
    assert shop.parked() == 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_commit_whose_answer_was_lost(pg_server: PostgresServer, when: Cut):
    """Committed, the row is gone, and what it stood for has taken effect; or it is there still."""
    schema = Schema(pg_server.url, "public")
    with (
        Proxy(pg_server.port) as proxy,
        closing(Shop(proxy.url(pg_server.url), "duly", schema, "def")) as shop,
    ):
        [held] = taken(park(shop, "bad-1"), 1)
        session = shop.store.begin(SCOPE)
        session.admit([held])
        session.connection.execute("insert into charges (name) values ('bad-1')")
        session.settle([Done(held.receipt)], [held])
        proxy.cut_at(b"commit\0", when)
        with pytest.raises(CommitUnknown):
            session.commit()
        session.rollback()
        stands = when == "after"
        eventually(lambda: shop.charged() == ["bad-1"] * stands, "the server is done with it")
        assert shop.parked() == 1 - stands
        shop.fixed.set()
        with Worker(shop.app):
            shop.store.parked.extend([held.receipt], 0.0)
            eventually(lambda: not shop.parked(), "it is gone")
        assert shop.charged() == ["bad-1"]
