"""Moments as people write them: an age, a time of day with its date, or a position."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import click

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_MOST_S = 100 * 366 * 86400.0
_LAST_POSITION = (1 << 63) - 1


def age_s(text: str) -> float | None:
    """The seconds of ``90s``, ``15m``, ``2h`` or ``7d``; None for what is no age."""
    try:
        seconds = float(text[:-1]) * _UNITS[text[-1:]]
    except (KeyError, ValueError):
        return None
    return seconds if 0 <= seconds <= _MOST_S else None


class Age(click.ParamType[float]):
    """``90s``, ``15m``, ``2h``, ``7d``."""

    name = "age"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The age in seconds."""
        found = age_s(str(value))
        if found is None:
            self.fail(f"{value!r} is no age: write 90s, 15m, 2h or 7d", param, ctx)
        return found


Moment = datetime | int | Literal["earliest"]


class Place(click.ParamType[Moment]):
    """``earliest``, an age, an ISO 8601 time (of this machine's zone where it names none), or a
    position.
    """

    name = "time|position"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Moment:
        """A time, a position, or the word."""
        text = str(value)
        if text == "earliest":
            return "earliest"
        if text.isascii() and text.isdigit() and len(text) < len("9223372036854775807") + 1:
            position = int(text)
            if position <= _LAST_POSITION:
                return position
        seconds = age_s(text)
        if seconds is not None:
            return datetime.now(UTC) - timedelta(seconds=seconds)
        try:
            return datetime.fromisoformat(text).astimezone()
        except (ValueError, OverflowError):
            self.fail(
                f"{value!r} is no place: write earliest, an age (2h), a time "
                "(2026-01-31T12:00:00Z) or a position (from duly trace)",
                param,
                ctx,
            )
