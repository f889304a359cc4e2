"""The servers that tests start: killed, they come back with what was committed."""

from __future__ import annotations

import psycopg
import pytest

from tests.servers.postgres import PostgresServer, Schema


def test_killed_it_comes_back_with_what_was_committed(pg_server: PostgresServer):
    with psycopg.connect(pg_server.url) as connection:
        connection.execute("create table kept (value int)")
        connection.execute("insert into kept values (1)")
    lost = psycopg.connect(pg_server.url)
    lost.execute("insert into kept values (2)")
    pg_server.kill()
    with pytest.raises(psycopg.OperationalError):
        lost.execute("select 1")
    pg_server.start()
    with psycopg.connect(pg_server.url) as connection:
        assert connection.execute("select value from kept").fetchall() == [(1,)]
    lost.close()


def test_each_test_has_a_schema_of_its_own(pg_schema: Schema):
    with pg_schema.connect() as connection:
        connection.execute("create table here (value int)")
        [(found,)] = connection.execute(
            "select table_schema from information_schema.tables where table_name = 'here'"
        ).fetchall()
    assert found == pg_schema.name
