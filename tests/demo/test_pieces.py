"""The pieces a run is made of: slices and turns, journals, the book, the workers' command."""

from __future__ import annotations

import io
import json
import sqlite3
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from rich.console import Console, RenderableType

import duly
from duly.broker import SubscribeOptions
from duly.cli.worker import Orders
from duly.demo import shop, view
from duly.demo.book import BOOK, Book, Kill
from duly.demo.crew import APP, PATIENCE, command, url
from duly.demo.evidence import open_evidence
from duly.demo.gauge import Gauge, Reach
from duly.demo.journal import Journal, last_lines, read_journal
from duly.demo.pace import Pace, slices
from duly.demo.result import Deaths, weigh
from duly.demo.run import Moment, Settings
from duly.demo.verdict import judge
from duly.guarantees import Done, Guarantee
from tests.demo.honest import honest_run
from tests.waiting import eventually


def test_slices_cover_everything_once_in_order():
    for total in (0, 1, 7, 100):
        for count in (1, 3, 21):
            parts = slices(total, count)
            assert len(parts) == count
            assert [number for part in parts for number in part] == list(range(total))


def test_the_publisher_stays_a_slice_ahead_of_the_killer():
    pace = Pace(kills=2)
    reached: list[int] = []

    def publish() -> None:
        for number in range(3):
            pace.wait_for_slice(number)
            reached.append(number)

    thread = threading.Thread(target=publish)
    thread.start()
    eventually(lambda: pace.is_dry, "the publisher waits")
    assert reached == [0]
    with pace.turn():
        eventually(lambda: reached == [0, 1], "the second slice is published")
    pace.let_go()
    thread.join(10)
    assert reached == [0, 1, 2]


def test_a_journal_keeps_the_lines_of_several_writers(tmp_path: Path):
    path = tmp_path / "lines.log"
    with Journal(path) as one, Journal(path) as other:
        one.write("a")
        other.write("b")
        one.write("c")
    assert read_journal(path) == ["a", "b", "c"]
    assert {"b", "c"} <= last_lines(path, size=4)
    assert "a" not in last_lines(path, size=4)
    assert read_journal(tmp_path / "nobody wrote this") == []
    assert last_lines(tmp_path / "nor this") == set()


def test_the_book_has_what_was_asked_for_before_its_outcome(tmp_path: Path):
    with Book(tmp_path) as book, closing(sqlite3.connect(tmp_path / BOOK)) as reader:
        book.invoke("rides", [("1-0", 1, 0, "requested"), ("1-1", 1, 1, "accepted")])
        assert reader.execute("select outcome from rides").fetchall() == [("invoked",)] * 2
        book.end("rides", [("ok", "1-0"), ("unknown", "1-1")])
        assert reader.execute("select outcome from rides order by id").fetchall() == [
            ("ok",),
            ("unknown",),
        ]
        book.note_kill(3, Kill(1.5, "12-ab", None, {"board": 2}, None))
        assert reader.execute("select * from kills").fetchall() == [(3, 1.5, "12-ab", None, None)]
        assert reader.execute("select * from held").fetchall() == [(3, "board", 2)]


def test_the_workers_are_those_of_duly_run():
    orders = Orders(APP, None, PATIENCE.drain_s / 2, "human", 4)
    *program, told = command(4)
    *duly_run, argument = orders.command()
    assert program == duly_run
    assert json.loads(told) == json.loads(argument)


def test_the_gauge_sees_who_holds_what(tmp_path: Path):
    with duly.App("shop", url(tmp_path)) as app:
        broker, _ = app.backends()
        app.publish_many(shop.rides, [shop.RideUpdate(n, 0, "x") for n in range(5)])
        options = SubscribeOptions(Guarantee.AT_LEAST_ONCE)
        lane = broker.subscribe([shop.rides], "board", options)
        with closing(Gauge(tmp_path)) as gauge:
            assert gauge.reach() == {"board": Reach(5, 0)}
            first = lane.claim(3, 10_000, 1.0)
            [holder] = gauge.holders()
            assert holder.held == {"board": 3}
            assert gauge.held_by(holder.worker) == {"board": 3}
            last = gauge.claimed_until(holder.worker, "board")
            assert last is not None
            assert gauge.id_at(last) == first[-1].message.id
            lane.settle([Done(delivery.receipt) for delivery in first])
            assert gauge.reach() == {"board": Reach(5, 3)}
            assert gauge.held_by(holder.worker) == {}
            assert not gauge.is_drained()


def test_the_last_screen_fits_80_columns_and_tells_all(tmp_path: Path):
    honest_run(tmp_path)
    with open_evidence(tmp_path) as evidence:
        judgements, deaths = judge(evidence), Deaths.of(evidence)
    honest = weigh(judgements, deaths, 10.0, {})
    text = shown(view.verdict(honest), 80)
    assert "…" not in text
    assert all(flow.judgement.guarantee.value in text for flow in honest.flows)
    assert "Every promise was kept." in text
    broken = replace(judgements[0], broken=("double start: 2 readings were recorded twice",))
    text = shown(view.verdict(weigh([broken, *judgements[1:]], deaths, 10.0, {})), 80)
    assert "A promise was broken." in text
    assert "double start" in text


def shown(what: RenderableType, width: int) -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(what)
    return text.getvalue()


def test_progress_is_shown_from_the_first_moment_on():
    moments = [
        Moment(Settings(100, 3, 2, 1), 0.0, 0, {}, [], "publishing"),
        Moment(
            Settings(100, 3, 2, 1), 1.0, 50, {"billing": Reach(50, 30)},
            [Kill(0.5, "12-ab", "billing", {"billing": 7}, True)], "publishing",
        ),
    ]  # fmt: skip
    speed = view.Speed()
    screens = []
    for moment in moments:
        speed.note(moment)
        screens.append(shown(view.progress(moment, speed), 80))
    assert all("billing" in screen and "…" not in screen for screen in screens)
    assert speed.of("billing") == 30
    assert "12, inside a transaction, holding 7 of billing" in screens[1]
