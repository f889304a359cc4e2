"""`OrderedIntake`: the partitions of a subscription in order by key, as this process works them.

Each has a queue that the server gives to one process at a time, the first that asks. So that this
is not the same one for all of them, a process that has more than its share of the partitions at
work hands some over: it lets what is held end, notes of the rest that nobody died with it, and goes
to the end of the line. Who else is there is seen by a queue that each of them consumes.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from duly.brokers.rabbitmq.intake import numbers
from duly.brokers.rabbitmq.link import Connection, Link
from duly.brokers.rabbitmq.notes import Note
from duly.brokers.rabbitmq.partition import Entry, Partition
from duly.brokers.rabbitmq.presence import Presence
from duly.brokers.rabbitmq.topology import Names, count, declare_subscription
from duly.errors import BrokerError
from duly.message import Topic

# Who kills a process does so soon, mostly; and some handlers take hours.
_NEW_S = 1.0


class Writing(Protocol):
    """What it takes to write something down."""

    link: Link

    def keep(self, notes: Sequence[tuple[str, bytes]]) -> None:
        """Publish these to queues; returns when the server has them. Raises `BrokerError`."""
        ...


class OrderedIntake:
    """What the lanes of one subscription in order by key have before them. All of it is locked by
    ``changed``; what talks to the server does so without holding that.
    """

    def __init__(
        self,
        names: Names,
        topics: Sequence[Topic[Any]],
        subscription: str,
        clock: Callable[[], float],
        keeps_s: float,
    ) -> None:
        self.number = next(numbers)
        self.topics = topics
        self.subscription = subscription
        self.changed = threading.Condition()
        self.held: dict[int, Entry] = {}
        self.partitions = [
            Partition(names, topic, subscription, number, self.changed, clock, self._gone)
            for topic in topics
            for number in range(topic.partitions)
        ]
        self._names = names
        self._keeps_s = keeps_s
        self._presence = Presence(names, topics, subscription)
        self._is_declared = False
        self._is_worked = False
        self._turn = 0

    @property
    def queues(self) -> Sequence[str]:
        """The queues that are consumed."""
        return [partition.queue for partition in self.partitions]

    @property
    def is_in_line(self) -> bool:
        """Whether this process has asked for every queue that answers, and is seen if it can be."""
        return not self._presence.is_to_enter and not any(each.is_out for each in self.partitions)

    # --- on the link's thread

    def open(self, connection: Connection) -> None:
        """Make what is needed; stand in line where lanes have begun to claim. Channels that are
        still there end first, or the server would go on giving them what nobody takes.
        """
        self._end_channels()
        self._declare(connection)
        if self._is_worked:
            self._consume(connection)

    def _declare(self, connection: Connection) -> None:
        for topic in self.topics:
            of = topic.name, self.subscription, topic.partitions
            declare_subscription(connection, self._names, *of)
        self._is_declared = True

    def _gone(self, partition: Partition, generation: int) -> None:
        """The channel of one partition is gone, alone; the next claim opens another."""
        with self.changed:
            if generation != partition.generation:
                return
            partition.lost()
            self._drop_lost()
            # Perhaps the queue went with it.
            self._is_declared = False

    def _drop_lost(self) -> None:
        for token, entry in list(self.held.items()):
            if not entry.is_here:
                del self.held[token]
        self.changed.notify_all()

    def lost(self) -> None:
        """The connection is gone, and the server gives to others what it had delivered here."""
        with self.changed:
            self._is_declared = False
            self.held.clear()
            for partition in self.partitions:
                partition.lost()
            self.changed.notify_all()

    def fit(self, connection: Connection) -> None:
        """Stand in line for every partition."""
        self._is_worked = True
        if not self._is_declared:
            self._declare(connection)
        self._consume(connection)

    def _consume(self, connection: Connection) -> None:
        for partition in self.partitions:
            if partition.is_out:
                partition.consume(connection)
        self._presence.enter(connection, self)

    def waiting(self, _: Connection) -> int:
        """How many messages the server could deliver here. On the channels that consume, so that
        what it has delivered before is here when this is.
        """
        return sum(partition.waiting() for partition in self.partitions)

    def is_consumed(self, connection: Connection) -> bool:
        """Whether each queue is there and has somebody who works it."""
        if not self._is_worked:
            return True
        told = count(connection, self.queues)
        return len(told) == len(self.partitions) and all(there for _, there in told.values())

    def mend(self, connection: Connection) -> None:
        """Stand in line again for the queues that nobody works. What is held of others stays
        held: their handlers run.
        """
        told = count(connection, self.queues)
        self._declare(connection)
        for partition in self.partitions:
            _, there = told.get(partition.queue, (0, 0))
            if not there:
                partition.stop()
                with self.changed:
                    self._drop_lost()
        self._consume(connection)

    def others(self, connection: Connection) -> int:
        """How many more processes stand in line."""
        queues = [self._names.present(topic.name, self.subscription) for topic in self.topics]
        return max((there for _, there in count(connection, queues).values()), default=1) - 1

    def acknowledge(self, settled: Iterable[Entry]) -> Sequence[Entry]:
        """Tell the server what is settled; those of which the channel is gone."""
        tags: dict[tuple[Partition, int], list[Entry]] = defaultdict(list)
        for entry in settled:
            tags[entry.partition, entry.generation].append(entry)
        return [
            entry
            for (partition, generation), entries in tags.items()
            if not partition.acknowledge(generation, [entry.item.tag for entry in entries])
            for entry in entries
        ]

    def stop(self, _: Connection) -> None:
        """Leave the line: the next ones are given what is not settled."""
        self._is_worked = False
        self._presence.leave(self)
        self._end_channels()

    def _end_channels(self) -> None:
        for partition in self.partitions:
            partition.stop()
        self.lost()

    def rejoin(self, connection: Connection, partitions: Sequence[Partition]) -> None:
        """Go to the end of the line for these."""
        for partition in partitions:
            partition.stop()
            partition.consume(connection)

    # --- what others have to know

    def write(self, broker: Writing, notes: Sequence[tuple[Entry, Note | None]]) -> None:
        """Note this of messages, durably on return. Raises `BrokerError`, and then perhaps did."""
        with self.changed:
            there = [(e, note) for e, note in notes if note is not None and e.is_here]
            before = [(e, note.identity, e.partition.put(note.identity, note)) for e, note in there]
        try:
            self._write(broker, list(dict.fromkeys(entry.partition for entry, _ in there)))
        except BaseException:
            with self.changed:
                for entry, identity, note in before:
                    if entry.is_here:
                        entry.partition.put(identity, note)
            raise

    def _write(self, broker: Writing, partitions: Sequence[Partition]) -> None:
        if not partitions:
            return
        for partition in partitions:
            broker.link.call(partition.declare_notes)
        with self.changed:
            snapshots = [(each.notes_queue, each.snapshot()) for each in partitions]
        try:
            broker.keep(snapshots)
        except BrokerError:
            for partition in partitions:
                partition.forget_notes_queue()
            raise

    def write_all(self, broker: Writing, partitions: Sequence[Partition]) -> None:
        """Note of everything that is unsettled how it stands: nobody has died with it."""
        with self.changed:
            notes = [each for partition in partitions for each in partition.as_they_stand()]
        self.write(broker, notes)

    def balance(self, broker: Writing) -> None:
        """See who else is there, and stop working what this process should hand over."""
        others = broker.link.call(self.others) if self._presence.is_seen else 0
        with self.changed:
            # Those in which something is held for so long go on, and another time may come.
            busy = {partition for partition in self.partitions if partition.leaving}
            for partition in self.partitions:
                partition.leaving = False
            for partition in self._excess(others):
                partition.leaving = partition not in busy
            self.changed.notify_all()

    def hand_over(self, broker: Writing) -> None:
        """Go to the end of the line where that is decided, and nothing is held any more: for
        others, or because the server counts how long what waits here was not acknowledged. Behind
        a channel's end it begins anew; that nobody died is noted.
        """
        with self.changed:
            for partition in self.partitions:
                partition.end_if_older(self._keeps_s)
            ready = [p for p in self.partitions if (p.leaving or p.is_over) and not p.is_held]
        if ready:
            self.write_all(broker, ready)
            broker.link.call(lambda connection: self.rejoin(connection, ready))

    # --- for lanes, with ``changed`` held

    def take(self, limit: int, max_bytes: int, now: float) -> Sequence[Entry]:
        """What a lane may claim: one suspect, or up to ``limit`` that are none. Among them may be
        some that nobody can read.

        No other lane is given a suspect while one that was is new: if the process dies now, that
        is the likely reason.
        """
        mine = self._in_turn()
        if not any(each.suspect and each.since > now - _NEW_S for each in self.held.values()):
            for partition in mine:
                suspect = partition.first_suspect(now)
                if suspect is not None:
                    return [suspect]
        taken: list[Entry] = []
        size = 0
        for entry in (entry for partition in mine for entry in partition.free(now)):
            if entry.suspect:
                continue
            size += len(entry.item.body)
            if len(taken) == limit or (taken and size > max_bytes):
                break
            taken.append(entry)
        return taken

    def _in_turn(self) -> Sequence[Partition]:
        """The partitions, each claim beginning with another, so that none starves."""
        busy = [partition for partition in self.partitions if partition.entries]
        self._turn += 1
        start = self._turn % len(busy) if busy else 0
        return busy[start:] + busy[:start]

    def next_due(self, now: float) -> float | None:
        """When something happens by itself: a retry is due, or a lease ends."""
        dues = [partition.next_due(now) for partition in self.partitions]
        return min((due for due in dues if due is not None), default=None)

    def _excess(self, others: int) -> Sequence[Partition]:
        """The partitions that this process should hand over, so that each process has its share of
        those at work: the ones that are the first to be free.
        """
        mine = [partition for partition in self.partitions if partition.is_mine]
        share = -(-len(self.partitions) // (others + 1))
        mine.sort(key=lambda each: (each.is_held, len(each.entries)))
        return mine[: max(0, len(mine) - share)]
