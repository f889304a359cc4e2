"""docs/guarantees.md says what the runs show, and nothing else.

Where this fails after a change of the code, ``make guarantees`` runs the sample again and writes
the page; look at what has changed in it.
"""

from __future__ import annotations

import msgspec

from duly.testing.simulation.points import CRASH_POINTS
from tests.proof import table
from tests.proof.mutations import MUTATIONS


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


def test_the_page_counts_the_planted_bugs() -> None:
    assert f" {len(MUTATIONS)} planted bugs " in table.PAGE.read_text(encoding="utf-8")


def test_the_long_campaign_is_what_is_claimed_of_it() -> None:
    results = table.kept(table.LONG)
    assert sum(each.distinct for each in results.values()) >= table.LONG_DISTINCT
    assert not {name: each.anomalies for name, each in results.items() if each.anomalies}
    reached = {point for each in results.values() for point in each.crashes}
    assert reached == set(CRASH_POINTS), "none at zero"


def test_pairs_of_crashes_broke_nothing() -> None:
    results = table.kept(table.PAIRS)
    assert {name.partition(",")[0] for name in results} == set(table.PLACES)
    assert not {name: each.anomalies for name, each in results.items() if each.anomalies}


def test_at_least_two_thousand_disks_were_opened() -> None:
    assert msgspec.json.decode(table.POWER_LOSS.read_bytes())["images"] >= 2_000
