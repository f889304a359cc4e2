"""A database of an older schema becomes one of this; who is too old for it is told so."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

import duly
from duly.brokers.sqlite import SQLiteBroker
from duly.errors import BrokerUnusable
from duly.sql.migrations import SCHEMA_VERSION
from duly.sql.sqlite import DatabaseFile
from duly.stores.sqlite import SQLiteStore
from tests.schema.versions import (
    NOW,
    WITH_CODE,
    meta,
    newer_code,
    older_code,
    older_file,
    rows,
    shape,
)
from tests.sqlite.programs import run, running

NEWS = duly.Topic("news", str, guarantee="at-least-once")
ADDS = (
    "alter table duly_messages add column colour text;\ncreate index duly_x on duly_messages (id);"
)
NEXT = SCHEMA_VERSION + 1
LEFT_BEHIND = (
    rf"schema {NEXT}, which code of schema {NEXT} or later may use, .* runs schema "
    rf"{SCHEMA_VERSION}: upgrade duly"
)

OPEN = f"""
{WITH_CODE}
from duly.errors import DulyError
from duly.sql.sqlite import DatabaseFile
try:
    DatabaseFile.open(sys.argv[2]).close()
    print("opened")
except DulyError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture
def broker(db_path: Path) -> Iterator[SQLiteBroker]:
    broker = SQLiteBroker(db_path)
    broker.declare([NEWS])
    yield broker
    broker.close()


def publish(broker: SQLiteBroker, id: str) -> object:
    [outcome] = broker.publish([NEWS.message("read all about it", source="paper", id=id)])
    return outcome


def stored(path: Path) -> list[str]:
    return [id for (id,) in rows(path, "select id from duly_messages order by position")]


def test_an_older_database_becomes_what_a_new_one_is(tmp_path: Path):
    older, new = tmp_path / "older.db", tmp_path / "new.db"
    older_file(older)
    for path in (older, new):
        DatabaseFile.open(path).close()
    assert shape(older) == shape(new)
    assert {**meta(older), "identity": 0} == {**meta(new), "identity": 0}
    assert meta(older)["schema"] == SCHEMA_VERSION
    assert meta(older)["identity"] == "sqlite:older", "it is the same database"


def test_the_older_code_makes_what_is_written_down(tmp_path: Path):
    written, made = tmp_path / "written.db", tmp_path / "made.db"
    older_file(written)
    assert run(OPEN, older_code(tmp_path / "code"), made) == ["opened"]
    assert shape(written) == shape(made)
    assert meta(made)["schema"] == 1


def test_older_code_opens_what_newer_code_has_added_to(tmp_path: Path, db_path: Path):
    DatabaseFile.open(db_path).close()
    assert run(OPEN, older_code(tmp_path / "code"), db_path) == ["opened"]
    assert meta(db_path)["schema"] == SCHEMA_VERSION, "it takes nothing back"


def test_what_is_open_goes_on_while_newer_code_adds(
    tmp_path: Path, db_path: Path, broker: SQLiteBroker
):
    newer = newer_code(tmp_path / "code", ADDS, oldest=SCHEMA_VERSION)
    publish(broker, "before")
    assert run(OPEN, newer, db_path) == ["opened"]
    assert meta(db_path)["schema"] == SCHEMA_VERSION + 1
    publish(broker, "after")
    assert stored(db_path) == ["before", "after"]
    assert len(broker.subscriptions()) == 0
    assert run(OPEN, NOW, db_path) == ["opened"]


def test_what_newer_code_leaves_behind_writes_nothing_more(
    tmp_path: Path, db_path: Path, broker: SQLiteBroker
):
    store = SQLiteStore(db_path, broker_database=broker.capabilities.database)
    publish(broker, "before")
    broker.incidents()  # a reader that is kept open
    store.begin(None).rollback()
    own = sqlite3.connect(db_path, isolation_level=None)
    newer = newer_code(
        tmp_path / "code", "alter table duly_messages rename column id to name;", oldest=NEXT
    )
    assert run(OPEN, newer, db_path) == ["opened"]
    outcome = publish(broker, "after")
    assert isinstance(outcome, duly.PublishFailed)
    with pytest.raises(duly.PublishFailed, match=LEFT_BEHIND):
        raise outcome
    with pytest.raises(BrokerUnusable, match=LEFT_BEHIND):
        broker.incidents()
    with pytest.raises(BrokerUnusable, match=LEFT_BEHIND):
        store.begin(None)
    own.execute("begin immediate")
    with pytest.raises(BrokerUnusable, match=LEFT_BEHIND):
        store.publish_within(own, [NEWS.message("x", source="paper")], [NEWS])
    own.close()
    store.close()
    [said] = run(OPEN, NOW, db_path)
    assert said.startswith("BrokerUnusable")
    assert rows(db_path, "select name from duly_messages") == [("before",)]
    assert run(OPEN, newer, db_path) == ["opened"], "nobody holds its turn"


def test_an_older_version_that_was_left_behind_is_refused_in_one_sentence(
    tmp_path: Path, db_path: Path
):
    newer = newer_code(tmp_path / "newer", ADDS, oldest=SCHEMA_VERSION)
    assert run(OPEN, newer, db_path) == ["opened"]
    assert run(OPEN, NOW, db_path) == ["opened"]
    [said] = run(OPEN, older_code(tmp_path / "older"), db_path)
    assert said.startswith(f"BrokerUnusable {db_path}: a newer duly has brought this database to")
    expected = f"schema {NEXT}, which code of schema {SCHEMA_VERSION} or later may use, and this"
    assert expected in said
    assert said.endswith("schema 1: upgrade duly here and start it again. Nothing was changed.")


def test_two_versions_are_made_up_in_one_transaction(tmp_path: Path, db_path: Path):
    older_file(db_path)
    wrong = newer_code(tmp_path / "wrong", "alter table nobodys add column a;", oldest=2)
    [said] = run(OPEN, wrong, db_path)
    assert said.startswith("BrokerUnusable")
    assert meta(db_path)["schema"] == 1, "not half of the way"
    assert run(OPEN, newer_code(tmp_path / "right", ADDS, oldest=2), db_path) == ["opened"]
    assert (meta(db_path)["schema"], meta(db_path)["oldest"]) == (NEXT, 2)


def test_tables_of_the_application_change_as_they_like(db_path: Path, broker: SQLiteBroker):
    publish(broker, "a")
    with closing(sqlite3.connect(db_path)) as own:
        own.execute("create table theirs (a)")
    publish(broker, "b")
    assert stored(db_path) == ["a", "b"]


KILLED = f"""
{WITH_CODE}
import os
from duly.sql.sqlite import DatabaseFile, file

steps, connect = int(sys.argv[3]), file.connect

def counted(*args, **options):
    connection = connect(*args, **options)
    left = [steps]
    def count(statement):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), 9)
    connection.set_trace_callback(count)
    return connection

file.connect = counted
DatabaseFile.open(sys.argv[2])
print("through")
"""


def killed_at(step: int, code: object, path: Path) -> bool:
    """Whether opening was killed; not where it has fewer steps."""
    with running(KILLED, code, path, step) as program:
        said = program.rest()
        assert said in ([], ["through"]), said
        assert program.process.returncode == (0 if said else -9)
        return not said


def test_a_migration_that_is_killed_anywhere_has_not_begun(tmp_path: Path):
    newer, reference = newer_code(tmp_path / "code", ADDS, oldest=2), tmp_path / "whole.db"
    older_file(reference)
    before = shape(reference)
    assert run(OPEN, newer, reference) == ["opened"]
    after, step = shape(reference), 0
    while True:
        step += 1
        path = tmp_path / f"{step}.db"
        older_file(path)
        if not killed_at(step, newer, path):
            break
        assert shape(path) == before, f"killed at statement {step}"
        assert meta(path)["schema"] == 1
        assert run(OPEN, newer, path) == ["opened"]
        assert shape(path) == after
    # journal mode, begin, meta made and read, three statements, version and oldest, commit
    assert step > 9


def test_making_the_tables_that_is_killed_anywhere_has_not_begun(tmp_path: Path):
    DatabaseFile.open(tmp_path / "whole.db").close()
    after, steps = shape(tmp_path / "whole.db"), 0
    for steps in range(1, 200, 7):
        path = tmp_path / f"{steps}.db"
        path.touch(0o600)
        if not killed_at(steps, NOW, path):
            break
        assert shape(path) == {}
        DatabaseFile.open(path).close()
        assert shape(path) == after
    assert steps > 30
