"""The Python of ``docs/versions.md``, and what the page says of it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import duly

PAGE = (Path(__file__).parents[2] / "docs/versions.md").read_text(encoding="utf-8")


def test_the_python_of_the_page_reads_every_version(monkeypatch: pytest.MonkeyPatch):
    [code] = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    module = ModuleType("orders_of_the_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look there
    exec(code, module.__dict__)
    page: Any = module
    topic = page.orders

    def stored(body: bytes, **headers: str) -> duly.Message[Any]:
        return duly.Message("orders", "shop", "o-1", body, 1, headers=headers)

    today = topic.message(page.Order("o-1", 4200, "EUR"), source="shop")
    assert today.headers == {"type": "shop.order.v3"}
    read = [
        topic.read(stored(b'{"order": "o-1", "euros": 42}')),
        topic.read(stored(b'{"order": "o-1", "cents": 4200}', type="shop.order.v2")),
        topic.read(today),
    ]
    assert read == [page.Order("o-1", 4200, "EUR")] * 3
    assert topic.versions.look_again_s == 30
