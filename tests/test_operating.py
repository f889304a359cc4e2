"""The commands of ``docs/operating.md``, run in their order, and what is shown below each."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from duly.broker import SubscribeOptions
from duly.cli import run
from duly.cli.loading import load_app
from duly.guarantees import Dead, Guarantee
from tests.cli.conftest import SHOP

PAGE = (Path(__file__).parent.parent / "docs/operating.md").read_text(encoding="utf-8")
DEAD = ["ValueError: no card", "ValueError: no card"]


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module ``shop``, with two dead letters in its file."""
    (tmp_path / "shop.py").write_text(SHOP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    app = load_app("shop:app")
    module: Any = sys.modules["shop"]
    with app:
        ids = [f"o-{n}" for n in range(len(DEAD))]
        app.publish_many(module.orders, [module.Order(id, 1) for id in ids], ids=ids)
        broker, _ = app.backends()
        options = SubscribeOptions(guarantee=Guarantee.EXACTLY_ONCE)
        lane = broker.subscribe([module.orders], "billing", options)
        claimed = lane.claim(10, 1 << 30, 0.0)
        lane.settle([Dead(d.receipt, error) for d, error in zip(claimed, DEAD, strict=True)])
    return module


def commands() -> list[tuple[str, list[str]]]:
    """Each command of the page with the lines below it."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"^```console\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            else:
                found[-1][1].append(line)
    return found


def test_every_command_of_the_page_does_what_is_shown(shop: Any, capsys: Any):
    assert len(commands()) >= 5
    for command, shown in commands():
        name, *arguments = shlex.split(command)
        assert name == "duly"
        status = run(arguments)
        out = capsys.readouterr().out
        assert status == (1 if shown == ["no dead letters match"] else 0), command
        assert not shown or out.splitlines() == shown, command


def test_the_python_of_the_page_does_what_it_says(shop: Any):
    [code] = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    with shop.app as app:
        assert len(app.dead_letters()) == len(DEAD)
        exec(code, {"app": app})
        assert app.dead_letters() == []
