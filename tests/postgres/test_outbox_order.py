"""In which order a relay sends what overlapping transactions put into the outbox, by key."""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest

from duly import App, Topic
from duly.broker import SubscribeOptions
from duly.brokers.memory import MemoryQueue
from duly.guarantees import Guarantee
from duly.relay import Relay
from duly.stores.postgres import PostgresStore
from tests.servers.postgres import Schema
from tests.waiting import eventually

news: Topic[str] = Topic("news", str, guarantee="at-least-once")


class Outlet:
    """A queue that drops no repeats, and the relays that fill it, stepped by hand."""

    def __init__(self, store: PostgresStore, relays: int) -> None:
        self._queue = MemoryQueue()
        self._queue.declare([news])
        options = SubscribeOptions(Guarantee.AT_LEAST_ONCE, lease_s=60.0)
        self._lane = self._queue.subscribe([news], "reader", options)
        self.relays = [Relay(store.outbox, self._queue, wait_s=0.0) for _ in range(relays)]
        self.sent: list[str] = []

    def step(self, number: int = 0) -> None:
        """One relay sends a batch, if the turn is its own."""
        self.relays[number].step()
        claimed = self._lane.claim(1_000, 1 << 20, 0.0)
        self.sent += [delivery.message.body.decode() for delivery in claimed]

    def hand_over(self, number: int) -> None:
        """A relay lets others take its place."""
        self.relays[number].close()


@pytest.fixture
def store(pg_schema: Schema) -> Iterator[PostgresStore]:
    with pg_schema.connect() as connection:
        connection.execute("create table rows (number int, value text)")
        connection.execute("insert into rows values (1, '')")
    opened = PostgresStore(pg_schema.url, schema=pg_schema.duly)
    opened.declare([news])
    yield opened
    opened.close()


@pytest.fixture
def app(store: PostgresStore) -> Iterator[App]:
    with App("shop", broker=MemoryQueue(), store=store) as app:
        yield app


def put(app: App, connection: Any, text: str, key: str = "k") -> None:
    app.publish(news, text, key=key, within=connection)


@dataclass
class Writer:
    """A transaction, with what it has put in."""

    connection: psycopg.Connection[Any]
    put: list[tuple[str, str]] = field(default_factory=list)


@pytest.mark.parametrize("seed", range(6))
def test_any_interleaving_sends_everything_once_and_keeps_keys_in_order(
    app: App, store: PostgresStore, pg_schema: Schema, seed: int
):
    """Transactions put, commit and roll back in any order, between steps of two relays.

    Of each key, what was committed before another was put in is sent before it, however late
    something else commits in between.
    """
    chance = random.Random(seed)
    outlet = Outlet(store, relays=2)
    committed: list[str] = []
    before: dict[str, set[str]] = {}
    done_of_key: dict[str, set[str]] = defaultdict(set)
    with ExitStack() as stack:
        writers = [Writer(stack.enter_context(pg_schema.connect())) for _ in range(5)]
        for number in range(250):
            writer = chance.choice(writers)
            match chance.choice(["put"] * 5 + ["commit"] * 2 + ["back"] + ["step"] * 2 + ["over"]):
                case "put":
                    key, body = chance.choice("abc"), f"{number}"
                    before[body] = set(done_of_key[key])
                    put(app, writer.connection, body, key)
                    writer.put.append((key, body))
                case "commit":
                    writer.connection.commit()
                    for key, body in writer.put:
                        done_of_key[key].add(body)
                        committed.append(body)
                    writer.put = []
                case "back":
                    writer.connection.rollback()
                    writer.put = []
                case "step":
                    outlet.step(chance.randrange(2))
                case _:
                    outlet.hand_over(chance.randrange(2))
        for writer in writers:
            writer.connection.rollback()
        for relay in (0, 1):
            outlet.hand_over(1 - relay)
            outlet.step(relay)
    assert sorted(outlet.sent, key=int) == sorted(committed, key=int), f"seed {seed}"
    place = {body: at for at, body in enumerate(outlet.sent)}
    inverted = [(a, b) for b in outlet.sent for a in before[b] if place[a] > place[b]]
    assert not inverted, f"seed {seed}: sent before what was committed before it: {inverted}"


@pytest.mark.parametrize("seen", ["apart", "together"])
def test_of_two_that_overlap_the_first_seen_is_sent_first(
    app: App, store: PostgresStore, pg_schema: Schema, seen: str
):
    """Committed in the other order than put: a relay that looks in between sends them as they
    committed, one that finds both sends them as they were put.
    """
    outlet = Outlet(store, relays=1)
    with pg_schema.connect() as first, pg_schema.connect() as second:
        put(app, first, "first")
        put(app, second, "second")
        second.commit()
        if seen == "apart":
            outlet.step()
        first.commit()
        outlet.step()
    assert outlet.sent == (["second", "first"] if seen == "apart" else ["first", "second"])


@pytest.mark.parametrize("how", ["tx.publish", "within="])
def test_who_waited_for_the_others_row_is_sent_after_it(
    app: App, store: PostgresStore, pg_schema: Schema, how: str
):
    """Published after what was written, or by `tx.publish` wherever: then the rows say the order.

    The relay looks once, when both are committed.
    """
    outlet = Outlet(store, relays=1)
    update = "update rows set value = %s where number = 1"

    def follow() -> None:
        if how == "tx.publish":
            with app.transaction() as tx:
                tx.publish(news, "follower", key="k")  # put in at the end of the transaction
                tx.connection.execute(update, ("follower",))
        else:
            with pg_schema.connect() as own:
                own.execute(update, ("follower",))
                put(app, own, "follower")

    with pg_schema.connect() as own, pg_schema.connect(autocommit=True) as watching:
        own.execute(update, ("leader",))
        following = threading.Thread(target=follow)
        following.start()
        waits = "select count(*) from pg_locks where not granted and locktype = 'transactionid'"
        eventually(lambda: watching.execute(waits).fetchone() != (0,), "the follower waits")
        put(app, own, "leader")
        own.commit()
        following.join(20)
        assert watching.execute("select value from rows").fetchone() == ("follower",)
    outlet.step()
    assert outlet.sent == ["leader", "follower"]
