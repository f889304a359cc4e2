"""`app.apublish`: tasks that publish together share a commit, and nobody takes others with him."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

import duly
from duly.broker import Outcome, Published
from duly.message import Message
from tests.api.fakes import FakeBroker, stored

rides = duly.Topic("rides", dict, guarantee="at-least-once")


@pytest.fixture
def broker() -> FakeBroker:
    return FakeBroker()


@pytest.fixture
def app(broker):
    app = duly.App("shop", broker)
    app.publish(rides, {"first": True})
    del broker.portions[:]
    while broker.entered.acquire(blocking=False):
        pass
    yield app
    broker.gate.set()
    app.close()


async def entered(broker: FakeBroker) -> None:
    """Wait until the broker was given a portion."""
    assert await asyncio.to_thread(broker.entered.acquire, timeout=30)


def test_tasks_that_are_ready_together_share_a_portion(app, broker):
    async def main():
        return await asyncio.gather(*(app.apublish(rides, {"n": n}) for n in range(50)))

    outcomes = asyncio.run(main())
    assert [len(portion) for portion in broker.portions] == [50]
    assert [outcome.message_id for outcome in outcomes] == [m.id for m in broker.messages]


def test_what_comes_while_a_portion_is_stored_goes_together_next(app, broker):
    async def main():
        broker.gate.clear()
        first = asyncio.create_task(app.apublish(rides, {"n": 0}))
        await entered(broker)
        rest = [asyncio.create_task(app.apublish(rides, {"n": n})) for n in range(1, 30)]
        await asyncio.sleep(0)
        broker.gate.set()
        await asyncio.gather(first, *rest)

    asyncio.run(main())
    assert [len(portion) for portion in broker.portions] == [1, 29]
    assert broker.bodies == [b'{"n":%d}' % n for n in range(30)]


def test_callers_that_publish_again_and_again_stay_together(app, broker):
    async def caller(k: int) -> None:
        for n in range(20):
            await app.apublish(rides, {"k": k, "n": n})

    async def main():
        await asyncio.gather(*(caller(k) for k in range(25)))

    asyncio.run(main())
    assert len(broker.messages) == 500
    assert len(broker.portions) <= 25


def test_each_gets_its_own_outcome(app, broker):
    def odd_fail(messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        return [
            duly.PublishFailed("odd", message_id=m.id) if int(m.id) % 2 else Published(m.id)
            for m in messages
        ]

    broker.answer = odd_fail

    async def main():
        calls = (app.apublish(rides, {}, id=str(n)) for n in range(10))
        return await asyncio.gather(*calls, return_exceptions=True)

    for n, outcome in enumerate(asyncio.run(main())):
        if n % 2:
            assert isinstance(outcome, duly.PublishFailed)
            assert outcome.message_id == str(n)
        else:
            assert outcome == Published(str(n))


def test_cancelling_one_that_is_being_stored_changes_nothing_for_anybody(app, broker):
    async def main():
        broker.gate.clear()
        tasks = [asyncio.create_task(app.apublish(rides, {"n": n})) for n in range(5)]
        await entered(broker)
        tasks[2].cancel()
        await asyncio.sleep(0)
        broker.gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    outcomes = asyncio.run(main())
    assert isinstance(outcomes[2], asyncio.CancelledError)
    assert all(isinstance(outcome, Published) for outcome in outcomes[:2] + outcomes[3:])
    assert len(broker.messages) == 5


def test_cancelling_one_that_still_waits_leaves_only_it_out(app, broker):
    async def main():
        broker.gate.clear()
        first = asyncio.create_task(app.apublish(rides, {"n": 0}))
        await entered(broker)
        tasks = [asyncio.create_task(app.apublish(rides, {"n": n})) for n in range(1, 4)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        broker.gate.set()
        return await asyncio.gather(first, *tasks, return_exceptions=True)

    outcomes = asyncio.run(main())
    assert isinstance(outcomes[2], asyncio.CancelledError)
    assert broker.bodies == [b'{"n":0}', b'{"n":1}', b'{"n":3}']


def test_all_cancelled_leaves_a_working_app(app, broker):
    async def main():
        broker.gate.clear()
        first = asyncio.create_task(app.apublish(rides, {"n": 0}))
        await entered(broker)
        rest = [asyncio.create_task(app.apublish(rides, {"n": n})) for n in range(1, 4)]
        await asyncio.sleep(0)
        for task in rest:
            task.cancel()
        broker.gate.set()
        await first
        await app.apublish(rides, {"n": 9})

    asyncio.run(main())
    assert broker.bodies == [b'{"n":0}', b'{"n":9}']


def test_a_broker_that_raises_fails_each_and_goes_on(app, broker):
    def broken(messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        raise OSError("gone")

    async def main():
        broker.answer = broken
        calls = (app.apublish(rides, {}, id=str(n)) for n in range(3))
        failed = await asyncio.gather(*calls, return_exceptions=True)
        assert [getattr(error, "message_id", "") for error in failed] == ["0", "1", "2"]
        assert all(isinstance(error, duly.PublishUnknown) for error in failed)
        broker.answer = stored
        assert isinstance(await app.apublish(rides, {}), Published)

    asyncio.run(main())


def test_portions_are_bounded(app, broker):
    async def main():
        await asyncio.gather(*(app.apublish(rides, {"n": n}) for n in range(2100)))

    asyncio.run(main())
    assert [len(portion) for portion in broker.portions] == [1000, 1000, 100]


def test_one_app_on_several_loops_one_after_the_other(app, broker):
    for n in range(3):
        asyncio.run(app.apublish(rides, {"n": n}))
    assert len(broker.messages) == 3


def test_a_loop_that_ends_meanwhile_harms_nobody(app, broker):
    async def abandoned():
        broker.gate.clear()
        task = asyncio.create_task(app.apublish(rides, {"n": 0}))
        await entered(broker)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(abandoned())
    broker.gate.set()
    asyncio.run(app.apublish(rides, {"n": 1}))
    # Two loops are two groups, and nobody waits for the first: only here is it certainly stored.
    app.close()
    assert sorted(broker.bodies) == [b'{"n":0}', b'{"n":1}']


def test_the_first_publish_opens_the_broker_off_the_loop():
    async def main():
        async with duly.App("shop", "memory://") as app:
            assert isinstance(await app.apublish(rides, {}), Published)

    asyncio.run(main())


def test_publishing_after_close_opens_again():
    app = duly.App("shop", "memory://")

    async def main():
        await app.apublish(rides, {})
        await app.aclose()
        await app.apublish(rides, {})

    asyncio.run(main())
    app.close()
