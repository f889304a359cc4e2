"""Opening late, closing what was opened, and what a forked child finds."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

import duly
from duly.broker import Published
from duly.brokers.memory import MemoryDatabase
from tests.api.fakes import FakeBroker

rides = duly.Topic("rides", dict, guarantee="at-least-once")
views = duly.Topic("views", dict, guarantee="at-most-once")


def in_a_child(call: Callable[[], Any]) -> Any:
    """What ``call`` returns, or the exception it raises, in a forked process."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer = call()
        except BaseException as error:
            answer = repr(error)
        os.write(write, pickle.dumps(answer))
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pickle.loads(pipe.read())
    assert os.waitpid(pid, 0)[1] == 0
    return answer


def test_importing_duly_imports_neither_brokers_nor_asyncio():
    program = "import duly, sys; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    for heavy in (
        "asyncio",
        "sqlite3",
        "duly.connect",
        "duly.brokers.sqlite",
        "duly.stores.sqlite",
    ):
        assert heavy not in loaded


def test_declaring_opens_nothing(tmp_path):
    app = duly.App("shop", "sqlite:////no/such/directory/at/all.db")
    app.consumer(rides, name="c", guarantee="at-least-once")(lambda ride: None)
    app.declare(views)
    assert [topic.name for topic in app.topics] == ["views", "rides"]
    app.close()


def test_backends_make_every_topic_known():
    broker = FakeBroker()
    app = duly.App("shop", broker)
    app.consumer(rides, name="c", guarantee="at-least-once")(lambda ride: None)
    assert app.backends()[0] is broker
    assert set(broker.declared) == {"rides"}
    app.consumer(views, name="d", guarantee="at-most-once")(lambda ride: None)
    app.backends()
    assert set(broker.declared) == {"rides", "views"}


def test_opened_once_by_many_threads():
    app = duly.App("shop", "memory://")
    together = threading.Barrier(8)
    found: list[Any] = []

    def publish() -> None:
        together.wait(30)
        app.publish(rides, {})
        found.append(app.backends()[0])

    threads = [threading.Thread(target=publish) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 8
    assert len(set(map(id, found))) == 1


def test_what_came_open_stays_open():
    broker = FakeBroker()
    with duly.App("shop", broker) as app:
        app.publish(rides, {})
    assert broker.closed == 0


def test_what_was_opened_is_closed_and_opened_again():
    with duly.App("shop", "memory://") as app:
        app.publish(rides, {})
        first = app.backends()[0]
    app.publish(rides, {})
    assert app.backends()[0] is not first
    asyncio.run(app.aclose())


def test_a_store_that_cannot_be_opened_leaves_nothing_open():
    app = duly.App("shop", "memory://", "nosuch://store")
    for _ in range(2):
        with pytest.raises(duly.ConfigurationError, match="nosuch"):
            app.publish(rides, {})


def test_urls_that_name_nothing():
    with pytest.raises(duly.ConfigurationError, match="nosuch"):
        duly.App("shop", "nosuch://x").publish(rides, {})


class TestFork:
    def test_a_child_of_an_app_that_opened_nothing_opens_its_own(self, db_url):
        app = duly.App("shop", db_url)
        assert in_a_child(lambda: app.publish(rides, {}, id="a")) == Published("a")
        assert in_a_child(lambda: asyncio.run(app.apublish(rides, {}, id="b"))) == Published("b")
        app.publish(rides, {}, id="c")
        app.close()
        assert in_a_child(lambda: app.publish(rides, {}, id="d")) == Published("d")

    def test_a_child_does_not_use_what_its_parent_opened(self, db_url):
        # SQLite's locks do not survive a fork; a child's own connection would not know of them.
        with duly.App("shop", db_url) as app:
            app.publish(rides, {})
            assert "fork" in in_a_child(lambda: app.publish(rides, {}))
            assert app.publish(rides, {}, id="last") == Published("last")

    def test_where_memory_is_the_broker_the_child_has_its_own(self):
        app = duly.App("shop", "memory://")
        app.publish(rides, {})
        mine = app.backends()[0].capabilities.database
        assert in_a_child(lambda: app.publish(rides, {}, id="a")) == Published("a")
        assert in_a_child(lambda: asyncio.run(app.apublish(rides, {}, id="b"))) == Published("b")
        assert app.backends()[0].capabilities.database == mine

    def test_what_the_parent_buffered_is_the_parents_to_send(self, db_url):
        app = duly.App("shop", db_url)
        app.publish_many(views, [{}] * 100)

        def child() -> dict[str, int]:
            app.close()
            return dict(app.drops)

        assert in_a_child(child) == {}
        app.close()
        assert app.drops == {}

    def test_while_threads_publish(self):
        app = duly.App("shop", "memory://")
        stop = threading.Event()

        def publish() -> None:
            while not stop.is_set():
                app.publish(rides, {})
                app.publish(views, {})

        threads = [threading.Thread(target=publish) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(5):
                assert in_a_child(lambda: app.publish(rides, {}, id="c")) == Published("c")
        finally:
            stop.set()
            for thread in threads:
                thread.join(30)
            app.close()

    def test_an_open_broker_cannot_be_shared(self):
        app = duly.App("shop", MemoryDatabase())
        app.publish(rides, {})
        assert "cannot be shared" in in_a_child(lambda: app.publish(rides, {}))
        assert "cannot be shared" in in_a_child(app.backends)
