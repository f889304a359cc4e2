"""What things are called on a cluster."""

from __future__ import annotations

from duly.errors import ConfigurationError

_OWN = "duly."


class Names:
    """The names of one namespace; without one, topics and groups have their own names."""

    def __init__(self, namespace: str) -> None:
        self._prefix = f"{namespace}." if namespace else ""

    def topic(self, name: str) -> str:
        """A topic. Raises `ConfigurationError` for one that is duly's own."""
        if name.startswith(_OWN):
            raise ConfigurationError(
                f"topic {name!r}: names that begin with {_OWN!r} are duly's own on Kafka"
            )
        return self._prefix + name

    def group(self, subscription: str) -> str:
        """The consumer group of a subscription."""
        return self._prefix + subscription

    def again(self, subscription: str) -> str:
        """Where what one subscription alone is to be given again waits."""
        return f"{self._prefix}{_OWN}again.{subscription}"

    def relayed(self, outbox: str) -> str:
        """What was last published from one outbox."""
        return f"{self._prefix}{_OWN}relayed.{outbox}"

    def relay(self, outbox: str, number: int) -> str:
        """One of the transactional ids under which what is in one outbox is published."""
        return f"{self._prefix}duly-relay-{outbox}-{number}"

    @property
    def records(self) -> str:
        """What is fixed, and which positions there have been."""
        return f"{self._prefix}{_OWN}records"

    @property
    def letters(self) -> str:
        """The dead letters of apps without a store."""
        return f"{self._prefix}{_OWN}dead"
