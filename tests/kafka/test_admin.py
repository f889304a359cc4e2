"""The driver's admin client, asked by several threads about topics that come and go."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import admin as _driver

from duly.brokers.kafka import admin as admin_module
from duly.brokers.kafka.address import address_of
from duly.brokers.kafka.admin import Admin
from duly.errors import BrokerError
from tests.kafka import beginning

ROOT = Path(__file__).parents[2]
COUNT = 30

# What the driver offers there has no types.
driver: Any = _driver


def ask(url: str) -> None:
    """Two threads ask where partitions end, two what topics there are, beside one that makes and
    deletes them.
    """
    admin_module._SETTLES_S = 0.0
    admin = Admin(address_of(url, ""))
    over = threading.Event()
    name = ["none"]

    def look(what: int) -> None:
        while not over.is_set():
            try:
                if what:
                    admin.ends([(name[0], number) for number in range(4)])
                else:
                    admin.find([name[0]])
            except BrokerError:
                pass  # it is gone

    threads = [threading.Thread(target=look, args=(what,)) for what in (0, 0, 1, 1)]
    for thread in threads:
        thread.start()
    try:
        for number in range(COUNT):
            name[0] = f"{admin_module.__name__}.{number}"
            admin._client.create_topics([driver.NewTopic(name[0], 4, 1)])[name[0]].result(30)
            over.wait(0.1)
            admin._client.delete_topics([name[0]])[name[0]].result(30)
            over.wait(0.1)
    finally:
        over.set()
        for thread in threads:
            thread.join()


@pytest.mark.slow
def test_to_ask_where_topics_end_that_come_and_go_ends_no_process(kafka_url: str):
    """In a process of its own: the driver frees twice what it is asked by one client."""
    asking = f"from tests.kafka.test_admin import ask; ask({kafka_url!r})"
    done = subprocess.run(
        [sys.executable, "-c", asking], cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("in_vain", [(), (1, 2, 3), (3, 4, 5)])
def test_a_node_that_knows_of_no_broker_yet_is_asked_again(in_vain: Sequence[int]):
    """In a process of its own: to describe such a cluster is the driver's end."""
    done = subprocess.run(
        [sys.executable, "-m", beginning.__name__, *map(str, in_vain)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, beginning.CLUSTER), done.stderr[-2000:]
