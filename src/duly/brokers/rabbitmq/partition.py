"""`Partition`: one ordered queue of a subscription, as this process consumes it.

The server gives such a queue to one consumer at a time, and what that leaves unsettled to the next
one, in the old order. This is so as long as three rules are kept:

- Nothing is given back but all of it, by the end of the channel. What is taken back singly goes
  behind what was taken back before.
- The consumer is never cancelled while something is unsettled, or the next would be given what
  comes behind that.
- Whoever consumes asks for as many messages ahead, `AHEAD`. Then all that was taken back is with
  the next consumer before it can die, and nothing stays where it could be overtaken.

So whatever waits for its retry waits here, in its place. Of each key nothing is handed out behind
what is held or waits; other keys go on.
"""

from __future__ import annotations

import itertools
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from duly.brokers.rabbitmq.intake import Item, unreadable
from duly.brokers.rabbitmq.link import Connection, explained
from duly.brokers.rabbitmq.notes import Identity, Note, judged, merged, written
from duly.brokers.rabbitmq.rest import Rest
from duly.brokers.rabbitmq.tags import Tags, acknowledge
from duly.brokers.rabbitmq.topology import Names, declare_notes
from duly.brokers.rabbitmq.transport import ChannelLost
from duly.brokers.rabbitmq.wire import History, body_of
from duly.message import Topic, now_ms

log = logging.getLogger("duly.rabbitmq")

# How many messages of a partition are with the one who works it. The same in every process and
# version, or the order is lost: see above.
AHEAD = 250


class Entry:
    """A message of a partition that is not settled, in its place.

    ``token``: of the claim that holds it, made by ``lane``, and ``since`` and ``until`` when;
    ``settled`` while it is being settled, for which no lease ends.
    ``due``: when it may be handed out, by the clock that leases go by. ``suspect``: it has to be
    alone in its claim. ``wrong``: why it is none that duly would carry.
    """

    __slots__ = (
        "due",
        "generation",
        "item",
        "key",
        "lane",
        "partition",
        "settled",
        "since",
        "suspect",
        "token",
        "until",
        "wrong",
    )

    def __init__(self, partition: Partition, item: Item) -> None:
        self.partition = partition
        self.generation = partition.generation
        self.item = item
        self.wrong = unreadable(item)
        self.key = None if item.message is None else item.message.key
        self.token: int | None = None
        self.lane = 0
        self.since = self.until = 0.0
        self.settled = False
        self.due = -math.inf
        self.suspect = False

    @property
    def is_here(self) -> bool:
        """Whether its channel is there, and with it the claim that this process has on it."""
        return self.generation == self.partition.generation

    @property
    def identity(self) -> Identity | None:
        """Which message it is; None: nobody can say."""
        message = self.item.message
        return None if message is None else (message.source, message.id, self.item.replays)

    def note(self, history: History, *, suspect: bool, wait_s: float = 0.0) -> Note | None:
        """What is to be known of it when this process is gone."""
        message = self.item.message
        if message is None:
            return None  # whoever looks at it gives it up
        wait_ms = math.ceil(max(0.0, wait_s) * 1000)
        return Note(
            message.source,
            message.id,
            self.item.replays,
            self.item.taken_back,
            history.charged,
            history.repeated,
            suspect,
            now_ms() + wait_ms if wait_ms else 0,
            wait_ms,
        )


class Partition:
    """``entries`` are in their order. All but what says otherwise is called with the lock of the
    intake held, and what takes a connection, on the link's thread, without. So is ``gone``, with
    the generation that the server has ended, and none but it.
    """

    def __init__(
        self,
        names: Names,
        topic: Topic[Any],
        subscription: str,
        number: int,
        changed: threading.Condition,
        clock: Callable[[], float],
        gone: Callable[[Partition, int], None],
    ) -> None:
        self.topic = topic
        self.number = number
        self.queue = names.partition(topic.name, subscription, number)
        self.notes_queue = names.notes(topic.name, subscription, number)
        self.generation = 0
        self.entries: dict[int, Entry] = {}
        # It is to be given to another process: nothing more is handed out.
        self.leaving = False
        # Likewise, to whoever is the next in line: the server would soon take all of it back.
        self.is_over = False
        # Somebody's deliveries have come on this channel: this process works the queue.
        self.is_mine = False
        self._changed = changed
        self._clock = clock
        self._gone = gone
        self._channel: Any = None
        self._rest = Rest()
        self._tags = Tags()
        self._found: Mapping[Identity, Note] | None = None
        self._left: Sequence[bytes] = ()
        self._noted: dict[Identity, Note] = {}
        self._has_suspects = False
        self._notes_declared = False
        self._writer = secrets.token_hex(6)
        self._numbers = itertools.count(1)

    # --- on the link's thread

    def consume(self, connection: Connection) -> None:
        """Stand in line for the queue, on a new channel."""
        channel, generation = connection.channel(), self.generation
        channel.on_lost = partial(self._lost_alone, generation)
        channel.basic_qos(0, AHEAD, False)
        self._channel = channel
        channel.basic_consume(
            self.queue,
            callback=lambda message: self._deliver(generation, message),
            on_cancel=partial(self._cancelled, connection, generation),
        )
        self._rest.end()

    @property
    def is_out(self) -> bool:
        """Whether this process has to ask for the queue."""
        return self._channel is None and self._rest.is_over

    def _lost_alone(self, generation: int, lost: ChannelLost) -> None:
        """The server closed the channel, or does not answer."""
        log.warning("%s: %s", self.queue, explained(lost))
        if lost.silent:
            self._rest.begin()
        self._gone(self, generation)

    def _deliver(self, generation: int, message: Any) -> None:
        tag, properties = message.delivery_tag, message.properties
        item = Item(self.topic, tag, body_of(message), properties, alone=False)
        entry = Entry(self, item)
        with self._changed:
            if generation != self.generation:
                return  # on a channel that is being closed: it comes again
            self.is_mine = True
            self._tags.add(tag)
            if self._found is not None:
                self._judge(entry)
            elif not item.taken_back and not self.entries:
                # What was taken back comes first, so there is nothing of which to know anything.
                self._found = {}
            self.entries[tag] = entry
            self._changed.notify_all()

    def _cancelled(self, connection: Connection, generation: int, _tag: str) -> None:
        """The server ended the consumer: the queue was deleted, or its leader is gone."""
        log.warning("%s: the server cancelled its consumer; subscribing again", self.queue)
        channel = self._channel

        def end(_: Connection) -> None:
            channel.close()
            self._gone(self, generation)

        connection.later(end)

    def read_notes(self, connection: Connection) -> None:
        """Fetch what others knew of what they left, and leave it there."""
        self.declare_notes(connection)
        channel = connection.channel()
        bodies = []
        while (message := channel.basic_get(self.notes_queue)) is not None:
            bodies.append(body_of(message))
        channel.close()
        with self._changed:
            self._found = merged([*bodies, *self._left])
            for entry in self.entries.values():
                self._judge(entry)
            self._changed.notify_all()

    def declare_notes(self, connection: Connection) -> None:
        """Make the queue of the notes, which few partitions ever need."""
        if not self._notes_declared:
            declare_notes(connection, self.notes_queue)
            self._notes_declared = True

    def forget_notes_queue(self) -> None:
        """Make it again before the next is written: somebody may have deleted it."""
        self._notes_declared = False

    def acknowledge(self, generation: int, tags: Sequence[int]) -> bool:
        """Tell the server that these are settled; False: their channel is gone."""
        with self._changed:
            if generation != self.generation or self._channel is None:
                return False
            told = self._tags.settle(tags)
        acknowledge(self._channel, *told)
        return True

    def waiting(self) -> int:
        """How many messages the server has that it could deliver; of a queue that this process is
        given as much of as it may have, none.
        """
        if self._channel is None or len(self._tags) >= AHEAD:
            return 0
        return int(self._channel.queue_declare(self.queue, passive=True).message_count)

    def stop(self) -> None:
        """End the channel: the server gives what is unsettled to the next in line."""
        channel = self._channel
        with self._changed:
            self.lost()
        if channel is not None:
            channel.close()

    # --- what has come

    def lost(self) -> None:
        """The channel is gone, and what was delivered there is, or will be, with another."""
        self._channel = None
        self.generation += 1
        if self.entries:
            # If it comes here again, nobody has died with what was not handed out.
            still = [note for entry, note in self.as_they_stand() if note and entry.token is None]
            self._left = [written(f"{self._writer} left", 1, still)]
        self.entries.clear()
        self._tags.clear()
        self._found = None
        self._noted.clear()
        self._notes_declared = False
        # What this one has written stands: who comes next is another writer.
        self._writer = secrets.token_hex(6)
        self.leaving = self.is_over = self.is_mine = False

    @property
    def is_unread(self) -> bool:
        """Whether something has come of which others may have known more."""
        return self._found is None and bool(self.entries)

    def _judge(self, entry: Entry) -> None:
        if not entry.item.taken_back:
            return
        assert self._found is not None
        note = None if entry.identity is None else self._found.get(entry.identity)
        item = entry.item
        item.history, suspect = judged(item.taken_back, item.history, note)
        if suspect:
            self.suspect(entry)
        if note is None or note.seen >= item.taken_back:
            return
        # Whatever is written from here on has to say it as well.
        self._noted[note.identity] = note
        if not suspect:
            entry.due = self._clock() + note.wait_s(now_ms())

    def free(self, now: float) -> Iterator[Entry]:
        """What may be handed out, in order: of each key the first, and those right behind it.

        Whoever takes a suspect takes nothing else: behind it its key ends.
        """
        if self.leaving or self.is_over or self._found is None:
            return
        blocked = {entry.key for entry in self.entries.values() if entry.token is not None}
        blocked.discard(None)
        for entry in self.entries.values():
            if entry.token is not None or entry.key in blocked:
                continue
            if entry.due <= now:
                yield entry
            if (entry.due > now or entry.suspect) and entry.key is not None:
                blocked.add(entry.key)

    def first_suspect(self, now: float) -> Entry | None:
        """The first suspect that may be handed out, as the first of its key."""
        if self._has_suspects:
            self._has_suspects = any(entry.suspect for entry in self.entries.values())
        if not self._has_suspects:
            return None
        before: set[str | None] = set()
        for entry in self.free(now):
            if entry.suspect and entry.key not in before:
                return entry
            if entry.key is not None:
                before.add(entry.key)
        return None

    def suspect(self, entry: Entry) -> None:
        """Somebody may have died with this one, or hangs."""
        entry.suspect = self._has_suspects = True

    def next_due(self, now: float) -> float | None:
        """When something may be handed out that may not yet."""
        return min((e.due for e in self.entries.values() if e.due > now), default=None)

    def end_if_older(self, keeps_s: float) -> None:
        """Where something was delivered so long ago, hand out nothing more."""
        oldest = next(iter(self.entries.values()), None)
        self.is_over |= oldest is not None and oldest.item.came_s + keeps_s < time.monotonic()

    @property
    def is_held(self) -> bool:
        """Whether a claim holds something of it."""
        return any(entry.token is not None for entry in self.entries.values())

    def drop(self, entry: Entry) -> None:
        """It is settled."""
        self.entries.pop(entry.item.tag, None)
        if entry.identity is not None:
            self._noted.pop(entry.identity, None)

    # --- what is written down

    def as_they_stand(self) -> Iterator[tuple[Entry, Note | None]]:
        """What there is to be known of everything that is unsettled, if nobody dies with it."""
        now = self._clock()
        for entry in self.entries.values():
            history = entry.item.history
            yield entry, entry.note(history, suspect=entry.suspect, wait_s=entry.due - now)

    def put(self, identity: Identity, note: Note | None) -> Note | None:
        """This is to be written of a message, or nothing; returns what was until now."""
        before = self._noted.pop(identity, None)
        if note is not None:
            self._noted[identity] = note
        return before

    def snapshot(self) -> bytes:
        """Everything that is to be known, as it is written."""
        return written(self._writer, next(self._numbers), self._noted.values())
