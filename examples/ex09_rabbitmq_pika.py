"""RabbitMQ between an application and a program that has never heard of duly, here in plain pika.

The old program still takes the orders and writes the mails. What it publishes is charged once, and
the subscription "mail", which duly has made, is worked by it and not by duly. DULY_BROKER is an
AMQP URL (amqp://guest:guest@localhost/), with no namespace.

    pip install 'duly[rabbitmq]' pika
    duly run ex09_rabbitmq_pika:app --consumers billing
    python ex09_rabbitmq_pika.py
"""

from __future__ import annotations

import json
import os
import sqlite3
from dataclasses import dataclass
from typing import Any

import pika

import duly


@dataclass
class Order:
    """What the old program sends as JSON."""

    number: str
    cents: int


# The old program makes a message-id for each attempt. What names an order is its number.
orders = duly.Topic("orders", Order, guarantee="at-least-once", dedup_by=lambda order: order.number)
receipts = duly.Topic("receipts", dict[str, Any], guarantee="at-least-once")
app = duly.App("shop", broker=os.environ["DULY_BROKER"], store="sqlite:///shop.db")


@app.consumer(orders, name="billing", guarantee="exactly-once")
def charge(order: Order, tx: duly.Transaction[sqlite3.Connection]) -> None:
    tx.connection.execute("create table if not exists charges (number, cents)")
    tx.connection.execute("insert into charges values (?, ?)", (order.number, order.cents))
    tx.publish(receipts, {"order": order.number}, id=f"receipt-{order.number}")


@app.consumer(receipts, name="mail", guarantee="at-least-once")
def mail(receipt: dict[str, Any]) -> None:
    """For the day on which the old program is switched off."""
    print("mail", receipt["order"])


# --- the old program


def main() -> None:
    connection = pika.BlockingConnection(pika.URLParameters(os.environ["DULY_BROKER"]))
    channel = connection.channel()
    channel.confirm_delivery()
    for number in [f"o-{n}" for n in range(100)]:
        body = json.dumps({"number": number, "cents": 900}).encode()
        for attempt in ("first", "second"):  # it is not sure that the first has arrived
            properties = pika.BasicProperties(
                message_id=f"{number}-{attempt}", app_id="old-shop", delivery_mode=2
            )
            # Raises where the server has not stored it, or no subscription takes it.
            channel.basic_publish("duly/orders", "", body, properties, mandatory=True)
    channel.basic_qos(prefetch_count=10)
    mailed: set[str | None] = set()
    for method, properties, body in channel.consume("duly/receipts/mail", inactivity_timeout=30):
        if method is None or properties is None or body is None:
            break  # nothing came for so long
        if properties.message_id not in mailed:  # at-least-once: it may come again
            print("mail", json.loads(body)["order"])
            mailed.add(properties.message_id)
        channel.basic_ack(method.delivery_tag)
        if len(mailed) == 100:
            break
    channel.cancel()
    connection.close()


if __name__ == "__main__":
    main()
