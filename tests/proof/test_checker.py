"""Every property on two histories made by hand: one that breaks it alone, one that keeps it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from duly.guarantees import Admission, Guarantee
from duly.testing.checker import PROPERTIES, Terms, different_rows
from duly.testing.history import Admit, Claim, Dropped, Fault, Planned, Row, Waiting
from tests.proof.story import ALO, AMO, EXACT, Story, message, output_of

A, B, C = message("a"), message("b"), message("c")
KA, KB = message("a", key="k"), message("b", key="k")
BY_KEY = replace(ALO, order_by_key=True)

Tell = Callable[[], Story]
broken: dict[str, list[Tell]] = {}
kept: list[Tell] = []


def breaks(name: str) -> Callable[[Tell], Tell]:
    def enter(tell: Tell) -> Tell:
        broken.setdefault(name, []).append(tell)
        return tell

    return enter


def keeps(tell: Tell) -> Tell:
    kept.append(tell)
    return tell


# --- the plain course of things


@keeps
def plain_at_most_once() -> Story:
    story = Story(AMO)
    story.publish(A, B)
    story.handled(A, "1")
    story.handled(B, "2")
    return story


@keeps
def plain_at_least_once() -> Story:
    story = Story(ALO)
    story.publish(A, B)
    story.handled(A, "1")
    story.handled(B, "2")
    return story


@keeps
def plain_exactly_once() -> Story:
    story = Story(EXACT)
    story.publish(A, B)
    story.handled(A, "1")
    story.handled(B, "2")
    return story


@keeps
def plain_in_order() -> Story:
    story = Story(BY_KEY)
    story.publish(KA, KB)
    story.handled(KA, "1")
    story.handled(KB, "2")
    return story


# --- log and publishing


@breaks("phantom")
def nobody_published_it() -> Story:
    story = plain_at_least_once()
    story.in_log(C)
    return story


@breaks("aborted read")
def a_failed_publish_is_seen() -> Story:
    story = plain_at_least_once()
    story.publish(C, end="fail", stored=True)
    return story


@breaks("aborted read")
def a_rolled_back_transaction_is_seen() -> Story:
    story = plain_at_least_once()
    story.publish(C, tx="tx", stored=True)
    return story


@breaks("dirty read")
def seen_before_its_transaction_committed() -> Story:
    story = plain_at_least_once()
    story.publish(C, tx="tx", stored=True)
    story.handled(C, "3")
    story.commit("tx")
    return story


@keeps
def seen_after_its_transaction_committed() -> Story:
    story = plain_at_least_once()
    story.publish(C, tx="tx", stored=True)
    story.commit("tx")
    story.handled(C, "3")
    return story


@breaks("torn transaction")
def half_of_a_transaction_is_seen() -> Story:
    # Of unknown outcome, so that what is missing may be missing; but then all of it.
    story = plain_at_least_once()
    far = message("far", topic="elsewhere")
    story.publish(C, tx="tx", stored=True)
    story.publish(far, tx="tx", stored=False)
    story.commit("tx", "info")
    story.handled(C, "3")
    return story


@breaks("lost write")
def a_confirmed_message_is_not_in_the_log() -> Story:
    story = plain_at_least_once()
    story.not_in_log(A)
    return story


@keeps
def what_was_sent_and_confirmed_by_nobody_may_be_absent() -> Story:
    story = plain_at_least_once()
    story.terms = replace(ALO, confirms_publishing=False)
    story.not_in_log(A)
    return story


@keeps
def an_unknown_publish_may_be_absent() -> Story:
    story = plain_at_least_once()
    story.publish(C, end="info")
    return story


@breaks("lost")
def an_unknown_publish_that_was_seen_must_be_handled() -> Story:
    story = plain_at_least_once()
    story.publish(C, end="info", stored=True)
    return story


@keeps
def a_dropped_message_was_counted() -> Story:
    story = plain_at_most_once()
    story.add(Dropped, "p", C)
    return story


@breaks("duplicate")
def one_id_at_two_positions() -> Story:
    story = Story(EXACT)
    story.publish(A)
    story.publish(A)
    story.handled(A, "1")
    return story


@keeps
def a_repeated_publish_may_stand_twice_at_least_once() -> Story:
    story = Story(ALO)
    story.publish(A, end="info", stored=True)
    story.publish(A)
    story.handled(A, "1")
    story.handled(A, "2")
    return story


@breaks("duplicate")
def published_once_and_stored_twice() -> Story:
    story = plain_at_least_once()
    story.in_log(B)
    return story


def relayed_again(*, relays_once: bool) -> Story:
    """A relay is not answered, and another brings the output of a run once more."""
    story = Story(replace(EXACT, relays_once=relays_once))
    story.publish(A)
    output = output_of(story.handled(A, "1"))
    story.publish(output, who="relay 1", end="info", stored=False)
    story.publish(output, who="relay 2")
    return story


@breaks("duplicate")
def an_output_that_is_relayed_twice() -> Story:
    return relayed_again(relays_once=True)


@keeps
def an_output_may_stand_twice_where_relays_repeat() -> Story:
    return relayed_again(relays_once=False)


@breaks("inconsistent positions")
def two_messages_at_one_position() -> Story:
    story = Story(ALO)
    story.publish(A, B)
    for each, token in ((A, "1"), (B, "2")):
        story.claim(each, token, position="log@7")
        story.run(each, token)
        story.settle(token)
    return story


@breaks("nonmonotonic send")
def read_in_another_order_than_sent() -> Story:
    story = Story(ALO)
    story.publish(A, B, stored=False)
    story.in_log(B, A)
    story.handled(A, "1")
    story.handled(B, "2")
    return story


@keeps
def a_queue_promises_no_order() -> Story:
    story = read_in_another_order_than_sent()
    story.terms = replace(ALO, keeps_send_order=False)
    return story


@breaks("corruption")
def the_body_differs() -> Story:
    story = Story(ALO)
    story.publish(A, stored=False)
    other = message("a", content="y")
    story.in_log(other)
    story.handled(other, "1")
    return story


@breaks("corruption")
def the_key_differs() -> Story:
    story = Story(ALO)
    story.publish(A, stored=False)
    story.in_log(KA)
    story.handled(KA, "1")
    return story


# --- at most once


@breaks("double start")
def started_twice() -> Story:
    story = plain_at_most_once()
    story.claim(A, "3")
    story.settle("3")
    story.run(A, "3")
    return story


@breaks("start before settle")
def started_after_an_unknown_settlement() -> Story:
    story = Story(AMO)
    story.publish(A, B)
    story.handled(B, "2")
    story.claim(A, "1")
    story.settle("1", end="info")
    story.run(A, "1")
    return story


@breaks("start before settle")
def started_after_a_refused_settlement() -> Story:
    story = Story(AMO)
    story.publish(A, B)
    story.handled(B, "2")
    story.claim(A, "1")
    story.settle("1", end="fail", refused=True)
    story.run(A, "1")
    return story


@breaks("unexplained loss")
def settled_and_never_started() -> Story:
    story = plain_at_most_once()
    story.publish(C)
    story.claim(C, "3")
    story.settle("3")
    return story


@keeps
def a_crash_in_the_window_explains_a_loss() -> Story:
    story = settled_and_never_started()
    story.fault("crash")
    return story


@keeps
def an_unknown_settlement_explains_a_loss() -> Story:
    story = plain_at_most_once()
    story.publish(C)
    story.claim(C, "3")
    story.settle("3", end="info")
    return story


HANDS_OUT = Terms(
    Guarantee.AT_MOST_ONCE, hands_out_once=True, loses_waiting=frozenset({"node down"})
)


def two_handed_out() -> Story:
    story = Story(HANDS_OUT)
    story.publish(A, B)
    story.handled(A, "1")
    story.handled(B, "2")
    return story


def taken_off_and_never_started() -> Story:
    story = two_handed_out()
    story.publish(C)
    story.claim(C, "3")
    return story


@keeps
def a_crash_explains_what_was_taken_off_for_good() -> Story:
    story = taken_off_and_never_started()
    story.fault("crash")
    return story


@keeps
def what_was_given_back_to_a_broker_that_died_is_lost() -> Story:
    story = taken_off_and_never_started()
    story.settle("3", "release")
    story.fault("node down")
    return story


@keeps
def a_repeated_publish_of_which_the_log_lacks_one_is_two() -> Story:
    story = two_handed_out()
    story.publish(A, end="info", stored=False)
    story.handled(A, "3")
    return story


@breaks("unexplained loss")
def given_back_and_never_taken_again() -> Story:
    story = taken_off_and_never_started()
    story.settle("3", "release")
    return story


@breaks("unexplained loss")
def the_death_of_the_broker_is_no_excuse_for_what_was_not_given_back() -> Story:
    story = taken_off_and_never_started()
    story.settle("3")
    story.fault("node down")
    return story


@breaks("double start")
def taken_off_for_good_and_started_twice() -> Story:
    story = two_handed_out()
    story.claim(A, "3")
    story.settle("3")
    story.run(A, "3")
    return story


# --- at least once


@breaks("lost")
def settled_as_done_though_its_handler_was_cancelled() -> Story:
    story = plain_at_least_once()
    story.publish(C)
    story.claim(C, "3")
    story.run(C, "3", how="cancelled")
    return story


@keeps
def a_dead_letter_is_not_lost() -> Story:
    story = plain_at_least_once()
    story.publish(C)
    story.claim(C, "3")
    story.run(C, "3", how="raised")
    story.settle("3", "dead")
    story.dead(C)
    return story


@breaks("premature settle")
def settled_before_it_returned() -> Story:
    story = plain_at_least_once()
    story.publish(C)
    story.claim(C, "3")
    run = story.start(C, "3")
    story.settle("3")
    story.end(run)
    return story


@breaks("premature settle")
def cancelled_and_taken_for_failed() -> Story:
    story = plain_at_least_once()
    story.publish(C)
    story.claim(C, "3")
    story.run(C, "3", how="cancelled")
    story.settle("3", "retry")
    story.claim(C, "4", attempt=2)
    story.run(C, "4", attempt=2)
    story.settle("4")
    return story


@breaks("redelivery after a confirmed settle")
def delivered_again_after_it_was_settled() -> Story:
    story = plain_at_least_once()
    story.claim(A, "3")
    return story


@breaks("redelivery after a confirmed settle")
def delivered_to_a_claim_that_was_made_after_the_settlement() -> Story:
    story = plain_at_least_once()
    story.ask("v")
    story.claim(A, "3", who="v")
    return story


def stood_still(attempt: int = 1) -> Story:
    """Its claim was made before another had the message, and it tells of it afterwards."""
    story = Story(ALO)
    story.publish(A)
    story.ask("v")
    story.fault("pause", who="v")
    story.claim(A, "1")
    story.run(A, "1", attempt=attempt)
    story.settle("1")
    story.claim(A, "2", who="v")
    story.run(A, "2", who="v")
    story.settle("2", end="fail", who="v", refused=True)
    return story


@keeps
def who_stood_still_within_its_claim_tells_of_it_late() -> Story:
    return stood_still()


@keeps
def it_has_the_count_that_it_was_given() -> Story:
    return stood_still(attempt=2)


def waited(attempt: int = 1) -> Story:
    """The same where nobody stood still, and a process was killed long before."""
    story = stood_still(attempt)
    story.events = [each for each in story.events if not isinstance(each, Fault)]
    story.events.insert(0, Fault(0.0, "u", "crash"))
    return story


@keeps
def some_brokers_may_deliver_again() -> Story:
    story = delivered_again_after_it_was_settled()
    story.terms = replace(ALO, confirms_settlement=False)
    return story


@breaks("unexplained duplicate")
def run_twice_without_a_cause() -> Story:
    story = Story(ALO)
    story.publish(A)
    story.claim(A, "1")
    story.run(A, "1")
    story.handled(A, "2")
    return story


@keeps
def a_crash_explains_a_repeat() -> Story:
    story = Story(ALO)
    story.publish(A)
    story.claim(A, "1")
    story.run(A, "1")
    story.fault("crash")
    story.handled(A, "2")
    return story


@keeps
def a_failure_explains_a_repeat() -> Story:
    story = Story(ALO)
    story.publish(A)
    story.claim(A, "1")
    story.run(A, "1", how="raised")
    story.settle("1", "retry")
    story.handled(A, "2", attempt=2)
    return story


@breaks("poison loop")
def more_attempts_than_the_policy_allows() -> Story:
    story = Story(replace(ALO, attempts=1))
    story.publish(A)
    story.claim(A, "1")
    story.run(A, "1", how="raised")
    story.settle("1", "retry")
    story.handled(A, "2", attempt=2)
    return story


@breaks("poison loop")
def the_count_of_a_started_message_falls() -> Story:
    story = Story(ALO)
    story.publish(A)
    for token, attempt in (("1", 1), ("2", 2), ("3", 1)):
        story.claim(A, token)
        story.run(A, token, how="returned" if token == "3" else "raised", attempt=attempt)
        story.settle(token, "done" if token == "3" else "retry")
    return story


# --- exactly once


@breaks("duplicate effect")
def two_effects_of_one_message() -> Story:
    story = Story(replace(EXACT, admission=Admission.BY_INBOX, drops_repeats=False))
    story.publish(A, end="info", stored=True)
    story.publish(A)
    story.handled(A, "1")
    story.handled(A, "2")
    return story


@breaks("lost effect")
def no_effect_and_not_dead() -> Story:
    story = plain_exactly_once()
    story.publish(C)
    return story


def published_twice_by_position(*effects: str) -> Story:
    """As a log has it that is admitted by its positions: a repeated publish is another message."""
    story = Story(
        replace(EXACT, admission=Admission.BY_CURSOR, drops_repeats=False, repeats_count=True)
    )
    story.publish(A, end="info", stored=True)
    story.publish(A)
    for token in effects:
        story.handled(A, token)
    return story


@keeps
def each_copy_has_its_effect() -> Story:
    return published_twice_by_position("1", "2")


@breaks("lost effect")
def a_copy_without_its_effect() -> Story:
    return published_twice_by_position("1")


@breaks("duplicate effect")
def an_effect_more_than_there_are_copies() -> Story:
    return published_twice_by_position("1", "2", "3")


@breaks("effect of a dead letter")
def dead_with_its_effect() -> Story:
    story = plain_exactly_once()
    story.dead(A)
    return story


@breaks("identity conflict")
def two_bodies_under_one_id() -> Story:
    story = Story(replace(EXACT, drops_repeats=True))
    other = message("a", content="y")
    story.publish(A)
    story.publish(other, stored=False)
    story.handled(A, "1")
    return story


@keeps
def the_second_body_is_refused() -> Story:
    story = plain_exactly_once()
    story.publish(message("a", content="y"), end="fail")
    return story


@breaks("torn effect")
def a_row_in_one_table_only() -> Story:
    story = plain_exactly_once()
    story.publish(C)
    story.claim(C, "3")
    story.admit("tx", "3")
    run = story.run(C, "3", tx="tx")
    story.publish_output(run, "tx")
    story.settle("3", tx="tx")
    story.commit("tx")
    story.there(C, run, tables=["one"])
    return story


@breaks("ghost message")
def an_output_without_its_effect() -> Story:
    story = plain_exactly_once()
    story.publish(C)
    story.claim(C, "3")
    story.admit("tx-1st", "3")
    run = story.run(C, "3", tx="tx-1st")
    story.publish_output(run, "tx-1st")
    story.commit("tx-1st", "info")
    story.there(C, run, tables=[])
    story.transaction(C, "3", "tx-2nd")
    return story


@breaks("missing output")
def an_effect_without_its_output() -> Story:
    story = plain_exactly_once()
    story.publish(C)
    story.claim(C, "3")
    story.admit("tx", "3")
    run = story.run(C, "3", tx="tx")
    story.settle("3", tx="tx")
    story.commit("tx")
    story.there(C, run, output=False)
    return story


@breaks("zombie commit")
def a_superseded_claim_commits() -> Story:
    story = plain_exactly_once()
    story.publish(C)
    story.claim(C, "3")
    story.fault("pause")
    story.claim(C, "4", who="v")
    story.transaction(C, "3", "tx")
    return story


@keeps
def a_claim_commits_that_another_had_before_and_tells_of_late() -> Story:
    story = plain_exactly_once()
    story.publish(C)
    story.ask(who="v")
    story.fault("pause", "v")
    story.claim(C, "4", repeated=True)
    story.claim(C, "3", who="v")
    story.transaction(C, "4", "tx")
    return story


@keeps
def a_superseded_claim_is_refused() -> Story:
    story = plain_exactly_once()
    story.publish(C)
    story.claim(C, "3")
    story.fault("pause")
    story.claim(C, "4", who="v")
    story.transaction(C, "3", "tx", end="fail")
    story.transaction(C, "4", "tx2", who="v")
    return story


@breaks("blind retry")
def settled_after_an_unknown_commit() -> Story:
    story = Story(replace(EXACT, admission=Admission.BY_INBOX))
    story.publish(A, B)
    story.handled(B, "2")
    story.claim(A, "1")
    run = story.transaction(A, "1", "tx", end="info")
    story.there(A, run)
    story.settle("1")
    return story


@keeps
def released_after_an_unknown_commit() -> Story:
    story = Story(EXACT)
    story.publish(A, B)
    story.handled(B, "2")
    story.claim(A, "1")
    story.transaction(A, "1", "tx", end="info")
    story.settle("1", "release")
    story.handled(A, "3")
    return story


@breaks("silent rollback")
def committed_and_nothing_is_there() -> Story:
    story = plain_exactly_once()
    story.publish(C)
    story.claim(C, "3")
    story.admit("tx", "3")
    story.run(C, "3", tx="tx")
    story.settle("3", tx="tx")
    story.commit("tx")
    story.dead(C)
    return story


@breaks("scope honesty")
def reported_once_and_happened_twice() -> Story:
    story = Story(ALO)
    story.publish(A)
    story.effect(story.handled(A, "1"))
    story.effect("run1")
    story.reported(A, 1)
    return story


@keeps
def reported_as_often_as_it_happened() -> Story:
    story = Story(ALO)
    story.publish(A)
    story.effect(story.handled(A, "1"))
    story.reported(A, 1)
    return story


@breaks("dedup horizon")
def an_old_repeat_is_run() -> Story:
    story = Story(replace(EXACT, admission=Admission.BY_INBOX, inbox_retention_s=60))
    old = message("a")
    story.publish(old)
    story.claim(old, "1", repeated=True)
    for _ in range(80):
        story.add(Claim, "w", "invoke", "c")
    story.transaction(old, "1", "tx")
    return story


# --- order


@keeps
def a_zombie_that_was_refused_has_not_succeeded() -> Story:
    story = Story(BY_KEY)
    story.publish(KA, KB)
    story.claim(KA, "1", who="zombie")
    story.fault("pause", "zombie")
    story.claim(KA, "2", attempt=2)
    story.run(KA, "2", how="raised", attempt=2)
    story.settle("2", "dead")
    story.dead(KA)
    story.handled(KB, "3")
    story.run(KA, "1", who="zombie")
    story.settle("1", end="fail", refused=True, who="zombie")
    return story


@keeps
def of_two_copies_nobody_knows_which_was_settled() -> Story:
    """Who ran both in order dies before it hears of the settlement; the second stands there twice.
    Both are done again, in order.
    """
    story = Story(replace(ALO, order_by_key=True, confirms_settlement=False))
    story.publish(KA)
    story.publish(KB, end="info", stored=True)
    story.publish(KB)
    for each, token in ((KA, "1"), (KB, "2")):
        story.claim(each, token)
        story.run(each, token)
        story.settle(token, end="")
    story.fault("crash")
    for each, token in ((KA, "3"), (KB, "4"), (KB, "5")):
        story.claim(each, token, who="v")
        story.run(each, token)
        story.settle(token)
    return story


@breaks("inversion")
def the_later_one_first() -> Story:
    story = Story(BY_KEY)
    story.publish(KA, KB)
    story.handled(KB, "2")
    story.handled(KA, "1")
    return story


@breaks("skip")
def done_while_an_earlier_one_waits() -> Story:
    story = Story(BY_KEY)
    story.publish(KA, KB)
    story.claim(KA, "1")
    story.run(KA, "1", how="raised")
    story.settle("1", "retry")
    story.handled(KB, "2")
    story.claim(KA, "3")
    story.run(KA, "3", how="raised", attempt=2)
    story.settle("3", "dead")
    story.dead(KA)
    return story


@breaks("head of line")
def done_behind_a_dead_letter() -> Story:
    story = done_behind_a_dead_letter_that_holds_nothing()
    story.terms = replace(BY_KEY, hold_key_on_dead=True)
    return story


@keeps
def done_behind_a_dead_letter_that_holds_nothing() -> Story:
    story = Story(BY_KEY)
    story.publish(KA, KB)
    story.claim(KA, "1")
    story.run(KA, "1", how="raised")
    story.settle("1", "dead")
    story.dead(KA)
    story.handled(KB, "2")
    return story


@breaks("overlap")
def two_at_once() -> Story:
    story = Story(BY_KEY)
    story.publish(KA, KB)
    story.claim(KA, "1")
    story.claim(KB, "2", who="v")
    first = story.start(KA, "1")
    second = story.start(KB, "2", who="v")
    story.end(first)
    story.end(second, who="v")
    story.settle("1")
    story.settle("2", who="v")
    return story


@keeps
def a_fenced_zombie_may_still_run() -> Story:
    story = Story(BY_KEY)
    story.publish(KA)
    story.claim(KA, "1")
    first = story.start(KA, "1")
    story.fault("pause")
    story.claim(KA, "2", who="v")
    story.run(KA, "2", who="v")
    story.settle("2", who="v")
    story.end(first)
    story.settle("1", end="fail", refused=True)
    return story


# --- liveness


def test_what_still_waits_is_stuck() -> None:
    judged = plain_at_least_once().judged(waiting=[Waiting("c", "t", backlog=2)])
    assert judged.names() == {"stuck"}


def test_what_is_left_open_is_a_leak() -> None:
    judged = plain_at_least_once().judged(leaks=["a transaction is open"])
    assert judged.names() == {"leak"}


# --- the tests


@pytest.mark.parametrize(
    ("name", "tell"),
    [pytest.param(n, t, id=f"{n}: {t.__name__}") for n, all_ in broken.items() for t in all_],
)
def test_it_is_caught_by_its_name_and_no_other(name: str, tell: Tell) -> None:
    judged = tell().judged()
    assert judged.verdict == "invalid"
    assert judged.names() == {name}, [str(anomaly) for anomaly in judged.anomalies]


@pytest.mark.parametrize("tell", [pytest.param(t, id=t.__name__) for t in kept])
def test_it_is_valid(tell: Tell) -> None:
    judged = tell().judged()
    assert judged.verdict == "valid", (judged.anomalies, judged.unknown)


@pytest.mark.parametrize("attempt", [1, 2])
def test_who_only_waited_is_to_be_given_nothing_that_was_settled(attempt: int) -> None:
    names = waited(attempt).judged().names()
    fell = {"poison loop"} if attempt > 1 else set[str]()
    assert names == {"redelivery after a confirmed settle", "unexplained duplicate"} | fell


def test_every_property_is_tried() -> None:
    assert set(broken) | {"stuck", "leak"} == set(PROPERTIES)


def test_rows_that_differ_from_the_fault_free_run() -> None:
    reference = [Row("one", A, "r1"), Row("log", A, "r1")]
    assert not different_rows(reference, [Row("one", A, "r9")], volatile=frozenset({"log"}))
    found = different_rows(reference, [Row("one", B, "r1"), Row("log", A, "r2")])
    assert [str(each) for each in found] == [
        "different rows: one: a is missing",
        "different rows: one: b should not be there",
    ]


# --- unknown


def unknown_of(story: Story) -> tuple[str, ...]:
    judged = story.judged()
    assert judged.verdict == "unknown", judged.anomalies
    return judged.unknown


def test_unknown_when_an_operation_never_succeeded() -> None:
    story = Story(ALO)
    story.publish(A, end="fail")
    assert unknown_of(story) == (
        "no publish ever succeeded",
        "no claim ever succeeded",
        "no handler ever succeeded",
        "no settlement ever succeeded",
    )


def test_unknown_when_nothing_committed() -> None:
    story = Story(EXACT)
    story.publish(A)
    story.claim(A, "1")
    story.add(Admit, "w", "tx", "c", "by claim", ("1",))
    story.run(A, "1", tx="tx")
    story.commit("tx", "fail")
    story.dead(A)
    assert unknown_of(story) == ("no commit ever succeeded",)


def test_unknown_when_a_planned_fault_never_hit() -> None:
    story = plain_at_least_once()
    story.add(Planned, "plan", "pause")
    assert unknown_of(story) == ("the fault 'pause' never hit",)
    story = plain_at_least_once()
    story.add(Planned, "plan", "pause")
    story.fault("pause")
    assert story.judged().verdict == "valid"


def test_unknown_when_a_crash_point_was_not_reached() -> None:
    story = plain_at_least_once()
    story.terms = replace(ALO, crash_points=frozenset({"settled"}))
    assert unknown_of(story) == ("the crash point 'settled' was never reached",)
    story = plain_at_least_once()
    story.terms = replace(ALO, crash_points=frozenset({"settled"}))
    story.fault("crash", point="settled")
    assert story.judged().verdict == "valid"
