"""Declaring schedules: ``app.every`` and ``app.cron``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

from duly.errors import ConfigurationError, InvalidMessage
from duly.message import Message, Topic, check_name, is_whole
from duly.schedules.ticks import Cron, Every, Ticks

T = TypeVar("T")

Misfire = Literal["latest"] | int

MOST_MISSED = 1_000


@dataclass(frozen=True, slots=True)
class Schedule:
    """A message for each tick: which topic, which payload, and what missed ticks come to.

    ``payload`` is the same for all, or a function of the tick. ``most`` ticks are published at
    once after a downtime, the latest; those before them are dropped.
    """

    name: str
    ticks: Ticks
    topic: Topic[Any]
    payload: Any
    most: int

    def message(self, tick_ms: int, source: str) -> Message[Any]:
        """The message of a tick, the same identity in every process. Raises `PublishFailed`, and
        what the payload's function raises.
        """
        tick = datetime.fromtimestamp(tick_ms / 1000, self.ticks.zone)
        payload = self.payload(tick) if callable(self.payload) else self.payload
        return self.topic.message(payload, source=source, id=self.id_of(tick_ms))

    def key(self, source: str) -> str:
        """The name by which a broker remembers it for an app."""
        return f"{source}/{self.name}"

    def around(self, reached_ms: int | None, now_ms: int) -> tuple[int | None, int | None]:
        """The last tick that was published, and the next one to be, or None: of a schedule that
        is at ``reached_ms`` (None: it has not begun).
        """
        at_ms = now_ms if reached_ms is None else reached_ms
        # Where it began is seldom a tick, and was not published even then.
        before = next(self.ticks.after(at_ms - 1), None)
        last = reached_ms if before == reached_ms else None
        return last, next(self.ticks.after(at_ms), None)

    def id_of(self, tick_ms: int) -> str:
        """The id of a tick's message: the schedule's name and the time in UTC."""
        tick = datetime.fromtimestamp(tick_ms / 1000, UTC)
        return f"{self.name}/{tick.isoformat().removesuffix('+00:00')}Z"


class Timetable:
    """Schedules by name, in the order declared."""

    def __init__(self) -> None:
        self._schedules: dict[str, Schedule] = {}

    @property
    def schedules(self) -> Sequence[Schedule]:
        """Every declared schedule, in the order declared."""
        return tuple(self._schedules.values())

    def every(
        self,
        period: str | int,
        topic: Topic[T],
        payload: T | Callable[[datetime], T],
        /,
        *,
        name: str,
        misfire: Misfire = "latest",
    ) -> None:
        """Publish to ``topic`` every ``period``: ``"90s"``, ``"5m"``, ``"2h"``, ``"1d"``, or
        whole seconds.

        Ticks are the multiples of the period since 1970 UTC. ``payload`` is a payload, or a
        function of the tick (a datetime in UTC), which may be called more than once for a tick.
        Each tick becomes one message, whose id is the name and the tick, however many workers
        there are; ``name`` outlives the code, as a consumer's does. ``misfire`` says what becomes
        of ticks that passed while no worker ran: ``"latest"`` publishes the last of them, a
        number that many of the last. Raises `ConfigurationError`.
        """
        where = self._free(name)
        self._schedule(name, Every.of(period, where), topic, payload, misfire)

    def cron(
        self,
        expression: str,
        topic: Topic[T],
        payload: T | Callable[[datetime], T],
        /,
        *,
        name: str,
        tz: str,
        misfire: Misfire = "latest",
    ) -> None:
        """Publish to ``topic`` by a cron expression, ``"0 9 * * mon"``, in the time zone ``tz``.

        As `every`; the tick that ``payload`` is called with is in that zone. Needs
        ``pip install duly[cron]``. Where the clocks of the zone change, a fixed time ticks once.
        """
        where = self._free(name)
        self._schedule(name, Cron.of(expression, tz, where), topic, payload, misfire)

    def _free(self, name: str) -> str:
        check_name("schedule", name)
        if name in self._schedules:
            raise ConfigurationError(
                f"schedule {name!r} is declared twice. By its name duly remembers which ticks "
                "were published: give the second one another."
            )
        return f"schedule {name!r}"

    def _schedule(
        self, name: str, ticks: Ticks, topic: Topic[Any], payload: Any, misfire: Any
    ) -> None:
        where = f"schedule {name!r}"
        most = 1 if misfire == "latest" else misfire
        if not is_whole(most) or not 1 <= most <= MOST_MISSED:
            raise ConfigurationError(
                f'{where}: misfire={misfire!r}: give "latest", or how many of the latest missed '
                f"ticks to publish, 1 to {MOST_MISSED:,}"
            )
        if not isinstance(topic, Topic):
            raise ConfigurationError(f"{where}: {topic!r} is no topic. Give a duly.Topic.")
        schedule = Schedule(name, ticks, topic, payload, most)
        if not callable(payload):
            try:
                schedule.message(0, "schedule")
            except InvalidMessage as error:
                raise ConfigurationError(f"{where}: {error}") from error
        self._schedules[name] = schedule
