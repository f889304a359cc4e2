"""Which consumers a broker can have: those that its contract does not refuse, and a judge can
follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import duly
from duly.broker import Broker
from duly.contract import contract_of
from duly.errors import ContractRefused
from duly.store import Store
from duly.testing.chaos.workload import Spec, Workload


def workload_on(
    broker: Broker, store: Store, apart: Store, alone: Callable[[], Store | None] = lambda: None
) -> Workload:
    """What is to be published and consumed there. ``store`` has the effects beside the messages,
    where there can be any; ``alone`` makes the broker one that publishes by its own transactions,
    where it can.
    """
    every = Workload(broker.capabilities)
    publishing = alone()
    refused = []
    for spec in every.specs:
        there = publishing if spec.copies else apart if spec.apart else store
        if there is None or not _is_kept(every, spec, broker, there):
            refused.append(spec.name)
    return Workload(every.can, tuple(refused))


def _is_kept(workload: Workload, spec: Spec, broker: Broker, store: Store) -> bool:
    can = workload.can
    if spec.copies:
        can = replace(can, database=store.capabilities.database)
    app = duly.App("fitting", broker, store)
    declare: Any = app.batch_consumer if spec.batch_handler else app.consumer
    declare(spec.topic, name=spec.name, guarantee=spec.guarantee, **spec.options())(_like(spec))
    try:
        contract_of(can, store.capabilities, app.topics, app.consumers)
    except ContractRefused:
        return False
    return True


def _like(spec: Spec) -> Callable[..., Any]:
    """A handler of the same shape as the one that will be there."""

    def plain(item: Any) -> None: ...

    async def async_plain(item: Any) -> None: ...

    def effects(item: Any, tx: Any) -> None: ...

    async def async_effects(item: Any, tx: Any) -> None: ...

    if spec.exactly:
        return async_effects if spec.concurrency else effects
    return async_plain if spec.concurrency else plain
