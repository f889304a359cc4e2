"""The broker on Kafka: topics, partitions, consumer groups. See `KafkaBroker`."""

from __future__ import annotations

from duly.brokers.kafka.broker import KafkaBroker

__all__ = ["KafkaBroker"]
