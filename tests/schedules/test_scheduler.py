"""The machine under a clock of the tests: what is due, missed, moved, refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import duly
from duly.broker import SubscribeOptions
from duly.brokers.sqlite import SQLiteBroker
from duly.cli import run as duly_command
from duly.connect import open_broker
from duly.contract import Run, contract_of, render
from duly.errors import BrokerUnavailable, CommitUnknown, ContractRefused
from duly.guarantees import Done
from duly.schedules import Scheduler, ticking
from duly.worker import Worker
from tests.waiting import eventually

START = int(datetime(2026, 3, 1, 9, 2, 30, tzinfo=UTC).timestamp() * 1000)
POLLS = duly.Topic("polls", str, guarantee="at-least-once")
ONCE = duly.Topic("once", str, guarantee="exactly-once")


class Time:
    """A wall clock that is told what it shows."""

    def __init__(self) -> None:
        self.ms = START

    def __call__(self) -> int:
        return self.ms

    def pass_s(self, seconds: float) -> None:
        self.ms += int(seconds * 1000)


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture(params=["sqlite", "memory://", "memory://?kind=log", "memory://?kind=queue"])
def broker(request: pytest.FixtureRequest, db_path: Path) -> Iterator[Any]:
    kind = request.param
    broker: Any = SQLiteBroker(db_path) if kind == "sqlite" else open_broker(kind)
    broker.declare([POLLS, ONCE])
    yield broker
    broker.close()


def app_with(topic: duly.Topic[str] = POLLS, payload: Any = "look", **options: Any) -> duly.App:
    app = duly.App("city")
    app.every("5m", topic, payload, name="poll", **options)
    return app


def scheduler(app: duly.App, broker: Any, time: Time) -> Scheduler:
    return Scheduler(app.schedules, ticking(broker, app.schedules), app.name, wall_ms=time)


def published(broker: Any, topic: duly.Topic[str] = POLLS, name: str = "reader") -> list[str]:
    """The ids of what is there, in order; each call gives what came since the last one."""
    options = SubscribeOptions(guarantee=duly.Guarantee.AT_LEAST_ONCE, start="earliest")
    lane = broker.subscribe([topic], name, options)
    found: list[str] = []
    while claimed := lane.claim(100, 1 << 30, 0.0):
        found += [delivery.message.id for delivery in claimed]
        lane.settle([Done(d.receipt) for d in claimed])
    lane.close()
    return found


def test_each_tick_becomes_one_message_whose_id_is_the_tick(broker: Any, time: Time):
    app = app_with()
    machine = scheduler(app, broker, time)
    assert machine.step() == 1.0, "a step of the clock has to be seen"
    assert published(broker) == [], "nothing ticked before it was there"
    time.pass_s(149.5)
    assert machine.step() == pytest.approx(0.5)
    time.pass_s(0.5)
    machine.step()
    machine.step()
    assert published(broker) == ["poll/2026-03-01T09:05:00Z"]
    time.pass_s(300)
    machine.step()
    assert published(broker) == ["poll/2026-03-01T09:10:00Z"]
    assert machine.published == 2


@pytest.mark.parametrize("topic", [POLLS, ONCE])
def test_of_several_processes_one_publishes(broker: Any, time: Time, topic: duly.Topic[str]):
    # Each gives another payload, which on an exactly-once topic would be a conflict.
    machines = [scheduler(app_with(topic, f"from {n}"), broker, time) for n in range(4)]
    for _ in range(20):
        for machine in machines:
            machine.step()
        time.pass_s(100)
    found = published(broker, topic)
    assert len(found) == len(set(found)) == 6
    assert sum(machine.published for machine in machines) == 6


@pytest.mark.parametrize(("misfire", "kept"), [("latest", 1), (3, 3), (1000, 12)])
def test_missed_ticks(
    broker: Any, time: Time, misfire: Any, kept: int, caplog: pytest.LogCaptureFixture
):
    app = app_with(misfire=misfire)
    scheduler(app, broker, time).step()
    time.pass_s(3600)
    caplog.clear()
    after_downtime = scheduler(app, broker, time)
    after_downtime.step()
    found = published(broker)
    assert len(found) == kept
    assert found[-1] == "poll/2026-03-01T10:00:00Z"
    assert found == sorted(found)
    assert ("were missed" in caplog.text) == (kept < 12)
    after_downtime.step()
    assert published(broker) == []


def test_a_clock_that_is_set_back_ticks_nothing_again_and_loses_nothing(
    broker: Any, time: Time, caplog: pytest.LogCaptureFixture
):
    machine = scheduler(app_with(misfire=1000), broker, time)
    ids: list[str] = []
    for seconds in (0, 300, 300, -3600, 300, 300, 3000, 7200, -7200, 300, 7200):
        time.pass_s(seconds)
        machine.step()
        scheduler(app_with(misfire=1000), broker, time).step()  # and one that has just started
        ids += published(broker)
    assert len(ids) == len(set(ids))
    assert ids == sorted(ids)
    minutes = [datetime.fromisoformat(id.removeprefix("poll/")).timestamp() / 300 for id in ids]
    assert minutes == list(range(int(minutes[0]), int(minutes[0]) + len(ids))), "none is left out"
    assert caplog.text.count("has published up to") >= 1


def test_a_schedule_that_is_changed_goes_on_from_the_last_tick(broker: Any, time: Time):
    first = scheduler(app_with(), broker, time)
    first.step()
    time.pass_s(150)
    first.step()
    assert published(broker) == ["poll/2026-03-01T09:05:00Z"]
    changed = duly.App("city")
    changed.cron("*/2 * * * *", POLLS, "look", name="poll", tz="UTC")
    time.pass_s(60)
    scheduler(changed, broker, time).step()
    assert published(broker) == ["poll/2026-03-01T09:06:00Z"]


def test_two_apps_do_not_share_a_schedule(broker: Any, time: Time):
    other = duly.App("harbour")
    other.every("5m", POLLS, "look", name="poll")
    machines = [scheduler(app, broker, time) for app in (app_with(), other)]
    for _ in range(2):
        for machine in machines:
            machine.step()
        time.pass_s(150)
    for machine in machines:
        machine.step()
    assert published(broker) == ["poll/2026-03-01T09:05:00Z"] * 2


def test_a_payload_may_be_made_of_the_tick(broker: Any, time: Time):
    app = duly.App("city")
    app.cron("0 * * * *", POLLS, lambda tick: tick.isoformat(), name="hourly", tz="Europe/Vienna")
    [schedule] = app.schedules
    message = schedule.message(START - START % 3_600_000, "city")
    assert message.body == b"2026-03-01T10:00:00+01:00"
    assert message.id == "hourly/2026-03-01T09:00:00Z"


def test_a_payload_that_fails_is_made_again(broker: Any, time: Time, caplog: Any):
    failures = iter([ValueError("no weather"), TypeError("none")])

    def look(_: datetime) -> str:
        for error in failures:
            raise error
        return "sunny"

    machine = scheduler(app_with(payload=look), broker, time)
    machine.step()
    time.pass_s(150)
    pauses = [machine.step()]
    time.pass_s(0.2)
    pauses.append(machine.step())
    assert pauses == pytest.approx([0.2, 0.4])
    assert machine.step() == pytest.approx(0.4), "not before its time"
    assert published(broker) == []
    time.pass_s(0.4)
    machine.step()
    assert published(broker) == ["poll/2026-03-01T09:05:00Z"]
    assert "no weather" in caplog.text


def test_a_clock_that_is_set_back_during_a_retry_delays_it_no_further(broker: Any, time: Time):
    called: list[datetime] = []

    def look(tick: datetime) -> str:
        called.append(tick)
        raise ValueError("no weather")

    machine = scheduler(app_with(payload=look), broker, time)
    machine.step()
    time.pass_s(150)
    for _ in range(12):  # so often that the next try is a minute away
        machine.step()
        time.pass_s(60)
    time.pass_s(-60)
    before = len(called)
    machine.step()
    assert len(called) == before, "not before its time"
    time.pass_s(-120)
    machine.step()
    assert len(called) == before + 1


def test_a_clock_that_was_ahead_is_told_once(
    broker: Any, time: Time, caplog: pytest.LogCaptureFixture
):
    machine = scheduler(app_with(), broker, time)
    for seconds in (0, 300, -3600, 1, 1, 3600, -3600, 1):
        time.pass_s(seconds)
        machine.step()
    assert caplog.text.count("has published up to") == 2, "once for each time"


class Broken:
    """A broker whose answers get lost, or that refuses, for a while."""

    def __init__(self, broker: Any, errors: list[tuple[str, Exception]]) -> None:
        self.broker = broker
        self.errors = errors

    def reached(self, *given: Any) -> int:
        return int(self.broker.reached(*given))

    def tick(self, *given: Any) -> Any:
        if not self.errors:
            return self.broker.tick(*given)
        when, error = self.errors.pop(0)
        if when == "after":
            self.broker.tick(*given)
        raise error


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [CommitUnknown("cut"), BrokerUnavailable("away")])
def test_an_answer_that_is_lost_costs_no_tick_and_repeats_none(
    broker: Any, time: Time, when: str, error: Exception
):
    app = app_with()
    broken: Any = Broken(broker, [(when, error)])
    machine = Scheduler(app.schedules, broken, app.name, wall_ms=time)
    machine.step()
    for _ in range(8):
        time.pass_s(75)
        machine.step()
        time.pass_s(75)
        machine.step()
    assert published(broker) == [f"poll/2026-03-01T09:{m:02d}:00Z" for m in (5, 10, 15, 20)]


def test_what_the_broker_refuses_leaves_the_schedule_where_it_was(db_path: Path, time: Time):
    broker = SQLiteBroker(db_path)  # the topic is not declared there
    machine = scheduler(app_with(), broker, time)
    machine.step()
    time.pass_s(150)
    machine.step()
    broker.declare([POLLS])
    time.pass_s(1)
    machine.step()
    assert published(broker) == ["poll/2026-03-01T09:05:00Z"]
    broker.close()


@pytest.mark.parametrize("broker", ["sqlite", "memory://"], indirect=True)  # they remember ids
def test_somebody_elses_message_under_the_ticks_id_stays(broker: Any, time: Time):
    broker.publish([ONCE.message("by hand", source="city", id="poll/2026-03-01T09:05:00Z")])
    machine = scheduler(app_with(ONCE), broker, time)
    machine.step()
    for _ in range(3):
        time.pass_s(150)
        machine.step()
    assert published(broker, ONCE) == ["poll/2026-03-01T09:05:00Z", "poll/2026-03-01T09:10:00Z"]


def test_namespaces_have_schedules_of_their_own(db_path: Path, time: Time):
    brokers = [SQLiteBroker(db_path, namespace=n) for n in ("", "staging")]
    for broker in brokers:
        broker.declare([POLLS])
        machine = scheduler(app_with(), broker, time)
        time.ms = START
        machine.step()
        time.pass_s(150)
        machine.step()
        assert published(broker) == ["poll/2026-03-01T09:05:00Z"]
    for broker in brokers:
        broker.close()


def test_a_broker_that_cannot_is_refused_with_advice(db_path: Path):
    class Plain:
        def __init__(self) -> None:
            self.capabilities = open_broker("memory://").capabilities

    plain: Any = Plain()
    with pytest.raises(ContractRefused, match=r"keeps no schedules, and the app declares poll"):
        ticking(plain, app_with().schedules)


def test_the_contract_shows_them(broker: Any):
    app = app_with(misfire=12)
    app.cron("0 9 * * mon", ONCE, "report", name="weekly", tz="Europe/Vienna")
    terms = contract_of(broker.capabilities, None, app.topics, [], Run(), app.schedules)
    text = render(terms)
    assert [t.name for t in terms.topics] == ["polls", "once"], "topics only schedules feed"
    assert "SCHEDULES\n  poll -> polls: every 5m\n" in text
    assert "  weekly -> once: at 0 9 * * mon in Europe/Vienna\n" in text
    poll, weekly = terms.schedules
    assert any("the latest missed 12 ticks are published" in limit for limit in poll.limits)
    assert any("the latest missed tick is published" in limit for limit in weekly.limits)


def test_a_worker_drives_them_and_drains(db_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING)
    app = duly.App("city", f"sqlite:///{db_path}")
    app.every(1, POLLS, "look", name="poll")
    got: list[str] = []

    @app.consumer(POLLS, name="eyes", guarantee="at-least-once")
    def look(message: duly.Message[str]) -> None:
        got.append(message.id)

    with Worker(app):
        eventually(lambda: len(got) >= 2, "two seconds have ticked")
    assert len(got) == len(set(got))
    assert caplog.records == []
    app.close()


def test_a_worker_without_consumers_is_one_for_schedules(db_path: Path):
    app = duly.App("city", f"sqlite:///{db_path}")
    app.every(1, POLLS, "look", name="poll")
    with Worker(app):
        broker: Any = app.backends()[0]
        eventually(lambda: published(broker), "it ticks")
    app.close()


def test_the_command_prints_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "ticking_city.py").write_text(
        "import duly\n"
        'polls = duly.Topic("polls", str, guarantee="at-least-once")\n'
        'app = duly.App("city", broker="sqlite:///city.db")\n'
        'app.every("5m", polls, "look", name="poll")\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert duly_command(["contract", "ticking_city:app"]) == 0
    assert "poll -> polls: every 5m" in capsys.readouterr().out
