"""Subscriptions of an app: paused, resumed, rewound, removed; and what that comes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Self

from duly.broker import Broker
from duly.consumer import Consumer
from duly.contract.setting import Run, Setting
from duly.errors import ConfigurationError
from duly.guarantees import Admission, Guarantee
from duly.inspection.steering import REMOVING, REWINDING, Forgetting, Steering, Target
from duly.message import MAX_NAME_CHARS
from duly.store import Store

# So many rows go in one transaction: a few milliseconds, for which writers wait.
PORTION = 500

Place = datetime | int | None
"""The time a message was made, a position, or None: the oldest that is kept."""

Progress = Callable[[int], None]
"""Told how many rows more were removed."""


def nobody(_: int) -> None:
    """For whom no progress is shown."""


@dataclass(frozen=True, slots=True)
class Rewind:
    """What a rewind would do: from where on messages come again, and what that means."""

    subscription: str
    targets: Sequence[Target]
    epoch: str | None
    forgets: bool
    meaning: str

    @property
    def messages(self) -> int:
        """How many messages come again."""
        return sum(target.messages for target in self.targets)


@dataclass(frozen=True, slots=True)
class Steerer:
    """A broker whose subscriptions can be steered, and the app that works them."""

    broker: Steering
    store: Store | None
    setting: Setting
    consumers: Sequence[Consumer]

    @classmethod
    def of(cls, backends: tuple[Broker, Store | None], consumers: Sequence[Consumer]) -> Self:
        """Raises `ConfigurationError` where the broker cannot."""
        broker, store = backends
        if not isinstance(broker, Steering):
            raise ConfigurationError(
                f"{broker.capabilities.name} cannot pause, rewind or remove subscriptions for "
                "duly; use its own tools"
            )
        setting = Setting(broker.capabilities, None if store is None else store.capabilities, Run())
        return cls(broker, store, setting, consumers)

    def pause(self, subscription: str) -> bool:
        """Whether it was not paused before."""
        return self.broker.pause(subscription)

    def resume(self, subscription: str) -> bool:
        """Whether it was paused."""
        return self.broker.resume(subscription)

    # --- rewinding

    def plan(self, subscription: str, to: Place, epoch: str | None = None) -> Rewind:
        """What a rewind would do. Raises `ConfigurationError` where it is refused."""
        guarantee = self._guarantee(subscription)
        forgets = False
        if epoch is not None and not (0 < len(epoch) <= MAX_NAME_CHARS and epoch.isprintable()):
            raise ConfigurationError(
                f"epoch {epoch[:80]!r}: give a name of 1 to {MAX_NAME_CHARS} printable characters"
            )
        if guarantee is Guarantee.EXACTLY_ONCE:
            forgets = self._forgets(subscription, epoch)
        elif epoch is not None:
            raise ConfigurationError(
                f"subscription {subscription!r} is {guarantee.value}: a new epoch is declared "
                "for exactly-once only, whose effects would happen again"
            )
        targets = self.broker.targets(subscription, to)
        return Rewind(subscription, targets, epoch, forgets, _MEANING[guarantee])

    def rewind(self, plan: Rewind, progress: Progress = nobody) -> bool:
        """Do it; False where its epoch was begun before, and nothing was done.

        Interrupted at any point, the subscription waits until the same rewind was run again.
        """
        name = plan.subscription
        if not plan.targets and not self.is_under_way(name, REWINDING):
            return False
        if not self.broker.rewind(name, plan.targets, plan.epoch, quiet=plan.forgets):
            return False
        self._tidy(name, progress)
        if plan.forgets:
            assert isinstance(self.store, Forgetting), "a plan is made where it can"
            while forgotten := self.store.forget(name, PORTION):
                progress(forgotten)
        self.broker.finish(name)
        return True

    def is_under_way(self, subscription: str, state: str) -> bool:
        """Whether it was left in this state, `REWINDING` or `REMOVING`, by what was interrupted."""
        return any(
            each.subscription == subscription and each.state == state
            for each in self.broker.steered()
        )

    def _forgets(self, subscription: str, epoch: str | None) -> bool:
        """Whether the store has to forget what took effect. Raises where it is refused."""
        if epoch is None:
            raise ConfigurationError(
                f"subscription {subscription!r} is exactly-once: what comes again would take "
                "effect again. Declare that this is meant, as a new life of it: --new-epoch NAME, "
                "with a name that was not used for it before. Its earlier effects stay as they "
                "are; undo them yourself, before."
            )
        if self.setting.one_database:
            return False
        consumer = next((each for each in self.consumers if each.name == subscription), None)
        if consumer is None:
            raise ConfigurationError(
                f"subscription {subscription!r} is exactly-once, and this app has no such "
                "consumer, so that nobody knows which store remembers its effects. Use the app "
                "that has it."
            )
        admission = self.setting.admission(consumer)
        if admission is not Admission.BY_INBOX or not isinstance(self.store, Forgetting):
            raise ConfigurationError(
                f"subscription {subscription!r}: what its store remembers cannot be forgotten "
                "here, and would drop everything that comes again. Give the consumer another name: "
                "a new subscription begins where its start says."
            )
        return True

    # --- removing

    def drop(self, subscription: str, progress: Progress = nobody) -> bool:
        """Remove it with its claims, waiting messages and dead letters; whether it was there,
        whole or in part.

        Interrupted, it is gone already; run again, the rest of what it left goes too.
        """
        unfinished = self.is_under_way(subscription, REMOVING)
        there = self.broker.drop(subscription)
        self._tidy(subscription, progress)
        return there or unfinished

    def check(self, subscription: str) -> str:
        """What removing it comes to. Raises `ConfigurationError` where there is none."""
        guarantee = self._guarantee(subscription)
        again = "made anew, it begins where its consumer's start says"
        if guarantee is Guarantee.EXACTLY_ONCE and self.setting.one_database:
            again += ", and what took effect before takes effect again"
        elif guarantee is Guarantee.EXACTLY_ONCE:
            again += ", and what its store remembers of it is dropped as a repeat"
        return f"{guarantee.value}; its place, what waits and its dead letters go; {again}"

    def _guarantee(self, subscription: str) -> Guarantee:
        recorded = self.broker.recorded()
        if subscription not in recorded:
            raise ConfigurationError(
                f"there is no subscription {subscription!r} here; there are: "
                f"{', '.join(sorted(recorded)) or 'none'}"
            )
        return Guarantee(recorded[subscription])

    def _tidy(self, subscription: str, progress: Progress) -> int:
        total = 0
        while removed := self.broker.tidy(subscription, PORTION):
            total += removed
            progress(removed)
        return total


_MEANING = {
    Guarantee.AT_MOST_ONCE: "they run again: at most once in each life of the subscription",
    Guarantee.AT_LEAST_ONCE: "they run again, and what their earlier runs did stays done",
    Guarantee.EXACTLY_ONCE: "they take effect again, once, and what took effect before stays",
}
