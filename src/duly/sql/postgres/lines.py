"""A connection with the one thing duly does on it: run steps. Of either colour, driven the same.

What drives a `LoopLine` blocks its own thread while each statement is awaited on the loop: so
one session, written once, works an async connection too, and everything that happens on that
connection happens on its loop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import psycopg

from duly.sql.postgres.statements import AsyncStatementRunner, StatementRunner
from duly.sql.steps import Steps, arun, run

R = TypeVar("R")

OnLoop = Callable[[Awaitable[Any]], Any]
"""Await on the loop and return the result, from any other thread."""


class Line(Protocol):
    """One connection, used by one thread at a time."""

    @property
    def connection(self) -> Any:
        """The driver's own."""
        ...

    def run(self, steps: Steps[R]) -> R:
        """Drive steps to their result. Raises what they raise, and the driver's errors."""
        ...

    def start_pipeline(self) -> None:
        """Send statements without waiting for answers, until `end_pipeline`."""
        ...

    def end_pipeline(self) -> None:
        """Wait for all answers; without a pipeline nothing. Raises the driver's errors."""
        ...


class OwnLine:
    """A blocking connection."""

    def __init__(self, connection: psycopg.Connection[Any], schema: str) -> None:
        self.connection = connection
        self._runner = _kept(StatementRunner, connection, schema)
        self._pipeline: Any = None

    def run(self, steps: Steps[R]) -> R:
        """As `Line.run`."""
        return run(self._runner, steps)

    def start_pipeline(self) -> None:
        """As `Line.start_pipeline`."""
        self._pipeline = self.connection.pipeline()
        self._pipeline.__enter__()

    def end_pipeline(self) -> None:
        """As `Line.end_pipeline`."""
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            pipeline.__exit__(None, None, None)


class LoopLine:
    """An async connection, driven from a thread that is not its loop's."""

    def __init__(
        self, connection: psycopg.AsyncConnection[Any], schema: str, on_loop: OnLoop
    ) -> None:
        self.connection = connection
        self._runner = _kept(AsyncStatementRunner, connection, schema)
        self._on_loop = on_loop
        self._pipeline: Any = None

    def run(self, steps: Steps[R]) -> R:
        """As `Line.run`."""
        return self._on_loop(arun(self._runner, steps))  # type: ignore[no-any-return]

    def start_pipeline(self) -> None:
        """As `Line.start_pipeline`."""
        self._pipeline = self.connection.pipeline()
        self._on_loop(self._pipeline.__aenter__())

    def end_pipeline(self) -> None:
        """As `Line.end_pipeline`."""
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None:
            self._on_loop(pipeline.__aexit__(None, None, None))


def _kept(kind: Any, connection: Any, schema: str) -> Any:
    """The runner of a connection, made once: it is taken and given back for each transaction."""
    runner = getattr(connection, _RUNNER, None)
    if runner is None or runner.schema != schema:
        runner = kind(connection, schema)
        setattr(connection, _RUNNER, runner)
    return runner


_RUNNER = "_duly_runner"
