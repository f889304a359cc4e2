"""`Gate`: by which what one outbox holds is stored once, in Kafka's transactions.

A batch and a note of it are one transaction. The notes stand in a compacted topic of the outbox's
own: in one that several share, a transaction of another outbox that is open would hide the last
note from who reads what is committed.

Transactional ids are counted, and the last note tells the number in use and whose it is. Whoever
resumes begins under that id, which fences off the other and ends what was open; then it says,
under that same id, that the next number is its own. So of two that resume at once only one can say
so, and no id is used again after a transaction that was not committed: Kafka may complete an abort
without ending it in a partition, and the next commit under that id would commit what stands there.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import Any

from duly.broker import Outcome, Published
from duly.brokers.kafka.address import Address
from duly.brokers.kafka.admin import COMPACTED, Admin, Wanted
from duly.brokers.kafka.leavings import Leavings
from duly.brokers.kafka.names import Names
from duly.brokers.kafka.producer import Sending
from duly.brokers.kafka.reader import Reader
from duly.brokers.kafka.transactions import TransactionalProducer
from duly.errors import (
    BrokerUnavailable,
    CommitUnknown,
    PublishFailed,
    Superseded,
    TransactionError,
    TransactionFailed,
    TransactionInterrupted,
)
from duly.message import Message

_KEY = b"note"
# What is older than the last note is of no use: small segments are soon compacted.
_NOTES: Mapping[str, str] = {**COMPACTED, "segment.bytes": str(1024 * 1024)}
# So often somebody else may come between.
_TRIES = 5

Ready = Callable[[Sequence[Message[Any]]], Iterable[Sending | PublishFailed]]
Told = Callable[[Message[Any], Sending], Outcome]
LookFor = Callable[[AbstractSet[str]], None]


@dataclass(frozen=True, slots=True)
class _Turn:
    """The id in use, by its number, who uses it, and the note of the last publish."""

    number: int = 0
    owner: bytes = b""
    note: bytes | None = None


class Gate:
    """See `duly.broker.Entrance`. ``ready`` makes records of messages, or says why one is
    refused; ``told`` says what became of one that was refused by the cluster; ``look_for`` looks,
    behind an error, whether topics are still there.
    """

    def __init__(
        self,
        address: Address,
        admin: Admin,
        names: Names,
        outbox: str,
        ready: Ready,
        told: Told,
        look_for: LookFor,
    ) -> None:
        # What a store calls its database may be long, and have characters that no topic has.
        self._outbox = hashlib.blake2b(outbox.encode(), digest_size=12).hexdigest()
        self._name = names.relayed(self._outbox)
        self._address = address
        self._admin = admin
        self._names = names
        self._reader = Reader(address, self._name)
        self._ready = ready
        self._told = told
        self._look_for = look_for
        self._producer: TransactionalProducer | None = None
        # It knows what it has not committed; the note tells of its last commit.
        self._given_up: TransactionalProducer | None = None
        self._tried: bytes | None = None
        self._turn = _Turn()
        self._leavings: Leavings | None = None
        self._resumed = False

    def resume(self) -> bytes | None:
        """As `Entrance.resume`."""
        self._resumed = False
        if self._producer is None or not self._producer.is_clean:
            self._take_turn()
        self._resumed = True
        return self._turn.note

    def _take_turn(self) -> None:
        self._give_up()
        # A person may have deleted it.
        if self._name not in self._admin.find([self._name]):
            self._admin.make([Wanted(self._name, 1, _NOTES)])
        for _ in range(_TRIES):
            found = self._last()
            with closing(self._before(found.number)) as before:
                before.prepare()
                last = self._last()
                if last.number != found.number:
                    continue
                if last.note != self._tried:
                    before.was_aborted()
                before.end_standing(self._admin.standing)
                mine = _Turn(last.number + 1, secrets.token_bytes(8), last.note)
                self._say(before, mine)
            with ExitStack() as otherwise:
                producer = self._called(mine.number)
                otherwise.callback(producer.close)
                producer.prepare()
                if self._last() == mine:
                    otherwise.pop_all()
                    # Who goes on as another itself knows what stood there before it published.
                    if self._leavings is None or last.owner != self._turn.owner:
                        left = Leavings(self._address, self._admin, self._called, mine.number)
                        self._leavings = left
                    self._producer, self._turn = producer, mine
                    return
        raise BrokerUnavailable(f"{self._name!r}: others resume at the same time")

    def _renewed(self) -> TransactionalProducer:
        """Go on under another id, unless somebody else has resumed meanwhile."""
        before = self._turn
        self._resumed = False
        if self._last() == before:
            self._take_turn()
        if self._turn.note != before.note or self._producer is None or self._turn == before:
            raise Superseded("nothing was published: another relay has resumed")
        self._resumed = True
        return self._producer

    def _before(self, number: int) -> TransactionalProducer:
        """Of this number: the one that was given up knows what it has not committed."""
        given_up, called = self._given_up, self._called(number)
        return given_up if given_up is not None and given_up.id == called.id else called

    def _called(self, number: int) -> TransactionalProducer:
        return TransactionalProducer(self._address, self._names.relay(self._outbox, number))

    def _say(self, producer: TransactionalProducer, turn: _Turn) -> None:
        try:
            producer.begin()
            producer.send([self._record(turn)])
            producer.commit()
        except (TransactionError, Superseded) as error:
            raise BrokerUnavailable(f"{self._name!r} is not resumed: {error}") from error

    def _record(self, turn: _Turn) -> Sending:
        headers = [("number", str(turn.number).encode()), ("owner", turn.owner)]
        if turn.note is not None:
            headers.append(("noted", b"1"))
        return Sending(self._name, turn.note or b"", _KEY, headers, partition=0)

    def _last(self) -> _Turn:
        record = self._reader.last()
        if record is None:
            return _Turn()
        headers = dict(record.headers() or ())
        note = (record.value() or b"") if "noted" in headers else None
        return _Turn(int(headers["number"]), headers["owner"], note)

    def _give_up(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.close()
            self._given_up = producer

    def publish(
        self, messages: Sequence[Message[Any]], note_of: Callable[[Sequence[int]], bytes]
    ) -> Sequence[Outcome]:
        """As `Entrance.publish`."""
        producer = self._producer
        if not self._resumed or producer is None:
            raise BrokerUnavailable("nothing was published: resume first")
        if not producer.is_clean:
            producer = self._renewed()
        ready = [*self._ready(messages)]
        at = [place for place, each in enumerate(ready) if isinstance(each, Sending)]
        sendings = [each for each in ready if isinstance(each, Sending)]
        if sendings:
            if self._leavings is not None:
                self._leavings.end(sendings)
            turn = replace(self._turn, note=note_of(at))
            self._resumed, self._tried = False, turn.note
            if not self._store(producer, sendings, self._record(turn)):
                return [self._told(messages[0], sendings[0])]
            self._turn, self._resumed = turn, True
        return [
            Published(message.id) if isinstance(each, Sending) else each
            for message, each in zip(messages, ready, strict=True)
        ]

    def _store(
        self, producer: TransactionalProducer, sendings: Sequence[Sending], note: Sending
    ) -> bool:
        """Store these; False where the one that there is was refused."""
        try:
            producer.begin()
            producer.send([*sendings, note])
            producer.commit()
        except (CommitUnknown, TransactionInterrupted):
            self._look_for({each.topic for each in sendings})
            raise
        except TransactionFailed as error:
            if note.is_refused:
                raise BrokerUnavailable(f"the note in {self._name!r}: {error}") from error
            if len(sendings) == 1 and sendings[0].is_refused:
                return False
            raise
        return True

    def close(self) -> None:
        """As `Entrance.close`."""
        self._resumed = False
        self._give_up()
        self._reader.close()
