"""A person's messages removed from an outbox, in pieces that keep nobody waiting."""

from __future__ import annotations

from pathlib import Path

import pytest

import duly
from duly.broker import Delivery, LogPosition
from duly.errors import Superseded
from duly.guarantees import Admission, Retry
from duly.inspection.erasing import Whose
from duly.store import Scope
from duly.stores.sqlite import SQLiteStore

PARKING = Scope("billing", Admission.BY_CURSOR, parks=True)
CHECKOUT = duly.Topic("checkout", bytes, guarantee="at-least-once")
BILLS = duly.Topic("bills", bytes, guarantee="at-least-once")


def at(offset: int, key: str) -> Delivery:
    message = CHECKOUT.message(b"body", source="shop", key=key)
    return Delivery(message, receipt=offset, position=LogPosition("log-1", offset))


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


def test_what_is_parked_is_erased_also_while_somebody_has_it(tmp_path: Path):
    store = SQLiteStore(tmp_path / "store.db")
    there = [at(offset, key="ann" if offset else "bob") for offset in range(3)]
    session = store.begin(PARKING)
    session.admit(there)
    session.settle([Retry(e.receipt, 0.0, f"about {e.message.key}") for e in there], there)
    session.commit()
    [taken] = store.parked.take("billing", ["checkout"], 1, 1 << 20, 30.0)
    assert taken.message.key == "bob"
    [taken] = store.parked.take("billing", ["checkout"], 1, 1 << 20, 30.0)
    assert store.holdings(Whose(key="ann")) == 2
    assert list(store.erase(Whose(key="ann"))) == [2]
    assert (store.holdings(Whose(key="ann")), store.holdings(Whose(key="bob"))) == (0, 1)
    session = store.begin(PARKING)
    with pytest.raises(Superseded):
        session.admit([taken])
    session.rollback()
    store.close()
    left = (tmp_path / "store.db").read_bytes()
    assert b"about bob" in left
    assert b"about ann" not in left
