"""Messaging in which delivery semantics are declared, checked, kept and proven.

::

    import duly

    rides = duly.Topic("rides", dict, guarantee="at-least-once")
    app = duly.App("city", broker="sqlite:///city.db")

    @app.consumer(rides, name="board", guarantee="at-least-once")
    def show(ride: dict) -> None: ...

    app.publish(rides, {"ride": "r-1", "status": "arrived"})

``duly run module:app`` works it. Brokers and stores are imported when first used.
"""

from duly.app import App
from duly.backends import Connect as _Connect
from duly.backends import connect_by as _connect_by
from duly.broker import Published, RepeatDropped
from duly.consumer import ConsumerOptions, Options
from duly.declarations import Group
from duly.dependencies import use
from duly.errors import (
    BrokerError,
    BrokerUnavailable,
    BrokerUnusable,
    CommitUnknown,
    ConfigurationError,
    ContractRefused,
    DecodeError,
    DulyError,
    IdentityConflict,
    InvalidMessage,
    MessageTooLarge,
    PublishError,
    PublishFailed,
    PublishIncomplete,
    PublishUnknown,
    Reject,
    Retry,
    SubscriptionEnded,
    Superseded,
    TransactionError,
    TransactionFailed,
    TransactionInterrupted,
    TransactionLost,
    UnknownType,
)
from duly.guarantees import Guarantee, RetryPolicy
from duly.message import Message, Topic
from duly.publishing import Buffered, Dropped
from duly.store import Transaction
from duly.versions import Upcast

__all__ = [
    "App",
    "BrokerError",
    "BrokerUnavailable",
    "BrokerUnusable",
    "Buffered",
    "CommitUnknown",
    "ConfigurationError",
    "ConsumerOptions",
    "ContractRefused",
    "DecodeError",
    "Dropped",
    "DulyError",
    "Group",
    "Guarantee",
    "IdentityConflict",
    "InvalidMessage",
    "Message",
    "MessageTooLarge",
    "Options",
    "PublishError",
    "PublishFailed",
    "PublishIncomplete",
    "PublishUnknown",
    "Published",
    "Reject",
    "RepeatDropped",
    "Retry",
    "RetryPolicy",
    "SubscriptionEnded",
    "Superseded",
    "Topic",
    "Transaction",
    "TransactionError",
    "TransactionFailed",
    "TransactionInterrupted",
    "TransactionLost",
    "UnknownType",
    "Upcast",
    "use",
]


def _connect() -> _Connect:
    from duly import connect

    return connect


_connect_by(_connect)
