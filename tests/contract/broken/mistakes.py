"""What is wrong with each, and which tests have to say so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace as with_fields
from typing import Any

from duly.store import outbox_of
from duly.testing.conformance import BrokerSubject, Site, StoreSubject
from duly.testing.conformance.memory import LOG, QUEUE, STORE, STORE_APART
from tests.contract.broken.brokers import (
    AcceptsWhatIsStale,
    BuriesWithoutAGrave,
    ClaimsMore,
    ClosingSettles,
    ConfirmsBeforeItStores,
    ConfirmsWhatIsTooLarge,
    CountsFromPublishing,
    CountsNoAttempts,
    CountsOffsetsAnew,
    CutsLongIds,
    DeliversAtOnce,
    DropsByContent,
    ErasesTheLogOnly,
    ExtendsNothing,
    FencesNobodyOff,
    FollowsInCircles,
    ForgetsHeaders,
    ForgetsWhatIsRepeated,
    IgnoresBytes,
    IgnoresOrder,
    IgnoresTheStart,
    KeepsForADay,
    LetsKeysGoOn,
    LooksBeforeItStores,
    LosesEveryTenthRelease,
    LosesSettlements,
    MakesPositionsUp,
    NeverCloses,
    NeverWaits,
    PausesInWords,
    RecordsNoGuarantee,
    RetriesAtOnce,
    RewindsWhatIsSettledOnly,
    RunsSuspectsTogether,
    SettlesAtTheNextClaim,
    SettlesById,
    SharesSubscriptions,
    ShowsNoDeadLetters,
    StoresBackwards,
    TakesConflictsForRepeats,
    TakesErasedIdsAgain,
    TakesWhatNobodyReads,
    TellsNoErrors,
)
from tests.contract.broken.burying import BURYING
from tests.contract.broken.coats import Outlives, Sound
from tests.contract.broken.lanes import LANES
from tests.contract.broken.mending import (
    AddsTopicsUp,
    CountsCalls,
    ForgetsReplays,
    ForgetsWhatIsParked,
    HalfAMender,
    HalfAnObserver,
    KeepsTheDead,
    KeepsWhatItReplays,
    MendsByMessage,
    MendsInWords,
    MendsTheFirstOnly,
    NamesNobody,
    NotesNothing,
    PublishesReplaysAnew,
    ReplaysAfterAWhile,
    SelectsLoosely,
    TakesTheClaimedForDone,
    TellsEverything,
)
from tests.contract.broken.mistake import Mistake
from tests.contract.broken.operated import OPERATED
from tests.contract.broken.stores import (
    AdmitsByAnything,
    AdmitsEverything,
    CommitsAgain,
    CommitsOnlyInWords,
    IsAnotherDatabase,
    LeavesItsTransactionOpen,
    ManyRelays,
    OverlooksConflicts,
    OvertakesInAKey,
    ParksNothing,
    ParksOutsideTheTransaction,
    PublishesAtOnce,
    PublishesWithinInWords,
    RemembersOutsideTheTransaction,
    SavepointsAreDecoration,
    SendsInWords,
    SendsUpTo,
    TakesForFenced,
    TakesWithoutALease,
)
from tests.contract.subjects import DOCS, SQLITE, SQLITE_STORE

BROKERS = (
    Mistake(ClaimsMore, ("Page::test_capabilities_are_as_the_page_says",)),
    Mistake(StoresBackwards, ("Publishing::test_messages_of_a_topic_stay_in_order",)),
    Mistake(ForgetsHeaders, ("Publishing::test_what_is_published_is_delivered_unchanged",)),
    Mistake(DropsByContent, ("Identity::test_equal_messages_under_two_ids_are_two_events",)),
    Mistake(TakesConflictsForRepeats, ("Identity::test_one_id_with_another_body_is_a_conflict",)),
    Mistake(DeliversAtOnce, ("Delays::test_a_due_time_is_kept",)),
    Mistake(
        CountsFromPublishing,
        (
            "Delays::test_a_due_time_names_a_moment[1]",
            "Delays::test_a_due_time_names_a_moment[-1]",
        ),
    ),
    Mistake(ConfirmsWhatIsTooLarge, ("Limits::test_a_body_over_the_limit_is_refused",)),
    Mistake(CutsLongIds, ("Limits::test_the_longest_id_and_key_arrive_whole[x]",)),
    Mistake(
        ConfirmsBeforeItStores,
        ("Durable::test_what_was_published_is_there[crash]",),
        SQLITE,
        "sqlite.md",
    ),
    Mistake(IgnoresBytes, ("Claims::test_a_claim_is_limited_in_bytes",)),
    Mistake(SharesSubscriptions, ("Claims::test_every_subscription_sees_every_message",)),
    Mistake(
        SettlesById,
        (
            "Receipts::test_the_receipt_of_an_earlier_claim_is_refused",
            "Leases::test_a_paused_worker_is_refused_when_it_wakes[settle]",
        ),
    ),
    Mistake(
        AcceptsWhatIsStale,
        (
            "Receipts::test_a_settlement_is_accepted_once",
            "Crowds::test_settling_from_many_threads",
        ),
    ),
    Mistake(
        SettlesAtTheNextClaim,
        (
            "Leases::test_a_lease_that_ended_gives_the_message_to_another",
            "Faults::test_a_claim_whose_answer_was_lost_comes_again",
        ),
    ),
    Mistake(ExtendsNothing, ("Leases::test_extending_holds_the_claim",)),
    Mistake(
        CountsNoAttempts,
        ("Settling::test_a_retry_waits_and_counts", "Deaths::test_a_death_alone_is_charged"),
    ),
    Mistake(
        RunsSuspectsTogether,
        (
            "Deaths::test_the_first_death_of_a_batch_charges_nobody",
            "Kills::test_a_killed_worker_makes_its_claims_suspect",
        ),
    ),
    Mistake(RetriesAtOnce, ("Settling::test_a_retry_waits_and_counts",)),
    Mistake(BuriesWithoutAGrave, ("Inside::test_a_dead_letter_is_kept_with_its_history",)),
    Mistake(
        LosesEveryTenthRelease,
        (
            "Settling::test_released_messages_come_again_uncharged",
            "Histories::test_random_histories_agree_with_the_model[0]",
            "Order::test_order_holds_whatever_happens[0]",
        ),
    ),
    Mistake(
        LosesSettlements,
        (
            "Confirmed::test_not_after_its_worker_fell_silent",
            "Faults::test_at_least_once_under_random_faults[0]",
        ),
    ),
    Mistake(ClosingSettles, ("Leases::test_closing_gives_everything_back_uncharged",)),
    Mistake(NeverWaits, ("Waiting::test_publishing_wakes_a_waiting_claim",)),
    Mistake(KeepsForADay, ("Retention::test_messages_are_kept_for_those_who_are_not_done",)),
    Mistake(IgnoresOrder, ("Order::test_a_key_that_is_claimed_is_not_claimed_again",)),
    Mistake(LetsKeysGoOn, ("HeldKeys::test_a_key_waits_behind_a_dead_letter",)),
    Mistake(IgnoresTheStart, ("Replays::test_or_after_the_newest",)),
    Mistake(
        RecordsNoGuarantee,
        ("Subscriptions::test_another_guarantee_is_refused[at-most-once]",),
    ),
    Mistake(
        PausesInWords, ("Steered::test_nothing_is_claimed_while_it_is_paused",), SQLITE, "sqlite.md"
    ),
    Mistake(
        RewindsWhatIsSettledOnly,
        ("Steered::test_a_claim_on_what_comes_again_is_lost",),
        SQLITE,
        "sqlite.md",
    ),
    Mistake(FollowsInCircles, ("Traced::test_following_takes_no_part",), SQLITE, "sqlite.md"),
    Mistake(TellsNoErrors, ("Traced::test_where_it_stands_for_everybody",), SQLITE, "sqlite.md"),
    Mistake(
        TakesErasedIdsAgain,
        ("Erased::test_a_repeat_of_it_is_dropped_as_before",),
        SQLITE,
        "sqlite.md",
    ),
    Mistake(ErasesTheLogOnly, ("Erased::test_wherever_it_is",), SQLITE, "sqlite.md"),
    Mistake(CountsOffsetsAnew, ("Positions::test_a_message_keeps_its_position",), LOG),
    Mistake(FencesNobodyOff, ("Entrances::test_whoever_resumes_fences_off_the_other",), LOG),
)

OTHERS = (
    Mistake(NeverCloses, ("Restart::test_a_closed_broker_takes_and_gives_nothing",)),
    Mistake(Outlives, ("Forgetful::test_a_restart_leaves_nothing[crash]",), stays=True),
    Mistake(
        ShowsNoDeadLetters,
        ("DurableInside::test_dead_letters_and_incidents_survive[crash]",),
        SQLITE,
        "sqlite.md",
    ),
    Mistake(LooksBeforeItStores, ("IdentityInCrowds::test_one_identity_from_many_threads",)),
    Mistake(
        DropsByContent,
        (
            "NoIdentity::test_a_repeat_on_an_exactly_once_topic_is_stored",
            "NoIdentityInCrowds::test_one_identity_from_many_threads",
        ),
        QUEUE,
    ),
    Mistake(
        TakesWhatNobodyReads,
        ("NoReplays::test_a_message_that_nobody_takes_is_refused",),
        says=("replays = true", "replays = false"),
    ),
    Mistake(DeliversAtOnce, ("NoDelays::test_a_due_time_is_refused[5]",), LOG),
    Mistake(
        DeliversAtOnce,
        ("OrderWithDelays::test_a_due_time_holds_nothing_but_itself_before_it_is_reached",),
    ),
    Mistake(
        Sound,
        ("HandedOutOnce::test_what_was_claimed_never_comes_again",),
        QUEUE,
        says=("hands_out_once = false", "hands_out_once = true"),
    ),
    Mistake(
        Sound,
        ("NoOrderWithDelays::test_a_due_time_is_refused",),
        says=("delays_in_order = true", "delays_in_order = false"),
    ),
    Mistake(
        IgnoresOrder,
        ("NoOrder::test_order_by_key_is_refused", "NoHeldKeys::test_holding_a_key_is_refused"),
        QUEUE,
    ),
    Mistake(
        ForgetsWhatIsRepeated,
        ("Unconfirmed::test_a_lost_settlement_comes_again_and_says_so",),
        QUEUE,
    ),
    Mistake(MakesPositionsUp, ("NoPositions::test_deliveries_have_no_position",)),
    Mistake(
        Sound,
        ("NoInside::test_it_has_no_such_call[dead_letters]",),
        says=(
            "inspection = true\nmending = true\nobserving = false\n\n[memory-log]",
            "inspection = false\nmending = true\nobserving = false\n\n[memory-log]",
        ),
    ),
)

MENDING = "Mending::test_"

# Every test of what people see and mend is seen to find one of these.
INSIDE = (
    Mistake(
        PublishesReplaysAnew,
        (
            MENDING + "a_replay_is_the_same_message",
            MENDING + "a_replay_reaches_its_subscription_and_nobody_else",
            "MendingInOrder::test_a_replay_comes_first_of_its_key",
        ),
    ),
    Mistake(
        KeepsWhatItReplays,
        (
            MENDING + "a_replay_begins_anew_and_is_delivered_once",
            MENDING + "what_is_no_dead_letter_any_more_is_told[replay]",
            MENDING + "of_many_who_replay_one_succeeds",
        ),
    ),
    Mistake(
        MendsInWords,
        (
            MENDING + "a_discarded_one_is_gone_for_good",
            MENDING + "what_is_no_dead_letter_any_more_is_told[discard]",
            MENDING + "the_log_may_have_forgotten_it",
            MENDING + "a_replay_wakes_who_waits",
            MENDING + "a_list_goes_on_where_it_ended",
            "MendingHeldKeys::test_a_held_key_goes_on[discard]",
            "MendingHeldKeys::test_of_two_dead_of_a_held_key_the_earlier_goes_first",
        ),
    ),
    Mistake(MendsByMessage, (MENDING + "an_old_letter_does_not_stand_for_a_new_one",)),
    Mistake(MendsTheFirstOnly, (MENDING + "many_are_replayed_in_one_call",)),
    Mistake(ForgetsReplays, (MENDING + "how_often_it_was_replayed_is_known[release]",)),
    Mistake(SelectsLoosely, (MENDING + "which_are_meant",)),
    Mistake(NotesNothing, (MENDING + "each_is_noted[discard-discarded]",)),
    Mistake(
        HalfAMender, (MENDING + "it_has_every_call", "Page::test_capabilities_are_as_the_page_says")
    ),
    Mistake(
        ReplaysAfterAWhile,
        ("DurableMending::test_a_replay_survives[crash]",),
        SQLITE,
        "sqlite.md",
    ),
    Mistake(
        Sound,
        (
            "NoMending::test_it_has_no_such_call[replay]",
            "NoMending::test_duly_dead_refuses_it",
        ),
        says=(
            "mending = true\nobserving = false\n\n[memory-log]",
            "mending = false\n\n[memory-log]",
        ),
    ),
    Mistake(AddsTopicsUp, ("States::test_each_topic_of_each_subscription_by_name",)),
    Mistake(TakesTheClaimedForDone, ("States::test_a_state_goes_with_what_happens",)),
    Mistake(CountsCalls, ("States::test_incidents_count_messages",)),
    Mistake(TellsEverything, ("States::test_incidents_are_narrowed_and_limited",)),
    Mistake(HalfAnObserver, ("Observing::test_it_has_every_call",), SQLITE, "sqlite.md"),
    Mistake(
        NamesNobody,
        ("Observing::test_who_holds_what", "Observing::test_who_is_done_holds_nothing"),
        SQLITE,
        "sqlite.md",
    ),
    Mistake(ForgetsWhatIsParked, ("Observing::test_how_old_the_oldest_is",), SQLITE, "sqlite.md"),
    Mistake(
        KeepsTheDead,
        ("Observing::test_what_was_given_up_on_does_not_grow_older",),
        SQLITE,
        "sqlite.md",
    ),
    Mistake(
        Sound,
        ("NoObserving::test_it_has_no_such_call[holders]",),
        SQLITE,
        "sqlite.md",
        says=("observing = true", "observing = false"),
    ),
)

STORES = (
    Mistake(
        RemembersOutsideTheTransaction,
        ("ExactlyOnce::test_a_crash_at_any_step_leaves_effects_and_outputs_once",),
        STORE_APART,
    ),
    Mistake(
        AdmitsEverything,
        (
            "ExactlyOnce::test_a_superseded_claim_does_not_commit",
            "ByInbox::test_a_repeated_publish_takes_effect_once",
        ),
        STORE_APART,
    ),
    Mistake(
        CommitsOnlyInWords,
        (
            "Publications::test_a_transaction_of_its_own_publishes_with_its_effects",
            "FaultsInTransactions::test_a_fault_in_each_call",
        ),
        STORE_APART,
    ),
    Mistake(
        PublishesAtOnce,
        (
            "Publications::test_a_transaction_of_its_own_publishes_with_its_effects",
            "FaultsInTransactions::test_a_worker_that_is_ended_in_each_call",
        ),
        STORE_APART,
    ),
    Mistake(
        SavepointsAreDecoration,
        ("Savepoints::test_a_savepoint_undoes_one_message_and_no_more",),
        STORE_APART,
    ),
    Mistake(
        LeavesItsTransactionOpen,
        (
            "ExactlyOnce::test_a_crash_at_any_step_leaves_effects_and_outputs_once",
            "OneWriter::test_one_writer_at_a_time",
        ),
        STORE_APART,
    ),
)

OTHER_STORES = (
    Mistake(
        AdmitsEverything,
        (
            "ByCursor::test_what_lies_below_the_cursor_is_repeated",
            "DoubtInTransactions::test_effects_are_once_all_the_same",
        ),
        STORE_APART,
    ),
    Mistake(
        CommitsOnlyInWords,
        ("CrowdsInTransactions::test_exactly_once_workers_side_by_side",),
        STORE_APART,
    ),
    Mistake(CommitsAgain, ("Transactions::test_a_session_is_over_after_its_end",), STORE_APART),
    Mistake(AdmitsByAnything, ("ByClaimElsewhere::test_it_is_refused",), STORE_APART),
    Mistake(
        IsAnotherDatabase,
        (
            "StorePage::test_capabilities_are_as_the_page_says",
            "StorePageByClaim::test_it_is_the_brokers_database",
        ),
        STORE,
    ),
    Mistake(PublishesWithinInWords, ("Within::test_it_is_seen_when_that_commits",), STORE_APART),
    Mistake(OverlooksConflicts, ("IntoTheLog::test_an_identity_conflict_is_found_inside",), STORE),
    Mistake(Outlives, ("ForgetfulStore::test_nothing_is_left",), STORE_APART, stays=True),
    Mistake(
        Sound,
        ("NoOutbox::test_it_has_none",),
        STORE_APART,
        says=("one_writer = true\noutbox = true", "one_writer = true\noutbox = false"),
    ),
)

OUTBOXES = (
    Mistake(
        SendsInWords, ("DurableStore::test_what_was_committed_is_there",), SQLITE_STORE, "sqlite.md"
    ),
    Mistake(SendsUpTo, ("Outboxes::test_what_is_sent_is_gone",), STORE_APART),
    Mistake(OvertakesInAKey, ("Outboxes::test_a_key_waits_behind_its_refused_one",), STORE_APART),
    Mistake(
        ManyRelays,
        ("Outboxes::test_one_relay_at_a_time", "Relaying::test_a_second_relay_takes_over"),
        STORE_APART,
    ),
)

PARKING = (
    Mistake(
        ParksOutsideTheTransaction,
        ("Parking::test_it_is_parked_by_the_transaction_or_not_at_all",),
        STORE_APART,
    ),
    Mistake(ParksNothing, ("Parking::test_the_cursor_passes_what_is_parked",), STORE_APART),
    Mistake(
        TakesForFenced,
        (
            "Parking::test_what_has_ended_does_not_end_again",
            "Parking::test_a_lease_that_is_over_is_another_ones",
        ),
        STORE_APART,
    ),
)

PARKED = (
    Mistake(
        TakesWithoutALease,
        (
            "Parking::test_nobody_else_takes_what_is_taken",
            "Parking::test_from_many_threads_each_is_taken_once",
            "ParkingDurably::test_it_survives",
        ),
        SQLITE_STORE,
        "sqlite.md",
    ),
)

MISTAKES = {
    mistake.name(): mistake
    for mistake in (
        *(*BROKERS, *LANES, *OTHERS, *INSIDE, *OPERATED, *BURYING),
        *(*STORES, *OTHER_STORES, *OUTBOXES, *PARKING, *PARKED),
    )
}


def page_of(mistake: Mistake) -> str:
    """What the page says of the subject with this mistake in it."""
    text = (DOCS / mistake.page).read_text(encoding="utf-8")
    assert mistake.says[0] in text
    return text.replace(*mistake.says)


def subject_with(name: str) -> BrokerSubject | StoreSubject:
    """The subject with this mistake in it."""
    mistake = MISTAKES[name]
    around = mistake.around
    opened: dict[Any, Any] = {}

    def coated(site: Site, *beside: Any) -> Any:
        # One object a test, where the mistake is that it outlives what it belongs to.
        key = site.folder if mistake.stays else object()
        if key not in opened:
            opened[key] = mistake.coat(around.open(site, *beside))
        return opened[key]

    if isinstance(around, BrokerSubject):
        return with_fields(around, open=coated, kill=around.kill and killed(around.kill))
    if mistake in OUTBOXES:
        return with_fields(around, outbox=lambda _, store: mistake.coat(outbox_of(store)))
    if mistake in PARKED:
        assert isinstance(around, StoreSubject)
        sound = around.parked
        assert sound is not None
        return with_fields(around, parked=lambda *there: mistake.coat(sound(*there)))
    return with_fields(around, open=coated)


def killed(kill: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    return lambda broker, lane: kill(broker.inner, lane.inner)
