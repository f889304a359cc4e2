"""Messages of logs that wait for a retry in the store, behind the cursor that has passed them.

The transaction that moves the cursor past a failed message keeps it here, whole. Who takes it
holds a lease and a token that grows each time: the fence compares that, and the settlement deletes
the row, parks it again or buries it, in the transaction of the effects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, assert_never

import msgspec

from duly.broker import Delivery, LogPosition
from duly.errors import Superseded
from duly.guarantees import Dead, Done, Release, Retry, Settlement
from duly.inspection import DeadLetter
from duly.message import Message
from duly.sql import graves
from duly.sql.looking import readable
from duly.sql.ranges import within_bytes
from duly.sql.steps import Ask, Change, Each, Many, Steps
from duly.store import Admitted, ParkedReceipt, Waiting, paired
from duly.store.parking import REPLAYED

_encode_headers = msgspec.json.Encoder().encode
_encode_names = msgspec.json.Encoder().encode

_NOT_ALONE, _ALONE, _ASKED_FOR_ONE = range(3)


@dataclass(frozen=True, slots=True)
class Moment:
    """When it is: what is due goes by ``now_ms`` (since 1970 UTC), leases by ``lease_now_ms`` of
    ``clock``; None: the database's own.
    """

    now_ms: int
    lease_now_ms: int | None
    clock: str


class Wanted(NamedTuple):
    """Whose messages: a consumer's, of these topics (a JSON list of their names)."""

    consumer: str
    topics: str


def wanted(consumer: str, topics: Sequence[str]) -> Wanted:
    """Those that this consumer can handle: what others of its topics wait for is not here."""
    return Wanted(consumer, _encode_names(list(topics)).decode())


# --- parking, in the transaction that moves the cursor


def park(
    consumer: str, parked: Sequence[tuple[Retry, Delivery, LogPosition]], now_ms: int
) -> Steps[None]:
    """Keep what failed, whole: the cursor passes it."""
    yield Many(
        "log_park",
        [
            (
                *_message_row(consumer, delivery, position),
                *(retry.error, _charged(retry, delivery), delivery.replays),
                *(_repeated(retry, delivery), now_ms, now_ms + int(retry.delay_s * 1000)),
            )
            for retry, delivery, position in parked
        ],
    )


def _charged(retry: Retry, delivery: Delivery) -> int:
    return delivery.attempt - (not retry.charged)


def _repeated(retry: Retry, delivery: Delivery) -> int:
    return int(retry.charged or delivery.repeated)


def _message_row(consumer: str, delivery: Delivery, at: LogPosition) -> tuple[Any, ...]:
    return (consumer, at.log, at.offset, at.epoch, *_columns(delivery.message))


def _columns(m: Message[Any]) -> tuple[Any, ...]:
    headers = _encode_headers(dict(m.headers)).decode() if m.headers else None
    return (m.topic, m.source, m.id, m.key, m.time_ms, headers, m.due_ms, m.body)


# --- taking


def take(
    whose: Wanted, limit: int, max_bytes: int, lease_ms: int, at: Moment
) -> Steps[list[Delivery]]:
    """Some that are due and nobody has: a suspect alone, or a batch of others."""
    when = (at.now_ms, at.lease_now_ms, at.clock)
    rows = yield Ask("log_parked_due", (*whose, *when, limit))
    if not rows:
        # Perhaps the clock was set back since it was noted when they are due.
        yield Change("log_parked_follow_clock", (*whose, at.now_ms))
        rows = yield Ask("log_parked_due", (*whose, *when, limit))
    found = [_Due.of(*row) for row in rows][:limit]
    if not found:
        return []
    if found[0].suspect:
        taken = [found[0]]
        kind = _ALONE
    else:
        sound = next((n for n, each in enumerate(found) if each.suspect), len(found))
        sizes = [(n, each.size) for n, each in enumerate(found[:sound])]
        taken = [found[n] for n in within_bytes(sizes, max_bytes)]
        kind = _ASKED_FOR_ONE if limit == 1 else _NOT_ALONE
    yield Many(
        "log_parked_take",
        [
            (
                *(each.attempts + (kind == _ALONE), int(each.suspect), kind, each.repeated),
                *(at.lease_now_ms, lease_ms, at.clock, each.number),
            )
            for each in taken
        ],
    )
    messages = yield Each("log_parked_message", [(each.number,) for each in taken])
    return [
        each.delivery(row, alone=kind == _ALONE)
        for each, row in zip(taken, messages, strict=True)
        if row is not None
    ]


class _Due(NamedTuple):
    """One that may be taken, with what its last lease has come to."""

    number: int
    token: int
    attempts: int
    suspect: bool
    repeated: int
    size: int

    @classmethod
    def of(
        cls,
        number: int,
        token: int,
        attempts: int,
        suspect: int,
        kind: int,
        repeated: int,
        until_ms: int,
        size: int,
    ) -> _Due:
        """Whoever had it has let the lease end: charged where nothing else can be the cause. One
        that was alone has been charged before its start.
        """
        lost = until_ms > 0
        charged = attempts + (lost and kind == _ASKED_FOR_ONE)
        return cls(number, token, charged, bool(suspect) or lost, int(repeated or lost), size)

    def delivery(self, row: Sequence[Any], *, alone: bool) -> Delivery:
        log, offset, epoch, replays, topic, *message = row
        return Delivery(
            readable(topic, message),
            ParkedReceipt(self.number, self.token + 1),
            self.attempts + 1,
            bool(self.repeated),
            alone,
            LogPosition(log, offset, epoch),
            replays,
        )


def next_ms(whose: Wanted, at: Moment) -> Steps[int | None]:
    """In how many milliseconds something may be taken."""
    [found] = yield Ask("log_parked_next", (*whose, at.now_ms, at.lease_now_ms, at.clock))
    return min((ms for ms in found if ms is not None), default=None)


def extend(
    receipts: Sequence[ParkedReceipt], lease_ms: int, at: Moment
) -> Steps[list[ParkedReceipt]]:
    """Hold these for longer; returns the lost. What a transaction has fenced is not lost."""
    rows = [(at.lease_now_ms, lease_ms, at.clock, each.number, each.token) for each in receipts]
    yield Many("log_parked_extend", rows)
    return (yield from _lost(receipts))


def _lost(receipts: Sequence[ParkedReceipt]) -> Steps[list[ParkedReceipt]]:
    held = yield Each("log_parked_is_held", [(each.number, each.token) for each in receipts])
    return [each for each, row in zip(receipts, held, strict=True) if row is None]


def give_back(releases: Sequence[Release]) -> Steps[list[ParkedReceipt]]:
    """Nobody has these any more, uncharged; returns the refused."""
    refused = yield from _lost([release.receipt for release in releases])
    rows = [(int(each.started), each.receipt.number, each.receipt.token) for each in releases]
    yield Many("log_parked_give_back", rows)
    return refused


# --- one transaction: fence and settlement


def fence(consumer: str, deliveries: Sequence[Delivery]) -> Steps[Admitted]:
    """Lock the rows and compare their tokens. Raises `Superseded` where one was lost."""
    tokens = sorted((each.receipt.number, each.receipt.token) for each in deliveries)
    held = yield Many("log_parked_fence", tokens)
    _see_all(consumer, held, tokens)
    return Admitted(deliveries)


def settle(
    consumer: str,
    settlements: Sequence[Settlement],
    deliveries: Sequence[Delivery],
    now_ms: int,
    *,
    buries: bool,
) -> Steps[None]:
    """End what is done or dead, park again what failed; the last statement.

    ``buries``: the dead are the store's to show, too. Raises `Superseded`.
    """
    ended: list[tuple[int, int]] = []
    again: list[tuple[Any, ...]] = []
    dead: list[tuple[Dead, Delivery]] = []
    for settlement, delivery in paired(settlements, deliveries):
        receipt: ParkedReceipt = delivery.receipt
        token = (receipt.number, receipt.token)
        match settlement:
            case Done():
                ended.append(token)
            case Dead():
                ended.append(token)
                dead.append((settlement, delivery))
            case Retry():
                again.append(
                    (
                        *(settlement.error, _charged(settlement, delivery)),
                        _repeated(settlement, delivery),
                        int(delivery.alone and not settlement.charged),
                        *(now_ms, now_ms + int(settlement.delay_s * 1000), *token),
                    )
                )
            case Release():
                pass  # its lease goes on, until the worker gives it back
            case _:
                assert_never(settlement)
    if ended:
        _see_all(consumer, (yield Many("log_parked_end", ended)), ended)
    if again:
        _see_all(consumer, (yield Many("log_parked_again", again)), again)
    if dead:
        yield from _bury(consumer, dead, now_ms, buries=buries)


def _bury(
    consumer: str, dead: Sequence[tuple[Dead, Delivery]], now_ms: int, *, buries: bool
) -> Steps[None]:
    rows = []
    for settlement, delivery in dead:
        assert delivery.position is not None, "taken with the one it was parked with"
        row = _message_row(consumer, delivery, delivery.position)
        rows.append((*row, settlement.error, delivery.attempt, now_ms))
    yield Many("bury_of_log", rows)
    if buries:
        yield from graves.bury([letter_of(consumer, *each, now_ms) for each in dead])


def letter_of(consumer: str, dead: Dead, delivery: Delivery, now_ms: int) -> DeadLetter:
    """What people are shown of one that was given up on."""
    return DeadLetter(
        consumer, delivery.message, dead.error, delivery.attempt, now_ms, replays=delivery.replays
    )


def _see_all(consumer: str, changed: int, rows: Sequence[Any]) -> None:
    if changed < len(rows):
        raise Superseded(
            f"consumer {consumer!r}: {len(rows) - changed} of {len(rows)} parked messages were "
            "lost to another worker, or removed by a person; nothing was committed"
        )


# --- what people see and do


def waiting() -> Steps[list[Waiting]]:
    """How much there is."""
    return [Waiting(*row) for row in (yield Ask("log_parked_count"))]


def replay(letters: Sequence[DeadLetter], now_ms: int) -> Steps[list[DeadLetter]]:
    """From the graveyard back to what waits, due at once; returns those that were not there."""
    missing = yield from graves.remove(letters)
    yield from bring_back([each for each in letters if each not in missing], now_ms)
    return missing


def bring_back(letters: Iterable[DeadLetter], now_ms: int) -> Steps[None]:
    """Park these, due at once, as if for the first time. What is known of their deaths goes: a
    delivery of the log below the cursor is a repeat again.
    """
    rows, dead = [], []
    for each in letters:
        m = each.message
        rows.append(
            (
                *(each.subscription, REPLAYED.log, REPLAYED.offset, REPLAYED.epoch, *_columns(m)),
                *(each.error, 0, each.replays + 1, 0, now_ms, now_ms),
            )
        )
        dead.append((each.subscription, m.topic, m.source, m.id))
    yield Many("log_park", rows)
    yield Many("log_dead_forget", dead)


class SQLParked:
    """See `duly.store.Parked`. ``moment`` tells the time, and whose leases it is of."""

    def __init__(self, database: graves.Database, moment: Callable[[], Moment]) -> None:
        self._database = database
        self._moment = moment

    def take(
        self, consumer: str, topics: Sequence[str], limit: int, max_bytes: int, lease_s: float
    ) -> Sequence[Delivery]:
        """As `Parked.take`."""
        whose, at = wanted(consumer, topics), self._moment()
        lease_ms = int(lease_s * 1000)
        return self._database.write(lambda: take(whose, limit, max_bytes, lease_ms, at))

    def next_s(self, consumer: str, topics: Sequence[str]) -> float | None:
        """As `Parked.next_s`."""
        whose, at = wanted(consumer, topics), self._moment()
        found = self._database.read(lambda: next_ms(whose, at))
        return None if found is None else found / 1000

    def extend(self, receipts: Sequence[ParkedReceipt], lease_s: float) -> Sequence[ParkedReceipt]:
        """As `Parked.extend`."""
        at, lease_ms = self._moment(), int(lease_s * 1000)
        return self._database.write(lambda: extend(receipts, lease_ms, at)) if receipts else []

    def give_back(self, releases: Sequence[Release]) -> Sequence[ParkedReceipt]:
        """As `Parked.give_back`."""
        return self._database.write(lambda: give_back(releases)) if releases else []

    def waiting(self) -> Sequence[Waiting]:
        """As `Parked.waiting`."""
        return self._database.read(waiting)

    def replay(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """As `Parked.replay`."""
        at = self._moment()
        return self._database.write(lambda: replay(letters, at.now_ms)) if letters else []

    def bring_back(self, letters: Sequence[DeadLetter]) -> None:
        """As `Parked.bring_back`."""
        at = self._moment()
        if letters:
            self._database.write(lambda: bring_back(letters, at.now_ms))
