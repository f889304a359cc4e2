"""The seam to where messages live: `Broker` and `Subscription`, and what they exchange.

Calls block, and batches are everywhere (one is a batch of one). A broker holds storage and
nothing else: validation, counting, retry policy and running handlers are the worker's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Protocol, overload, runtime_checkable

import msgspec

from duly.errors import PublishFailed, PublishUnknown
from duly.guarantees import Done, Guarantee, Settlement
from duly.message import Message, Topic

Receipt = Any
"""Opaque to all but the broker that gave it. Comparable and hashable; it carries the token
that fences the claim."""


class Published(msgspec.Struct, frozen=True, gc=False):
    """The message is durable."""

    message_id: str


class RepeatDropped(msgspec.Struct, frozen=True, gc=False):
    """The message had been published before, with the same body; nothing was stored again."""

    message_id: str


Outcome = Published | RepeatDropped | PublishFailed | PublishUnknown
"""How publishing one message ended. `IdentityConflict` is a `PublishFailed`."""


class LogPosition(msgspec.Struct, frozen=True, gc=False):
    """Where a message stands in an ordered source, for admission by cursor.

    ``log`` names one incarnation of a partition (cluster id, topic id, partition): a topic
    that was deleted and made again has another one. ``offset`` grows within it, with gaps.
    ``epoch`` is the leader's, 0 where a log has none. ``end`` is the offset that the log would
    give the next message, as known when this one was claimed (None: not known): a cursor
    beyond it shows that the log lost messages.
    """

    log: str
    offset: int
    epoch: int = 0
    end: int | None = None


class Stretch(msgspec.Struct, frozen=True):
    """Where consecutive messages of one ordered source stand: as `LogPosition`, of all of them."""

    log: str
    offsets: Sequence[int]
    epoch: int = 0
    end: int | None = None


class Unread(msgspec.Struct, frozen=True, gc=False):
    """A message of which only id and body were fetched, because most handlers need no more.

    ``look_up`` fetches the whole message by its receipt, while the claim is held. Once it is
    settled the message may be gone: then that raises `LookupError`.
    """

    id: str
    body: bytes
    look_up: Callable[[Receipt], Message[Any]]


class Delivery(msgspec.Struct, frozen=True, gc=False):
    """One claim on one message.

    ``attempt`` is 1 for the first start and counts what was charged before. ``repeated`` is
    the broker's own mark that the message may have been delivered before. ``alone`` says the
    claim holds this message only and nothing else may run beside it in the lane: a death now
    is charged to it, where its worker holds nothing else. ``carried`` is the message, or its
    body where the subscription asked for `SubscribeOptions.bodies_only`. ``replays`` counts how
    often people brought it back from the dead letters.
    """

    carried: Message[Any] | Unread
    receipt: Receipt
    attempt: int = 1
    repeated: bool = False
    alone: bool = False
    position: LogPosition | None = None
    replays: int = 0

    @property
    def message_id(self) -> str:
        """The message's id, whatever is carried."""
        return self.carried.id

    @property
    def message(self) -> Message[Any]:
        """The message; fetched now where only its body was."""
        carried = self.carried
        return carried if isinstance(carried, Message) else carried.look_up(self.receipt)


class Span(Sequence[Delivery], ABC):
    """Consecutive deliveries of one claim that share their history, by their bodies.

    What `Subscription.claim` may give where only bodies were asked for: one object, instead of
    four a message. It is a sequence of `Delivery`, each made when it is looked at; a slice is a
    span too. ``receipt`` stands for all of it, in settlements and in `Subscription.extend`.
    """

    bodies: list[bytes]
    attempt: int
    repeated: bool

    @property
    def largest(self) -> int:
        """Bytes that no body exceeds; of a span that knows more than its bodies tell, perhaps
        more than any has.
        """
        return max(map(len, self.bodies), default=0)

    @property
    @abstractmethod
    def identities(self) -> tuple[str, Sequence[str], Sequence[str]]:
        """The topic, the sources and the ids of its messages."""

    @property
    def stretches(self) -> Sequence[Stretch]:
        """Where its messages stand, those of one stretch after those of another; none where their
        source is no log.
        """
        return ()

    @property
    @abstractmethod
    def receipt(self) -> Receipt:
        """One receipt for every message of the span; of what is refused, each has its own."""

    @overload
    def __getitem__(self, index: int) -> Delivery: ...
    @overload
    def __getitem__(self, index: slice) -> Span: ...
    @abstractmethod
    def __getitem__(self, index: int | slice) -> Delivery | Span:
        """One delivery, or a span of some."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a broker provides. Each one adds conformance tests, none removes any.

    - ``name``: for people ("SQLite", "in-memory log").
    - ``database``: identity of the database the messages live in, equal to a store's where a
      transaction can cover both; None for brokers that are no database.
    - ``is_log``: deliveries carry a `LogPosition`; settlements cover a prefix per partition.
    - ``durable``: stored messages survive the death of every process.
    - ``confirms_settlement``: when settle returns, a settled message is never delivered again.
    - ``hands_out_once``: what an at-most-once subscription claims has left the broker, and is never
      delivered again, though no settlement is confirmed. What waits for it need not survive a
      restart of the broker.
    - ``identity_retention``: repeated publishes on exactly-once topics are dropped.
    - ``retries_in_place``: a retried message holds up those behind it in its partition.
    - ``orders_by_key``: consumers may ask for order by key.
    - ``holds_keys``: and also for a key to wait behind its dead letter.
    - ``delays``: messages may have a due time.
    - ``delays_in_order``: also those of a topic with partitions: the later ones of their key wait
      for them, where order by key is asked for.
    - ``key_lanes``: a log whose partitions can be cut so for exactly-once subscriptions
      (`SubscribeOptions`); another works a partition as one, whatever was asked for.
    - ``replays``: a new subscription may begin with messages from before it was made. Where it
      cannot, the broker is `Prepares`, and a message that no subscription takes is refused, unless
      the topic `may_go_unheard`.
    - ``one_writer``: one transaction at a time; more processes do not speed that up.
    - ``relays_once``: what is brought from a store's outbox is stored once, whatever dies; the
      broker is `PublishesOnce`.
    - ``redelivery_horizon_s``: the longest after its first delivery that a message can come
      again by itself; None: no bound.
    - ``max_message_bytes``: the largest body it carries.
    """

    name: str
    database: str | None = None
    is_log: bool = False
    durable: bool = True
    confirms_settlement: bool = True
    hands_out_once: bool = False
    identity_retention: bool = True
    retries_in_place: bool = False
    orders_by_key: bool = True
    holds_keys: bool = True
    delays: bool = True
    delays_in_order: bool = True
    key_lanes: bool = False
    replays: bool = True
    one_writer: bool = False
    relays_once: bool = False
    redelivery_horizon_s: float | None = None
    max_message_bytes: int = 512 * 1024 * 1024

    @property
    def settles_before_it_runs(self) -> bool:
        """Whether an at-most-once handler can be started for what surely does not come again."""
        return self.confirms_settlement or self.hands_out_once

    def holds_partition(self, guarantee: Guarantee, *, parks: bool = False) -> bool:
        """Whether a retry holds up what is behind it in its partition, for consumers of this
        guarantee: on a log a cursor cannot pass it, so nothing may be started behind it, unless
        the store ``parks`` it.
        """
        on_log = self.is_log and guarantee is Guarantee.EXACTLY_ONCE
        return not parks and (self.retries_in_place or on_log)


Start = Literal["earliest", "latest"] | datetime
"""Where a new subscription begins: at the oldest kept message, after the newest, or at a time."""


@dataclass(frozen=True, slots=True)
class SubscribeOptions:
    """What a lane asks of its subscription.

    ``start`` matters once, when the subscription is first made. ``guarantee`` is recorded
    with it then; another one later is refused with `ConfigurationError`. ``hold_key_on_dead``:
    with ``order_by_key``, messages of a key wait behind its dead letter until that is replayed
    or discarded; otherwise they go on. ``bodies_only``: deliveries may carry `Unread`, to save
    fetching what nobody looks at; a broker may ignore it. ``identities``: every message's source
    and id will be looked at too. ``key_lanes``: an exactly-once subscription of a log that can do
    so is worked in so many lanes of keys within a partition, each a log of its own by its
    `LogPosition`; the number is recorded when it is first worked, and another one later refused.
    ``remembered``: what is settled as done has taken effect in a store, which knows it when it
    comes again. So a loss of power may lose such a settlement, and a broker need not sync it.
    """

    guarantee: Guarantee
    lease_s: float = 30.0
    order_by_key: bool = False
    hold_key_on_dead: bool = False
    start: Start = "earliest"
    bodies_only: bool = False
    identities: bool = False
    key_lanes: int = 1
    remembered: bool = False


class Subscription(Protocol):
    """One lane's view of a subscription.

    One thread claims; `settle` and `extend` come from any thread, also while `claim` waits.
    """

    def claim(self, limit: int, max_bytes: int, wait_s: float) -> Sequence[Delivery]:
        """Claim up to ``limit`` messages of together ``max_bytes`` (at least one message).

        Waits up to ``wait_s`` seconds for the first; empty when none came, or on `close`, or
        while what is due waits for this worker, or has it, with nothing else beside it: so it
        may stay empty for a while though something is due, and always comes to an end.
        Either every delivery is for one run together, or there is exactly one with ``alone``
        set, whose start has been counted where its worker holds nothing else. In order by key,
        nothing of a key is delivered while an earlier message of it is claimed or waits for a
        retry. Raises `BrokerError`.
        """
        ...

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[Receipt]:
        """Settle, durably on return; returns the refused: their lease was lost to another.

        All accepted ones take effect together; where the broker does not confirm settlements, what
        is over may stand without the rest. Raises `BrokerUnavailable` when nothing was settled, and
        `PublishUnknown` never: an unknown outcome, or part of one, is `CommitUnknown`. Settling the
        same again is harmless then, and refuses nothing that is known to stand. While it lasts,
        these claims do not end.
        """
        ...

    def extend(self, receipts: Iterable[Receipt], lease_s: float) -> Sequence[Receipt]:
        """Hold the claims for ``lease_s`` more seconds from now; returns the lost."""
        ...

    def close(self) -> None:
        """End a waiting claim and give back what is claimed and unsettled, uncharged."""
        ...


class Ahead(Protocol):
    """The next claim of a lane, to be made in the transaction that settles its last one."""

    def deliveries(self) -> Sequence[Delivery]:
        """What was claimed, once that transaction stands; to be called once."""
        ...


@runtime_checkable
class ClaimsAhead(Protocol):
    """What a `Subscription` may also do, where settling and claiming are one database's: both
    in one transaction, which saves a commit a batch. A session of that database does the same
    by `duly.store.ClaimsAhead`.
    """

    def ahead(self, limit: int, max_bytes: int) -> Ahead | None:
        """The claim that `Subscription.claim` would make now; None where a call of that is
        wanted instead, because there may be nothing to claim or there is other work to do.
        """
        ...

    def settle_and_claim(
        self, settlements: Sequence[Settlement], ahead: Ahead
    ) -> Sequence[Receipt]:
        """As `Subscription.settle`. Where it raises, nobody can say whether ``ahead`` was made:
        it must not be used, and what it may have claimed comes again when its lease is over.
        """
        ...


@runtime_checkable
class SettlesRemembered(Protocol):
    """What a `Subscription` may also do, where settling takes a while, for those whose store knows
    what has taken effect without being told by the broker (`duly.guarantees.Admission.BY_CURSOR`).
    """

    @property
    def settles_remembered(self) -> bool:
        """Whether it can, here: what stands before another subscription can what that one can."""
        ...

    def settle_remembered(self, settlements: Sequence[Done]) -> Sequence[Receipt]:
        """As `Subscription.settle`, but returns before it is durable. What was lost to another
        may not be known yet, and is not refused; after a crash these may come again.
        """
        ...


@runtime_checkable
class Pausable(Protocol):
    """What a `Subscription` may also tell, where people can hold it back."""

    @property
    def paused(self) -> bool:
        """Whether the last claim came back empty because the subscription is held back."""
        ...


@runtime_checkable
class NotesRepeats(Protocol):
    """What a `Subscription` may also do, for people to see."""

    def note_repeats(self, deliveries: Sequence[Delivery]) -> None:
        """Keep as incidents (``repeat-suppressed``) that these had taken effect before, which the
        store found, and were not run again. They are claimed still, or were a moment ago.

        Called only where there are any. Nothing depends on it: it may raise `BrokerError` or
        `CommitUnknown`, and need not survive a crash.
        """
        ...


class Entrance(Protocol):
    """The one way by which what an outbox holds is stored once, whoever dies on it.

    One thread at a time uses it. `resume` comes first, and again after every `publish` that did
    not store all it was given.
    """

    def resume(self) -> bytes | None:
        """From now on nobody else publishes by this entrance, until somebody resumes it there.

        What another had begun is ended before this returns: it stands as a whole, or nothing of
        it does. Returns the note of the last publish that stands; None: there is none. Raises
        `BrokerError`.
        """
        ...

    def publish(
        self, messages: Sequence[Message[Any]], note_of: Callable[[Sequence[int]], bytes]
    ) -> Sequence[Outcome]:
        """As `Broker.publish`, in one transaction with a note: what is not refused is stored, all
        of it and the note, or nothing. ``note_of`` makes it for those that stand at these places
        of ``messages``. Nobody sees a message before it is certain that it stands.

        Never `PublishUnknown`. Raises `CommitUnknown`, until `resume` finds out; where nothing was
        stored `BrokerError`, `TransactionInterrupted`, and `TransactionFailed` where one of several
        was refused: each by itself is told its outcome. Where another has resumed nothing is
        stored, and it raises `Superseded` or `CommitUnknown`.
        """
        ...

    def close(self) -> None:
        """Publish no more; what is under way is undone, or stands."""
        ...


@runtime_checkable
class PublishesOnce(Protocol):
    """What a `Broker` may also do that can store messages and a note together
    (`Capabilities.relays_once`).
    """

    def entrance(self, outbox: str) -> Entrance:
        """The entrance for the outbox of this name, which is its own for ever. Asks nobody."""
        ...


@runtime_checkable
class Prepares(Protocol):
    """What a `Broker` must also do that keeps nothing for those who come later
    (`Capabilities.replays`).
    """

    def prepare(
        self, topics: Iterable[Topic[Any]], subscription: str, options: SubscribeOptions
    ) -> None:
        """Make the subscription of these declared topics, so that it is given what is published
        from now on; again is harmless. Lanes will ask for it with such options; its guarantee is
        recorded when it is first worked.

        Raises `ConfigurationError` where it cannot be made, `BrokerError`.
        """
        ...


@runtime_checkable
class Knows(Protocol):
    """A broker that tells of its topics and subscriptions without their being declared."""

    def know(
        self, topics: Iterable[Topic[Any]], subscription: str, options: SubscribeOptions
    ) -> None:
        """Know that this subscription of these topics may be there, for who only looks; make
        nothing.

        Raises `ConfigurationError` where a topic is there as another, `BrokerError`.
        """
        ...


class Broker(Protocol):
    """Where messages live. Safe to use from any thread."""

    @property
    def capabilities(self) -> Capabilities:
        """What this broker provides."""
        ...

    def declare(self, topics: Iterable[Topic[Any]]) -> None:
        """Make the topics known, creating what they need; again is harmless.

        Raises `ConfigurationError` where a topic exists with other fixed properties, saying
        which. Publishing and subscribing need it first.
        """
        ...

    def publish(self, messages: Sequence[Message[Any]]) -> Sequence[Outcome]:
        """Store messages of topics that somebody has declared, this process or another, durably on
        return; one outcome each, in order.

        What is refused (`PublishFailed`) or unknown (`PublishUnknown`) is in the outcomes and
        not raised. Messages for one topic are stored in the order given.
        """
        ...

    def subscribe(
        self, topics: Sequence[Topic[Any]], subscription: str, options: SubscribeOptions
    ) -> Subscription:
        """One lane of the named subscription of these declared topics.

        Raises `ConfigurationError` when the subscription is recorded with another guarantee.
        """
        ...

    def close(self) -> None:
        """Close every subscription and connection."""
        ...
