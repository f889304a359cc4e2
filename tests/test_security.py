"""What SECURITY.md promises and no other test holds it to."""

from __future__ import annotations

import ast
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import duly
from duly.worker import Worker
from tests.waiting import eventually

REBUILDS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "yaml"}
SQL = "'); drop table duly_messages; delete from duly_topics; --"


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


def test_nothing_rebuilds_objects_from_data():
    assert duly.__file__ is not None
    for path in Path(duly.__file__).parent.rglob("*.py"):
        found = REBUILDS & set(imports(ast.parse(path.read_text(encoding="utf-8"))))
        assert not found, f"{path}: {found}"


@pytest.mark.parametrize("where", ["the same file", "another file"])
def test_sql_in_a_message_is_text(db_path: Path, tmp_path: Path, where: str):
    store = None if where == "the same file" else f"sqlite:///{tmp_path / 'effects.db'}"
    topic = duly.Topic("t", str, guarantee="exactly-once")
    app = duly.App("app", broker=f"sqlite:///{db_path}", store=store)
    seen: list[duly.Message[str]] = []

    @app.consumer(topic, name="reader", guarantee="exactly-once")
    def read(message: duly.Message[str], tx: duly.Transaction[sqlite3.Connection]) -> None:
        seen.append(message)
        raise duly.Reject(SQL)

    with app:
        app.publish(topic, SQL, id=SQL, key=SQL, headers={"tenant": SQL})
        with Worker(app):
            broker: Any = app.backends()[0]
            eventually(lambda: [s for s in broker.subscriptions() if s.dead], "it is dead")
        (letter,) = broker.dead_letters()
        assert app.publish(topic, SQL, id=SQL) == duly.RepeatDropped(SQL)
    got = letter.message
    assert (got.id, got.key, got.body.decode(), got.headers) == (SQL, SQL, SQL, {"tenant": SQL})
    assert SQL in letter.error
    with closing(sqlite3.connect(db_path)) as connection:
        assert connection.execute("select name from duly_topics").fetchall() == [("t",)]
