"""What a claim is settled and extended by."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Receipt(msgspec.Struct, frozen=True, gc=False):
    """Of one message. ``generation`` is given to one assignment of one partition, and ``token`` to
    one claim.
    """

    intake: int
    generation: int
    offset: int
    token: int


class SpanReceipt(msgspec.Struct, frozen=True):
    """Of many that were claimed together: offsets, by the generation of their partition."""

    intake: int
    token: int
    parts: tuple[tuple[int, Sequence[int]], ...]

    def each(self) -> list[Receipt]:
        """The receipt of each of them."""
        return [
            Receipt(self.intake, generation, offset, self.token)
            for generation, offsets in self.parts
            for offset in offsets
        ]
