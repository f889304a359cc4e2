"""Payments: each withdrawal takes effect once, whatever is killed.

The balance, the entry in the book and the message to the customer are one transaction with the
memory that the withdrawal was handled. What an account does not hold is refused for good. The
publisher names each withdrawal itself, so that sending it again pays nothing twice.

    duly run ex01_payments:app --processes 2     # and kill -9 its workers while it works
    python ex01_payments.py                      # as often as you like
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

import duly


@dataclass(frozen=True)
class Withdrawal:
    """What somebody takes from an account."""

    account: str
    cents: int


withdrawals = duly.Topic("withdrawals", Withdrawal, guarantee="exactly-once")
notices = duly.Topic("notices", str, guarantee="at-least-once")
app = duly.App("bank", broker="sqlite:///bank.db")


@app.consumer(withdrawals, name="ledger", guarantee="exactly-once")
def withdraw(
    withdrawal: duly.Message[Withdrawal], tx: duly.Transaction[sqlite3.Connection]
) -> None:
    account, cents = withdrawal.payload.account, withdrawal.payload.cents
    enough = tx.connection.execute(
        "update accounts set cents = cents - ? where account = ? and cents >= ?",
        (cents, account, cents),
    )
    if not enough.rowcount:
        raise duly.Reject(f"account {account} does not hold {cents} cents")
    tx.connection.execute("insert into book values (?, ?, ?)", (withdrawal.id, account, cents))
    tx.publish(notices, f"{cents} cents were taken from {account}")


@app.consumer(notices, name="mail", guarantee="at-least-once")
def mail(notice: duly.Message[str]) -> None:
    # A mail cannot be taken back: the key lets the mail server drop a second one.
    print(f"mail {notice.idempotency_key}: {notice.payload}", flush=True)


def main() -> None:
    with app:
        with app.transaction() as tx:
            tx.connection.execute(
                "create table if not exists accounts (account primary key, cents integer)"
            )
            tx.connection.execute("create table if not exists book (id, account, cents)")
            tx.connection.execute("insert or ignore into accounts values ('ann', 100000)")
        payments = [Withdrawal("ann", 10) for _ in range(1000)]
        app.publish_many(withdrawals, payments, ids=[f"2026-01-01/{n}" for n in range(1000)])
        print(app.publish(withdrawals, Withdrawal("ann", 99_999_999), id="2026-01-01/too-much"))


if __name__ == "__main__":
    main()
