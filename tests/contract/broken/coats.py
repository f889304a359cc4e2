"""A coat around a sound broker or store, that changes one call."""

from __future__ import annotations

import threading
from typing import Any

NOBODY = threading.Event()  # sets it: a moment to wait


class Coat:
    """Passes on whatever it does not change."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Broken(Coat):
    """A broker; its lanes are coats too."""

    lane: type[Coat] = Coat

    def subscribe(self, topics: Any, subscription: str, options: Any) -> Any:
        return self.lane(self.inner.subscribe(topics, subscription, options))


class BrokenStore(Coat):
    """A store; its sessions are coats too."""

    session: type[Coat] = Coat

    def begin(self, scope: Any) -> Any:
        return self.session(self.inner.begin(scope))


class Sound(Coat):
    """Nothing is wrong with it but what its page says."""


class Outlives(Coat):
    """Still there when it is opened again."""

    def close(self) -> None:
        """Not yet."""
