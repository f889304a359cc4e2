"""What a durable broker has taken is there after a restart; one that is not says so."""

from __future__ import annotations

from typing import Any

import pytest

from duly.errors import BrokerError, ConfigurationError, PublishError
from duly.guarantees import Dead, Done, Guarantee, Release, Retry, Settlement
from duly.testing.conformance.backend import Backend, bodies, claim, drain, kinds, settle_done


class Restart:
    """A broker that was closed."""

    def test_a_closed_broker_takes_and_gives_nothing(self, backend: Backend) -> None:
        topic = backend.topic()
        lane = backend.lane(topic)
        backend.broker.close()
        try:
            [outcome] = backend.broker.publish([backend.message(topic, "a")])
            assert isinstance(outcome, PublishError)
        except (BrokerError, ConfigurationError):
            pass
        assert list(lane.claim(1, 1, 0.0)) == []
        backend.broker.close()
        backend.restart()


class Forgetful:
    """Not durable, and it says so: a restart leaves nothing."""

    @pytest.mark.parametrize("end", ["restart", "crash"])
    def test_a_restart_leaves_nothing(self, backend: Backend, end: str) -> None:
        topic = backend.topic(guarantee="exactly-once")
        backend.publish(topic, "a", id="one")
        getattr(backend, end)()
        assert drain(backend.lane(topic)) == []
        backend.publish(topic, "a", id="one")


class Durable:
    """What a durable broker has taken is there after a restart."""

    def test_messages_and_progress_survive(self, backend: Backend) -> None:
        topic = backend.topic()
        lane = backend.lane(topic)
        backend.publish(topic, *"abcdef")
        settle, retry, dead, held, *_ = claim(lane, limit=4)
        lane.settle(
            [Done(settle.receipt), Retry(retry.receipt, 5.0, "no"), Dead(dead.receipt, "no")]
        )
        backend.restart()
        lane = backend.lane(topic)
        assert sorted(drain(lane)) == ["d", "e", "f"]
        backend.clock.advance(6)
        [again] = claim(lane)
        assert (bodies([again]), again.attempt) == (["b"], 2)
        assert list(lane.settle([Done(held.receipt)])) == [held.receipt], "a stale receipt"

    def test_the_recorded_guarantee_survives(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.lane(topic, guarantee=Guarantee.EXACTLY_ONCE)
        backend.restart()
        with pytest.raises(ConfigurationError, match="exactly-once"):
            backend.lane(topic, guarantee=Guarantee.AT_LEAST_ONCE)

    def test_the_topics_fixed_properties_survive(self, backend: Backend) -> None:
        topic = backend.topic(partitions=4, in_order=True)
        for number in range(20):
            backend.publish(topic, str(number), key="k")
        backend.restart()
        lane = backend.lane(topic, order_by_key=backend.can.orders_by_key)
        assert drain(lane, limit=3) == [str(n) for n in range(20)]

    def test_a_topic_is_known_to_processes_that_do_not_declare_it(self, backend: Backend) -> None:
        """A relay passes on what other processes have put into the outbox."""
        topic = backend.topic(guarantee="exactly-once", partitions=4)
        backend.topics.remove(topic)
        backend.restart()
        backend.publish(topic, "a", key="k", id="one")
        backend.broker.declare([topic])
        assert drain(backend.lane(topic)) == ["a"]

    def test_receipts_of_before_stay_stale(self, backend: Backend) -> None:
        """Tokens only grow: a new one is never an old one."""
        topic = backend.topic()
        lane = backend.lane(topic)
        backend.publish(topic, "a")
        [before] = claim(lane)
        backend.restart()
        lane = backend.lane(topic)
        backend.fall_silent()
        [after] = claim(lane)
        assert after.receipt != before.receipt
        assert list(lane.settle([Done(before.receipt)])) == [before.receipt]
        assert list(lane.settle([Done(after.receipt)])) == []

    @pytest.mark.parametrize("end", ["restart", "crash"])
    def test_what_was_published_is_there(self, backend: Backend, end: str) -> None:
        topic = backend.topic()
        sent = backend.publish(topic, *"abc", key="k", headers={"tenant": "blue"})
        getattr(backend, end)()
        got = [delivery.message for delivery in claim(backend.lane(topic))]
        assert [(m.id, m.body, m.key, m.time_ms) for m in got] == [
            (m.id, m.body, m.key, m.time_ms) for m in sent
        ]
        assert {m.headers["tenant"] for m in got} == {"blue"}

    @pytest.mark.parametrize("kind", [Done, Retry, Dead, Release])
    def test_a_settlement_survives_a_crash(self, backend: Backend, kind: Any) -> None:
        """When settle has returned, no process need live for it to hold."""
        topic = backend.topic()
        backend.publish(topic, "a")
        lane = backend.lane(topic)
        [delivery] = claim(lane)
        ends: dict[Any, Settlement] = {
            Done: Done(delivery.receipt),
            Retry: Retry(delivery.receipt, 100.0, "later"),
            Dead: Dead(delivery.receipt, "no"),
            Release: Release(delivery.receipt),
        }
        assert list(lane.settle([ends[kind]])) == []
        backend.crash()
        lane = backend.lane(topic)
        backend.fall_silent()
        again = claim(lane)
        assert [d.attempt for d in again] == ([1] if kind is Release else [])
        settle_done(lane, again)
        backend.clock.advance(100)
        assert [d.attempt for d in claim(lane)] == ([2] if kind is Retry else [])

    def test_what_a_crash_left_claimed_comes_again(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a", "b")
        held = claim(backend.lane(topic))
        backend.crash()
        lane = backend.lane(topic)
        backend.fall_silent()
        for body in "ab":
            [delivery] = claim(lane)
            assert (bodies([delivery]), delivery.repeated) == ([body], True)
            settle_done(lane, [delivery])
        stale = [delivery.receipt for delivery in held]
        assert list(lane.settle([Done(receipt) for receipt in stale])) == stale

    def test_where_a_subscription_began_survives(self, backend: Backend) -> None:
        topic = backend.topic(read_by=("another",))
        backend.publish(topic, "before")
        backend.lane(topic, start="latest").close()
        backend.publish(topic, "after")
        backend.crash()
        assert drain(backend.lane(topic)) == ["after"]

    def test_a_repeat_after_a_crash_is_no_new_message(self, backend: Backend) -> None:
        """The publisher died before the answer, and another repeats under the same id."""
        topic = backend.topic(guarantee="exactly-once")
        backend.publish(topic, "a", id="one")
        backend.crash()
        outcomes = kinds(backend.broker.publish([backend.message(topic, "a", id="one")]))
        drops = backend.can.identity_retention
        assert outcomes == ["RepeatDropped" if drops else "Published"]
        assert drain(backend.lane(topic)) == (["a"] if drops else ["a", "a"])


class DurableInside:
    """What people look at survives too."""

    @pytest.mark.parametrize("end", ["restart", "crash"])
    def test_dead_letters_and_incidents_survive(self, backend: Backend, end: str) -> None:
        topic = backend.topic()
        backend.publish(topic, "bad")
        lane = backend.lane(topic)
        [delivery] = claim(lane)
        lane.settle([Dead(delivery.receipt, "no")])
        getattr(backend, end)()
        [letter] = backend.inside.dead_letters("sub")
        assert (letter.message.body, letter.error, letter.attempts) == (b"bad", "no", 1)
        assert backend.inside.incident_counts()["sub", "dead-letter"] == 1
        assert [state.dead for state in backend.inside.subscriptions()] == [1]
