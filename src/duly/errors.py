"""Every error duly raises, and what to do about each.

::

    DulyError
    ├── ConfigurationError        a declaration or option is wrong; nothing was started
    │   └── ContractRefused       a guarantee was asked for that this broker and store cannot keep
    ├── PublishError              about one message, named by its id
    │   ├── PublishFailed         certainly not stored: mend the cause, publish again
    │   │   ├── InvalidMessage    the payload, id, key or a header cannot be published
    │   │   ├── MessageTooLarge   over the topic's or broker's limit
    │   │   └── IdentityConflict  this id was published before with another body
    │   ├── PublishUnknown        maybe stored: publish again under the same id
    │   └── PublishIncomplete     some of many did not succeed; it carries every outcome
    ├── BrokerError               the broker cannot do its work
    │   ├── BrokerUnavailable     for now: locked, unreachable, disk full; try again later
    │   └── BrokerUnusable        for good: no database, corrupt, a newer schema
    │       └── SubscriptionEnded   of one consumer: its position is lost; its worker ends
    ├── TransactionError          about one transaction
    │   ├── TransactionFailed     certainly rolled back
    │   │   ├── TransactionLost         it ended behind duly's back
    │   │   └── TransactionInterrupted  a deadlock, a lost connection: do it again
    │   └── CommitUnknown         COMMIT was sent and its answer lost: neither success nor failure
    ├── Superseded                the claim was lost to another worker; nothing was committed
    └── DecodeError               a body is not what its topic's type says
        └── UnknownType           its type is none that this code knows

Two more are raised *by handlers* to say how a message ends: `Retry` and `Reject`. They are
not `DulyError`, so that ``except DulyError`` in a handler does not swallow them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class DulyError(Exception):
    """The root of everything duly raises."""


class ConfigurationError(DulyError):
    """A declaration or an option is wrong. Nothing was started; mend the line it names."""


class ContractRefused(ConfigurationError):
    """A guarantee was asked for that cannot be kept here. The text gives reason and remedy."""


class PublishError(DulyError):
    """Publishing a message did not plainly succeed.

    ``message_id`` is the message's id, given or generated. Publishing again under the same id
    is safe on an exactly-once topic: a repeat is dropped there.
    """

    def __init__(self, text: str, *, message_id: str = "") -> None:
        super().__init__(text)
        self.message_id = message_id


class PublishFailed(PublishError):
    """The message is certainly not stored."""


class InvalidMessage(PublishFailed):
    """The payload, id, key or a header cannot be published; nothing was sent."""


class MessageTooLarge(PublishFailed):
    """The message is over the size limit; nothing was sent."""


class IdentityConflict(PublishFailed):
    """This (source, id) was published before on this topic with another body.

    One id names one event. Give the new event an id of its own.
    """


class PublishUnknown(PublishError):
    """The message may or may not be stored. Publish it again under ``message_id``."""


class PublishIncomplete(PublishError):
    """Of many messages published together, some did not succeed.

    ``outcomes`` has one entry a message, in the order given: `Published`, `RepeatDropped`,
    or the `PublishFailed` or `PublishUnknown` of that message.
    """

    def __init__(self, text: str, outcomes: Sequence[Any]) -> None:
        super().__init__(text)
        self.outcomes = outcomes


class BrokerError(DulyError):
    """The broker cannot do its work."""


class BrokerUnavailable(BrokerError):
    """The broker cannot be used just now (locked, unreachable, disk full). Nothing was changed."""


class BrokerUnusable(BrokerError):
    """What the URL names cannot serve as a broker: no database, corrupt, or of a newer version."""


class SubscriptionEnded(BrokerUnusable):
    """This process cannot go on with a subscription, however long it waits: its position is lost,
    or the log is another one. Its worker ends; the text says what a person has to do.
    """


class TransactionError(DulyError):
    """A transaction did not commit, or it is not known whether it did."""


class TransactionFailed(TransactionError):
    """The transaction was certainly rolled back, with all its effects and messages."""


class TransactionLost(TransactionFailed):
    """The transaction had ended before its commit: a statement inside failed and the database
    rolled everything back (and the handler swallowed the error), or the handler ended it.
    """


class TransactionInterrupted(TransactionFailed):
    """The transaction was rolled back by what was no fault of it: a deadlock, a serialization
    failure, a connection lost before COMMIT was sent, a full disk. Do it again; a worker does,
    uncharged, some twenty times in a row.
    """


class CommitUnknown(TransactionError):
    """COMMIT was sent and no answer came. The redelivery finds out through admission."""


class Superseded(DulyError):
    """The claim on these messages was lost to another worker; this transaction may not commit."""


class DecodeError(DulyError):
    """A message's body is not what its topic's type says."""


class UnknownType(DecodeError):
    """The message names a type that its topic's declaration does not: see `Topic.versioned`."""


class Retry(Exception):
    """Raise in a handler: run this message again, ``in_s`` seconds from now.

    Without ``in_s`` the consumer's retry policy gives the delay. It counts as an attempt.
    """

    def __init__(self, why: str = "the handler asked for a retry", *, in_s: float | None = None):
        super().__init__(why)
        if in_s is not None and not 0 <= in_s <= 366 * 86400:
            raise ValueError(f"Retry(in_s={in_s!r}): give seconds from 0 to a year")
        self.in_s = in_s


class Reject(Exception):
    """Raise in a handler: this message can never be handled; dead-letter it now, saying why."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why
