"""What can be seen of a server by AMQP alone: its version, alarms, and what waits in its queues."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from duly.brokers.rabbitmq.link import Connection, Link, content
from duly.brokers.rabbitmq.publisher import Publisher, Sending, State
from duly.brokers.rabbitmq.topology import Names, count
from duly.errors import BrokerError
from duly.inspection.counting import Queued
from duly.inspection.health import Finding

Known = Mapping[tuple[str, str], int]
"""Of each (topic, subscription) how many partitions it works in order by key; 0: without order."""

# The first series that was not run.
_UNSEEN = (4, 0)
# How long a server that has no alarm takes at most to confirm one message.
_CONFIRM_S = 5.0


def queued(connection: Connection, names: Names, known: Known) -> Sequence[Queued]:
    """What waits for each (topic, subscription), by subscription."""
    found = []
    for (topic, subscription), partitions in sorted(known.items(), key=lambda each: each[0][::-1]):
        of = (topic, subscription)
        queues = [names.queue(*of), names.alone(*of)]
        if partitions:
            queues = [names.partition(*of, number) for number in range(partitions)]
        # A process may have several consumers of a queue, or none, and works it all the same.
        counts_workers = names.here(*of)
        told = count(connection, {*queues, counts_workers})
        backlog = sum(told[queue][0] for queue in queues if queue in told)
        workers = told.get(counts_workers, (0, 0))[1]
        found.append(Queued(subscription, topic, backlog, workers))
    return found


def examine(
    link: Link, publisher: Publisher, names: Names, queued: Callable[[], Sequence[Queued]]
) -> Sequence[Finding]:
    """Every finding; raises nothing about what it looks at."""
    try:
        return [
            _version(link.call(lambda connection: str(connection.server_properties["version"]))),
            _alarm(publisher, names),
            _CLOCK,
            *_unworked(queued()),
        ]
    except (BrokerError, KeyError) as error:
        return [Finding("wrong", "RabbitMQ", f"did not answer: {error}", "Look at its log.")]


def _version(version: str) -> Finding:
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers >= _UNSEEN:
        return Finding(
            "warning", "RabbitMQ", f"{version}: duly was not run against this series",
            "See what docs/brokers/rabbitmq.md lists as not verified.",
        )  # fmt: skip
    return Finding("ok", "RabbitMQ", version)


def _alarm(publisher: Publisher, names: Names) -> Finding:
    """A server with an alarm takes one message from a connection, and then blocks it: so two are
    sent, which no queue takes.
    """
    probes = [
        Sending(content(b"", {}), "", f"{names.namespace}/nobody", mandatory=False)
        for _ in range(2)
    ]
    for probe in probes:
        publisher.send([probe], _CONFIRM_S)
    if all(probe.state is State.CONFIRMED for probe in probes):
        return Finding("ok", "publishing", "messages are confirmed")
    return Finding(
        "wrong", "publishing", f"nothing is confirmed: {publisher.why_not}",
        "Give the server memory or disk, or publish less: rabbitmqctl list_alarms.",
    )  # fmt: skip


_CLOCK = Finding("ok", "clock", "no lease and no delay goes by a wall clock here")


def _unworked(states: Sequence[Queued]) -> Iterator[Finding]:
    for state in states:
        if state.backlog and not state.workers:
            yield Finding(
                "warning",
                f"consumer {state.subscription}",
                f"{state.backlog:,} messages of {state.topic} wait, and nobody works on them",
                "Start a worker.",
            )
