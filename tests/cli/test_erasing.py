"""``duly erase``: what is asked, said and refused; run within this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from duly.cli import run
from duly.cli.loading import load_app
from tests.cli.test_dead import Ended

Duly = Callable[..., Ended]


@pytest.fixture
def duly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, shop_source: str) -> Duly:
    """``duly ...`` on an application with three orders, two of them of ann."""
    (tmp_path / "shop.py").write_text(shop_source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    app = load_app("shop:app")
    shop = sys.modules["shop"]
    with app:
        for n, key in enumerate(["ann", "ann", "bob"]):
            app.publish(shop.orders, shop.Order(f"o-{n}", 1), id=f"o-{n}", key=key)

    def call(*arguments: str) -> Ended:
        status = run(list(arguments))
        return Ended(status, *capsys.readouterr())

    return call


def left(duly: Duly) -> int:
    return len(
        duly("tail", "shop:app", "orders", "--from", "earliest", "--no-follow").out.splitlines()
    )


def test_by_key_and_by_id_and_again(duly: Duly):
    ended = duly("erase", "shop:app", "--key", "ann", "--yes")
    assert (ended.status, ended.out, left(duly)) == (0, "erased 2\n", 1)
    again = duly("erase", "shop:app", "--key", "ann", "--json")  # nothing to ask about
    assert (again.status, again.json) == (0, {"erased": 0})
    assert duly("erase", "shop:app", "--id", "o-2", "--source", "other", "--json").json == {
        "erased": 0
    }
    assert duly("erase", "shop:app", "--id", "o-2", "--yes").out == "erased 1\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "say whose messages to erase"),
        (("--topic", "orders", "--yes"), "say whose messages to erase"),
        (("--key", "ann"), "erase 2 copies for good? There is no terminal to ask at: add --yes"),
    ],
)
def test_wrong_use_is_told_in_a_line_and_changes_nothing(
    duly: Duly, arguments: tuple[str, ...], said: str
):
    ended = duly("erase", "shop:app", *arguments)
    assert ended.status == 2
    assert said in ended.err.splitlines()[-1]
    assert left(duly) == 3


def test_what_is_no_key_of_anybody_erases_nobody(duly: Duly):
    for key in ("' or '1'='1", "%", "*", ""):
        assert duly("erase", "shop:app", "--key", key, "--yes", "--json").json == {"erased": 0}
    assert left(duly) == 3
