"""Three Kafka nodes for tests, on the loopback interface, each broker and controller in one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self

import confluent_kafka.admin as driver
from confluent_kafka import KafkaException, TopicCollection

from duly.testing.kafka import new_cluster
from tests.servers.kafka import KafkaNode
from tests.servers.postgres import free_port
from tests.waiting import eventually

_SETTINGS = """
node.id={number}
controller.quorum.voters={voters}
listeners=PLAINTEXT://127.0.0.1:{{port}},CONTROLLER://127.0.0.1:{control}
offsets.topic.replication.factor=3
transaction.state.log.replication.factor=3
transaction.state.log.min.isr=2
share.coordinator.state.topic.replication.factor=3
share.coordinator.state.topic.min.isr=2
default.replication.factor=3
min.insync.replicas=2
"""
_driver: Any = driver


class KafkaCluster:
    """Three nodes, each to be killed and started again. What is made has three copies, of which two
    have to have what is confirmed.
    """

    def __init__(self) -> None:
        ports = {number: free_port() for number in (1, 2, 3)}
        voters = ",".join(f"{number}@127.0.0.1:{port}" for number, port in ports.items())
        cluster = new_cluster()
        self.nodes = {
            number: KafkaNode(
                _SETTINGS.format(number=number, voters=voters, control=port),
                cluster=cluster,
                heap_mb=384,
            )
            for number, port in ports.items()
        }

    @property
    def url(self) -> str:
        """All of them, for a client to try in turn."""
        return "kafka://" + ",".join(node.bootstrap for node in self.nodes.values())

    def start(self) -> Self:
        """Start those that are down: together, for none answers before most of them are there."""
        down = [node for node in self.nodes.values() if not node.is_running]
        for node in down:
            node.begin()
        for node in down:
            eventually(node.answers, "it answers", node.log, 90.0)
        return self

    def _client(self) -> Any:
        up = [node.bootstrap for node in self.nodes.values() if node.is_running]
        return _driver.AdminClient({"bootstrap.servers": ",".join(up)})

    def _partitions(self, topics: Iterable[str]) -> Sequence[Any]:
        client = self._client()  # as long as it is held it answers
        asked = client.describe_topics(TopicCollection([*topics]), request_timeout=30)
        return [each for told in asked.values() for each in told.result(40).partitions]

    def leader_of(self, topic: str) -> int:
        """Which node leads the first partition of a topic."""
        return int(self._partitions([topic])[0].leader.id)

    def leads_most(self, topics: Iterable[str]) -> int:
        """Which node leads the most partitions of these."""
        leaders = [each.leader.id for each in self._partitions(topics)]
        return int(max(self.nodes, key=leaders.count))

    def wait_until_whole(self) -> None:
        """Until every partition of every topic is in sync on all three."""

        seen: list[object] = []

        def whole() -> bool:
            try:
                names = self._client().list_topics(timeout=30).topics
                there = self._partitions(names)
            except KafkaException as error:  # of a node that has just begun to answer, or to end
                seen.append(error)
                return False
            seen.append(sum(len(each.isr) < len(each.replicas) for each in there))
            return seen[-1] == 0

        eventually(whole, "all copies are in sync", lambda: str(seen[-1]), 120.0)

    def close(self) -> None:
        """End all of them at once, and remove their data."""
        for node in self.nodes.values():
            node.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()
