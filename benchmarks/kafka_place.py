"""Where the rows on Kafka run: a private node, and a PostgreSQL server beside it for effects.

Each row has a namespace and a database of its own.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Self

import confluent_kafka
import confluent_kafka.admin
import counting
from postgres_place import Databases

# The servers are those that the tests start.
sys.path.insert(0, str(Path(__file__).parent.parent))

from duly.testing.kafka import jars
from tests.servers.kafka import KafkaNode

driver: Any = confluent_kafka.admin


@dataclass(frozen=True, slots=True)
class Both:
    """A namespace on the node, and a database for the effects."""

    kafka: str
    database: str

    @classmethod
    def named(cls, place: str) -> Self:
        """As `Namespaces.fresh` names it."""
        return cls(*place.split(" "))

    @property
    def bootstrap(self) -> str:
        """The node's address as drivers ask for it."""
        return self.kafka.removeprefix("kafka://").partition("?")[0]

    @property
    def namespace(self) -> str:
        """What names of topics and groups begin with."""
        return self.kafka.partition("namespace=")[2]

    def topic(self, name: str = "orders") -> str:
        """A topic of one partition, made."""
        full = f"{self.namespace}.{name}"
        admin = driver.AdminClient({"bootstrap.servers": self.bootstrap})
        for made in admin.create_topics([driver.NewTopic(full, 1, 1)]).values():
            made.result(30)
        return full


class Namespaces:
    """A namespace and a database of a row's own, on one node and one server."""

    counted: tuple[str, ...] = ("commits", "requests")
    traced = False

    def __init__(self, within: Path) -> None:
        tempfile.tempdir = os.fspath(within)
        self._node = KafkaNode()
        self._databases = Databases(within)
        self._numbers = count(1)
        self._exits = ExitStack()

    def __enter__(self) -> Self:
        self._exits.enter_context(self._node)
        self._exits.enter_context(self._databases)
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    @contextmanager
    def fresh(self) -> Iterator[str]:
        """As `Places.fresh`: two URLs."""
        name = f"row{next(self._numbers)}"
        with self._databases.fresh() as database:
            yield f"{self._node.url}?namespace={name} {database}"
        admin = driver.AdminClient({"bootstrap.servers": self._node.bootstrap})
        mine = [t for t in admin.list_topics(timeout=30).topics if t.startswith(f"{name}.")]
        for gone in admin.delete_topics(mine).values() if mine else ():
            gone.result(30)


def count_requests() -> None:
    """From now on count what clients of the driver send, as they tell it every 5 ms:
    commits of positions and of transactions, and requests of every kind. To be called before
    anything is imported that takes a client from the driver.
    """
    told: dict[int, str] = {}

    def counted(kind: Any) -> Any:
        class Counted(kind):  # type: ignore[misc]
            def __init__(self, given: dict[str, Any]) -> None:
                def see(text: str) -> None:
                    told[id(self)] = text

                super().__init__({**given, "statistics.interval.ms": 5, "stats_cb": see})

        return Counted

    def sent(*kinds: str) -> int:
        brokers = [each for text in told.values() for each in json.loads(text)["brokers"].values()]
        return sum(
            number
            for broker in brokers
            for kind, number in broker["req"].items()
            if not kinds or kind in kinds
        )

    for name in ("Consumer", "Producer"):
        setattr(confluent_kafka, name, counted(getattr(confluent_kafka, name)))
    counting.METERS["commits"] = lambda: sent("OffsetCommit", "EndTxn")
    counting.METERS["requests"] = sent


def server_version() -> str:
    """Of what runs."""
    found = jars()
    assert found is not None, "the node runs"
    return found.name.removeprefix("kafka-")
