"""The RabbitMQ node of a run, the link to it, and what befalls both."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import msgspec

from duly.errors import ConfigurationError
from duly.testing.chaos.errand import Errand
from duly.testing.chaos.link import Cut, Frames, Link
from duly.testing.chaos.server import Tell, nothing

if TYPE_CHECKING:
    from duly.testing.rabbitmq import PrivateNode

COUNTS = "queues.json"
"""In the folder of a round: how many messages are in each queue."""

# A connection that is silent for twice to three times as long is given up, by either side; then
# somebody has to take up what was held by it.
HEARTBEAT_S = 2
SILENT_S = 5.0 * HEARTBEAT_S
_UP_S = 4.0
_DOWN_S = (0.0, 0.8)
_ALARM_S = (0.3, 1.5)
_SETTLES_S = 60.0
# So often counts are brought up to date that `messages` tells.
_COUNTS_MS = 300

# By name: what raises an alarm, and what ends it.
ALARMS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "memory alarm": (
        ("set_vm_memory_high_watermark", "absolute", "1"),
        ("set_vm_memory_high_watermark", "0.4"),
    ),
    "disk alarm": (("set_disk_free_limit", "900000GB"), ("set_disk_free_limit", "1MB")),
}


class Node:
    """One of the run's own, which can be killed, with a link that can be cut.

    ``tell`` is whoever is to hear of faults. Raises `ConfigurationError` where none is installed.
    """

    strikes = frozenset(
        {
            *("kill node", "stop node", *ALARMS, "silence"),
            *("cut before publish", "cut after publish", "cut before ack"),
        }
    )
    silent_s = SILENT_S
    pace_s = (0.05, 0.45)
    takes_aim = False
    more_rest_s = 0.0

    def __init__(self) -> None:
        try:
            from duly.testing.rabbitmq import PrivateNode
        except ModuleNotFoundError as missing:
            raise ConfigurationError(
                f"RabbitMQ needs the driver amqp ({missing}): pip install 'duly[rabbitmq]'"
            ) from missing
        self.tell: Tell = nothing
        self._told = 0
        self._over: list[str] = []
        self._up_s = 0.0
        self._errand = Errand()
        counts = f"-rabbit quorum_tick_interval {_COUNTS_MS}"
        self._node: PrivateNode = PrivateNode("disk_free_limit.absolute = 1MB", arguments=counts)
        self._node.start()
        self._link = Link("127.0.0.1", self._node.port, self._cut, Frames)

    @property
    def folder(self) -> str:
        """Where its data are."""
        return str(self._node.folder)

    def url(self, namespace: str, *, at_rest: bool = False) -> str:
        """A namespace there: for processes of the run, or past the link for who looks on."""
        port = self._node.port if at_rest else self._link.port
        named = f"?namespace={namespace}&heartbeat={HEARTBEAT_S}"
        return f"amqp://guest:guest@127.0.0.1:{port}/{named}"

    def settle(self) -> None:
        """Wait until it remembers every queue: killed before, it comes back with queues that answer
        nothing.
        """
        until = time.monotonic() + _SETTLES_S
        while not self._node.is_settled():
            if time.monotonic() > until:
                raise AssertionError(f"the queues do not get to disk:\n{self._node.log()[-2000:]}")
            time.sleep(0.1)

    def tell_of(self, namespace: str, folder: Path, *, at_rest: bool) -> None:
        """Write down how many messages are in each queue, claimed or not. While somebody is at work
        they are counted twice, since counts are late: what moves would be seen nowhere.
        """
        if at_rest:
            time.sleep(2 * _COUNTS_MS / 1000)
        early = {} if at_rest else self._node.messages()
        counts = {
            name: max(count, early.get(name, 0))
            for name, count in self._node.messages().items()
            if name.startswith(f"{namespace}/")
        }
        (folder / COUNTS).write_bytes(msgspec.json.encode(counts))

    def drop(self, namespace: str) -> None:
        """Delete the queues of a namespace before another is worked; its exchanges cost nothing and
        go with the node.
        """
        self._over.append(namespace)

    def sweep(self) -> None:
        """Delete what was dropped."""
        over, self._over = self._over, []
        if not over:
            return
        with self._node.connected() as link:
            for name in self._node.messages():
                if name.partition("/")[0] in over:
                    link.call(partial(_delete, queue=name))

    # --- what befalls it

    def strike(self, kind: str, random: Random) -> bool:
        """Let this befall it; False: not now, but soon."""
        match kind:
            case "kill node" | "stop node":
                return self._take_down(kind, random.uniform(*_DOWN_S))
            case "memory alarm" | "disk alarm":
                pause_s = random.uniform(*_ALARM_S)
                return self._errand.run(lambda: self._raise_alarm(kind, pause_s))
            case "silence":
                if not self._link.silence(random):
                    return False
                self.tell(kind, "link")
            case "cut before publish":
                self._link.cut("before publish")
            case "cut after publish":
                self._link.cut("after publish")
            case "cut before ack":
                self._link.cut("before ack")
            case _:
                raise ValueError(f"{kind!r} is no strike")
        return True

    def _cut(self, when: Cut) -> None:
        self.tell(f"cut {when}", "link")

    def _take_down(self, kind: str, pause_s: float) -> bool:
        """False as well where nobody has had the time to do anything since it was."""
        if time.monotonic() < self._up_s + _UP_S or not self._node.is_settled():
            return False
        return self._errand.run(lambda: self._down_and_up(kind, pause_s))

    def _down_and_up(self, kind: str, pause_s: float) -> None:
        self.tell("node down", kind)
        if kind == "kill node":
            self._node.kill()
        else:
            self._node.stop()
        threading.Event().wait(pause_s)
        self._node.start()
        self._up_s = time.monotonic()
        self.tell("node up", kind)

    def _raise_alarm(self, kind: str, pause_s: float) -> None:
        raised, ended = ALARMS[kind]
        self._node.control(*raised)
        self.tell("alarm", kind)
        threading.Event().wait(pause_s)
        # Before it is: publishers go on while the control program has not returned yet.
        self.tell("alarm over", kind)
        self._node.control(*ended)

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


def _delete(connection: Any, queue: str) -> None:
    channel = connection.channel()
    channel.queue_delete(queue)
    channel.close()
