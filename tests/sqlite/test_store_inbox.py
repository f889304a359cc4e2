"""Admission by inbox: what has taken effect does not take effect again."""

from __future__ import annotations

import itertools
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from duly.errors import TransactionLost
from duly.guarantees import Admission, Done, Release, Retry
from duly.message import now_ms
from duly.sql import inbox
from duly.sql.sqlite.driver import StatementRunner
from duly.store import Scope
from duly.stores.sqlite import SQLiteStore
from tests.sqlite.stores import (
    INBOX,
    begin_anew,
    delivery,
    effects,
    execute,
    ids,
    lose_the_transaction,
    rows,
    run,
    settle_and_commit,
    write,
)

DAY_MS = 86_400_000
COUNTED = "select consumer, count(*) from duly_inbox natural join duly_inbox_flows group by 1"


@pytest.fixture
def store(db_path: Path) -> Iterator[SQLiteStore]:
    store = SQLiteStore(db_path)
    execute(db_path, "create table if not exists effects (value)")
    yield store
    store.close()


def remembered(store: SQLiteStore) -> list[str]:
    return [id for (id,) in rows(store.path, "select id from duly_inbox order by id")]


def test_a_message_takes_effect_once(store: SQLiteStore):
    assert run(store, INBOX, [delivery("a"), delivery("b")]) == ["a", "b"]
    assert run(store, INBOX, [delivery("b"), delivery("c")]) == ["c"]
    assert effects(store.path) == ["a", "b", "c"]


def test_a_repeat_is_reported_as_one(store: SQLiteStore):
    run(store, INBOX, [delivery("a")])
    session = store.begin(INBOX)
    admitted = session.admit([delivery("b"), delivery("a"), delivery("c")])
    session.rollback()
    assert ids(admitted.fresh) == ["b", "c"], "in the order delivered"
    assert ids(admitted.repeated) == ["a"]
    assert not admitted.conflicting


def test_the_order_delivered_is_the_order_run(store: SQLiteStore):
    batch = [delivery(id) for id in ("c", "a", "b")]
    assert run(store, INBOX, batch) == ["c", "a", "b"]


def test_one_id_with_another_body_is_a_conflict(store: SQLiteStore):
    run(store, INBOX, [delivery("a", b"one")])
    session = store.begin(INBOX)
    admitted = session.admit([delivery("a", b"other"), delivery("b")])
    session.rollback()
    assert ids(admitted.conflicting) == ["a"]
    assert ids(admitted.fresh) == ["b"]


def test_one_id_twice_in_a_batch_runs_once(store: SQLiteStore):
    first, again, other = delivery("a"), delivery("a", receipt="a2"), delivery("a", b"other")
    session = store.begin(INBOX)
    admitted = session.admit([first, again, other])
    session.settle([Done(first.receipt)], [first])
    session.commit()
    assert list(admitted.fresh) == [first]
    assert list(admitted.repeated) == [again]
    assert list(admitted.conflicting) == [other]


def test_ids_belong_to_consumer_topic_and_source(store: SQLiteStore):
    run(store, INBOX, [delivery("a")])
    assert run(store, INBOX, [delivery("a", topic="refund", body=b"x")]) == ["a"]
    assert run(store, INBOX, [delivery("a", source="kiosk", body=b"y")]) == ["a"]
    assert run(store, Scope("audit", Admission.BY_INBOX), [delivery("a")]) == ["a"]


@pytest.mark.parametrize("settle", [lambda r: Retry(r, 1, "x"), Release], ids=["retry", "release"])
def test_what_did_not_take_effect_can_run_again(store: SQLiteStore, settle):
    assert run(store, INBOX, [delivery("a")], settle) == ["a"]
    assert remembered(store) == []
    assert run(store, INBOX, [delivery("a")]) == ["a"]


def test_forgetting_is_only_for_what_this_transaction_admitted(store: SQLiteStore):
    run(store, INBOX, [delivery("a")])
    session = store.begin(INBOX)
    admitted = session.admit([delivery("a")])
    session.settle([Release("a")], admitted.repeated)
    session.commit()
    assert remembered(store) == ["a"]


def test_a_rolled_back_transaction_remembers_nothing(store: SQLiteStore):
    session = store.begin(INBOX)
    session.admit([delivery("a")])
    session.rollback()
    assert run(store, INBOX, [delivery("a")]) == ["a"]


@pytest.mark.parametrize("anew", [False, True])
def test_effects_without_their_memory_are_never_committed(store: SQLiteStore, anew: bool):
    session = store.begin(INBOX)
    batch = [delivery("a")]
    session.admit(batch)
    lose_the_transaction(session)
    if anew:
        begin_anew(session)
    with pytest.raises(TransactionLost):
        settle_and_commit(session, batch)
    session.rollback()
    assert effects(store.path) == []
    assert remembered(store) == []


def test_a_second_copy_waits_for_the_first_and_is_a_repeat(store: SQLiteStore):
    session = store.begin(INBOX)
    session.admit([delivery("a")])
    ran: list[list[str]] = []
    copy = threading.Thread(target=lambda: ran.append(run(store, INBOX, [delivery("a")])))
    copy.start()
    write(session, "first")
    session.settle([Done("a")], [delivery("a")])
    session.commit()
    copy.join(10)
    assert ran == [[]]
    assert effects(store.path) == ["first"]


def test_a_repeat_older_than_the_memory_is_parked_and_a_first_delivery_is_not(store: SQLiteStore):
    scope = Scope("billing", Admission.BY_INBOX, inbox_retention_s=86_400)
    old = now_ms() - 2 * DAY_MS
    marked = delivery("marked", time_ms=old, repeated=True)
    late = delivery("late", time_ms=old)
    young = delivery("young", repeated=True)
    session = store.begin(scope)
    admitted = session.admit([marked, late, young])
    fresh = admitted.fresh
    session.settle([Done(d.receipt) for d in fresh], fresh)
    session.commit()
    assert ids(admitted.too_old) == ["marked"]
    assert ids(admitted.fresh) == ["late", "young"]
    assert remembered(store) == ["late", "young"]


def test_an_old_repeat_that_is_still_remembered_is_a_plain_repeat(store: SQLiteStore):
    scope = Scope("billing", Admission.BY_INBOX, inbox_retention_s=86_400)
    old = now_ms() - 2 * DAY_MS
    run(store, scope, [delivery("a", time_ms=old)])
    session = store.begin(scope)
    admitted = session.admit([delivery("a", time_ms=old, repeated=True)])
    session.rollback()
    assert ids(admitted.repeated) == ["a"]
    assert not admitted.too_old


def test_what_is_older_than_the_retention_is_forgotten_in_short_steps(
    db_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(inbox, "STRETCH", 20)
    # Of its own: of a real clock many batches may see the same millisecond.
    store = SQLiteStore(db_path, wall_ms=itertools.count(now_ms()).__next__)
    with closing(sqlite3.connect(db_path)) as connection:
        connection.execute("create table if not exists effects (value)")
    forgetful = Scope("billing", Admission.BY_INBOX, inbox_retention_s=0)
    keeping = Scope("audit", Admission.BY_INBOX)
    for start in range(0, 100, 10):
        batch = [delivery(f"{n:03}") for n in range(start, start + 10)]
        run(store, keeping, batch)
        run(store, forgetful, batch)
    for start in range(100, 200, 10):
        run(store, forgetful, [delivery(f"{n:03}") for n in range(start, start + 10)])
    counts = dict(rows(store.path, COUNTED))
    assert counts["billing"] <= 60
    assert counts["audit"] == 100, "another consumer's memory is its own"
    store.close()


def test_large_batches_of_growing_ids_are_forgotten_too(db_path: Path):
    """Cleaning that is no faster than filling would follow the newest for ever."""
    now = [now_ms()]
    store = SQLiteStore(db_path, wall_ms=lambda: now[0])
    with closing(sqlite3.connect(db_path)) as connection:
        connection.execute("create table if not exists effects (value)")
    scope = Scope("billing", Admission.BY_INBOX, inbox_retention_s=60.0)
    for start in range(0, 12_000, 600):
        run(store, scope, [delivery(f"{n:05}") for n in range(start, start + 600)])
        now[0] += 20_000
    assert len(remembered(store)) <= 7200
    store.close()


class Looks:
    """How often the inbox was gone through, of a store whose clock and consumer the test moves."""

    def __init__(self, store: SQLiteStore, monkeypatch: pytest.MonkeyPatch, start: int = 0) -> None:
        self.count = 0
        self._store = store
        self._start = start
        plain = StatementRunner.ask

        def counted(runner: StatementRunner, name: str, params: Any) -> list[tuple[Any, ...]]:
            self.count += name == "inbox_stretch"
            return plain(runner, name, params)

        monkeypatch.setattr(inbox, "STRETCH", 20)
        monkeypatch.setattr(StatementRunner, "ask", counted)

    def during(self, batches: int) -> int:
        """Looks made while so many batches of ten are admitted, each remembered for a minute."""
        before = self.count
        scope = Scope("billing", Admission.BY_INBOX, inbox_retention_s=60.0)
        for _ in range(batches):
            self._start += 10
            run(self._store, scope, [delivery(f"{self._start + n:05}") for n in range(10)])
        return self.count - before


def test_where_nothing_can_be_old_nobody_looks_until_it_can(
    db_path: Path, monkeypatch: pytest.MonkeyPatch
):
    now = [now_ms()]
    store = SQLiteStore(db_path, wall_ms=lambda: now[0])
    execute(db_path, "create table if not exists effects (value)")
    looks = Looks(store, monkeypatch)
    assert looks.during(30) > 0
    assert looks.during(30) == 0, "a whole round has shown that all of it is new"
    assert len(remembered(store)) == 600
    now[0] += 61_000
    assert looks.during(60) > 0
    assert len(remembered(store)) == 600, "what was old is gone, and what came since is kept"
    store.close()


def test_a_process_that_begins_late_rests_no_longer_than_what_it_found_is_young(
    db_path: Path, monkeypatch: pytest.MonkeyPatch
):
    now = [now_ms()]
    execute(db_path, "create table if not exists effects (value)")
    first = SQLiteStore(db_path, wall_ms=lambda: now[0])
    Looks(first, monkeypatch).during(30)
    first.close()
    now[0] += 50_000
    second = SQLiteStore(db_path, wall_ms=lambda: now[0])
    looks = Looks(second, monkeypatch, start=10_000)
    looks.during(60)
    assert looks.during(10) == 0, "a whole round has shown that nothing is old yet"
    now[0] += 11_000
    looks.during(80)
    assert len(remembered(second)) == 1500, "what the first has left is gone"
    second.close()


def test_a_clock_that_was_set_back_ends_the_rest(db_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = [now_ms()]
    store = SQLiteStore(db_path, wall_ms=lambda: now[0])
    execute(db_path, "create table if not exists effects (value)")
    looks = Looks(store, monkeypatch)
    looks.during(30)
    now[0] -= DAY_MS  # what comes from now on is old a day before what came first
    assert looks.during(30) > 0
    now[0] += 61_000
    looks.during(100)
    assert len(remembered(store)) <= 300 + 1000, "what came after the step is forgotten"
    store.close()


def test_every_source_and_topic_of_a_consumer_is_cleaned(
    store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(inbox, "STRETCH", 10)
    forgetful = Scope("billing", Admission.BY_INBOX, inbox_retention_s=0)
    for n in range(40):
        run(store, forgetful, [delivery(f"{n:03}", source=f"s{n % 4}") for _ in range(1)])
    for n in range(40):
        run(store, forgetful, [delivery(f"late-{n:03}", source="s9")])
    left = [id for id in remembered(store) if not id.startswith("late")]
    assert left == []


def test_the_same_id_of_two_sources_is_two_messages(store: SQLiteStore):
    both = [delivery("a", source="one"), delivery("a", source="two")]
    assert run(store, INBOX, both) == ["a", "a"]
    assert run(store, INBOX, [*both, delivery("a", source="three")]) == ["a"]


def test_a_flow_that_was_rolled_back_is_made_again(store: SQLiteStore):
    session = store.begin(INBOX)
    session.admit([delivery("a")])
    session.rollback()
    assert run(store, INBOX, [delivery("a")]) == ["a"]
    assert run(store, INBOX, [delivery("a")]) == []


def test_a_sweep_forgets_nothing_within_the_retention(
    store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(inbox, "STRETCH", 4)
    for n in range(30):
        run(store, INBOX, [delivery(f"{n:02}-{i}") for i in range(3)])
    assert len(remembered(store)) == 90
