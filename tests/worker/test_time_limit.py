"""How long handlers may run, where one timer is kept for all of them."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from duly.worker.loop import TimeLimit, shake_off


async def outcome(limit: TimeLimit, call: Any) -> str:
    task = asyncio.current_task()
    assert task is not None
    try:
        return str(await limit.keep(call, task))
    except TimeoutError as error:
        return str(error)
    except asyncio.CancelledError:
        await shake_off(task)
        return "cancelled"
    finally:
        assert not task.cancelling(), "what comes next in this task is not cancelled"


def test_each_is_cancelled_when_its_own_time_is_over():
    async def run() -> None:
        limit, loop = TimeLimit(0.05), asyncio.get_running_loop()
        ended: list[float] = []

        async def one() -> None:
            began = loop.time()
            assert "max_run_s=0.05" in await outcome(limit, loop.create_future())
            ended.append(loop.time() - began)

        first = asyncio.create_task(one())
        quick = asyncio.create_task(outcome(limit, asyncio.sleep(0, "in time")))
        assert await quick == "in time"
        later = asyncio.create_task(one())
        await asyncio.gather(first, later)
        assert min(ended) >= 0.05
        assert limit._timer is None, "nothing is left behind where nobody runs"

    asyncio.run(run())


def test_who_swallows_its_cancellation_has_failed_all_the_same():
    async def swallow() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.get_running_loop().create_future()
        return "as if nothing had been"

    assert "max_run_s" in asyncio.run(outcome(TimeLimit(0.01), swallow()))


def test_who_does_not_end_keeps_no_other_from_its_limit():
    async def run() -> None:
        limit, loop = TimeLimit(0.01), asyncio.get_running_loop()
        goes_on = loop.create_future()

        async def stubborn() -> None:
            while not goes_on.done():
                try:
                    await asyncio.shield(goes_on)
                except asyncio.CancelledError:
                    continue

        first = asyncio.create_task(outcome(limit, stubborn()))
        second = asyncio.create_task(outcome(limit, loop.create_future()))
        assert "max_run_s" in await second
        third = asyncio.create_task(outcome(limit, loop.create_future()))
        assert "max_run_s" in await third
        goes_on.set_result(None)
        assert "max_run_s" in await first

    asyncio.run(run())


def test_a_handlers_own_errors_are_its_own():
    async def late() -> None:
        raise TimeoutError("its own")

    async def wrong() -> None:
        raise ValueError("wrong")

    limit = TimeLimit(30)
    assert asyncio.run(outcome(limit, late())) == "its own"
    with pytest.raises(ValueError, match="wrong"):
        asyncio.run(outcome(limit, wrong()))
    assert limit._timer is None


def test_what_somebody_else_cancels_is_no_limit():
    async def run() -> str:
        limit = TimeLimit(30)
        task = asyncio.create_task(outcome(limit, asyncio.get_running_loop().create_future()))
        await asyncio.sleep(0)
        task.cancel()
        return await task

    assert asyncio.run(run()) == "cancelled"


def test_between_calls_that_follow_one_another_the_timer_stays():
    async def run() -> None:
        limit = TimeLimit(0.05)
        timers = set()
        with limit.held():
            for _ in range(3):
                assert await outcome(limit, asyncio.sleep(0, "in time")) == "in time"
                timers.add(limit._timer)
            assert timers == {limit._timer}
            assert "max_run_s" in await outcome(limit, asyncio.get_running_loop().create_future())
        assert limit._timer is None

    asyncio.run(run())
