"""In which order messages have to be handled that two publish at the same time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from duly.testing.history import About, Publish
from tests.proof.story import ALO, Story, message

KA, KB, KC = (message(each, key="k") for each in "abc")
BY_KEY = replace(ALO, order_by_key=True)


def beside(*, one_order: bool, second: str = "q") -> Story:
    """KA and KB by two at the same time, in the log in this order, then KC."""
    story = Story(BY_KEY)
    story.one_order = one_order
    for phase in ("invoke", "ok"):
        for who, each in (("p", KA), (second, KB)):
            story.add(Publish, who, phase, each)
    story.in_log(KA, KB)
    story.publish(KC)
    return story


def handled(story: Story, *messages: About) -> set[str]:
    for token, each in enumerate(messages):
        story.handled(each, str(token))
    return {anomaly.name for anomaly in story.judged().anomalies}


@pytest.mark.parametrize("order", [(KA, KB, KC), (KB, KA, KC)])
def test_a_queue_of_each_subscription_may_have_either_first(order: tuple[About, ...]):
    assert handled(beside(one_order=False), *order) == set()


def test_a_log_has_one_order():
    assert handled(beside(one_order=True), KB, KA, KC) == {"inversion"}


def test_one_publisher_has_its_order_everywhere():
    assert handled(beside(one_order=False, second="p"), KB, KA, KC) == {"inversion"}


@pytest.mark.parametrize("order", [(KC, KA, KB), (KA, KC, KB), (KB, KC, KA)])
def test_what_is_published_later_is_later_in_every_queue(order: tuple[About, ...]):
    assert handled(beside(one_order=False), *order) == {"inversion"}
