"""Where the rows on RabbitMQ run: a private node, and a PostgreSQL server beside it for effects.

Each row has a virtual host and a database of its own.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from postgres_place import Databases

# The servers are those that the tests start.
sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.servers.rabbitmq import RabbitMQNode


@dataclass(frozen=True, slots=True)
class Both:
    """A virtual host, and a database for the effects."""

    amqp: str
    database: str

    @classmethod
    def named(cls, place: str) -> Self:
        """As `VirtualHosts.fresh` names it."""
        return cls(*place.split(" "))

    @property
    def parts(self) -> dict[str, str]:
        """The address as drivers ask for it: host (with its port) and virtual host."""
        split = urlsplit(self.amqp)
        return {"host": f"{split.hostname}:{split.port}", "vhost": split.path[1:]}


class VirtualHosts:
    """A virtual host and a database of a row's own, on one node and one server."""

    counted: tuple[str, ...] = ()
    traced = False

    def __init__(self, within: Path) -> None:
        tempfile.tempdir = os.fspath(within)
        self._node = RabbitMQNode()
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
        self._node.control("add_vhost", name)
        self._node.control("set_permissions", "--vhost", name, "guest", ".*", ".*", ".*")
        with self._databases.fresh() as database:
            yield f"{self._node.url}{name} {database}"
        self._node.control("delete_vhost", name)


def server_version() -> str:
    """Of the node that runs."""
    with RabbitMQNode() as node:
        return node.control("version").strip()
