"""When a schedule ticks: pure, the same in every process, by the wall clock alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from typing import Any, Protocol
from zoneinfo import ZoneInfo

from duly.errors import ConfigurationError

_PERIOD = re.compile(r"(\d+)\s*([smhd])")
_UNIT_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_MOST_MS = 366 * 86_400_000


class Ticks(Protocol):
    """The moments of a schedule, in milliseconds since 1970 UTC, always whole seconds."""

    @property
    def zone(self) -> tzinfo:
        """The time zone in which its moments are told."""
        ...

    def after(self, time_ms: int) -> Iterator[int]:
        """Its ticks later than this, in order."""
        ...

    def since(self, time_ms: int, until_ms: int, most: int) -> list[int]:
        """The latest ``most`` of its ticks later than the one and not later than the other."""
        ...


@dataclass(frozen=True, slots=True)
class Every:
    """Ticks at the multiples of a period since 1970 UTC, so that all processes agree."""

    period_ms: int

    @classmethod
    def of(cls, period: Any, where: str) -> Every:
        """From ``"90s"``, ``"5m"``, ``"2h"``, ``"1d"``, or whole seconds."""
        period_ms = 0
        if isinstance(period, str) and (found := _PERIOD.fullmatch(period.strip())):
            period_ms = int(found[1]) * _UNIT_MS[found[2]]
        elif isinstance(period, int) and not isinstance(period, bool):
            period_ms = period * 1_000
        if not 1_000 <= period_ms <= _MOST_MS:
            raise ConfigurationError(
                f"{where}: every {period!r}: give a whole number of seconds, minutes, hours or "
                'days, such as "90s", "5m", "2h", "1d", from 1 s to 366 days'
            )
        return cls(period_ms)

    def __str__(self) -> str:
        for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000)):
            if self.period_ms % size == 0:
                return f"every {self.period_ms // size}{unit}"
        return f"every {self.period_ms // 1000}s"

    @property
    def zone(self) -> tzinfo:
        """UTC."""
        return UTC

    def after(self, time_ms: int) -> Iterator[int]:
        """As `Ticks.after`."""
        tick_ms = time_ms // self.period_ms * self.period_ms
        while True:
            tick_ms += self.period_ms
            yield tick_ms

    def since(self, time_ms: int, until_ms: int, most: int) -> list[int]:
        """As `Ticks.since`."""
        last = until_ms // self.period_ms
        first = max(time_ms // self.period_ms + 1, last - most + 1)
        return [number * self.period_ms for number in range(first, last + 1)]


@dataclass(frozen=True, slots=True)
class Cron:
    """Ticks by a cron expression in a time zone, across changes of its clocks as Debian's cron.

    A fixed time that the clocks skip ticks once, right after; one that they repeat ticks once, at
    the first. Where minute or hour is a ``*``, it ticks by the time that passes.
    """

    expression: str
    zone: ZoneInfo

    @classmethod
    def of(cls, expression: Any, tz: Any, where: str) -> Cron:
        """Checked. Raises `ConfigurationError`, also where the package cronsim is missing."""
        try:
            from cronsim import CronSim, CronSimError
        except ModuleNotFoundError:
            raise ConfigurationError(
                f"{where}: cron needs the package cronsim: pip install 'duly[cron]'"
            ) from None
        if not isinstance(expression, str) or len(expression.split()) != 5:
            raise ConfigurationError(
                f"{where}: cron {expression!r}: give five fields, minute hour day month weekday, "
                'such as "0 9 * * mon"'
            )
        try:
            zone = ZoneInfo(tz)
        except (TypeError, ValueError, OSError, LookupError):
            raise ConfigurationError(
                f'{where}: tz={tz!r}: give the name of a time zone, such as tz="Europe/Vienna" or '
                'tz="UTC" (from the system, or the package tzdata)'
            ) from None
        try:
            next(CronSim(expression, datetime.now(zone)))
        except CronSimError as error:
            raise ConfigurationError(f"{where}: cron {expression!r}: {error}") from None
        except StopIteration:
            raise ConfigurationError(f"{where}: cron {expression!r} never ticks") from None
        return cls(" ".join(expression.split()), zone)

    def __str__(self) -> str:
        return f"at {self.expression} in {self.zone.key}"

    def after(self, time_ms: int) -> Iterator[int]:
        """As `Ticks.after`."""
        from cronsim import CronSim

        start = datetime.fromtimestamp(time_ms // 1000, self.zone)
        last_ms = time_ms
        for moment in CronSim(self.expression, start):
            tick_ms = int(moment.timestamp()) * 1000
            if tick_ms > last_ms:
                yield tick_ms
                last_ms = tick_ms

    def since(self, time_ms: int, until_ms: int, most: int) -> list[int]:
        """As `Ticks.since`. Goes forward, as the ticks themselves do: backward, a change of the
        clocks would give others.
        """
        kept: list[int] = []
        for tick_ms in self.after(time_ms):
            if tick_ms > until_ms:
                break
            kept.append(tick_ms)
            del kept[:-most]
        return kept
