"""What is published and consumed is what the broker can have, and never less."""

from __future__ import annotations

import itertools
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from duly import connect
from duly.broker import Capabilities
from duly.guarantees import Admission
from duly.testing.chaos.fitting import workload_on
from duly.testing.chaos.workload import KILLED_BY_MESSAGES, OF_A_LOG, SPECS, WAYS, Workload

# A queue that keeps no identities and no order, whose settlements are not confirmed.
QUEUE = Capabilities(
    "a queue",
    confirms_settlement=False,
    identity_retention=False,
    orders_by_key=False,
    delays=False,
    replays=False,
)
REFUSED = ("exactly-ordered", "least-ordered", "most", "most-lossy")


def test_a_publisher_repeats_itself():
    def first(seed: int) -> list[Any]:
        return list(itertools.islice(Workload().steps(seed, 0), 200))

    assert first(1) == first(1)
    assert first(1) != first(2)
    numbers = [item.n for step in first(1) for item in step.items]
    assert numbers == list(range(len(numbers)))
    assert {step.way for step in first(1)} == set(WAYS)


@pytest.mark.parametrize("url", ["memory://", "sqlite:///{}/a.db"])
def test_a_database_has_every_consumer_as_it_is(tmp_path: Path, url: str):
    with closing(connect.open_broker(url.format(tmp_path))) as broker:
        store = connect.open_store(None, broker)
        apart = connect.open_store(f"sqlite:///{tmp_path}/b.db", broker)
        assert store is not None
        assert apart is not None
        with closing(store), closing(apart):
            there = workload_on(broker, store, apart)
    assert list(there.specs) == list(SPECS)


def test_what_the_contract_refuses_is_left_out(tmp_path: Path):
    with (
        closing(connect.open_broker("memory://?kind=queue")) as broker,
        closing(_apart(tmp_path, broker)) as apart,
    ):
        there = workload_on(cast(Any, _Like(broker, QUEUE)), apart, apart)
    assert there == Workload(QUEUE, REFUSED)


class _Like:
    """A broker that can do no more than this."""

    def __init__(self, inner: Any, can: Capabilities) -> None:
        self.capabilities = can
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _apart(folder: Path, broker: Any) -> Any:
    return connect.open_store(f"sqlite:///{folder}/b.db", broker)


def test_beside_a_queue_all_effects_are_apart_and_repeats_are_the_inboxes():
    there = Workload(QUEUE, REFUSED)
    assert {spec.name for spec in there.specs} == {spec.name for spec in SPECS} - {*REFUSED}
    for spec in there.specs:
        assert spec.apart == spec.exactly
        assert spec.topic.guarantee == spec.guarantee, "nobody else drops a repeat"
        assert not spec.topic.partitions
        terms = there.terms(spec)
        assert (terms.drops_repeats, terms.confirms_settlement) == (False, False)
        assert not terms.keeps_attempts, "a retry whose settlement is lost is there twice"
    assert {*there.topics} == {"inputs", "lines", "plain-inputs"}
    steps = list(itertools.islice(there.steps(1, 0), 300))
    assert {step.topic.name for step in steps} == {*there.topics}
    assert {step.way for step in steps} == {*WAYS} - {"late", "view"}


def test_what_is_taken_off_for_good_is_judged_as_that(tmp_path: Path):
    """As RabbitMQ has it: a queue of their own, which loses what waits there with its server."""
    can = replace(QUEUE, hands_out_once=True)
    with (
        closing(connect.open_broker("memory://?kind=queue")) as broker,
        closing(_apart(tmp_path, broker)) as apart,
    ):
        there = workload_on(cast(Any, _Like(broker, can)), apart, apart)
    most = {spec.name: there.terms(spec) for spec in there.specs if "most" in spec.name}
    assert {*most} == {"most", "most-lossy"}
    assert all(terms.hands_out_once for terms in most.values())
    assert all("node down" in terms.loses_waiting for terms in most.values())


def test_every_process_of_a_round_finds_the_same(tmp_path: Path):
    assert Workload.kept_in(tmp_path) == Workload()
    Workload(QUEUE, REFUSED).keep_in(tmp_path)
    assert Workload.kept_in(tmp_path) == Workload(QUEUE, REFUSED)


LOG = Capabilities("a log", is_log=True, identity_retention=False, delays=False, relays_once=True)


def test_a_log_has_consumers_by_its_positions_and_into_itself():
    there = Workload(LOG)
    by_name = {spec.name: spec for spec in there.specs}
    assert by_name.keys() == {spec.name for spec in (*SPECS, *OF_A_LOG)}
    terms = {name: there.terms(spec) for name, spec in by_name.items()}
    assert terms["exactly"].admission is Admission.BY_INBOX
    assert terms["cursor"].admission is Admission.BY_CURSOR
    assert terms["copied"].admission is Admission.BY_CLAIM
    assert [name for name, each in terms.items() if each.repeats_count] == [
        spec.name for spec in OF_A_LOG
    ]
    assert not by_name["copied"].apart
    assert by_name["copied"].tables == ("one_copied", "two_copied")
    assert all(spec.topic.partitions for spec in there.specs), "several work on each"
    assert not terms["most"].keeps_send_order, "what has no key goes to any partition"
    assert terms["least-ordered"].keeps_send_order
    assert not terms["most-lossy"].confirms_publishing


@pytest.mark.parametrize("can", [None, QUEUE, LOG])
def test_soon_each_topic_has_what_kills_its_worker(can: Capabilities | None):
    """A run that is too short for chance has it too; on a log, where a death takes long, once."""
    there = Workload() if can is None else Workload(can)
    deadly = {spec.topic.name for spec in there.specs if spec.name in KILLED_BY_MESSAGES}
    steps = list(itertools.islice(there.steps(1, 0), 60))
    found = [s.topic.name for s in steps for item in s.items if item.manner == "kill"]
    assert deadly <= {*found}
    if can is LOG:
        assert sorted(found) == sorted(deadly)
        assert all(
            i.manner != "kill" for s in itertools.islice(there.steps(1, 1), 600) for i in s.items
        )
