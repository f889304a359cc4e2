"""Subscriptions held back, taken back and removed, by brokers that can (`Steering`)."""

from __future__ import annotations

from typing import Any

import pytest

from duly.errors import BrokerError, ConfigurationError
from duly.guarantees import Dead, Done, Retry
from duly.inspection.steering import REMOVING, Steering
from duly.testing.conformance.backend import Backend, bodies, claim, drain, settle_done


def rewind(broker: Any, subscription: str = "sub", epoch: str | None = None) -> int:
    """All that is kept comes again; how many messages."""
    targets = broker.targets(subscription, None)
    assert broker.rewind(subscription, targets, epoch, quiet=False)
    while broker.tidy(subscription, 2):
        pass
    broker.finish(subscription)
    return sum(target.messages for target in targets)


class Steered:
    """What people do to a subscription holds for every worker, and loses nothing by itself."""

    def broker(self, backend: Backend) -> Any:
        """The broker as one that can be steered."""
        assert isinstance(backend.broker, Steering)
        return backend.broker

    def test_nothing_is_claimed_while_it_is_paused(self, backend: Backend) -> None:
        topic = backend.topic()
        lane, other = backend.lane(topic), backend.lane(topic, name="other")
        backend.publish(topic, *"abcd")
        held = claim(lane, 2)
        assert self.broker(backend).pause("sub")
        assert not self.broker(backend).pause("sub")
        assert list(claim(lane)) == []
        settle_done(lane, held)
        assert drain(other) == [*"abcd"]
        if backend.can.durable:
            backend.restart()
            lane = backend.lane(topic)
            assert list(claim(lane)) == []
        assert self.broker(backend).resume("sub")
        assert drain(lane) == [*"cd"]

    def test_what_is_kept_comes_again_to_it_alone(self, backend: Backend) -> None:
        topic = backend.topic(retention_s=3600.0)
        lane, other = backend.lane(topic), backend.lane(topic, name="other")
        backend.publish(topic, *"abc")
        assert drain(lane) == drain(other) == [*"abc"]
        assert rewind(self.broker(backend)) == 3
        assert drain(lane) == [*"abc"]
        assert drain(other) == []

    def test_a_claim_on_what_comes_again_is_lost(self, backend: Backend) -> None:
        topic = backend.topic()
        lane, second = backend.lane(topic), backend.lane(topic)
        backend.publish(topic, *"ab")
        held = claim(lane)
        rewind(self.broker(backend))
        assert bodies(claim(second)) == [*"ab"]
        receipts = [delivery.receipt for delivery in held]
        assert list(lane.settle([Done(receipt) for receipt in receipts])) == receipts

    def test_what_waits_and_what_is_dead_comes_again_once(self, backend: Backend) -> None:
        topic = backend.topic(retention_s=3600.0)
        lane = backend.lane(topic)
        backend.publish(topic, *"abc")
        first, second, third = [delivery.receipt for delivery in claim(lane)]
        lane.settle([Retry(first, 60.0, "e"), Dead(second, "e"), Done(third)])
        assert rewind(self.broker(backend)) == 3
        assert sorted(drain(lane)) == [*"abc"]
        assert list(backend.inside.dead_letters()) == []
        backend.clock.advance(120)
        assert drain(lane) == []

    def test_until_it_is_finished_nothing_is_claimed(self, backend: Backend) -> None:
        """Its process may die in between: nothing is lost, and the same again goes on."""
        topic = backend.topic()
        lane = backend.lane(topic)
        backend.publish(topic, *"abc")
        lane.settle([Retry(d.receipt, 0.0, "e") for d in claim(lane)])
        broker = self.broker(backend)
        assert broker.rewind("sub", broker.targets("sub", None), None, quiet=False)
        assert list(claim(lane)) == []
        with pytest.raises(ConfigurationError):
            broker.resume("sub")
        with pytest.raises(ConfigurationError):
            broker.finish("sub")
        rewind(broker)
        assert drain(lane) == [*"abc"]

    def test_an_epoch_begins_once(self, backend: Backend) -> None:
        topic = backend.topic(retention_s=3600.0)
        lane = backend.lane(topic)
        backend.publish(topic, "a")
        drain(lane)
        broker = self.broker(backend)
        targets = broker.targets("sub", None)
        rewind(broker, epoch="e")
        assert not broker.rewind("sub", targets, "e", quiet=False)
        assert drain(lane) == ["a"]

    def test_where_nobody_may_be_at_work(self, backend: Backend) -> None:
        topic = backend.topic()
        lane = backend.lane(topic)
        backend.publish(topic, "a")
        held = claim(lane)
        broker = self.broker(backend)
        for make_quiet in (lambda: broker.pause("sub"), lambda: settle_done(lane, held)):
            with pytest.raises(ConfigurationError):
                broker.rewind("sub", broker.targets("sub", None), "e", quiet=True)
            make_quiet()
        assert broker.rewind("sub", broker.targets("sub", None), "e", quiet=True)

    def test_a_removed_one_is_gone_and_its_workers_get_nothing_of_the_next(
        self, backend: Backend
    ) -> None:
        topic = backend.topic()
        lane = backend.lane(topic)
        backend.publish(topic, *"abc")
        held = claim(lane, 1)
        broker = self.broker(backend)
        assert broker.drop("sub")
        assert not broker.drop("sub")
        assert [(each.subscription, each.state) for each in broker.steered()] == [("sub", REMOVING)]
        while broker.tidy("sub", 2):
            pass
        assert not broker.steered()
        assert [state.name for state in backend.inside.subscriptions()] == []
        anew = backend.lane(topic)
        with pytest.raises(BrokerError):
            claim(lane)
        assert list(lane.settle([Done(held[0].receipt)])) == [held[0].receipt]
        assert drain(anew) == [*"abc"]

    def test_what_is_no_subscription(self, backend: Backend) -> None:
        for call in (self.broker(backend).pause, self.broker(backend).resume):
            with pytest.raises(ConfigurationError):
                call("'; drop table messages; --")
