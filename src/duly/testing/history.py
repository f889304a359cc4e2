"""What happened, as recorded by whoever did it, and what the resources said in the end.

An operation is invoked and then ends exactly once: ``ok`` (certainly happened), ``fail``
(certainly did not) or ``info`` (unknown). One that was invoked and has no end in the history
is unknown too: its process died. Invocations are recorded before the act.

`Recorder` writes a history that kill -9 cannot lose a finished record of, from as many processes
as there are; `read_history` brings their files together.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import msgspec

from duly.broker import Delivery
from duly.message import Message

Phase = Literal["invoke", "ok", "fail", "info"]
How = Literal["returned", "raised", "cancelled", "killed"]
Kind = Literal["done", "retry", "dead", "release"]

Identity = tuple[str, str, str]
"""Topic, source and id: what names one event."""


class About(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A message as history knows it: its identity, and what must not change on the way.

    ``content`` stands for body and headers; two messages have the same exactly if those are.
    """

    topic: str
    source: str
    id: str
    key: str | None = None
    content: str = ""
    time_ms: int = 0

    @property
    def identity(self) -> Identity:
        """What names the event."""
        return (self.topic, self.source, self.id)


def about(message: Message[Any]) -> About:
    """What a history keeps of a message."""
    content = message.body_hash().hex()
    if message.headers:
        content += repr(sorted(message.headers.items()))
    return About(message.topic, message.source, message.id, message.key, content, message.time_ms)


# --- what happened. ``at`` is in seconds of one clock for the whole history, ``who`` the process.


class Record(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, tag_field="event"):
    """Something that happened."""

    at: float
    who: str


class Publish(Record, frozen=True, gc=False, omit_defaults=True, tag="publish"):
    """One message is published; with ``tx`` as part of that transaction, whose commit decides.

    ``repeat``: the broker answered that it knew the message already.
    """

    phase: Phase
    message: About
    tx: str = ""
    repeat: bool = False
    why: str = ""


class Claim(Record, frozen=True, gc=False, omit_defaults=True, tag="claim"):
    """A claim is asked for (no message), or one delivery came of it.

    ``token`` is the receipt. ``position`` is known where the source is an ordered log. What came of
    one call has its ``asking``.
    """

    phase: Phase
    subscription: str
    token: str = ""
    message: About | None = None
    attempt: int = 1
    repeated: bool = False
    alone: bool = False
    position: str = ""
    asking: int = 0


class Start(Record, frozen=True, gc=False, omit_defaults=True, tag="start"):
    """A handler starts for one delivery; ``run`` is unlike any other start's."""

    subscription: str
    token: str
    message: About
    run: str
    attempt: int = 1
    tx: str = ""


class End(Record, frozen=True, gc=False, omit_defaults=True, tag="end"):
    """A run ended. One without an end was killed."""

    run: str
    how: How


class Effect(Record, frozen=True, gc=False, omit_defaults=True, tag="effect"):
    """A run had an effect outside any transaction, ``what``."""

    run: str
    message: About
    what: str = ""


class Reported(Record, frozen=True, gc=False, omit_defaults=True, tag="reported"):
    """Somebody reported that an effect outside the scope happened so many times."""

    message: About
    times: int
    what: str = ""


class Admit(Record, frozen=True, gc=False, omit_defaults=True, tag="admit"):
    """A transaction admitted deliveries: tokens of those that may run, and of the others.

    ``began`` is when it was begun; from then on nobody else writes where there is one writer.
    """

    tx: str
    subscription: str
    admission: str
    fresh: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    began: float | None = None


class Commit(Record, frozen=True, gc=False, omit_defaults=True, tag="commit"):
    """A transaction commits. ``fail`` also without ``invoke``: it was rolled back."""

    phase: Phase
    tx: str


class Settle(Record, frozen=True, gc=False, omit_defaults=True, tag="settle"):
    """One delivery is settled; with ``tx`` as part of that transaction.

    ``refused`` (with ``fail``): the claim was lost.
    """

    phase: Phase
    subscription: str
    token: str
    kind: Kind
    tx: str = ""
    refused: bool = False


class Fault(Record, frozen=True, gc=False, omit_defaults=True, tag="fault"):
    """A fault was brought about at ``point``, and hit; ``who`` is its victim."""

    kind: str
    point: str = ""


class Planned(Record, frozen=True, gc=False, omit_defaults=True, tag="planned"):
    """This kind of fault belongs to the run's profile: without a hit nothing is proven."""

    kind: str


class Heal(Record, frozen=True, gc=False, omit_defaults=True, tag="heal"):
    """From here on there are no faults; what is left must get done."""


class Dropped(Record, frozen=True, gc=False, omit_defaults=True, tag="dropped"):
    """An at-most-once message was given up on before it was sent, and counted."""

    message: About


# --- what the resources say in the end


class Row(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A committed row of an effect table: of which message, written by which run."""

    table: str
    message: About
    run: str = ""


class Output(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A message that stands in a broker or outbox because ``run`` published it."""

    message: About
    run: str


class Dead(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A dead letter."""

    subscription: str
    message: About
    attempts: int = 1
    error: str = ""


class Waiting(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What a subscription has before it in one topic."""

    subscription: str
    topic: str
    backlog: int = 0
    in_flight: int = 0
    parked: int = 0


class Final(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """The resources, read when everything had come to rest; never what a worker believes.

    ``log``: every message that stands in the broker, in its order. ``leaks``: sentences about
    what was left open (a transaction, an unsent outbox row, an inbox beyond its retention).
    ``one_order``: every subscription has the messages in the log's order. A broker that copies them
    to a queue for each may put what is published side by side into each in another.
    """

    log: tuple[About, ...] = ()
    rows: tuple[Row, ...] = ()
    outputs: tuple[Output, ...] = ()
    dead: tuple[Dead, ...] = ()
    waiting: tuple[Waiting, ...] = ()
    leaks: tuple[str, ...] = ()
    one_order: bool = True


class Read(Record, frozen=True, gc=False, omit_defaults=True, tag="read"):
    """The resources were read."""

    final: Final


Event = (
    Publish
    | Claim
    | Start
    | End
    | Effect
    | Reported
    | Admit
    | Commit
    | Settle
    | Fault
    | Planned
    | Heal
    | Dropped
    | Read
)


def position_of(delivery: Delivery) -> str:
    """Where a delivery stands in its log, as one text; empty where there is no such thing."""
    where = delivery.position
    return "" if where is None else f"{where.log}@{where.offset}"


# --- files


class DamagedHistory(ValueError):
    """A file holds what no recorder wrote; a torn last line is not that."""


class Recorder:
    """Appends records to a file of this process, each by one write().

    A finished record is the kernel's when `record` returns, so that the process's death loses
    none. ``clock`` must be one for all processes of the run; the default is the machine's.
    Raises OSError where the disk is full: then the history ends there.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / f"{name}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._encode = msgspec.json.Encoder().encode

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @staticmethod
    def clock() -> float:
        """Seconds that every process of this machine sees alike."""
        return time.monotonic()

    def record(self, event: Event) -> None:
        """Append one record."""
        line = self._encode(event) + b"\n"
        written = os.write(self._fd, line)
        if written != len(line):
            raise OSError(f"{self._path}: only {written} of {len(line)} bytes were written")

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def read_history(paths: Iterable[Path]) -> list[Event]:
    """All records of these files, in the order of their times.

    A last line without its end is a write that its process's death cut short: it is left out.
    Raises `DamagedHistory` for anything else that cannot be read.
    """
    events = [event for path in sorted(paths) for event in _events_of(path)]
    # Stable, so that records of one process at one moment keep their order.
    return sorted(events, key=lambda event: event.at)


_decode = msgspec.json.Decoder(Event).decode


def _events_of(path: Path) -> Sequence[Event]:
    *lines, torn = path.read_bytes().split(b"\n")
    events = []
    for number, line in enumerate(lines, 1):
        try:
            events.append(_decode(line))
        except msgspec.MsgspecError as error:
            raise DamagedHistory(f"{path}:{number}: {error}") from error
    if torn:
        # Cut short: its operation is unknown, as that of any process that died.
        with contextlib.suppress(msgspec.MsgspecError):
            events.append(_decode(torn))
    return events
