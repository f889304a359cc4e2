"""``duly run``, end to end: real processes on a real file, killed, stopped and drained."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import duly
from duly.cli.worker import Orders, Process, take_turns
from duly.errors import BrokerUnavailable, BrokerUnusable, ConfigurationError
from duly.supervisor import CUT_OFF, DRAINED, REFUSED, Lifeline
from duly.supervisor.lifeline import Counts
from tests.cli.conftest import SHOP, Place, children, end, records
from tests.waiting import alive, eventually

DECLARED = 'guarantee="exactly-once")\ndef'
# What a handler may do wrong, by the note on its order. The file says that it has begun.
TROUBLE = """
    if order.note == "hang":
        open("hanging", "a").write("x")
        time.sleep(3600)
    if order.note == "slow":
        open("hanging", "a").write("x")
        time.sleep(1)
    if order.note == "exit" and not os.path.exists("hanging"):
        open("hanging", "a").write("x")
        raise SystemExit(3)
    if order.note == "hold":
        # In C, with the interpreter's lock held: no thread of this process runs any more.
        open("hanging", "a").write("x")
        ctypes.PyDLL(None).sleep(3600)
"""


def publish(place: Place, count: int, note: str | None = None, start: int = 0) -> None:
    lines = [
        json.dumps({"order": f"o-{n:06}", "cents": 1, "note": note})
        for n in range(start, start + count)
    ]
    place.write(f"{note}-{start}.jsonl", "\n".join(lines))
    ended = place.duly("publish", "shop:app", "orders", "--from", f"{note}-{start}.jsonl")
    assert ended.status == 0, ended.err


@pytest.fixture
def troubled(place: Place) -> Place:
    """The shop with a handler that hangs, or is slow, when an order says so."""
    place.write("shop.py", SHOP + TROUBLE)
    return place


def hanging(place: Place) -> int:
    file = place.path / "hanging"
    return len(file.read_text()) if file.exists() else 0


@pytest.mark.parametrize(("found_s", "then_s"), [(0.005, [0.0005]), (0.02, [])])
def test_threads_take_short_turns_unless_the_application_has_said(
    monkeypatch: pytest.MonkeyPatch, found_s: float, then_s: list[float]
):
    said: list[float] = []
    monkeypatch.setattr(sys, "getswitchinterval", lambda: found_s)
    monkeypatch.setattr(sys, "setswitchinterval", said.append)
    take_turns()
    assert said == then_s


def test_every_order_is_charged_once_though_workers_are_killed(shop: Place):
    publish(shop, 20_000)
    process = shop.start("run", "shop:app", "--processes", "3")
    killed = 0
    for target in (1, 3000, 8000, 14_000):
        count = "select n from charges"
        shop.await_rows(count, target)
        for worker in children(process.pid)[:2]:
            os.kill(worker, signal.SIGKILL)
            killed += 1
    shop.await_rows("select n from charges", 20_000)
    ended = end(process)
    assert ended.status == 0, ended.err
    assert killed >= 4
    assert ended.err.count("was killed by SIGKILL") >= 4
    assert shop.rows("select count(*), count(distinct n) from charges") == [(20_000, 20_000)]


def test_a_handler_that_hangs_has_its_process_replaced(place: Place):
    short = 'guarantee="exactly-once", max_run_s=1, retry=duly.RetryPolicy(attempts=2))\ndef'
    place.write("shop.py", (SHOP + TROUBLE).replace(DECLARED, short))
    publish(place, 1, "hang")
    publish(place, 3, start=10)
    process = place.start("run", "shop:app")
    place.await_rows("select n from charges", 3)
    ended = end(process)
    assert "over its max_run_s" in ended.err
    assert "was killed by SIGKILL; another starts" in ended.err
    assert sorted(place.rows("select n from charges")) == [
        ("o-000010",), ("o-000011",), ("o-000012",)
    ]  # fmt: skip


def test_a_worker_is_ready_before_the_first_handler_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Silence before "ready" is taken for a long import, and a handler that holds the interpreter
    # would be left alone for as long as one.
    app = duly.App("shop", broker=f"sqlite:///{tmp_path}/shop.db")
    orders = duly.Topic("orders", str, guarantee="at-least-once")
    ran: list[str] = []
    ran_when_ready: list[str] = []

    @app.consumer(orders, name="billing", guarantee="at-least-once")
    def charge(order: str) -> None:
        ran.append(order)
        process.ending = True

    class SlowLifeline(Lifeline):
        def __init__(self) -> None:
            """Without a socket, whose end would be the end of this process."""

        def start(self, orphaned: Callable[[], None]) -> None: ...

        def ready(self, counts: Callable[[], Counts]) -> None:
            threading.Event().wait(0.5)
            ran_when_ready.extend(ran)

    app.publish(orders, "o-1")
    monkeypatch.setattr("duly.cli.worker.load_app", lambda _: app)
    process = Process(Orders("shop:app", None, 5.0, "json", 1), SlowLifeline())
    assert process.work() == DRAINED
    assert ran == ["o-1"]
    assert ran_when_ready == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "holds the interpreter"])
def test_a_worker_that_hangs_inside_its_transaction_frees_the_file(place: Place, how: str):
    once = 'guarantee="exactly-once", batch=1, retry=duly.RetryPolicy(attempts=1))\ndef'
    place.write("shop.py", "import ctypes\n" + (SHOP + TROUBLE).replace(DECLARED, once))
    publish(place, 1, "slow" if how == "stopped" else "hold")
    log = place.path / "log"
    with log.open("w") as err:
        process = place.start("run", "shop:app", "--processes", "2", "--drain-s", "2", stderr=err)
    # Both: one that only starts may be silent for longer.
    eventually(lambda: log.read_text().count("works") == 2, "both work", timeout_s=60)
    eventually(lambda: hanging(place), "the handler runs", timeout_s=60)
    if how == "stopped":
        # Whichever of them has the transaction open.
        for worker in children(process.pid):
            os.kill(worker, signal.SIGSTOP)
    publish(place, 3, start=10)
    place.await_rows("select n from charges where n > 'o-000009'", 3)
    end(process)
    assert "is silent for" in log.read_text()
    assert len(place.rows("select n from charges where n > 'o-000009'")) == 3
    assert len(place.rows("select n from charges where n < 'o-000010'")) <= 1


def test_a_handler_that_exits_ends_its_process_and_nothing_else(troubled: Place):
    publish(troubled, 5)
    publish(troubled, 1, "exit", start=10)
    process = troubled.start("run", "shop:app")
    troubled.await_rows("select n from charges", 6)
    ended = end(process)
    assert ended.status == 0
    assert "a lane broke" in ended.err
    assert "exited with status 1; another starts" in ended.err
    assert troubled.rows("select count(*), count(distinct n) from charges") == [(6, 6)]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BrokerUnavailable("locked for 30 s"), CUT_OFF),
        (RuntimeError("in the lifespan"), CUT_OFF),
        (BrokerUnusable("no database"), REFUSED),
        (ConfigurationError("no such consumer"), REFUSED),
    ],
)
def test_a_start_that_may_succeed_later_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
):
    def fail(spec: str) -> None:
        raise error

    monkeypatch.setattr("duly.cli.worker.load_app", fail)
    assert Process(Orders("shop:app", None, 1.0, "json", 1), None).work() == status


def test_running_handlers_end_before_a_drained_worker_does(troubled: Place):
    publish(troubled, 1, "slow")
    process = troubled.start("run", "shop:app")
    eventually(lambda: hanging(troubled), "the handler runs", timeout_s=60)
    ended = end(process)
    assert ended.status == 0, ended.err
    assert troubled.rows("select n from charges") == [("o-000000",)]
    assert hanging(troubled) == 1


def test_what_does_not_end_in_time_is_cut_off_and_comes_again(troubled: Place):
    publish(troubled, 1, "hang")
    process = troubled.start("run", "shop:app", "--drain-s", "1")
    eventually(lambda: hanging(troubled), "the handler runs", timeout_s=60)
    workers = children(process.pid)
    ended = end(process)
    assert ended.status == 1, ended.err
    assert not any(alive(pid) for pid in workers)
    assert troubled.rows("select n from charges") == []
    (troubled.path / "hanging").unlink()
    process = troubled.start("run", "shop:app", "--drain-s", "0.1")
    eventually(lambda: hanging(troubled), "the message came again", timeout_s=60)
    end(process)


def test_what_hangs_as_it_is_imported_is_not_waited_for(place: Place):
    hangs = "import threading\nopen('importing', 'a').close()\nthreading.Event().wait()\n"
    place.write("shop.py", hangs)
    process = place.start("run", "shop:app", "--drain-s", "600")
    eventually((place.path / "importing").exists, "it is imported", timeout_s=60)
    workers = children(process.pid)
    ended = end(process)
    assert ended.status == 0, ended.err
    assert "did not drain" in ended.err
    assert not any(alive(pid) for pid in workers)


def test_a_worker_that_is_told_to_end_as_it_starts_begins_no_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    app = duly.App("shop", broker=f"sqlite:///{tmp_path}/shop.db")
    orders = duly.Topic("orders", str, guarantee="at-most-once")
    ran: list[str] = []

    @app.consumer(orders, name="billing", guarantee="at-most-once")
    def charge(order: str) -> None:
        ran.append(order)

    def load(_: str) -> duly.App:
        process.end(signal.SIGTERM, None)
        return app

    app.publish(orders, "o-1")
    monkeypatch.setattr("duly.cli.worker.load_app", load)
    process = Process(Orders("shop:app", None, 5.0, "json", 1), None)
    assert process.work() == DRAINED
    assert ran == []


def test_a_second_signal_stops_at_once(troubled: Place):
    publish(troubled, 1, "hang")
    process = troubled.start("run", "shop:app", "--drain-s", "600")
    eventually(lambda: hanging(troubled), "the handler runs", timeout_s=60)
    workers = children(process.pid)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    ended = end(process, signal.SIGINT)
    assert ended.status == 128 + signal.SIGINT
    assert not any(alive(pid) for pid in workers)


def test_no_worker_outlives_a_killed_supervisor(troubled: Place):
    publish(troubled, 1, "hang")
    process = troubled.start("run", "shop:app", "--processes", "2", "--drain-s", "1")
    eventually(lambda: hanging(troubled), "the handler runs", timeout_s=60)
    workers = children(process.pid)
    assert len(workers) == 2
    process.kill()
    eventually(lambda: not any(alive(pid) for pid in workers), "no orphans")


def test_only_the_named_consumers_are_worked(shop: Place):
    more = SHOP + '\n@app.consumer(orders, name="other", guarantee="at-least-once")\n'
    more += 'def other(order: Order) -> None:\n    open("other", "a").write("x")\n'
    shop.write("shop.py", more)
    publish(shop, 5)
    process = shop.start("run", "shop:app", "--consumers", "billing")
    shop.await_rows("select n from charges", 5)
    assert end(process).status == 0
    assert not (shop.path / "other").exists()


def test_log_records_of_a_handler_say_what_they_are_about(shop: Place):
    publish(shop, 1, "log")
    process = shop.start("run", "shop:app")
    shop.await_rows("select n from charges", 1)
    (record,) = [r for r in records(end(process).err) if r["logger"] == "shop"]
    assert record["message"] == "charged o-000000"
    assert record["duly_consumer"] == "billing"
    assert record["duly_message_id"] == "log-0.jsonl:1"
    assert record["duly_attempt"] == 1


def test_reload_starts_anew_when_a_file_changes(shop: Place):
    log = shop.write("log", "")
    with log.open("w") as err:
        process = shop.start("run", "shop:app", "--reload", stderr=err)
    publish(shop, 1)
    shop.await_rows("select n from charges", 1)
    (before,) = children(process.pid)
    shop.write("shop.py", SHOP + "\ndef broken(:\n")
    # Half-edited code is no reason to end.
    eventually(lambda: "waiting for a change" in log.read_text(), "it waits", log.read_text)
    assert not alive(before)
    shop.write("shop.py", SHOP.replace("order.cents, order.note", "order.cents * 100, order.note"))
    publish(shop, 1, start=1)
    shop.await_rows("select n from charges where cents = 100", 1)
    assert end(process).status == 0


def test_a_terminal_shows_progress_and_logs_for_people(shop: Place):
    publish(shop, 2, "log")
    reading, terminal = pty.openpty()
    os.set_blocking(reading, False)
    process = shop.start("run", "shop:app", stderr=terminal)
    shown = bytearray()

    def saw(*words: str) -> bool:
        with contextlib.suppress(BlockingIOError):
            shown.extend(os.read(reading, 65536))
        return all(word in shown.decode(errors="replace") for word in words)

    eventually(lambda: saw("INFO shop: charged o-000000  [billing"), "a log line", timeout_s=60)
    eventually(lambda: saw("billing", "/s (2)"), "the progress line", shown.decode, timeout_s=60)
    end(process)
    os.close(terminal)
    os.close(reading)


def test_an_app_may_print_without_a_terminal(shop: Place):
    shop.write("shop.py", SHOP + '    print("printed", order.order, flush=True)\n')
    publish(shop, 1)
    process = shop.start("run", "shop:app")
    shop.await_rows("select n from charges", 1)
    assert "printed o-000000\n" in end(process).out
