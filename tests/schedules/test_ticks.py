"""When schedules tick, across changes of the clocks, and what is no schedule."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import islice
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

import duly
from duly.errors import ConfigurationError
from duly.schedules import Cron, Every

REPORTS = duly.Topic("reports", str, guarantee="at-least-once")
VIENNA = ZoneInfo("Europe/Vienna")


def ms(text: str, zone: Any = UTC) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=zone).timestamp() * 1000)


def told(ticks: Any, start: str, count: int, zone: Any = VIENNA) -> list[str]:
    """The next ticks, as the zone's clocks show them."""
    return [
        datetime.fromtimestamp(tick / 1000, zone).strftime("%m-%d %H:%M %Z")
        for tick in islice(ticks.after(ms(start, zone)), count)
    ]


def vienna(expression: str) -> Cron:
    return Cron.of(expression, "Europe/Vienna", "here")


@pytest.mark.parametrize(
    ("period", "period_ms", "text"),
    [
        ("90s", 90_000, "every 90s"),
        ("5m", 300_000, "every 5m"),
        (" 2 h ", 7_200_000, "every 2h"),
        ("1d", 86_400_000, "every 1d"),
        (60, 60_000, "every 1m"),
    ],
)
def test_a_period(period: Any, period_ms: int, text: str):
    every = Every.of(period, "here")
    assert (every.period_ms, str(every)) == (period_ms, text)


@pytest.mark.parametrize(
    "period", ["", "5", "m", "0s", "-5m", "1.5h", "5 min", 0, -1, 0.5, True, None, "367d"]
)
def test_what_is_no_period(period: Any):
    with pytest.raises(ConfigurationError, match="give a whole number of seconds, minutes"):
        Every.of(period, "here")


def test_periods_are_counted_from_1970_so_that_processes_agree():
    every = Every.of("5m", "here")
    assert list(islice(every.after(ms("2026-03-01T09:02:30")), 2)) == [
        ms("2026-03-01T09:05:00"),
        ms("2026-03-01T09:10:00"),
    ]
    assert next(every.after(ms("2026-03-01T09:05:00"))) == ms("2026-03-01T09:10:00"), "later than"


@given(
    period=st.integers(1, 10_000),
    start=st.integers(0, 10**9),
    length=st.integers(0, 10**7),
    most=st.integers(1, 50),
)
def test_the_latest_of_a_period_are_the_last_of_all(period, start, length, most):
    every = Every.of(period, "here")
    every_tick: list[int] = []
    for tick in every.after(start):
        if tick > start + length or len(every_tick) > 20_000:
            break
        every_tick.append(tick)
    assert every.since(start, start + length, most) == every_tick[-most:]


def test_a_fixed_time_ticks_once_where_the_clocks_skip_it():
    assert told(vienna("30 2 * * *"), "2026-03-28 00:00", 3) == [
        "03-28 02:30 CET",
        "03-29 03:00 CEST",
        "03-30 02:30 CEST",
    ]


def test_a_fixed_time_ticks_once_where_the_clocks_repeat_it():
    assert told(vienna("30 2 * * *"), "2026-10-24 00:00", 3) == [
        "10-24 02:30 CEST",
        "10-25 02:30 CEST",
        "10-26 02:30 CET",
    ]


def test_every_so_often_ticks_by_the_time_that_passes():
    assert told(vienna("*/30 * * * *"), "2026-10-25 01:45", 5) == [
        "10-25 02:00 CEST",
        "10-25 02:30 CEST",
        "10-25 02:00 CET",
        "10-25 02:30 CET",
        "10-25 03:00 CET",
    ]
    assert told(vienna("*/30 * * * *"), "2026-03-29 01:15", 2) == [
        "03-29 01:30 CET",
        "03-29 03:00 CEST",
    ]


@pytest.mark.parametrize("expression", ["30 2 * * *", "0 9 * * mon", "*/20 * * * *", "0 3 29 2 *"])
@pytest.mark.parametrize("year", [2024, 2026])
def test_wherever_one_begins_the_ticks_are_the_same(expression: str, year: int):
    # Another process begins at another moment, also in the middle of a change of the clocks.
    cron = vienna(expression)
    for begin, end in (("03-28", "03-31"), ("10-24", "10-27")):
        first, last = ms(f"{year}-{begin}T00:00", VIENNA), ms(f"{year}-{end}T00:00", VIENNA)
        all_ticks = cron.since(first, last, 1000)
        for start in range(first, last, 17 * 60_000):
            assert cron.since(start, last, 1000) == [t for t in all_ticks if t > start]


def test_the_latest_of_cron_are_the_last_of_all():
    cron = vienna("0 * * * *")
    first, last = ms("2026-01-01T00:00"), ms("2026-01-03T00:30")
    assert cron.since(first, last, 3) == cron.since(first, last, 1000)[-3:]
    assert len(cron.since(first, last, 1000)) == 48


@pytest.mark.parametrize(
    ("expression", "tz", "said"),
    [
        ("0 9 * *", "UTC", "five fields"),
        ("0 0 9 * * mon", "UTC", "five fields"),
        (None, "UTC", "five fields"),
        ("0 25 * * *", "UTC", "Bad hour"),
        ("0 9 31 2 *", "UTC", "Bad day"),
        ("0 9 * * *", "Europe/Nowhere", "name of a time zone"),
        ("0 9 * * *", "../etc/passwd", "name of a time zone"),
        ("0 9 * * *", None, "name of a time zone"),
    ],
)
def test_what_is_no_cron(expression: Any, tz: Any, said: str):
    app = duly.App("city")
    with pytest.raises(ConfigurationError, match=f"schedule 'nightly': .*{said}"):
        app.cron(expression, REPORTS, "x", name="nightly", tz=tz)
    assert app.schedules == ()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "a b"}, "schedule name 'a b'"),
        ({"misfire": 0}, "how many of the latest missed"),
        ({"misfire": True}, "how many of the latest missed"),
        ({"misfire": "all"}, "how many of the latest missed"),
        ({"misfire": 1001}, "1 to 1,000"),
        ({"topic": "reports"}, "is no topic"),
        ({"payload": 7}, "is not a str"),
    ],
)
def test_what_is_no_schedule(given: dict[str, Any], said: str):
    app: Any = duly.App("city")
    arguments = {"topic": REPORTS, "payload": "x", "name": "poll", "misfire": "latest", **given}
    with pytest.raises(ConfigurationError, match=said):
        app.every("5m", arguments.pop("topic"), arguments.pop("payload"), **arguments)


def test_a_name_is_declared_once():
    app = duly.App("city")
    app.every("5m", REPORTS, "x", name="poll")
    with pytest.raises(ConfigurationError, match="schedule 'poll' is declared twice"):
        app.cron("0 9 * * *", REPORTS, "x", name="poll", tz="UTC")
