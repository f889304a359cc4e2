"""Subscriptions held back, taken back to an earlier message, or removed, by people.

What is long comes in pieces. A rewind or a removal takes hold in one short transaction, from
which on nobody claims; `tidy` then removes what it superseded, some rows at a time, and a crash
in between leaves a subscription that waits for the rest and loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from duly.errors import BrokerUnusable, ConfigurationError
from duly.inspection.steering import REMOVING, REWINDING, Steered, Target
from duly.sql.ranges import at, stream_of, within_bytes
from duly.sql.steps import Ask, Many, Steps

# A dead letter may be as large as a body may be; everything else is some bytes.
_DEAD_AT_ONCE = 50
_BYTES_AT_ONCE = 4 * 1024 * 1024


def held_back() -> Steps[Mapping[int, str | None]]:
    """The numbers of subscriptions from which nothing is claimed, and what is under way."""
    return dict((yield Ask("held_back")))


def is_paused(numbers: Sequence[int]) -> Steps[bool]:
    """Whether one of these subscriptions is held back. Raises `BrokerUnusable` where one is gone.

    A worker whose subscription was removed must not make it anew by itself: that would run
    everything that is kept once more.
    """
    held = yield from held_back()
    for number in numbers:
        if number in held and held[number] not in (None, REWINDING):
            raise BrokerUnusable(
                "this subscription was removed (duly drop) while this worker runs, and nothing "
                "is claimed any more. Stop this worker; one that is started anew makes the "
                "subscription again, from its consumer's start on."
            )
    return any(number in held for number in numbers)


def steered() -> Steps[list[Steered]]:
    """What people have done to subscriptions that holds them back now."""
    rows = yield Ask("steered")
    return [Steered(name.partition("#")[0], *rest) for name, *rest in rows]


def recorded() -> Steps[Mapping[str, str]]:
    """Every subscription by name, with the guarantee it was made with."""
    return dict((yield Ask("recorded_guarantees")))


def pause(name: str, now_ms: int) -> Steps[bool]:
    """Let nothing be claimed from now on; whether it was not paused already."""
    yield from _numbers(name)
    changed: bool = (yield Many("pause", [(name, now_ms)])) > 0
    if changed:
        yield from _note("paused", name, "", now_ms)
    return changed


def resume(name: str, now_ms: int) -> Steps[bool]:
    """Let it be claimed again; whether it was paused. Raises `ConfigurationError` where a rewind
    was not finished.
    """
    yield from _numbers(name)
    if (yield from _under(name)) == REWINDING:
        raise ConfigurationError(
            f"subscription {name!r}: a rewind of it was not finished, and what it removed would "
            "be lost. Run the same rewind again; it goes on where it ended."
        )
    changed: bool = (yield Many("resume", [(name,)])) > 0
    if changed:
        yield from _note("resumed", name, "", now_ms)
    return changed


# --- taking back


def targets(name: str, to: datetime | int | None) -> Steps[list[Target]]:
    """Where a rewind would begin in each stream that it moves; only reads.

    ``to`` is the time a message was made, a position, or None: the oldest that is kept.
    Raises `ConfigurationError` where a position is none of the subscription's.
    """
    found: list[Target] = []
    streams = yield Ask("cursors_of", (name,))
    if isinstance(to, int) and stream_of(to) not in {stream for _, stream, _ in streams}:
        raise ConfigurationError(
            f"subscription {name!r}: position {to} is in none of its topics; duly trace and duly "
            "tail show positions"
        )
    for topic, stream, next_seq in streams:
        first, end = at(stream, 0), at(stream, next_seq)
        since_ms = -(1 << 62)
        if isinstance(to, int):
            if stream != stream_of(to):
                continue
            first = to
        elif to is not None:
            since_ms = int(to.timestamp() * 1000)
        rows = yield Ask("first_position", (first, end - 1, since_ms))
        dead = yield Ask("first_dead", (name, first, end - 1, since_ms))
        begins = [position for (position,) in (*rows, *dead) if position is not None]
        if begins:
            start = min(begins)
            [(count,)] = yield Ask("count_kept", (start, end - 1))
            [(lost,)] = yield Ask("count_dead_only", (name, start, end - 1))
            found.append(Target(topic, start, count + lost))
    return found


def begin_rewind(
    name: str, wanted: Sequence[Target], epoch: str | None, now_ms: int, *, quiet: bool
) -> Steps[bool]:
    """Hold the subscription until `finish`; whether it is to be taken back.

    False where this epoch was begun before and finished. With ``quiet``, raises
    `ConfigurationError` unless it is paused and nothing of it is claimed. Ended between this and
    `take_back` it waits, and the same again goes on.
    """
    numbers = yield from _numbers(name)
    under = yield from _under(name)
    if epoch is not None:
        begun = yield Ask("find_epoch", (name, epoch))
        if begun and under != REWINDING:
            return False
        yield Ask("add_epoch", (name, epoch, now_ms))
    if quiet and under != REWINDING:
        yield from _require_quiet(name, numbers)
    yield Ask("hold_for", (name, REWINDING, now_ms))
    said = "" if epoch is None else f"; epoch {epoch}"
    yield from _note("rewound", name, f"to {_places(wanted)}{said}", now_ms)
    return True


def take_back(name: str, wanted: Sequence[Target]) -> Steps[None]:
    """Take the cursors back, of a subscription that is held by `begin_rewind`.

    Claims on what comes again are gone with it: who holds one can settle nothing of it, nor
    commit. Raises `ConfigurationError` where it is held no more: another person's rewind, begun
    at the same time, has let it go. It is worked again by now, and nobody would tidy up.
    """
    numbers = yield from _numbers(name)
    if (yield from _under(name)) != REWINDING:
        raise ConfigurationError(
            f"subscription {name!r}: another rewind of it was under way and has ended, so that "
            "this one took nothing back. Where that is still wanted run it again, an exactly-once "
            "one with the name of a further epoch."
        )
    for target in wanted:
        position = int(target.position)
        stream, end = stream_of(position), at(stream_of(position) + 1, 0)
        for number in numbers:
            yield Ask("take_back_cursor", (position - at(stream, 0), number, stream))
            yield Ask("cut_claims", (position, number, end))
            yield Ask("drop_held_claims", (number, position, end))


def _places(wanted: Sequence[Target]) -> str:
    return ", ".join(f"{target.topic} {target.position}" for target in wanted) or "nothing"


def _require_quiet(name: str, numbers: Sequence[int]) -> Steps[None]:
    [(paused,)] = yield Ask("is_paused", (name,))
    claimed = 0
    for number in numbers:
        [(count,)] = yield Ask("count_claimed", (number,))
        claimed += count
    if not paused or claimed:
        state = f"{claimed:,} messages of it are claimed" if paused else "it is not paused"
        raise ConfigurationError(
            f"subscription {name!r}: {state}. Its effects live in another database, where no "
            "claim is seen, so nobody may be at work on it: pause it, and rewind it once "
            "nothing is in flight (duly status)."
        )


def finish(name: str) -> Steps[None]:
    """Let a rewound subscription go. Raises `ConfigurationError` while `tidy` is not done."""
    for number in (yield from _numbers(name)):
        [(left,)] = yield Ask("superseded", (number,))
        if left:
            raise ConfigurationError(f"subscription {name!r}: what it left behind is still there")
    yield Ask("let_go", (name,))
    yield Ask("let_go_unpaused", (name,))


# --- removing


def drop(name: str, now_ms: int) -> Steps[bool]:
    """Remove a subscription: from now on it is unknown; whether it was there.

    Its number keeps a row, so that no other subscription ever gets it: a worker that still goes
    by it finds out instead of working what is another's.
    """
    numbers = [number for _, number, _ in (yield Ask("find_subscription", (name,)))]
    if not numbers:
        return False
    for number in numbers:
        yield Ask("drop_cursors", (number,))
    yield Ask("let_go_for_good", (name,))
    yield Ask("bury_name", (name, REMOVING, now_ms))
    yield Ask("rename_dropped", (name,))
    yield from _note("removed", name, "", now_ms)
    return True


# --- what is left behind


def tidy(name: str, limit: int, now_ms: int) -> Steps[int]:
    """Remove up to ``limit`` rows of what a rewind or a removal superseded; 0: none is left."""
    removed = 0
    for number, under in (yield Ask("to_tidy", (name,))):
        done = yield from _tidy(number, under == REMOVING, limit - removed, now_ms)
        if done == 0 and under == REMOVING:
            yield Ask("is_removed", (number,))
        removed += done
        if removed >= limit:
            break
    return removed


def _tidy(number: int, everything: bool, limit: int, now_ms: int) -> Steps[int]:
    beyond = "" if everything else "_beyond"
    removed: int = yield Many(f"tidy_claims{beyond}", [(number, limit)])
    if removed < limit:
        removed += yield Many(f"tidy_parked{beyond}", [(number, limit - removed)])
    if removed < limit:
        some = min(limit - removed, _DEAD_AT_ONCE)
        sizes = yield Ask(f"tidy_dead{beyond}", (number, some))
        rows = [(dead,) for dead in within_bytes(sizes, _BYTES_AT_ONCE)]
        if rows and not everything:
            # They come again, from their copies where the log has forgotten them.
            yield Many("restore", rows)
            detail = "rewound; had been given up on at attempt "
            yield Many("note_dead", [(dead, now_ms, "rewound", detail) for (dead,) in rows])
        yield Many("exhume", rows)
        removed += len(rows)
    return removed


def _numbers(name: str) -> Steps[list[int]]:
    """The subscription's numbers, one for each topic. Raises `ConfigurationError`."""
    rows: list[tuple[Any, ...]] = yield Ask("find_subscription", (name,))
    if not rows:
        there = ", ".join(sorted((yield from recorded()))) or "none"
        raise ConfigurationError(f"there is no subscription {name!r} here; there are: {there}")
    return [number for _, number, _ in rows]


def _under(name: str) -> Steps[str | None]:
    rows = yield Ask("under_way", (name,))
    return rows[0][0] if rows else None


def _note(kind: str, name: str, detail: str, now_ms: int) -> Steps[None]:
    row = (now_ms, kind, None, name, None, None, None, 1, None, detail or f"{kind} by a person")
    yield Ask("note", row)
