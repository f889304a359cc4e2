"""The PostgreSQL server of a run, the link to it, and what befalls both."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from random import Random
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from duly.errors import ConfigurationError
from duly.testing.chaos.link import Cut, Link

if TYPE_CHECKING:
    from duly.testing.postgres import PrivateServer

Tell = Callable[[str, str], None]
"""Called with the kind of a fault and where it hit."""

_PORT = 5432
_UP_S = 4.0


def nothing(kind: str, point: str) -> None:
    """Hear of nothing."""
    del kind, point


class Server:
    """One of its own, which can be killed, or the one of this URL; with a link that can be cut.

    ``tell`` is whoever is to hear of faults. Raises `ConfigurationError` where none is there.
    """

    def __init__(self, url: str | None = None) -> None:
        try:
            from duly.testing.postgres import OTHER, PrivateServer
        except ModuleNotFoundError as missing:
            raise ConfigurationError(
                f"PostgreSQL needs the driver psycopg ({missing}): pip install 'duly[postgres]'"
            ) from missing
        self.tell: Tell = nothing
        self._private: PrivateServer | None = None
        self._down: threading.Thread | None = None
        self._told = 0
        self._up_s = 0.0
        named = url or os.environ.get(OTHER)
        if named is None:
            self._private = PrivateServer().start()
        self.direct = named or self._private_url()
        parts = urlsplit(self.direct)
        self._link = Link(parts.hostname or "127.0.0.1", parts.port or _PORT, self._cut)
        login, at, _ = parts.netloc.rpartition("@")
        netloc = f"{login}{at}127.0.0.1:{self._link.port}"
        self.url = parts._replace(netloc=netloc).geturl()

    def _private_url(self) -> str:
        assert self._private is not None, "it was started"
        return self._private.url

    @property
    def is_private(self) -> bool:
        """Whether it may be killed."""
        return self._private is not None

    @property
    def folder(self) -> str:
        """Where the data of a private one are; else where it is."""
        return str(self._private.folder) if self._private is not None else self.direct

    def check(self) -> None:
        """Raise `BrokerUnavailable`, `BrokerUnusable` where it does not answer as duly needs it."""
        from duly.sql.postgres import Database

        try:
            Database(self.direct).close()
        except BaseException:
            self.close()
            raise

    # --- what befalls it

    def end_a_session(self, random: Random) -> bool:
        """End a session in the middle of something; False: there was none."""
        import psycopg

        from duly.testing.chaos.schema import end_a_session

        if self.is_down:
            return False
        try:
            state = end_a_session(self.direct, random)
        except psycopg.Error:
            return False
        if state is not None:
            self.tell("end session", state)
        return state is not None

    def is_held_by(self, number: int) -> bool:
        """Whether the process of this number has a transaction open, for whose end others may have
        to wait; False too where that cannot be asked just now.
        """
        import psycopg

        from duly.testing.chaos.schema import is_amidst

        if self.is_down:
            return False
        try:
            return is_amidst(self.direct, number)
        except psycopg.Error:
            return False

    def cut(self, when: Cut) -> None:
        """Cut the link at the next COMMIT."""
        self._link.cut(when)

    def _cut(self, when: Cut) -> None:
        self.tell(f"cut {when}", "link")

    @property
    def is_down(self) -> bool:
        """Whether it is on its way down or up again."""
        return self._down is not None and self._down.is_alive()

    def take_down(self, kind: str, pause_s: float) -> bool:
        """Kill it or shut it down at once, and start it again after a pause; False: it is down, or
        nobody has had the time to do anything since it was.
        """
        if self.is_down or time.monotonic() < self._up_s + _UP_S:
            return False
        self._down = threading.Thread(target=self._down_and_up, args=(kind, pause_s))
        self._down.start()
        return True

    def _down_and_up(self, kind: str, pause_s: float) -> None:
        private = self._private
        assert private is not None, "only a private one is taken down"
        self.tell("server down", kind)
        if kind == "kill server":
            private.kill()
        else:
            private.abandon()
        threading.Event().wait(pause_s)
        private.start()
        self._up_s = time.monotonic()
        self.tell("server up", kind)

    def heal(self) -> None:
        """Wait until it is up, and cut nothing any more."""
        self._link.heal()
        if self._down is not None:
            self._down.join()

    def said(self) -> str:
        """What a private one has written to its log since it was asked last."""
        text = "" if self._private is None else self._private.log()
        new, self._told = text[self._told :], len(text)
        return new

    def close(self, *, keep: bool = False) -> None:
        """Close the link and stop a private one; its data go, or are kept."""
        with ExitStack() as closing:
            if self._private is not None:
                closing.callback(self._private.stop if keep else self._private.close)
            closing.callback(self._link.close)
            closing.callback(self.heal)
