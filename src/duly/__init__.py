"""Messaging in which delivery semantics are declared, checked, kept and proven."""

from duly.app import App as App
from duly.consumer import Options as Options
from duly.declarations import Group as Group
from duly.dependencies import use as use
from duly.guarantees import RetryPolicy as RetryPolicy
from duly.message import Message as Message
from duly.message import Topic as Topic
from duly.store import Transaction as Transaction


def _connect():
    from duly import connect

    return connect


from duly.backends import connect_by

connect_by(_connect)
