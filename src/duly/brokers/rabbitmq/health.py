"""What can be seen of a server by AMQP alone: its version, alarms, and what waits in its queues."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from duly.brokers.rabbitmq.link import Connection, Link, content
from duly.brokers.rabbitmq.publisher import Publisher, Sending, State
from duly.brokers.rabbitmq.topology import Names, count
from duly.errors import BrokerError, BrokerUnavailable
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
        backlog = sum(messages for messages, _ in count(connection, queues).values())
        found.append(Queued(subscription, topic, backlog, _workers(connection, names.present(*of))))
    return found


def _workers(connection: Connection, present: str) -> int | None:
    """How many processes consume this: one may have several consumers of a subscription's queue,
    or none, and works it all the same. None: it does not answer, of which the work knows nothing.
    """
    try:
        _, workers = count(connection, [present]).get(present, (0, 0))
    except BrokerUnavailable:
        return None
    return workers


def examine(
    link: Link, publisher: Publisher, names: Names, queued: Callable[[], Sequence[Queued]]
) -> Sequence[Finding]:
    """Every finding; raises nothing about what it looks at."""
    return [
        *_asked(lambda: [_version(str(link.server["version"]))]),
        *_asked(lambda: [_alarm(publisher, names)]),
        _CLOCK,
        *_asked(lambda: [*_seen(queued())]),
    ]


def _asked(look: Callable[[], Sequence[Finding]]) -> Sequence[Finding]:
    """What is found, or that nothing is. What cannot be seen hides nothing else."""
    try:
        return look()
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


def _seen(states: Sequence[Queued]) -> Iterator[Finding]:
    for state in states:
        if state.workers is None:
            yield Finding(
                "warning",
                f"consumer {state.subscription}",
                f"who works on {state.topic} cannot be seen: the queue that counts them does not "
                "answer",
                "Work goes on without it; see whether a node of the cluster is down.",
            )
        elif state.backlog and not state.workers:
            yield Finding(
                "warning",
                f"consumer {state.subscription}",
                f"{state.backlog:,} messages of {state.topic} wait, and nobody works on them",
                "Start a worker.",
            )
