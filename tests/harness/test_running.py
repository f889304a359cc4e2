"""`running`: real lanes on a broker of the test's own, and an app that is as before afterwards."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import duly
from duly import Message, RetryPolicy, Topic
from duly.brokers.memory import MemoryDatabase
from duly.brokers.sqlite import SQLiteBroker
from duly.errors import ConfigurationError, ContractRefused, PublishUnknown
from duly.guarantees import Admission
from duly.testing import Faults, Running, running
from tests.harness import shop

Make = Callable[..., Running]


@pytest.fixture(autouse=True)
def _nothing_before() -> None:
    shop.mailed.clear()
    shop.seen.clear()


@pytest.fixture
def shopping(tmp_path: Path) -> Iterator[Running]:
    with running(shop.app, folder=tmp_path) as t:
        with t.connection() as db:
            db.execute(shop.TABLE)
        yield t


def charged(t: Running) -> list[int]:
    with t.connection() as db:
        return [cents for (cents,) in db.execute("select cents from charges order by rowid")]


# --- what runs


def test_what_one_message_leads_to_is_run_to_its_end(shopping: Running):
    t = shopping
    t.publish(shop.orders, {"cents": 42})
    assert charged(t) == [], "nothing runs in between"
    t.drain()
    assert charged(t) == t.payloads(shop.receipts) == shop.mailed == shop.seen == [42]
    assert t.counts("billing").handled == 1
    assert t.waiting("billing").is_drained


def test_the_broker_that_the_app_names_is_not_touched(shopping: Running):
    shop.app.publish(shop.orders, {"cents": 7})
    shopping.drain()
    assert charged(shopping) == [7]
    assert not Path(shop.NEVER).exists()
    assert not list(Path().glob("*-duly"))


def test_afterwards_the_app_is_as_it_was(tmp_path: Path):
    app = duly.App("theirs", f"sqlite:///{tmp_path / 'theirs.db'}")
    topic: Topic[int] = Topic("t", int, guarantee="at-least-once")
    handled: list[int] = []
    app.consumer(topic, name="c", guarantee="at-least-once")(handled.append)
    before = app.backends()
    app.overrides[len] = max
    with pytest.raises(KeyError), running(app, overrides={len: min}) as t:  # noqa: PT012
        app.publish(topic, 1)
        t.drain()
        raise KeyError
    assert app.backends() == before
    assert app.overrides == {len: max}
    app.publish(topic, 2)
    with running(app) as t:
        t.drain()
    assert handled == [1], "what is in the app's own broker is not handled by a test"
    app.close()


def test_what_the_app_had_open_stays_open(tmp_path: Path):
    with closing(SQLiteBroker(tmp_path / "own.db")) as broker:
        app = duly.App("theirs", broker)
        topic: Topic[int] = Topic("t", int, guarantee="at-least-once")
        app.publish(topic, 1)
        with running(app, folder=tmp_path) as t:
            assert t.broker.capabilities.name == "SQLite"
            assert t.broker is not broker
            assert t.payloads(topic) == []
        app.publish(topic, 2)


@pytest.mark.parametrize(
    ("broker", "store", "admission"),
    [
        ("sqlite:///a.db", None, Admission.BY_CLAIM),
        ("sqlite:///a.db", "sqlite:///a.db?foreign_keys=on", Admission.BY_CLAIM),
        ("sqlite:///a.db", "sqlite:///b.db", Admission.BY_INBOX),
        ("memory://", None, Admission.BY_CLAIM),
        ("memory://?kind=queue", None, Admission.BY_INBOX),
        (None, None, Admission.BY_CLAIM),
    ],
)
def test_the_arrangement_is_the_apps_own(tmp_path: Path, broker: str, store: str, admission: Any):
    topic: Topic[int] = Topic("t", int, guarantee="exactly-once")
    outputs: Topic[int] = Topic("outputs", int, guarantee="at-least-once")
    app = duly.App("theirs", broker, store)

    @app.consumer(topic, name="c", guarantee="exactly-once")
    def handle(n: int, tx: duly.Transaction[Any]) -> None:
        tx.publish(outputs, n)

    with running(app, folder=tmp_path) as t:
        t.publish_many(topic, [1, 2])
        t.drain()
        assert t.contract is not None
        assert t.contract.admission("c") == admission
        assert t.payloads(outputs) == [1, 2], "also through an outbox"
    assert not Path("a.db").exists()


def test_some_consumers_only():
    with running(shop.app, consumers=["dashboard"]) as t:
        t.publish(shop.receipts, 1)
        t.publish(shop.views, 2)
        t.drain()
        assert (shop.mailed, shop.seen) == ([], [2])
        with pytest.raises(ConfigurationError, match="mail"):
            t.waiting("mail")


def test_dependencies_are_overridden_and_torn_down(tmp_path: Path):
    told: list[str] = []

    def dearer() -> Iterator[dict[str, int]]:
        told.append("made")
        yield {"a": 100}
        told.append("torn down")

    with running(shop.app, overrides={shop.prices: dearer}, folder=tmp_path) as t:
        with t.connection() as db:
            db.execute(shop.TABLE)
        t.publish(shop.orders, {"cents": 1})
        t.drain()
        assert charged(t) == [100]
    assert told == ["made", "torn down"]


def test_the_lifespan_is_around_it():
    told: list[str] = []

    @asynccontextmanager
    async def lifespan(app: duly.App) -> AsyncIterator[None]:
        told.append("begin")
        yield
        told.append("end")

    app = duly.App("theirs", "memory://", lifespan=lifespan)
    topic: Topic[int] = Topic("t", int, guarantee="at-least-once")
    app.consumer(topic, name="c", guarantee="at-least-once")(lambda n: told.append(str(n)))
    with running(app) as t:
        t.publish(topic, 1)
        t.drain()
    assert told == ["begin", "1", "end"]


def test_two_apps_on_one_broker():
    events: Topic[int] = Topic("events", int, guarantee="at-least-once")
    one, other = duly.App("one", "memory://"), duly.App("other", "memory://")
    handled: list[int] = []
    other.consumer(events, name="c", guarantee="at-least-once")(handled.append)
    with running(one) as t, running(other, broker=t.broker, clock=t.clock) as u:
        one.publish(events, 1)
        one.publish(events, 2, delay_s=60)
        u.drain()
        assert handled == [1]
        t.advance(60)
        u.drain()
        assert handled == [1, 2]


def test_an_app_without_consumers():
    app = duly.App("theirs", "memory://")
    with running(app) as t:
        app.publish(shop.receipts, 3)
        app.publish(shop.views, 4)
        t.drain()
        assert (t.payloads(shop.receipts), t.payloads(shop.views)) == ([3], [4])


def test_what_the_contract_refuses_is_refused():
    with pytest.raises(ContractRefused), running(shop.app, broker="memory://?kind=queue"):
        pass
    with running(shop.app):
        pass


def test_bodies_are_encoded_and_decoded_as_ever(shopping: Running):
    wrong: Any = {"cents": "many"}
    with pytest.raises(duly.InvalidMessage):
        shopping.publish(shop.orders, wrong)


def test_a_rate_limit_is_waited_out_on_the_clock():
    app = duly.App("theirs", "memory://")
    topic: Topic[int] = Topic("t", int, guarantee="at-least-once")
    handled: list[int] = []
    app.consumer(topic, name="c", guarantee="at-least-once", rate_per_s=1)(handled.append)
    with running(app) as t:
        began = t.clock.now
        t.publish_many(topic, range(10))
        t.drain()
        assert handled == list(range(10))
        assert t.clock.now - began >= timedelta(seconds=8)


@pytest.mark.parametrize("hold", [False, True])
def test_order_by_key_behind_a_failure(hold: bool):
    app = duly.App("theirs", "memory://")
    topic: Topic[int] = Topic(
        "t", int, guarantee="exactly-once", partitions=2, key=lambda n: f"k{n % 2}"
    )

    @app.consumer(
        topic, name="c", guarantee="exactly-once", order_by_key=True, hold_key_on_dead=hold
    )
    def handle(n: int, tx: duly.Transaction[Any]) -> None:
        if n == 2:
            raise ValueError("the even ones wait")
        tx.connection.insert("handled", n, n)

    def handled(t: Running) -> list[int]:
        with t.connection() as tables:
            return list(tables.rows("handled"))

    with running(app) as t:
        t.publish_many(topic, range(1, 7))
        t.drain(failures="expected")
        assert handled(t) == [1, 3, 5]
        t.drain(advance=True, failures="expected")
        assert handled(t) == ([1, 3, 5] if hold else [1, 3, 5, 4, 6])
        assert [letter.message.payload for letter in t.dead("c")] == [2]
        assert t.waiting("c").parked == (2 if hold else 0)


@pytest.mark.parametrize("guarantee", ["at-least-once", "exactly-once"])
def test_batch_handlers(guarantee: Any):
    app = duly.App("theirs", "memory://")
    topic: Topic[int] = Topic("t", int, guarantee="exactly-once")
    batches: list[list[int]] = []

    def plain(batch: list[int]) -> None:
        batches.append(batch)
        if 3 in batch:
            raise ValueError("not with the three")

    def within(batch: list[int], tx: duly.Transaction[Any]) -> None:
        plain(batch)

    declare: Any = app.batch_consumer(topic, name="c", guarantee=guarantee, batch=10)
    declare(within if guarantee == "exactly-once" else plain)
    with running(app) as t:
        t.publish_many(topic, range(5))
        with pytest.raises(ValueError, match="three"):
            t.drain()
        t.drain(advance=True, failures="expected")
        assert batches[0] == [0, 1, 2, 3, 4]
        assert batches[1:6] == [[0], [1], [2], [3], [4]], "alone, so that the culprit is found"
        assert [letter.message.payload for letter in t.dead("c")] == [3]


# --- failures


def test_a_handlers_exception_surfaces_where_it_was_raised(shopping: Running):
    t = shopping
    t.publish(shop.orders, {"cents": -1}, id="o-1")
    t.publish(shop.orders, {"cents": 5})
    with pytest.raises(ValueError, match="nobody is charged -1") as raised:
        t.drain()
    frames = traceback.extract_tb(raised.value.__traceback__)
    assert frames[-1].name == "bill"
    assert any("'billing' failed on message 'o-1'" in note for note in raised.value.__notes__)
    t.drain()
    assert charged(t) == [5], "what is left is handled"
    assert t.waiting("billing").parked == 1, "and the failed one waits for its retry"


def test_expected_failures_go_all_the_way(shopping: Running):
    t = shopping
    began = t.clock.now
    t.publish(shop.orders, {"cents": -1}, id="o-1")
    t.drain(advance=True, failures="expected")
    assert [(f.attempt, f.retry_in_s) for f in t.failures] == [(1, 10.0), (2, 20.0), (3, None)]
    assert timedelta(seconds=30) <= t.clock.now - began < timedelta(seconds=31)
    [letter] = t.dead("billing")
    assert letter.message.payload == {"cents": -1}
    assert (letter.attempts, letter.error) == (3, "ValueError: nobody is charged -1")
    assert [incident.kind for incident in t.incidents()] == ["retry", "retry", "dead-letter"]
    assert charged(t) == t.payloads(shop.receipts) == []
    t.drain()  # it is not told of again


def deciding(app: duly.App, raises: Exception) -> Topic[int]:
    topic: Topic[int] = Topic("t", int, guarantee="at-least-once")

    @app.consumer(topic, name="c", guarantee="at-least-once")
    def decide(n: int) -> None:
        raise raises

    return topic


def test_what_a_handler_decides_is_no_accident():
    app = duly.App("theirs", "memory://")
    topic = deciding(app, duly.Reject("not for us"))
    with running(app) as t:
        t.publish(topic, 1)
        t.drain()
        assert [letter.error for letter in t.dead()] == ["Reject: not for us"]
    app = duly.App("theirs", "memory://")
    topic = deciding(app, duly.Retry("later", in_s=60))
    with running(app) as t:
        t.publish(topic, 1)
        t.drain()
        assert t.waiting("c").parked == 1


def test_what_cannot_be_decoded_is_told(shopping: Running):
    t = shopping
    damaged: Message[Any] = Message("orders", "shop", "o-1", b"no json", 1)
    t.broker.publish([damaged])
    with pytest.raises(AssertionError, match=r"gave up on message 'o-1'.*cannot be decoded"):
        t.drain()
    t.drain()
    assert len(t.dead("billing")) == 1


def test_failures_may_be_expected_throughout():
    app = duly.App("theirs", "memory://")
    topic = deciding(app, KeyError("k"))
    with running(app, failures="expected") as t:
        t.publish(topic, 1)
        t.drain(advance=True)
        assert len(t.failures) == 10
    with pytest.raises(ConfigurationError, match="expected"):
        running(app, failures="never")  # type: ignore[arg-type]


def test_what_is_no_exception_ends_the_lane_and_surfaces():
    app = duly.App("theirs", "memory://")
    topic: Topic[int] = Topic("t", int, guarantee="at-least-once")

    @app.consumer(topic, name="c", guarantee="at-least-once")
    def leave(n: int) -> None:
        raise SystemExit(3)

    with running(app) as t:
        t.publish(topic, 1)
        with pytest.raises(SystemExit):
            t.drain()


def test_what_never_comes_to_rest_is_told():
    app = duly.App("theirs", "memory://")
    topic: Topic[int] = Topic("t", int, guarantee="at-least-once")
    app.consumer(topic, name="c", guarantee="at-least-once")(lambda n: app.publish(topic, n))
    with running(app) as t:
        t.publish(topic, 1)
        with pytest.raises(AssertionError, match=r"does not come to rest.*c handled"):
            t.drain(timeout_s=0.2)


def test_publishing_in_a_transaction_is_refused_as_ever():
    app = duly.App("theirs", "memory://")
    topic: Topic[int] = Topic("t", int, guarantee="exactly-once")

    @app.consumer(topic, name="c", guarantee="exactly-once")
    def handle(n: int, tx: duly.Transaction[Any]) -> None:
        app.publish(topic, n)

    with running(app) as t:
        t.publish(topic, 1)
        with pytest.raises(ConfigurationError, match=r"tx\.publish"):
            t.drain()


# --- time


@pytest.mark.parametrize("broker", ["memory://", "memory://?kind=log", "sqlite"])
def test_time_stands_still_until_it_is_moved(tmp_path: Path, broker: str):
    app = duly.App("theirs", f"sqlite:///{tmp_path / 'x.db'}" if broker == "sqlite" else broker)
    topic: Topic[int] = Topic("t", int, guarantee="at-least-once")
    handled: list[int] = []
    app.consumer(topic, name="c", guarantee="at-least-once")(handled.append)
    with running(app, folder=tmp_path) as t:
        if t.broker.capabilities.delays:
            app.publish(topic, 1, delay_s=3600)
            app.publish(topic, 2, delay_s=7200)
            t.drain()
            assert handled == []
            assert [message.payload for message in t.published(topic)] == [1, 2]
            t.advance(3601)
            t.drain()
            assert handled == [1]
            app.publish(topic, 3, delay_s=60)
            t.drain()
            assert handled == [1], "a delay begins with the clock as it is now"
            began = t.clock.now
            t.drain(advance=True)
            assert handled == [1, 3, 2]
            assert t.clock.now - began < timedelta(hours=1)
            assert t.payloads(topic) == [1, 2, 3]


def test_a_retry_that_was_there_before_is_found_by_looking(tmp_path: Path):
    """Its time was told to nobody who is still there."""
    path = tmp_path / "shared.db"
    app = duly.App("theirs", "memory://")
    topic = deciding(app, duly.Retry("later", in_s=1000))
    with running(app, broker=f"sqlite:///{path}") as t:
        t.publish(topic, 1)
        t.drain()
    with running(app, broker=f"sqlite:///{path}", failures="expected") as t:
        t.drain(advance=True)
        assert len(t.dead()) == 1


def test_a_broker_that_came_open_goes_by_the_machines_clock():
    app = duly.App("theirs", "memory://")
    topic: Topic[int] = Topic("t", int, guarantee="at-least-once")
    handled: list[int] = []
    app.consumer(topic, name="c", guarantee="at-least-once")(handled.append)
    broker = MemoryDatabase()
    with running(app, broker=broker) as t:
        t.publish(topic, 1, delay_s=0.05)
        with pytest.raises(ConfigurationError, match="machine's clock"):
            t.advance(1)
        t.drain(advance=True)
    assert handled == [1]
    broker.publish([])


# --- async def tests


async def _async_shop(folder: Path) -> None:
    async with running(shop.app, folder=folder) as t:
        with t.connection() as db:
            db.execute(shop.TABLE)
        await shop.app.apublish(shop.orders, {"cents": 1})
        with pytest.raises(ConfigurationError, match=r"await t\.adrain"):
            t.drain()
        await t.adrain()
        assert charged(t) == shop.mailed == shop.seen == [1]
        t.publish(shop.orders, {"cents": -1})
        with pytest.raises(ValueError, match="nobody is charged"):
            await t.adrain()


def test_async_tests(tmp_path: Path):
    asyncio.run(_async_shop(tmp_path))


def test_async_handlers_run_on_the_tests_own_loop():
    app = duly.App("theirs", "memory://")
    topic: Topic[int] = Topic("t", int, guarantee="at-least-once")
    loops: list[Any] = []

    @app.consumer(topic, name="c", guarantee="at-least-once")
    async def handle(n: int) -> None:
        loops.append(asyncio.get_running_loop())

    async def test() -> None:
        async with running(app) as t:
            t.publish(topic, 1)
            await t.adrain()
            assert loops == [asyncio.get_running_loop()]

    asyncio.run(test())


# --- faults

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


def test_it_is_entered_once():
    with pytest.raises(ConfigurationError, match="entered before"), running(shop.app) as t, t:
        pass
    assert shop.app._backends.named == (f"sqlite:///{shop.NEVER}", None)
