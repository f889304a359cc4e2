"""Brokers that mend, count and tell in wrong ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace as with_fields
from typing import Any

from msgspec.structs import replace

from duly.inspection import DeadLetter, Holder, Selection, SubscriptionState
from tests.contract.broken.coats import Broken, Coat


class PublishesReplaysAnew(Broken):
    """A replay is a publish: everybody sees it, behind whatever came meanwhile."""

    def replay(self, letters: Sequence[DeadLetter]):
        gone = self.inner.discard(letters)
        meant = [letter.message for letter in letters if letter not in gone]
        self.inner.publish([replace(each, id=f"{each.id}-again") for each in meant])
        return gone


class KeepsWhatItReplays(Broken):
    """Delivered again, and a dead letter still: for the next who looks."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.kept: list[DeadLetter] = []

    def replay(self, letters: Sequence[DeadLetter]):
        self.inner.replay(letters)
        self.kept += letters
        return []

    def discard(self, letters: Sequence[DeadLetter]):
        self.inner.discard(letters)
        return []

    def select(self, which: Selection, limit: int):
        return [*self.inner.select(which, limit), *self.kept][:limit]


class MendsInWords(Broken):
    """Says that it did."""

    def replay(self, letters: Sequence[DeadLetter]):
        return []

    def discard(self, letters: Sequence[DeadLetter]):
        return []


class MendsByMessage(Broken):
    """Whichever letter of a message is shown, its latest is meant."""

    def _latest(self, letters: Sequence[DeadLetter]) -> list[DeadLetter]:
        ids = {letter.message.id for letter in letters}
        return [each for each in self.inner.select(Selection(), 1000) if each.message.id in ids]

    def replay(self, letters: Sequence[DeadLetter]):
        return self.inner.replay(self._latest(letters))

    def discard(self, letters: Sequence[DeadLetter]):
        return self.inner.discard(self._latest(letters))


class MendsTheFirstOnly(Broken):
    def replay(self, letters: Sequence[DeadLetter]):
        return self.inner.replay(letters[:1])


class ForgetsReplays(Broken):
    class lane(Coat):  # noqa: N801
        def claim(self, limit: int, max_bytes: int, wait_s: float):
            found = self.inner.claim(limit, max_bytes, wait_s)
            return [replace(delivery, replays=0) for delivery in found]


class SelectsLoosely(Broken):
    """Errors are compared as a whole, and lists end where they like."""

    def select(self, which: Selection, limit: int):
        return self.inner.select(with_fields(which, error=None, below=None), limit)


class NotesNothing(Broken):
    """What people did is nobody's business."""

    def incidents(self, subscription: str | None = None, kind: str | None = None, limit: int = 100):
        found = self.inner.incidents(subscription, kind, limit)
        return [each for each in found if each.kind not in ("replayed", "discarded")]

    def incident_counts(self):
        counts = self.inner.incident_counts()
        return {key: n for key, n in counts.items() if key[1] not in ("replayed", "discarded")}


class ReplaysAfterAWhile(Broken):
    """A replay is kept in memory until somebody subscribes."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.later: list[DeadLetter] = []

    def replay(self, letters: Sequence[DeadLetter]):
        self.later += letters
        return []

    def subscribe(self, topics: Any, subscription: str, options: Any) -> Any:
        self.inner.replay(self.later)
        return super().subscribe(topics, subscription, options)


class HalfAMender(Broken):
    """It can be asked which, and no more."""

    def __getattr__(self, name: str) -> Any:
        if name in ("replay", "discard"):
            raise AttributeError(name)
        return super().__getattr__(name)


class HalfAnObserver(Broken):
    def __getattr__(self, name: str) -> Any:
        if name == "oldest":
            raise AttributeError(name)
        return super().__getattr__(name)


class AddsTopicsUp(Broken):
    """One state a subscription, whatever it reads."""

    def subscriptions(self):
        found: dict[str, SubscriptionState] = {}
        for state in self.inner.subscriptions():
            found.setdefault(state.name, state)
        return list(found.values())


class TakesTheClaimedForDone(Broken):
    def subscriptions(self):
        return [with_fields(state, in_flight=0) for state in self.inner.subscriptions()]


class CountsCalls(Broken):
    """However many messages one call was about."""

    def incident_counts(self):
        return dict.fromkeys(self.inner.incident_counts(), 1)


class TellsEverything(Broken):
    def incidents(self, subscription: str | None = None, kind: str | None = None, limit: int = 100):
        return self.inner.incidents(None, None, limit)


class NamesNobody(Broken):
    """Holders are those who ever claimed, with what they claimed first."""

    def __init__(self, inner: Any) -> None:
        super().__init__(inner)
        self.ever: dict[tuple[str, str], Holder] = {}

    def holders(self) -> Sequence[Holder]:
        for holder in self.inner.holders():
            self.ever.setdefault((holder.subscription, holder.topic), holder)
        return list(self.ever.values())


class ForgetsWhatIsParked(Broken):
    """The oldest of what was never tried."""

    def oldest(self):
        waiting = {(s.name, s.topic) for s in self.inner.subscriptions() if s.backlog}
        return {key: at for key, at in self.inner.oldest().items() if key in waiting}


class KeepsTheDead(Broken):
    """What was given up on grows older."""

    def oldest(self):
        dead = {(d.subscription, d.message.topic): d.dead_ms for d in self.inner.dead_letters()}
        return {**dead, **self.inner.oldest()}
