"""Logs that say which message they are about, for people on a terminal and for machines.

The worker names what runs in `CURRENT`; `install` makes every log record of the process carry it
as ``duly_consumer``, ``duly_message_id`` and ``duly_attempt``, whatever logger a handler uses.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from io import TextIOBase
from operator import length_hint
from typing import IO, Any, Literal

from duly.broker import Delivery


class InTurn:
    """A handler that runs for one delivery after another.

    ``source`` is the iterator that the calls are made from, and knows how far they have come:
    nothing is noted a message, and what a record shows is looked up when something is logged.
    """

    __slots__ = ("_last", "consumer", "deliveries", "source")

    def __init__(self, consumer: str) -> None:
        self.consumer = consumer
        self.deliveries: Sequence[Any] = ()
        self.source: Iterator[Any] = iter(())
        self._last = -1

    def begin(self, deliveries: Sequence[Any], given: list[Any], first: int) -> Iterator[Any]:
        """The iterator to call from, of what the handler is given for deliveries from ``first``
        on.
        """
        self.deliveries = deliveries
        self.source = source = iter(given)
        self._last = first + len(given) - 1
        return source

    @property
    def index(self) -> int:
        """Which delivery's call was begun last."""
        return self._last - length_hint(self.source)


class OneOf:
    """A handler that runs for one of some deliveries, which is looked up when it is shown: of a
    span that may take the database, and a task that outlives its call still knows which it was.
    """

    __slots__ = ("consumer", "deliveries", "index")

    def __init__(self, consumer: str, deliveries: Sequence[Any], index: int) -> None:
        self.consumer = consumer
        self.deliveries = deliveries
        self.index = index


Handling = tuple[str, Delivery | Sequence[Delivery]] | InTurn | OneOf
"""The consumer's name, and the delivery its handler is running for: several for a batch handler."""

CURRENT: ContextVar[Handling | None] = ContextVar("duly_current", default=None)
"""What runs here just now. Only the worker sets it; a thread or task of a handler's own, where it
copies the context (``asyncio.create_task``, ``asyncio.to_thread``), still knows it."""

Format = Literal["auto", "human", "json"]

_ABOUT = ("duly_consumer", "duly_message_id", "duly_attempt", "duly_batch")
_Factory = Callable[..., logging.LogRecord]


def install() -> None:
    """Make every log record of this process carry what `CURRENT` says. Again is harmless.

    A record factory, not a filter: filters of a logger do not see its children's records, and
    those of a handler would miss the handlers an application adds itself.
    """
    make = logging.getLogRecordFactory()
    if not isinstance(make, _AboutCurrent):
        logging.setLogRecordFactory(_AboutCurrent(make))


class _AboutCurrent:
    """The record factory that was there before, and what `CURRENT` says."""

    def __init__(self, make: _Factory) -> None:
        self._make = make

    def __call__(self, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = self._make(*args, **kwargs)
        record.__dict__.update(about_current())
        return record


def handling_now(handling: Handling) -> tuple[str, Delivery | Sequence[Delivery]]:
    """The consumer's name, and what its handler runs for at this moment."""
    if isinstance(handling, tuple):
        return handling
    return handling.consumer, handling.deliveries[handling.index]


def about_current() -> dict[str, Any]:
    """What runs here, by the names log records show; empty outside a handler."""
    handling = CURRENT.get()
    if handling is None:
        return {}
    try:
        consumer, running = handling_now(handling)
    except Exception:  # noqa: BLE001 - its id cannot be looked up, and no log line fails for that
        return {}
    if isinstance(running, Delivery):
        return _about(consumer, running)
    # A record of a batch handler is about all of it: the first id finds the batch.
    return {**_about(consumer, running[0]), "duly_batch": len(running)} if running else {}


def _about(consumer: str, delivery: Delivery) -> dict[str, Any]:
    return {
        "duly_consumer": consumer,
        "duly_message_id": delivery.message_id,
        "duly_attempt": delivery.attempt,
    }


def configure(
    format: Format = "auto",
    *,
    level: int = logging.INFO,
    stream: IO[str] | TextIOBase | None = None,
) -> None:
    """Log to ``stream`` (standard error): human lines on a terminal, JSON lines elsewhere.

    Leaves alone what an application has configured: where the root logger has handlers already,
    only the records learn what they are about.
    """
    install()
    root = logging.getLogger()
    if root.handlers:
        return
    to: Any = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(to)
    human = chosen(format, to) == "human"
    handler.setFormatter(HumanFormatter() if human else JsonFormatter())
    root.addHandler(handler)
    root.setLevel(level)


def chosen(format: Format, stream: IO[str]) -> Literal["human", "json"]:
    """The format that ``auto`` stands for on this stream."""
    if format == "auto":
        return "human" if stream.isatty() else "json"
    return format


# Attributes every record has; anything else came from ``extra=`` and is shown.
_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, what it is about, extras."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _PLAIN}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        # default=repr: an extra that is no JSON must not lose the line.
        return json.dumps(line, default=repr, ensure_ascii=False)


class HumanFormatter(logging.Formatter):
    """``12:00:01.123 INFO shop: charged  [billing o-1 attempt 2]``."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        text = f"{clock}.{int(record.msecs):03d} {record.levelname} {record.name}: "
        text += record.getMessage() + self._about(record)
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        if record.stack_info:
            text += "\n" + self.formatStack(record.stack_info)
        return text

    def _about(self, record: logging.LogRecord) -> str:
        consumer, message_id, attempt, batch = (getattr(record, name, None) for name in _ABOUT)
        if consumer is None:
            return ""
        more = "" if batch is None else f" and {batch - 1} more"
        again = "" if attempt == 1 else f" attempt {attempt}"
        return f"  [{consumer} {message_id}{more}{again}]"
