"""What people ask of a log and do to it: the same on every SQL database.

A broker is an `OperatedLog`, and brings with it how steps are run on its database, and what has
to be done in turn there (`Ground`). The statements are in ``sql/<dialect>_operating.sql``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol, TypeVar

from duly.broker import Outcome, Start
from duly.inspection import DeadLetter, Incident, Selection, SubscriptionState
from duly.inspection.erasing import Whose
from duly.inspection.steering import Steered, Target
from duly.inspection.tracing import Followed, Logged, Trace
from duly.message import Message
from duly.sql import log, looking, mending, schedules, steering, tracing
from duly.sql.eraser import Eraser
from duly.sql.steps import Steps

R = TypeVar("R")


class Ground(Protocol):
    """A database as operations use it: steps in transactions, and some of them in turn.

    The steps that are given are the whole of a transaction; what comes back may do more before.
    """

    def read(self, make_steps: Callable[[], Steps[R]]) -> R:
        """Run steps that only look. Raises `BrokerError`."""
        ...

    def write(self, make_steps: Callable[[], Steps[R]]) -> R:
        """Run steps in a transaction, durable on return."""
        ...

    def now_ms(self) -> int:
        """Milliseconds since 1970 UTC."""
        ...

    def settle_positions(self) -> None:
        """See that whatever is committed stands at its position."""
        ...

    def stir(self) -> None:
        """Something may be claimed now that could not be before: wake who waits."""
        ...

    def mend(self, numbers: Sequence[int], steps: Steps[R]) -> Steps[R]:
        """While nobody claims of the subscriptions of these dead letters."""
        ...

    def steer(self, name: str, steps: Steps[R]) -> Steps[R]:
        """While nobody claims of this subscription, nor anybody else changes it."""
        ...

    def take_back(self, name: str, steps: Steps[R]) -> Steps[R]:
        """Once nobody is in the middle of settling what is held of it; it is held back."""
        ...

    def tidy(self, name: str, steps: Steps[R]) -> Steps[R]:
        """While nobody brings back dead letters of what is being rewound."""
        ...

    def erase(self, steps: Steps[R]) -> Steps[R]:
        """While nobody publishes under an identity."""
        ...

    def await_holders(self, positions: Sequence[int]) -> None:
        """Until whoever was ending a claim on one of these has done so."""
        ...


class OperatedLog(ABC):
    """The operating half of a broker whose log is in a SQL database."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground

    @abstractmethod
    def _publish_steps(self, messages: Sequence[Message[Any]]) -> Steps[list[Outcome]]:
        """Publish, as part of a transaction."""

    def record_drops(self, topic: str, count: int) -> None:
        """Make visible that ``count`` at-most-once publishes were never stored."""
        now_ms = self._ground.now_ms()
        self._ground.write(lambda: log.record_drops(topic, count, now_ms))

    # --- looking inside: `duly.inspection.Inspection`

    def subscriptions(self) -> Sequence[SubscriptionState]:
        """One state for each topic of each subscription, by name."""
        return self._ground.read(looking.subscriptions)

    def dead_letters(
        self, subscription: str | None = None, limit: int = 100
    ) -> Sequence[DeadLetter]:
        """The latest dead letters, newest first."""
        return self.select(Selection(subscription), limit)

    def incidents(
        self, subscription: str | None = None, kind: str | None = None, limit: int = 100
    ) -> Sequence[Incident]:
        """The latest incidents, newest first."""
        return self._ground.read(lambda: looking.incidents(subscription, kind, limit))

    def incident_counts(self) -> Mapping[tuple[str, str], int]:
        """How many messages met which kind of incident."""
        return self._ground.read(looking.incident_counts)

    def oldest(self) -> Mapping[tuple[str, str], int]:
        """When the oldest message was made that (subscription, topic) has before it."""
        return self._ground.read(looking.oldest)

    def published(self) -> Mapping[str, int]:
        """How many messages each topic ever stored; see `duly.inspection.counting.Counting`."""
        return self._ground.read(looking.published)

    # --- mending: `duly.inspection.Mending`

    def select(self, which: Selection, limit: int) -> Sequence[DeadLetter]:
        """The dead letters that are meant, the highest number first."""
        return self._ground.read(lambda: looking.dead_letters(which, limit))

    def replay(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """Deliver dead letters again, in one transaction; returns those that are gone."""
        return self._mend(letters, mending.replay)

    def discard(self, letters: Sequence[DeadLetter]) -> Sequence[DeadLetter]:
        """Remove dead letters for good, in one transaction; returns those that are gone."""
        return self._mend(letters, mending.discard)

    def _mend(
        self,
        letters: Sequence[DeadLetter],
        mend: Callable[[Sequence[int], int], Steps[list[int]]],
    ) -> Sequence[DeadLetter]:
        ground, numbers = self._ground, [letter.number for letter in letters]
        now_ms = ground.now_ms()
        gone = set(ground.write(lambda: ground.mend(numbers, mend(numbers, now_ms))))
        ground.stir()
        return [letter for letter in letters if letter.number in gone]

    # --- steering: `duly.inspection.steering.Steering`

    def recorded(self) -> Mapping[str, str]:
        """Every subscription by name, with the guarantee it was made with."""
        return self._ground.read(steering.recorded)

    def steered(self) -> Sequence[Steered]:
        """The subscriptions that are held back."""
        return self._ground.read(steering.steered)

    def pause(self, subscription: str) -> bool:
        """Let nothing of it be claimed; whether it was not paused before."""
        now_ms = self._ground.now_ms()
        return self._steer(subscription, lambda: steering.pause(subscription, now_ms))

    def resume(self, subscription: str) -> bool:
        """Let it be claimed again; whether it was paused."""
        now_ms = self._ground.now_ms()
        return self._steer(subscription, lambda: steering.resume(subscription, now_ms))

    def targets(self, subscription: str, to: datetime | int | None) -> Sequence[Target]:
        """Where a rewind would begin."""
        self._ground.settle_positions()
        return self._ground.read(lambda: steering.targets(subscription, to))

    def rewind(
        self, subscription: str, targets: Sequence[Target], epoch: str | None, *, quiet: bool
    ) -> bool:
        """Take it back, and hold it until `finish`."""
        ground, now_ms = self._ground, self._ground.now_ms()
        if not self._steer(
            subscription,
            lambda: steering.begin_rewind(subscription, targets, epoch, now_ms, quiet=quiet),
        ):
            return False
        ground.write(
            lambda: ground.take_back(subscription, steering.take_back(subscription, targets))
        )
        return True

    def drop(self, subscription: str) -> bool:
        """Remove it; whether it was there."""
        now_ms = self._ground.now_ms()
        return self._steer(subscription, lambda: steering.drop(subscription, now_ms))

    def tidy(self, subscription: str, limit: int) -> int:
        """Remove some of what a rewind or a removal left behind."""
        ground, now_ms = self._ground, self._ground.now_ms()
        return ground.write(
            lambda: ground.tidy(subscription, steering.tidy(subscription, limit, now_ms))
        )

    def finish(self, subscription: str) -> None:
        """Let a rewound subscription go."""
        self._steer(subscription, lambda: steering.finish(subscription))

    def _steer(self, subscription: str, make_steps: Callable[[], Steps[R]]) -> R:
        done = self._ground.write(lambda: self._ground.steer(subscription, make_steps()))
        self._ground.stir()
        return done

    # --- tracing and following: `duly.inspection.tracing`

    def trace(self, id: str, source: str, topic: str | None = None) -> Sequence[Trace]:
        """What is kept of the life of a message."""
        self._ground.settle_positions()
        return self._ground.read(lambda: tracing.trace(id, source, topic))

    def caused_by(self, cause: str, limit: int) -> Sequence[Logged]:
        """The kept messages that name this as what caused them."""
        self._ground.settle_positions()
        return self._ground.read(lambda: tracing.caused_by(cause, limit))

    def mark(self, topic: str, start: Start) -> tracing.Mark:
        """Where to begin following a topic."""
        self._ground.settle_positions()
        return self._ground.read(lambda: tracing.mark(topic, start))

    def follow(self, topic: str, mark: tracing.Mark, limit: int) -> Followed:
        """What was published to a topic since."""
        self._ground.settle_positions()
        return self._ground.read(lambda: tracing.follow(topic, mark, limit))

    # --- erasing: `duly.inspection.erasing.Erasing`

    def holdings(self, whose: Whose) -> int:
        """How many copies of a person's messages are kept here."""
        self._ground.settle_positions()
        return Eraser(self._ground, whose).holdings()

    def erase(self, whose: Whose) -> Iterator[int]:
        """Remove them, some at a time."""
        self._ground.settle_positions()
        yield from Eraser(self._ground, whose).erase()

    # --- schedules: `duly.schedules.Ticking`

    def reached(self, schedule: str, now_ms: int) -> int:
        """The last tick published; ``now_ms`` where the schedule is new."""
        found = self._ground.read(lambda: schedules.find(schedule))
        if found is None:
            found = self._ground.write(lambda: schedules.start(schedule, now_ms))
        return found

    def ticked(self) -> Mapping[str, int]:
        """How far each schedule is."""
        return self._ground.read(schedules.every)

    def tick(
        self, schedule: str, reached_ms: int, to_ms: int, messages: Sequence[Message[Any]]
    ) -> Sequence[Outcome] | None:
        """Store a tick's messages and move the schedule on, in one transaction."""
        outcomes = self._ground.write(
            lambda: schedules.tick(schedule, reached_ms, to_ms, self._publish_steps(messages))
        )
        self._ground.stir()
        return outcomes
