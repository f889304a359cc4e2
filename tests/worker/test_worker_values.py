"""What is made once for a worker and cannot be made yet: nothing is claimed, nobody is charged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import duly
from duly.message import Message, Topic
from tests.worker.test_worker import Place, until

numbers: Topic[int] = Topic("numbers", int, guarantee="at-least-once")


class Flaky:
    """A pool whose server is away for the first few calls."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals
        self.calls = 0
        self.closed = 0

    def _try(self) -> str:
        self.calls += 1
        if self.calls <= self.refusals:
            raise OSError("the server is away")
        return "pool"

    def of_def(self) -> Callable[[], Iterator[str]]:
        def pool() -> Iterator[str]:
            yield self._try()
            self.closed += 1

        return pool

    def of_async_def(self) -> Callable[[], Any]:
        async def pool() -> Any:
            yield self._try()
            self.closed += 1

        return pool


def consumes(place: Place, flaky: Flaky, seen: list[Any], guarantee: Any, colour: str) -> None:
    app: Any = place.app  # which guarantee it is, no type checker can know
    if colour == "def":

        @app.consumer(numbers, name="c", guarantee=guarantee)
        def handle(
            number: Message[int], *, pool: str = duly.use(flaky.of_def(), per="worker")
        ) -> None:
            assert pool == "pool"
            seen.append(number.payload)
    else:

        @app.consumer(numbers, name="c", guarantee=guarantee)
        async def handle_async(
            number: Message[int], *, pool: str = duly.use(flaky.of_async_def(), per="worker")
        ) -> None:
            assert pool == "pool"
            seen.append(number.payload)


@pytest.mark.parametrize("colour", ["def", "async def"])
@pytest.mark.parametrize("guarantee", ["at-most-once", "at-least-once"])
def test_what_cannot_be_made_yet_costs_no_message(colour: str, guarantee: str) -> None:
    place, flaky, seen = Place(), Flaky(refusals=3), list[Any]()
    consumes(place, flaky, seen, guarantee, colour)
    place.publish(numbers, range(5))
    with place.working():
        until(lambda: len(seen) == 5, "all are handled")
    assert seen == list(range(5))
    assert flaky.calls == 4
    assert flaky.closed == 1
    assert list(place.broker.incidents()) == [], "no attempt was charged"
