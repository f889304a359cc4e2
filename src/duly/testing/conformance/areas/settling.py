"""How a claim ends: done, retried, dead or released."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from duly.broker import Subscription
from duly.guarantees import Dead, Done, Release, Retry, Settlement
from duly.testing.conformance.backend import (
    Backend,
    batches,
    bodies,
    claim,
    drain,
    settle_done,
    together,
)


def settled(lane: Subscription, settlement: Settlement) -> None:
    """Settle this one, and see that it is taken."""
    assert list(lane.settle([settlement])) == []


class Settling:
    """How a claim ends: done, retried, dead or released."""

    def test_done_is_never_delivered_again(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, *"abc")
        lane = backend.lane(topic)
        settle_done(lane, claim(lane))
        backend.fall_silent()
        assert list(claim(lane)) == []
        lane.close()
        assert list(claim(backend.lane(topic))) == []

    def test_a_retry_waits_and_counts(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a")
        lane = backend.lane(topic)
        for attempt in (1, 2, 3):
            [delivery] = claim(lane)
            assert delivery.attempt == attempt
            assert delivery.repeated == (attempt > 1)
            assert list(lane.settle([Retry(delivery.receipt, 10.0, "not yet")])) == []
            backend.clock.advance(9)
            assert list(claim(lane)) == []
            backend.clock.advance(1.5)
        [delivery] = claim(lane)
        assert (delivery.attempt, delivery.alone) == (4, False)

    def test_what_was_never_started_waits_and_stays_as_it_was(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a", "b")
        lane = backend.lane(topic)
        unread = {"a": [(1, False)] * 4, "b": [(1, False)] * 4}
        seen: dict[str, list[tuple[int, bool]]] = {"a": [], "b": []}
        for _ in range(4):
            while deliveries := claim(lane):
                for d in deliveries:
                    seen[d.message.body.decode()].append((d.attempt, d.repeated))
                    settled(lane, Retry(d.receipt, 10.0, "of a type of tomorrow", charged=False))
            backend.clock.advance(10.5)
        assert seen == unread
        # A failure is charged on top of what was there, and not more.
        [delivery] = [d for d in claim(lane) if d.message.body == b"a"] or claim(lane)
        settled(lane, Retry(delivery.receipt, 0.0, "it failed"))
        assert [d.attempt for d in claim(lane) if d.message.id == delivery.message.id] == [2]

    def test_a_retry_without_delay_comes_at_once(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a")
        lane = backend.lane(topic)
        [delivery] = claim(lane)
        lane.settle([Retry(delivery.receipt, 0.0, "again")])
        [again] = claim(lane)
        assert again.attempt == 2

    def test_only_in_place_does_a_retry_hold_up_the_others(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a", "b")
        lane = backend.lane(topic)
        claimed = claim(lane)
        settlements: list[Settlement] = [
            Retry(claimed[0].receipt, 10.0, "not yet"),
            Release(claimed[1].receipt),
        ]
        assert list(lane.settle(settlements)) == []
        backend.publish(topic, "c")
        now = [] if backend.can.retries_in_place else ["b", "c"]
        assert sorted(drain(lane)) == now
        backend.clock.advance(11)
        assert drain(lane) == (["a", "b", "c"] if backend.can.retries_in_place else ["a"])

    def test_released_messages_come_again_uncharged(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, *"abcd")
        lane = backend.lane(topic)
        for _ in range(5):
            claimed = claim(lane, limit=3)
            assert {(d.attempt, d.repeated, d.alone) for d in claimed} == {(1, False, False)}
            assert list(lane.settle([Release(d.receipt) for d in claimed])) == []
        assert sorted(drain(lane)) == ["a", "b", "c", "d"]

    def test_a_release_does_not_uncharge_earlier_attempts(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a")
        lane = backend.lane(topic)
        [delivery] = claim(lane)
        lane.settle([Retry(delivery.receipt, 0.0, "failed once")])
        for _ in range(2):
            [delivery] = claim(lane)
            assert delivery.attempt == 2
            lane.settle([Release(delivery.receipt)])

    def test_all_kinds_of_settlement_in_one_call(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "done", "retried", "dead", "released")
        lane = backend.lane(topic)
        done, retried, dead, released = claim(lane)
        settlements: list[Settlement] = [
            Done(done.receipt),
            Retry(retried.receipt, 5.0, "later"),
            Dead(dead.receipt, "never"),
            Release(released.receipt),
        ]
        assert list(lane.settle(settlements)) == []
        backend.clock.advance(6)
        assert sorted(drain(lane)) == ["released", "retried"]

    def test_a_dead_one_is_never_delivered_again(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "bad", "good")
        lane = backend.lane(topic)
        bad, good = claim(lane)
        assert list(lane.settle([Dead(bad.receipt, "no"), Done(good.receipt)])) == []
        backend.fall_silent()
        assert list(claim(lane)) == []
        lane.close()
        assert list(claim(backend.lane(topic))) == []

    def test_what_is_settled_behind_a_gap_stays_settled(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, *"abcd")
        lane = backend.lane(topic)
        claimed = claim(lane)
        settle_done(lane, [claimed[1], claimed[3]])
        lane.close()
        again = bodies(claim(backend.lane(topic)))
        assert again in (["a", "c"], ["a", "b", "c", "d"])
        backend.judge("prefix-only", deviates=len(again) == 4)

    def test_settlements_come_from_any_thread(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, *"ab")
        lane = backend.lane(topic)
        claimed = claim(lane)
        together(*(lambda receipt=each.receipt: settled(lane, Done(receipt)) for each in claimed))
        backend.fall_silent()
        assert list(claim(lane)) == []

    def test_settling_nothing_is_harmless(self, backend: Backend) -> None:
        lane = backend.lane(backend.topic())
        assert list(lane.settle([])) == []
        assert list(lane.extend([], 1.0)) == []


class NoInside:
    """No looking inside: nothing pretends to be `duly.inspection.Inspection`."""

    @pytest.mark.parametrize(
        "call", ["subscriptions", "dead_letters", "incidents", "incident_counts"]
    )
    def test_it_has_no_such_call(self, backend: Backend, call: str) -> None:
        assert not hasattr(backend.broker, call), "say inspection = true in the page"


class Inside:
    """Dead letters, states and incidents, for a person to look at."""

    def test_it_has_every_call(self, backend: Backend) -> None:
        assert list(backend.inside.subscriptions()) == []
        assert list(backend.inside.dead_letters()) == []
        assert list(backend.inside.incidents()) == []
        assert dict(backend.inside.incident_counts()) == {}

    def test_only_the_dead_are_dead_letters(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "done", "retried", "dead", "released")
        lane = backend.lane(topic)
        done, retried, dead, released = claim(lane)
        settlements: list[Settlement] = [
            Done(done.receipt),
            Retry(retried.receipt, 5.0, "later"),
            Dead(dead.receipt, "never"),
            Release(released.receipt),
        ]
        assert list(lane.settle(settlements)) == []
        assert [letter.message.body for letter in backend.inside.dead_letters("sub")] == [b"dead"]

    def test_a_stale_settlement_buries_nothing(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a")
        lane = backend.lane(topic)
        [stale] = claim(lane)
        backend.fall_silent()
        [held] = claim(lane)
        assert list(lane.settle([Dead(stale.receipt, "stale")])) == [stale.receipt]
        assert list(backend.inside.dead_letters()) == []
        settle_done(lane, [held])

    def test_a_dead_letter_is_kept_with_its_history(self, backend: Backend) -> None:
        topic = backend.topic()
        [sent] = backend.publish(topic, "bad", key="k", headers={"tenant": "blue"})
        lane = backend.lane(topic)
        [delivery] = claim(lane)
        lane.settle([Retry(delivery.receipt, 0.0, "first error")])
        [delivery] = claim(lane)
        assert list(lane.settle([Dead(delivery.receipt, "last error")])) == []
        backend.fall_silent()
        assert list(claim(lane)) == []
        [letter] = backend.inside.dead_letters("sub")
        assert (letter.subscription, letter.error, letter.attempts) == ("sub", "last error", 2)
        assert (letter.message.id, letter.message.body) == (sent.id, b"bad")
        assert (letter.message.key, dict(letter.message.headers)) == ("k", {"tenant": "blue"})
        assert letter.dead_ms == backend.clock.wall_ms() - 30_500

    def test_what_cannot_be_decoded_is_buried_as_it_is(self, backend: Backend) -> None:
        topic = backend.topic()
        wild = replace(backend.message(topic, "x"), body=b"\xff\x00 not text")
        backend.broker.publish([wild])
        lane = backend.lane(topic)
        [delivery] = claim(lane)
        assert list(lane.settle([Dead(delivery.receipt, "no text: \x00, 100 %, 'quoted'\n")])) == []
        [letter] = backend.inside.dead_letters("sub")
        assert letter.message.body == wild.body
        assert "no text" in letter.error

    def test_dead_letters_belong_to_one_subscription(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a")
        one, two = backend.lane(topic, name="one"), backend.lane(topic, name="two")
        [delivery] = claim(one)
        one.settle([Dead(delivery.receipt, "no")])
        assert [d.subscription for d in backend.inside.dead_letters()] == ["one"]
        assert list(backend.inside.dead_letters("two")) == []
        assert drain(two) == ["a"]

    def test_the_latest_dead_letters_come_first(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, *"abc")
        lane = backend.lane(topic)
        for delivery in claim(lane):
            lane.settle([Dead(delivery.receipt, "no")])
            backend.clock.advance(1)
        assert [d.message.body for d in backend.inside.dead_letters("sub", limit=2)] == [
            b"c",
            b"b",
        ]

    def test_states_add_up(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, *"abcdef")
        lane = backend.lane(topic)
        claimed = claim(lane, limit=4)
        lane.settle([Done(claimed[0].receipt), Dead(claimed[1].receipt, "no")])
        lane.settle([Retry(claimed[3].receipt, 60.0, "later")])
        [state] = backend.inside.subscriptions()
        assert (state.name, state.topic) == ("sub", topic.name)
        assert (state.backlog, state.in_flight, state.parked, state.dead) == (2, 1, 1, 1)
        assert not state.is_drained

    def test_a_drained_subscription_says_so(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, *"abc")
        lane = backend.lane(topic)
        drain(lane)
        [state] = backend.inside.subscriptions()
        assert state.is_drained

    def test_what_was_not_plain_success_is_told(self, backend: Backend) -> None:
        topic = backend.topic(guarantee="exactly-once")
        lane = backend.lane(topic)
        backend.publish(topic, "a", id="one")
        assert dict(backend.inside.incident_counts()) == {}
        backend.broker.publish([backend.message(topic, "a", id="one")])
        [stale, *_] = claim(lane)
        backend.fall_silent()
        for batch in batches(lane):
            lane.settle([Retry(d.receipt, 0.0, "why") for d in batch if d.attempt == 1])
            lane.settle([Dead(d.receipt, "why") for d in batch if d.attempt > 1])
        lane.settle([Done(stale.receipt)])
        counts = backend.inside.incident_counts()
        # A stale settlement may name the topic: its claim is gone, and with it whose it was.
        seen = {kind for _, kind in counts}
        drops = {"repeat-dropped"} if backend.can.identity_retention else set()
        assert seen == {"redelivery", "retry", "dead-letter", "stale-settle"} | drops
        assert counts["sub", "retry"] == (1 if drops else 2)
        if drops:
            assert counts[topic.name, "repeat-dropped"] == 1
        newest = backend.inside.incidents(limit=1)
        assert [incident.kind for incident in newest] == ["stale-settle"]
        [retry, *_] = backend.inside.incidents("sub", kind="retry")
        assert (retry.id, retry.source, retry.topic) == ("one", "tests", topic.name)
        assert "why" in retry.detail
