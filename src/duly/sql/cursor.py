"""Admission by cursor: how far each ordered log has taken effect, compared and set.

What lies below the cursor has taken effect, or is parked in the store (`duly.sql.parking`). Whoever
read a cursor that another has moved since changes nothing and commits nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from duly.broker import Delivery, LogPosition, Span, Stretch
from duly.errors import BrokerUnusable, ConfigurationError, Superseded
from duly.guarantees import Dead, Done, Retry, Settlement
from duly.sql import parking
from duly.sql.steps import Ask, Many, Steps
from duly.store import Admitted, Scope, are_parked, paired

_encode_headers = msgspec.json.Encoder().encode


class Cursor(NamedTuple):
    """The next offset to take effect, and the epoch of the one before it."""

    next_offset: int
    epoch: int


@dataclass(slots=True)
class Reached:
    """One transaction's view of a log: what it read, and what of it was admitted in order."""

    read: Cursor
    admitted: list[int] = field(default_factory=list)
    next_offset: int = 0


# Before every offset and every epoch.
_NOTHING_YET = Cursor(0, -1)

Logs = dict[str, Reached]
"""By name of the log, the memory of one transaction between `admit` and `settle`."""


def admit(consumer: str, logs: Logs, deliveries: Sequence[Delivery]) -> Steps[Admitted]:
    """Those below the cursor have taken effect; the others may run. So may what was parked, where
    its lease was not lost.

    Raises `BrokerUnusable` where the log is not the one that the cursor was kept for, and
    `Superseded`.
    """
    if are_parked(deliveries):
        return (yield from parking.fence(consumer, deliveries))
    stretches = deliveries.stretches if isinstance(deliveries, Span) else ()
    if stretches and (yield from _admit_whole(consumer, logs, stretches)):
        return Admitted(deliveries)
    fresh: list[Delivery] = []
    repeated: list[Delivery] = []
    dead: list[Delivery] = []
    for delivery in deliveries:
        position = _position(delivery)
        log = logs.get(position.log)
        if log is None:
            log = logs[position.log] = yield from _read(consumer, position.log)
        _check_history(consumer, position, log.read)
        if position.offset < log.next_offset:
            # Replayed, it would change the order of the log: it has no effect.
            gave_up = not delivery.replays and (yield from _gave_up(consumer, position))
            (dead if gave_up else repeated).append(delivery)
        else:
            fresh.append(delivery)
            log.admitted.append(position.offset)
            log.next_offset = position.offset + 1
    return Admitted(fresh, repeated, dead=dead)


def _admit_whole(consumer: str, logs: Logs, stretches: Sequence[Stretch]) -> Steps[bool]:
    """Admit all of a span, where none of it has taken effect; otherwise nothing of it."""
    for each in stretches:
        if each.log not in logs:
            logs[each.log] = yield from _read(consumer, each.log)
        log = logs[each.log]
        _check_history(
            consumer, LogPosition(each.log, each.offsets[0], each.epoch, each.end), log.read
        )
        if each.offsets[0] < log.next_offset:
            return False
    for each in stretches:
        log = logs[each.log]
        log.admitted += each.offsets
        log.next_offset = each.offsets[-1] + 1
    return True


def _gave_up(consumer: str, position: LogPosition) -> Steps[bool]:
    return bool((yield Ask("is_dead_of_log", (consumer, position.log, position.offset))))


def _read(consumer: str, log: str) -> Steps[Reached]:
    rows = yield Ask("log_cursor", (consumer, log))
    if not rows:
        # Something to lock, where transactions run side by side: a second copy waits for it.
        rows = yield Ask("open_log_cursor", (consumer, log, *_NOTHING_YET))
    cursor = Cursor(*rows[0])
    return Reached(cursor, next_offset=cursor.next_offset)


def _check_history(consumer: str, position: LogPosition, cursor: Cursor) -> None:
    """Refuse a log that lost or rewrote what had taken effect: its new messages would be
    passed off as old.
    """
    ahead = position.offset >= cursor.next_offset
    if position.end is not None and cursor.next_offset > position.end:
        what = f"the cursor stands at {cursor.next_offset}, beyond the log's end {position.end}"
    elif ahead and position.epoch < cursor.epoch:
        what = (
            f"offset {position.offset} is of epoch {position.epoch}, and epoch {cursor.epoch} "
            "has taken effect before it"
        )
    elif not ahead and position.epoch > cursor.epoch:
        what = (
            f"offset {position.offset}, below the cursor at {cursor.next_offset}, was written "
            f"anew in epoch {position.epoch}"
        )
    else:
        return
    raise BrokerUnusable(
        f"consumer {consumer!r}, log {position.log!r}: {what}. The log lost messages that had "
        "taken effect, or is another one. Nothing was run; find out what it holds before you "
        "remove the cursor (in duly's table of log cursors)."
    )


def settle(
    scope: Scope,
    logs: Logs,
    settlements: Sequence[Settlement],
    deliveries: Sequence[Delivery],
    now_ms: int,
) -> Steps[None]:
    """Move the cursors past what is done, dead or parked, and keep the dead and the parked; the
    last statement.

    Only a prefix of what was admitted of each log can be settled: anything else would skip
    messages or run them again, and is a ValueError. Raises `Superseded` where another
    transaction moved a cursor.
    """
    consumer = scope.consumer
    if are_parked(deliveries):
        yield from parking.settle(consumer, settlements, deliveries, now_ms, buries=scope.buries)
        return
    moved: dict[str, Cursor] = {}
    due = {name: iter(log.admitted) for name, log in logs.items()}
    dead: list[tuple[object, ...]] = []
    parked: list[tuple[Retry, Delivery, LogPosition]] = []
    if (whole := _all_done(settlements, deliveries, logs)) is not None:
        moved, deliveries, settlements = whole, (), ()
    for settlement, delivery in paired(settlements, deliveries):
        position = _position(delivery)
        log = logs[position.log]
        if position.offset < log.read.next_offset:
            continue
        parks = scope.parks and isinstance(settlement, Retry)
        if not (parks or isinstance(settlement, Done | Dead)):
            due[position.log] = iter(())  # nothing of this log may pass what is not done
            continue
        if next(due[position.log], None) != position.offset:
            raise ValueError(
                f"log {position.log!r}: offset {position.offset} cannot be settled, one before "
                "it is not done: by cursor, settlements cover a prefix"
            )
        moved[position.log] = Cursor(position.offset + 1, position.epoch)
        if isinstance(settlement, Dead):
            dead.append(_dead_row(consumer, settlement, delivery, position, now_ms))
        elif isinstance(settlement, Retry):
            parked.append((settlement, delivery, position))
    for name, cursor in moved.items():
        yield from _move(consumer, name, logs[name].read, cursor)
    if dead:
        yield Many("bury_of_log", dead)
    if parked:
        yield from parking.park(consumer, parked, now_ms)


def _all_done(
    settlements: Sequence[Settlement], deliveries: Sequence[Delivery], logs: Logs
) -> dict[str, Cursor] | None:
    """Where the cursors go if a span was admitted as a whole, and this first part of it is done;
    None: each has to be looked at.
    """
    if not isinstance(deliveries, Span) or not all(isinstance(s, Done) for s in settlements):
        return None
    ends: dict[str, list[int]] = {}
    moved: dict[str, Cursor] = {}
    for each in deliveries.stretches:
        ends.setdefault(each.log, []).extend(each.offsets)
        moved[each.log] = Cursor(each.offsets[-1] + 1, each.epoch)
    in_order = all(logs[log].admitted[: len(ended)] == ended for log, ended in ends.items())
    return moved if moved and in_order else None


def _move(consumer: str, log: str, read: Cursor, to: Cursor) -> Steps[None]:
    changed = yield Ask("move_log_cursor", (*to, consumer, log, *read))
    if not changed:
        raise Superseded(
            f"consumer {consumer!r}: the cursor of log {log!r} was moved by another worker; "
            "nothing was committed"
        )


def _dead_row(
    consumer: str, dead: Dead, delivery: Delivery, position: LogPosition, now_ms: int
) -> tuple[object, ...]:
    m = delivery.message
    return (
        *(consumer, position.log, position.offset, position.epoch),
        *(m.topic, m.source, m.id, m.key, m.time_ms),
        _encode_headers(dict(m.headers)).decode() if m.headers else None,
        *(m.due_ms, m.body, dead.error, delivery.attempt, now_ms),
    )


def _position(delivery: Delivery) -> LogPosition:
    if delivery.position is None:
        raise ConfigurationError(
            f"message {delivery.message.id!r} has no position in a log: admission by cursor "
            "needs a broker that is one"
        )
    return delivery.position
