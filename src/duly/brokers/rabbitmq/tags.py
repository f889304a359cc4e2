"""`Tags`: what the server holds for us on a channel, and how to say what of it is settled."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any


class Tags:
    """The delivery tags of a channel that the server was not told of, in the order delivered.

    One acknowledgement stands for all up to a tag where all of those are settled.
    """

    def __init__(self) -> None:
        self._settled: dict[int, bool] = {}

    def __len__(self) -> int:
        return len(self._settled)

    def add(self, tag: int) -> None:
        """The next was delivered."""
        self._settled[tag] = False

    def settle(self, tags: Sequence[int]) -> tuple[int | None, Sequence[int]]:
        """These are settled. What to tell the server: one tag that stands for all before it, and
        those to be named singly.
        """
        for tag in tags:
            self._settled[tag] = True
        prefix = list(itertools.takewhile(self._settled.__getitem__, self._settled))
        covered = set(prefix)
        others = [tag for tag in tags if tag not in covered]
        for tag in (*prefix, *others):
            del self._settled[tag]
        return (prefix[-1] if prefix else None), others

    def clear(self) -> None:
        """The channel is gone."""
        self._settled.clear()


def acknowledge(channel: Any, last: int | None, others: Sequence[int]) -> None:
    """Tell the server what `Tags.settle` says."""
    if last is not None:
        channel.basic_ack(last, multiple=True)
    for tag in others:
        channel.basic_ack(tag)
