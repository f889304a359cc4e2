"""What a subscription knows of each message that it has passed and is not done with."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import msgspec

from duly.brokers.memory.shelf import Record
from duly.message import Message


class Claimed(msgspec.Struct, frozen=True, gc=False):
    """The receipt of a claim: ``token`` grows with every claim of the broker and fences it."""

    subscription: str
    position: int
    token: int


class State(Enum):
    """Where an item is."""

    READY = "may be claimed now"
    BLOCKED = "behind an earlier message of its key"
    PARKED = "waits until it is due"
    CLAIMED = "claimed"
    HELD = "dead, and holds its key"


@dataclass(slots=True, eq=False)
class Item:
    """A message that the cursor passed and that is not done.

    ``charged`` counts the starts so far. ``suspect``: a worker died or fell silent with it, so
    it is next claimed alone. ``repeated``: it may have been started before; one that was
    released unstarted was not. ``replays`` counts how often it came back from the dead letters.
    ``token`` and ``until`` are those of its claim, where it is claimed.
    """

    position: int
    topic: str
    message: Message[Any]
    record: Record | None
    state: State = State.READY
    charged: int = 0
    suspect: bool = False
    repeated: bool = False
    replays: int = 0
    token: int = 0
    until: float = 0.0


@dataclass(slots=True, eq=False)
class Claim:
    """Messages handed out together. ``lane`` tells whose they are.

    ``alone``: a suspect, whose start is counted already. ``asked_for_one``: no suspect, but the
    lane asked for one message, so that a death can be charged where it held nothing else.
    """

    token: int
    lane: int
    alone: bool
    asked_for_one: bool
    positions: set[int] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class Line:
    """The items of one key, in order, and how many of them are claimed."""

    positions: deque[int] = field(default_factory=deque)
    claimed: int = 0
