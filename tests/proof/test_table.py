"""docs/guarantees.md says what the runs show, and nothing else.

Where this fails after a change of the code, ``make guarantees`` runs the sample again and writes
the page; look at what has changed in it.
"""

from __future__ import annotations

import msgspec

from duly.testing.chaos.setup import FAULTS
from duly.testing.simulation.points import CRASH_POINTS
from duly.testing.simulation.scenario import KINDS, POSTGRES_KINDS
from tests.proof import table


def test_the_sample_shows_what_is_kept_of_it() -> None:
    found = table.sample()
    assert not {name: each.anomalies for name, each in found.items() if each.anomalies}
    assert found == table.kept(table.SAMPLE), "make guarantees"


def test_every_crash_point_is_in_the_sample() -> None:
    reached = {point for each in table.kept(table.SAMPLE).values() for point in each.crashes}
    assert reached == set(CRASH_POINTS)


def test_the_page_says_what_is_kept() -> None:
    text = table.PAGE.read_text(encoding="utf-8")
    assert table.page(text) == text, "make guarantees"


def test_the_long_campaign_is_what_is_claimed_of_it() -> None:
    results = table.kept(table.LONG)
    assert sum(each.distinct for each in results.values()) >= table.LONG_DISTINCT
    assert not {name: each.anomalies for name, each in results.items() if each.anomalies}
    reached = {point for each in results.values() for point in each.crashes}
    assert reached == set(CRASH_POINTS), "none at zero"


def test_on_a_server_every_crash_point_was_reached_too() -> None:
    results = table.kept(table.POSTGRES)
    assert {name.partition(",")[0] for name in results} == set(POSTGRES_KINDS)
    assert sum(each.distinct for each in results.values()) >= table.POSTGRES_DISTINCT
    assert not {name: each.anomalies for name, each in results.items() if each.anomalies}
    reached = {point for each in results.values() for point in each.crashes}
    assert reached == set(CRASH_POINTS), "none at zero"


def test_crowds_on_a_server_broke_nothing_and_every_fault_hit() -> None:
    runs = table.crowds()
    assert {
        "messages in rabbitmq, effects in sqlite",
        "messages in rabbitmq, effects in postgres",
        "messages in kafka, effects in sqlite",
        "messages in kafka, effects in postgres",
    } < {run["setup"] for run in runs}
    assert len(runs) >= 4
    for run in runs:
        assert (run["anomalies"], run["complaints"]) == ({}, 0)
        # What each fault costs a node is seconds.
        on_node = any(kind in run["setup"] for kind in ("rabbitmq", "kafka"))
        assert run["seconds"] >= (3 if on_node else 10) * 60
        # Which those are stands on the page, as zeros: with Kafka a round is long, and its faults
        # are many.
        missed = [name for name in run["profile"] if not run["hits"].get(name)]
        assert len(missed) <= (3 if "kafka" in run["setup"] else 0), missed
    assert {name for run in runs for name, count in run["hits"].items() if count} == set(FAULTS)


def test_pairs_of_crashes_broke_nothing() -> None:
    results = table.kept(table.PAIRS) | table.kept(table.POSTGRES_PAIRS)
    assert {name.partition(",")[0] for name in results} == {*KINDS, *POSTGRES_KINDS}
    assert min(each.distinct for each in results.values()) > 800
    assert not {name: each.anomalies for name, each in results.items() if each.anomalies}


def test_at_least_two_thousand_disks_were_opened() -> None:
    assert msgspec.json.decode(table.POWER_LOSS.read_bytes())["images"] >= 2_000
