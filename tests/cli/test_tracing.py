"""``duly trace`` and ``duly tail``: what is shown, and what is honestly not kept."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import duly as lib
from duly.broker import SubscribeOptions
from duly.cli import run
from duly.cli.loading import load_app
from duly.guarantees import Dead, Done, Guarantee, Retry
from duly.worker import Worker
from tests.cli.conftest import SHOP, Place
from tests.cli.test_dead import Ended
from tests.waiting import eventually

Duly = Callable[..., Ended]
ENDS = [Done, lambda r: Dead(r, "\x1b[31mred"), lambda r: Retry(r, 60, "ValueError: no")]


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shop_source: str) -> Any:
    """The module ``shop``: of its orders one is done, one dead, one parked, one waits."""
    (tmp_path / "shop.py").write_text(shop_source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    app = load_app("shop:app")
    module: Any = sys.modules["shop"]
    with app:
        for n in range(4):
            app.publish(module.orders, module.Order(f"o-{n}", 1), id=f"o-{n}")
        broker, _ = app.backends()
        options = SubscribeOptions(guarantee=Guarantee.EXACTLY_ONCE)
        lane = broker.subscribe([module.orders], "billing", options)
        claimed = lane.claim(3, 1 << 30, 0.0)
        lane.settle([end(d.receipt) for end, d in zip(ENDS, claimed, strict=True)])  # type: ignore[operator]
    return module


@pytest.fixture
def duly(shop: Any, capsys: Any) -> Duly:
    def call(*arguments: str) -> Ended:
        status = run(list(arguments))
        return Ended(status, *capsys.readouterr())

    return call


def test_what_is_not_kept_is_said(duly: Duly):
    done = duly("trace", "shop:app", "o-0").out
    assert "when is not kept" in done
    assert "stored 20" in done
    assert "it was there before this subscription began" in done
    duly("dead", "discard", "shop:app", "--id", "o-1", "--yes")
    discarded = duly("trace", "shop:app", "o-1").out
    assert "billing: done; when" in discarded, "it did come to it, as the incident says"


def test_errors_are_shown_and_move_no_cursor(duly: Duly):
    dead = duly("trace", "shop:app", "o-1").out
    assert "given up on" in dead
    assert "\\x1b[31mred" in dead
    assert "\x1b" not in dead
    assert "ValueError: no" in duly("trace", "shop:app", "o-2").out
    waits = duly("trace", "shop:app", "o-3", "--json").json
    assert waits[0]["standings"][0]["state"] == "waiting"


def test_nothing_is_kept(duly: Duly):
    ended = duly("trace", "shop:app", "'; drop table duly_messages; --")
    assert (ended.status, ended.out) == (1, "")
    assert "nothing is kept" in ended.err
    assert duly("trace", "shop:app", "o-0", "--source", "other").status == 1
    assert duly("trace", "shop:app", "o-0", "--topic", "pings", "--json").json == []


def test_tail_from_the_start(duly: Duly):
    ended = duly("tail", "shop:app", "orders", "--from", "earliest", "--no-follow", "--json")
    assert [json.loads(line)["id"] for line in ended.out.splitlines()] == [
        "o-0",
        "o-1",
        "o-2",
        "o-3",
    ]
    few = duly("tail", "shop:app", "orders", "--from", "1h", "--limit", "2").out.splitlines()
    assert [line.split()[1] for line in few] == ["o-0", "o-1"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("tail", "shop:app", "gone"), "no topic 'gone' here"),
        (("tail", "shop:app", "orders", "--from", "17"), "not a position"),
        (("tail", "shop:app", "orders", "--no-follow"), "say --from where"),
        (("tail", "shop:app", "orders", "--limit", "0"), "not in the range"),
        (("trace", "shop:app"), "Missing argument 'ID'"),
    ],
)
def test_wrong_use(duly: Duly, arguments: tuple[str, ...], said: str):
    ended = duly(*arguments)
    assert ended.status == 2
    assert said in ended.err.splitlines()[-1]


def test_tail_shows_what_is_published_while_it_runs(place: Place):
    place.write("shop.py", f"{SHOP}\napp.declare(events)\n")
    following = place.start("tail", "shop:app", "events", "--limit", "2", "--json")
    publish = "from shop import *\nwith app: app.publish(events, {'n': 1})"
    while following.poll() is None:
        environment = place.environment()
        subprocess.run(
            [sys.executable, "-c", publish], cwd=place.path, env=environment, check=True, timeout=60
        )
    out, err = following.communicate(timeout=30)
    assert following.returncode == 0, err
    assert [json.loads(line)["body"] for line in out.splitlines()] == ['{"n":1}'] * 2


def test_an_effect_in_a_store_apart_has_its_time(tmp_path: Path):
    app = lib.App("shop", broker=f"sqlite:///{tmp_path}/a.db", store=f"sqlite:///{tmp_path}/b.db")
    orders = lib.Topic("orders", dict, guarantee="exactly-once")
    receipts = lib.Topic("receipts", dict, guarantee="at-least-once")

    @app.consumer(orders, name="billing", guarantee="exactly-once")
    def charge(order: lib.Message[dict[str, Any]], tx: lib.Transaction[Any]) -> None:
        tx.publish(receipts, {}, id="r", headers=order.causation)

    with app:
        app.publish(orders, {}, id="o")
        with Worker(app):
            eventually(lambda: bool(app.trace("r")), "the receipt is there")
        [life] = app.trace("o")
    assert life.effects_ms["billing"] >= life.trace.stored_ms  # type: ignore[operator]
    assert [each.message.id for each in life.followed] == ["r"]
