"""``duly`` on a broker that is no database: what it shows, mends, finds wrong and refuses."""

from __future__ import annotations

import json
import runpy
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from duly.broker import SubscribeOptions
from duly.brokers.rabbitmq import RabbitMQBroker
from duly.brokers.rabbitmq.link import NOT_FOUND
from duly.brokers.rabbitmq.topology import Names
from duly.cli import run
from duly.guarantees import Dead, Guarantee, Retry
from duly.message import Topic
from duly.worker import Worker
from tests.servers.postgres import Schema, named_after
from tests.servers.rabbitmq import RabbitMQNode, channel, in_namespace
from tests.waiting import eventually

# On servers of its own, and minutes in all.
pytestmark = pytest.mark.long

SHOP = """
import os
import duly

orders = duly.Topic("orders", str, guarantee="at-least-once")
app = duly.App("shop", broker=os.environ["SHOP_BROKER"], store=os.environ.get("SHOP_STORE"))
fails = True
seen = []

@app.consumer(orders, name="billing", guarantee="at-least-once")
def charge(order: str) -> None:
    if fails:
        raise duly.Reject(f"no such order: {order}")
    seen.append(order)
"""


@dataclass
class Ended:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Duly = Callable[..., Ended]


def at(
    broker: str, store: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> Duly:
    """``duly`` within this process, on the shop in this folder."""
    (folder / "shop.py").write_text(SHOP)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    monkeypatch.setenv("SHOP_BROKER", broker)
    monkeypatch.delenv("SHOP_STORE", raising=False)
    if store is not None:
        monkeypatch.setenv("SHOP_STORE", store)

    def call(*arguments: str) -> Ended:
        status = run(list(arguments))
        return Ended(status, *capsys.readouterr())

    return call


@pytest.fixture(params=["no store", "sqlite", "postgres"])
def duly(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    rabbit_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> Duly:
    store = None
    if request.param == "sqlite":
        store = "sqlite:///shop.db"
    elif request.param == "postgres":
        schema: Schema = request.getfixturevalue("pg_schema")
        mark = "&" if "?" in schema.url else "?"
        store = f"{schema.url}{mark}schema={schema.duly}"
    return at(rabbit_url, store, tmp_path, monkeypatch, capsys)


@pytest.fixture
def plain(tmp_path: Path, rabbit_url: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Duly:
    """Without a store."""
    return at(rabbit_url, None, tmp_path, monkeypatch, capsys)


def work(*orders: str, fails: bool, ends: int = 0) -> list[str]:
    """Publish these, and work until so many, or each of them, have come to an end."""
    shop = runpy.run_path("shop.py")
    shop["charge"].__globals__["fails"] = fails
    with shop["app"] as app:
        for order in orders:
            app.publish(shop["orders"], order, id=order)
        with Worker(app) as worker:

            def ended() -> int:
                return worker.counts()["billing"].dead + len(shop["seen"])

            eventually(lambda: ended() >= (ends or len(orders)), "every order came to an end")
    seen: list[str] = shop["seen"]
    return seen


def listed(duly: Duly) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = duly("dead", "list", "shop:app", "--json").json
    return found


def test_dead_letters_are_listed_shown_replayed_and_discarded(duly: Duly):
    assert listed(duly) == []
    work("o-1", "o-2", "o-3", fails=True)
    letters = listed(duly)
    assert sorted(letter["id"] for letter in letters) == ["o-1", "o-2", "o-3"]
    assert {(each["consumer"], each["attempts"], each["replays"]) for each in letters} == {
        ("billing", 1, 0)
    }
    by_id = {letter["id"]: letter for letter in letters}
    shown = duly("dead", "show", "shop:app", str(by_id["o-1"]["number"]), "--json").json
    assert shown["error"] == "Reject: no such order: o-1"
    assert shown["body"] == "o-1"
    ended = duly("dead", "discard", "shop:app", "--id", "o-1", "--yes", "--json")
    assert (ended.status, ended.json["discarded"]) == (0, 1)
    ended = duly("dead", "replay", "shop:app", "--all", "--yes", "--json")
    assert (ended.status, ended.json["replayed"]) == (0, 2)
    assert listed(duly) == []
    assert duly("dead", "replay", "shop:app", str(by_id["o-2"]["number"]), "--yes").status == 2

    work("o-4", fails=True, ends=3)
    died = {letter["id"]: letter["replays"] for letter in listed(duly)}
    assert died == {"o-2": 1, "o-3": 1, "o-4": 0}


def test_the_app_mends_too(duly: Duly):
    work("o-1", "o-2", fails=True)
    shop = runpy.run_path("shop.py")
    with shop["app"] as app:
        first, second = app.dead_letters("billing")
        assert app.discard([first]) == 1
        assert app.replay([second]) == 1
        assert app.replay([first, second]) == 0
        assert app.dead_letters() == []
    assert work(fails=False, ends=1) == [second.message.id]


def test_status_counts_what_can_be_counted(duly: Duly):
    [billing] = duly("status", "shop:app", "--json").json["consumers"]
    assert (billing["backlog"], billing["dead"], billing["workers"]) == (0, 0, 0)
    shop = runpy.run_path("shop.py")
    with shop["app"] as app:
        for n in range(5):
            app.publish(shop["orders"], f"o-{n}", id=f"o-{n}")
        broker, _ = app.backends()
        options = SubscribeOptions(guarantee=Guarantee.AT_LEAST_ONCE)
        lane = broker.subscribe([shop["orders"]], "billing", options)
        held = lane.claim(1, 1 << 30, 10.0)
        lane.settle([Dead(held[0].receipt, "no")])
        held = lane.claim(1, 1 << 30, 10.0)
        lane.settle([Retry(held[0].receipt, 600.0, "later")])
        status = duly("status", "shop:app", "--json").json
        [billing] = status["consumers"]
        assert (billing["dead"], billing["workers"], status["delayed"]) == (1, 1, 1)
        assert billing["in_flight"] is None
        assert billing["parked"] is None
        lane.close()
        eventually(
            lambda: duly("status", "shop:app", "--json").json["consumers"][0]["backlog"] == 3,
            "what was delivered beforehand is back",
        )
        head, row, *_ = (line.split("\t") for line in duly("status", "shop:app").out.splitlines())
        shown = dict(zip(head, row, strict=True))
        assert (shown["consumer"], shown["backlog"], shown["in flight"]) == ("billing", "3", "-")
        assert (shown["dead"], shown["workers"]) == ("1", "0")
        assert "passed" not in shown


def test_who_only_looks_makes_nothing(plain: Duly, rabbit_url: str):
    """Neither an exchange nor a queue nor a record; and what is there is compared all the same."""
    assert plain("status", "shop:app", "--json").json["consumers"][0]["backlog"] == 0
    assert plain("doctor", "shop:app").status == 0
    names = Names(rabbit_url.partition("namespace=")[2])
    exchanges = [names.topic("orders"), names.onward, names.unheard, names.delay(64)]
    exchanges += [names.record(kind, "orders") for kind in ("topic", "partitions")]
    for name in exchanges:
        with channel(rabbit_url) as operator, pytest.raises(NOT_FOUND):
            operator.exchange_declare(name, "fanout", passive=True)
    for name in (names.queue("orders", "billing"), names.dead("orders", "billing"), names.letters):
        with channel(rabbit_url) as operator, pytest.raises(NOT_FOUND):
            operator.queue_declare(name, passive=True)
    with closing(RabbitMQBroker(rabbit_url)) as other:
        other.declare([Topic("orders", str, guarantee="exactly-once")])
    ended = plain("doctor", "shop:app")
    assert ended.status == 1
    assert "'orders' is there with guarantee exactly-once" in ended.out
    assert plain("status", "shop:app").status == 2


def test_init_makes_queues_and_tables(duly: Duly):
    made = duly("init", "shop:app", "--json").json
    assert [(each["what"], each["name"]) for each in made] == [
        ("topic", "orders"),
        ("subscription", "billing"),
    ]
    ended = duly("init", "shop:app")
    assert ended.status == 0
    [billing] = duly("status", "shop:app", "--json").json["consumers"]
    assert (billing["consumer"], billing["workers"]) == ("billing", 0)


def test_doctor_finds_nothing_wrong(duly: Duly):
    findings = duly("doctor", "shop:app", "--json").json
    # The store of tests is told that it would not survive a power cut.
    seen = [each for each in findings if not each["what"].startswith("store")]
    # What is not looked at without the management interface is said.
    odd = {each["what"] for each in seen if each["level"] != "ok"}
    assert odd <= {"server"}, seen
    assert "wrong" not in {each["level"] for each in seen}
    found = {each["what"]: each["found"] for each in seen}
    assert found["broker"] == "RabbitMQ: reachable"
    assert found["broker, RabbitMQ"][0].isdigit()
    assert found["broker, publishing"] == "messages are confirmed"
    assert found["contract"] == "kept for 1 consumers"


def test_doctor_sees_that_nobody_works(plain: Duly):
    shop = runpy.run_path("shop.py")
    with shop["app"] as app:
        app.publish(shop["orders"], "o-1")
    ended = plain("doctor", "shop:app")
    assert ended.status == 0
    assert "1 messages of orders wait, and nobody works on them" in ended.out


def test_doctor_sees_an_alarm(
    rabbit_node: RabbitMQNode,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
):
    rabbit_node.start_again()
    url = in_namespace(named_after(request.node.name), rabbit_node.url)
    duly = at(url, None, tmp_path, monkeypatch, capsys)
    assert duly("doctor", "shop:app").status == 0
    rabbit_node.control("set_vm_memory_high_watermark", "absolute", "1")
    ended = Ended(0, "", "")

    def sees() -> bool:
        nonlocal ended
        ended = duly("doctor", "shop:app", "--json")
        return ended.status == 1

    try:
        eventually(sees, "the alarm is raised and seen", lambda: ended.out)
    finally:
        rabbit_node.control("set_vm_memory_high_watermark", "0.4")
    [wrong] = [each for each in ended.json if each["level"] == "wrong"]
    assert wrong["what"] == "broker, publishing"
    assert "blocked" in wrong["found"]
    assert "memory" in wrong["remedy"]


@pytest.mark.parametrize("command", ["status", "dead list", "init"])
def test_a_server_that_is_not_there(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    duly = at("amqp://guest:sesame@127.0.0.1:1/", None, tmp_path, monkeypatch, capsys)
    ended = duly(*command.split(), "shop:app")
    assert ended.status == 1
    [line] = ended.err.splitlines()
    assert line.startswith("duly: BrokerUnavailable: RabbitMQ at 127.0.0.1:1: cannot connect")
    assert "sesame" not in ended.err + ended.out
    ended = duly("doctor", "shop:app")
    assert ended.status == 1
    assert "cannot be used: RabbitMQ at 127.0.0.1:1" in ended.out


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("trace", "shop:app", "o-1"), "cannot tell duly the life of a message"),
        (("tail", "shop:app", "orders", "--no-follow", "--from", "earliest"), "cannot show duly"),
        (("pause", "shop:app", "billing"), "cannot pause, rewind or remove subscriptions"),
        (("resume", "shop:app", "billing"), "cannot pause, rewind or remove subscriptions"),
        (("rewind", "shop:app", "billing", "--to", "earliest", "--yes"), "cannot pause, rewind"),
        (("drop", "shop:app", "billing", "--yes"), "cannot pause, rewind or remove"),
        (("erase", "shop:app", "--key", "ann", "--yes"), "cannot remove single messages"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(plain: Duly, command: tuple[str, ...], said: str):
    ended = plain(*command)
    assert ended.status == 2
    [line] = ended.err.splitlines()
    assert line.startswith("duly: RabbitMQ ")
    assert said in line
    assert ended.out == ""


@pytest.mark.parametrize("duly", ["sqlite", "postgres"], indirect=True)
def test_a_persons_dead_letters_are_erased(duly: Duly):
    work("o-1", "o-2", fails=True)
    ended = duly("erase", "shop:app", "--id", "o-1", "--yes", "--json")
    assert (ended.status, ended.json["erased"]) == (0, 1)
    assert "RabbitMQ cannot remove what waits in its queues" in ended.json["out_of_reach"]
    assert [letter["id"] for letter in listed(duly)] == ["o-2"]
    ended = duly("erase", "shop:app", "--id", "o-2", "--yes")
    assert (ended.status, ended.out) == (0, "erased 1\n")
    assert "erase again" in ended.err
    assert listed(duly) == []


# --- a worker that dies between the store and the broker

DIES = """
import os, sys
import duly
from duly.sql import graves
from duly.worker import Worker

sys.path.insert(0, ".")
import shop2

bury = graves.SQLGraveyard.bury

def once(self, letters):
    bury(self, letters)
    if letters:
        print("buried", flush=True)
        if sys.argv[1] == "dies":
            os.kill(os.getpid(), 9)

graves.SQLGraveyard.bury = once
with shop2.app, Worker(shop2.app):
    sys.stdin.readline()
"""

SHOP2 = """
import os, sqlite3
import duly

orders = duly.Topic("orders", str, guarantee="exactly-once")
app = duly.App("shop", broker=os.environ["SHOP_BROKER"], store="sqlite:///effects.db")

@app.consumer(orders, name="billing", guarantee="exactly-once")
def charge(order: str, tx: duly.Transaction[sqlite3.Connection]) -> None:
    tx.connection.execute("create table if not exists charges (id)")
    tx.connection.execute("insert into charges values (?)", (order,))
    if not os.path.exists("mended"):
        raise duly.Reject("no such order")
"""


def charged() -> list[tuple[str]]:
    with closing(sqlite3.connect("effects.db", timeout=30)) as connection:
        try:
            return connection.execute("select id from charges").fetchall()
        except sqlite3.OperationalError:
            return []  # nothing took effect yet


def test_a_worker_that_is_killed_between_store_and_broker(
    tmp_path: Path, rabbit_url: str, monkeypatch: pytest.MonkeyPatch
):
    """One letter, no effect; and the replay takes effect once."""
    (tmp_path / "shop2.py").write_text(SHOP2)
    monkeypatch.setenv("SHOP_BROKER", rabbit_url)
    monkeypatch.chdir(tmp_path)
    shop = runpy.run_path("shop2.py")

    def worker(how: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", DIES, how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    with shop["app"] as app:
        app.publish(shop["orders"], "o-1", id="o-1")
        dying = worker("dies")
        assert dying.wait(60) == -signal.SIGKILL
        out, _ = dying.communicate()
        assert out == "buried\n"
        assert [letter.message.id for letter in app.dead_letters()] == ["o-1"]
        living = worker("lives")
        try:
            assert living.stdout is not None
            assert living.stdout.readline() == "buried\n", "it came back, and was given up on again"
            [letter] = app.dead_letters()
            assert letter.error == "Reject: no such order"
            Path("mended").touch()
            assert app.replay([letter]) == 1
            assert app.replay([letter]) == 0

            eventually(charged, "the replay took effect")
            assert charged() == [("o-1",)]
            assert app.dead_letters() == []
        finally:
            living.communicate("that is all\n", timeout=60)
        assert living.returncode == 0
