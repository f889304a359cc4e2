"""``duly doctor`` and ``duly init``: what is found wrong, and what is made; within this process."""

from __future__ import annotations

import os
import sqlite3
import stat
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from duly.broker import SubscribeOptions
from duly.cli import run
from duly.cli.loading import load_app
from duly.guarantees import Guarantee
from tests.cli.conftest import SHOP
from tests.cli.test_dead import Ended
from tests.sqlite.brokers import PLAIN, Hands, opened, options, publish
from tests.sqlite.programs import running

Duly = Callable[..., Ended]


@pytest.fixture
def duly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Duly:
    (tmp_path / "shop.py").write_text(SHOP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "shop", raising=False)

    def call(*arguments: str) -> Ended:
        status = run(list(arguments))
        return Ended(status, *capsys.readouterr())

    return call


def wrong(duly: Duly) -> dict[str, str]:
    ended = duly("doctor", "shop:app", "--json")
    found = {each["what"]: each["found"] for each in ended.json if each["level"] == "wrong"}
    assert ended.status == (1 if found else 0)
    return found


def warned(duly: Duly) -> dict[str, str]:
    findings = duly("doctor", "shop:app", "--json").json
    return {each["what"]: each["found"] for each in findings if each["level"] == "warning"}


def test_nothing_is_wrong(duly: Duly):
    assert wrong(duly) == {}
    ended = duly("doctor", "shop:app")
    assert ended.status == 0
    assert "broker, permissions: the owner's only" in ended.out
    assert "contract: kept for 1 consumers" in ended.out


def test_init_makes_what_workers_need_and_works_nothing(duly: Duly, tmp_path: Path):
    made = duly("init", "shop:app", "--json").json
    assert [(each["what"], each["name"], each["state"]) for each in made] == [
        ("topic", "orders", "there"),
        ("subscription", "billing", "made"),
    ]
    *_, last = duly("init", "shop:app").out.splitlines()
    assert last == "subscription\tbilling\texactly-once\tthere"
    [billing] = duly("status", "shop:app", "--json").json["consumers"]
    assert (billing["consumer"], billing["in_flight"]) == ("billing", 0)


def test_init_makes_subscriptions_of_every_guarantee(duly: Duly, tmp_path: Path):
    (tmp_path / "shop.py").write_text(
        SHOP + '\n@app.consumer(pings, name="p", guarantee="at-most-once")\n'
        "def p(ping: dict) -> None: ...\n\n"
        '@app.consumer(pings, name="q", guarantee="at-least-once")\n'
        "def q(ping: dict) -> None: ...\n"
    )
    made = duly("init", "shop:app", "--json").json
    names = [each["name"] for each in made if each["what"] == "subscription"]
    assert names == ["billing", "p", "q"]
    assert {c["consumer"] for c in duly("status", "shop:app", "--json").json["consumers"]} == {
        *names
    }


def test_schedules_that_the_broker_cannot_keep(duly: Duly, tmp_path: Path):
    (tmp_path / "shop.py").write_text(
        "import duly\n"
        "from duly.brokers.memory import MemoryLog\n\n\n"
        "class WithoutTicks:\n"
        "    def __init__(self):\n"
        "        self.inner = MemoryLog()\n\n"
        "    def __getattr__(self, name):\n"
        '        if name in ("tick", "ticked", "reached"):\n'
        "            raise AttributeError(name)\n"
        "        return getattr(self.inner, name)\n\n\n"
        'pings = duly.Topic("pings", str, guarantee="at-least-once")\n'
        'app = duly.App("shop", broker=WithoutTicks())\n'
        'app.every("5m", pings, "look", name="poll")\n'
    )
    assert "keeps no schedules" in duly("init", "shop:app").err
    assert "keeps no schedules" in wrong(duly)["contract"]


def test_init_of_a_contract_that_cannot_be_kept(duly: Duly, tmp_path: Path):
    at_most_once = 'guarantee="at-most-once")\nevents'
    broken = SHOP.replace(at_most_once, 'guarantee="at-most-once", partitions=2)\nevents') + (
        '\n@app.consumer(pings, name="p", guarantee="at-most-once", order_by_key=True)\n'
        "def p(ping: dict) -> None: ...\n"
    )
    (tmp_path / "shop.py").write_text(broken)
    ended = duly("init", "shop:app")
    assert ended.status == 2
    assert "Remedy" in ended.err
    assert "contract" in wrong(duly)


@pytest.mark.parametrize("name", ["shop.db", "shop.db-duly", "shop.db-duly/workers"])
def test_who_may_read_the_files(duly: Duly, tmp_path: Path, name: str):
    duly("init", "shop:app")
    path = tmp_path / name
    path.chmod(0o740)
    assert name in warned(duly)["broker, permissions"]
    path.chmod(0o704)
    assert name in wrong(duly)["broker, permissions"]


def test_every_file_is_its_owners_only(duly: Duly, tmp_path: Path):
    previous = os.umask(0)
    try:
        app = load_app("shop:app")
        with app:
            broker, _ = app.backends()
            shop = sys.modules["shop"]
            wanted = SubscribeOptions(guarantee=Guarantee.EXACTLY_ONCE)
            broker.subscribe([shop.orders], "billing", wanted).claim(1, 1, 0.0)
            app.publish(shop.orders, shop.Order("o", 1))
            made = [path for path in tmp_path.rglob("*") if "shop.db" in str(path)]
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in made}
    finally:
        os.umask(previous)
    assert {"shop.db", "shop.db-wal", "shop.db-shm", "shop.db-duly", "workers"} <= modes.keys()
    assert {name: oct(mode) for name, mode in modes.items() if mode & 0o077} == {}


def test_somebody_elses_trigger(duly: Duly, tmp_path: Path):
    duly("init", "shop:app")
    with closing(sqlite3.connect(tmp_path / "shop.db")) as connection:
        connection.execute("create trigger t after insert on duly_claims begin select 1; end")
    assert "t" in wrong(duly)["broker, triggers"]


def test_a_damaged_file(duly: Duly, tmp_path: Path):
    duly("init", "shop:app")
    (tmp_path / "shop.db-wal").unlink(missing_ok=True)
    with (tmp_path / "shop.db").open("r+b") as file:
        file.write(b"this is no database")
    assert "no SQLite database" in wrong(duly)["broker or store"]


def test_pages_that_are_damaged(duly: Duly, tmp_path: Path):
    duly("init", "shop:app")
    with (tmp_path / "shop.db").open("r+b") as file:
        file.seek(4096 * 3)
        file.write(b"\xff" * 4096 * 2)
    assert "broker, contents" in wrong(duly) or "broker or store" in wrong(duly)


def test_no_room(duly: Duly, monkeypatch: pytest.MonkeyPatch):
    real = os.statvfs

    def full(path: Any) -> Any:
        return os.statvfs_result((4096, 4096, 10, 10, 10, *real(path)[5:]))

    monkeypatch.setattr(os, "statvfs", full)
    assert wrong(duly)["broker, disk"] == "0 MiB free"


def test_another_guarantee_than_recorded(duly: Duly, tmp_path: Path):
    duly("init", "shop:app")
    declared = '"billing", guarantee="{}")'
    other = SHOP.replace(declared.format("exactly-once"), declared.format("at-least-once"))
    other = other.replace(", tx: duly.Transaction[sqlite3.Connection]", "")
    (tmp_path / "shop.py").write_text(other)
    sys.modules.pop("shop")
    assert "recorded as exactly-once" in wrong(duly)["consumer billing"]


def test_what_is_held_back(duly: Duly):
    duly("init", "shop:app")
    duly("pause", "shop:app", "billing")
    assert warned(duly)["consumer billing"].startswith("paused since")


HOLDER = """
import sys
from tests.sqlite.brokers import *
broker = opened(sys.argv[1])
lane = broker.subscribe([PLAIN], "s", options())
print(len(lane.claim(3, 1 << 30, 20)))
input()
"""


def test_a_dead_workers_claims_and_the_clock(db_path: Path):
    from duly.operating.health import examine

    hands = Hands()
    broker = opened(db_path, hands=hands)
    publish(broker, PLAIN, range(3), time_ms=hands.wall + 3_600_000)
    with running(HOLDER, db_path) as holder:
        holder.expect("3")
        holder.kill()
    broker.subscribe([PLAIN], "t", options()).claim(1, 1, 0.0)
    hands.wall += 7_000
    found = [f"{each.what}: {each.found}" for each in examine((broker, None), [], [], [])]
    assert any("claimed by a worker that is dead" in each for each in found)
    assert any("clock: stepped by +7.0 s" in each for each in found)
    assert any("clock: messages were made 3,593 s from now" in each for each in found)
