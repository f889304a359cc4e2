"""pgqueuer and procrastinate on the same server, at the settings that do best here.

Both run a task a message on an event loop and keep nothing of what succeeded but a log row
(pgqueuer) or nothing (procrastinate, ``delete_jobs="always"``). Neither has exactly-once effects:
their rows with an inserted row do what their users write for it, a dedup row by the job's id in
the transaction of the effect, on a connection of a pool of ten.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import psycopg
from postgres_work import CHARGE, IN_FLIGHT, check_charges, create_charges, wait
from psycopg_pool import AsyncConnectionPool
from workload import BATCH, Order, Sample, Stopwatch, in_batches, measured, orders

WARM = 500
POOL = 10
DEDUP = "create table if not exists handled (job bigint primary key)"
ONCE = "insert into handled values (%s) on conflict do nothing"

encode = msgspec.json.Encoder().encode
decode = msgspec.json.Decoder(Order).decode

Handle = Callable[[int, Order], Awaitable[None]]
"""Given the job's id and what it carries."""


async def ignore(_job: int, _order: Order) -> None:
    """The empty handler."""


async def pause(_job: int, order: Order) -> None:
    """What waits 10 ms for somebody else."""
    await wait(order)


class Charging:
    """One inserted row a message, and the memory of the job in the same transaction."""

    def __init__(self, url: str) -> None:
        create_charges(url)
        with psycopg.connect(url) as connection:
            connection.execute(DEDUP)
        self._pool = AsyncConnectionPool(url, min_size=POOL, max_size=POOL, open=False)

    async def __aenter__(self) -> Handle:
        await self._pool.open(wait=True)
        return self._charge

    async def __aexit__(self, *_: object) -> None:
        await self._pool.close()

    async def _charge(self, job: int, order: Order) -> None:
        async with self._pool.connection() as connection:
            done = await connection.execute(ONCE, (job,))
            if done.rowcount:
                await connection.execute(CHARGE, (order.order_id, order.cents))


class Counted:
    """A handler that starts the clock after the warm-up and stops it at the end."""

    def __init__(self, handle: Handle, messages: int) -> None:
        self._handle = handle
        self._all = WARM + messages
        self.watch = Stopwatch(messages)
        self.over = asyncio.Event()
        self._done = 0

    async def __call__(self, job: int, order: Order) -> None:
        await self._handle(job, order)
        self._done += 1
        if self._done == WARM:
            self.watch.start()
        elif self._done == self._all:
            self.watch.stop()
            self.over.set()


# --- pgqueuer


async def pgqueuer_at(url: str) -> tuple[Any, psycopg.AsyncConnection[Any]]:
    from pgqueuer import Queries

    connection = await psycopg.AsyncConnection.connect(url, autocommit=True)
    queries = Queries.from_psycopg_connection(connection)
    await queries.install()
    return queries, connection


async def _enqueue(queries: Any, count: int, size: int, first: int = 0) -> None:
    for batch in in_batches(orders(count, first), size):
        if size == 1:
            await queries.enqueue("order", encode(batch[0]))
        else:
            bodies = [encode(order) for order in batch]
            await queries.enqueue(["order"] * len(batch), bodies, [0] * len(batch))


def pgqueuer_publish(url: str, messages: int, size: int = BATCH) -> Sample:
    async def run() -> Sample:
        queries, connection = await pgqueuer_at(url)
        async with connection:
            await _enqueue(queries, WARM if size > 1 else 100, size)
            with measured(messages) as sample:
                await _enqueue(queries, messages, size, WARM)
        return sample

    return asyncio.run(run())


def pgqueuer_consume(url: str, messages: int, handle: Handle = ignore) -> Sample:
    return asyncio.run(_pgqueuer(url, messages, handle))


async def _pgqueuer(url: str, messages: int, handle: Handle) -> Sample:
    from pgqueuer import PgQueuer
    from pgqueuer.models import Job

    logging.getLogger("pgqueuer").setLevel(logging.ERROR)
    queries, connection = await pgqueuer_at(url)
    async with connection:
        await _enqueue(queries, WARM + messages, BATCH)
        app = PgQueuer.from_psycopg_connection(connection)
        counted = Counted(handle, messages)

        @app.entrypoint("order")
        async def work(job: Job) -> None:
            assert job.payload is not None
            await counted(job.id, decode(job.payload))

        running = asyncio.create_task(app.qm.run(batch_size=BATCH))
        await counted.over.wait()
        app.shutdown.set()
        await running
    return counted.watch.sample


def pgqueuer_charge(url: str, messages: int) -> Sample:
    async def run() -> Sample:
        async with Charging(url) as charge:
            return await _pgqueuer(url, messages, charge)

    sample = asyncio.run(run())
    check_charges(url, WARM + messages)
    return sample


# --- procrastinate


def procrastinate_at(url: str) -> Any:
    from procrastinate import App, PsycopgConnector

    logging.getLogger("procrastinate").setLevel(logging.ERROR)
    return App(connector=PsycopgConnector(conninfo=url, min_size=POOL, max_size=POOL))


async def _defer(task: Any, count: int, size: int, first: int = 0) -> None:
    for batch in in_batches(orders(count, first), size):
        if size == 1:
            await task.defer_async(order=msgspec.to_builtins(batch[0]))
        else:
            await task.batch_defer_async(*({"order": msgspec.to_builtins(o)} for o in batch))


def procrastinate_publish(url: str, messages: int, size: int = BATCH) -> Sample:
    async def run() -> Sample:
        app = procrastinate_at(url)

        async def never_run(order: dict[str, Any]) -> None:
            """Only deferred."""

        work = app.task(name="order")(never_run)
        async with app.open_async():
            await app.schema_manager.apply_schema_async()
            await _defer(work, WARM if size > 1 else 100, size)
            with measured(messages) as sample:
                await _defer(work, messages, size, WARM)
        return sample

    return asyncio.run(run())


def procrastinate_consume(url: str, messages: int, handle: Handle = ignore) -> Sample:
    return asyncio.run(_procrastinate(url, messages, handle))


async def _procrastinate(url: str, messages: int, handle: Handle) -> Sample:
    app = procrastinate_at(url)
    counted = Counted(handle, messages)

    async def handle_one(context: Any, order: dict[str, Any]) -> None:
        await counted(context.job.id, msgspec.convert(order, Order))

    work = app.task(name="order", pass_context=True)(handle_one)
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        await _defer(work, WARM + messages, BATCH)
        await app.run_worker_async(
            concurrency=IN_FLIGHT,
            wait=False,
            delete_jobs="always",
            listen_notify=False,
            install_signal_handlers=False,
        )
    return counted.watch.sample


def procrastinate_charge(url: str, messages: int) -> Sample:
    async def run() -> Sample:
        async with Charging(url) as charge:
            return await _procrastinate(url, messages, charge)

    sample = asyncio.run(run())
    check_charges(url, WARM + messages)
    return sample
