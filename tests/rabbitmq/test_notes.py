"""What is known of messages that stay in their place, when those who knew it are gone."""

from __future__ import annotations

import pytest

from duly.brokers.rabbitmq.notes import Note, judged, merged, written
from duly.brokers.rabbitmq.wire import History


def note(id: str = "a", **more: object) -> Note:
    known = {"replays": 0, "seen": 0, "charged": 1, "repeated": True, "suspect": False, **more}
    return Note("app", id, **known)  # type: ignore[arg-type]


def test_of_each_writer_the_last_counts_whatever_came_first():
    older, newer = note(charged=3, suspect=True), note(charged=2)
    bodies = [written("one", 8, [newer]), written("one", 7, [older])]
    assert merged(bodies) == {("app", "a", 0): newer}


def test_who_hangs_makes_no_count_fall():
    before, after = note(charged=1, seen=0), note(charged=2, seen=1)
    bodies = [written("old", 9, [before]), written("new", 1, [after])]
    assert merged(bodies) == merged(bodies[::-1]) == {("app", "a", 0): after}


def test_what_is_over_is_in_no_note():
    assert merged([written("one", 1, [note()]), written("one", 2, [])]) == {}


def test_what_nobody_had_before_is_as_it_came():
    carried = History(2, repeated=True)
    assert judged(0, carried, note(charged=9)) == (carried, False)


def test_what_somebody_died_with_is_suspect():
    assert judged(1, History(), None) == (History(0, repeated=True), True)


@pytest.mark.parametrize("repeated", [True, False])
def test_what_waited_when_its_process_died_is_not(repeated: bool):
    waited = note(seen=3, charged=2, repeated=repeated)
    assert judged(4, History(), waited) == (History(2, repeated=repeated), False)
    # But if it was taken over meanwhile, it may have been at work.
    assert judged(5, History(), waited) == (History(2, repeated=True), True)


def test_what_was_alone_when_its_process_died_is_charged_and_suspect():
    assert judged(4, History(), note(seen=3, charged=3, suspect=True)) == (
        History(3, repeated=True),
        True,
    )


def test_what_was_brought_back_is_another():
    before, after = note(charged=9), note(charged=1, replays=1)
    found = merged([written("one", 1, [before]), written("two", 1, [after])])
    assert found == {("app", "a", 0): before, ("app", "a", 1): after}


def test_the_note_of_an_earlier_life_does_not_count():
    """It was given up, and somebody published it again: the server counts from 0."""
    assert judged(1, History(), note(seen=4, charged=9)) == (History(0, repeated=True), True)


def test_a_step_of_the_clock_makes_no_wait_longer():
    waits = note(due_ms=100_000, wait_ms=5_000)
    assert waits.wait_s(97_000) == 3.0
    assert waits.wait_s(200_000) == 0.0
    assert waits.wait_s(-3_600_000) == 5.0
