"""``duly dead``: what is shown, what is asked, what wrong use costs; run within this process."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from duly.broker import SubscribeOptions
from duly.cli import run
from duly.guarantees import Dead, Guarantee


@dataclass
class Ended:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Duly = Callable[..., Ended]


def give_up(order: str, error: str) -> None:
    """One more dead letter, by another object than the command's."""
    shop = runpy.run_path("shop.py")
    orders = shop["orders"]
    with shop["app"] as app:
        app.publish(orders, shop["Order"](order, 100), id=order)
        broker, _ = app.backends()
        options = SubscribeOptions(guarantee=Guarantee.EXACTLY_ONCE)
        lane = broker.subscribe([orders], "billing", options)
        lane.settle([Dead(d.receipt, error) for d in lane.claim(10, 1 << 30, 0.0)])
        lane.close()


@pytest.fixture
def duly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, shop_source: str) -> Duly:
    """``duly dead ...`` on an application with three dead letters."""
    (tmp_path / "shop.py").write_text(shop_source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    for n, error in enumerate(["KeyError: 'card'", "ValueError: \x1b[31mred\nmore", "last"]):
        give_up(f"o-{n}", error)

    def call(*arguments: str) -> Ended:
        status = run(["dead", *arguments])
        return Ended(status, *capsys.readouterr())

    return call


def test_the_list_is_lines_with_tabs_where_it_is_piped(duly: Duly):
    head, *rows = [line.split("\t") for line in duly("list", "shop:app").out.splitlines()]
    assert head[:4] == ["number", "consumer", "topic", "id"]
    assert [row[3] for row in rows] == ["o-2", "o-1", "o-0"]
    assert rows[1][-1] == "ValueError: \\x1b[31mred"


def test_the_list_is_narrowed(duly: Duly):
    def ids(*options: str) -> list[str]:
        return [each["id"] for each in duly("list", "shop:app", "--json", *options).json]

    assert ids("--error", "card") == ["o-0"]
    assert ids("--id", "o-1") == ["o-1"]
    assert ids("--limit", "2") == ["o-2", "o-1"]
    assert ids("--older", "1h") == ids("--consumer", "nobody") == ids("--topic", "pings") == []
    assert ids("--newer", "1h", "--consumer", "billing", "--topic", "orders") == [
        "o-2",
        "o-1",
        "o-0",
    ]


def test_one_is_shown_with_its_message_and_what_a_replay_comes_to(duly: Duly):
    shown = duly("show", "shop:app", "2", "--json").json
    assert json.loads(shown["body"])["order"] == "o-1"
    assert (shown["source"], shown["id"], shown["attempts"]) == ("shop", "o-1", 1)
    assert "commits once" in shown["replay"]
    text = duly("show", "shop:app", "2").out
    assert "\x1b" not in text
    assert "more" in text


def test_replay_and_discard_do_what_was_meant_and_say_how_much(duly: Duly):
    replayed = duly("replay", "shop:app", "1", "3", "--yes")
    assert (replayed.status, replayed.out) == (0, "replayed 2\n")
    assert "2 of consumer billing: no effect of it was committed" in replayed.err
    discarded = duly("discard", "shop:app", "--all", "--yes", "--json")
    assert (discarded.status, discarded.json) == (0, {"discarded": 1, "consumers": {"billing": 1}})
    assert duly("list", "shop:app", "--json").json == []
    nothing = duly("replay", "shop:app", "--all", "--yes")
    assert (nothing.status, nothing.out) == (1, "no dead letters match\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("replay", "shop:app", "--yes"), "say which to replay"),
        (("discard", "shop:app", "--yes"), "say which to discard"),
        (("discard", "shop:app", "1", "--all"), "not both"),
        (("replay", "shop:app", "--all"), "add --yes"),
        (("show", "shop:app", "77"), "there is no dead letter 77"),
        (("replay", "shop:app", "77", "--yes"), "there is no dead letter 77"),
        (("list", "shop:app", "--older", "3y"), "write 90s, 15m, 2h or 7d"),
        (("list", "gone:app"), "there is no module 'gone'"),
    ],
)
def test_wrong_use_is_told_in_a_line_and_changes_nothing(
    duly: Duly, arguments: tuple[str, ...], said: str
):
    ended = duly(*arguments)
    assert ended.status == 2
    assert said in ended.err.splitlines()[-1]
    assert len(duly("list", "shop:app", "--json").json) == 3


@pytest.mark.parametrize("which", [["--all"], ["--consumer", "billing"]])
@pytest.mark.parametrize("how", ["replay", "discard"])
def test_what_dies_while_it_asks_stays(
    duly: Duly, monkeypatch: pytest.MonkeyPatch, how: str, which: list[str]
):
    def asked(question: str, *, yes: bool) -> None:
        assert question == f"{how} 3 dead letters?"
        give_up("o-late", "late")

    monkeypatch.setattr("duly.cli.dead.ask", asked)
    ended = duly(how, "shop:app", *which)
    assert (ended.status, ended.out) == (0, f"{how}ed 3\n")
    assert [each["id"] for each in duly("list", "shop:app", "--json").json] == ["o-late"]
