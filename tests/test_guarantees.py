"""The pure page: the words of a guarantee, and when a failure is tried again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duly.errors import ConfigurationError, DecodeError, IdentityConflict
from duly.guarantees import PROMISES, Guarantee, RetryPolicy, guarantee_of


def test_every_guarantee_has_its_row() -> None:
    assert set(PROMISES) == set(Guarantee)


@pytest.mark.parametrize("word", [None, "", "exactly once", "EXACTLY-ONCE", "at-least"])
def test_a_missing_or_unknown_word_is_refused_with_all_three_explained(word: str | None) -> None:
    with pytest.raises(ConfigurationError) as refused:
        guarantee_of(word, "consumer 'billing'")
    text = str(refused.value)
    assert "consumer 'billing'" in text
    for guarantee, row in PROMISES.items():
        assert guarantee in text
        assert row.promise in text


def test_the_word_is_taken_as_it_is() -> None:
    assert guarantee_of("exactly-once", "here") is Guarantee.EXACTLY_ONCE


@pytest.mark.parametrize(
    "wrong",
    [
        {"attempts": 0},
        {"first_s": -1},
        {"factor": 0.5},
        {"first_s": 10, "longest_s": 5},
        {"jitter": 1.5},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        RetryPolicy(**wrong)  # type: ignore[arg-type]


def test_waiting_grows_to_its_bound() -> None:
    policy = RetryPolicy(attempts=100, first_s=1, factor=2, longest_s=10, jitter=0)
    waits = [policy.after_failure(attempt, ValueError(), 0.5) for attempt in range(1, 7)]
    assert waits == [1, 2, 4, 8, 10, 10]
    assert policy.delay_s(10_000, 0.5) == 10, "no overflow however often it failed"


@given(
    attempt=st.integers(1, 10_000),
    first_s=st.floats(0, 1e6),
    factor=st.floats(1, 100),
    more_s=st.floats(0, 1e6),
    jitter=st.floats(0, 1),
    roll=st.floats(0, 1, exclude_max=True),
)
def test_a_wait_is_never_negative_nor_over_its_bound(
    attempt: int, first_s: float, factor: float, more_s: float, jitter: float, roll: float
) -> None:
    policy = RetryPolicy(10, first_s, factor, first_s + more_s, jitter)
    assert 0 <= policy.delay_s(attempt, roll) <= policy.longest_s


def test_jitter_spreads_messages_that_failed_together() -> None:
    policy = RetryPolicy(first_s=10, jitter=0.5)
    assert policy.delay_s(1, 0.0) == 10
    assert policy.delay_s(1, 0.5) == 7.5


def test_the_last_attempt_has_no_further() -> None:
    policy = RetryPolicy(attempts=3)
    assert policy.after_failure(2, ValueError(), 0) is not None
    assert policy.after_failure(3, ValueError(), 0) is None
    assert policy.after_failure(4, ValueError(), 0) is None


@pytest.mark.parametrize("hopeless", [DecodeError("x"), IdentityConflict("x")])
def test_what_no_attempt_can_help_is_not_tried_again(hopeless: Exception) -> None:
    assert RetryPolicy(attempts=10).after_failure(1, hopeless, 0) is None


def test_rules_give_an_exception_its_own_policy_and_the_first_match_wins() -> None:
    patient = RetryPolicy(attempts=50, first_s=60, jitter=0)
    policy = RetryPolicy(
        attempts=1, rules=[(ConnectionError, patient), (OSError, RetryPolicy(attempts=2))]
    )
    assert policy.after_failure(1, ConnectionResetError(), 0) == 60
    assert policy.after_failure(1, FileNotFoundError(), 0) is not None
    assert policy.after_failure(2, FileNotFoundError(), 0) is None
    assert policy.after_failure(1, ValueError(), 0) is None
