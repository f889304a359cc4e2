"""Tokens of claims: unlike each other, and all that finds a claim's ranges."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from duly.brokers.sqlite import SQLiteBroker
from duly.guarantees import Dead, Done, Release, Retry, Settlement
from duly.sql import log
from duly.sql.sqlite.driver import named_statements
from tests.sqlite.brokers import PLAIN, claim, execute, opened, options, publish, receipts


def lane_of(broker: SQLiteBroker) -> Any:
    return broker.subscribe([PLAIN], "s", options())


def test_a_token_is_never_given_twice(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(3))
    tokens = []
    for _ in range(3):
        lane = lane_of(broker)
        got = claim(lane)
        tokens.append(got[0].receipt[0])
        lane.settle([Release(r) for r in receipts(got)])
        broker.close()
        broker = opened(db_path)
    assert tokens == sorted(set(tokens))


@pytest.mark.parametrize(
    "name",
    ["stamp", "stamp_range", "drop_whole_claim", "pieces", "pieces_seen", "pieces_at_rest"],
)
def test_the_ranges_of_a_claim_are_looked_up_and_never_all_claims_looked_through(
    db_path: Path, name: str
):
    """Else a thousand handlers in flight, which settle in any order, look through each other's."""
    broker = opened(db_path)
    for sql in named_statements("")[name].split(";\n"):
        params = [1] * max(n for n in range(1, 5) if f"?{n}" in sql)
        plan = [row[3] for row in execute(broker, f"explain query plan {sql}", *params)]
        assert any(step.startswith("SEARCH duly_claims USING INTEGER PRIMARY KEY") for step in plan)
        assert any("INDEX duly_claims_further (token=?" in step for step in plan)
        assert not any(step.startswith("SCAN duly_claims") for step in plan)


def test_of_many_ranges_of_one_claim_each_is_found_by_its_token(db_path: Path):
    broker = opened(db_path)
    lane = lane_of(broker)
    publish(broker, PLAIN, range(20))
    got = receipts(claim(lane))
    assert lane.settle([Done(r) for r in got[::2]]) == []
    assert lane.settle([Done(r) for r in got[::2]]) == got[::2]
    assert list(lane.extend(got, 60)) == got[::2]
    assert lane.settle([Done(r) for r in got[1::2]]) == []
    assert execute(broker, "select count(*) from duly_claims") == [(0,)]


def test_a_range_that_is_given_back_does_not_stand_in_the_way_of_a_token(
    db_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Rows number themselves behind the greatest, which is that of a token."""
    broker = opened(db_path)
    lane = lane_of(broker)
    publish(broker, PLAIN, range(9))
    for _ in range(3):
        got = claim(lane, 3)
        lane.settle([Release(r) for r in receipts(got)[1:]])
        assert lane.settle([Done(receipts(got)[0])]) == []
    taken = execute(broker, "select claim_id from duly_claims order by claim_id")
    monkeypatch.setattr(broker.file, "new_token", itertools.count(taken[-1][0]).__next__)
    for n in (3, 4):
        got = claim(lane, n)
        assert lane.settle([Done(r) for r in receipts(got)]) == []


@pytest.mark.parametrize(
    "name", ["outlook_ordered", "free_ranges_ordered", "accused_ranges_ordered"]
)
def test_what_keeps_a_stream_is_not_looked_for_once_for_each_of_its_ranges(
    db_path: Path, name: str
):
    """Else thousands that a dead worker left take each look, and each claim, half a second."""
    broker = opened(db_path)
    sql = named_statements("")[name]
    params = [1, 10][: 1 + ("?2" in sql)]
    plan = [row[3] for row in execute(broker, f"explain query plan {sql}", *params)]
    correlated = [step for step in plan if step.startswith("CORRELATED")]
    # The outlook looks up whether a stream that has fresh messages has claims: one for each stream.
    assert len(correlated) == (name == "outlook_ordered")


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("end", [Done, lambda r: Retry(r, 9, "x"), lambda r: Dead(r, "x")])
def test_a_transaction_over_one_range_of_a_claim_of_several_is_not_lost(
    db_path: Path, which: int, end: Callable[[Any], Settlement]
):
    """It is stamped by the fence, and the others are not."""
    broker = opened(db_path)
    lane = lane_of(broker)
    publish(broker, PLAIN, range(9))
    got = receipts(claim(lane))
    lane.settle([Done(r) for r in got[::2]])
    lane.settle([Retry(r, 0, "x") for r in got[1::2]])
    got = receipts(claim(lane))
    assert len({receipt[0] for receipt in got}) == 1

    def steps() -> Any:
        assert (yield from log.fence([got[which]], 4711))
        assert (yield from log.settle([end(got[which])], 1, 4711)) == []

    broker.file.write(steps)
    assert lane.settle([Done(r) for r in got]) == [got[which]]
