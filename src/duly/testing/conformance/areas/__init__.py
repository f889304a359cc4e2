"""What is tested, area by area, and which areas a broker or a store has to pass.

A capability adds an area; where it is absent another takes its place, which sees that what is
not provided is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from duly.broker import Knows, NotesRepeats
from duly.inspection.counting import Counting
from duly.inspection.erasing import Erasing
from duly.inspection.graves import Buries, Graveyard
from duly.inspection.steering import Forgetting, Steering
from duly.inspection.survey import Surveys
from duly.inspection.tracing import Remembering, Tracing
from duly.schedules import Ticking
from duly.testing.conformance.areas.admission import ExactlyOnce, Savepoints
from duly.testing.conformance.areas.burying import Burying
from duly.testing.conformance.areas.claims import Claims, Deaths, Receipts
from duly.testing.conformance.areas.commits import DoubtInTransactions, FaultsInTransactions
from duly.testing.conformance.areas.counted import Counted, Suppressed
from duly.testing.conformance.areas.crowds import (
    Crowds,
    CrowdsInTransactions,
    IdentityInCrowds,
    NoIdentityInCrowds,
)
from duly.testing.conformance.areas.cursor import ByCursor
from duly.testing.conformance.areas.delays import Delays, NoDelays
from duly.testing.conformance.areas.described import Page, StorePage, StorePageByClaim
from duly.testing.conformance.areas.durability import Durable, DurableInside, Forgetful, Restart
from duly.testing.conformance.areas.entrances import Entrances
from duly.testing.conformance.areas.erased import Erased
from duly.testing.conformance.areas.faults import Confirmed, Faults, Unconfirmed
from duly.testing.conformance.areas.graves import Graves, GravesDurably
from duly.testing.conformance.areas.histories import Histories
from duly.testing.conformance.areas.identity import Identity, NoIdentity
from duly.testing.conformance.areas.inbox import ByInbox
from duly.testing.conformance.areas.kills import Kills
from duly.testing.conformance.areas.known import Known
from duly.testing.conformance.areas.lanes import KeyLanes, NoKeyLanes
from duly.testing.conformance.areas.leases import Leases
from duly.testing.conformance.areas.limits import Limits
from duly.testing.conformance.areas.mending import (
    DurableMending,
    Mending,
    MendingHeldKeys,
    MendingInOrder,
    NoMending,
)
from duly.testing.conformance.areas.observing import NoObserving, Observing, States
from duly.testing.conformance.areas.once import HandedOutOnce
from duly.testing.conformance.areas.order import (
    HeldKeys,
    NoHeldKeys,
    NoOrder,
    NoOrderWithDelays,
    Order,
    OrderWithDelays,
)
from duly.testing.conformance.areas.outbox import Outboxes
from duly.testing.conformance.areas.parked import Parking, ParkingDurably
from duly.testing.conformance.areas.positions import NoPositions, Positions
from duly.testing.conformance.areas.publishing import Publishing
from duly.testing.conformance.areas.relay import Relaying
from duly.testing.conformance.areas.remembered import Forgotten, Remembered
from duly.testing.conformance.areas.settling import Inside, NoInside, Settling
from duly.testing.conformance.areas.steered import Steered
from duly.testing.conformance.areas.subscriptions import (
    NoReplays,
    Replays,
    Retention,
    Subscriptions,
    Waiting,
)
from duly.testing.conformance.areas.surveyed import Surveyed
from duly.testing.conformance.areas.survival import DurableStore, ForgetfulStore
from duly.testing.conformance.areas.ticked import Ticked, TickedDurably
from duly.testing.conformance.areas.traced import Traced
from duly.testing.conformance.areas.transactions import (
    ByClaimElsewhere,
    IntoTheLog,
    NoOutbox,
    Publications,
    Transactions,
    Within,
)
from duly.testing.conformance.areas.writers import ManyWriters, OneWriter
from duly.testing.conformance.page import Expected
from duly.testing.conformance.subject import BrokerSubject, StoreSubject

Area = type[Any]

EVERY_BROKER: tuple[Area, ...] = (
    Page,
    Publishing,
    Claims,
    Receipts,
    Deaths,
    Leases,
    Settling,
    Subscriptions,
    Waiting,
    Retention,
    Limits,
    Restart,
    Histories,
    Faults,
    Crowds,
    ExactlyOnce,
    FaultsInTransactions,
    CrowdsInTransactions,
)

# With the capability, and without it.
BY_CAPABILITY: dict[str, tuple[tuple[Area, ...], tuple[Area, ...]]] = {
    "identity_retention": ((Identity, IdentityInCrowds), (NoIdentity, NoIdentityInCrowds)),
    "delays": ((Delays,), (NoDelays,)),
    "delays_in_order": ((), (NoOrderWithDelays,)),
    "key_lanes": ((KeyLanes,), (NoKeyLanes,)),
    "replays": ((Replays,), (NoReplays,)),
    "orders_by_key": ((Order,), (NoOrder,)),
    "holds_keys": ((HeldKeys,), (NoHeldKeys,)),
    "durable": ((Durable,), (Forgetful,)),
    "confirms_settlement": ((Confirmed,), (Unconfirmed, DoubtInTransactions)),
    "hands_out_once": ((HandedOutOnce,), ()),
    "relays_once": ((Entrances,), ()),
    "is_log": ((Positions,), (NoPositions,)),
    "inspection": ((Inside, States), (NoInside,)),
    "mending": ((Mending,), (NoMending,)),
    "observing": ((Observing,), (NoObserving,)),
}

BY_CAPABILITIES: dict[tuple[str, ...], tuple[Area, ...]] = {
    ("orders_by_key", "delays", "delays_in_order"): (OrderWithDelays,),
    ("durable", "inspection"): (DurableInside,),
    ("orders_by_key", "mending"): (MendingInOrder,),
    ("holds_keys", "mending"): (MendingHeldKeys,),
    ("durable", "mending"): (DurableMending,),
}

# Of a broker that its subject says can do so.
BY_OPERATION: dict[Any, Area] = {
    Steering: Steered,
    Tracing: Traced,
    Erasing: Erased,
    Ticking: Ticked,
    Counting: Counted,
    Surveys: Surveyed,
    Knows: Known,
    NotesRepeats: Suppressed,
    Buries: Burying,
}

# Of a store that its subject says can do so.
BY_OPERATION_OF_A_STORE: dict[Any, Area] = {
    Remembering: Remembered,
    Forgetting: Forgotten,
    Graveyard: Graves,
}

EVERY_STORE: tuple[Area, ...] = (
    StorePage,
    ExactlyOnce,
    Savepoints,
    Transactions,
    ByInbox,
    ByCursor,
    ByClaimElsewhere,
    FaultsInTransactions,
    DoubtInTransactions,
    CrowdsInTransactions,
)


OF_SOME_STORES: tuple[Area, ...] = (
    Publications,
    Within,
    NoOutbox,
    DurableStore,
    ForgetfulStore,
    StorePageByClaim,
    IntoTheLog,
    Outboxes,
    Relaying,
    Parking,
    ParkingDurably,
    OneWriter,
    ManyWriters,
)


def every_area() -> Iterator[Area]:
    """All there are, whoever passes them."""
    yield from EVERY_BROKER
    for present, absent in BY_CAPABILITY.values():
        yield from (*present, *absent)
    for areas in BY_CAPABILITIES.values():
        yield from areas
    yield Kills
    yield from BY_OPERATION.values()
    yield TickedDurably
    yield from EVERY_STORE
    yield from BY_OPERATION_OF_A_STORE.values()
    yield GravesDurably
    yield from OF_SOME_STORES


def brokers(subject: BrokerSubject, expected: Expected) -> Iterator[Area]:
    """The areas of a broker that can what its page says."""
    yield from EVERY_BROKER
    for capability, (present, absent) in BY_CAPABILITY.items():
        if capability == "mending" and Buries in subject.operations:
            continue  # people's commands reach what is buried
        yield from present if expected.can.get(capability) else absent
    for both, areas in BY_CAPABILITIES.items():
        if all(expected.can.get(capability) for capability in both):
            yield from areas
    if subject.kill is not None:
        yield Kills
    for operation in subject.operations:
        if operation in BY_OPERATION:
            yield BY_OPERATION[operation]
    if Ticking in subject.operations and expected.can.get("durable"):
        yield TickedDurably


def stores(subject: StoreSubject, expected: Expected) -> Iterator[Area]:
    """The areas of a store that can what its page says."""
    yield from EVERY_STORE
    yield DurableStore if expected.can.get("durable") else ForgetfulStore
    if subject.broker is not None:
        yield StorePageByClaim
        yield IntoTheLog
    if expected.can.get("outbox"):
        yield Outboxes
        yield Relaying
    else:
        yield NoOutbox
    if expected.can.get("outbox") or subject.broker is not None:
        yield Publications
        yield Within
    if expected.can.get("parks"):
        yield Parking
        if expected.can.get("durable"):
            yield ParkingDurably
    yield OneWriter if expected.can.get("one_writer") else ManyWriters
    for operation in subject.operations:
        if operation in BY_OPERATION_OF_A_STORE:
            yield BY_OPERATION_OF_A_STORE[operation]
    if Graveyard in subject.operations and expected.can.get("durable"):
        yield GravesDurably
