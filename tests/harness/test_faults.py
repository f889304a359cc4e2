"""An application under faults from a seed: `running(app, faults=...)`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import duly
from duly import RetryPolicy, Topic
from duly.errors import ConfigurationError, PublishUnknown
from duly.testing import Faults, Running, running
from tests.harness import shop
from tests.harness.shop import charged

Make = Callable[..., Running]


SEEDS = range(12)
ALWAYS: RetryPolicy = RetryPolicy(attempts=50, first_s=0.1)


def numbers(app: duly.App, guarantee: Any, handled: list[int]) -> Topic[int]:
    topic: Topic[int] = Topic("t", int, guarantee=guarantee)
    declare: Any = app.consumer(topic, name="c", guarantee=guarantee, retry=ALWAYS)
    declare(handled.append)
    return topic


def test_effects_are_once_under_faults(tmp_path: Path):
    hits = 0
    for seed in SEEDS:
        faults = Faults(seed, rate=0.2)
        with running(shop.app, faults=faults, folder=tmp_path, seed=seed) as t:
            with t.connection() as db:
                db.execute(shop.TABLE)
            t.publish_many(shop.orders, [{"cents": n} for n in range(10)])
            t.drain(advance=True)
            # One that was alone whenever its worker died is given up on, in sight.
            dead = [letter.message.payload["cents"] for letter in t.dead("billing")]
            assert sorted(charged(t)) == sorted(t.payloads(shop.receipts)), seed
            assert sorted([*charged(t), *dead]) == list(range(10)), seed
        hits += len(faults.hits)
    assert hits > 50


def test_under_faults_at_least_once_repeats_and_at_most_once_loses():
    repeated = lost = 0
    for seed in SEEDS:
        for guarantee in ("at-least-once", "at-most-once"):
            handled: list[int] = []
            app = duly.App("theirs", "memory://")
            topic = numbers(app, guarantee, handled)
            with running(app, faults=Faults(seed, rate=0.3)) as t:
                t.publish_many(topic, range(5))
                t.drain(advance=True)
            if guarantee == "at-least-once":
                assert set(handled) == set(range(5))
                repeated += len(handled) - 5
            else:
                assert len(handled) == len(set(handled))
                lost += 5 - len(handled)
    assert repeated > 5
    assert lost > 5


def test_a_seed_says_what_hits():
    def hits(seed: int) -> Any:
        app = duly.App("theirs", "memory://")
        topic = numbers(app, "at-least-once", [])
        faults = Faults(seed, rate=0.3)
        with running(app, faults=faults) as t:
            t.publish_many(topic, range(5))
            t.drain()
        return faults.hits

    assert hits(1) == hits(1)
    assert hits(1) != hits(2)


@pytest.mark.parametrize(("kind", "handled"), [("die before", [1, 1]), ("die after", [1])])
def test_one_fault_at_one_call(kind: Any, handled: list[int]):
    found: list[int] = []
    app = duly.App("theirs", "memory://")
    topic = numbers(app, "at-least-once", found)
    faults = Faults(rate=0.0, at={("settle", 1): kind})
    with running(app, faults=faults) as t:
        t.publish(topic, 1)
        t.drain()
        assert t.waiting("c").is_drained
    assert found == handled
    assert [hit[1:] for hit in faults.hits] == [("settle", kind)]
    assert faults.calls[faults.hits[0][0] - 1] == "settle"


def test_what_a_fault_raises_in_the_apps_own_publishing_is_the_apps_to_cope_with():
    app = duly.App("theirs", "memory://")
    topic = numbers(app, "at-least-once", [])
    with running(app, faults=Faults(rate=0.0, at={1: "cut after"})) as t:
        with pytest.raises(PublishUnknown):
            app.publish(topic, 1)
        t.publish(topic, 2)
        t.drain()
        assert t.payloads(topic) == [1, 2]


def test_in_a_handler_that_is_a_retry_and_no_failure_of_the_test():
    app = duly.App("theirs", "memory://")
    topic: Topic[int] = Topic("t", int, guarantee="at-least-once")
    app.consumer(topic, name="c", guarantee="at-least-once")(
        lambda n: app.publish(shop.receipts, n)
    )
    with running(app, faults=Faults(rate=0.0, at={2: "cut before"})) as t:
        t.publish(topic, 1)
        t.drain(advance=True)
        assert t.payloads(shop.receipts) == [1]
        assert [failure.attempt for failure in t.failures] == [1]


def test_a_fault_that_cannot_hit_is_refused():
    with (
        pytest.raises(ConfigurationError, match="'lose' cannot hit: in-memory database"),
        running(shop.app, broker="memory://", faults=Faults(kinds={"reorder", "lose"})),
    ):
        pass
    with pytest.raises(ConfigurationError, match="'slow' is no fault"):
        Faults(kinds={"slow"})  # type: ignore[arg-type]


def test_messages_twice_and_out_of_order_on_a_broker_that_may():
    repeated = reordered = 0
    for seed in range(5):
        handled: list[int] = []
        app = duly.App("theirs", "memory://?kind=queue")
        topic = numbers(app, "at-least-once", handled)
        faults = Faults(seed, rate=0.5, kinds={"reorder", "lose"}, most=20)
        with running(app, faults=faults) as t:
            t.publish_many(topic, range(10))
            t.drain(advance=True)
        assert set(handled) == set(range(10))
        assert len(faults.hits) <= 20
        repeated += len(handled) - 10
        reordered += handled[:10] != list(range(10))
    assert repeated
    assert reordered
