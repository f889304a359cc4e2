"""The progress line of ``duly run`` on a terminal: what each consumer does a second."""

from __future__ import annotations

import io
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

from duly.supervisor import Report

# Rates are over the last few seconds: shorter they flicker, longer they lag.
WINDOW_S = 3.0

Totals = Mapping[str, Mapping[str, int]]


class Tally:
    """Sums what worker processes report, and keeps the sums of those that died.

    `take` comes from the supervisor's thread, `line` from the one that draws.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_process: dict[int, Totals] = {}
        self._slots: dict[int, int] = {}
        self._before: dict[str, dict[str, int]] = {}
        self._history: dict[str, deque[tuple[float, int]]] = {}

    def take(self, report: Report) -> None:
        """Note what one process has done since it started."""
        with self._lock:
            last = self._slots.get(report.slot)
            if last is not None and last != report.pid:
                _add(self._before, self._by_process.pop(last, {}))
            self._slots[report.slot] = report.pid
            self._by_process[report.pid] = report.counts

    def totals(self) -> Totals:
        """Consumer, and how much of what, over all processes so far."""
        with self._lock:
            sums = {name: dict(counts) for name, counts in self._before.items()}
            for counts in self._by_process.values():
                _add(sums, counts)
            return sums

    def line(self, now: float) -> str:
        """``billing 1,234/s (56,000, 2 dead)  board 20/s (130)``."""
        parts = []
        for consumer, counts in self.totals().items():
            handled = counts.get("handled", 0)
            told = [f"{handled:,}"]
            told += [f"{counts[word]:,} {word}" for word in ("failed", "dead") if counts.get(word)]
            parts.append(
                f"{consumer} {self._rate(consumer, handled, now):,.0f}/s ({', '.join(told)})"
            )
        return "   ".join(parts) or "waiting for workers"

    def _rate(self, consumer: str, handled: int, now: float) -> float:
        history = self._history.setdefault(consumer, deque())
        history.append((now, handled))
        while len(history) > 2 and now - history[1][0] >= WINDOW_S:
            history.popleft()
        since, before = history[0]
        return (handled - before) / (now - since) if now > since else 0.0


def _add(sums: dict[str, dict[str, int]], counts: Totals) -> None:
    for consumer, each in counts.items():
        total = sums.setdefault(consumer, {})
        for word, count in each.items():
            total[word] = total.get(word, 0) + count


class Progress(io.TextIOBase):
    """The line at the bottom, and above it whatever workers and the supervisor write."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tally = Tally()

    @classmethod
    @contextmanager
    def on_terminal(cls) -> Iterator[Progress]:
        """Draw on standard error while this lasts."""
        console = Console(stderr=True, highlight=False)
        progress = cls(console)
        with Live(
            console=console,
            get_renderable=progress.draw,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        ):
            yield progress

    def count(self, report: Report) -> None:
        """Note what a worker process has done."""
        self._tally.take(report)

    def show(self, output: bytes) -> None:
        """Print whole lines above the progress line."""
        self.write(output.decode(errors="replace"))

    def write(self, text: str) -> int:
        """Print whole lines above the progress line; what a log handler calls."""
        if text.strip():
            self._console.print(Text.from_ansi(text.rstrip("\n")), soft_wrap=True)
        return len(text)

    def draw(self) -> Text:
        """The line as it is now."""
        return Text(
            self._tally.line(time.monotonic()), style="dim", no_wrap=True, overflow="ellipsis"
        )
