"""`KafkaStore`: a transaction of Kafka's in place of one of a database.

It covers what is published through it, the positions of the consumer's group, and its dead
letters. There are no rows: what a handler does elsewhere is no part of it.

What is published waits in this process until the commit. So Kafka's transaction is as short as the
commit takes, however long handlers run: who dies in a handler leaves nothing open that others wait
for, and a savepoint is a mark in a list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NoReturn, Protocol

from duly.broker import Delivery, Outcome, Published, Span
from duly.brokers.kafka.ending import Aside, Ending, RunEnding, asides
from duly.brokers.kafka.held import endings_of
from duly.brokers.kafka.intake import Intake
from duly.brokers.kafka.producer import Sending
from duly.brokers.kafka.producers import Producers
from duly.brokers.kafka.transacted import Transacted
from duly.errors import (
    CommitUnknown,
    ConfigurationError,
    PublishFailed,
    Superseded,
    TransactionInterrupted,
)
from duly.guarantees import Release, Settlement
from duly.message import Message, Topic
from duly.store import Admitted, Scope, StoreCapabilities

NAME = "Kafka's transactions"


class Home(Protocol):
    """What a store needs of its broker."""

    @property
    def capabilities(self) -> Any:
        """Its ``database`` names what both are."""
        ...

    def declare(self, topics: Iterable[Topic[Any]]) -> None:
        """Make topics known."""
        ...

    def intake(self, subscription: str) -> Intake | None:
        """The subscription as this process works it."""
        ...

    def ready(self, messages: Sequence[Message[Any]]) -> Iterable[PublishFailed | Sending]:
        """The records of these, or why one is certainly not stored."""
        ...

    def look_for(self, topics: AbstractSet[str]) -> None:
        """Look, behind an error, whether these are still there."""
        ...

    def letters(self, subscription: str, asides: Sequence[Aside]) -> Sequence[Sending]:
        """The records of dead letters."""
        ...

    def watch(self) -> None:
        """Look now and then for what others have left open, from here on."""
        ...


class NoConnection:
    """`Transaction.connection` where there is no database: whatever is asked of it says so."""

    def _refuse(self, *_: object) -> NoReturn:
        raise ConfigurationError(
            "tx.connection: there is no database here. A transaction of Kafka's covers what is "
            "published with tx.publish and the positions of this consumer, nothing else. For rows "
            'give the app a store, say App(..., store="postgresql://..."); they are written in '
            "its transaction then."
        )

    def __getattr__(self, name: str) -> Any:
        return self._refuse(name)

    __call__ = __enter__ = __exit__ = __aenter__ = __aexit__ = __getitem__ = __iter__ = _refuse

    def __repr__(self) -> str:
        return "<no connection: a transaction of Kafka's>"


class KafkaStore:
    """See `duly.store.Store`. It is closed with its broker."""

    def __init__(self, home: Home, producers: Producers, timeout_s: float) -> None:
        self._home = home
        self._producers = producers
        self._capabilities = StoreCapabilities(
            name=NAME,
            database=home.capabilities.database,
            effects=False,
            limits=tuple(_limits(timeout_s)),
        )

    @property
    def capabilities(self) -> StoreCapabilities:
        """What this store provides."""
        return self._capabilities

    def declare(self, topics: Sequence[Topic[Any]]) -> None:
        """Make known the topics that transactions publish to."""
        self._home.declare(topics)

    def begin(self, scope: Scope | None) -> KafkaSession:
        """As `Store.begin`. Nothing is begun on the cluster before the commit."""
        return KafkaSession(self._home, self._producers, scope)

    def joins(self, connection: Any) -> bool:  # noqa: ARG002 - seam
        """Nothing of Kafka's is a connection that could be given."""
        return False

    def publish_within(
        self,
        connection: Any,
        messages: Sequence[Message[Any]],  # noqa: ARG002 - seam
        topics: Sequence[Topic[Any]] = (),  # noqa: ARG002 - seam
    ) -> Sequence[Outcome]:
        """Refused: see `joins`."""
        raise ConfigurationError(
            f"within={type(connection).__name__}: Kafka's transactions have no connection to "
            "publish within; use app.transaction(), or tx.publish in a handler"
        )

    def close(self) -> None:
        """Nothing is open but the broker, which is closed by itself."""


class KafkaSession:
    """See `duly.store.Session`."""

    def __init__(self, home: Home, producers: Producers, scope: Scope | None) -> None:
        self._home = home
        self._producers = producers
        self._scope = scope
        self._sendings: list[Sending] = []
        self._mark = 0
        self._ended: Sequence[Ending | RunEnding] = ()
        self.connection = NoConnection()

    def admit(self, deliveries: Sequence[Delivery]) -> Admitted:
        """As `Session.admit`: whoever holds the claims may run, once it is known what became of the
        commits before.
        """
        if (intake := self._intake()) is not None:
            intake.commits.decide()
        if isinstance(deliveries, Span):
            self._held([Release(deliveries.receipt)])
            return Admitted(deliveries)
        self._held([Release(delivery.receipt) for delivery in deliveries])
        return Admitted(list(deliveries))

    @property
    def _consumer(self) -> str:
        if self._scope is None:
            raise TypeError("this transaction was begun without a scope: it admits nothing")
        return self._scope.consumer

    def _intake(self) -> Intake | None:
        return self._home.intake(self._consumer)

    def _held(self, settlements: Sequence[Settlement]) -> Sequence[Ending | RunEnding]:
        """How what these are about is to end. Raises `Superseded` unless all of it is held."""
        intake = self._intake()
        ended: Sequence[Ending | RunEnding] = ()
        is_lost = intake is None
        if intake is not None:
            with intake.changed:
                ended, refused = endings_of(intake, settlements)
                is_lost = bool(refused)
        if is_lost:
            raise Superseded(
                f"consumer {self._consumer!r}: its claim was lost to another worker; nothing "
                "was committed"
            )
        return ended

    def savepoint(self) -> None:
        """As `Session.savepoint`."""
        self._mark = len(self._sendings)

    def rollback_to_savepoint(self) -> None:
        """As `Session.rollback_to_savepoint`."""
        del self._sendings[self._mark :]

    def release_savepoint(self) -> None:
        """As `Session.release_savepoint`."""

    def declare(self, topics: Iterable[Topic[Any]]) -> None:
        """As `Session.declare`. Topics are made at once, whatever becomes of the transaction."""
        self._home.declare(topics)

    def publish(self, messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        """As `Session.publish`."""
        ready = [*self._home.ready(messages)]
        self._sendings += [each for each in ready if isinstance(each, Sending)]
        return [
            Published(message.id) if isinstance(each, Sending) else each
            for message, each in zip(messages, ready, strict=True)
        ]

    def settle(
        self,
        settlements: Sequence[Settlement],
        deliveries: Sequence[Delivery],  # noqa: ARG002 - seam: receipts say which
    ) -> None:
        """As `Session.settle`. Raises `Superseded`."""
        self._ended = self._held(settlements)

    def commit(self) -> None:
        """As `Session.commit`. Raises `Superseded` and `BrokerError`, too: nothing was committed
        then.
        """
        try:
            self._commit()
        except (CommitUnknown, TransactionInterrupted):
            self._home.look_for({each.topic for each in self._sendings})
            raise

    def _commit(self) -> None:
        if self._scope is None:
            self._publish(self._sendings)
        elif self._ended:
            intake = self._home.intake(self._scope.consumer)
            if intake is None or not isinstance(intake.commits, Transacted):
                raise Superseded(f"consumer {self._scope.consumer!r} has ended in this process")
            letters = self._home.letters(self._scope.consumer, asides(self._ended))
            intake.commits.transact(self._ended, [*self._sendings, *letters])

    def _publish(self, sendings: Sequence[Sending]) -> None:
        if not sendings:
            return
        self._home.watch()
        with self._producers.one() as producer:
            producer.begin()
            producer.send(sendings)
            producer.commit()

    def rollback(self) -> None:
        """As `Session.rollback`: nothing has left this process."""
        self._sendings.clear()
        self._ended = ()


def _limits(timeout_s: float) -> Iterator[str]:
    yield (
        "what it publishes is seen when the transaction commits, by readers that read what is "
        "committed (isolation.level=read_committed: duly's do, others unless told so do not)"
    )
    yield (
        "nothing else is part of the transaction: rows, files and requests of the handler may "
        "happen again"
    )
    yield (
        "a worker that dies while it commits leaves its transaction open until another takes over "
        f"its partitions, or for {timeout_s:g} s (transaction.timeout.ms) and what the cluster "
        "needs to look: until then what is behind it in a topic is not read"
    )
