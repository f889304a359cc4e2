"""The code of ``docs/schedules.md``, and the contract it shows."""

from __future__ import annotations

import re
import shlex
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from duly.cli import run
from duly.cli.loading import load_app

PAGE = (Path(__file__).parents[2] / "docs/schedules.md").read_text(encoding="utf-8")


def test_the_application_of_the_page_has_the_contract_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    [code, testing] = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    [shown] = re.findall(r"^```console\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "city.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "city", raising=False)
    command, _, lines = shown.partition("\n")
    _, *arguments = shlex.split(command.removeprefix("$ "))
    assert run(arguments) == 0
    said = capsys.readouterr().out
    for part in lines.split("...\n"):
        assert part in said
    [poll, weekly] = load_app("city:app").schedules
    vienna = ZoneInfo("Europe/Vienna")
    start = int(datetime(2026, 2, 28, tzinfo=vienna).timestamp() * 1000)
    tick = next(weekly.ticks.after(start))
    assert weekly.message(tick, "city").id == "weekly/2026-03-02T08:00:00Z"
    assert weekly.message(tick, "city").body == b'{"week":"2026-W10"}'
    assert (poll.most, weekly.most) == (1, 4)
    exec(testing, vars(__import__("city")))
