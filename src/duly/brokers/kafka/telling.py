"""`Telling`: what the group knows of who may start what, for claims that do not ask each time."""

from __future__ import annotations

from duly.brokers.kafka.extent import NOWHERE, Extent


class Telling:
    """Of one partition: where somebody may be about to start what is there, as the group was told
    last, and as it is being told. With the intake's lock held.
    """

    __slots__ = ("_sent", "doubts", "known")

    def __init__(self, announced: Extent) -> None:
        self.known = self._sent = announced
        # How often it was doubted whether the partition is still this process's.
        self.doubts = 0

    def covers(self, offset: int) -> bool:
        """Whether the group knows, and goes on to know, that this one may have been started."""
        return (self.known & self._sent).covers(offset)

    def doubt(self) -> None:
        """Others may have it by now: nothing is started that the group is not asked about anew."""
        self.doubts += 1
        self.known = NOWHERE

    def sent(self, announced: Extent) -> int:
        """This is on its way to the group, to be told with what this returns."""
        # Nobody knows whether what was sent before it, and not answered, was taken.
        self._sent &= announced
        return self.doubts

    def told(self, announced: Extent, doubts: int) -> None:
        """The group has it. What it was asked before a doubt says nothing about that."""
        if doubts == self.doubts:
            self.known = self._sent = announced
