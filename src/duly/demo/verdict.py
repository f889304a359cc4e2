"""The verdict on each flow, from the evidence alone: one query for each way to break a promise.

The names of the checks are those of the guarantees' specification. A check that finds anything
makes the verdict invalid, and it says how much of what it found.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from duly.guarantees import PROMISES, Guarantee

Verdict = Literal["valid", "invalid", "unknown"]


@dataclass(frozen=True, slots=True)
class Check:
    """``query`` counts what must not be; ``found`` says what it is."""

    name: str
    found: str
    query: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the evidence says about one flow.

    ``handled`` are the published messages whose effect is there, ``lost`` those without one and
    not dead-lettered, ``duplicated`` effects beyond the first of a message. ``broken`` tells
    what broke the promise, one sentence a check; ``hits`` counts the kills that struck it.
    """

    name: str
    consumer: str
    guarantee: Guarantee
    published: int
    handled: int
    lost: int
    duplicated: int
    broken: Sequence[str]
    happened: str
    hits: int

    @property
    def promised(self) -> str:
        """The promise, in words."""
        return PROMISES[self.guarantee].promise


# --- sensors: never handled twice

SENSORS = (
    Check(
        "double start",
        "readings were recorded more than once",
        "select count(*) from (select 1 from recorded group by id having count(*) > 1)",
    ),
    Check(
        "phantom",
        "readings were recorded that nobody published",
        "select count(*) from recorded where id not in (select id from book.sensors)",
    ),
    Check(
        "aborted read",
        "readings were recorded though publishing them had failed",
        "select count(*) from recorded r join book.sensors b on b.id = r.id "
        "where b.outcome = 'fail'",
    ),
    Check(
        "unexplained loss",
        "readings were lost beyond what the kills put at risk",
        """
        select max(0,
            (select count(*) from logged where topic = 'sensors'
                and id not in (select id from recorded)
                and id not in (select id from dead where consumer = 'dashboard'))
            - (select count(*) from book.kills)
                * (select crash_loses from book.limits where consumer = 'dashboard')
        )
        """,
    ),
    Check(
        "lost write",
        "readings vanished between the publisher and the log, and no drop was counted",
        """
        select max(0,
            (select count(*) from sensors_due
                where id not in (select id from logged where topic = 'sensors'))
            - (select coalesce(sum(count), 0) from shop.duly_incidents
                where kind = 'dropped' and topic = 'sensors')
        )
        """,
    ),
)


def judge_sensors(db: sqlite3.Connection) -> Judgement:
    """At-most-once: no reading twice, and no loss but for a kill or a counted drop."""
    published = _count(db, "select count(*) from sensors_due")
    handled = _count(db, "select count(*) from sensors_due where id in (select id from recorded)")
    duplicated = _count(db, "select count(*) - count(distinct id) from recorded")
    risk = _count(
        db,
        "select (select count(*) from book.kills) * crash_loses from book.limits "
        "where consumer = 'dashboard'",
    )
    lost = published - handled
    return Judgement(
        "sensors",
        "dashboard",
        Guarantee.AT_MOST_ONCE,
        published,
        handled,
        lost,
        duplicated,
        _broken(db, SENSORS),
        f"no reading was recorded twice; {_are(lost, 'reading')} lost, and at most "
        f"{risk:,} were at risk in the kills",
        _hits(db, "dashboard"),
    )


# --- rides: handled, or dead-lettered in sight

BOARD = (
    Check(
        "lost",
        "ride updates never reached the board",
        """
        select count(*) from rides_due d
        where not exists (select 1 from shop.board b where b.ride = d.ride and b.step = d.step)
        and d.id not in (select id from dead where consumer = 'board')
        """,
    ),
    Check(
        "corruption",
        "lines of the board say something else than what was published",
        """
        select count(*) from shop.board b join book.rides d on d.ride = b.ride and d.step = b.step
        where d.status <> b.status
        """,
    ),
    Check(
        "phantom",
        "lines of the board were never published",
        """
        select count(*) from shop.board where (ride, step) not in (
            select ride, step from book.rides where outcome <> 'fail'
        )
        """,
    ),
    Check(
        "unexplained duplicate",
        "ride updates came to the board again though no kill was the cause",
        """
        select count(*) from shop.board b
            join book.rides d on d.ride = b.ride and d.step = b.step
        where b.runs > 1 + coalesce(
            (select times from redelivered r where r.consumer = 'board' and r.id = d.id), 0)
        """,
    ),
)

NOTIFY = (
    Check(
        "lost",
        "ride updates nobody was told of",
        """
        select count(*) from rides_due where id not in (select id from notified)
        and id not in (select id from dead where consumer = 'notify')
        """,
    ),
    Check(
        "phantom",
        "notices were sent of what was never published",
        "select count(*) from notified where id not in "
        "(select id from book.rides where outcome <> 'fail')",
    ),
    Check(
        "unexplained duplicate",
        "notices were sent again though no kill was the cause",
        """
        select count(*) from (select id, count(*) as times from notified group by id) n
        where n.times > 1 and n.times > 1 + coalesce(
            (select times from redelivered r where r.consumer = 'notify' and r.id = n.id), 0)
        """,
    ),
)


def judge_board(db: sqlite3.Connection) -> Judgement:
    """At-least-once with an idempotent handler: everything is there, and right."""
    published = _count(db, "select count(*) from rides_due")
    handled = _count(
        db,
        "select count(*) from rides_due d where exists "
        "(select 1 from shop.board b where b.ride = d.ride and b.step = d.step)",
    )
    again = _count(db, "select coalesce(sum(runs - 1), 0) from shop.board")
    return Judgement(
        "rides",
        "board",
        Guarantee.AT_LEAST_ONCE,
        published,
        handled,
        _count(db, BOARD[0].query),
        again,
        _broken(db, BOARD),
        f"every update is on the board; {_came(again, 'update')} again and changed nothing, as "
        "the handler is idempotent",
        _hits(db, "board"),
    )


def judge_notify(db: sqlite3.Connection) -> Judgement:
    """At-least-once with a handler that is not: everything was done, some of it twice."""
    published = _count(db, "select count(*) from rides_due")
    handled = _count(db, "select count(*) from rides_due where id in (select id from notified)")
    again = _count(db, "select count(*) - count(distinct id) from notified")
    return Judgement(
        "rides-not-idempotent",
        "notify",
        Guarantee.AT_LEAST_ONCE,
        published,
        handled,
        _count(db, NOTIFY[0].query),
        again,
        _broken(db, NOTIFY),
        f"every passenger was told; {_went(again, 'notice')} out twice, each after a kill: that "
        "is what at-least-once costs a handler that is not idempotent",
        _hits(db, "notify"),
    )


# --- payments: effects commit once

PAYMENTS = (
    Check(
        "lost effect",
        "orders were never charged",
        """
        select count(*) from checkout_due where id not in (select order_id from shop.charges)
        and id not in (select id from dead where consumer = 'billing')
        """,
    ),
    Check(
        "duplicate effect",
        "orders were charged more than once",
        "select count(*) from (select 1 from shop.charges group by order_id having count(*) > 1)",
    ),
    Check(
        "phantom",
        "orders were charged that nobody placed",
        "select count(*) from shop.charges where order_id not in "
        "(select id from book.checkout where outcome <> 'fail')",
    ),
    Check(
        "effect of a dead letter",
        "orders were charged and dead-lettered",
        "select count(*) from shop.charges where order_id in "
        "(select id from dead where consumer = 'billing')",
    ),
    Check(
        "corruption",
        "charges name another amount or account than the order",
        """
        select count(*) from shop.charges c join book.checkout b on b.id = c.order_id
        where (c.payer, c.payee, c.cents) <> (b.payer, b.payee, b.cents)
        """,
    ),
    Check(
        "torn effect",
        "charges are without exactly their two entries",
        """
        select count(*) from shop.charges c left join (
            select order_id, count(*) as entries, sum(cents) as total, max(cents) as cents
            from shop.entries group by order_id
        ) e on e.order_id = c.order_id
        where e.entries is not 2 or e.total <> 0 or e.cents <> c.cents
        """,
    ),
    Check(
        "torn effect",
        "entries are without a charge",
        "select count(*) from shop.entries "
        "where order_id not in (select order_id from shop.charges)",
    ),
    Check(
        "missing output",
        "charges are without a receipt",
        "select count(*) from shop.charges where order_id not in (select order_id from receipts)",
    ),
    Check(
        "duplicate output",
        "orders have more than one receipt",
        "select count(*) from (select 1 from receipts group by order_id having count(*) > 1)",
    ),
    Check(
        "ghost message",
        "receipts are for orders that were not charged, or not of this amount",
        "select count(*) from receipts "
        "where (order_id, cents) not in (select order_id, cents from shop.charges)",
    ),
    Check(
        "ledger",
        "accounts do not hold what the published orders leave in them",
        """
        with moved as (
            select payer as account, -cents as cents from checkout_due
            where id not in (select id from dead where consumer = 'billing')
            union all
            select payee, cents from checkout_due
            where id not in (select id from dead where consumer = 'billing')
        ), due as (select account, sum(cents) as cents from moved group by account)
        select count(*) from book.accounts b
            left join shop.accounts a on a.account = b.account
            left join due d on d.account = b.account
        where a.balance is not b.opening + coalesce(d.cents, 0)
        """,
    ),
    Check(
        "duplicate",
        "orders stand in the log twice though publishing them was exactly-once",
        "select count(*) from (select 1 from logged where topic = 'checkout' "
        "group by id having count(*) > 1)",
    ),
)


def judge_payments(db: sqlite3.Connection) -> Judgement:
    """Exactly-once: one charge an order, one receipt a charge, and the sums agree."""
    published = _count(db, "select count(*) from checkout_due")
    handled = _count(
        db,
        "select count(*) from checkout_due where id in (select order_id from shop.charges)",
    )
    receipts = _count(db, "select count(*) from receipts")
    repeated = _count(db, "select count(*) from book.repeated")
    accounts, total = db.execute("select count(*), sum(balance) from shop.accounts").fetchone()
    return Judgement(
        "payments",
        "billing",
        Guarantee.EXACTLY_ONCE,
        published,
        handled,
        _count(db, PAYMENTS[0].query),
        _count(db, "select count(*) - count(distinct order_id) from shop.charges"),
        _broken(db, PAYMENTS),
        f"{handled:,} orders charged once, {receipts:,} receipts; {_were(repeated, 'order')} "
        f"published twice and charged once; {accounts:,} accounts still hold "
        f"{(total or 0) / 100:,.2f} together",
        _hits(db, "billing"),
    )


# --- all of them


def judge(db: sqlite3.Connection) -> Sequence[Judgement]:
    """Every flow, by the evidence that `open_evidence` gathered."""
    return judge_sensors(db), judge_board(db), judge_notify(db), judge_payments(db)


def _count(db: sqlite3.Connection, query: str) -> int:
    (found,) = db.execute(query).fetchone()
    return int(found)


def _broken(db: sqlite3.Connection, checks: Sequence[Check]) -> Sequence[str]:
    found: list[tuple[Check, Any]] = [(check, _count(db, check.query)) for check in checks]
    return tuple(f"{check.name}: {count:,} {check.found}" for check, count in found if count)


def _hits(db: sqlite3.Connection, consumer: str) -> int:
    (hits,) = db.execute(
        "select count(*) from book.kills k where k.struck = ?1 or exists "
        "(select 1 from book.held h where h.kill = k.number and h.consumer = ?1)",
        (consumer,),
    ).fetchone()
    return int(hits)


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _are(count: int, what: str) -> str:
    return f"{_plural(count, what)} {'is' if count == 1 else 'are'}"


def _were(count: int, what: str) -> str:
    return f"{_plural(count, what)} {'was' if count == 1 else 'were'}"


def _came(count: int, what: str) -> str:
    return f"{_plural(count, what)} came"


def _went(count: int, what: str) -> str:
    return f"{_plural(count, what)} went"
