"""Every violation of a promise is found in the evidence, whatever else is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from duly.demo import shop
from duly.demo.evidence import NOTICES, READINGS, open_evidence
from duly.demo.verdict import Judgement, judge
from tests.demo.honest import (
    AGAIN,
    LOST_READINGS,
    ORDERS,
    append,
    bury,
    drop,
    falsify,
    falsify_book,
    honest_run,
)

THE_RECEIPT = """cast(body as text) = '{"order":"o-3","cents":10}'"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    honest_run(tmp_path)
    return tmp_path


def judged(folder: Path) -> Mapping[str, Judgement]:
    with open_evidence(folder) as evidence:
        return {found.name: found for found in judge(evidence)}


def sql(statement: str) -> Callable[[Path], None]:
    return lambda folder: falsify(folder, statement)


def book(statement: str) -> Callable[[Path], None]:
    return lambda folder: falsify_book(folder, statement)


def test_an_honest_run_breaks_nothing(folder: Path):
    found = judged(folder)
    assert [each.broken for each in found.values()] == [()] * 4
    numbers = {
        name: (each.published, each.handled, each.lost, each.duplicated, each.hits)
        for name, each in found.items()
    }
    assert numbers == {
        "sensors": (ORDERS, ORDERS - len(LOST_READINGS), len(LOST_READINGS), 0, 1),
        "rides": (ORDERS, ORDERS, 0, len(AGAIN), 1),
        "rides-not-idempotent": (ORDERS, ORDERS, 0, len(AGAIN), 1),
        "payments": (ORDERS, ORDERS, 0, 0, 1),
    }


@pytest.mark.parametrize(
    ("flow", "violation", "falsified"),
    [
        # at-most-once
        ("sensors", "double start", lambda f: append(f / READINGS, "3")),
        ("sensors", "phantom", lambda f: append(f / READINGS, "999")),
        ("sensors", "aborted read", book("update sensors set outcome = 'fail' where id = '3'")),
        (
            "sensors",
            "unexplained loss",
            lambda f: drop(f / READINGS, "1", "2"),
        ),
        ("sensors", "lost write", sql("delete from duly_messages where id = '8'")),
        # at-least-once
        ("rides", "lost", sql("delete from board where ride = 3")),
        ("rides", "corruption", sql("update board set status = 'arrived' where ride = 3")),
        ("rides", "phantom", sql("insert into board values (999, 0, 'requested', 1)")),
        ("rides", "unexplained duplicate", sql("update board set runs = 2 where ride = 3")),
        ("rides", "unexplained duplicate", sql("update board set runs = 3 where ride = 5")),
        ("rides-not-idempotent", "lost", lambda f: drop(f / NOTICES, "3-0")),
        ("rides-not-idempotent", "phantom", lambda f: append(f / NOTICES, "999-0")),
        ("rides-not-idempotent", "unexplained duplicate", lambda f: append(f / NOTICES, "3-0")),
        (
            "rides-not-idempotent",
            "unexplained duplicate",
            # A worker that died though nobody killed it explains nothing.
            sql("update duly_incidents set worker = '1-other'"),
        ),
        # exactly-once
        ("payments", "lost effect", sql("delete from charges where order_id = 'o-3'")),
        ("payments", "duplicate effect", sql("insert into charges values ('o-3', 0, 1, 10)")),
        ("payments", "phantom", sql("insert into charges values ('o-999', 0, 1, 10)")),
        ("payments", "corruption", sql("update charges set cents = 11 where order_id = 'o-3'")),
        (
            "payments",
            "torn effect",
            sql("delete from entries where order_id = 'o-3' and account = 1"),
        ),
        ("payments", "torn effect", sql("insert into entries values ('o-999', 0, -10)")),
        ("payments", "torn effect", sql("insert into entries values ('o-3', 0, -10)")),
        (
            "payments",
            "missing output",
            sql(f"delete from duly_messages where {THE_RECEIPT}"),
        ),
        (
            "payments",
            "duplicate output",
            sql(
                "insert into duly_messages select position + 1000, source, id || 'b', key, "
                "time_ms, headers, due_ms, body from duly_messages "
                f"where {THE_RECEIPT}"
            ),
        ),
        (
            "payments",
            "ghost message",
            sql(
                "insert into duly_messages select position + 1000, source, id || 'b', key, "
                'time_ms, headers, due_ms, cast(\'{"order":"o-999","cents":10}\' as blob) '
                f"from duly_messages where {THE_RECEIPT}"
            ),
        ),
        ("payments", "ledger", sql("update accounts set balance = balance + 1")),
        (
            "payments",
            "ledger",
            # The money that one order moved went twice, though every table agrees otherwise.
            sql("update accounts set balance = balance + 10 * (2 * account - 1)"),
        ),
        (
            "payments",
            "duplicate",
            sql(
                "insert into duly_messages select position + 1000, source, id, key, time_ms, "
                "headers, due_ms, body from duly_messages where id = 'o-3'"
            ),
        ),
    ],
)
def test_a_planted_violation_is_found(
    folder: Path, flow: str, violation: str, falsified: Callable[[Path], object]
):
    falsified(folder)
    found = judged(folder)
    assert violation in {sentence.partition(":")[0] for sentence in found[flow].broken}
    # The two flows of ride updates share what explains a repeat.
    topic = flow.partition("-")[0]
    assert all(not each.broken for name, each in found.items() if name.partition("-")[0] != topic)


def test_a_charge_of_a_dead_letter_is_found(folder: Path):
    bury(folder, shop.checkout, "billing", "o-3")
    broken = judged(folder)["payments"].broken
    assert "effect of a dead letter" in {sentence.partition(":")[0] for sentence in broken}


def test_a_dead_letter_without_effect_is_not_lost(folder: Path):
    bury(folder, shop.rides, "notify", "3-0")
    drop(folder / NOTICES, "3-0")
    found = judged(folder)["rides-not-idempotent"]
    assert (found.handled, found.lost, found.broken) == (ORDERS - 1, 0, ())


def test_a_publish_of_unknown_outcome_counts_only_when_it_is_in_the_log(folder: Path):
    falsify_book(folder, "insert into checkout values ('o-999', 0, 1, 10, 'unknown')")
    assert judged(folder)["payments"].published == ORDERS
    falsify_book(folder, "update checkout set outcome = 'unknown' where id = 'o-3'")
    assert judged(folder)["payments"].published == ORDERS
