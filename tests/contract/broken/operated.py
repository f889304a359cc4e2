"""Mistakes in what schedules, counts and people ask for, beside publishing and consuming."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from duly.broker import Delivery, Knows, SubscribeOptions
from duly.errors import PublishFailed
from duly.guarantees import Guarantee
from duly.inspection.survey import Peril, Survey, Surveys
from duly.testing.conformance.memory import DATABASE
from tests.contract.broken.coats import Broken, Coat
from tests.contract.broken.mistake import Mistake
from tests.contract.subjects import SQLITE, SQLITE_STORE

# --- schedules


class TicksInTwoSteps(Broken):
    """Messages first, then the memory of them."""

    def tick(self, schedule: str, reached_ms: int, to_ms: int, messages: Sequence[Any]):
        outcomes = self.inner.publish(messages)
        if any(isinstance(outcome, PublishFailed) for outcome in outcomes):
            raise next(outcome for outcome in outcomes if isinstance(outcome, PublishFailed))
        return outcomes if self.inner.tick(schedule, reached_ms, to_ms, ()) is not None else None


class RemembersBeforeItPublishes(Broken):
    """The memory first, then the messages."""

    def tick(self, schedule: str, reached_ms: int, to_ms: int, messages: Sequence[Any]):
        if self.inner.tick(schedule, reached_ms, to_ms, ()) is None:
            return None
        for outcome in (outcomes := self.inner.publish(messages)):
            if isinstance(outcome, PublishFailed):
                raise outcome
        return outcomes


class BeginsAtEveryStart(Broken):
    def reached(self, schedule: str, now_ms: int):
        self.inner.reached(schedule, now_ms)
        return now_ms


class OneScheduleForAll(Broken):
    def reached(self, schedule: str, now_ms: int):
        return self.inner.reached("all", now_ms)

    def tick(self, schedule: str, *more: Any):
        return self.inner.tick("all", *more)


class TicksWhenClosed(Broken):
    closed = False

    def close(self) -> None:
        self.closed = True
        self.inner.close()

    def tick(self, *given: Any):
        return [] if self.closed else self.inner.tick(*given)


class RemembersTicksInMemory(Broken):
    """How far it is goes with the process."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.at: dict[str, int] = {}

    def reached(self, schedule: str, now_ms: int):
        return self.at.setdefault(schedule, now_ms)

    def tick(self, schedule: str, reached_ms: int, to_ms: int, messages: Sequence[Any]):
        if self.at.get(schedule) != reached_ms:
            return None
        self.at[schedule] = to_ms
        return self.inner.publish(messages)


# --- counts


class CountsWhatIsKept(Broken):
    """What everybody is done with was never published."""

    def published(self):
        waiting = dict.fromkeys(self.inner.published(), 0)
        for state in self.inner.subscriptions():
            waiting[state.topic] += state.backlog + state.in_flight + state.parked
        return waiting


class CountsAttempts(Broken):
    """A repeat counts again."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.seen: dict[str, int] = {}

    def publish(self, messages: Sequence[Any]):
        for message in messages:
            self.seen[message.topic] = self.seen.get(message.topic, 0) + 1
        return self.inner.publish(messages)

    def published(self):
        return {**dict.fromkeys(self.inner.published(), 0), **self.seen}


class CountsOnePartition(Broken):
    def published(self):
        return {topic: min(count, 1) for topic, count in self.inner.published().items()}


class SeesWhoIsBusy(Broken):
    def workers(self):
        return [holder.worker for holder in self.inner.holders()]


class NotesOneOfThem(Broken):
    class lane(Coat):  # noqa: N801
        def note_repeats(self, deliveries: Sequence[Delivery]) -> None:
            self.inner.note_repeats(deliveries[:1])


class NotesAndBuries(Broken):
    class lane(Coat):  # noqa: N801
        def note_repeats(self, deliveries: Sequence[Delivery]) -> None:
            from duly.guarantees import Dead

            self.inner.settle([Dead(d.receipt, "a repeat") for d in deliveries])


# --- what a store remembers


class ForgetsNothing(Coat):
    def forget(self, consumer: str, limit: int) -> int:
        return 0


class ForgetsEverybody(Coat):
    def forget(self, consumer: str, limit: int) -> int:
        return sum(self.inner.forget(each, limit) for each in ("sub", "another"))


class RemembersByIdAlone(Coat):
    """Whoever it was, from whomever."""

    def effect_ms(self, consumer: str, topic: str, source: str, id: str):
        from duly.testing.conformance.backend import SOURCE

        return self.inner.effect_ms("sub", "t", SOURCE, id)


class RemembersTheDead(Coat):
    """What was given up on took effect; in this case everything did."""

    def effect_ms(self, *asked: str):
        return 1


# --- what a server is configured to do


class SeesDangerEverywhere(Broken):
    def survey(self, topics: Any, subscriptions: Any):
        return Survey([Peril(None, None, "it may rain", "wait")], ["the sky was looked at"])


class SeesNothingAtAll(Broken):
    def survey(self, topics: Any, subscriptions: Any):
        return Survey()


class MakesWhatItLooksFor(Broken):
    def survey(self, topics: Any, subscriptions: Any):
        for name in subscriptions:
            self.inner.subscribe(topics, name, SubscribeOptions(Guarantee.AT_LEAST_ONCE)).close()
        return Survey(seen=["all is there"])


# --- what only looks


class KnowsByMaking(Broken):
    def know(self, topics: Sequence[Any], subscription: str, options: SubscribeOptions):
        self.inner.declare(topics)
        self.inner.subscribe(topics, subscription, options).close()


class TakesAwayWhatIsHeld(Broken):
    lanes: Any = ()

    def subscribe(self, topics: Any, subscription: str, options: SubscribeOptions):
        lane = self.inner.subscribe(topics, subscription, options)
        self.lanes = (*self.lanes, lane)
        return lane

    def know(self, topics: Sequence[Any], subscription: str, options: SubscribeOptions):
        for lane in self.lanes:
            lane.close()


class KnowsWhateverItIsTold(Broken):
    def know(self, topics: Sequence[Any], subscription: str, options: SubscribeOptions):
        pass


KNOWN: Any = {"around": replace(DATABASE, operations=(Knows,))}
SURVEYED: Any = {"around": replace(DATABASE, operations=(Surveys,))}
SQL: Any = {"around": SQLITE, "page": "sqlite.md"}
STORE: Any = {"around": SQLITE_STORE, "page": "sqlite.md"}

OPERATED = (
    Mistake(
        TicksInTwoSteps,
        (
            "Ticked::test_a_tick_is_published_once",
            "Ticked::test_only_from_where_it_stands",
            "Ticked::test_of_many_one_publishes_a_tick",
            "Ticked::test_what_is_refused_moves_nothing",
        ),
        **SQL,
    ),
    Mistake(RemembersBeforeItPublishes, ("Ticked::test_what_is_refused_moves_nothing",), **SQL),
    Mistake(
        BeginsAtEveryStart,
        ("Ticked::test_a_schedule_begins_once", "Ticked::test_an_id_that_is_taken_ends_the_tick"),
        **SQL,
    ),
    Mistake(OneScheduleForAll, ("Ticked::test_only_from_where_it_stands",), **SQL),
    Mistake(TicksWhenClosed, ("Ticked::test_a_closed_broker_ticks_nothing",), **SQL),
    Mistake(RemembersTicksInMemory, ("TickedDurably::test_a_tick_survives[crash]",), **SQL),
    Mistake(CountsWhatIsKept, ("Counted::test_what_was_ever_stored",), **SQL),
    Mistake(CountsAttempts, ("Counted::test_a_repeat_was_not_stored",), **SQL),
    Mistake(CountsOnePartition, ("Counted::test_in_every_partition",), **SQL),
    Mistake(SeesWhoIsBusy, ("Counted::test_who_is_there",), **SQL),
    Mistake(NotesOneOfThem, ("Suppressed::test_each_is_counted",), **SQL),
    Mistake(SeesDangerEverywhere, ("Surveyed::test_nothing_endangers_what_is_there",), **SURVEYED),
    Mistake(SeesNothingAtAll, ("Surveyed::test_nothing_endangers_what_is_there",), **SURVEYED),
    Mistake(MakesWhatItLooksFor, ("Surveyed::test_looking_makes_nothing",), **SURVEYED),
    Mistake(
        KnowsByMaking,
        (
            "Known::test_a_topic_that_is_known_is_not_made",
            "Known::test_a_subscription_that_is_known_is_not_made",
        ),
        **KNOWN,
    ),
    Mistake(TakesAwayWhatIsHeld, ("Known::test_what_is_there_is_not_disturbed",), **KNOWN),
    Mistake(KnowsWhateverItIsTold, ("Known::test_what_is_there_as_another_is_refused",), **KNOWN),
    Mistake(NotesAndBuries, ("Suppressed::test_they_are_settled_as_ever",), **SQL),
    Mistake(
        ForgetsNothing,
        (
            "Forgotten::test_some_at_a_time_until_none_is_left",
            "Forgotten::test_what_was_given_up_on_too",
        ),
        **STORE,
    ),
    Mistake(ForgetsEverybody, ("Forgotten::test_nobody_elses",), **STORE),
    Mistake(RemembersByIdAlone, ("Remembered::test_nobody_elses",), **STORE),
    Mistake(
        RemembersTheDead,
        (
            "Remembered::test_when_it_took_effect",
            "Remembered::test_only_what_took_effect",
        ),
        **STORE,
    ),
)
