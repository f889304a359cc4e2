"""How to test your own application: `ex01_payments.py`, on real lanes, a file of the test's own.

    pytest test_ex08_payments.py

The first test is what most tests look like. The second runs five times, with calls of the broker
that fail, answers that are lost, leases that end early and workers that die. The third moves the
clock. docs/testing.md has the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ex01_payments import Withdrawal, app, notices, withdrawals

from duly.testing import RunApp, Running

TABLES = (
    "create table accounts (account primary key, cents integer)",
    "create table book (id, account, cents)",
    "insert into accounts values ('ann', 1000)",
)


def balance(t: Running) -> int:
    with t.connection() as db:
        [(cents,)] = db.execute("select cents from accounts").fetchall()
    return int(cents)


def with_tables(t: Running) -> Running:
    with t.connection() as db:
        for statement in TABLES:
            db.execute(statement)
    return t


@pytest.fixture
def t(duly_running: RunApp) -> Iterator[Running]:
    with duly_running(app) as running:
        yield with_tables(running)


def test_a_withdrawal_is_booked_and_told(t: Running) -> None:
    t.publish(withdrawals, Withdrawal("ann", 300))
    t.drain()
    assert balance(t) == 700
    assert t.payloads(notices) == ["300 cents were taken from ann"]


def test_whatever_goes_wrong_each_is_booked_once(duly_faulty: RunApp) -> None:
    with duly_faulty(app) as running:
        t = with_tables(running)
        t.publish_many(withdrawals, [Withdrawal("ann", 10) for _ in range(9)])
        t.drain(advance=True)
        assert balance(t) == 1000 - 10 * len(t.payloads(notices))
        assert len(t.payloads(notices)) + len(t.dead("ledger")) == 9


def test_what_an_account_does_not_hold_is_refused_and_seen(t: Running) -> None:
    t.publish(withdrawals, Withdrawal("ann", 2000))
    t.drain()
    assert balance(t) == 1000
    [letter] = t.dead("ledger")
    assert "does not hold 2000 cents" in letter.error
