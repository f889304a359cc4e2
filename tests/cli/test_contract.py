"""``duly contract``."""

from __future__ import annotations

import json

from tests.cli.conftest import Place


def test_as_text(shop: Place):
    ended = shop.duly("contract", "shop:app")
    assert ended.status == 0
    assert ended.err == ""
    assert ended.out.startswith("broker: SQLite    store: SQLite\n")
    assert "billing <- orders: exactly-once, admission by claim" in ended.out
    assert "process ended and replaced" in ended.out


def test_as_json(shop: Place):
    ended = shop.duly("contract", "shop:app", "--json")
    contract = json.loads(ended.out)
    (consumer,) = contract["consumers"]
    assert consumer["admission"] == "by claim"
    assert consumer["crash_loses"] == consumer["crash_repeats"] == 0
    (flow,) = contract["flows"]
    assert (flow["topic"], flow["consumer"]) == ("orders", "billing")
    assert flow["guarantee"] == "exactly-once"
