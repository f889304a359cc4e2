"""The broker on RabbitMQ: exchanges, quorum queues, publisher confirms. See `RabbitMQBroker`."""

from __future__ import annotations

from duly.brokers.rabbitmq.broker import RabbitMQBroker

__all__ = ["RabbitMQBroker"]
