"""When a run says nothing, it says so; what breaks a promise is never hidden by that."""

from __future__ import annotations

from dataclasses import replace

import pytest

from duly.demo.result import Deaths, weigh
from duly.demo.verdict import Judgement
from duly.guarantees import Guarantee

ALL_HIT = Deaths(kills=10, in_work=10, in_transaction=4)


def judgement(consumer: str, guarantee: Guarantee, duplicated: int = 0) -> Judgement:
    return Judgement(
        name=consumer, consumer=consumer, guarantee=guarantee, published=100, handled=100,
        lost=0, duplicated=duplicated, broken=(), happened="all went well", hits=3,
    )  # fmt: skip


SENSORS = judgement("dashboard", Guarantee.AT_MOST_ONCE)
NOTIFY = judgement("notify", Guarantee.AT_LEAST_ONCE, duplicated=5)
PAYMENTS = judgement("billing", Guarantee.EXACTLY_ONCE)


def test_a_run_that_hit_its_aim_is_valid():
    result = weigh([SENSORS, NOTIFY, PAYMENTS], ALL_HIT, 10.0, {"billing": 10.0})
    assert (result.verdict, result.exit_status, list(result.why)) == ("valid", 0, [])
    assert [flow.messages_per_s for flow in result.flows] == [0.0, 0.0, 10.0]


@pytest.mark.parametrize(
    ("deaths", "says"),
    [
        (Deaths(0, 0, 0), "no worker was killed"),
        (Deaths(10, 4, 4), "only 4 of 10 kills"),
    ],
)
def test_too_few_kills_in_work_show_nothing(deaths: Deaths, says: str):
    result = weigh([SENSORS, NOTIFY, PAYMENTS], deaths, 10.0, {})
    assert (result.verdict, result.exit_status) == ("unknown", 3)
    assert says in result.why[0]
    assert {flow.verdict for flow in result.flows} == {"unknown"}


def test_half_of_the_kills_are_enough():
    assert weigh([SENSORS, NOTIFY], Deaths(10, 5, 0), 10.0, {}).verdict == "valid"


def test_without_a_repeat_nothing_is_shown():
    result = weigh([SENSORS, replace(NOTIFY, duplicated=0), PAYMENTS], ALL_HIT, 10.0, {})
    assert result.verdict == "unknown"
    assert "not idempotent repeated nothing" in result.why[0]


def test_a_flow_that_no_kill_hit_is_unknown_by_itself():
    result = weigh([SENSORS, NOTIFY, replace(PAYMENTS, hits=0)], ALL_HIT, 10.0, {})
    assert [flow.verdict for flow in result.flows] == ["valid", "valid", "unknown"]
    assert (result.verdict, result.exit_status) == ("unknown", 3)


def test_a_flow_without_messages_is_unknown():
    result = weigh([NOTIFY, replace(PAYMENTS, published=0)], ALL_HIT, 10.0, {})
    assert [flow.verdict for flow in result.flows] == ["valid", "unknown"]


def test_a_broken_promise_is_invalid_whatever_else_is_unknown():
    broken = replace(PAYMENTS, broken=("duplicate effect: 1 orders were charged twice",))
    result = weigh([SENSORS, NOTIFY, broken], Deaths(10, 0, 0), 10.0, {})
    assert [flow.verdict for flow in result.flows] == ["unknown", "unknown", "invalid"]
    assert (result.verdict, result.exit_status) == ("invalid", 1)


def test_the_json_says_it_all():
    result = weigh([SENSORS, NOTIFY, PAYMENTS], ALL_HIT, 12.345, {"billing": 99.6})
    told = result.as_json()
    assert (told["kills"], told["kills_in_work"], told["seconds"]) == (10, 10, 12.35)
    assert told["flows"][2] == {
        "name": "billing",
        "guarantee": "exactly-once",
        "published": 100,
        "handled": 100,
        "lost": 0,
        "duplicated": 0,
        "messages_per_s": 100,
        "verdict": "valid",
        "why": [],
        "kills_in_work": 3,
    }
