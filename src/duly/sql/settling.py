"""Settling, fencing, extending and losing claims.

Every one of these goes by the claim's token, which only grows: a token that is gone was lost to
another, whatever the message, the state or the attempt say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, assert_never

from duly.errors import TransactionLost
from duly.guarantees import Dead, Done, Release, Retry, Settlement
from duly.sql.ranges import at, runs, stream_of, within, without
from duly.sql.steps import Ask, Change, Many, Steps
from duly.sql.taking import ACCUSED, LEFT_ALONE, NOT_ALONE, SUSPECT, Lane

# What stays of it when it is given back.
_SUSPICION = {SUSPECT: SUSPECT, ACCUSED: ACCUSED, LEFT_ALONE: SUSPECT}

LogReceipt = tuple[int, int] | tuple[int, int, int]
"""(token of the claim, position of the message), or for a span (token, first, last position)"""


class _Piece(NamedTuple):
    """A contiguous range that a claim still holds."""

    claim_id: int
    subscription_no: int
    first: int
    last: int
    attempt: int
    alone: int
    repeated: int
    mark: int | None
    worker: str | None
    replays: int

    @property
    def size(self) -> int:
        return self.last - self.first + 1


def fence(receipts: Sequence[LogReceipt], mark: int) -> Steps[list[LogReceipt]]:
    """The receipts whose claims are still held; the first statement of a transaction.

    Stamps the claims with ``mark``, so that `settle` can tell whether it is still in the same
    transaction. Until that ends nobody else can take them over.
    """
    if len(receipts) == 1:
        # A span, nearly always, and all of a claim.
        [(token, *reach)] = receipts
        if (yield Change("stamp_range", (mark, token, reach[0], reach[-1]))):
            return list(receipts)
    lost: set[LogReceipt] = set()
    for token, positions in _by_token(receipts).items():
        pieces = yield Ask("stamp", (mark, token))
        held = [within(first, last, positions) for first, last in pieces]
        if sum(map(len, held)) < len(positions):
            found = {position for some in held for position in some}
            lost.update((token, position) for position in positions if position not in found)
    if not lost:
        return list(receipts)
    return [receipt for receipt in receipts if lost.isdisjoint(_singles(receipt))]


def check_stamp(mark: int) -> Steps[None]:
    """Raise `TransactionLost` where the stamp of `fence` is gone, and with it its transaction."""
    if not (yield Ask("stamped", (mark,))):
        raise TransactionLost(_LOST)


def settle(
    settlements: Sequence[Settlement],
    now_ms: int,
    mark: int | None = None,
    subscription_no: int | None = None,
) -> Steps[list[LogReceipt]]:
    """Record how deliveries ended; returns the receipts that were refused.

    ``subscription_no`` says in the incident of a refusal whose it was.

    With the ``mark`` of `fence`, part of its transaction and its last statement: raises
    `TransactionLost` when the stamp is gone, for then that transaction ended early.
    """
    receipts: list[LogReceipt] = [settlement.receipt for settlement in settlements]
    refused: list[LogReceipt] = []
    ends: dict[LogReceipt, Settlement] | None = None
    if not set(map(type, settlements)) <= {Done}:
        ends = {}
        for receipt, settlement in zip(receipts, settlements, strict=True):
            for single in _singles(receipt):
                ends.setdefault(single, settlement)  # of two for one receipt the first counts
    tokens = _by_token(receipts)
    if sum(map(len, tokens.values())) < sum([r[-1] - r[1] + 1 for r in receipts]):
        counted = Counter(single for receipt in receipts for single in _singles(receipt))
        refused = [single for single, n in counted.items() for _ in range(n - 1)]
    for token, positions in tokens.items():
        refused += yield from _settle_claim(token, positions, ends, now_ms, mark)
    if refused:
        if mark is not None:
            raise TransactionLost(_LOST)
        yield from _note_refused(refused, subscription_no, now_ms)
    return refused


_LOST = (
    "the transaction ended before its commit: a statement inside it failed and the database "
    "rolled everything back, or the handler ended it. Nothing of it was kept; let errors of "
    "statements leave the handler."
)


def _settle_claim(
    token: int,
    positions: Sequence[int],
    ends: Mapping[LogReceipt, Settlement] | None,
    now_ms: int,
    mark: int | None,
) -> Steps[list[LogReceipt]]:
    """Settle positions of one claim; without ``ends`` all of them are done."""
    if ends is None and len(positions) == positions[-1] - positions[0] + 1:
        # Nearly always: a claim of one piece, and the whole of it was handled.
        gone = yield Ask("drop_whole_claim", (token, positions[0], positions[-1], mark))
        if gone:
            [(subscription_no, anyone_behind)] = gone
            if anyone_behind:
                yield from _promote(subscription_no, positions)
            return []
    pieces = [_Piece(*row) for row in (yield Ask("pieces", (token,)))]
    # Of what is settled only: a fence stamps what it was asked for, which may be some of a claim.
    here = [
        (piece, mine) for piece in pieces if (mine := within(piece.first, piece.last, positions))
    ]
    if mark is not None and any(piece.mark != mark for piece, _ in here):
        raise TransactionLost(_LOST)
    settled = 0
    for piece, mine in here:
        settled += len(mine)
        if ends is not None:
            yield from _end_specially(piece, [(p, ends[token, p]) for p in mine], now_ms)
        # After what looks at the claim, and before what looks for others of its key.
        yield from _remove(piece, mine)
        [(anyone_behind,)] = yield Ask("anyone_behind", (piece.subscription_no,))
        if anyone_behind:
            yield from _promote(piece.subscription_no, mine)
    if settled == len(positions):
        return []
    held = {p for piece in pieces for p in within(piece.first, piece.last, positions)}
    return [(token, p) for p in positions if p not in held]


def _remove(piece: _Piece, gone: Sequence[int]) -> Steps[None]:
    """Take settled positions out of a piece: drop it, shrink it, or split it."""
    if len(gone) == piece.size:
        yield Ask("drop_claim", (piece.claim_id,))
        return
    (first, last), *others = without(piece.first, piece.last, gone)
    yield Many("split_claim", [(piece.claim_id, *other) for other in others])
    yield Ask("resize_claim", (first, last, piece.claim_id))


def _promote(subscription_no: int, settled: Sequence[int]) -> Steps[None]:
    """Let go on what waited behind the settled messages, in order by key."""
    end = at(stream_of(settled[0]) + 1, 0)
    first = yield Ask("keys_behind", (subscription_no, settled[0], settled[-1], end))
    yield Many("promote", [(subscription_no, position) for (position,) in first])


def _end_specially(
    piece: _Piece, ends: Sequence[tuple[int, Settlement]], now_ms: int
) -> Steps[None]:
    """What retried, dead and released messages become, beside leaving the claim."""
    retried: list[Retry] = []
    waiting: list[Retry] = []
    dead: list[Dead] = []
    released: dict[bool, list[int]] = {}
    for position, end in ends:
        match end:
            case Done():
                pass
            case Retry():
                (retried if end.charged else waiting).append(end)
            case Dead():
                dead.append(end)
            case Release():
                released.setdefault(end.started, []).append(position)
            case _:
                assert_never(end)
    if retried:
        yield from _park(piece, retried, now_ms)
    if waiting:
        yield from _park_unstarted(piece, waiting, now_ms)
    if dead:
        yield from _bury(piece, dead, now_ms)
    for started, positions in released.items():
        # Charged nothing: attempt and marks stay what they were.
        alone = _SUSPICION.get(piece.alone, NOT_ALONE)
        repeated = int(piece.repeated or started)
        history = (piece.attempt, alone, repeated, piece.replays)
        free = [(piece.subscription_no, *run, *history) for run in runs(positions)]
        yield Many("add_free_range", free)


def _park(piece: _Piece, retried: Sequence[Retry], now_ms: int) -> Steps[None]:
    rows = [
        (
            piece.subscription_no,
            r.receipt[1],
            now_ms + int(r.delay_s * 1000),
            piece.attempt + 1,
            r.error,
            piece.replays,
        )
        for r in retried
    ]
    yield Many("park_retry", rows)
    yield Many("note_position", [_note(piece, "retry", r, now_ms) for r in retried])


def _park_unstarted(piece: _Piece, waiting: Sequence[Retry], now_ms: int) -> Steps[None]:
    """Nobody's failure: no incident each time, and attempt and marks stay what they were."""
    history = (piece.attempt, int(piece.alone == SUSPECT), piece.repeated)
    rows = [
        (
            piece.subscription_no,
            w.receipt[1],
            now_ms + int(w.delay_s * 1000),
            *history,
            w.error,
            piece.replays,
        )
        for w in waiting
    ]
    yield Many("park_unstarted", rows)


def _bury(piece: _Piece, dead: Sequence[Dead], now_ms: int) -> Steps[None]:
    history = (piece.attempt, now_ms, piece.replays)
    rows = [(piece.subscription_no, d.receipt[1], d.error, *history) for d in dead]
    yield Many("bury", rows)
    yield Many("note_position", [_note(piece, "dead-letter", d, now_ms) for d in dead])


def _note(piece: _Piece, kind: str, end: Retry | Dead, now_ms: int) -> tuple[Any, ...]:
    detail = f"attempt {piece.attempt}: {end.error}"
    return now_ms, kind, piece.subscription_no, end.receipt[1], 1, piece.worker, detail


def _note_refused(
    refused: Sequence[LogReceipt], subscription_no: int | None, now_ms: int
) -> Steps[None]:
    detail = "settled after its claim was lost, or twice"
    rows = [
        (now_ms, "stale-settle", subscription_no, receipt[1], 1, None, detail)
        for receipt in refused
    ]
    yield Many("note_position", rows)


# --- holding ------------------------------------------------------------------------------------


def extend(receipts: Iterable[LogReceipt], lease_until_boot_ms: int) -> Steps[list[LogReceipt]]:
    """Hold the named messages until then, and no others; returns the lost.

    A piece whose row is locked is being settled, or the messages of a transaction: who looks for
    the dead passes it over, and so does this, which must not wait for a handler to end.
    """
    asked = list(receipts)
    lost: set[LogReceipt] = set()
    for token, positions in _by_token(asked).items():
        left = list(positions)
        at_rest = {claim_id for (claim_id,) in (yield Ask("pieces_at_rest", (token,)))}
        for row in (yield Ask("pieces_seen", (token,))):
            piece = _Piece(*row)
            mine = within(piece.first, piece.last, positions)
            if mine:
                if piece.claim_id in at_rest:
                    yield from _renew(piece, mine, lease_until_boot_ms)
                left = [p for p in left if not piece.first <= p <= piece.last]
        lost.update((token, p) for p in left)
    return [receipt for receipt in asked if lost and not lost.isdisjoint(_singles(receipt))]


def _renew(piece: _Piece, mine: Sequence[int], lease_until_boot_ms: int) -> Steps[None]:
    """Renew a piece; messages in it that were not named keep the lease they have."""
    if len(mine) == piece.size:
        yield Ask("renew", (lease_until_boot_ms, piece.claim_id))
        return
    (first, last), *others = runs(mine)
    # A split-off piece has the lease of the moment: first those that are not renewed.
    unnamed = without(piece.first, piece.last, mine)
    yield Many("split_claim", [(piece.claim_id, *left) for left in unnamed])
    yield Ask("renew", (lease_until_boot_ms, piece.claim_id))
    yield Many("split_claim", [(piece.claim_id, *other) for other in others])
    yield Ask("resize_claim", (first, last, piece.claim_id))


class _Held(NamedTuple):
    """A claim that somebody holds."""

    claim_id: int
    subscription_no: int
    first: int
    last: int
    attempt: int
    alone: int
    worker: str
    boot_id: str
    lease_until_boot_ms: int

    @property
    def size(self) -> int:
        return self.last - self.first + 1


def take_over(dead: Collection[str], boot_id: str, boot_ms: int, now_ms: int) -> Steps[int]:
    """Free the claims of workers that are ``dead`` and those whose lease is over, of whichever
    subscription: all that a worker held is judged at once.

    What becomes free is given out one message at a time. A death is charged to a message only
    where it was all that its worker held, claimed by itself. Alone in its claim, but not in its
    worker, it is accused: see `duly.sql.solitude`. Returns how many messages became free.
    """
    held = [_Held(*row) for row in (yield Ask("held"))]
    burden: Counter[str] = Counter()
    for claim in held:
        burden[claim.worker] += claim.size
    gone = {claim.worker for claim in held if claim.worker in dead or claim.boot_id != boot_id}
    lost = [c for c in held if c.worker in gone or c.lease_until_boot_ms <= boot_ms]
    for claim in lost:
        cause = "worker died" if claim.worker in gone else "lease ended"
        yield from _free(claim, cause, now_ms, sole=burden[claim.worker] == 1)
    for worker in {claim.worker for claim in lost} - gone:
        yield Ask("forget_alone", (worker,))
    return sum(claim.size for claim in lost)


def _free(claim: _Held, cause: str, now_ms: int, *, sole: bool) -> Steps[None]:
    charged = sole and claim.alone not in (NOT_ALONE, LEFT_ALONE)
    in_company = claim.alone in _SUSPICION and not charged
    alone = ACCUSED if in_company or claim.alone == ACCUSED else SUSPECT
    yield Ask("free_suspect", (alone, claim.attempt + charged, claim.claim_id))
    said = ", charged" if charged else ", perhaps of another message" if in_company else ""
    detail = f"attempt {claim.attempt}: its {cause}{said}"
    place = (claim.subscription_no, claim.first, claim.size, claim.worker)
    yield Many("note_position", [(now_ms, "redelivery", *place, detail)])


def holds_accused(worker: str, boot_id: str, boot_ms: int) -> Steps[bool]:
    """Whether this worker still holds a message that it runs with nothing beside it."""
    [(held,)] = yield Ask("holds_accused", (worker, boot_id, boot_ms))
    return bool(held)


def accused_waits() -> Steps[bool]:
    """Whether an accused message waits for a worker of its own, of whichever subscription."""
    [(waits,)] = yield Ask("accused_waits")
    return bool(waits)


# What a clock may be corrected by before it counts as a step.
STEP_MS = 1_000


def follow_clock(boot_id: str, offset_ms: int) -> Steps[None]:
    """Keep retries waiting as long as they were meant to when the wall clock was stepped.

    ``offset_ms`` is by how much it is ahead of the time since boot.
    """
    if (yield from is_followed(boot_id, offset_ms)):
        return
    known = yield Ask("known_offset")
    if known and known[0][0] == boot_id:
        yield Ask("shift_retries", (offset_ms - known[0][1],))
    yield Ask("put_offset", (boot_id, offset_ms))


def is_followed(boot_id: str, offset_ms: int) -> Steps[bool]:
    """Whether the retries that wait were noted by this clock."""
    known = yield Ask("known_offset")
    return bool(known) and known[0][0] == boot_id and abs(offset_ms - known[0][1]) <= STEP_MS


def release_lanes(lanes: Sequence[Lane]) -> Steps[None]:
    """Free what a closing lane holds, charging nothing."""
    for lane in lanes:
        yield Ask("free_lane", (lane.subscription_no, lane.worker, lane.lane))


def _singles(receipt: LogReceipt) -> Iterable[LogReceipt]:
    """A receipt for each message."""
    return [(receipt[0], position) for position in range(receipt[1], receipt[-1] + 1)]


def _by_token(receipts: Sequence[LogReceipt]) -> dict[int, Sequence[int]]:
    """Ascending positions of each token, each once."""
    if len(receipts) == 1:  # a span, nearly always
        [receipt] = receipts
        return {receipt[0]: range(receipt[1], receipt[-1] + 1)}
    tokens: dict[int, set[int]] = {}
    for receipt in receipts:
        tokens.setdefault(receipt[0], set()).update(range(receipt[1], receipt[-1] + 1))
    return {token: sorted(positions) for token, positions in tokens.items()}
