"""The Kafka node of a run, the link to it, and what befalls both."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from duly.errors import ConfigurationError
from duly.testing.chaos.errand import Errand
from duly.testing.chaos.link import Cut, Link, Requests
from duly.testing.chaos.server import Tell, nothing

if TYPE_CHECKING:
    from duly.testing.kafka import PrivateNode

# Who is silent for so long is out of its groups, and others are given its partitions.
SESSION_S = 6.0
SILENT_S = 2 * SESSION_S
_HEARTBEAT_S = 1.0
_DOWN_S = (0.0, 0.8)
_FROZEN_S = (1.0, SESSION_S + 2.0)
_STOPS_S = 10.0
# Groups come together again, and who waits for an answer that will not come gives up.
_UP_S = 15.0
_CUTS: Mapping[str, Cut] = {
    "cut before publish": "before publish",
    "cut after publish": "after publish",
    "cut before ack": "before ack",
    "cut after ack": "after ack",
    "cut before transaction": "before transaction",
    "cut after transaction": "after transaction",
}
# A crowd has some three hundred clients.
_HEAP_MB = 768
# What goes through the link is told the link's address to go on with.
_LISTENERS = """
listeners=PLAINTEXT://127.0.0.1:{{port}},LINK://127.0.0.1:{linked},CONTROLLER://127.0.0.1:{{control}}
advertised.listeners=PLAINTEXT://127.0.0.1:{{port}},LINK://127.0.0.1:{link}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,LINK:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
"""


class KafkaNode:
    """One of the run's own, which can be killed, with a link that can be cut.

    ``tell`` is whoever is to hear of faults. Raises `ConfigurationError` where none is installed.
    """

    strikes = frozenset({"kill node", "stop node", "freeze node", "silence", *_CUTS})
    silent_s = SILENT_S
    # More often, and groups never come together in between.
    pace_s = (1.5, 4.0)
    # What is claimed is settled soon, and whoever is struck at any time seldom holds anything.
    takes_aim = True
    # Each message that kills its worker, or stops it, costs all groups a session and more; those
    # are handled at last that come one by one after a death.
    more_rest_s = 500.0

    def __init__(self) -> None:
        try:
            from duly.testing.chaos.groups import drop_namespaces
            from duly.testing.kafka import PrivateNode
        except ModuleNotFoundError as missing:
            raise ConfigurationError(
                f"Kafka needs the driver confluent-kafka ({missing}): pip install 'duly[kafka]'"
            ) from missing
        from duly.testing.chaos.processes import free_port

        self.tell: Tell = nothing
        self._drop = drop_namespaces
        self._told = 0
        self._over: list[str] = []
        self._up_s = 0.0
        self._errand = Errand()
        linked = free_port()
        self._link = Link("127.0.0.1", linked, self._cut, Requests)
        self._node: PrivateNode
        try:
            listeners = _LISTENERS.format(linked=linked, link=self._link.port)
            self._node = PrivateNode(listeners, heap_mb=_HEAP_MB)
            self._node.start()
        except BaseException:
            self._link.close()
            raise

    @property
    def folder(self) -> str:
        """Where its data are."""
        return str(self._node.folder)

    def url(self, namespace: str, *, at_rest: bool = False) -> str:
        """A namespace there: for processes of the run, or past the link for who looks on."""
        port = self._node.port if at_rest else self._link.port
        session = f"session.timeout.ms={SESSION_S * 1000:.0f}"
        heartbeat = f"heartbeat.interval.ms={_HEARTBEAT_S * 1000:.0f}"
        return f"kafka://127.0.0.1:{port}?namespace={namespace}&{session}&{heartbeat}"

    def settle(self) -> None:
        """See `Node.settle`: what is made is there. It is to be used before anything befalls it."""
        self._up_s = time.monotonic()

    def tell_of(self, namespace: str, folder: Path, *, at_rest: bool) -> None:
        """See `Node.tell_of`: whoever looks asks for itself."""

    def drop(self, namespace: str) -> None:
        """Delete the topics of a namespace before another is worked."""
        self._over.append(namespace)

    def sweep(self) -> None:
        """Delete what was dropped."""
        over, self._over = self._over, []
        if over:
            self._drop(self._node.bootstrap, over)

    # --- what befalls it

    def strike(self, kind: str, random: Random) -> bool:
        """Let this befall it; False: not now, but soon."""
        match kind:
            case "kill node" | "stop node":
                pause_s = random.uniform(*_DOWN_S)
                return self._once_up(lambda: self._down_and_up(kind, pause_s))
            case "freeze node":
                pause_s = random.uniform(*_FROZEN_S)
                return self._once_up(lambda: self._freeze(pause_s))
            case "silence":
                if not self._link.silence(random):
                    return False
                self.tell(kind, "link")
            case _:
                self._link.cut(_CUTS[kind])
        return True

    def _cut(self, when: Cut) -> None:
        self.tell(f"cut {when}", "link")

    def _once_up(self, act: Callable[[], None]) -> bool:
        """False as well where nobody has had the time to do anything since it was down."""
        return time.monotonic() >= self._up_s + _UP_S and self._errand.run(act)

    def _down_and_up(self, kind: str, pause_s: float) -> None:
        self.tell("node down", kind)
        if kind == "kill node":
            self._node.kill()
        else:
            self._node.stop(_STOPS_S)
        threading.Event().wait(pause_s)
        self._node.start()
        self._up_s = time.monotonic()
        self.tell("node up", kind)

    def _freeze(self, pause_s: float) -> None:
        self._node.pause()
        self.tell("alarm", "freeze node")
        threading.Event().wait(pause_s)
        self.tell("alarm over", "freeze node")
        self._node.go_on()
        self._up_s = time.monotonic()

    def heal(self) -> None:
        """Wait until it is up, and cut nothing any more. Who is silent stays so."""
        self._link.heal()
        self._errand.wait()

    def said(self) -> str:
        """What it has written to its log since it was asked last."""
        text = self._node.log()
        new, self._told = text[self._told :], len(text)
        return new

    def close(self, *, keep: bool = False) -> None:
        """Close the link and end it; its data go, or are kept."""
        with ExitStack() as closing:
            closing.callback(self._node.leave if keep else self._node.close)
            closing.callback(self._link.close)
            closing.callback(self.heal)
