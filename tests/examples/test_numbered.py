"""Each numbered example, run as its docstring says, and killed where that is the point."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cli.conftest import Place, children, end, place
from tests.harness.test_plugin import run_pytest
from tests.servers.rabbitmq import RabbitMQNode
from tests.waiting import eventually

__all__ = ["place"]

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
NUMBERED = sorted(path for path in EXAMPLES.glob("*.py") if re.match(r"(test_)?ex\d\d_", path.name))


def has(place: Place, *names: str) -> None:
    for name in names:
        shutil.copy(EXAMPLES / name, place.path)


def script(place: Place, name: str, *arguments: str) -> str:
    """Run it to its end; what it prints."""
    ended = subprocess.run(
        [sys.executable, name, *arguments],
        cwd=place.path,
        env=place.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def run(place: Place, app: str, *options: str) -> subprocess.Popen[str]:
    """``duly run``, writing to a file: nobody reads a pipe while the test looks elsewhere."""
    with (place.path / "run.log").open("ab") as log:
        return place.start("run", app, *options, stdout=log, stderr=log)


def kill_a_worker(running: subprocess.Popen[str]) -> None:
    def workers() -> list[int]:
        return children(running.pid)

    eventually(workers, "a worker runs")
    victim = workers()[0]
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: victim not in workers(), "the killed worker is gone")


def drained(place: Place, app: str) -> bool:
    """Whether no consumer has anything before it, as ``duly status`` says."""
    said = json.loads(place.duly("status", app, "--json").out)
    return all(
        not (row["backlog"] or row["in_flight"] or row["parked"]) for row in said["consumers"]
    )


def printed(place: Place) -> str:
    return (place.path / "run.log").read_text(errors="replace")


def test_there_are_nine_with_what_they_show():
    numbers = sorted(re.sub(r"\D", "", path.name) for path in NUMBERED)
    assert numbers == [f"{number:02}" for number in range(1, 10)]
    for path in NUMBERED:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 100, path.name
        assert path.stem in text.split('"""')[1], f"{path.name} does not say how to run it"


def test_payments_are_made_once_under_kills(place: Place):
    has(place, "ex01_payments.py")
    assert "too-much" in script(place, "ex01_payments.py")
    running = run(place, "ex01_payments:app", "--processes", "2")

    def booked() -> int:
        return int(place.rows("select count(*) from book", database="bank.db")[0][0])

    kill_a_worker(running)
    eventually(lambda: booked() >= 1, "the first is booked")
    kill_a_worker(running)
    assert "RepeatDropped" in script(place, "ex01_payments.py")
    eventually(lambda: drained(place, "ex01_payments:app"), "all is paid", timeout_s=60)
    assert end(running).status == 0
    assert place.rows("select cents from accounts", database="bank.db") == [(90_000,)]
    assert place.rows("select count(distinct id), count(*) from book", database="bank.db") == [
        (1000, 1000)
    ]
    mailed = re.findall(r"^mail (\S+): 10 cents", printed(place), re.MULTILINE)
    assert len(set(mailed)) == 1000
    dead = json.loads(place.duly("dead", "list", "ex01_payments:app", "--json").out)
    assert ["does not hold" in letter["error"] for letter in dead] == [True]


def test_sensor_readings_are_never_handled_twice(place: Place):
    has(place, "ex02_sensors.py")
    assert script(place, "ex02_sensors.py") == "dropped: 0\n"
    running = run(place, "ex02_sensors:app")
    eventually(
        lambda: place.rows("select 1 from history", database="history.db"), "the first readings"
    )
    kill_a_worker(running)
    eventually(lambda: drained(place, "ex02_sensors:app"), "all is settled", timeout_s=60)
    assert end(running).status == 0
    [(kinds, count)] = place.rows(
        "select count(distinct number), count(*) from history", database="history.db"
    )
    assert kinds == count, "one was handled twice"
    # What one crash costs is in the contract: a batch.
    assert 2000 - 20 <= count <= 2000


def test_ride_statuses_stay_in_order_under_kills(place: Place):
    has(place, "ex03_ride_status.py")
    running = run(place, "ex03_ride_status:app", "--processes", "2")
    publishing = subprocess.Popen(
        [sys.executable, "ex03_ride_status.py"], cwd=place.path, env=place.environment()
    )
    eventually(lambda: place.rows("select 1 from board", database="board.db"), "the first ride")
    kill_a_worker(running)
    assert publishing.wait(60) == 0
    eventually(lambda: drained(place, "ex03_ride_status:app"), "all is shown", timeout_s=60)
    assert end(running).status == 0
    shown = place.rows("select status, trail, count(*) from board group by 1", database="board.db")
    assert [(status, count) for status, _, count in shown] == [("arrived", 200)]
    trails = {trail for (trail,) in place.rows("select trail from board", database="board.db")}
    for trail in trails:
        # A repeat may go back to a batch's beginning; what was shown first is in order.
        first = list(dict.fromkeys(str(trail).split(",")))
        assert first == ["0", "1", "2", "3"], trail


def test_ad_clicks_are_billed_once_though_they_are_published_twice(place: Place):
    has(place, "ex04_ad_clicks.py")
    running = run(place, "ex04_ad_clicks:app")
    publishing = subprocess.Popen(
        [sys.executable, "ex04_ad_clicks.py"],
        cwd=place.path,
        env=place.environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert publishing.stdout is not None
    assert "hour 0" in publishing.stdout.readline()
    publishing.kill()
    publishing.communicate(timeout=30)
    kill_a_worker(running)
    [repeats] = re.findall(r"(\d+) repeats were dropped", script(place, "ex04_ad_clicks.py"))
    assert int(repeats) >= 500
    eventually(lambda: drained(place, "ex04_ad_clicks:app"), "all is billed", timeout_s=60)
    assert end(running).status == 0
    bills = place.rows("select sum(clicks), sum(cents) from bills", database="ads.db")
    assert bills == [(12_000, 24 * (250 * 3 + 250 * 4))]


def test_a_warehouse_is_loaded_once_and_says_so(place: Place):
    has(place, "ex05_warehouse.py")
    lines = [f"shop-{n % 3},item-{n},{n % 5}" for n in range(5000)]
    place.write("sales.csv", "\n".join(["shop,item,pieces", *lines, ""]))
    running = run(place, "ex05_warehouse:app")
    first = place.duly("publish", "ex05_warehouse:app", "sales", "--from", "sales.csv")
    assert first.status == 0, first.err
    eventually(lambda: place.rows("select 1 from sales", database="warehouse.db"), "some rows")
    kill_a_worker(running)
    assert place.duly("publish", "ex05_warehouse:app", "sales", "--from", "sales.csv").status == 0

    def reported() -> int:
        return sum(map(int, re.findall(r"^(\d+) rows were loaded", printed(place), re.MULTILINE)))

    def loaded() -> int:
        return int(place.rows("select count(*) from sales", database="warehouse.db")[0][0])

    eventually(lambda: loaded() >= 5000, "every row is loaded", timeout_s=60)
    # A report may come twice, for a print is at-least-once; none may be missing.
    eventually(lambda: reported() >= 5000, "every load is reported", lambda: printed(place))
    eventually(lambda: drained(place, "ex05_warehouse:app"), "nothing is left")
    assert end(running).status == 0
    assert place.rows("select count(*), sum(pieces) from sales", database="warehouse.db") == [
        (5000, sum(n % 5 for n in range(5000)))
    ]


@pytest.fixture
def shop(place: Place, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, imported in a directory of its own."""
    has(place, "ex06_fastapi.py")
    monkeypatch.chdir(place.path)
    monkeypatch.syspath_prepend(place.path)
    monkeypatch.delitem(sys.modules, "ex06_fastapi", raising=False)
    module = importlib.import_module("ex06_fastapi")
    yield module
    module.app.close()


def test_an_order_and_its_message_are_one_transaction(place: Place, shop: Any):
    async def statuses(*orders: dict[str, Any]) -> list[int]:
        transport = httpx.ASGITransport(app=shop.api)
        client = httpx.AsyncClient(transport=transport, base_url="http://shop")
        async with shop.api.router.lifespan_context(shop.api), client:
            return [(await client.post("/orders", json=each)).status_code for each in orders]

    asked = {"number": "o-1", "cents": 900}
    free = {"number": "o-2", "cents": 0}
    assert asyncio.run(statuses(asked, asked, free)) == [201, 409, 422]
    assert place.rows("select number from orders") == [("o-1",)]
    running = run(place, "ex06_fastapi:app")
    eventually(lambda: place.rows("select number from charges") == [("o-1",)], "the charge")
    eventually(lambda: drained(place, "ex06_fastapi:app"), "nothing is left")
    assert place.rows("select number from charges") == [("o-1",)]
    assert end(running).status == 0


def test_a_plain_script_publishes_works_and_ends(place: Place):
    has(place, "ex07_script.py")
    said = script(place, "ex07_script.py", "ann", "bob")
    assert said.count("Published(") == 3
    greeted = (place.path / "greetings.txt").read_text().splitlines()
    assert greeted == ["hello ann", "hello bob", "hello the end"]
    with sqlite3.connect(place.path / "greetings.db") as db:
        assert db.execute("select count(*) from duly_claims").fetchone() == (0,)
    db.close()


@pytest.fixture
def rabbit(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server of the example's own, for it names exchanges and queues without a namespace."""
    with RabbitMQNode() as node:
        monkeypatch.setenv("DULY_BROKER", node.url)
        yield


@pytest.mark.usefixtures("rabbit")
def test_a_program_without_duly_shares_rabbitmq_with_one(place: Place):
    has(place, "ex09_rabbitmq_pika.py")
    running = run(place, "ex09_rabbitmq_pika:app", "--consumers", "billing")

    eventually(lambda: " works" in printed(place), "it runs", lambda: printed(place))
    kill_a_worker(running)
    said = script(place, "ex09_rabbitmq_pika.py")
    numbers = {f"o-{number}" for number in range(100)}
    assert set(re.findall(r"^mail (\S+)", said, re.MULTILINE)) == numbers
    assert end(running).status == 0
    charged = place.rows("select number, count(*) from charges group by 1", database="shop.db")
    assert sorted(charged) == sorted((number, 1) for number in numbers)


def test_the_tests_of_an_application_pass(place: Place):
    has(place, "ex01_payments.py", "test_ex08_payments.py")
    ended = run_pytest(place.path, "-q", "-W", "error")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "7 passed" in ended.stdout
    assert not (place.path / "bank.db").exists()
