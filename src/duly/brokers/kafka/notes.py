"""`Notes`: what is committed beside a position, in the text that Kafka keeps with it.

A position says that all before it is settled. What else has to outlive the process is about the
few messages behind it: which of them are settled already, how many starts are charged to one, when
one may be tried again, and how far somebody may have started them. Kafka keeps 4,096 bytes of text
with each position (``offset.metadata.max.bytes``), written together with it.

``{"v":1,"t":topic,"x":owner,"s":suspects,"f":since,"r":repeated,"d":done,
"n":[[offset,charged,repeated,due_ms],...],"m":packed,"b":due_ms,"w":written_ms}``

``t`` is the id of the topic: made anew, it has another. ``x`` is who commits by transactions, and
may have one open (`duly.brokers.kafka.producers`). Offsets are counted from the position.
``s`` and ``r`` are ends: what stands before them may have
been started by somebody who died, or handed over. With ``f``, which is one more than the first of
them, nobody can have died with what stands before that: suspects came in parts
(`duly.brokers.kafka.suspects`). ``d`` is a bitmap in base64, lowest bit first.
``w`` is when it was written, by the clock that the times are of: whose clock was set meanwhile lets
nothing wait for longer than it had to then.

What would be longer than Kafka takes says ``m`` in place of ``n``: the same as numbers of seven
bits a byte, in base64, each offset counted from the one before, and the times in tenths of a second
from ``b`` on. That is room for over 400 messages, beside the largest bitmap. Of still more the
attempts of those are left out that were tried least: they are told to have been tried, by ``r``.
"""

from __future__ import annotations

import base64
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from duly.brokers.kafka.extent import START, Extent

REACH = 8192
"""So far behind the position messages are claimed: their bitmap takes a third of the text."""

MOST = 80
"""Of so many messages something is noted; nothing behind them is claimed until it is fewer. What
was claimed before may come to it all the same.
"""

MOST_BYTES = 4096
"""So long a text every broker takes (``offset.metadata.max.bytes``)."""

# A time is noted in such steps where there are many.
_STEP_MS = 100


class Known(msgspec.Struct, frozen=True, gc=False):
    """What is known of one message that comes again. ``due_ms`` is a wall clock's; 0: at once."""

    charged: int = 0
    repeated: bool = False
    due_ms: int = 0


@dataclass(slots=True)
class Notes:
    """Of one partition, by offset. ``suspects`` and ``repeated`` are the first offset that is not
    any more; ``since`` is the first that is suspect. ``owner``: see `duly.brokers.kafka.producers`.
    ``written_ms``: by the clock of times.
    """

    topic: str = ""
    suspects: int = 0
    repeated: int = 0
    done: set[int] = field(default_factory=set)
    known: dict[int, Known] = field(default_factory=dict)
    owner: str = ""
    written_ms: int = 0
    since: int = START

    @property
    def extent(self) -> Extent:
        """What somebody may have died with."""
        return Extent(self.since, self.suspects)

    @property
    def known_to(self) -> int:
        """From here on nothing is said of any."""
        ends = (self.suspects, self.repeated, max(self.done, default=-1) + 1)
        return max(*ends, max(self.known, default=-1) + 1)

    def from_now(self, first: int, wall_ms: int) -> dict[int, Known]:
        """What is known of those from this offset on, by the clock that there is now."""
        found: dict[int, Known] = {}
        for offset, each in self.known.items():
            if offset >= first:
                left_ms = self.left_ms(each.due_ms, wall_ms)
                due_ms = wall_ms + left_ms if left_ms else 0
                found[offset] = Known(each.charged, each.repeated, due_ms)
        return found

    def left_ms(self, due_ms: int, wall_ms: int) -> int:
        """How long something has to wait that is due then."""
        left = due_ms - wall_ms
        return max(0, min(left, due_ms - self.written_ms) if self.written_ms else left)


@dataclass(frozen=True, slots=True)
class Foretold:
    """What would be committed, and where it would announce what may be started. ``doubts``: see
    `Telling`.
    """

    position: int
    notes: Notes
    announced: Extent
    doubts: int = 0


class _Text(msgspec.Struct, omit_defaults=True):
    v: int = 0
    t: str = ""
    x: str = ""
    s: int = 0
    f: int = 0
    r: int = 0
    d: str = ""
    n: list[tuple[int, int, int, int]] = []
    m: str = ""
    b: int = 0
    w: int = 0


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Text).decode


def as_text(notes: Notes, position: int) -> str:
    """What is committed beside a position: at most `MOST_BYTES`."""
    text = _text(notes, position)
    text.n = [
        (offset - position, known.charged, int(known.repeated), known.due_ms)
        for offset, known in notes.known.items()
    ]
    written = _encode(text)
    return (written if len(written) <= MOST_BYTES else _shortened(notes, position)).decode()


def _text(notes: Notes, position: int) -> _Text:
    return _Text(
        v=1,
        t=notes.topic,
        x=notes.owner,
        s=max(0, notes.suspects - position),
        f=max(0, notes.since - position) + 1 if START < notes.since < notes.suspects else 0,
        r=max(0, notes.repeated - position),
        d=_bitmap(offset - position for offset in notes.done),
        w=notes.written_ms if any(known.due_ms for known in notes.known.values()) else 0,
    )


def _shortened(notes: Notes, position: int) -> bytes:
    """As much as there is room for, of those first that were tried most."""
    ranked = sorted(notes.known, key=lambda offset: (-notes.known[offset].charged, offset))

    def keeping(count: int) -> bytes:
        return _packed_text(notes, position, ranked[:count], ranked[count:])

    most = min(len(ranked), MOST_BYTES // 4)  # each takes four bytes or more
    if len(whole := keeping(most)) <= MOST_BYTES:
        return whole
    return keeping(bisect_right(range(most), MOST_BYTES, key=lambda n: len(keeping(n))) - 1)


def _packed_text(
    notes: Notes, position: int, kept: Sequence[int], left_out: Sequence[int]
) -> bytes:
    repeated = max([notes.repeated, *(offset + 1 for offset in left_out)])
    text = _text(replace(notes, repeated=repeated), position)
    known = {offset - position: notes.known[offset] for offset in sorted(kept)}
    text.b = min((each.due_ms for each in known.values() if each.due_ms), default=0)
    text.m = base64.b64encode(bytes(_packed(known, text.b))).decode()
    return _encode(text)


def _packed(known: Mapping[int, Known], base_ms: int) -> Iterator[int]:
    last = 0
    for offset, each in known.items():
        steps = 1 + -(-(each.due_ms - base_ms) // _STEP_MS) if each.due_ms else 0
        for number in (offset - last, each.charged << 1 | each.repeated, steps):
            left = number
            while left > 127:
                yield left & 127 | 128
                left >>= 7
            yield left
        last = offset


def _unpacked(packed: bytes, base_ms: int) -> Iterator[tuple[int, Known]]:
    numbers: list[int] = []
    number = shift = 0
    for byte in packed:
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            numbers.append(number)
            number = shift = 0
    offset = 0
    for ahead, tried, steps in zip(*[iter(numbers)] * 3, strict=True):
        offset += ahead
        due_ms = base_ms + (steps - 1) * _STEP_MS if steps else 0
        yield offset, Known(tried >> 1, bool(tried & 1), due_ms)


def in_text(text: str | None, position: int) -> Notes:
    """What somebody committed beside a position; nothing, where that was no duly."""
    try:
        read = _decode(text or "{}")
        done = {position + bit for bit in _bits(read.d)}
        packed = dict(_unpacked(base64.b64decode(read.m, validate=True), read.b))
    except (msgspec.DecodeError, ValueError):
        return Notes()
    if read.v != 1:
        return Notes()
    return Notes(
        topic=read.t,
        suspects=position + read.s if read.s else 0,
        repeated=position + read.r if read.r else 0,
        done=done,
        known={
            position + offset: Known(charged, bool(repeated), due_ms)
            for offset, charged, repeated, due_ms in read.n
        }
        | {position + offset: known for offset, known in packed.items()},
        owner=read.x,
        written_ms=read.w,
        since=position + read.f - 1 if read.f else START,
    )


def _bitmap(bits: Iterable[int]) -> str:
    number = 0
    for bit in bits:
        number |= 1 << bit
    return base64.b64encode(number.to_bytes((number.bit_length() + 7) // 8, "little")).decode()


def _bits(bitmap: str) -> Iterable[int]:
    number, bit = int.from_bytes(base64.b64decode(bitmap, validate=True), "little"), 0
    while number:
        zeros = (number & -number).bit_length() - 1
        bit += zeros
        yield bit
        number >>= zeros + 1
        bit += 1
