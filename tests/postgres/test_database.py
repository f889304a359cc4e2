"""`Database`: what it is recognised by, its own transactions, and what errors become."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator
from typing import LiteralString

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import dict_row, tuple_row
from psycopg_pool import ConnectionPool

from duly.errors import (
    BrokerError,
    BrokerUnavailable,
    BrokerUnusable,
    CommitUnknown,
    ConfigurationError,
    DulyError,
    TransactionInterrupted,
    TransactionLost,
)
from duly.sql.postgres import Database
from duly.sql.postgres.errors import broker_error
from duly.sql.postgres.guard import found_in, guard
from duly.sql.postgres.transactions import Say, begin, commit, roll_back
from duly.sql.steps import Steps
from tests.postgres.proxy import Cut, Proxy
from tests.servers.postgres import PostgresServer, Schema, shared_url
from tests.waiting import eventually


def says(*texts: str) -> Steps[None]:
    for text in texts:
        yield Say(text)


@pytest.fixture
def database(pg_schema: Schema) -> Iterator[Database]:
    with pg_schema.connect(autocommit=True) as connection:
        connection.execute("create table rows_ (value int primary key)")
    opened = Database(pg_schema.url, schema=pg_schema.duly)
    yield opened
    opened.close()


def values(schema: Schema) -> list[int]:
    with schema.connect() as connection:
        return [v for (v,) in connection.execute("select value from rows_ order by value")]


# --- identity


def test_it_is_recognised_by_the_system_and_not_by_the_url(database: Database, pg_schema: Schema):
    by_name = Database(pg_schema.url.replace("127.0.0.1", "localhost"), schema=pg_schema.duly)
    pool = ConnectionPool(pg_schema.url, min_size=1, open=True)
    by_pool = Database(pool, schema=pg_schema.duly)
    by_function = Database(pg_schema.connect, schema=pg_schema.duly)
    try:
        assert database.identity == by_name.identity == by_pool.identity == by_function.identity
        other = Database(pg_schema.url, schema="elsewhere")
        assert other.identity != database.identity
        other.close()
    finally:
        for each in (by_name, by_pool, by_function):
            each.close()
        pool.close()


def test_another_database_of_the_server_is_another(pg_server: PostgresServer):
    here, there = Database(pg_server.url), Database(pg_server.url_of("postgres"))
    assert here.identity != there.identity
    here.close()
    there.close()


def test_a_plain_role_is_enough_where_the_schema_is_there(pg_server: PostgresServer):
    owner = Database(pg_server.url)
    owner.ensure("store", "postgres_store")
    with psycopg.connect(pg_server.url) as connection:
        connection.execute("create role plain login")
        connection.execute("grant usage on schema duly to plain")
        connection.execute("grant select, insert, update, delete on duly.meta to plain")
    plain = Database(pg_server.url_of("duly", user="plain"))
    plain.ensure("store", "postgres_store")
    assert plain.identity == owner.identity
    with pytest.raises(BrokerUnusable, match="permission denied"):
        plain.ensure("broker", "postgres")
    for each in (owner, plain):
        each.close()


def test_many_that_create_the_schema_at_once_do_not_collide(pg_schema: Schema):
    databases = [Database(pg_schema.url, schema=pg_schema.duly) for _ in range(6)]
    failures: list[BaseException] = []

    def ensure(database: Database) -> None:
        try:
            database.ensure("store", "postgres_store")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ensure, args=(each,)) for each in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []
    for each in databases:
        each.close()


# --- errors


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("postgresql://u:s3cret@127.0.0.1:{port}/none", BrokerUnavailable),
        ("postgresql://u:s3cret@127.0.0.1:1/duly", BrokerUnavailable),
        ("postgresql://u:s3cret@127.0.0.1:nonsense/duly", BrokerError),
        ("postgresql://u:s3cret@127.0.0.1:{port}/duly?nonsense=1", ConfigurationError),
    ],
)
def test_a_wrong_url_is_named_without_its_password(url: str, kind: type[DulyError]):
    port = shared_url().rpartition(":")[2].partition("/")[0]
    with pytest.raises(kind) as raised:
        Database(url.format(port=port))
    error: BaseException | None = raised.value
    while error is not None:
        assert "s3cret" not in str(error) + repr(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_no_error_of_the_driver_is_without_a_meaning():
    """Every class the driver has, by code and by base, becomes one of duly's."""
    for name in dir(psycopg.errors):
        kind = getattr(psycopg.errors, name)
        if isinstance(kind, type) and issubclass(kind, psycopg.Error):
            meaning = broker_error(kind("text"), "here")
            assert isinstance(meaning, BrokerError), name


def test_what_a_statement_raises_is_dulys(database: Database):
    with pytest.raises(BrokerUnusable, match="defect of duly"):
        database.write(lambda: says("select nonsense"))
    with pytest.raises(BrokerUnusable):
        database.read(lambda: says("select nonsense"))


def test_a_server_that_is_gone_is_unavailable_and_comes_back(pg_server: PostgresServer):
    database = Database(pg_server.url)
    database.write(lambda: says("create table rows_ (value int)"))
    pg_server.kill()
    with pytest.raises(BrokerUnavailable):
        database.write(lambda: says("insert into rows_ values (1)"))
    pg_server.start()
    database.write(lambda: says("insert into rows_ values (2)"))
    with psycopg.connect(pg_server.url) as connection:
        assert connection.execute("select value from rows_").fetchall() == [(2,)]
    database.close()


# --- its own transactions


def test_a_deadlock_is_done_again(database: Database, pg_schema: Schema):
    database.write(lambda: says("insert into rows_ values (1), (2)"))
    both = threading.Barrier(2)
    tries: list[int] = []

    def crosswise(first: int, second: int) -> Steps[None]:
        tries.append(first)
        yield Say(f"update rows_ set value = value where value = {first}")
        if len(tries) <= 2:
            both.wait(30)
        yield Say(f"update rows_ set value = value where value = {second}")

    threads = [
        threading.Thread(target=database.write, args=(lambda a=a, b=b: crosswise(a, b),))
        for a, b in ((1, 2), (2, 1))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(tries) == 3, "one of them was done again"


def test_a_serialization_failure_is_done_again(database: Database, pg_schema: Schema):
    database.write(lambda: says("insert into rows_ values (1)"))
    tries: list[int] = []

    def steps() -> Steps[None]:
        tries.append(1)
        yield Say("select * from rows_")  # takes the snapshot
        if len(tries) == 1:
            with pg_schema.connect(autocommit=True) as other:
                other.execute("update rows_ set value = value + 1")
        yield Say("update rows_ set value = value * 10")

    database.write(steps, isolation="repeatable read")
    assert len(tries) == 2
    assert values(pg_schema) == [20]


@pytest.mark.parametrize(("when", "stored"), [("before", []), ("after", [1])])
def test_a_lost_answer_to_commit_is_unknown_and_not_tried_again(
    when: Cut, stored: list[int], pg_schema: Schema, pg_server: PostgresServer
):
    with psycopg.connect(pg_server.url, autocommit=True) as connection:
        connection.execute("create table rows_ (value int)")
    with Proxy(pg_server.port) as proxy:
        database = Database(proxy.url(pg_server.url))
        tries: list[int] = []

        def steps() -> Steps[None]:
            tries.append(1)
            yield Say("insert into rows_ values (1)")

        proxy.cut_at(b"commit\0", when)
        with pytest.raises(CommitUnknown):
            database.write(steps)
        assert proxy.cuts == 1
        assert tries == [1]
        with psycopg.connect(pg_server.url) as connection:
            assert [v for (v,) in connection.execute("select value from rows_")] == stored
        database.write(steps)  # and it goes on with another connection
        database.close()


# --- a transaction that is not what it was


def test_commit_answered_by_rollback_is_no_success(database: Database, pg_schema: Schema):
    with database.line() as line:
        line.run(begin(1))
        line.run(says("insert into rows_ values (1)"))
        with pytest.raises(psycopg.Error):
            line.run(says("select nonsense"))
        with pytest.raises(TransactionLost, match="swallowed"):
            line.run(commit(line.connection, 1, "here"))
    assert values(pg_schema) == []


def test_an_aborted_transaction_is_found_by_its_answer_too(database: Database):
    """Where the driver's status says that all is well, the answer does not."""
    with database.line() as line:
        line.run(begin(1))
        steps = commit(line.connection, 1, "here")
        next(steps)
        with pytest.raises(TransactionLost, match="answered with ROLLBACK"):
            steps.send("ROLLBACK")


@pytest.mark.parametrize("end", ["commit", "rollback", "commit; begin", "rollback; begin"])
def test_a_transaction_that_was_ended_by_sql_does_not_pass_as_success(
    end: LiteralString, database: Database, pg_schema: Schema
):
    with database.line() as line:
        line.run(begin(1))
        psycopg.ClientCursor(line.connection).execute(end)
        if "begin" in end:
            line.run(says("insert into rows_ values (7)"))
        with pytest.raises(TransactionLost, match="SQL of its own"):
            line.run(commit(line.connection, 1, "here"))
    assert values(pg_schema) == []


def test_a_session_that_the_server_ended_before_commit_is_interrupted(
    database: Database, pg_schema: Schema
):
    with database.line() as line:
        line.run(begin(1))
        line.run(says("insert into rows_ values (1)"))
        pid = line.connection.info.backend_pid
        with pg_schema.connect(autocommit=True) as other:
            other.execute("select pg_terminate_backend(%s)", (pid,))
            eventually(
                lambda: (
                    not other.execute(
                        "select 1 from pg_stat_activity where pid = %s", (pid,)
                    ).fetchall()
                ),
                "the session is gone",
            )
        with pytest.raises(psycopg.Error):
            line.run(says("select 1"))
        with pytest.raises(TransactionInterrupted, match="before COMMIT was sent"):
            line.run(commit(line.connection, 1, "here"))
        assert line.run(roll_back(line.connection)) is False
    assert values(pg_schema) == []


def test_nothing_is_compiled_for_looking_up_a_few_rows(database: Database):
    """A plan that is kept was, at each run, as soon as the log was large."""
    with database.line() as line:
        line.connection.execute("set jit = on")
        line.run(begin(1))
        assert line.connection.execute("show jit").fetchall() == [("off",)]
        line.run(roll_back(line.connection))
        assert line.connection.execute("show jit").fetchall() == [("on",)]


def test_standing_idle_for_too_long_is_certainly_not_committed(database: Database):
    with database.line() as line:
        line.run(begin(1, idle_s=0.05))
        eventually(lambda: _has_input(line.connection), "the server ended it")
        with pytest.raises(TransactionInterrupted, match="idle"):
            line.run(commit(line.connection, 1, "here"))


def _has_input(connection: psycopg.Connection) -> bool:
    waiting = select.poll()  # unlike select, for any number of open files
    waiting.register(connection.fileno(), select.POLLIN)
    return bool(waiting.poll(0))


def test_a_role_that_has_synchronous_commit_off_is_durable_here(pg_server: PostgresServer):
    with psycopg.connect(pg_server.url, autocommit=True) as connection:
        connection.execute("create role hasty login")
        connection.execute("alter role hasty set synchronous_commit = off")
    database = Database(pg_server.url_of("duly", user="hasty"))
    with database.line() as line:
        line.run(begin(1))
        shown = line.connection.execute("show synchronous_commit").fetchall()
    assert shown == [("on",)]
    database.close()


# --- the guard


@pytest.mark.parametrize(
    "attempt",
    [
        lambda c: c.commit(),
        lambda c: c.rollback(),
        lambda c: c.close(),
        lambda c: c.__enter__(),
        lambda c: setattr(c, "autocommit", False),
        lambda c: setattr(c, "isolation_level", 3),
        lambda c: c.set_autocommit(False),
        lambda c: c.tpc_begin("x"),
        lambda c: c.execute("commit"),
        lambda c: c.execute(b"COMMIT"),
        lambda c: c.execute(sql.SQL("commit")),
        lambda c: c.execute("insert into rows_ values (1); -- x\n commit"),
        lambda c: c.cursor().execute("rollback"),
        lambda c: c.cursor().executemany("abort", [()]),
        lambda c: c.cursor(row_factory=dict_row).execute("end"),
    ],
)
def test_a_handler_cannot_end_the_transaction(attempt, database: Database, pg_schema: Schema):
    with database.line() as line:
        line.run(begin(1))
        line.run(says("insert into rows_ values (5)"))
        restored = guard(line.connection)
        assert isinstance(line.connection, psycopg.Connection)
        with pytest.raises(ConfigurationError, match="This transaction is duly's"):
            attempt(line.connection)
        restored.restore()
        line.run(commit(line.connection, 1, "here"))
    assert values(pg_schema) == [5]


def test_what_a_handler_may_do_it_can(database: Database, pg_schema: Schema):
    with database.line() as line:
        line.run(begin(1))
        restored = guard(line.connection)
        connection = line.connection
        with connection.transaction():
            connection.execute("insert into rows_ values (1)")
        with pytest.raises(psycopg.errors.UniqueViolation), connection.transaction():
            connection.execute("insert into rows_ values (1)")
        with connection.cursor().copy("copy rows_ from stdin") as copy:
            copy.write_row((2,))
        with connection.pipeline():
            connection.execute("insert into rows_ values (3)")
        connection.execute("savepoint a")
        connection.execute("rollback to a")
        connection.row_factory = dict_row
        assert connection.execute("select 'commit; commit' as text").fetchall() == [
            {"text": "commit; commit"}
        ]
        restored.restore()
        line.run(commit(connection, 1, "here"))
        assert connection.row_factory is tuple_row
    assert values(pg_schema) == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("select 1; commit", "COMMIT"),
        ("/* commit */ rollback work", "ROLLBACK WORK"),
        ("prepare transaction 'x'", "PREPARE TRANSACTION"),
        ("rollback transaction to a", None),
        ("rollback to savepoint a", None),
        ("select $x$ ; commit $x$", None),
        ("select E'\\'; commit'", None),
        ('select ";commit"', None),
        ("select case when a then b end", None),
        ("prepare x as select 1", None),
    ],
)
def test_which_sql_ends_a_transaction(text: str, ends: str | None):
    assert found_in(text).ends == ends


def test_a_pool_gets_its_connections_back_as_they_were(pg_schema: Schema):
    with ConnectionPool(pg_schema.url, min_size=1, max_size=1, open=True) as pool:
        database = Database(pool, schema=pg_schema.duly)
        database.write(lambda: says("create table here (value int)"))
        with pool.connection(timeout=5) as connection:
            assert connection.autocommit is False
            assert type(connection) is psycopg.Connection
        database.close()


def test_it_is_not_shared_with_a_forked_child(database: Database, monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: 1)
    with pytest.raises(ConfigurationError, match="forked"):
        database.read(lambda: says("select 1"))


def test_the_shared_server_is_named_without_user(database: Database):
    assert "@" not in database.shown
    assert shared_url().partition("@")[2].partition("/")[0] in database.shown
