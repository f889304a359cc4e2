"""A damaged row is a dead letter with its reason, and in nobody's way."""

from __future__ import annotations

from pathlib import Path

import pytest

from duly.brokers.sqlite import SQLiteBroker
from tests.sqlite.brokers import PLAIN, claim, drain, execute, leftovers, opened, options, publish


def damage(broker: SQLiteBroker, column: str, value: str) -> None:
    """Write SQL's ``value`` into the second message, past the broker."""
    execute(
        broker,
        f"update duly_messages set {column} = {value} "
        "where position = 1 + (select min(position) from duly_messages)",
    )


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("headers", "'{no json'", "malformed"),
        ("headers", "'[1, 2]'", "object"),
        ("headers", "'{\"tenant\": 7}'", "str"),
        ("headers", "cast(x'7bff7d' as text)", "headers is no text"),
        ("id", "cast(x'ff' as text)", "id is no text"),
        ("source", "cast(x'ff41' as text)", "source is no text"),
        ("key", "cast(x'80' as text)", "key is no text"),
    ],
)
def test_a_damaged_row_is_a_dead_letter(db_path: Path, column: str, value: str, said: str):
    broker = opened(db_path)
    publish(broker, PLAIN, range(4), key="k", headers={"tenant": "t"})
    damage(broker, column, value)
    lane = broker.subscribe([PLAIN], "s", options())
    assert drain(lane) == ["0", "2", "3"]
    [letter] = broker.dead_letters()
    assert said in letter.error
    assert "damaged" in letter.error
    assert letter.message.body == b"1"
    assert leftovers(broker) == {"duly_claims": 0, "duly_parked": 0}


def test_a_damaged_row_alone_does_not_end_the_lane(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(3))
    damage(broker, "headers", "'{'")
    lane = broker.subscribe([PLAIN], "s", options())
    assert [len(claim(lane, 1)) for _ in range(3)] == [1, 1, 0]


def test_rows_that_the_log_lost_are_passed_over(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(5))
    execute(
        broker, "delete from duly_messages where body in (cast('1' as blob), cast('3' as blob))"
    )
    lane = broker.subscribe([PLAIN], "s", options())
    assert drain(lane) == ["0", "2", "4"]
    assert leftovers(broker) == {"duly_claims": 0, "duly_parked": 0}
