"""`Notes`: what is committed beside a position, in the text that Kafka keeps with it.

A position says that all before it is settled. What else has to outlive the process is about the
few messages behind it: which of them are settled already, how many starts are charged to one, when
one may be tried again, and how far somebody may have started them. Kafka keeps 4,096 bytes of text
with each position (``offset.metadata.max.bytes``), written together with it.

``{"v":1,"t":topic,"s":suspects,"r":repeated,"d":done,"n":[[offset,charged,repeated,due_ms],...]}``

``t`` is the id of the topic: made anew, it has another. Offsets are counted from the position.
``s`` and ``r`` are ends: what stands before them may have
been started by somebody who died, or handed over. ``d`` is a bitmap in base64, lowest bit first.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

REACH = 8192
"""So far behind the position messages are claimed: their bitmap takes a third of the text."""

MOST = 80
"""Of so many messages something is noted; nothing behind them is claimed until it is fewer."""


class Known(msgspec.Struct, frozen=True, gc=False):
    """What is known of one message that comes again. ``due_ms`` is a wall clock's; 0: at once."""

    charged: int = 0
    repeated: bool = False
    due_ms: int = 0


@dataclass(slots=True)
class Notes:
    """Of one partition, by offset. ``suspects`` and ``repeated`` are the first offset that is not
    any more.
    """

    topic: str = ""
    suspects: int = 0
    repeated: int = 0
    done: set[int] = field(default_factory=set)
    known: dict[int, Known] = field(default_factory=dict)


class _Text(msgspec.Struct, omit_defaults=True):
    v: int = 0
    t: str = ""
    s: int = 0
    r: int = 0
    d: str = ""
    n: list[tuple[int, int, int, int]] = []


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(_Text).decode


def as_text(notes: Notes, position: int) -> str:
    """What is committed beside a position."""
    return _encode(
        _Text(
            v=1,
            t=notes.topic,
            s=max(0, notes.suspects - position),
            r=max(0, notes.repeated - position),
            d=_bitmap(offset - position for offset in notes.done),
            n=[
                (offset - position, known.charged, int(known.repeated), known.due_ms)
                for offset, known in notes.known.items()
            ],
        )
    ).decode()


def in_text(text: str | None, position: int) -> Notes:
    """What somebody committed beside a position; nothing, where that was no duly."""
    try:
        read = _decode(text or "{}")
        done = {position + bit for bit in _bits(read.d)}
    except (msgspec.DecodeError, binascii.Error):
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
        },
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
