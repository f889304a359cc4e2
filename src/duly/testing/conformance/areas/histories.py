"""Random histories against a model: what each message may be charged, and who may hold it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from duly.broker import Delivery, Subscription
from duly.guarantees import Dead, Done, Release, Retry, Settlement
from duly.testing.conformance.backend import LEASE_S, Backend, claim

FEW = 32
"""Of more suspects than so many a log may first give out several at once."""


@dataclass
class Fate:
    """What the model knows of one message."""

    charged: int = 0
    holder: int | None = None
    alone: bool = False
    asked_for_one: bool = False
    suspect: bool = False
    among_many: bool = False
    perhaps: bool = False
    ended: str = ""
    offset: int = 0
    due: float = 0.0


@dataclass
class Model:
    """A subscription as its contract describes it, with lanes that live, fail and fall silent."""

    backend: Backend
    roll: random.Random
    lanes: list[Subscription]
    fates: dict[str, Fate] = field(default_factory=dict)
    held: list[list[Delivery]] = field(default_factory=lambda: [[], [], []])

    def claim(self, n: int) -> None:
        limit = self.roll.choice([1, 2, 5, 20])
        deliveries = claim(self.lanes[n], limit)
        assert len(deliveries) <= limit
        assert len(deliveries) == 1 or not any(delivery.alone for delivery in deliveries)
        for delivery in deliveries:
            self._check(delivery)
            fate = self.fates[delivery.message.id]
            fate.holder, fate.alone, fate.asked_for_one = n, delivery.alone, limit == 1
        self.held[n] += deliveries

    def _check(self, delivery: Delivery) -> None:
        fate = self.fates[delivery.message.id]
        assert not fate.ended, f"delivered again after {fate.ended}"
        assert fate.holder is None, f"delivered while lane {fate.holder} holds it"
        assert fate.due <= self.backend.clock() + 0.001, "delivered before it is due"
        assert delivery.alone or not fate.suspect or fate.among_many, "a suspect comes alone"
        # A server that confirms no settlement may hold somebody for dead who is not.
        if self.backend.can.confirms_settlement:
            assert fate.suspect or not delivery.alone, "nobody else says that it is alone"
        if fate.perhaps and delivery.attempt == fate.charged + 2:
            fate.charged += 1
        fate.perhaps = False
        assert delivery.attempt == fate.charged + 1

    def settle(self, n: int) -> None:
        deliveries = self.held[n]
        # On a log a prefix is settled for good, so that the model need not know of gaps.
        count = self.roll.randint(1, len(deliveries))
        chosen = [self._end(delivery) for delivery in deliveries[:count]]
        if self.backend.can.is_log:
            chosen = released_behind_failures(deliveries[:count], chosen)
        assert list(self.lanes[n].settle(chosen)) == []
        for delivery, end in zip(deliveries[:count], chosen, strict=True):
            self._ended(self.fates[delivery.message.id], end)
        self.held[n] = deliveries[count:]

    def _end(self, delivery: Delivery) -> Settlement:
        number = self.roll.random()
        if number < 0.6:
            return Done(delivery.receipt)
        if number < 0.75:
            return Retry(delivery.receipt, self.roll.choice([0.0, 3.0, 40.0]), "no")
        return Dead(delivery.receipt, "no") if number < 0.8 else Release(delivery.receipt)

    def _ended(self, fate: Fate, end: Settlement) -> None:
        fate.holder = None
        if isinstance(end, Done | Dead):
            fate.ended = type(end).__name__
        elif isinstance(end, Retry):
            fate.charged += 1
            fate.suspect = fate.among_many = False
            fate.due = self.backend.clock() + end.delay_s

    def fall_silent(self) -> None:
        """Every lane lets its leases end: charged is who was alone, the others are suspect.

        Where more than that one message was held, it depends on what its worker is, which may be
        the lane or all of them. What was asked for singly, and was all that the lane held, may be
        charged as well.
        """
        self.backend.fall_silent()
        if self.backend.deviates("prefix-only") and any(self.held):
            self._lose_what_is_behind_a_gap()
        lost = sum(map(len, self.held))
        only_one = lost == 1
        for deliveries in self.held:
            for delivery in deliveries:
                fate = self.fates[delivery.message.id]
                fate.charged += fate.alone and only_one
                by_itself = fate.alone or (fate.asked_for_one and len(deliveries) == 1)
                fate.perhaps = by_itself and not (fate.alone and only_one)
                fate.suspect, fate.holder = True, None
                fate.among_many |= self.backend.can.is_log and lost > FEW
            deliveries.clear()

    def _lose_what_is_behind_a_gap(self) -> None:
        """A log knows the prefix only: what was done further on comes again, as if new."""
        first = min(fate.offset for fate in self.fates.values() if not fate.ended)
        for fate in self.fates.values():
            if fate.ended and fate.offset > first:
                fate.charged, fate.suspect, fate.ended, fate.due = 0, False, "", 0.0

    def extend(self) -> None:
        for lane, deliveries in zip(self.lanes, self.held, strict=True):
            assert list(lane.extend([d.receipt for d in deliveries], LEASE_S)) == []


def released_behind_failures(
    deliveries: list[Delivery], ends: list[Settlement]
) -> list[Settlement]:
    """On a log: what stands behind one that is not done is given back."""
    stopped: set[str] = set()
    result: list[Settlement] = []
    for delivery, end in zip(deliveries, ends, strict=True):
        log = delivery.position.log if delivery.position else ""
        result.append(Release(delivery.receipt) if log in stopped else end)
        if not isinstance(result[-1], Done | Dead):
            stopped.add(log)
    return result


class Histories:
    """Random histories agree with a model."""

    @pytest.mark.parametrize("seed", range(8))
    def test_random_histories_agree_with_the_model(self, backend: Backend, seed: int) -> None:
        roll = random.Random(seed)
        topic = backend.topic()
        # One lane on a log: what its partition's next owner sees is test_memory's.
        lanes = [backend.lane(topic) for _ in range(1 if backend.can.is_log else 3)]
        model = Model(backend, roll, lanes, held=[[] for _ in lanes])
        for number in range(400):
            if number < 300 and roll.random() < 0.5:
                for message in backend.publish(topic, *(str(n) for n in range(roll.randint(1, 4)))):
                    model.fates[message.id] = Fate(offset=len(model.fates))
            if roll.random() < 0.04:
                model.fall_silent()
            n = roll.randrange(len(lanes))
            if model.held[n] and roll.random() < 0.6:
                model.settle(n)
            else:
                model.claim(n)
            if number % 8 == 0:  # a lease is many steps long, and extending is most of the work
                model.extend()
            backend.clock.advance(roll.choice([0.0, 0.5]))
        for _ in range(5000):
            backend.clock.advance(5.0)
            model.extend()
            for n in range(len(lanes)):
                model.claim(n)
                while model.held[n]:
                    model.settle(n)
            if all(fate.ended for fate in model.fates.values()):
                break
        left = {id: fate for id, fate in model.fates.items() if not fate.ended}
        assert not left, f"seed {seed}: never finished"
