"""Subscriptions paused, rewound and removed beside workers that are in the middle of something."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest

import duly
from duly.brokers.postgres import PostgresBroker
from duly.errors import BrokerUnusable, ConfigurationError
from duly.guarantees import Dead, Done, Retry
from duly.inspection.steering import Steering
from duly.sql import locks, log, steering
from duly.sql.postgres import OwnLine
from duly.sql.steps import Ask, Steps
from tests.postgres.brokers import bodies, claim, drain, lane, opened, publish, publish_in, topic
from tests.servers.postgres import Schema
from tests.waiting import eventually

T = topic(retention_s=3600.0)


def take_back(broker: Steering, to: datetime | int | None = None) -> None:
    targets = broker.targets("sub", to)
    assert broker.rewind("sub", targets, None, quiet=False)


def rewind(broker: Steering, to: datetime | int | None = None) -> None:
    take_back(broker, to)
    while broker.tidy("sub", 3):
        pass
    broker.finish("sub")


@contextmanager
def within(schema: Schema) -> Iterator[tuple[psycopg.Connection[Any], OwnLine]]:
    """Somebody's transaction, open until the end of the block, or until it is committed."""
    with schema.connect() as connection:
        yield connection, OwnLine(connection, schema.duly)
        connection.rollback()


@contextmanager
def meanwhile(schema: Schema, call: Callable[[], object]) -> Iterator[None]:
    """A call on a thread that has to wait for a lock first; it is through at the end."""
    failures: list[BaseException] = []

    def told() -> None:
        try:
            call()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=told)
    before = waiting(schema)
    thread.start()
    eventually(lambda: waiting(schema) > before, "it waits for a lock", lambda: str(failures))
    yield
    thread.join(30)
    assert not thread.is_alive()
    assert failures == []


def waiting(schema: Schema) -> int:
    """How many sessions on the log of this schema wait for a lock."""
    with schema.connect(autocommit=True) as connection:
        [(count,)] = connection.execute(
            "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query ~ %s",
            (schema.duly,),
        ).fetchall()
    return int(count)


# --- pausing


def test_a_claim_that_is_being_made_is_made_and_none_after_it(pg_schema: Schema):
    """Whoever has paused it, and was told so, may count on it on every host."""
    with opened(pg_schema, T) as broker, opened(pg_schema, T) as other:
        publish(broker, T, *"ab")
        sub, second = lane(broker, T), lane(other, T)
        with within(pg_schema) as (connection, line):
            line.run(lock_subscription())  # what a claim holds until it is committed
            with meanwhile(pg_schema, lambda: broker.pause("sub")):
                assert [each.state for each in other.steered()] == []
                connection.commit()
        assert (list(claim(sub)), sub.paused) == ([], True)
        assert (list(claim(second)), second.paused) == ([], True)
        assert other.resume("sub")
        assert (drain(sub), sub.paused) == ([*"ab"], False)


def lock_subscription() -> Steps[None]:
    for _, number, _ in (yield Ask("find_subscription", ("sub",))):
        yield Ask("lock_subscription", (number,))


def test_who_waits_is_woken_by_the_end_of_a_pause(pg_schema: Schema):
    with opened(pg_schema, T) as broker, opened(pg_schema, T) as other:
        publish(broker, T, "a")
        sub = lane(other, T)
        broker.pause("sub")
        assert list(claim(sub)) == []
        found: list[str] = []
        thread = threading.Thread(target=lambda: found.extend(bodies(claim(sub, wait_s=30.0))))
        thread.start()
        broker.resume("sub")
        thread.join(30)
        assert found == ["a"]


# --- rewinding


def test_what_is_still_open_comes_once(pg_schema: Schema):
    """It has no position yet: a rewind is about what has one."""
    with opened(pg_schema, T) as broker, pg_schema.connect() as late:
        sub = lane(broker, T)
        publish(broker, T, *"ab")
        publish_in(late, pg_schema, T, "late")
        publish(broker, T, *"cd")
        assert drain(sub) == [*"abcd"]
        take_back(broker, int(broker.targets("sub", None)[0].position) + 2)
        late.commit()
        while broker.tidy("sub", 3):
            pass
        broker.finish("sub")
        assert drain(sub) == ["c", "d", "late"]
        assert drain(sub) == []


def test_to_a_time_by_when_messages_were_made(pg_schema: Schema):
    with opened(pg_schema, T) as broker:
        sub = lane(broker, T)
        for n, body in enumerate("abc"):
            [outcome] = broker.publish([made_at(body, 1_000 * (n + 1))])
            assert isinstance(outcome, duly.Published)
        assert drain(sub) == [*"abc"]
        rewind(broker, datetime.fromtimestamp(2, UTC))
        assert drain(sub) == [*"bc"]
        rewind(broker, datetime.fromtimestamp(4, UTC))
        assert drain(sub) == []


def made_at(body: str, time_ms: int) -> Any:
    return duly.Message(T.name, "tests", f"{body}-{time_ms}", body.encode(), time_ms)


def test_the_rest_of_a_claim_that_is_just_being_split_is_lost_too(pg_schema: Schema):
    """Whoever settles the middle of a claim makes a row of what is behind it, which a statement
    that waited for him does not see.
    """
    with opened(pg_schema, T) as broker:
        sub = lane(broker, T)
        publish(broker, T, *"abcdefg")
        held = [delivery.receipt for delivery in claim(sub)]
        with within(pg_schema) as (connection, line):
            assert line.run(log.settle([Done(held[3])], 0)) == []
            with meanwhile(pg_schema, lambda: take_back(broker)):
                connection.commit()
        left = [*held[:3], *held[4:]]
        assert list(sub.settle([Done(receipt) for receipt in left])) == left
        while broker.tidy("sub", 3):
            pass
        broker.finish("sub")
        assert drain(sub) == [*"abcdefg"]


def test_a_retry_that_is_just_being_noted_comes_once(pg_schema: Schema):
    with opened(pg_schema, T) as broker:
        sub = lane(broker, T)
        publish(broker, T, *"ab")
        first, second = [delivery.receipt for delivery in claim(sub)]
        with within(pg_schema) as (connection, line):
            line.run(log.settle([Retry(first, 0.0, "e"), Dead(second, "e")], 0))
            with meanwhile(pg_schema, lambda: rewind(broker)):
                connection.commit()
        assert drain(sub) == [*"ab"]
        assert (drain(sub), list(broker.dead_letters())) == ([], [])


def test_cursors_that_are_just_being_swept_away_do_not_go_with_the_last(pg_schema: Schema):
    """Retention takes cursors that later ones have taken the place of; a rewind takes the later."""
    with opened(pg_schema, T) as broker:
        sub = lane(broker, T)
        publish(broker, T, *"abcd")
        for _ in range(4):
            assert len(drain(sub, 1)) in (0, 4)
        [all_of_it] = broker.targets("sub", None)
        targets = broker.targets("sub", int(all_of_it.position) + 2)
        with within(pg_schema) as (connection, line), within(pg_schema) as (other, sweeping):
            assert line.run(steering.begin_rewind("sub", targets, None, 0, quiet=False))
            other.execute("set local lock_timeout = '2s'")
            line.run(locks.taking_back("sub", steering.take_back("sub", targets)))
            [(mine,)] = sweeping.run(ask("lock_retention"))
            if mine:
                sweeping.run(ask("forget_cursors"))
            other.commit()
            connection.commit()
        broker.finish("sub")
        assert drain(sub) == [*"cd"]


def ask(name: str, *params: object) -> Steps[list[tuple[Any, ...]]]:
    rows: list[tuple[Any, ...]] = yield Ask(name, params)
    return rows


def test_a_handler_in_its_transaction_is_waited_for(pg_schema: Schema):
    """What it does stands, and comes again as what is rewound does; nothing of it is half."""
    with opened(pg_schema, T) as broker:
        sub = lane(broker, T)
        publish(broker, T, "a")
        [held] = claim(sub)
        with within(pg_schema) as (connection, line):
            assert line.run(log.fence([held.receipt], 7)) == [held.receipt]
            with meanwhile(pg_schema, lambda: rewind(broker)):
                assert line.run(log.settle([Done(held.receipt)], 0, 7)) == []
                connection.commit()
        assert drain(sub) == ["a"]


def test_a_handler_that_begins_afterwards_finds_its_claim_lost(pg_schema: Schema):
    with opened(pg_schema, T) as broker:
        sub = lane(broker, T)
        publish(broker, T, "a")
        [held] = claim(sub)
        take_back(broker)
        with within(pg_schema) as (_, line):
            assert line.run(log.fence([held.receipt], 7)) == []


def test_two_that_rewind_at_once_leave_it_whole(pg_schema: Schema):
    with opened(pg_schema, T) as broker, opened(pg_schema, T) as other:
        sub = lane(broker, T)
        publish(broker, T, *"abc")
        drain(sub)
        take_back(broker)
        with pytest.raises(ConfigurationError, match="was not finished"):
            other.resume("sub")
        take_back(other)
        for each in (broker, other):
            while each.tidy("sub", 3):
                pass
        broker.finish("sub")
        other.finish("sub")
        assert drain(sub) == [*"abc"]


def test_what_the_log_has_forgotten_comes_from_its_dead_letter(pg_schema: Schema):
    short = topic("short", retention_s=0.0)
    with opened(pg_schema, short) as broker:
        sub = lane(broker, short)
        publish(broker, short, *"abc")
        _, middle, _ = held = [delivery.receipt for delivery in claim(sub)]
        sub.settle([Dead(r, "e") if r == middle else Done(r) for r in held])
        eventually(lambda: not (claim(sub, wait_s=0.1) or kept(pg_schema)), "the log is swept")
        [target] = broker.targets("sub", None)
        assert target.messages == 1
        rewind(broker)
        assert drain(sub) == ["b"]


def kept(schema: Schema) -> int:
    with schema.connect(autocommit=True) as connection:
        query = f"select count(*) from {schema.duly}.messages"
        return int(connection.execute(query.encode()).fetchall()[0][0])


# --- removing


def test_beside_a_handler_in_its_transaction(pg_schema: Schema):
    with opened(pg_schema, T) as broker:
        sub = lane(broker, T)
        publish(broker, T, *"ab")
        first, second = [delivery.receipt for delivery in claim(sub)]
        with within(pg_schema) as (connection, line):
            assert line.run(log.fence([first, second], 7)) == [first, second]
            assert broker.drop("sub")
            with meanwhile(pg_schema, lambda: tidy(broker)):
                assert line.run(log.settle([Done(first), Done(second)], 0, 7)) == []
                connection.commit()
        with pytest.raises(BrokerUnusable, match="duly drop"):
            claim(sub)
        assert [state.name for state in broker.subscriptions()] == []
        assert drain(lane(broker, T)) == [*"ab"]


def tidy(broker: PostgresBroker) -> None:
    while broker.tidy("sub", 3):
        pass


def test_beside_a_worker_that_works(pg_schema: Schema):
    """It says why it stops, and one that is started anew begins where its consumer says."""
    with opened(pg_schema, T) as broker, opened(pg_schema, T) as workers:
        publish(broker, T, *map(str, range(200)))
        sub, stop = lane(workers, T), threading.Event()
        ended: list[BaseException] = []

        def work() -> None:
            try:
                while not stop.is_set():
                    some = claim(sub, 3, wait_s=0.1)
                    sub.settle([Done(delivery.receipt) for delivery in some])
            except BaseException as error:
                ended.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        eventually(lambda: broker.subscriptions()[0].backlog < 150, "it works")
        assert broker.drop("sub")
        tidy(broker)
        thread.join(30)
        assert [type(error) for error in ended] == [BrokerUnusable]
        assert len(drain(lane(broker, T))) == 200
        stop.set()
