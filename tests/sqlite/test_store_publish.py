"""The outbox, and publishing inside a transaction of the application's own."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from duly.broker import Published, RepeatDropped, SubscribeOptions
from duly.brokers.sqlite import SQLiteBroker
from duly.errors import BrokerUnavailable, ConfigurationError, IdentityConflict, PublishFailed
from duly.guarantees import Guarantee
from duly.message import Message, Topic, now_ms
from duly.sql import outbox
from duly.store import Refusal
from duly.stores.sqlite import SQLiteStore, within
from tests.sqlite.programs import running
from tests.sqlite.stores import execute, rows

ORDERS = Topic("orders", bytes, guarantee="exactly-once")
NEWS = Topic("news", bytes, guarantee="at-least-once")
UNDECLARED = Topic("undeclared", bytes, guarantee="at-least-once")


def order(id: str, body: bytes = b"order") -> Message[bytes]:
    return ORDERS.message(body, source="shop", id=id)


# --- the outbox


@pytest.fixture
def store(db_path: Path) -> Iterator[SQLiteStore]:
    """A store whose broker is elsewhere."""
    store = SQLiteStore(db_path, broker_database="postgres:elsewhere")
    store.declare([ORDERS, NEWS])
    yield store
    store.close()


def waiting(store: SQLiteStore) -> list[Message[bytes]]:
    return [message for _, message in store.file.read(lambda: outbox.first(100))]


def test_a_relay_sleeps_while_what_is_due_waits_behind_another_of_its_key(
    store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
):
    session = store.begin(None)
    session.publish([NEWS.message(b"", source="shop", id=id, key="k") for id in ("a", "b")])
    session.commit()
    first, second = store.outbox.unsent(10, 1 << 20, 0.0)
    store.outbox.refused(
        [Refusal(first.position, "full", 30.0), Refusal(second.position, "full", 0.0)]
    )
    looks: list[object] = []
    inner = store.file.read

    def read(make_steps: Any) -> Any:
        looks.append(make_steps)
        return inner(make_steps)

    monkeypatch.setattr(store.file, "read", read)
    assert not store.outbox.unsent(10, 1 << 20, 0.5)
    assert len(looks) < 20


def test_messages_go_to_the_outbox_whole(store: SQLiteStore):
    message = NEWS.message(
        b"\x00\xff",
        source="shop",
        id="n-1",
        key="k",
        headers={"traceparent": "00-ab"},
        due_ms=now_ms() + 1000,
    )
    session = store.begin(None)
    assert session.publish([order("a"), message]) == [Published("a"), Published("n-1")]
    assert waiting(store) == []
    session.commit()
    assert waiting(store) == [order_as_read(store, "a"), message]


def order_as_read(store: SQLiteStore, id: str) -> Message[bytes]:
    [found] = [message for message in waiting(store) if message.id == id]
    return found


def test_a_rolled_back_transaction_leaves_no_message(store: SQLiteStore):
    session = store.begin(None)
    session.publish([order("a")])
    session.rollback()
    assert waiting(store) == []


def test_undeclared_topics_are_refused_one_by_one(store: SQLiteStore):
    session = store.begin(None)
    outcomes = session.publish([order("a"), UNDECLARED.message(b"x", source="shop", id="u")])
    session.commit()
    assert outcomes[0] == Published("a")
    assert isinstance(outcomes[1], PublishFailed)
    assert "undeclared" in str(outcomes[1])
    assert [message.id for message in waiting(store)] == ["a"]


def test_sent_messages_leave_and_places_are_not_given_again(store: SQLiteStore):
    for id in ("a", "b"):
        session = store.begin(None)
        session.publish([order(id)])
        session.commit()
        [(place, _)] = store.file.read(lambda: outbox.first(1))
        store.file.write(partial(outbox.sent, [place]))
    assert waiting(store) == []
    session = store.begin(None)
    session.publish([order("c")])
    session.commit()
    [(place, _)] = store.file.read(lambda: outbox.first(1))
    assert place == 3


# --- within=


@pytest.fixture
def broker(db_path: Path) -> Iterator[SQLiteBroker]:
    broker = SQLiteBroker(db_path)
    broker.declare([ORDERS, NEWS])
    yield broker
    broker.close()


@pytest.fixture
def here(broker: SQLiteBroker, db_path: Path) -> Iterator[SQLiteStore]:
    """A store in the broker's own file."""
    store = SQLiteStore(db_path, broker_database=broker.capabilities.database)
    store.declare([ORDERS, NEWS])
    execute(db_path, "create table if not exists theirs (a)")
    yield store
    store.close()


@pytest.fixture
def own(here: SQLiteStore) -> Iterator[sqlite3.Connection]:
    """The application's own connection."""
    connection = sqlite3.connect(here.path, timeout=0.1)
    yield connection
    connection.close()


def delivered(broker: SQLiteBroker) -> list[str]:
    lane = broker.subscribe([ORDERS, NEWS], "look", SubscribeOptions(Guarantee.EXACTLY_ONCE))
    found = [d.message.id for _ in range(3) for d in lane.claim(100, 1 << 20, 0)]
    lane.close()
    return found


def test_a_connection_to_this_file_joins(
    here: SQLiteStore, own: sqlite3.Connection, tmp_path: Path
):
    assert here.joins(own)
    (tmp_path / "link.db").symlink_to(here.path)
    linked = sqlite3.connect(tmp_path / "link.db")
    linked.text_factory = bytes
    linked.row_factory = sqlite3.Row
    assert here.joins(linked)
    linked.close()
    assert not here.joins(linked), "closed"


def test_others_do_not_join(here: SQLiteStore, tmp_path: Path):
    elsewhere = sqlite3.connect(tmp_path / "elsewhere.db")
    memory = sqlite3.connect(":memory:")
    memory.execute("attach database ? as shop", (str(here.path),))
    for other in (elsewhere, memory, object(), None, "sqlite:///x"):
        assert not here.joins(other)
    with pytest.raises(ConfigurationError, match=r"no open sqlite3.Connection to"):
        here.publish_within(elsewhere, [order("a")])
    elsewhere.close()
    memory.close()


def test_message_and_rows_are_one(here: SQLiteStore, broker: SQLiteBroker, own: sqlite3.Connection):
    with own:
        own.execute("insert into theirs values (1)")
        assert here.publish_within(own, [order("a")]) == [Published("a")]
    own.execute("insert into theirs values (2)")
    here.publish_within(own, [order("b")])
    own.rollback()
    assert delivered(broker) == ["a"]
    assert rows(here.path, "select a from theirs") == [(1,)]


def test_publishing_first_begins_as_the_driver_would(
    here: SQLiteStore, broker: SQLiteBroker, own: sqlite3.Connection
):
    here.publish_within(own, [order("a")])
    assert own.in_transaction
    own.rollback()
    here.publish_within(own, [order("b")])
    own.commit()
    assert delivered(broker) == ["b"]


def test_autocommit_without_a_transaction_is_refused(here: SQLiteStore, broker: SQLiteBroker):
    own = sqlite3.connect(here.path, isolation_level=None)
    with pytest.raises(ConfigurationError, match="autocommit mode and no transaction is open"):
        here.publish_within(own, [order("a")])
    own.execute("begin immediate")
    here.publish_within(own, [order("b")])
    own.execute("commit")
    own.close()
    assert delivered(broker) == ["b"]


def test_what_the_caller_set_on_the_connection_stays(
    here: SQLiteStore, broker: SQLiteBroker, own: sqlite3.Connection
):
    own.row_factory = sqlite3.Row
    own.text_factory = bytes
    own.execute("begin immediate")
    here.publish_within(own, [order("a")])
    assert own.row_factory is sqlite3.Row
    assert own.text_factory is bytes
    assert own.execute("select 'x' as x").fetchone()["x"] == b"x"
    own.commit()
    assert delivered(broker) == ["a"]


def test_a_dropped_repeat_or_a_conflict_leaves_the_callers_transaction_whole(
    here: SQLiteStore, broker: SQLiteBroker, own: sqlite3.Connection
):
    broker.publish([order("a")])
    own.execute("begin immediate")
    own.execute("insert into theirs values (1)")
    outcomes = here.publish_within(own, [order("a"), order("b"), order("a", b"other")])
    own.execute("insert into theirs values (2)")
    own.commit()
    assert outcomes[:2] == [RepeatDropped("a"), Published("b")]
    assert isinstance(outcomes[2], IdentityConflict)
    assert delivered(broker) == ["a", "b"]
    assert rows(here.path, "select a from theirs") == [(1,), (2,)]


def test_a_publish_that_fails_takes_nothing_of_the_callers_with_it(
    here: SQLiteStore,
    broker: SQLiteBroker,
    own: sqlite3.Connection,
    monkeypatch: pytest.MonkeyPatch,
):
    own.execute("begin immediate")
    own.execute("insert into theirs values (1)")
    real = here.publish_steps

    def half_way(messages, declared):
        yield from real(messages)
        raise LookupError

    monkeypatch.setattr(here, "publish_steps", half_way)
    with pytest.raises(LookupError):
        here.publish_within(own, [order("a")])
    monkeypatch.undo()
    own.commit()
    assert delivered(broker) == []
    assert rows(here.path, "select a from theirs") == [(1,)]


def test_a_file_that_another_writes_is_unavailable_with_advice(
    here: SQLiteStore, own: sqlite3.Connection
):
    session = here.begin(None)
    with pytest.raises(BrokerUnavailable, match="BEGIN IMMEDIATE"):
        here.publish_within(own, [order("a")])
    own.rollback()
    session.rollback()


@pytest.mark.parametrize("how", ["mode=ro", "query_only"])
def test_a_connection_that_may_only_read_is_refused_and_not_its_file(here: SQLiteStore, how: str):
    mode = "ro" if how == "mode=ro" else "rw"
    reading = sqlite3.connect(f"{here.path.as_uri()}?mode={mode}", uri=True, isolation_level=None)
    if how == "query_only":
        reading.execute("pragma query_only = on")
    reading.execute("begin")
    with pytest.raises(ConfigurationError, match="opened to read only"):
        here.publish_within(reading, [order("a")])
    reading.close()


def test_a_connection_that_does_not_sync_is_refused(here: SQLiteStore, own: sqlite3.Connection):
    own.execute("pragma synchronous = normal")
    with pytest.raises(ConfigurationError, match="synchronous = FULL"):
        here.publish_within(own, [order("a")])


def test_a_handlers_connection_is_told_of_tx_publish(here: SQLiteStore):
    session = here.begin(None)
    with pytest.raises(ConfigurationError, match=r"tx\.publish"):
        here.publish_within(session.connection, [order("a")])
    session.rollback()


def test_within_goes_to_the_outbox_where_the_broker_is_elsewhere(store: SQLiteStore):
    own = sqlite3.connect(store.path)
    with own:
        assert store.publish_within(own, [order("a")]) == [Published("a")]
    own.close()
    assert [message.id for message in waiting(store)] == ["a"]


def test_checkpoints_of_the_callers_are_warned_of_once_where_sqlite_is_old(
    here: SQLiteStore,
    own: sqlite3.Connection,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setattr(within, "SAFE_VERSION", (9, 9, 9))
    with caplog.at_level(logging.WARNING):
        for id in ("a", "b"):
            here.publish_within(own, [order(id)])
    assert caplog.text.count("walresetbug") == 1
    own.rollback()


def test_a_killed_caller_leaves_neither_rows_nor_message(here: SQLiteStore, broker: SQLiteBroker):
    program = """
        import sqlite3, sys
        from duly.brokers.sqlite import SQLiteBroker
        from duly.message import Topic
        from duly.stores.sqlite import SQLiteStore

        topic = Topic("orders", bytes, guarantee="exactly-once")
        broker = SQLiteBroker(sys.argv[1])
        store = SQLiteStore(sys.argv[1], broker_database=broker.capabilities.database)
        store.declare([topic])
        own = sqlite3.connect(sys.argv[1])
        own.execute("pragma wal_autocheckpoint = 0")
        own.execute("insert into theirs values (1)")
        store.publish_within(own, [topic.message(b"x", source="shop", id="killed")])
        print("open")
        sys.stdin.readline()
    """
    with running(program, here.path) as caller:
        caller.expect("open")
        caller.kill()
    assert delivered(broker) == []
    assert rows(here.path, "select a from theirs") == []
