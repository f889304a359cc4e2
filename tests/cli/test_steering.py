"""``duly pause|resume|rewind|drop``: what is said, asked and refused; run within this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from duly.broker import SubscribeOptions
from duly.cli import run
from duly.cli.loading import load_app
from duly.guarantees import Done, Guarantee
from tests.cli.test_dead import Ended

Duly = Callable[..., Ended]


@pytest.fixture
def duly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, shop_source: str) -> Duly:
    """``duly ...`` on an application that has handled three orders of five."""
    kept = 'guarantee="exactly-once", retention_s=3600)\npings'
    (tmp_path / "shop.py").write_text(shop_source.replace('guarantee="exactly-once")\npings', kept))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    app = load_app("shop:app")
    shop = sys.modules["shop"]
    with app:
        app.publish_many(shop.orders, [shop.Order(f"o-{n}", 1) for n in range(5)])
        broker, _ = app.backends()
        options = SubscribeOptions(guarantee=Guarantee.EXACTLY_ONCE)
        lane = broker.subscribe([shop.orders], "billing", options)
        lane.settle([Done(d.receipt) for d in lane.claim(3, 1 << 30, 0.0)])

    def call(*arguments: str) -> Ended:
        status = run(list(arguments))
        return Ended(status, *capsys.readouterr())

    return call


def backlog(duly: Duly) -> tuple[int, str]:
    [billing] = duly("status", "shop:app", "--json").json["consumers"]
    return billing["backlog"], billing["state"]


def test_pause_and_resume(duly: Duly):
    assert duly("pause", "shop:app", "billing").out == "paused billing\n"
    assert duly("pause", "shop:app", "billing").out == "billing: it was paused already\n"
    assert backlog(duly) == (2, "paused")
    assert duly("resume", "shop:app", "billing", "--json").json == {
        "subscription": "billing",
        "resumed": True,
    }
    assert duly("resume", "shop:app", "billing").out == "billing: it was not paused\n"
    assert backlog(duly) == (2, "working")


def test_rewind_says_what_comes_again_and_what_that_means(duly: Duly):
    ended = duly("rewind", "shop:app", "billing", "--to", "earliest", "--new-epoch", "e", "--yes")
    assert (ended.status, ended.out) == (0, "rewound billing: 3 messages come again\n")
    assert "orders: 3 from 1099511627777 on" in ended.err
    assert backlog(duly) == (5, "working")
    again = duly("rewind", "shop:app", "billing", "--to", "1h", "--new-epoch", "f", "--yes")
    assert (again.status, again.out) == (
        1,
        "billing: nothing is kept between there and where it stands\n",
    )


def test_drop(duly: Duly):
    ended = duly("drop", "shop:app", "billing", "--yes")
    assert (ended.status, ended.out) == (0, "dropped billing\n")
    assert duly("status", "shop:app", "--json").json["consumers"] == []
    assert "no subscription 'billing'" in duly("drop", "shop:app", "billing", "--yes").err


def test_what_was_interrupted_is_finished_by_the_same_command_which_says_so(duly: Duly):
    with load_app("shop:app") as app:
        broker: Any = app.backends()[0]
        broker.rewind("billing", broker.targets("billing", None), "e", quiet=False)
    again = duly("rewind", "shop:app", "billing", "--to", "earliest", "--new-epoch", "e", "--yes")
    assert (again.status, again.out) == (0, "rewound billing: what was begun before is finished\n")
    assert backlog(duly) == (5, "working")

    with load_app("shop:app") as app:
        broker = app.backends()[0]
        broker.drop("billing")
    again = duly("drop", "shop:app", "billing", "--yes", "--json")
    assert (again.status, again.json) == (0, {"subscription": "billing", "dropped": True})
    assert duly("drop", "shop:app", "billing", "--yes").status == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("pause", "shop:app", "gone"), "no subscription 'gone' here; there are: billing"),
        (("resume", "shop:app", "'; drop table duly_messages"), "no subscription"),
        (("drop", "shop:app", "gone", "--yes"), "no subscription 'gone'"),
        (("drop", "shop:app", "billing"), "add --yes"),
        (("rewind", "shop:app", "billing", "--yes"), "Missing option '--to'"),
        (("rewind", "shop:app", "billing", "--to", "noon"), "'noon' is no place"),
        (("rewind", "shop:app", "billing", "--to", "9" * 19), "is no place"),
        (("rewind", "shop:app", "billing", "--to", "7", "--new-epoch", "e"), "none of its topics"),
        (("rewind", "shop:app", "billing", "--to", "2h", "--yes"), "--new-epoch NAME"),
        (("rewind", "shop:app", "billing", "--to", "2h", "--new-epoch", "e"), "add --yes"),
        (("rewind", "shop:app", "gone", "--to", "2h"), "no subscription 'gone'"),
        (("pause", "gone:app", "billing"), "there is no module 'gone'"),
    ],
)
def test_wrong_use_is_told_in_a_line_and_changes_nothing(
    duly: Duly, arguments: tuple[str, ...], said: str
):
    ended = duly(*arguments)
    assert ended.status == 2
    assert said in ended.err.splitlines()[-1]
    assert backlog(duly) == (2, "working")


def test_what_comes_again_is_said_as_json(duly: Duly):
    ended = duly(
        *(
            "rewind",
            "shop:app",
            "billing",
            "--to",
            "earliest",
            "--new-epoch",
            "e",
            "--yes",
            "--json",
        )
    )
    assert json.loads(ended.out) == {
        "subscription": "billing",
        "rewound": True,
        "messages": 3,
        "epoch": "e",
        "targets": [{"topic": "orders", "position": 1099511627777, "messages": 3}],
    }
