"""One run of the demonstration: workers, a publisher and a killer in step, then the verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import duly
from duly.contract import Run as HowRun
from duly.contract import contract_on
from duly.demo import shop
from duly.demo.book import Book, Kill
from duly.demo.crew import Crew, crew, url
from duly.demo.evidence import open_evidence
from duly.demo.gauge import Gauge, Reach, is_drained
from duly.demo.killer import Killer, Plan
from duly.demo.pace import Pace
from duly.demo.publisher import Publisher, accounts
from duly.demo.result import Deaths, Result, weigh
from duly.demo.verdict import judge

LOOK_S = 0.1
# Nothing moved for this long: the rest will not come, and the verdict says what is missing.
# Longer than a lease, after which whatever a dead worker held is given out again in any case.
STUCK_S = 60.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is published to each topic, how many die, how many work, and the dice."""

    messages: int
    kills: int
    processes: int
    seed: int


@dataclass(frozen=True, slots=True)
class Moment:
    """The run as it stands, for whoever watches."""

    settings: Settings
    seconds: float
    published: int
    reach: Mapping[str, Reach]
    kills: Sequence[Kill]
    phase: str


Watch = Callable[[Moment], None]


@dataclass(slots=True)
class Clock:
    """When the run began, and when each consumer was done."""

    started_at: float = field(default_factory=time.monotonic)
    done_s: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started_at

    def note(self, reach: Mapping[str, Reach]) -> None:
        """Everything is published: note who is done with it."""
        for name, each in reach.items():
            if each.settled == each.logged:
                self.done_s.setdefault(name, self.seconds)


def run(folder: Path, settings: Settings, watch: Watch) -> Result:
    """Run the demonstration in an empty ``folder``. Leaves no process behind, however it ends."""
    with duly.App(shop.app.name, url(folder)) as app, Book(folder) as book:
        _prepare(app, book, settings)
        pace = Pace(settings.kills)
        with crew(folder, settings.processes) as workers, closing(Gauge(folder)) as gauge:
            with _threads(app, book, pace, settings, folder) as (publisher, killer):
                clock = Clock()
                _follow(Course(settings, workers, gauge, publisher, killer, clock, watch), app)
            seconds = clock.seconds
            watch(
                Moment(
                    settings, seconds, publisher.published, gauge.reach(), killer.kills, "judging"
                )
            )
            workers.stop()
    with open_evidence(folder) as evidence:
        judgements = judge(evidence)
        rates = {
            found.consumer: found.handled / max(clock.done_s.get(found.consumer, seconds), 1e-9)
            for found in judgements
        }
        return weigh(judgements, Deaths.of(evidence), seconds, rates)


def _prepare(app: duly.App, book: Book, settings: Settings) -> None:
    """The tables of effects, the accounts, and what the contract says that a crash may cost."""
    with app.transaction() as tx:
        for statement in shop.TABLES.split(";"):
            tx.connection.execute(statement)
        tx.connection.executemany(
            "insert into accounts values (?, ?, ?)", [(a, cents, cents) for a, cents in accounts()]
        )
    book.open_accounts(accounts())
    broker, store = app.backends()
    how = HowRun(supervised=True, processes=settings.processes)
    contract = contract_on(broker, store, shop.app.topics, shop.app.consumers, how)
    book.note_limits((c.name, c.crash_loses, c.crash_repeats) for c in contract.consumers)


@contextmanager
def _threads(
    app: duly.App, book: Book, pace: Pace, settings: Settings, folder: Path
) -> Iterator[tuple[Publisher, Killer]]:
    publisher = Publisher(app, book, pace, settings.messages, settings.seed)
    plan = Plan(settings.messages, shop.app.consumers, settings.seed)
    killer = Killer(folder, book, pace, plan, lambda: not publisher.is_alive())
    publisher.start()
    killer.start()
    try:
        yield publisher, killer
    finally:
        for thread in (killer, publisher):
            thread.stop()
            thread.join()
    for thread in (killer, publisher):
        if thread.error is not None:
            raise thread.error


@dataclass(frozen=True, slots=True)
class Course:
    """Everything that is under way."""

    settings: Settings
    workers: Crew
    gauge: Gauge
    publisher: Publisher
    killer: Killer
    clock: Clock
    watch: Watch

    def show(self, phase: str) -> Mapping[str, Reach]:
        """Tell the watcher how it stands; raises where the run cannot go on."""
        self.workers.check()
        for thread in (self.publisher, self.killer):
            if thread.error is not None:
                raise thread.error
        reach = self.gauge.reach()
        self.watch(
            Moment(
                self.settings, self.clock.seconds, self.publisher.published, reach,
                tuple(self.killer.kills), phase,
            )
        )  # fmt: skip
        return reach


def _follow(course: Course, app: duly.App) -> None:
    """Watch until everything is published and handled, or nothing moves any more."""
    while course.publisher.is_alive():
        course.show("publishing")
        course.publisher.join(LOOK_S)
    # What the at-most-once buffer still holds goes to the log now.
    app.close()
    before: Mapping[str, Reach] = {}
    moved_at = time.monotonic()
    while True:
        reach = course.show("draining")
        course.clock.note(reach)
        if is_drained(reach):
            return
        if reach != before:
            before, moved_at = reach, time.monotonic()
        elif time.monotonic() - moved_at > STUCK_S:
            return
        course.killer.join(LOOK_S)
