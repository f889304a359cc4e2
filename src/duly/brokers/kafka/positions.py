"""`Positions`: where a group stands, asked without being a member of it.

By a client of its own each time, for it is seldom asked: the driver's admin client, asked for the
same while a coordinator restarts, has ended the process (an assertion of librdkafka 2.16).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from confluent_kafka import Consumer, KafkaException, TopicPartition

from duly.brokers.kafka.address import Address
from duly.brokers.kafka.client import READ_COMMITTED, broker_error, settings

_ANSWERS_S = 10.0

Place = tuple[str, int]


class Positions:
    """Of one group: position and text by partition, of those where it has one."""

    def __init__(self, address: Address, group: str) -> None:
        self._address = address
        self._group = group

    def now(self, places: Collection[Place]) -> Mapping[Place, tuple[int, str]]:
        """As they are, whatever an open transaction may make of them. Raises `BrokerError`."""
        return self._asked(places, "read_uncommitted")

    def at_last(self, places: Collection[Place]) -> Mapping[Place, tuple[int, str]]:
        """Once no transaction may change them any more. Raises `BrokerError`, too where one
        still may.
        """
        return self._asked(places, "read_committed")

    def _asked(self, places: Collection[Place], isolation: str) -> Mapping[Place, tuple[int, str]]:
        more = {**READ_COMMITTED, "isolation.level": isolation, "group.id": self._group}
        what = f"where group {self._group!r} stands is not known"
        client = Consumer(settings(self._address.common, more))
        try:
            told = client.committed([TopicPartition(*place) for place in places], _ANSWERS_S)
        except KafkaException as error:
            raise broker_error(error, what) from error
        finally:
            client.close()
        for each in told:
            if each.error is not None:
                raise broker_error(each.error, f"{what}: {each.topic}/{each.partition}")
        return {
            (each.topic, each.partition): (each.offset, each.metadata or "")
            for each in told
            if each.offset >= 0
        }
