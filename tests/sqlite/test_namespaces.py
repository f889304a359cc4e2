"""Several environments in one file: none sees, holds up or damages what another has."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import duly
from duly.errors import ConfigurationError
from duly.sql.sqlite import DatabaseFile
from duly.sql.sqlite.driver import in_namespace, named_statements
from duly.worker import Worker
from tests.schema.versions import meta, older_file
from tests.sqlite.stores import rows
from tests.waiting import eventually

ORDERS = duly.Topic("orders", str, guarantee="exactly-once")
RECEIPTS = duly.Topic("receipts", str, guarantee="at-least-once")


class Shop:
    """The same application in one environment."""

    def __init__(self, url: str, store: str | None = None) -> None:
        self.app = duly.App("shop", broker=url, store=store)
        self.handled: list[str] = []
        self.mailed: list[str] = []

        @self.app.consumer(
            ORDERS, name="billing", guarantee="exactly-once", retry=duly.RetryPolicy(attempts=1)
        )
        def charge(order: str, tx: duly.Transaction[sqlite3.Connection]) -> None:
            if order == "bad":
                raise ValueError(order)
            self.handled.append(order)
            tx.publish(RECEIPTS, order)

        @self.app.consumer(RECEIPTS, name="mail", guarantee="at-least-once")
        def send(receipt: str) -> None:
            self.mailed.append(receipt)

    @property
    def broker(self) -> Any:
        return self.app.backends()[0]


@pytest.mark.parametrize("store", [None, "effects.db"])
def test_two_environments_never_see_each_other(tmp_path: Path, db_path: Path, store: str | None):
    def shop(options: str) -> Shop:
        at = None if store is None else f"sqlite:///{tmp_path / store}{options}"
        return Shop(f"sqlite:///{db_path}{options}", at)

    production, staging = shop(""), shop("?namespace=staging")
    with production.app, staging.app:
        production.app.publish(ORDERS, "real", id="o-1")
        with Worker(staging.app):
            assert isinstance(staging.app.publish(ORDERS, "tried", id="o-1"), duly.Published)
            staging.app.publish(ORDERS, "bad", id="o-2")
            eventually(lambda: staging.mailed == ["tried"], "staging has done its own")
            eventually(staging.app.dead_letters, "and given up on its own")
        assert production.handled == production.mailed == []
        assert production.app.dead_letters() == []
        assert production.broker.incidents() == []
        with Worker(production.app):
            eventually(lambda: production.mailed == ["real"], "production has done its own")
        assert (set(staging.handled), staging.mailed) == ({"tried"}, ["tried"])
        assert production.app.publish(ORDERS, "real", id="o-1") == duly.RepeatDropped("o-1")
        assert len(staging.broker.incidents(kind="repeat-dropped")) == 0
        assert production.broker.incidents(kind="dead-letter") == []
        assert {state.dead for state in production.broker.subscriptions()} == {0}


def tables(path: Path) -> set[str]:
    return {
        name for (name,) in rows(path, "select name from sqlite_master where name like 'duly%'")
    }


def test_no_two_namespaces_have_a_table_in_common(db_path: Path):
    # duly_log_dead is a table, and "log" would be a namespace with a table "dead".
    seen: set[str] = set()
    for namespace in ("", "log", "log_dead", "dead", "inbox", "outbox", "a", "a_log"):
        DatabaseFile.open(db_path, namespace=namespace).close()
        found = tables(db_path) - seen
        assert len(found) == (len(seen) if namespace == "log" else len(found))
        assert all(name.startswith(f"duly_{namespace}__") for name in found) or not namespace
        seen |= found
    assert len(seen) % 8 == 0


def test_every_statement_names_the_tables_of_its_namespace():
    for name, sql in named_statements("staging").items():
        assert not re.search(r"\bduly_(?!staging__)", sql), name
    assert in_namespace("select duly_dead.key", "x") == "select duly_x__dead.key"


@pytest.mark.parametrize("namespace", ["", "staging"])
@pytest.mark.parametrize("other", ["", "staging", "dead"])
def test_a_handler_changes_no_namespaces_tables(db_path: Path, namespace: str, other: str):
    DatabaseFile.open(db_path, namespace=other).close()
    prefix = f"duly_{other}__" if other else "duly_"
    shop = Shop(f"sqlite:///{db_path}" + (f"?namespace={namespace}" if namespace else ""))
    with shop.app, shop.app.transaction() as tx:
        assert tx.connection.execute(f"select count(*) from {prefix}messages").fetchone() == (0,)
        for sql in (
            f"delete from {prefix}messages",
            f"update {prefix}meta set value = 99",
            f"drop table {prefix}claims",
            f"alter table {prefix}inbox add column a",
        ):
            with pytest.raises(ConfigurationError, match="duly's own table"):
                tx.connection.execute(sql)


def test_a_namespace_is_brought_up_to_date_by_itself(db_path: Path):
    older_file(db_path)
    DatabaseFile.open(db_path, namespace="staging").close()
    assert meta(db_path)["schema"] == 1, "production is still run by the version before"
    assert meta(db_path, "duly_staging__")["schema"] > 1
    DatabaseFile.open(db_path).close()
    assert meta(db_path)["schema"] == meta(db_path, "duly_staging__")["schema"]


def test_what_leaves_one_namespace_behind_holds_for_it_alone(db_path: Path):
    production, staging = (DatabaseFile.open(db_path, namespace=n) for n in ("", "staging"))
    with closing(sqlite3.connect(db_path)) as foreign:
        foreign.execute("update duly_staging__meta set value = 99 where name = 'oldest'")
        foreign.execute("create table moved (a)")
        foreign.commit()
    production.read(lambda: iter(()))  # type: ignore[arg-type,return-value]
    with pytest.raises(duly.BrokerUnusable, match="upgrade duly here"):
        staging.read(lambda: iter(()))  # type: ignore[arg-type,return-value]
    production.close()
    staging.close()
