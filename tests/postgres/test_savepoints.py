"""Savepoints that handlers set for themselves: none reaches into the effects of another message."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from duly.brokers.sqlite import SQLiteBroker
from duly.errors import TransactionLost
from duly.stores.postgres import PostgresStore
from tests.postgres.shop import Colour, Shop
from tests.servers.postgres import Schema
from tests.waiting import eventually


@pytest.fixture(params=["def", "async def"])
def shop(request: pytest.FixtureRequest, db_path: Path, pg_schema: Schema) -> Iterator[Shop]:
    colour: Colour = request.param
    store = PostgresStore(pg_schema.url, schema=pg_schema.duly)
    broker = SQLiteBroker(db_path)
    shop = Shop(broker, store, pg_schema.url, colour)
    yield shop
    shop.app.close()
    store.close()
    broker.close()


def work(shop: Shop, *names: str) -> int:
    """Work until all of these have ended; the number of transactions."""
    shop.publish(*names)
    with shop.working() as worker:
        eventually(
            lambda: worker.counts()["billing"].handled == len(names),
            "all have ended",
            lambda: f"called for {shop.calls}",
        )
        return worker.counts()["billing"].commits


def says(text: Callable[[str], str]) -> Callable[[Any, str], Any]:
    return lambda connection, name: connection.execute(text(name).encode())


@pytest.mark.parametrize("set_", ["savepoint mine", 'SAVEPOINT "mine"', "select 1; savepoint mine"])
def test_who_goes_back_to_anothers_savepoint_undoes_nothing_of_its(shop: Shop, set_: str):
    shop.before = says(lambda name: "rollback to mine" if name == "back" else set_)
    shop.consumer()
    work(shop, "a", "b", "back", "c")
    assert shop.charged() == ["a", "b", "c"]
    [letter] = shop.app.dead_letters("billing")
    assert letter.message.id == "back"
    assert "mine" in letter.error
    assert shop.calls.count("back") == 1, "the culprit is known: nothing was run twice for it"


def test_in_a_pipeline_too(shop: Shop):
    shop.before = says(lambda name: "rollback to mine" if name == "back" else "savepoint mine")
    shop.consumer(pipeline=True)
    work(shop, "a", "b", "back", "c")
    assert shop.charged() == ["a", "b", "c"]
    assert shop.dead() == ["back"]


def test_blocks_of_the_driver_cost_nothing(shop: Shop):
    """Each call ends its own, so that all share one transaction, without savepoints of duly's."""
    names = [f"o-{number}" for number in range(120)]

    def before(connection: Any, _: str) -> Any:
        if not isinstance(connection, psycopg.Connection):
            return in_block(connection)
        with connection.transaction(), connection.transaction():
            connection.execute("select 1")
        return None

    async def in_block(connection: Any) -> None:
        async with connection.transaction(), connection.transaction():
            await connection.execute("select 1")

    shop.before = before
    shop.consumer(tx_s=30.0, batch=120)
    assert work(shop, *names) == 1
    assert shop.charged() == names
    assert shop.calls == names


class Keeper:
    """Begins a block and keeps it; who comes next but one ends it with a failure."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def before(self, connection: Any, name: str) -> Any:
        if isinstance(connection, psycopg.Connection):
            if name == "keeps":
                block = connection.transaction()
                block.__enter__()
                self.kept.append(block)
            elif name == "ends" and self.kept:
                self.kept.pop().__exit__(ValueError, ValueError(), None)
            return None
        return self._abefore(connection, name)

    async def _abefore(self, connection: Any, name: str) -> None:
        if name == "keeps":
            block = connection.transaction()
            await block.__aenter__()
            self.kept.append(block)
        elif name == "ends" and self.kept:
            await self.kept.pop().__aexit__(ValueError, ValueError(), None)


def test_who_keeps_a_block_is_alone_to_fail(shop: Shop):
    shop.before = Keeper().before
    shop.consumer()
    work(shop, "a", "keeps", "b", "c", "ends", "d")
    assert set(shop.charged()) >= {"a", "b", "c", "d"}
    assert len(shop.charged()) == len(set(shop.charged()))
    assert shop.dead()[-1:] == ["keeps"]
    letters = {letter.message.id: letter for letter in shop.app.dead_letters("billing")}
    assert "connection.transaction() was not ended" in letters["keeps"].error


def test_a_transaction_of_the_applications_own_keeps_none_either(shop: Shop):
    kept: list[Any] = []

    def keep() -> None:
        with shop.app.transaction() as tx:
            tx.connection.execute("insert into charges values ('a')")
            kept.append(tx.connection.transaction())
            kept[0].__enter__()

    with pytest.raises(TransactionLost, match="was not ended"):
        keep()
    assert shop.charged() == []
    with shop.app.transaction() as tx:
        tx.connection.execute("insert into charges values ('b')")
    assert shop.charged() == ["b"]
