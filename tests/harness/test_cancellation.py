"""Cancelled at any await, a handler breaks no promise, and neither does a publish."""

from __future__ import annotations

import asyncio
import inspect
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import duly
from duly import Topic
from duly.testing import Running, running

AWAITS = range(1, 5)

outputs: Topic[int] = Topic("outputs", int, guarantee="at-least-once")


class Awaits:
    """Counts the awaits of all handlers, and lets one of them be cancelled."""

    def __init__(self, at: int) -> None:
        self._at = at
        self.passed = 0
        self.is_over = False

    async def step(self) -> None:
        self.passed += 1
        awaited = asyncio.ensure_future(asyncio.sleep(0))
        if self.passed == self._at:
            self.is_over = True
            awaited.cancel()
        await awaited


def drain(t: Running) -> None:
    """Until nobody is cancelled any more: what was, comes again when its lease is over."""
    for _ in range(3):
        with suppress(asyncio.CancelledError):
            t.drain(advance=True, failures="expected")


@pytest.mark.parametrize("at", AWAITS)
@pytest.mark.parametrize(
    "where",
    [
        ("memory://", None),
        ("memory://?kind=log", "memory://"),
        ("memory://?kind=queue", "memory://"),
        ("sqlite:///a.db", None),
        ("sqlite:///a.db", "sqlite:///b.db"),
    ],
    ids=lambda where: f"{where[0][:6]}{where[0][-5:]}-{where[1]}",
)
def test_exactly_once_effects_and_outputs_are_all_there_once(
    tmp_path: Path, where: tuple[str, str | None], at: int
):
    app = duly.App("theirs", *where)
    topic: Topic[int] = Topic("t", int, guarantee="exactly-once")
    awaits = Awaits(at)
    is_sql = where[0].startswith("sqlite")

    def write(tx: duly.Transaction[Any], table: str, n: int) -> None:
        if is_sql:
            tx.connection.execute(f"insert into {table} values (?)", (n,))
        else:
            tx.connection.insert(table, n, n)

    @app.consumer(topic, name="c", guarantee="exactly-once")
    async def handle(n: int, tx: duly.Transaction[Any]) -> None:
        await awaits.step()
        write(tx, "one", n)
        await awaits.step()
        tx.publish(outputs, n)
        await awaits.step()
        write(tx, "two", n)
        await awaits.step()

    with running(app, folder=tmp_path) as t:
        if is_sql:
            with t.connection() as db:
                db.execute("create table one (n)")
                db.execute("create table two (n)")
        t.publish_many(topic, [1, 2])
        drain(t)
        assert awaits.is_over
        with t.connection() as db:
            for table in ("one", "two"):
                rows = (
                    [n for (n,) in db.execute(f"select n from {table}")]
                    if is_sql
                    else list(db.rows(table))
                )
                assert sorted(rows) == [1, 2], table
        assert sorted(t.payloads(outputs)) == [1, 2]
        assert list(t.dead("c")) == []


@pytest.mark.parametrize("at", AWAITS)
@pytest.mark.parametrize("guarantee", ["at-most-once", "at-least-once"])
@pytest.mark.parametrize("concurrency", [1, 3])
def test_settled_once_the_handler_returned_or_before_it_began(
    guarantee: Any, at: int, concurrency: int
):
    app = duly.App("theirs", "memory://")
    topic: Topic[int] = Topic("t", int, guarantee=guarantee)
    awaits = Awaits(at)
    began: list[int] = []
    returned: list[int] = []

    async def handle(n: int) -> None:
        began.append(n)
        await awaits.step()
        await awaits.step()
        await awaits.step()
        await awaits.step()
        returned.append(n)

    declare: Any = app.consumer(topic, name="c", guarantee=guarantee, concurrency=concurrency)
    declare(handle)
    with running(app) as t:
        t.publish_many(topic, [1, 2])
        drain(t)
        assert awaits.is_over
        assert t.waiting("c").is_drained
        assert list(t.dead("c")) == []
    if guarantee == "at-most-once":
        assert sorted(began) == [1, 2], "none starts twice"
        assert len(returned) == 1
    else:
        assert sorted(returned) == [1, 2], "what was cancelled is not settled"


@pytest.mark.parametrize("broker", ["memory://", "sqlite:///a.db"])
def test_a_publish_cancelled_at_any_turn_of_the_loop_is_there_once_when_repeated(
    tmp_path: Path, broker: str
):
    app = duly.App("theirs", broker)
    topic: Topic[int] = Topic("t", int, guarantee="exactly-once")
    app.declare(topic)

    async def publish(t: Running) -> tuple[int, int]:
        cancelled = turns = 0
        for turns in range(200):
            task = asyncio.create_task(app.apublish(topic, turns, id=f"m{turns}"))
            for _ in range(turns):
                await asyncio.sleep(0)
            whole = task.done()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            cancelled += task.cancelled()
            await app.apublish(topic, turns, id=f"m{turns}")
            if whole:
                break
        return cancelled, turns

    async def test() -> None:
        async with running(app, folder=tmp_path) as t:
            cancelled, turns = await publish(t)
            assert cancelled > 0
            found = await asyncio.to_thread(t.payloads, topic)
            assert sorted(found) == list(range(turns + 1))

    asyncio.run(test())


async def inner_task() -> None:
    """What it awaits is cancelled."""
    inner = asyncio.ensure_future(asyncio.sleep(60))
    asyncio.get_running_loop().call_soon(inner.cancel)
    await inner


async def own_task() -> None:
    """The task that it runs in is cancelled."""
    cancel_own_task()
    await asyncio.sleep(0)


async def nothing() -> None:
    """Nobody cancelled anything."""
    raise asyncio.CancelledError


def cancel_own_task() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()


# Hundreds at once are not for transactions, whose messages run in order.
LANES = [
    ("at-most-once", 1),
    ("at-most-once", 3),
    ("at-least-once", 1),
    ("at-least-once", 3),
    ("exactly-once", 1),
]
# No lease ends meanwhile: what comes again does so because it is tried again.
LEASE_S = 86400.0


def within_transaction(handle: Any) -> Any:
    """The same handler, as exactly-once wants it."""

    async def asynchronous(n: int, tx: duly.Transaction[Any]) -> None:
        await handle(n)

    def plain(n: int, tx: duly.Transaction[Any]) -> None:
        handle(n)

    return asynchronous if inspect.iscoroutinefunction(handle) else plain


class Numbers:
    """An app with one consumer of numbers, to be worked to the end."""

    def __init__(self, guarantee: Any, concurrency: int, handle: Any) -> None:
        self.app = duly.App("theirs", "memory://")
        self.topic: Topic[int] = Topic("t", int, guarantee=guarantee)
        declare: Any = self.app.consumer(
            self.topic,
            name="c",
            guarantee=guarantee,
            concurrency=concurrency,
            lease_s=LEASE_S,
            retry=duly.RetryPolicy(attempts=2, first_s=0.01),
        )
        declare(handle if guarantee != "exactly-once" else within_transaction(handle))

    def work(self, *numbers: int) -> tuple[int, list[str]]:
        """How often one was tried again, and why those are dead that were given up on."""
        with running(self.app) as t:
            t.publish_many(self.topic, numbers)
            began = t.clock.now
            t.drain(advance=True, failures="expected", timeout_s=10.0)
            assert (t.clock.now - began).total_seconds() < LEASE_S / 2
            assert t.waiting("c").is_drained
            return len(t.incidents("retry")), [letter.error for letter in t.dead("c")]


@pytest.mark.parametrize(("guarantee", "concurrency"), LANES)
@pytest.mark.parametrize("cancelled", [inner_task, own_task, nothing])
def test_cancelled_from_inside_a_handler_has_failed_and_harms_no_other(
    guarantee: str, concurrency: int, cancelled: Any
):
    began: list[int] = []
    returned: list[int] = []
    # The first failure in a transaction rolls it back, and the second names the culprit.
    failures = 2 if guarantee == "exactly-once" else 1

    async def handle(n: int) -> None:
        began.append(n)
        if n == 1 and began.count(1) <= failures:
            await cancelled()
        await asyncio.sleep(0)
        returned.append(n)

    retries, dead = Numbers(guarantee, concurrency, handle).work(1, 2, 3)
    assert dead == []
    if guarantee == "at-most-once":
        assert (sorted(began), sorted(returned), retries) == ([1, 2, 3], [2, 3], 0)
    else:
        assert (sorted(set(returned)), retries) == ([1, 2, 3], 1)


@pytest.mark.parametrize(("guarantee", "concurrency"), LANES[2:])
@pytest.mark.parametrize("cancelled", [inner_task, own_task, nothing])
def test_cancelled_each_time_it_is_dead_like_any_that_fails(
    guarantee: str, concurrency: int, cancelled: Any
):
    returned: list[int] = []

    async def handle(n: int) -> None:
        if n == 1:
            await cancelled()
        returned.append(n)

    retries, [error] = Numbers(guarantee, concurrency, handle).work(1, 2, 3)
    assert (set(returned), retries) == ({2, 3}, 1)
    assert "asyncio.CancelledError" in error


@pytest.mark.parametrize("guarantee", ["at-most-once", "at-least-once", "exactly-once"])
def test_a_def_handler_that_raises_it_has_failed_too(guarantee: str):
    began: list[int] = []

    def handle(n: int) -> None:
        began.append(n)
        if n == 1:
            raise asyncio.CancelledError

    retries, dead = Numbers(guarantee, 1, handle).work(1, 2, 3)
    assert set(began) == {1, 2, 3}
    if guarantee == "at-most-once":
        assert (len(began), retries, dead) == (3, 0, [])
    else:
        assert (retries, len(dead)) == (1, 1)


@pytest.mark.parametrize(("guarantee", "concurrency"), LANES)
def test_a_cancellation_that_nobody_waited_for_hits_no_other_message(
    guarantee: str, concurrency: int
):
    began: list[int] = []
    returned: list[int] = []

    async def handle(n: int) -> None:
        began.append(n)
        if n == 1:
            cancel_own_task()
        else:
            await asyncio.sleep(0)
        returned.append(n)

    assert Numbers(guarantee, concurrency, handle).work(1, 2, 3) == (0, [])
    assert (sorted(began), sorted(returned)) == ([1, 2, 3], [1, 2, 3])


@pytest.mark.parametrize("guarantee", ["at-most-once", "at-least-once"])
def test_tasks_that_a_handler_cancels_before_they_have_begun_begin_all_the_same(guarantee: str):
    began: list[int] = []
    returned: list[int] = []

    async def handle(n: int) -> None:
        began.append(n)
        if len(began) == 1:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
        returned.append(n)

    assert Numbers(guarantee, 8, handle).work(*range(8)) == (0, [])
    assert (sorted(began), sorted(returned)) == ([*range(8)], [*range(8)])
