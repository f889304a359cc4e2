"""What the tests of the SQLite broker share: clocks they own, and short ways to say things."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duly.broker import Delivery, Published, SubscribeOptions
from duly.brokers.sqlite import Clock, SQLiteBroker
from duly.guarantees import Done, Guarantee
from duly.message import Message, Topic

BIG = 1 << 40

PLAIN = Topic("plain", bytes, guarantee="at-least-once")
ONCE = Topic("once", bytes, guarantee="exactly-once")
KEYED = Topic("keyed", bytes, guarantee="at-least-once", partitions=2)


@dataclass
class Hands:
    """The hands of a clock, moved by the test."""

    wall: int = 1_700_000_000_000
    boot: int = 5_000_000
    boot_id: str = "this-boot"

    def clock(self) -> Clock:
        return Clock(
            wall_ms=lambda: self.wall,
            boot_ms=lambda: self.boot,
            boot_id=lambda: self.boot_id,
            monotonic_s=lambda: self.boot / 1000,
        )

    def advance(self, seconds: float) -> None:
        self.wall += int(seconds * 1000)
        self.boot += int(seconds * 1000)


def opened(path: Path, *topics: Topic[Any], hands: Hands | None = None) -> SQLiteBroker:
    broker = SQLiteBroker(path, clock=hands.clock() if hands else None)
    broker.declare(topics or (PLAIN, ONCE, KEYED))
    return broker


def options(**given: Any) -> SubscribeOptions:
    given.setdefault("guarantee", Guarantee.AT_LEAST_ONCE)
    return SubscribeOptions(**given)


def messages(topic: Topic[Any], bodies: Iterable[Any], **given: Any) -> list[Message[Any]]:
    return [topic.message(_bytes(body), source="shop", **given) for body in bodies]


def _bytes(body: Any) -> bytes:
    return body if isinstance(body, bytes) else str(body).encode()


def publish(broker: SQLiteBroker, topic: Topic[Any], bodies: Iterable[Any], **given: Any) -> None:
    outcomes = broker.publish(messages(topic, bodies, **given))
    assert all(isinstance(outcome, Published) for outcome in outcomes), outcomes


def bodies(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.message.body.decode() for delivery in deliveries]


def receipts(deliveries: Sequence[Delivery]) -> list[Any]:
    return [delivery.receipt for delivery in deliveries]


def done(deliveries: Sequence[Delivery]) -> list[Done]:
    return [Done(delivery.receipt) for delivery in deliveries]


def claim(lane: Any, limit: int = 1000, max_bytes: int = BIG) -> Sequence[Delivery]:
    """Claim what there is, without waiting."""
    claimed: Sequence[Delivery] = lane.claim(limit, max_bytes, 0.0)
    return claimed


def drain(lane: Any, limit: int = 1000) -> list[str]:
    """Claim and settle until nothing is left; the bodies in the order claimed."""
    seen: list[str] = []
    while claimed := claim(lane, limit):
        seen += bodies(claimed)
        assert lane.settle(done(claimed)) == []
    return seen


def leftovers(broker: SQLiteBroker) -> dict[str, int]:
    """Rows of the tables that must be empty once everything is settled."""
    connection = broker.file.connect(_sqlite_connection())
    try:
        return {
            table: connection.execute(f"select count(*) from {table}").fetchone()[0]
            for table in ("duly_claims", "duly_parked")
        }
    finally:
        connection.close()


def execute(broker: SQLiteBroker, sql: str, *params: Any) -> list[Any]:
    """Run SQL on the broker's file, past the broker."""
    connection = broker.file.connect(_sqlite_connection())
    try:
        rows: list[Any] = connection.execute(sql, params).fetchall()
        return rows
    finally:
        connection.close()


def _sqlite_connection() -> Any:
    import sqlite3

    return sqlite3.Connection
