"""What threads publish at the same time: stored at once, and each told its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import psycopg
import pytest

from duly.broker import Published
from duly.brokers.postgres import PostgresBroker
from duly.brokers.postgres.gathering import Gathering
from duly.errors import BrokerUnusable, CommitUnknown
from tests.postgres.brokers import drain, lane, message, opened, publish_in, topic
from tests.postgres.crowd import ONCE, kinds
from tests.servers.postgres import Schema
from tests.waiting import eventually

T, OTHER = topic(), topic("other")


def in_threads(*calls: Callable[[], Any]) -> list[threading.Thread]:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    return threads


class Storing:
    """A store that stands still when it is told to, and fails on what is called bad."""

    def __init__(self) -> None:
        self.stored: list[list[str]] = []
        self.goes_on = threading.Event()
        self.error: Exception = BrokerUnusable("bad")

    def __call__(self, messages: Sequence[Any]) -> Sequence[Published]:
        bodies = [each.body.decode() for each in messages]
        self.stored.append(bodies)
        self.goes_on.wait(30)
        if "bad" in bodies:
            raise self.error
        return [Published(each.id) for each in messages]


def gathered(storing: Storing, *bodies: str, most: int = 100, of: Any = T) -> dict[str, Any]:
    """One message is being stored while the others come."""
    ended: dict[str, Any] = {}
    gathering = Gathering(storing, most)

    def call(body: str) -> None:
        try:
            ended[body] = kinds(gathering.publish([message(of, body)]))
        except Exception as error:
            ended[body] = error

    threads = in_threads(lambda: call("first"))
    eventually(lambda: bool(storing.stored), "the first is being stored")
    for number, body in enumerate(bodies, 1):
        threads += in_threads(partial(call, body))
        eventually(partial(_wait, gathering, number), "it waits")
    storing.goes_on.set()
    for thread in threads:
        thread.join(30)
    return ended


def _wait(gathering: Gathering, count: int) -> bool:
    return len(gathering._waiting) == count


def test_who_comes_while_another_publishes_shares_with_whoever_else_came():
    storing = Storing()
    ended = gathered(storing, "a", "b", "c")
    assert storing.stored == [["first"], ["a", "b", "c"]]
    assert set(ended) == {"first", "a", "b", "c"}
    assert all(outcomes == ["Published"] for outcomes in ended.values())


def test_no_more_than_fits_is_stored_at_once():
    storing = Storing()
    gathered(storing, "a", "b", "c", most=2)
    assert storing.stored == [["first"], ["a", "b"], ["c"]]


def test_one_callers_failure_is_its_own():
    storing = Storing()
    ended = gathered(storing, "a", "bad", "c")
    assert storing.stored == [["first"], ["a", "bad", "c"], ["a"], ["bad"], ["c"]]
    assert ended["a"] == ended["c"] == ["Published"]
    assert isinstance(ended["bad"], BrokerUnusable)


def test_what_nobody_knows_of_is_not_tried_again():
    storing = Storing()
    storing.error = CommitUnknown("lost")
    ended = gathered(storing, "a", "bad")
    assert storing.stored == [["first"], ["a", "bad"]]
    assert isinstance(ended["a"], CommitUnknown)
    assert isinstance(ended["bad"], CommitUnknown)


def test_who_is_interrupted_leaves_the_others_with_the_unknown():
    storing = Storing()
    storing.error = KeyboardInterrupt()  # type: ignore[assignment]
    gathering = Gathering(storing, 100)
    storing.goes_on.set()
    with pytest.raises(KeyboardInterrupt):
        gathering.publish([message(T, "bad")])
    assert kinds(gathering.publish([message(T, "a")])) == ["Published"]


def test_fifty_threads_share_commits_and_lose_nothing(pg_schema: Schema):
    with opened(pg_schema, T, OTHER) as broker:
        ready = threading.Barrier(50)
        outcomes: list[str] = []

        def call(number: int) -> None:
            of = OTHER if number % 10 == 0 else T
            ready.wait()
            for each in range(20):
                outcomes.extend(kinds(broker.publish([message(of, f"{number}-{each}")])))

        for thread in in_threads(*(partial(call, n) for n in range(50))):
            thread.join(60)
        assert outcomes == ["Published"] * 1000
        with pg_schema.connect() as direct:
            places = f"select count(distinct place >> 16) from {pg_schema.duly}.messages"
            [(commits,)] = direct.execute(places.encode()).fetchall()
        assert commits < 500
        handled = drain(lane(broker, T)) + drain(lane(broker, OTHER, name="other"))
        assert sorted(handled) == sorted(f"{n}-{each}" for n in range(50) for each in range(20))
        # Those of one thread in the order in which it published them.
        mine = [body for body in handled if body.startswith("7-")]
        assert mine == [f"7-{each}" for each in range(20)]


def test_who_waits_for_an_identity_keeps_nobody_else_waiting(pg_schema: Schema):
    """It may be taken by a transaction of the very thread that publishes next."""
    with opened(pg_schema, ONCE, T) as broker, pg_schema.connect(autocommit=False) as open_one:
        publish_in(open_one, pg_schema, ONCE, "a", id="one")
        outcomes: list[str] = []
        waiting = in_threads(
            lambda: outcomes.extend(kinds(broker.publish([message(ONCE, "a", id="one")])))
        )
        eventually(lambda: _waits(pg_schema), "it waits for the identity")
        assert kinds(broker.publish([message(T, "b")])) == ["Published"]
        assert kinds(broker.publish([message(ONCE, "c", id="two")])) == ["Published"]
        open_one.commit()
        waiting[0].join(30)
        assert outcomes == ["RepeatDropped"]


def _waits(schema: Schema) -> bool:
    with schema.connect() as direct:
        ungranted = "select exists (select 1 from pg_locks where not granted)"
        return bool(direct.execute(ungranted).fetchall()[0][0])


def test_a_role_that_does_not_wait_for_the_disk_does_for_what_is_published(pg_schema: Schema):
    """Nor does a default isolation matter, nor a deadline that is too short."""

    def connect() -> psycopg.Connection[Any]:
        options = "-c synchronous_commit=off -c default_transaction_isolation=serializable"
        return psycopg.connect(pg_schema.url, options=options)

    broker = PostgresBroker(connect, schema=pg_schema.duly)
    try:
        broker.declare([T])
        assert kinds(broker.publish([message(T, "a")])) == ["Published"]
        autocommit = broker.database._autocommit
        assert autocommit is not None
        session = autocommit._source.take()
        settings = (
            "select current_setting('synchronous_commit'), current_setting('transaction_isolation')"
        )
        assert session.execute(settings).fetchall() == [("on", "read committed")]
        autocommit._source.give_back(session, in_doubt=False)
        assert drain(lane(broker, T)) == ["a"]
    finally:
        broker.close()
