"""Claims: who gets what, under which receipt, and whose death is charged to what."""

from __future__ import annotations

from duly.guarantees import Dead, Done, Release, Retry
from duly.testing.conformance.backend import Backend, batches, bodies, claim, drain, settle_done


class Claims:
    """Who gets what."""

    def test_nothing_to_claim(self, backend: Backend) -> None:
        assert list(claim(backend.lane(backend.topic()))) == []

    def test_a_claim_is_limited_in_messages(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, *"abcde")
        lane = backend.lane(topic)
        assert bodies(claim(lane, limit=2)) == ["a", "b"]
        assert bodies(claim(lane, limit=2)) == ["c", "d"]
        assert bodies(claim(lane, limit=2)) == ["e"]

    def test_a_claim_is_limited_in_bytes(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "x" * 10, "y" * 10, "z" * 10)
        assert len(claim(backend.lane(topic), max_bytes=20)) == 2

    def test_one_message_over_the_bytes_comes_all_the_same(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "x" * 100, "y")
        lane = backend.lane(topic)
        assert bodies(claim(lane, max_bytes=10)) == ["x" * 100]
        assert bodies(claim(lane, max_bytes=10)) == ["y"]

    def test_a_first_delivery_says_so(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a", "b")
        for delivery in claim(backend.lane(topic)):
            assert (delivery.attempt, delivery.repeated, delivery.alone) == (1, False, False)

    def test_receipts_are_hashable_and_differ(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, *"abc")
        assert len({delivery.receipt for delivery in claim(backend.lane(topic))}) == 3

    def test_what_is_claimed_is_nobody_elses(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, *"abcd")
        lane = backend.lane(topic)
        first = claim(lane, limit=2)
        rest = claim(lane)
        assert not set(bodies(first)) & set(bodies(rest))
        assert list(claim(lane)) == []
        settle_done(lane, [*first, *rest])
        backend.fall_silent()
        assert list(claim(lane)) == []

    def test_lanes_of_one_subscription_compete(self, backend: Backend) -> None:
        topic = backend.topic(partitions=8)
        one, two = backend.lane(topic), backend.lane(topic)
        sent = [backend.publish(topic, f"m{n}", key=f"k{n}")[0].body.decode() for n in range(40)]
        got: list[str] = []
        for _ in range(100):
            got += bodies([*claim(one, limit=3), *claim(two, limit=3)])
        assert sorted(got) == sorted(sent)

    def test_every_subscription_sees_every_message(self, backend: Backend) -> None:
        topic = backend.topic(read_by=("one", "two"))
        backend.publish(topic, *"abc")
        one, two = backend.lane(topic, name="one"), backend.lane(topic, name="two")
        assert drain(one) == ["a", "b", "c"]
        assert drain(two) == ["a", "b", "c"]

    def test_several_topics_feed_one_subscription(self, backend: Backend) -> None:
        topics = [backend.topic(name) for name in ("one", "two", "three")]
        for topic in topics:
            backend.publish(topic, f"from {topic.name}", f"more from {topic.name}")
        handled = drain(backend.lane(*topics), limit=1)
        assert sorted(handled) == sorted(
            f"{word}from {topic.name}" for topic in topics for word in ("", "more ")
        )


class Receipts:
    """A receipt fences its claim."""

    def test_a_settlement_is_accepted_once(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a")
        lane = backend.lane(topic)
        [delivery] = claim(lane)
        assert list(lane.settle([Done(delivery.receipt)])) == []
        assert list(lane.settle([Done(delivery.receipt)])) == [delivery.receipt]

    def test_the_receipt_of_an_earlier_claim_is_refused(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a")
        lane = backend.lane(topic)
        [before] = claim(lane)
        backend.fall_silent()
        [after] = claim(lane)
        assert before.message.id == after.message.id
        for stale in (
            Done(before.receipt),
            Retry(before.receipt, 0, "stale"),
            Dead(before.receipt, "stale"),
            Release(before.receipt),
        ):
            assert list(lane.settle([stale])) == [before.receipt]
        assert list(claim(lane)) == [], "a stale settlement must not set its successor's claim free"
        assert list(lane.settle([Done(after.receipt)])) == []
        backend.fall_silent()
        assert list(claim(lane)) == []

    def test_a_receipt_is_refused_after_release_too(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a")
        lane = backend.lane(topic)
        [before] = claim(lane)
        lane.settle([Release(before.receipt)])
        [after] = claim(lane)
        assert list(lane.settle([Done(before.receipt)])) == [before.receipt]
        assert list(lane.settle([Done(after.receipt)])) == []

    def test_the_refused_do_not_hold_up_the_others(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a", "b")
        lane = backend.lane(topic)
        stale = claim(lane)
        backend.fall_silent()
        [held] = claim(lane)
        settlements = [Done(delivery.receipt) for delivery in (stale[0], held, stale[1])]
        assert list(lane.settle(settlements)) == [stale[0].receipt, stale[1].receipt]
        assert len(drain(lane)) == 1
        backend.fall_silent()
        assert list(claim(lane)) == []

    def test_a_claim_may_be_settled_in_parts(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, *"abcdef")
        lane = backend.lane(topic)
        claimed = claim(lane)
        settle_done(lane, [claimed[3], claimed[0]])
        settle_done(lane, [claimed[1]])
        settle_done(lane, [claimed[5], claimed[4], claimed[2]])
        backend.fall_silent()
        assert list(claim(lane)) == []

    def test_what_is_left_of_a_claim_comes_again(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, *"abcd")
        lane = backend.lane(topic)
        claimed = claim(lane)
        settle_done(lane, claimed[:2])
        backend.fall_silent()
        assert drain(lane) == ["c", "d"]


class Deaths:
    """Whose death is charged to what."""

    def test_the_first_death_of_a_batch_charges_nobody(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, *"abc")
        lane = backend.lane(topic)
        claim(lane)
        backend.fall_silent()
        for body in "abc":
            [delivery] = claim(lane)
            assert (delivery.message.body.decode(), delivery.attempt) == (body, 1)
            assert delivery.alone, "after a death each runs alone"
            assert delivery.repeated
            settle_done(lane, [delivery])
        assert list(claim(lane)) == []

    def test_a_death_alone_is_charged(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "mate", "poison", "friend")
        lane = backend.lane(topic)
        claim(lane)
        attempts = []
        for _ in range(8):
            backend.fall_silent()
            [delivery] = claim(lane)
            if bodies([delivery]) == ["poison"]:
                attempts.append(delivery.attempt)
            else:
                assert delivery.attempt == 1, "only the one that was alone is charged"
                settle_done(lane, [delivery])
        assert attempts == sorted(set(attempts)), "each death counts"
        assert attempts[0] == 1
        assert attempts[-1] >= 5

    def test_new_messages_do_not_run_beside_a_suspect(self, backend: Backend) -> None:
        topic = backend.topic()
        lane = backend.lane(topic)
        backend.publish(topic, "suspect")
        claim(lane)
        backend.fall_silent()
        backend.publish(topic, "new")
        alone = {}
        for _ in range(2):
            [delivery] = claim(lane)
            alone[delivery.message.body] = (delivery.alone, delivery.attempt)
            settle_done(lane, [delivery])
        assert alone == {b"suspect": (True, 1), b"new": (False, 1)}

    def test_releasing_a_suspect_charges_nothing(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a", "b")
        lane = backend.lane(topic)
        claim(lane)
        backend.fall_silent()
        for _ in range(3):
            [delivery] = claim(lane)
            assert (delivery.attempt, delivery.alone) == (1, True)
            lane.settle([Release(delivery.receipt)])

    def test_a_suspect_that_failed_is_no_suspect_any_more(self, backend: Backend) -> None:
        topic = backend.topic()
        backend.publish(topic, "a", "b")
        lane = backend.lane(topic)
        claim(lane)
        backend.fall_silent()
        [delivery] = claim(lane)
        assert bodies([delivery]) == ["a"]
        lane.settle([Retry(delivery.receipt, 0, "its handler raised, and its worker lives")])
        again: dict[str, tuple[int, bool]] = {}
        for batch in batches(lane):
            again |= {d.message.body.decode(): (d.attempt, d.alone) for d in batch}
            settle_done(lane, batch)
        assert again == {"a": (2, False), "b": (1, True)}
