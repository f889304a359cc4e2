"""A person's messages removed from an outbox, in pieces that keep nobody waiting."""

from __future__ import annotations

from pathlib import Path

import duly
from duly.inspection.erasing import Whose
from duly.stores.sqlite import SQLiteStore

BILLS = duly.Topic("bills", bytes, guarantee="at-least-once")


def put(store: SQLiteStore, count: int, size: int, key: str = "ann") -> None:
    session = store.begin(None)
    session.declare([BILLS])
    session.publish([BILLS.message(bytes(size), source="shop", key=key) for _ in range(count)])
    session.commit()


def test_pieces_are_bounded_in_messages_and_in_bytes(tmp_path: Path):
    store = SQLiteStore(tmp_path / "store.db")
    put(store, 10, 1024 * 1024)
    put(store, 250, 1)
    put(store, 3, 1, key="bob")
    whose = Whose(key="ann")
    assert store.holdings(whose) == 260
    assert list(store.erase(whose)) == [4, 4, 100, 100, 52]
    assert (store.holdings(whose), store.holdings(Whose(key="bob"))) == (0, 3)
    store.close()
