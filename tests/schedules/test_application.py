"""Schedules as an application has them: in groups, in tests, in `duly status`, when it drains."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import duly
from duly.cli import run as duly_command
from duly.connect import open_broker
from duly.errors import ConfigurationError, ContractRefused, InvalidMessage
from duly.testing import running
from duly.testing.harness import Clock
from duly.worker import Worker
from tests.waiting import eventually

POLLS = duly.Topic("polls", str, guarantee="at-least-once")
NINE = datetime(2026, 3, 1, 9, 0, 30, tzinfo=UTC).timestamp()


def city(payload: Any = "look", period: str | int = "5m") -> tuple[duly.App, list[str]]:
    app, seen = duly.App("city", broker="sqlite:///city.db"), list[str]()
    app.every(period, POLLS, payload, name="poll")

    @app.consumer(POLLS, name="eyes", guarantee="at-least-once")
    def look(message: duly.Message[str]) -> None:
        seen.append(message.id)

    return app, seen


# --- in a test of the application


@pytest.mark.parametrize("broker", [None, "memory://", "memory://?kind=log"])
def test_a_test_moves_the_clock_and_they_tick(broker: str | None, tmp_path: Path):
    app, seen = city()
    with running(app, broker=broker, clock=Clock(NINE), folder=tmp_path) as t:
        t.drain()
        assert seen == []
        t.advance(5 * 60)
        assert seen == [], "nothing runs until the next drain"
        t.drain()
        assert seen == ["poll/2026-03-01T09:05:00Z"]
        t.drain()
        t.advance(17 * 60)
        t.drain(advance=True)
        assert seen[1:] == ["poll/2026-03-01T09:20:00Z"], "the latest of the missed"
        assert t.payloads(POLLS) == ["look", "look"]


def test_without_a_consumer_too():
    app = duly.App("city", broker="memory://")
    app.every("5m", POLLS, lambda tick: f"{tick:%H:%M}", name="poll", misfire=9)
    with running(app, clock=Clock(NINE)) as t:
        t.advance(600)
        t.drain()
        assert t.payloads(POLLS) == ["09:05", "09:10"]


def test_a_retry_that_is_waited_for_makes_no_tick_of_its_own():
    """Else an hour of retries would be an hour of ticks, each with retries of its own."""
    app = duly.App("city", broker="memory://")
    app.every("1m", POLLS, "look", name="poll")
    tries: list[str] = []

    @app.consumer(
        POLLS,
        name="eyes",
        guarantee="at-least-once",
        retry=duly.RetryPolicy(attempts=3, first_s=600),
    )
    def look(message: duly.Message[str]) -> None:
        tries.append(message.id)
        raise ValueError("no")

    with running(app, clock=Clock(NINE)) as t:
        t.advance(60)
        t.drain(advance=True, failures="expected")
        assert tries == ["poll/2026-03-01T09:01:00Z"] * 3
        t.drain(failures="expected")
        assert len(tries) == 4, "what became due meanwhile comes with the next drain"


def test_a_payload_that_cannot_be_made_fails_the_test():
    def broken(tick: datetime) -> str:
        raise LookupError("no such sensor")

    app, _ = city(broken)
    with running(app, clock=Clock(NINE)) as t:
        t.advance(600)
        with pytest.raises(LookupError, match="no such sensor"):
            t.drain()
    app, _ = city(lambda tick: 3)
    with running(app, clock=Clock(NINE)) as t:
        t.advance(600)
        with pytest.raises(InvalidMessage):
            t.drain()


# --- groups


def test_a_group_brings_its_schedules():
    group = duly.Group()
    group.every("5m", POLLS, "look", name="poll")
    seen: list[str] = []

    @group.consumer(POLLS, name="eyes", guarantee="at-least-once")
    def look(message: duly.Message[str]) -> None:
        seen.append(message.id)

    app = duly.App("city", broker="memory://")
    app.include(group)
    assert [schedule.name for schedule in app.schedules] == ["poll"]
    assert POLLS in app.topics
    assert repr(group) == "<duly.Group of eyes, poll>"
    with running(app, clock=Clock(NINE)) as t:
        t.advance(300)
        t.drain()
    assert seen == ["poll/2026-03-01T09:05:00Z"]


def test_a_name_that_is_taken_takes_nothing_over():
    group = duly.Group()
    group.every("5m", POLLS, "look", name="poll")

    @group.consumer(POLLS, name="hands", guarantee="at-least-once")
    def look(message: duly.Message[str]) -> None: ...

    app, _ = city()
    with pytest.raises(ConfigurationError, match="poll"):
        app.include(group)
    assert [consumer.name for consumer in app.consumers] == ["eyes"]


# --- what people see


def test_status_shows_where_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "status_city.py").write_text(
        "import duly\n"
        'polls = duly.Topic("polls", str, guarantee="at-least-once")\n'
        'app = duly.App("city", broker="sqlite:///city.db")\n'
        'app.every("5m", polls, "look", name="poll")\n'
        'app.every("1d", polls, "look", name="daily")\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    from status_city import app, polls  # type: ignore[import-not-found]

    with app:
        broker: Any = app.backends()[0]
        began, tick = 1_772_355_750_000, 1_772_355_900_000
        broker.reached("city/poll", began)
        assert shown(capsys, "poll") == {
            "schedule": "poll", "topic": "polls", "last_tick_ms": None, "next_tick_ms": tick,
        }  # fmt: skip
        broker = app.backends()[0]
        broker.tick("city/poll", began, tick, [polls.message("look", source="city")])
        row = shown(capsys, "poll")
        assert (row["last_tick_ms"], row["next_tick_ms"]) == (tick, tick + 300_000)
        daily = shown(capsys, "daily")
        assert daily["last_tick_ms"] is None
        assert daily["next_tick_ms"] % 86_400_000 == 0
        broker = app.backends()[0]
        assert set(broker.ticked()) == {"city/poll"}, "looking begins nothing"
    assert duly_command(["status", "status_city:app"]) == 0
    out = capsys.readouterr().out
    assert "schedule\ttopic\tlast tick\tnext tick\n" in out
    assert "poll\tpolls\t2026-03-01 09:05:00Z\t2026-03-01 09:10:00Z\n" in out


def shown(capsys: pytest.CaptureFixture[str], name: str) -> Any:
    capsys.readouterr()
    assert duly_command(["status", "status_city:app", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["schedules"]
    return next(row for row in rows if row["schedule"] == name)


# --- draining


def test_a_worker_that_is_drained_in_the_middle_of_a_tick_publishes_it(db_path: Path):
    begun, go_on = threading.Event(), threading.Event()

    def slowly(tick: datetime) -> str:
        begun.set()
        assert go_on.wait(30)
        return "look"

    app = duly.App("city", broker=f"sqlite:///{db_path}")
    app.every(1, POLLS, slowly, name="poll")
    worker = Worker(app)
    worker.start()
    assert begun.wait(30), "it ticks"
    broker: Any = app.backends()[0]
    draining = threading.Thread(target=worker.drain)
    draining.start()
    eventually(worker._stopping.is_set, "it was told to stop")
    assert broker.published()["polls"] == 0
    go_on.set()
    draining.join(30)
    assert not draining.is_alive()
    assert broker.published()["polls"] == 1
    [reached] = broker.ticked().values()
    assert reached % 1000 == 0, "a tick, and no beginning"
    app.close()


def test_a_broker_that_keeps_none_is_refused_in_a_test_as_well():
    app, _ = city()
    broker: Any = open_broker("memory://")

    class WithoutTicks:
        def __getattr__(self, name: str) -> Any:
            if name in ("tick", "reached", "ticked"):
                raise AttributeError(name)
            return getattr(broker, name)

    without_ticks: Any = WithoutTicks()
    refused = pytest.raises(ContractRefused, match="keeps no schedules")
    with refused, running(app, broker=without_ticks):
        raise AssertionError("it ran")
