"""Admission by cursor: compare and set, a prefix at a time, and no log passed off as another."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from duly.errors import BrokerUnusable, ConfigurationError, Superseded, TransactionLost
from duly.guarantees import Admission, Dead, Done, Release, Retry, Settlement
from duly.store import Scope
from duly.stores.sqlite import SQLiteStore
from tests.sqlite.stores import (
    CURSOR,
    at,
    begin_anew,
    delivery,
    effects,
    execute,
    ids,
    lose_the_transaction,
    rows,
    run,
    settle_and_commit,
)


@pytest.fixture
def store(db_path: Path) -> Iterator[SQLiteStore]:
    store = SQLiteStore(db_path)
    execute(db_path, "create table if not exists effects (value)")
    yield store
    store.close()


def cursors(store: SQLiteStore) -> dict[str, tuple[int, int]]:
    """Those that have moved."""
    found = rows(store.path, "select log, next_offset, epoch from duly_log_cursors")
    return {log: (next_offset, epoch) for log, next_offset, epoch in found if next_offset}


def test_the_first_use_begins_anywhere(store: SQLiteStore):
    assert run(store, CURSOR, [at(7), at(9)]) == ["m-7", "m-9"]
    assert cursors(store) == {"log-1": (10, 0)}


def test_what_lies_below_the_cursor_has_taken_effect(store: SQLiteStore):
    run(store, CURSOR, [at(1), at(2), at(3)])
    session = store.begin(CURSOR)
    admitted = session.admit([at(2), at(3), at(4), at(5)])
    session.rollback()
    assert ids(admitted.repeated) == ["m-2", "m-3"]
    assert ids(admitted.fresh) == ["m-4", "m-5"]


def test_a_copy_within_a_batch_runs_once(store: SQLiteStore):
    assert run(store, CURSOR, [at(1), at(2), at(2), at(1), at(3)]) == ["m-1", "m-2", "m-3"]


def test_each_log_and_each_consumer_has_a_cursor(store: SQLiteStore):
    run(store, CURSOR, [at(1), at(5, log="log-2"), at(2), at(6, log="log-2")])
    assert cursors(store) == {"log-1": (3, 0), "log-2": (7, 0)}
    assert run(store, Scope("audit", Admission.BY_CURSOR), [at(1)]) == ["m-1"]


def test_a_log_made_anew_is_another_log(store: SQLiteStore):
    run(store, CURSOR, [at(100)])
    assert run(store, CURSOR, [at(0, log="log-1-again")]) == ["m-0"]


@pytest.mark.parametrize("end", [lambda r: Retry(r, 1, "x"), Release], ids=["retry", "release"])
def test_the_cursor_stops_before_what_is_not_done(store: SQLiteStore, end):
    session = store.begin(CURSOR)
    fresh = session.admit([at(1), at(2), at(3)]).fresh
    session.settle([Done("m-1"), end("m-2"), Release("m-3")], fresh)
    session.commit()
    assert cursors(store) == {"log-1": (2, 0)}
    assert run(store, CURSOR, [at(2), at(3)]) == ["m-2", "m-3"]


def test_what_never_started_is_not_passed(store: SQLiteStore):
    session = store.begin(CURSOR)
    fresh = session.admit([at(1), at(2), at(3)]).fresh
    session.settle([Done("m-1")], fresh[:1])
    session.commit()
    assert cursors(store) == {"log-1": (2, 0)}


def test_settling_behind_a_gap_is_refused(store: SQLiteStore):
    """It would skip a message, or run one again whose effects stand."""
    cases: list[tuple[list[Settlement], list[int]]] = [
        ([Retry("m-1", 1, "x"), Done("m-2")], [1, 2]),
        ([Done("m-2")], [2]),
        ([Done("m-1"), Done("m-3")], [1, 3]),
        ([Release("m-1"), Dead("m-2", "x")], [1, 2]),
    ]
    for settlements, positions in cases:
        session = store.begin(CURSOR)
        session.admit([at(1), at(2), at(3)])
        with pytest.raises(ValueError, match="prefix"):
            session.settle(settlements, [at(n) for n in positions])
        session.rollback()
    assert cursors(store) == {}


def test_one_log_that_stops_does_not_stop_another(store: SQLiteStore):
    session = store.begin(CURSOR)
    fresh = session.admit([at(1), at(1, log="log-2"), at(2), at(2, log="log-2")]).fresh
    session.settle([Retry("x", 1, "x"), Done("y"), Release("x"), Done("y")], fresh)
    session.commit()
    assert cursors(store) == {"log-2": (3, 0)}


def test_repeats_may_be_settled_and_move_nothing(store: SQLiteStore):
    run(store, CURSOR, [at(1), at(2)])
    session = store.begin(CURSOR)
    session.admit([at(1), at(3)])
    session.settle([Done("m-1"), Done("m-3")], [at(1), at(3)])
    session.commit()
    assert cursors(store) == {"log-1": (4, 0)}


def test_a_dead_letter_is_kept_with_all_it_takes_to_replay_it(store: SQLiteStore):
    session = store.begin(CURSOR)
    dead = at(4, epoch=2)
    session.admit([dead])
    session.settle([Dead("m-4", "ValueError: no such account")], [dead])
    session.commit()
    assert cursors(store) == {"log-1": (5, 2)}
    sql = 'select consumer, log, "offset", epoch, topic, source, id, body, error, attempts'
    assert rows(store.path, f"{sql} from duly_log_dead") == [
        (
            "billing",
            "log-1",
            4,
            2,
            "checkout",
            "shop",
            "m-4",
            b"body",
            "ValueError: no such account",
            1,
        )
    ]


def test_a_cursor_that_another_moved_is_superseded(store: SQLiteStore):
    run(store, CURSOR, [at(1)])
    session = store.begin(CURSOR)
    fresh = session.admit([at(2)]).fresh
    # What a zombie's read would have seen before its successor committed.
    session._guard.execute("update duly_log_cursors set next_offset = 3")
    with pytest.raises(Superseded, match="log-1"):
        session.settle([Done("m-2")], fresh)
    session.rollback()
    assert cursors(store) == {"log-1": (2, 0)}


def test_a_first_use_that_another_made_is_superseded(store: SQLiteStore):
    session = store.begin(CURSOR)
    fresh = session.admit([at(1)]).fresh
    session._guard.execute("update duly_log_cursors set next_offset = 2, epoch = 0")
    with pytest.raises(Superseded):
        session.settle([Done("m-1")], fresh)
    session.rollback()
    assert cursors(store) == {}


def test_a_worker_that_comes_late_runs_only_what_is_left(store: SQLiteStore):
    """It claimed 1 to 4 and paused; its successor did 1 to 3 meanwhile."""
    run(store, CURSOR, [at(1), at(2), at(3)])
    assert run(store, CURSOR, [at(1), at(2), at(3), at(4)]) == ["m-4"]
    assert effects(store.path) == ["m-1", "m-2", "m-3", "m-4"]


@pytest.mark.parametrize("anew", [False, True])
def test_effects_without_their_cursor_are_never_committed(store: SQLiteStore, anew: bool):
    run(store, CURSOR, [at(1)])
    session = store.begin(CURSOR)
    fresh = session.admit([at(2)]).fresh
    lose_the_transaction(session)
    if anew:
        begin_anew(session)
    with pytest.raises(TransactionLost):
        settle_and_commit(session, fresh)
    session.rollback()
    assert cursors(store) == {"log-1": (2, 0)}
    assert effects(store.path) == ["m-1"]


@pytest.mark.parametrize(
    ("arrived", "says"),
    [
        (at(3, epoch=6), "written anew in epoch 6"),
        (at(12, epoch=4), "of epoch 4, and epoch 5 has taken effect"),
        (at(3, epoch=5, end=8), "beyond the log's end 8"),
    ],
    ids=["rewritten", "older epoch", "beyond the end"],
)
def test_a_log_that_lost_what_took_effect_stops_with_an_error(
    store: SQLiteStore, arrived, says: str
):
    run(store, CURSOR, [at(10, epoch=5)])
    session = store.begin(CURSOR)
    with pytest.raises(BrokerUnusable, match=says):
        session.admit([arrived])
    session.rollback()
    assert cursors(store) == {"log-1": (11, 5)}


def test_a_new_leader_is_no_reason_to_stop(store: SQLiteStore):
    run(store, CURSOR, [at(10, epoch=5, end=11)])
    assert run(store, CURSOR, [at(11, epoch=7, end=12)]) == ["m-11"]
    session = store.begin(CURSOR)
    assert ids(session.admit([at(10, epoch=5, end=12)]).repeated) == ["m-10"]
    session.rollback()


def test_a_message_without_a_position_is_refused(store: SQLiteStore):
    session = store.begin(CURSOR)
    with pytest.raises(ConfigurationError, match="no position in a log"):
        session.admit([delivery("a")])
    session.rollback()
