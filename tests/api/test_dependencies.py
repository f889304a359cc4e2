"""`duly.use`: when what is used is made, shared, torn down, overridden and refused."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

import duly
from duly.consumer import Handler
from duly.dependencies import Resolver

topic = duly.Topic("t", Any, guarantee="at-least-once")


def handler_of(function: Callable[..., Any]) -> Handler:
    app = duly.App("test")
    app.consumer(topic, name="c", guarantee="at-least-once")(function)
    return app.consumers[0].handler


class Diary:
    """What happened, in order, and factories that write into it."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def generated(self) -> Iterator[str]:
        self.lines.append("open")
        try:
            yield "value"
        except BaseException as error:
            self.lines.append(f"saw {error!r}")
            raise
        finally:
            self.lines.append("close")

    async def agenerated(self) -> AsyncIterator[str]:
        self.lines.append("aopen")
        try:
            yield "avalue"
        except BaseException as error:
            self.lines.append(f"asaw {error!r}")
            raise
        finally:
            self.lines.append("aclose")


@pytest.fixture
def diary() -> Diary:
    return Diary()


def test_a_handler_that_uses_nothing_is_called_itself():
    def handle(payload): ...

    assert Resolver().bind(handler_of(handle)) is handle


def test_every_kind_of_factory_for_a_def(diary):
    def plain() -> str:
        return "plain"

    managed = contextlib.contextmanager(diary.generated)

    def handle(payload, *, a=duly.use(plain), b=duly.use(diary.generated),
               c=duly.use(managed), d=7):  # fmt: skip
        diary.lines.append(f"run {payload} {a} {b} {c} {d}")
        return "result"

    bound = Resolver().bind(handler_of(handle))
    assert bound("p") == "result"
    assert diary.lines == ["open", "open", "run p plain value value 7", "close", "close"]


def test_every_kind_of_factory_for_an_async_def(diary):
    async def awaited() -> str:
        return "awaited"

    managed = contextlib.asynccontextmanager(diary.agenerated)

    async def handle(payload, *, a=duly.use(awaited), b=duly.use(diary.agenerated),
                     c=duly.use(managed),
                     d=duly.use(diary.generated)):  # fmt: skip
        diary.lines.append(f"run {payload} {a} {b} {c} {d}")
        return "result"

    bound = Resolver().bind(handler_of(handle))
    assert asyncio.run(bound("p")) == "result"
    assert diary.lines == [
        "aopen", "aopen", "open", "run p awaited avalue avalue value", "close", "aclose", "aclose"
    ]  # fmt: skip


def test_positional_parameters_pass_through():
    def plain() -> int:
        return 3

    def handle(payload, tx, *, n=duly.use(plain)):
        return payload, tx, n

    handler = Handler(handle, False, False, False, True, {"n": duly.use(plain)})
    assert Resolver().bind(handler)("p", "tx") == ("p", "tx", 3)


def test_one_value_a_message_shared_by_all_that_use_it():
    made: list[object] = []

    def shared() -> object:
        made.append(object())
        return made[-1]

    def one(*, value=duly.use(shared)):
        return value

    def two(*, value=duly.use(shared)):
        return value

    def handle(payload, *, a=duly.use(one), b=duly.use(two), c=duly.use(shared)):
        return a is b is c

    bound = Resolver().bind(handler_of(handle))
    assert bound("p")
    assert bound("p")
    assert len(made) == 2


def test_teardown_sees_the_failure_and_runs_in_reverse(diary):
    def outer(*, inner=duly.use(diary.generated)) -> Iterator[str]:
        diary.lines.append("outer open")
        yield "outer"
        diary.lines.append("never: the handler raised")

    def handle(payload, *, value=duly.use(outer)):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Resolver().bind(handler_of(handle))("p")
    assert diary.lines == ["open", "outer open", "saw ValueError('no')", "close"]


@pytest.mark.parametrize("colour", ["def", "async def"])
def test_a_teardown_cannot_turn_a_failure_into_a_success(colour):
    def swallowing() -> Iterator[None]:
        with contextlib.suppress(ValueError):
            yield

    async def aswallowing() -> AsyncIterator[None]:
        with contextlib.suppress(ValueError):
            yield

    def handle(payload, *, value=duly.use(swallowing)):
        raise ValueError("no")

    async def ahandle(payload, *, value=duly.use(aswallowing)):
        raise ValueError("no")

    bound = Resolver().bind(handler_of(handle if colour == "def" else ahandle))
    with pytest.raises(ValueError, match="no"):
        bound("p") if colour == "def" else asyncio.run(bound("p"))


def test_a_teardown_that_fails_fails_the_handler():
    def failing() -> Iterator[None]:
        yield
        raise OSError("commit failed")

    def handle(payload, *, value=duly.use(failing)):
        return "fine"

    with pytest.raises(OSError, match="commit failed"):
        Resolver().bind(handler_of(handle))("p")


def test_a_factory_that_fails_tears_down_what_was_made(diary):
    def failing(*, before=duly.use(diary.generated)) -> None:
        raise OSError("no connection")

    def handle(payload, *, value=duly.use(failing)):
        diary.lines.append("never")

    with pytest.raises(OSError, match="no connection"):
        Resolver().bind(handler_of(handle))("p")
    assert diary.lines == ["open", "saw OSError('no connection')", "close"]


def test_cancelling_an_async_handler_tears_down(diary):
    started = asyncio.Event()

    async def handle(payload, *, value=duly.use(diary.agenerated)):
        started.set()
        await asyncio.Event().wait()

    async def main():
        task = asyncio.create_task(Resolver().bind(handler_of(handle))("p"))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert diary.lines == ["aopen", "asaw CancelledError()", "aclose"]


class TestPerWorker:
    def test_made_once_and_closed_last_made_first(self, diary):
        def pool(*, config=duly.use(diary.generated, per="worker")) -> Iterator[str]:
            diary.lines.append("pool open")
            yield f"pool of {config}"
            diary.lines.append("pool close")

        def handle(payload, *, pool=duly.use(pool, per="worker")):
            diary.lines.append(pool)

        resolver = Resolver()
        bound = resolver.bind(handler_of(handle))
        assert diary.lines == []
        bound("p")
        bound("p")
        resolver.close()
        once = ["open", "pool open", "pool of value", "pool of value", "pool close", "close"]
        assert diary.lines == once
        resolver.close()
        assert diary.lines == once

    def test_made_once_by_many_threads(self):
        made: list[int] = []
        together = threading.Barrier(8)

        def slow() -> int:
            made.append(1)
            return len(made)

        def handle(payload, *, value=duly.use(slow, per="worker")):
            return value

        bound = Resolver().bind(handler_of(handle))
        seen: list[int] = []

        def run() -> None:
            together.wait(30)
            seen.append(bound("p"))

        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert (made, seen) == ([1], [1] * 8)

    def test_made_once_by_many_tasks_also_when_the_first_is_cancelled(self, diary):
        first, gate = asyncio.Event(), asyncio.Event()
        made: list[int] = []

        async def slow() -> AsyncIterator[int]:
            made.append(1)
            first.set()
            await gate.wait()
            diary.lines.append("open")
            yield 7
            diary.lines.append("close")

        async def handle(payload, *, value=duly.use(slow, per="worker")):
            return value

        async def main():
            resolver = Resolver()
            bound = resolver.bind(handler_of(handle))
            tasks = [asyncio.create_task(bound("p")) for _ in range(5)]
            await first.wait()
            tasks[0].cancel()
            gate.set()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(results[0], asyncio.CancelledError)
            assert results[1:] == [7] * 4
            resolver.close()
            assert diary.lines == ["open"]
            await resolver.aclose()

        asyncio.run(main())
        assert diary.lines == ["open", "close"]

    def test_teardowns_that_fail_do_not_stop_the_others(self, diary):
        def failing() -> Iterator[str]:
            yield "x"
            raise OSError("close failed")

        def handle(payload, *, a=duly.use(diary.generated, per="worker"),
                   b=duly.use(failing, per="worker")): ...  # fmt: skip

        resolver = Resolver()
        resolver.bind(handler_of(handle))("p")
        with pytest.raises(ExceptionGroup) as group:
            resolver.close()
        assert [str(error) for error in group.value.exceptions] == ["close failed"]
        assert diary.lines == ["open", "close"]

    def test_cannot_be_built_on_a_messages_value(self):
        def per_message() -> int:
            return 1

        def pool(*, value=duly.use(per_message)): ...

        with pytest.raises(duly.ConfigurationError, match="made for each message"):
            duly.use(pool, per="worker")


class TestOverrides:
    def test_replace_a_factory_everywhere(self):
        def real() -> str:
            return "real"

        def wrapped(*, value=duly.use(real)) -> str:
            return f"wrapped {value}"

        def fake() -> str:
            return "fake"

        def handle(payload, *, a=duly.use(real), b=duly.use(wrapped)):
            return a, b

        assert Resolver({real: fake}).bind(handler_of(handle))("p") == ("fake", "wrapped fake")

    def test_may_be_of_another_kind(self, diary):
        def real() -> str:
            return "real"

        def handle(payload, *, a=duly.use(real)):
            return a

        assert Resolver({real: diary.generated}).bind(handler_of(handle))("p") == "value"
        assert diary.lines == ["open", "close"]

    def test_an_async_one_cannot_replace_for_a_def(self):
        def real() -> str:
            return "real"

        async def fake() -> str:
            return "fake"

        def handle(payload, *, a=duly.use(real)): ...

        with pytest.raises(duly.ConfigurationError, match="async"):
            Resolver({real: fake}).bind(handler_of(handle))

    def test_one_that_needs_what_it_replaces(self):
        def real() -> str:
            return "real"

        def fake(*, value=duly.use(real)):
            return value

        def handle(payload, *, a=duly.use(real)): ...

        with pytest.raises(duly.ConfigurationError, match="needs itself"):
            Resolver({real: fake}).bind(handler_of(handle))


class TestRefused:
    @pytest.mark.parametrize("value", [None, 7, "session"])
    def test_what_cannot_be_called(self, value):
        with pytest.raises(duly.ConfigurationError, match="makes the value"):
            duly.use(value)

    def test_a_lifetime_there_is_not(self):
        use: Any = duly.use
        with pytest.raises(duly.ConfigurationError, match="process"):
            use(dict, per="process")

    def test_a_factory_that_needs_what_nobody_gives(self):
        def factory(url): ...

        use: Any = duly.use
        with pytest.raises(duly.ConfigurationError, match="'url'"):
            use(factory)

    def test_a_positional_only_dependency_of_a_factory(self):
        def inner() -> int:
            return 1

        def factory(value=duly.use(inner), /): ...

        with pytest.raises(duly.ConfigurationError, match="positional"):
            duly.use(factory)


def test_a_connection_is_a_value_though_it_is_a_context_manager():
    class Connection:
        entered = False

        def __enter__(self):
            self.entered = True

        def __exit__(self, *error): ...

    def handle(payload, *, connection=duly.use(Connection)):
        return connection

    assert not Resolver().bind(handler_of(handle))("p").entered


def test_a_generator_behind_a_decorator_is_torn_down(diary):
    def noted(factory):
        @functools.wraps(factory)
        def wrapper(*args, **kwargs):
            return factory(*args, **kwargs)

        return wrapper

    factory = noted(diary.generated)

    def handle(payload, *, value=duly.use(factory)):
        return value

    assert Resolver().bind(handler_of(handle))("p") == "value"
    assert diary.lines == ["open", "close"]
