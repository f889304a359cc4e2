"""`running`: an application at work within a test, step by step."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar

from duly import events
from duly.app import App
from duly.broker import Broker
from duly.contract import Contract
from duly.errors import ConfigurationError
from duly.inspection import DeadLetter, Incident, SubscriptionState
from duly.message import Message, Topic, due_ms
from duly.publishing.direct import all_accepted
from duly.schedules import Scheduler, ticking
from duly.store import Store, outbox_of, parked_beside
from duly.testing.faulty import Faults
from duly.testing.harness.clock import Clock, told_by
from duly.testing.harness.declared import (
    check_consumer,
    check_kind,
    check_overrides,
    check_topic,
)
from duly.testing.harness.drive import Drive
from duly.testing.harness.failures import Failure, Failures
from duly.testing.harness.observer import Observer, decoded, letters_of
from duly.testing.harness.places import open_place, working_with
from duly.testing.harness.seams import Seen, seen
from duly.testing.harness.stepped import Loop, SteppedWorker, TestsLoop, lane_of
from duly.worker.steps import Counts

T = TypeVar("T")
WhenFailing = Literal["raise", "expected"]


def running(
    app: App,
    *,
    broker: str | Broker | None = None,
    store: str | Store | None = None,
    consumers: Sequence[str] | None = None,
    overrides: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
    faults: Faults | None = None,
    failures: WhenFailing = "raise",
    clock: Clock | None = None,
    folder: Path | None = None,
    seed: int = 0,
) -> Running:
    """Let an application work within a test: ``with running(app) as t``, or ``async with``.

    The consumers run on real lanes, admitted as they would be, whenever the test says
    ``t.drain()``, and in an ``async with`` ``await t.adrain()``. Nothing runs in between. What
    the app named as its broker and store is neither opened nor touched, and afterwards the app
    is as it was before.

    - ``broker``, ``store``: URLs or open ones. Left out: new ones of the kind that the app names
      and in its arrangement (SQLite files of the test's own, or in memory).
    - ``consumers``: the names of those to work; all, if left out.
    - ``overrides``: other factories for dependencies, beside ``app.overrides``; each for one
      that a consumer uses.
    - ``faults``: what is to go wrong at broker and store; see `Faults`. Two workers compete
      then, stepped in an order that ``seed`` decides. What ``t`` itself publishes is spared.
      At the end of the block `NotHit` is raised for those of ``at`` that have not hit.
    - ``failures``: "raise" lets a handler's exception surface in ``drain``; "expected" does not.
    - ``clock``: left out, time stands still until ``t.advance`` or ``t.drain(advance=True)``
      moves it. Share one, ``running(other, broker=t.broker, clock=t.clock)``, for two apps.
    - ``folder``: where files are made, such as pytest's ``tmp_path``; a temporary one otherwise.
    - ``seed``: of the random part of retries' delays, and of the order under faults.

    Raises `ConfigurationError` (`ContractRefused`) where the app cannot run there.
    """
    return Running(
        app,
        broker=broker,
        store=store,
        consumers=consumers,
        overrides=overrides,
        faults=faults,
        failures=failures,
        clock=clock,
        folder=folder,
        seed=seed,
    )


class RunApp(Protocol):
    """What the fixtures ``duly_running`` and ``duly_faulty`` are: `running`, set up for a test."""

    def __call__(self, app: App, **options: Any) -> Running:
        """As `running`: for ``with`` or ``async with``."""
        ...


class Running:
    """An application at work within a test; see `running`."""

    def __init__(
        self,
        app: App,
        *,
        broker: str | Broker | None,
        store: str | Store | None,
        consumers: Sequence[str] | None,
        overrides: Mapping[Callable[..., Any], Callable[..., Any]] | None,
        faults: Faults | None,
        failures: WhenFailing,
        clock: Clock | None,
        folder: Path | None,
        seed: int,
    ) -> None:
        self.app = app
        self.faults = faults
        self.contract: Contract | None = None
        self._named = (broker, store)
        self._only = consumers
        self._overrides = dict(overrides or {})
        self._when_failing = _checked(failures)
        self._given_clock = clock
        self._folder = folder
        self._seed = seed
        self._seen = Seen()
        self._failures = Failures((lambda _: False) if faults is None else faults.made)
        self._retries: list[float] = []
        self._worker: SteppedWorker | None = None
        self._scheduler: Scheduler | None = None
        self._exits = ExitStack()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_open = False

    # --- from beginning to end

    def __enter__(self) -> Self:
        self._open(None)
        return self

    def __exit__(self, *raised: object) -> None:
        self._close()
        self._check_faults(raised)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._open, TestsLoop(self._loop))
        return self

    async def __aexit__(self, *raised: object) -> None:
        await asyncio.to_thread(self._close)
        self._check_faults(raised)

    def _open(self, loop: Loop | None) -> None:
        if self._is_open:
            raise ConfigurationError("this running(app) was entered before: call running(app) anew")
        self._is_open = True
        try:
            self._open_all(loop)
        except BaseException:
            self._close()
            raise

    def _open_all(self, loop: Loop | None) -> None:
        app, exits = self.app, self._exits
        check_overrides(app, self._overrides)
        place = open_place(app, *self._named, self._given_clock, self._folder, exits)
        self.broker, self.store, self.clock = place.broker, place.store, place.clock
        exits.enter_context(told_by(self.clock))
        if self.faults is not None:
            self.faults.surrounded(self._stand_still)
        broker, store = seen(self.broker, self.store, self._seen, self.faults)
        exits.enter_context(working_with(app, broker, store, self._overrides))
        outbox = None
        if store is not None and self.store is not None:
            apart = store.capabilities.database != broker.capabilities.database
            outbox = outbox_of(self.store) if apart else None
        self._observer = Observer(self.broker, self._seen)
        self._observer.watch(app.topics)
        if app.consumers:
            worker = self._worker = SteppedWorker(
                app,
                self.clock,
                consumers=self._only,
                loop=loop,
                crews=1 if self.faults is None else 2,
                seed=self._seed,
                watch=self._watch,
            )
            exits.callback(worker.end)
            worker.start()
            self.contract = worker.contract
        self._drive = Drive(
            app,
            self._worker,
            self.broker,
            outbox,
            self.clock,
            self._seen,
            self._failures,
            self.faults,
            self._seed,
        )
        self._drive.retries = self._retries
        self._drive.parked = parked_beside(self.broker, self.store)
        self._begin_schedules()

    def _begin_schedules(self) -> None:
        """Their time begins now, as it does for a worker that starts. No fault hits them."""
        app = self.app
        if not app.schedules:
            return
        broker = ticking(self.broker, app.schedules)
        app.backends()  # makes their topics known, also where no consumer is worked
        self._scheduler = Scheduler(app.schedules, broker, app.name, wall_ms=self.clock.wall_ms)
        self._scheduler.publish_due()

    def _close(self) -> None:
        if self.faults is not None:
            self.faults.heal()
        self._exits.close()

    def _check_faults(self, raised: Sequence[object]) -> None:
        if self.faults is not None and raised[0] is None:
            self.faults.check()

    # --- publishing, as somebody outside

    def publish(
        self,
        topic: Topic[T],
        payload: T,
        *,
        id: str | None = None,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        delay_s: float | None = None,
        due: datetime | None = None,
        source: str | None = None,
    ) -> str:
        """Publish a message as another service would; returns its id.

        ``source`` is that service's name, left out the app's own. It is in the broker when this
        returns, under every guarantee, and no fault hits it. What the app publishes by itself
        goes its own way.
        """
        message = topic.message(
            payload,
            source=source or self.app.name,
            id=id,
            key=key,
            headers=headers,
            due_ms=due_ms(topic.name, delay_s, due),
        )
        self._put(topic, [message])
        return message.id

    def publish_many(
        self, topic: Topic[T], payloads: Iterable[T], *, source: str | None = None
    ) -> Sequence[str]:
        """`publish` for many, in order; returns their ids."""
        messages = topic.messages(payloads, source=source or self.app.name)
        self._put(topic, messages)
        return [message.id for message in messages]

    def _put(self, topic: Topic[Any], messages: Sequence[Message[Any]]) -> None:
        check_topic(self.app, topic, self._seen.topics)
        self._observer.watch([topic])
        all_accepted(self.broker.publish(messages))
        self._seen.messages += [message for message in messages if message.due_ms is not None]

    # --- working

    def drain(
        self,
        *,
        advance: bool = False,
        failures: WhenFailing | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        """Run everything that can be run now, until nothing is left that is due.

        Schedules tick first, and once: what ``t.advance`` or an earlier ``drain`` has made due.
        What handlers publish is handled too. With ``advance`` the clock is moved on to whatever
        is due next, again and again, until nothing waits for its time: every delay has passed
        and every retry was made. With faults, it is also moved over leases that have to run out.

        A handler's exception is raised here as the handler raised it, after its message was
        settled as it should be; what is left is run by the next ``drain``. Not so with
        ``failures="expected"``, and not `Retry` and `Reject`, by which a handler says how a
        message is to end. Raises `DeadLettered` for a message that was given up on without any
        handler having failed, and `NotDrained` after ``timeout_s`` real seconds.
        """
        if self._loop is not None and _is_running(self._loop):
            raise ConfigurationError(
                "t.drain() would stop the event loop that the handlers need: await t.adrain()"
            )
        self._drain(advance, failures, timeout_s)

    async def adrain(
        self,
        *,
        advance: bool = False,
        failures: WhenFailing | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        """`drain` for ``async def`` tests. ``async def`` handlers run on the test's own loop."""
        await asyncio.to_thread(self._drain, advance, failures, timeout_s)

    def _drain(self, advance: bool, failures: WhenFailing | None, timeout_s: float) -> None:
        if not self._is_open:
            raise ConfigurationError("nothing runs yet: with running(app) as t")
        expected = _checked(failures or self._when_failing) == "expected"
        if self._scheduler is not None:
            self._scheduler.publish_due()
        self._drive.run(advance=advance, expected=expected, timeout_s=timeout_s)
        died = self.faults is not None and bool(self.faults.hits)
        self._failures.tell_of_letters(self.dead(), expected=expected or died)

    def advance(self, seconds: float) -> None:
        """Move the clock; nothing runs until the next ``drain``."""
        if not self.clock.stands_still:
            raise ConfigurationError(
                "this broker goes by the machine's clock, which a test cannot move: name it by "
                "its URL, or drain(advance=True), which waits"
            )
        self.clock.advance(seconds)

    # --- looking

    def published(self, topic: Topic[T]) -> Sequence[Message[T]]:
        """Every message of a topic that is in the broker, decoded, in the broker's order; behind
        them those that are not due yet. Rolled back, a message is not among them. Raises
        `ConfigurationError` for a topic that the app has nothing to do with.
        """
        check_topic(self.app, topic, self._seen.topics)
        return self._observer.read(topic)

    def payloads(self, topic: Topic[T]) -> list[T]:
        """The payloads of what was `published`."""
        return [message.payload for message in self.published(topic)]

    def dead(self, consumer: str | None = None) -> Sequence[DeadLetter]:
        """The dead letters of one consumer or of all, oldest first, decoded where they can be."""
        if consumer is not None:
            check_consumer(self._counts(), consumer)
        letters = letters_of(self.broker, self.store, self.app, consumer)
        topics = {topic.name: topic for topic in self.app.topics}
        return [
            DeadLetter(
                letter.subscription,
                decoded(topics.get(letter.message.topic), letter.message),
                letter.error,
                letter.attempts,
                letter.dead_ms,
            )
            for letter in letters
        ]

    @property
    def failures(self) -> Sequence[Failure]:
        """Every time a handler raised, oldest first: message, attempt, exception."""
        return tuple(self._failures.all)

    def incidents(self, kind: str | None = None) -> Sequence[Incident]:
        """What was not plain success, oldest first; see `duly.inspection.KINDS`."""
        if kind is not None:
            check_kind(kind)
        look: Any = self.broker
        found: Sequence[Incident] = look.incidents(None, kind, 10_000)
        return list(reversed(found))

    def waiting(self, consumer: str) -> SubscriptionState:
        """What a consumer has before it, summed over its topics."""
        check_consumer(self._counts(), consumer)
        states = [state for state in self._drive.states() if state.name == consumer]
        return SubscriptionState(
            consumer,
            ", ".join(state.topic for state in states),
            *(sum(getattr(s, name) for s in states) for name in _COUNTED),
        )

    def counts(self, consumer: str) -> Counts:
        """What a consumer has done: claimed, handled, failed, repeats dropped, ..."""
        check_consumer(there := self._counts(), consumer)
        return there[consumer]

    def _counts(self) -> Mapping[str, Counts]:
        return {} if self._worker is None else self._worker.counts()

    @contextmanager
    def connection(self) -> Iterator[Any]:
        """The store's connection, as handlers get it, within a transaction that commits at the
        end of the block: to make tables before, and to look at effects after. No fault hits it.
        """
        if self.store is None:
            raise ConfigurationError(f"app {self.app.name!r} has no store to connect to")
        session = self.store.begin(None)
        try:
            yield session.connection
            session.commit()
        except BaseException:
            session.rollback()
            raise

    # --- parts

    def _watch(self, event: events.Event) -> None:
        if isinstance(event, events.HandlerFailed):
            message, consumer = event.delivery.message, event.consumer
            topics = {topic.name: topic for topic in self.app.topics}
            self._failures.all.append(
                Failure(
                    consumer,
                    decoded(topics.get(message.topic), message),
                    event.delivery.attempt,
                    event.error,
                    event.retry_in_s,
                )
            )
            if event.retry_in_s is not None:
                self._retries.append(self.clock() + event.retry_in_s)

    def _stand_still(self) -> None:
        """A process stands still, stopped past its leases."""
        lanes = () if self._worker is None else self._worker.lanes
        leases = [lane_of(driven).consumer.options.lease_s for driven in lanes]
        self.clock.advance(max(leases, default=0.0) + 0.001)


_COUNTED = ("backlog", "in_flight", "parked", "dead")


def _checked(failures: str) -> WhenFailing:
    if failures not in ("raise", "expected"):
        raise ConfigurationError(f'failures={failures!r}; there are "raise", "expected"')
    return failures  # type: ignore[return-value]


def _is_running(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False
