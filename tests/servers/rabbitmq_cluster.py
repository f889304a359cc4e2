"""A cluster of three RabbitMQ nodes for tests, on the loopback interface."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Self

from tests.servers.rabbitmq import RabbitMQNode
from tests.waiting import eventually


class RabbitMQCluster:
    """Three nodes, each to be killed and started again."""

    def __init__(self) -> None:
        first = RabbitMQNode()
        self.nodes = [first, RabbitMQNode(beside=first), RabbitMQNode(beside=first)]

    @property
    def url(self) -> str:
        """All of them, for a client to try in turn."""
        places = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        return f"amqp://guest:guest@{places}/"

    def start(self) -> Self:
        """Start all, and make them one."""
        first, *others = [node.start() for node in self.nodes]
        for node in others:
            node.control("stop_app")
            node.control("join_cluster", first.name)
            node.control("start_app")
        return self

    @property
    def running(self) -> RabbitMQNode:
        """One that is up."""
        return next(node for node in self.nodes if node.is_running)

    def leader_of(self, queue: str) -> RabbitMQNode:
        """Where a queue's leader is."""
        name = self._told(queue, "leader")
        return next(node for node in self.nodes if node.name == name)

    def members_of(self, queue: str) -> Sequence[str]:
        """The nodes on which a queue is, and which are up."""
        return sorted(re.findall(r"[\w]+@localhost", str(self._told(queue, "online"))))

    def _told(self, queue: str, what: str) -> object:
        rows = json.loads(self.running.control("list_queues", "--formatter", "json", "name", what))
        return next(row[what] for row in rows if row["name"] == queue)

    def wait_for(self, queue: str, members: int) -> None:
        """Wait until so many nodes have a queue."""
        eventually(
            lambda: len(self.members_of(queue)) == members,
            f"{queue} has {members} members",
            lambda: str(self.members_of(queue)),
            60.0,
        )

    def close(self) -> None:
        """End all of them at once, and remove their data."""
        for node in reversed(self.nodes):
            node.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()
