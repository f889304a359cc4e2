"""Order by key: nothing of a key is delivered while an earlier one is claimed or waits."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import pytest

from duly.broker import Delivery, Subscription
from duly.errors import ConfigurationError, InvalidMessage
from duly.guarantees import Dead, Done, Guarantee, Release, Retry, Settlement
from duly.message import Topic
from duly.testing.conformance.backend import (
    LEASE_S,
    Backend,
    batches,
    bodies,
    claim,
    drain,
    settle_done,
)


def ordered(backend: Backend, topic: Topic[Any], **more: Any) -> Subscription:
    """A lane that asks for order by key."""
    return backend.lane(topic, order_by_key=True, **more)


class Workers:
    """Three lanes that fail, release and fall silent at random, as workers do."""

    def __init__(self, backend: Backend, topic: Topic[Any], roll: random.Random) -> None:
        self.backend = backend
        self.roll = roll
        self.lanes = [ordered(backend, topic) for _ in range(3)]
        self.held: list[list[Delivery]] = [[], [], []]
        self.done: dict[str, list[str]] = defaultdict(list)

    def act(self, n: int, *, fails: float) -> None:
        if self.held[n]:
            self._settle(n, fails)
        else:
            self.held[n] = list(claim(self.lanes[n], limit=self.roll.randint(1, 8)))
            self._check_one_holder_a_key()

    def fall_silent(self) -> None:
        self.backend.fall_silent()
        self.held = [[], [], []]

    def _settle(self, n: int, fails: float) -> None:
        """What follows a failure in its key, or on a log in its partition, is released."""
        ends: list[Settlement] = []
        stopped: set[str] = set()
        for delivery in self.held[n]:
            group = delivery.position.log if delivery.position else str(delivery.message.key)
            end = Release(delivery.receipt) if group in stopped else self._end(delivery, fails)
            ends.append(end)
            if not isinstance(end, Done):
                stopped.add(group)
        refused = set(self.lanes[n].settle(ends))
        for delivery, end in zip(self.held[n], ends, strict=True):
            if isinstance(end, Done) and delivery.receipt not in refused:
                self.done[str(delivery.message.key)] += bodies([delivery])
        self.held[n] = []

    def _end(self, delivery: Delivery, fails: float) -> Settlement:
        if self.roll.random() >= fails:
            return Done(delivery.receipt)
        delay_s = self.roll.choice([0.0, 0.0, 5.0, None])
        if delay_s is None:
            return Release(delivery.receipt)
        return Retry(delivery.receipt, delay_s, "no")

    def _check_one_holder_a_key(self) -> None:
        """Those whose claim was lost do not count: what they do next is refused."""
        keys = []
        for lane, held in zip(self.lanes, self.held, strict=True):
            lost = set(lane.extend([d.receipt for d in held], LEASE_S))
            keys.append({d.message.key for d in held if d.receipt not in lost})
        assert sum(map(len, keys)) == len(set().union(*keys)), f"two lanes hold one of {keys}"


class Order:
    """Nothing of a key is delivered while an earlier one is claimed or waits."""

    @pytest.fixture
    def topic(self, backend: Backend) -> Topic[Any]:
        return backend.topic(partitions=4, in_order=True)

    def test_a_topic_without_partitions_has_no_order(self, backend: Backend) -> None:
        plain = backend.topic("plain")
        with pytest.raises(ConfigurationError, match="partitions"):
            ordered(backend, plain)

    def test_a_key_comes_in_order(self, backend: Backend, topic: Topic[Any]) -> None:
        for number in range(60):
            backend.publish(topic, f"{number % 7}:{number}", key=str(number % 7))
        seen: dict[str, list[int]] = defaultdict(list)
        for body in drain(ordered(backend, topic), limit=4):
            seen[body.split(":")[0]].append(int(body.split(":")[1]))
        assert all(numbers == sorted(numbers) for numbers in seen.values())
        assert sorted(n for numbers in seen.values() for n in numbers) == list(range(60))

    def test_a_key_that_is_claimed_is_not_claimed_again(
        self, backend: Backend, topic: Topic[Any]
    ) -> None:
        one, two = ordered(backend, topic), ordered(backend, topic)
        backend.publish(topic, "1", "2", key="k")
        first = claim(one, limit=1) or claim(two, limit=1)
        assert bodies(first) == ["1"]
        assert list(claim(one)) == []
        assert list(claim(two)) == []

    def test_one_claim_may_hold_several_of_a_key(self, backend: Backend, topic: Topic[Any]) -> None:
        backend.publish(topic, "1", "2", "3", key="k")
        lane = ordered(backend, topic)
        assert bodies(claim(lane)) == ["1", "2", "3"]
        assert list(claim(lane)) == []

    def test_other_keys_go_on_while_one_waits(self, backend: Backend, topic: Topic[Any]) -> None:
        # Many keys, so that some are in other partitions whatever the hash.
        lane = ordered(backend, topic)
        for number in range(32):
            backend.publish(topic, f"k{number}", key=f"k{number}")
        head, *others = claim(lane, limit=100)
        settle_done(lane, others)
        lane.settle([Retry(head.receipt, 10.0, "later")])
        waiting = head.message.key
        for number in range(32):
            backend.publish(topic, f"again k{number}", key=f"k{number}")
        went_on = {body.removeprefix("again ") for body in drain(lane)}
        assert waiting not in went_on
        assert len(went_on) >= (1 if backend.can.retries_in_place else 31)
        backend.clock.advance(11)
        rest = drain(lane)
        assert rest.index(str(waiting)) < rest.index(f"again {waiting}")

    def test_a_retry_holds_its_key(self, backend: Backend, topic: Topic[Any]) -> None:
        lane = ordered(backend, topic)
        backend.publish(topic, "1", "2", "3", key="k")
        first, *rest = claim(lane)
        settlements: list[Settlement] = [
            Retry(first.receipt, 10.0, "later"),
            *(Release(d.receipt) for d in rest),
        ]
        assert list(lane.settle(settlements)) == []
        backend.publish(topic, "4", key="k")
        backend.clock.advance(9)
        assert list(claim(lane)) == []
        backend.clock.advance(1.5)
        assert drain(lane) == ["1", "2", "3", "4"]

    def test_a_key_waits_while_a_later_one_is_still_claimed(
        self, backend: Backend, topic: Topic[Any]
    ) -> None:
        """Else two handlers of one key would run at once."""
        lane = ordered(backend, topic)
        backend.publish(topic, "1", "2", "3", key="k")
        first, second = claim(lane, limit=2)
        lane.settle([Retry(first.receipt, 0.0, "at once")])
        assert list(claim(lane)) == []
        lane.settle([Release(second.receipt)])
        assert drain(lane) == ["1", "2", "3"]

    def test_a_released_one_keeps_its_place(self, backend: Backend, topic: Topic[Any]) -> None:
        lane = ordered(backend, topic)
        backend.publish(topic, "1", "2", "3", key="k")
        first, *rest = claim(lane)
        lane.settle([Release(d.receipt) for d in rest])
        backend.publish(topic, "4", key="k")
        assert list(claim(lane)) == [], "the first is still claimed"
        settle_done(lane, [first])
        assert drain(lane) == ["2", "3", "4"]

    def test_a_key_stays_in_order_over_a_death(self, backend: Backend, topic: Topic[Any]) -> None:
        lane = ordered(backend, topic)
        backend.publish(topic, "1", "2", "3", key="k")
        claim(lane, limit=2)
        backend.fall_silent()
        handled = []
        for batch in batches(lane):
            assert list(claim(lane)) == []
            handled += bodies(batch)
            settle_done(lane, batch)
        assert handled == ["1", "2", "3"]

    def test_a_key_goes_on_after_a_dead_letter(self, backend: Backend, topic: Topic[Any]) -> None:
        lane = ordered(backend, topic)
        backend.publish(topic, "1", "2", key="k")
        first, second = claim(lane)
        lane.settle([Dead(first.receipt, "no"), Done(second.receipt)])
        backend.publish(topic, "3", key="k")
        assert drain(lane) == ["3"]

    def test_messages_without_a_key_have_no_order(
        self, backend: Backend, topic: Topic[Any]
    ) -> None:
        lane = ordered(backend, topic)
        backend.publish(topic, *"abcdefgh")
        assert sorted(drain(lane, limit=3)) == list("abcdefgh")

    def test_a_lane_without_order_is_refused_beside_one_with(
        self, backend: Backend, topic: Topic[Any]
    ) -> None:
        """Or it is let in, and what it claims is in order all the same."""
        lane = ordered(backend, topic)
        backend.publish(topic, "1", "2", key="k")
        try:
            other = backend.lane(topic)
        except ConfigurationError:
            assert drain(lane) == ["1", "2"]
            return
        got = [*claim(lane, limit=1), *claim(other, limit=1)]
        assert len(got) <= 2

    @pytest.mark.parametrize("seed", range(5))
    def test_order_holds_whatever_happens(
        self, backend: Backend, topic: Topic[Any], seed: int
    ) -> None:
        """Each key is handled in order, by one at a time, completely."""
        roll = random.Random(seed)
        workers = Workers(backend, topic, roll)
        sent: dict[str, list[str]] = defaultdict(list)
        for number in range(400):
            if roll.random() < 0.5:
                key = str(roll.randrange(6))
                backend.publish(topic, str(number), key=key)
                sent[key].append(str(number))
            if roll.random() < 0.03:
                workers.fall_silent()
            workers.act(roll.randrange(3), fails=0.2)
            backend.clock.advance(0.5)
        for number in range(3000):
            workers.act(number % 3, fails=0.0)
            backend.clock.advance(2.5)
            if workers.done == sent:
                break
        assert workers.done == sent, f"seed {seed}"


class HeldKeys:
    """A key waits behind its dead letter, where that is declared."""

    def test_a_key_waits_behind_a_dead_letter(self, backend: Backend) -> None:
        topic = backend.topic(partitions=4, in_order=True)
        lane = ordered(backend, topic, hold_key_on_dead=True)
        backend.publish(topic, "1", "2", key="k")
        first, second = claim(lane)
        lane.settle([Dead(first.receipt, "no"), Release(second.receipt)])
        backend.publish(topic, "3", key="k")
        assert drain(lane) == []
        backend.clock.advance(3600)
        assert drain(lane) == []
        assert [d.message.body for d in backend.inside.dead_letters("sub")] == [b"1"]


class NoHeldKeys:
    """No key waits behind its dead letter: asking for it is refused, never ignored."""

    def test_holding_a_key_is_refused(self, backend: Backend) -> None:
        topic = backend.topic(partitions=4, in_order=True)
        with pytest.raises(ConfigurationError, match=r"hold_key_on_dead|order by key"):
            backend.lane(topic, order_by_key=True, hold_key_on_dead=True)


class OrderWithDelays:
    """Order by key and due times."""

    @pytest.fixture
    def topic(self, backend: Backend) -> Topic[Any]:
        return backend.topic(partitions=4, in_order=True)

    def test_a_due_time_holds_nothing_but_itself_before_it_is_reached(
        self, backend: Backend, topic: Topic[Any]
    ) -> None:
        lane = ordered(backend, topic)
        backend.publish(topic, "1", key="k", due_ms=backend.clock.wall_ms() + 10_000)
        backend.publish(topic, "other", key="another")
        backend.publish(topic, "2", key="k")
        assert drain(lane) == ["other"], "in order by key the second waits for the first"
        backend.clock.advance(11)
        assert drain(lane) == ["1", "2"]


class NoOrderWithDelays:
    """No due times where there is an order: refused at publish, not overtaken instead."""

    def test_a_due_time_is_refused(self, backend: Backend) -> None:
        topic = backend.topic(partitions=4, in_order=True)
        lane = ordered(backend, topic)
        due_ms = backend.clock.wall_ms() + 5_000
        batch = [
            backend.message(topic, "a", key="k"),
            backend.message(topic, "later", key="k", due_ms=due_ms),
            backend.message(topic, "b", key="k"),
        ]
        outcomes = backend.broker.publish(batch)
        assert [isinstance(outcome, InvalidMessage) for outcome in outcomes] == [False, True, False]
        backend.clock.advance(6)
        assert drain(lane) == ["a", "b"]


class NoOrder:
    """No order by key: asking for it is refused, never ignored."""

    def test_order_by_key_is_refused(self, backend: Backend) -> None:
        topic = backend.topic()
        with pytest.raises(ConfigurationError, match="order"):
            backend.lane(topic, order_by_key=True)

    def test_a_refusal_makes_no_subscription(self, backend: Backend) -> None:
        topic = backend.topic()
        with pytest.raises(ConfigurationError, match="order"):
            backend.lane(topic, order_by_key=True)
        lane = backend.lane(topic, guarantee=Guarantee.EXACTLY_ONCE)
        backend.publish(topic, "a")
        assert drain(lane) == ["a"]
