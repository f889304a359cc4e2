"""`Item`: a fetched record that is not settled, and what may be claimed beside what."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

from duly.brokers.kafka.wire import headers_in, message_in, read_headers
from duly.errors import InvalidMessage
from duly.message import Message, Topic


class Order(enum.Enum):
    """What may be claimed beside what. ``NONE``: anything. ``BY_KEY``: nothing of a key that is
    claimed or waits. ``BY_LANE``: nothing of a lane of keys that is. ``AS_LOGGED``: nothing beside
    anything, as a cursor needs it.
    """

    NONE = "none"
    BY_KEY = "by key"
    BY_LANE = "by lane of keys"
    AS_LOGGED = "as logged"

    @property
    def is_in_lines(self) -> bool:
        """Whether what waits holds up its own line (`duly.brokers.kafka.lines`), and no other."""
        return self in (Order.BY_KEY, Order.BY_LANE)


class Way(NamedTuple):
    """How a subscription is worked: in which order, in how many lanes of keys where it is by them,
    and whether its lanes can be given many messages at a time.
    """

    order: Order
    key_lanes: int
    as_runs: bool


class State(enum.Enum):
    """Where an item is."""

    READY = "ready"
    BLOCKED = "blocked"
    WAITING = "waiting"
    CLAIMED = "claimed"


class Item:
    """A fetched record that is not settled. ``wrong``: why it is no message that duly carries;
    ``noted``: what is known of it has to be committed, for the record does not say it; ``line``:
    what it is in order with.
    """

    __slots__ = (
        *("alone", "body", "charged", "declared", "due", "epoch", "lane", "line", "message"),
        *("noted", "offset", "record", "repeated", "replays", "settling", "state", "suspect"),
        *("token", "until", "wrong"),
    )

    def __init__(self, declared: Topic[Any], offset: int, epoch: int, body: bytes) -> None:
        self.declared = declared
        self.offset = offset
        self.epoch = epoch
        self.body = body
        self.message: Message[Any] | None = None
        self.record: Any = None
        self.line: str | None = None
        self.wrong: str | None = None
        self.charged = 0
        self.replays = 0
        self.repeated = self.suspect = self.alone = self.settling = self.noted = False
        self.due = 0.0
        self.state = State.READY
        self.token = self.lane = 0
        self.until = 0.0

    def is_late(self, now: float) -> bool:
        """Whether its lease is over, and nobody is settling it."""
        return self.token != 0 and self.until <= now and not self.settling


def item_of(declared: Topic[Any], record: Any) -> Item:
    """The item of a record, with its message or why it is none."""
    body, epoch = record.value() or b"", record.leader_epoch()
    item = Item(declared, record.offset(), 0 if epoch is None else epoch, body)
    try:
        headers = read_headers(headers_in(record))
        stamp_ms = record.timestamp()[1]
        item.message = message_in(declared, headers, record.key(), body, stamp_ms)
    except InvalidMessage as error:
        item.wrong = f"{type(error).__name__}: {error}"
        item.record = (headers_in(record), record.key())
    return item
