"""Crash points: a process kills itself with SIGKILL just before or after a call at a seam.

They are put around the seams from outside, by the test's own program; duly knows nothing of it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

# Calls that only look, or that happen as often as time allows: they are no steps.
_NO_STEPS = frozenset(
    {
        *("subscriptions", "dead_letters", "incidents", "incident_counts", "joins"),
        *("unsent", "backlog", "hold", "given_up"),
    }
)

Returns = Callable[[str, Any], Any]
"""What a call's result is replaced with, by the call's name."""


class Points:
    """Counts how often each point was reached, and dies at one of them.

    ``crash`` is a point with its number, such as ``after session.commit 2``; at ``stop`` the
    process stops itself instead (SIGSTOP) until a test lets it go on. With ``trace`` every
    point is appended there, by one write each.
    """

    def __init__(self, crash: str | None, trace: str | None, stop: str | None = None) -> None:
        self._crash = crash
        self._stop = stop
        self._counts: Counter[str] = Counter()
        self._mutex = threading.Lock()
        self._trace = (
            None if trace is None else os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        )

    def at(self, point: str) -> None:
        """The process stands at this point now."""
        with self._mutex:
            self._counts[point] += 1
            reached = f"{point} {self._counts[point]}"
        if self._trace is not None:
            os.write(self._trace, f"{reached}\n".encode())
        if reached == self._crash:
            os.kill(os.getpid(), signal.SIGKILL)
            threading.Event().wait()  # the signal may reach another thread first
        if reached == self._stop:
            # To this very thread: another would take a moment, in which this one went on.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)

    def reached(self, point: str) -> int:
        """How often the process has stood at this point."""
        return self._counts[point]

    def around(
        self, inner: Any, name: str, returns: Callable[[str, Any], Any] | None = None
    ) -> Any:
        """``inner`` with a point before and after each of its calls."""
        return _Seam(inner, name, self, returns)


class _Seam:
    def __init__(
        self,
        inner: Any,
        name: str,
        points: Points,
        returns: Returns | None,
    ) -> None:
        self._inner = inner
        self._name = name
        self._points = points
        self._returns = returns

    def __getattr__(self, attribute: str) -> Any:
        found = getattr(self._inner, attribute)
        if attribute == "outbox":
            return self._points.around(found, "outbox")
        if attribute in _NO_STEPS or not callable(found) or attribute == "connection":
            return found
        step = f"{self._name}.{attribute}"

        def call(*arguments: Any, **named: Any) -> Any:
            self._points.at(f"before {step}")
            result = found(*arguments, **named)
            # A claim that found nothing is no step: how many there are is a matter of time.
            if attribute != "claim" or result:
                self._points.at(f"after {step}")
            return result if self._returns is None else self._returns(attribute, result)

        return call


def around_broker(broker: Any, points: Points) -> Any:
    """A broker with points around its calls and those of its subscriptions."""

    def returns(attribute: str, result: Any) -> Any:
        return points.around(result, "subscription") if attribute == "subscribe" else result

    return points.around(broker, "broker", returns)


def around_store(store: Any, points: Points) -> Any:
    """A store with points around its calls and those of its sessions."""

    def returns(attribute: str, result: Any) -> Any:
        return points.around(result, "session") if attribute == "begin" else result

    return points.around(store, "store", returns)
