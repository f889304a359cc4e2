"""``duly status``: what is counted, in both forms; run within this process."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from duly.broker import SubscribeOptions
from duly.cli import run
from duly.cli.loading import load_app
from duly.cli.status import _tables as tables_of
from duly.cli.status import look, with_rates
from duly.guarantees import Dead, Done, Guarantee, Retry
from tests.sqlite.brokers import PLAIN, Hands, claim, opened, options, publish, receipts
from tests.sqlite.programs import running


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shop_source: str) -> Any:
    """The module ``shop``, beside a fresh file."""
    (tmp_path / "shop.py").write_text(shop_source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "shop", raising=False)
    load_app("shop:app")
    return sys.modules["shop"]


def test_everything_is_counted(shop: Any, capsys: Any):
    with shop.app as app:
        for n in range(10):
            app.publish(shop.orders, shop.Order(f"o-{n}", 1), id=f"o-{n}")
        app.publish(shop.orders, shop.Order("o-1", 1), id="o-1")
        broker, _ = app.backends()
        broker.record_drops("pings", 7)
        lane = broker.subscribe(
            [shop.orders], "billing", SubscribeOptions(guarantee=Guarantee.EXACTLY_ONCE)
        )
        first, second, third, *_ = receipts(lane.claim(5, 1 << 30, 0.0))
        lane.settle([Done(first), Retry(second, 60, "e"), Dead(third, "e")])
        app.declare(shop.pings)
        assert run(["status", "shop:app", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    [billing] = status["consumers"]
    oldest_ms = billing.pop("oldest_ms")
    assert oldest_ms > 1_700_000_000_000
    assert billing == {
        "consumer": "billing",
        "topic": "orders",
        "backlog": 5,
        "in_flight": 2,
        "parked": 1,
        "dead": 1,
        "state": "working",
        "passed": 2,
        "retries": 1,
        "redelivered": 0,
        "repeats_suppressed": 0,
        "stale_settles": 0,
        "replayed": 0,
        "discarded": 0,
    }
    orders, pings = sorted(status["topics"], key=lambda topic: topic["topic"])
    assert (orders["repeats_dropped"], pings["dropped"]) == (1, 7)
    assert (orders["published"], pings["published"]) == (10, 0)
    assert status["outbox"] is None


def test_as_lines_with_tabs(shop: Any, capsys: Any):
    with shop.app as app:
        app.backends()
    assert run(["status", "shop:app"]) == 0
    head, *_ = capsys.readouterr().out.splitlines()
    assert head.split("\t")[:4] == ["consumer", "topic", "backlog", "in flight"]


def test_what_goes_through_in_a_second(shop: Any):
    with shop.app as app:
        app.publish(shop.orders, shop.Order("o", 1))
        broker, _ = app.backends()
        lane = broker.subscribe(
            [shop.orders], "billing", SubscribeOptions(guarantee=Guarantee.EXACTLY_ONCE)
        )
        before = look(app)
        for _ in range(9):
            app.publish(shop.orders, shop.Order("o", 1))
        lane.settle([Done(receipt) for receipt in receipts(lane.claim(6, 1 << 30, 0.0))])
        rated = with_rates(before, look(app), 2.0)
        [worker] = rated.workers
        assert (worker.alive, worker.messages) == (True, 0)
    [billing], [orders] = rated.consumers, rated.topics
    assert (billing["passed_per_s"], orders["published_per_s"]) == (3, 4)
    heads = [head for head, _ in tables_of(rated)]
    assert "passed/s" in heads[0]
    assert "passed" not in heads[0]
    assert "published/s" in heads[1]


def test_watching_wants_a_terminal_and_no_json(shop: Any, capsys: Any):
    assert run(["status", "shop:app", "--watch"]) == 2
    assert run(["status", "shop:app", "--watch", "--json"]) == 2
    assert "leave out --json" in capsys.readouterr().err


HOLDER = """
import sys
from tests.sqlite.brokers import *
broker = opened(sys.argv[1])
lane = broker.subscribe([PLAIN], "s", options())
print(len(lane.claim(3, 1 << 30, 20)))
input()
"""


def test_who_holds_what_and_whether_it_lives(db_path: Path):
    broker = opened(db_path)
    publish(broker, PLAIN, range(4))
    with running(HOLDER, db_path) as holder:
        holder.expect("3")
        [alive] = broker.holders()
        assert (alive.subscription, alive.topic, alive.messages, alive.alive) == (
            "s",
            "plain",
            3,
            True,
        )
        assert alive.worker.startswith(f"{holder.pid}-")
        holder.kill()
    assert [(each.messages, each.alive) for each in broker.holders()] == [(3, False)]


def test_the_oldest_is_found_wherever_it_waits(db_path: Path):
    hands = Hands()
    broker = opened(db_path, hands=hands)
    lane = broker.subscribe([PLAIN], "s", options())
    assert broker.oldest() == {}
    publish(broker, PLAIN, range(3))
    times = [at for (at,) in _times(broker)]
    assert broker.oldest() == {("s", "plain"): times[0]}
    first, second, third = receipts(claim(lane))
    assert broker.oldest() == {("s", "plain"): times[0]}
    lane.settle([Done(first), Retry(second, 60, "e"), Done(third)])
    assert broker.oldest() == {("s", "plain"): times[1]}


def _times(broker: Any) -> list[Any]:
    from tests.sqlite.brokers import execute

    return execute(
        broker, "update duly_messages set time_ms = time_ms + (position & 255) returning time_ms"
    )
